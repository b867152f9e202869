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

text, arrays = {}, {}


def launcher(launch, inputs):
    """One array an output, available and always the same: whatever hangs on it is an operation of ours."""
    name = launch["name"]
    if name not in arrays:
        text[name.rsplit("_", 1)[0]] = len(launch["header"]) + len(launch["body"])
        pairs = zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
        arrays[name] = [mx.zeros(shape, dtype) for shape, dtype in pairs]
        mx.eval(arrays[name])
    return arrays[name]


def timed(step):
    start = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - start)


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
        text.clear(), arrays.clear()
        _ext._set_gpu_launcher(launcher, "cuda")
        before = sum(_ext.gpu_launches().values())

        def step(cache=cache, one=one, q=q):
            return [*_ext.attend(q, *cache.update(one, one), scale=0.1, causal=True), *cache.arrays()]

        made = step()
        launches = sum(_ext.gpu_launches().values()) - before
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            mx.export_to_dot(str(path), *made)
            operations = re.findall(r'label ?= ?"([A-Za-z]+)"', path.read_text())
        mx.eval(made)
        each = min(timed(step) for _ in range(20))
        print(
            f"{kind}: {launches} launches, {len(operations)} other operations {operations}, text {text}; {each:.0f} us with this launcher"
        )
    _ext._set_gpu_launcher(None)


if __name__ == "__main__":
    main()
