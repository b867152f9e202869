"""metal/_vecinfer.py and compute_query_lut against plain numpy: shapes, dtypes, codebooks, errors."""

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.vecinfer import compute_query_lut
from veloxquant_mlx.metal import (
    vecinfer_dequant_metal,
    vecinfer_encode_decode_metal,
    vecinfer_encode_decode_simple_metal,
    vecinfer_quantize_metal,
)

rng = np.random.default_rng(5)


def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def nearest(x, codebook, sub_dim):
    """Direct squared distances in float32, summed over ascending dimensions; codebook [.., C, d]."""
    parts = x.astype(np.float32).reshape(*x.shape[:-1], -1, sub_dim)
    if codebook.ndim == 4:  # [H, M or 1, C, d] against [..., H, S, M, d]
        codebook = codebook[:, None]
    distance = 0
    for i in range(sub_dim):
        distance = distance + (parts[..., None, i] - codebook[..., i]) ** 2
    return distance.argmin(-1)


def numbers(a):
    return np.array(a.astype(mx.float32)) if a.dtype == mx.bfloat16 else np.array(a)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 70, 12), (1, 2, 3, 1, 2, 12)])
def test_quantize_takes_the_nearest_centroid(dtype, shape):
    x, codebook = mx.array(normal(*shape)).astype(dtype), normal(40, 4)
    codes = vecinfer_quantize_metal(x, mx.array(codebook), 4)
    assert codes.dtype == mx.int32 and codes.shape == (*shape[:-1], 3)
    if dtype == mx.float16:
        codebook = codebook.astype(np.float16).astype(np.float32)
    assert np.array_equal(np.array(codes), nearest(numbers(x), codebook, 4))


@pytest.mark.parametrize("n_centroids", [1, 2, 16, 256, 300, 4096])
@pytest.mark.parametrize("sub_dim", [1, 2, 3, 8, 16])
def test_quantize_with_any_codebook_size(n_centroids, sub_dim):
    x, codebook = normal(33, 2 * sub_dim), normal(n_centroids, sub_dim)
    codes = vecinfer_quantize_metal(mx.array(x), mx.array(codebook), sub_dim)
    assert np.array_equal(np.array(codes), nearest(x, codebook, sub_dim))


@pytest.mark.parametrize("leading", [(6,), (3, 6), (3, 1)])
def test_codebooks_per_subvector_and_per_head(leading):
    x, codebook = normal(2, 3, 90, 24), normal(*leading, 64, 4)
    codes = np.array(vecinfer_quantize_metal(mx.array(x), mx.array(codebook), 4))
    assert np.array_equal(codes, nearest(x, codebook, 4))
    decoded = np.array(vecinfer_dequant_metal(mx.array(codes), mx.array(codebook)))
    full = np.broadcast_to(codebook.reshape((1,) * (3 - len(leading) - 1) + codebook.shape), (3, 6, 64, 4))
    for h in range(3):
        for m in range(6):
            assert np.array_equal(decoded[:, h, :, 4 * m : 4 * m + 4], full[h, m][codes[:, h, :, m]])


def test_non_contiguous_and_lazy_inputs_under_compile():
    x, codebook = mx.array(normal(2, 70, 3, 16)), mx.array(normal(256, 4))
    moved = x.transpose(0, 2, 1, 3)[:, :, ::2]
    expected = np.array(vecinfer_quantize_metal(mx.array(np.array(moved)), codebook, 4))
    assert np.array_equal(np.array(vecinfer_quantize_metal(moved, codebook, 4)), expected)
    both = mx.compile(lambda a: vecinfer_dequant_metal(vecinfer_quantize_metal(a * 1.0, codebook, 4), codebook))
    decoded = np.array(both(moved))
    assert np.array_equal(decoded.reshape(2, 3, 35, 4, 4), np.array(codebook)[expected])


def test_empty_inputs():
    codebook = mx.array(normal(16, 4))
    assert vecinfer_quantize_metal(mx.zeros((2, 0, 8)), codebook, 4).shape == (2, 0, 2)
    assert vecinfer_dequant_metal(mx.zeros((0, 2), mx.int32), codebook).shape == (0, 8)
    assert compute_query_lut(mx.zeros((0, 8)), codebook, 4).shape == (0, 2, 16)
    decoded, codes = vecinfer_encode_decode_metal(mx.zeros((1, 2, 0, 8)), codebook, 4, mx.eye(8))
    mx.eval(decoded, codes)
    assert decoded.shape == (1, 2, 0, 8) and codes.shape == (1, 2, 0, 2)


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int32, mx.uint32, mx.int64])
def test_dequant_clamps_codes_out_of_range(dtype):
    codebook = mx.array(normal(8, 4))
    rows = np.array(vecinfer_dequant_metal(mx.array([1, 200], dtype=dtype), codebook))
    assert np.array_equal(rows, np.array(codebook)[[1, 7]].reshape(-1))
    if dtype in (mx.int32, mx.int64):
        rows = vecinfer_dequant_metal(mx.array([-1, -(2**31)], dtype=dtype), codebook)
        assert np.array_equal(np.array(rows), np.array(codebook)[[7, 7]].reshape(-1))


@pytest.mark.parametrize("out_dtype", [None, mx.float32, mx.float16, mx.bfloat16])
def test_dequant_rounds_the_codebook_to_the_output(out_dtype):
    codebook = mx.array(normal(8, 3)).astype(mx.float16)
    rows = vecinfer_dequant_metal(mx.array([[0, 5]]), codebook, out_dtype)
    assert rows.dtype == (out_dtype or mx.float16)
    assert np.array_equal(numbers(rows), numbers(codebook.astype(rows.dtype))[[0, 5]].reshape(1, 6))


