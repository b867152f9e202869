"""Arguments and options that several commands share."""

from typing import Annotated, Optional

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="'smollm2', a model directory, or a hub name.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
Artifacts = Annotated[
    Optional[str],
    typer.Option(metavar="DIR", help="Made by calibrate. Left out: calibrated on built-in text once, and kept."),
]
Window = Annotated[int, typer.Option(help="Most recent tokens that stay exact, at least.")]
Sinks = Annotated[int, typer.Option(help="First tokens that stay exact.")]
