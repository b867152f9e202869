"""VeloxQuant for MLX: compressed KV caches that are small in memory and attended on packed codes."""

from veloxquant_mlx import _runtime

_runtime.prepare()

from veloxquant_mlx import _ext  # noqa: E402  (MLX and its BLAS must be there first)

__version__ = _ext.version
__all__ = ["__version__"]
