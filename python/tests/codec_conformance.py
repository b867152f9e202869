"""The conformance suite of codecs through MLX: blocks and decoded bits of a device against another's.

Every method, width and form; whole blocks and tails, rows that are hard in one way or another, tokens at the border
between two codes, garbage. tools/gpu/mlx_check.py runs it on a GPU, test_gpu_launch.py some of it on the MSL machine.
"""

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext

HEADS = 2


def _codec(method, side="keys", dim=128, options=(), tables=()):
    return lambda: _ext.codec(side, method, HEADS, dim, dict(options), dict(tables))


def _vecinfer(dim, sub_dim, centroids, tables, transform, method="vecinfer", **more):
    r = np.random.default_rng(dim + centroids)
    n = dim // sub_dim
    book = r.standard_normal((HEADS, tables or n, centroids, sub_dim)).astype(np.float16)
    given = {"tables": mx.array(book), **more}
    options = {"n_subvectors": n, **({"transform": transform} if transform else {})}
    if transform == "hadamard":
        given["scale"] = mx.array(0.5 + r.random((HEADS, dim), dtype=np.float32))
    if transform == "dense":
        turns = np.stack([np.linalg.qr(r.standard_normal((dim, dim)))[0] for _ in range(HEADS)])
        given["encode_matrix"] = mx.array(turns.astype(np.float32))
    return _codec(method, dim=dim, options=options, tables=given)


def _rope(dim):
    pairs, r = dim // 2, np.random.default_rng(dim)
    return {
        "inv_freq": mx.array(10000.0 ** (-np.arange(pairs) / pairs).astype(np.float32)),
        "weight": mx.array(0.5 + r.random((HEADS, pairs), dtype=np.float32)),
    }


