"""RaBitQ and QJL functions of veloxquant_mlx.metal against NumPy, in every layout and dtype."""

import math

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx.metal import (
    qjl_encode,
    qjl_inner_product,
    qjl_sketch,
    rabitq_encode,
    rabitq_hamming_score,
    rabitq_popcount_score,
)

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def hamming(qbits, bits, cx, scale):
    distance = np.unpackbits(qbits[..., None, :] ^ bits, axis=-1).sum(-1)
    return distance.astype(np.float32) * np.float32(scale) + cx.astype(np.float32)


def random_bytes(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


# --- Hamming -------------------------------------------------------------------------------------


def test_hamming_golden_words():
    q = mx.array([0xB1], mx.uint8)
    bits = mx.array([[0xB1], [0x4E], [0xB0]], mx.uint8)
    score = rabitq_hamming_score(q, bits, mx.zeros(3), mx.array([1.0]))
    assert score.dtype == mx.float32 and score.tolist() == [0, 8, 1]
    assert rabitq_hamming_score(q, bits, mx.array([1.0, 2, 3]), mx.array([[0.5]])).tolist() == [1, 6, 3.5]


@pytest.mark.parametrize("n_bytes", [1, 2, 6, 8, 10, 12, 16, 32, 33])
@pytest.mark.parametrize("n", [0, 1, 7, 127, 128, 129])
def test_hamming_equals_numpy(n_bytes, n):
    rng = np.random.default_rng(n_bytes * 1000 + n)
    q, bits = random_bytes(rng, n_bytes), random_bytes(rng, n, n_bytes)
    cx = rng.standard_normal(n).astype(np.float32)
    got = rabitq_hamming_score(mx.array(q), mx.array(bits).reshape(n, n_bytes), mx.array(cx), 0.25)
    assert got.shape == (n,)
    assert np.array_equal(np.array(got), hamming(q, bits, cx, 0.25))


def test_hamming_broadcasts_leading_axes():
    rng = np.random.default_rng(1)
    bits, cx = random_bytes(rng, 2, 3, 50, 16), rng.standard_normal((2, 3, 50)).astype(np.float32)
    for q_shape in [(16,), (3, 16), (2, 1, 16), (2, 3, 16), (4, 2, 3, 16)]:
        q = random_bytes(rng, *q_shape)
        got = np.array(rabitq_hamming_score(mx.array(q), mx.array(bits), mx.array(cx), mx.array(2.0)))
        assert np.array_equal(got, hamming(q, bits, cx, 2.0))
    one = np.array(rabitq_hamming_score(mx.array(q), mx.array(bits[0, :1]), mx.array(cx[0, 0]), 2.0))
    assert np.array_equal(one, hamming(q, bits[0, :1], cx[0, 0], 2.0))


def test_hamming_takes_views_and_other_integers():
    rng = np.random.default_rng(2)
    bits, q, cx = random_bytes(rng, 16, 60), random_bytes(rng, 32), rng.standard_normal((60, 2)).astype(np.float16)
    got = rabitq_hamming_score(
        mx.array(q).astype(mx.int32)[::2], mx.array(bits).T[::2].astype(mx.uint32), mx.array(cx)[::2, 1], mx.array(1)
    )
    assert np.array_equal(np.array(got), hamming(q[::2], bits.T[::2], cx[::2, 1], 1.0))


def test_hamming_is_lazy_and_compiles():
    rng = np.random.default_rng(3)
    q, bits, cx = random_bytes(rng, 16), random_bytes(rng, 33, 16), np.zeros(33, np.float32)
    compiled = mx.compile(lambda a, b, c: rabitq_hamming_score(a, b, c, mx.array(1.0)) + 1)
    for _ in range(2):
        got = compiled(mx.array(q), mx.array(bits), mx.array(cx))
        assert np.array_equal(np.array(got), hamming(q, bits, cx, 1.0) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qbits": mx.zeros((), mx.uint8)}, r"\[rabitq_hamming_score\] qbits"),
        ({"qbits": mx.zeros(4, mx.float32)}, r"\[rabitq_hamming_score\] qbits"),
        ({"qbits": mx.zeros(8, mx.uint8)}, r"\[rabitq_hamming_score\] bits: got uint8 \[5, 4\], wanted uint8 .*, 8\]"),
        ({"bits": mx.zeros(4, mx.uint8)}, r"\[rabitq_hamming_score\] bits"),
        ({"Cx": mx.zeros(6)}, r"\[rabitq_hamming_score\] Cx: got .*, wanted floats \[..., 5\]"),
        ({"scale": mx.zeros(2)}, r"\[rabitq_hamming_score\] scale"),
        ({"bits": mx.zeros((2, 5, 4), mx.uint8), "qbits": mx.zeros((3, 4), mx.uint8)}, "leading axes"),
        ({"bits": [[1, 2]]}, r"\[rabitq_hamming_score\] bits: got list, wanted an mx.array"),
    ],
)
def test_hamming_errors(change, message):
    arguments = {
        "qbits": mx.zeros(4, mx.uint8),
        "bits": mx.zeros((5, 4), mx.uint8),
        "Cx": mx.zeros(5),
        "scale": mx.array(1.0),
    }
    with pytest.raises(ValueError, match=message):
        rabitq_hamming_score(**(arguments | change))


