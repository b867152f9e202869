"""method="rabitq" and method="qjl" as KV caches: packed memory, scores on codes, options and their errors."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.models import load_model, smollm2

# Bytes per token and KV head at head_dim 64 (ALGORITHMS section 7, recomputed): keys.
KEY_BYTES = {
    ("rabitq", 1): 8 + 2,
    ("rabitq", 2): 16 + 2,
    ("rabitq", 3): 24 + 2,
    ("rabitq", 4): 32 + 2,
    ("qjl", 1): 8 + 2,
    ("qjl", 2): 16 + 2,
    ("qjl", 4): 32 + 2,
}


def filled(model, tokens, **options):
    caches = KVCacheBuilder.build(model, KVCacheConfig(**options))
    mx.eval(model(tokens[None], cache=caches))
    return caches


@pytest.mark.parametrize("method, bits", KEY_BYTES)
def test_memory_of_keys_is_the_formula(tiny_model, tokens, method, bits):
    options = {"value_method": "fp16", "bits": bits, "window": 64, "sinks": 4}
    cache = filled(tiny_model, tokens, method=method, **options)[0]
    packed = (700 - 4 - 64) // 64 * 64  # tokens in sealed blocks
    exact = filled(tiny_model, tokens, method="fp16", window=64, sinks=4)[0]
    assert exact.nbytes - cache.nbytes == packed * 2 * (2 * 64 - KEY_BYTES[method, bits])
    assert cache.shared_nbytes == 0


def test_outliers_take_what_the_readme_says(tiny_model, tokens):
    plain, with_outliers = (
        filled(tiny_model, tokens, method="qjl", value_method="fp16", bits=2, codec_options=o)[0].nbytes
        for o in (None, {"outliers": 4})
    )
    blocks = (700 - 4 - 64) // 64
    assert with_outliers - plain == 2 * blocks * (64 * (8 + 2) + 4)


@pytest.mark.parametrize("method", ["rabitq", "qjl"])
def test_more_bits_are_nearer_to_the_exact_cache(tiny_model, tokens, method):
    exact = tiny_model(tokens[None], cache=KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16")))
    errors = []
    for bits in (1, 2, 4):
        config = KVCacheConfig(method=method, bits=bits, value_method="fp16", strict=True)
        logits = tiny_model(tokens[None], cache=KVCacheBuilder.build(tiny_model, config))
        errors.append(mx.linalg.norm(logits - exact).item() / mx.linalg.norm(exact).item())
    assert 0 < errors[2] < errors[1] < errors[0] < 1


def test_values_go_to_turboquant_unless_the_config_says_otherwise(tiny_model, tokens):
    for options, values in (
        ({"method": "rabitq", "bits": 2, "codec_options": {"scale": "norm"}}, "turboquant"),
        ({"method": "qjl", "bits": 2, "value_bits": 3, "codec_options": {"outliers": 2}}, "turboquant"),
        ({"method": "rabitq", "value_method": "rabitq", "bits": 4}, "rabitq"),
        ({"method": "fp16", "value_method": "rabitq", "bits": 4}, "rabitq"),
    ):
        cache = filled(tiny_model, tokens, **options)[0]
        assert values in cache.kernel, options


def test_attention_runs_on_the_codes(tiny_model, tokens):
    before = _ext.dequantize_calls()
    for method in ("rabitq", "qjl"):
        caches = filled(tiny_model, tokens, method=method, bits=2, value_bits=3)
        mx.eval(tiny_model(tokens[None, :1], cache=caches))
        assert method in caches[0].kernel
    assert _ext.dequantize_calls() == before


def test_a_mean_of_the_keys_changes_what_is_stored(tiny_model, tokens):
    mean = 3 * np.ones((3, 2, 64), np.float32)
    exact = tiny_model(tokens[None], cache=KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16")))

    def error(mean):
        config = KVCacheConfig(method="rabitq", bits=2, value_method="fp16", strict=True, codec_options={"mean": mean})
        logits = tiny_model(tokens[None], cache=KVCacheBuilder.build(tiny_model, config))
        return mx.linalg.norm(logits - exact).item()

    zero = error(np.zeros(64))
    assert error(np.zeros((2, 64))) == error(np.zeros((3, 2, 64))) == zero
    assert error(mean) > zero  # a mean that the keys do not have


def test_same_seed_same_cache(tiny_model, tokens):
    for method in ("rabitq", "qjl"):
        states = []
        for seed in (1, 1, 2):
            cache = filled(tiny_model, tokens, method=method, bits=1, seed=seed)[0]
            spans = [a for a in cache.state if isinstance(a, mx.array) and a.dtype == mx.uint8 and a.ndim == 4]
            states.append([np.array(a) for a in spans])
            assert spans
        assert all(np.array_equal(a, b) for a, b in zip(states[0], states[1]))
        assert not all(np.array_equal(a, b) for a, b in zip(states[0], states[2]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "rabitq", "bits": 1.5}, "bits: got 1.5, wanted one of 1, 2, 3, 4"),
        ({"method": "qjl", "bits": 2.5}, "bits: got 2.5, wanted one of 1, 2, 3, 4"),
        ({"method": "rabitq", "codec_options": {"rounds": 2}}, "codec_options: got 'rounds', wanted one of scale"),
        ({"method": "rabitq", "codec_options": {"scale": "raw"}}, "wanted one of unbiased"),
        ({"method": "qjl", "codec_options": {"outliers": -1}}, "'outliers'"),
        ({"method": "qjl", "value_method": "qjl"}, "value_method: got 'qjl'"),
        ({"method": "rabitq", "codec_options": 3}, "codec_options: got int, wanted a dict"),
    ],
)
def test_bad_configuration_names_the_field(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVCacheConfig(**arguments)


def test_what_only_the_model_can_refuse(tiny_model):
    for options, message in (
        ({"method": "rabitq", "codec_options": {"mean": np.zeros((5, 64))}}, "mean"),
        ({"method": "qjl", "codec_options": {"outliers": 64}}, "outliers: got 64, wanted 0..63"),
        ({"method": "qjl", "codec_options": {"outliers": 2, "outlier_bits": 65}}, "outlier_bits: got 65"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCacheBuilder.build(tiny_model, KVCacheConfig(**options))


def test_prompt_caches_come_back(tiny_model, tokens, tmp_path):
    from veloxquant_mlx.cache import prompt_cache

    for options in ({"method": "rabitq", "bits": 3}, {"method": "qjl", "bits": 2, "codec_options": {"outliers": 4}}):
        caches = filled(tiny_model, tokens, value_method="fp16", **options)
        prompt_cache.save(str(tmp_path / "cache.safetensors"), caches)
        again = prompt_cache.load(str(tmp_path / "cache.safetensors"), tiny_model)
        expected, got = (tiny_model(tokens[None, :3], cache=c) for c in (caches, again))
        assert mx.array_equal(expected, got)
        assert [c.nbytes for c in caches] == [c.nbytes for c in again]


@pytest.mark.parametrize("options", [{"method": "rabitq", "bits": 4}, {"method": "qjl", "bits": 4}])
def test_smollm2_generates_from_packed_keys(options):
    try:
        directory = smollm2.directory()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model(str(directory))[:2]
    cache = KVCacheBuilder.build(model, KVCacheConfig(value_bits=4, window=64, **options))
    prompt = "The seven days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. " * 12
    text = mlx_lm.generate(model, tokenizer, prompt=prompt + "The first of them is", max_tokens=12, kv_cache=cache)
    assert text.strip()
    if options["method"] == "rabitq":
        assert "Monday" in text
    packed = (cache[0].offset - 4 - 64) // 64 * 64
    assert packed >= 128
    # Keys and values of 4 bits and one scalar; sinks, window and open block in 16 bits.
    assert sum(c.nbytes for c in cache) == 30 * 3 * (packed * 2 * (32 + 2) + (4 + 64 + 64) * 2 * 128)
