"""method "turboquant": rotate, one Lloyd-Max code of `bits` bits a coordinate, one scalar a token.

codec_options: {"scale": "norm_corrected" | "raw" | "unbiased"} or {"prod": True} (bits - 1 bits and a
sign sketch of what they leave, the paper's inner-product form).
"""

from veloxquant_mlx.cache.codecs import scalar

SCALES = ("norm_corrected", "raw", "unbiased")


def check(config, side):
    scalar.check_bits(config, side, "turboquant")
    scalar.check_options(config, "turboquant", {"scale": SCALES, "prod": (False, True)})
    options = config.codec_options or {}
    if options.get("prod") and options.get("scale", "raw") != "raw":
        raise ValueError(f"codec_options: got scale = {options['scale']!r} with prod, wanted 'raw' or none")


def side_codecs(model, config, layers, side):
    options = {"bits": int(scalar.bits_of(config, side)), **(config.codec_options or {})}
    options["prod"] = int(options.get("prod", False))
    return scalar.codecs(config, layers, side, "turboquant", options)
