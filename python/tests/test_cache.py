"""The cache inside a model: what it holds, what it computes, what it refuses."""

import copy
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, install
from veloxquant_mlx.cache.codecs import exact, vecinfer
from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache, lookup_nbytes, shared_nbytes

generate_step = sys.modules["mlx_lm.generate"].generate_step  # as veloxquant_mlx.cache.base extends it


def run(model, cache, tokens, chunk):
    logits = [model(tokens[None, i : i + chunk], cache=cache) for i in range(0, len(tokens), chunk)]
    out = mx.concatenate(logits, axis=1)[0]
    mx.eval(out)
    return np.array(out)


def state_bytes(cache):
    return [[np.array(a.view(mx.uint8)).tobytes() for a in c.state[1:]] + [c.state[0]] for c in cache]


def test_exact_method_equals_mlx(tiny_model, tokens):
    exact = run(tiny_model, make_prompt_cache(tiny_model), tokens, 100)
    ours = run(tiny_model, KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16")), tokens, 100)
    # The only difference is that keys and values are rounded to fp16.
    assert np.abs(ours - exact).max() < 2e-3 * np.abs(exact).max()


def test_forms_of_tables_that_look_ups_keep_are_counted_once(tiny_model, tables, tokens):
    cache, other = (KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables)) for _ in range(2))
    run(tiny_model, cache, tokens, 690)  # the last 10 attend on codes
    run(tiny_model, other, tokens, 700)  # one pass decodes tiles
    in_registers = "register" in cache[0].kernel
    for layer in cache:
        # One table a head: fp16 columns of keys, two planes of bytes and a step a dimension of values.
        assert layer.lookup_nbytes == (2 * 4 * (256 * 2 + 256 * 2 + 4) if in_registers else 0)
    assert lookup_nbytes(cache) == sum(layer.lookup_nbytes for layer in cache)
    assert lookup_nbytes(other) == 0


def test_generates_the_same_tokens_as_mlx_with_the_exact_method(tiny_model, tokens):
    def generate(**kwargs):
        return [t for t, _ in generate_step(tokens[:300], tiny_model, max_tokens=40, **kwargs)]

    ours = KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16"))
    assert generate(kv_cache=ours) == generate()
    assert ours[0].offset in (340, 341)  # mlx_lm computes one step ahead


@pytest.mark.parametrize("method", ["fp16", "vecinfer"])
def test_any_chunking_of_the_same_tokens_gives_the_same_bytes(tables, method):
    rng = np.random.default_rng(3)
    keys = mx.array(rng.standard_normal((2, 3, 700, 64)), dtype=mx.float32)
    values = mx.array(rng.standard_normal((2, 3, 700, 64)), dtype=mx.float32)

    def fill(sizes):
        tables4 = mx.array(np.broadcast_to(tables, (3, 1, 256, 4)))
        if method == "fp16":
            codecs = [exact.codec(side, 3, 64, mx.float16) for side in ("keys", "values")]
        else:
            codecs = [vecinfer.codec(side, tables4, 16) for side in ("keys", "values")]
        cache = _ext.ArrayCache(*codecs, 64, 4, mx.float16)
        start = 0
        for n in sizes:
            cache.update(keys[:, :, start : start + n], values[:, :, start : start + n])
            start += n
        return b"".join(np.array(mx.concatenate([s.flatten() for s in side], 0)).tobytes() for side in spans(cache))

    def spans(cache):
        snapshot = cache.snapshot()
        return [[s.swapaxes(1, 2).swapaxes(0, 1) for s in side.spans] for side in snapshot]

    assert fill([700]) == fill([1] * 700) == fill([63, 1, 64, 65, 128, 379])


def test_strict_equals_token_by_token(tiny_model, tables, tokens):
    config = KVCacheConfig(codebook=tables, strict=True, window=10, sinks=3)
    caches = [KVCacheBuilder.build(tiny_model, config) for _ in range(3)]
    whole = run(tiny_model, caches[0], tokens[:400], 400)
    steps = run(tiny_model, caches[1], tokens[:400], 1)
    chunks = run(tiny_model, caches[2], tokens[:400], 77)
    assert np.median(np.abs(whole - steps)) < 1e-4 * np.abs(steps).max()
    assert np.median(np.abs(whole - chunks)) < 1e-4 * np.abs(steps).max()
    loose = run(tiny_model, KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables)), tokens[:400], 400)
    assert np.abs(whole - loose).max() > 1e-2 * np.abs(steps).max()  # strict really sees codes


def test_nbytes_is_the_formula_and_what_the_arrays_hold(tiny_model, tables, tokens):
    cache = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
    run(tiny_model, cache, tokens, 700)
    blocks = (700 - 4 - 64) // 64
    packed = 2 * 2 * blocks * 64 * 16  # sides x heads x tokens x 16 codes of 8 bits
    exact = 2 * 2 * (4 + 64 + 64) * 64 * 2
    assert cache[0].nbytes == packed + exact == sum(a.nbytes for a in cache[0].state[2:]) - cache[0].shared_nbytes
    assert cache[0].bits_per_element == 2
    assert shared_nbytes(cache) == sum(c.shared_nbytes for c in cache) > 0


