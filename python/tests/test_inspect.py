"""veloxquant inspect of saved prompt caches and of errors by layer: every byte is accounted for."""

import json
import os

import architectures as models
import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx.allocators.vecinfer import calibrate
from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.cache.layout import flat_caches
from veloxquant_mlx.cli import main


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def filled(model, config, n=300):
    caches = KVCacheBuilder.build(model, config)
    mx.eval(model(mx.array(np.random.default_rng(0).integers(0, models.VOCABULARY, (1, n))), cache=caches))
    return caches


TABLES = np.random.default_rng(0).standard_normal((256, 4)).astype(np.float32)


def test_scalars_of_a_token_are_told_apart_from_its_codes(run, tmp_path):
    file = str(tmp_path / "a.safetensors")
    prompt_cache.save(file, filled(models.build("llama"), KVCacheConfig(method="turboquant", bits=2)))
    code, out, err = run("inspect", file, "--json")
    assert code == 0, err
    (found,) = json.loads(out)["prompt_caches"]
    for layer in found["layers"]:  # 2 KV heads, 3 blocks of 64 tokens of 64 dimensions
        assert layer["bytes"]["key_codes"] == layer["bytes"]["value_codes"] == 2 * 3 * 64 * 64 // 4
        assert layer["bytes"]["scalars"] == 2 * (2 * 3 * 64 * 2)


def test_a_prompt_cache_byte_by_byte(run, tmp_path):
    model = models.build("llama")  # 2 layers of 2 KV heads of 64
    file = str(tmp_path / "a.safetensors")
    caches = filled(model, KVCacheConfig(codebook=TABLES))
    prompt_cache.save(file, caches, {"title": "a talk"})
    code, out, err = run("inspect", file, "--json")
    assert code == 0, err
    (found,) = json.loads(out)["prompt_caches"]
    assert (found["state"], found["tokens"], found["metadata"]) == ("whole", 300, {"title": "a talk"})
    assert found["file_bytes"] == os.path.getsize(file) and found["model"] == caches[0].fingerprint
    for layer, cache in zip(found["layers"], caches, strict=True):
        parts = layer["bytes"]
        # 3 blocks of 64 tokens have left the window: a code of one byte for four elements.
        assert parts["key_codes"] == parts["value_codes"] == 2 * 3 * 64 * 16
        assert parts["scalars"] == 0
        assert parts["sinks"] == 2 * 2 * 4 * 64 * 2
        assert parts["tables"] == cache.shared_nbytes
        assert sum(parts.values()) == cache.nbytes + cache.shared_nbytes
        assert layer["bits_per_element"] == [2, 2] and layer["codecs"] == ["vecinfer d4x256"] * 2
    assert found["bytes"]["key_codes"] == 2 * 2 * 3 * 64 * 16

    code, out, err = run("inspect", file)
    assert code == 0, err
    for text in ("300 tokens", "title: a talk", "vecinfer d4x256", "2 / 2", "key codes", "sinks", str(2 * 3 * 64 * 16)):
        assert text in out


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoehybrid", "falcon_h1"])
def test_caches_of_other_kinds_beside_ours(run, tmp_path, name):
    caches = filled(models.build(name), KVCacheConfig(method="fp16"))
    file = str(tmp_path / "a.safetensors")
    prompt_cache.save(file, caches)
    (found,) = json.loads(run("inspect", file, "--json")[1])["prompt_caches"]
    flat = list(flat_caches(caches))
    assert [layer["kind"] for layer in found["layers"]] == [type(c).__name__ for c in flat]
    ours = [isinstance(c, VeloxQuantKVCache) for c in flat]
    assert any(ours) and not all(ours)
    assert [sum(layer["bytes"].values()) for layer in found["layers"]] == [c.nbytes for c in flat]
    assert run("inspect", file)[0] == 0


def test_a_directory_shows_its_caches_and_a_damaged_one_is_said(run, tmp_path):
    model = models.build("llama")
    files = [tmp_path / f"{name}.safetensors" for name in ("good", "bad")]
    for file in files:
        prompt_cache.save(file, filled(model, KVCacheConfig(method="fp16"), 70))
    data = bytearray(files[1].read_bytes())
    data[-5] ^= 4
    files[1].write_bytes(data)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"w": mx.zeros((3,))})  # none of ours
    code, out, _ = run("inspect", str(tmp_path), "--json")
    states = {cache["name"]: cache["state"] for cache in json.loads(out)["prompt_caches"]}
    assert code == 1 and states.keys() == {"good.safetensors", "bad.safetensors"}
    assert states["good.safetensors"] == "whole" and "the file is damaged" in states["bad.safetensors"]
    code, out, _ = run("inspect", str(tmp_path))
    assert code == 1 and "the file is damaged" in " ".join(out.split())


def test_errors_by_layer_of_an_artifact(run, tmp_path):
    model = models.build("llama")
    _, codebook = calibrate(model, models.Tokenizer(), bits=2, num_tokens=600)
    NpyArtifactStore(tmp_path).save("codebook", codebook)
    (found,) = json.loads(run("inspect", str(tmp_path), "--json")[1])["artifacts"]
    for side in ("keys", "values"):
        by_layer = found["relative_error_by_layer"][side]
        assert by_layer == pytest.approx(np.mean(codebook.relative_error[side], axis=1))
        assert found["relative_error"][side] == pytest.approx(np.mean(by_layer))
    out = run("inspect", str(tmp_path))[1]
    assert f"{100 * found['relative_error_by_layer']['values'][1]:.3f} %" in out
