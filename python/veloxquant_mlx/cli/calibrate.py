"""veloxquant calibrate: fit smooth factors and codebooks to a model, and save them."""

from typing import Annotated, Optional

import typer

from veloxquant_mlx.cache.codebook import TRANSFORMS
from veloxquant_mlx.cli import calibration, options, output
from veloxquant_mlx.cli.methods import check_at_least, check_bits, only
from veloxquant_mlx.cli.setup import open_model

NAME = "calibrate"
EXAMPLE = "veloxquant calibrate smollm2 --text my_domain.txt --bits 2 -o artifacts"


def command(
    model: options.Model,
    out: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Directory to write the artifacts into.")],
    text: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="Calibration text; left out: built-in text.")
    ] = None,
    bits: Annotated[
        str, typer.Option(help="Bits per element: 1, 1.5, 2, 2.5, 3, 4, 6, 8, or 4/2 for keys/values.")
    ] = "2",
    tokens: Annotated[int, typer.Option(help="Calibration tokens; fewer are used if the text is shorter.")] = (
        calibration.FULL_TOKENS
    ),
    transform: Annotated[
        str, typer.Option(help="hadamard, or learned: better quality, larger transforms (shared bytes).")
    ] = "hadamard",
    json: options.Json = False,
):
    """Fit codebooks to a model and save them.

    Smooth factors or learned rotations, and for keys and values one codebook per head and sub-vector."""
    width = only("--bits", check_bits(bits))
    check_at_least("--tokens", tokens, 256)
    if transform not in TRANSFORMS:
        raise ValueError(f"--transform: got {transform!r}, wanted one of {', '.join(TRANSFORMS)}")
    if text is not None:
        from veloxquant_mlx.text import read_file

        read_file(text, "--text")  # complains now rather than after the model is loaded

    loaded, tokenizer = open_model(model)
    with output.progress() as report:
        made = calibration.calibrate(loaded, tokenizer, [width], text, tokens, report, transform)
    smooth_factors, codebook = made[width]
    calibration.save(out, smooth_factors, codebook)
    key_bits, value_bits = codebook.bits_per_element
    if json:
        bits_per_element = calibration.bits_of(codebook)
        fields = {"artifacts": out, "bits_per_element": bits_per_element, "transform": transform}
        output.emit_json(fields | {"shared_bytes": codebook.nbytes})
    else:
        size = output.megabytes(codebook.nbytes)
        output.note(f"saved in {out}: {key_bits:g} bits per key element, {value_bits:g} per value element, {size}")
