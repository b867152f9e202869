"""Fitting rotations and tables to the keys or the values of one layer: what calibration and adaptive caches share."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codebook import TABLE_SHAPES

PER = ("subvector", "lane", "head")
ENTRIES = ("fp16", "int8")
# Tables of sub-vectors: 30 take 1.6 times as long for .3 % less error. One table for a head is soon trained.
_ITERATIONS = {"subvector": 15, "lane": 15, "head": 30}


@dataclass(frozen=True)
class Fitting:
    """How the tables of one side are made.

    per: one table for each "subvector", or one for all those of a "head"; "lane": as many as GPUs look up as fast as
    one, sub-vector m sharing table m % 4 (keys) or m % 8 (values). entries: "fp16", or "int8": integers times one
    power of two a table, held in fp16, the form that GPUs look up fastest.
    start, max_iterations: of the k-means (calibration.h); None: enough for 24k tokens.
    """

    n_subvectors: int
    n_centroids: int
    per: str = "subvector"
    entries: str = "fp16"
    start: str = "plus_plus"
    max_iterations: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.per not in PER:
            raise ValueError(f"codebook_per: got {self.per!r}, wanted 'subvector', 'lane' or 'head'")
        if self.entries not in ENTRIES:
            raise ValueError(f"entries: got {self.entries!r}, wanted 'fp16' or 'int8'")

    def n_tables(self, side) -> int:
        """Of a head."""
        if self.per == "lane":
            return min(_ext.LANE_TABLES[side], self.n_subvectors)
        return {"subvector": self.n_subvectors, "head": 1}[self.per]

    @classmethod
    def of_bits(cls, bits, head_dim, **options):
        sub_dim, n_centroids = TABLE_SHAPES[bits]
        return cls(head_dim // sub_dim, n_centroids, **options)


class LearnedTransform(NamedTuple):
    """rotation: fp32 [H, D, D]. weight: the metric of the queries, fp32 [H, D]; None for values."""

    rotation: mx.array
    weight: mx.array | None

    def matrices(self) -> dict:
        """encode_matrix and query_matrix, fp32 [H, D, D]; an orthogonal matrix is its own dual: one array for both."""
        if self.weight is None:
            return {"encode_matrix": self.rotation, "query_matrix": self.rotation}
        encode, query = _ext.rotation_matrices(self.rotation, self.weight)
        return {"encode_matrix": encode, "query_matrix": query}


def learned_transform(side, x, fitting, query_moments=None, token_weights=None) -> LearnedTransform:
    """x: floats [H, N, D]. query_moments: E q_i^2, [H, D], for keys. token_weights: how much the error of each
    token counts, [H, N]; None: 1."""
    rotation, weight = _ext.learned_rotation(
        x,
        query_moments,
        n_subvectors=fitting.n_subvectors,
        n_tables=fitting.n_tables(side),
        token_weights=token_weights,
    )
    return LearnedTransform(rotation, None if query_moments is None else weight)


def fit_tables(side, x, fitting, token_weights=None, **transform):
    """x: floats [H, N, D]; transform: scale=lambda (and a Hadamard), the two matrices, or nothing (Hadamard).

    Returns (tables fp16 [H, M or 1, C, d], [H] of |y - y^|^2 / |y|^2). Those that sub-vectors share by lane come once
    for each sub-vector, as codecs take them.
    """
    tables, error = _ext.train_tables(
        x,
        **transform,
        n_subvectors=fitting.n_subvectors,
        n_centroids=fitting.n_centroids,
        n_tables=fitting.n_tables(side),
        max_iterations=fitting.max_iterations or _ITERATIONS[fitting.per],
        seed=fitting.seed,
        start=fitting.start,
        entries=fitting.entries,
        token_weights=token_weights,
    )
    if 1 < tables.shape[1] < fitting.n_subvectors:
        tables = tables[:, mx.arange(fitting.n_subvectors) % tables.shape[1]]
    return tables, [round(e, 6) for e in error]


def fit_learned(side, x, fitting, query_moments=None, token_weights=None):
    """(LearnedTransform, tables, errors): the rotation first, then tables behind it."""
    transform = learned_transform(side, x, fitting, query_moments, token_weights)
    return transform, *fit_tables(side, x, fitting, token_weights, **transform.matrices())
