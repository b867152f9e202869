"""veloxquant devices: what this machine runs the kernels on."""
from veloxquant_mlx.cli import options, output

NAME = "devices"
EXAMPLE = "veloxquant devices --json"

_SLOW_BLAS = (
    "MLX runs on the reference BLAS, 15-40 times slower than OpenBLAS; install it with: "
    "apt-get install libopenblas0-pthread"
)


def command(json: options.Json = False):
    """Show what the kernels run on.

    Backends with SIMD levels or device names, threads, MLX, BLAS."""
    fields = collect()
    if json:
        output.emit_json(fields)
        return
    rows = [[backend["name"], ", ".join(map(str, backend.get("levels") or backend.get("devices") or []))]
            for backend in fields["backends"]]  # fmt: skip
    rows += [[key.replace("_", " "), str(fields[key])] for key in ("threads", "mlx", "default_device", "blas", "metal", "cuda")]
    output.table("VeloxQuant on this machine", ["what", "found"], rows)
    if fields["advice"]:
        output.note(fields["advice"])


def collect():
    """The fields of devices --json."""
    import mlx.core as mx

    from veloxquant_mlx._ext import devices_info

    fields = dict(devices_info())
    fields.update(
        mlx=mx.__version__,
        default_device=str(mx.default_device()),
        metal=mx.metal.is_available(),
        cuda=mx.cuda.is_available(),
    )
    fields["advice"] = _SLOW_BLAS if "reference" in str(fields["blas"]).lower() else ""
    return fields
