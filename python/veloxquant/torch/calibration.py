"""Fits tables and transforms to the keys and values that a model makes of sample text."""

import numpy
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from veloxquant import Error, _core
from veloxquant.torch.tables import LayerTables, SideArrays, Tables

RECORDER = "veloxquant_recorder"
SUB_DIMS = {2: 4, 4: 2}  # bits -> dimensions of a sub-vector of 256 centroids


class Recording:
    """Keys and values of each layer, up to a number of tokens, and the queries' second moments."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens
        self.layers = {}

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        layer = self.layers.setdefault(module.layer_idx, {"keys": [], "values": [], "moments": 0.0, "n": 0})
        if layer["n"] < self.max_tokens:
            heads, groups = key.shape[1], query.shape[1] // key.shape[1]
            for name, x in (("keys", key), ("values", value)):
                layer[name].append(x.transpose(0, 1).flatten(1, 2).float().cpu())
            squares = query.float().square().mean(dim=(0, 2))  # [Hq, D]
            layer["moments"] = layer["moments"] + squares.reshape(heads, groups, -1).mean(1).cpu()
            layer["n"] += key.shape[0] * key.shape[2]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@torch.no_grad()
def record(model, batches, max_tokens):
    recording = Recording(max_tokens)
    AttentionInterface.register(RECORDER, recording.attention)
    AttentionMaskInterface.register(RECORDER, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(RECORDER)
    try:
        for ids in batches:
            ids = torch.as_tensor(ids, device=model.device)
            model.base_model(ids.reshape(-1, ids.shape[-1]), use_cache=False)
            if min(layer["n"] for layer in recording.layers.values()) >= max_tokens:
                break
    finally:
        model.set_attn_implementation(before)
    return recording.layers


def fit_side(side, x, moments, bits, transform, codebook_per, seed):
    """x: fp32 [H, N, D] on the CPU -> SideArrays."""
    if bits not in SUB_DIMS:
        raise Error(f"[calibrate] bits: got {bits!r}, wanted one of {sorted(SUB_DIMS)}")
    if codebook_per not in ("head", "subvector"):
        raise Error(f"[calibrate] codebook_per: got {codebook_per!r}, wanted 'head' or 'subvector'")
    heads, _, dim = x.shape
    sub_dim = SUB_DIMS[bits]
    n_subvectors = dim // sub_dim
    arrays = {}
    if transform == "learned":
        kind = "dense"
        arrays = {n: numpy.empty((heads, dim, dim), numpy.float32) for n in ("encode_matrix", "query_matrix")}
        centred = codebook_per == "subvector"
        _core.learned_rotation(x, moments, n_subvectors, arrays["encode_matrix"], arrays["query_matrix"], centred)
    elif transform == "hadamard":
        kind = "hadamard"
        arrays["scale"] = numpy.ones((heads, dim), numpy.float32)
        if side == "keys":
            _core.smooth_factors(x, arrays["scale"])
    else:
        raise Error(f"[calibrate] transform: got {transform!r}, wanted 'learned' or 'hadamard'")
    shape = (heads, n_subvectors if codebook_per == "subvector" else 1, 256, sub_dim)
    tables = numpy.empty(shape, numpy.float16)
    given = [arrays.get(name) for name in ("scale", "encode_matrix", "query_matrix")]
    _core.train_tables(x, kind, *given, n_subvectors, seed, tables, sub_dim == 4)
    return SideArrays(side, kind, tables, *given)


def calibrate(
    model, batches, bits=2, value_bits=None, transform="learned", codebook_per="head", max_tokens=16384, seed=0
):
    """Tables for every full-attention layer of the model.

    batches: token ids, [n] or [B, n] each, without padding; text like what will be cached. bits: 2 or 4 of the keys, and
    of the values where value_bits is not given. codebook_per 'head' is the fast one on CUDA, 'subvector' closer to the
    model. Entries of 2-bit tables are int8 times a power of two, on every device.
    """
    layers = record(model, batches, max_tokens)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    made = []
    for index, kind in enumerate(kinds):
        if kind != "full_attention" or index not in layers:
            made.append(None)
            continue
        layer = layers.pop(index)
        sides = []
        for name, b in (("keys", bits), ("values", bits if value_bits is None else value_bits)):
            x = numpy.ascontiguousarray(torch.cat(layer[name], dim=1)[:, :max_tokens].numpy())
            moments = numpy.ascontiguousarray(layer["moments"].numpy()) if name == "keys" else None
            sides.append(fit_side(name, x, moments, b, transform, codebook_per, seed))
        made.append(LayerTables(*sides))
    return Tables(made)
