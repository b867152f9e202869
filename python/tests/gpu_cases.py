"""Calls of functions that have GPU kernels: the same on the CPU, on the MSL machine, on a real GPU (tools/gpu/mlx.sh)."""

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.vecinfer import compute_query_lut
from veloxquant_mlx.metal import (
    comm_vq_decode_metal,
    rabitq_hamming_score,
    turboquant_bit_pack,
    turboquant_bit_unpack,
    turboquant_fused_rvq_decode_attend,
    turboquant_hadamard_quantize,
    turboquant_scalar_dequantize,
    turboquant_scalar_quantize,
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
    scalar, back = ["vq_scalar_quantize"], ["vq_scalar_dequantize"]
    hard = mx.where(
        mx.abs(x) > 2, mx.array(float("inf"), h16), mx.where(mx.abs(x) < 0.01, mx.array(float("nan"), h16), x)
    )
    levels = mx.sort(_normal(8))
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
        ("scalar quantize, 2 bits", lambda: _parts(turboquant_scalar_quantize(hard, 2)), scalar),
        (
            "scalar quantize of a slice, 3 bits, unbiased",
            lambda: _parts(turboquant_scalar_quantize(_strided(x.astype(mx.float32)), bits=3, scale="unbiased")),
            scalar,
        ),
        ("rotated, 4 bits", lambda: _parts(turboquant_hadamard_quantize(x.astype(bf16), bits=4, seed=3)), scalar),
        (
            "scalar dequantize, rotated",
            lambda: turboquant_scalar_dequantize(turboquant_hadamard_quantize(x, bits=2, seed=3)),
            scalar + back,
        ),
        (
            "scalar dequantize",
            lambda: turboquant_scalar_dequantize(turboquant_scalar_quantize(odd[:, :35].astype(mx.float32), 1)),
            scalar + back,
        ),
        ("nearest scalar", lambda: turboquant_scalar_quantize(hard, levels, 3), ["vq_scalar_nearest"]),
        ("centroids of scalars", lambda: turboquant_scalar_dequantize(odd, levels), ["vq_scalar_centroids"]),
        (
            "nearest of the fused Hadamard",
            lambda: turboquant_hadamard_quantize(x, mx.sign(_fixed(64)), levels, 3),
            ["vq_hadamard_nearest"],
        ),
        (
            "popcount scores",
            lambda: _ext.rabitq_popcount_score(
                x[:, :, 0].astype(mx.float32), _fixed_bytes(2, 1, 70, 8), _fixed(2, 1, 70), 5, 4
            ),
            ["vq_popcount_queries", "vq_popcount_scores"],
        ),
        (
            "CommVQ look-up",
            lambda: comm_vq_decode_metal(codes[0, 0], _fixed(16, 70, 4), mx.arange(5) * 37 - 20, _fixed(32), 16, 4, 70),
            ["vq_comm_vq_look_up"],
        ),
        (
            "CommVQ look-up, two stages in fp16",
            lambda: comm_vq_decode_metal(
                codes[:, :2].swapaxes(1, 2),
                _fixed(2, 16, 70, 4).astype(h16),
                mx.array([[3], [70000]]),
                _fixed(32),
                16,
                4,
                70,
            ),
            ["vq_comm_vq_look_up"],
        ),
        ("QJL signs", lambda: _ext.qjl_encode(hard, _fixed(128, 64)), ["vq_qjl_encode_rows"]),
        (
            "QJL inner products",
            lambda: _ext.qjl_inner_product(_fixed(2, 6, 128), _fixed_bytes(2, 300, 3, 16), _fixed(2, 300, 3)),
            ["vq_qjl_inner_product"],
        ),
        ("RaBitQ codes", lambda: _ext.rabitq_encode(hard, 5), ["vq_rabitq_encode_rows"]),
    ]


def _parts(quantized):
    return quantized.packed, quantized.norms


def _fixed(*shape):
    return mx.array(np.random.default_rng(3).standard_normal(shape, dtype=np.float32))


def _fixed_bytes(*shape):
    return mx.array(np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8))


