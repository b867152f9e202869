"""The rotary embedding of each attention layer: read from the model's modules, checked against what the model does.

A layer's module says what it means to do; the keys that reach the cache say what was done. Both are compared
with our own RoPE (C++, include/veloxquant/rope.h) before a codec of pre-RoPE keys relies on it. One token is run
at a few offsets: a single token attends to itself alone, so its keys differ between offsets by RoPE and nothing else.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.layout import attention_layers, cache_of, native_caches, put_cache

# Where the module and the keys are looked at. Position 0 is what the others are compared with.
PROBE_POSITIONS = (1, 50, 1001)
# Largest difference, relative to the size of the keys, by their dtype: their own rounding, and for fp32 that of the
# angles in MLX.
_TOLERANCE = {mx.float32: 2e-3, mx.float16: 6e-3, mx.bfloat16: 4e-2}


@dataclass(frozen=True, eq=False)
class LayerRope:
    """What one layer does to its keys. inv_freq: radians per position of each rotated pair, fp32; none where the
    layer has no position embedding. module: the class it was read from, None without RoPE. max_position: the
    embedding is only known below it (dynamic NTK scaling); our keys come back right beyond it too, since encoding
    and decoding use the same angles, but codebooks fit them less well."""

    head_dim: int
    inv_freq: np.ndarray
    traditional: bool = False
    position_scale: float = 1.0
    attention_factor: float = 1.0
    module: str | None = None
    max_position: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "inv_freq", np.asarray(self.inv_freq, np.float32).reshape(-1))

    @property
    def rotates(self) -> bool:
        return bool(np.any(self.inv_freq))

    @property
    def rotary_dims(self) -> int:
        return 2 * len(self.inv_freq)

    def partners(self) -> np.ndarray:
        """The other channel of each channel's pair; channels that do not rotate are their own."""
        partners, n = np.arange(self.head_dim), self.rotary_dims
        partners[:n] = partners[:n] ^ 1 if self.traditional else np.roll(partners[:n], n // 2)
        return partners

    def turned_moments(self, moments: mx.array) -> mx.array:
        """E q_i^2 [H, D] of queries that RoPE turns by every angle: both channels of a pair get the mean of the two."""
        return (moments + moments[:, mx.array(self.partners())]) / 2

    def core(self):
        """The C++ Rope: rotate(x, positions), unrotate(x, positions)."""
        return _ext.Rope(
            self.head_dim, self.frequencies(), self.traditional, self.position_scale, self.attention_factor
        )

    def frequencies(self):
        # An array without elements cannot be a codec's table: one pair that stands still is the same.
        return mx.array(self.inv_freq if self.inv_freq.size else np.zeros(1, np.float32))

    def options(self) -> dict:
        """As options of a codec, beside the table inv_freq."""
        return {
            "traditional": int(self.traditional),
            "position_scale": float(self.position_scale),
            "attention_factor": float(self.attention_factor),
        }


def detect_ropes(model) -> list[LayerRope]:
    """One LayerRope for each of attention_layers(model). ValueError naming the layer and its module where the
    embedding is of a kind that is not known, or where it does not do what it says."""
    known = getattr(model, "_veloxquant_ropes", None)
    if known is not None:
        return known
    layers = attention_layers(model)
    keys = {position: _keys_at(model, position) for position in (0, *PROBE_POSITIONS)}
    ropes = []
    for layer in layers:
        here = {position: keys[position][layer.position] for position in keys}
        ropes.append(_detect(model, layer, here))
    object.__setattr__(model, "_veloxquant_ropes", ropes)
    return ropes


def read_module(module, head_dim) -> LayerRope:
    """The LayerRope that a module of mlx or mlx_lm describes. ValueError for a class that is not known."""
    name = type(module).__name__
    reader = _READERS.get(name)
    if reader is None:
        raise ValueError(f"RoPE: got a module {name}, wanted one of {', '.join(sorted(_READERS))}")
    settings = reader(module)
    rope = LayerRope(head_dim=head_dim, module=name, **settings)
    if rope.rotary_dims > head_dim:
        raise ValueError(f"RoPE: got {name} of {rope.rotary_dims} dimensions, wanted at most head_dim = {head_dim}")
    return rope


def _by_base(dims, base, scale=1.0, **settings):
    # As mx.fast.rope computes them, in fp32.
    half = dims // 2
    inv_freq = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base) / half))
    return {"inv_freq": np.array(inv_freq), "position_scale": scale, **settings}


def _by_freqs(module, attention_factor=1.0, traditional=None):
    # mx.fast.rope takes periods; an infinite one stands still.
    return {
        "inv_freq": np.array(1.0 / module._freqs.astype(mx.float32)),
        "traditional": module.traditional if traditional is None else traditional,
        "attention_factor": float(attention_factor),
    }


