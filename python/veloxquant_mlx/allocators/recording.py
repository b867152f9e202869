"""What calibration sees of a model: keys and values of some text, queries' moments, the attention tokens got."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.layout import attention_layers, cache_of, put_cache
from veloxquant_mlx.generated import OWN_SHARE, built_in_texts
from veloxquant_mlx.models.rope import detect_ropes
from veloxquant_mlx.text import read_texts

# Samples are run through the model in a dozen windows, of this length at most.
WINDOW_TOKENS = 2048
# Keys carry their RoPE: tables that saw no position as late as the ones they encode lose most of a key
# (docs/quality.md). Windows begin at positions that are spread over so many.
CONTEXT_TOKENS = 8192
# The first tokens of a window draw attention and have keys of their own kind. Caches keep them
# exact (sinks=4), so they are not trained on.
SINK_TOKENS = 4
# Tokens that are younger are exact for a query (window=64); what they get does not count.
CODED_AGE = 64
ATTENTION_STEP = 8  # a sample of the queries tells what attention tokens get
ATTENTION_POWERS = (0.3, 0.5)  # of it, in the weight of a token: keys, values (docs/quality.md)


@dataclass
class CalibrationData:
    """What `collect` saw of every attention layer.

    keys (post-RoPE), values: one fp16 array [H_kv, n, D] per layer. query_moments: E q_i^2 of the
    post-RoPE queries of all query heads of a KV head, fp32 [L, H_kv, D]; token_weights: how much the
    error of each token counts, fp32 [L, H_kv, n]. Both None where a layer calls MLX's attention
    directly, so that its queries cannot be seen.
    """

    keys: list
    values: list
    query_moments: np.ndarray | None
    token_weights: tuple | None  # of keys and of values
    windows: list  # (position of the first token, tokens); the first SINK_TOKENS are not among keys and values

    def positions(self) -> np.ndarray:
        """Of every token among the keys and values, int32."""
        return np.concatenate(
            [np.arange(first + min(SINK_TOKENS, n - 1), first + n) for first, n in self.windows]
        ).astype(np.int32)


def window_positions(num_tokens, context) -> list:
    """(position of the first token, tokens) of each window of `num_tokens` tokens."""
    length = min(WINDOW_TOKENS, max(256, num_tokens // 12))
    lengths = [min(length, num_tokens - i) for i in range(0, num_tokens, length)]
    room, last = max(0, context - length), max(1, len(lengths) - 1)
    return [(room * i // last, n) for i, n in enumerate(lengths)]


def collect(model, tokenizer, num_tokens, texts=None, progress=None, own_share=OWN_SHARE, context=CONTEXT_TOKENS):
    """CalibrationData over `num_tokens` tokens of text. The language head is not run.

    texts: None: generated.built_in_texts, own_share of them written by the model. context: positions that the
    windows are spread over.
    """
    report, writing = progress or (lambda fraction, text: None), 0.0
    if texts is None and own_share > 0:
        writing = 0.5  # of the progress

        def wrote(fraction):
            report(writing * fraction, "the model writes calibration text")

        texts = built_in_texts(model, tokenizer, num_tokens, own_share, wrote)
    tokens = _tokens(tokenizer, num_tokens, texts)
    report(writing, "running the model")
    layers = attention_layers(model)
    inner = getattr(model, "model", model)  # without the language head
    recorders, windows, done = [_Recorder() for _ in layers], window_positions(len(tokens), context), 0
    for first, n in windows:
        # Our exact cache: its attention is faster on a CPU than MLX's, and needs no score matrix.
        caches = KVCacheBuilder.build(model, KVCacheConfig(method="fp16"))
        for layer, recorder in zip(layers, recorders):
            recorder.cache, recorder.first = cache_of(caches, layer), first
            put_cache(caches, layer, recorder)
        inner(mx.array(tokens[done : done + n])[None], cache=caches)
        mx.eval([(r.keys[-1], r.values[-1], r.query_squares, r.attention[-1:]) for r in recorders])
        done += n
        report(writing + (1 - writing) * done / len(tokens), "running the model")
    moments, weights = [r.query_moments() for r in recorders], [r.token_weights() for r in recorders]
    hidden = any(m is None for m in moments)
    return CalibrationData(
        keys=[mx.concatenate(r.keys, axis=1) for r in recorders],
        values=[mx.concatenate(r.values, axis=1) for r in recorders],
        query_moments=None if hidden else np.stack(moments),
        token_weights=None if hidden else tuple(np.stack(side) for side in zip(*weights)),
        windows=windows,
    )


def undo_rope(model, data) -> CalibrationData:
    """`data` with its keys before RoPE. Such keys meet queries turned by every angle: both channels of a pair
    get the mean of their moments."""
    positions = mx.array(data.positions())
    keys, moments = [], data.query_moments
    for i, rope in enumerate(detect_ropes(model)):
        keys.append(rope.core().unrotate(data.keys[i], positions).astype(mx.float16))
        if moments is not None:
            moments[i] = np.array(rope.turned_moments(mx.array(moments[i])))
    return replace(data, keys=keys)


class _Recorder:
    """Stands in for a layer's cache and keeps what passes through it: keys and values, fp16 [H_kv, n, D] per window,
    the sum of the squares of the queries, and the attention that each token got. The window begins at position
    `first`."""

    first = 0

    def __init__(self):
        self.keys, self.values = [], []
        self.query_squares, self.n_queries = [], 0
        self.attention, self.all_keys = [], None  # [2, H_kv, n] per window
        self.cache = None

    def __getattr__(self, name):
        return getattr(self.cache, name)

    @property
    def offset(self):
        """Where the model takes the next token to be; scores do not change where all tokens move."""
        return self.first + self.cache.offset

    def update_and_fetch(self, keys, values):
        first = min(SINK_TOKENS, keys.shape[2] - 1)
        self.keys.append(keys[0, :, first:].astype(mx.float16))
        self.values.append(values[0, :, first:].astype(mx.float16))
        self.all_keys = keys[0]
        return self.cache.update_and_fetch(keys, values)

    def observe_queries(self, queries):
        """queries: [1, H_q, n, D] as attention gets them; called by its hook (metal/fused_sdpa.py)."""
        _, heads, n, dim = queries.shape
        groups = heads // self.keys[-1].shape[0]
        squares = mx.square(queries.astype(mx.float32)).reshape(-1, groups * n, dim)
        squares = mx.where(mx.isfinite(squares), squares, 0).sum(axis=1)
        self.query_squares = [squares + self.query_squares[0] if self.query_squares else squares]
        self.n_queries += groups * n
        self.attention.append(attention_got(queries[0], self.all_keys)[:, :, min(SINK_TOKENS, n - 1) :])

    def query_moments(self):
        """E q_i^2, fp32 [H_kv, D]; None where the attention of the layer never reached the hook."""
        return np.array(self.query_squares[0]) / np.float32(self.n_queries) if self.query_squares else None

    def token_weights(self):
        """Of keys and of values, fp32 [H_kv, n] each; None as query_moments()."""
        return token_weights(np.concatenate([np.array(a) for a in self.attention], axis=2)) if self.attention else None


def attention_got(queries, keys):
    """What each key of one sequence gets from the queries that see it as a code: fp32 [2, H_kv, n], the sums of the
    probabilities, and of their squares. queries: [H_q, n, D], keys: [H_kv, n, D]; every ATTENTION_STEP-th query."""
    heads, n, dim = keys.shape
    places = mx.arange(n % ATTENTION_STEP, n, ATTENTION_STEP)
    groups, count = queries.shape[0] // heads, len(places)
    seen = queries[:, places].astype(mx.float32).reshape(heads, groups * count, dim) * dim**-0.5
    scores = (seen @ keys.astype(mx.float32).swapaxes(1, 2)).reshape(heads, groups, count, n)
    age = places[:, None] - mx.arange(n)
    p = mx.softmax(mx.where(age < 0, -mx.inf, scores), axis=-1)
    p = mx.where(age < CODED_AGE, 0, p)
    return mx.stack([p.sum(axis=(1, 2)), mx.square(p).sum(axis=(1, 2))])


def token_weights(attention):
    """How much the error of each token counts in training: attention [2, H_kv, n] -> (keys, values) fp32 [H_kv, n].

    An error of a score changes the output by the probability, an error of a value too, so that its square counts by the
    probability (keys, to the first order of the divergence) and by its square. A few tokens get most of the
    attention: the powers keep them from taking the tables over."""
    shares = np.clip(attention / np.maximum(attention.mean(axis=2, keepdims=True), 1e-30), 1e-3, 1e3)
    return tuple((side**power).astype(np.float32) for side, power in zip(shares, ATTENTION_POWERS))


def _tokens(tokenizer, num_tokens, texts):
    tokens = []
    for text in read_texts(texts):
        tokens.extend(tokenizer.encode(text, add_special_tokens=False))
        if len(tokens) >= num_tokens:
            return tokens[:num_tokens]
    if not tokens:
        raise ValueError("texts: got no text at all, wanted some to calibrate on")
    return tokens  # a short text is used whole
