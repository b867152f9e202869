"""Smooth factors, rotations and codebooks: what calibration returns, the store keeps and the config takes."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext

TRANSFORMS = ("hadamard", "learned")

# bits per element -> (dimensions of a sub-vector, centroids)
TABLE_SHAPES = {1: (8, 256), 1.5: (4, 64), 2: (4, 256), 3: (2, 64), 4: (2, 256), 6: (1, 64), 8: (1, 256)}
# 2.5 bits in one table would need tables larger than the codes; keys gain more from the third bit than values.
MIXED_BITS = {2.5: (3, 2)}


def key_and_value_bits(bits) -> tuple:
    """bits: those of both sides, or a pair (keys, values). ValueError where there is no table shape for them."""
    pair = tuple(bits) if isinstance(bits, (list, tuple)) else MIXED_BITS.get(bits, (bits, bits))
    if len(pair) != 2 or any(b not in TABLE_SHAPES for b in pair):
        wanted = ", ".join(f"{b:g}" for b in sorted([*TABLE_SHAPES, *MIXED_BITS]))
        raise ValueError(f"bits: got {bits!r}, wanted one of {wanted}, or a pair (keys, values) without 2.5")
    return pair


class SmoothFactors(np.ndarray):
    """lambda, fp32 [L, H_kv, D]: an array that knows the model it was measured on.

    query_moments: E q_i^2 of the post-RoPE queries of each KV head, fp32 [L, H_kv, D]; None where
    the model's attention does not let them be seen. Learned rotations need them.
    """

    fingerprint: str | None
    query_moments: np.ndarray | None

    def __new__(cls, values, fingerprint=None, query_moments=None):
        factors = np.asarray(values, dtype=np.float32).view(cls)
        factors.fingerprint = fingerprint
        factors.query_moments = query_moments
        return factors

    def __array_finalize__(self, other):
        self.fingerprint = getattr(other, "fingerprint", None)
        self.query_moments = getattr(other, "query_moments", None)


@dataclass
class Rotations:
    """Learned rotations of a whole model, fp32: what the matrices of the transforms are made of.

    keys, values: [L, H_kv, D, D], orthogonal. key_weights: [L, H_kv, D], the metric of the queries.
    """

    keys: np.ndarray
    values: np.ndarray
    key_weights: np.ndarray

    def key_matrices(self, layer: int) -> dict:
        """encode_matrix and query_matrix of the keys of a layer, fp32 [H_kv, D, D]."""
        encode, query = _ext.rotation_matrices(mx.array(self.keys[layer]), mx.array(self.key_weights[layer]))
        return {"encode_matrix": encode, "query_matrix": query}

    def value_matrices(self, layer: int) -> dict:
        """The same of the values: one array for both, an orthogonal matrix being its own dual."""
        matrix = mx.array(self.values[layer])
        return {"encode_matrix": matrix, "query_matrix": matrix}


@dataclass
class Codebook:
    """Trained tables of a whole model.

    keys, values: fp16 [L, H_kv, M or 1, C, d], L attention layers, M = head_dim / d sub-vectors
    (1: one table for all sub-vectors of a head), C centroids.
    smooth_factors: fp32 [L, H_kv, D], the lambda of the keys, which "hadamard" smooths with.
    rotations: with transform "learned" only.
    """

    keys: np.ndarray
    values: np.ndarray
    smooth_factors: np.ndarray
    fingerprint: str
    transform: str = "hadamard"
    relative_error: dict = field(default_factory=dict)  # side -> [L][H_kv]: |y - y^|^2 / |y|^2
    rotations: Rotations | None = None

    def __post_init__(self):
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform: got {self.transform!r}, wanted one of {', '.join(TRANSFORMS)}")
        if (self.transform == "learned") != (self.rotations is not None):
            got = "none" if self.rotations is None else "some"
            raise ValueError(f"rotations: got {got} with transform {self.transform!r}, wanted them with 'learned' only")

    @property
    def head_dim(self) -> int:
        return self.smooth_factors.shape[-1]

    @property
    def bits_per_element(self) -> tuple[float, float]:
        """(keys, values): bits of the codes per element; the tables are counted as shared_nbytes."""
        return table_bits(self.keys), table_bits(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of tables and transforms that all caches of a model share. Keys have two matrices."""
        tables = self.keys.nbytes + self.values.nbytes
        if self.rotations is None:
            return tables + self.smooth_factors.nbytes
        return tables + 2 * self.rotations.keys.nbytes + self.rotations.values.nbytes

    def __repr__(self):
        bits = "/".join(f"{b:g}" for b in self.bits_per_element)
        return (
            f"Codebook({bits} bits per element, {self.keys.shape[0]} layers, {self.keys.shape[1]} KV heads, "
            f"head_dim {self.head_dim}, tables {_times(self.keys)} and {_times(self.values)}, "
            f"{self.transform} transform)"
        )


