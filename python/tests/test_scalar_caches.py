"""method="turboquant" and method="turboquant_rvq" as KV caches: packed memory, widths of either side, errors."""

import mlx.core as mx
import mlx_lm
import pytest

from veloxquant_mlx import _ext
from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.models import load_model, smollm2

PACKED = (700 - 4 - 64) // 64 * 64  # tokens of `tokens` in sealed blocks


def filled(model, tokens, **options):
    caches = KVCacheBuilder.build(model, KVCacheConfig(**options))
    mx.eval(model(tokens[None], cache=caches))
    return caches


def token_bytes(method, bits, prod=False):
    """ALGORITHMS section 7 for head_dim 64."""
    planes = 2 if method == "turboquant_rvq" else 1
    return planes * 64 * bits // 8 + (4 if prod else 2)


@pytest.mark.parametrize("method", ["turboquant", "turboquant_rvq"])
@pytest.mark.parametrize(("bits", "value_bits"), [(1, None), (2, 2), (3, 2), (4, 1), (1, 4)])
def test_packed_memory_is_the_formula(tiny_model, tokens, method, bits, value_bits):
    cache = filled(tiny_model, tokens, method=method, bits=bits, value_bits=value_bits)[0]
    exact = filled(tiny_model, tokens, method="fp16")[0]
    saved = 4 * 64 - token_bytes(method, bits) - token_bytes(method, value_bits or bits)
    assert exact.nbytes - cache.nbytes == PACKED * 2 * saved
    assert cache.shared_nbytes == 0


def test_prod_takes_one_more_scalar(tiny_model, tokens):
    plain, prod = (
        filled(tiny_model, tokens, method="turboquant", bits=2, codec_options=o)[0].nbytes
        for o in (None, {"prod": True})
    )
    assert prod - plain == PACKED * 2 * 2 * (token_bytes("turboquant", 2, True) - token_bytes("turboquant", 2))


@pytest.mark.parametrize("method", ["turboquant", "turboquant_rvq"])
def test_more_bits_are_nearer_to_the_exact_cache(tiny_model, tokens, method):
    exact = tiny_model(tokens[None], cache=KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16")))
    errors = []
    for bits in (1, 2, 3, 4):
        config = KVCacheConfig(method=method, bits=bits, strict=True)
        logits = tiny_model(tokens[None], cache=KVCacheBuilder.build(tiny_model, config))
        errors.append((mx.linalg.norm(logits - exact) / mx.linalg.norm(exact)).item())
    assert 1 > errors[0] > errors[1] > errors[2] > errors[3] > 0


def test_attention_runs_on_the_packed_blocks(tiny_model, tokens):
    before = _ext.dequantize_calls()
    for method in ("turboquant", "turboquant_rvq"):
        caches = filled(tiny_model, tokens, method=method, bits=2, value_bits=3)
        mx.eval(tiny_model(tokens[None, :1], cache=caches))
        assert method in caches[0].kernel
    assert _ext.dequantize_calls() == before


def test_layers_and_sides_have_rotations_of_their_own(tiny_model, tokens):
    caches = filled(tiny_model, tokens, method="turboquant", bits=2, seed=3)
    seeds = {codec.options["seed"] for cache in caches for codec in cache.codecs}
    assert len(seeds) == 2 * len(caches)
    other = filled(tiny_model, tokens, method="turboquant", bits=2, seed=4)
    assert seeds.isdisjoint({codec.options["seed"] for cache in other for codec in cache.codecs})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 2.5}, "bits: got 2.5, wanted 1, 2, 3 or 4"),
        ({"bits": 2, "value_bits": 1.5}, "value_bits: got 1.5"),
        ({"codebook": [[0.0]]}, "codebook: got one, wanted none"),
        ({"codec_options": 3}, "codec_options: got int, wanted a dict"),
        ({"codec_options": {"scle": "raw"}}, "codec_options: got 'scle'"),
        ({"codec_options": {"scale": "best"}}, "codec_options: got scale = 'best'"),
        ({"codec_options": {"prod": True, "scale": "unbiased"}}, "codec_options: got scale = 'unbiased' with prod"),
    ],
)
def test_wrong_fields_are_named(options, text):
    with pytest.raises(ValueError) as error:
        KVCacheConfig(method="turboquant", **options)
    assert text in str(error.value)


def test_a_saved_cache_goes_on_as_before(tiny_model, tokens, tmp_path):
    for method, options in (("turboquant", {"prod": True}), ("turboquant_rvq", None)):
        caches = filled(tiny_model, tokens, method=method, bits=2, value_bits=3, codec_options=options, seed=11)
        prompt_cache.save(str(tmp_path / "cache.safetensors"), caches)
        again = prompt_cache.load(str(tmp_path / "cache.safetensors"), tiny_model)
        expected, got = (tiny_model(tokens[None, :3], cache=c) for c in (caches, again))
        assert mx.array_equal(expected, got)
        assert [c.nbytes for c in caches] == [c.nbytes for c in again]


@pytest.mark.parametrize(("method", "bits", "value_bits"), [("turboquant", 4, 3), ("turboquant_rvq", 2, 1)])
def test_smollm2_generates_from_packed_blocks(method, bits, value_bits):
    try:
        directory = smollm2.directory()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model(str(directory))[:2]
    cache = KVCacheBuilder.build(model, KVCacheConfig(method=method, bits=bits, value_bits=value_bits))
    prompt = "The seven days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. " * 12
    text = mlx_lm.generate(model, tokenizer, prompt=prompt + "The first of them is", max_tokens=12, kv_cache=cache)
    assert "Monday" in text
    packed = (cache[0].offset - 4 - 64) // 64 * 64
    assert packed >= 128
    one = token_bytes(method, bits) + token_bytes(method, value_bits)
    # Sinks, window and open block in 16 bits.
    assert sum(c.nbytes for c in cache) == 30 * 3 * (packed * one + (4 + 64 + 64) * 2 * 128)
