"""What a transformers user gets: append, prefill and whole decode steps of a Llama-3.1-8B-shaped model, beside fp16.

    PYTHONPATH=python python3 tools/gpu/torch_bench.py [append] [prefill] [step]

The weights are random and the cache is filled with random codes: only times and bytes count here.
"""

import statistics
import sys
import time

import numpy
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, CacheLayerMixin

import veloxquant.torch as vt
from veloxquant.torch.tables import SideArrays

LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128


def random_side(side, sub_dim, rng):
    """A rotation and tables of int8 times a power of two: what `calibrate` makes, of nothing."""
    matrix = numpy.linalg.qr(rng.standard_normal((KV_HEADS, DIM, DIM)))[0].astype(numpy.float32)
    if sub_dim == 4:
        entries = rng.integers(-127, 128, (KV_HEADS, 1, 256, 4)) / 64
    else:
        entries = rng.standard_normal((KV_HEADS, 1, 256, 2))
    return SideArrays(side, "dense", entries.astype(numpy.float16), encode_matrix=matrix, query_matrix=matrix)


def tables(bits, layers=LAYERS):
    rng = numpy.random.default_rng(bits)
    one = vt.LayerTables(*(random_side(side, 8 // bits, rng) for side in ("keys", "values")))
    return vt.Tables([one] * layers)


def model_of(layers=LAYERS):
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=1 << 20,
        rope_theta=500000.0,
        initializer_range=0.0,
        eos_token_id=None,
    )
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_(0, 0.02)
    return model


def filled(model, made, batch, context):
    """A cache with `context` tokens of random codes."""
    cache = vt.VeloxQuantCache(model, made, max_length=context + 2048)
    one = torch.zeros(batch, KV_HEADS, 0, DIM, dtype=torch.float16, device="cuda")
    for layer in cache.layers:
        layer.lazy_initialization(one, one)
        for codes in layer.codes:
            codes.random_(0, 256)
        for exact in layer.exact:
            exact.normal_()
    lengths = cache.lengths
    lengths.packed, lengths.exact = [context // 64 * 64 - 128] * batch, [100] * batch
    lengths.before, lengths.seen = (lengths.packed, lengths.exact), lengths.packed[0] + 100
    lengths.to_device()
    return cache


class Fp16Layer(CacheLayerMixin):
    """The plain cache at its best: written in place, never copied."""

    def __init__(self, batch, context):
        super().__init__()
        self.context, self.is_initialized = context, True
        self.keys, self.values = (
            torch.randn(batch, KV_HEADS, context, DIM, dtype=torch.float16, device="cuda") for _ in range(2)
        )

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        return self.context, 0

    def get_seq_length(self):
        return self.context - 1

    def get_max_length(self):
        return self.context


def cudnn(module, query, key, value, attention_mask, scaling=None, **kwargs):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def median_ms(call, runs=15):
    times = []
    for i in range(runs + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


@torch.no_grad()
def step_times(model, cache, batch, context, ours):
    """Median ms of a decode step: captured, and eager."""
    token = torch.ones(batch, 1, dtype=torch.long, device="cuda")
    position = torch.full((batch, 1), context - 1, device="cuda")

    def step():
        return model(token, position_ids=position, past_key_values=cache).logits

    step()
    start = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    eager = (time.perf_counter() - start) * 200
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    if ours:
        cache.forget_captured_step()
    captured = median_ms(graph.replay)
    assert torch.isfinite(logits).all()
    return captured, eager


def steps():
    model = model_of()
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    print(f"decode step, {LAYERS} layers, weights {weights / 1e9:.2f} GB; ms captured (eager)")
    for batch, context in ((1, 131072), (1, 196608), (16, 16384)):
        transformers.AttentionInterface.register("cudnn_fp16", cudnn)
        transformers.AttentionMaskInterface.register("cudnn_fp16", lambda *a, **k: None)
        model.set_attn_implementation("cudnn_fp16")
        before = torch.cuda.mem_get_info()[0]
        cache = Cache(layers=[Fp16Layer(batch, context) for _ in range(LAYERS)])
        exact, exact_eager = step_times(model, cache, batch, context, False)
        taken = before - torch.cuda.mem_get_info()[0]
        del cache
        torch.cuda.empty_cache()
        print(
            f"{batch} x {context}: cuDNN fp16 {exact:.2f} ({exact_eager:.2f}), {taken / 1e9:.2f} GB of cache",
            flush=True,
        )
        for bits in (2, 4):
            before = torch.cuda.mem_get_info()[0]
            cache = filled(model, tables(bits), batch, context)
            ms, eager = step_times(model, cache, batch, context, True)
            taken = before - torch.cuda.mem_get_info()[0]
            roofline = (weights + sum(c.nbytes for layer in cache.layers for c in layer.codes)) / 4.49e9
            print(
                f"{batch} x {context}: {bits} bits {ms:.2f} ({eager:.2f}), {taken / 1e9:.2f} GB, cache says "
                f"{cache.nbytes / 1e9:.2f}; {exact / ms:.2f} x fp16, {roofline / ms:.0%} of the roofline {roofline:.2f}",
                flush=True,
            )
            del cache
            torch.cuda.empty_cache()


@torch.no_grad()
def appends():
    """One decode step's append of all layers against its attention, each captured in a graph of 64 steps."""
    model = model_of(1)
    for batch, context in ((1, 131072), (16, 16384)):
        cache = filled(model, tables(2, 1), batch, context)
        layer = cache.layers[0]
        k, v = (torch.randn(batch, KV_HEADS, 1, DIM, dtype=torch.float16, device="cuda") for _ in range(2))
        q = torch.randn(batch, HEADS, 1, DIM, dtype=torch.float16, device="cuda")
        layer.append(k, v)
        layer.kernels.attend_token(q, 0.09)
        times = []
        for call in (lambda: layer.append(k, v), lambda: layer.kernels.attend_token(q, 0.09)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(64):
                    call()
            cache.lengths.to_device()
            times.append(median_ms(graph.replay, 1) * 1e3 / 64)
        print(
            f"{batch} x {context}: append {times[0]:.2f} us a layer (lengths of the step included), "
            f"attention {times[1]:.2f} us (warm L2): {times[0] / times[1]:.0%}",
            flush=True,
        )


@torch.no_grad()
def prefills():
    """Prefill of 32k tokens: two layers of the model's shape, and the encoder alone."""
    model = model_of(2)
    ids = torch.randint(0, 128256, (1, 32768), device="cuda")
    model.set_attn_implementation("sdpa")
    model.model(ids[:, :1024], use_cache=False)
    exact = median_ms(lambda: model.model(ids, past_key_values=transformers.DynamicCache(config=model.config)), 3)
    print(f"prefill 1 x 32768, 2 layers: fp16 {exact:.1f} ms", flush=True)
    for bits in (2, 4):
        made = tables(bits, 2)
        ms = median_ms(lambda: model.model(ids, past_key_values=vt.VeloxQuantCache(model, made)), 3)
        cache = vt.VeloxQuantCache(model, made)
        x = torch.randn(1, KV_HEADS, 32768, DIM, dtype=torch.float16, device="cuda")
        layer = cache.layers[0]
        layer.lazy_initialization(x, x)
        layer.make_room(512)
        encode = median_ms(lambda: layer.kernels.encode(layer.sides[0], x, layer.codes[0], 0), 5)
        print(
            f"  {bits} bits {ms:.1f} ms, {ms / exact - 1:+.1%}; encoding one side of one layer {encode:.2f} ms",
            flush=True,
        )


def main():
    wanted = sys.argv[1:] or ["append", "prefill", "step"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, part in (("append", appends), ("prefill", prefills), ("step", steps)):
        if name in wanted:
            part()


if __name__ == "__main__":
    main()
