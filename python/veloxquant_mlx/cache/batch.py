"""The cache of a batch: a cache per row, so that a row holds and says what it would alone.

mlx_lm pads the rows of a batch to one length, on the right while prompts are read, then on the left.
Padding is never stored here. Columns of the mask are counted as mlx_lm does: rows end together at
`width`, a row of n tokens starts at width - n.
"""

import copy

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.metal.rows import CausalMask, EncodedRows, Row


class BatchVeloxQuantKVCache:
    """Rows of one layer. Made by merge(); mlx_lm's batch_generate and server drive it."""

    def __init__(self, rows):
        self.rows = list(rows)
        self._padding = [0] * len(self.rows)  # columns of padding that a row will see before its tokens
        self._columns = [(0, 0)] * len(self.rows)  # (first, n): tokens of each row in the latest step
        self._expected = [None] * len(self.rows)  # tokens to come before padding; None: all are tokens
        self._step = None  # of the latest step: its end column, the shape of its keys

    @classmethod
    def merge(cls, caches):
        """The given single caches as rows; they stay as they are (arrays are shared)."""
        for cache in caches:
            if not isinstance(cache, VeloxQuantKVCache):
                raise ValueError(f"caches: got a {type(cache).__name__}, wanted VeloxQuantKVCache in every row")
        return cls(copy.deepcopy(cache) for cache in caches)

    # What models call.

    @property
    def offset(self) -> mx.array:
        """Per row, the position of the step's first column: negative in front of left padding."""
        return mx.array([row.offset - padding for row, padding in zip(self.rows, self._padding)])

    def update_and_fetch(self, keys, values):
        """keys, values: [B, H_kv, n, D], RoPE applied. Returns EncodedRows for the fused attention,
        or dense left-padded arrays where the layer cannot use it."""
        n_columns, width = keys.shape[2], self._width()
        fetched = []
        for i, cache in enumerate(self.rows):
            first = min(self._padding[i], n_columns)
            n = n_columns - first
            if self._expected[i] is not None:
                n = min(n, self._expected[i])
                self._expected[i] -= n
            self._padding[i] -= first
            taken = (slice(i, i + 1), slice(None), slice(first, first + n))
            fetched.append(cache.update_and_fetch(keys[taken], values[taken]) if n else cache.fetch())
            self._columns[i] = first, n
        self._step = width + n_columns, keys.shape
        return self._handed_out(fetched)

    def keys_and_values(self):
        """For layers that attend to the keys and values of another one, after its update."""
        return self._handed_out([row.fetch() for row in self.rows])

    def _handed_out(self, fetched):
        end, (_, heads, n_columns, dim) = self._step
        rows = []
        for cache, (keys, values), (first, n) in zip(self.rows, fetched, self._columns):
            start = end - n_columns + first + n - cache.offset
            rows.append(Row(keys, values, first, n, start, cache.offset))
        shape = (len(rows), heads, end, dim)
        if self.fused:
            encoded = EncodedRows(tuple(rows), shape)
            return encoded, encoded
        return _dense(rows, shape, "keys"), _dense(rows, shape, "values")

    @property
    def fused(self) -> bool:
        return all(row.fused for row in self.rows)

    def observe_queries(self, queries):
        """queries: [B, H_q, n, D] of the columns that update_and_fetch just took; padding is left out."""
        for i, (cache, (first, n)) in enumerate(zip(self.rows, self._columns)):
            if n:
                cache.observe_queries(queries[i : i + 1, :, first : first + n])

    def make_mask(self, n, return_array=False, window_size=None):
        padding = mx.array(self._left_padding())
        mask = create_causal_mask(n, self._width(), window_size=window_size, left_padding=padding)
        return mask if window_size is not None else CausalMask(mask)

    # What the batch generator calls.

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        """Announces the padding of the next columns: left_padding columns in front of each row's
        tokens, or, with right_padding, only `lengths` tokens of each row and padding from there on."""
        if left_padding is not None:
            if not self.empty():
                raise ValueError("left_padding: got it for rows that hold tokens, wanted empty rows")
            self._padding = [a + int(b) for a, b in zip(self._padding, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None or len(lengths) != len(self.rows):
                raise ValueError(f"lengths: got {lengths!r:.80}, wanted one for each of {len(self.rows)} rows")
            self._expected = [int(n) for n in lengths]

    def finalize(self):
        self._columns = [(0, 0)] * len(self.rows)  # (first, n): tokens of each row in the latest step
        self._expected = [None] * len(self.rows)

    def filter(self, batch_indices):
        """Keeps the given rows, in the given order."""
        indices = batch_indices.tolist() if isinstance(batch_indices, mx.array) else list(batch_indices)
        for name in ("rows", "_padding", "_expected", "_columns"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])

    def extend(self, other):
        """Appends the rows of another batch."""
        self.rows = self.rows + other.rows
        self._padding = self._padding + other._padding
        self._expected = self._expected + other._expected
        self._columns = self._columns + other._columns

    def extract(self, index) -> VeloxQuantKVCache:
        """The cache of one row, on its own."""
        return copy.deepcopy(self.rows[index])

    def is_trimmable(self):
        return True

    def trim(self, n) -> int:
        """Forgets the last n tokens of every row; a shorter row becomes empty."""
        return max((row.trim(n) for row in self.rows), default=0)

    def size(self) -> int:
        return self._width()

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    @property
    def left_padding(self) -> mx.array:
        return mx.array(self._left_padding())

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def owns_tables(self) -> bool:
        return any(row.owns_tables for row in self.rows)

    @property
    def codecs(self) -> tuple:
        """Those of all rows; rows of one model share them."""
        return tuple({id(c): c for row in self.rows for c in row.codecs}.values())

    @property
    def state(self) -> tuple:
        """The states of the rows; not to be taken between prepare() and finalize()."""
        return tuple(row.state for row in self.rows)

    @state.setter
    def state(self, state):
        self.__init__(VeloxQuantKVCache.from_state(row) for row in state)

    @classmethod
    def from_state(cls, state):
        batch = cls([])
        batch.state = state
        return batch

    def _width(self) -> int:
        return max((row.offset for row in self.rows), default=0)

    def _left_padding(self) -> list:
        width = self._width()
        return [width - row.offset + padding for row, padding in zip(self.rows, self._padding)]


def _dense(rows, shape, side):
    held = [getattr(row, side) for row in rows]
    dtype = next((x.dtype for x in held if x is not None), mx.float32)
    padded = []
    for row, x in zip(rows, held):
        if x is None:
            padded.append(mx.zeros((1, *shape[1:]), dtype))
        else:
            after = shape[2] - row.start - row.length
            padded.append(mx.pad(x, [(0, 0), (0, 0), (row.start, after), (0, 0)]))
    return mx.concatenate(padded)


# load_prompt_cache looks classes up by their names in this module.
mlx_lm_cache.BatchVeloxQuantKVCache = BatchVeloxQuantKVCache
