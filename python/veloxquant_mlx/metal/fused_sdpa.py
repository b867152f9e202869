"""Fused attention on packed codes, and the hook that routes a model's attention through it."""

import functools
import logging
import threading

from veloxquant_mlx import _ext, _mlx_lm
from veloxquant_mlx.cache.layout import run_probes
from veloxquant_mlx.cache.reference import ReferenceTensor
from veloxquant_mlx.metal import soft_capped
from veloxquant_mlx.metal.rows import CausalMask, EncodedRows, attend_rows

log = logging.getLogger("veloxquant_mlx")

EncodedTensor = _ext.EncodedTensor


def supports_shape(batch: int, heads: int, seq_len: int, head_dim: int) -> bool:
    """True where a fused kernel runs: batch, heads and seq_len of at least 1 and any head_dim that is a multiple of
    8 up to 256. Where the default device is a GPU it runs there, for every method's codes within the limits that
    `veloxquant devices` names, and on the CPU beyond them."""
    return min(batch, heads, seq_len) >= 1 and 8 <= head_dim <= 256 and head_dim % 8 == 0


def metal_fused_sdpa(
    queries, encoded_keys, values, scale, mask=None, *, sinks=None, sliding_window=0, logit_softcap=0.0
):
    """softmax(scale * queries . keys^T + mask) values, without ever expanding the history.

    queries: [B, H_q, L_q, D], post-RoPE, untransformed; the last L_q positions of the keys.
    encoded_keys: EncodedTensor of a cache's update_and_fetch or of vecinfer_encode.
    values: EncodedTensor of the same cache, or an array [B, H_kv, L, D].
    mask: None (every key visible), "causal", or a bool or additive array that broadcasts to
    [B, H_q, L_q, L]. sinks: [H_q] attention-sink logits. sliding_window: keys seen by a query.
    Returns [B, H_q, L_q, D] in the dtype of the queries. ValueError where shapes do not fit.
    """
    if not isinstance(encoded_keys, EncodedTensor):
        raise ValueError(
            f"encoded_keys: got {type(encoded_keys).__name__}, wanted an EncodedTensor (from update_and_fetch or "
            "vecinfer_encode)"
        )
    if not isinstance(values, EncodedTensor):
        values = encoded_keys.exact_like(values)
    causal = isinstance(mask, str)
    if causal and mask != "causal":
        raise ValueError(f"mask: got {mask!r}, wanted None, 'causal' or an array")
    out, _ = _ext.attend(
        queries,
        encoded_keys,
        values,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        logit_softcap=logit_softcap,
        mask=None if causal else mask,
        sinks=sinks,
    )
    return out


def _hook(original):
    @functools.wraps(original)
    def scaled_dot_product_attention(queries, keys, values, cache, scale, mask=None, sinks=None):
        _note(keys, values)
        if _is_encoded(keys):
            return attend_encoded(queries, keys, values, mask, cache, scale=scale, sinks=sinks)
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)

    scaled_dot_product_attention._veloxquant_original = original
    return scaled_dot_product_attention


def _is_encoded(keys):
    return isinstance(keys, EncodedTensor | EncodedRows | ReferenceTensor)


def attend_encoded(queries, keys, values, mask, cache=None, **options):
    """Attention over what one of our caches handed out. options: those of metal_fused_sdpa."""
    # Calibration and adaptive caches: nobody else sees post-RoPE queries.
    if hasattr(cache, "observe_queries"):
        cache.observe_queries(queries)
    if isinstance(keys, ReferenceTensor):
        return keys.attend(queries, values, mask, **options)
    if isinstance(keys, EncodedRows):
        return attend_rows(metal_fused_sdpa, queries, keys, mask, **options)
    mask = "causal" if isinstance(mask, CausalMask) else mask
    return metal_fused_sdpa(queries, keys, values, mask=mask, **options)


def patch_mlx_lm_for_fused_sdpa(model=None) -> set[int]:
    """Route mlx_lm's attention through the fused kernel wherever the cache is one of ours.

    Other caches are served as before. Idempotent; models imported later are covered. Returns (and
    logs) the layers of `model` that call MLX's attention directly and cannot be routed.
    """
    original = _mlx_lm.original_attention()
    hook = _mlx_lm.base.scaled_dot_product_attention
    if hook is original:
        hook = _hook(original)
    for module in _mlx_lm.hooked_modules():
        if module.scaled_dot_product_attention is original:
            module.scaled_dot_product_attention = hook
    soft_capped.patch(attend_encoded, _note, _is_encoded)
    return set() if model is None else unrouted_layers(model)


def unpatch_mlx_lm_for_fused_sdpa(model=None) -> None:
    """Undo patch_mlx_lm_for_fused_sdpa. Our caches then refuse to be attended."""
    original = _mlx_lm.original_attention()
    for module in _mlx_lm.hooked_modules():
        module.scaled_dot_product_attention = original
    soft_capped.unpatch()


def unrouted_layers(model) -> set[int]:
    """Indices of attention layers whose keys and values never reach the hook as their cache handed
    them out: tried on the graph of one token."""
    known = getattr(model, "_veloxquant_unrouted", None)
    if known is not None:
        return known
    _noting.reached = reached = {}
    try:
        probes = run_probes(model)
    finally:
        _noting.reached = None
    unrouted = set()
    for index, _, probe in probes:
        if probe.shapes and not reached.keys() & {(id(probe),), tuple(map(id, probe.fetched))}:
            unrouted.add(index)
    for index in sorted(unrouted):
        log.warning(
            "layer %d calls mx.fast attention directly or computes its own: its history is dequantised at every step",
            index,
        )
    object.__setattr__(model, "_veloxquant_unrouted", unrouted)
    return unrouted


# While unrouted_layers runs a model in this thread: by their ids the caches, or the (keys, values), of
# every attention that would come here. They are kept alive, so that an id means one thing.
_noting = threading.local()


def _note(*objects):
    reached = getattr(_noting, "reached", None)
    if reached is not None:
        reached[tuple(map(id, objects))] = objects
