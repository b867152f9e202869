"""Caches for comparison, not for use: attention on what any quantiser makes of the history, computed densely.

A query sees exactly the tokens that are exact in a cache of ours (sinks, and blocks of 64 that are not sealed
yet), or, with block=1, window=0, sinks=0, none at all: what mlx_lm's QuantizedKVCache does.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from veloxquant_mlx import _ext

_QUERIES = 256  # that are attended at a time


@dataclass(frozen=True)
class Coder:
    """code: [1, H, n, D] of all tokens -> what decoding their codes gives. bits: of an element, scalars included.
    codec: the _ext.Codec whose tables it uses, if any."""

    code: object
    bits: float
    codec: object = None


class ReferenceCache(KVCache):
    """keys, values: Coders. codecs: those whose tables sequences share."""

    def __init__(self, keys, values, window=64, sinks=4, block=64):
        super().__init__()
        self._coders = keys, values
        self._window, self._sinks, self._block = window, sinks, block
        self.codecs = tuple(coder.codec for coder in self._coders if coder.codec is not None)

    def update_and_fetch(self, keys, values):
        dense = super().update_and_fetch(keys, values)
        held = (
            ReferenceTensor(x.astype(mx.float32), coder.code(x).astype(mx.float32), self._first_exact)
            for x, coder in zip(dense, self._coders)
        )
        return tuple(held)

    def _first_exact(self, positions):
        """For queries at `positions`: tokens from `sinks` up to this one are codes."""
        sealed = mx.maximum(positions + 1 - self._sinks - self._window, 0) // self._block
        return self._sinks, self._sinks + sealed * self._block

    @property
    def bits_per_element(self) -> float:
        return sum(coder.bits for coder in self._coders) / 2

    @property
    def elements_per_token(self) -> int:
        return 2 * self.keys.shape[1] * self.keys.shape[3]

    def nbytes_at(self, n) -> int:
        """Bytes that a cache of this kind would hold of n tokens, the exact ones in 16 bits."""
        coded = max(0, n - self._sinks - self._window) // self._block * self._block
        return int(self.elements_per_token * (coded * self.bits_per_element + (n - coded) * 16) / 8)

    @property
    def nbytes(self) -> int:
        return self.nbytes_at(self.offset)


@dataclass(frozen=True)
class ReferenceTensor:
    """Keys or values as they came and as their codes give them, fp32 [1, H, n, D]."""

    dense: mx.array
    coded: mx.array
    first_exact: object

    def attend(self, queries, values, mask, *, scale, sinks=None):
        """Causal attention of the last tokens; self: the keys. [1, H_q, n, D] in the dtype of the queries."""
        if sinks is not None or not (mask is None or isinstance(mask, str)):
            raise ValueError("mask: got an array or attention sinks, wanted causal attention: reference caches have it")
        (_, heads, n, dim), total = queries.shape, self.dense.shape[2]
        grouped = queries.astype(mx.float32).reshape(self.dense.shape[1], -1, n, dim) * scale
        tokens, out = mx.arange(total), []
        for start in range(0, n, _QUERIES):
            stop = min(start + _QUERIES, n)
            positions = mx.arange(total - n + start, total - n + stop)[:, None]
            first, last = self.first_exact(positions)
            codes = (tokens >= first) & (tokens < last)
            part = grouped[:, :, start:stop]
            scores = mx.where(codes, part @ _transposed(self.coded), part @ _transposed(self.dense))
            weights = mx.softmax(mx.where(tokens <= positions, scores, -mx.inf), axis=-1)
            exact = mx.where(codes, 0, weights) @ values.dense[0, :, None]
            out.append(exact + mx.where(codes, weights, 0) @ values.coded[0, :, None])
            mx.eval(out[-1])
        return mx.concatenate(out, axis=2).reshape(1, heads, n, dim).astype(queries.dtype)


def _transposed(x):
    return x[0, :, None].swapaxes(-1, -2)


def affine_coder(bits=4, group_size=64) -> Coder:
    """What mlx_lm's QuantizedKVCache stores: scale and bias of 16 bits a group."""

    def code(x):
        return mx.dequantize(*mx.quantize(x, group_size=group_size, bits=bits), group_size=group_size, bits=bits)

    return Coder(code, bits + 32 / group_size)


def codec_coders(keys, values, rope=None) -> tuple:
    """(of keys, of values) by two _ext.Codecs. rope: an _ext.Rope that is undone before keys are encoded."""

    def code(x, side):
        # Whole blocks are encoded; the rest would not be sealed in any cache.
        core = _ext.ArrayCache(keys, values, 0, 0, mx.bfloat16 if x.dtype == mx.bfloat16 else mx.float16)
        core.update(x, x)
        return core.snapshot()[side].dequantize()

    def code_keys(x):
        positions = mx.arange(x.shape[2])
        return code(x, 0) if rope is None else rope.rotate(code(rope.unrotate(x, positions), 0), positions)

    return (
        Coder(code_keys, keys.bits_per_element, keys),
        Coder(lambda x: code(x, 1), values.bits_per_element, values),
    )
