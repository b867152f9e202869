"""method "rabitq": rotated signs or small integers with an unbiased scalar (bits 1 to 4); no calibration.

codec_options (of the keys):
    scale   "unbiased" (default), "reconstruction" or "norm": what the scalar of a token makes right
    mean    [D], [H, D] or [L, H, D]: subtracted before encoding, added back by decoding
Values go to turboquant at value_bits unless value_method says otherwise; value_method="rabitq" stores
them here with scale "reconstruction".
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codecs import turboquant
from veloxquant_mlx.cache.layout import attention_layers

BITS = (1, 2, 3, 4)
SCALES = ("unbiased", "reconstruction", "norm")


def side_bits(config, side):
    """The bits of one side as an integer; ValueError naming the field."""
    name = "value_bits" if side == "values" and config.value_bits is not None else "bits"
    value = getattr(config, name)
    if value not in BITS:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, BITS))}")
    return int(value)


def check_options(config, known):
    """codec_options as a dict; ValueError for a name that is not among `known`."""
    options = config.codec_options or {}
    if not isinstance(options, dict):
        raise ValueError(f"codec_options: got {type(options).__name__}, wanted a dict")
    unknown = sorted(set(map(str, options)) - set(known))
    if unknown:
        raise ValueError(f"codec_options: got {unknown[0]!r}, wanted one of {', '.join(known)}")
    return options


def check(config, side):
    side_bits(config, side)
    if side == "values":
        return
    options = check_options(config, ("scale", "mean"))
    if options.get("scale", SCALES[0]) not in SCALES:
        raise ValueError(f"codec_options['scale']: got {options['scale']!r}, wanted one of {', '.join(SCALES)}")


def default_values(model, config, layers):
    """The values of a method that says nothing about them: turboquant, with its own default options."""
    config = replace(config, method="turboquant", value_method=None, codec_options=None, layers=None)
    return turboquant.side_codecs(model, config, layers, "values")


def side_codecs(model, config, layers, side):
    if side == "values" and config.value_method is None:
        return default_values(model, config, layers)
    bits = side_bits(config, side)
    options = {"bits": bits, "seed": config.seed}
    if side == "values":
        options |= {"scale": "reconstruction"}
        return [_shared(side, layer, options, {}) for layer in layers]
    given = config.codec_options or {}
    options |= {"scale": given.get("scale", SCALES[0])}
    means = _means(given.get("mean"), model)
    return [_shared(side, layer, options, means(layer)) for layer in layers]


def _shared(side, layer, options, arrays):
    codec = _ext.codec(side, "rabitq", layer.n_kv_heads, layer.head_dim, options, arrays)
    return lambda dtype: codec


def _means(mean, model):
    """A function from a layer to the arrays of its codec."""
    if mean is None:
        return lambda layer: {}
    mean = np.array(mean, np.float32)
    n_layers = len(attention_layers(model))

    def of(layer):
        shape = (layer.n_kv_heads, layer.head_dim)
        if mean.shape not in ((n_layers, *shape), shape, shape[1:]):
            raise ValueError(
                f"codec_options['mean']: got {list(mean.shape)}, wanted [{shape[1]}], {list(shape)} or "
                f"{[n_layers, *shape]}"
            )
        own = mean[layer.position] if mean.ndim == 3 else mean
        return {"mean": mx.array(np.ascontiguousarray(np.broadcast_to(own, shape)))}

    return of
