"""CommVQ: the published look-up, training on a small model, the cache, its files."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from veloxquant_mlx.allocators.commvq import train_commvq
from veloxquant_mlx.allocators.vecinfer_rope import train_vecinfer_rope
from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.pre_rope import CommVQCodebook, RopePairCodebook
from veloxquant_mlx.metal._comm_vq import comm_vq_decode_metal
from veloxquant_mlx.models.rope import detect_ropes


def decode(indices, codebook, positions, inv_freq):
    """The definition, in numpy: indices [n, R, M], codebook [R, M, C, d]."""
    stages, books, size, sub_dim = codebook.shape
    codes = np.minimum(np.asarray(indices).astype(np.uint32), size - 1)
    gathered = sum(
        np.concatenate([codebook[r, m][codes[:, r, m]] for m in range(books)], axis=-1) for r in range(stages)
    ).astype(np.float64)
    angle = (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64)
    half = gathered.shape[1] // 2
    a, b = gathered[:, :half], gathered[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=1)


@pytest.fixture
def call():
    random = np.random.default_rng(0)
    return {
        "indices": random.integers(-1, 18, (2, 3, 40, 4)).astype(np.int32),
        "codebook": random.standard_normal((4, 16, 8)).astype(np.float32),
        "positions": random.integers(0, 100000, (2, 3, 40)).astype(np.int32),
        "inv_freq": (10000.0 ** -(np.arange(16) / 16)).astype(np.float32),
    }


def run(call, **changes):
    arguments = call | changes
    return comm_vq_decode_metal(*(mx.array(v) for v in arguments.values()), 4, 8, 16)


@pytest.mark.parametrize("dtype, tolerance", [(mx.float32, 1e-5), (mx.float16, 1e-2), (mx.bfloat16, 8e-2)])
def test_decode_is_the_definition(call, dtype, tolerance):
    out = run(call, codebook=mx.array(call["codebook"]).astype(dtype))
    assert out.dtype == dtype and out.shape == (2, 3, 40, 32)
    expected = decode(
        call["indices"].reshape(-1, 1, 4), call["codebook"][None], call["positions"].reshape(-1), call["inv_freq"]
    )
    np.testing.assert_allclose(np.array(out.astype(mx.float32)).reshape(-1, 32), expected, atol=tolerance)


def test_decode_adds_residual_stages(call):
    random = np.random.default_rng(1)
    indices = random.integers(0, 16, (40, 3, 4)).astype(np.uint8)
    codebook = random.standard_normal((3, 4, 16, 8)).astype(np.float32)
    positions = call["positions"][0, 0]
    out = run(call, indices=indices, codebook=codebook, positions=positions)
    np.testing.assert_allclose(np.array(out), decode(indices, codebook, positions, call["inv_freq"]), atol=2e-5)


def test_decode_broadcasts_positions_and_takes_what_is_not_contiguous(call):
    positions = np.arange(40, dtype=np.int64)
    whole = run(call, positions=np.broadcast_to(positions, (2, 3, 40)).copy())
    assert mx.array_equal(run(call, positions=positions), whole)
    turned = mx.array(np.ascontiguousarray(call["indices"].swapaxes(0, 2))).swapaxes(0, 2)
    assert mx.array_equal(run(call, indices=turned, positions=positions), whole)
    compiled = mx.compile(lambda i, c, p, f: comm_vq_decode_metal(i, c, p, f, 4, 8, 16))
    got = compiled(*(mx.array(v) for v in (call | {"positions": positions}).values()))
    assert mx.array_equal(got, whole)


def test_decode_of_nothing(call):
    out = run(call, indices=np.zeros((2, 0, 4), np.int32), positions=np.zeros((2, 0), np.int32))
    assert out.shape == (2, 0, 32)
    scalar = run(call, indices=np.zeros(4, np.int32), positions=np.array(0, np.int32))
    assert scalar.shape == (32,)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"codebook": np.zeros((4, 16, 7), np.float32)}, "codebook: got"),
        ({"codebook": np.zeros((4, 16, 8), np.int32)}, "codebook: got"),
        ({"indices": np.zeros((2, 3, 40, 5), np.int32)}, "indices: got"),
        ({"indices": np.zeros((2, 3, 40, 4), np.float32)}, "indices: got"),
        ({"positions": np.zeros((2, 40), np.int32)}, "positions: got"),
        ({"positions": np.zeros((2, 3, 40), np.float32)}, "positions: got"),
        ({"inv_freq": np.zeros(15, np.float32)}, "inv_freq: got"),
    ],
)
def test_decode_refuses_what_does_not_fit(call, changes, words):
    with pytest.raises(ValueError, match=words):
        run(call, **changes)


def test_decode_refuses_an_odd_head(call):
    with pytest.raises(ValueError, match="must be even"):
        comm_vq_decode_metal(*(mx.array(v) for v in call.values()), 3, 3, 16)


class Letters:
    """A tokenizer of the tiny model's 200 tokens."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) % 200 for c in text]


