"""The cache object that mlx_lm drives: one per attention layer, a thin shell over the C++ ArrayCache."""

import logging
from dataclasses import replace

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from veloxquant_mlx import _ext
from veloxquant_mlx.cache import state as states
from veloxquant_mlx.cache.adaptive import Fit, fit
from veloxquant_mlx.cache.layout import flat_caches
from veloxquant_mlx.metal.fused_sdpa import patch_mlx_lm_for_fused_sdpa
from veloxquant_mlx.metal.rows import CausalMask

log = logging.getLogger("veloxquant_mlx")


class VeloxQuantKVCache:
    """Keys and values of one layer, packed.

    make_codecs(exact_dtype) -> (key codec, value codec): called at the first update, when the
    model's dtype is known (exact tokens are kept in bf16 for bf16 models, else in fp16).
    fingerprint, layer: the model and the place in it that the cache belongs to; saved with it.
    fit_plan: the cache starts with exact codecs and fits its own later (cache/adaptive.py).
    """

    def __init__(
        self,
        make_codecs,
        *,
        window=64,
        sinks=4,
        strict=False,
        fused=True,
        fingerprint=None,
        layer=None,
        fit_plan=None,
    ):
        self._make_codecs = make_codecs
        self._fit = None if fit_plan is None else Fit(fit_plan)  # the next one; None: no more
        self.owns_tables = fit_plan is not None
        self.fit_report = None
        self._window, self._sinks = window, sinks
        self.strict, self.fused = strict, fused
        self.fingerprint, self.layer = fingerprint, layer
        self._codecs = None
        self._core = None
        self._exact_dtype = None

    def _start(self, dtype):
        if self._make_codecs is None:
            raise ValueError("cache: got one that was saved before its first use, wanted a new one: it has no codec")
        self._exact_dtype = mx.bfloat16 if dtype == mx.bfloat16 else mx.float16
        self._codecs = self._make_codecs(self._exact_dtype)
        self._core = _ext.ArrayCache(*self._codecs, self._window, self._sinks, self._exact_dtype)

    # What models call.

    def update_and_fetch(self, keys, values):
        """keys, values: [B, H_kv, n, D], RoPE applied. Returns EncodedTensors for the fused
        attention, or dense arrays (dequantised history) where the layer cannot use it."""
        if self._core is None:
            self._start(keys.dtype)
        if self._fit is not None and self._core.length >= self._fit.plan.tokens:
            self._fit_now()
        return self._handed_out(self._core.update(keys, values, self.strict))

    def _fit_now(self):
        """Waits for the tokens so far to be evaluated, once or a few times in the life of a sequence."""
        self._codecs, self._core, self.fit_report = fit(
            self._core, self._fit.plan, self._fit.moments, self._window, self._sinks, self._exact_dtype
        )
        self._fit = self._fit.next()
        log.info(
            "layer %s: tables fitted on %d tokens in %.2f s, %d bytes; %d more while it lasted",
            self.layer,
            self.fit_report.tokens,
            self.fit_report.seconds,
            sum(codec.nbytes for codec in self._codecs),
            self.fit_report.peak_bytes,
        )

    def observe_queries(self, queries):
        """queries: [B, H_q, n, D] of the tokens that update_and_fetch just took; called by the attention hook."""
        if self._fit is not None and not self._fit.again:
            self._fit.moments.add(queries, self._codecs[0].n_kv_heads)

    def fetch(self):
        """What is held now, in the form of update_and_fetch; (None, None) before the first update."""
        return (None, None) if self._core is None else self._handed_out(self._core.snapshot())

    def _handed_out(self, encoded):
        return encoded if self.fused else (encoded[0].dequantize(), encoded[1].dequantize())

    @property
    def keys(self):
        """None is held: models that reach for the arrays of their cache (sparse indexers, pipelines over
        several machines) cannot work on packed ones. AttributeError, so that hasattr says no."""
        raise AttributeError(
            "cache: this model reads `keys` or `values` of its cache itself, and a packed cache holds no such arrays; "
            "use the model's own cache (mlx_lm.models.cache.make_prompt_cache)"
        )

    values = keys

    # For layers that attend to the keys and values of another one, after its update.
    keys_and_values = fetch

    @property
    def offset(self) -> int:
        return 0 if self._core is None else self._core.length

    def make_mask(self, n, return_array=False, window_size=None):
        if not return_array and window_size is None:
            return None if n == 1 else "causal"
        if n == 1 and (window_size is None or self.offset < window_size):
            return None
        mask = create_causal_mask(n, self.offset, window_size=window_size)
        return mask if window_size is not None else CausalMask(mask)

    # What generate, the server and speculative decoding call.

    @property
    def state(self) -> tuple:
        """Everything: text, checksum, arrays (cache/state.py). Lazy and cheap."""
        return states.pack(self._settings(), self._codecs, self._core, self._exact_dtype, self._fit)

    @state.setter
    def state(self, state):
        settings, self._codecs, self._core, self._exact_dtype, self._fit = states.unpack(state)
        self._window, self._sinks = settings["window"], settings["sinks"]
        self.strict, self.fused = settings["strict"], settings["fused"]
        self.fingerprint, self.layer = settings["fingerprint"], settings["layer"]
        self.owns_tables = settings["owns_tables"]

    def interchange_state(self) -> tuple:
        """The same for files, in an order that does not depend on the layout in memory; evaluated."""
        return states.pack(self._settings(), self._codecs, self._core, self._exact_dtype, self._fit, interchange=True)

    def _settings(self):
        return {
            "fingerprint": self.fingerprint,
            "layer": self.layer,
            "window": self._window,
            "sinks": self._sinks,
            "strict": self.strict,
            "fused": self.fused,
            "owns_tables": self.owns_tables,
        }

    @classmethod
    def from_state(cls, state):
        """A cache that goes on where the one of `state` was, with the codecs of the state."""
        cache = cls(None)
        cache.state = state
        if cache.fused:
            patch_mlx_lm_for_fused_sdpa()
        return cache

    @classmethod
    def merge(cls, caches):
        """A batch with these caches as rows; mlx_lm batches every cache that has this function."""
        from veloxquant_mlx.cache.batch import BatchVeloxQuantKVCache  # which is made of this class

        return BatchVeloxQuantKVCache.merge(caches)

    def is_trimmable(self):
        return True

    def trim(self, n) -> int:
        return 0 if self._core is None else self._core.trim(n)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    def __deepcopy__(self, memo):
        # Arrays are immutable: a copy shares them.
        copy = VeloxQuantKVCache(
            self._make_codecs,
            window=self._window,
            sinks=self._sinks,
            strict=self.strict,
            fused=self.fused,
            fingerprint=self.fingerprint,
            layer=self.layer,
        )
        copy._codecs, copy._exact_dtype = self._codecs, self._exact_dtype
        copy._core = None if self._core is None else self._core.copy()
        copy._fit = None if self._fit is None else replace(self._fit, moments=replace(self._fit.moments))
        copy.owns_tables, copy.fit_report = self.owns_tables, self.fit_report
        return copy

    # What it holds.

    @property
    def nbytes(self) -> int:
        """Bytes of this sequence: packed codes and exact tokens, the capacity of the latter included;
        tables too where they were fitted on it."""
        tables = sum(codec.nbytes for codec in self.codecs) if self.owns_tables else 0
        return tables + (0 if self._core is None else self._core.nbytes)

    @property
    def elements_per_token(self) -> int:
        """Of keys and values; known once the cache was used."""
        return sum(codec.n_kv_heads * codec.head_dim for codec in self._codecs)

    def nbytes_at(self, n) -> int:
        """nbytes of a sequence of n tokens in this cache, which has been used."""
        exact = sum(array.nbytes for array in self._core.arrays()[:2])
        blocks = max(0, n - self._sinks - self._window) // 64
        packed = sum(blocks * codec.n_kv_heads * codec.block_bytes for codec in self._codecs)
        return exact + packed + (sum(codec.nbytes for codec in self._codecs) if self.owns_tables else 0)

    @property
    def shared_nbytes(self) -> int:
        """Bytes of the tables and transforms: once per model, however many sequences."""
        return shared_nbytes([self])

    @property
    def lookup_nbytes(self) -> int:
        """Bytes of the forms of the tables that attention on a CPU looks up in registers: made at the first
        decode step, kept with the tables."""
        return lookup_nbytes([self])

    @property
    def codecs(self) -> tuple:
        """(key codec, value codec); empty before the first update."""
        return self._codecs or ()

    @property
    def packed_range(self) -> tuple[int, int]:
        """Positions [start, stop) that are held as codes."""
        return (0, 0) if self._core is None else (self._sinks, self._core.positions()[1])

    @property
    def nonfinite(self) -> int:
        """Elements of keys and values so far that were NaN, infinite, or too large for 16 bits."""
        return 0 if self._core is None else self._core.nonfinite

    @property
    def bits_per_element(self) -> float | None:
        """Bits of a packed element, keys and values averaged; None before the first update."""
        return None if self._codecs is None else sum(c.bits_per_element for c in self._codecs) / 2

    @property
    def kernel(self) -> str | None:
        """Which attention runs on this cache; None before the first update."""
        if self._codecs is None:
            return None
        return _ext.kernel_name(*self._codecs) if self.fused else "dequantised, mx.fast attention"


# load_prompt_cache looks classes up by their names in this module.
mlx_lm_cache.VeloxQuantKVCache = VeloxQuantKVCache


def shared_nbytes(caches) -> int:
    """Bytes of the tables that sequences share, of all `caches`, each table counted once."""
    sharing = [c for c in flat_caches(caches) if not getattr(c, "owns_tables", False)]
    codecs = {id(codec): codec for c in sharing for codec in getattr(c, "codecs", ())}
    return sum(codec.nbytes for codec in codecs.values())


def lookup_nbytes(caches) -> int:
    """Bytes of the forms of tables for look-ups in registers, of all `caches`, each counted once."""
    codecs = {id(codec): codec for c in flat_caches(caches) for codec in getattr(c, "codecs", ())}
    return sum(codec.kept_nbytes for codec in codecs.values())
