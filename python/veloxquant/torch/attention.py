"""'veloxquant' among transformers' attention implementations."""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from veloxquant import Error
from veloxquant.torch.operator import NewTokens

NAME = "veloxquant"


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Keys that come from a compressed layer say which; all others go to SDPA."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(key, NewTokens):
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = causal_mask(mask, query.shape[2], key.shape[2])
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    for name in ("softcap", "s_aux", "sliding_window"):
        if kwargs.get(name) is not None:
            raise Error(f"[veloxquant attention] {name}: got {kwargs[name]!r}, wanted a layer without")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise Error(
            f"[veloxquant attention] attention_mask: got {attention_mask.dim()} dimensions, wanted a padding mask [B, tokens]"
        )
    out = torch.ops.veloxquant.attend(query, key.states, value, attention_mask, key.ticket, key.layer, scaling)
    return out, None


def causal_mask(valid, n, length):
    """bool [B, 1, n, length] from a padding mask [B, length]."""
    rows = torch.arange(length - n, length, device=valid.device)
    seen = rows[:, None] >= torch.arange(length, device=valid.device)
    return seen & valid[:, None, None, -length:].to(torch.bool)


def mask(batch_size, q_length, kv_length, attention_mask=None, local_size=None, allow_is_causal_skip=True, **kwargs):
    """The padding mask as it is: causality is the attention's own. Sliding layers are SDPA's."""
    if local_size is not None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    if not allow_is_causal_skip:
        raise Error("[veloxquant attention] mask: got one that is not plainly causal, wanted causal with padding")
    # A single new token is nobody's padding, and to look would wait for the device.
    if attention_mask is None or (q_length == 1 and kv_length > 1):
        return None
    if torch.compiler.is_compiling():
        return attention_mask
    return None if attention_mask.all() else attention_mask


def register():
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