TEXT = ["".join(chr(33 + int(i)) for i in np.random.default_rng(2).integers(0, 90, 600))]


@pytest.fixture
def tokens():
    """Of the kind that the codebook was trained on."""
    return mx.array(np.random.default_rng(4).integers(33, 123, 700))


@pytest.fixture
def codebook(tiny_model):
    return train_commvq(tiny_model, Letters(), bits=1, num_tokens=600, texts=TEXT, max_steps=3)


def test_training_reports_and_fits(tiny_model, codebook):
    seen = []
    again = train_commvq(
        tiny_model, Letters(), bits=1, num_tokens=600, texts=TEXT, max_steps=3, progress=lambda f, t: seen.append(f)
    )
    assert np.array_equal(again.keys, codebook.keys) and np.array_equal(again.values, codebook.values)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0) and len(seen) > 10
    assert codebook.keys.shape == (3, 2, 4, 64, 2, 32) and codebook.keys.dtype == np.float16
    assert np.all(np.isfinite(codebook.keys))
    assert np.array(codebook.relative_error["keys"]).shape == (3, 2)
    assert np.all(np.array(codebook.relative_error["keys"]) < 0.9)


def test_cache_holds_packed_keys_that_come_back_near(tiny_model, codebook, tokens):
    config = KVCacheConfig(method="commvq", bits=1, codebook=codebook, window=64, sinks=4)
    exact = KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16"))
    caches = KVCacheBuilder.build(tiny_model, config)
    tiny_model(tokens[None], cache=exact)
    tiny_model(tokens[None], cache=caches)
    for cache, plain in zip(caches, exact):
        key_codec, value_codec = cache.codecs
        assert key_codec.bits_per_element == 1.0 and value_codec.bits_per_element == 1.0
        # 9 blocks of 64 tokens, 2 heads: keys and values 8 bytes a token each.
        packed = 9 * 64 * 2 * (8 + 8)
        exact_bytes = (4 + 64 + 64) * 2 * 2 * 64 * 2
        assert cache.nbytes <= packed + exact_bytes + 0.02 * packed
    # The first layer has seen the same tokens in both: its keys are those of the model, nearly.
    got = caches[0].fetch()[0].dequantize().astype(mx.float32)
    wanted = exact[0].fetch()[0].dequantize().astype(mx.float32)
    sealed = slice(4, 4 + 64 * 9)
    error = mx.square(got - wanted)[:, :, sealed].sum() / mx.square(wanted)[:, :, sealed].sum()
    assert error.item() < 0.02  # the first layer's keys before RoPE depend on the token alone
    assert mx.abs(got - wanted)[:, :, :4].max().item() < 1e-2


def test_generation_runs_token_by_token_as_in_one_pass(tiny_model, codebook, tokens):
    config = KVCacheConfig(method="commvq", bits=1, codebook=codebook, strict=True)
    whole, steps = KVCacheBuilder.build(tiny_model, config), KVCacheBuilder.build(tiny_model, config)
    at_once = tiny_model(tokens[None, :300], cache=whole)
    tiny_model(tokens[None, :290], cache=steps)
    for i in range(290, 300):
        last = tiny_model(tokens[None, i : i + 1], cache=steps)
    scale = mx.abs(at_once[0, -1]).max().item()
    assert mx.abs(last[0, -1] - at_once[0, -1]).max().item() < 0.02 * scale
    fresh = KVCacheBuilder.build(tiny_model, config)
    made = [t for t, _ in generate_step(tokens[:200], tiny_model, max_tokens=5, prompt_cache=fresh)]
    assert len(made) == 5


