"""How many tokens each row of a batch holds, the same in every layer: on the host, and on the device for the kernels."""

import torch

from veloxquant import _core

BLOCK = _core.block_tokens


class Lengths:
    """Row b: `packed[b]` tokens are codes (whole blocks), `exact[b]` are exact: the sinks, then the tail.

    A row's tail grows to window + 64 tokens; then its 64 oldest become a block. Layers take the same steps one after
    the other: the first to come makes a step, the others follow it.
    """

    def __init__(self, batch, sinks, window, device):
        self.sinks, self.window = sinks, window
        self.packed, self.exact = [0] * batch, [0] * batch
        self.seen = 0  # tokens as transformers counts them, padding included
        self.before = (self.packed, self.exact)
        self.steps = 0
        self.device = device
        # [packed before, exact before, packed after, exact after] of the step under way
        self.counts = torch.zeros(4, batch, dtype=torch.int32, device=device)

    @property
    def batch(self):
        return len(self.packed)

    @property
    def capacity(self):
        return self.sinks + self.window + BLOCK

    def sealed(self, n_exact):
        """Blocks that become packed where a row has so many exact tokens."""
        return max(0, (n_exact - self.sinks - self.window) // BLOCK)

    def blocks_after(self, n_new):
        """Packed blocks of the longest row after n_new tokens more."""
        return max(n // BLOCK + self.sealed(m + n_new) for n, m in zip(self.packed, self.exact))

    def append(self, n_new, per_row=None, on_device=False):
        """n_new tokens for every row, of which per_row[b] are no padding (all, where it is None).

        on_device: the device has taken the step itself.
        """
        self.before = (self.packed, self.exact)
        exact = [n + (n_new if per_row is None else per_row[b]) for b, n in enumerate(self.exact)]
        sealed = [self.sealed(n) for n in exact]
        self.packed = [n + BLOCK * s for n, s in zip(self.packed, sealed)]
        self.exact = [n - BLOCK * s for n, s in zip(exact, sealed)]
        self.seen += n_new
        self.steps += 1
        if self.device.type != "cuda" or on_device:
            return
        if n_new == 1 and per_row is None:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            _core.cuda_advance(self.counts.data_ptr(), self.batch, self.sinks, self.window, stream)
        else:
            self.to_device()

    def step_back(self):
        """The step just taken was only captured in a graph: on the device nothing has happened."""
        (self.packed, self.exact), self.seen, self.steps = self.before, self.seen - 1, self.steps - 1

    def to_device(self):
        """After any change that the device did not make itself."""
        if self.device.type == "cuda":
            rows = [*self.before, self.packed, self.exact]
            self.counts.copy_(torch.tensor(rows, dtype=torch.int32))

    def select(self, indices):
        """Rows by number, with repetition."""
        self.packed = [self.packed[i] for i in indices]
        self.exact = [self.exact[i] for i in indices]
        self.before = (self.packed, self.exact)
        self.counts = torch.zeros(4, len(indices), dtype=torch.int32, device=self.device)
        self.to_device()

    def uniform(self):
        """Whether all rows hold, and held before this step, the same number of tokens."""
        return all(len(set(n)) == 1 for n in (self.packed, self.exact, *self.before))
