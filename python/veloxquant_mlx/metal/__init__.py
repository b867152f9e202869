"""The kernels of the system: Metal where MLX has it, else the C++ CPU kernels with the same codes.

Every function can be imported from here or from its module; a module is loaded on first use.
"""

import importlib

import mlx.core as mx

# Module -> what it exports.
_MODULES = {
    "_scalar_quant": (
        "turboquant_scalar_quantize",
        "turboquant_scalar_dequantize",
        "turboquant_hadamard_quantize",
        "ScalarQuantized",
    ),
    "_bit_packing": ("turboquant_bit_pack", "turboquant_bit_unpack"),
    "_rvq_attend": ("turboquant_fused_rvq_decode_attend",),
    "_vecinfer": (
        "vecinfer_quantize_metal",
        "vecinfer_dequant_metal",
        "vecinfer_encode_decode_metal",
        "vecinfer_encode_decode_simple_metal",
        "vecinfer_encode",
    ),
    "_qjl": ("qjl_encode", "qjl_inner_product", "qjl_sketch"),
    "_rabitq": ("rabitq_hamming_score", "rabitq_encode", "rabitq_popcount_score"),
    "_comm_vq": ("comm_vq_decode_metal",),
    "fused_sdpa": (
        "metal_fused_sdpa",
        "supports_shape",
        "patch_mlx_lm_for_fused_sdpa",
        "unpatch_mlx_lm_for_fused_sdpa",
        "EncodedTensor",
    ),
}

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["metal_available", *_MODULE_OF]


def metal_available() -> bool:
    """True where MLX has a Metal device to run kernels on. `veloxquant devices` names the functions that do; the
    others run on the CPU there too."""
    return mx.metal.is_available()


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
