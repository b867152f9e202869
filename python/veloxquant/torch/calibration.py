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
SINKS, CODED_AGE = 4, 64  # a cache keeps the first tokens exact, and a query's newest: neither is trained for
QUERY_STEP = 8  # every so many queries tell what attention tokens get
POWERS = {"keys": 0.3, "values": 0.5}  # of the attention, in the weight of a token (docs/quality.md)


class Recording:
    """Keys and values of each layer, up to a number of tokens, the queries' second moments, and the attention that each
    token got."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens
        self.layers = {}

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        layer = self.layers.setdefault(
            module.layer_idx, {"keys": [], "values": [], "attention": [], "moments": 0.0, "n": 0}
        )
        if layer["n"] < self.max_tokens:
            heads, groups = key.shape[1], query.shape[1] // key.shape[1]
            got = attention_got(query, key, kwargs.get("scaling"))
            first = min(SINKS, key.shape[2] - 1)
            for name, x in (("keys", key), ("values", value), ("attention", got)):
                layer[name].append(x[:, :, first:].transpose(0, 1).flatten(1, 2).float().cpu())
            squares = query.float().square().mean(dim=(0, 2))  # [Hq, D]
            layer["moments"] = layer["moments"] + squares.reshape(heads, groups, -1).mean(1).cpu()
            layer["n"] += key.shape[0] * key.shape[2]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def attention_got(query, key, scaling=None):
    """What each key gets from the queries that see it as a code: fp32 [B, heads, n, 2], the sums of the probabilities
    and of their squares. query: [B, Hq, n, D], key: [B, heads, n, D]."""
    batch, heads, n, dim = key.shape
    places = torch.arange(n % QUERY_STEP, n, QUERY_STEP, device=key.device)
    groups, count = query.shape[1] // heads, len(places)
    seen = query[:, :, places].float().reshape(batch, heads, groups * count, dim)
    scores = (seen @ key.float().transpose(2, 3)) * (dim**-0.5 if scaling is None else scaling)
    scores = scores.reshape(batch, heads, groups, count, n)
    age = places[:, None] - torch.arange(n, device=key.device)
    p = scores.masked_fill(age < 0, -torch.inf).softmax(-1).masked_fill(age < CODED_AGE, 0)
    return torch.stack([p.sum((2, 3)), p.square().sum((2, 3))], dim=-1)


def token_weights(side, got):
    """How much the error of each token counts in training: sums of attention [heads, n] -> fp32 [heads, n].

    An error of a score changes the output by the probability, so that its square counts by it; that of a value by its
    square. A few tokens get most of the attention: the powers keep them from taking the tables over.
    """
    mean = got.mean(dim=1, keepdim=True).clamp_min(1e-30)
    return numpy.ascontiguousarray(((got / mean).clamp(1e-3, 1e3) ** POWERS[side]).numpy())


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


def tables_of_head(side, codebook_per, n_subvectors):
    """How many; sub-vector m uses table m % so many."""
    if codebook_per not in ("head", "lane", "subvector"):
        raise Error(f"[calibrate] codebook_per: got {codebook_per!r}, wanted 'head', 'lane' or 'subvector'")
    lanes = min(_core.LANE_TABLES[side], n_subvectors)
    return {"head": 1, "lane": lanes, "subvector": n_subvectors}[codebook_per]


def fit_side(side, x, moments, weights, bits, transform, codebook_per, seed):
    """x: fp32 [H, N, D], weights: of the tokens, fp32 [H, N] on the CPU -> SideArrays."""
    if bits not in SUB_DIMS:
        raise Error(f"[calibrate] bits: got {bits!r}, wanted one of {sorted(SUB_DIMS)}")
    heads, _, dim = x.shape
    sub_dim = SUB_DIMS[bits]
    n_subvectors = dim // sub_dim
    n_tables = tables_of_head(side, codebook_per, n_subvectors)
    arrays = {}
    if transform == "learned":
        kind = "dense"
        arrays = {n: numpy.empty((heads, dim, dim), numpy.float32) for n in ("encode_matrix", "query_matrix")}
        _core.learned_rotation(x, moments, n_subvectors, n_tables, *arrays.values(), weights)
    elif transform == "hadamard":
        kind = "hadamard"
        arrays["scale"] = numpy.ones((heads, dim), numpy.float32)
        if side == "keys":
            _core.smooth_factors(x, arrays["scale"])
    else:
        raise Error(f"[calibrate] transform: got {transform!r}, wanted 'learned' or 'hadamard'")
    tables = numpy.empty((heads, n_tables, 256, sub_dim), numpy.float16)
    given = [arrays.get(name) for name in ("scale", "encode_matrix", "query_matrix")]
    _core.train_tables(x, kind, *given, n_subvectors, seed, tables, sub_dim == 4, weights)
    if n_tables > 1:  # a table for each sub-vector, as codecs take them
        tables = numpy.ascontiguousarray(tables[:, numpy.arange(n_subvectors) % n_tables])
    return SideArrays(side, kind, tables, *given)


def calibrate(
    model, batches, bits=2, value_bits=None, transform="learned", codebook_per="lane", max_tokens=16384, seed=0
):
    """Tables for every full-attention layer of the model.

    batches: token ids, [n] or [B, n] each, without padding; text like what will be cached. bits: 2 or 4 of the keys,
    and of the values where value_bits is not given. codebook_per: 'lane', as many tables a head as CUDA looks up as
    fast as one ('head'); 'subvector' is closer to the model, and slower. Entries of 2-bit tables are int8 times a power
    of two, on every device.
    """
    layers = record(model, batches, max_tokens)
    return fit(model, layers, bits, value_bits, transform, codebook_per, max_tokens, seed)


def fit(model, layers, bits, value_bits, transform, codebook_per, max_tokens, seed=0):
    """Tables of what `record` saw."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    made = []
    for index, kind in enumerate(kinds):
        if kind != "full_attention" or index not in layers:
            made.append(None)
            continue
        layer = layers[index]
        sides = []
        got = torch.cat(layer["attention"], dim=1)[:, :max_tokens]
        for i, (name, b) in enumerate((("keys", bits), ("values", bits if value_bits is None else value_bits))):
            x = numpy.ascontiguousarray(torch.cat(layer[name], dim=1)[:, :max_tokens].numpy())
            moments = numpy.ascontiguousarray(layer["moments"].numpy()) if name == "keys" else None
            weights = token_weights(name, got[:, :, i])
            sides.append(fit_side(name, x, moments, weights, b, transform, codebook_per, seed))
        made.append(LayerTables(*sides))
    return Tables(made)
