"""Learned rotations: what calibration gathers for them, scores, memory, artifacts, refusals."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import tiny_model
from mlx_lm.models import llama

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.recording import (
    ATTENTION_STEP,
    CODED_AGE,
    SINK_TOKENS,
    attention_got,
    collect,
    token_weights,
    undo_rope,
    window_positions,
)
from veloxquant_mlx.allocators.vecinfer import calibrate, calibrate_smooth_factors, train_codebook
from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codebook import SmoothFactors
from veloxquant_mlx.cache.kv_cache import shared_nbytes
from veloxquant_mlx.models import load_model
from veloxquant_mlx.models.rope import detect_ropes

TEXT = "How vexingly quick daft zebras jump; 5 boxing wizards jump quickly. Pack my box with jugs! "


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(tiny_model.save(tmp_path_factory.mktemp("learned") / "tiny")))


@pytest.fixture(scope="module")
def texts():
    words = (TEXT * 60).split()
    np.random.default_rng(0).shuffle(words)
    return [" ".join(words)]


@pytest.fixture(scope="module")
def calibrated(loaded, texts):
    return calibrate(*loaded, bits=2, texts=texts, num_tokens=2048, transform="learned")


def test_query_moments_are_those_of_the_queries_that_attention_gets(loaded, texts, monkeypatch):
    model, tokenizer = loaded
    seen = []
    attention = llama.scaled_dot_product_attention

    def spy(queries, *arguments, **options):
        seen.append(np.array(queries.astype(mx.float32)))
        return attention(queries, *arguments, **options)

    KVCacheBuilder.build(model, KVCacheConfig(method="fp16"))  # hooks mlx_lm's attention
    attention = llama.scaled_dot_product_attention
    monkeypatch.setattr(llama, "scaled_dot_product_attention", spy)
    moments = collect(model, tokenizer, 250, texts).query_moments  # one window
    groups = tiny_model.N_HEADS // tiny_model.N_KV_HEADS
    for layer, queries in enumerate(seen[-tiny_model.N_LAYERS :]):
        per_head = np.square(queries[0]).mean(axis=1)
        wanted = per_head.reshape(-1, groups, tiny_model.HEAD_DIM).mean(axis=1)
        np.testing.assert_allclose(moments[layer], wanted, rtol=1e-4)


def test_attention_that_tokens_get_is_that_of_the_queries_that_see_codes():
    rng, n = np.random.default_rng(4), 100
    queries, keys = rng.standard_normal((4, n, 16)), rng.standard_normal((2, n, 16))
    got = np.array(attention_got(mx.array(queries.astype(np.float32)), mx.array(keys.astype(np.float32))))
    wanted = np.zeros((2, 2, n))
    for head in range(4):
        for t in range(n % ATTENTION_STEP, n, ATTENTION_STEP):
            scores = np.exp(queries[head, t] @ keys[head // 2, : t + 1].T / 4)
            p = (scores / scores.sum())[: max(0, t + 1 - CODED_AGE)]
            wanted[0, head // 2, : len(p)] += p
            wanted[1, head // 2, : len(p)] += p**2
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    for weights, side, power in zip(token_weights(wanted), wanted, (0.3, 0.5)):
        shares = np.clip(side / side.mean(axis=1, keepdims=True), 1e-3, 1e3)
        np.testing.assert_allclose(weights, shares**power, rtol=1e-5)
    assert (token_weights(np.zeros((2, 2, 5)))[0] > 0).all()


def test_recorded_weights_are_of_the_tokens_that_are_trained_on(loaded, texts):
    data = collect(*loaded, 600, texts)
    for i, x in enumerate(data.keys):
        for side in data.token_weights:
            assert side[i].shape == tuple(x.shape[:2]) and (side[i] > 0).all()
    # Of the last tokens of a window no query sees codes.
    last = data.token_weights[0][:, :, -CODED_AGE:]
    assert (last == last.min()).all() and (data.token_weights[0] > 2 * last.min()).any()


def test_tables_by_lane(loaded, texts):
    """Sub-vectors share tables 4 by 4 (keys) and 8 by 8; more of them are nearer than one for all."""
    model, tokenizer = loaded
    errors = {}
    for per in ("head", "lane", "subvector"):
        _, codebook = calibrate(
            model, tokenizer, texts=texts, num_tokens=2048, transform="learned", codebook_per=per, entries="int8"
        )
        errors[per] = np.mean([codebook.relative_error[side] for side in ("keys", "values")])
        if per != "lane":
            continue
        for tables, lanes in ((codebook.keys, 4), (codebook.values, 8)):
            many = tables.shape[2]
            assert many == tiny_model.HEAD_DIM // 4
            assert all((tables[:, :, m] == tables[:, :, m % lanes]).all() for m in range(many))
            assert all((tables[:, :, m] != tables[:, :, 0]).any() for m in range(1, min(lanes, many)))
        caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook))
        model(mx.array([list(range(300))]) % 256, cache=caches)
        assert shared_nbytes(caches) == codebook.nbytes  # what is held: a table for each sub-vector
    assert errors["subvector"] < errors["lane"] < errors["head"]


def test_scores_are_closer_than_with_hadamard(loaded, texts, calibrated):
    """Mean (q . (k - k^))^2 over another text, queries drawn with the moments that were measured."""
    model, tokenizer = loaded
    factors, learned = calibrated
    hadamard = train_codebook(model, tokenizer, factors, num_samples=16, texts=texts, transform="hadamard")
    keys = collect(model, tokenizer, 600, [texts[0][-2000:]]).keys
    rng = np.random.default_rng(1)
    errors = {"hadamard": [], "learned": []}
    for codebook in (hadamard, learned):
        caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook, sinks=0))
        for layer, (cache, k) in enumerate(zip(caches, keys)):
            k = k[None]
            cache.update_and_fetch(k, k)  # a chunk still sees itself as exact
            encoded, _ = cache.update_and_fetch(k[:, :, -1:], k[:, :, -1:])
            n = k.shape[2] - 128  # all of these are packed
            error = np.array((encoded.dequantize()[:, :, :n] - k[:, :, :n]).astype(mx.float32))[0]
            scale = np.sqrt(factors.query_moments[layer])[:, None]
            q = scale * rng.standard_normal((error.shape[0], 64, error.shape[2]))
            errors[codebook.transform].append(np.square(np.einsum("hqd,htd->hqt", q, error)).mean())
    # Random weights make keys without structure: a real model gains far more.
    assert np.mean(errors["learned"]) < np.mean(errors["hadamard"])


def test_shared_bytes_count_a_value_rotation_once(loaded, calibrated):
    model, _ = loaded
    _, codebook = calibrated
    caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook))
    model(mx.array([[1, 2, 3]]), cache=caches)
    matrix = tiny_model.N_LAYERS * tiny_model.N_KV_HEADS * tiny_model.HEAD_DIM**2 * 4
    tables = codebook.keys.nbytes + codebook.values.nbytes
    assert shared_nbytes(caches) == codebook.nbytes == tables + 3 * matrix


def test_packed_attention_equals_attention_on_the_decoded_history(loaded, calibrated):
    model, _ = loaded
    tokens = mx.array(np.random.default_rng(2).integers(0, 256, (1, 300)))
    logits = []
    for fused in (True, False):
        config = KVCacheConfig(codebook=calibrated[1], use_fused_sdpa=fused)
        caches = KVCacheBuilder.build(model, config)
        model(tokens[:, :280], cache=caches)
        logits.append(np.array(model(tokens[:, 280:], cache=caches)))
    assert np.abs(logits[0] - logits[1]).max() < 2e-2 * np.abs(logits[1]).max()


def test_artifacts_come_back_bit_for_bit(loaded, calibrated, tmp_path):
    factors, codebook = calibrated
    store = NpyArtifactStore(tmp_path)
    store.save("smooth", factors)
    store.save("codebook", codebook)
    again, book = store.load("smooth"), store.load("codebook")
    assert again.tobytes() == factors.tobytes() and again.fingerprint == factors.fingerprint
    assert again.query_moments.tobytes() == factors.query_moments.tobytes()
    assert (book.transform, book.relative_error) == ("learned", codebook.relative_error)
    for field in dataclasses.fields(codebook.rotations):
        wanted, got = getattr(codebook.rotations, field.name), getattr(book.rotations, field.name)
        assert got.dtype == np.float32 and got.tobytes() == wanted.tobytes()
    assert book.keys.tobytes() == codebook.keys.tobytes()
    KVCacheBuilder.build(loaded[0], KVCacheConfig(codebook=book, smooth_factors=again))


def test_a_prompt_cache_goes_on_with_the_same_logits(loaded, calibrated, tmp_path):
    model, _ = loaded
    tokens = mx.array(np.random.default_rng(3).integers(0, 256, (1, 300)))
    caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=calibrated[1]))
    model(tokens, cache=caches)
    prompt_cache.save(str(tmp_path / "prompt.safetensors"), caches)
    again = prompt_cache.load(str(tmp_path / "prompt.safetensors"), model)
    logits = [np.array(model(mx.array([[7]]), cache=c)) for c in (caches, again)]
    assert (logits[0] == logits[1]).all()


def test_moments_are_taken_from_the_factors_or_gathered(loaded, texts):
    model, tokenizer = loaded
    factors = calibrate_smooth_factors(model, tokenizer, num_samples=4, texts=texts)
    without = SmoothFactors(np.array(factors), factors.fingerprint)
    assert factors.query_moments.shape == factors.shape and without.query_moments is None
    options = {"num_samples": 4, "num_centroids": 16, "texts": texts, "transform": "learned"}
    weights = [
        train_codebook(model, tokenizer, smooth_factors=given, **options).rotations.key_weights
        for given in (factors, without, None)
    ]
    assert (weights[0] == weights[1]).all() and (weights[0] == weights[2]).all()  # the same text
    flat = SmoothFactors(np.array(factors), factors.fingerprint, np.ones_like(factors))
    assert (train_codebook(model, tokenizer, smooth_factors=flat, **options).rotations.key_weights == 1).all()


def test_matrices_are_dual(calibrated):
    matrices = calibrated[1].rotations.key_matrices(0)
    product = np.array(matrices["encode_matrix"]) @ np.array(matrices["query_matrix"]).transpose(0, 2, 1)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(tiny_model.HEAD_DIM), product.shape), atol=1e-5)


def test_refusals(loaded, texts, calibrated, monkeypatch):
    model, tokenizer = loaded
    factors, codebook = calibrated
    with pytest.raises(ValueError, match="transform: got 'dct'"):
        calibrate(model, tokenizer, texts=texts, transform="dct")
    with pytest.raises(ValueError, match="rotations: got none with transform 'learned'"):
        dataclasses.replace(codebook, rotations=None)
    with pytest.raises(ValueError, match="smooth_factors: got an array"):
        KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook, smooth_factors=np.array(factors)))
    with pytest.raises(ValueError, match="one matrix"):
        _ext.train_tables(mx.zeros((1, 8, 8)), encode_matrix=mx.eye(8)[None], n_subvectors=2, n_centroids=2, n_tables=1)
    # A model that calls MLX's attention directly never shows its queries.
    monkeypatch.setattr(llama, "scaled_dot_product_attention", _direct_attention)
    monkeypatch.setattr(model, "_veloxquant_unrouted", None, raising=False)
    data = collect(model, tokenizer, 200, texts)
    assert data.query_moments is None and data.token_weights is None
    with pytest.raises(ValueError, match="does not show its queries"):
        calibrate(model, tokenizer, texts=texts, num_tokens=200, transform="learned")


def _direct_attention(queries, keys, values, cache, scale, mask=None):
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def test_windows_are_spread_over_the_context(loaded):
    """Only RoPE sees where a window begins: keys turn, values and scores stay."""
    model, tokenizer = loaded
    texts = ["The five boxing wizards jump quickly over lazy dogs. " * 100]
    near, far = (collect(model, tokenizer, 600, texts, context=context) for context in (256, 8192))
    assert near.windows == [(0, 256), (0, 256), (0, 88)]
    assert far.windows == [(0, 256), (3968, 256), (7936, 88)]
    positions = far.positions()
    assert len(positions) == far.keys[0].shape[1] == 600 - 3 * SINK_TOKENS
    assert positions[0] == SINK_TOKENS and positions[252] == 3968 + SINK_TOKENS
    assert window_positions(24576, 2048) == [(0, 2048)] * 12
    assert window_positions(3, 8192) == [(0, 3)]
    offsets = mx.array(positions - near.positions())
    for i, rope in enumerate(detect_ropes(model)):
        turned = rope.core().rotate(near.keys[i], offsets)
        size = mx.abs(turned).max().item()
        assert mx.abs(turned - far.keys[i]).max().item() < 0.02 * size
        assert mx.abs(near.keys[i] - far.keys[i]).max().item() > 0.2 * size
        assert mx.abs(near.values[i] - far.values[i]).max().item() < 0.02 * mx.abs(near.values[i]).max().item()
    plain = undo_rope(model, far).keys[0], undo_rope(model, near).keys[0]
    assert mx.abs(plain[0] - plain[1]).max().item() < 0.02 * mx.abs(plain[0]).max().item()
