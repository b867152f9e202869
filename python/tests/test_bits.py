"""Codes of 4 to 12 bits, other bits for values than for keys, and layers with settings of their own."""

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.vecinfer import calibrate
from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codebook import key_and_value_bits


class ByteTokenizer:
    def encode(self, text, add_special_tokens=True):
        return [byte % 200 for byte in text.encode()]


@pytest.fixture
def text():
    rng = np.random.default_rng(4)
    return ["".join(map(chr, rng.integers(32, 127, 1500)))]


def run(model, caches, tokens):
    logits = model(tokens[None], cache=caches)
    mx.eval(logits)
    return np.array(logits)


# bits of a code, centroids, dimensions of a sub-vector
@pytest.mark.parametrize(
    "code_bits, centroids, sub_dim", [(4, 16, 2), (6, 64, 4), (8, 256, 4), (10, 1000, 4), (12, 4096, 8)]
)
def test_codes_of_every_width_take_their_bits_and_survive_files(
    tmp_path, tiny_model, tokens, code_bits, centroids, sub_dim
):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((centroids, sub_dim)).astype(np.float32)
    caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=table))
    run(tiny_model, caches, tokens[:400])
    for codec in caches[0].codecs:
        assert codec.bits_per_element == code_bits / sub_dim
        assert codec.block_bytes == 64 * 64 * code_bits // (8 * sub_dim)
    file = tmp_path / "cache.safetensors"
    prompt_cache.save(file, caches)
    loaded = prompt_cache.load(file, tiny_model)
    after = [run(tiny_model, c, tokens[400:420]) for c in (caches, loaded)]
    assert np.array_equal(*after)


@pytest.mark.parametrize("bits, pair", [(2, (2, 2)), (2.5, (3, 2)), ((4, 2), (4, 2)), (1.5, (1.5, 1.5)), (8, (8, 8))])
def test_calibrated_bits(tiny_model, text, bits, pair):
    assert key_and_value_bits(bits) == pair
    _, codebook = calibrate(tiny_model, ByteTokenizer(), bits, texts=text, num_tokens=1024)
    assert codebook.bits_per_element == pair
    caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=codebook))
    run(tiny_model, caches, mx.array(ByteTokenizer().encode(text[0]))[:300])
    assert tuple(c.bits_per_element for c in caches[2].codecs) == pair


@pytest.mark.parametrize("bits", [5, (2.5, 2), (2, 2, 2), "2", None])
def test_bits_without_a_table_shape(tiny_model, text, bits):
    with pytest.raises(ValueError, match="bits: got"):
        calibrate(tiny_model, ByteTokenizer(), bits, texts=text, num_tokens=1024)


def test_values_with_a_codebook_or_a_method_of_their_own(tiny_model, tables, tokens):
    finer = np.random.default_rng(1).standard_normal((256, 2)).astype(np.float32)
    caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables, value_codebook=finer))
    run(tiny_model, caches, tokens[:300])
    assert [c.bits_per_element for c in caches[1].codecs] == [2, 4]
    caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables, value_method="fp16"))
    run(tiny_model, caches, tokens[:300])
    assert [c.bits_per_element for c in caches[1].codecs] == [2, 16]


def test_layers_with_settings_of_their_own(tmp_path, tiny_model, tables, tokens):
    finer = np.random.default_rng(1).standard_normal((256, 2)).astype(np.float32)
    layers = {0: {"codebook": finer, "window": 128}, -1: {"method": "fp16"}}
    caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables, layers=layers))
    before = run(tiny_model, caches, tokens[:400])
    assert np.isfinite(before).all()
    assert [c.bits_per_element for c in caches] == [4, 2, 16]
    # 400 = 4 sinks + blocks + tail of window .. window + 63 tokens
    assert [c._core.exact_tokens for c in caches] == [4 + 140, 4 + 76, 4 + 76]
    prompt_cache.save(tmp_path / "mixed.safetensors", caches)
    loaded = prompt_cache.load(tmp_path / "mixed.safetensors", tiny_model)
    assert np.array_equal(run(tiny_model, loaded, tokens[400:420]), run(tiny_model, caches, tokens[400:420]))


@pytest.mark.parametrize("layers, message", [
    ([4], "layers: got list"),
    ({"0": {}}, "layers: got '0'"),
    ({0: {"bit": 2}}, "layers: got field 'bit'"),
    ({0: {"layers": {}}}, "layers: got field 'layers'"),
    ({0: {"method": "zip"}}, "method: got 'zip'"),
    ({0: {"window": -1}}, "window: got -1"),
    ({3: {"sinks": 2}}, "layers: got layer 3, wanted one of the 3"),
    ({0: {"sinks": 2}, -3: {"sinks": 2}}, "layers: got layer 0 twice"),
])  # fmt: skip
def test_wrong_layer_settings(tiny_model, tables, layers, message):
    with pytest.raises(ValueError, match=message):
        KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables, layers=layers))


def test_codecs_say_what_is_wrong(tables):
    with pytest.raises(ValueError, match=r"\[codec\] method: got 'zip', wanted one of .*exact.*vecinfer"):
        _ext.codec("keys", "zip", 1, 64)
    with pytest.raises(ValueError, match=r"\[vecinfer\] n_subvectors: got none"):
        _ext.codec("keys", "vecinfer", 1, 64)
    with pytest.raises(ValueError, match=r"\[exact\] colour: got an unknown name, wanted one of dtype"):
        _ext.codec("keys", "exact", 1, 64, {"colour": 3})
    with pytest.raises(ValueError, match=r"\[vecinfer\] tables"):
        _ext.codec("keys", "vecinfer", 1, 64, {"n_subvectors": 16}, {"tables": mx.array(tables)})
