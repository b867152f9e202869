"""Evaluations on record: what `veloxquant eval` measured of learned vecinfer settings, by model."""

import json

from veloxquant_mlx.cache.layout import model_fingerprint
from veloxquant_mlx.models.paths import cache_root


def _file(model):
    return cache_root() / "scores" / f"{model_fingerprint(model)}.json"


def known(model):
    """{(key bits, value bits): {"ppl_increase", "kl"}} of the model; empty where nothing was evaluated."""
    try:
        stored = json.loads(_file(model).read_text())
    except (OSError, ValueError):
        return {}
    return {tuple(map(float, key.split("/"))): score for key, score in stored.items()}


def shared(tables):
    """Whether sub-vectors of a head share some of the tables [L, H, M or 1, C, d]."""
    first = tables[0, 0]
    return len(first) == 1 or any((first[0] == other).all() for other in first[1:])


def record(model, method, score):
    """Keeps the score of a learned vecinfer setting as recommend offers it, the newest of each: with the usual
    window and sinks, and tables for each sub-vector."""
    codebook = getattr(method.trained, "codebook", None)
    if method.name != "vecinfer" or getattr(codebook, "transform", None) != "learned":
        return
    if (method.window, method.sinks) != (64, 4) or any(shared(t) for t in (codebook.keys, codebook.values)):
        return
    scores = {f"{k:g}/{v:g}": s for (k, v), s in known(model).items()}
    scores[f"{method.bits[0]:g}/{method.bits[1]:g}"] = {"ppl_increase": score.ppl_increase, "kl": score.kl}
    file = _file(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(scores))
    temporary.replace(file)
