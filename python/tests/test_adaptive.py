"""codebook="adaptive": exact first, then packed with tables fitted on the sequence itself."""

import copy
import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from veloxquant_mlx import _ext
from veloxquant_mlx.cache import adaptive, prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, install
from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache, shared_nbytes
from veloxquant_mlx.models.rope import detect_ropes


def build(model, **options):
    return KVCacheBuilder.build(model, KVCacheConfig(codebook="adaptive", **{"fit_tokens": 300, **options}))


def run(model, caches, tokens, chunk=100):
    logits = [model(tokens[None, i : i + chunk], cache=caches) for i in range(0, len(tokens), chunk)]
    mx.eval(logits, [c.state for c in caches])
    return np.array(mx.concatenate(logits, axis=1)[0])


def test_exact_until_enough_tokens_have_come_then_packed(tiny_model, tokens):
    caches = build(tiny_model)
    exact = build(tiny_model, fit_tokens=10**6)
    assert np.array_equal(run(tiny_model, caches, tokens[:300]), run(tiny_model, exact, tokens[:300]))
    assert [c.bits_per_element for c in caches] == [16] * 3 and caches[0].fit_report is None
    before = caches[0].nbytes
    run(tiny_model, caches, tokens[300:400])
    assert [c.bits_per_element for c in caches] == [2] * 3 and caches[1].offset == 400
    report = caches[1].fit_report
    assert report.tokens == 300 and report.seconds > 0 and len(report.relative_error["keys"]) == 2
    # The tables are the sequence's own: counted in nbytes, not as shared.
    tables = sum(codec.nbytes for codec in caches[0].codecs)
    assert shared_nbytes(caches) == 0 and caches[0].nbytes == tables + caches[0]._core.nbytes
    assert caches[0]._core.nbytes < before


def test_nearer_to_the_exact_model_than_tables_that_know_nothing(tiny_model, tables, tokens):
    def distance(caches):
        run(tiny_model, caches, tokens[:400], 400)
        return np.abs(run(tiny_model, caches, tokens[400:500]) - exact).mean()

    reference = make_prompt_cache(tiny_model)
    run(tiny_model, reference, tokens[:400], 400)
    exact = run(tiny_model, reference, tokens[400:500])
    fitted = distance(build(tiny_model, strict=True))
    assert fitted < 0.7 * distance(KVCacheBuilder.build(tiny_model, KVCacheConfig(codebook=tables, strict=True)))


def test_the_fit_is_deterministic_and_sees_the_queries(tiny_model, tokens):
    first, second = build(tiny_model), build(tiny_model)
    for caches in (first, second):
        run(tiny_model, caches, tokens[:400])
    for a, b in zip(first, second):
        for one, other in zip(a._core.arrays(), b._core.arrays()):
            assert mx.array_equal(one, other)
        keys, values = a.codecs
        assert "query_matrix" in keys.arrays  # the metric of the queries makes it another matrix
        assert "query_matrix" not in values.arrays


def test_what_a_fit_costs_is_reported(tiny_model, tokens):
    """Copies of the history of both sides, one side's slice and its fp32 transform: heads 2, head_dim 64."""
    for per, times in (("subvector", 1), ("head", 2)):
        caches = build(tiny_model, fit_per=per)
        run(tiny_model, caches, tokens[:350], 350)
        run(tiny_model, caches, tokens[350:351])
        report = caches[0].fit_report
        assert report.tokens == 300
        # Keys and three copies of them at later positions.
        assert report.peak_bytes == 2 * 64 * (2 * 2 * 350 + 4 * 296 * (2 + 4 * times))


def held_error(cache, keys):
    """Of the codes of the last 100 tokens: relative, squared."""
    held = np.array(cache.fetch()[0].dequantize(), np.float32)[:, :, -200:-100]
    wanted = np.array(keys, np.float32)[:, :, -200:-100]
    return ((held - wanted) ** 2).sum() / (wanted**2).sum()


def test_later_positions_lose_no_more_than_the_first(tiny_model):
    """Keys of a constant direction before RoPE, as real ones have: tables that never saw their angles lose them."""
    rng = np.random.default_rng(4)
    plain = 4 * rng.standard_normal((1, 2, 1, 64)) + 0.3 * rng.standard_normal((1, 2, 3000, 64))
    rope = detect_ropes(tiny_model)[0].core()
    keys = rope.rotate(mx.array(plain.astype(np.float32)), mx.arange(3000))
    errors = {}
    for context in (1, 1000, 4096):
        (cache, *_) = build(tiny_model, fit_context=context)
        for start in range(0, 3000, 300):
            part = keys[:, :, start : start + 300]
            cache.update_and_fetch(part, part)
        errors[context] = held_error(cache, keys)
    # A context of 1 grows to 600 and 2,400 tokens, 1,000 to 4,000: they fit again on the way.
    assert max(errors.values()) < 0.02
    unknown = [dataclasses.replace(c._fit.plan, rope=None) for c in build(tiny_model)]
    cache = VeloxQuantKVCache(build(tiny_model)[0]._make_codecs, fit_plan=unknown[0])
    for start in range(0, 3000, 300):
        part = keys[:, :, start : start + 300]
        cache.update_and_fetch(part, part)
    assert cache._fit is None and held_error(cache, keys) > 3 * max(errors.values())


