"""bench generate: every cache reads the same text, and the rows say what was measured."""

import json
import math

import pytest
import tiny_model

from veloxquant_mlx import cli
from veloxquant_mlx.benchmarks import attention, generate
from veloxquant_mlx.cli.methods import CacheMethod
from veloxquant_mlx.models import load_model


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("bench") / "model")


def test_rows(model_directory, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    arguments = ["bench", "generate", str(model_directory), "--method", "exact,fp16,turboquant", "--bits", "2"]
    arguments += ["--contexts", "700,1400", "--steps", "3", "--text", str(text), "--json"]
    assert cli.main(arguments) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [(row["method"], row["context"]) for row in rows] == [
        (method, context) for context in (700, 1400) for method in ("exact", "fp16", "turboquant 2 bits")
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0 and row["n_steps"] == 3
        assert row["prefill_peak_bytes"] > 0
    at = {(row["method"], row["context"]): row for row in rows}
    # 512 + 188 tokens, 3 decoded, then 697 more in chunks of 512: the first chunk is not scored.
    assert at["fp16", 700]["scored_tokens"] == 188 and at["fp16", 1400]["scored_tokens"] == 188 + 697
    for context in (700, 1400):
        exact, fp16, codes = (at[name, context] for name in ("exact", "fp16", "turboquant 2 bits"))
        # A random model is very sure of wrong tokens: its perplexity is huge, so logarithms are compared.
        assert math.log(fp16["perplexity"]) == pytest.approx(math.log(exact["perplexity"]), rel=1e-3)
        assert codes["perplexity"] != fp16["perplexity"]
        assert codes["cache_bytes"] < fp16["cache_bytes"] and codes["bits"] == 2.25


def test_a_cache_that_forgets_shows_in_its_perplexity(model_directory):
    class Forgets(CacheMethod):
        def build(self, model, strict=False):
            caches = super().build(model, strict)
            for cache in caches:
                read = cache.update_and_fetch
                cache.update_and_fetch = lambda k, v, read=read: read(k, 0 * v)
            return caches

    model, _ = load_model(str(model_directory), lambda fraction, what: None)
    tokens = [7 * i % 250 for i in range(800)]
    rows = generate.rows(model, tokens, [700], {"right": CacheMethod("fp16"), "wrong": Forgets("fp16")}, 1)
    assert abs(rows[1]["perplexity"] / rows[0]["perplexity"] - 1) > 0.01


def test_stack(capfd):
    arguments = ["bench", "generate", "--stack", "128,600", "--stack-shape", "4/2x64", "--steps", "2", "--json"]
    assert cli.main([*arguments, "--stack-methods", "fp16,vecinfer 2 bits,turboquant 4 bits"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row["context"] for row in rows] == [128] * 3 + [600] * 3
    for row in rows:
        assert row["attend_ms"] > 0 and row["append_ms"] > 0 and row["steps_per_s"] > 0
        assert row["append_share"] == pytest.approx(row["append_ms"] / row["attend_ms"], rel=0.02)
    long = {row["method"]: row for row in rows if row["context"] == 600}
    assert long["vecinfer 2 bits"]["cache_bytes"] < long["fp16"]["cache_bytes"]


@pytest.mark.parametrize(
    "option, value",
    [("--contexts", "2048,1024"), ("--contexts", "0"), ("--steps", "0"), ("--method", "none"), ("--stack", "x")],
)
def test_wrong_arguments(option, value, capfd):
    assert cli.main(["bench", "generate", option, value]) == 2
    assert option in capfd.readouterr().err


def test_every_method_has_codecs():
    for name in attention.METHODS:
        keys, values = attention.codecs(name, 2, 64)
        assert keys.head_dim == values.head_dim == 64
