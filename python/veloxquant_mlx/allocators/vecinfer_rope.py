"""Training of VecInfer on keys before RoPE: product codebooks of whole RoPE pairs."""

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.pre_rope import check_positive, train_pre_rope, value_fitting
from veloxquant_mlx.cache.codebook import TABLE_SHAPES
from veloxquant_mlx.cache.layout import one_shape
from veloxquant_mlx.cache.pre_rope import RopePairCodebook

NUM_TOKENS = 24576


def train_vecinfer_rope(
    model, tokenizer, bits=2, value_bits=None, *, num_tokens=NUM_TOKENS, texts=None, seed=0, progress=None
):
    """A RopePairCodebook for KVCacheConfig(method="vecinfer_rope", codebook=...).

    bits: of a key element, of those that put whole pairs into a sub-vector: 1, 1.5, 2, 3 or 4. value_bits: None:
    as `bits`. texts, num_tokens, progress(fraction, text): as in calibrate().
    """
    _, dim = one_shape(model)
    check_positive("bits", bits)
    whole = {b: shape for b, shape in TABLE_SHAPES.items() if shape[0] % 2 == 0 and dim % shape[0] == 0}
    if bits not in whole:
        raise ValueError(f"bits: got {bits!r}, wanted one of {', '.join(f'{b:g}' for b in whole)}")
    sub_dim, n_centroids = whole[bits]

    def train_keys(x, positions, rope, weight, progress):
        tables, order, error = _ext.train_vecinfer_rope(
            x, positions, rope, weight, n_subvectors=dim // sub_dim, n_centroids=n_centroids, seed=seed
        )
        return {"keys": tables, "order": order}, error

    values = value_fitting(dim, bits, value_bits, seed)
    return train_pre_rope(
        RopePairCodebook,
        train_keys,
        model,
        tokenizer,
        values,
        num_tokens=num_tokens,
        texts=texts,
        progress=progress,
    )
