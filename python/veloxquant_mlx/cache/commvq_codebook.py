"""What training CommVQ returns, the store keeps and the config takes."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class CommVQCodebook:
    """Trained tables of a whole model: keys by CommVQ, values by product VQ behind a learned rotation.

    keys: fp16 [L, H_kv, R, N, 2, D / 2], R stages of N entries: x of all RoPE pairs, then y.
    weights: fp32 [L, H_kv, D / 2], the metric of the pairs.
    values: fp16 [L, H_kv, M, C, d]; value_rotations: fp32 [L, H_kv, D, D].
    The rotary embedding is not part of it: it is read from the model again.
    """

    keys: np.ndarray
    weights: np.ndarray
    values: np.ndarray
    value_rotations: np.ndarray
    fingerprint: str
    relative_error: dict = field(default_factory=dict)  # side -> [L][H_kv]: |x - x^|^2 / |x|^2

    @property
    def n_stages(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.keys, self.weights, self.values, self.value_rotations))