# --- RaBitQ codes and popcount scores ------------------------------------------------------------


@pytest.mark.parametrize("dim", [48, 64, 80, 128])
def test_popcount_scores_are_unbiased(dim):
    mx.random.seed(4)
    keys = mx.random.normal((2, 3, 4096, dim))
    queries = mx.random.normal((2, 6, dim))
    codes, factors = rabitq_encode(keys, seed=11)
    assert codes.shape == (2, 3, 4096, dim // 8) and codes.dtype == mx.uint8
    assert factors.shape == (2, 3, 4096) and factors.dtype == mx.float32
    got = np.array(rabitq_popcount_score(queries, codes, factors, seed=11), np.float64)
    truth = np.array(mx.repeat(keys, 2, axis=1) @ queries[..., None], np.float64)[..., 0]
    assert got.shape == (2, 6, 4096)
    # Pooled over 50 thousand pairs, each within sqrt(.6 / .4)-odd of a standard deviation.
    slope = (got * truth).sum() / (truth * truth).sum()
    assert abs(slope - 1) < 0.02
    assert np.corrcoef(got.ravel(), truth.ravel())[0, 1] > 0.77
    fine = np.array(rabitq_popcount_score(queries, codes, factors, seed=11, query_bits=8), np.float64)
    assert np.std(fine - truth) < np.std(got - truth)


def test_rabitq_encode_takes_every_float_and_view_and_nothing():
    mx.random.seed(5)
    x = mx.random.normal((3, 64, 10)).astype(mx.float16)
    codes, factors = rabitq_encode(x.astype(mx.float32).transpose(0, 2, 1))
    again = rabitq_encode(x.transpose(0, 2, 1))
    assert mx.array_equal(codes, again[0]) and mx.array_equal(factors, again[1])
    empty = rabitq_encode(mx.zeros((0, 64)))
    assert empty[0].shape == (0, 8) and empty[1].shape == (0,)
    none = rabitq_popcount_score(mx.zeros((2, 64)), mx.zeros((1, 0, 8), mx.uint8), mx.zeros((1, 0)))
    assert none.shape == (2, 0)


def test_rabitq_errors():
    with pytest.raises(ValueError, match=r"\[rabitq_encode\] x: got float32 \[2, 12\]"):
        rabitq_encode(mx.zeros((2, 12)))
    with pytest.raises(ValueError, match=r"\[rabitq_encode\] x: got int32"):
        rabitq_encode(mx.zeros((2, 16), mx.int32))
    q, codes, factors = mx.zeros((4, 64)), mx.zeros((2, 5, 8), mx.uint8), mx.zeros((2, 5))
    for change, message in (
        ({"query_bits": 9}, "query_bits: got 9"),
        ({"queries": mx.zeros((3, 64))}, "codes: got"),
        ({"codes": mx.zeros((2, 5, 4), mx.uint8)}, "codes: got"),
        ({"factors": mx.zeros((2, 6))}, "factors: got"),
    ):
        with pytest.raises(ValueError, match=message):
            rabitq_popcount_score(**({"queries": q, "codes": codes, "factors": factors} | change))


# --- QJL -----------------------------------------------------------------------------------------


def qjl_scores(q_proj, signs, norms):
    """In float64: q_proj [Hq, m], signs [S, H, m/8], norms [S, H] -> [Hq, S]."""
    m, group = q_proj.shape[-1], q_proj.shape[0] // signs.shape[1]
    plus_minus = 2.0 * np.unpackbits(signs, axis=-1, bitorder="little") - 1
    plus_minus = np.repeat(plus_minus, group, axis=1)
    return (
        math.sqrt(math.pi / 2)
        / m
        * np.repeat(norms, group, axis=1).T
        * np.einsum("hj,shj->hs", q_proj.astype(np.float64), plus_minus)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, m", [((5, 64), 64), ((2, 3, 70, 48), 96), ((128,), 256), ((1, 200, 7), 8)])
def test_qjl_encode_equals_numpy(dtype, shape, m):
    mx.random.seed(6)
    x = mx.random.normal(shape).astype(dtype)
    sketch = mx.random.normal((m, shape[-1])).astype(dtype)
    signs, norms = qjl_encode(x, sketch)
    assert signs.shape == (*shape[:-1], m // 8) and signs.dtype == mx.uint8
    assert norms.shape == shape[:-1] and norms.dtype == mx.float16
    wide = np.array(x.astype(mx.float32), np.float64), np.array(sketch.astype(mx.float32), np.float64)
    projected = wide[0] @ wide[1].T
    got = np.unpackbits(np.array(signs), axis=-1, bitorder="little")
    unclear = np.abs(projected) < 1e-4  # fp32 sums may fall on either side
    assert ((got == (projected >= 0)) | unclear).all()
    assert np.allclose(np.array(norms, np.float64), np.linalg.norm(wide[0], axis=-1), rtol=1e-3)


def test_qjl_encode_conventions():
    x = mx.array([[1, -1, 0, -0.0, 3, -2, 1e-6, -1e-6], [60000] * 8, [math.nan, -1, 1, 1, 1, 1, 1, 1]])
    signs, norms = qjl_encode(x, mx.eye(8))
    assert signs.flatten().tolist() == [0b01011101, 255, 0b11111101]
    assert norms[1].item() == 65504  # never infinity
    assert qjl_encode(x.astype(mx.float16)[::2], mx.eye(8))[0].flatten().tolist() == [0b01011101, 0b11111101]
    empty = qjl_encode(mx.zeros((0, 8)), mx.eye(8))
    assert empty[0].shape == (0, 1) and empty[1].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, group, n, m", [(1, 1, 1, 8), (2, 1, 33, 64), (3, 3, 130, 128), (2, 4, 17, 256)])
def test_qjl_inner_product_equals_numpy(dtype, heads, group, n, m):
    rng = np.random.default_rng(m + n)
    q = mx.array(rng.standard_normal((heads * group, m)).astype(np.float32)).astype(dtype)
    signs, norms = random_bytes(rng, n, heads, m // 8), rng.random((n, heads)).astype(np.float16)
    got = qjl_inner_product(q, mx.array(signs), mx.array(norms))
    want = qjl_scores(np.array(q.astype(mx.float32)), signs, norms.astype(np.float64))
    assert got.shape == (heads * group, n) and got.dtype == mx.float16
    assert np.allclose(np.array(got, np.float64), want, rtol=1e-3, atol=2e-3)


def test_qjl_inner_product_batches_views_and_nothing():
    rng = np.random.default_rng(7)
    q = rng.standard_normal((2, 3, 4, 32)).astype(np.float32)
    signs, norms = random_bytes(rng, 2, 3, 20, 2, 4), rng.random((2, 3, 20, 2)).astype(np.float16)
    # Stored [..., H, S, m/8], as caches have it: a transposed view.
    stored = mx.array(np.ascontiguousarray(signs.swapaxes(2, 3))).swapaxes(2, 3)
    got = np.array(qjl_inner_product(mx.array(q), stored, mx.array(norms)), np.float64)
    for b in range(2):
        for c in range(3):
            want = qjl_scores(q[b, c], signs[b, c], norms[b, c].astype(np.float64))
            assert np.allclose(got[b, c], want, rtol=1e-3, atol=2e-3)
    assert qjl_inner_product(mx.zeros((2, 8)), mx.zeros((0, 2, 1), mx.uint8), mx.zeros((0, 2))).shape == (2, 0)


def test_qjl_estimates_inner_products():
    mx.random.seed(8)
    d, m = 128, 256
    keys, queries = mx.random.normal((500, 2, d)), mx.random.normal((256, d))
    truth = np.array(mx.repeat(keys, 128, axis=1).transpose(1, 0, 2) @ queries[..., None], np.float64)[..., 0]
    # Of one Gaussian sketch the slope of every query varies by sqrt(2 / m): three times that over sqrt(256).
    for sketch, wanted, tolerance in (
        (qjl_sketch(d, m, seed=3), 1.002, 0.006),
        (mx.random.normal((m, d)), 1.0, 3 * math.sqrt(2 / m / 256)),
    ):
        signs, norms = qjl_encode(keys, sketch)
        got = np.array(qjl_inner_product(queries @ sketch.T, signs, norms), np.float64)
        assert abs((got * truth).sum() / (truth * truth).sum() - wanted) < tolerance


def test_qjl_sketch_rows_are_orthogonal():
    sketch = np.array(qjl_sketch(48, 96, seed=1), np.float64)
    assert sketch.shape == (96, 48)
    for block in (sketch[:48], sketch[48:]):
        assert np.allclose(block @ block.T, 48 * np.eye(48), atol=1e-3)
    assert not np.array_equal(sketch, np.array(qjl_sketch(48, 96, seed=2), np.float64))


def test_qjl_errors():
    with pytest.raises(ValueError, match=r"\[qjl_encode\] S: got float32 \[12, 8\]"):
        qjl_encode(mx.zeros((2, 8)), mx.zeros((12, 8)))
    with pytest.raises(ValueError, match=r"\[qjl_encode\] S: got float32 \[8, 7\]"):
        qjl_encode(mx.zeros((2, 8)), mx.zeros((8, 7)))
    with pytest.raises(ValueError, match=r"\[qjl_encode\] x: got int32"):
        qjl_encode(mx.zeros((2, 8), mx.int32), mx.eye(8))
    with pytest.raises(ValueError, match=r"\[qjl_inner_product\] q_proj"):
        qjl_inner_product(mx.zeros((2, 12)), mx.zeros((3, 2, 1), mx.uint8), mx.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"\[qjl_inner_product\] packed_signs"):
        qjl_inner_product(mx.zeros((3, 8)), mx.zeros((3, 2, 1), mx.uint8), mx.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"\[qjl_inner_product\] norms"):
        qjl_inner_product(mx.zeros((2, 8)), mx.zeros((3, 2, 1), mx.uint8), mx.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\[qjl_sketch\] m: got 65"):
        qjl_sketch(64, 65)
    with pytest.raises(ValueError, match=r"\[qjl_sketch\] seed: got -1"):
        qjl_sketch(64, 64, seed=-1)
