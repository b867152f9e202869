"""VecInfer's functions: product quantisation of rows, with or without the smoothing and rotation of keys.

A codebook is [C, sub_dim] for everything, [n_sub, C, sub_dim] per sub-vector, or [H, n_sub or 1, C, sub_dim]
per head (axis -3 of what is quantised). Codes are the nearest centroids by direct distance; the lowest
index wins ties, and NaN gets code 0. Everything is lazy. Wrong shapes and dtypes are a ValueError.
"""

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codebook import normalise_factors, normalise_tables
from veloxquant_mlx.cache.codecs import exact, vecinfer


def vecinfer_quantize_metal(x, codebook, sub_dim):
    """x: floats [..., D] -> codes, int32 [..., D // sub_dim]. float16 rows meet a float16 codebook."""
    return _ext.vecinfer_quantize(x, codebook, sub_dim)


def vecinfer_dequant_metal(indices, codebook, out_dtype=None):
    """indices: integers [..., n_sub] -> [..., n_sub * sub_dim] in out_dtype (default: the codebook's).

    An index out of range reads the last centroid.
    """
    return _ext.vecinfer_dequant(indices, codebook, out_dtype)


def vecinfer_encode_decode_metal(keys, k_codebook, sub_dim, H_mat, smooth=None):
    """keys: [B, H, S, D] -> (k_hat float16 [B, H, S, D], codes int32 [B, H, S, D // sub_dim]).

    codes of H_mat (keys / smooth); k_hat back in the coordinates of the keys. H_mat: [D, D]; the
    Walsh-Hadamard matrix takes the fast transform. smooth: lambda [D] or [R, D], per head where
    R = H, else its mean over R.
    """
    return _ext.vecinfer_encode_decode(keys, k_codebook, sub_dim, H_mat, smooth)


def vecinfer_encode_decode_simple_metal(values, v_codebook, sub_dim):
    """values: [B, H, S, D] -> (v_hat float16 [B, H, S, D], codes uint32 [B, H, S, D // sub_dim])."""
    return _ext.vecinfer_encode_decode_simple(values, v_codebook, sub_dim)


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
