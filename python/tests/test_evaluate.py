"""The evaluation protocol, on a small random model."""

import json
import math
import sys
import types

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from tiny_model import save

from veloxquant_mlx import cli
from veloxquant_mlx.evaluate import LogProbs, bits_per_element, cache_bytes, evaluate, mean_kl, read_windows
from veloxquant_mlx.models import kv_elements_per_token, load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save(tmp_path_factory.mktemp("model"))))


class NoisyCache(KVCache):
    """An exact cache with an error in every value."""

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(keys, values + 0.1 * mx.sin(1000 * values))


def test_windows_are_the_first_tokens(loaded):
    _, tokenizer = loaded
    windows = read_windows(tokenizer, "abcdefghijk", 2, 5)
    assert windows.shape == (2, 5)
    assert tokenizer.decode(windows.ravel().tolist()) == "abcdefghij"


def test_a_short_text_is_refused(loaded):
    with pytest.raises(ValueError, match="text: got 3 tokens, wanted at least 10"):
        read_windows(loaded[1], "abc", 2, 5)


def test_perplexity_is_that_of_a_plain_forward_pass(loaded):
    model, tokenizer = loaded
    windows = read_windows(tokenizer, "The quick brown fox jumps over the lazy dog. " * 20, 2, 300)
    score = evaluate(model, windows, {"exact": lambda: make_prompt_cache(model)})["exact"]

    logits = np.array(model(mx.array(windows)), np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, windows[:, 1:, None], -1).mean()
    assert score.tokens == 2 * 299
    assert score.ppl == pytest.approx(math.exp(nll), rel=1e-5)
    assert (score.ppl_exact, score.kl, score.top1) == (score.ppl, 0.0, 1.0)


def test_kl_and_top1_are_against_the_exact_cache(loaded):
    model, tokenizer = loaded
    windows = read_windows(tokenizer, "Pack my box with five dozen liquor jugs. " * 20, 2, 300)
    score = evaluate(model, windows, {"noisy": lambda: [NoisyCache() for _ in model.layers]})["noisy"]

    kl, same = [], []
    for window in windows:
        p, q = (
            LogProbs(model, window, caches).rows(0, 299)
            for caches in (make_prompt_cache(model), [NoisyCache() for _ in model.layers])
        )
        kl.append((p[0].astype(np.float64) * (p[1] - q[1])).sum(-1).mean())
        same.append((p[1].argmax(-1) == q[1].argmax(-1)).mean())
    assert score.kl > 1e-4 and score.top1 < 1
    assert score.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert score.top1 == pytest.approx(np.mean(same))


def test_log_probabilities_from_a_later_position(loaded):
    model, tokenizer = loaded
    tokens = tokenizer.encode("Sphinx of black quartz, judge my vow.")
    whole = LogProbs(model, tokens, make_prompt_cache(model))
    end = LogProbs(model, tokens, make_prompt_cache(model), start=10)
    # Read in two passes: another number of rows may round differently in the last bit.
    np.testing.assert_allclose(end.rows(0, 5)[1], whole.rows(10, 15)[1], rtol=1e-4, atol=1e-5)
    assert mean_kl(end, end) == 0.0


def test_bytes_and_bits_of_mlx_lm_caches(loaded):
    model, tokenizer = loaded
    tokens = mx.array([tokenizer.encode("x" * 256)])
    exact = make_prompt_cache(model)
    packed = [cache.to_quantized(group_size=64, bits=4) for cache in make_prompt_cache(model)]
    for caches, bits in ((exact, 32.0), (packed, 4 + 2 * 32 / 64)):  # fp32 model: fp32 scale and bias per 64
        model(tokens, cache=caches)
        assert bits_per_element(caches) == bits
        assert cache_bytes(caches) == 256 * kv_elements_per_token(model) * bits / 8


def test_cuda_says_what_it_needs(monkeypatch, capsys):
    arguments = ["eval", "smollm2", "--text", "none.txt", "--backend"]
    assert cli.main([*arguments, "metal"]) == 2
    assert "--backend: got 'metal', wanted cpu or cuda" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "veloxquant", None)  # as where it is not installed
    assert cli.main([*arguments, "cuda"]) == 2
    assert "wanted `pip install" in capsys.readouterr().err


def test_cuda_gets_the_settings_that_were_asked_for(monkeypatch, capsys):
    asked = {}

    def compare(model, text, settings, calibration, windows, length, report):
        asked.update(settings=settings, text=text, calibration=calibration, windows=windows)
        return {"exact": {"ppl": 10.0}}

    package = types.ModuleType("veloxquant")
    package.eval = types.SimpleNamespace(
        COMPARED="all", settings_of=lambda text: text, compare=compare, Error=ValueError
    )
    monkeypatch.setitem(sys.modules, "veloxquant", package)
    monkeypatch.setitem(sys.modules, "veloxquant.eval", package.eval)
    arguments = ["eval", "folder", "--text", "t.txt", "--backend", "cuda", "--calibration", "c.txt", "--json"]
    assert cli.main([*arguments, "--compare", "vecinfer2,vecinfer4/2", "--codebook-per", "lane"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == {"exact": {"ppl": 10.0}}
    assert asked["settings"] == "2/2:lane:learned,4/2:lane:learned"
    assert (asked["text"], asked["calibration"], asked["windows"]) == ("t.txt", "c.txt", 8)
    assert cli.main(arguments) == 0 and asked["settings"] == "all"
    assert cli.main([*arguments, "--compare", "qjl2"]) == 2
    assert "wanted vecinfer alone" in capsys.readouterr().err
    assert cli.main([*arguments, "--window", "128"]) == 2
    assert "--backend: got cuda with --window 128, wanted that with cpu alone" in capsys.readouterr().err