def test_a_sequence_that_outgrows_its_context_fits_again(tmp_path, tiny_model, tokens):
    caches = build(tiny_model, fit_context=450)
    run(tiny_model, caches, tokens[:400])
    first, seen = caches[0].fit_report, caches[0]._fit.moments.count
    assert first.tokens == 300 and caches[0]._fit.again and caches[0]._fit.plan.tokens == 600
    prompt_cache.save(tmp_path / "a.safetensors", caches)  # between the fits
    loaded = prompt_cache.load(tmp_path / "a.safetensors", tiny_model)
    after = [run(tiny_model, c, tokens[400:], 100) for c in (caches, loaded)]
    assert np.array_equal(*after)
    for cache in (*caches, *loaded):
        assert cache.fit_report.tokens == 600 and cache._fit.plan.tokens == 2400
        assert cache.offset == 700 and cache.bits_per_element == 2
        assert cache._fit.moments.count == seen  # queries of the prompt, not of every step
    tables = [c.codecs[0].arrays["tables"] for c in (caches[0], loaded[0])]
    assert mx.array_equal(*tables)


def test_the_fit_does_not_depend_on_the_pieces_that_tokens_come_in(tiny_model, tokens):
    keys, values = (mx.random.normal((1, 2, 700, 64), key=mx.random.key(i)) for i in range(2))
    states = []
    for step in (1, 7, 100, 350):
        (cache, *_) = build(tiny_model)
        for start in range(0, 700, step):
            cache.update_and_fetch(keys[:, :, start : start + step], values[:, :, start : start + step])
        states.append([a for codec in cache.codecs for _, a in sorted(codec.arrays.items())])
        assert cache.fit_report.tokens == 300
    for other in states[1:]:
        assert all(mx.array_equal(a, b).item() for a, b in zip(states[0], other, strict=True))


@pytest.mark.parametrize("filled", [0, 200, 400])
def test_a_saved_conversation_goes_on_the_same(tmp_path, tiny_model, tokens, filled):
    """Before the first token, before the fit, after it."""
    caches = build(tiny_model)
    twin = copy.deepcopy(caches)
    if filled:
        for c in (caches, twin):
            run(tiny_model, c, tokens[:filled], 200)
        prompt_cache.save(tmp_path / "a.safetensors", caches)
        caches = prompt_cache.load(tmp_path / "a.safetensors", tiny_model)
        assert [c.nbytes for c in caches] == [c.nbytes for c in twin]
    after = [run(tiny_model, c, tokens[filled:700], 150) for c in (caches, twin)]
    assert np.array_equal(*after)
    assert caches[0].bits_per_element == 2


def test_copies_and_trims_do_not_share_what_was_seen(tiny_model, tokens):
    caches = build(tiny_model)
    run(tiny_model, caches, tokens[:200])
    twin = copy.deepcopy(caches)
    seen = caches[0]._fit.moments.count
    run(tiny_model, twin, tokens[200:260])
    assert caches[0]._fit.moments.count == seen < twin[0]._fit.moments.count
    for c in caches:
        c.trim(150)
    run(tiny_model, caches, tokens[50:350])
    assert [c.bits_per_element for c in caches] == [16] * 3  # 350 tokens, but the fit waits for the next update
    run(tiny_model, caches, tokens[350:351])
    assert [c.bits_per_element for c in caches] == [2] * 3