def test_keys_and_values_are_chosen_apart(tiny_model, codebook, tables, tokens):
    config = KVCacheConfig(method="commvq", codebook=codebook, value_codebook=tables)
    caches = KVCacheBuilder.build(tiny_model, config)
    tiny_model(tokens[None], cache=caches)
    assert [c.bits_per_element for c in caches[0].codecs] == [1.0, 2.0]
    mixed = KVCacheConfig(method="commvq", codebook=codebook, value_method="fp16")
    caches = KVCacheBuilder.build(tiny_model, mixed)
    tiny_model(tokens[None], cache=caches)
    assert [c.bits_per_element for c in caches[0].codecs] == [1.0, 16.0]


def test_store_keeps_every_bit(tmp_path, tiny_model, codebook):
    store = NpyArtifactStore(tmp_path)
    store.save("commvq", codebook)
    again = store.load("commvq")
    for field in ("keys", "weights", "values", "value_rotations"):
        assert np.array_equal(getattr(again, field), getattr(codebook, field))
        assert getattr(again, field).dtype == getattr(codebook, field).dtype
    assert again.fingerprint == codebook.fingerprint
    assert again.relative_error == json.loads(json.dumps(codebook.relative_error))
    KVCacheBuilder.build(tiny_model, KVCacheConfig(method="commvq", codebook=again))


def test_a_saved_prompt_cache_goes_on(tmp_path, tiny_model, codebook, tokens):
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

    caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(method="commvq", codebook=codebook))
    tiny_model(tokens[None, :300], cache=caches)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    ours = tiny_model(tokens[None, 300:301], cache=caches)
    theirs = tiny_model(tokens[None, 300:301], cache=loaded)
    assert mx.array_equal(ours, theirs)


def test_errors_name_the_field(tiny_model, codebook):
    with pytest.raises(ValueError, match=r"codebook: got none, wanted the result of train_commvq"):
        KVCacheConfig(method="commvq")
    with pytest.raises(ValueError, match=r"codebook: got ndarray"):
        KVCacheConfig(method="commvq", codebook=np.zeros((256, 4)))
    with pytest.raises(ValueError, match="another model"):
        other = CommVQCodebook(**(vars(codebook) | {"fingerprint": "x"}))
        KVCacheBuilder.build(tiny_model, KVCacheConfig(method="commvq", codebook=other))
    for arguments in ({"bits": 0}, {"bits": "2"}, {"value_bits": 5}, {"stages": 0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            train_commvq(tiny_model, Letters(), texts=TEXT, **arguments)


def test_the_tiny_model_turns_its_keys(tiny_model):
    assert all(rope.rotates and rope.rotary_dims == 64 for rope in detect_ropes(tiny_model))


@pytest.fixture
def pairs(tiny_model):
    return train_vecinfer_rope(tiny_model, Letters(), num_tokens=600, texts=TEXT)


def test_pairs_before_rope_in_a_cache(tmp_path, tiny_model, pairs, tokens):
    assert pairs.keys.shape == (3, 2, 16, 256, 4) and pairs.order.dtype == np.int32
    assert np.array_equal(np.sort(pairs.order, axis=-1), np.broadcast_to(np.arange(32), (3, 2, 32)))
    store = NpyArtifactStore(tmp_path)
    store.save("pairs", pairs)
    again = store.load("pairs")
    assert isinstance(again, RopePairCodebook)
    for name, array in pairs.arrays.items():
        assert np.array_equal(getattr(again, name), array) and getattr(again, name).dtype == array.dtype
    exact = KVCacheBuilder.build(tiny_model, KVCacheConfig(method="fp16"))
    caches = KVCacheBuilder.build(tiny_model, KVCacheConfig(method="vecinfer_rope", codebook=again))
    tiny_model(tokens[None], cache=exact)
    tiny_model(tokens[None], cache=caches)
    assert [c.bits_per_element for c in caches[0].codecs] == [2.0, 2.0]
    got, wanted = (c[0].fetch()[0].dequantize().astype(mx.float32)[:, :, 4:580] for c in (caches, exact))
    error = mx.square(got - wanted).sum() / mx.square(wanted).sum()
    assert error.item() < 0.02
    with pytest.raises(ValueError, match="wanted the result of train_vecinfer_rope"):
        KVCacheConfig(method="vecinfer_rope", codebook=np.zeros((256, 4)))
    with pytest.raises(ValueError, match="bits: got 8"):
        train_vecinfer_rope(tiny_model, Letters(), bits=8, texts=TEXT)
