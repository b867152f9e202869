"""The bindings on NumPy arrays: encode, decode, attention on codes, calibration, errors."""

import ctypes
import importlib.util
import tomllib
from pathlib import Path

import numpy
import pytest

from veloxquant import Error, SideTables, _core
from veloxquant import eval as evaluation

H, D, N = 2, 64, 256


def side(rng, name, sub_dim=4, transform="hadamard", per_head=True, int8=True, head_dim=D):
    x = rng.standard_normal((H, 2048, head_dim)).astype(numpy.float32)
    x[:, :, 3] *= 6
    m = head_dim // sub_dim
    scale = numpy.ones((H, head_dim), numpy.float32)
    encode = query = None
    if transform == "hadamard":
        _core.smooth_factors(x, scale)
    else:
        scale = None
        encode, query = (numpy.empty((H, head_dim, head_dim), numpy.float32) for _ in range(2))
        moments = numpy.abs(rng.standard_normal((H, head_dim))).astype(numpy.float32) + 0.1
        n_tables = 1 if per_head else m
        _core.learned_rotation(x, moments if name == "keys" else None, m, n_tables, encode, query)
    tables = numpy.empty((H, 1 if per_head else m, 256, sub_dim), numpy.float16)
    errors = _core.train_tables(x, transform, scale, encode, query, m, 0, tables, int8)
    assert len(errors) == H and all(0 < e < 0.5 for e in errors)
    return SideTables(name, H, head_dim, tables, transform, scale, encode, query)


