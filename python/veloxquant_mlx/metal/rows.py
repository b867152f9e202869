"""What a batch of rows of different lengths hands to attention: each row's own packed tensors."""

from dataclasses import dataclass

import mlx.core as mx


class CausalMask(mx.array):
    """A mask that says nothing but "causal", for a model that asked for an array: not read."""


@dataclass(frozen=True)
class Row:
    """One row at one step. Of the step's columns only [first, first + n) are tokens, the others are
    padding. In the mask, the row's keys are the columns [start, start + length)."""

    keys: object  # EncodedTensor, or None where the row has no token yet
    values: object
    first: int
    n: int
    start: int
    length: int


@dataclass(frozen=True)
class EncodedRows:
    """Keys or values of a batch: [B, H_kv, width, D] as the model sees them, padding never stored."""

    rows: tuple
    shape: tuple
    ndim = 4


def attend_rows(attend, queries, encoded: EncodedRows, mask, **options):
    """Every row alone, as it would be in a cache of its own; queries of padding get zeros.
    attend: metal_fused_sdpa."""
    n_columns = queries.shape[2]
    outputs = []
    for i, row in enumerate(encoded.rows):
        q = queries[i : i + 1]
        if row.n == 0:
            outputs.append(mx.zeros_like(q))
            continue
        if row.n < n_columns:
            q = q[:, :, row.first : row.first + row.n]
        out = attend(q, row.keys, row.values, mask=_mask_of_row(mask, i, row), **options)
        if row.n < n_columns:
            out = mx.pad(out, [(0, 0), (0, 0), (row.first, n_columns - row.first - row.n), (0, 0)])
        outputs.append(out)
    return mx.concatenate(outputs)


def _mask_of_row(mask, i, row):
    if mask is None or isinstance(mask, str):
        return mask
    if isinstance(mask, CausalMask):
        return None if row.n == 1 else "causal"
    if mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[i : i + 1]
    return mask[..., row.first : row.first + row.n, row.start : row.start + row.length]
