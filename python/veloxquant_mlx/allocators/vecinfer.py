"""Calibration of VecInfer: smooth factors, learned rotations and product codebooks from a model and some text."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codebook import (
    TRANSFORMS,
    Codebook,
    Rotations,
    SmoothFactors,
    code_bits,
    key_and_value_bits,
)
from veloxquant_mlx.cache.fitting import Fitting, fit_learned, fit_tables
from veloxquant_mlx.cache.layout import attention_layers, cache_of, model_fingerprint, one_shape, put_cache
from veloxquant_mlx.generated import OWN_SHARE, built_in_texts
from veloxquant_mlx.models.rope import detect_ropes
from veloxquant_mlx.text import read_texts

SAMPLE_TOKENS = 128  # tokens of one calibration sample
# Samples are run through the model in a dozen windows, of this length at most.
WINDOW_TOKENS = 2048
# Keys carry their RoPE: tables that saw no position as late as the ones they encode lose most of a key
# (docs/quality.md). Windows begin at positions that are spread over so many.
CONTEXT_TOKENS = 8192
# The first tokens of a window draw attention and have keys of their own kind. Caches keep them
# exact (sinks=4), so they are not trained on.
SINK_TOKENS = 4


def calibrate_smooth_factors(model, tokenizer, num_samples=64, *, texts=None, progress=None):
    """lambda_i = sqrt(max_t |K[t, i]|) of every layer, KV head and channel (arXiv 2510.06175, eq. 4).

    Returns SmoothFactors, an fp32 array [L, H_kv, D], with the second moments of the queries that
    learned rotations need. num_samples: samples of 128 tokens.
    texts: strings or the path of a text file; default a built-in source. progress(fraction, text).
    """
    one_shape(model)  # or a ValueError
    return _smooth_factors(model, collect(model, tokenizer, num_samples * SAMPLE_TOKENS, texts, progress))


def train_codebook(
    model,
    tokenizer,
    smooth_factors=None,
    num_samples=128,
    num_centroids=256,
    num_subspaces=None,
    *,
    texts=None,
    value_num_centroids=None,
    value_num_subspaces=None,
    codebook_per="subvector",
    entries="fp16",
    transform="hadamard",
    context=CONTEXT_TOKENS,
    seed=0,
    progress=None,
):
    """Product codebooks of keys (post-RoPE) and values, per layer and KV head, by k-means on their
    transforms. Returns a Codebook.

    num_subspaces: sub-vectors of a head; None: 2 bits per element. value_num_centroids,
    value_num_subspaces: of the values; None: as the keys. codebook_per: "subvector" (one
    table each) or "head" (one for all sub-vectors of a head). entries: "fp16" or "int8" (integers
    times one power of two a table, held in fp16: the form that GPUs look up fastest).
    smooth_factors: what calibrate_smooth_factors returned (None: measured on the same text).
    transform: "hadamard" (keys smoothed, both sides rotated alike everywhere) or "learned" (a rotation
    per head, in the metric of the queries: better, and two more matrices a head to hold). context:
    positions that the tables are to serve; more positions, a little less for each.
    """
    layers, (_, dim) = attention_layers(model), one_shape(model)
    _check_transform(transform)
    how = {"per": codebook_per, "entries": entries, "seed": seed}
    keys = _fitting(dim, num_centroids, num_subspaces, how)
    values = keys
    if (value_num_centroids, value_num_subspaces) != (None, None):
        values = _fitting(dim, value_num_centroids or num_centroids, value_num_subspaces, how, "value_")
    _check_factors(model, smooth_factors, layers)
    steps = _Steps(progress, collecting=0.5)
    data = collect(model, tokenizer, num_samples * SAMPLE_TOKENS, texts, steps.collecting, context=context)
    if smooth_factors is None:
        smooth_factors = _smooth_factors(model, data)
    return _train(model, data, smooth_factors, transform, (keys, values), steps.training)


def calibrate(
    model,
    tokenizer,
    bits=2,
    *,
    texts=None,
    num_tokens=8192,
    codebook_per="subvector",
    entries="fp16",
    transform="hadamard",
    before_rope=False,
    own_share=OWN_SHARE,
    context=CONTEXT_TOKENS,
    seed=0,
    progress=None,
):
    """Smooth factors and a codebook from one pass over the text: (SmoothFactors, Codebook).

    bits: per element, 1, 1.5, 2, 2.5, 3, 4, 6 or 8, or a pair (keys, values); a list of such: then
    (SmoothFactors, [Codebook, ...]).
    codebook_per, entries, transform: as in train_codebook. before_rope: of keys before RoPE, which no
    cache takes: for cache/reference.py alone. own_share: of the built-in text, what the model writes.
    context: positions that the tables are to serve.
    """
    _check_transform(transform)
    several = isinstance(bits, list)
    pairs = [key_and_value_bits(b) for b in (bits if several else [bits])]
    if num_tokens < 1:
        raise ValueError(f"num_tokens: got {num_tokens}, wanted at least 1")
    steps = _Steps(progress, collecting=0.5)
    _, dim = one_shape(model)
    how = {"per": codebook_per, "entries": entries, "seed": seed}
    fittings = [tuple(Fitting.of_bits(b, dim, **how) for b in pair) for pair in pairs]
    data = collect(model, tokenizer, num_tokens, texts, steps.collecting, own_share, context)
    if before_rope:
        data = undo_rope(model, data)
    factors = _smooth_factors(model, data)
    codebooks = []
    for i, sides in enumerate(fittings):

        def step(fraction, text, i=i):
            steps.training((i + fraction) / len(pairs), text)

        codebooks.append(_train(model, data, factors, transform, sides, step))
    return factors, codebooks if several else codebooks[0]


def compute_query_lut(q, codebook, sub_dim):
    """q: transformed queries [..., D] -> scores of every centroid, [..., n_sub, C] in the dtype of q.

    The score of a token is the sum over s of lut[..., s, code[s]]. codebook: as in metal/_vecinfer.py.
    """
    return _ext.vecinfer_query_lut(q, codebook, sub_dim)


@dataclass
class CalibrationData:
    """What `collect` saw of every attention layer.

    keys (post-RoPE), values: one fp16 array [H_kv, n, D] per layer. query_moments: E q_i^2 of the
    post-RoPE queries of all query heads of a KV head, fp32 [L, H_kv, D]; None where a layer calls
    MLX's attention directly, so that its queries cannot be seen.
    """

    keys: list
    values: list
    query_moments: np.ndarray | None
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
        mx.eval([(r.keys[-1], r.values[-1], r.query_squares) for r in recorders])
        done += n
        report(writing + (1 - writing) * done / len(tokens), "running the model")
    moments = [r.query_moments() for r in recorders]
    return CalibrationData(
        keys=[mx.concatenate(r.keys, axis=1) for r in recorders],
        values=[mx.concatenate(r.values, axis=1) for r in recorders],
        query_moments=None if any(m is None for m in moments) else np.stack(moments),
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
    """Stands in for a layer's cache and keeps what passes through it: keys and values, fp16
    [H_kv, n, D] per window, and the sum of the squares of the queries. The window begins at position `first`."""

    first = 0

    def __init__(self):
        self.keys, self.values = [], []
        self.query_squares, self.n_queries = [], 0
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
        return self.cache.update_and_fetch(keys, values)

    def observe_queries(self, queries):
        """queries: [1, H_q, n, D] as attention gets them; called by its hook (metal/fused_sdpa.py)."""
        _, heads, n, dim = queries.shape
        groups = heads // self.keys[-1].shape[0]
        squares = mx.square(queries.astype(mx.float32)).reshape(-1, groups * n, dim)
        squares = mx.where(mx.isfinite(squares), squares, 0).sum(axis=1)
        self.query_squares = [squares + self.query_squares[0] if self.query_squares else squares]
        self.n_queries += groups * n

    def query_moments(self):
        """E q_i^2, fp32 [H_kv, D]; None where the attention of the layer never reached the hook."""
        return np.array(self.query_squares[0]) / np.float32(self.n_queries) if self.query_squares else None


def _tokens(tokenizer, num_tokens, texts):
    tokens = []
    for text in read_texts(texts):
        tokens.extend(tokenizer.encode(text, add_special_tokens=False))
        if len(tokens) >= num_tokens:
            return tokens[:num_tokens]
    if not tokens:
        raise ValueError("texts: got no text at all, wanted some to calibrate on")
    return tokens  # a short text is used whole


def _smooth_factors(model, data):
    factors = np.stack([np.array(_ext.smooth_factors(k)) for k in data.keys])
    return SmoothFactors(factors, model_fingerprint(model), data.query_moments)


def _check_transform(transform):
    if transform not in TRANSFORMS:
        raise ValueError(f"transform: got {transform!r}, wanted 'hadamard' or 'learned'")


def _fitting(head_dim, num_centroids, num_subspaces, how, prefix=""):
    """how: further fields of the Fitting. prefix: of the arguments' names in errors."""
    if not (isinstance(num_centroids, int) and 2 <= num_centroids <= 4096):
        raise ValueError(f"{prefix}num_centroids: got {num_centroids!r}, wanted 2..4096")
    if num_subspaces is None:
        num_subspaces = head_dim * 2 // code_bits(num_centroids)
    if not (isinstance(num_subspaces, int) and num_subspaces >= 1 and head_dim % num_subspaces == 0):
        raise ValueError(f"{prefix}num_subspaces: got {num_subspaces!r}, wanted a divisor of head_dim = {head_dim}")
    return Fitting(num_subspaces, num_centroids, **how)


