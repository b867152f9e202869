"""The launch layer without a GPU: what it hands to MLX runs on the MSL machine, and gives the CPU's bits."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest
from codec_conformance import answers, conformance_cases, probes
from gpu_cases import STEPS, cache_cases, cases, dequantized, drive, make_cache, make_codecs, outputs, ready, rvq_call
from msl import Machine, on_machine

from veloxquant_mlx import _ext
from veloxquant_mlx.metal import rabitq_hamming_score, turboquant_scalar_quantize, vecinfer_quantize_metal

CASES = cases()
FUNCTIONS = {
    "vq_vecinfer_quantize": ["vecinfer_quantize_metal"],
    "vq_vecinfer_dequantize": ["vecinfer_dequant_metal"],
    "vq_vecinfer_query_lut": ["compute_query_lut"],
    "vq_is_walsh_hadamard": [],
    "vq_vecinfer_encode_decode": ["vecinfer_encode_decode_metal", "vecinfer_encode_decode_simple_metal"],
    "vq_pack_words": ["turboquant_bit_pack"],
    "vq_unpack_words": ["turboquant_bit_unpack"],
    "vq_hamming_score": ["rabitq_hamming_score"],
    "vq_scalar_quantize": ["turboquant_scalar_quantize", "turboquant_hadamard_quantize"],
    "vq_scalar_dequantize": ["turboquant_scalar_dequantize"],
    "vq_scalar_nearest": [],
    "vq_scalar_centroids": [],
    "vq_hadamard_nearest": [],
    "vq_rabitq_encode_rows": ["rabitq_encode"],
    "vq_popcount_queries": [],
    "vq_popcount_scores": ["rabitq_popcount_score"],
    "vq_qjl_encode_rows": ["qjl_encode"],
    "vq_qjl_inner_product": ["qjl_inner_product"],
    "vq_comm_vq_look_up": ["comm_vq_decode_metal"],
    "vq_rvq_items": ["turboquant_fused_rvq_decode_attend"],
}
RVQ_OPTIONS = [(), ("words", "norms", "causal"), ("mask", "window")]
OPTIONS = [("sliding_window",), ("logit_softcap",), ("mask",), ("sinks",), ("mask", "sinks", "logit_softcap")]


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
    long = mx.array(np.random.default_rng(1).standard_normal((2, 1040), dtype=np.float32))
    codes = turboquant_scalar_quantize(long, 2)
    recorder = record("cuda")
    assert np.array_equal(vecinfer_quantize_metal(x, book, 64), wide)  # sub-vectors of 64
    again = rabitq_hamming_score(mx.zeros((2, 8), mx.uint8), mx.zeros((5, 8), mx.uint8), mx.ones(5), 1.0)
    assert np.array_equal(again, scores)  # two queries
    assert np.array_equal(turboquant_scalar_quantize(long, 2).packed, codes.packed)  # rows of more than 1024
    assert vecinfer_quantize_metal(mx.zeros((2, 0, 8)), mx.ones((4, 4)), 4).shape == (2, 0, 2)
    assert recorder.launches == []


def test_a_wrong_launcher_name_is_refused():
    with pytest.raises(ValueError, match=r"\[_set_gpu_launcher\] gpu: got 'vulkan', wanted 'metal' or 'cuda'"):
        _ext._set_gpu_launcher(None, "vulkan")


def errors(got, expected):
    """The largest relative error of a row."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if a.ndim == 4:
            worst = max(worst, np.max(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))
        else:
            worst = max(worst, np.max(np.abs(a - b) / (1 + np.abs(b))))
    return worst


@pytest.mark.parametrize("name", cache_cases())
def test_decode_steps_keep_the_bytes_and_attend_within_tolerance(name):
    arguments = cache_cases()[name]
    dtype = arguments.get("dtype", mx.float32)
    steps = STEPS if name == "Hadamard" else STEPS[:7]
    expected, arrays, positions = drive(make_cache(**arguments), steps, dtype=dtype)
    with on_machine() as machine:
        got, gpu_arrays, gpu_positions = drive(make_cache(**arguments), steps, dtype=dtype)
    assert gpu_positions == positions
    assert len(arrays) == len(gpu_arrays) and all(map(np.array_equal, arrays, gpu_arrays))
    assert errors(got, expected) < (1e-2 if dtype == mx.bfloat16 else 2e-3)
    names, appends = machine.names, sum(0 < n for n in steps)
    assert names.count("vq_decode_items") + names.count("vq_prefill_items") == names.count("vq_decode_merge") == appends
    assert names.count("vq_prefill_items") == sum(16 < n for n in steps)
    assert names.count("vq_append") + names.count("vq_append_seal") == appends
    assert sum(n.endswith("encode_blocks") for n in names) == 2 * names.count("vq_append_seal") > 0


