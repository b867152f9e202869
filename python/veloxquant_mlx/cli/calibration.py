"""Smooth factors and codebooks for a command: read from --artifacts, or calibrated once and kept."""

import hashlib
import shutil
from pathlib import Path

from veloxquant_mlx.allocators import vecinfer
from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cache.codebook import Codebook
from veloxquant_mlx.cli import output
from veloxquant_mlx.models import model_directory
from veloxquant_mlx.models.paths import atomic_directory, cache_root

SMOOTH, CODEBOOK = "vecinfer_smooth", "vecinfer_codebook"
QUICK_TOKENS = 8192  # enough for a first look
FULL_TOKENS = 24576


def load(directory):
    """(smooth_factors, codebook) of an artifact directory; ValueError or FileNotFoundError if there are none."""
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"--artifacts: got {str(directory)!r}, wanted a directory made by veloxquant calibrate")
    store = NpyArtifactStore(directory)
    smooth_factors, codebook = store.load(SMOOTH), store.load(CODEBOOK)
    if not isinstance(codebook, Codebook):
        raise ValueError(
            f"--artifacts: got a {type(codebook).__name__} as {CODEBOOK} in {directory}, wanted a Codebook"
        )
    return smooth_factors, codebook


def bits_of(codebook):
    """Bits per element of the codes, keys and values averaged."""
    return sum(codebook.bits_per_element) / 2


def save(directory, smooth_factors, codebook):
    store = NpyArtifactStore(directory)
    store.save(SMOOTH, smooth_factors)
    store.save(CODEBOOK, codebook)


def load_or_calibrate(model_name, model, tokenizer, bits):
    """{b: (smooth_factors, codebook)} for every b in `bits`, from the built-in text.

    Calibrated together where missing and kept under the cache directory, so that the next run is quick.
    """
    found = {b: _load_kept(_kept_directory(model_name, b)) for b in bits}
    missing = [b for b in bits if found[b] is None]
    if missing:
        where = _kept_directory(model_name, missing[0]).parent
        output.note(f"calibrating on {QUICK_TOKENS} tokens of built-in text, once; kept in {where}")
        with output.progress() as report:
            made = calibrate(model, tokenizer, missing, None, QUICK_TOKENS, report)
        for b, artifacts in made.items():
            with atomic_directory(_kept_directory(model_name, b)) as temporary:
                save(temporary, *artifacts)
        found |= made
    return found


def calibrate(model, tokenizer, bits, texts, n_tokens, report, transform="hadamard"):
    """{b: (smooth_factors, codebook)} for every b in `bits`. texts: None for the built-in text, a path, or strings."""
    smooth_factors, codebooks = vecinfer.calibrate(
        model, tokenizer, list(bits), texts=texts, num_tokens=n_tokens, transform=transform, progress=report
    )
    return {b: (smooth_factors, codebook) for b, codebook in zip(bits, codebooks)}


def _load_kept(directory):
    if not directory.is_dir():
        return None
    try:
        return load(directory)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        output.note(f"{directory} cannot be used ({error}); calibrating again")
        shutil.rmtree(directory)
        return None


def _kept_directory(model_name, bits):
    """Keyed by what the weights are, not only by the name: a retrained model at the same path is another one."""
    directory = model_directory(model_name)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in Path(model_name).name)
    return cache_root() / "artifacts" / f"{name}-{digest.hexdigest()[:12]}" / f"vecinfer-{bits[0]:g}-{bits[1]:g}bit"
