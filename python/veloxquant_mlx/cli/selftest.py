"""veloxquant devices --selftest: every GPU kernel on this machine's GPU against the CPU, as a report to paste."""

import platform
import time

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext

TOLERANCE = 2e-3  # of a row of attention, relative


def run(on_cpu=lambda: mx.stream(mx.cpu), rows=2048):
    """The fields of the report. on_cpu: a context in which operations run on the CPU."""
    checks = [_contraction(), *_functions(on_cpu, rows), *_cache(on_cpu)]
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
    words = _ext.pack_words(codes, 3)
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


def _cache(on_cpu, heads=2, dim=64):
    """Decode steps of a cache until a block is sealed: bytes, and attention."""
    from veloxquant_mlx.cache.codecs import vecinfer

    r = np.random.default_rng(2)
    tables = [mx.array(r.standard_normal((heads, 1, 256, 4), dtype=np.float32)) for _ in range(2)]
    scale = mx.array(0.5 + r.random((heads, dim), dtype=np.float32))
    tokens = mx.array(r.standard_normal((6, 1, heads, 200, dim), dtype=np.float32))

    def steps():
        codecs = [vecinfer.codec("keys", tables[0], dim // 4, scale=scale)]
        codecs.append(vecinfer.codec("values", tables[1], dim // 4))
        cache, outs, start = _ext.ArrayCache(*codecs, 64, 4, mx.float16), [], 0
        for n in (150, 16, 16, 16):
            keys, values = tokens[0, :, :, start : start + n], tokens[1, :, :, start : start + n]
            query = tokens[2:, 0, :, start : start + n].reshape(1, 4 * heads, n, dim)
            held = cache.update(keys, values)
            outs.append(_ext.attend(query, *held, scale=0.125, causal=True)[0])
            mx.eval(outs[-1], cache.arrays())
            start += n
        return _bits(cache.arrays()), [np.array(out) for out in outs[1:]]

    before = _ext.gpu_launches()
    arrays, outs = steps()
    after = _ext.gpu_launches()
    launched = all(
        after.get(name, 0) > before.get(name, 0)
        for name in ("vq_vecinfer_encode_blocks", "vq_decode_items", "vq_decode_merge")
    )
    with on_cpu():
        expected_arrays, expected = steps()
    differ = sum(int(np.sum(a != b)) for a, b in zip(arrays, expected_arrays, strict=True))
    note = f"{differ} of {sum(a.size for a in arrays)} elements of the cache differ from the CPU's"
    yield _check("append", differ == 0 and launched, note if launched else "ran on the CPU")
    worst = max(
        float(np.max(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))
        for a, b in zip(outs, expected, strict=True)
    )
    yield _check("attend", worst < TOLERANCE and launched, f"row error {worst:.1e}, wanted below {TOLERANCE:g}")


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
