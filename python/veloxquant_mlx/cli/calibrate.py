"""veloxquant calibrate: fit codebooks to a model, and save them."""

import time
from typing import Annotated, Optional

import typer

from veloxquant_mlx.cli import calibration, options, output
from veloxquant_mlx.cli.methods import bits_text, check_at_least, check_bits, only
from veloxquant_mlx.cli.setup import open_model
from veloxquant_mlx.generated import OWN_SHARE

NAME = "calibrate"
EXAMPLE = "veloxquant calibrate smollm2 --text my_domain.txt --bits 2 -o artifacts"


def command(
    model: options.Model,
    out: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Directory to write the artifacts into.")],
    text: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="Calibration text; left out: built-in text.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(calibration.CODEBOOKS)}.")] = "vecinfer",
    bits: Annotated[
        str, typer.Option(help="Bits per element: 1, 1.5, 2, 2.5, 3, 4, 6, 8, or 4/2 for keys/values.")
    ] = "2",
    tokens: Annotated[int, typer.Option(help="Calibration tokens; fewer are used if the text is shorter.")] = (
        calibration.FULL_TOKENS
    ),
    context: Annotated[
        int, typer.Option(help="Positions that the tables are to serve: the longest sequence you expect.")
    ] = calibration.CONTEXT_TOKENS,
    own_text: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the built-in text, what the model writes itself (0 to 1).")
    ] = OWN_SHARE,
    transform: options.Transform = None,
    codebook_per: options.CodebookPer = "subvector",
    entries: options.Entries = "fp16",
    json: options.Json = False,
):
    """Fit codebooks to a model and save them.

    Rotations or smooth factors, and tables of keys and of values for each head and sub-vector."""
    recipe = calibration.Recipe(method, transform, codebook_per, entries)
    width = only("--bits", check_bits(bits))
    check_at_least("--tokens", tokens, 256)
    check_at_least("--context", context, 1)
    if not 0 <= own_text <= 1:
        raise ValueError(f"--own-text: got {own_text:g}, wanted a share of 0 to 1")
    if text is not None:
        from veloxquant_mlx.text import read_file

        read_file(text, "--text")  # complains now rather than after the model is loaded

    loaded, tokenizer = open_model(model)
    with output.progress() as report:
        report = _Stages(report)
        made = calibration.calibrate(loaded, tokenizer, [width], text, tokens, report, recipe, own_text, context)
    trained = made[width]
    calibration.save(out, trained)
    codebook = trained.codebook
    if json:
        fields = {"artifacts": out, "method": method, "bits_per_element": calibration.bits_of(codebook)}
        fields |= {
            "transform": getattr(codebook, "transform", "learned"),
            "shared_bytes": codebook.nbytes,
            "seconds": report.seconds(),
        }
        output.emit_json(fields)
    else:
        text = bits_text(codebook.bits_per_element)
        output.note(f"saved in {out}: {method} at {text} bits per element, {output.megabytes(codebook.nbytes)}")


class _Stages:
    """A progress callback that also knows how long each stage took."""

    def __init__(self, report):
        self._report, self._begun = report, {}

    def __call__(self, fraction, what):
        self._begun.setdefault(what, time.monotonic())
        self._report(fraction, what)

    def seconds(self):
        """{stage: seconds}, up to now."""
        times = [*self._begun.values(), time.monotonic()]
        return {what: round(after - before, 2) for what, before, after in zip(self._begun, times, times[1:])}
