"""The functions of metal/_scalar_quant.py, _bit_packing.py and _rvq_attend.py against numpy."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx import metal
from veloxquant_mlx.metal import (
    ScalarQuantized,
    turboquant_bit_pack,
    turboquant_bit_unpack,
    turboquant_fused_rvq_decode_attend,
    turboquant_hadamard_quantize,
    turboquant_scalar_dequantize,
    turboquant_scalar_quantize,
)

LEVELS = {1: [0.797885], 2: [0.452780, 1.510418], 3: [0.245094, 0.756005, 1.343909, 2.151946]}


def normal(*shape, seed=0, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def relative_error(x, x_hat):
    x, x_hat = (np.array(a.astype(mx.float32)) for a in (x, x_hat))
    return ((x - x_hat) ** 2).sum(-1) / np.maximum((x**2).sum(-1), 1e-30)


def test_everything_is_exported():
    for name in ("turboquant_scalar_quantize", "turboquant_bit_pack", "turboquant_fused_rvq_decode_attend"):
        assert name in metal.__all__ and name in dir(metal)


# ------------------------------------------------------------------ scalar quantisation, the seed's form


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_scalar_quantize_is_nearest_level_of_the_unit_vector(bits):
    x = normal(3, 5, 128)
    q = turboquant_scalar_quantize(x, bits=bits)
    assert isinstance(q, ScalarQuantized) and q.shape == (3, 5, 128) and q.dtype == mx.float32
    assert q.packed.dtype == mx.uint32 and q.packed.shape == (3, 5, -(-128 // (32 // bits)))
    assert q.norms.dtype == mx.float16 and q.nbytes == q.packed.nbytes + q.norms.nbytes
    levels = np.array([-v for v in LEVELS[bits][::-1]] + LEVELS[bits])
    u = np.array(x) / np.linalg.norm(np.array(x), axis=-1, keepdims=True) * np.sqrt(128)
    codes = np.abs(u[..., None] - levels).argmin(-1)
    unpacked = np.array(turboquant_bit_unpack(q.packed, bits=bits, original_length=128))
    assert (unpacked != codes).mean() < 1e-4
    z = levels[unpacked]
    scalar = np.linalg.norm(np.array(x), axis=-1) / np.linalg.norm(z, axis=-1)
    np.testing.assert_allclose(np.array(q.norms), scalar, rtol=6e-4)
    x_hat = turboquant_scalar_dequantize(q)
    np.testing.assert_allclose(np.array(x_hat), scalar[..., None] * z, rtol=2e-3, atol=1e-6)
    # norm-corrected: the reconstruction has the norm of the row
    np.testing.assert_allclose(
        np.linalg.norm(np.array(x_hat), axis=-1), np.linalg.norm(np.array(x), axis=-1), rtol=6e-4
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 80), (0, 128), (4, 0, 16), (5, 100), (2, 1), (1, 8, 33, 48)])
def test_scalar_round_trip_in_every_shape_and_dtype(shape, dtype):
    x = normal(*shape, seed=1, dtype=dtype)
    for bits in (1, 2, 3, 4):
        q = turboquant_scalar_quantize(x, bits=bits)
        x_hat = turboquant_scalar_dequantize(q)
        assert x_hat.shape == x.shape and x_hat.dtype == dtype
        if x.size > 300 and shape[-1] >= 48:
            assert relative_error(x, x_hat).mean() < [0, 0.50, 0.15, 0.05, 0.015][bits]
            # Rows are alone in their codes: a row quantised alone gives the same.
            alone = turboquant_scalar_quantize(x.reshape(-1, shape[-1])[-1], bits=bits)
            assert mx.array_equal(alone.packed, q.packed.reshape(-1, q.packed.shape[-1])[-1])


def test_scalar_quantize_of_a_view_is_that_of_its_copy():
    x = normal(8, 64, 4)
    view = x.transpose(2, 0, 1)[::2, ::-1]
    a, b = (turboquant_scalar_quantize(v, bits=2) for v in (view, mx.array(np.array(view))))
    assert mx.array_equal(a.packed, b.packed) and mx.array_equal(a.norms, b.norms)


def test_scalar_quantize_zero_nan_and_infinity():
    x = np.ones((4, 64), np.float32)
    x[0] = 0
    x[1, 3] = np.nan
    x[2, 5] = np.inf
    x[3, 7] = -np.inf
    fixed = np.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0)
    a, b = (turboquant_scalar_quantize(mx.array(v), bits=4) for v in (x, fixed))
    assert mx.array_equal(a.packed, b.packed) and mx.array_equal(a.norms, b.norms)
    x_hat = np.array(turboquant_scalar_dequantize(a))
    assert np.isfinite(x_hat).all() and (x_hat[0] == 0).all()


def test_scales_of_the_scalar():
    x = normal(4000, 128, seed=3)
    slope = {}
    for scale in ("norm_corrected", "raw", "unbiased"):
        x_hat = turboquant_scalar_dequantize(turboquant_hadamard_quantize(x, bits=2, seed=5, scale=scale))
        slope[scale] = float(((x_hat * x).sum(-1) / (x * x).sum(-1)).mean())
    assert slope["norm_corrected"] == pytest.approx(0.939, abs=0.005)
    assert slope["raw"] == pytest.approx(0.8825, abs=0.005)
    assert slope["unbiased"] == pytest.approx(1.0, abs=0.005)


# ------------------------------------------------------------------ the published forms


def test_published_scalar_form_is_argmin_with_the_lowest_index():
    centroids = mx.array([-1.0, 0.0, 0.5, 2.0])
    x = mx.array([-0.5, 0.25, np.nan, np.inf, -np.inf, 1.25, -9.0, 0.1])
    assert turboquant_scalar_quantize(x, centroids, 2).tolist() == [0, 1, 0, 0, 0, 2, 0, 1]
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        y = normal(3, 7, 33, seed=4, dtype=dtype)
        codes = turboquant_scalar_quantize(y, centroids=centroids, b=2)
        expected = np.abs(np.array(y.astype(mx.float32))[..., None] - np.array(centroids)).argmin(-1)
        assert codes.dtype == mx.uint8 and np.array_equal(np.array(codes), expected)
        back = turboquant_scalar_dequantize(codes, centroids)
        assert back.dtype == mx.float16 and np.array_equal(np.array(back), np.array(centroids, np.float16)[expected])


def test_published_dequantize_clamps():
    out = turboquant_scalar_dequantize(mx.array([1, 200, -1, 70000]), mx.array([1.0, 2.0, 3.0]))
    assert out.tolist() == [2.0, 3.0, 3.0, 3.0]


def test_published_hadamard_form():
    rng = np.random.default_rng(5)
    for dim in (2, 8, 64, 128, 1024):
        x = rng.standard_normal((6, dim)).astype(np.float32)
        diag = np.where(rng.standard_normal(dim) > 0, 1, -1).astype(np.float32)
        centroids = np.sort(rng.standard_normal(16)).astype(np.float32)
        y = np.array(mx.hadamard_transform(mx.array(x * diag)))
        codes = turboquant_hadamard_quantize(mx.array(x), mx.array(diag), mx.array(centroids), 4)
        assert codes.dtype == mx.uint8 and codes.shape == (6, dim)
        assert (np.array(codes) != np.abs(y[..., None] - centroids).argmin(-1)).mean() <= 0.01


def test_hadamard_seed_form_undoes_its_rotation():
    x = mx.zeros((16, 128)) + 0.0
    x[mx.arange(16), mx.arange(16)] = 3.0  # one-hot rows: hopeless without a rotation
    plain = relative_error(x, turboquant_scalar_dequantize(turboquant_scalar_quantize(x, bits=2))).mean()
    q = turboquant_hadamard_quantize(x, bits=2, seed=7)
    assert relative_error(x, turboquant_scalar_dequantize(q)).mean() < 0.2 < plain
    other = turboquant_hadamard_quantize(x, bits=2, seed=8)
    assert not mx.array_equal(q.packed, other.packed)


# ------------------------------------------------------------------ bit packing


def test_golden_words():
    assert turboquant_bit_pack(mx.array([0, 1, 2, 3] * 4), bits=2).tolist() == [0xE4E4E4E4]
    assert turboquant_bit_pack(mx.arange(8), bits=4).tolist() == [0x76543210]
    assert turboquant_bit_pack(mx.array([*range(8), 0, 1, 2, 3]), bits=3).tolist() == [0x08FAC688, 0x0000001A]
    # published: bytes
    assert turboquant_bit_pack(mx.array([0, 1, 0, 1, 1, 0, 0, 1]), b=1).tolist() == [0x9A]
    assert turboquant_bit_pack(mx.array([0, 1, 2, 3]), b=2).tolist() == [0xE4]
    assert turboquant_bit_unpack(mx.array([0x9A], mx.uint8), 7, 1).tolist() == [0, 1, 0, 1, 1, 0, 0]
    assert turboquant_bit_unpack(mx.array([0xE4], mx.uint8), N=3, b=2).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_round_trip_of_ragged_rows(bits):
    rng = np.random.default_rng(bits)
    for shape in ((1,), (3, 7), (2, 0), (0, 5), (2, 3, 100), (4, 129)):
        for dtype in (mx.int32, mx.uint8, mx.int64, mx.uint32, mx.int16):
            codes = mx.array(rng.integers(0, 2**bits, shape)).astype(dtype)
            packed = turboquant_bit_pack(codes, bits=bits)
            assert packed.dtype == mx.uint32
            assert packed.shape == (*shape[:-1], -(-shape[-1] // (32 // bits)))
            back = turboquant_bit_unpack(packed, bits=bits, original_length=shape[-1])
            assert back.dtype == mx.int32 and mx.array_equal(back, codes.astype(mx.int32))
    masked = turboquant_bit_pack(mx.array([2**bits, -1, 2**bits + 1]), bits=bits)
    assert turboquant_bit_unpack(masked, bits=bits)[:3].tolist() == [0, 2**bits - 1, 1]
    view = mx.array(rng.integers(0, 2**bits, (40, 6))).T[::2]
    assert mx.array_equal(
        turboquant_bit_pack(view, bits=bits), turboquant_bit_pack(mx.array(np.array(view)), bits=bits)
    )


def test_one_bit_of_int32_is_32_times_smaller():
    indices = mx.zeros((4, 1024), mx.int32)
    assert turboquant_bit_pack(indices, bits=1).nbytes * 32 == indices.nbytes


# ------------------------------------------------------------------ attention on residual codes


def rvq_problem(rng, batch, heads, kv_heads, n_queries, n_tokens, dim, sub, b1, b2, bv):
    return {
        "q": mx.array(rng.standard_normal((batch, heads, n_queries, dim)).astype(np.float32)),
        "k_indices1": mx.array(rng.integers(0, 2**b1, (batch, kv_heads, n_tokens, dim)).astype(np.uint8)),
        "k_indices2": mx.array(rng.integers(0, 2**b2, (batch, kv_heads, n_tokens, dim)).astype(np.uint8)),
        "centroids1": mx.array(np.sort(rng.standard_normal(2**b1)).astype(np.float32)),
        "centroids2": mx.array(np.sort(rng.standard_normal(2**b2) / 3).astype(np.float32)),
        "v_indices": mx.array(rng.integers(0, 2**bv, (batch, kv_heads, n_tokens, dim // sub)).astype(np.uint8)),
        "v_codebook": mx.array(rng.standard_normal((2**bv, sub)).astype(np.float32)),
        "b1": b1, "b2": b2, "bv": bv,
    }  # fmt: skip


def rvq_oracle(p, scale=None, norms=None, visible=None, additive=None):
    q, k1, k2, c1, c2, v, book = (
        np.array(p[n], np.float64 if n[0] in "qc" or "book" in n else np.int64)
        for n in ("q", "k_indices1", "k_indices2", "centroids1", "centroids2", "v_indices", "v_codebook")
    )
    group = q.shape[1] // k1.shape[1]
    keys = c1[np.minimum(k1, c1.size - 1)] + c2[np.minimum(k2, c2.size - 1)]
    if norms is not None:
        keys = keys * np.array(norms, np.float64)[..., None]
    values = book[np.minimum(v, len(book) - 1)].reshape(*v.shape[:3], -1)
    keys, values = (np.repeat(a, group, axis=1) for a in (keys, values))
    scores = np.einsum("bhqd,bhtd->bhqt", q, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if additive is not None:
        scores = scores + additive
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhqt,bhtd->bhqd", weights, values) / np.where(total > 0, total, 1)


def assert_close(out, expected):
    assert out.dtype == mx.float16
    error = np.linalg.norm(np.array(out, np.float64) - expected) / max(np.linalg.norm(expected), 1e-9)
    assert error < 1e-3, error


@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 127, 128, 129, 1500])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (9, 3)])
def test_rvq_attend_is_softmax_over_decoded_keys(n_tokens, heads):
    rng = np.random.default_rng(n_tokens)
    for dim, sub, (b1, b2, bv), n_queries in (
        (64, 4, (1, 1, 8), 1), (80, 8, (2, 2, 4), 3), (128, 2, (4, 4, 6), 1), (100, 5, (3, 1, 5), 2), (16, 16, (5, 2, 1), 1)
    ):  # fmt: skip
        p = rvq_problem(rng, 2, *heads, n_queries, n_tokens, dim, sub, b1, b2, bv)
        assert_close(turboquant_fused_rvq_decode_attend(*p.values()), rvq_oracle(p))


def test_rvq_attend_norms_masks_windows_and_packed_codes():
    rng = np.random.default_rng(1)
    p = rvq_problem(rng, 2, 4, 2, 5, 200, 64, 4, 2, 2, 8)
    norms = mx.array(rng.uniform(0.5, 2, (2, 2, 200)).astype(np.float32))
    positions, keys = 195 + np.arange(5)[:, None], np.arange(200)[None]
    causal = keys <= positions
    assert_close(
        turboquant_fused_rvq_decode_attend(**p, key_norms=norms, causal=True),
        rvq_oracle(p, norms=norms, visible=causal),
    )
    assert_close(turboquant_fused_rvq_decode_attend(**p, mask="causal"), rvq_oracle(p, visible=causal))
    window = causal & (keys > positions - 17)
    assert_close(
        turboquant_fused_rvq_decode_attend(**p, causal=True, sliding_window=17, scale=0.3),
        rvq_oracle(p, visible=window, scale=0.3),
    )
    boolean = rng.uniform(size=(2, 1, 5, 200)) > 0.3
    boolean[0, 0, 2] = False  # sees nothing
    out = turboquant_fused_rvq_decode_attend(**p, mask=mx.array(boolean))
    assert_close(out, rvq_oracle(p, visible=boolean))
    assert (np.array(out)[0, :, 2] == 0).all()
    additive = rng.standard_normal((5, 200)).astype(np.float32)
    assert_close(turboquant_fused_rvq_decode_attend(**p, mask=mx.array(additive)), rvq_oracle(p, additive=additive))
    words = dict(p)
    for name in ("k_indices1", "k_indices2"):
        words[name] = turboquant_bit_pack(p[name], bits=2)
    assert mx.array_equal(turboquant_fused_rvq_decode_attend(**words), turboquant_fused_rvq_decode_attend(**p))


def test_rvq_attend_clamps_codes():
    p = rvq_problem(np.random.default_rng(2), 1, 2, 1, 1, 70, 64, 4, 2, 1, 3)
    for name in ("k_indices1", "k_indices2", "v_indices"):
        p[name] = p[name].astype(mx.int32)
        p[name][0, 0, 5] = 999
    assert_close(turboquant_fused_rvq_decode_attend(**p), rvq_oracle(p))


# ------------------------------------------------------------------ laziness, errors, noise


def test_functions_work_under_compile_and_are_lazy():
    x = normal(4, 128)
    levels = mx.array([-1.0, 1.0])

    def both(x):
        codes = turboquant_scalar_quantize(x, levels, 1)
        return turboquant_bit_unpack(turboquant_bit_pack(codes, bits=1), bits=1, original_length=128)

    assert mx.array_equal(mx.compile(both)(x), both(x))

    def round_trip(x):
        return turboquant_scalar_dequantize(turboquant_hadamard_quantize(x, bits=2, seed=3))

    assert mx.array_equal(mx.compile(round_trip)(x), round_trip(x))


X, C2 = mx.zeros((2, 64)), mx.array([0.0, 1.0])
P = rvq_problem(np.random.default_rng(0), 1, 2, 1, 1, 4, 64, 4, 1, 1, 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: turboquant_scalar_quantize(X, bits=5), "bits: got 5, wanted 1 to 4"),
        (lambda: turboquant_scalar_quantize(X, bits=0), "bits: got 0"),
        (lambda: turboquant_scalar_quantize(X, bits="2"), "bits: got '2'"),
        (lambda: turboquant_scalar_quantize(X.astype(mx.int32), bits=2), "x: got int32"),
        (lambda: turboquant_scalar_quantize(mx.array(1.0), bits=2), "x: got float32"),
        (lambda: turboquant_scalar_quantize(X, bits=2, scale="best"), "scale: got 'best'"),
        (lambda: turboquant_scalar_quantize(X, C2, 2), "centroids: got float32"),
        (lambda: turboquant_scalar_quantize(X, C2), "b: got none"),
        (lambda: turboquant_scalar_quantize(X, C2, 1, bits=1), "b: got bits as well"),
        (lambda: turboquant_scalar_quantize(X, C2, 5), "bits: got 5"),
        (lambda: turboquant_scalar_dequantize(mx.array([1])), "centroids: got none"),
        (lambda: turboquant_scalar_dequantize(mx.array([1.5]), C2), "indices: got float32"),
        (lambda: turboquant_hadamard_quantize(mx.zeros((2, 48)), bits=2), "wanted a power of two"),
        (lambda: turboquant_hadamard_quantize(mx.zeros((2, 2048)), bits=2), "wanted a power of two"),
        (lambda: turboquant_hadamard_quantize(X, mx.ones(32), C2, 1), "diag: got float32 [32]"),
        (lambda: turboquant_hadamard_quantize(X, mx.ones(64), C2, 2), "centroids: got float32 [2]"),
        (lambda: turboquant_hadamard_quantize(X, mx.ones(64)), "wanted centroids and b"),
        (lambda: turboquant_hadamard_quantize(X, bits=2, seed=-1), "seed: got -1"),
        (lambda: turboquant_bit_pack(mx.arange(8), bits=9), "bits: got 9, wanted 1 to 8"),
        (lambda: turboquant_bit_pack(mx.array([0.5]), bits=1), "indices: got float32"),
        (lambda: turboquant_bit_pack(mx.array(1), bits=1), "indices: got a scalar"),
        (lambda: turboquant_bit_pack(mx.arange(9), b=1), "N=9"),
        (lambda: turboquant_bit_pack(mx.arange(8), b=3), "b: got 3"),
        (lambda: turboquant_bit_unpack(mx.zeros((1,), mx.uint8), 9, 1), "1 byte(s) but N=9 at b=1 needs 2"),
        (lambda: turboquant_bit_unpack(mx.zeros((1,), mx.uint8), -1, 1), "N: got -1"),
        (lambda: turboquant_bit_unpack(mx.zeros((1,), mx.uint32), bits=1, original_length=33), "original_length: got 33"),
        (lambda: turboquant_bit_unpack(mx.zeros((1,), mx.int32), bits=1), "packed: got int32"),
        (lambda: turboquant_fused_rvq_decode_attend(**{**P, "q": X}), "q: got float32 [2, 64]"),
        (lambda: turboquant_fused_rvq_decode_attend(**{**P, "b1": 2}), "centroids1: got float32 [2], wanted 4"),
        (lambda: turboquant_fused_rvq_decode_attend(**{**P, "bv": 3}), "v_codebook"),
        (lambda: turboquant_fused_rvq_decode_attend(**{**P, "q": mx.zeros((1, 2, 1, 300))}), "D = 300"),
        (lambda: turboquant_fused_rvq_decode_attend(**{**P, "q": mx.zeros((2, 2, 1, 64))}), "k_indices1: got uint8"),
        (lambda: turboquant_fused_rvq_decode_attend(**P, key_norms=mx.ones((1, 1, 5))), "key_norms: got"),
        (lambda: turboquant_fused_rvq_decode_attend(**P, mask=mx.ones((3, 7))), "mask: got"),
        (lambda: turboquant_fused_rvq_decode_attend(**P, mask="all"), "mask: got 'all'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_clear_error(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)


def test_rvq_attend_refuses_no_tokens():
    empty = {**P}
    for name in ("k_indices1", "k_indices2", "v_indices"):
        empty[name] = empty[name][:, :, :0]
    with pytest.raises(ValueError, match="at least one token"):
        turboquant_fused_rvq_decode_attend(**empty)


def test_random_calls_round_trip_or_raise():
    """Shapes, dtypes, bits and layouts at random; whatever does not fit is a ValueError, never anything else."""
    seed = int(np.random.default_rng().integers(2**31))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    dtypes = [mx.float32, mx.float16, mx.bfloat16, mx.int32]
    for _ in range(300):
        shape = tuple(int(n) for n in rng.integers(0, 40, rng.integers(0, 4)))
        dtype, bits = dtypes[rng.integers(4)], int(rng.integers(-1, 10))
        x = mx.array(rng.standard_normal(shape) * 3).astype(dtype)
        if rng.integers(2) and x.ndim >= 2:
            x = x.swapaxes(0, 1)
        fits = dtype != mx.int32 and x.ndim >= 1 and x.shape[-1] >= 1
        try:
            q = turboquant_scalar_quantize(x, bits=bits)
            mx.eval(turboquant_scalar_dequantize(q))
            assert fits and 1 <= bits <= 4
        except ValueError:
            assert not (fits and 1 <= bits <= 4), (seed, shape, dtype, bits)
        codes = mx.array(rng.integers(-300, 300, shape))
        try:
            packed = turboquant_bit_pack(codes, bits=bits)
            back = turboquant_bit_unpack(packed, bits=bits, original_length=codes.shape[-1])
            assert mx.array_equal(back, mx.bitwise_and(codes, 2**bits - 1))
        except ValueError:
            assert codes.ndim == 0 or not 1 <= bits <= 8, (seed, shape, bits)


def test_same_bits_on_every_level():
    from veloxquant_mlx import _ext

    x = normal(37, 128, seed=9)
    p = rvq_problem(np.random.default_rng(3), 1, 2, 1, 1, 100, 64, 4, 2, 2, 4)
    results = []
    levels = _ext.simd_levels()
    try:
        for level in levels:
            _ext.set_simd_level(level)
            q = turboquant_hadamard_quantize(x, bits=3, seed=1)
            codes = [q.packed, q.norms, turboquant_scalar_dequantize(q)]
            mx.eval(codes)
            results.append(codes)
            assert_close(turboquant_fused_rvq_decode_attend(**p), rvq_oracle(p))
    finally:
        _ext.set_simd_level("")
    for one, other in itertools.pairwise(results):
        assert all(mx.array_equal(a, b) for a, b in zip(one, other, strict=True))
