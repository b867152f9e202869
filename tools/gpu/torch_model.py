"""What torch_bench.py measures: a Llama-3.1-8B-shaped model without weights of its own, caches of random codes and an fp16
one, and a clock."""

import functools
import statistics

import numpy
import torch
import torch.nn.functional as F
import transformers
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, CacheLayerMixin

import veloxquant.torch as vt
from veloxquant.torch.operator import NewTokens
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


@functools.cache
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


def weight_bytes(model):
    """What a step reads."""
    return sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes


def filled(model, made, batch, context):
    """A cache with `context` tokens of random codes, and room for three blocks more."""
    cache = vt.VeloxQuantCache(model, made, max_length=context + 192)
    one = torch.zeros(batch, KV_HEADS, 0, DIM, dtype=torch.float16, device="cuda")
    for layer in cache.layers:
        layer.lazy_initialization(one, one)
        for codes in layer.codes:
            codes.random_(0, 256)
        for exact in layer.exact:
            exact.normal_()
    lengths = cache.lengths
    lengths.packed, lengths.exact = [context // 64 * 64 - 64] * batch, [70] * batch
    lengths.before, lengths.seen = (lengths.packed, lengths.exact), lengths.packed[0] + 70
    lengths.to_device()
    return cache


class Fp16Layer(CacheLayerMixin):
    """The plain cache at its best: written in place, never copied."""

    def __init__(self, batch, context):
        super().__init__()
        self.context, self.is_initialized = context, True
        shape = (batch, KV_HEADS, context, DIM)
        self.keys, self.values = (torch.empty(shape, dtype=torch.float16, device="cuda").normal_() for _ in range(2))

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError

    def get_mask_sizes(self, query_length):
        return self.context, 0

    def get_seq_length(self):
        return self.context - 1

    def get_max_length(self):
        return self.context


class Fp16Cache(Cache):
    """As opaque to torch.compile as VeloxQuantCache, so that both are compiled alike."""

    now = None

    def __init__(self, batch, context, layers=LAYERS):
        super().__init__(layers=[Fp16Layer(batch, context) for _ in range(layers)])
        self.ticket = torch.zeros(1, dtype=torch.int64, device="cuda")
        Fp16Cache.now = self

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return NewTokens(key_states, self.ticket, layer_idx), value_states


def fp16_attend(query, key, value, ticket, layer, scaling):
    held = Fp16Cache.now.layers[layer]
    held.keys[:, :, -1:] = key
    held.values[:, :, -1:] = value
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(query, held.keys, held.values, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


library = torch.library.Library("veloxquant_bench", "DEF")
library.define(
    "fp16_attend(Tensor query, Tensor key, Tensor value, Tensor(a!) ticket, SymInt layer, float scaling) -> Tensor"
)
library.impl("fp16_attend", fp16_attend, "CompositeExplicitAutograd")
torch.library.register_fake(
    "veloxquant_bench::fp16_attend",
    lambda query, *_: query.new_empty(query.shape[0], query.shape[2], *query.shape[1::2]),
    lib=library,
)


def cudnn(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return torch.ops.veloxquant_bench.fp16_attend(query, key.states, value, key.ticket, key.layer, scaling), None


def use_cudnn(model):
    transformers.AttentionInterface.register("cudnn_fp16", cudnn)
    transformers.AttentionMaskInterface.register("cudnn_fp16", lambda *a, **k: None)
    model.set_attn_implementation("cudnn_fp16")


def median_ms(call, runs=15, warm_up=3):
    """Of single calls, one after the other on the device."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    for _ in range(warm_up):
        call()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:]))


@triton.jit
def read_kernel(x, sums, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * COUNT * BLOCK
    for i in range(COUNT):
        total += tl.load(x + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read_bandwidth():
    """Bytes a second of a kernel that only reads, 8 GB at a time."""
    count, block, programs = 32, 4096, 16384
    x = torch.ones(count * block * programs, dtype=torch.int32, device="cuda")
    sums = torch.empty(programs, dtype=torch.int32, device="cuda")
    ms = median_ms(lambda: read_kernel[(programs,)](x, sums, count, block, num_warps=8))
    assert (sums == count * block).all()
    return x.nbytes / ms * 1e3
