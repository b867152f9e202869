"""method "commvq": keys before RoPE as sums of centres that commute with it; values by product VQ."""

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codecs import pre_rope
from veloxquant_mlx.cache.pre_rope import CommVQCodebook


def key_codec(rope, codebook, layer):
    arrays = {
        "codebook": mx.array(codebook.keys[layer.position]),
        "weight": mx.array(codebook.weights[layer.position]),
        "inv_freq": rope.frequencies(),
    }
    return _ext.codec("keys", "commvq", layer.n_kv_heads, layer.head_dim, rope.options(), arrays)


def check(config, side):
    pre_rope.check(config, side, CommVQCodebook, "train_commvq")


def side_codecs(model, config, layers, side):
    return pre_rope.side_codecs(model, config, layers, side, key_codec)
