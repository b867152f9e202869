"""Small instances of mlx_lm's architectures with random weights, for tests of every model shape."""

import zlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes

VOCABULARY = 96
_SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    rope_theta=10000.0,
)
_MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_d_conv=4, mamba_n_groups=1)
_LATENT = dict(
    kv_lora_rank=32,
    q_lora_rank=None,
    qk_rope_head_dim=16,
    qk_nope_head_dim=48,
    v_head_dim=48,
    rope_scaling=dict(
        factor=1.0, mscale=1.0, mscale_all_dim=0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1
    ),
)

# Name -> configuration beyond _SMALL. The head sizes are 64, 80, 96, 112, 128, 192 and 256 among them,
# with one query head for each KV head (MHA), several (GQA), and one KV head for all (MQA).
ARCHITECTURES = {
    "llama": dict(head_dim=64, tie_word_embeddings=False),
    "qwen2": dict(hidden_size=160, num_attention_heads=2, num_key_value_heads=1),  # 80, MQA
    "qwen3": dict(head_dim=128, tie_word_embeddings=False),
    "mistral": dict(head_dim=96, num_key_value_heads=4),  # MHA
    "phi3": dict(hidden_size=224, num_attention_heads=2, num_key_value_heads=2, partial_rotary_factor=0.5),  # 112
    "mixtral": dict(hidden_size=256, num_local_experts=4, num_experts_per_tok=2),
    # The attention soft-caps its scores; written out by hand in mlx_lm.
    "gemma2": dict(head_dim=256, num_key_value_heads=1, attn_logit_softcapping=3.0, query_pre_attn_scalar=64.0),
    # Layers 1 and 3 keep a sliding window, layers 2 and 4 everything.
    "gemma3_text": dict(
        head_dim=192, num_hidden_layers=4, sliding_window=32, sliding_window_pattern=2, query_pre_attn_scalar=192
    ),
    "cohere2": dict(
        head_dim=64, hidden_size=256, num_hidden_layers=4, sliding_window=32, sliding_window_pattern=2, logit_scale=1.0
    ),
    # Attention sinks in every layer, and a sliding window in every second one.
    "gpt_oss": dict(head_dim=64, num_hidden_layers=4, sliding_window=32, num_local_experts=4, num_experts_per_tok=2),
    "granitemoehybrid": dict(
        _MAMBA2,
        hidden_size=256,
        attention_bias=False,
        embedding_multiplier=1.0,
        attention_multiplier=0.125,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "attention"],
        mamba_proj_bias=False,
        mamba_conv_bias=True,
    ),
    "nemotron_h": dict(
        head_dim=96,
        attention_bias=False,
        mamba_num_heads=4,
        mamba_head_dim=32,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=1,
        mlp_bias=False,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        use_conv_bias=True,
        hybrid_override_pattern=["M", "*", "-", "*"],
    ),
    # A state space cache and a KV cache in every layer.
    "falcon_h1": dict(
        _MAMBA2,
        head_dim=64,
        mamba_d_ssm=128,
        attention_out_multiplier=1.0,
        embedding_multiplier=1.0,
        key_multiplier=1.0,
        lm_head_multiplier=1.0,
        ssm_in_multiplier=1.0,
        ssm_out_multiplier=0.25,
        mlp_multipliers=[1.0, 1.0],
        ssm_multipliers=[1.0] * 5,
    ),
    # Calls MLX's attention itself.
    "plamo2": dict(
        hidden_size_per_head=64,
        num_hidden_layers=4,
        mamba_d_state=16,
        mamba_num_heads=4,
        tie_word_embeddings=False,
    ),
}
# Layers with different numbers of KV heads.
SEVERAL_SHAPES = {
    "openelm": dict(
        head_dim=64,
        num_transformer_layers=3,
        model_dim=128,
        ffn_dim_divisor=8,
        num_query_heads=[4, 4, 6],
        num_kv_heads=[1, 2, 3],
        ffn_multipliers=[1.0, 1.0, 1.0],
    )
}
# Latent attention: keys and values of different sizes.
LATENT = {"deepseek_v2": _LATENT, "deepseek_v3": dict(_LATENT, n_routed_experts=None)}


def build(name, seed=0, **changes):
    """A model of architecture `name` in fp32, whose attention and logits are peaked: otherwise no
    error of the cache would show."""
    options = {**ARCHITECTURES, **SEVERAL_SHAPES, **LATENT}[name]
    config = {"model_type": name, **_SMALL, **options, **changes}
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    mx.random.seed(seed)
    tied = not any("lm_head" in path for path, _ in tree_flatten(model.parameters()))
    # Gemmas multiply embeddings by sqrt(hidden_size), and in their norms by 1 + weight.
    gemma, width = name.startswith("gemma"), config["hidden_size"] ** 0.5
    embedding = 1 / width if gemma else 1.0
    last_norm = 4.0 / (width * embedding) if tied else 1.0

    def weight(path, array):
        if "layers" not in path and "norm" in path and path.endswith("weight"):
            # Of any sign, so that tied embeddings do not say the current token again.
            return mx.random.normal(array.shape) * last_norm - (1.0 if gemma else 0.0)
        # What is no matrix (norms, biases, the constants of state spaces) stays as it is.
        if array.ndim < 2 or not path.endswith("weight") or "norm" in path or "conv" in path:
            return array
        if "embed" in path:
            return mx.random.normal(array.shape) * embedding
        gain = 4.0 if "lm_head" in path else 1.2 if any(part in path for part in ("q_proj", "k_proj", "qkv")) else 1.0
        return mx.random.normal(array.shape) * gain / array.shape[-1] ** 0.5

    model.update(tree_map_with_path(weight, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


class Tokenizer:
    """A random token for each character, all equally often: what train_codebook runs the model on."""

    def encode(self, text, add_special_tokens=False):
        return np.random.default_rng(zlib.crc32(text.encode())).integers(0, VOCABULARY, len(text)).tolist()
