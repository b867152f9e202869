"""GPU launches without a GPU: what the extension would hand to MLX runs on the MSL machine (tests/msl)."""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx import _ext

ROOT = Path(__file__).parents[2]
PLACES = [ROOT / "build" / "python" / "msl_run", ROOT / "build" / "dev" / "msl_run"]


def program():
    """The machine's program, or a skip that says what is missing."""
    given = os.environ.get("VELOXQUANT_MSL_RUN")
    for place in [Path(given)] if given else PLACES:
        if place.exists():
            return place
    pytest.skip("NOT TESTED: msl_run is not built (`make test` builds it on x86-64 Linux with clang 16-19)")


def _type(dtype):
    """As a kernel spells it, less the _t."""
    return {mx.bool_: "bool", mx.float32: "float"}.get(dtype) or str(dtype).removeprefix("mlx.core.")


def _memory(a):
    """(bytes, strides in elements; none where row-major) of an array as it lies in memory."""
    view = np.asarray(memoryview(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a))
    strides = [stride // view.itemsize for stride in view.strides]
    if all(n == 1 or s == r for n, s, r in zip(view.shape, strides, _row_major(view.shape), strict=True)):
        return np.ascontiguousarray(view).tobytes(), []
    assert min(strides) >= 0
    reach = sum((n - 1) * stride for n, stride in zip(view.shape, strides, strict=True)) + 1
    return np.lib.stride_tricks.as_strided(view, (reach,), (view.itemsize,)).tobytes(), strides


def _row_major(shape):
    return [int(np.prod(shape[d + 1 :])) for d in range(len(shape))]


def _from_bytes(data, shape, dtype):
    as_uint16 = dtype == mx.bfloat16
    numpy = np.uint16 if as_uint16 else np.dtype(str(dtype).removeprefix("mlx.core.").rstrip("_"))
    a = mx.array(np.frombuffer(data, numpy).reshape(shape))
    return a.view(mx.bfloat16) if as_uint16 else a


class Machine:
    """A launcher for _ext._set_gpu_launcher; `launches` keeps what it was given."""

    def __init__(self):
        self.program = program()
        self.launches = []

    def __call__(self, launch, inputs):
        self.launches.append(launch)
        mx.eval(inputs)
        memory = [_memory(a) for a in inputs]
        argument = {bool: "bool", int: "int", mx.Dtype: "type"}
        described = {
            **{key: launch[key] for key in ("name", "header", "body", "row_contiguous", "grid", "threadgroup")},
            "arguments": [
                {"name": name, argument[type(value)]: _type(value) if isinstance(value, mx.Dtype) else value}
                for name, value in launch["template"]
            ],
            "inputs": [
                {"name": name, "type": _type(a.dtype), "shape": list(a.shape), "strides": strides}
                for name, a, (_, strides) in zip(launch["inputs"], inputs, memory, strict=True)
            ],
            "outputs": [
                {"name": name, "type": _type(dtype), "shape": shape}
                for name, shape, dtype in zip(
                    launch["outputs"], launch["output_shapes"], launch["output_dtypes"], strict=True
                )
            ],
        }
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "launch.json").write_text(json.dumps(described))
            for i, (data, _) in enumerate(memory):
                (folder / f"input_{i}").write_bytes(data)
            done = subprocess.run([self.program, folder], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return [
                _from_bytes((folder / f"output_{i}").read_bytes(), shape, dtype)
                for i, (shape, dtype) in enumerate(zip(launch["output_shapes"], launch["output_dtypes"], strict=True))
            ]

    @property
    def names(self):
        """Kernels launched, without the hash of their text."""
        return [launch["name"].rsplit("_", 1)[0] for launch in self.launches]


@contextlib.contextmanager
def on_machine():
    """Every operation with a GPU kernel runs on the MSL machine meanwhile."""
    machine = Machine()
    _ext._set_gpu_launcher(machine, "metal")
    try:
        yield machine
    finally:
        _ext._set_gpu_launcher(None)
