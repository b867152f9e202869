"""Degenerate keys and values: finite results or one clear error, for every method and for all that is fitted."""

import methods
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_model as tiny

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.vecinfer import calibrate
from veloxquant_mlx.cache.base import KVCacheBuilder
from veloxquant_mlx.cache.fitting import ENTRIES, PER, Fitting, fit_learned, fit_tables
from veloxquant_mlx.evaluate import evaluate

KINDS = ["constant channels", "zero", "one token repeated", "not finite", "huge", "tiny"]


def degenerate(kind, n, heads=tiny.N_KV_HEADS, dim=tiny.HEAD_DIM):
    x = np.random.default_rng(3).standard_normal((heads, n, dim)).astype(np.float32)
    if kind == "constant channels":
        x[..., ::3] = 2.5
    elif kind == "zero":
        x[:] = 0
    elif kind == "one token repeated":
        x[:] = x[:, :1]
    elif kind == "not finite":
        x[0, n // 2, 3], x[-1, n // 3, 1] = np.nan, np.inf
    elif kind == "huge":
        x *= 2e4
    elif kind == "tiny":
        x *= 1e-7
    return x


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return mlx_lm.load(str(tiny.save(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_caches(loaded, name, kind):
    """Attention over what was stored, in every layer's cache, and what it decodes to."""
    cache = KVCacheBuilder.build(loaded[0], methods.config(name, loaded[0], window=0, sinks=0))[0]
    x = mx.array(degenerate(kind, 200)[None])
    q = mx.array(np.random.default_rng(4).standard_normal((1, tiny.N_HEADS, 100, tiny.HEAD_DIM)), mx.float32)
    for start in (0, 100):
        keys, values = cache.update_and_fetch(x[:, :, start : start + 100], x[:, :, start : start + 100])
        cache.observe_queries(q)
        out, lse = _ext.attend(q, keys, values, scale=0.125, causal=True)
        assert mx.isfinite(out).all().item() and mx.isfinite(lse).all().item()
    keys, values = cache.update_and_fetch(x[:, :, :1], x[:, :, :1])  # adaptive: after its fit
    for side in (keys, values):
        assert mx.isfinite(side.dequantize()).all().item()
    if kind == "not finite":
        assert cache.nonfinite > 0


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("n", [1, 2, 40, 600])
@pytest.mark.parametrize("kind", KINDS)
def test_fits(kind, n, per, entries):
    """Fewer vectors than centroids too."""
    x = mx.array(degenerate(kind, n))
    how = Fitting.of_bits(2, tiny.HEAD_DIM, per=per, entries=entries, max_iterations=3)
    queries = mx.array((degenerate(kind, 50) ** 2).mean(axis=1))  # not finite where x is not
    if kind == "not finite" and n == 1:
        with pytest.raises(ValueError, match="no token of head [01] is finite"):
            fit_learned("keys", x, how, queries)
        return
    transform, tables, errors = fit_learned("keys", x, how, queries)
    for array in (tables, *transform, *transform.matrices().values()):
        assert mx.isfinite(array).all().item()
    assert np.isfinite(errors).all()
    tables, errors = fit_tables("keys", x, how)
    assert mx.isfinite(tables).all().item() and np.isfinite(errors).all()


@pytest.mark.parametrize("transform", ["hadamard", "learned"])
def test_calibration_on_one_token(loaded, transform):
    model, tokenizer = loaded
    factors, codebook = calibrate(model, tokenizer, texts=["a"], transform=transform)
    assert np.isfinite(factors).all() and np.isfinite(codebook.keys).all() and np.isfinite(codebook.values).all()
    with pytest.raises(ValueError, match="got no text at all"):
        calibrate(model, tokenizer, texts=[], transform=transform)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_prompt_of_one_token(loaded, name):
    model, _ = loaded
    config = methods.config(name, model, window=0, sinks=0, strict=True)
    scores = evaluate(model, np.array([[7] * 130]), {name: lambda: KVCacheBuilder.build(model, config)})
    assert np.isfinite([scores[name].ppl, scores[name].kl]).all()
    caches = KVCacheBuilder.build(model, config)
    assert mx.isfinite(model(mx.array([[7]]), cache=caches)).all().item()
