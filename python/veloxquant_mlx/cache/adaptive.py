"""codebook="adaptive": rotations and tables fitted on the sequence itself, no calibration.

A cache starts exact. When `tokens` have come, at the next update, each layer fits learned rotations and
tables to the keys and values of these, and to the queries so far, encodes all that is older than the window,
and goes on as any other cache. The tables belong to the sequence: its nbytes count them, its files carry them.
Keys carry their RoPE: tables that only saw the first positions lose most of a key at later ones. So a fit also
sees the keys turned to positions up to fit_context (docs/quality.md has the errors with and without).
Layer after layer fits, so that what a fit needs beside the cache is that of one layer (FitReport.peak_bytes).

A sequence that outgrows fit_context fits again, for four times as many positions: what it holds is decoded and
encoded anew. That pays only there: codes of codes lose half as much again, tables that never saw a position more
than ten times as much.
"""

import time
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codebook import TABLE_SHAPES, key_and_value_bits
from veloxquant_mlx.cache.codecs import exact, vecinfer
from veloxquant_mlx.cache.fitting import Fitting, fit_learned
from veloxquant_mlx.models.rope import LayerRope

# A table for each sub-vector has few vectors a centroid: from centroids of a normal distribution (C++:
# KMeansStart::normal) 6 iterations over-fit less than k-means++ does. One for a head sees all sub-vectors, and their
# means, which no normal distribution has.
_STARTS = {"subvector": ("normal", 6), "head": ("plus_plus", 10)}
# Vectors of a head that a fit takes at most: it stays cheap beside reading a prompt of that length.
VECTORS = 8192
_EVALUATE = 256  # queries
_GROWTH = 4  # of the context from fit to fit
_COPIES = 3  # of each key, turned to later positions
_ROPE_FIELDS = ("head_dim", "traditional", "position_scale", "attention_factor")


def wanted(config) -> bool:
    return isinstance(config.codebook, str)


