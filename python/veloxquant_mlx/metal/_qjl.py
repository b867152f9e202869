"""QJL on its own: the signs of a sketch and the scores from them. Everything is lazy."""

import mlx.core as mx

from veloxquant_mlx import _ext


def qjl_encode(x, S):
    """x [..., d], S [m, d] -> (packed_signs uint8 [..., m/8], norms fp16 [...]).

    Bit j % 8 of byte j // 8 is 1 where S_j . x >= 0; m is a multiple of 8. Sums are fp32 in ascending order,
    so the bits are the same on every machine. Norms are at most 65504; NaN in x counts as 0.
    """
    return _ext.qjl_encode(_array("qjl_encode", "x", x), _array("qjl_encode", "S", S))


def qjl_inner_product(q_proj, packed_signs, norms):
    """sqrt(pi/2)/m * norms * sum_j q_proj[j] * (2 bit_j - 1), fp16 [..., H_q, S]: estimates of q . k.

    q_proj: S q, [..., H_q, m]; packed_signs: uint8 [..., S, H, m/8]; norms: [..., S, H]. Query head h reads
    key head h // (H_q / H). The softmax scale is the caller's.
    """
    arrays = [
        _array("qjl_inner_product", name, a)
        for name, a in (("q_proj", q_proj), ("packed_signs", packed_signs), ("norms", norms))
    ]
    return _ext.qjl_inner_product(*arrays)


def qjl_sketch(d, m, seed=0):
    """A sketch for both: fp32 [m, d], m / d stacked blocks of orthogonal rows of length sqrt(d).

    Rows as long as Gaussian ones, scores of 2.7 times less variance; m is a multiple of d.
    """
    for name, value in (("d", d), ("m", m), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"[qjl_sketch] {name}: got {value!r}, wanted an integer of at least 0")
    return _ext.qjl_sketch(d, m, seed)


def _array(function, name, a):
    if not isinstance(a, mx.array):
        raise ValueError(f"[{function}] {name}: got {type(a).__name__}, wanted an mx.array")
    return a
