"""veloxquant inspect: what an artifact directory, or one artifact in it, holds."""

from pathlib import Path
from typing import Annotated

import typer

from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cli import options, output

NAME = "inspect"
EXAMPLE = "veloxquant inspect artifacts"


def command(
    path: Annotated[
        str, typer.Argument(metavar="DIR|FILE", help="A directory made by calibrate, or one manifest (.json) in it.")
    ],
    json: options.Json = False,
):
    """Show what an artifact directory holds.

    Arrays, model, and whether the checksums hold; exit code 1 if not.
    """
    artifacts = [describe(manifest) for manifest in find_manifests(path)]
    if json:
        output.emit_json({"path": path, "artifacts": artifacts})
    else:
        _print(artifacts)
    if any(artifact["state"] != "whole" for artifact in artifacts):
        raise typer.Exit(1)


def find_manifests(path):
    """The manifests (*.json) that `path` names: itself, or all of a directory."""
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"path: got {str(path)!r}, wanted an artifact directory or a manifest (.json) in one")
    manifests = [file for file in sorted(path.glob("*.json")) if _is_manifest(file)]
    if not manifests:
        raise FileNotFoundError(
            f"path: got {str(path)!r}, which holds no artifacts, wanted a directory made by calibrate"
        )
    return manifests


def _is_manifest(file):
    """Also for a damaged one, which is known by its arrays."""
    return b"veloxquant-artifact" in file.read_bytes()[:200] or any(file.parent.glob(f"{file.stem}.*.npy"))


def describe(manifest):
    """One artifact as a dict: name, state ("whole" or what is wrong), kind, model, transform, bits_per_element,
    relative_error (squared, mean over layers and heads), bytes, arrays. What an artifact does not have is None."""
    name = manifest.name.removesuffix(".json")
    store = NpyArtifactStore(manifest.parent)
    try:
        found, loaded = store.describe(name), store.load(name)  # both check sizes, versions and checksums
    except (ValueError, OSError, RuntimeError) as error:
        found, loaded, state = {"kind": None, "attributes": {}, "arrays": {}}, None, " ".join(str(error).split())
    else:
        state = "whole"
    attributes = found["attributes"]
    bits = getattr(loaded, "bits_per_element", None)
    errors = attributes.get("relative_error") or {}
    return {
        "name": name,
        "state": state,
        "kind": found["kind"],
        "model": attributes.get("model"),
        "transform": attributes.get("transform"),
        "bits_per_element": sum(bits) / len(bits) if bits else None,
        "relative_error": {side: _mean(per_layer) for side, per_layer in errors.items()} or None,
        "bytes": sum(array["bytes"] for array in found["arrays"].values()),
        "arrays": [{"name": array, **entry} for array, entry in found["arrays"].items()],
    }


def _mean(per_layer):
    values = [value for layer in per_layer for value in layer]
    return sum(values) / len(values)


def _print(artifacts):
    for artifact in artifacts:
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
