"""The core's kernels on a layer's tensors: CpuKernels on the host, CudaKernels on the device."""

import torch
import torch.nn.functional as F

from veloxquant import Error, _core
from veloxquant.torch.lengths import BLOCK

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType of the core
TILE = 4096  # tokens that are decoded at once, where many queries attend
MATH_ROWS = 256  # queries at once where PyTorch has no fused kernel


class CpuKernels:
    appends_alone = False

    def __init__(self, layer):
        self.layer = layer

    def block_bytes(self, side):
        return side.core.block_bytes

    def bind(self):
        pass

    def encode(self, side, x, codes, first_block):
        _core.cpu_encode(side.core, x.contiguous(), codes, first_block)

    def decode(self, side, codes, first_block, n):
        x = torch.empty(codes.shape[0], codes.shape[1], n, side.core.head_dim, dtype=torch.float32)
        for row in range(codes.shape[0]):
            _core.cpu_decode_row(side.core, codes[row], first_block, x[row])
        return x

    def to_portable(self, side, codes):
        return codes.clone()

    def from_portable(self, side, portable):
        return portable

    def attend_token(self, query, scaling):
        lengths = self.layer.cache.lengths
        return self._attend(query, None, None, scaling, None, lengths.packed, lengths.exact, self.layer.exact)

    def attend_chunk(self, query, key, value, scaling, valid):
        counts = self.layer.counts_before()
        return self._attend(query, key, value, scaling, valid, *counts, self.layer.exact)

    def attend_stored_chunk(self, query, key, value, scaling, valid, exact):
        """As token by token: after the append, with the exact storage as it was before."""
        lengths = self.layer.cache.lengths
        packed = [(after - before) // BLOCK for before, after in zip(lengths.before[0], lengths.packed)]
        return self._attend(query, key, value, scaling, valid, *lengths.before, exact, packed)

    def _attend(self, query, key, value, scaling, valid, packed, exact, storage, sealed=None):
        layer = self.layer
        lengths = layer.cache.lengths
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for b in range(query.shape[0]):
            rows = slice(None) if valid is None else valid[b].nonzero()[:, 0]
            q = query[b][:, rows].detach().contiguous()
            if q.shape[1] == 0:
                continue
            result = torch.empty_like(q)
            chunk = [None if x is None else x[b][:, rows].detach().contiguous() for x in (key, value)]
            _core.cpu_attend_row(
                layer.tables.keys.core,
                layer.tables.values.core,
                q,
                layer.codes[0][b],
                layer.codes[1][b],
                packed[b],
                storage[0][b],
                storage[1][b],
                exact[b],
                lengths.sinks,
                *chunk,
                scaling,
                result,
                n_sealed=0 if sealed is None else sealed[b],
                window=lengths.window,
            )
            out[b][:, rows] = result
        return out.transpose(1, 2)


class CudaKernels:
    appends_alone = True
    native = _core.CudaLayer
    workspaces = {}  # device, stream -> scratch of the decode kernel

    def __init__(self, layer):
        if not _core.cuda_built():
            raise Error("[VeloxQuantCache] device: got cuda, wanted cpu: this build of veloxquant has no CUDA kernels")
        for side in layer.sides:
            if side.core.cuda_problem:
                raise Error(side.core.cuda_problem)
        self.layer, self.core, self.n_q_heads = layer, None, None

    def stream(self):
        return torch.cuda.current_stream(self.layer.device).cuda_stream

    def block_bytes(self, side):
        return side.core.cuda_block_bytes

    def bind(self):
        """The layer's tensors are others than before."""
        self.core = None

    def bound(self, n_q_heads):
        if self.core is not None and (n_q_heads is None or self.n_q_heads == n_q_heads):
            return self.core
        layer = self.layer
        keys, values = layer.sides
        self.n_q_heads = n_q_heads or self.n_q_heads or keys.core.n_kv_heads
        lengths = layer.cache.lengths
        layer.make_room(1)
        self.core = self.native(
            keys.core,
            values.core,
            keys.blob(layer.device),
            values.blob(layer.device),
            self.n_q_heads,
            lengths.sinks,
            lengths.window,
        )
        self.core.bind(*layer.codes, *layer.exact, lengths.counts)
        self.workspace_bytes = self.core.workspace_bytes()
        return self.core

    def workspace(self, stream):
        key = (self.layer.device, stream)
        if key not in self.workspaces or self.workspaces[key].numel() < self.workspace_bytes:
            self.workspaces[key] = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.layer.device)
        return self.workspaces[key]

    def append_token(self, key, value):
        if key.stride(3) != 1 or value.stride(3) != 1 or key.dtype != value.dtype:
            key, value = key.contiguous(), value.to(key.dtype).contiguous()
        self.bound(None).append(
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
            DTYPE_CODES[key.dtype],
            self.stream(),
        )

    def attend_token(self, query, scaling):
        batch, heads, _, dim = query.shape
        q = query.reshape(batch, heads, dim).contiguous()
        out = torch.empty_like(q)
        core = self.bound(heads)
        stream = self.stream()
        space = self.workspace(stream)
        core.attend(
            q.data_ptr(), out.data_ptr(), 0, DTYPE_CODES[q.dtype], scaling, space.data_ptr(), space.numel(), stream
        )
        return out[:, None]

    def encode(self, side, x, codes, first_block):
        _core.cuda_encode(side.core, side.blob(self.layer.device), x, codes, first_block, self.stream())

    def decode_tile(self, side, codes, first_block, n):
        """fp16, in the codec's coordinates."""
        shape = (codes.shape[0], codes.shape[1], n, side.core.head_dim)
        y = torch.empty(shape, dtype=torch.float16, device=codes.device)
        _core.cuda_decode(side.core, side.blob(codes.device), codes, first_block, y, self.stream())
        return y

    def decode(self, side, codes, first_block, n):
        return self.decode_tile(side, codes, first_block, n).float() @ side.inverse_matrix(codes.device)

    def to_portable(self, side, codes):
        codes = codes.contiguous()
        portable = torch.empty(*codes.shape[:3], side.core.block_bytes, dtype=torch.uint8, device=codes.device)
        if portable.numel():
            _core.cuda_pack(side.core, portable, codes, True, self.stream())
        return portable

    def from_portable(self, side, portable):
        portable = portable.contiguous()
        codes = torch.zeros(*portable.shape[:3], side.core.cuda_block_bytes, dtype=torch.uint8, device=portable.device)
        if portable.numel():
            _core.cuda_pack(side.core, portable, codes, False, self.stream())
        return codes

    def attend_chunk(self, query, key, value, scaling, valid):
        """Many queries: history in tiles that are decoded once, the chunk itself causal, joined by log-sum-exp."""
        packed, exact = self.layer.counts_before()
        if valid is None and len(set(packed)) == len(set(exact)) == 1:
            return self._attend_rows(slice(None), query, key, value, packed[0], exact[0], scaling).transpose(1, 2)
        out = torch.zeros_like(query)
        for b in range(query.shape[0]):
            rows = slice(b, b + 1)
            kept = slice(None) if valid is None else valid[b].nonzero()[:, 0]
            if valid is not None and kept.numel() == 0:
                continue
            parts = [x[rows][:, :, kept] for x in (query, key, value)]
            out[rows, :, kept] = self._attend_rows(rows, *parts, packed[b], exact[b], scaling)
        return out.transpose(1, 2)

    def _attend_rows(self, rows, query, key, value, packed, exact, scaling):
        layer = self.layer
        if not exact and not packed:  # the first tokens: no history, and PyTorch's best kernel
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        joined = Joined()
        joined.add(*fused_attention(query, key, value, True, scaling))
        if exact:
            tokens = [x[rows, :, :exact].to(query.dtype) for x in layer.exact]
            joined.add(*fused_attention(query, *tokens, False, scaling))
        if packed:
            keys, values = layer.sides
            batch, heads, n, dim = query.shape
            grouped = query.float().reshape(batch, keys.core.n_kv_heads, -1, dim)
            moved = (grouped @ keys.query_matrix(query.device)).reshape(query.shape)
            moved = moved.clamp(-65504.0, 65504.0).half()
            history = Joined()
            for start in range(0, packed, TILE):
                count = min(TILE, packed - start)
                tile = [
                    self.decode_tile(side, codes[rows], start // BLOCK, count)
                    for side, codes in zip(layer.sides, layer.codes)
                ]
                history.add(*fused_attention(moved, *tile, False, scaling))
            out = history.out.reshape(batch, values.core.n_kv_heads, -1, dim) @ values.inverse_matrix(query.device)
            joined.add(out.reshape(query.shape), history.lse)
        return joined.out.to(query.dtype)


class Joined:
    """Parts of a softmax, joined by their log-sum-exps."""

    out = lse = None

    def add(self, out, lse):
        out = out.float()
        if self.out is None:
            self.out, self.lse = out, lse
            return
        total = torch.logaddexp(self.lse, lse)
        self.out = self.out * (self.lse - total).exp()[..., None] + out * (lse - total).exp()[..., None]
        self.lse = total


def fused_attention(q, k, v, causal, scaling):
    """Attention and its log-sum-exp, fp32 [B, Hq, n]; a causal one is square."""
    n = q.shape[2]
    if q.dtype == torch.float32:
        return math_attention(q, k, v, causal, scaling)
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)
    return out[0], out[1][:, :, :n]


def math_attention(q, k, v, causal, scaling):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    outs, sums = [], []
    for start in range(0, q.shape[2], MATH_ROWS):
        scores = q[:, :, start : start + MATH_ROWS].float() @ k.transpose(2, 3) * scaling
        if causal:
            rows = torch.arange(start, start + scores.shape[2], device=q.device)
            hidden = rows[:, None] < torch.arange(k.shape[2], device=q.device)
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse[..., None]).exp() @ v)
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)