def _order(dim):
    r = np.random.default_rng(dim)
    return mx.array(np.stack([r.permutation(dim // 2) for _ in range(HEADS)]).astype(np.int32))


def _book(dim, stages, entries):
    r = np.random.default_rng(dim + entries)
    return mx.array(r.standard_normal((HEADS, stages, entries, 2, dim // 2)).astype(np.float16))


def _forms(dim):
    """One of each method at this head_dim."""
    yield f"vecinfer {dim}", _vecinfer(dim, 4, 256, 0, "hadamard")
    yield f"turboquant {dim}", _codec("turboquant", dim=dim, options={"bits": 3})
    yield f"rvq {dim}", _codec("turboquant_rvq", dim=dim, options={"bits": 2})
    yield f"rabitq {dim}", _codec("rabitq", dim=dim, options={"bits": 2})
    yield f"qjl {dim}", _codec("qjl", dim=dim, options={"sketch_bits": 2 * dim, "outliers": 3})
    yield f"commvq {dim}", _codec("commvq", dim=dim, tables={"codebook": _book(dim, 2, 64), **_rope(dim)})
    yield f"vecinfer_rope {dim}", _vecinfer(dim, 4, 100, 0, None, "vecinfer_rope", order=_order(dim), **_rope(dim))
    yield f"exact {dim}", _codec("exact", dim=dim, options={"dtype": "float16" if dim % 3 else "bfloat16"})


def conformance_cases():
    """(name, function that makes the codec)"""
    cases = [form for dim in (16, 80, 128, 256) for form in _forms(dim)]
    for sub_dim, centroids, tables, transform in ((2, 16, 1, "none"), (8, 1000, 0, "dense"), (2, 64, 1, "hadamard")):
        cases.append((f"vecinfer d{sub_dim}x{centroids}", _vecinfer(128, sub_dim, centroids, tables, transform)))
    cases.append(("vecinfer d8x4096", _vecinfer(64, 8, 4096, 1, "none")))
    for bits in (1, 2, 4):
        cases.append((f"turboquant {bits} bits", _codec("turboquant", options={"bits": bits, "scale": "unbiased"})))
        cases.append((f"values, {bits} bits", _codec("turboquant", "values", options={"bits": bits, "scale": "raw"})))
        mean = mx.array(np.random.default_rng(bits).standard_normal((HEADS, 128), dtype=np.float32))
        cases.append((f"rabitq {bits} bits, mean", _codec("rabitq", options={"bits": bits}, tables={"mean": mean})))
    for bits in (1, 3):
        cases.append((f"prod {bits} bits", _codec("turboquant", options={"bits": bits, "prod": 1})))
        cases.append((f"rvq values {bits} bits", _codec("turboquant_rvq", "values", options={"bits": bits})))
    sketch = mx.array(np.random.default_rng(3).standard_normal((24, 128), dtype=np.float32))
    channels = mx.array([[7, 0, 4], [1, 2, 3]], mx.int32)
    cases.append(("rabitq 3 bits", _codec("rabitq", "values", options={"bits": 3, "scale": "reconstruction"})))
    cases.append(("qjl, given sketch", _codec("qjl", tables={"sketch": sketch})))
    cases.append(("qjl, one rotation", _codec("qjl", options={"sketch_bits": 128})))
    fixed = {"sketch_bits": 128, "outliers": 3}
    cases.append(("qjl, fixed outliers", _codec("qjl", options=fixed, tables={"outlier_channels": channels})))
    return cases


def _hard_rows(r, n, dim):
    x = r.standard_normal((1, HEADS, n, dim), dtype=np.float32)
    for t in range(n // 2, n):
        row = x[:, :, t]
        kind = t % 8
        if kind == 0:
            row[:] = 0
        elif kind == 1:
            row[..., t % dim] *= 100
        elif kind == 2:
            row *= 2.0**-40
        elif kind == 3:
            row *= 2.0**12
        elif kind == 4:
            row[:] = row[..., :1]
        elif kind == 5:
            row[:] = np.where(np.arange(dim) % 2, -1, 1)
        elif kind == 6:
            row[:] = -0.0
    return x


def _borders(codec, r):
    """64 rows, each with one element at either side of where the decoded token changes. By the CPU."""
    dim, tokens = codec.head_dim, np.arange(64)
    x = r.standard_normal((1, HEADS, 64, dim), dtype=np.float32)
    places = r.integers(0, dim, 64)
    low = x[:, :, tokens, places].copy()
    high = low + np.where(low < 0, 4, -4).astype(np.float32)

    def decoded(values):
        rows = x.copy()
        rows[:, :, tokens, places] = values
        return np.array(codec.decode_blocks(codec.encode_blocks(mx.array(rows), 4), 4)).view(np.uint32)

    first = decoded(low)
    for _ in range(40):
        middle = low + (high - low) * np.float32(0.5)
        same = np.all(decoded(middle) == first, axis=-1)
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    sides = []
    for values in (low, high):
        rows = x.copy()
        rows[:, :, tokens, places] = values
        sides.append(rows)
    return sides


def probes(codec, seed=5):
    """(rows to encode, blocks to decode); where the default device is the CPU."""
    r = np.random.default_rng(seed)
    rows = [_hard_rows(r, n, codec.head_dim) for n in (64, 33, 1)] + _borders(codec, r)
    garbage = r.integers(0, 256, (1, HEADS, 2, codec.block_bytes), dtype=np.uint8)
    return [mx.array(x) for x in rows], mx.array(garbage)


def answers(codec, given):
    """Bytes and bits, on the default device; a NaN is any NaN."""
    rows, garbage = given
    blocks = [codec.encode_blocks(x, 4) for x in rows]
    numbers = [codec.decode_blocks(b, 4) for b in (blocks[0], garbage)]
    mx.eval(blocks, numbers)
    decoded = [np.array(y) for y in numbers]
    return [np.array(b) for b in blocks] + [np.where(np.isnan(y), np.float32(0), y).view(np.uint32) for y in decoded]
