"""What a transformers user gets: decode steps of a Llama-3.1-8B-shaped model, append, prefill and memory, beside fp16.

    PYTHONPATH=python python3 tools/gpu/torch_bench.py [smoke|variants|step|prefill|memory ...] [compile|descent|autotune ...]
                                                       [1x131072 ...]

Parts, ways to compile and shapes (batch x context), in this order; all parts but `variants` where none is named. The weights
are random and the caches filled with random codes: only times and bytes count here.
"""

import gc
import os
import sys
import time

import torch
import transformers
from torch_model import (
    DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    Fp16Cache,
    filled,
    median_ms,
    model_of,
    read_bandwidth,
    tables,
    use_cudnn,
    weight_bytes,
)

import veloxquant.torch as vt

SHAPES = [(1, 131072), (16, 16384), (1, 196608)]
WAYS = {  # options of compile_layers
    "compile": {},
    "descent": {"options": {"coordinate_descent_tuning": True}},
    "autotune": {"mode": "max-autotune-no-cudagraphs"},
}
chosen = {"ways": ["compile"]}  # as named; the first is taken, or the fastest of `variants`


def say(*text):
    print(f"[{time.perf_counter() - started:5.0f} s]", *text, flush=True)


def inputs(batch, context):
    return torch.ones(batch, 1, dtype=torch.long, device="cuda"), torch.full((batch, 1), context - 1, device="cuda")


@torch.no_grad()
def eager_ms(model, cache, batch, context, runs=5):
    token, position = inputs(batch, context)
    for i in range(runs + 2):
        if i == 2:
            torch.cuda.synchronize()
            start = time.perf_counter()
        model(token, position_ids=position, past_key_values=cache)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / runs


@torch.no_grad()
def graph_ms(model, cache, batch, context, ours, after=None):
    """Median ms of a step in a CUDA graph. The way a user has it: CapturedStep."""
    token, position = inputs(batch, context)
    if ours:
        step = vt.CapturedStep(model, cache)
        for _ in range(step.WARM_UP + 1):
            step(token)
        graph, logits = step.graph, step.logits
    else:
        for _ in range(2):
            model(token, position_ids=position, past_key_values=cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, position_ids=position, past_key_values=cache).logits
    ms = median_ms(graph.replay)
    assert torch.isfinite(logits).all()
    if after is not None:
        after(graph)
    if ours:
        cache.lengths.to_device()
    return ms


@torch.no_grad()
def without_append_ms(model, cache, batch):
    """The same step without append, and the attention of all layers alone."""
    token, position = inputs(batch, 1)
    held = [layer.append for layer in cache.layers]
    for layer in cache.layers:
        layer.append = lambda key, value: None
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    with torch.cuda.graph(graphs[0]):
        model(token, position_ids=position, past_key_values=cache)
    query = torch.randn(batch, HEADS, 1, DIM, dtype=torch.float16, device="cuda")
    with torch.cuda.graph(graphs[1]):
        for layer in cache.layers:
            layer.kernels.attend_token(query, 0.09)
    for layer, append in zip(cache.layers, held):
        layer.append = append
    return [median_ms(graph.replay) for graph in graphs]


