"""The launch layer without a GPU: what it hands to MLX runs on the MSL machine, and gives the CPU's bits."""

import mlx.core as mx
import numpy as np
import pytest
from gpu_cases import cases, outputs
from msl import on_machine

from veloxquant_mlx import _ext
from veloxquant_mlx.metal import rabitq_hamming_score, turboquant_scalar_quantize, vecinfer_quantize_metal

CASES = cases()


@pytest.mark.parametrize("name, call, kernels", CASES, ids=[name for name, _, _ in CASES])
def test_functions_equal_the_cpu_bit_for_bit(name, call, kernels):
    expected = outputs(call())
    with on_machine() as machine:
        got = outputs(call())
    assert machine.names == kernels
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and np.array_equal(a, b)


class Recorder:
    """A launcher that computes nothing."""

    def __init__(self):
        self.launches = []

    def __call__(self, launch, inputs):
        self.launches.append((launch, inputs))
        pairs = zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in pairs]


@pytest.fixture
def record():
    """record("metal" or "cuda") -> a Recorder in place of MLX."""

    def start(gpu):
        recorder = Recorder()
        _ext._set_gpu_launcher(recorder, gpu)
        return recorder

    yield start
    _ext._set_gpu_launcher(None)


@pytest.mark.parametrize("name, call, kernels", CASES, ids=[name for name, _, _ in CASES])
def test_cuda_is_handed_the_same_text_behind_its_own_prelude(name, call, kernels, record):
    metal = record("metal")
    call()
    cuda = record("cuda")
    call()
    assert len(metal.launches) == len(cuda.launches) == len(kernels)
    for (m, m_inputs), (c, c_inputs) in zip(metal.launches, cuda.launches, strict=True):
        assert c["name"] == m["name"] and c["template"] == m["template"] and c["outputs"] == m["outputs"]
        assert c["output_shapes"] == m["output_shapes"] and c["output_dtypes"] == m["output_dtypes"]
        assert c["header"].endswith(m["header"]) and "#define threadgroup __shared__" in c["header"]
        assert c["body"].endswith(m["body"]) and "#define" not in m["header"].split("__METAL_VERSION__")[0]
        single = c["inputs"][-1] == "vq_grid"
        assert c["inputs"][: len(m["inputs"])] == m["inputs"] and len(c["inputs"]) == len(m["inputs"]) + single
        if single:  # threads on their own: one row of blocks, the last ones beyond the grid
            assert c_inputs[-1].tolist() == list(m["grid"])
            assert 0 <= c["grid"][0] - np.prod(m["grid"]) < 256 and c["grid"][1:] == (1, 1)
        else:
            assert c["grid"] == m["grid"] and c["threadgroup"] == m["threadgroup"]
        for a, b in zip(m_inputs, c_inputs, strict=False):
            assert a.dtype == b.dtype and a.shape == b.shape


def test_what_no_kernel_takes_runs_on_the_cpu(record):
    x, book = mx.array(np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)), mx.ones((4, 64))
    wide = vecinfer_quantize_metal(x, book, 64)
    scores = rabitq_hamming_score(mx.zeros((2, 8), mx.uint8), mx.zeros((5, 8), mx.uint8), mx.ones(5), 1.0)
    codes = turboquant_scalar_quantize(x, 2)
    recorder = record("cuda")
    assert np.array_equal(vecinfer_quantize_metal(x, book, 64), wide)  # sub-vectors of 64
    again = rabitq_hamming_score(mx.zeros((2, 8), mx.uint8), mx.zeros((5, 8), mx.uint8), mx.ones(5), 1.0)
    assert np.array_equal(again, scores)  # two queries
    assert np.array_equal(turboquant_scalar_quantize(x, 2).packed, codes.packed)  # no kernel
    assert vecinfer_quantize_metal(mx.zeros((2, 0, 8)), mx.ones((4, 4)), 4).shape == (2, 0, 2)
    assert recorder.launches == []


def test_a_wrong_launcher_name_is_refused():
    with pytest.raises(ValueError, match=r"\[_set_gpu_launcher\] gpu: got 'vulkan', wanted 'metal' or 'cuda'"):
        _ext._set_gpu_launcher(None, "vulkan")
