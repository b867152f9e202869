"""The packed part of every cache takes what its formula says, for every method, width and head size.

Formulas: the READMEs of src/codecs, which are ALGORITHMS section 7 for any head size D. Exact recent
tokens, sinks and shared tables are listed apart.
"""

import functools

import architectures
import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx.allocators.commvq import train_commvq
from veloxquant_mlx.allocators.vecinfer_rope import train_vecinfer_rope
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.contents import describe

TOKENS, SINKS, WINDOW, BLOCK, LAYERS, HEADS = 200, 4, 64, 64, 1, 2
PACKED = (TOKENS - SINKS - WINDOW) // BLOCK * BLOCK


def scalar(bits):
    return lambda dim: dim * bits / 8 + 2  # codes, one fp16 scalar


def product(code_bits, sub_dim):
    return lambda dim: dim / sub_dim * code_bits / 8


def table(code_bits, sub_dim):
    entries = np.random.default_rng(0).standard_normal((2**code_bits, sub_dim))
    return lambda model: entries.astype(np.float32)


def commuting(model):
    return train_commvq(model, architectures.Tokenizer(), bits=2, num_tokens=512, max_steps=2)


def pairs(model):
    return train_vecinfer_rope(model, architectures.Tokenizer(), num_tokens=512)


# settings of KVCacheConfig, what makes the codebook, bytes a token of keys and of values
CASES = [
    *(
        (dict(method="turboquant", bits=bits, value_bits=5 - bits), None, scalar(bits), scalar(5 - bits))
        for bits in (1, 2, 3, 4)
    ),
    *(
        (
            dict(method="turboquant", bits=bits, codec_options=dict(prod=True), value_method="fp16"),
            None,
            lambda dim, bits=bits: dim * bits / 8 + 4,  # codes of bits - 1, signs, two scalars
            lambda dim: 2 * dim,
        )
        for bits in (2, 4)
    ),
    *(
        (
            dict(method="turboquant_rvq", bits=bits),
            None,
            *2 * [lambda dim, bits=bits: 2 * dim * bits / 8 + 2],
        )
        for bits in (1, 2, 3, 4)
    ),
    *(
        (
            dict(method="rabitq", value_method="rabitq", bits=bits, value_bits=5 - bits),
            None,
            scalar(bits),
            scalar(5 - bits),
        )
        for bits in (1, 2, 3, 4)
    ),
    *((dict(method="qjl", bits=bits, value_bits=2), None, scalar(bits), scalar(2)) for bits in (1, 2, 4)),
    (
        dict(method="qjl", bits=2, value_bits=4, codec_options=dict(outliers=4)),
        None,
        lambda dim: (2 * dim + dim) / 8 + 4 + 4 / BLOCK,  # signs of both, two norms, channels of a block
        scalar(4),
    ),
    *(
        (dict(), table(code_bits, sub_dim), product(code_bits, sub_dim), product(code_bits, sub_dim))
        for code_bits, sub_dim in ((4, 2), (4, 1), (6, 4), (8, 8), (8, 4), (8, 2), (10, 4), (12, 8))
    ),
    # 12 bits a stage, one scalar: as many stages as `bits` leave room for
    (
        dict(method="commvq"),
        commuting,
        lambda dim: (2 * dim - 16) // 12 * 1.5 + 2,
        product(8, 4),
    ),
    (dict(method="vecinfer_rope"), pairs, product(8, 4), product(8, 4)),
    (dict(method="fp16"), None, lambda dim: 2 * dim, lambda dim: 2 * dim),
]


@functools.cache
def model(dim):
    return architectures.build("llama", head_dim=dim, num_hidden_layers=LAYERS)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case[0].values())) or "vecinfer")
def test_packed_bytes_are_the_formula(case, dim):
    settings, codebook, of_keys, of_values = case
    if dim == 80 and codebook in (commuting, pairs):
        pytest.skip("trained at two head sizes: enough, and training takes its time")
    if codebook is not None:
        settings = dict(settings, codebook=codebook(model(dim)))
    caches = KVCacheBuilder.build(model(dim), KVCacheConfig(sinks=SINKS, window=WINDOW, **settings))
    tokens = mx.array(np.random.default_rng(1).integers(0, architectures.VOCABULARY, (1, TOKENS)))
    mx.eval(model(dim)(tokens, cache=caches))
    contents = describe(caches)
    assert len(contents) == LAYERS
    for layer, cache in zip(contents, caches, strict=True):
        parts = layer["bytes"]
        packed = parts["key_codes"] + parts["value_codes"] + parts["scalars"]
        formula = (of_keys(dim) + of_values(dim)) * HEADS * PACKED
        assert formula <= packed <= 1.02 * formula
        # Apart: exact tokens (the window and a block on its way), sinks, and tables shared by all.
        assert parts["sinks"] == 2 * HEADS * SINKS * dim * 2
        assert parts["exact"] == 2 * HEADS * (WINDOW + BLOCK) * dim * 2
        assert cache.nbytes == packed + parts["sinks"] + parts["exact"]
        assert parts["tables"] == cache.shared_nbytes