@torch.no_grad()
def append_ms(cache, batch):
    """Append of all layers alone, the lengths of the step included."""
    k, v = (torch.randn(batch, KV_HEADS, 1, DIM, dtype=torch.float16, device="cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in cache.layers:
            layer.append(k, v)
    cache.forget_captured_step()
    ms = median_ms(graph.replay)
    cache.lengths.to_device()
    return ms


def taken(make):
    """What make() gives, and the GB of the device that it took."""
    Fp16Cache.now = None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    made = make()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return made, (before - torch.cuda.mem_get_info()[0]) / 1e9


class Compiled:
    """A model whose layers are compiled, or as they were."""

    def __init__(self, model, **options):
        torch.compiler.reset()
        self.model = model
        vt.compile_layers(model, **options)
        self.forwards = {m: m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__}

    def off(self):
        for module in self.forwards:
            module.__dict__.pop("forward", None)

    def on(self):
        for module, forward in self.forwards.items():
            module.forward = forward


def row(compiled, name, make, shape, bandwidth, fp16_ms):
    """One line of the table; returns the ms of a captured step."""
    batch, context = shape
    model, ours = compiled.model, fp16_ms is not None
    cache, gb = taken(make)
    compiled.off()
    eager = eager_ms(model, cache, batch, context)
    compiled.on()
    ms = graph_ms(model, cache, batch, context, ours)
    held = [t for layer in cache.layers for t in (layer.codes if ours else (layer.keys, layer.values))]
    least = (weight_bytes(model) + sum(t.nbytes for t in held)) / bandwidth * 1e3
    text = f"{batch} x {context} {name}: graph {ms:.2f} ms = {least / ms:.1%} of {least:.2f}, eager {eager:.1f}; {gb:.2f} GB"
    if ours:
        bare, attention = without_append_ms(model, cache, batch)
        append = append_ms(cache, batch)
        text += f"; {fp16_ms / ms:.2f} x fp16; a layer: attention {attention * 1e3 / LAYERS:.1f} us, append "
        text += f"{append * 1e3 / LAYERS:.2f} alone ({append / attention:.1%}), {(ms - bare) * 1e3 / LAYERS:.2f} "
        text += f"in the step ({(ms - bare) / attention:.1%})"
    say(text)
    return ms


def step(shapes):
    bandwidth = read_bandwidth()
    model = model_of()
    say(
        f"{LAYERS} layers, weights {weight_bytes(model) / 1e9:.2f} GB, read at {bandwidth / 1e12:.2f} TB/s; compiled: {chosen['ways'][0]}"
    )
    compiled, last = None, None
    for shape in shapes:
        batch, context = shape
        if batch != last:
            if compiled is not None:
                compiled.off()
            compiled = Compiled(model, **WAYS[chosen["ways"][0]])
        last = batch
        use_cudnn(model)
        fp16_ms = row(compiled, "fp16", lambda: Fp16Cache(batch, context), shape, bandwidth, None)
        for bits in (2, 4):
            made = tables(bits)
            row(compiled, f"{bits} bits", lambda: filled(model, made, batch, context), shape, bandwidth, fp16_ms)
    compiled.off()


@torch.no_grad()
def variants(shapes):
    """The ways to compile a step, 2 bits, of the first shape."""
    model = model_of()
    for batch, context in shapes[:1]:
        cache = filled(model, tables(2), batch, context)
        say(f"{batch} x {context} not compiled: {graph_ms(model, cache, batch, context, True):.2f} ms")
        times = {}
        for name in chosen["ways"]:
            start, seen = time.perf_counter(), []
            compiled = Compiled(model, **WAYS[name])
            ms = graph_ms(model, cache, batch, context, True, lambda graph: seen.append(kernels(graph)))
            say(f"{batch} x {context} {name}: {ms:.2f} ms; {time.perf_counter() - start:.0f} s to compile and time")
            print(seen[0], flush=True)
            compiled.off()
            times[name] = ms
        chosen["ways"].sort(key=times.get)
        del cache
        torch.cuda.empty_cache()


def kernels(graph, top=14):
    """The kernels of a replay, us."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    print(f"      {len(profile.events())} kernels")
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)[:top]
    return "\n".join(f"      {e.device_time_total:8.1f} us {e.count:4d} x {e.key[:90]}" for e in events)


@torch.no_grad()
def memory(shapes):
    """The largest batch at 32k tokens in 100 GB of caches (weights are beside them in both), with a step that runs."""
    limit, context = 100.0, 32768
    model = model_of()
    made = tables(2)

    def ours(batch):
        return taken(lambda: filled(model, made, batch, context))

    def fp16(batch):
        return taken(lambda: Fp16Cache(batch, context))

    found = []
    for name, make in (("fp16", fp16), ("2 bits", ours)):
        if make is fp16:
            use_cudnn(model)
        batch = int(20 * limit / make(20)[1])  # near it: the allocator takes in steps
        while make(batch + 1)[1] <= limit:
            batch += 1
        cache, gb = make(batch)
        while gb > limit:
            batch, cache = batch - 1, None
            cache, gb = make(batch)
        ms = eager_ms(model, cache, batch, context, 2)
        say(f"memory, {context} tokens in {limit:.0f} GB: {name} batch {batch}, {gb:.2f} GB; a step {ms:.1f} ms eager")
        found.append(batch)
        cache = None
    say(f"memory: {found[1] / found[0]:.2f} x the batch")


@torch.no_grad()
def prefill(shapes):
    """Prefill of 32k tokens: two layers of the model's shape, and the encoder alone."""
    model = model_of(2)
    ids = torch.randint(0, 128256, (1, 32768), device="cuda")
    model.set_attn_implementation("sdpa")
    model.model(ids[:, :1024], use_cache=False)
    exact = median_ms(lambda: model.model(ids, past_key_values=transformers.DynamicCache(config=model.config)), 5, 2)
    say(f"prefill 1 x 32768, 2 layers: fp16 {exact:.1f} ms")
    for bits in (2, 4):
        made = tables(bits, 2)
        ms = median_ms(lambda: model.model(ids, past_key_values=vt.VeloxQuantCache(model, made)), 5, 2)
        cache = vt.VeloxQuantCache(model, made)
        x = torch.randn(1, KV_HEADS, 32768, DIM, dtype=torch.float16, device="cuda")
        layer = cache.layers[0]
        layer.lazy_initialization(x, x)
        layer.make_room(512)
        encode = median_ms(lambda: layer.kernels.encode(layer.sides[0], x, layer.codes[0], 0), 5)
        say(f"prefill {bits} bits {ms:.1f} ms, {ms / exact - 1:+.1%}; encoding one side of one layer {encode:.2f} ms")


@torch.no_grad()
def smoke(shapes):
    """Everything once, on a small model: a mistake shows here and costs no minutes."""
    model = model_of(4)
    made = tables(2, 4)
    plain = vt.VeloxQuantCache(model, made)
    ids = torch.randint(0, 128256, (2, 300), device="cuda")
    want = [model(ids[:, :200], past_key_values=plain).logits[:, -1:]]
    want += [model(ids[:, i : i + 1], past_key_values=plain).logits for i in range(200, 300)]
    vt.compile_layers(model, **WAYS[chosen["ways"][0]])
    cache = vt.VeloxQuantCache(model, made)
    got = [model(ids[:, :200], past_key_values=cache).logits[:, -1:]]
    captured = vt.CapturedStep(model, cache)
    got += [captured(ids[:, i : i + 1]).clone() for i in range(200, 300)]
    want, got = torch.cat(want, 1).float(), torch.cat(got, 1).float()
    error = ((got - want).norm() / want.norm()).item()
    say(
        f"smoke: captured and compiled against eager {error:.1e}; lengths {cache.lengths.packed} {plain.lengths.packed}"
    )
    assert error < 2e-2 and cache.lengths.counts.tolist() == plain.lengths.counts.tolist()
    with torch.compiler.set_stance("fail_on_recompile"):  # not captured, and the next cache
        other = vt.VeloxQuantCache(model, made)
        for i in (160, *[1] * 140):
            position = torch.zeros(2, i, dtype=torch.long, device="cuda")
            model(ids[:, :i].contiguous(), position_ids=position, past_key_values=other)
    say(f"smoke: no graph compiled again while {other.lengths.packed[0]} tokens became packed")
    torch.compiler.reset()


def main():
    parts = {"smoke": smoke, "variants": variants, "step": step, "prefill": prefill, "memory": memory}
    given = sys.argv[1:]
    wanted = [name for name in parts if name in given] or [name for name in parts if name != "variants"]
    chosen["ways"] = [name for name in given if name in WAYS] or chosen["ways"]
    shapes = [tuple(map(int, a.split("x"))) for a in given if a[0].isdigit()] or SHAPES
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name in wanted:
        parts[name](shapes)
        torch.cuda.empty_cache()


started = time.perf_counter()
if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "0")
    main()