@pytest.mark.parametrize("name", cache_cases())
def test_dequantize_gives_the_bits(name):
    arguments, steps = cache_cases()[name], [3, 150, 2]  # blocks are codes to what comes behind them
    dtype = arguments.get("dtype", mx.float32)
    expected = dequantized(make_cache(**arguments), steps, dtype)
    with on_machine() as machine:
        got = dequantized(make_cache(**arguments), steps, dtype)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and np.array_equal(a, b)
    assert machine.names.count("vq_inverse_rows") == 2


@pytest.mark.parametrize("case", conformance_cases()[:8], ids=lambda case: case[0])
def test_blocks_of_a_codec_are_the_cpus(case):
    codec = case[1]()
    given = probes(codec)
    expected = answers(codec, given)
    with on_machine() as machine:
        got = answers(codec, given)
    assert (
        sum("encode_blocks" in n for n in machine.names) == 5 and sum("decode_blocks" in n for n in machine.names) == 2
    )
    for a, b in zip(got, expected, strict=True):
        assert np.array_equal(a, b)
    for wrong, error in (
        (mx.zeros((1, 2, 3, 15)), r"\[codec\] x: got float32 \[1, 2, 3, 15\], wanted"),
        (mx.zeros((1, 2, 3, 16), mx.int32), "wanted a float"),
    ):
        with pytest.raises(ValueError, match=error):
            codec.encode_blocks(wrong)


def test_prefill_attends_some_hundred_queries_at_a_time():
    steps = [70, 300]
    expected, arrays, _ = drive(make_cache("turboquant", dim=16), steps, group=1, dim=16)
    with on_machine() as machine:
        got, gpu_arrays, _ = drive(make_cache("turboquant", dim=16), steps, group=1, dim=16)
    assert all(map(np.array_equal, arrays, gpu_arrays)) and errors(got, expected) < 2e-3
    assert machine.names.count("vq_prefill_items") == 1 + 2
    # What no query of a launch sees is in none of its items.
    options = ready(("sliding_window", "mask"), steps)
    expected, _, _ = drive(make_cache("turboquant", dim=16), steps, group=1, dim=16, **options)
    with on_machine():
        got, _, _ = drive(make_cache("turboquant", dim=16), steps, group=1, dim=16, **options)
    assert errors(got, expected) < 2e-3


@pytest.mark.parametrize("options", OPTIONS, ids=[", ".join(o) for o in OPTIONS])
def test_masks_sinks_windows_and_soft_caps(options):
    steps = [150, 1, 5]
    expected, _, _ = drive(make_cache("hadamard"), steps, **ready(options, steps))
    with on_machine() as machine:
        got, _, _ = drive(make_cache("hadamard"), steps, **ready(options, steps))
    assert (machine.names.count("vq_decode_items"), machine.names.count("vq_prefill_items")) == (2, 1)
    assert errors(got, expected) < 2e-3


@pytest.mark.parametrize("options", RVQ_OPTIONS, ids=[", ".join(o) or "plain" for o in RVQ_OPTIONS])
def test_rvq_attend_is_within_tolerance(options):
    expected = outputs(rvq_call(options).astype(mx.float32))
    with on_machine() as machine:
        got = outputs(rvq_call(options).astype(mx.float32))
    assert machine.names[-2:] == ["vq_rvq_items", "vq_decode_merge"]
    assert errors([a.view(np.float32) for a in got], [a.view(np.float32) for a in expected]) < 2e-3


def test_values_that_are_not_finite_are_counted_on_a_gpu_too():
    steps, caches, results = [100, 2, 16, 16, 1], [], []
    for place in (contextlib.nullcontext(), on_machine()):
        with place:
            caches.append(make_cache("hadamard"))
            results.append(drive(caches[-1], steps, bad=True))
    assert caches[0].nonfinite == caches[1].nonfinite == 2 * 2 * 2 * 2
    assert all(map(np.array_equal, results[0][1], results[1][1]))


