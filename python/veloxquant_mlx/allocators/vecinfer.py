"""Calibration of VecInfer: smooth factors, learned rotations and product codebooks from a model and some text."""

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.recording import CONTEXT_TOKENS, collect, undo_rope
from veloxquant_mlx.cache.codebook import (
    TRANSFORMS,
    Codebook,
    Rotations,
    SmoothFactors,
    code_bits,
    key_and_value_bits,
)
from veloxquant_mlx.cache.fitting import Fitting, fit_learned, fit_tables
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint, one_shape
from veloxquant_mlx.generated import OWN_SHARE

SAMPLE_TOKENS = 128  # tokens of one calibration sample


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
    table each), "head" (one for all sub-vectors of a head) or "lane" (as many as GPUs look up as fast
    as one: 4 a head for keys, 8 for values). entries: "fp16" or "int8" (integers
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
    weights = data.token_weights or ([None] * len(data.keys),) * 2
    for i, sides in enumerate(zip(data.keys, data.values)):
        for side, x, fitting, counts in zip(("keys", "values"), sides, fittings, weights):
            counts = None if counts[i] is None else mx.array(counts[i])
            if transform == "learned":
                queries = mx.array(moments[i]) if side == "keys" else None
                rotated, table, error = fit_learned(side, x, fitting, queries, counts)
                learned[side].append([None if a is None else np.array(a) for a in rotated])
            else:
                scale = {"scale": mx.array(factors[i])} if side == "keys" else {}
                table, error = fit_tables(side, x, fitting, counts, **scale)
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
