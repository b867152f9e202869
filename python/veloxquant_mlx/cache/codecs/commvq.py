"""method "commvq": keys before RoPE as sums of centres that commute with it; values by product VQ."""

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codecs import vecinfer
from veloxquant_mlx.cache.commvq_codebook import CommVQCodebook
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint
from veloxquant_mlx.models.rope import detect_ropes


def codec(rope, table, weight):
    """rope: LayerRope; table: fp16 [H, R, N, 2, D / 2]; weight: [H, D / 2]."""
    arrays = {
        "codebook": mx.array(table).astype(mx.float16),
        "weight": mx.array(weight).astype(mx.float32),
        "inv_freq": rope.frequencies(),
    }
    return _ext.codec("keys", "commvq", table.shape[0], rope.head_dim, rope.options(), arrays)


def check(config, side):
    if side == "values" and config.value_codebook is not None:
        return
    if not isinstance(config.codebook, CommVQCodebook):
        got = "none" if config.codebook is None else type(config.codebook).__name__
        raise ValueError(f"codebook: got {got}, wanted the result of train_commvq(): method 'commvq' needs one")


def side_codecs(model, config, layers, side):
    if side == "values" and config.value_codebook is not None:
        return vecinfer.side_codecs(model, config, layers, side)
    codebook = config.codebook
    _check_model(model, codebook)
    if side == "keys":
        ropes = detect_ropes(model)
        codecs = [
            codec(ropes[layer.position], codebook.keys[layer.position], codebook.weights[layer.position])
            for layer in layers
        ]
    else:
        codecs = [_value_codec(codebook, layer) for layer in layers]
    return [lambda dtype, one=one: one for one in codecs]


def _value_codec(codebook, layer):
    tables = codebook.values[layer.position]
    rotation = mx.array(codebook.value_rotations[layer.position])
    n_subvectors = layer.head_dim // tables.shape[-1]
    return vecinfer.codec("values", mx.array(tables), n_subvectors, encode_matrix=rotation, query_matrix=rotation)


def _check_model(model, codebook):
    fingerprint = model_fingerprint(model)
    if codebook.fingerprint != fingerprint:
        raise ValueError(
            f"codebook: got one made for another model ({codebook.fingerprint}), wanted one for this model "
            f"({fingerprint}): train_commvq() again"
        )
    layers = attention_layers(model)
    got = codebook.keys.shape[:2], 2 * codebook.keys.shape[-1]
    wanted = (len(layers), layers[0].n_kv_heads), layers[0].head_dim
    if got != wanted:
        raise ValueError(f"codebook: got layers, heads and head_dim {got}, wanted {wanted}")
