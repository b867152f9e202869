"""What a model's attention layers look like, found without knowing the architecture."""

import hashlib
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache


@dataclass(frozen=True)
class AttentionLayer:
    """One layer that keeps a plain KV cache. `index` counts the model's caches, `position` only
    the layers described here (the layer axis of codebooks)."""

    index: int
    position: int
    n_kv_heads: int
    head_dim: int


def native_caches(model) -> list:
    """The caches that mlx_lm would make for `model`, whether ours are installed on it or not."""
    make_cache = getattr(type(model), "make_cache", None)
    return make_cache(model) if make_cache else [KVCache() for _ in model.layers]


class _Probe(KVCache):
    """Records the shapes that a layer hands to its cache."""

    def update_and_fetch(self, keys, values):
        self.shapes = (keys.shape, values.shape)
        return super().update_and_fetch(keys, values)


def attention_layers(model) -> list[AttentionLayer]:
    """The layers of `model` whose cache is a plain KVCache, with their shapes.

    The graph of one token is built and never evaluated: MLX infers the shapes, nothing is computed.
    Layers with other caches (sliding window, state space) are left out: they keep their own.
    """
    known = getattr(model, "_veloxquant_layers", None)
    if known is not None:
        return known
    caches = native_caches(model)
    probes = [_Probe() if type(c) is KVCache else c for c in caches]
    model(mx.array([[0]]), cache=probes)
    layers = []
    for index, probe in enumerate(probes):
        if not isinstance(probe, _Probe) or not hasattr(probe, "shapes"):
            continue
        (_, k_heads, _, k_dim), (_, v_heads, _, v_dim) = probe.shapes
        if (k_heads, k_dim) != (v_heads, v_dim):
            raise ValueError(
                f"model: layer {index} has keys of {k_heads} x {k_dim} and values of {v_heads} x {v_dim}, "
                "wanted keys and values of one shape (multi-head latent attention is not supported)"
            )
        layers.append(AttentionLayer(index, len(layers), k_heads, k_dim))
    if not layers:
        raise ValueError("model: found no layer with a plain KV cache to compress")
    object.__setattr__(model, "_veloxquant_layers", layers)
    return layers


def model_fingerprint(model) -> str:
    """Identifies a model by its parameters' names and shapes and a sample of their values, so that
    a codebook is never used with a model it was not made for."""
    known = getattr(model, "_veloxquant_fingerprint", None)
    if known is not None:
        return known
    parameters = sorted(tree_flatten(model.parameters()))
    digest = hashlib.sha256()
    for name, array in parameters:
        digest.update(f"{name}{tuple(array.shape)}".encode())
    for name, array in parameters[:: max(1, len(parameters) // 8)]:
        sample = array.reshape(-1)[:64].astype(mx.float32)
        digest.update(np.array(sample).tobytes())
    fingerprint = digest.hexdigest()[:16]
    object.__setattr__(model, "_veloxquant_fingerprint", fingerprint)
    return fingerprint
