"""KVCacheConfig and KVCacheBuilder: from a description to one cache per layer."""

import logging
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import mlx.core as mx

from veloxquant_mlx._mlx_lm import accept_kv_cache
from veloxquant_mlx.cache import adaptive
from veloxquant_mlx.cache.codebook import key_and_value_bits
from veloxquant_mlx.cache.codecs import METHODS
from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint, native_caches, put_cache
from veloxquant_mlx.metal.fused_sdpa import patch_mlx_lm_for_fused_sdpa
from veloxquant_mlx.models.rope import detect_ropes

log = logging.getLogger("veloxquant_mlx")

BITS = (1, 1.5, 2, 2.5, 3, 4)

accept_kv_cache()


@dataclass
class KVCacheConfig:
    """How the KV cache is kept.

    method: one of cache/codecs: "vecinfer", "vecinfer_rope" and "commvq" need a codebook; "turboquant",
    "turboquant_rvq", "rabitq", "qjl" and "fp16" (exact, 2 bytes an element) need nothing.
    value_method: of the values; None: that of the keys.
    bits, value_bits: with a codebook the codebook decides, and one log line states the true bits.
    codebook: what train_codebook returned, or arrays [C, d] ... [L, H, M, C, d] for both sides.
    value_codebook: another one for the values, so that they may have other bits; None: `codebook`.
    codebook="adaptive": none is needed; each sequence is kept exact for its first fit_tokens tokens, then
    fits tables of its own at `bits` and is packed. fit_per: "subvector" or "head", as codebook_per. fit_context:
    positions that these tables are to serve, the longest sequence that is expected.
    smooth_factors: lambda of the keys, [D], [H, D] or [L, H, D].
    num_subspaces: sub-vectors per head; checked against the codebook.
    use_fused_sdpa: attend on the packed codes; False hands dense arrays to the model's attention.
    window, sinks: recent and first tokens that stay exact. strict: a prefill chunk sees as codes
    what token-by-token decoding would (for evaluation).
    layers: fields that differ in single attention layers, counted from 0 or from the end, e.g.
    {0: {"codebook": finer}, -1: {"method": "fp16"}}. codec_options: settings of the method's own.
    """

    method: str = "vecinfer"
    value_method: str | None = None
    bits: float = 2
    value_bits: float | None = None
    codebook: Any = None
    value_codebook: Any = None
    smooth_factors: Any = None
    num_subspaces: int | None = None
    use_fused_sdpa: bool = True
    window: int = 64
    sinks: int = 4
    seed: int = 0
    strict: bool = False
    layers: dict | None = None
    codec_options: dict | None = None
    fit_tokens: int = 2048
    fit_per: str = "subvector"
    fit_context: int = 16384

    def __post_init__(self):
        for name, value in (("method", self.method), ("value_method", self.value_method or self.method)):
            if value not in METHODS:
                raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(METHODS)}")
        for name in ("window", "sinks", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least 0")
        if self.strict and not self.use_fused_sdpa:
            raise ValueError("strict: got True with use_fused_sdpa=False, wanted the fused attention")
        adaptive.check(self)
        if self.codebook is None:
            for name in ("bits", "value_bits"):
                value = getattr(self, name)
                if value is not None and value not in BITS:
                    raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, BITS))}")
        if not adaptive.wanted(self):
            METHODS[self.method].check(self, "keys")
            METHODS[self.value_method or self.method].check(self, "values")
        self._check_layers()

    def _check_layers(self):
        known = {f.name for f in fields(self)} - {"layers", "use_fused_sdpa"}
        if self.layers is not None and not isinstance(self.layers, dict):
            raise ValueError(f"layers: got {type(self.layers).__name__}, wanted a dict from layer to changed fields")
        for index, changes in (self.layers or {}).items():
            if not isinstance(index, int) or isinstance(index, bool) or not isinstance(changes, dict):
                raise ValueError(f"layers: got {index!r}: {changes!r:.60}, wanted an integer and a dict of fields")
            unknown = sorted(set(map(str, changes)) - known)
            if unknown:
                raise ValueError(f"layers: got field {unknown[0]!r}, wanted one of {', '.join(sorted(known))}")
            replace(self, layers=None, **changes)  # which checks the values


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
    makers = _codec_makers(model, config, layers)
    if config.use_fused_sdpa:
        unfused = patch_mlx_lm_for_fused_sdpa(model)
    else:
        unfused = {layer.index for layer in layers}
        log.warning("use_fused_sdpa=False: history is dequantised at every step, no memory is saved")

    fingerprint = model_fingerprint(model)
    plans = [fit_plan(settings, rope) for (_, settings), rope in zip(makers, _ropes(model, makers))]

    def make_caches():
        caches = native_caches(model)
        for layer, (make_codecs, settings), plan in zip(layers, makers, plans):
            ours = VeloxQuantKVCache(
                make_codecs,
                window=settings.window,
                sinks=settings.sinks,
                strict=settings.strict,
                fused=layer.index not in unfused,
                fingerprint=fingerprint,
                layer=layer.index,
                fit_plan=plan,
            )
            put_cache(caches, layer, ours)
        return caches

    return make_caches


