"""metal_fused_sdpa: against plain attention over the dequantised tensors."""

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx.metal import metal_available
from veloxquant_mlx.metal._vecinfer import vecinfer_encode
from veloxquant_mlx.metal.fused_sdpa import (
    EncodedTensor,
    metal_fused_sdpa,
    patch_mlx_lm_for_fused_sdpa,
    supports_shape,
    unpatch_mlx_lm_for_fused_sdpa,
)


def dense(q, k, v, scale, mask=None, sinks=None):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def relative_error(a, b):
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return np.linalg.norm(a - b, axis=-1).max() / np.linalg.norm(b, axis=-1).max()


@pytest.fixture(params=[(64, 50), (128, 200), (80, 130)], ids=str)
def case(request):
    dim, length = request.param
    rng = np.random.default_rng(dim)

    def normal(*shape):
        return mx.array(rng.standard_normal(shape), dtype=mx.float32)

    codebook = rng.standard_normal((2, dim // 4, 256, 4)).astype(np.float32)
    factors = np.exp(rng.uniform(-1, 1, (2, dim)))
    keys = normal(3, 2, length, dim)
    return dict(
        q=normal(3, 6, 5, dim),
        keys=keys,
        values=normal(3, 2, length, dim),
        encoded=vecinfer_encode(keys, codebook, factors),
        scale=dim**-0.5,
    )


def test_values_as_an_array(case):
    k = case["encoded"].dequantize()
    out = metal_fused_sdpa(queries=case["q"], encoded_keys=case["encoded"], values=case["values"], scale=case["scale"])
    assert relative_error(out, dense(case["q"], k, case["values"], case["scale"])) < 2e-3


def test_masks_and_sinks(case):
    encoded, length = case["encoded"], case["keys"].shape[2]
    k, v = encoded.dequantize(), case["values"]
    rng = np.random.default_rng(9)
    allowed = mx.array(rng.random((3, 1, 5, length)) < 0.7)
    bias = mx.array(rng.standard_normal((6, 5, length)), dtype=mx.float32)
    logits = mx.array(rng.standard_normal(6), dtype=mx.float32)
    for mask, sinks in [("causal", None), (allowed, None), (bias, None), ("causal", logits)]:
        ours = metal_fused_sdpa(case["q"], encoded, v, case["scale"], mask, sinks=sinks)
        assert relative_error(ours, dense(case["q"], k, v, case["scale"], mask, sinks)) < 2e-3


def test_strided_and_half_precision_queries(case):
    q = case["q"].swapaxes(1, 2)
    q = mx.contiguous(q).swapaxes(1, 2)  # [B, H, L, D] over [B, L, H, D] memory
    wanted = dense(q, case["encoded"].dequantize(), case["values"], case["scale"])
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        out = metal_fused_sdpa(q.astype(dtype), case["encoded"], case["values"], case["scale"])
        assert out.dtype == dtype
        assert relative_error(out, wanted) < (2e-2 if dtype == mx.bfloat16 else 3e-3)


def test_compiles(case):
    def attend(q):
        return metal_fused_sdpa(q, case["encoded"], case["values"], case["scale"]) * 2

    assert mx.array_equal(mx.compile(attend)(case["q"]), attend(case["q"]))


def test_encoded_tensor_knows_its_shape(case):
    encoded = case["encoded"]
    assert isinstance(encoded, EncodedTensor)
    assert tuple(encoded.shape) == tuple(case["keys"].shape)
    assert encoded.nbytes < case["keys"].nbytes or case["keys"].shape[2] < 64


def test_supports_shape_and_metal():
    assert supports_shape(batch=1, heads=8, seq_len=4096, head_dim=128)
    assert not supports_shape(batch=1, heads=8, seq_len=4096, head_dim=63)
    assert metal_available() == mx.metal.is_available()


def test_bad_arguments_are_named(case):
    with pytest.raises(ValueError, match="encoded_keys"):
        metal_fused_sdpa(case["q"], case["keys"], case["values"], case["scale"])
    with pytest.raises(ValueError, match="values"):
        metal_fused_sdpa(case["q"], case["encoded"], case["values"][:, :, 1:], case["scale"])
    with pytest.raises(ValueError, match="mask"):
        metal_fused_sdpa(case["q"], case["encoded"], case["values"], case["scale"], "full")


def test_patch_is_idempotent_and_can_be_undone(tiny_model):
    import mlx_lm.models.base as base
    import mlx_lm.models.llama as llama

    patch_mlx_lm_for_fused_sdpa(tiny_model)
    hook = base.scaled_dot_product_attention
    assert patch_mlx_lm_for_fused_sdpa(tiny_model) == set()
    assert base.scaled_dot_product_attention is hook is llama.scaled_dot_product_attention
    unpatch_mlx_lm_for_fused_sdpa(tiny_model)
    assert base.scaled_dot_product_attention is llama.scaled_dot_product_attention is not hook
    patch_mlx_lm_for_fused_sdpa(tiny_model)
    assert base.scaled_dot_product_attention is llama.scaled_dot_product_attention
