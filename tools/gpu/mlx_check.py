"""On a GPU machine, run by tools/gpu/mlx.sh: every operation on the GPU against the CPU, then what is asked for.

mlx_check.py OUT PART[:i/n]...     functions, conformance, cache, selftest, snippets, generate, speed, launches,
                                   bench; the i-th of n shares of it

generate wants SmolLM2 as MODEL (a .gguf) and a calibrated ARTIFACTS directory in the environment.
"""

import os
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from codec_conformance import answers, conformance_cases, probes
from gpu_cases import STEPS, cache_cases, cases, dequantized, drive, make_cache, outputs, ready

from veloxquant_mlx import _ext

failures = []
share = 0, 1  # PART:i/n: the i-th of n shares, for processes side by side


def shared_out(all_of_them):
    return [one for i, one in enumerate(all_of_them) if i % share[1] == share[0]]


def check(name, ok, note=""):
    print(f"{'ok    ' if ok else 'FAILED'} {name} {note}")
    if not ok:
        failures.append(name)


def on(device, call):
    mx.set_default_device(device)
    result = outputs(call())
    mx.set_default_device(mx.gpu)
    return result


def equal(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def functions():
    """Bits equal to the CPU's: as they are, under mx.compile, on a stream of their own."""
    for name, call, kernels in shared_out(cases()):
        expected = on(mx.cpu, call)
        before = _ext.gpu_launches()
        start = time.perf_counter()
        got = on(mx.gpu, call)
        seconds = time.perf_counter() - start
        launched = [k for k, n in _ext.gpu_launches().items() for _ in range(n - before.get(k, 0))]
        check(name, equal(got, expected) and sorted(launched) == sorted(kernels), f"{seconds:.2f} s, {launched}")
        compiled = on(mx.gpu, mx.compile(lambda call=call: call()))
        check(name + ", compiled", equal(compiled, expected))
        with mx.stream(mx.new_stream(mx.gpu)):
            check(name + ", own stream", equal(outputs(call()), expected))


def conformance():
    """Blocks and decoded bits of every codec, equal to the CPU's: whole ones, tails, borders of codes, garbage."""
    for name, make in shared_out(conformance_cases()):
        codec = make()
        mx.set_default_device(mx.cpu)
        given = probes(codec)
        expected = answers(codec, given)
        mx.set_default_device(mx.gpu)
        before = _ext.gpu_launches()
        got = answers(codec, given)
        launched = launched_since(before)
        kernels = {k.split("_")[-2] for k in launched if k.endswith("_blocks")}
        check(f"conformance: {name}", equal(got, expected) and kernels == {"encode", "decode"}, launched)


def snippets():
    """The seeds' and README's snippets as the tests run them, with the GPU as default device."""
    import pytest

    tests = Path(__file__).resolve().parents[2] / "python" / "tests"
    files = [str(tests / f"test_{name}_snippets.py") for name in ("documented", "metal")]
    result = pytest.main(["-q", "-rs", "-p", "no:cacheprovider", *files])
    launched = _ext.gpu_launches()
    check("snippets", result == 0 and "vq_decode_items" in launched and "vq_scalar_quantize" in launched, launched)


def launched_since(before):
    return {k: n - before.get(k, 0) for k, n in _ext.gpu_launches().items() if n > before.get(k, 0)}


def row_error(got, expected):
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        norm = np.linalg.norm(b, axis=-1) if a.ndim == 4 else 1 + np.abs(b)
        worst = max(worst, np.max((np.linalg.norm(a - b, axis=-1) if a.ndim == 4 else np.abs(a - b)) / norm))
    return worst


def cache():
    """Bytes equal to the CPU's, attention within tolerance: every transform, options, long histories."""
    for name, arguments in shared_out(cache_cases().items()):
        dtype = arguments.get("dtype", mx.float32)
        steps = STEPS if name == "Hadamard" else STEPS[:7]
        mx.set_default_device(mx.cpu)
        expected, arrays, positions = drive(make_cache(**arguments), steps, dtype=dtype)
        mx.set_default_device(mx.gpu)
        before = _ext.gpu_launches()
        start = time.perf_counter()
        got, gpu_arrays, gpu_positions = drive(make_cache(**arguments), steps, dtype=dtype)
        seconds, launched = time.perf_counter() - start, launched_since(before)
        appends = sum(0 < n for n in steps)
        check(f"bytes: {name}", positions == gpu_positions and equal(gpu_arrays, arrays), f"{seconds:.1f} s {launched}")
        check(
            f"kernels: {name}",
            launched["vq_decode_items"] + launched["vq_prefill_items"] == launched["vq_decode_merge"] == appends,
        )
        mx.set_default_device(mx.cpu)
        dense = dequantized(make_cache(**arguments), [150, 2], dtype)
        mx.set_default_device(mx.gpu)
        check(f"dequantize: {name}", equal(dequantized(make_cache(**arguments), [150, 2], dtype), dense))
        error = row_error(got, expected)
        check(f"attention: {name}", error < (1e-2 if dtype == mx.bfloat16 else 2e-3), f"row error {error:.1e}")
    if share[0] > 0:
        return
    for options in (["sliding_window"], ["mask", "sinks", "logit_softcap"]):
        steps = [150, 1, 5]
        mx.set_default_device(mx.cpu)
        expected, _, _ = drive(make_cache("hadamard"), steps, **ready(options, steps))
        mx.set_default_device(mx.gpu)
        got, _, _ = drive(make_cache("hadamard"), steps, **ready(options, steps))
        check(f"attention: {options}", row_error(got, expected) < 2e-3, f"row error {row_error(got, expected):.1e}")
    steps = [1500, 1100, 1100, 1100, 1100, 1, 1]
    mx.set_default_device(mx.cpu)
    expected, _, _ = drive(make_cache("none", tables=16, centroids=16), steps, group=1, bad=True)
    mx.set_default_device(mx.gpu)
    long = make_cache("none", tables=16, centroids=16)
    got, _, positions = drive(long, steps, group=1, bad=True)
    check("attention: 5,902 tokens in 4 spans", row_error(got, expected) < 2e-3 and len(positions) == 2 + 3 * 4)


LAYERS = 24


def _each(call, n=30):
    """Microseconds of a call, calls in flight."""
    start = time.perf_counter()
    for _ in range(n):
        arrays = call()
        mx.async_eval(arrays)
    mx.eval(arrays)
    return 1e6 * (time.perf_counter() - start) / n


def speed():
    """Steps of 24 layers, host and device together: append and attention, and MLX's own exact cache; one prefill."""
    from mlx_lm.models.cache import KVCache

    r = np.random.default_rng(1)
    for kind in shared_out(("hadamard", "dense", "turboquant")):
        for length in (4096, 32768):
            k = mx.array(r.standard_normal((1, 8, length, 128), dtype=np.float32)).astype(mx.float16)
            one, q = mx.array(k[:, :, :1]), mx.repeat(k[:, :, :1], 4, 1)
            caches = [make_cache(kind, heads=8, dim=128) for _ in range(LAYERS)]
            exact = [KVCache() for _ in caches]
            for cache, plain in zip(caches, exact, strict=True):
                cache.update(k, k)
                plain.update_and_fetch(k, k)
                mx.eval(cache.arrays(), plain.state)
            mx.eval(one, q)

            def ours(caches=caches, one=one, q=q):
                outs = [_ext.attend(q, *cache.update(one, one), scale=0.1, causal=True)[0] for cache in caches]
                return outs + [a for cache in caches for a in cache.arrays()]

            def plain(exact=exact, one=one, q=q):
                return [
                    mx.fast.scaled_dot_product_attention(q, *cache.update_and_fetch(one, one), scale=0.1)
                    for cache in exact
                ]

            for _ in range(66):  # every kernel compiled, those of a block that is sealed too
                mx.eval(ours())
            mx.eval(plain())
            start = time.perf_counter()
            ours()
            built = 1e6 * (time.perf_counter() - start) / LAYERS
            print(
                f"speed: {kind}, 32/8 heads d128, {length} tokens: {_each(ours) / LAYERS:.0f} us a layer, of them "
                f"{built:.0f} us building the graph; MLX's exact cache {_each(plain) / LAYERS:.0f}"
            )
        # On one set of spans: another number of them is another kernel, which MLX compiles in seconds.
        chunk, queries, cache = k[:, :, :2048], mx.repeat(k[:, :, :2048], 4, 1), caches[0]
        held = cache.update(chunk, chunk)
        mx.eval(queries, cache.arrays())

        def prefill(held=held, queries=queries):
            return [_ext.attend(queries, *held, scale=0.1, causal=True)[0]]

        mx.eval(prefill())
        print(f"speed: {kind}, prefill of 2048 of {cache.length}: attention {_each(prefill, 2) / 1000:.1f} ms a layer")


def launches():
    """What launches cost: steps of 24 layers by their parts, beside as many trivial kernels and operations of MLX."""
    r = np.random.default_rng(1)
    k = mx.array(r.standard_normal((1, 8, 4096, 128), dtype=np.float32)).astype(mx.float16)
    one, q = mx.array(k[:, :, :1]), mx.repeat(k[:, :, :1], 4, 1)
    caches = [make_cache("hadamard", heads=8, dim=128) for _ in range(LAYERS)]
    held = [cache.update(k, k) for cache in caches]
    held = [cache.update(one, one) for cache in caches]
    codes, x = mx.zeros((8, 64), mx.int32), mx.zeros((8, 64))
    mx.eval(one, q, codes, x, [cache.arrays() for cache in caches])

    def chain(call, x, n):
        for _ in range(n):
            x = call(x)
        return [x]

    calls = {
        "append": lambda: [cache.update(one, one) and a for cache in caches for a in cache.arrays()],
        "attend": lambda: [_ext.attend(q, *sides, scale=0.1, causal=True)[0] for sides in held],
        "pack_words": lambda: [_ext.pack_words(codes, 3) for _ in range(LAYERS)],
        "pack_words and unpack_words in turn": lambda: chain(
            lambda c: _ext.unpack_words(_ext.pack_words(c, 8), 8, 64), codes, LAYERS // 2
        ),
        "one addition": lambda: [x + float(i) for i in range(LAYERS)],
        "one addition, in a chain": lambda: chain(lambda y: y + 1.0, x, LAYERS),
    }
    for name, call in calls.items():
        for _ in range(4):
            mx.eval(call())
        start = time.perf_counter()
        for _ in range(30):
            call()
        built = 1e6 * (time.perf_counter() - start) / 30 / LAYERS
        print(f"speed: {name}: {_each(call) / LAYERS:.1f} us a layer, of them {built:.1f} us building the graph")


def generate():
    """SmolLM2 through mlx_lm with a calibrated cache, GPU and CPU as default device."""
    from mlx_lm.models.cache import make_prompt_cache

    from veloxquant_mlx.cli.generate import chat_tokens, run
    from veloxquant_mlx.cli.methods import Wanted
    from veloxquant_mlx.cli.setup import Settings, make_methods, open_model
    from veloxquant_mlx.models.gguf import convert
    from veloxquant_mlx.prose import PASSAGES

    target = Path("/tmp/veloxquant_mlx/smollm2")
    if not target.exists():
        target.mkdir()
        mx.set_default_device(mx.cpu)
        convert(Path(os.environ["MODEL"]), target)
    prompt = f"{PASSAGES[2]}\n{PASSAGES[9]}\nIn a few sentences: what does a river do to the land?"
    answers, rows = {}, {}
    for device in (mx.gpu, mx.cpu):
        mx.set_default_device(device)
        model, tokenizer = open_model(str(target))
        method = make_methods(
            str(target), model, tokenizer, [Wanted("vecinfer")], Settings(artifacts=[os.environ["ARTIFACTS"]])
        )[0]
        tokens = chat_tokens(tokenizer, prompt)
        before = _ext.gpu_launches()
        for attempt in range(2 if device == mx.gpu else 1):  # once more: compiled
            fields = run(model, tokenizer, tokens, method, 64)
            print({k: v for k, v in fields.items() if k != "text"}, launched_since(before), attempt)
        print(device, repr(fields["text"]))
        answers[device] = fields
        # Logits of a fixed continuation, token by token, behind the same prompt.
        ids = mx.array(tokens)
        for kind in ("ours", "exact"):
            caches = method.build(model) if kind == "ours" else make_prompt_cache(model)
            mx.eval(model(ids[None, :-40], cache=caches))
            start = time.perf_counter()
            steps = [model(ids[None, i : i + 1], cache=caches)[0, -1] for i in range(len(tokens) - 40, len(tokens))]
            rows[device, kind] = np.array(mx.stack(steps).astype(mx.float32))
            print(device, kind, f"{40 / (time.perf_counter() - start):.1f} tokens/s, one token at a time")
    gpu, cpu = rows[mx.gpu, "ours"], rows[mx.cpu, "ours"]
    exact = np.abs(rows[mx.gpu, "exact"] - rows[mx.cpu, "exact"])
    median, top1 = np.median(np.abs(gpu - cpu)), np.mean(gpu.argmax(-1) == cpu.argmax(-1))
    note = f"median |difference of logits| {median:.1e} (exact cache {np.median(exact):.1e}), top-1 equal {top1:.2f}"
    check("SmolLM2: logits of the GPU and of the CPU", median < 0.05 and top1 >= 0.9, note)
    check("SmolLM2: the same answer", answers[mx.gpu]["text"] == answers[mx.cpu]["text"])
    check("SmolLM2: the same size", answers[mx.gpu]["cache_bytes"] == answers[mx.cpu]["cache_bytes"])
    mx.set_default_device(mx.gpu)


def selftest():
    from veloxquant_mlx.cli import selftest

    fields = selftest.run(methods=shared_out(selftest.METHODS), functions=share[0] == share[1] - 1 or share[1] == 1)
    print(selftest.text(fields))
    check("devices --selftest", fields["passed"])


def bench():
    """The rows of `veloxquant bench kernels`; a result that differs from MLX's own operations is an error."""
    from veloxquant_mlx.benchmarks import kernels, measure

    for case in shared_out(kernels.cases()):
        row = measure.row(case, 5)
        check(f"bench: {row['function']} {row['shape']}", row["backend"] == "gpu")
        print(
            f"speed: {row['function']} {row['shape']}: {row['us']} us, {row['speedup']} x {row['baseline']}, "
            f"{row['gbps']} GB/s, {row['fraction_of_copy']} of a pass over as many bytes"
        )


PARTS = {
    "bench": bench,
    "functions": functions,
    "cache": cache,
    "selftest": selftest,
    "speed": speed,
    "launches": launches,
    "generate": generate,
    "conformance": conformance,
    "snippets": snippets,
}


def main():
    global share
    wanted = sys.argv[2:]
    mx.set_default_device(mx.gpu)
    print("MLX", mx.__version__, mx.default_device(), mx.device_info().get("device_name", ""))
    for part in wanted:
        start = time.perf_counter()
        part, _, given = part.partition(":")
        share = tuple(int(n) for n in given.split("/")) if given else (0, 1)
        PARTS[part]()
        print(f"{part}: {time.perf_counter() - start:.1f} s")
    print("launches:", _ext.gpu_launches())
    print(f"{len(failures)} failures", failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
