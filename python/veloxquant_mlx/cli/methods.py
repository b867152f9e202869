"""Cache methods by the names that the command line uses, and the checks of their options."""

from dataclasses import dataclass

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codebook import key_and_value_bits
from veloxquant_mlx.cache.layout import flat_caches, native_caches

METHODS = {
    "vecinfer": "packed product-quantised codes, attention on the codes",
    "adaptive": "vecinfer with tables fitted on the prompt itself; no calibration",
    "turboquant": "rotated scalar codes, no calibration",
    "turboquant_rvq": "rotated scalar codes in two stages of so many bits each, no calibration",
    "fp16": "VeloxQuant's exact cache, 2 bytes an element",
    "exact": "mlx_lm's own cache, in the model's dtype",
    "mlx4": "mlx_lm's QuantizedKVCache, 4 bits, groups of 64",
}
# These take --bits as they are; vecinfer's are those of a codebook.
WITH_BITS = ("adaptive", "turboquant", "turboquant_rvq")


@dataclass(frozen=True)
class CacheMethod:
    """A method with everything that it needs to make caches for a model."""

    name: str
    bits: tuple = (16.0, 16.0)  # of keys and values; of vecinfer and WITH_BITS
    window: int = 64
    sinks: int = 4
    smooth_factors: object = None
    codebook: object = None
    fit_tokens: int = 1024  # adaptive
    fit_per: str = "subvector"

    @property
    def label(self):
        return f"{self.name} {bits_text(self.bits)} bits" if self.name in ("vecinfer", *WITH_BITS) else self.name

    def build(self, model, strict=False):
        """One new cache per layer. strict: every query sees what token-by-token decoding would."""
        if self.name in ("exact", "mlx4"):
            return _mlx_lm_caches(model, quantised=self.name == "mlx4")
        options = {"window": self.window, "sinks": self.sinks, "strict": strict}
        if self.name in ("vecinfer", *WITH_BITS):
            options |= {"bits": self.bits[0], "value_bits": self.bits[1]}
        if self.name == "vecinfer":
            options |= {"codebook": self.codebook, "smooth_factors": self.smooth_factors}
        if self.name == "adaptive":
            options |= {"codebook": "adaptive", "fit_tokens": self.fit_tokens, "fit_per": self.fit_per}
        method = "vecinfer" if self.name == "adaptive" else self.name
        return KVCacheBuilder.build(model, KVCacheConfig(method=method, **options))


def kernel(caches):
    """What attention ran on these caches, in words."""
    for cache in flat_caches(caches):
        if getattr(cache, "kernel", None):
            return cache.kernel
    if any(hasattr(cache, "group_size") for cache in flat_caches(caches)):
        return "mlx quantized_matmul"
    return "mlx fast.scaled_dot_product_attention"


def check_methods(text):
    """ "a,b" -> ["a", "b"]; ValueError naming the option for an unknown method."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--method: got {name!r}, wanted one of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def bits_text(pair):
    """(2.0, 2.0) -> "2", (3.0, 2.0) -> "3/2"."""
    return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g}/{pair[1]:g}"


def check_bits(text):
    """ "4,2.5,4/2" -> [(4.0, 4.0), (3.0, 2.0), (4.0, 2.0)]: bits of keys and values. ValueError naming
    the option for bits that vecinfer does not have."""
    pairs = []
    for part in str(text).split(","):
        try:
            numbers = [float(number) for number in part.split("/")]
            pairs.append(key_and_value_bits(numbers if len(numbers) > 1 else numbers[0]))
        except ValueError as error:
            reason = str(error).partition("wanted ")[2] or "numbers such as 2, or 4/2 for keys and values"
            raise ValueError(f"--bits: got {part!r}, wanted {reason}") from None
    return list(dict.fromkeys(tuple(map(float, pair)) for pair in pairs))


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
