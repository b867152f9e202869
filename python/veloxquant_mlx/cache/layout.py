"""What a model's attention layers look like, found without knowing the architecture."""

import hashlib
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, KVCache


@dataclass(frozen=True)
class AttentionLayer:
    """One layer that keeps a plain KV cache. `index` counts the model's caches, `position` only
    the layers described here (the layer axis of codebooks). slot: its place among the caches of a
    CacheList, where the layer keeps several; else None."""

    index: int
    position: int
    n_kv_heads: int
    head_dim: int
    slot: int | None = None


def native_caches(model) -> list:
    """The caches that mlx_lm would make for `model`, whether ours are installed on it or not."""
    make_cache = getattr(type(model), "make_cache", None)
    return make_cache(model) if make_cache else [KVCache() for _ in model.layers]


def flat_caches(caches):
    """All caches one by one, those inside of a CacheList too."""
    for cache in caches or ():
        if isinstance(cache, CacheList):
            yield from flat_caches(cache.caches)
        else:
            yield cache


def cache_of(caches, layer: AttentionLayer):
    """The cache of `layer` among those of its model."""
    cache = caches[layer.index]
    return cache if layer.slot is None else cache[layer.slot]


def put_cache(caches, layer: AttentionLayer, cache) -> None:
    """Makes `cache` that of `layer`."""
    if layer.slot is None:
        caches[layer.index] = cache
    else:
        parts = list(caches[layer.index].caches)
        parts[layer.slot] = cache
        caches[layer.index] = CacheList(*parts)


class Probe(KVCache):
    """Records the shapes that a layer hands to its cache, and the arrays that it gets back."""

    def __init__(self, index):
        super().__init__()
        self.index, self.shapes, self.fetched = index, None, ()

    def update_and_fetch(self, keys, values):
        (_, k_heads, _, k_dim), (_, v_heads, _, v_dim) = keys.shape, values.shape
        if (k_heads, k_dim) != (v_heads, v_dim):
            raise ValueError(
                f"model: layer {self.index} keeps keys of {k_heads} x {k_dim} and values of {v_heads} x {v_dim}, "
                "wanted keys and values of one shape: latent attention (MLA) is already compressed, use the "
                "model's own cache"
            )
        if k_dim % 8 != 0:
            raise ValueError(f"model: got head_dim {k_dim} in layer {self.index}, wanted a multiple of 8")
        self.shapes = (k_heads, k_dim)
        self.fetched = super().update_and_fetch(keys, values)
        return self.fetched


def run_probes(model) -> list:
    """[(index, slot, probe)] after one token: a probe in the place of every plain KVCache.

    The graph of the token is built and never evaluated: MLX infers the shapes, nothing is computed.
    """
    found, caches = [], native_caches(model)
    for index, cache in enumerate(caches):
        places = enumerate(cache.caches) if isinstance(cache, CacheList) else [(None, cache)]
        for slot, plain in places:
            if type(plain) is KVCache:
                found.append((index, slot, Probe(index)))
    for index, slot, probe in found:
        put_cache(caches, AttentionLayer(index, 0, 0, 0, slot), probe)
    model(mx.array([[0]]), cache=caches)
    return found


def attention_layers(model) -> list[AttentionLayer]:
    """The layers of `model` whose cache is a plain KVCache, with their shapes.

    Layers with other caches (sliding window, state space) are left out: they keep their own.
    """
    known = getattr(model, "_veloxquant_layers", None)
    if known is not None:
        return known
    used = [(index, slot, probe.shapes) for index, slot, probe in run_probes(model) if probe.shapes]
    layers = [AttentionLayer(index, i, *shapes, slot) for i, (index, slot, shapes) in enumerate(used)]
    if not layers:
        raise ValueError("model: found no layer with a plain KV cache to compress")
    object.__setattr__(model, "_veloxquant_layers", layers)
    return layers


def one_shape(model) -> tuple[int, int]:
    """(n_kv_heads, head_dim) of all attention layers, for what is trained: tables of a whole model
    are one array."""
    shapes = {(layer.n_kv_heads, layer.head_dim) for layer in attention_layers(model)}
    if len(shapes) > 1:
        found = ", ".join(f"{heads} x {dim}" for heads, dim in sorted(shapes))
        raise ValueError(
            f"model: got attention layers of several shapes ({found}), wanted one: use a method without calibration, "
            "or an array [C, d] as codebook"
        )
    return shapes.pop()


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
