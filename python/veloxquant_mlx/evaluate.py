"""How much a cache costs a model: perplexity, KL divergence and top-1 agreement against the exact cache.

The protocol, so that two runs agree: the text is tokenised once, without BOS; its first n * length tokens
are n windows; positions 1..length-1 of each window are scored. The exact cache (mlx_lm's own, in the model's
dtype) and every method run on the same window, in one pass, before the next window starts, so that memory is
bounded by two windows of logits.
"""

import math
import time
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache, shared_nbytes
from veloxquant_mlx.cache.layout import flat_caches, native_caches
from veloxquant_mlx.cache.reference import ReferenceCache
from veloxquant_mlx.layer_errors import errors_of, observed

_CHUNK = 256  # positions turned into log-probabilities at a time
_PROMPT_CHUNK = 2048  # tokens of a prompt read at a time: attention without a fused kernel holds all its scores
_OURS = (VeloxQuantKVCache, ReferenceCache)
LENGTHS = (2048, 8192)  # that bits_with_everything is stated at


@dataclass
class Score:
    """Means over the scored positions of all windows."""

    tokens: int  # positions scored
    ppl: float
    ppl_exact: float  # of the exact cache on the same positions
    kl: float  # mean KL(exact || method) of the next-token distribution, nats
    top1: float  # fraction of positions where both have the same argmax
    cache_bytes_per_token: float
    shared_bytes: int  # codebooks and transforms, once per model
    bits_per_element: float
    # Length of a sequence -> bits of an element with scalars, tables, rotations, window and sinks counted.
    bits_with_everything: dict = field(default_factory=dict)
    layers: list = field(default_factory=list)  # LayerErrors on the first window, of our caches
    fit: dict | None = None  # of adaptive caches, on the first window: see fit_cost()

    @property
    def ppl_increase(self):
        """Relative to the exact cache: 0.024 is +2.4 %."""
        return self.ppl / self.ppl_exact - 1


