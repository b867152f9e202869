"""What has to be right before the extension is loaded: MLX's BLAS and its C++ ABI."""

import hashlib
import logging
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import _veloxquant_preload

log = logging.getLogger("veloxquant_mlx")


def prepare() -> None:
    """Load MLX on a fast BLAS, then check that it is the MLX that the extension was built for."""
    import mlx.core as mx

    if not blas_in_use()["fast"]:
        log.info("MLX runs on its reference BLAS: install OpenBLAS (libopenblas0-pthread) for 15-40 x faster prefill")

    wanted, found = mlx_pin(), metadata.version("mlx")
    if wanted and wanted != found:
        raise ImportError(
            f"veloxquant_mlx was built for MLX {wanted} but MLX {found} is installed: run "
            f"`pip install mlx=={wanted}`, or reinstall veloxquant-mlx against MLX {found}."
        )
    from veloxquant_mlx import _ext

    if (current := bindings_digest()) and current != getattr(_ext, "bindings", None):
        raise ImportError(
            "veloxquant_mlx: the extension was built from other sources than those here, as after a `git pull`: "
            "run `make setup`."
        )
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


def bindings_digest() -> str | None:
    """Of the sources that _ext is bound by (cmake/python.cmake computes the same); None where this
    is no source tree."""
    sources = sorted((Path(__file__).parent.parent / "bindings").glob("*.cpp"))
    digests = "".join(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)
    return hashlib.sha256(digests.encode()).hexdigest() if sources else None


def blas_in_use() -> dict:
    """{'name', 'path', 'fast'}: the BLAS that MLX's matrix products run on."""
    if sys.platform == "darwin":
        return {"name": "Accelerate", "path": None, "fast": True}
    preloaded = _veloxquant_preload.loaded or next(
        (lib for lib in os.environ.get("LD_PRELOAD", "").replace(":", " ").split() if "openblas" in lib), None
    )
    if preloaded:
        return {"name": "OpenBLAS", "path": preloaded, "fast": True}
    return {"name": "reference BLAS of the MLX wheel", "path": None, "fast": False}
