"""Batches: every row says and holds what it would alone, whatever is merged, padded, filtered."""

import copy
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_model as tiny
from mlx_lm.models import base
from mlx_lm.models.cache import BatchKVCache, load_prompt_cache, save_prompt_cache

from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, install
from veloxquant_mlx.cache.batch import BatchVeloxQuantKVCache
from veloxquant_mlx.cache.codecs import exact, vecinfer
from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.metal.fused_sdpa import patch_mlx_lm_for_fused_sdpa

generate = sys.modules["mlx_lm.generate"]
LENGTHS = [230, 5, 131, 64, 300, 1, 68, 200]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return mlx_lm.load(str(tiny.save(tmp_path_factory.mktemp("model") / "tiny")))


def config(method, tables, **kwargs):
    return KVCacheConfig(method=method, codebook=tables if method == "vecinfer" else None, **kwargs)


def prompts(lengths=LENGTHS):
    return [np.random.default_rng(n).integers(0, 256, n).tolist() for n in lengths]


def alone(model, caches, prompt, max_tokens, prefill_step_size=2048):
    steps = generate.generate_step(
        mx.array(prompt), model, max_tokens=max_tokens, prompt_cache=caches, prefill_step_size=prefill_step_size
    )
    return [t for t, _ in steps]


@pytest.mark.parametrize(
    "method, options",
    [
        ("fp16", dict()),
        ("vecinfer", dict()),
        ("vecinfer", dict(prefill_step_size=50)),
        # Rows join and leave while others speak: extend and filter.
        ("vecinfer", dict(prefill_batch_size=2, completion_batch_size=3)),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_rows_say_and_hold_what_they_would_alone(loaded, tables, method, options, fused):
    model, tokenizer = loaded
    cfg = config(method, tables, strict=fused, use_fused_sdpa=fused)
    max_tokens = [40, 70, 20, 33, 40, 90, 12, 40]
    install(model, cfg)
    try:
        response = generate.batch_generate(
            model,
            tokenizer,
            prompts(),
            max_tokens=max_tokens,
            return_prompt_caches=True,
            return_token_ids=True,
            **options,
        )
    finally:
        object.__delattr__(model, "make_cache")
    for prompt, n, tokens, caches in zip(prompts(), max_tokens, response.token_ids, response.caches, strict=True):
        own = KVCacheBuilder.build(model, cfg)
        # A row that met its end-of-text token is shorter by that token.
        said = alone(model, own, prompt, n, options.get("prefill_step_size", 2048))
        assert tokens == said[: len(tokens)] and len(tokens) >= min(n, said.index(256) if 256 in said else n)
        for a, b in zip(own, caches, strict=True):
            assert isinstance(b, VeloxQuantKVCache)
            a.trim(a.offset - b.offset)
            assert b.offset >= len(prompt) + len(tokens) - 1
            assert a._core.positions() == b._core.positions() and a.nbytes == b.nbytes
        for p, q in zip(*(c[0]._core.arrays()[2:] for c in (own, caches)), strict=True):
            assert (np.array(p) == np.array(q)).mean() > 0.999  # MLX's own sums differ with the batch


def test_a_batch_goes_on_from_saved_caches(loaded, tables, tmp_path):
    model, tokenizer = loaded
    cfg = config("vecinfer", tables, strict=True)
    first, second = prompts([150, 280, 3]), prompts([20, 7, 90])
    caches = []
    for i, prompt in enumerate(first):
        caches.append(KVCacheBuilder.build(model, cfg))
        model(mx.array(prompt)[None], cache=caches[-1])
        prompt_cache.save(tmp_path / f"{i}.safetensors", caches[-1])
    files = [prompt_cache.load(tmp_path / f"{i}.safetensors", model) for i in range(3)]
    response = generate.batch_generate(
        model, tokenizer, second, prompt_caches=files, max_tokens=30, return_token_ids=True
    )
    for own, prompt, tokens in zip(caches, second, response.token_ids, strict=True):
        assert tokens == alone(model, own, prompt, 30)[: len(tokens)]
    assert [f[0].offset for f in files] == [150, 280, 3]  # given caches stay as they are


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [7, 40, 100])
def test_padding_is_never_stored(loaded, tables, side, chunk):
    model, _ = loaded
    cfg = config("fp16", tables)
    lengths = [90, 100, 1, 33]
    padding = [100 - n for n in lengths]
    rows = prompts(lengths)
    fill = [[0] * p for p in padding]
    padded = mx.array([f + r if side == "left" else r + f for r, f in zip(rows, fill)])
    batch = [c.merge([copy.deepcopy(c) for _ in rows]) for c in KVCacheBuilder.build(model, cfg)]
    for c in batch:
        if side == "left":
            c.prepare(left_padding=padding)
            assert c.offset.tolist() == [-p for p in padding]
        else:
            c.prepare(lengths=lengths, right_padding=padding)
    parts = [model(padded[:, i : i + chunk], cache=batch) for i in range(0, 100, chunk)]
    for c in batch:
        c.finalize()
        assert c.offset.tolist() == lengths and c.size() == 100
        assert c.left_padding.tolist() == padding
    logits = mx.concatenate(parts, axis=1)
    steps = model(mx.array([[3]] * 4), cache=batch)
    for i, (row, n) in enumerate(zip(rows, lengths)):
        own = KVCacheBuilder.build(model, cfg)
        wanted = model(mx.array([row]), cache=own)
        at = slice(100 - n, 100) if side == "left" else slice(0, n)
        assert mx.abs(logits[i, at] - wanted[0]).max() < 1e-2 * mx.abs(wanted).max()
        wanted = model(mx.array([[3]]), cache=own)
        assert mx.abs(steps[i] - wanted[0]).max() < 1e-2 * mx.abs(wanted).max()
        assert [c.extract(i).nbytes for c in batch] == [c.nbytes for c in own]


@pytest.mark.parametrize("window", [None, 9])
def test_masks_are_mlx_lms(window):
    ours = BatchVeloxQuantKVCache(
        VeloxQuantKVCache(lambda dtype: [exact.codec(side, 1, 8, dtype) for side in ("keys", "values")])
        for _ in range(2)
    )
    theirs = BatchKVCache([3, 0])
    ours.prepare(left_padding=[3, 0])
    for n in (5, 4, 1):
        a, b = (c.make_mask(n, window_size=window) for c in (ours, theirs))
        assert a.dtype == mx.bool_ and isinstance(a, mx.array)
        assert mx.array_equal(a, b).item() and a.shape == b.shape
        assert mx.array_equal(ours.offset, theirs.offset).item()
        for c in (ours, theirs):
            c.update_and_fetch(*[mx.zeros((2, 1, n, 8))] * 2)


def test_a_windowed_mask_reaches_every_row():
    """Rows of different lengths under a sliding window, against MLX's attention on dense keys."""
    rng = np.random.default_rng(0)
    patch_mlx_lm_for_fused_sdpa()
    caches = []
    for n in (30, 50, 11):
        caches.append(VeloxQuantKVCache(lambda dtype: [exact.codec(s, 1, 8, dtype) for s in ("keys", "values")]))
        caches[-1].update_and_fetch(*[mx.array(rng.standard_normal((1, 1, n, 8)), dtype=mx.float32)] * 2)
    batch = VeloxQuantKVCache.merge(caches)
    mask = batch.make_mask(4, window_size=12)
    x = mx.array(rng.standard_normal((3, 1, 4, 8)), dtype=mx.float32)
    out = base.scaled_dot_product_attention(x, *batch.update_and_fetch(x, x), batch, scale=0.3, mask=mask)
    for i in range(3):
        dense = batch.rows[i].fetch()[0].dequantize()
        own = base.create_causal_mask(4, dense.shape[2] - 4, window_size=12)
        wanted = mx.fast.scaled_dot_product_attention(x[i : i + 1], dense, dense, scale=0.3, mask=own)
        assert mx.allclose(out[i], wanted[0], atol=2e-3).item()


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="caches"):
        VeloxQuantKVCache.merge([BatchKVCache([0])])
    batch = VeloxQuantKVCache.merge([VeloxQuantKVCache(None)] * 2)
    with pytest.raises(ValueError, match="lengths"):
        batch.prepare(right_padding=[0, 3])


