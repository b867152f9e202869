"""bench attention: the rows say what was measured, and a wrong output is never timed."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx import cli
from veloxquant_mlx.benchmarks import attention, llama, quality


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
            known = quality.table().get(row["method"])
            assert row["perplexity_increase"] == (known and known["perplexity_increase"])
            assert row["kl"] == (known and known["kl"])
            assert row["baseline"] == min(exact, key=exact.get)
            assert row["speedup"] == pytest.approx(row["baseline_us"] / row["us"], abs=0.01)
            assert 0 < row["us_p10"] <= row["us"] and row["gbps"] > 0 and row["read_gbps"] > 0
    long = {row["method"]: row for row in rows if row["context"] == 1024}
    assert "look-ups" in long["vecinfer 2 bits"]["kernel"]  # of bytes or in registers
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
    [
        ("--shapes", "32x128"),
        ("--shapes", "9/2x64"),
        ("--contexts", "0"),
        ("--methods", "turbo"),
        ("--rounds", "0"),
        ("--backend", "metal"),
    ],
)
def test_wrong_arguments(option, value, capsys):
    assert cli.main(["bench", "attention", option, value]) == 2
    assert option in capsys.readouterr().err


def test_cuda_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "veloxquant", None)  # as where it is not installed
    assert cli.main(["bench", "attention", "--backend", "cuda"]) == 2
    assert "wanted `pip install" in capsys.readouterr().err


def test_every_figure_is_of_a_setting_that_is_timed_and_says_how_it_was_measured():
    timed = {"mlx fp32", "mlx fp16", "mlx_lm 4 bits", *attention.METHODS, *(f"llama.cpp {t}" for t in llama.TYPES)}
    # By veloxquant.bench:
    timed |= {f"vecinfer 2 bits{how}, int8 tables" for how in ("", ", tables by lane", ", a table a head")}
    timed |= {f"vecinfer 4 bits{how}" for how in (", tables by lane", ", a table a head")}
    for name, entry in quality.table().items():
        assert name.removesuffix(", 16-bit look-ups") in timed
        assert entry["windows"] >= 1 and entry["kl"] >= 0
        assert "veloxquant eval" in entry["command"] or name == "mlx fp32"


def test_a_setting_that_nobody_measured_has_no_figure(monkeypatch):
    assert quality.text(quality.fields("vecinfer 2 bits")) == "+1.79 %, 0.0208"
    assert quality.text(quality.fields("mlx fp32", ours=False)) == "reference"
    unknown = quality.fields("vecinfer 2 bits d2x16")
    assert quality.text(unknown) == quality.NOT_MEASURED == "not measured"
    assert all(value is None for field, value in unknown.items() if field != "setting")
    monkeypatch.setenv("VELOXQUANT_LOOKUPS", "registers")
    fast = quality.fields("vecinfer 2 bits")
    assert fast["setting"] == "vecinfer 2 bits, 16-bit look-ups" and quality.text(fast) == "not measured"
    assert quality.text(quality.fields("mlx fp32", ours=False)) == "reference"


@pytest.mark.parametrize("entry", [{}, {"perplexity_increase": 0.1, "kl": 0.1, "windows": 8}, {"kl": "little"}])
def test_a_figure_without_its_command_is_refused(entry, tmp_path):
    file = tmp_path / "quality.json"
    file.write_text(json.dumps({"settings": {"vecinfer 2 bits": entry}}))
    with pytest.raises(ValueError, match="vecinfer 2 bits.*wanted perplexity_increase, kl, windows, command"):
        quality.table(file)


def test_rows_in_words_pair_speed_and_quality(capsys):
    arguments = ["--shapes", "4/2x64", "--contexts", "128", "--methods", "vecinfer 2 bits,vecinfer 1 bit"]
    assert cli.main(["bench", "attention", *arguments, "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (two,) = [line for line in lines if "vecinfer 2" in line]
    (one,) = [line for line in lines if "vecinfer 1" in line]
    assert "+1.79 %" in two and "not" in one and "%," not in one


def test_llama_needs_its_library(monkeypatch, tmp_path):
    monkeypatch.setenv("VELOXQUANT_CACHE", str(tmp_path))
    llama.library.cache_clear()
    with pytest.raises(FileNotFoundError, match="wanted the result of llama.build"):
        llama.library()


def test_a_library_that_does_not_build_says_where_the_log_is(monkeypatch, tmp_path):
    monkeypatch.setenv("VELOXQUANT_CACHE", str(tmp_path))
    (llama._folder() / "ggml").mkdir(parents=True)  # without a CMakeLists.txt
    with pytest.raises(RuntimeError, match="cmake failed with status 1.*build.log"):
        llama.build()
    assert "CMakeLists.txt" in (llama._folder() / "build.log").read_text()


def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VELOXQUANT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    (llama._folder() / "ggml").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="llama.cpp: got no program 'cmake' on PATH"):
        llama.build()


@pytest.mark.skipif(not llama.built().exists(), reason="made by `veloxquant bench attention --llama`")
def test_llama_rows(capsys):
    llama.library.cache_clear()
    arguments = ["--shapes", "4/2x64", "--contexts", "128,1000", "--methods", "fp16", "--llama", "--threads", "2"]
    assert cli.main(["bench", "attention", *arguments, "--rounds", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    bits = {row["method"]: row["bits"] for row in rows}
    assert (bits["llama.cpp f16"], bits["llama.cpp q8_0"], bits["llama.cpp q4_0"]) == (16, 8.5, 4.5)
    exact = {"mlx fp32", "mlx fp16", "llama.cpp f16", "fp16"}
    assert all(row["baseline"] in exact for row in rows)
    assert all(0 < row["error"] <= 0.02 for row in rows if row["method"].startswith("llama.cpp"))


@pytest.mark.skipif(not llama.built().exists(), reason="made by `veloxquant bench attention --llama`")
def test_llama_holds_what_it_was_given():
    llama.library.cache_clear()
    random = np.random.default_rng(1)
    q, keys, values = (random.standard_normal(shape, np.float32) for shape in ((4, 1, 64), (2, 70, 64), (2, 70, 64)))
    # Half a step of the format, of the largest value; q4_0's levels are -8 to 7 eighths: a whole one at its end.
    # 2^-11: fp16, of values or of the scale.
    for kind, step in (("f16", 0), ("q8_0", 0.5 / 127), ("q4_0", 1 / 8)):
        attend = llama.Attention(kind, q, keys, values, 0.125, 1)
        for held, given in zip(attend.held(), (keys, values)):
            assert 0 < np.abs(held - given).max() <= (step + 2**-11) * np.abs(given).max()
    with pytest.raises(ValueError, match="got a cache of 'q9', wanted one of f16"):
        llama.Attention("q9", q, keys, values, 0.125, 1)
