"""Codebooks of keys before RoPE: what their training returns, the store keeps and the config takes.

The rotary embedding is not part of them: it is read from the model again (models/rope.py).
"""

from dataclasses import dataclass, field, fields

import numpy as np

from veloxquant_mlx.cache.codebook import table_bits


@dataclass
class PreRopeCodebook:
    """What all have: tables of a whole model, L attention layers.

    weights: fp32 [L, H_kv, D / 2], the metric of the RoPE pairs.
    values: fp16 [L, H_kv, M, C, d] behind value_rotations, fp32 [L, H_kv, D, D]: product VQ.
    """

    keys: np.ndarray
    weights: np.ndarray
    values: np.ndarray
    value_rotations: np.ndarray
    fingerprint: str
    relative_error: dict = field(default_factory=dict)  # side -> [L][H_kv]: |x - x^|^2 / |x|^2

    @property
    def arrays(self) -> dict:
        """Field -> array."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: array for name, array in held.items() if isinstance(array, np.ndarray)}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def bits_per_element(self) -> tuple[float, float]:
        """(keys, values): bits of the codes per element, the scalars of tokens included."""
        return self.key_bits, table_bits(self.values)


@dataclass
class CommVQCodebook(PreRopeCodebook):
    """Keys by CommVQ: fp16 [L, H_kv, R, N, 2, D / 2], R stages of N entries: x of all RoPE pairs, then y."""

    @property
    def n_stages(self) -> int:
        return self.keys.shape[2]

    @property
    def head_dim(self) -> int:
        return 2 * self.keys.shape[-1]

    @property
    def key_bits(self) -> float:
        """12 bits a stage, and 16 of the scalar (src/codecs/commvq/README.md)."""
        return (12 * self.n_stages + 16) / self.head_dim


@dataclass
class RopePairCodebook(PreRopeCodebook):
    """Keys by product VQ of whole RoPE pairs: fp16 [L, H_kv, M, C, d].

    order: int32 [L, H_kv, D / 2], the pairs as they are dealt out to the sub-vectors.
    """

    order: np.ndarray = None

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2] * self.keys.shape[4]

    @property
    def key_bits(self) -> float:
        return table_bits(self.keys)
