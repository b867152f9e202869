"""veloxquant inspect: what an artifact directory, an artifact in it, or a saved prompt cache holds."""

from pathlib import Path
from typing import Annotated

import typer

from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cache import contents, prompt_cache
from veloxquant_mlx.cache.layout import flat_caches
from veloxquant_mlx.cli import options, output

NAME = "inspect"
EXAMPLE = "veloxquant inspect artifacts"


def command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="DIR|FILE",
            help="A directory made by calibrate, a manifest (.json) in it, or a saved prompt cache (.safetensors).",
        ),
    ],
    json: options.Json = False,
):
    """Show what artifacts and saved prompt caches hold.

    Arrays, errors by layer, bytes by part, and whether the checksums hold; exit code 1 if not.
    """
    manifests, files = find(path)
    artifacts = [describe(manifest) for manifest in manifests]
    caches = [describe_cache(file) for file in files]
    if json:
        output.emit_json({"path": path, "artifacts": artifacts, "prompt_caches": caches})
    else:
        for artifact in artifacts:
            _print_artifact(artifact)
        for cache in caches:
            _print_cache(cache)
    if any(one["state"] != "whole" for one in artifacts + caches):
        raise typer.Exit(1)


def find(path):
    """(manifests, prompt caches) that `path` names: itself, or all of a directory."""
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return [path], []
    if path.is_file() and path.suffix == ".safetensors":
        return [], [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"path: got {str(path)!r}, wanted an artifact directory, a manifest (.json) in one, or a saved prompt "
            "cache (.safetensors)"
        )
    manifests = [file for file in sorted(path.glob("*.json")) if _is_manifest(file)]
    caches = [file for file in sorted(path.glob("*.safetensors")) if prompt_cache.looks_like_one(file)]
    if not manifests and not caches:
        raise FileNotFoundError(
            f"path: got {str(path)!r}, which holds no artifacts and no prompt caches, wanted a directory made by "
            "calibrate"
        )
    return manifests, caches


def _is_manifest(file):
    """Also for a damaged one, which is known by its arrays."""
    return b"veloxquant-artifact" in file.read_bytes()[:200] or any(file.parent.glob(f"{file.stem}.*.npy"))


def describe(manifest):
    """One artifact as a dict: name, state ("whole" or what is wrong), kind, model, transform, bits_per_element,
    relative_error (squared, mean over layers and heads), relative_error_by_layer (mean over heads), bytes, arrays.
    What an artifact does not have is None."""
    name = manifest.name.removesuffix(".json")
    store = NpyArtifactStore(manifest.parent)
    try:
        found, loaded = store.describe(name), store.load(name)  # both check sizes, versions and checksums
    except (ValueError, OSError, RuntimeError) as error:
        found, loaded, state = {"kind": None, "attributes": {}, "arrays": {}}, None, _sentence(error)
    else:
        state = "whole"
    attributes = found["attributes"]
    bits = getattr(loaded, "bits_per_element", None)
    errors = attributes.get("relative_error") or {}
    by_layer = {side: [_mean(heads) for heads in layers] for side, layers in errors.items()}
    return {
        "name": name,
        "state": state,
        "kind": found["kind"],
        "model": attributes.get("model"),
        "transform": attributes.get("transform"),
        "bits_per_element": _mean(bits) if bits else None,
        "relative_error": {side: _mean(layers) for side, layers in by_layer.items()} or None,
        "relative_error_by_layer": by_layer or None,
        "bytes": sum(array["bytes"] for array in found["arrays"].values()),
        "arrays": [{"name": array, **entry} for array, entry in found["arrays"].items()],
    }


def describe_cache(file):
    """A saved prompt cache as a dict: name, state ("whole" or what is wrong), metadata, model, file_bytes (as it is
    on disk), tokens, bytes (in memory, by part, all layers), layers (see cache/contents.py)."""
    description = {"name": file.name, "state": "whole", "file_bytes": file.stat().st_size}
    try:
        caches, metadata = prompt_cache.load(file, return_metadata=True)
        layers = contents.describe(caches)
    except (ValueError, OSError, RuntimeError) as error:
        return description | {"state": _sentence(error), "tokens": None, "bytes": {}, "layers": []}
    total = {}
    for layer in layers:
        for part, n in layer["bytes"].items():
            total[part] = total.get(part, 0) + n
    return description | {
        "metadata": metadata,
        "model": next((c.fingerprint for c in flat_caches(caches) if hasattr(c, "fingerprint")), None),
        "tokens": max((layer["tokens"] for layer in layers), default=0),
        "bytes": total,
        "layers": layers,
    }


def _sentence(error):
    return " ".join(str(error).split())


def _mean(values):
    return sum(values) / len(values)


def _print_artifact(artifact):
    facts = [f"{artifact['name']}: {artifact['state']}", artifact["kind"], output.megabytes(artifact["bytes"])]
    if artifact["bits_per_element"] is not None:
        facts.append(f"{artifact['bits_per_element']:g} bits per element")
    if artifact["transform"]:
        facts.append(f"{artifact['transform']} transform")
    if artifact["model"]:
        facts.append(f"model {artifact['model']}")
    for side, error in (artifact["relative_error"] or {}).items():
        facts.append(f"error of {side} {100 * error:.2f} %")
    rows = [
        [array["name"], array["dtype"], " x ".join(map(str, array["shape"])), str(array["bytes"])]
        for array in artifact["arrays"]
    ]
    output.table(", ".join(filter(None, facts)), ["array", "dtype", "shape", "bytes"], rows)
    if by_layer := artifact["relative_error_by_layer"]:
        rows = [
            [str(layer), *(f"{100 * error:.3f} %" for error in errors)]
            for layer, errors in enumerate(zip(*by_layer.values()))
        ]
        output.table(f"{artifact['name']}: |x - x^|^2 / |x|^2", ["layer", *by_layer], rows)


def _print_cache(cache):
    facts = [f"{cache['name']}: {cache['state']}", f"{output.megabytes(cache['file_bytes'])} on disk"]
    if cache["state"] != "whole":
        output.table(", ".join(facts), ["layer"], [])
        return
    facts.append(f"{cache['tokens']} tokens")
    if cache["model"]:
        facts.append(f"model {cache['model']}")
    facts += [f"{key}: {value}" for key, value in cache["metadata"].items()]
    parts = list(cache["bytes"])
    rows = []
    for layer in cache["layers"]:
        name, bits = layer["kind"], "-"
        if layer["codecs"]:
            name = " / ".join(dict.fromkeys(layer["codecs"]))
            bits = " / ".join(f"{b:g}" for b in layer["bits_per_element"])
        sizes = [str(layer["bytes"].get(part, "")) for part in parts]
        rows.append([str(layer["layer"]), name, str(layer["tokens"]), bits, *sizes])
    rows.append(["all", "", "", "", *map(str, cache["bytes"].values())])
    columns = ["layer", "cache", "tokens", "bits K / V", *(part.replace("_", " ") for part in parts)]
    output.table(", ".join(facts), columns, rows)