def check(config) -> None:
    """ValueError naming the field of the KVCacheConfig that does not go with codebook="adaptive"."""
    for name in ("fit_tokens", "fit_context"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, wanted an integer of at least 1")
    if config.fit_per not in _STARTS:
        raise ValueError(f"fit_per: got {config.fit_per!r}, wanted 'subvector' or 'head'")
    if not wanted(config):
        return
    if config.codebook != "adaptive":
        raise ValueError(f"codebook: got {config.codebook!r}, wanted 'adaptive', a Codebook or an array")
    if config.method != "vecinfer" or config.value_method not in (None, "vecinfer"):
        raise ValueError(f"method: got {config.method!r} with codebook='adaptive', wanted 'vecinfer' for both sides")
    for name in ("value_codebook", "smooth_factors", "num_subspaces"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}: got one with codebook='adaptive', which fits its own, wanted none")
    for name in ("bits", "value_bits"):
        if getattr(config, name) is not None:
            key_and_value_bits(getattr(config, name))


@dataclass(frozen=True)
class FitPlan:
    """bits: of keys and of values. tokens: how many are waited for. per_head: one table for all
    sub-vectors of a head, which a short sequence pays for sooner. context: positions that the tables are to
    serve; rope: how keys turn with their position, None where it is not known."""

    bits: tuple
    tokens: int
    per_head: bool = False
    context: int = 0
    rope: LayerRope | None = None

    def as_dict(self) -> dict:
        rope = None
        if self.rope is not None:
            rope = {name: getattr(self.rope, name) for name in _ROPE_FIELDS} | {"inv_freq": self.rope.inv_freq.tolist()}
        return {
            "bits": list(self.bits),
            "tokens": self.tokens,
            "per_head": self.per_head,
            "context": self.context,
            "rope": rope,
        }

    @classmethod
    def from_dict(cls, fields):
        bits, tokens, per_head, context = (fields[name] for name in ("bits", "tokens", "per_head", "context"))
        known = isinstance(bits, list) and len(bits) == 2 and all(b in TABLE_SHAPES for b in bits)
        counted = type(tokens) is int and tokens >= 1 and type(context) is int and context >= 0
        if not (known and counted and type(per_head) is bool):
            raise ValueError(f"state: got a fit of {fields!r:.80}, wanted bits, tokens, per_head and context")
        rope = fields["rope"]
        if rope is not None:
            rope = LayerRope(**{name: rope[name] for name in _ROPE_FIELDS}, inv_freq=rope["inv_freq"])
            rope.core()  # which checks the numbers
        return cls(tuple(bits), tokens, per_head, context, rope)


@dataclass
class QueryMoments:
    """Sums of the squares of the queries of each KV head, which weigh the error of the keys."""

    squares: mx.array | None = None  # fp32 [H_kv, D]
    count: int = 0

    def add(self, queries, n_kv_heads):
        """queries: [B, H_q, n, D], post-RoPE."""
        batch, heads, n, dim = queries.shape
        squares = mx.square(queries.astype(mx.float32))
        squares = mx.where(mx.isfinite(squares), squares, 0).sum(axis=(0, 2))
        squares = squares.reshape(n_kv_heads, heads // n_kv_heads, dim).sum(axis=1)
        self.squares = squares if self.squares is None else self.squares + squares
        before, self.count = self.count, self.count + batch * n * (heads // n_kv_heads)
        if n == 1 and before // _EVALUATE != self.count // _EVALUATE:
            mx.async_eval(self.squares)  # else the graph of every step would be kept until the fit

    def mean(self):
        """E q_i^2, fp32 [H_kv, D]; None where the layer's attention never showed its queries."""
        return None if self.squares is None else self.squares / self.count


@dataclass
class Fit:
    """A fit that is still to come: the plan, and what was seen so far. again: not the first of the sequence."""

    plan: FitPlan
    moments: QueryMoments = field(default_factory=QueryMoments)
    again: bool = False

    def next(self):
        """The one that follows when the sequence outgrows the positions of this one's tables; None where keys are
        not known to turn with their positions."""
        if self.plan.rope is None or not self.plan.rope.rotates:
            return None
        longer = max(self.plan.context, 2 * self.plan.tokens)
        return Fit(replace(self.plan, tokens=longer, context=_GROWTH * longer), self.moments, again=True)


@dataclass(frozen=True)
class FitReport:
    """What a fit cost and gave, for one layer."""

    tokens: int
    seconds: float
    peak_bytes: int  # held at once beside the exact cache and the packed one: copies of the history, scratch
    relative_error: dict  # side -> [H_kv]: |y - y^|^2 / |y|^2 on the tokens it was fitted on


def starting_codecs(n_kv_heads, head_dim, dtype):
    return tuple(exact.codec(side, n_kv_heads, head_dim, dtype) for side in ("keys", "values"))


def fit(core, plan, moments, window, sinks, dtype):
    """core: the _ext.ArrayCache so far. Returns (codecs, a core that holds its tokens packed, FitReport).

    Fitted on the first plan.tokens tokens, so that it does not matter in which pieces they came.
    """
    started = time.perf_counter()
    sides = history(core, sinks, dtype)
    codecs, errors, scratch = [], {}, 0
    for side, x, bits, queries in zip(("keys", "values"), sides, plan.bits, (moments.mean(), None)):
        per = "head" if plan.per_head else "subvector"
        start, iterations = _STARTS[per]
        how = Fitting.of_bits(bits, x.shape[3], per=per, start=start, max_iterations=iterations)
        seen = x[:, :, min(sinks, plan.tokens - 1) : plan.tokens]
        seen = seen[:, :, :: -(-seen.shape[2] // VECTORS)]
        if side == "keys" and plan.rope is not None and plan.context > plan.tokens:
            seen = _at_later_positions(seen, plan)
            queries = None if queries is None else plan.rope.turned_moments(queries)
        seen = seen.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])
        transform, tables, errors[side] = fit_learned(side, seen, how, queries)
        codecs.append(vecinfer.codec(side, tables, how.n_subvectors, **transform.matrices()))
        # Besides the slice: its transform in fp32, and where all sub-vectors share a table their vectors once more.
        scratch = max(scratch, seen.nbytes + 4 * seen.size * (2 if plan.per_head else 1))
    packed = _ext.ArrayCache(*codecs, window, sinks, dtype)
    packed.update(*sides)
    mx.eval(packed.arrays())
    peak = sum(x.nbytes for x in sides) + scratch
    report = FitReport(min(core.length, plan.tokens), time.perf_counter() - started, peak, errors)
    return tuple(codecs), packed, report


def _at_later_positions(keys, plan):
    """Keys as they come at the positions that the tables are to serve: themselves and copies that RoPE turns
    further, or where there are many of them every second one turned."""
    n, room = keys.shape[2], plan.context - plan.tokens
    copies = max(0, min(_COPIES, VECTORS // n - 1))
    rope = plan.rope.core()

    def turned(x, number):
        # Multiples of irrational numbers fill the room evenly.
        places = (np.arange(x.shape[2]) * 0.6180339887498949 + number * 0.7548776662466927) % 1.0
        return rope.rotate(x, mx.array((places * room).astype(np.int32))).astype(keys.dtype)

    if copies == 0:
        return mx.concatenate([keys[:, :, ::2], turned(keys[:, :, 1::2], 1)], axis=2)
    return mx.concatenate([keys, *(turned(keys, number + 1) for number in range(copies))], axis=2)


def history(core, sinks, dtype):
    """All tokens as `core` holds them, 16-bit [B, H_kv, length, D]: of keys, of values."""
    held = core.snapshot()
    if held[0].codec.method == "exact":
        return exact_history(core, sinks, dtype)
    return [side.dequantize().astype(dtype) for side in held]


def exact_history(core, sinks, dtype):
    """The tokens of a cache of exact codecs, in their order: (keys, values), 16-bit [B, H_kv, length, D]."""
    exact_arrays, spans = core.arrays()[:2], core.arrays()[2:]
    length, tail_start, *positions = core.positions()
    counts = [64 * (n - 1) + last for _, n, last in np.reshape(positions, (-1, 3)).tolist()]
    sides = []
    for i, stored in enumerate(exact_arrays):
        batch, heads, _, dim = stored.shape
        parts = [stored[:, :, : min(sinks, length)]]
        for span, count in zip(spans[i * len(counts) : (i + 1) * len(counts)], counts):
            tokens = span.view(dtype).reshape(batch, heads, -1, dim)
            parts.append(tokens[:, :, :count])
        parts.append(stored[:, :, sinks : sinks + max(0, length - tail_start)])
        sides.append(mx.concatenate(parts, axis=2))
    return sides