def test_resident_memory_is_what_nbytes_says():
    """8k tokens of an 8B-shaped layer set, grown step by step as a model would."""

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    rng = np.random.default_rng(0)
    tables = mx.array(rng.standard_normal((8, 1, 256, 4)).astype(np.float32))
    codecs = [vecinfer.codec(side, tables, 32) for side in ("keys", "values")]
    caches = [_ext.ArrayCache(*codecs, 64, 4, mx.float16) for _ in range(16)]
    chunk = mx.array(rng.standard_normal((1, 8, 512, 128)), dtype=mx.float32)
    token = chunk[:, :, :1]
    mx.eval(chunk)
    before = resident()
    for step in range(16 + 64):
        for cache in caches:
            cache.update(*[chunk if step < 16 else token] * 2)
        mx.eval([cache.arrays() for cache in caches])
    grown = resident() - before
    nbytes = sum(cache.nbytes for cache in caches)
    assert caches[0].length == 8192 + 64
    assert nbytes > 70e6
    assert grown <= 1.2 * nbytes + 32e6


def test_a_decode_step_at_8k_needs_little_memory():
    rng = np.random.default_rng(0)
    tables = mx.array(rng.standard_normal((8, 1, 256, 4)).astype(np.float32))
    codecs = [vecinfer.codec(side, tables, 32) for side in ("keys", "values")]
    cache = _ext.ArrayCache(*codecs, 64, 4, mx.float16)
    history = mx.array(rng.standard_normal((1, 8, 8192, 128)), dtype=mx.float32)
    cache.update(history, history)
    mx.eval(cache.arrays())
    del history
    token = mx.array(rng.standard_normal((1, 8, 1, 128)), dtype=mx.float32)
    q = mx.array(rng.standard_normal((1, 32, 1, 128)), dtype=mx.float32)
    mx.eval(token, q)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out, _ = _ext.attend(q, *cache.update(token, token), scale=0.1)
    mx.eval(out, cache.arrays())
    assert mx.get_peak_memory() - before < 2e6


def test_attention_reads_the_codes(tiny_model, tables, tokens):
    cache = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
    calls = _ext.dequantize_calls()
    run(tiny_model, cache, tokens[:300], 300)
    before = run(tiny_model, copy.deepcopy(cache), tokens[300:301], 1)
    core = cache[1]._core
    arrays = core.arrays()
    codes = np.array(arrays[2])
    codes[0, 0, 0, 5] ^= 0x40
    core.restore(arrays[:2] + [mx.array(codes)] + arrays[3:], core.positions())
    after = run(tiny_model, cache, tokens[300:301], 1)
    assert not np.array_equal(before, after)
    assert _ext.dequantize_calls() == calls


def test_without_the_fused_attention_history_is_dequantised_and_counted(tiny_model, tables, tokens, caplog):
    fused = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
    with caplog.at_level("WARNING", "veloxquant_mlx"):
        dense = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables, use_fused_sdpa=False))
    assert "dequantised" in caplog.text
    calls = _ext.dequantize_calls()
    a = run(tiny_model, fused, tokens[:300], 60)
    b = run(tiny_model, dense, tokens[:300], 60)
    assert _ext.dequantize_calls() - calls == 5 * 3 * 2
    assert np.abs(a - b).max() < 5e-3 * np.abs(a).max()


def test_trim_and_deepcopy(tiny_model, tables, tokens):
    config = KVCacheConfig(codebook=tables, strict=True)
    cache = KVCacheBuilder.build(tiny_model, config)
    # In the chunks that are run again below: a BLAS may round another number of rows differently.
    run(tiny_model, cache, tokens[:480], 480)
    run(tiny_model, cache, tokens[480:500], 20)
    twin = copy.deepcopy(cache)
    for c in cache:
        assert c.trim(20) == 20
    # Trimming within the exact tail and running again gives the bytes of never having trimmed.
    run(tiny_model, cache, tokens[480:500], 20)
    assert [c.offset for c in cache] == [500] * 3
    assert state_bytes(cache)[0] == state_bytes(twin)[0]
    for c in cache:
        assert c.trim(300) == 300  # into sealed blocks
    assert [c.offset for c in twin] == [500] * 3
    logits = run(tiny_model, cache, tokens[200:260], 60)
    assert np.isfinite(logits).all() and cache[0].offset == 260
    for c in cache:
        assert c.trim(10**6) == 260
    assert cache[0].empty()


def test_half_precision_models(tiny_model, tables, tokens):
    for dtype in (mx.float16, mx.bfloat16):
        tiny_model.set_dtype(dtype)
        cache = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
        logits = tiny_model(tokens[None, :200], cache=cache)
        assert logits.dtype == dtype
        assert cache[0]._core.arrays()[0].dtype == dtype
        assert bool(mx.isfinite(logits).all())


