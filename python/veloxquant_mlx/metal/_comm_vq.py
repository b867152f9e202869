"""CommVQ's look-up: codes to keys, rotary embedding applied."""

import mlx.core as mx

from veloxquant_mlx import _ext


def comm_vq_decode_metal(indices, codebook, positions, inv_freq, n_cb, sub_dim, cb_size):
    """Looks up n_cb entries a token, puts them side by side, and rotates pairs (j, j + D/2) by
    positions * inv_freq[j]. Returns [..., D], D = n_cb * sub_dim, in the dtype of the codebook.

    indices: integers [..., n_cb]; codebook: floats [n_cb, cb_size, sub_dim]. Or in residual stages,
    which add up before the rotation: [..., R, n_cb] and [R, n_cb, cb_size, sub_dim].
    positions: integers, one for each of the leading axes of indices, or broadcast to them.
    inv_freq: [D / 2]. Codes out of range are clamped to the last entry, negative ones too.
    """
    return _ext.comm_vq_decode(
        _array(indices), _array(codebook), _array(positions), _array(inv_freq), n_cb, sub_dim, cb_size
    )


def _array(values):
    return values if isinstance(values, mx.array) else mx.array(values)
