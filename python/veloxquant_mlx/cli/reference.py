"""Caches of cache/reference.py for `veloxquant eval`: what methods that no cache does would give."""

import mlx.core as mx

from veloxquant_mlx.cache.codecs import vecinfer
from veloxquant_mlx.cache.layout import attention_layers, native_caches, put_cache
from veloxquant_mlx.cache.reference import ReferenceCache, affine_coder, codec_coders
from veloxquant_mlx.metal.fused_sdpa import patch_mlx_lm_for_fused_sdpa
from veloxquant_mlx.models.rope import detect_ropes


def build(model, name, trained, window, sinks):
    """One cache per layer: "mlx4" (mlx_lm's 4-bit codes with our window and sinks) or "pre_rope"."""
    layers = attention_layers(model)
    if patch_mlx_lm_for_fused_sdpa(model) & {layer.index for layer in layers}:
        raise ValueError(f"--method: got {name!r} for a model that calls MLX's attention directly, wanted another")
    caches = native_caches(model)
    for layer in layers:
        coders = [affine_coder()] * 2 if name == "mlx4" else _pre_rope(model, trained.codebook, layer)
        put_cache(caches, layer, ReferenceCache(*coders, window, sinks))
    return caches


def _pre_rope(model, codebook, layer):
    """The Coders of keys and of values."""
    vecinfer.check_fingerprints(model, codebook, None)
    codecs = []
    for side in ("keys", "values"):
        tables, maps = getattr(codebook, side), vecinfer.transforms(codebook, side)
        n_subvectors = layer.head_dim // tables.shape[-1]
        codecs.append(vecinfer.codec(side, mx.array(tables[layer.position]), n_subvectors, **maps(layer.position)))
    rope = detect_ropes(model)[layer.position].core()
    return codec_coders(*codecs, rope)
