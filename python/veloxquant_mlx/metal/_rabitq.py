"""RaBitQ on its own: Hamming scores of sign codes, and unbiased scores from integers.

Codes are uint8 [..., D/8], least significant bit first, a bit is 1 for >= 0. Everything is lazy.
"""

import mlx.core as mx

from veloxquant_mlx import _ext


def rabitq_hamming_score(qbits, bits, Cx, scale):
    """popcount(qbits XOR bits[i]) * scale + Cx[i], fp32 [..., N]; lower is closer.

    qbits: uint8 [..., D/8]; bits: uint8 [..., N, D/8]; Cx: [..., N]; scale: one number, as an array of
    any shape or a float. Leading axes broadcast. A pre-filter: it is no estimate of q . k.
    """
    arrays = [_array("rabitq_hamming_score", name, a) for name, a in (("qbits", qbits), ("bits", bits), ("Cx", Cx))]
    scale = scale if isinstance(scale, mx.array) else mx.array(scale, mx.float32)
    return _ext.rabitq_hamming_score(*arrays, scale)


def rabitq_encode(keys, seed=0):
    """keys [..., D] -> (codes uint8 [..., D/8], factors fp32 [...]).

    The sign codes of the keys after the seeded rotation, and the factor that makes their scores unbiased.
    D: a multiple of 8 up to 1024.
    """
    return _ext.rabitq_encode(_array("rabitq_encode", "keys", keys), seed)


def rabitq_popcount_score(queries, codes, factors, seed=0, query_bits=4):
    """Unbiased estimates of q . k from popcounts, fp32 [..., H_q, N].

    queries: [..., H_q, D]; codes: uint8 [..., H, N, D/8] and factors [..., H, N] as rabitq_encode gives them
    with the same seed; H divides H_q (grouped queries). The rotated query is rounded to query_bits bits.
    """
    arrays = [
        _array("rabitq_popcount_score", name, a)
        for name, a in (("queries", queries), ("codes", codes), ("factors", factors))
    ]
    return _ext.rabitq_popcount_score(*arrays, seed, query_bits)


def _array(function, name, a):
    if not isinstance(a, mx.array):
        raise ValueError(f"[{function}] {name}: got {type(a).__name__}, wanted an mx.array")
    return a
