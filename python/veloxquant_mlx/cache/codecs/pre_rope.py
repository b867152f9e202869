"""What the methods with keys before RoPE share: their checks, and their values, which are product-quantised."""

import mlx.core as mx

from veloxquant_mlx.cache.codecs import vecinfer
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint
from veloxquant_mlx.models.rope import detect_ropes


def check(config, side, kind, training):
    """kind: the class of the method's codebook; training: the name of the function that makes one."""
    if side == "values" and config.value_codebook is not None:
        return
    if not isinstance(config.codebook, kind):
        got = "none" if config.codebook is None else type(config.codebook).__name__
        raise ValueError(f"codebook: got {got}, wanted the result of {training}(): method {config.method!r} needs one")


def side_codecs(model, config, layers, side, key_codec):
    """key_codec(rope, codebook, layer) -> _ext.Codec."""
    if side == "values" and config.value_codebook is not None:
        return vecinfer.side_codecs(model, config, layers, side)
    codebook = config.codebook
    _check_model(model, codebook)
    if side == "keys":
        ropes = detect_ropes(model)
        codecs = [key_codec(ropes[layer.position], codebook, layer) for layer in layers]
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
            f"({fingerprint}): train it again"
        )
    layers = attention_layers(model)
    got = *codebook.keys.shape[:2], codebook.head_dim
    wanted = len(layers), layers[0].n_kv_heads, layers[0].head_dim
    if got != wanted:
        raise ValueError(f"codebook: got {got} layers, heads and head_dim, wanted {wanted}")
