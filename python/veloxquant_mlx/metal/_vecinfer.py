"""VecInfer on its own: encode keys into packed codes, to be attended by metal_fused_sdpa."""

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codebook import normalise_factors, normalise_tables
from veloxquant_mlx.cache.codecs import exact, vecinfer


def vecinfer_encode(keys, codebook, smooth_factors=None):
    """keys: [B, H_kv, L, D] -> EncodedTensor: every full block of 64 tokens as codes, the rest exact.

    codebook: [C, d], [M, C, d] or [H, M, C, d]; smooth_factors: lambda [D] or [H, D], or None.
    """
    if keys.ndim != 4:
        raise ValueError(f"keys: got {keys.ndim} dimensions, wanted [B, H_kv, L, D]")
    heads, dim = keys.shape[1], keys.shape[3]
    tables = normalise_tables("codebook", codebook, 1, heads, dim)[0]
    factors = normalise_factors(smooth_factors, 1, heads, dim)[0]
    codec = vecinfer.codec("keys", mx.array(tables), dim // tables.shape[-1], scale=mx.array(factors))
    exact_dtype = mx.bfloat16 if keys.dtype == mx.bfloat16 else mx.float16
    # Values are not wanted: the same cache holds the keys as exact values, and drops them.
    cache = _ext.ArrayCache(codec, exact.codec("values", heads, dim, exact_dtype), 0, 0, exact_dtype)
    cache.update(keys, mx.zeros_like(keys))
    return cache.snapshot()[0]
