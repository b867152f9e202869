"""Timings of the kernels against the same operations in plain MLX: `veloxquant bench kernels`."""
