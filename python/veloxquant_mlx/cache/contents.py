"""What a cache holds, byte by byte: for `veloxquant inspect` and for whoever asks where memory goes."""

from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.cache.layout import flat_caches

PARTS = ("key_codes", "value_codes", "scalars", "exact", "sinks", "tables")


def describe(caches) -> list[dict]:
    """One dict for each cache: layer, kind, tokens, codecs (names of keys and values), bits_per_element
    (of keys and values), bytes (by PARTS, or {"all": n} for caches that are not ours).

    exact: the recent tokens, with the slots that are free. scalars: what codecs keep for a token
    beside its codes. tables: shared by all sequences and no part of cache.nbytes, unless fitted on this one.
    """
    described = []
    for layer, cache in enumerate(caches):
        for part in flat_caches([cache]):
            described.append({"layer": layer, "kind": type(part).__name__, **_describe(part)})
    return described


def _describe(cache):
    if not isinstance(cache, VeloxQuantKVCache):
        return {"tokens": cache.size(), "codecs": None, "bits_per_element": None, "bytes": {"all": cache.nbytes}}
    tokens, codecs = cache.offset, cache.codecs
    parts = dict.fromkeys(PARTS, 0)
    if codecs:
        arrays = cache._core.arrays()
        exact, spans = arrays[:2], arrays[2:]
        for side, codec in enumerate(codecs):
            packed = sum(span.nbytes for span in spans[side * len(spans) // 2 : (side + 1) * len(spans) // 2])
            scalars = packed * codec.scalar_bytes * 64 // codec.block_bytes
            parts[PARTS[side]] = packed - scalars
            parts["scalars"] += scalars
            sinks = exact[side].nbytes * cache._sinks // exact[side].shape[2]
            parts["sinks"] += sinks
            parts["exact"] += exact[side].nbytes - sinks
        parts["tables"] = sum(codec.nbytes for codec in codecs)
    return {
        "tokens": tokens,
        "codecs": [codec.name for codec in codecs],
        "bits_per_element": [codec.bits_per_element for codec in codecs],
        "bytes": parts,
    }