def _codec_makers(model, config, layers):
    """Per layer, a function exact_dtype -> (key codec, value codec)."""
    makers = {}
    for settings, same in _layers_by_config(config, layers):
        if adaptive.wanted(settings):
            for layer in same:
                start = partial(adaptive.starting_codecs, layer.n_kv_heads, layer.head_dim)
                makers[layer.position] = start, settings
            continue
        sides = [
            METHODS[method].side_codecs(model, settings, same, side)
            for side, method in (("keys", settings.method), ("values", settings.value_method or settings.method))
        ]
        for layer, keys, values in zip(same, *sides):
            makers[layer.position] = (lambda dtype, k=keys, v=values: (k(dtype), v(dtype))), settings
        _log_bits(settings, sides, same)
    return [makers[layer.position] for layer in layers]


def fit_plan(config, rope=None):
    """The FitPlan of an adaptive configuration, else None. rope: the layer's LayerRope, where it is known."""
    if not adaptive.wanted(config):
        return None
    bits = key_and_value_bits(config.bits)
    if config.value_bits is not None:
        bits = (bits[0], key_and_value_bits(config.value_bits)[1])
    return adaptive.FitPlan(bits, config.fit_tokens, config.fit_per == "head", config.fit_context, rope)


def _ropes(model, makers):
    """The LayerRope of each attention layer where adaptive caches need it."""
    if any(adaptive.wanted(settings) for _, settings in makers):
        try:
            return detect_ropes(model)
        except ValueError as error:
            log.warning("%s: adaptive tables are fitted for the positions of the prompt alone", error)
    return [None] * len(makers)


def _layers_by_config(config, layers):
    """[(config, the layers it holds for)]: the common one, then one for each entry of config.layers."""
    special = {}
    for index, changes in (config.layers or {}).items():
        position = index + len(layers) if index < 0 else index
        if not 0 <= position < len(layers):
            raise ValueError(f"layers: got layer {index}, wanted one of the {len(layers)} attention layers")
        if position in special:
            raise ValueError(f"layers: got layer {position} twice, as {index} too, wanted it once")
        special[position] = replace(config, layers=None, **changes)
    common = [layer for layer in layers if layer.position not in special]
    groups = [(config, common)] if common else []
    return groups + [(settings, [layers[position]]) for position, settings in sorted(special.items())]


def _log_bits(config, sides, layers):
    """One line with what an element really takes, which a codebook decides whatever was asked for."""
    true = [side[0](mx.float16).bits_per_element for side in sides]
    asked = [config.bits, config.bits if config.value_bits is None else config.value_bits]
    note = "" if config.method == "fp16" or asked == true else f" (asked for {asked[0]:g}/{asked[1]:g})"
    where = "" if config.layers is None and len(layers) > 1 else f", layers {[layer.index for layer in layers]}"
    log.info("%s: %g bits per key element, %g per value element%s%s", config.method, *true, note, where)
