"""The caches that eval compares with: dense, and exactly what they say."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codecs import vecinfer
from veloxquant_mlx.cache.reference import Coder, ReferenceCache, affine_coder, codec_coders
from veloxquant_mlx.evaluate import bits_with_everything
from veloxquant_mlx.metal.fused_sdpa import patch_mlx_lm_for_fused_sdpa


def logits(model, caches, tokens, chunks):
    parts = [model(tokens[None, a:b], cache=caches) for a, b in zip((0, *chunks), (*chunks, len(tokens)))]
    return np.array(mx.concatenate(parts, axis=1)[0])


@pytest.fixture(autouse=True)
def hooked():
    patch_mlx_lm_for_fused_sdpa()


def test_nothing_exact_is_what_mlx_lm_does(tiny_model, tokens):
    theirs = [c.to_quantized(group_size=64, bits=4) for c in make_prompt_cache(tiny_model)]
    ours = [ReferenceCache(affine_coder(), affine_coder(), 0, 0, block=1) for _ in theirs]
    wanted = logits(tiny_model, theirs, tokens[:300], (200,))
    np.testing.assert_allclose(logits(tiny_model, ours, tokens[:300], (200,)), wanted, atol=2e-3)
    exact = logits(tiny_model, make_prompt_cache(tiny_model), tokens[:300], ())
    assert np.abs(wanted - exact).max() > 0.05


@pytest.mark.parametrize("window, sinks", [(64, 4), (0, 0), (100, 70)])
def test_the_same_tokens_are_exact_as_in_our_caches(tiny_model, tokens, tables, window, sinks):
    """Dense attention on the codes of a vecinfer codec against the strict cache with that codec."""
    config = KVCacheConfig(codebook=tables, window=window, sinks=sinks, strict=True)
    codec = [vecinfer.codec(side, mx.array(np.stack([tables[None]] * 2)), 16) for side in ("keys", "values")]
    coders = codec_coders(*codec)
    reference = [ReferenceCache(*coders, window, sinks) for _ in tiny_model.layers]
    wanted = logits(tiny_model, KVCacheBuilder.build(tiny_model, config), tokens[:500], ())
    got = logits(tiny_model, reference, tokens[:500], (130, 131, 400))
    wrong = [ReferenceCache(*coders, window + 64, sinks) for _ in tiny_model.layers]
    far = logits(tiny_model, wrong, tokens[:500], ())
    # Exact tokens are 16 bits in one and 32 in the other, and a key that moves by the last bit may get another code.
    right, far = (np.median(np.abs(other - wanted)[300:]) for other in (got, far))
    assert right < 4e-3 and right < far / 3


def test_bits_with_everything(tiny_model, tokens):
    half = Coder(lambda x: x, 8.0)
    caches = [ReferenceCache(half, half, 64, 4) for _ in tiny_model.layers]
    logits(tiny_model, caches, tokens[:300], ())
    coded = (1000 - 68) // 64 * 64
    assert bits_with_everything(caches, 1000) == pytest.approx((coded * 8 + (1000 - coded) * 16) / 1000, abs=1e-4)
    assert caches[0].nbytes == caches[0].nbytes_at(300)


def test_bytes_at_a_length_are_those_of_a_cache_of_that_length(tiny_model, tokens, tables):
    for n in (100, 333, 700):
        caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
        mx.eval(tiny_model(tokens[None, :n], cache=caches))
        short = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
        mx.eval(tiny_model(tokens[None, :5], cache=short))
        assert [c.nbytes_at(n) for c in short] == [c.nbytes for c in caches]


def test_masks_of_other_kinds_are_refused(tiny_model, tokens):
    (cache, *_) = [ReferenceCache(affine_coder(), affine_coder()) for _ in tiny_model.layers]
    keys, values = cache.update_and_fetch(mx.zeros((1, 2, 8, 64)), mx.zeros((1, 2, 8, 64)))
    with pytest.raises(ValueError, match="mask: got an array"):
        keys.attend(mx.zeros((1, 4, 8, 64)), values, mx.zeros((8, 8)), scale=1.0)