def test_nan_is_code_zero_and_ties_go_to_the_lowest_index():
    codebook = mx.array([[1.0], [-1.0], [1.0], [-1.0]])
    codes = vecinfer_quantize_metal(mx.array([[0.0, float("nan"), float("inf"), -3.0]]), codebook, 1)
    assert codes.tolist() == [[0, 0, 0, 1]]


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h / np.sqrt(n)).astype(np.float32)


@pytest.mark.parametrize("smooth_shape", [None, (16,), (2, 16), (5, 16)])
@pytest.mark.parametrize("rotation", ["hadamard", "dense"])
def test_encode_decode_in_the_coordinates_of_the_keys(smooth_shape, rotation):
    keys, codebook = normal(2, 2, 100, 16), normal(64, 4)
    h = hadamard(16) if rotation == "hadamard" else np.linalg.qr(normal(16, 16))[0].astype(np.float32)
    smooth = None if smooth_shape is None else np.exp(normal(*smooth_shape))
    decoded, codes = vecinfer_encode_decode_metal(
        mx.array(keys), mx.array(codebook), 4, mx.array(h), None if smooth is None else mx.array(smooth)
    )
    assert decoded.dtype == mx.float16 and codes.dtype == mx.int32
    scale = np.ones(16, np.float32)
    if smooth is not None:
        scale = smooth if smooth.shape in ((16,), (2, 16)) else smooth.mean(0)
        scale = scale[:, None] if scale.ndim == 2 else scale
    y = (keys / scale) @ h.T
    expected = nearest(y, codebook, 4)
    codes = np.array(codes)
    assert (codes != expected).mean() < 0.002  # the rotation rounds differently from numpy's
    assert np.array(decoded) == pytest.approx((codebook[codes].reshape(keys.shape) @ h) * scale, rel=2e-3, abs=2e-3)


def test_encode_decode_simple():
    values, codebook = normal(1, 2, 33, 96), normal(256, 4)
    decoded, codes = vecinfer_encode_decode_simple_metal(mx.array(values), mx.array(codebook), 4)
    assert decoded.dtype == mx.float16 and codes.dtype == mx.uint32
    assert np.array_equal(np.array(codes), nearest(values, codebook, 4))
    assert np.array_equal(np.array(decoded), codebook[np.array(codes)].reshape(values.shape).astype(np.float16))


def test_query_lut_golden_and_scores():
    codebook = mx.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    assert compute_query_lut(mx.array([1.0, 2, 3, 4]), codebook, 2).tolist() == [[0, 1, 2, 3], [0, 3, 4, 7]]
    q, tables = normal(2, 3, 5, 16), normal(4, 100, 4)
    lut = compute_query_lut(mx.array(q).astype(mx.bfloat16), mx.array(tables), 4)
    assert lut.dtype == mx.bfloat16 and lut.shape == (2, 3, 5, 4, 100)
    rounded = numbers(mx.array(q).astype(mx.bfloat16)).reshape(2, 3, 5, 4, 4)
    assert numbers(lut) == pytest.approx(np.einsum("bhsmi,mci->bhsmc", rounded, tables), rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("level", _ext.simd_levels())
def test_every_simd_level_gives_the_same_codes(level):
    x, codebook = mx.array(normal(4, 333, 128)), mx.array(normal(256, 4))
    expected = nearest(np.array(x), np.array(codebook), 4)
    _ext.set_simd_level(level)
    try:
        assert np.array_equal(np.array(vecinfer_quantize_metal(x, codebook, 4)), expected)
    finally:
        _ext.set_simd_level("")


@pytest.mark.parametrize(
    "call, wanted",
    [
        (lambda: vecinfer_quantize_metal(mx.zeros((2, 10)), mx.zeros((8, 4)), 4), "divisor"),
        (lambda: vecinfer_quantize_metal(mx.zeros((2, 8)), mx.zeros((8, 3)), 4), "columns"),
        (lambda: vecinfer_quantize_metal(mx.zeros((2, 8), mx.int32), mx.zeros((8, 4)), 4), "floats"),
        (lambda: vecinfer_quantize_metal(mx.zeros((2, 8)), mx.zeros((3, 8, 4)), 4), "sub-vectors"),
        (lambda: vecinfer_quantize_metal(mx.zeros((2, 2, 8)), mx.zeros((3, 2, 8, 4)), 4), "heads"),
        (lambda: vecinfer_dequant_metal(mx.zeros((2, 2)), mx.zeros((8, 4))), "integers"),
        (lambda: vecinfer_dequant_metal(mx.zeros((2, 2), mx.int32), mx.zeros((4,))), "codebook"),
        (lambda: vecinfer_dequant_metal(mx.zeros((2,), mx.int32), mx.zeros((8, 4)), mx.int8), "out_dtype"),
        (lambda: vecinfer_encode_decode_metal(mx.zeros((2, 8)), mx.zeros((8, 4)), 4, mx.eye(8)), "[B, H, S, D]"),
        (lambda: vecinfer_encode_decode_metal(mx.zeros((1, 1, 2, 8)), mx.zeros((8, 4)), 4, mx.eye(4)), "H_mat"),
        (
            lambda: vecinfer_encode_decode_metal(mx.zeros((1, 1, 2, 8)), mx.zeros((8, 4)), 4, mx.eye(8), mx.ones((4,))),
            "smooth",
        ),
        (lambda: vecinfer_encode_decode_simple_metal(mx.zeros((1, 2, 8)), mx.zeros((8, 4)), 4), "[B, H, S, D]"),
        (lambda: compute_query_lut(mx.zeros((7,)), mx.zeros((8, 4)), 4), "divisor"),
    ],
)
def test_one_clear_error(call, wanted):
    with pytest.raises(ValueError) as error:
        call()
    assert wanted in str(error.value) and "got" in str(error.value)
