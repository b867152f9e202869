"""Cache methods by the names that the command line uses, and the checks of their options."""

import re
from dataclasses import dataclass
from pathlib import Path

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codebook import key_and_value_bits
from veloxquant_mlx.cache.layout import flat_caches, native_caches
from veloxquant_mlx.cli import reference
from veloxquant_mlx.cli.calibration import CODEBOOKS, Trained

METHODS = {
    "vecinfer": "packed product-quantised codes, attention on the codes",
    "vecinfer_rope": "vecinfer on keys before RoPE, in whole RoPE pairs",
    "commvq": "keys before RoPE as sums of centres that commute with it",
    "adaptive": "vecinfer with tables fitted on the prompt itself; no calibration",
    "turboquant": "rotated scalar codes, no calibration",
    "turboquant_rvq": "rotated scalar codes in two stages of so many bits each, no calibration",
    "rabitq": "rotated signs or small integers of keys, no calibration",
    "qjl": "signs of a sketch of the keys, no calibration",
    "fp16": "VeloxQuant's exact cache, 2 bytes an element",
    "exact": "mlx_lm's own cache, in the model's dtype",
    "mlx4": "mlx_lm's QuantizedKVCache, 4 bits, groups of 64",
    "pre_rope": "for eval alone: a learned rotation of keys before RoPE, computed densely",
}
REFERENCES = ("pre_rope",)  # that no cache does
# These take --bits as they are; those of calibration.CODEBOOKS have the bits of their codebook.
UNTRAINED = ("adaptive", "turboquant", "turboquant_rvq", "rabitq", "qjl")
WITH_BITS = (*CODEBOOKS, *UNTRAINED)


@dataclass(frozen=True)
class Wanted:
    """A method as it was asked for. bits: (keys, values), or None: those of the methods without any, or every
    codebook there is. window, sinks: exact tokens; None: as those of all others."""

    name: str
    bits: tuple | None = None
    window: int | None = None
    sinks: int | None = None


@dataclass(frozen=True)
class CacheMethod:
    """A method with everything that it needs to make caches for a model."""

    name: str
    bits: tuple = (16.0, 16.0)  # of keys and values; of WITH_BITS
    window: int = 64
    sinks: int = 4
    trained: Trained | None = None  # of those of calibration.CODEBOOKS
    fit_tokens: int = 1024  # adaptive
    fit_per: str = "subvector"
    own_exact: bool = False  # window and sinks were asked for, of a method of mlx_lm

    @property
    def label(self):
        if self.own_exact and self.name == "mlx4":
            return f"mlx4, window {self.window}, sinks {self.sinks}"
        return f"{self.name} {bits_text(self.bits)} bits" if self.name in WITH_BITS else self.name

    def build(self, model, strict=False):
        """One new cache per layer. strict: every query sees what token-by-token decoding would."""
        if self.name in ("exact", "mlx4") and not self.own_exact:
            return _mlx_lm_caches(model, quantised=self.name == "mlx4")
        if self.name in ("mlx4", *REFERENCES):
            return reference.build(model, self.name, self.trained, self.window, self.sinks)
        options = {"window": self.window, "sinks": self.sinks, "strict": strict}
        if self.name in UNTRAINED:
            options |= {"bits": self.bits[0], "value_bits": self.bits[1]}
        if self.trained is not None:
            options |= {"codebook": self.trained.codebook, "smooth_factors": self.trained.smooth_factors}
        if self.name == "adaptive":
            options |= {"codebook": "adaptive", "fit_tokens": self.fit_tokens, "fit_per": self.fit_per}
        method = "vecinfer" if self.name == "adaptive" else self.name
        return KVCacheBuilder.build(model, KVCacheConfig(method=method, **options))


def labels(methods) -> list[str]:
    """One for each, all different: what methods of the same name and bits differ in is added."""
    found = [method.label for method in methods]
    for field in (
        lambda m: f"window {m.window}, sinks {m.sinks}",
        lambda m: m.trained.source if m.trained else "",
        lambda m: m.fit_per,
    ):
        for label in {label for label in found if found.count(label) > 1}:
            places = [i for i, other in enumerate(found) if other == label]
            added = {i: field(methods[i]) for i in places}
            if len(set(added.values())) > 1:
                for i in places:
                    found[i] = f"{label}, {added[i]}" if added[i] else label
    return [label if found.index(label) == i else f"{label} #{i + 1}" for i, label in enumerate(found)]


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


def methods_with_bits(names, pairs) -> list[Wanted]:
    """Those that take bits once for each pair of them."""
    return [Wanted(name, pair) for name in names for pair in (pairs if name in WITH_BITS else [None])]


def check_compare(text) -> list[Wanted]:
    """ "fp16,mlx4,vecinfer4/2,adaptive2:0/0" -> methods with their bits, and with a window and sinks of their own."""
    wanted = []
    for part in text.split(","):
        match = re.fullmatch(r"(.*?)([\d.]+(?:/[\d.]+)?)?(?::(\d+)/(\d+))?", part.strip())
        name, bits, *exact = match.groups()
        if (whole := f"{name}{bits or ''}") in METHODS:
            name, bits = whole, None
        known = name in METHODS and (bits is None or name in WITH_BITS)
        if not known or (name == "exact" and exact[0] is not None):
            raise ValueError(
                f"--compare: got {part!r}, wanted one of {', '.join(METHODS)}, with bits where they take some, e.g. "
                "vecinfer2, vecinfer4/2, and a window and sinks of its own after a colon, e.g. vecinfer4:0/0"
            )
        pair = only("--compare", check_bits(bits, "--compare")) if bits else None
        wanted.append(Wanted(name, pair, *(None if number is None else int(number) for number in exact)))
    return list(dict.fromkeys(wanted))


def bits_text(pair):
    """(2.0, 2.0) -> "2", (3.0, 2.0) -> "3/2"."""
    return f"{pair[0]:.3g}" if pair[0] == pair[1] else f"{pair[0]:.3g}/{pair[1]:.3g}"


def check_bits(text, option="--bits"):
    """ "4,2.5,4/2" -> [(4.0, 4.0), (3.0, 2.0), (4.0, 2.0)]: bits of keys and values. ValueError naming
    the option for bits that vecinfer does not have."""
    pairs = []
    for part in str(text).split(","):
        try:
            numbers = [float(number) for number in part.split("/")]
            pairs.append(key_and_value_bits(numbers if len(numbers) > 1 else numbers[0]))
        except ValueError as error:
            reason = str(error).partition("wanted ")[2] or "numbers such as 2, or 4/2 for keys and values"
            raise ValueError(f"{option}: got {part!r}, wanted {reason}") from None
    return list(dict.fromkeys(tuple(map(float, pair)) for pair in pairs))


def only(option, values):
    """The one entry of `values`; ValueError naming the option if there are more."""
    if len(values) != 1:
        raise ValueError(f"{option}: got {len(values)} values, wanted one")
    return values[0]


def check_at_least(option, value, least):
    if value < least:
        raise ValueError(f"{option}: got {value}, wanted at least {least}")


def check_directories(artifacts):
    """--artifacts as a list; FileNotFoundError for what is no directory."""
    for directory in artifacts or ():
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"--artifacts: got {directory!r}, wanted a directory made by veloxquant calibrate")
    return list(artifacts or ())


def _mlx_lm_caches(model, quantised):
    caches = native_caches(model)
    if quantised:
        caches = [
            cache.to_quantized(group_size=64, bits=4) if hasattr(cache, "to_quantized") else cache for cache in caches
        ]
    return caches
