"""Calibration of VecInfer: smooth factors and product codebooks from a model and some text."""

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.codebook import Codebook, SmoothFactors
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint
from veloxquant_mlx.text import read_texts

SAMPLE_TOKENS = 128  # tokens of one calibration sample
# Samples are run through the model in windows of this length: keys carry their RoPE, so that the
# codebook must see positions as late as the ones it will encode.
WINDOW_TOKENS = 2048
# The first tokens of a window draw attention and have keys of their own kind. Caches keep them
# exact (sinks=4), so they are not trained on.
SINK_TOKENS = 4

# bits per element -> (dimensions of a sub-vector, centroids)
TABLE_SHAPES = {1: (8, 256), 2: (4, 256), 4: (2, 256)}


def calibrate_smooth_factors(model, tokenizer, num_samples=64, *, texts=None, progress=None):
    """lambda_i = sqrt(max_t |K[t, i]|) of every layer, KV head and channel (arXiv 2510.06175, eq. 4).

    Returns SmoothFactors, an fp32 array [L, H_kv, D]. num_samples: samples of 128 tokens.
    texts: strings or the path of a text file; default a built-in source. progress(fraction, text).
    """
    keys, _ = collect_kv(model, tokenizer, num_samples * SAMPLE_TOKENS, texts, progress)
    return _smooth_factors(model, keys)


def train_codebook(
    model,
    tokenizer,
    smooth_factors=None,
    num_samples=128,
    num_centroids=256,
    num_subspaces=None,
    *,
    texts=None,
    codebook_per="subvector",
    transform="hadamard",
    seed=0,
    progress=None,
):
    """Product codebooks of keys (post-RoPE, smoothed, rotated) and values (rotated), per layer and
    KV head, by k-means. Returns a Codebook.

    num_subspaces: sub-vectors of a head; None: 2 bits per element. codebook_per: "subvector" (one
    table each) or "head" (one for all sub-vectors of a head). smooth_factors: what
    calibrate_smooth_factors returned (None: measured on the same text).
    """
    layers = attention_layers(model)
    dim = layers[0].head_dim
    if num_subspaces is None:
        num_subspaces = dim * 2 // (4 if num_centroids <= 16 else 8)
    _check_training(dim, num_centroids, num_subspaces, codebook_per, transform)
    _check_factors(model, smooth_factors, layers)
    steps = _Steps(progress, collecting=0.5)
    keys, values = collect_kv(model, tokenizer, num_samples * SAMPLE_TOKENS, texts, steps.collecting)
    if smooth_factors is None:
        smooth_factors = _smooth_factors(model, keys)
    return _train(model, keys, values, smooth_factors, num_subspaces, num_centroids, codebook_per, seed, steps.training)


