"""The kernels of the system: Metal where MLX has it, else the C++ CPU kernels with the same codes."""

import mlx.core as mx


def metal_available() -> bool:
    """True where MLX has a Metal device to run kernels on."""
    return mx.metal.is_available()
