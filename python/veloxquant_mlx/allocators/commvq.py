"""Training of CommVQ: commuting codebooks of pre-RoPE keys."""

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.pre_rope import (
    NUM_TOKENS,
    check_integer,
    check_positive,
    train_pre_rope,
    value_fitting,
)
from veloxquant_mlx.cache.layout import one_shape
from veloxquant_mlx.cache.pre_rope import CommVQCodebook


def train_commvq(
    model,
    tokenizer,
    bits=2,
    value_bits=None,
    *,
    num_tokens=NUM_TOKENS,
    texts=None,
    stages=None,
    max_steps=30,
    seed=0,
    progress=None,
):
    """A CommVQCodebook for KVCacheConfig(method="commvq", codebook=...).

    bits: of a key element, the scalar of each token included; rounded down to whole stages of 12 bits. stages:
    instead of bits. value_bits: None: as `bits`, or 2 where there is no table shape for them.
    max_steps: EM steps of a stage. texts, num_tokens, progress(fraction, text): as in calibrate().
    """
    _, dim = one_shape(model)
    check_positive("bits", bits)
    if stages is None:
        stages = _ext.commvq_stages(dim, float(bits))
    check_integer("stages", stages, 1, 64)
    check_integer("max_steps", max_steps, 1, 1000)

    def train_keys(x, positions, rope, weight, progress):
        table, error = _ext.train_commvq(
            x, positions, rope, weight, n_stages=stages, max_steps=max_steps, seed=seed, progress=progress
        )
        return {"keys": table}, [head[-1] for head in error]

    values = value_fitting(dim, bits, value_bits, seed)
    return train_pre_rope(
        CommVQCodebook,
        train_keys,
        model,
        tokenizer,
        values,
        num_tokens=num_tokens,
        texts=texts,
        progress=progress,
    )
