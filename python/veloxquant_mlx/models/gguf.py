"""GGUF (llama architecture, byte-level BPE tokenizer) to an mlx_lm model directory.

    convert(Path("SmolLM2.Q4_1.gguf"), Path("smollm2"))   # config.json, model.safetensors, tokenizer*.json

Matrices are dequantised to fp32: on a CPU that is MLX's fast path, fp16 and 4-bit products are 3-20x
slower there. llama.cpp stores the rows of attn_q and attn_k interleaved, (d/2, 2) inside a head; the
Hugging Face order that mlx_lm's RoPE expects is (2, d/2).
"""

import json
from pathlib import Path

import numpy as np

# GGUF's name for a tensor of block i: blk.<i>.<key>
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types

# Pre-tokenizers that split every digit off before the GPT-2 pattern, by llama.cpp's names.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_PLAIN_GPT2 = ("gpt-2", "default")


class _Metadata:
    """The key-value part of a GGUF file; keys without a value read as the default."""

    def __init__(self, reader):
        self._reader = reader

    def __call__(self, key, default=None):
        field = self._reader.get_field(key)
        return default if field is None else field.contents()


def convert(source, target, progress=lambda fraction, text: None):
    """Writes the model of the GGUF file `source` into the existing directory `target`, fp32.

    progress(fraction in 0..1, what) is called per tensor. Raises ValueError for an architecture
    or a tokenizer that is not handled.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    metadata = _Metadata(reader)
    if metadata("general.architecture") != "llama":
        raise ValueError(
            f"source: got a GGUF of architecture {metadata('general.architecture')!r} in {source}, wanted 'llama'"
        )
    target = Path(target)
    _write_tokenizer(metadata, target)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    (target / "config.json").write_text(json.dumps(_config(metadata, tied), indent=1))
    _write_weights(reader.tensors, metadata, target, progress)


def _module_name(tensor_name):
    stem = tensor_name.rsplit(".", 1)[0]
    if stem.startswith("blk."):
        _, index, key = stem.split(".", 2)
        return f"model.layers.{index}.{_BLOCK_MODULES[key]}"
    return _OUTER_MODULES[stem]


def _deinterleave_heads(weight, n_heads):
    """[n_heads * D, cols], rows of a head as (D/2, 2) -> rows as (2, D/2)."""
    rows, cols = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def _write_weights(tensors, metadata, target, progress):
    import mlx.core as mx
    from gguf.quants import dequantize

    heads = {"attn_q": metadata("llama.attention.head_count"), "attn_k": metadata("llama.attention.head_count_kv")}
    weights = {}
    for done, tensor in enumerate(tensors):
        progress(done / len(tensors), f"dequantising {tensor.name}")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for key, n_heads in heads.items():
            if f".{key}." in tensor.name:
                weight = _deinterleave_heads(weight, n_heads)
        weights[_module_name(tensor.name) + ".weight"] = mx.array(weight)
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    progress(1.0, "weights written")


def _config(metadata, tied):
    n_heads = metadata("llama.attention.head_count")
    hidden = metadata("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": metadata("llama.block_count"),
        "intermediate_size": metadata("llama.feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": metadata("llama.attention.head_count_kv", n_heads),
        "head_dim": metadata("llama.attention.key_length", hidden // n_heads),
        "rms_norm_eps": round(float(metadata("llama.attention.layer_norm_rms_epsilon")), 12),
        "vocab_size": metadata("llama.vocab_size"),
        "max_position_embeddings": metadata("llama.context_length"),
        "rope_theta": float(metadata("llama.rope.freq_base", 10000.0)),
        "rope_traditional": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _write_tokenizer(metadata, target):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    if metadata("tokenizer.ggml.model") != "gpt2":
        raise ValueError(
            f"source: got a GGUF with a {metadata('tokenizer.ggml.model')!r} tokenizer, wanted 'gpt2' (byte-level BPE)"
        )
    tokens = metadata("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in metadata("tokenizer.ggml.merges", [])]
    prefix_space = bool(metadata("tokenizer.ggml.add_space_prefix", False))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre_tokenizers, metadata("tokenizer.ggml.pre", "default"), prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for token, kind in zip(tokens, metadata("tokenizer.ggml.token_type")):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    tokenizer.save(str(target / "tokenizer.json"))

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": prefix_space,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata("llama.context_length"),
        "chat_template": metadata("tokenizer.chat_template"),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))


def _pre_tokenizer(pre_tokenizers, name, prefix_space):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=True)
    if name in _PLAIN_GPT2:
        return byte_level
    if name in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise ValueError(
        f"source: got a GGUF with pre-tokenizer {name!r}, wanted one of {', '.join(_PLAIN_GPT2 + _SINGLE_DIGITS)}"
    )
