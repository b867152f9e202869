"""A random llama model small enough for quick tests, saved as an mlx_lm directory."""

import json

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM = 2, 4, 2, 64


def byte_tokens():
    """The 256 symbols of a byte-level tokenizer, and <eos>."""
    return sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<eos>"]


def config(vocab_size):
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": N_LAYERS,
        "intermediate_size": 96,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": vocab_size - 1,
    }


def save(directory, seed=0):
    """Writes config, weights and a byte-level tokenizer; every byte is one token. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = byte_tokens()
    (directory / "config.json").write_text(json.dumps(config(len(tokens))))

    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config(len(tokens))))
    weights = {name: 4 * weight for name, weight in tree_flatten(model.parameters())}  # far from uniform logits
    mx.save_safetensors(str(directory / "model.safetensors"), weights)

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )
    return directory
