"""Compressed KV caches without MLX: the core for NumPy and PyTorch. For transformers see `veloxquant.torch`."""

from veloxquant._core import Error, SideTables, cuda_built, simd_level
from veloxquant._core import version as __version__

__all__ = ["Error", "SideTables", "cuda_built", "simd_level", "__version__"]