def test_500_random_sequences_against_a_list_of_tokens(tmp_path):
    """append, trim, merge, extend, filter, extract, copy, save, load: each row is its tokens.

    A token is a number; its key is that number in every dimension, its value the negative. They
    come back as they were from exact caches, and from codes whose table has all the numbers.
    """
    numbers = np.repeat(np.arange(256, dtype=np.float32)[:, None], 8, axis=1)[None, None]
    codecs_of = {
        "exact": [exact.codec(side, 1, 8, mx.float16) for side in ("keys", "values")],
        "codes": [
            vecinfer.codec(side, sign * numbers, 1, hadamard=False) for side, sign in (("keys", 1), ("values", -1))
        ],
    }

    def make():
        codecs = codecs_of[rng.choice(list(codecs_of))]
        return VeloxQuantKVCache(
            lambda dtype: codecs, window=int(rng.integers(0, 70)), sinks=int(rng.integers(0, 6)), fused=False
        )

    def dense(tokens):
        return np.repeat(np.array(tokens, np.float32)[None, None, :, None], 8, axis=3)

    def append(batch, rows, counts):
        width = max(counts)
        if width == 0:
            return
        batch.prepare(lengths=counts, right_padding=[width - n for n in counts])
        new = rng.integers(0, 256, (len(rows), width))
        x = mx.array(np.concatenate([dense(row) for row in new]))
        keys, values = batch.update_and_fetch(x, -x)
        batch.finalize()
        for row, tokens, n in zip(rows, new, counts):
            row.extend(tokens[:n].tolist())
        return keys, values

    for seed in range(500):
        rng = np.random.default_rng(seed)
        batch, rows = BatchVeloxQuantKVCache.merge([make() for _ in range(3)]), [[], [], []]
        for _ in range(8):
            what = rng.choice(["append", "append", "trim", "extend", "filter", "extract", "copy", "file"])
            if what == "append":
                append(batch, rows, [int(n) for n in rng.integers(0, 150, len(rows))])
            elif what == "trim":
                n = int(rng.integers(0, 100))
                batch.trim(n)
                rows = [row[: max(0, len(row) - n)] for row in rows]
            elif what == "extend" and len(rows) < 6:
                other, tokens = BatchVeloxQuantKVCache.merge([make()]), [[]]
                append(other, tokens, [int(rng.integers(1, 150))])
                batch.extend(other)
                rows += tokens
            elif what == "filter" and len(rows) > 1:
                keep = sorted(rng.choice(len(rows), size=len(rows) - 1, replace=False).tolist())
                batch.filter(keep)
                rows = [rows[i] for i in keep]
            elif what == "extract":
                single = [batch.extract(i) for i in range(len(rows))]
                batch = VeloxQuantKVCache.merge(single)
            elif what == "copy":
                batch = copy.deepcopy(batch)
            elif what == "file" and all(row.codecs for row in batch.rows):
                file = str(tmp_path / "a.safetensors")
                if rng.integers(2):
                    prompt_cache.save(file, batch.rows)
                    batch = VeloxQuantKVCache.merge(prompt_cache.load(file))
                else:
                    save_prompt_cache(file, [batch])
                    (batch,) = load_prompt_cache(file)
            assert batch.offset.tolist() == [len(row) for row in rows], f"seed {seed}"
        for cache, row in zip(batch.rows, rows):
            if row:
                keys, values = cache.fetch()
                assert np.array_equal(np.array(keys), dense(row)), f"seed {seed}"
                assert np.array_equal(np.array(values), -dense(row)), f"seed {seed}"
