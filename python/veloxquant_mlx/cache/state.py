"""The state of one cache as mlx_lm stores it: (header, checksum, array, array, ...).

header: JSON text with the version, positions, settings and codecs; strings and arrays are all that
survives mlx_lm's save_prompt_cache exactly. checksum: CRC-32 of everything else. arrays: those of
the key codec, of the value codec, then exact keys, exact values, key spans, value spans.

Spans are in memory order in `state`, because mlx_lm evaluates states after every prefill chunk; the
files of veloxquant_mlx.cache.prompt_cache have them in interchange order. The header says which.
"""

import json

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.adaptive import Fit, FitPlan, QueryMoments

FORMAT, VERSION = "veloxquant-cache", 2
ORDERS = ("memory", "interchange")
SETTINGS = {
    "fingerprint": (str, type(None)),
    "layer": (int, type(None)),
    "window": (int,),
    "sinks": (int,),
    "strict": (bool,),
    "fused": (bool,),
    "owns_tables": (bool,),
}
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}


def pack(settings: dict, codecs, core, exact_dtype, fit=None, interchange=False) -> tuple:
    """settings: SETTINGS of the cache. core: None before its first use. fit: an adaptive.Fit to come."""
    header = {"format": FORMAT, "version": VERSION, "order": ORDERS[interchange], **settings}
    arrays = []
    if core is not None:
        header["exact_dtype"] = str(exact_dtype).removeprefix("mlx.core.")
        header["codecs"] = [_described(codec) for codec in codecs]
        header["positions"] = core.positions()
        arrays = [a for codec in codecs for _, a in sorted(codec.arrays.items())]
        if fit is not None:
            header["fit"] = {"plan": fit.plan.as_dict(), "queries": fit.moments.count, "again": fit.again}
            arrays += [] if fit.moments.squares is None else [fit.moments.squares]
        arrays += core.interchange_arrays() if interchange else core.arrays()
    text = json.dumps(header)
    return text, _ext.checksum(text, arrays), *arrays


def unpack(state) -> tuple:
    """(settings, codecs, core, exact dtype, fit); the last four None where the cache was never used,
    the last where no fit is to come.
    ValueError with one sentence where the state is damaged, inconsistent or of another version."""
    header, arrays = _verified(state)
    try:
        return _rebuilt(header, arrays)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"state: got a header that is incomplete or has wrong types ({error!r:.80})") from None


def _verified(state):
    state = list(state) if isinstance(state, (list, tuple)) else []
    if len(state) < 2 or not isinstance(state[0], str) or not all(isinstance(a, mx.array) for a in state[1:]):
        raise ValueError("state: got something else, wanted what VeloxQuantKVCache.state gives")
    text, checksum, *arrays = state
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"state: got a damaged or foreign header, wanted one of {FORMAT!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"state: got version {header.get('version')!r:.40}, wanted {VERSION}")
    wanted = _ext.checksum(text, arrays).item()
    if checksum.shape != (1,) or checksum.dtype != mx.uint32 or checksum.item() != wanted:
        raise ValueError(f"state: got a checksum that does not match the contents, wanted {wanted:08x}: it is damaged")
    return header, arrays


def _rebuilt(header, arrays):
    settings = {name: header[name] for name in SETTINGS}
    for name, types in SETTINGS.items():
        if type(settings[name]) not in types:
            raise ValueError(f"state: got {name} {settings[name]!r:.40}, wanted {types[0].__name__}")
    if header["order"] not in ORDERS:
        raise ValueError(f"state: got order {header['order']!r:.40}, wanted {' or '.join(ORDERS)}")
    if "codecs" not in header:
        if arrays:
            raise ValueError(f"state: got {len(arrays)} arrays without a codec, wanted none")
        return settings, None, None, None, None
    exact_dtype = _DTYPES[header["exact_dtype"]]
    if len(header["codecs"]) != 2:
        raise ValueError(f"state: got {len(header['codecs'])} codecs, wanted those of keys and values")
    codecs = []
    for side, description in zip(("keys", "values"), header["codecs"]):
        n = len(description["arrays"])
        if len(arrays) < n:
            raise ValueError(f"state: got {len(arrays)} arrays for the codec of the {side}, wanted at least {n}")
        codecs.append(_restored(side, description, arrays[:n]))
        arrays = arrays[n:]
    fit, arrays = _restored_fit(header.get("fit"), codecs[0], arrays)
    core = _ext.ArrayCache(*codecs, settings["window"], settings["sinks"], exact_dtype)
    core.restore(arrays, header["positions"], header["order"] == "interchange")
    return settings, tuple(codecs), core, exact_dtype, fit


def _restored_fit(described, codec, arrays):
    """(the fit to come or None, the arrays that follow its own)."""
    if described is None:
        return None, arrays
    again = described["again"]
    fit = Fit(FitPlan.from_dict(described["plan"]), QueryMoments(count=described["queries"]), again)
    if (
        type(again) is not bool
        or (codec.method == "exact") == again
        or type(fit.moments.count) is not int
        or fit.moments.count < 0
    ):
        raise ValueError(f"state: got a fit of {described!r:.80} for {codec.name} codes, wanted one for such codes")
    if fit.moments.count > 0:
        squares, *arrays = arrays
        if squares.shape != (codec.n_kv_heads, codec.head_dim) or squares.dtype != mx.float32:
            raise ValueError(f"state: got query moments {squares.shape}, wanted those of each head")
        fit.moments.squares = squares
    return fit, arrays


def _described(codec) -> dict:
    return {
        "method": codec.method,
        "n_kv_heads": codec.n_kv_heads,
        "head_dim": codec.head_dim,
        "options": codec.options,
        "arrays": sorted(codec.arrays),
    }


def _restored(side, description, arrays):
    codec = _ext.codec(
        side,
        description["method"],
        description["n_kv_heads"],
        description["head_dim"],
        description["options"],
        dict(zip(description["arrays"], arrays)),
    )
    # A batch axis would have to fit the batch of the cache: such tables are not saved.
    if codec.n_sequences != 1:
        raise ValueError(f"state: got tables for {codec.n_sequences} sequences, wanted those of one")
    return codec
