"""Cache methods by the names that the command line uses, and the checks of their options."""

from dataclasses import dataclass

from veloxquant_mlx.allocators.vecinfer import TABLE_SHAPES
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.layout import native_caches

METHODS = {
    "vecinfer": "packed product-quantised codes, attention on the codes",
    "fp16": "VeloxQuant's exact cache, 2 bytes an element",
    "exact": "mlx_lm's own cache, in the model's dtype",
    "mlx4": "mlx_lm's QuantizedKVCache, 4 bits, groups of 64",
}
BITS = tuple(TABLE_SHAPES)  # of vecinfer


@dataclass(frozen=True)
class CacheMethod:
    """A method with everything that it needs to make caches for a model."""

    name: str
    bits: float = 0.0  # vecinfer only
    window: int = 64
    sinks: int = 4
    smooth_factors: object = None
    codebook: object = None

    @property
    def label(self):
        return f"{self.name} {self.bits:g} bits" if self.name == "vecinfer" else self.name

    def build(self, model, strict=False):
        """One new cache per layer. strict: every query sees what token-by-token decoding would."""
        if self.name in ("exact", "mlx4"):
            return _mlx_lm_caches(model, quantised=self.name == "mlx4")
        options = {"window": self.window, "sinks": self.sinks, "strict": strict}
        if self.name == "vecinfer":
            options |= {"bits": self.bits, "codebook": self.codebook, "smooth_factors": self.smooth_factors}
        return KVCacheBuilder.build(model, KVCacheConfig(method=self.name, **options))


def kernel(caches):
    """What attention ran on these caches, in words."""
    for cache in caches:
        if getattr(cache, "kernel", None):
            return cache.kernel
    if hasattr(caches[0], "group_size"):
        return "mlx quantized_matmul"
    return "mlx fast.scaled_dot_product_attention"


def check_methods(text):
    """ "a,b" -> ["a", "b"]; ValueError naming the option for an unknown method."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--method: got {name!r}, wanted one of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def check_bits(text):
    """ "4,2" -> [4.0, 2.0]; ValueError naming the option for bits that vecinfer does not have."""
    wanted = ", ".join(f"{bits:g}" for bits in BITS)
    try:
        bits = [float(part) for part in str(text).split(",")]
    except ValueError:
        raise ValueError(f"--bits: got {text!r}, wanted one of {wanted}") from None
    for value in bits:
        if value not in BITS:
            raise ValueError(f"--bits: got {value:g}, wanted one of {wanted}")
    return list(dict.fromkeys(bits))


def only(option, values):
    """The one entry of `values`; ValueError naming the option if there are more."""
    if len(values) != 1:
        raise ValueError(f"{option}: got {len(values)} values, wanted one")
    return values[0]


def check_at_least(option, value, least):
    if value < least:
        raise ValueError(f"{option}: got {value}, wanted at least {least}")


def _mlx_lm_caches(model, quantised):
    caches = native_caches(model)
    if quantised:
        caches = [
            cache.to_quantized(group_size=64, bits=4) if hasattr(cache, "to_quantized") else cache for cache in caches
        ]
    return caches
