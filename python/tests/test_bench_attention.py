"""bench attention: the rows say what was measured, and a wrong output is never timed."""

import json

import mlx.core as mx
import pytest

from veloxquant_mlx import cli
from veloxquant_mlx.benchmarks import attention


def test_rows(capsys, tmp_path):
    plot = tmp_path / "attention.png"
    arguments = ["bench", "attention", "--shapes", "4/2x64", "--contexts", "128,1024", "--methods", "all"]
    assert cli.main([*arguments, "--rounds", "2", "--json", "--plot", str(plot)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert plot.stat().st_size > 0
    names = {"mlx fp32", "mlx fp16", "mlx_lm 4 bits", *attention.METHODS}
    for context in (128, 1024):
        here = {row["method"]: row for row in rows if row["context"] == context}
        assert here.keys() == names
        exact = {name: here[name]["us"] for name in ("mlx fp32", "mlx fp16", "fp16")}
        for row in here.values():
            assert row["baseline"] == min(exact, key=exact.get)
            assert row["speedup"] == pytest.approx(row["baseline_us"] / row["us"], abs=0.01)
            assert row["us"] > 0 and row["gbps"] > 0 and row["read_gbps"] > 0
    long = {row["method"]: row for row in rows if row["context"] == 1024}
    assert "byte look-ups" in long["vecinfer 2 bits"]["kernel"]
    assert long["vecinfer 2 bits"]["bits"] == 2 and long["vecinfer 4 bits d1x16"]["bits"] == 4
    # 16-bit look-ups in registers round to some 1e-4.
    assert all(row["error"] <= 1e-3 for row in rows if row["method"] in attention.METHODS)
    assert all(
        " codes (" in row["kernel"] for name, row in long.items() if name in attention.METHODS and name != "fp16"
    )


def test_a_wrong_output_stops_the_run(monkeypatch):
    right = attention._sdpa
    monkeypatch.setattr(attention, "_sdpa", lambda q, k, v: right(q, k, v) * (1 + 0.01 * (k.dtype == mx.float32)))
    with pytest.raises(RuntimeError, match="relative error"):
        attention.rows(attention.Shape(4, 2, 64), 256, ["fp16"], 1)


@pytest.mark.parametrize(
    "option, value",
    [("--shapes", "32x128"), ("--shapes", "9/2x64"), ("--contexts", "0"), ("--methods", "turbo"), ("--rounds", "0")],
)
def test_wrong_arguments(option, value, capsys):
    assert cli.main(["bench", "attention", option, value]) == 2
    assert option in capsys.readouterr().err
