"""veloxquant devices: what this machine runs the kernels on."""

from typing import Annotated

import typer

from veloxquant_mlx import _ext, _runtime
from veloxquant_mlx.cli import options, output

NAME = "devices"
EXAMPLE = "veloxquant devices --json"

_SLOW_BLAS = (
    "MLX runs on the reference BLAS, 15-40 times slower than OpenBLAS; install it with: "
    "apt-get install libopenblas0-pthread"
)


def command(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Run every GPU kernel against the CPU; prints a report to paste.")
    ] = False,
    json: options.Json = False,
):
    """Show what the kernels run on.

    Backends with SIMD levels or device names, threads, MLX, BLAS.
    """
    if selftest:
        return _selftest(json)
    fields = collect()
    if json:
        output.emit_json(fields)
        return
    rows = [[f"{backend['name']} backend", backend["description"]] for backend in fields["backends"]]
    rows += [[key.replace("_", " "), str(fields[key])] for key in ("threads", "mlx", "default_device", "metal", "cuda")]
    rows.append(["GPU kernels", fields["gpu_kernels"]["description"]])
    rows.append(["BLAS", " ".join(filter(None, (fields["blas"]["name"], fields["blas"]["path"])))])
    output.table("VeloxQuant on this machine", ["what", "found"], rows)
    if fields["advice"]:
        output.note(fields["advice"])


def _selftest(json):
    from veloxquant_mlx.cli import selftest

    if not _ext.gpu_backend():
        raise ValueError(
            "--selftest: got a machine whose default device in MLX is the CPU, wanted a GPU (Metal, or MLX for CUDA): "
            "there is nothing to compare with the CPU"
        )
    fields = selftest.run()
    if json:
        output.emit_json(fields)
    else:
        output.text(selftest.text(fields))
    if not fields["passed"]:
        raise typer.Exit(1)


def _gpu_kernels():
    """Which operations run on MLX's default device where that is a GPU."""
    backend = _ext.gpu_backend()
    operations = [{"name": name, "limits": limits} for name, limits in _ext.gpu_operations()]
    if not backend:
        text = f"none run: MLX's default device is the CPU ({len(operations)} operations have one)"
        return {"backend": None, "operations": [], "description": text}
    names = ", ".join(operation["name"] for operation in operations)
    return {"backend": backend, "operations": operations, "description": f"{backend}: {names}; the rest on the CPU"}


def collect():
    """The fields of devices --json."""
    import mlx.core as mx

    levels = _ext.simd_levels()
    running = _ext.simd_level()
    blas = _runtime.blas_in_use()
    return {
        "backends": [
            {
                "name": "cpu",
                "simd_levels": levels,
                "simd_level": running,
                "description": f"SIMD {running}; this machine runs {', '.join(levels)}",
            },
            {"name": "reference", "simd_levels": [], "simd_level": None, "description": "plain C++, for checking"},
        ],
        "default_backend": _ext.backend(),
        "threads": _ext.num_threads(),
        "mlx": mx.__version__,
        "default_device": str(mx.default_device()),
        "blas": blas,
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "gpu_kernels": _gpu_kernels(),
        "advice": "" if blas["fast"] else _SLOW_BLAS,
    }
