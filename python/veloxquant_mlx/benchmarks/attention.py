"""Decode attention of one layer: our caches against exact and quantised attention, interleaved in one run.

Keys, values, tables and rotations are random: the time does not depend on them. VecInfer's tables come with
rotations as learned ones do, since that is the setting whose quality is known. Every output is verified against
fp32 attention over what its own cache holds.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from veloxquant_mlx import _ext
from veloxquant_mlx.benchmarks import llama, quality
from veloxquant_mlx.benchmarks.measure import time_calls
from veloxquant_mlx.cache.codecs import exact, vecinfer

TOLERANCE = 2e-3  # relative L2 error of an output row; fp16 arithmetic of MLX itself: ten times that
_DROP = 4.0  # what is this many times slower than the fastest in the first round is measured once
CHUNK = 4096  # tokens appended at a time

# Name -> a side's codec, or those of keys and values: VecInfer's (dimensions of a sub-vector, centroids), or a
# method and its bits.
METHODS = {
    "fp16": ("fp16",),
    "vecinfer 2 bits": (4, 256),
    "vecinfer 2 bits d2x16": (2, 16),
    "vecinfer 4 bits": (2, 256),
    "vecinfer 4 bits d1x16": (1, 16),
    "vecinfer 1 bit": (8, 256),
    "vecinfer 1/2 bits": [(8, 256), (4, 256)],
    "rabitq 1/vecinfer 2 bits": [("rabitq", 1), (4, 256)],
    "rabitq 1 bit": ("rabitq", 1),
    "turboquant 1 bit": ("turboquant", 1),
    "turboquant 2 bits": ("turboquant", 2),
    "turboquant 3/2 bits": [("turboquant", 3), ("turboquant", 2)],
    "turboquant 3 bits": ("turboquant", 3),
    "turboquant 4 bits": ("turboquant", 4),
    "turboquant_rvq 1+1 bits": ("turboquant_rvq", 1),
    "turboquant_rvq 2+2 bits": ("turboquant_rvq", 2),
}


@dataclass(frozen=True)
class Shape:
    query_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self):
        return f"{self.query_heads}/{self.kv_heads} heads, d {self.head_dim}"


@dataclass
class Candidate:
    """One way to attend. is_exact: nothing is quantised, hence a baseline. always: measured in every round,
    however slow. rest: called after a block of timed calls."""

    name: str
    call: object
    reference: object  # -> fp32 output over the same tokens
    n_bytes: int
    tolerance: float
    bits: float
    is_exact: bool = False
    always: bool = False
    kernel: str = "mlx"
    rest: object = lambda: None


def rows(shape, context, methods, rounds, report=lambda what: None, with_llama=False):
    """The rows of `bench attention --json` for one shape and context. with_llama: after llama.build()."""
    q, keys, values = _random(shape, context)
    candidates = _mlx(q, keys, values) + (_llama(q, keys, values, report) if with_llama else [])
    candidates += [_ours(name, q, keys, values, report) for name in methods]
    for candidate in candidates:
        report(f"{candidate.name}: checking the output")
    errors = {c.name: _verify(c) for c in candidates}
    times = {c.name: [] for c in candidates}
    running = candidates
    for index in range(rounds):
        report(f"{shape}, {context} tokens: round {index + 1} of {rounds}")
        for candidate in running:
            times[candidate.name] += time_calls(candidate.call, least=0.02 if index else 0.0)
            candidate.rest()
        if index == 0:
            fastest = min(times[c.name][0] for c in candidates)
            running = [c for c in candidates if times[c.name][0] <= _DROP * fastest or c.always]
            if rounds > 1:
                for candidate in running:  # the first call warms up
                    times[candidate.name].clear()
    bandwidth = read_bandwidth()
    seconds = {name: statistics.median(values) for name, values in times.items()}
    baseline = min((c.name for c in candidates if c.is_exact), key=seconds.get)
    for candidate in candidates:
        _verify(candidate)
    # As they are reported: who divides them gets the ratio that stands beside them.
    us = {c.name: round(seconds[c.name] * 1e6, 1) for c in candidates}
    return [
        {
            "method": c.name,
            "bits": c.bits,
            "shape": str(shape),
            "context": context,
            "simd": _ext.simd_level(),
            "threads": _ext.num_threads(),
            "kernel": c.kernel,
            "us": us[c.name],
            "us_p10": round(sorted(times[c.name])[len(times[c.name]) // 10] * 1e6, 1),
            "gbps": round(c.n_bytes / seconds[c.name] / 1e9, 3),
            "read_gbps": round(bandwidth / 1e9, 2),
            "roofline_us": round(c.n_bytes / bandwidth * 1e6, 1),
            "fraction_of_read_bandwidth": round(c.n_bytes / seconds[c.name] / bandwidth, 3),
            "baseline": baseline,
            "baseline_us": us[baseline],
            "speedup": round(us[baseline] / us[c.name], 2),
            "error": float(f"{errors[c.name]:.2g}"),
            "n_times": len(times[c.name]),
            **quality.fields(c.name, c.name in METHODS),
        }
        for c in candidates
    ]


def read_bandwidth(n_bytes=1 << 28):
    """Bytes per second that all threads read together from an array larger than the caches."""
    parts = np.array_split(np.ones(n_bytes // 8, np.uint64), _ext.num_threads())
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return n_bytes / best


def _random(shape, context):
    mx.random.seed(context)
    q = mx.random.normal((1, shape.query_heads, 1, shape.head_dim))
    keys, values = (mx.random.normal((1, shape.kv_heads, context, shape.head_dim)) for _ in range(2))
    mx.eval(q, keys, values)
    return q, keys, values


def _scale(q):
    return q.shape[-1] ** -0.5


def _sdpa(q, keys, values):
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=_scale(q))


def _mlx(q, keys, values):
    found = []
    exact_output = _sdpa(q, keys, values)
    mx.eval(exact_output)
    for dtype, name, tolerance in ((mx.float32, "mlx fp32", 1e-4), (mx.float16, "mlx fp16", 10 * TOLERANCE)):
        args = [x.astype(dtype) for x in (q, keys, values)]
        mx.eval(args)
        found.append(
            Candidate(
                name,
                lambda args=args: _sdpa(*args),
                lambda: exact_output,
                args[1].nbytes + args[2].nbytes,
                tolerance,
                8.0 * args[1].itemsize,
                is_exact=True,
            )
        )
    packed = [mx.quantize(x, group_size=64, bits=4) for x in (keys, values)]
    mx.eval(packed)
    dense = [mx.dequantize(*x, group_size=64, bits=4) for x in packed]
    output = _sdpa(q, *dense)
    mx.eval(output)
    n_bytes = sum(part.nbytes for x in packed for part in x)
    # q + 0: the function scales its argument in place.
    found.append(
        Candidate(
            "mlx_lm 4 bits",
            lambda: quantized_scaled_dot_product_attention(
                q + 0, *packed, scale=_scale(q), mask=None, group_size=64, bits=4
            ),
            lambda: output,
            n_bytes,
            TOLERANCE,
            8.0 * n_bytes / (keys.size + values.size),
        )
    )
    return found


def _llama(q, keys, values, report):
    found, scale = [], _scale(q)
    inputs = [np.array(x[0]) for x in (q, keys, values)]
    for kind in llama.TYPES:
        report(f"llama.cpp {kind}: filling the cache")
        attend = llama.Attention(kind, *inputs, scale, _ext.num_threads())

        def output(attend=attend):
            return mx.array(attend()[None, :, None])

        def reference(attend=attend):
            return _sdpa(q, *(mx.array(x[None]) for x in attend.held()))

        n_bytes, bits = attend.nbytes, 8.0 * attend.nbytes / (keys.size + values.size)
        # With q8_0 and q4_0 ggml rounds queries to 8 bits. Sums of f16 values are kept in fp16: n roundings of a sum
        # that grows as sqrt(n), relative to what it has become.
        tolerance = TOLERANCE + 2.0**-12 * keys.shape[2] ** 0.5 if kind == "f16" else 10 * TOLERANCE
        found.append(
            Candidate(
                f"llama.cpp {kind}",
                output,
                reference,
                n_bytes,
                tolerance,
                bits,
                is_exact=kind == "f16",
                always=True,
                kernel=attend.kernel,
                rest=attend.rest,
            )
        )
    return found


def codecs(name, heads, dim):
    """The codecs of keys and values of METHODS[name], with random tables."""
    sides = METHODS[name] if isinstance(METHODS[name], list) else [METHODS[name]] * 2

    def codec(side, what, *of):
        if what == "fp16":
            return exact.codec(side, heads, dim, mx.float16)
        if isinstance(what, str):
            return _ext.codec(side, what, heads, dim, {"bits": of[0]})
        rotations = {"encode_matrix": _rotation(heads, dim)}
        # Learned ones of keys are two arrays, weights divided out of one and multiplied into the other.
        rotations["query_matrix"] = (
            mx.array(rotations["encode_matrix"]) if side == "keys" else rotations["encode_matrix"]
        )
        return vecinfer.codec(side, mx.random.normal((heads, dim // what, of[0], what)), dim // what, **rotations)

    return codec("keys", *sides[0]), codec("values", *sides[1])


def _rotation(heads, dim):
    return mx.array(np.linalg.qr(np.random.default_rng(dim).standard_normal((heads, dim, dim)))[0], mx.float32)


def _ours(name, q, keys, values, report):
    heads, context, dim = keys.shape[1:]
    pair = codecs(name, heads, dim)
    cache = _ext.ArrayCache(*pair, 64, 4, mx.float16)
    for start in range(0, context, CHUNK):
        report(f"{name}: appending {context} tokens")
        end = min(context, start + CHUNK)
        mx.eval([s.spans for s in cache.update(keys[:, :, start:end], values[:, :, start:end])])
    held = cache.snapshot()

    def reference():
        return _sdpa(q, held[0].dequantize().astype(mx.float32), held[1].dequantize().astype(mx.float32))

    return Candidate(
        name,
        lambda: _ext.attend(q, *held, scale=_scale(q))[0],
        reference,
        cache.nbytes,
        TOLERANCE,
        sum(c.bits_per_element for c in pair) / 2,
        is_exact=name == "fp16",
        always=True,
        kernel=_ext.kernel_name(*pair),
    )


def _verify(candidate):
    """The largest relative L2 error of an output row."""
    got, want = (x.astype(mx.float32) for x in (candidate.call(), candidate.reference()))
    error = mx.linalg.norm(got - want, axis=-1) / mx.linalg.norm(want, axis=-1)
    worst = mx.max(error).item()
    if not worst <= candidate.tolerance:
        raise RuntimeError(f"{candidate.name}: relative error {worst:.2g}, wanted at most {candidate.tolerance:.0e}")
    return worst