def outputs(result):
    """Every output of a call as numpy bits."""
    result = result if isinstance(result, tuple | list) else (result,)
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    return [np.array(a.view(bits[a.dtype.size])) for a in result]


def cache_cases():
    """(name, cache's arguments, what is done) of caches whose decode steps run on a GPU."""
    return {
        "Hadamard": {"kind": "hadamard"},
        "as they are, tables per sub-vector": {"kind": "none", "tables": 16, "centroids": 64},
        "dense": {"kind": "dense", "dtype": mx.bfloat16},
        "turboquant": {"kind": "turboquant"},
        "rvq": {"kind": "turboquant_rvq", "dtype": mx.bfloat16},
        "rabitq with a mean": {"kind": "rabitq"},
        "rabitq, values of vecinfer": {"kind": "rabitq", "values": "dense"},
        "qjl": {"kind": "qjl 1", "values": "turboquant"},
        "qjl, two blocks": {"kind": "qjl 2", "values": "rabitq"},
        "qjl, outliers of each block": {"kind": "qjl 2 outliers", "values": "turboquant"},
        "qjl, outliers of a head": {"kind": "qjl 1 fixed", "values": "turboquant"},
        "prod": {"kind": "prod"},
        "commvq": {"kind": "commvq", "values": "none"},
        "vecinfer_rope": {"kind": "vecinfer_rope", "values": "rabitq"},
        "fp16": {"kind": "exact"},
        "bf16": {"kind": "exact", "dtype": mx.bfloat16},
    }


# Bits of keys and of values.
BITS = {"turboquant": (2, 3), "turboquant_rvq": (1, 2), "rabitq": (1, 2)}


def rvq_call(options, tokens=150):
    """turboquant_fused_rvq_decode_attend with some of: words, norms, causal, mask, window."""
    r = np.random.default_rng(31)
    k1, k2 = (mx.array(r.integers(0, 4, (2, 2, tokens, 64), dtype=np.uint8)) for _ in range(2))
    values = mx.array(r.integers(0, 16, (2, 2, tokens, 12), dtype=np.int32))
    if "words" in options:
        k1, k2 = turboquant_bit_pack(k1, 2), turboquant_bit_pack(k2, 2)
    given = {
        "key_norms": mx.abs(_fixed(2, 2, tokens)) if "norms" in options else None,
        "causal": "causal" in options,
        "mask": mx.arange(tokens) % 5 != 2 if "mask" in options else None,
        "sliding_window": 40 if "window" in options else 0,
    }
    q = _fixed(2, 6, 3, 64).astype(mx.float16)
    return turboquant_fused_rvq_decode_attend(
        q, k1, k2, _fixed(4), 0.3 * _fixed(4), values, _fixed(16, 4), 2, 2, 4, **given
    )


def make_cache(kind, dtype=mx.float16, window=64, sinks=4, **codecs):
    return _ext.ArrayCache(*make_codecs(kind, dtype=dtype, **codecs), window, sinks, dtype)


def make_codecs(kind, values=None, **options):
    """Codecs of both sides; values: another kind for them."""
    return [_codec(side, kind if side == "keys" or not values else values, **options) for side in ("keys", "values")]