def stored(rng, tables, n):
    x = rng.standard_normal((1, H, n, tables.head_dim)).astype(numpy.float16)
    codes = numpy.zeros((1, H, n // 64 + 1, tables.block_bytes), numpy.uint8)
    _core.cpu_encode(tables, x, codes, 0)
    back = numpy.empty((H, n, tables.head_dim), numpy.float32)
    _core.cpu_decode_row(tables, codes[0], 0, back)
    return x[0], codes, back


@pytest.mark.parametrize("transform", ["hadamard", "dense"])
@pytest.mark.parametrize("sub_dim", [2, 4])
def test_decoded_tokens_are_near_and_matrices_invert_each_other(rng, transform, sub_dim):
    tables = side(rng, "keys", sub_dim, transform)
    assert tables.bits == 8 / sub_dim and tables.cuda_problem == ""
    assert tables.cuda_block_bytes == 64 * D // sub_dim
    x, codes, back = stored(rng, tables, N)
    error = numpy.square(back - x).sum() / numpy.square(x.astype(numpy.float32)).sum()
    assert error < (0.08 if sub_dim == 2 else 0.45)
    assert codes[:, :, N // 64 :].max() == 0  # nothing beyond what was asked for
    product = tables.query_matrix() @ tables.inverse_matrix().transpose(0, 2, 1)
    # q' . y = q . x for all q and x: F G^T with G the inverse map is the identity where G = F^T.
    scores = numpy.einsum("hij,hkj->hik", x[:, :4].astype(numpy.float32) @ tables.query_matrix(), back[:, :8])
    assert product.shape == (H, D, D) and numpy.isfinite(scores).all()
    assert numpy.allclose(tables.query_matrix(), tables.inverse_matrix().transpose(0, 2, 1), atol=1e-5)


@pytest.mark.parametrize("bits,distortion", [(1, 0.36), (2, 0.117), (3, 0.035), (4, 0.0095)])
def test_turboquant_needs_no_tables(rng, bits, distortion):
    """The paper's distortion of rotated Gaussian tokens, and bits + 16 / D an element."""
    tables = SideTables.turboquant("keys", H, D, bits, seed=3)
    assert tables.is_general and tables.cuda_problem == "" and tables.bits == bits + 16 / D
    assert tables.block_bytes == tables.cuda_block_bytes == 64 * (D * bits // 8 + 2)
    x, _, back = stored(rng, tables, N)
    error = numpy.square(back - x).sum() / numpy.square(x.astype(numpy.float32)).sum()
    assert 0.8 * distortion < error < 1.25 * distortion
    assert numpy.allclose(tables.query_matrix() @ tables.inverse_matrix(), numpy.eye(D), atol=1e-5)
    other = SideTables.turboquant("keys", H, D, bits, seed=4)
    assert not numpy.allclose(tables.query_matrix(), other.query_matrix(), atol=0.1)
    assert len(tables.cuda_blob()) == len(other.cuda_blob()) > 0


@pytest.mark.parametrize("n_packed,n_exact,chunk", [(0, 9, 0), (128, 70, 0), (192, 68, 5), (0, 0, 33), (256, 4, 1)])
def test_attention_is_the_softmax_over_decoded_and_exact_tokens(rng, n_packed, n_exact, chunk):
    keys, values = side(rng, "keys"), side(rng, "values", 2, "dense")
    _, key_codes, k = stored(rng, keys, N)
    _, value_codes, v = stored(rng, values, N)
    exact = [rng.standard_normal((H, 132, D)).astype(numpy.float16) for _ in range(2)]
    n = max(chunk, 1)
    new = [rng.standard_normal((H, n, D)).astype(numpy.float16) if chunk else None for _ in range(2)]
    q = rng.standard_normal((3 * H, n, D)).astype(numpy.float32)
    out, lse = numpy.empty_like(q), numpy.empty((3 * H, n), numpy.float32)
    _core.cpu_attend_row(
        keys, values, q, key_codes[0], value_codes[0], n_packed, *exact, n_exact, 4, *new, 0.125, out, lse
    )
    all_k = [k[:, :n_packed], exact[0][:, :n_exact]] + ([new[0]] if chunk else [])
    all_v = [v[:, :n_packed], exact[1][:, :n_exact]] + ([new[1]] if chunk else [])
    all_k, all_v = (numpy.concatenate(x, axis=1).astype(numpy.float64).repeat(3, axis=0) for x in (all_k, all_v))
    scores = 0.125 * q.astype(numpy.float64) @ all_k.transpose(0, 2, 1)
    if chunk:
        past = n_packed + n_exact
        scores[:, numpy.arange(n)[:, None] + past < numpy.arange(past + n)[None]] = -numpy.inf
    top = scores.max(-1, keepdims=True)
    weights = numpy.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    want = weights / total @ all_v
    assert numpy.linalg.norm(out - want) <= 2e-3 * numpy.linalg.norm(want)
    assert numpy.abs(lse - (top + numpy.log(total))[..., 0]).max() < 2e-3


def test_what_cuda_cannot_take_is_said(rng):
    wide = side(rng, "keys", int8=False)
    assert "int8" in wide.cuda_problem
    with pytest.raises(Error, match="int8"):
        wide.cuda_blob()


def test_bad_arguments_are_one_sentence(rng):
    tables = numpy.zeros((H, 1, 256, 4), numpy.float16)
    for arguments, word in (
        (("side", H, D, tables), "side"),
        (("keys", H, D, tables.astype(numpy.float32)), "float16"),
        (("keys", H, 66, tables), "head_dim"),
        (("keys", H + 1, D, tables), "tables"),
        (("keys", H, D, tables, "learned"), "transform"),
    ):
        with pytest.raises(Error, match=word):
            SideTables(*arguments)
    for arguments, word in ((("keys", H, D, 5), "bits"), (("keys", H, 60, 2), "head_dim"), (("q", H, D, 2), "side")):
        with pytest.raises(Error, match=word):
            SideTables.turboquant(*arguments)
    good = side(rng, "keys")
    x, codes, _ = stored(rng, good, N)
    with pytest.raises(Error, match="first_block"):
        _core.cpu_encode(good, x[None], codes, 2)
    with pytest.raises(Error, match="whole blocks"):
        _core.cpu_encode(good, x[None, :, :63], codes, 0)
    with pytest.raises(Error, match="n_packed"):
        q = numpy.zeros((H, 1, D), numpy.float32)
        exact = numpy.zeros((H, 132, D), numpy.float16)
        _core.cpu_attend_row(good, good, q, codes[0], codes[0], 999, exact, exact, 0, 4, None, None, 1.0, q)


class DLTensor(ctypes.Structure):
    """DLManagedTensor of DLPack 0.8, of zeros: memory of a device, if one believes it."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("type", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip

    def __init__(self, *shape):
        self.numbers, self.sizes = ctypes.create_string_buffer(256), (ctypes.c_int64 * len(shape))(*shape)
        cuda, bytes_of_one = 2, 1 | 8 << 8 | 1 << 16
        super().__init__(ctypes.addressof(self.numbers), (cuda, 0), len(shape), bytes_of_one, self.sizes)

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self), b"dltensor", None)


@pytest.mark.parametrize("name", ["CudaLayer", "CudaGeneralLayer"])
def test_a_layer_on_cuda_names_itself(rng, name):
    general = name == "CudaGeneralLayer"
    sides = [SideTables.turboquant(s, H, D, 2) if general else side(rng, s) for s in ("keys", "values")]
    blobs = [DLTensor(one.cuda_blob().size) for one in sides]
    layer = getattr(_core, name)(*sides, *blobs, 4, 4, 64)
    five = [DLTensor(1, 1, 1, 1) for _ in range(5)]
    with pytest.raises(Error, match=rf"^\[{name}\] codes: got another shape, wanted uint8 \[B, 2, blocks"):
        layer.bind(*five)


def test_without_cuda_its_functions_say_so():
    if _core.cuda_built():
        pytest.skip("built with CUDA")
    with pytest.raises(Error, match="CUDA"):
        _core.cuda_device_name()


def test_a_gguf_without_its_packages_says_what_to_install(monkeypatch):
    project = Path(__file__).parents[1] / "core/pyproject.toml"
    if project.exists():  # tools/gpu takes the tests along without it
        extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
        assert set(extras["gguf"]) == set(evaluation.GGUF_NEEDS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(Error, match=r"^\[eval\] model: got some\.gguf without accelerate, .*\[torch,gguf\]\"`$"):
        evaluation.load("some.gguf", "cpu", "float32")


def codebook(rng, transform, layers=2, sub_dim=4):
    """What `veloxquant calibrate` makes, of random numbers; without the package with MLX the test is skipped."""
    made = pytest.importorskip("veloxquant_mlx.cache.codebook")
    rotations = None
    if transform == "learned":
        matrices = rng.standard_normal((2, layers, H, D, D)).astype(numpy.float32)
        keys, values = (numpy.linalg.qr(m)[0].astype(numpy.float32) for m in matrices)
        weights = (0.5 + rng.random((layers, H, D))).astype(numpy.float32)
        rotations = made.Rotations(keys, values, weights)
    keys, values = rng.standard_normal((2, layers, H, D // sub_dim, 256, sub_dim)).astype(numpy.float16)
    factors = (0.5 + rng.random((layers, H, D))).astype(numpy.float32)
    return made.Codebook(keys, values, factors, "model", transform, {}, rotations)


def test_files_of_calibrate_are_read(rng, tmp_path):
    store = pytest.importorskip("veloxquant_mlx.artifacts.npy_store").NpyArtifactStore(tmp_path)
    want = codebook(rng, "learned")
    store.save("vecinfer_codebook", want)
    kind, attributes, arrays = _core.load_artifact(str(tmp_path), "vecinfer_codebook")
    assert kind == "vecinfer_codebook" and '"learned"' in attributes
    assert {name: a.dtype for name, a in arrays.items()}["keys"] == numpy.float16
    assert numpy.array_equal(arrays["values"], want.values)
    assert numpy.array_equal(arrays["key_rotation"], want.rotations.keys)
    encode, query = (numpy.empty((H, D, D), numpy.float32) for _ in range(2))
    _core.rotation_matrices(arrays["key_rotation"][1], arrays["key_weight"][1], encode, query)
    matrices = want.rotations.key_matrices(1)
    assert numpy.array_equal(encode, matrices["encode_matrix"]) and numpy.array_equal(query, matrices["query_matrix"])
    with pytest.raises(Error, match="nothing"):
        _core.load_artifact(str(tmp_path), "nothing")
