"""What holds for every cache method: files in a new process and on other SIMD levels, rewinding, batches, threads."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import methods
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_model as tiny
from mlx_lm.models.cache import trim_prompt_cache

from veloxquant_mlx import _ext
from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, install

generate = sys.modules["mlx_lm.generate"]
LEVELS = list(dict.fromkeys([_ext.simd_levels()[0], _ext.simd_levels()[-1]]))  # the widest and the narrowest
# Trimmed into sealed blocks, or not.
TRIMS = (0, 250)
GO_ON = """
import json, sys
import veloxquant_mlx.cache.base
import mlx.core as mx, mlx_lm
from veloxquant_mlx import _ext
from veloxquant_mlx.cache import prompt_cache
directory, tokens, *files = sys.argv[1:]
model, _ = mlx_lm.load(directory)
step = sys.modules["mlx_lm.generate"].generate_step
said = {}
for file in files:
    caches = prompt_cache.load(file, model)
    prompt_cache.save(file.replace("first", _ext.simd_level()), caches)
    steps = step(mx.array(json.loads(tokens)), model, max_tokens=30, prompt_cache=caches)
    said[file] = [token for token, _ in steps]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def loaded(directory):
    return mlx_lm.load(str(directory))


def prompt(n, seed=1):
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


def say(model, caches, tokens, n):
    steps = generate.generate_step(mx.array(tokens), model, max_tokens=n, prompt_cache=caches)
    return [token for token, _ in steps]


@pytest.fixture(scope="module")
def talks(loaded, tmp_path_factory):
    """{(method, trim): (file of a conversation, what it says when it goes on here)}."""
    talks = {}
    for i, name in enumerate(methods.METHODS):
        for trim in TRIMS:
            caches = KVCacheBuilder.build(loaded[0], methods.config(name, loaded[0]))
            say(loaded[0], caches, prompt(300), 20)
            assert trim_prompt_cache(caches, trim) == trim
            file = str(tmp_path_factory.mktemp("talks") / f"first-{i}-{trim}.safetensors")
            prompt_cache.save(file, caches)
            talks[name, trim] = file, say(loaded[0], caches, prompt(40, seed=2), 30)
    return talks


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    return request.param


@pytest.fixture(scope="module")
def elsewhere(level, directory, talks):
    """What a new process, held to one SIMD level, says after loading each file."""
    files = [file for file, _ in talks.values()]
    out = subprocess.run(
        [sys.executable, "-c", GO_ON, str(directory), json.dumps(prompt(40, seed=2)), *files],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "VELOXQUANT_SIMD": level},
    ).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("trim", TRIMS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_saved_conversation_goes_on_in_a_new_process_on_any_simd_level(talks, level, elsewhere, name, trim):
    file, wanted = talks[name, trim]
    assert elsewhere[file] == wanted
    with open(file, "rb") as a, open(file.replace("first", level), "rb") as b:
        assert a.read() == b.read()  # saved there again: the same file


@pytest.mark.parametrize("name", methods.METHODS)
def test_rewinding_leaves_every_byte_as_if_nothing_was_tried(loaded, name):
    """Speculative decoding: three tokens are appended, some of them taken back."""
    tried, plain = (KVCacheBuilder.build(loaded[0], methods.config(name, loaded[0]))[0] for _ in range(2))
    rng = np.random.default_rng(2)
    shape = (1, tiny.N_KV_HEADS, 400, tiny.HEAD_DIM)
    keys, values, wrong = (mx.array(rng.standard_normal(shape), dtype=mx.float32) for _ in range(3))
    at = 0
    while at < 390:
        accepted = int(rng.integers(1, 4))
        rejected = wrong[:, :, : 3 - accepted]
        step = [mx.concatenate([x[:, :, at : at + accepted], rejected], axis=2) for x in (keys, values)]
        tried.update_and_fetch(*step)
        assert tried.trim(3 - accepted) == 3 - accepted
        for t in range(at, at + accepted):
            plain.update_and_fetch(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        at += accepted
    # One token more, so that both have rewritten their exact storage.
    for cache in (tried, plain):
        cache.update_and_fetch(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    assert tried.state[0] == plain.state[0]
    assert all(mx.array_equal(a, b).item() for a, b in zip(tried.state[1:], plain.state[1:], strict=True))


# Keys of a batch differ from those of a row alone in the last bit, as everywhere in MLX. Where a fit sees them, so do
# eigenvectors, and by more where eigenvalues are close: test_adaptive.py has its rows.
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "adaptive"])
def test_8_rows_of_a_batch_say_and_hold_what_they_would_alone(loaded, name):
    model, tokenizer = loaded
    config = methods.config(name, model, strict=True)
    prompts = [prompt(n, seed=n) for n in (230, 5, 131, 64, 300, 1, 68, 200)]
    install(model, config)
    try:
        batch = generate.batch_generate(
            model, tokenizer, prompts, max_tokens=24, return_prompt_caches=True, return_token_ids=True
        )
    finally:
        object.__delattr__(model, "make_cache")
    compared = 0
    for tokens, said, row in zip(prompts, batch.token_ids, batch.caches, strict=True):
        own = KVCacheBuilder.build(model, config)
        wanted = say(model, own, tokens, 24)
        # A row that met its end-of-text token is shorter by that token.
        assert said == wanted[: len(said)] and len(said) >= (wanted.index(256) if 256 in wanted else 24)
        for a, b in zip(own, row, strict=True):
            a.trim(a.offset - b.offset)
            # Alone, mlx_lm runs further than it speaks: now and then that seals one block more.
            if a._core.positions() == b._core.positions():
                assert a.nbytes == b.nbytes  # padding is never stored
                compared += 1
    assert compared >= 7 * len(own)


@pytest.mark.parametrize("name", methods.METHODS)
def test_8_threads_with_caches_of_their_own(loaded, name):
    """Codecs are shared, caches are not: every thread gets what it would get alone."""
    start = KVCacheBuilder.build(loaded[0], methods.config(name, loaded[0]))[0]
    shape = (1, tiny.N_KV_HEADS, 300, tiny.HEAD_DIM)

    def work(seed):
        rng = np.random.default_rng(seed)
        stream = mx.new_stream(mx.cpu)
        with mx.stream(stream):
            keys, values = (mx.array(rng.standard_normal(shape), dtype=mx.float32) for _ in range(2))
            cache, results = copy.deepcopy(start), []
            at = 0
            while at < 280:
                n = int(rng.integers(1, 20))
                k, v = cache.update_and_fetch(keys[:, :, at : at + n], values[:, :, at : at + n])
                at += n
                q = mx.array(rng.standard_normal((1, tiny.N_HEADS, n, tiny.HEAD_DIM)), dtype=mx.float32)
                results.append(_ext.attend(q, k, v, scale=0.125, causal=True)[0])
                if at % 3 == 0:
                    at -= cache.trim(5)
                mx.eval(results[-1])
            return [np.array(a) for a in [*results, *cache.state[1:]]]

    wanted = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    for a, b in zip(wanted, found, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
