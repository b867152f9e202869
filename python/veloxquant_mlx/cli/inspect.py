"""veloxquant inspect: what an artifact directory, or one artifact in it, holds."""
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from veloxquant_mlx.cli import options, output

NAME = "inspect"
EXAMPLE = "veloxquant inspect artifacts"


def command(
    path: Annotated[str, typer.Argument(metavar="DIR|FILE", help="A directory made by calibrate, or one manifest in it.")],
    json: options.Json = False,
):
    """Show what an artifact directory holds.

    Arrays, model, and whether the checksums hold; exit code 1 if not."""
    manifests = find_manifests(path)
    artifacts = [describe(manifest) for manifest in manifests]
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
        raise FileNotFoundError(f"path: got {str(path)!r}, which holds no artifacts, wanted a directory made by calibrate")
    return manifests


def _is_manifest(file):
    """Also for a damaged one, which is known by its arrays."""
    return b"veloxquant-artifact" in file.read_bytes()[:200] or any(file.parent.glob(f"{file.stem}.*.npy"))


def describe(manifest):
    """One artifact as a dict: name, kind, state ("whole" or what is wrong), bytes, arrays, attributes."""
    from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore

    name = manifest.name.removesuffix(".json")
    described = {"name": name, "kind": None, "state": "whole", "bytes": 0, "arrays": [], "attributes": {}}
    try:
        NpyArtifactStore(manifest.parent).load(name)  # checks sizes, versions and checksums
        contents = jsonlib.loads(manifest.read_text())
    except (ValueError, OSError, RuntimeError) as error:
        described["state"] = " ".join(str(error).split())
        return described
    described["kind"] = contents["kind"]
    described["attributes"] = contents["attributes"]
    described["arrays"] = [
        {"name": array, **{key: entry[key] for key in ("dtype", "shape", "bytes")}}
        for array, entry in contents["arrays"].items()
    ]
    described["bytes"] = sum(array["bytes"] for array in described["arrays"])
    return described


def _print(artifacts):
    for artifact in artifacts:
        attributes = ", ".join(f"{key} {value}" for key, value in artifact["attributes"].items())
        title = f"{artifact['name']} ({artifact['kind'] or 'unknown'}): {artifact['state']}, {output.megabytes(artifact['bytes'])}"
        rows = [
            [array["name"], array["dtype"], " x ".join(map(str, array["shape"])), str(array["bytes"])]
            for array in artifact["arrays"]
        ]
        output.table(f"{title}\n{attributes}".rstrip(), ["array", "dtype", "shape", "bytes"], rows)