def test_nonfinite_keys_are_replaced_and_counted(tables):
    tables4 = mx.array(np.broadcast_to(tables, (1, 1, 256, 4)))
    codecs = [vecinfer.codec(side, tables4, 16) for side in ("keys", "values")]
    cache = _ext.ArrayCache(*codecs, 0, 0, mx.float16)
    keys = mx.zeros((1, 1, 70, 64))
    keys[0, 0, 3, :3] = mx.array([float("nan"), float("inf"), -1e9])
    out, lse = _ext.attend(mx.ones((1, 2, 70, 64)), *cache.update(keys, keys), scale=1e-4, causal=True)
    mx.eval(out, lse, cache.arrays())
    assert cache.nonfinite == 6
    assert bool(mx.isfinite(out).all())


def test_install_makes_every_new_cache_ours(tiny_model, tables):
    install(tiny_model, KVCacheConfig(codebook=tables))
    first, second = make_prompt_cache(tiny_model), make_prompt_cache(tiny_model)
    assert all(isinstance(c, VeloxQuantKVCache) for c in first + second)
    assert first[0] is not second[0]
    # Building again sees the model's own caches, not the installed ones.
    assert KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16"))[0].nbytes == 0


def test_lazy_nothing_is_evaluated_by_an_update(tiny_model, tables, tokens):
    cache = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
    mx.eval(tokens)
    before = mx.get_active_memory()
    logits = tiny_model(tokens[None], cache=cache)
    assert mx.get_active_memory() - before < 1e6
    mx.eval(logits)
    assert mx.get_active_memory() - before > 1e5


@pytest.mark.parametrize(
    "arguments, names",
    [
        (dict(method="vecinfr"), "method"),
        (dict(method="vecinfer"), "codebook"),
        (dict(method="vecinfer", bits=7), "bits"),
        (dict(method="fp16", window=-1), "window"),
        (dict(method="fp16", sinks=1.5), "sinks"),
        (dict(codebook=np.zeros((256, 5))), "codebook"),
        (dict(codebook=np.zeros((5000, 4))), "codebook"),
        (dict(codebook=np.full((256, 4), np.nan)), "codebook"),
        (dict(codebook="no array"), "codebook"),
        (dict(codebook=np.ones((16, 4)), smooth_factors=np.ones(63)), "smooth_factors"),
        (dict(codebook=np.ones((16, 4)), smooth_factors=np.zeros(64)), "smooth_factors"),
        (dict(codebook=np.ones((16, 4)), num_subspaces=8), "num_subspaces"),
        (dict(codebook=np.ones((16, 4)), strict=True, use_fused_sdpa=False), "strict"),
    ],
)
def test_bad_configuration_is_one_sentence_that_names_the_field(tiny_model, arguments, names):
    with pytest.raises(ValueError) as error:
        KVCacheBuilder.build(tiny_model, KVCacheConfig(**arguments))
    text = str(error.value)
    assert names in text and "got" in text and "wanted" in text and "\n" not in text


def test_kv_bits_beside_our_cache_is_refused(tiny_model, tables, tokens):
    cache = KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables))
    with pytest.raises(ValueError, match="kv_bits: got 4"):
        next(generate_step(tokens, tiny_model, kv_cache=cache, kv_bits=4))
    with pytest.raises(ValueError, match="kv_cache"):
        next(generate_step(tokens, tiny_model, kv_cache=cache, prompt_cache=cache))
    assert next(generate_step(tokens, tiny_model, kv_bits=4)) is not None  # mlx_lm's own stays as it is


def test_other_caches_are_served_as_before(tiny_model, tokens):
    KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16"))
    plain = [KVCache() for _ in tiny_model.layers]
    assert run(tiny_model, plain, tokens[:50], 50).shape == (50, 200)


def test_wrong_shapes_are_refused_before_anything_changes(tables):
    tables4 = mx.array(np.broadcast_to(tables, (2, 1, 256, 4)))
    codecs = [vecinfer.codec(side, tables4, 16) for side in ("keys", "values")]
    cache = _ext.ArrayCache(*codecs, 64, 4, mx.float16)
    for keys, values in [
        (mx.zeros((1, 3, 5, 64)), mx.zeros((1, 3, 5, 64))),
        (mx.zeros((1, 2, 5, 32)), mx.zeros((1, 2, 5, 32))),
        (mx.zeros((1, 2, 5, 64)), mx.zeros((1, 2, 4, 64))),
        (mx.zeros((2, 5, 64)), mx.zeros((2, 5, 64))),
        (mx.zeros((1, 2, 5, 64), dtype=mx.int32), mx.zeros((1, 2, 5, 64), dtype=mx.int32)),
    ]:
        with pytest.raises(ValueError, match="got"):
            cache.update(keys, values)
    assert cache.length == 0
    keys, values = cache.update(mx.zeros((1, 2, 5, 64)), mx.zeros((1, 2, 5, 64)))
    with pytest.raises(ValueError, match="queries"):
        _ext.attend(mx.zeros((1, 3, 5, 64)), keys, values, scale=1.0)
    with pytest.raises(ValueError, match="mask"):
        _ext.attend(mx.zeros((1, 4, 5, 64)), keys, values, scale=1.0, mask=mx.zeros((5, 7)))
