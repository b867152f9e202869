"""method "fp16": exact 16-bit tokens in our own cache, to compare with."""

import mlx.core as mx

from veloxquant_mlx import _ext


def codec(side, n_kv_heads, head_dim, dtype):
    """dtype: mx.float16 or mx.bfloat16."""
    name = "bfloat16" if dtype == mx.bfloat16 else "float16"
    return _ext.codec(side, "exact", n_kv_heads, head_dim, {"dtype": name})


def check(config, side):
    """Nothing can be wrong."""


def side_codecs(model, config, layers, side):
    return [lambda dtype, layer=layer: codec(side, layer.n_kv_heads, layer.head_dim, dtype) for layer in layers]