@pytest.mark.parametrize("batch", [1, 2])
def test_the_history_of_exact_codecs_in_order(batch):
    rng = np.random.default_rng(2)
    keys = mx.array(rng.standard_normal((batch, 2, 333, 16)), dtype=mx.float16)
    for sinks, lengths in ((4, (333,)), (0, (100, 233)), (4, (3,)), (80, (60, 273))):
        core = _ext.ArrayCache(*adaptive.starting_codecs(2, 16, mx.float16), 64, sinks, mx.float16)
        start = 0
        for n in lengths:
            core.update(keys[:, :, start : start + n], -keys[:, :, start : start + n])
            start += n
        for x, sign in zip(adaptive.exact_history(core, sinks, mx.float16), (1, -1)):
            assert mx.array_equal(x, sign * keys[:, :, :start])
        core.trim(start // 2)
        kept, _ = adaptive.exact_history(core, sinks, mx.float16)
        assert mx.array_equal(kept, keys[:, :, : start - start // 2])


def test_rows_of_a_batch_fit_their_own_tables(tiny_model, tokens):
    rows = [build(tiny_model), build(tiny_model)]
    run(tiny_model, rows[0], tokens[:400])
    run(tiny_model, rows[1], tokens[300:450])
    batch = [VeloxQuantKVCache.merge([a, b]) for a, b in zip(*rows)]
    step = mx.stack([tokens[400:401], tokens[450:451]])
    mx.eval(tiny_model(step, cache=batch))
    assert [row.bits_per_element for row in batch[0].rows] == [2, 16]
    assert shared_nbytes(batch) == 0
    # 150 + 200 more: the second row fits at its own pace, with its own queries.
    seen = batch[0].rows[1]._fit.moments.count
    mx.eval(tiny_model(mx.stack([tokens[:200], tokens[:200]]), cache=batch))
    assert batch[0].rows[1]._fit.moments.count == seen + 2 * 200
    mx.eval(tiny_model(step, cache=batch))
    assert [row.bits_per_element for row in batch[0].rows] == [2, 2]


def test_mlx_lm_drives_it(tiny_model, tokens):
    install(tiny_model, KVCacheConfig(codebook="adaptive", fit_tokens=64))
    caches = make_prompt_cache(tiny_model)
    assert all(isinstance(c, VeloxQuantKVCache) for c in caches)
    answer = [t for t, _ in generate_step(tokens[:200], tiny_model, max_tokens=30, prompt_cache=caches)]
    assert len(answer) == 30 and caches[0].bits_per_element == 2
    assert not any(isinstance(c, KVCache) for c in caches)


def degenerate(kind):
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((1, 2, 200, 64)).astype(np.float32)
    if kind == "constant channels":
        keys[..., ::3] = 2.5
    elif kind == "zero":
        keys[:] = 0
    elif kind == "one token repeated":
        keys[:] = keys[:, :, :1]
    elif kind == "not finite":
        keys[0, 0, 7, 3], keys[0, 1, 90, 1] = np.nan, np.inf
    return mx.array(keys)


@pytest.mark.parametrize("kind", ["constant channels", "zero", "one token repeated", "not finite"])
@pytest.mark.parametrize("fit_tokens", [1, 20, 200])  # fewer vectors than centroids, too
def test_degenerate_tokens_give_finite_results(tiny_model, kind, fit_tokens):
    (cache,) = build(tiny_model, fit_tokens=fit_tokens, window=0, sinks=0)[:1]
    x = degenerate(kind)
    for start, stop in ((0, fit_tokens), (fit_tokens, 260)):
        part = x[:, :, start:stop] if start < 200 else x[:, :, :60]
        cache.update_and_fetch(part, part)
        cache.observe_queries(mx.repeat(part, 2, axis=1))
    assert cache.bits_per_element == 2
    dense = cache.fetch()[0].dequantize()
    assert mx.isfinite(dense).all().item()


def test_a_prompt_of_one_token_and_sequences_that_share_a_cache(tiny_model, tokens):
    caches = build(tiny_model, fit_tokens=1)
    said = [t for t, _ in generate_step(tokens[:1], tiny_model, max_tokens=100, prompt_cache=caches)]
    assert len(said) == 100 and caches[0].bits_per_element == 2 and caches[0].fit_report.tokens == 1
    logits = tiny_model(tokens[None, :1], cache=caches)
    assert mx.isfinite(logits).all().item()

    caches = build(tiny_model)
    both = mx.stack([tokens[:350], tokens[350:700]])
    mx.eval(tiny_model(both, cache=caches))
    mx.eval(tiny_model(both[:, :1], cache=caches))
    tables = caches[0].codecs[0].arrays["tables"]
    (alone, *_) = single = build(tiny_model)
    mx.eval(tiny_model(both[:1], cache=single))
    mx.eval(tiny_model(both[:1, :1], cache=single))
    assert not mx.array_equal(tables, alone.codecs[0].arrays["tables"])  # both were seen


@pytest.mark.parametrize("options, message", [
    ({"codebook": "adaptiv"}, "codebook: got 'adaptiv'"),
    ({"fit_tokens": 0}, "fit_tokens: got 0"),
    ({"fit_per": "layer"}, "fit_per: got 'layer'"),
    ({"bits": 5}, "bits: got 5"),
    ({"value_bits": 7}, "bits: got 7"),
    ({"method": "fp16"}, "method: got 'fp16' with codebook='adaptive'"),
    ({"num_subspaces": 16}, "num_subspaces: got one"),
])  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        KVCacheConfig(**{"codebook": "adaptive", **options})
