"""codebook="adaptive": rotations and tables fitted on the sequence itself, no calibration.

A cache starts exact. When `tokens` have come, at the next update, each layer fits learned rotations and
tables to the keys and values of these, and to the queries so far, encodes all that is older than the window,
and goes on as any other cache. The tables belong to the sequence: its nbytes count them, its files carry them.
Layer after layer fits, so that what a fit needs beside the cache is that of one layer (FitReport.peak_bytes).

A second fit is not offered: the exact tokens are gone by then, and codes of codes lose more than tables that fit
better gain (docs/quality.md). Who can hold more exact tokens for a while waits for more (fit_tokens).
"""

import time
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codebook import TABLE_SHAPES, key_and_value_bits
from veloxquant_mlx.cache.codecs import exact, vecinfer
from veloxquant_mlx.cache.fitting import PER, Fitting, fit_learned

# From centroids of a normal distribution (C++: KMeansStart::normal) more iterations only over-fit.
ITERATIONS = 6


def wanted(config) -> bool:
    return isinstance(config.codebook, str)


def check(config) -> None:
    """ValueError naming the field of the KVCacheConfig that does not go with codebook="adaptive"."""
    if not isinstance(config.fit_tokens, int) or isinstance(config.fit_tokens, bool) or config.fit_tokens < 1:
        raise ValueError(f"fit_tokens: got {config.fit_tokens!r}, wanted an integer of at least 1")
    if config.fit_per not in PER:
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
    sub-vectors of a head, which a short sequence pays for sooner."""

    bits: tuple
    tokens: int
    per_head: bool = False

    def as_dict(self) -> dict:
        return {"bits": list(self.bits), "tokens": self.tokens, "per_head": self.per_head}

    @classmethod
    def from_dict(cls, fields):
        bits, tokens, per_head = fields["bits"], fields["tokens"], fields["per_head"]
        known = isinstance(bits, list) and len(bits) == 2 and all(b in TABLE_SHAPES for b in bits)
        if not (known and type(tokens) is int and tokens >= 1 and type(per_head) is bool):
            raise ValueError(f"state: got a fit of {fields!r:.80}, wanted bits, tokens and per_head")
        return cls(tuple(bits), tokens, per_head)


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
        self.count += batch * n * (heads // n_kv_heads)

    def mean(self):
        """E q_i^2, fp32 [H_kv, D]; None where the layer's attention never showed its queries."""
        return None if self.squares is None else self.squares / self.count


@dataclass
class Fit:
    """A fit that is still to come: the plan, and what was seen so far."""

    plan: FitPlan
    moments: QueryMoments = field(default_factory=QueryMoments)


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
    """core: the exact _ext.ArrayCache so far. Returns (codecs, a core that holds its tokens packed, FitReport).

    Fitted on the first plan.tokens tokens, so that it does not matter in which pieces they came.
    """
    started = time.perf_counter()
    sides = exact_history(core, sinks, dtype)
    codecs, errors, scratch = [], {}, 0
    for side, x, bits, queries in zip(("keys", "values"), sides, plan.bits, (moments.mean(), None)):
        how = Fitting.of_bits(
            bits, x.shape[3], per="head" if plan.per_head else "subvector", start="normal", max_iterations=ITERATIONS
        )
        seen = x[:, :, min(sinks, plan.tokens - 1) : plan.tokens]
        seen = seen.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])
        transform, tables, errors[side] = fit_learned(seen, how, queries)
        codecs.append(vecinfer.codec(side, tables, how.n_subvectors, **transform.matrices()))
        # Besides the slice: its transform in fp32, and where all sub-vectors share a table their vectors once more.
        scratch = max(scratch, seen.nbytes + 4 * seen.size * (2 if plan.per_head else 1))
    packed = _ext.ArrayCache(*codecs, window, sinks, dtype)
    packed.update(*sides)
    mx.eval(packed.arrays())
    peak = sum(x.nbytes for x in sides) + scratch
    report = FitReport(min(core.length, plan.tokens), time.perf_counter() - started, peak, errors)
    return tuple(codecs), packed, report


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
