"""`veloxquant bench kernels`: rows that say what the issue asks for, and refuse wrong results."""

import json

import mlx.core as mx
import pytest

from veloxquant_mlx import cli
from veloxquant_mlx.benchmarks import kernels, measure

FIELDS = {"function", "shape", "backend", "simd", "us", "baseline", "baseline_us", "speedup", "gbps"} | {
    "fraction_of_copy",
    "us_1_thread",
    "speedup_1_thread",
    "threads",
    "copy_us",
    "baselines_us",
    "seed_row",
}


def test_json_rows_and_chart(capfd, tmp_path):
    plot = tmp_path / "kernels.png"
    arguments = ["bench", "kernels", "--json", "--tokens", "64", "--rounds", "1", "--only", "vecinfer_dequant"]
    assert cli.main([*arguments, "--plot", str(plot)]) == 0
    (row,) = json.loads(capfd.readouterr().out)["rows"]
    assert set(row) == FIELDS
    assert row["function"] == "vecinfer_dequant_metal" and row["us"] > 0 and len(row["baselines_us"]) >= 2
    assert row["baseline_us"] == min(row["baselines_us"].values())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_on_a_gpu_rows_say_so_and_count_no_threads(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "on_gpu", lambda: True)
    arguments = ["bench", "kernels", "--tokens", "64", "--rounds", "1", "--only", "vecinfer_dequant"]
    assert cli.main([*arguments, "--json", "--plot", str(tmp_path / "kernels.png")]) == 0
    (row,) = json.loads(capfd.readouterr().out)["rows"]
    assert set(row) == FIELDS and row["backend"] == "gpu" and row["simd"] == mx.device_info()["device_name"]
    assert row["threads"] is row["us_1_thread"] is row["speedup_1_thread"] is None and row["copy_us"] > 0
    assert cli.main(arguments) == 0
    assert "threads" not in capfd.readouterr().out


def test_every_function_agrees_with_every_formulation():
    for case in kernels.cases(tokens=64):
        assert len(case.formulations) >= 2, case.function
        ours = case.ours()
        mx.eval(ours)
        for formulation in case.formulations.values():
            case.check(ours, formulation())


def test_a_wrong_result_is_no_benchmark():
    case = measure.Case(
        "wrong", "4", lambda: mx.zeros(4), {"a": lambda: mx.zeros(4), "b": lambda: mx.ones(4)}, measure.equal, 32
    )
    with pytest.raises(RuntimeError, match="wrong against 'b'"):
        measure.row(case, 1)


@pytest.mark.parametrize("arguments", [["--tokens", "3"], ["--rounds", "0"], ["--only", "nothing"]])
def test_wrong_arguments(arguments, capfd):
    assert cli.main(["bench", "kernels", "--tokens", "64", *arguments]) == 2
    assert arguments[0] in capfd.readouterr().err
