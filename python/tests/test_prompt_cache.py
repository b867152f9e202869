"""Prompt caches on disk: a conversation goes on in a new process; damaged and forged files are refused."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_model as tiny
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache, trim_prompt_cache

from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig

generate_step = sys.modules["mlx_lm.generate"].generate_step

SAVE = {"ours": prompt_cache.save, "mlx_lm": save_prompt_cache}
IN_A_NEW_PROCESS = """
import json, sys
import veloxquant_mlx.cache.base
import mlx.core as mx, mlx_lm
from mlx_lm.models.cache import load_prompt_cache
from veloxquant_mlx.cache import prompt_cache
how, file, directory, dtype, tokens = sys.argv[1:]
model, _ = mlx_lm.load(directory)
model.set_dtype(getattr(mx, dtype))
caches = prompt_cache.load(file, model) if how == "ours" else load_prompt_cache(file)
step = sys.modules["mlx_lm.generate"].generate_step
print(json.dumps([t for t, _ in step(mx.array(json.loads(tokens)), model, max_tokens=30, prompt_cache=caches)]))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(directory):
    return mlx_lm.load(str(directory))[0]


def config(method, **kwargs):
    tables = np.random.default_rng(0).standard_normal((256, 4)).astype(np.float32)
    return KVCacheConfig(method=method, codebook=tables if method == "vecinfer" else None, **kwargs)


def prompt(n, seed=1):
    return mx.array(np.random.default_rng(seed).integers(0, 256, n))


def filled(model, method="vecinfer", n=400, **kwargs):
    caches = KVCacheBuilder.build(model, config(method, **kwargs))
    mx.eval(model(prompt(n)[None], cache=caches))
    return caches


def same_state(a, b):
    return all(
        x.state[0] == y.state[0] and all(mx.array_equal(p, q).item() for p, q in zip(x.state[1:], y.state[1:]))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("how", ["ours", "mlx_lm"])
@pytest.mark.parametrize(
    "method, dtype, trim",
    [("fp16", "float32", 0), ("vecinfer", "float32", 0), ("vecinfer", "float32", 250), ("vecinfer", "bfloat16", 0)],
)
def test_a_saved_conversation_goes_on_in_a_new_process(directory, tmp_path, how, method, dtype, trim):
    model, _ = mlx_lm.load(str(directory))
    model.set_dtype(getattr(mx, dtype))
    caches = KVCacheBuilder.build(model, config(method))
    turns = [prompt(n, seed=n) for n in (300, 40)]
    said = [[t for t, _ in generate_step(turns[0], model, max_tokens=20, prompt_cache=caches)]]
    if trim:
        assert trim_prompt_cache(caches, trim) == trim  # into sealed blocks
    file = str(tmp_path / "chat.safetensors")
    SAVE[how](file, caches)
    said.append([t for t, _ in generate_step(turns[1], model, max_tokens=30, prompt_cache=caches)])
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, how, file, str(directory), dtype, json.dumps(turns[1].tolist())]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == said[1]


@pytest.mark.parametrize("settings", [dict(), dict(strict=True, window=10, sinks=0), dict(use_fused_sdpa=False)])
@pytest.mark.parametrize("method", ["fp16", "vecinfer"])
def test_load_gives_back_every_byte_and_setting(model, tmp_path, method, settings):
    caches = filled(model, method, **settings)
    file = str(tmp_path / "a.safetensors")
    prompt_cache.save(file, caches, {"title": "a talk", "crc32": "version 1 crc32 00000000"})
    loaded, metadata = prompt_cache.load(file, model, return_metadata=True)
    assert metadata == {"title": "a talk", "crc32": "version 1 crc32 00000000"}
    assert same_state(loaded, caches)
    assert same_state(load_prompt_cache(file), caches)
    assert [c.nbytes for c in loaded] == [c.nbytes for c in caches]
    # The file holds the codes once, and little else: no page of 400 tokens of fp16.
    shared = sum(c.shared_nbytes for c in caches)
    assert os.path.getsize(file) < sum(c.nbytes for c in caches) + shared + 20_000
    again = str(tmp_path / "b.safetensors")
    save_prompt_cache(again, loaded, metadata)
    assert same_state(load_prompt_cache(again), caches)
    assert same_state(copy.deepcopy(loaded), caches)