def read_windows(tokenizer, text, n_windows, length):
    """The first n_windows * length tokens of `text` as int32 [n_windows, length]. ValueError if there are fewer."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    wanted = n_windows * length
    if len(tokens) < wanted:
        raise ValueError(
            f"text: got {len(tokens)} tokens, wanted at least {wanted} ({n_windows} windows of {length}); "
            f"use fewer windows or a longer text"
        )
    return np.array(tokens[:wanted], np.int32).reshape(n_windows, length)


def evaluate(model, windows, methods, progress=lambda fraction, text: None, score_from=0):
    """Scores caches on `windows` (int [n, length]).

    methods: {label: f() -> list of caches, new and empty}; ours must be built with strict=True, so that one pass
    sees what token-by-token decoding would. progress(fraction in 0..1, what). Returns {label: Score}.
    score_from: so many tokens of each window are a prompt, read first and not scored.
    """
    sums = {label: _Sums() for label in methods}
    exact_nll = 0.0
    steps, done = len(windows) * (1 + len(methods)), 0
    for number, window in enumerate(windows):
        progress(done / steps, f"window {number + 1}/{len(windows)}: exact cache")
        exact = LogProbs(model, window, native_caches(model), score_from)
        exact_nll += exact.nll()
        done += 1
        for label, make_caches in methods.items():
            progress(done / steps, f"window {number + 1}/{len(windows)}: {label}")
            caches = make_caches()
            run_with = observed(caches) if number == 0 else caches
            log_probs = LogProbs(model, window, run_with, score_from)
            sums[label].add(exact, log_probs, caches)
            if number == 0:
                sums[label].layers = errors_of(run_with)
                sums[label].fit = fit_cost(caches, log_probs.prompt_seconds)
            done += 1
            del caches, run_with, log_probs
            mx.clear_cache()
    progress(1.0, "scored")
    scored = windows.shape[0] * (windows.shape[1] - 1 - score_from)
    return {label: total.score(scored, windows.size, exact_nll) for label, total in sums.items()}


def mean_kl(exact, other):
    """Mean KL(exact || other), nats, over the positions of two LogProbs of the same tokens."""
    return _divergence(exact, other)[0] / exact.n_scored


class LogProbs:
    """The next-token distributions of a model over `tokens`, from position `start` on.

    The tokens before `start` are read first, then the others in one pass. Row t predicts
    tokens[start + t + 1]; the last token predicts nothing.
    """

    def __init__(self, model, tokens, caches, start=0):
        tokens, started = np.asarray(tokens, np.int32), time.perf_counter()
        for first, last in _chunks(start, _PROMPT_CHUNK):
            model(mx.array(tokens[None, first:last]), cache=caches)
            mx.eval([c.state for c in caches])
        self.prompt_seconds = time.perf_counter() - started
        logits = mx.contiguous(model(mx.array(tokens[None, start:]), cache=caches)[0, :-1])
        mx.eval(logits)
        self.targets = tokens[start + 1 :]
        self.n_scored = logits.shape[0]
        self._logits = logits  # kept in the model's dtype; log-probabilities are made chunk by chunk

    def rows(self, start, stop):
        """(p, log p) of the positions start..stop-1, fp32 [stop - start, vocabulary] each.

        In NumPy: its exp is vectorised, MLX's on a CPU takes 16 times as long.
        """
        logits = np.array(self._logits[start:stop].astype(mx.float32))
        logits -= logits.max(axis=-1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(axis=-1, keepdims=True)
        return p / total, logits - np.log(total)

    def nll(self):
        """The summed negative log-likelihood of the tokens, nats."""
        return sum(_nll(self.rows(start, stop)[1], self.targets[start:stop]) for start, stop in _chunks(self.n_scored))


def _chunks(n, size=_CHUNK):
    for first in range(0, n, size):
        yield first, min(first + size, n)


def _nll(log_p, targets):
    return -float(np.take_along_axis(log_p, targets[:, None], axis=-1).sum(dtype=np.float64))


def _divergence(exact, other):
    """(summed KL, positions with the same argmax, summed negative log-likelihood of `other`)."""
    kl, same, nll = 0.0, 0, 0.0
    for first, last in _chunks(exact.n_scored):
        (p, log_p), (_, log_q) = exact.rows(first, last), other.rows(first, last)
        kl += float(np.einsum("tv,tv->t", p, log_p - log_q).sum(dtype=np.float64))
        same += int((log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum())
        nll += _nll(log_q, exact.targets[first:last])
    return kl, same, nll


class _Sums:
    """What is added up over the windows for one method."""

    def __init__(self):
        self.nll = self.kl = 0.0
        self.same = self.cache_bytes = 0
        self.layers, self.fit = [], None

    def add(self, exact, other, caches):
        kl, same, nll = _divergence(exact, other)
        self.kl += kl
        self.same += same
        self.nll += nll
        self.cache_bytes += cache_bytes(caches)
        self.shared_bytes = shared_nbytes(caches)
        self.bits_per_element = bits_per_element(caches)
        self.bits_with_everything = {n: bits_with_everything(caches, n) for n in LENGTHS}

    def score(self, scored, tokens, exact_nll):
        return Score(
            tokens=scored,
            ppl=math.exp(self.nll / scored),
            ppl_exact=math.exp(exact_nll / scored),
            kl=self.kl / scored,
            top1=self.same / scored,
            cache_bytes_per_token=self.cache_bytes / tokens,
            shared_bytes=self.shared_bytes,
            bits_per_element=self.bits_per_element,
            bits_with_everything=self.bits_with_everything,
            layers=self.layers,
            fit=self.fit,
        )


def cache_bytes(caches):
    """Bytes that the caches of one sequence hold, all layers."""
    return sum(cache.nbytes for cache in caches)


def bits_per_element(caches):
    """Bits that one stored key or value element takes in the codes (mlx_lm's caches: in their arrays)."""
    ours = [cache.bits_per_element for cache in flat_caches(caches) if isinstance(cache, _OURS)]
    if ours:
        return sum(ours) / len(ours)
    plain = next(cache for cache in flat_caches(caches) if hasattr(cache, "keys"))
    keys = plain.keys
    if isinstance(keys, tuple):  # mlx_lm's QuantizedKVCache: codes, scales, biases
        elements = keys[0].size * 32 / plain.bits
        return 8 * sum(part.nbytes for part in keys) / elements
    return 8.0 * keys.itemsize


def bits_with_everything(caches, n):
    """Bits of a key or value element in a sequence of n tokens, everything that is held for it counted: codes,
    scalars, tables and rotations, exact tokens. caches: used at least once; those of other kinds are left out."""
    elements, total = 0, shared_nbytes(caches)
    for cache in flat_caches(caches):
        if isinstance(cache, _OURS):
            elements += n * cache.elements_per_token
            total += cache.nbytes_at(n)
        elif getattr(cache, "keys", None) is not None:
            quantised = isinstance(cache.keys, tuple)
            codes = cache.keys[0] if quantised else cache.keys
            own = 2 * n * codes.shape[1] * codes.shape[3] * (32 // cache.bits if quantised else 1)
            elements += own
            total += own * bits_per_element([cache]) / 8
    return 8 * total / max(elements, 1)


def fit_cost(caches, prompt_seconds):
    """What the fits of adaptive caches cost, all layers, beside reading the prompt; None where there were none."""
    reports = [c.fit_report for c in flat_caches(caches) if getattr(c, "fit_report", None)]
    if not reports:
        return None
    return {
        "tokens": reports[0].tokens,
        "seconds": sum(report.seconds for report in reports),
        "prompt_seconds": prompt_seconds,
        "peak_bytes": max(report.peak_bytes for report in reports),  # layers fit one after the other
    }
