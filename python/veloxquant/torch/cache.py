"""VeloxQuantCache: a transformers Cache whose tokens are packed codes."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from veloxquant import Error
from veloxquant.torch import attention
from veloxquant.torch.codecs import codec_tables_for, tables_of
from veloxquant.torch.layer import VeloxQuantLayer
from veloxquant.torch.lengths import BLOCK, Lengths
from veloxquant.torch.operator import NewTokens, issue_ticket

FORMAT = "veloxquant cache 1"


class VeloxQuantCache(Cache):
    """Pass it to `model.generate(..., past_key_values=cache)` or to the model itself.

    tables: of `calibrate`, one for each layer; or a codec that needs none, "turboquant" of 1 to 4 bits an element and 16 a
    token and head (value_bits for the values where they are to have others). The first `sinks` tokens and the newest window .. window + 63 stay exact in
    16 bits. max_length: tokens to make room for at once; else codes grow as they come. on_codes: the model's attention
    implementation becomes 'veloxquant', which reads the codes; without, attention is the model's own and sees the history
    decoded, which takes its memory for the time of a layer. strict: a token of a chunk sees as codes exactly what token
    by token decoding would show it, as evaluations want; on the CPU only.
    Sliding-window layers keep transformers' own cache.
    """

    def __init__(
        self,
        model,
        tables=None,
        sinks=4,
        window=64,
        max_length=None,
        on_codes=True,
        strict=False,
        codec=None,
        bits=4,
        value_bits=None,
    ):
        self.config = model.config.get_text_config(decoder=True)
        count = self.config.num_hidden_layers
        if (tables is None) == (codec is None):
            raise Error(f"[VeloxQuantCache] tables, codec: got {tables!r}, {codec!r}, wanted one of them")
        if tables is None:
            tables = codec_tables_for(self.config, codec, bits, value_bits)
        if len(tables) != count:
            raise Error(f"[VeloxQuantCache] tables: got tables for {len(tables)} layers, wanted {count}")
        if sinks < 0 or window < 0:
            raise Error(f"[VeloxQuantCache] sinks, window: got {sinks}, {window}, wanted 0 or more")
        self.tables, self.sinks, self.window, self.max_length = tables, sinks, window, max_length
        self.strict = strict
        self.lengths = None
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * count
        layers = []
        for kind, table in zip(kinds, tables.layers):
            if kind == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(sliding_window=self.config.sliding_window))
            elif kind != "full_attention":
                raise Error(f"[VeloxQuantCache] model: got a layer of kind '{kind}', wanted full or sliding attention")
            else:
                layers.append(DynamicLayer() if table is None else VeloxQuantLayer(self, table))
        super().__init__(layers=layers)
        self.compressed = [layer for layer in layers if isinstance(layer, VeloxQuantLayer)]
        self.all_compressed = len(self.compressed) == count
        self.ticket = issue_ticket(self, model.device)
        if on_codes:
            model.set_attn_implementation(attention.NAME)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        # A cache of compressed layers only looks at no layer here: so one graph of a decoder layer serves all of them.
        on_codes = self.attends_on_codes
        if not on_codes or not (self.all_compressed or isinstance(self.layers[layer_idx], VeloxQuantLayer)):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.layers[layer_idx].wait_for_attention()
        return NewTokens(key_states, self.ticket, layer_idx), value_states

    @property
    def attends_on_codes(self):
        return self.config._attn_implementation == attention.NAME

    @property
    def nbytes(self):
        """Bytes of these sequences as allocated: codes, exact tokens; of other layers their tensors."""
        total = sum(layer.nbytes for layer in self.compressed)
        for layer in self.layers:
            if not isinstance(layer, VeloxQuantLayer) and layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    @property
    def shared_nbytes(self):
        return self.tables.nbytes

    def start(self, batch, device):
        """The lengths that all layers share; made by the first layer to get tokens."""
        if self.strict and device.type != "cpu":
            raise Error(f"[VeloxQuantCache] strict: got {device}, wanted cpu (elsewhere give it token by token)")
        if self.lengths is None:
            self.lengths = Lengths(batch, self.sinks, self.window, device)
        elif self.lengths.device != device or self.lengths.batch != batch:
            raise Error(
                f"[VeloxQuantCache] layer: got a batch of {batch} on {device}, wanted {self.lengths.batch} on "
                f"{self.lengths.device} as the first layer has"
            )
        return self.lengths

    # CUDA graphs: what a captured forward pass of one token does on the device goes on from replay to replay; here is
    # what the host must know of it.

    def forget_captured_step(self):
        """After the capture of a step of one token, which runs nothing."""
        self.lengths.step_back()
        for layer in self.compressed:
            layer.steps -= 1

    def count_replay(self):
        """Before or after each replay. There must be room for the tokens (make_room, or max_length)."""
        self.lengths.append(1, on_device=True)
        for layer in self.compressed:
            layer.steps += 1
        room = min(layer.codes[0].shape[2] for layer in self.compressed)
        if max(self.lengths.packed) > BLOCK * room:
            raise Error(
                f"[VeloxQuantCache] count_replay: got {max(self.lengths.packed)} packed tokens, wanted at most "
                f"{BLOCK * room}: make_room before a step is captured"
            )

    def make_room(self, n_new):
        """For n_new more tokens in every row."""
        blocks = self.lengths.blocks_after(n_new)
        for layer in self.compressed:
            layer.make_room(blocks)

    @property
    def bound(self):
        """Another one where tensors of the cache are others than before: a captured step is of use no more."""
        return sum(layer.bindings for layer in self.compressed), self.lengths

    # Changes of the whole cache.

    def reset(self):
        for layer in self.layers:
            if isinstance(layer, VeloxQuantLayer):
                layer.is_initialized, layer.waiting, layer.steps = False, False, 0
                layer.codes = layer.exact = None
            else:
                layer.reset()
        self.lengths = None

    def _select(self, indices):
        if self.lengths is None:
            return
        indices = torch.as_tensor(indices, device=self.lengths.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        rows = indices.tolist()
        if not rows or min(rows) < 0 or max(rows) >= self.lengths.batch:
            raise Error(f"[VeloxQuantCache] rows: got {rows}, wanted numbers from 0 to {self.lengths.batch - 1}")
        self.lengths.select(rows)
        for layer in self.compressed:
            if layer.is_initialized:
                layer.select(indices)

    def _others(self, method, *args):
        for layer in self.layers:
            if not isinstance(layer, VeloxQuantLayer):
                getattr(layer, method)(*args)

    def reorder_cache(self, beam_idx):
        self._select(beam_idx)
        self._others("reorder_cache", beam_idx)

    def batch_select_indices(self, indices):
        self._select(indices)
        self._others("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats):
        if self.lengths is not None:
            self._select(torch.arange(self.lengths.batch).repeat_interleave(repeats))
        self._others("batch_repeat_interleave", repeats)

    def crop(self, tokens_to_remove):
        """Forgets the last -tokens_to_remove tokens of every row; a positive number is the length to keep.

        Where that cuts into a packed block, what is left of the block goes back to the exact tokens, as decoded.
        """
        lengths, tokens_to_remove = self.lengths, int(tokens_to_remove)
        if lengths is not None:
            n = lengths.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
            n = min(max(n, 0), lengths.seen)
            if n:
                self._crop(n)
        self._others("crop", tokens_to_remove)

    def _crop(self, n):
        lengths = self.lengths
        packed, exact = list(lengths.packed), list(lengths.exact)
        for b in range(lengths.batch):
            sinks = min(lengths.sinks, exact[b])
            kept = max(packed[b] + exact[b] - n, 0)
            if kept >= packed[b] + sinks:
                exact[b] = kept - packed[b]
                continue
            in_codes = max(kept - sinks, 0)
            packed[b], rest = in_codes // BLOCK * BLOCK, in_codes % BLOCK
            if rest:
                for layer in self.compressed:
                    layer.unpack_cut_block(b, packed[b], rest, exact[b])
            exact[b] = min(sinks, kept) + rest
        lengths.packed, lengths.exact = packed, exact
        lengths.before = (packed, exact)
        lengths.seen -= n
        lengths.to_device()

    # Files.

    def save(self, path):
        """One safetensors file with the codes in the core's portable order, the exact tokens and the tables."""
        if self.lengths is None:
            raise Error("[VeloxQuantCache] save: got an empty cache, wanted one with tokens")
        if len(self.compressed) != len(self.layers):
            raise Error("[VeloxQuantCache] save: got layers that are not compressed, wanted none")
        arrays, description = self.tables.to_arrays()
        arrays = {f"tables.{name}": array for name, array in arrays.items()}
        blocks = max(self.lengths.packed) // BLOCK
        for index, layer in enumerate(self.layers):
            for i, side in enumerate(layer.sides):
                codes = layer.kernels.to_portable(side, layer.codes[i][:, :, :blocks])
                arrays[f"{index}.{side.side}.codes"] = codes.cpu().contiguous()
                exact = layer.exact[i][:, :, : max(self.lengths.exact)]
                arrays[f"{index}.{side.side}.exact"] = exact.cpu().contiguous()
        head = {
            "format": FORMAT,
            "sinks": self.sinks,
            "window": self.window,
            "dtype": str(self.layers[0].dtype).removeprefix("torch."),
            "packed": self.lengths.packed,
            "exact": self.lengths.exact,
            "seen": self.lengths.seen,
        }
        save_file(arrays, str(path), metadata={"veloxquant": json.dumps(head), "tables": description})

    @classmethod
    def load(cls, path, model, max_length=None, on_codes=True):
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        try:
            head = json.loads(metadata["veloxquant"])
            if head["format"] != FORMAT:
                raise KeyError(head["format"])
            stored = {n.removeprefix("tables."): a for n, a in arrays.items() if n.startswith("tables.")}
            tables = tables_of(stored, metadata["tables"])
            cache = cls(model, tables, head["sinks"], head["window"], max_length, on_codes)
            cache._restore(head, arrays, model.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise Error(f"[VeloxQuantCache] file: got one that does not hold '{FORMAT}' whole ({error})") from None
        return cache

    def _restore(self, head, arrays, device):
        packed, exact, seen = head["packed"], head["exact"], head["seen"]
        capacity = self.sinks + self.window + BLOCK
        ok = len(packed) == len(exact) > 0 and isinstance(seen, int) and seen >= 0
        ok = ok and all(n >= 0 and n % BLOCK == 0 for n in packed) and all(0 <= n < capacity for n in exact)
        if not ok:
            raise KeyError("lengths")
        for index, layer in enumerate(self.layers):
            core = layer.tables.keys.core
            empty = torch.empty(
                len(packed), core.n_kv_heads, 0, core.head_dim, dtype=getattr(torch, head["dtype"]), device=device
            )
            layer.lazy_initialization(empty, empty)
            blocks = max(packed) // BLOCK
            layer.make_room(blocks)
            for i, side in enumerate(layer.sides):
                codes, tokens = arrays[f"{index}.{side.side}.codes"], arrays[f"{index}.{side.side}.exact"]
                wanted = (len(packed), core.n_kv_heads, blocks, side.core.block_bytes)
                if codes.shape != wanted or codes.dtype != torch.uint8:
                    raise KeyError(f"{index}.{side.side}.codes")
                if tokens.shape != (*wanted[:2], max(exact), core.head_dim) or tokens.dtype != layer.exact_dtype:
                    raise KeyError(f"{index}.{side.side}.exact")
                layer.codes[i][:, :, :blocks] = layer.kernels.from_portable(side, codes.to(device))
                layer.exact[i][:, :, : max(exact)] = tokens.to(device)
        self.lengths.packed, self.lengths.exact, self.lengths.seen = packed, exact, seen
        self.lengths.before = (packed, exact)
        self.lengths.to_device()
