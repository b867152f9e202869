"""Speculative decoding: our caches for the target and the draft in one list, rewound after each step."""

import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_model as tiny

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codecs import exact, vecinfer

generate = sys.modules["mlx_lm.generate"]


@pytest.mark.parametrize("method", ["fp16", "vecinfer"])
def test_a_model_as_its_own_draft(tmp_path, tables, method):
    model, _ = mlx_lm.load(str(tiny.save(tmp_path / "tiny")))
    config = KVCacheConfig(method=method, codebook=tables if method == "vecinfer" else None, strict=True)
    prompt = mx.array(np.random.default_rng(1).integers(0, 256, 200))
    plain = KVCacheBuilder.build(model, config)
    tokens = [t for t, _ in generate.generate_step(prompt, model, max_tokens=120, prompt_cache=plain)]
    caches = KVCacheBuilder.build(model, config) + KVCacheBuilder.build(model, config)
    steps = generate.speculative_generate_step(prompt, model, model, max_tokens=120, prompt_cache=caches)
    spoken = list(steps)
    assert [t for t, _, _ in spoken] == tokens
    # Two tokens are drafted for each one that the model says itself.
    accepted = sum(from_draft for _, _, from_draft in spoken) / (2 * sum(not d for _, _, d in spoken))
    assert accepted >= 0.95

    # What is held is the same; mlx_lm runs one token further in plain decoding.
    length = min(c.offset for c in plain + caches)
    for cache in plain + caches:
        cache.trim(cache.offset - length)
    for a, b in zip(plain, caches):
        assert a._core.positions() == b._core.positions()
        for x, y in zip(a._core.snapshot(), b._core.snapshot()):
            for p, q in zip(x.spans, y.spans, strict=True):
                assert np.array_equal(np.array(p), np.array(q))
            # MLX sums rows of three tokens in another order than rows of one: the last fp16 bit.
            assert mx.allclose(x.dequantize(), y.dequantize(), rtol=1e-3, atol=1e-3).item()


@pytest.mark.parametrize("method", ["fp16", "vecinfer"])
def test_rewinding_leaves_every_byte_as_if_nothing_was_tried(tables, method):
    rng = np.random.default_rng(2)
    keys, values, wrong = (mx.array(rng.standard_normal((1, 2, 400, 64)), dtype=mx.float32) for _ in range(3))
    tables4 = mx.array(np.broadcast_to(tables, (2, 1, 256, 4)))
    make = {
        "fp16": lambda side: exact.codec(side, 2, 64, mx.float16),
        "vecinfer": lambda side: vecinfer.codec(side, tables4, 16),
    }[method]
    tried, plain = (_ext.ArrayCache(make("keys"), make("values"), 64, 4, mx.float16) for _ in range(2))
    at = 0
    while at < 390:
        accepted = int(rng.integers(1, 4))
        taken = slice(at, at + accepted)
        rejected = wrong[:, :, : 3 - accepted]
        tried.update(*(mx.concatenate([x[:, :, taken], rejected], axis=2) for x in (keys, values)))
        assert tried.trim(3 - accepted) == 3 - accepted
        at += accepted
        for t in range(at - accepted, at):
            plain.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    # One token more, so that both have rewritten their exact storage.
    for cache in (tried, plain):
        cache.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    assert tried.positions() == plain.positions()
    assert all(mx.array_equal(a, b).item() for a, b in zip(tried.arrays(), plain.arrays(), strict=True))
