"""Every model shape: random instances of mlx_lm's architectures on 8-bit codes, on exact tokens, saved,
in batches; and what cannot be served is said."""

import copy
import logging
import sys

import architectures as models
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import CacheList, make_prompt_cache

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.vecinfer import train_codebook
from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, install
from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.cache.layout import attention_layers, cache_of, flat_caches

generate = sys.modules["mlx_lm.generate"]
N_PROMPT, N_STEPS = 120, 100
# Nearly everything that attention sees is codes.
SETTINGS = dict(window=16, sinks=2)
# Whose attention cannot be reached: history is dequantised, which is said and counted.
DEQUANTISED = {"plamo2"}


@pytest.fixture(scope="module", params=models.ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return models.build(name)


@pytest.fixture(scope="module")
def spoken(model):
    """(tokens, logits): a prompt, what the model with its own cache says after it (sampled, so that
    it does not repeat itself), and its logits for the token after each of them."""
    tokens = np.random.default_rng(0).integers(0, models.VOCABULARY, N_PROMPT).tolist()
    cache, all_logits = make_prompt_cache(model), []
    mx.random.seed(7)
    step = mx.array(tokens)
    for _ in range(N_STEPS):
        logits = model(step[None], cache=cache)[0, -1]
        step = mx.random.categorical(logits)[None]
        tokens.append(step.item())
        all_logits.append(logits)
    return mx.array(tokens), mx.stack(all_logits)


def forced(model, caches, tokens):
    """The logits of the model along the same tokens: the prompt at once, then one by one."""
    all_logits = [model(tokens[None, :N_PROMPT], cache=caches)[0, -1]]
    for t in range(N_PROMPT, tokens.size - 1):
        all_logits.append(model(tokens[None, t : t + 1], cache=caches)[0, -1])
        mx.async_eval(all_logits[-1])
    return mx.stack(all_logits)


def agreement(a, b):
    """In per cent of the steps."""
    return 100 * (a.argmax(axis=-1) == b.argmax(axis=-1)).sum().item() / len(a)


def error(a, b):
    """Of the median step: where a mixture takes another expert, one step says little about the rest."""
    return np.median(np.linalg.norm(np.array(a - b), axis=-1))


def test_8_bit_codes_say_the_tokens_of_the_exact_cache(name, model, spoken):
    """Teacher-forced along tokens that the exact cache said: the next token is the same at >= 95 % of
    the steps. The codes are vecinfer's d1 x 256, trained on the instance's own keys and values."""
    tokens, exact = spoken
    layers = attention_layers(model)
    codebook = train_codebook(model, models.Tokenizer(), num_samples=32, num_subspaces=layers[0].head_dim)
    assert codebook.bits_per_element == (8, 8)

    calls = _ext.dequantize_calls()
    caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook, **SETTINGS))
    logits = forced(model, caches, tokens)
    print(f"{name}: {agreement(logits, exact):.0f} % of steps agree, error {error(logits, exact):.4f}")
    assert agreement(logits, exact) >= 95
    # The measure would notice: without what the codes hold it is far below.
    empty = KVCacheConfig(codebook=np.zeros((2, 8)), **SETTINGS)
    without = forced(model, KVCacheBuilder.build(model, empty), tokens)
    print(f"without the codes: {agreement(without, exact):.0f} %, error {error(without, exact):.4f}")
    assert agreement(without, exact) <= 90
    assert error(without, exact) > 10 * error(logits, exact)
    # All attention ran on the codes, and layers of other kinds have the caches of the model.
    assert (_ext.dequantize_calls() > calls) == (name in DEQUANTISED)
    ours = [cache_of(caches, layer) for layer in layers]
    assert all(type(cache) is VeloxQuantKVCache and cache.bits_per_element == 8 for cache in ours)
    native = [type(c) for c in flat_caches(make_prompt_cache(model))]
    assert [type(c) for c in flat_caches(caches) if c not in ours] == [
        kind for kind in native if kind.__name__ != "KVCache"
    ]


def test_exact_tokens_give_the_logits_of_the_exact_cache(model, spoken):
    tokens, exact = spoken
    caches = KVCacheBuilder.build(model, KVCacheConfig(method="fp16", **SETTINGS))
    logits = forced(model, caches, tokens)
    assert mx.abs(logits - exact).max() < 5e-3 * mx.abs(exact).max()  # keys and values are rounded to fp16
    assert agreement(logits, exact) >= 99


def test_a_saved_cache_goes_on_with_the_same_logits(model, spoken, tmp_path):
    tokens, _ = spoken
    config = KVCacheConfig(codebook=np.random.default_rng(0).standard_normal((16, 2)), **SETTINGS)
    caches = KVCacheBuilder.build(model, config)
    model(tokens[None, :N_PROMPT], cache=caches)
    file = tmp_path / "a.safetensors"
    prompt_cache.save(file, caches)
    loaded = prompt_cache.load(file, model)
    assert [c.nbytes for c in loaded] == [c.nbytes for c in caches]
    step = tokens[None, N_PROMPT : N_PROMPT + 1]
    wanted = model(step, cache=copy.deepcopy(caches))
    assert mx.array_equal(model(step, cache=loaded), wanted).item()


