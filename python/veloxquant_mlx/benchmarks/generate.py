"""Prefill and decode speed of a whole model by cache, all caches side by side in one run.

The model reads a text in chunks; every chunk is read once for each cache before the next one, and decode steps
alternate as well, so that all see the same weather. Tokens after the first chunk are also scored: the perplexity
of a row is that of its own caches in this run (a chunk sees itself exactly, its history as codes).

`stack` times the attention of a larger model on random keys and values: a token appended and attended to in every
layer, several layers measured and the rest counted.
"""

import math
import statistics
import time
from dataclasses import dataclass, field

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.benchmarks import attention
from veloxquant_mlx.evaluate import bits_per_element, cache_bytes

CHUNK = 512  # tokens read at a time
_SCORED = 128  # positions turned into log-probabilities at a time


@dataclass
class _Run:
    """One cache method while the text is read."""

    label: str
    method: object
    caches: list
    prefill_seconds: float = 0.0
    peak_bytes: int = 0
    nll: float = 0.0
    scored: int = 0
    steps: list = field(default_factory=list)
    last: object = None  # the next token to decode


def rows(model, tokens, contexts, methods, n_decode, report=lambda fraction, what: None):
    """The rows of `bench generate --json`. tokens: ids of a text longer than the last context.

    methods: {label: CacheMethod}. Contexts ascend; at each, n_decode steps of every method are timed.
    """
    runs = [_Run(label, method, method.build(model)) for label, method in methods.items()]
    _warm_up(model, methods, tokens)
    found, position, start = [], 0, time.perf_counter()
    for context in contexts:
        first = position
        for run in runs:
            run.prefill_seconds, run.peak_bytes, run.steps = 0.0, 0, []
        while position < context:
            report(position / contexts[-1], f"{position} of {contexts[-1]} tokens read")
            end = min(context, position + CHUNK)
            for run in runs:
                _read(model, run, tokens, position, end)
            position = end
        for _ in range(n_decode):
            for run in runs:
                _step(model, run, tokens, position)
            position += 1
        found += [_row(run, context, context - first) for run in runs]
    report(1.0, f"done in {time.perf_counter() - start:.0f} s")
    return found


def _row(run, context, n_read):
    seconds = statistics.median(run.steps)
    return {
        "method": run.label,
        "bits": round(bits_per_element(run.caches), 3),
        "context": context,
        "simd": _ext.simd_level(),
        "threads": _ext.num_threads(),
        "prefill_tokens": n_read,
        "prefill_tokens_per_s": round(n_read / run.prefill_seconds, 1),
        "decode_ms": round(seconds * 1e3, 2),
        "tokens_per_s": round(1 / seconds, 2),
        "n_steps": len(run.steps),
        "cache_bytes": cache_bytes(run.caches),
        "prefill_peak_bytes": run.peak_bytes,
        "perplexity": round(math.exp(run.nll / run.scored), 4) if run.scored else None,
        "scored_tokens": run.scored,
    }


def _warm_up(model, methods, tokens):
    """Kernels, thread pools and pages of the model, before the first timing."""
    for method in methods.values():
        caches = method.build(model)
        mx.eval(model(mx.array([tokens[:CHUNK]]), cache=caches))
        mx.eval(model(mx.array([tokens[:1]]), cache=caches))


def _read(model, run, tokens, begin, end):
    inputs = mx.array([tokens[begin:end]])
    mx.eval(inputs)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    logits = model(inputs, cache=run.caches)
    mx.eval([cache.state for cache in run.caches])  # as mlx_lm reads a prompt: no logits
    run.prefill_seconds += time.perf_counter() - start
    run.peak_bytes = max(run.peak_bytes, mx.get_peak_memory() - before)
    if begin:  # the first chunk has no history
        _score(run, logits[0], mx.array(tokens[begin + 1 : end + 1]))


def _score(run, logits, targets):
    for at in range(0, targets.size, _SCORED):
        part = logits[at : at + _SCORED].astype(mx.float32)
        wanted = mx.take_along_axis(part, targets[at : at + _SCORED, None], axis=-1)[:, 0]
        run.nll += (mx.logsumexp(part, axis=-1) - wanted).sum().item()
    run.scored += targets.size


def _step(model, run, tokens, position):
    inputs = mx.array([tokens[position : position + 1]])
    mx.eval(inputs)
    start = time.perf_counter()
    logits = model(inputs, cache=run.caches)[:, -1]
    mx.eval(mx.argmax(logits, axis=-1))
    run.steps.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Stack:
    """The attention layers of a model: `measured` of `layers` are timed."""

    shape: attention.Shape
    layers: int = 32
    measured: int = 2

    def __str__(self):
        return f"{self.layers} layers of {self.shape}, {self.measured} measured"


def stack_rows(stack, contexts, names, n_decode, report=lambda fraction, what: None):
    """Decode steps of an attention stack: append and attend in every layer. names: of attention.METHODS."""
    found = []
    for index, context in enumerate(contexts):

        def told(what, index=index):
            report(index / len(contexts), what)

        layers = {name: [_layer(stack.shape, context, name, told) for _ in range(stack.measured)] for name in names}
        append, attend = {name: [] for name in names}, {name: [] for name in names}
        for step in range(n_decode + 1):
            told(f"{context} tokens: step {step + 1} of {n_decode + 1}")
            for name in names:
                times = [_stack_step(stack.shape, cache) for cache in layers[name]]
                if step:  # the first warms up
                    append[name].append(sum(a for a, _ in times))
                    attend[name].append(sum(b for _, b in times))
        scale = stack.layers / stack.measured
        for name in names:
            # A block is sealed every 64 steps: appends count as their mean, attention as its median.
            appended = statistics.fmean(append[name]) * scale
            attended = statistics.median(attend[name]) * scale
            found.append(
                {
                    "method": name,
                    "stack": str(stack),
                    "context": context,
                    "simd": _ext.simd_level(),
                    "threads": _ext.num_threads(),
                    "attend_ms": round(attended * 1e3, 2),
                    "append_ms": round(appended * 1e3, 3),
                    "append_share": round(appended / attended, 4),
                    "steps_per_s": round(1 / (appended + attended), 2),
                    "cache_bytes": int(sum(cache.nbytes for cache in layers[name]) * scale),
                    "n_steps": n_decode,
                }
            )
    return found


def _layer(shape, context, name, report):
    codecs = attention.codecs(name, shape.kv_heads, shape.head_dim)
    cache = _ext.ArrayCache(*codecs, 64, 4, mx.float16)
    for start in range(0, context, attention.CHUNK):
        report(f"{name}: appending {context} tokens")
        n = min(attention.CHUNK, context - start)
        mx.eval([side.spans for side in cache.update(*_tokens(shape, n))])
    return cache


def _tokens(shape, n):
    keys, values = (mx.random.normal((1, shape.kv_heads, n, shape.head_dim)) for _ in range(2))
    mx.eval(keys, values)
    return keys, values


def _stack_step(shape, cache):
    keys, values = _tokens(shape, 1)
    q = mx.random.normal((1, shape.query_heads, 1, shape.head_dim))
    mx.eval(q)
    start = time.perf_counter()
    held = cache.update(keys, values)
    mx.eval(cache.arrays())
    middle = time.perf_counter()
    mx.eval(_ext.attend(q, *held, scale=shape.head_dim**-0.5)[0])
    return middle - start, time.perf_counter() - middle
