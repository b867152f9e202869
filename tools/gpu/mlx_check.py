"""On a GPU machine, run by tools/gpu/mlx.sh: every operation on the GPU against the CPU, then what is asked for.

mlx_check.py OUT [functions]     the parts: functions. All of them where none is named.
"""

import sys
import time

import mlx.core as mx
import numpy as np
from gpu_cases import cases, outputs

from veloxquant_mlx import _ext

failures = []


def check(name, ok, note=""):
    print(f"{'ok    ' if ok else 'FAILED'} {name} {note}")
    if not ok:
        failures.append(name)


def on(device, call):
    mx.set_default_device(device)
    result = outputs(call())
    mx.set_default_device(mx.gpu)
    return result


def equal(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def functions():
    """Bits equal to the CPU's: as they are, under mx.compile, on a stream of their own."""
    for name, call, kernels in cases():
        expected = on(mx.cpu, call)
        before = _ext.gpu_launches()
        start = time.perf_counter()
        got = on(mx.gpu, call)
        seconds = time.perf_counter() - start
        launched = [k for k, n in _ext.gpu_launches().items() for _ in range(n - before.get(k, 0))]
        check(name, equal(got, expected) and sorted(launched) == sorted(kernels), f"{seconds:.2f} s, {launched}")
        compiled = on(mx.gpu, mx.compile(lambda call=call: call()))
        check(name + ", compiled", equal(compiled, expected))
        with mx.stream(mx.new_stream(mx.gpu)):
            check(name + ", own stream", equal(outputs(call()), expected))


PARTS = {"functions": functions}


def main():
    wanted = sys.argv[2:] or list(PARTS)
    mx.set_default_device(mx.gpu)
    print("MLX", mx.__version__, mx.default_device(), mx.device_info().get("device_name", ""))
    for part in wanted:
        start = time.perf_counter()
        PARTS[part]()
        print(f"{part}: {time.perf_counter() - start:.1f} s")
    print("launches:", _ext.gpu_launches())
    print(f"{len(failures)} failures", failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
