"""method "vecinfer_rope": keys before RoPE, product-quantised in whole RoPE pairs; values as in vecinfer."""

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codecs import pre_rope
from veloxquant_mlx.cache.pre_rope import RopePairCodebook


def key_codec(rope, codebook, layer):
    tables = codebook.keys[layer.position]
    arrays = {
        "tables": mx.array(tables),
        "order": mx.array(codebook.order[layer.position]),
        "weight": mx.array(codebook.weights[layer.position]),
        "inv_freq": rope.frequencies(),
    }
    options = rope.options() | {"n_subvectors": tables.shape[1]}
    return _ext.codec("keys", "vecinfer_rope", layer.n_kv_heads, layer.head_dim, options, arrays)


def check(config, side):
    pre_rope.check(config, side, RopePairCodebook, "train_vecinfer_rope")


def side_codecs(model, config, layers, side):
    return pre_rope.side_codecs(model, config, layers, side, key_codec)