def _codec(side, kind, dtype=mx.float16, tables=1, centroids=256, heads=2, dim=64):
    from veloxquant_mlx.cache.codecs import exact, vecinfer

    r = np.random.default_rng(23 + (side == "values"))
    pairs = dim // 2
    turning = {
        "inv_freq": mx.array(10000.0 ** (-np.arange(pairs) / pairs).astype(np.float32)),
        "weight": mx.array(0.5 + r.random((heads, pairs), dtype=np.float32)),
    }
    if kind == "exact":
        return exact.codec(side, heads, dim, dtype)
    if kind == "prod":
        return _ext.codec(side, "turboquant", heads, dim, {"bits": 2, "seed": 7, "prod": 1}, {})
    if kind == "commvq":
        book = mx.array(r.standard_normal((heads, 3, 40, 2, pairs), dtype=np.float32)).astype(mx.float16)
        return _ext.codec(side, kind, heads, dim, {}, {"codebook": book, **turning})
    if kind == "vecinfer_rope":
        table = mx.array(r.standard_normal((heads, 1, centroids, 4), dtype=np.float32)).astype(mx.float16)
        order = mx.array(np.stack([r.permutation(pairs) for _ in range(heads)]).astype(np.int32))
        given = {"tables": table, "order": order, **turning}
        return _ext.codec(side, kind, heads, dim, {"n_subvectors": dim // 4, "position_scale": 0.5}, given)
    if kind in BITS:
        given = {"mean": mx.array(r.standard_normal((heads, dim), dtype=np.float32))} if kind == "rabitq" else {}
        return _ext.codec(side, kind, heads, dim, {"bits": BITS[kind][side == "values"], "seed": 7}, given)
    if kind.startswith("qjl"):
        options = {"sketch_bits": int(kind[4]) * dim, "seed": 7, **({"outliers": 3} if len(kind) > 5 else {})}
        fixed = {"outlier_channels": mx.array([[7, 0, 40], [1, 2, 3]], mx.int32)} if "fixed" in kind else {}
        return _ext.codec(side, "qjl", heads, dim, options, fixed)
    table = mx.array(r.standard_normal((heads, tables, centroids, 4), dtype=np.float32))
    options = {"hadamard": kind == "hadamard"}
    if kind == "hadamard" and side == "keys":
        options["scale"] = mx.array(0.5 + r.random((heads, dim), dtype=np.float32))
    if kind == "dense":
        q = np.stack([np.linalg.qr(r.standard_normal((dim, dim)))[0] for _ in range(heads)])
        options["encode_matrix"] = options["query_matrix"] = mx.array(q.astype(np.float32))
    return vecinfer.codec(side, table, dim // 4, **options)


def drive(cache, steps, group=3, dtype=mx.float16, seed=29, bad=False, dim=64, **options):
    """Appends steps[i] tokens and attends them; -n trims. -> outputs of attention (fp32), arrays of the cache."""
    r = np.random.default_rng(seed)
    outs, mask = [], options.get("mask")
    for i, n in enumerate(steps):
        if n < 0:
            cache.trim(-n)
            continue
        k, v, q = (
            mx.array(r.standard_normal((2, n, h, dim), dtype=np.float32)).astype(dtype).swapaxes(1, 2)
            for h in (2, 2, 2 * group)
        )
        if bad and i % 5 == 1:
            k = mx.where(mx.arange(64) == 3, float("nan"), k)
            v = mx.where(mx.arange(64) == 5, -float("inf"), v)
        keys, values = cache.update(k, v)
        if "mask" in options:
            options["mask"] = mask[: keys.length]
        out, lse = _ext.attend(q, keys, values, scale=0.125, causal=True, **options)
        outs += [out.astype(mx.float32), lse]
        mx.eval(outs[-2:], cache.arrays())
    return [np.array(a) for a in outs], [np.array(a.view(mx.uint8)) for a in cache.arrays()], cache.positions()


def dequantized(cache, steps, dtype, seed=29, dim=64):
    """Appends steps[i] tokens -> dense keys and values, as bits, behind each."""
    r = np.random.default_rng(seed)
    dense = []
    for n in steps:
        k, v = (mx.array(r.standard_normal((2, 2, n, dim), dtype=np.float32)).astype(dtype) for _ in range(2))
        dense += outputs([side.dequantize() for side in cache.update(k, v)])
    return dense


# Tokens at a time: from inside the sinks on, seals while decoding and while prefilling, trims the tail and into blocks.
STEPS = [3, 2, 90, 16, 16, 16, 1, 70, 3, -3, 16, 16, 16, 16, 1, -100, 1, 79, 16, 16, 16, 1]


def ready(names, steps):
    """Options of attention by name; masks see the whole history whatever its length."""
    given = {
        "sliding_window": 100,
        "logit_softcap": 5.0,
        "mask": mx.arange(sum(steps)) % 7 != 2,
        "sinks": mx.array(np.linspace(-1, 2, 6, dtype=np.float32)),
    }
    return {name: given[name] for name in names}
