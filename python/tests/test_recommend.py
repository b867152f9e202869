"""Errors by layer, and the setting that veloxquant recommends for a budget."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny_model as tiny

from veloxquant_mlx import cli
from veloxquant_mlx.allocators.vecinfer import calibrate
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.kv_cache import shared_nbytes
from veloxquant_mlx.cli import recommend, scores
from veloxquant_mlx.layer_errors import layer_errors
from veloxquant_mlx.models import load_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("recommend") / "model"))


@pytest.fixture(scope="module")
def loaded(directory):
    return load_model(directory)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VELOXQUANT_CACHE", str(tmp_path / "cache"))


def run(capsys, *arguments):
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_errors_by_layer_are_those_of_the_codes(loaded):
    model, tokenizer = loaded
    text = ["a sentence that says little, again and again, in other words: " * 40]
    _, (fine, coarse) = calibrate(model, tokenizer, [4, 1], texts=text, num_tokens=1500, transform="learned")
    tokens = tokenizer.encode(text[0])[:600]

    def errors(**options):
        return layer_errors(model, tokens, KVCacheBuilder.build(model, KVCacheConfig(**options)))

    four, one, exact = errors(codebook=fine), errors(codebook=coarse), errors(method="fp16")
    assert [e.layer for e in four] == list(range(tiny.N_LAYERS))
    for a, b, c in zip(four, one, exact):
        assert c.score < 0.05 * a.score and c.value < 1e-5  # 16-bit rounding
        assert 0 < a.score < b.score and 0 < a.value and 0 < b.value < 1
    # In the first layer the values of the same byte are the same: both tables have a centroid for each.
    assert four[-1].value < one[-1].value

    # The values, computed by hand from what one cache was given and holds.
    caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=coarse))
    given = {}
    original = caches[0].update_and_fetch
    caches[0].update_and_fetch = lambda k, v: given.update(v=v) or original(k, v)
    mx.eval(model(mx.array(tokens)[None], cache=caches))
    start, stop = caches[0].packed_range
    assert start == 4 and stop > 400
    v, held = (np.array(x)[:, :, start:stop] for x in (given["v"], caches[0].fetch()[1].dequantize()))
    assert one[0].value == pytest.approx(((v - held) ** 2).sum() / (v**2).sum(), rel=1e-4)


def test_errors_by_layer_of_too_few_tokens(loaded):
    model, _ = loaded
    with pytest.raises(ValueError, match="tokens: got 50, wanted more"):
        layer_errors(model, [1] * 50, KVCacheBuilder.build(model, KVCacheConfig(method="fp16")))


@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (1, 1)])
def test_the_bytes_are_those_of_a_real_cache(loaded, bits):
    model, tokenizer = loaded
    _, codebook = calibrate(model, tokenizer, bits, texts=["some words " * 200], num_tokens=600, transform="learned")
    caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook))
    mx.eval(model(mx.array([5] * 777)[None], cache=caches))
    found = {c.bits: c for c in recommend.candidates(model, 777, 1e12, 64, 4, {})}
    assert found[bits].cache_bytes == sum(c.nbytes for c in caches)
    assert found[bits].shared_bytes == shared_nbytes(caches)


def test_an_evaluated_model_goes_by_its_evaluations(capsys, loaded, directory):
    model, _ = loaded
    context = 100_000
    sizes = {c.bits: c.cache_bytes + c.shared_bytes for c in recommend.candidates(model, context, 1, 64, 4, {})}
    budget = str((sizes[(3, 3)] + 1000) / 1e9)
    for name, kl in (("3/3", 0.02), ("2/2", 0.01), ("1/1", 0.2)):  # 2 bits better than 3: the record decides
        file = scores._file(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(stored | {name: {"ppl_increase": kl, "kl": kl}}))
    code, out, err = run(capsys, "recommend", directory, "--context", str(context), "--memory", budget, "--json")
    assert code == 0, err
    fields = json.loads(out)
    assert (fields["choice"], fields["basis"]) == ("vecinfer 2 bits", "evaluated")
    fits = {c["setting"]: c["fits"] for c in fields["candidates"]}
    assert fits["vecinfer 3 bits"] and not fits["vecinfer 4 bits"] and not fits["fp16"]


def test_eval_records_what_recommend_reads(capsys, loaded, directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    artifacts = str(tmp_path / "artifacts")
    arguments = ["--text", str(text), "--tokens", "512", "--transform", "learned", "-o", artifacts]
    assert run(capsys, "calibrate", directory, *arguments)[0] == 0
    arguments = ["--text", str(text), "--artifacts", artifacts, "--windows", "1", "--length", "400", "--json"]
    code, out, err = run(capsys, "eval", directory, *arguments)
    assert code == 0, err
    kept = json.loads(out)["kl"]
    assert scores.known(loaded[0])[(2.0, 2.0)]["kl"] == kept
    # Tables that sub-vectors share are another setting, and so is another window.
    shared = str(tmp_path / "shared")
    arguments_of_shared = ["--text", str(text), "--tokens", "512", "--codebook-per", "lane", "-o", shared]
    assert run(capsys, "calibrate", directory, *arguments_of_shared)[0] == 0
    assert run(capsys, "eval", directory, *arguments, "--artifacts", shared)[0] == 0
    assert scores.known(loaded[0])[(2.0, 2.0)]["kl"] == kept
    code, out, err = run(capsys, "eval", directory, *arguments, "--window", "0", "--sinks", "0")
    assert code == 0 and json.loads(out)["kl"] != kept
    assert scores.known(loaded[0])[(2.0, 2.0)]["kl"] == kept


def test_a_model_without_evaluations_is_tried_and_called_estimated(capsys, directory, monkeypatch):
    monkeypatch.setattr(recommend.calibration, "QUICK_TOKENS", 1024)
    monkeypatch.setattr(recommend, "MEASURED", 2)
    context, budget = 100_000, 0.0125
    arguments = ["recommend", directory, "--context", str(context), "--memory", str(budget)]
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    fields = json.loads(out)
    assert fields["basis"] == "estimated"
    tried = {c["setting"]: c["estimated_error"] for c in fields["candidates"] if c["estimated_error"] is not None}
    assert len(tried) == 2 and fields["choice"] == min(tried, key=tried.get)
    code, out, err = run(capsys, *arguments)
    assert code == 0 and "estimated" in out + err and "> vecinfer" in out


@pytest.mark.parametrize("arguments, message", [
    (["--context", "0", "--memory", "1"], "--context: got 0"),
    (["--context", "10", "--memory", "-1"], "--memory: got -1"),
    (["--context", "10", "--memory", "nan"], "--memory: got nan"),
])  # fmt: skip
def test_wrong_budgets(capsys, directory, arguments, message):
    code, _, err = run(capsys, "recommend", directory, *arguments)
    assert code == 2 and message in err


def test_nothing_fits(capsys, directory):
    code, out, err = run(capsys, "recommend", directory, "--context", "100000", "--memory", "0.0001")
    assert code == 1 and "nothing fits" in err and "no" in out
