"""KVCacheConfig and KVCacheBuilder: from a description to one cache per layer."""

import logging
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx._mlx_lm import accept_kv_cache
from veloxquant_mlx.cache.codebook import Codebook, SmoothFactors, normalise_factors, normalise_tables
from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint, native_caches
from veloxquant_mlx.metal.fused_sdpa import patch_mlx_lm_for_fused_sdpa

log = logging.getLogger("veloxquant_mlx")

METHODS = ("vecinfer", "fp16")
BITS = (1, 1.5, 2, 2.5, 3, 4)

accept_kv_cache()


@dataclass
class KVCacheConfig:
    """How the KV cache is kept.

    method: "vecinfer" (packed codes; needs a codebook) or "fp16" (exact, 2 bytes an element).
    bits, value_bits: with a codebook the codebook decides, and one log line states the true bits.
    codebook: what train_codebook returned, or arrays [C, d] ... [L, H, M, C, d] for both sides.
    smooth_factors: lambda of the keys, [D], [H, D] or [L, H, D].
    num_subspaces: sub-vectors per head; checked against the codebook.
    use_fused_sdpa: attend on the packed codes; False hands dense arrays to the model's attention.
    window, sinks: recent and first tokens that stay exact. strict: a prefill chunk sees as codes
    what token-by-token decoding would (for evaluation).
    """

    method: str = "vecinfer"
    bits: float = 2
    value_bits: float | None = None
    codebook: Any = None
    smooth_factors: Any = None
    num_subspaces: int | None = None
    use_fused_sdpa: bool = True
    window: int = 64
    sinks: int = 4
    seed: int = 0
    strict: bool = False

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, wanted one of {', '.join(METHODS)}")
        for name in ("window", "sinks", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least 0")
        if self.strict and not self.use_fused_sdpa:
            raise ValueError("strict: got True with use_fused_sdpa=False, wanted the fused attention")
        if self.method != "vecinfer":
            return
        if self.codebook is None:
            for name in ("bits", "value_bits"):
                value = getattr(self, name)
                if value is not None and value not in BITS:
                    raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, BITS))}")
            raise ValueError(
                "codebook: got none, wanted the result of train_codebook() (or `veloxquant calibrate`): "
                "method 'vecinfer' needs one"
            )


class KVCacheBuilder:
    """Builds the caches of a model."""

    @staticmethod
    def build(model, config: KVCacheConfig) -> list:
        """One cache per layer, to be passed as kv_cache= or prompt_cache= to mlx_lm.generate.

        Layers that keep another kind of cache (sliding window, state space) keep it.
        """
        return _cache_maker(model, config)()

    for_model = build


def install(model, config: KVCacheConfig) -> None:
    """Make every cache that mlx_lm builds for `model` (server, CLI, batch) one of ours."""
    object.__setattr__(model, "make_cache", _cache_maker(model, config))


def _cache_maker(model, config):
    """A function that makes fresh caches; all checks are done and the tables loaded here, once."""
    if not isinstance(config, KVCacheConfig):
        raise ValueError(f"config: got {type(config).__name__}, wanted a KVCacheConfig")
    layers = attention_layers(model)
    factories = _codec_factories(model, config, layers)
    if config.use_fused_sdpa:
        unfused = patch_mlx_lm_for_fused_sdpa(model)
    else:
        unfused = {layer.index for layer in layers}
        log.warning("use_fused_sdpa=False: history is dequantised at every step, no memory is saved")

    fingerprint = model_fingerprint(model)

    def make_caches():
        caches = native_caches(model)
        for layer, factory in zip(layers, factories):
            caches[layer.index] = VeloxQuantKVCache(
                factory,
                window=config.window,
                sinks=config.sinks,
                strict=config.strict,
                fused=layer.index not in unfused,
                fingerprint=fingerprint,
                layer=layer.index,
            )
        return caches

    return make_caches


def _codec_factories(model, config, layers):
    if config.method == "fp16":
        return [
            lambda dtype, layer=layer: tuple(
                _ext.exact_codec(side, layer.n_kv_heads, layer.head_dim, dtype) for side in ("keys", "values")
            )
            for layer in layers
        ]
    return _vecinfer_factories(model, config, layers)


def _vecinfer_factories(model, config, layers):
    shapes = {(layer.n_kv_heads, layer.head_dim) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"model: got attention layers of different shapes {sorted(shapes)}, wanted one shape")
    (heads, dim), n_layers = shapes.pop(), len(layers)
    codebook, factors = config.codebook, config.smooth_factors
    for name, made in (("codebook", codebook), ("smooth_factors", factors)):
        fingerprint = getattr(made, "fingerprint", None)
        if fingerprint is not None and fingerprint != model_fingerprint(model):
            raise ValueError(
                f"{name}: got one made for another model ({fingerprint}), wanted one for this model "
                f"({model_fingerprint(model)}): calibrate again"
            )
    if isinstance(codebook, Codebook):
        if factors is None:
            factors = codebook.smooth_factors
        elif isinstance(factors, SmoothFactors) and not (
            factors.shape == codebook.smooth_factors.shape and (factors == codebook.smooth_factors).all()
        ):
            raise ValueError("smooth_factors: got other factors than the codebook was trained with, wanted those")
        elif codebook.rotations is not None and not isinstance(factors, SmoothFactors):
            raise ValueError("smooth_factors: got an array for a codebook of learned rotations, wanted none")
        key_tables, value_tables = codebook.keys, codebook.values
    else:
        key_tables = value_tables = codebook
    factors = normalise_factors(factors, n_layers, heads, dim)
    key_tables = normalise_tables("codebook", key_tables, n_layers, heads, dim)
    value_tables = normalise_tables("codebook", value_tables, n_layers, heads, dim)
    n_subvectors = dim // key_tables.shape[-1]
    if config.num_subspaces not in (None, n_subvectors):
        raise ValueError(
            f"num_subspaces: got {config.num_subspaces}, wanted {n_subvectors} (the codebook has sub-vectors of "
            f"{key_tables.shape[-1]} for head_dim {dim})"
        )
    rotations = getattr(codebook, "rotations", None)
    codecs = []
    for i in range(n_layers):
        if rotations is None:
            key_map, value_map = {"scale": mx.array(factors[i])}, {}
        else:
            key_map, value_map = rotations.key_matrices(i), rotations.value_matrices(i)
        codecs.append(
            (
                _ext.vecinfer_codec("keys", mx.array(key_tables[i]), n_subvectors, **key_map),
                _ext.vecinfer_codec("values", mx.array(value_tables[i]), dim // value_tables.shape[-1], **value_map),
            )
        )
    true_bits = [codec.bits_per_element for codec in codecs[0]]
    asked = [config.bits, config.bits if config.value_bits is None else config.value_bits]
    note = "" if asked == true_bits else f" (asked for {asked[0]:g}/{asked[1]:g}: the codebook decides)"
    log.info("vecinfer: %g bits per key element, %g per value element%s", *true_bits, note)
    return [lambda dtype, pair=pair: pair for pair in codecs]
