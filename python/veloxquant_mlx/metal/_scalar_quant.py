"""Scalar quantisation of rows: packed words and one scalar a row, or one byte a code for given centroids.

Two forms of each function, told apart by their arguments:

    turboquant_scalar_quantize(keys, bits=2)           -> ScalarQuantized, for turboquant_scalar_dequantize(q)
    turboquant_scalar_quantize(x, centroids, b)        -> uint8, one code each (the published form)

Everything is lazy. Wrong shapes, dtypes and bits are a ValueError.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from veloxquant_mlx import _ext


@dataclass(frozen=True)
class ScalarQuantized:
    """Rows [..., D] as codes of `bits` bits, 32 // bits in a word, and one float16 scalar a row.

    norms: what the table values of a row are multiplied with (its norm / |z| where norm-corrected).
    seed: of the rotation; None: the rows were not rotated.
    """

    packed: mx.array  # uint32 [..., ceil(D / (32 // bits))]
    norms: mx.array  # float16 [...]
    bits: int
    shape: tuple  # of what was quantised
    dtype: mx.Dtype
    seed: int | None = None

    @property
    def nbytes(self):
        return self.packed.nbytes + self.norms.nbytes

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return math.prod(self.shape)


def turboquant_scalar_quantize(x, centroids=None, b=None, *, bits=None, scale="norm_corrected"):
    """x: floats [..., D]. With bits (1 to 4): ScalarQuantized; scale is "norm_corrected", "raw" or "unbiased".

    With centroids (2^b floats) and b: uint8 [..., D], the index of the nearest centroid; the lowest wins ties,
    NaN gets 0.
    """
    if _is_published("turboquant_scalar_quantize", centroids, b, bits):
        return _ext.nearest_scalar(x, centroids, b)
    return _quantized(x, _bits("turboquant_scalar_quantize", centroids, bits), scale, None)


def turboquant_scalar_dequantize(indices, centroids=None):
    """A ScalarQuantized -> its rows in the dtype that was quantised. Or integer codes and centroids -> float16
    of the same shape; a code beyond the table reads the last centroid."""
    if not isinstance(indices, ScalarQuantized):
        if centroids is None:
            raise ValueError("[turboquant_scalar_dequantize] centroids: got none, wanted them with plain codes")
        return _ext.scalar_centroids(indices, centroids)
    if centroids is not None:
        raise ValueError("[turboquant_scalar_dequantize] centroids: got some, wanted none with a ScalarQuantized")
    q = indices
    return _ext.scalar_dequantize(q.packed, q.norms, q.shape[-1], q.bits, q.seed is not None, q.seed or 0, q.dtype)


def turboquant_hadamard_quantize(x, diag=None, centroids=None, b=None, *, bits=None, seed=0, scale="norm_corrected"):
    """Rotate and quantise in one pass; the last dimension is a power of two up to 1024.

    With bits: ScalarQuantized of x [..., D], rotated by two rounds of random signs and Walsh-Hadamard as the
    caches do with this seed; turboquant_scalar_dequantize undoes both. With diag [D], centroids (2^b) and b:
    uint8 codes of H (diag * x) / sqrt(D), the published form; x must have unit rows for unit centroids.
    """
    name = "turboquant_hadamard_quantize"
    if diag is not None and not isinstance(diag, int):
        if bits is not None or centroids is None or b is None:
            raise ValueError(f"[{name}] arguments: got diag, wanted centroids and b with it, and no bits")
        return _ext.hadamard_nearest(x, diag, centroids, b)
    if centroids is not None or b is not None:
        raise ValueError(f"[{name}] diag: got none, wanted it with centroids and b")
    return _quantized(x, _bits(name, diag, bits), scale, seed)


def _is_published(name, centroids, b, bits):
    published = centroids is not None and not isinstance(centroids, int)
    if published and (b is None or bits is not None):
        raise ValueError(f"[{name}] b: got {'none' if b is None else 'bits as well'}, wanted b alone with centroids")
    if not published and b is not None:
        raise ValueError(f"[{name}] centroids: got none, wanted 2^b floats with b")
    return published


def _bits(name, positional, keyword):
    """bits may come as the second argument, too; 1 where they come not at all."""
    if positional is not None and keyword is not None:
        raise ValueError(f"[{name}] bits: got it twice, wanted it once")
    given = keyword if keyword is not None else positional
    if given is None:
        return 1
    if not isinstance(given, int) or isinstance(given, bool):
        raise ValueError(f"[{name}] bits: got {given!r}, wanted 1, 2, 3 or 4")
    return given


def _quantized(x, bits, scale, seed):
    words, norms = _ext.scalar_quantize(x, bits, scale, seed is not None, seed or 0)
    return ScalarQuantized(words, norms, bits, tuple(x.shape), x.dtype, seed)