def test_a_long_history_is_few_spans():
    before, steps = [1500, 1100, 1100, 1100, 1100], [1, 1]
    caches = [make_cache("none", tables=16, centroids=16) for _ in range(2)]
    for cache in caches:
        drive(cache, before, group=1)
    expected, arrays, positions = drive(caches[0], steps, group=1, seed=5)
    with on_machine():
        got, gpu_arrays, gpu_positions = drive(caches[1], steps, group=1, seed=5)
    spans, gpu_spans = len(positions[2:]) // 3, len(gpu_positions[2:]) // 3
    assert spans == 5 and gpu_spans == 4
    for side in range(2):
        one = np.concatenate(arrays[2 + side * spans : 2 + (side + 1) * spans], 2)
        other = np.concatenate(gpu_arrays[2 + side * gpu_spans : 2 + (side + 1) * gpu_spans], 2)
        assert np.array_equal(one, other)
    assert errors(got, expected) < 2e-3


def test_caches_that_no_kernel_takes_stay_on_the_cpu(record):
    arguments = {"kind": "qjl 9", "values": "turboquant", "dim": 256}  # queries of 2,304 numbers
    expected, _, _ = drive(make_cache(**arguments), [150, 1], dim=256)
    recorder = record("cuda")
    got, _, _ = drive(make_cache(**arguments), [150, 1], dim=256)
    assert all(map(np.array_equal, got, expected)) and recorder.launches == []


def test_devices_names_what_runs_where(record):
    from veloxquant_mlx.cli.devices import collect

    sides = make_codecs("hadamard")
    before = collect()["gpu_kernels"]
    assert before["backend"] is None and before["operations"] == [] and "the CPU" in before["description"]
    assert _ext.kernel_name(*sides).startswith("cpu/")
    record("cuda")
    on_gpu = collect()["gpu_kernels"]
    assert on_gpu["backend"] == "cuda" and on_gpu["description"].startswith("cuda: ")
    assert _ext.kernel_name(*sides) == "cuda codes (vecinfer d4x256)"
    # Every function that is named has a case above, and those that are not launch nothing (test_what_no_kernel_takes).
    kernels = {k for _, _, ks in CASES for k in ks} | {"vq_rvq_items"}
    tested = {name for names in map(FUNCTIONS.get, kernels) for name in names}
    assert tested | {"append", "attend", "dequantize"} == {operation["name"] for operation in on_gpu["operations"]}


def test_selftest_passes_on_the_machine_and_sees_a_wrong_kernel(capsys):
    from veloxquant_mlx.cli import main, selftest

    # Every method's cache has a test of its own above.
    assert len(selftest.METHODS) == 10

    assert main(["devices", "--selftest"]) == 2
    assert "wanted a GPU" in capsys.readouterr().err

    class Wrong(Machine):
        def __call__(self, launch, inputs):
            outputs = super().__call__(launch, inputs)
            wrong = launch["name"].startswith(("vq_vecinfer_quantize", "vq_decode_merge", "vq_pack_words"))
            return [a + 1 if wrong else a for a in outputs]

    names = {name for name, _ in _ext.gpu_operations()} | {"no fused multiply-add in encode"}
    wrong = {"vecinfer_quantize_metal", "turboquant_bit_pack", "turboquant_fused_rvq_decode_attend", "attend"}
    for launcher, methods, failed in ((Machine(), ("vecinfer", "commvq"), set()), (Wrong(), ("vecinfer",), wrong)):

        @contextlib.contextmanager
        def on_cpu(launcher=launcher):
            _ext._set_gpu_launcher(None)
            yield
            _ext._set_gpu_launcher(launcher)

        _ext._set_gpu_launcher(launcher)
        try:
            fields = selftest.run(on_cpu, rows=9, methods=methods)
        finally:
            _ext._set_gpu_launcher(None)
        report = selftest.text(fields)
        got = {check["name"] for check in fields["checks"] if not check["passed"]}
        assert got == failed, report
        assert fields["passed"] == (not failed) and f"{len(names)} checks, {len(failed)} failed" in report
    assert names == {check["name"] for check in fields["checks"]}
