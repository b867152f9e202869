"""What the methods of the scalar family share: a bit width and a seed, and no calibration."""

from veloxquant_mlx import _ext


def bits_of(config, side):
    return config.bits if side == "keys" or config.value_bits is None else config.value_bits


def check_bits(config, side, method):
    bits = bits_of(config, side)
    if bits not in (1, 2, 3, 4):
        field = "bits" if side == "keys" or config.value_bits is None else "value_bits"
        raise ValueError(f"{field}: got {bits!r}, wanted 1, 2, 3 or 4 (method {method!r})")
    other = config.value_method if side == "keys" else config.method
    if other != "vecinfer" and (config.codebook is not None or config.smooth_factors is not None):
        field = "codebook" if config.codebook is not None else "smooth_factors"
        raise ValueError(f"{field}: got one, wanted none: method {method!r} needs no calibration")


def check_options(config, method, known):
    """known: option -> its values. ValueError naming codec_options for another name or value."""
    if not isinstance(config.codec_options or {}, dict):
        raise ValueError(f"codec_options: got {type(config.codec_options).__name__}, wanted a dict")
    for name, value in (config.codec_options or {}).items():
        if name not in known:
            raise ValueError(f"codec_options: got {name!r}, wanted {', '.join(known)} (method {method!r})")
        if value not in known[name]:
            wanted = ", ".join(map(repr, known[name]))
            raise ValueError(f"codec_options: got {name} = {value!r}, wanted one of {wanted}")


def codecs(config, layers, side, method, options):
    """Layers have rotations of their own; keys and values of a layer share none."""
    made = []
    for layer in layers:
        seed = 2 * (config.seed * 4096 + layer.position) + (side == "values")
        made.append(_ext.codec(side, method, layer.n_kv_heads, layer.head_dim, {**options, "seed": seed}))
    return [lambda dtype, one=one: one for one in made]
