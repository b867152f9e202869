"""What a decode step of one layer costs MLX's host side, without a GPU: a launcher that computes nothing takes MLX's place.

PYTHONPATH=python/tests .venv/bin/python tools/gpu/mlx_host.py     MLX operations, launches, text, time to build the graph
"""

import re
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from gpu_cases import make_cache

from veloxquant_mlx import _ext

text = {}


def launcher(launch, inputs):
    text[launch["name"].rsplit("_", 1)[0]] = len(launch["header"]) + len(launch["body"])
    # One array an output, available: whatever hangs on it is an operation of ours.
    return [
        mx.array(np.zeros(shape, np.uint8 if dtype == mx.uint8 else np.int32)).view(dtype)
        if dtype in (mx.uint8, mx.int32)
        else mx.array(np.zeros(shape, np.float32)).astype(dtype)
        for shape, dtype in zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
    ]


def main():
    r = np.random.default_rng(1)
    tokens = mx.array(r.standard_normal((1, 8, 4101, 128), dtype=np.float32)).astype(mx.float16)
    for kind in ("hadamard", "dense", "turboquant"):
        _ext._set_gpu_launcher(None)
        cache = make_cache(kind, heads=8, dim=128)
        cache.update(tokens[:, :, :4100], tokens[:, :, :4100])
        one = mx.array(np.array(tokens[:, :, 4100:]))
        q = mx.array(np.array(mx.repeat(tokens[:, :, 4100:], 4, 1)))
        mx.eval(cache.arrays(), one, q)
        text.clear()
        _ext._set_gpu_launcher(launcher, "cuda")
        before = sum(_ext.gpu_launches().values())

        def step(cache=cache, one=one, q=q):
            return [*_ext.attend(q, *cache.update(one, one), scale=0.1, causal=True), *cache.arrays()]

        arrays = step()
        launches = sum(_ext.gpu_launches().values()) - before
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            mx.export_to_dot(str(path), *arrays)
            operations = re.findall(r'label ?= ?"([A-Za-z]+)"', path.read_text())
        # Conversions of the launcher's own arrays are not ours.
        own = [name for name in operations if name not in ("AsType", "View")]
        mx.eval(arrays)
        start, n = time.perf_counter(), 20
        for _ in range(n):
            step()
        each = 1e6 * (time.perf_counter() - start) / n
        print(
            f"{kind}: {launches} launches, {len(own)} other operations {own}, text {text}; {each:.0f} us with this launcher"
        )
    _ext._set_gpu_launcher(None)


if __name__ == "__main__":
    main()