def calibrate(
    model, tokenizer, bits=2, *, texts=None, num_tokens=8192, codebook_per="subvector", seed=0, progress=None
):
    """Smooth factors and a codebook from one pass over the text: (SmoothFactors, Codebook).

    bits: 1, 2 or 4 per element, or a sequence of them: then (SmoothFactors, [Codebook, ...]).
    """
    several = isinstance(bits, (list, tuple))
    wanted = list(bits) if several else [bits]
    for b in wanted:
        if b not in TABLE_SHAPES:
            raise ValueError(f"bits: got {b!r}, wanted one of {', '.join(map(str, TABLE_SHAPES))}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens: got {num_tokens}, wanted at least 1")
    steps = _Steps(progress, collecting=0.5)
    keys, values = collect_kv(model, tokenizer, num_tokens, texts, steps.collecting)
    factors = _smooth_factors(model, keys)
    codebooks = []
    for i, b in enumerate(wanted):
        sub_dim, centroids = TABLE_SHAPES[b]
        dim = factors.shape[-1]
        _check_training(dim, centroids, dim // sub_dim, codebook_per, "hadamard")

        def step(fraction, text, i=i):
            steps.training((i + fraction) / len(wanted), text)

        codebooks.append(_train(model, keys, values, factors, dim // sub_dim, centroids, codebook_per, seed, step))
    return factors, codebooks if several else codebooks[0]


def collect_kv(model, tokenizer, num_tokens, texts=None, progress=None):
    """Keys (post-RoPE) and values of every attention layer over `num_tokens` tokens of text.

    Returns two lists, one fp16 array [H_kv, n, D] per attention layer. The language head is not run.
    """
    tokens = _tokens(tokenizer, num_tokens, texts)
    layers = attention_layers(model)
    inner = getattr(model, "model", model)  # without the language head
    recorders = [_Recorder() for _ in layers]
    for start in range(0, len(tokens), WINDOW_TOKENS):
        # Our exact cache: its attention is faster on a CPU than MLX's, and needs no score matrix.
        caches = KVCacheBuilder.build(model, KVCacheConfig(method="fp16"))
        for layer, recorder in zip(layers, recorders):
            recorder.cache = caches[layer.index]
            caches[layer.index] = recorder
        inner(mx.array(tokens[start : start + WINDOW_TOKENS])[None], cache=caches)
        mx.eval([(r.keys[-1], r.values[-1]) for r in recorders])
        if progress:
            progress(min(1.0, (start + WINDOW_TOKENS) / len(tokens)), "running the model")
    return tuple([mx.concatenate(getattr(r, side), axis=1) for r in recorders] for side in ("keys", "values"))


class _Recorder:
    """Stands in for a layer's cache and keeps what passes through it: fp16 [H_kv, n, D] per window."""

    def __init__(self):
        self.keys, self.values = [], []
        self.cache = None

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def update_and_fetch(self, keys, values):
        first = min(SINK_TOKENS, keys.shape[2] - 1)
        self.keys.append(keys[0, :, first:].astype(mx.float16))
        self.values.append(values[0, :, first:].astype(mx.float16))
        return self.cache.update_and_fetch(keys, values)


def _tokens(tokenizer, num_tokens, texts):
    tokens = []
    for text in read_texts(texts):
        tokens.extend(tokenizer.encode(text, add_special_tokens=False))
        if len(tokens) >= num_tokens:
            return tokens[:num_tokens]
    if not tokens:
        raise ValueError("texts: got no text at all, wanted some to calibrate on")
    return tokens  # a short text is used whole


def _smooth_factors(model, keys):
    return SmoothFactors(np.stack([np.array(_ext.smooth_factors(k)) for k in keys]), model_fingerprint(model))


def _train(model, keys, values, factors, num_subspaces, num_centroids, codebook_per, seed, progress):
    tables = {"keys": [], "values": []}
    errors = {"keys": [], "values": []}
    for i, (k, v) in enumerate(zip(keys, values)):
        for side, x, scale in (("keys", k, mx.array(factors[i])), ("values", v, None)):
            table, error = _ext.train_tables(
                x,
                scale=scale,
                n_subvectors=num_subspaces,
                n_centroids=num_centroids,
                per_head=codebook_per == "head",
                seed=seed,
            )
            tables[side].append(np.array(table))
            errors[side].append([round(e, 6) for e in error])
        if progress:
            progress((i + 1) / len(keys), "training codebooks")
    return Codebook(
        keys=np.stack(tables["keys"]),
        values=np.stack(tables["values"]),
        smooth_factors=np.array(factors, dtype=np.float32),
        fingerprint=model_fingerprint(model),
        relative_error=errors,
    )


def _check_training(head_dim, num_centroids, num_subspaces, codebook_per, transform):
    if not (isinstance(num_centroids, int) and 2 <= num_centroids <= 256):
        raise ValueError(f"num_centroids: got {num_centroids!r}, wanted 2..256")
    if not (isinstance(num_subspaces, int) and num_subspaces >= 1 and head_dim % num_subspaces == 0):
        raise ValueError(f"num_subspaces: got {num_subspaces!r}, wanted a divisor of head_dim = {head_dim}")
    if codebook_per not in ("subvector", "head"):
        raise ValueError(f"codebook_per: got {codebook_per!r}, wanted 'subvector' or 'head'")
    if transform != "hadamard":
        raise ValueError(f"transform: got {transform!r}, wanted 'hadamard'")


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