def test_rows_of_a_batch_say_what_they_say_in_the_models_own_caches(name, model):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, models.VOCABULARY, n).tolist() for n in (90, 7, 130, 41)]

    class WordsOnly:  # batch_generate wants no more of a tokenizer than this
        eos_token_ids = ()
        detokenizer = None

        def decode(self, tokens):
            return ""

    def say():
        return generate.batch_generate(
            model, WordsOnly(), prompts, max_tokens=20, return_token_ids=True, return_prompt_caches=True
        )

    if name == "gemma2":  # mlx_lm's own attention of it does not take the mask of a batch
        wanted = []
        for prompt in prompts:
            steps = generate.generate_step(mx.array(prompt), model, max_tokens=20)
            wanted.append([token for token, _ in steps])
    else:
        wanted = say().token_ids
    install(model, KVCacheConfig(method="fp16", **SETTINGS))
    try:
        said = say()
    finally:
        object.__delattr__(model, "make_cache")
    assert said.token_ids == wanted
    for caches in said.caches:
        assert sum(type(c) is VeloxQuantKVCache for c in flat_caches(caches)) == len(attention_layers(model))


@pytest.mark.parametrize("name", models.LATENT)
def test_latent_attention_is_refused(name):
    with pytest.raises(ValueError, match=r"layer 0 keeps keys .* and values of .*, wanted .* latent attention \(MLA\)"):
        KVCacheBuilder.build(models.build(name), KVCacheConfig(method="fp16"))


def test_attention_that_cannot_be_reached_is_said_and_dequantised(caplog):
    model = models.build("plamo2")
    with caplog.at_level(logging.WARNING, "veloxquant_mlx"):
        caches = KVCacheBuilder.build(model, KVCacheConfig(method="fp16"))
    assert [record.args[0] for record in caplog.records] == [1, 3]
    assert "dequantised at every step" in caplog.text
    calls = _ext.dequantize_calls()
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))
    assert _ext.dequantize_calls() - calls == 2 * 2
    assert "dequantised" in caches[1].kernel


def test_a_model_that_reads_the_arrays_of_its_cache_is_told():
    cache = KVCacheBuilder.build(models.build("llama"), KVCacheConfig(method="fp16"))[0]
    for name in ("keys", "values"):
        assert not hasattr(cache, name)
        with pytest.raises(AttributeError, match="use the model's own cache"):
            getattr(cache, name)


def test_a_sliding_window_holds_no_more_than_it_shows():
    model = models.build("gemma3_text")
    caches = KVCacheBuilder.build(model, KVCacheConfig(method="fp16"))
    for step in range(100):
        mx.eval(model(mx.array([[step % models.VOCABULARY]]), cache=caches))
    assert [c.size() for c in caches] == [32, 100, 32, 100]


def test_a_layer_may_keep_several_caches():
    caches = KVCacheBuilder.build(models.build("falcon_h1"), KVCacheConfig(method="fp16"))
    assert all(type(c) is CacheList and type(c[1]) is VeloxQuantKVCache for c in caches)


def test_layers_of_several_shapes():
    """An array without a head axis serves them all; a trained codebook is of one shape, and says so."""
    model = models.build("openelm")
    assert [layer.n_kv_heads for layer in attention_layers(model)] == [1, 2, 3]
    tokens = mx.array(np.random.default_rng(1).integers(0, models.VOCABULARY, (1, 200)))
    exact = model(tokens)
    scalars = np.linspace(-4, 4, 256)[:, None]  # 8 bits: a scalar quantiser
    factors = np.full(64, 0.5)
    for options in (dict(method="fp16"), dict(codebook=scalars, smooth_factors=factors)):
        caches = KVCacheBuilder.build(model, KVCacheConfig(**options, **SETTINGS))
        logits = model(tokens, cache=caches)
        assert mx.linalg.norm(logits - exact).item() < 0.1 * mx.linalg.norm(exact).item()
    with pytest.raises(ValueError, match=r"several shapes \(1 x 64, 2 x 64, 3 x 64\), wanted one"):
        train_codebook(model, models.Tokenizer(), num_samples=1)
    with pytest.raises(ValueError, match="codebook: got shape"):
        KVCacheBuilder.build(model, KVCacheConfig(codebook=np.zeros((3, 2, 1, 16, 4))))


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 112, 120, 128, 192, 256])
@pytest.mark.parametrize("transform", ["hadamard", "learned"])
def test_any_head_size_that_is_a_multiple_of_8(head_dim, transform):
    model = models.build("llama", head_dim=head_dim)
    codebook = train_codebook(
        model, models.Tokenizer(), num_samples=4, num_centroids=16, num_subspaces=head_dim, transform=transform
    )
    tokens = mx.array(np.random.default_rng(1).integers(0, models.VOCABULARY, (1, 200)))
    calls = _ext.dequantize_calls()
    caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook, **SETTINGS))
    logits = model(tokens, cache=caches)
    exact = model(tokens)
    assert mx.linalg.norm(logits - exact).item() < 0.3 * mx.linalg.norm(exact).item()
    assert _ext.dequantize_calls() == calls


def test_other_head_sizes_are_refused():
    with pytest.raises(ValueError, match="got head_dim 20 in layer 0, wanted a multiple of 8"):
        KVCacheBuilder.build(models.build("llama", head_dim=20), KVCacheConfig(method="fp16"))
