"""What has to be right before the extension is loaded: MLX's BLAS and its C++ ABI."""

import ctypes
import glob
import os
import re
import sys
from importlib import metadata

_OPENBLAS_PATTERNS = (
    "/usr/lib/*/openblas-pthread/libopenblas.so.0",
    "/usr/lib/*/libopenblas.so.0",
    "/usr/lib64/libopenblas*.so.0",
)


def prepare() -> None:
    """Load OpenBLAS where MLX would use its slow reference BLAS, then MLX, then check the ABI."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        _load_openblas()
    import mlx.core as mx

    wanted, found = mlx_pin(), metadata.version("mlx")
    if wanted and wanted != found:
        raise ImportError(
            f"veloxquant_mlx was built for MLX {wanted} but MLX {found} is installed: run "
            f"`pip install mlx=={wanted}`, or reinstall veloxquant-mlx against MLX {found}."
        )
    from veloxquant_mlx import _ext

    try:
        _ext.abi_check(mx.zeros((1,)))
    except TypeError as error:
        raise ImportError(
            "veloxquant_mlx was built with another nanobind than MLX and cannot share arrays with it: "
            "reinstall it with `make setup`."
        ) from error


def mlx_pin() -> str | None:
    """The exact MLX release that this package was built for, e.g. '0.32.4'."""
    try:
        requirements = metadata.requires("veloxquant-mlx") or []
    except metadata.PackageNotFoundError:
        return None  # run from a source tree
    for requirement in requirements:
        match = re.match(r"mlx(?:\[[^]]*\])?==([0-9.]+)", requirement)
        if match:
            return match[1]
    return None


def _load_openblas() -> None:
    """MLX's Linux wheel ships the Netlib reference BLAS, 15-40 times slower: symbols of a BLAS
    that is loaded globally beforehand win. VELOXQUANT_BLAS names a library, or 'off'."""
    choice = os.environ.get("VELOXQUANT_BLAS", "")
    if choice == "off":
        return
    candidates = [choice] if choice else sorted(p for pattern in _OPENBLAS_PATTERNS for p in glob.glob(pattern))
    for path in candidates:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            if choice:
                raise ImportError(f"VELOXQUANT_BLAS: got {path!r}, wanted a BLAS library ({error})") from error


def blas_in_use() -> dict:
    """{'name', 'path', 'fast'}: the BLAS that MLX's matrix products run on."""
    if sys.platform == "darwin":
        return {"name": "Accelerate", "path": None, "fast": True}
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if ".so" in line}
    openblas = sorted(path for path in loaded if "openblas" in path and "numpy" not in path and "scipy" not in path)
    if openblas:
        return {"name": "OpenBLAS", "path": openblas[0], "fast": True}
    reference = sorted(path for path in loaded if "libblas" in path)
    return {"name": "reference BLAS of the MLX wheel", "path": reference[0] if reference else None, "fast": False}
