"""The cache object that mlx_lm drives: one per attention layer, a thin shell over the C++ ArrayCache."""

import logging

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from veloxquant_mlx import _ext

log = logging.getLogger("veloxquant_mlx")


class VeloxQuantKVCache:
    """Keys and values of one layer, packed.

    make_codecs(exact_dtype) -> (key codec, value codec): called at the first update, when the
    model's dtype is known (exact tokens are kept in bf16 for bf16 models, else in fp16).
    """

    def __init__(self, make_codecs, *, window=64, sinks=4, strict=False, fused=True):
        self._make_codecs = make_codecs
        self._window, self._sinks = window, sinks
        self.strict, self.fused = strict, fused
        self._codecs = None
        self._core = None

    def _start(self, dtype):
        exact_dtype = mx.bfloat16 if dtype == mx.bfloat16 else mx.float16
        self._codecs = self._make_codecs(exact_dtype)
        self._core = _ext.ArrayCache(*self._codecs, self._window, self._sinks, exact_dtype)

    # What models call.

    def update_and_fetch(self, keys, values):
        """keys, values: [B, H_kv, n, D], RoPE applied. Returns EncodedTensors for the fused
        attention, or dense arrays (dequantised history) where the layer cannot use it."""
        if self._core is None:
            self._start(keys.dtype)
        encoded = self._core.update(keys, values, self.strict)
        if self.fused:
            return encoded
        return encoded[0].dequantize(), encoded[1].dequantize()

    @property
    def offset(self) -> int:
        return 0 if self._core is None else self._core.length

    def make_mask(self, n, return_array=False, window_size=None):
        if not return_array and window_size is None:
            return None if n == 1 else "causal"
        if n == 1 and (window_size is None or self.offset < window_size):
            return None
        return create_causal_mask(n, self.offset, window_size=window_size)

    # What generate, the server and speculative decoding call.

    @property
    def state(self):
        return [] if self._core is None else self._core.arrays()

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
            self._make_codecs, window=self._window, sinks=self._sinks, strict=self.strict, fused=self.fused
        )
        copy._codecs = self._codecs
        copy._core = None if self._core is None else self._core.copy()
        return copy

    # What it holds.

    @property
    def nbytes(self) -> int:
        """Bytes of this sequence: packed codes and exact tokens, the capacity of the latter included."""
        return 0 if self._core is None else self._core.nbytes

    @property
    def shared_arrays(self) -> list:
        """Tables and transforms: once per model, however many sequences."""
        return [] if self._codecs is None else self._codecs[0].arrays + self._codecs[1].arrays

    @property
    def shared_nbytes(self) -> int:
        return sum(a.nbytes for a in self.shared_arrays)

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


def shared_nbytes(caches) -> int:
    """Bytes of the tables of all `caches`, each array counted once."""
    arrays = {id(a): a.nbytes for c in caches for a in getattr(c, "shared_arrays", [])}
    return sum(arrays.values())