def _dynamic_ntk(module):
    """Below max_position_embeddings the base is the module's own; beyond, it changes with every token."""
    base = getattr(module, "original_base", None) or module.base
    scale = getattr(module, "scale", 1.0)
    return _by_base(
        module.dims, base, scale, traditional=module.traditional, max_position=module.max_position_embeddings
    )


# Class -> its settings. Classes of the same name in several model files of mlx_lm agree in what is read here.
_READERS = {
    "RoPE": lambda m: _by_base(m.dims, m.base, m.scale, traditional=m.traditional),
    "Llama3RoPE": _by_freqs,
    "ProportionalRoPE": _by_freqs,
    "YarnRoPE": lambda m: _by_freqs(m, m.mscale),
    "SuScaledRoPE": lambda m: _by_freqs(m, m._scale, traditional=False),
    "DynamicNTKAlphaRoPE": lambda m: _by_freqs(m, traditional=False),
    "DeepseekV2YarnRotaryEmbedding": lambda m: _by_freqs(m, m.mscale, traditional=True),
    "DynamicNTKScalingRoPE": _dynamic_ntk,
}


class _Probe(KVCache):
    """An empty cache that claims to be at an offset, and keeps the keys it is handed."""

    def __init__(self, offset):
        super().__init__()
        self.offset = offset
        self.seen = None

    def update_and_fetch(self, keys, values):
        self.seen = keys
        return keys, values

    def make_mask(self, *args, **kwargs):
        return None


def _keys_at(model, position) -> list:
    """Keys [B, H, 1, D] of token 0 at `position`, for each of attention_layers(model)."""
    caches, layers = native_caches(model), attention_layers(model)
    for layer in layers:
        put_cache(caches, layer, _Probe(position))
    model(mx.array([[0]]), cache=caches)
    seen = [cache_of(caches, layer).seen for layer in layers]
    mx.eval(seen)
    return seen


def _detect(model, layer, keys):
    if all(_difference(keys[0], keys[position]) == 0.0 for position in PROBE_POSITIONS):
        return LayerRope(layer.head_dim, np.zeros(0, np.float32))
    modules = _rope_modules(model, layer.index)
    reasons = []
    for module in modules:
        name = type(module).__name__
        try:
            rope = read_module(module, layer.head_dim)
        except ValueError as error:
            reasons.append(str(error))
            continue
        difference = _module_difference(module, rope)
        if difference > _TOLERANCE[mx.float32]:
            reasons.append(f"{name} differs from its description by {difference:.2g}")
            continue
        difference = _keys_difference(rope, keys)
        if difference > _TOLERANCE.get(keys[0].dtype, _TOLERANCE[mx.bfloat16]):
            reasons.append(f"the keys differ from {name} by {difference:.2g}")
            continue
        return rope
    found = "; ".join(dict.fromkeys(reasons)) or "no module with RoPE in its class name"
    raise ValueError(
        f"RoPE: layer {layer.index} turns its keys with their position in a way that is not known ({found}), "
        f"wanted one of {', '.join(sorted(_READERS))}"
    )


def _rope_modules(model, index):
    """Modules that may be the layer's: those inside it first, then those of the whole model (shared ones)."""

    def inside(part):
        return [m for _, m in part.named_modules() if _looks_like_rope(m)] if hasattr(part, "named_modules") else []

    layers = list(model.layers)
    own = inside(layers[index]) if index < len(layers) else []
    return own + [m for m in inside(model) if not any(m is other for other in own)]


def _looks_like_rope(module):
    name = type(module).__name__.lower()
    return type(module).__name__ in _READERS or "rope" in name or "rotary" in name


def _difference(a, b):
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.abs(a - b).max() / mx.maximum(mx.abs(a).max(), 1e-20)).item()


def _positions(rope):
    return [p for p in PROBE_POSITIONS if rope.max_position is None or p < rope.max_position]


def _module_difference(module, rope):
    """The module against its description, on random rows."""
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 1, rope.head_dim)), dtype=mx.float32)
    dims = rope.rotary_dims if type(module).__name__ == "DeepseekV2YarnRotaryEmbedding" else rope.head_dim
    worst = 0.0
    for position in _positions(rope):
        theirs = module(x[..., :dims], offset=position)
        ours = rope.core().rotate(x, mx.array([position]))[..., :dims]
        worst = max(worst, _difference(theirs, ours))
    return worst


def _keys_difference(rope, keys):
    core = rope.core()
    plain = core.unrotate(keys[0], mx.array([0]))
    return max(_difference(core.rotate(plain, mx.array([p])), keys[p]) for p in _positions(rope))