def _train(model, data, factors, transform, fittings, progress):
    """fittings: of keys and of values."""
    moments = getattr(factors, "query_moments", None)
    moments = data.query_moments if moments is None else moments
    if transform == "learned" and moments is None:
        raise ValueError(
            "transform: got 'learned' for a model whose attention does not show its queries, wanted 'hadamard'"
        )
    progress(0.0, "training codebooks")
    tables, errors, learned = ({"keys": [], "values": []} for _ in range(3))
    for i, sides in enumerate(zip(data.keys, data.values)):
        for side, x, fitting in zip(("keys", "values"), sides, fittings):
            if transform == "learned":
                queries = mx.array(moments[i]) if side == "keys" else None
                rotated, table, error = fit_learned(x, fitting, queries)
                learned[side].append([None if a is None else np.array(a) for a in rotated])
            else:
                scale = {"scale": mx.array(factors[i])} if side == "keys" else {}
                table, error = fit_tables(x, fitting, **scale)
            tables[side].append(np.array(table))
            errors[side].append(error)
        progress((i + 1) / len(data.keys), "training codebooks")
    rotations = None
    if transform == "learned":
        (keys, weights), (values, _) = zip(*learned["keys"]), zip(*learned["values"])
        rotations = Rotations(keys=np.stack(keys), values=np.stack(values), key_weights=np.stack(weights))
    return Codebook(
        keys=np.stack(tables["keys"]),
        values=np.stack(tables["values"]),
        smooth_factors=np.array(factors, dtype=np.float32),
        fingerprint=model_fingerprint(model),
        transform=transform,
        relative_error=errors,
        rotations=rotations,
    )


def _check_factors(model, factors, layers):
    shape = (len(layers), layers[0].n_kv_heads, layers[0].head_dim)
    if factors is None:
        return
    if tuple(factors.shape) != shape:
        raise ValueError(f"smooth_factors: got shape {list(factors.shape)}, wanted {list(shape)}")
    fingerprint = getattr(factors, "fingerprint", None)
    if fingerprint is not None and fingerprint != model_fingerprint(model):
        raise ValueError("smooth_factors: got factors of another model, wanted those of this model: calibrate again")


class _Steps:
    """Splits one progress callback into the two stages of calibration."""

    def __init__(self, progress, collecting):
        self._progress, self._collecting = progress, collecting

    def collecting(self, fraction, text):
        if self._progress:
            self._progress(self._collecting * fraction, text)

    def training(self, fraction, text):
        if self._progress:
            self._progress(self._collecting + (1 - self._collecting) * fraction, text)
