"""Calls of functions that have GPU kernels: the same on the CPU, on the MSL machine, on a real GPU (tools/gpu/mlx.sh)."""

import mlx.core as mx
import numpy as np

from veloxquant_mlx.allocators.vecinfer import compute_query_lut
from veloxquant_mlx.metal import (
    rabitq_hamming_score,
    turboquant_bit_pack,
    turboquant_bit_unpack,
    vecinfer_dequant_metal,
    vecinfer_encode_decode_metal,
    vecinfer_encode_decode_simple_metal,
    vecinfer_quantize_metal,
)

rng = np.random.default_rng(17)


def _normal(*shape, dtype=mx.float32):
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)


def _bytes(*shape):
    return mx.array(rng.integers(0, 256, shape, dtype=np.uint8))


def _hadamard(dim):
    h = np.ones((1, 1))
    while len(h) < dim:
        h = np.block([[h, h], [h, -h]])
    return mx.array((h / np.sqrt(dim)).astype(np.float32))


def _strided(a):
    """The same numbers, every other row of a larger array and axes moved: what a slice of a cache is."""
    wide = mx.repeat(a, 2, axis=-2)
    return wide.swapaxes(0, -2).swapaxes(0, -2)[..., ::2, :]


def cases():
    """(name, function of no arguments, kernels that it launches) for each."""
    h16, bf16 = mx.float16, mx.bfloat16
    book = _normal(256, 4)
    x = _normal(2, 3, 9, 64, dtype=h16)
    per_head = _normal(3, 16, 16, 4)
    codes = mx.array(rng.integers(-2, 70, (2, 3, 5, 16), dtype=np.int32))
    odd = mx.array(rng.integers(-(2**31), 2**31, (3, 37), dtype=np.int64).astype(np.int32))
    query, keys = _bytes(16), _bytes(300, 16)
    offsets, scale = _normal(300), mx.array([-0.37])
    quantize, dequantize = ["vq_vecinfer_quantize"], ["vq_vecinfer_dequantize"]
    return [
        ("quantize fp16, one table", lambda: vecinfer_quantize_metal(x, book, 4), quantize),
        ("quantize bf16 rows of a slice", lambda: vecinfer_quantize_metal(_strided(x.astype(bf16)), book, 4), quantize),
        ("quantize per head", lambda: vecinfer_quantize_metal(x.astype(mx.float32), per_head, 4), quantize),
        ("quantize one row", lambda: vecinfer_quantize_metal(x[0, 0, 0], book, 4), quantize),
        ("dequantize per head", lambda: vecinfer_dequant_metal(codes, per_head, mx.float32), dequantize),
        ("dequantize fp16", lambda: vecinfer_dequant_metal(codes, book, h16), dequantize),
        ("dequantize bf16", lambda: vecinfer_dequant_metal(codes.astype(mx.uint32), book, bf16), dequantize),
        ("look-up table", lambda: compute_query_lut(x[:, :, 0], book, 4), ["vq_vecinfer_query_lut"]),
        (
            "encode and decode, Hadamard, smooth per head",
            lambda: vecinfer_encode_decode_metal(x, book, 4, _hadamard(64), mx.abs(_fixed(3, 64)) + 0.1),
            ["vq_is_walsh_hadamard", "vq_vecinfer_encode_decode"],
        ),
        (
            "encode and decode, any matrix, mean factors",
            lambda: vecinfer_encode_decode_metal(x, book, 4, _fixed(64, 64), mx.abs(_fixed(2, 64)) + 0.1),
            ["vq_is_walsh_hadamard", "vq_vecinfer_encode_decode"],
        ),
        (
            "encode and decode, as they are",
            lambda: vecinfer_encode_decode_simple_metal(_strided(x), per_head, 4),
            ["vq_vecinfer_encode_decode"],
        ),
        ("pack 3 bits", lambda: turboquant_bit_pack(odd, 3), ["vq_pack_words"]),
        ("pack 2 bits into bytes", lambda: turboquant_bit_pack(mx.abs(odd)[:, :36], b=2), ["vq_pack_words"]),
        ("unpack 4 bits from bytes", lambda: turboquant_bit_unpack(keys, 1001, 4), ["vq_unpack_words"]),
        ("pack booleans", lambda: turboquant_bit_pack(odd > 0, 1), ["vq_pack_words"]),
        (
            "unpack 5 bits",
            lambda: turboquant_bit_unpack(
                mx.array(np.arange(21, dtype=np.uint32).reshape(3, 7) * 99999989), 5, original_length=37
            ),
            ["vq_unpack_words"],
        ),
        ("Hamming scores", lambda: rabitq_hamming_score(query, keys, offsets, scale), ["vq_hamming_score"]),
    ]


def _fixed(*shape):
    return mx.array(np.random.default_rng(3).standard_normal(shape, dtype=np.float32))


def outputs(result):
    """Every output of a call as numpy bits."""
    result = result if isinstance(result, tuple | list) else (result,)
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    return [np.array(a.view(bits[a.dtype.size])) for a in result]
