"""Where a cache loses: the error that its codes make in the scores and the values of each layer."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache

N_QUERIES = 64  # the last so many of the tokens look back at the codes


@dataclass(frozen=True)
class LayerError:
    """score: root mean square error of a score q . k / sqrt(head_dim) in nats, the part that is the same for
    all keys of a query left out, since softmax does not see it; the attention of the layer moves by about
    score^2 / 2 nats. value: |v - v^|^2 / |v|^2. Both over the tokens that are codes."""

    layer: int
    score: float
    value: float


def layer_errors(model, tokens, caches) -> list[LayerError]:
    """Reads `tokens` with `caches` (new, ours) and compares what they hold with what they were given.

    ValueError where no token became codes, or where a layer's attention hides its queries.
    """
    observers = observed(caches)
    mx.eval(model(mx.array(np.asarray(tokens, np.int32))[None], cache=observers))
    seen = [o for o in observers if isinstance(o, _Observer) and o.queries is not None]
    if not seen:
        raise ValueError("model: got no layer whose attention runs on codes, wanted at least one")
    return [observer.error() for observer in seen]


def observed(caches) -> list:
    """Caches to run a model with that keep what passes through them; errors_of() compares it with `caches`."""
    return [_Observer(c) if isinstance(c, VeloxQuantKVCache) and c.fused else c for c in caches]


def errors_of(observers) -> list[LayerError]:
    """Of the layers among observed() that hold codes and saw their queries; may be none."""
    seen = [o for o in observers if isinstance(o, _Observer) and o.queries is not None]
    return [o.error() for o in seen if o.packed_range[0] < o.packed_range[1]]


class _Observer:
    """Stands in for a cache and keeps the keys and values that it was given, and the last queries."""

    def __init__(self, cache):
        self._cache = cache
        self.keys, self.values, self.queries = [], [], None

    def __getattr__(self, name):
        return getattr(self._cache, name)

    def update_and_fetch(self, keys, values):
        self.keys.append(keys)
        self.values.append(values)
        return self._cache.update_and_fetch(keys, values)

    def observe_queries(self, queries):
        self._cache.observe_queries(queries)
        self.queries = queries[:, :, -N_QUERIES:]

    def error(self):
        keys, values = (_rows(mx.concatenate(x, axis=2)) for x in (self.keys, self.values))
        held = [_rows(side.dequantize()) for side in self._cache.fetch()]
        coded = slice(*self._cache.packed_range)
        if coded.start >= coded.stop:
            raise ValueError(f"tokens: got {keys.shape[1]}, wanted more: none of them became codes yet")
        queries = _rows(self.queries)
        group = len(queries) // len(keys)
        difference = np.repeat((keys - held[0])[:, coded], group, axis=0)
        scores = np.einsum("hqd,hkd->hqk", queries, difference) / math.sqrt(keys.shape[-1])
        lost = ((values - held[1])[:, coded] ** 2).sum() / max((values[:, coded] ** 2).sum(), 1e-30)
        return LayerError(self._cache.layer, float(np.sqrt(scores.var(axis=-1).mean())), float(lost))


def _rows(x):
    """[1, H, n, D] -> fp32 NumPy [H, n, D]."""
    return np.array(x[0].astype(mx.float32))