def test_codes_in_a_file_are_token_major(model, tmp_path):
    caches = filled(model, n=200)
    file = str(tmp_path / "a.safetensors")
    prompt_cache.save(file, caches)
    spans = caches[0]._core.arrays()[2]  # [1, H, 2 blocks, 16 rows of 64 codes]
    blocks = np.array(spans).reshape(1, 2, 2, 16, 64)
    wanted = blocks.transpose(0, 1, 2, 4, 3).reshape(1, 2, 128, 16)
    position = 2 + len(caches[0].state) - 2 - 2  # the last two arrays are the key and the value span
    assert np.array_equal(np.array(mx.load(file)[f"0.{position}"]), wanted)


def test_an_unused_cache_is_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="never used"):
        prompt_cache.save(tmp_path / "a.safetensors", KVCacheBuilder.build(model, config("fp16")))
    with pytest.raises(ValueError, match="path"):
        prompt_cache.save(tmp_path / "a.bin", filled(model))
    with pytest.raises(ValueError, match="metadata"):
        prompt_cache.save(tmp_path / "a.safetensors", filled(model), {"a.b": "c"})
    save_prompt_cache(str(tmp_path / "a.safetensors"), KVCacheBuilder.build(model, config("fp16")))
    empty = load_prompt_cache(str(tmp_path / "a.safetensors"))
    assert empty[0].offset == 0
    with pytest.raises(ValueError, match="no codec"):
        model(prompt(5)[None], cache=empty)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]  # no temporary files


def test_killed_saves_leave_a_whole_file(model, directory, tmp_path):
    file = tmp_path / "a.safetensors"
    versions = [filled(model, n=n) for n in (150, 300)]
    prompt_cache.save(file, versions[0])
    code = (
        "import sys, itertools\nfrom veloxquant_mlx.cache import prompt_cache\n"
        "versions = [prompt_cache.load(f) for f in sys.argv[2:]]\nprint('ready', flush=True)\n"
        "for i in itertools.count(1): prompt_cache.save(sys.argv[1], versions[i % 2])"
    )
    sources = []
    for i, caches in enumerate(versions):
        sources.append(tmp_path / f"{i}.safetensors")
        prompt_cache.save(sources[-1], caches)
    rng = random.Random(1)
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", code, file, *sources], stdout=subprocess.PIPE)
        child.stdout.readline()
        for _ in range(5):
            time.sleep(rng.uniform(0, 0.02))
            assert prompt_cache.load(file, model)[0].offset in (150, 300)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        loaded = prompt_cache.load(file, model)
        assert same_state(loaded, versions[loaded[0].offset == 300])


# Damage: what a disk or a transfer does. Forgery: contents that do not fit, under right checksums.


