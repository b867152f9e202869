"""Prompt caches on disk: saved whole or not at all, checked before anything in them is used.

The files are those of mlx_lm's save_prompt_cache (safetensors) with two differences: packed codes
are in interchange order, and the metadata entry `veloxquant` carries a version and the CRC-32 of
the whole file, computed with the checksum's own digits as zeros. mlx_lm's load_prompt_cache reads
them too, but checks only each layer's own checksum, and not the model.
"""

import json
import os
import re
import threading
import zlib
from pathlib import Path

from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import CacheList

from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
from veloxquant_mlx.cache.layout import attention_layers, cache_of, flat_caches, model_fingerprint, native_caches

VERSION = 1
_KEY = "veloxquant"
_PREFIX = f"version {VERSION} crc32 "
_ZEROS = "0" * 8


def save(path, caches, metadata=None) -> None:
    """Writes `caches` (one per layer) to `path`, a name that ends in .safetensors. A file that is
    there already is replaced at the end, by rename: whenever the process dies, the old or the new
    one is whole. metadata: {str: str}, comes back from load(..., return_metadata=True)."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: got {str(path)!r}, wanted a name that ends in .safetensors")
    for cache in flat_caches(caches):
        if isinstance(cache, VeloxQuantKVCache) and not cache.codecs:
            raise ValueError(
                f"caches: got one that was never used (layer {cache.layer}), wanted caches with a prompt in them"
            )
    metadata = dict(metadata or {}, **{_KEY: _PREFIX + _ZEROS})
    for key, value in metadata.items():
        # mlx_lm reads dots and numbers in keys as nested lists.
        if not (isinstance(key, str) and isinstance(value, str)) or "." in key or key.isdigit():
            raise ValueError(f"metadata: got {key!r}: {value!r:.40}, wanted text under words without dots")

    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.tmp.safetensors")
    try:
        mlx_lm_cache.save_prompt_cache(str(temporary), [_as_in_a_file(c) for c in caches], metadata)
        with open(temporary, "r+b") as file:
            at = _checksum_at(file, temporary)
            checksum = _crc32(file, at)
            file.seek(at)
            file.write(b"%08x" % checksum)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path, model=None, return_metadata=False):
    """The caches that save() wrote, with the codecs they were made with; the codebook is not needed.
    model: checks that they belong to it. ValueError with one sentence for a file that is damaged,
    truncated, of another version, or of another model."""
    path = str(path)
    with open(path, "rb") as file:
        at = _checksum_at(file, path)
        computed = _crc32(file, at)
        file.seek(at)
        stored = file.read(8)
    if stored != b"%08x" % computed:
        raise ValueError(f"{path}: got checksum {computed:08x}, wanted {stored.decode()}: the file is damaged")
    try:
        caches, metadata = mlx_lm_cache.load_prompt_cache(path, return_metadata=True)
    except Exception as error:  # also whatever mlx and mlx_lm raise where contents do not fit together
        reason = str(error) if "wanted" in str(error) else f"got contents that make no prompt cache ({error!r:.120})"
        raise ValueError(f"{path}: {reason}") from None
    if model is not None:
        _check_model(path, caches, model)
    del metadata[_KEY]
    return (caches, metadata) if return_metadata else caches


def looks_like_one(path) -> bool:
    """Whether the file, whole or damaged, was written by save(): other safetensors files are not ours."""
    with open(path, "rb") as file:
        return f'"0.{_KEY}":"{_PREFIX}'.encode() in file.read(1 << 20)


def _as_in_a_file(cache):
    """What save_prompt_cache is to see: it asks for the name of the class and for `state`."""
    if isinstance(cache, CacheList):
        state = [(_as_in_a_file(part).state, type(part).__name__) for part in cache.caches]
    elif isinstance(cache, VeloxQuantKVCache):
        state = cache.interchange_state()
    else:
        return cache
    return type(type(cache).__name__, (), {"state": state})()


def _checksum_at(file, path) -> int:
    """Where the checksum's digits are in the file; the size of the header is checked first."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    n = int.from_bytes(file.read(8), "little")
    if size < 8 or n > size - 8:
        raise ValueError(f"{path}: got {size} bytes with a header of {n}, wanted a whole safetensors file")
    text = file.read(n)
    try:
        header = json.loads(text)
        metadata = header["__metadata__"]
        largest = max(int(part) for name in [*header, *metadata] for part in name.split(".") if part.isdecimal())
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: got a damaged header or another kind of file, wanted a saved prompt cache") from None
    entry = metadata.get(f"0.{_KEY}", "no version")
    if not re.fullmatch(_PREFIX + "[0-9a-f]{8}", entry):
        raise ValueError(
            f"{path}: got {entry:.30}, wanted version {VERSION} as veloxquant_mlx.cache.prompt_cache saves"
        )
    # Lists are rebuilt as long as the numbers in the names say.
    if largest > len(header) + len(metadata):
        raise ValueError(f"{path}: got an entry number {largest} among {len(header)}, wanted consecutive numbers")
    # Quotes inside a JSON string are escaped: this is the entry itself, whatever else the header says.
    at = text.find(f'"0.{_KEY}":"{entry}"'.encode())
    if at < 0:
        raise ValueError(f"{path}: got a header in another layout than ours, wanted it as it was saved")
    return 8 + at + len(f'"0.{_KEY}":"{_PREFIX}')


def _crc32(file, at) -> int:
    """Of the whole file, the 8 digits at `at` taken as zeros."""
    file.seek(0)
    checksum = zlib.crc32(_ZEROS.encode(), zlib.crc32(file.read(at)))
    file.seek(at + 8)
    while chunk := file.read(1 << 20):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _check_model(path, caches, model):
    n, fingerprint = len(native_caches(model)), model_fingerprint(model)
    if len(caches) < n:  # more is fine: the layers of a draft model follow
        raise ValueError(f"{path}: got {len(caches)} layers, wanted {n} as the model has")
    for layer in attention_layers(model):
        if layer.slot is not None and not isinstance(caches[layer.index], CacheList):
            raise ValueError(f"{path}: got one cache as layer {layer.index}, wanted a list of them as the model has")
        cache = cache_of(caches, layer)
        if not isinstance(cache, VeloxQuantKVCache):
            continue
        if cache.fingerprint != fingerprint:
            raise ValueError(f"{path}: got a cache of model {cache.fingerprint}, wanted {fingerprint}")
        if cache.layer != layer.index:
            raise ValueError(f"{path}: got the cache of layer {cache.layer} as layer {layer.index}, wanted its own")