def _times(tables) -> str:
    return " x ".join(map(str, tables.shape[2:]))


def code_bits(n_centroids) -> int:
    """Bits of a code: the least of 4, 6, 8, 10 and 12 that tells all centroids apart."""
    return next(bits for bits in (4, 6, 8, 10, 12) if n_centroids <= 1 << bits)


def table_bits(tables) -> float:
    """Bits of a code per element, tables [..., C, d]."""
    n_centroids, sub_dim = tables.shape[-2:]
    return code_bits(n_centroids) / sub_dim


def normalise_tables(name: str, tables, n_layers: int, n_kv_heads: int, head_dim: int) -> np.ndarray:
    """[C, d], [M, C, d], [H, M, C, d] or [L, H, M, C, d] -> fp16 [L, H, M or 1, C, d]."""
    try:
        tables = np.array(tables.astype(mx.float32) if isinstance(tables, mx.array) else tables, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {type(tables).__name__}, wanted a Codebook or an array of numbers") from None
    shape = list(tables.shape)
    if not 2 <= tables.ndim <= 5:
        raise ValueError(f"{name}: got shape {shape}, wanted [C, d], [M, C, d], [H, M, C, d] or [L, H, M, C, d]")
    tables = tables.reshape((1,) * (5 - tables.ndim) + tables.shape)
    layers, heads, groups, centroids, sub_dim = tables.shape
    fits = (
        layers in (1, n_layers)
        and heads in (1, n_kv_heads)
        and 2 <= centroids <= 4096
        and head_dim % sub_dim == 0
        and groups in (1, head_dim // sub_dim)
    )
    if not fits:
        raise ValueError(
            f"{name}: got shape {shape}, wanted [{n_layers}, {n_kv_heads}, M or 1, 2..4096, d] with M * d = head_dim "
            f"= {head_dim}, or fewer leading axes"
        )
    if not np.isfinite(tables).all() or np.abs(tables).max() > 65504:
        raise ValueError(f"{name}: got values that are not finite in fp16, wanted finite centroids")
    return np.broadcast_to(tables, (n_layers, n_kv_heads, groups, centroids, sub_dim)).astype(np.float16)


def normalise_factors(factors, n_layers: int, n_kv_heads: int, head_dim: int) -> np.ndarray:
    """[D], [H, D] or [L, H, D] -> fp32 [L, H, D]; None -> ones."""
    if factors is None:
        return np.ones((n_layers, n_kv_heads, head_dim), np.float32)
    factors = np.array(factors.astype(mx.float32) if isinstance(factors, mx.array) else factors, dtype=np.float32)
    full = (n_layers, n_kv_heads, head_dim)
    if factors.ndim not in (1, 2, 3) or factors.shape != full[3 - factors.ndim :]:
        raise ValueError(f"smooth_factors: got shape {list(factors.shape)}, wanted {list(full)} or fewer leading axes")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError("smooth_factors: got values that are not finite and positive, wanted lambda > 0")
    return np.broadcast_to(factors, full).copy()