def damaged(data):
    n = int.from_bytes(data[:8], "little")

    def flip(at, bit=0):
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    digits = data.index(b"crc32 ") + 6
    return {
        "empty": b"",
        "four bytes": data[:4],
        "length only": data[:8],
        "half a header": data[: 8 + n // 2],
        "header only": data[: 8 + n],
        "half": data[: len(data) // 2],
        "one byte short": data[:-1],
        "one byte more": data + b"\0",
        "flip in the length": flip(0),
        "flip in the high length": flip(7, 6),
        "flip in the header": flip(9),
        "flip in a name": flip(8 + n // 2),
        "flip in the padding": flip(8 + n - 1),
        "flip in the metadata": flip(data.index(b"a talk")),
        "flip in the checksum": flip(digits),
        "capital checksum": data[:digits] + b"ABCDEF00" + data[digits + 8 :],
        "flip in the first array": flip(8 + n),
        "flip in the middle": flip(8 + n + (len(data) - n) // 2, 3),
        "flip in the last byte": flip(len(data) - 1, 7),
        "zeros": bytes(len(data)),
        "text": b"not a cache at all, but long enough to look at",
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
        "header of brackets": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "arrays of another file": data[: 8 + n] + bytes(len(data) - 8 - n),
    }


def forged(file, out, change):
    """Applies change(arrays, metadata, header of layer 0), then makes every checksum right again."""
    from veloxquant_mlx import _ext

    arrays, metadata = mx.load(str(file), return_metadata=True)
    header = json.loads("".join(map(chr, arrays["0.0"].tolist())))
    change(arrays, metadata, header)
    text = json.dumps(header)
    arrays["0.0"] = mx.array([ord(c) for c in text])
    layer = [arrays[name] for name in sorted((n for n in arrays if n.startswith("0.")), key=lambda n: int(n[2:]))]
    arrays["0.1"] = _ext.checksum(text, layer[2:])
    mx.save_safetensors(str(out), arrays, metadata)
    data = out.read_bytes()
    with open(out, "rb") as f:
        if b"crc32 " in data:
            at = data.index(b"crc32 ") + 6
            data = data[:at] + b"%08x" % prompt_cache._crc32(f, at) + data[at + 8 :]
    out.write_bytes(data)


def set_header(**fields):
    return lambda arrays, metadata, header: header.update(fields)


def set_position(index, value):
    return lambda arrays, metadata, header: header["positions"].__setitem__(index, value)


def set_codec(name, value):
    return lambda arrays, metadata, header: header["codecs"][0].__setitem__(name, value)


def set_option(name, value):
    return lambda arrays, metadata, header: header["codecs"][0]["options"].__setitem__(name, value)


def set_array(name, make):
    return lambda arrays, metadata, header: arrays.__setitem__(name, make(arrays[name]))


def swap(a, b):
    def change(arrays, metadata, header):
        arrays[a], arrays[b] = arrays[b], arrays[a]

    return change


def swap_layers(arrays, metadata, header):
    zero = {n: arrays.pop(n) for n in list(arrays) if n.startswith("0.")}
    for name in [n for n in arrays if n.startswith("1.")]:
        arrays["0." + name[2:]] = arrays.pop(name)
    arrays.update({"1." + name[2:]: a for name, a in zero.items()})
    header.clear()
    header.update(json.loads("".join(map(chr, arrays["0.0"].tolist()))))


# Layer 0: 0.0 header, 0.1 checksum, 0.2 lambda, 0.3 key tables, 0.4 value tables, 0.5 and 0.6 exact
# keys and values, 0.7 key span, 0.8 value span. positions: length, tail start, start, blocks, count.
FORGERIES = {
    "next version of the state": set_header(version=3),
    "no version": set_header(version=None),
    "foreign format": set_header(format="other"),
    "unknown order": set_header(order="sideways"),
    "memory order": set_header(order="memory"),
    "negative length": set_position(0, -1),
    "huge length": set_position(0, 2**40),
    "length beyond the tail": set_position(0, 5000),
    "negative tail": set_position(1, -64),
    "negative start": set_position(2, -4),
    "huge block count": set_position(3, 2**40),
    "wrong block count": set_position(3, 4),
    "negative block count": set_position(3, -1),
    "count 65": set_position(4, 65),
    "count 0": set_position(4, 0),
    "position that overflows": set_position(0, 2**70),
    "position of text": set_position(0, "400"),
    "no positions": set_header(positions=[]),
    "positions left out": lambda arrays, metadata, header: header.pop("positions"),
    "negative window": set_header(window=-1),
    "huge window": set_header(window=2**31 - 1),
    "window of text": set_header(window="64"),
    "strict of text": set_header(strict="yes"),
    "no fingerprint": lambda arrays, metadata, header: header.pop("fingerprint"),
    "another dtype": set_header(exact_dtype="float64"),
    "bfloat16 for float16": set_header(exact_dtype="bfloat16"),
    "version before": set_header(version=1),
    "unknown method": set_codec("method", "gzip"),
    "more heads": set_codec("n_kv_heads", 3),
    "huge head_dim": set_codec("head_dim", 2**31 - 1),
    "huge n_subvectors": set_option("n_subvectors", 2**31 - 1),
    "zero n_subvectors": set_option("n_subvectors", 0),
    "n_subvectors that overflows": set_option("n_subvectors", 2**70),
    "n_subvectors of text": set_option("n_subvectors", "16"),
    "unknown option": set_option("colour", 3),
    "unknown transform": set_option("transform", "fourier"),
    "dense without matrices": set_option("transform", "dense"),
    "arrays of other names": set_codec("arrays", ["tables", "lambda"]),
    "more arrays than there are": set_codec("arrays", [str(i) for i in range(40)]),
    "one codec": lambda arrays, metadata, header: header["codecs"].pop(),
    "missing array": lambda arrays, metadata, header: arrays.pop("0.8"),
    "gap": lambda arrays, metadata, header: arrays.pop("0.5"),
    "one array more": lambda arrays, metadata, header: arrays.__setitem__("0.9", mx.zeros((3,))),
    "far array": lambda arrays, metadata, header: arrays.__setitem__("99999999.0", mx.zeros((3,))),
    "swapped kinds": swap("0.2", "0.7"),
    "swapped exact and codes": swap("0.5", "0.8"),
    "exact keys in float32": set_array("0.5", lambda a: a.astype(mx.float32)),
    "spans as int8": set_array("0.7", lambda a: a.view(mx.int8)),
    "tables in float32": set_array("0.3", lambda a: a.astype(mx.float32)),
    "no scale": set_array("0.2", lambda a: a * 0),
    "flat span": set_array("0.7", lambda a: a.flatten()),
    "short span": set_array("0.8", lambda a: a[:, :, 1:]),
    "two sequences of values": set_array("0.8", lambda a: mx.concatenate([a, a])),
    "scalar exact keys": set_array("0.5", lambda a: mx.array(1.0, dtype=mx.float16)),
    "next version of the file": lambda a, metadata, h: metadata.update({"0.veloxquant": "version 2 crc32 00000000"}),
    "no version of the file": lambda arrays, metadata, header: metadata.pop("0.veloxquant"),
    "no metadata": lambda arrays, metadata, header: metadata.clear(),
    "unknown class": lambda arrays, metadata, header: metadata.update({"1.0": "mx"}),
    "another class": lambda arrays, metadata, header: metadata.update({"1.0": "KVCache"}),
    "one layer": lambda arrays, metadata, header: metadata.pop("1.1"),
    "swapped layers": swap_layers,
}


def assert_refused(file, model):
    with pytest.raises(ValueError) as error:
        prompt_cache.load(file, model)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "got" in str(error.value) or "wanted" in str(error.value)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "chat.safetensors"
    prompt_cache.save(file, filled(model), {"title": "a talk"})
    assert prompt_cache.load(file, model)[0].offset == 400
    return file


def test_damaged_files_are_refused(model, saved, tmp_path):
    file = tmp_path / "bad.safetensors"
    for name, data in damaged(saved.read_bytes()).items():
        file.write_bytes(data)
        try:
            assert_refused(file, model)
        except BaseException as error:
            raise AssertionError(name) from error
    save_prompt_cache(str(file), filled(model))
    assert_refused(file, model)  # has no checksum of the whole


def test_any_flipped_bit_is_found(model, saved, tmp_path):
    file, rng, data = tmp_path / "bad.safetensors", random.Random(3), saved.read_bytes()
    arrays_at = 8 + int.from_bytes(data[:8], "little")
    for _ in range(200):
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        assert_refused(file, model)
        if at >= arrays_at:  # mlx_lm's own function checks what our state carries
            with pytest.raises(ValueError):
                load_prompt_cache(str(file))


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_are_refused(model, saved, tmp_path, name):
    file = tmp_path / "bad.safetensors"
    forged(saved, file, FORGERIES[name])
    assert_refused(file, model)


def test_an_untouched_forgery_loads(model, saved, tmp_path):
    file = tmp_path / "good.safetensors"
    forged(saved, file, lambda *_: None)
    assert same_state(prompt_cache.load(file, model), prompt_cache.load(saved, model))


def test_a_cache_of_another_model_is_refused(saved, tmp_path):
    other, _ = mlx_lm.load(str(tiny.save(tmp_path / "other", seed=1)))
    assert_refused(saved, other)
    with pytest.raises(ValueError, match="model"):
        next(generate_step(prompt(5), other, prompt_cache=prompt_cache.load(saved)))
