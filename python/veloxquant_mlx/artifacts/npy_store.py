"""NpyArtifactStore: arrays, smooth factors and codebooks on disk, atomic and checked.

The format is C++ (src/artifacts): .npy files plus a manifest with shapes and checksums.
"""

import json

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codebook import Codebook, Rotations, SmoothFactors
from veloxquant_mlx.cache.pre_rope import CommVQCodebook, PreRopeCodebook, RopePairCodebook

_NUMPY_DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "int32": np.int32,
    "bool": np.bool_,
}

# Field of Rotations -> array in the file.
_ROTATIONS = {"keys": "key_rotation", "values": "value_rotation", "key_weights": "key_weight"}
# Kind -> class; the arrays have the names of its fields.
_PRE_ROPE = {"commvq_codebook": CommVQCodebook, "rope_pair_codebook": RopePairCodebook}


class NpyArtifactStore:
    """A directory of named artifacts. save replaces whole artifacts or nothing; load verifies."""

    def __init__(self, directory):
        self.directory = str(directory)
        self._store = _ext.ArtifactStore(self.directory)

    def save(self, name: str, obj) -> None:
        """obj: an array (numpy, MLX, anything numpy takes), SmoothFactors, a Codebook or one of cache/pre_rope.py."""
        kind, attributes, arrays = _describe(obj)
        self._store.save(name, kind, json.dumps(attributes), {k: _raw(k, v) for k, v in arrays.items()})

    def load(self, name: str):
        """What was saved under `name`, bit for bit (plain arrays come back as MLX arrays).
        ValueError with one sentence where the file is missing, damaged or foreign."""
        kind, attributes, raw = self._store.load(name)
        attributes = json.loads(attributes)
        if kind == "array":
            return _mlx_array(*raw["array"])
        if kind == "smooth_factors":
            moments = _numpy_array(*raw["query_moments"]) if "query_moments" in raw else None
            return SmoothFactors(_numpy_array(*raw["factors"]), attributes["model"], moments)
        if kind == "vecinfer_codebook":
            rotations = None
            if attributes["transform"] == "learned":
                rotations = Rotations(**{field: _numpy_array(*raw[name]) for field, name in _ROTATIONS.items()})
            return Codebook(
                keys=_numpy_array(*raw["keys"]),
                values=_numpy_array(*raw["values"]),
                smooth_factors=_numpy_array(*raw["smooth_factors"]),
                fingerprint=attributes["model"],
                transform=attributes["transform"],
                relative_error=attributes["relative_error"],
                rotations=rotations,
            )
        if kind in _PRE_ROPE:
            return _PRE_ROPE[kind](
                **{field: _numpy_array(*array) for field, array in raw.items()},
                fingerprint=attributes["model"],
                relative_error=attributes["relative_error"],
            )
        raise ValueError(f"{name}: got an artifact of kind {kind!r}, wanted an array, smooth factors or a codebook")

    def describe(self, name: str) -> dict:
        """{'kind', 'attributes', 'arrays': {name: {'dtype', 'shape', 'bytes'}}}, checksums verified."""
        kind, attributes, raw = self._store.load(name)
        arrays = {k: {"dtype": d, "shape": list(s), "bytes": len(b)} for k, (d, s, b) in raw.items()}
        return {"kind": kind, "attributes": json.loads(attributes), "arrays": arrays}

    def exists(self, name: str) -> bool:
        return self._store.exists(name)

    def names(self) -> list[str]:
        return self._store.names()


def _describe(obj):
    if isinstance(obj, Codebook):
        attributes = {"model": obj.fingerprint, "transform": obj.transform, "relative_error": obj.relative_error}
        arrays = {"keys": obj.keys, "values": obj.values, "smooth_factors": obj.smooth_factors}
        if obj.rotations is not None:
            arrays |= {name: getattr(obj.rotations, field) for field, name in _ROTATIONS.items()}
        return "vecinfer_codebook", attributes, arrays
    if isinstance(obj, PreRopeCodebook):
        kind = next(kind for kind, made in _PRE_ROPE.items() if type(obj) is made)
        return kind, {"model": obj.fingerprint, "relative_error": obj.relative_error}, obj.arrays
    if isinstance(obj, SmoothFactors):
        arrays = {"factors": obj}
        if obj.query_moments is not None:
            arrays["query_moments"] = obj.query_moments
        return "smooth_factors", {"model": obj.fingerprint}, arrays
    return "array", {}, {"array": obj}


def _raw(name, array):
    if isinstance(array, mx.array):
        dtype = str(array.dtype).removeprefix("mlx.core.").replace("bool_", "bool")
        array = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    else:
        array = np.asarray(array)
        dtype = array.dtype.name
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"{name}: got dtype {dtype}, wanted one of {', '.join(_NUMPY_DTYPES)}")
    return dtype, list(array.shape), np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()


def _numpy_array(dtype, shape, data):
    return np.frombuffer(data, dtype=_NUMPY_DTYPES[dtype]).reshape(shape).copy()


def _mlx_array(dtype, shape, data):
    array = mx.array(_numpy_array(dtype, shape, data))
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array
