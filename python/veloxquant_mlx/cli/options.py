"""Arguments and options that several commands share."""

import importlib
from typing import Annotated, Optional

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="'smollm2', a model directory, or a hub name.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
Artifacts = Annotated[
    Optional[list[str]],
    typer.Option(
        metavar="DIR",
        help="Made by calibrate; repeated for several methods or bits. Left out: calibrated on built-in text once, "
        "and kept.",
    ),
]
Window = Annotated[int, typer.Option(help="Most recent tokens that stay exact, at least.")]
Sinks = Annotated[int, typer.Option(help="First tokens that stay exact.")]
Transform = Annotated[
    Optional[str],
    typer.Option(
        help="vecinfer: learned (better), or hadamard (smaller). Left out: learned where the model shows its queries."
    ),
]
CodebookPer = Annotated[
    str,
    typer.Option(
        help="One table for each subvector, or one for all of a head (vecinfer, adaptive); lane: as many as GPUs look "
        "up as fast as one (vecinfer)."
    ),
]
Entries = Annotated[str, typer.Option(help="Of the tables: fp16, or int8 (vecinfer), which GPUs look up fastest.")]


def on_cuda(backend, name):
    """The module of the package veloxquant that does on a GPU what a command does here; --backend was not cpu."""
    if backend != "cuda":
        raise ValueError(f"--backend: got {backend!r}, wanted cpu or cuda")
    try:
        return importlib.import_module(f"veloxquant.{name}")
    except ImportError:
        raise ValueError(
            "--backend: got cuda without the package veloxquant, wanted `pip install 'python/core[torch]'` with nvcc"
        ) from None
