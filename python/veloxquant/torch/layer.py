"""One layer of the cache: where its tokens are, and how they get there."""

import torch
from transformers.cache_utils import CacheLayerMixin

from veloxquant import Error
from veloxquant.torch.general import GeneralKernels
from veloxquant.torch.kernels import CpuKernels, CudaKernels
from veloxquant.torch.lengths import BLOCK


def clean(x, dtype):
    """In 16 bits, as the core rounds: NaN is 0, what does not fit is the largest that does."""
    largest = torch.finfo(dtype).max
    return torch.nan_to_num(x, nan=0.0, posinf=largest, neginf=-largest).clamp(-largest, largest).to(dtype)


def kernels_for(layer):
    if layer.device.type == "cpu":
        return CpuKernels(layer)
    if layer.device.type == "cuda":
        return (GeneralKernels if layer.tables.keys.core.is_general else CudaKernels)(layer)
    raise Error(f"[VeloxQuantCache] device: got {layer.device}, wanted cpu or cuda")


class VeloxQuantLayer(CacheLayerMixin):
    """Codes [B, H, blocks, bytes] and exact tokens [B, H, sinks + window + 64, D], of keys and of values."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache, tables):
        super().__init__()
        self.cache, self.tables = cache, tables
        self.steps = 0
        self.bindings = 0  # how often the tensors became others
        self.waiting = False

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states, value_states):
        batch, heads, _, dim = key_states.shape
        core = self.tables.keys.core
        if (heads, dim, value_states.shape[-1]) != (core.n_kv_heads, core.head_dim, core.head_dim):
            raise Error(
                f"[VeloxQuantCache] tables: got tables for {core.n_kv_heads} KV heads of {core.head_dim}, wanted "
                f"{heads} of {dim}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        lengths = self.cache.start(batch, self.device)
        self.exact_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        self.kernels = kernels_for(self)
        shape = (batch, heads, lengths.capacity, dim)
        self.exact = [torch.zeros(shape, dtype=self.exact_dtype, device=self.device) for _ in range(2)]
        blocks = -(-(self.cache.max_length or 0) // BLOCK)
        self.codes = [self.new_codes(batch, side, blocks) for side in self.sides]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.append(key_states, value_states)
        return self.dequantize(0), self.dequantize(1)

    def wait_for_attention(self):
        """It takes new tokens from there on codes: it needs them apart from the old ones."""
        if self.waiting:
            raise Error(
                "[VeloxQuantCache] update: got new tokens before the attention of the last ones ran; wanted a model "
                "whose attention goes through transformers' AttentionInterface"
            )
        self.waiting = True

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self):
        # Between two layers of a forward pass the first has stepped and this one has not yet.
        if not self.is_initialized:
            return 0
        return self.cache.lengths.seen

    def get_max_length(self):
        return -1

    @property
    def batch_size(self):
        return self.cache.lengths.batch if self.is_initialized else -1

    # Storage.

    @property
    def sides(self):
        return self.tables.keys, self.tables.values

    @property
    def nbytes(self):
        return sum(t.nbytes for t in (*self.exact, *self.codes)) if self.is_initialized else 0

    def new_codes(self, batch, side, blocks):
        shape = (batch, side.core.n_kv_heads, blocks, self.kernels.block_bytes(side))
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def rebind(self):
        self.bindings += 1
        self.kernels.bind()

    def make_room(self, blocks):
        """For so many blocks a row; by half more than there were, so that growing costs little."""
        old = self.codes[0].shape[2]
        if blocks <= old:
            return
        blocks = max(blocks, old + old // 2)
        for i, side in enumerate(self.sides):
            grown = self.new_codes(self.codes[i].shape[0], side, blocks)
            grown[:, :, :old] = self.codes[i]
            self.codes[i] = grown
        self.rebind()

    def step(self, n_new, per_row=None):
        """This layer's part of a step; returns the lengths, with what was before in `before`."""
        lengths = self.cache.lengths
        if self.steps == lengths.steps:
            lengths.append(n_new, per_row)
        self.steps += 1
        if self.steps != lengths.steps:
            raise Error("[VeloxQuantCache] update: got layers that took different steps, wanted every layer in turn")
        self.make_room(max(lengths.packed) // BLOCK)
        return lengths

    def counts_before(self):
        """Packed and exact tokens of each row before the step that this layer takes next."""
        lengths = self.cache.lengths
        return lengths.before if self.steps != lengths.steps else (lengths.packed, lengths.exact)

    def append(self, key_states, value_states, valid=None):
        """Stores new tokens [B, H, n, D]; valid: bool [B, n], False for padding."""
        n = key_states.shape[2]
        if n == 1 and valid is None and self.kernels.appends_alone:
            self.step(1)
            self.kernels.append_token(key_states, value_states)
            return
        per_row = None if valid is None else valid.sum(1).tolist()
        lengths = self.step(n, per_row)
        if valid is None and lengths.uniform():
            groups = [(slice(None), 0, None)]
        else:
            groups = [(slice(b, b + 1), b, None if valid is None else valid[b]) for b in range(lengths.batch)]
        for rows, b, mask in groups:
            for i, x in enumerate((key_states, value_states)):
                fresh = x[rows] if mask is None else x[rows][:, :, mask]
                self._store(i, rows, b, clean(fresh, self.exact_dtype))

    def _store(self, i, rows, b, fresh):
        lengths = self.cache.lengths
        packed, exact = lengths.before[0][b], lengths.before[1][b]
        both = torch.cat([self.exact[i][rows, :, :exact], fresh], dim=2)
        sealed = (lengths.packed[b] - packed) // BLOCK
        if sealed:
            end = lengths.sinks + BLOCK * sealed
            self.kernels.encode(self.sides[i], both[:, :, lengths.sinks : end], self.codes[i][rows], packed // BLOCK)
            both = torch.cat([both[:, :, : lengths.sinks], both[:, :, end:]], dim=2)
        self.exact[i][rows, :, : both.shape[2]] = both

    def dequantize(self, i):
        """All tokens of side i as 16-bit floats widened to the model's dtype; rows must hold no padding."""
        lengths = self.cache.lengths
        packed, exact = lengths.packed, lengths.exact
        if not len(set(packed)) == len(set(exact)) == 1:
            raise Error(
                "[VeloxQuantCache] attention: got rows of different lengths, wanted the 'veloxquant' attention for them"
            )
        sinks = min(lengths.sinks, exact[0])
        parts = [self.exact[i][:, :, :sinks].to(self.dtype)]
        if packed[0]:
            parts.append(self.kernels.decode(self.sides[i], self.codes[i], 0, packed[0]).to(self.dtype))
        parts.append(self.exact[i][:, :, sinks : exact[0]].to(self.dtype))
        return torch.cat(parts, dim=2)

    def attend(self, query, key, value, scaling, valid):
        """Attention of the new tokens over everything, themselves included, and their append. -> [B, n, Hq, D]"""
        self.waiting = False
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if query.shape[2] == 1 and valid is None:
            self.append(key, value)
            return self.kernels.attend_token(query, scaling)
        if self.cache.strict:
            exact = [x.clone() for x in self.exact]
            self.append(key, value, valid)
            return self.kernels.attend_stored_chunk(query, key, value, scaling, valid, exact)
        out = self.kernels.attend_chunk(query, key, value, scaling, valid)
        self.append(key, value, valid)
        return out

    # Changes of a whole cache; VeloxQuantCache calls them and changes the lengths.

    def select(self, indices):
        self.codes = [codes.index_select(0, indices) for codes in self.codes]
        self.exact = [exact.index_select(0, indices) for exact in self.exact]
        self.rebind()

    def unpack_cut_block(self, b, packed, kept, exact):
        """Row b keeps `kept` < 64 tokens of its block at `packed`: they go back into the exact storage, decoded."""
        sinks = self.cache.lengths.sinks
        for i, side in enumerate(self.sides):
            rows = self.kernels.decode(side, self.codes[i][b : b + 1], packed // BLOCK, BLOCK)[:, :, :kept]
            self.exact[i][b : b + 1, :, sinks : sinks + kept] = clean(rows, self.exact_dtype)
