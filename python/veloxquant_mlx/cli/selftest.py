"""veloxquant devices --selftest: every GPU kernel on this machine's GPU against the CPU, as a report to paste."""

import platform
import time

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext

TOLERANCE = 2e-3  # of a row of attention, relative
ATTEND = {"vq_append", "vq_append_seal", "vq_decode_items", "vq_prefill_items", "vq_decode_merge"}
METHODS = (
    "vecinfer", "turboquant", "prod", "turboquant_rvq", "rabitq", "qjl", "outliers", "commvq", "vecinfer_rope", "fp16",
)  # fmt: skip


def run(on_cpu=lambda: mx.stream(mx.cpu), rows=2048, methods=METHODS, functions=True):
    """The fields of the report. on_cpu: a context in which operations run on the CPU. methods: of caches."""
    checks = [_contraction(), *(_functions(on_cpu, rows) if functions else ()), *_cache(on_cpu, methods)]
    return {
        "device": str(mx.default_device()),
        "backend": _ext.gpu_backend(),
        "mlx": mx.__version__,
        "veloxquant": _ext.version,
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "checks": checks,
        "bandwidth": _bandwidth(rows * rows // 16),
        "passed": all(check["passed"] for check in checks),
    }


def text(fields):
    lines = [
        f"VeloxQuant {fields['veloxquant']} selftest: {fields['backend']}, {fields['device']}, MLX {fields['mlx']}, "
        f"{fields['machine']}"
    ]
    lines += [f"{'ok    ' if c['passed'] else 'FAILED'} {c['name']}: {c['note']}" for c in fields["checks"]]
    for name, figure in fields["bandwidth"].items():
        lines.append(f"       {name}: {figure:.1f} GB/s")
    failed = sum(not c["passed"] for c in fields["checks"])
    return "\n".join([*lines, f"{len(fields['checks'])} checks, {failed} failed"])


def _check(name, passed, note):
    return {"name": name, "passed": bool(passed), "note": note}


def _contraction():
    """-(1 + 2^-11) + a a with a = 1 + 2^-12: 0 where the product is rounded, 2^-24 where it is fused with the sum."""
    a = 1 + 2.0**-12
    codebook = mx.array([[-(1 + 2.0**-11), a]])
    score = _ext.vecinfer_query_lut(mx.array([[1.0, a]]), codebook, 2).item()
    return _check("no fused multiply-add in encode", score == 0.0, f"canary {score:g}, wanted 0")


def _bits(arrays):
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    return [np.array(a.view(unsigned[a.dtype.size])) for a in arrays]


def _functions(on_cpu, rows):
    r = np.random.default_rng(1)

    def normal(*shape):
        return mx.array(r.standard_normal(shape, dtype=np.float32))

    x, book, matrix = normal(1, 2, rows, 128).astype(mx.float16), normal(256, 4), normal(128, 128)
    factors = mx.abs(normal(2, 128)) + 0.1
    codes = mx.array(r.integers(0, 256, (rows, 33), dtype=np.uint8))
    words, entries = _ext.pack_words(codes, 3), normal(32, 256, 4)
    signs = mx.array(r.integers(0, 256, (1, rows, 16), dtype=np.uint8))
    packed, norms = _ext.scalar_quantize(x, 2, "norm_corrected", True, 3)
    calls = {
        "vecinfer_quantize_metal": lambda: [_ext.vecinfer_quantize(x, book, 4)],
        "vecinfer_dequant_metal": lambda: [_ext.vecinfer_dequant(codes, book, mx.float16)],
        "vecinfer_encode_decode_metal": lambda: _ext.vecinfer_encode_decode(x, book, 4, matrix, factors),
        "vecinfer_encode_decode_simple_metal": lambda: _ext.vecinfer_encode_decode_simple(x, book, 4),
        "compute_query_lut": lambda: [_ext.vecinfer_query_lut(x[0, :, :4], book, 4)],
        "turboquant_bit_pack": lambda: [_ext.pack_words(codes, 3)],
        "turboquant_bit_unpack": lambda: [_ext.unpack_words(words, 3, 33)],
        "rabitq_hamming_score": lambda: [
            _ext.rabitq_hamming_score(codes[0], codes, factors[0, :1] * mx.ones(rows), mx.array([-0.37]))
        ],
        "turboquant_scalar_quantize": lambda: _ext.scalar_quantize(x, 3, "unbiased", False, 0),
        "turboquant_hadamard_quantize": lambda: _ext.scalar_quantize(x, 2, "norm_corrected", True, 3),
        "turboquant_scalar_dequantize": lambda: [_ext.scalar_dequantize(packed, norms, 128, 2, True, 3, mx.float16)],
        "rabitq_encode": lambda: _ext.rabitq_encode(x, 5),
        "rabitq_popcount_score": lambda: [
            _ext.rabitq_popcount_score(factors[None], signs[None], factors[:1, :1] * mx.ones((1, 1, rows)), 5, 4)
        ],
        "comm_vq_decode_metal": lambda: [
            _ext.comm_vq_decode(codes[:, :32], entries, mx.arange(rows), factors[0, :64], 32, 4, 256)
        ],
        "qjl_encode": lambda: _ext.qjl_encode(x, matrix),
        "qjl_inner_product": lambda: [
            _ext.qjl_inner_product(factors[None], signs.swapaxes(0, 1)[None], mx.ones((1, rows, 1)))
        ],
    }
    for name, call in calls.items():
        before = sum(_ext.gpu_launches().values())
        got = _bits(call())
        launched = sum(_ext.gpu_launches().values()) - before
        with on_cpu():
            expected = _bits(call())
        differ = sum(int(np.sum(a != b)) for a, b in zip(got, expected, strict=True))
        note = f"{differ} of {sum(a.size for a in got)} elements differ from the CPU's"
        yield _check(name, differ == 0 and launched > 0, note if launched else "ran on the CPU")


def _codecs(method, r, heads, dim):
    from veloxquant_mlx.cache.codecs import vecinfer

    def normal(*shape):
        return mx.array(r.standard_normal(shape, dtype=np.float32))

    def both(method, options):
        return [_ext.codec(side, method, heads, dim, options) for side in ("keys", "values")]

    if method == "vecinfer":
        keys = vecinfer.codec("keys", normal(heads, 1, 256, 4), dim // 4, scale=mx.abs(normal(heads, dim)) + 0.5)
        return [keys, vecinfer.codec("values", normal(heads, 1, 256, 4), dim // 4)]
    if method == "fp16":
        return both("exact", {"dtype": "float16"})
    if method in ("turboquant", "prod", "turboquant_rvq", "rabitq"):
        options = {"bits": 2, "seed": 3, **({"prod": 1} if method == "prod" else {})}
        return both("turboquant" if method == "prod" else method, options)
    values = _ext.codec("values", "turboquant", heads, dim, {"bits": 2, "seed": 3})
    if method in ("qjl", "outliers"):
        options = {"sketch_bits": 2 * dim, "seed": 3, **({"outliers": 4} if method == "outliers" else {})}
        return [_ext.codec("keys", "qjl", heads, dim, options), values]
    tables = {"inv_freq": mx.array(10000.0 ** (-np.arange(dim // 2) / (dim // 2)).astype(np.float32))}
    if method == "commvq":
        tables["codebook"] = normal(heads, 3, 40, 2, dim // 2).astype(mx.float16)
        return [_ext.codec("keys", "commvq", heads, dim, {}, tables), values]
    tables["tables"] = normal(heads, 1, 256, 4).astype(mx.float16)
    tables["order"] = mx.array(np.tile(np.arange(dim // 2, dtype=np.int32)[::-1], (heads, 1)))
    tables["weight"] = mx.abs(normal(heads, dim // 2)) + 0.5
    return [_ext.codec("keys", "vecinfer_rope", heads, dim, {"n_subvectors": dim // 4}, tables), values]


def _cache(on_cpu, methods, heads=2, dim=64):
    """Prefill and decode steps of caches until a block is sealed in both: bytes, and attention."""
    r = np.random.default_rng(2)
    tokens = mx.array(r.standard_normal((6, 1, heads, 200, dim), dtype=np.float32))

    def steps(codecs):
        cache, outs, start = _ext.ArrayCache(*codecs, 64, 4, mx.float16), [], 0
        for n in (150, 16, 16, 16):
            keys, values = tokens[0, :, :, start : start + n], tokens[1, :, :, start : start + n]
            query = tokens[2:, 0, :, start : start + n].reshape(1, 4 * heads, n, dim)
            held = cache.update(keys, values)
            outs.append(_ext.attend(query, *held, scale=0.125, causal=True)[0])
            mx.eval(outs[-1], cache.arrays())
            start += n
        dense = _bits([side.dequantize() for side in held])
        return _bits(cache.arrays()), [np.array(out) for out in outs], dense

    differ, dense_differ, errors, launched, decoded = {}, {}, {}, True, True
    for method in methods:
        codecs = _codecs(method, r, heads, dim)
        before = _ext.gpu_launches()
        arrays, outs, dense = steps(codecs)
        ran = {name for name, n in _ext.gpu_launches().items() if n > before.get(name, 0)}
        launched = launched and ATTEND <= ran
        launched = launched and any(name.endswith("_encode_blocks") for name in ran)
        decoded = decoded and "vq_inverse_rows" in ran
        with on_cpu():
            expected_arrays, expected, expected_dense = steps(codecs)
        differ[method] = sum(int(np.sum(a != b)) for a, b in zip(arrays, expected_arrays, strict=True))
        dense_differ[method] = sum(int(np.sum(a != b)) for a, b in zip(dense, expected_dense, strict=True))
        errors[method] = max(
            float(np.max(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))
            for a, b in zip(outs, expected, strict=True)
        )
    yield _rvq(on_cpu, r)
    for name, counts, ran in (("append", differ, launched), ("dequantize", dense_differ, decoded)):
        note = "elements that differ from the CPU's: " + ", ".join(f"{m} {n}" for m, n in counts.items())
        yield _check(name, not any(counts.values()) and ran, note if ran else "ran on the CPU")
    note = "row errors " + ", ".join(f"{m} {e:.1e}" for m, e in errors.items()) + f", wanted below {TOLERANCE:g}"
    yield _check("attend", max(errors.values()) < TOLERANCE and launched, note)


def _rvq(on_cpu, r):
    keys = [mx.array(r.integers(0, 4, (1, 2, 300, 64), dtype=np.uint8)) for _ in range(2)]
    tables = [mx.array(r.standard_normal(4, dtype=np.float32)) for _ in range(2)]
    values = mx.array(r.integers(0, 16, (1, 2, 300, 16), dtype=np.uint8))
    q = mx.array(r.standard_normal((1, 8, 2, 64), dtype=np.float32))
    vectors = mx.array(r.standard_normal((16, 4), dtype=np.float32))

    def call():
        return np.array(_ext.rvq_attend(q, *keys, *tables, values, vectors, 2, 2, 4, causal=True).astype(mx.float32))

    before = _ext.gpu_launches().get("vq_rvq_items", 0)
    got = call()
    launched = _ext.gpu_launches().get("vq_rvq_items", 0) > before
    with on_cpu():
        expected = call()
    error = float(np.max(np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)))
    note = f"row error {error:.1e}, wanted below {TOLERANCE:g}"
    return _check("turboquant_fused_rvq_decode_attend", error < TOLERANCE and launched, note)


def _bandwidth(rows):
    """Bytes read and written a second: decoding codes to rows, and a copy by MLX of the same rows."""
    codes = mx.zeros((rows, 32), mx.int32)
    book = mx.ones((256, 4), mx.float16)
    decoded = _ext.vecinfer_dequant(codes, book, mx.float16)
    one = mx.array(1.0, mx.float16)
    calls = {
        "vecinfer_dequant_metal": (lambda: _ext.vecinfer_dequant(codes, book, mx.float16), codes.nbytes),
        "MLX's product with 1": (lambda: decoded * one, decoded.nbytes),
    }
    figures = {}
    for name, (call, bytes_read) in calls.items():
        mx.eval(call())
        start, n = time.perf_counter(), 20
        mx.eval([call() for _ in range(n)])
        figures[name] = n * (bytes_read + decoded.nbytes) / (time.perf_counter() - start) / 1e9
    return figures
