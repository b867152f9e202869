"""Detection of the rotary embedding, on small random models of every flavour that mlx_lm has."""

import importlib

import architectures
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import rope_utils

from veloxquant_mlx.models.rope import LayerRope, detect_ropes, read_module

SCALING = {
    "default": None,
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "mscale": 1.0},
    "longrope": {
        "type": "longrope",
        "original_max_position_embeddings": 256,
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + 0.2 * i for i in range(16)],
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
    "mrope": {"type": "mrope", "mrope_section": [4, 6, 6]},
}


def llama(**changes):
    arguments = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": 60,
        "max_position_embeddings": 2048,
        **changes,
    }
    return build("llama", arguments)


def build(name, arguments):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(arguments))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("kind", SCALING)
@pytest.mark.parametrize("traditional", [False, True])
def test_every_scaling_of_rope_utils(kind, traditional):
    ropes = detect_ropes(llama(rope_scaling=SCALING[kind], rope_traditional=traditional, rope_theta=5000.0))
    assert len(ropes) == 2
    for rope in ropes:
        assert rope.rotates and rope.rotary_dims == 32
        assert rope.traditional == (traditional and kind != "longrope")
        assert (rope.attention_factor != 1.0) == (kind in ("yarn", "longrope"))
        assert rope.position_scale == (0.25 if kind == "linear" else 1.0)
        assert (rope.max_position == 2048) == (kind == "dynamic")
        # The half that does not turn.
        assert np.count_nonzero(rope.inv_freq) == (8 if kind == "proportional" else 16)


COMMON = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}

MODELS = {
    # name: (more arguments, rotary dimensions, traditional)
    "phi": ({"model_type": "phi", "partial_rotary_factor": 0.5}, 8, False),
    "stablelm": (
        {
            "model_type": "stablelm",
            "rope_theta": 10000.0,
            "use_qkv_bias": False,
            "partial_rotary_factor": 0.25,
            "layer_norm_eps": 1e-5,
        },
        4,
        False,
    ),
    "cohere": ({"model_type": "cohere", "rope_theta": 8000.0, "layer_norm_eps": 1e-5}, 16, True),
    "hunyuan_v1_dense": (
        {
            "model_type": "hunyuan_v1_dense",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "head_dim": 16,
            "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0},
        },
        16,
        False,
    ),
    "internlm3": ({"model_type": "internlm3", "rms_norm_eps": 1e-5}, 16, False),
    "phi3": (
        {
            "model_type": "phi3",
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0 + 0.1 * i for i in range(8)],
            },
        },
        16,
        False,
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        16,
        False,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    more, rotary, traditional = MODELS[name]
    for rope in detect_ropes(build(name, COMMON | more)):
        assert (rope.rotary_dims, rope.traditional, rope.rotates) == (rotary, traditional, True)


@pytest.mark.parametrize("name", [*architectures.ARCHITECTURES, *architectures.SEVERAL_SHAPES])
def test_every_architecture_is_understood(name):
    """Hybrid ones, caches in lists, layers of several shapes; some have no position embedding where the cache is plain."""
    ropes = detect_ropes(architectures.build(name))
    without = name in ("cohere2", "nemotron_h")
    assert ropes and all(rope.rotates != without and rope.module == (None if without else "RoPE") for rope in ropes)


@pytest.mark.parametrize("name", architectures.LATENT)
def test_latent_attention_is_refused(name):
    with pytest.raises(ValueError, match="latent attention"):
        detect_ropes(architectures.build(name))


def test_layers_without_rope_are_found_by_their_keys():
    model = build(
        "smollm3",
        COMMON
        | {
            "model_type": "smollm3",
            "num_hidden_layers": 4,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "no_rope_layer_interval": 2,
            "no_rope_layers": [1, 0, 1, 0],
            "tie_word_embeddings": True,
        },
    )
    assert [rope.rotates for rope in detect_ropes(model)] == [True, False, True, False]
    assert [rope.module for rope in detect_ropes(model)] == ["RoPE", None, "RoPE", None]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype):
    model = llama()
    model.set_dtype(dtype)
    assert all(rope.rotates for rope in detect_ropes(model))


class StrangeRoPE(nn.Module):
    def __call__(self, x, offset=0):
        return mx.fast.rope(x, 32, traditional=False, base=100.0, scale=1.0, offset=2 * offset)


def test_an_unknown_module_is_refused_by_layer_and_class():
    model = llama()
    model.layers[1].self_attn.rope = StrangeRoPE()
    with pytest.raises(ValueError, match=r"layer 1 .*StrangeRoPE"):
        detect_ropes(model)


class Doubled(nn.RoPE):
    """Of a known name, but not doing what it says."""

    def __call__(self, x, offset=0):
        return super().__call__(x, offset=2 * offset)


def test_a_module_that_does_not_do_what_it_says_is_refused():
    Doubled.__name__ = "RoPE"
    model = llama()
    for layer in model.layers:
        layer.self_attn.rope = Doubled(32)
    with pytest.raises(ValueError, match="layer 0 .*RoPE differs from its description"):
        detect_ropes(model)


def test_keys_that_the_module_does_not_explain_are_refused():
    model = llama()

    class Late(nn.Module):  # the model turns its keys again after RoPE
        def __init__(self, rope):
            super().__init__()
            self.inner = rope

        def __call__(self, x, offset=0):
            return self.inner(self.inner(x, offset=offset), offset=offset)

    model.layers[0].self_attn.rope = Late(model.layers[0].self_attn.rope)
    with pytest.raises(ValueError, match="layer 0 .*the keys differ from RoPE"):
        detect_ropes(model)


def test_the_rotation_is_that_of_the_module_and_its_inverse_undoes_it():
    x = mx.array(np.random.default_rng(1).standard_normal((2, 3, 40, 32)), dtype=mx.float32)
    positions = mx.arange(100, 140)
    for kind, scaling in SCALING.items():
        module = rope_utils.initialize_rope(32, 10000.0, False, scaling, 2048)
        rope = read_module(module, 32)
        turned = rope.core().rotate(x, positions)
        assert mx.abs(turned - module(x, offset=100)).max().item() < 2e-4, kind
        back = rope.core().unrotate(turned, positions)
        assert (mx.abs(back - x).max() / mx.abs(x).max()).item() < 1e-6, kind


def test_a_layer_without_rope_is_left_alone():
    rope = LayerRope(16, np.zeros(0, np.float32))
    x = mx.random.normal((1, 1, 5, 16))
    assert mx.array_equal(rope.core().rotate(x, mx.arange(5)), x)
    with pytest.raises(ValueError, match="positions"):
        rope.core().rotate(x, mx.arange(4))
