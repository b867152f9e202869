"""Attention on two-stage scalar codes of keys and vector codes of values, never dequantised as a whole."""

from veloxquant_mlx import _ext


def turboquant_fused_rvq_decode_attend(
    q,
    k_indices1,
    k_indices2,
    centroids1,
    centroids2,
    v_indices,
    v_codebook,
    b1,
    b2,
    bv,
    *,
    key_norms=None,
    scale=None,
    mask=None,
    causal=False,
    sliding_window=0,
):
    """-> float16 [B, H, S_q, D_v], D_v = n_sub * sub_v.

    q: floats [B, H, S_q, D], rotated as the keys were. k_indices1, k_indices2: integers [B, H_kv, S, D], one code
    each, or uint32 words of turboquant_bit_pack. H is a multiple of H_kv. centroids: 2^b1 and 2^b2 floats.
    v_indices: integers [B, H_kv, S, n_sub]; v_codebook: floats [2^bv, sub_v].

    A key is key_norms * (centroids1[k1] + centroids2[k2]); key_norms: floats [B, H_kv, S], 1 without them.
    scale: 1 / sqrt(D) if not given. mask: None, "causal", or bools or floats that broadcast to [B, H, S_q, S].
    causal: the queries are the last S_q positions. sliding_window > 0: only so many positions back.
    Codes beyond a table read its last entry. A query that sees nothing gives 0.
    """
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"[turboquant_fused_rvq_decode_attend] mask: got {mask!r}, wanted 'causal' or an array")
        mask, causal = None, True
    return _ext.rvq_attend(
        q,
        k_indices1,
        k_indices2,
        centroids1,
        centroids2,
        v_indices,
        v_codebook,
        b1,
        b2,
        bv,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        key_norms=key_norms,
        mask=mask,
    )
