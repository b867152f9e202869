"""Tables and transforms of a model's attention layers: made by `calibrate`, kept in one safetensors file, or read from
the directory that `veloxquant calibrate` (the package with MLX) has written."""

import hashlib
import json
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from veloxquant import Error, SideTables, _core

FORMAT = "veloxquant tables 1"
ARRAYS = ("tables", "scale", "encode_matrix", "query_matrix")


class Side:
    """One side of one layer: what the core makes of it, and copies of that on devices. It has no arrays of its own."""

    arrays = {}

    def __init__(self, side, core):
        self.side, self.core = side, core
        self._devices = {}

    def _on(self, name, device, make):
        key = (name, device)
        if key not in self._devices:
            self._devices[key] = torch.from_numpy(make()).to(device)
        return self._devices[key]

    def blob(self, device):
        return self._on("blob", device, self.core.cuda_blob)

    def query_matrix(self, device):
        return self._on("query", device, self.core.query_matrix)

    def inverse_matrix(self, device):
        return self._on("inverse", device, self.core.inverse_matrix)

    @property
    def nbytes(self):
        return sum(array.nbytes for array in self.arrays.values())


class SideArrays(Side):
    """A side with tables: the arrays are as they are saved."""

    def __init__(self, side, transform, tables, scale=None, encode_matrix=None, query_matrix=None):
        self.transform = transform
        given = {"tables": tables, "scale": scale, "encode_matrix": encode_matrix, "query_matrix": query_matrix}
        self.arrays = {name: array for name, array in given.items() if array is not None}
        heads, n_tables, _, sub_dim = tables.shape
        if n_tables > 1:
            head_dim = n_tables * sub_dim
        else:
            per_channel = scale if scale is not None else encode_matrix
            if per_channel is None:
                raise Error(
                    "[SideArrays] tables: got one table a head and no transform, wanted one that tells head_dim"
                )
            head_dim = per_channel.shape[-1]
        super().__init__(side, SideTables(side, heads, head_dim, transform=transform, **self.arrays))


class LayerTables:
    def __init__(self, keys, values):
        if (keys.core.n_kv_heads, keys.core.head_dim) != (values.core.n_kv_heads, values.core.head_dim):
            raise Error(
                f"[LayerTables] values: got {values.core.n_kv_heads} heads of {values.core.head_dim}, wanted those of "
                f"the keys: {keys.core.n_kv_heads} of {keys.core.head_dim}"
            )
        self.keys, self.values = keys, values

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes


class Tables:
    """A LayerTables for every layer of a model; None where a layer is not compressed."""

    def __init__(self, layers):
        self.layers = list(layers)

    def __len__(self):
        return len(self.layers)

    @property
    def nbytes(self):
        """What all sequences share."""
        return sum(layer.nbytes for layer in self.layers if layer is not None)

    def to_arrays(self):
        """Flat names -> tensors, and a description as text."""
        arrays, layers = {}, []
        for index, layer in enumerate(self.layers):
            if layer is None:
                layers.append(None)
                continue
            layers.append({"keys": layer.keys.transform, "values": layer.values.transform})
            for side in (layer.keys, layer.values):
                for name, array in side.arrays.items():
                    arrays[f"{index}.{side.side}.{name}"] = torch.from_numpy(numpy.ascontiguousarray(array))
        return arrays, json.dumps({"format": FORMAT, "layers": layers})

    @classmethod
    def from_arrays(cls, arrays, description):
        try:
            head = json.loads(description)
            if head["format"] != FORMAT:
                raise KeyError(head["format"])
            layers = []
            for index, transforms in enumerate(head["layers"]):
                if transforms is None:
                    layers.append(None)
                    continue
                sides = []
                for side in ("keys", "values"):
                    found = {n: arrays[f"{index}.{side}.{n}"] for n in ARRAYS if f"{index}.{side}.{n}" in arrays}
                    sides.append(SideArrays(side, transforms[side], **{n: a.numpy() for n, a in found.items()}))
                layers.append(LayerTables(*sides))
        except (KeyError, TypeError, ValueError) as error:
            raise Error(f"[Tables] file: got one that does not hold '{FORMAT}' ({error})") from None
        return cls(layers)

    @classmethod
    def from_artifact(cls, directory):
        """What `veloxquant calibrate` has written; a layer for each layer that it saw."""
        kind, attributes, arrays = _core.load_artifact(str(directory), "vecinfer_codebook")
        if kind != "vecinfer_codebook":
            raise Error(f"[Tables] {directory}: got an artifact of kind {kind!r}, wanted vecinfer_codebook")
        learned = json.loads(attributes)["transform"] == "learned"
        made = []
        for layer in range(len(arrays["keys"])):
            sides = []
            for side in ("keys", "values"):
                given = _matrices(side, arrays, layer) if learned else _scale(side, arrays, layer)
                tables = numpy.ascontiguousarray(arrays[side][layer])
                sides.append(SideArrays(side, "dense" if learned else "hadamard", tables, **given))
            made.append(LayerTables(*sides))
        return cls(made)

    def fingerprint(self):
        arrays, description = self.to_arrays()
        digest = hashlib.sha256(description.encode())
        for name in sorted(arrays):
            digest.update(name.encode() + arrays[name].numpy().tobytes())
        return digest.hexdigest()

    def save(self, path):
        arrays, description = self.to_arrays()
        save_file(arrays, str(path), metadata={"veloxquant": description})

    @classmethod
    def load(cls, path):
        """path: a file of `save`, or a directory of `veloxquant calibrate --method vecinfer`. CUDA takes 2-bit tables
        with int8 entries only (`--entries int8`, `--codebook-per lane`)."""
        if Path(path).is_dir():
            return cls.from_artifact(path)
        try:
            with safe_open(str(path), "pt") as file:
                description = (file.metadata() or {}).get("veloxquant", "null")
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise Error(f"[Tables] file: got {path}, which is no safetensors file ({error})") from None
        return cls.from_arrays(arrays, description)


def _matrices(side, arrays, layer):
    """Of a learned rotation; that of the values is its own dual."""
    if side == "values":
        matrix = numpy.ascontiguousarray(arrays["value_rotation"][layer])
        return {"encode_matrix": matrix, "query_matrix": matrix.copy()}  # safetensors takes no array twice
    rotation = numpy.ascontiguousarray(arrays["key_rotation"][layer])
    made = {name: numpy.empty_like(rotation) for name in ("encode_matrix", "query_matrix")}
    _core.rotation_matrices(rotation, numpy.ascontiguousarray(arrays["key_weight"][layer]), *made.values())
    return made


def _scale(side, arrays, layer):
    """What Hadamard smooths keys with; values are not smoothed."""
    factors = numpy.ascontiguousarray(arrays["smooth_factors"][layer])
    return {"scale": factors if side == "keys" else numpy.ones_like(factors)}
