"""method "qjl": signs of an orthogonalised sketch of the keys, `bits` signs an element; no calibration.

codec_options:
    outliers      channels per block of 64 tokens that get a sketch and a norm of their own (default 0)
    outlier_bits  signs of that sketch, a multiple of head_dim (default head_dim)
Values go to turboquant at value_bits unless value_method says otherwise: QJL stores keys only.
"""

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codecs import rabitq


def check(config, side):
    if side == "values":
        if config.value_method == "qjl":
            raise ValueError("value_method: got 'qjl', which stores keys only, wanted another method")
        rabitq.check(config, side)
        return
    rabitq.side_bits(config, side)
    for name, value in rabitq.check_options(config, ("outliers", "outlier_bits")).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"codec_options[{name!r}]: got {value!r}, wanted an integer of at least 0")


def side_codecs(model, config, layers, side):
    if side == "values":
        return rabitq.default_values(model, config, layers)
    bits = rabitq.side_bits(config, side)
    options = dict(config.codec_options or {}) | {"seed": config.seed}

    def shared(layer):
        sketch = {"sketch_bits": bits * layer.head_dim}
        codec = _ext.codec(side, "qjl", layer.n_kv_heads, layer.head_dim, options | sketch, {})
        return lambda dtype: codec

    return [shared(layer) for layer in layers]
