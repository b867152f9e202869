"""veloxquant eval: perplexity, KL divergence and top-1 agreement of caches against the exact one."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from veloxquant_mlx.cli import options, output
from veloxquant_mlx.cli import scores as recorded
from veloxquant_mlx.cli.methods import METHODS, check_at_least, check_bits, check_methods
from veloxquant_mlx.cli.setup import make_methods, open_model

NAME = "eval"
EXAMPLE = "veloxquant eval smollm2 --method vecinfer,mlx4 --bits 4,2 --text wikitext2-test.txt --windows 8"


def command(
    model: options.Model,
    text: Annotated[str, typer.Option(metavar="FILE", help="UTF-8 text to score; its first tokens are used.")],
    method: Annotated[
        list[str], typer.Option(help=f"One of {', '.join(METHODS)}; repeated or comma separated for several.")
    ] = ["vecinfer"],
    bits: Annotated[
        str,
        typer.Option(help="Bits per element (vecinfer), e.g. 2 or 4/2 for keys/values; comma separated for several."),
    ] = "2",
    artifacts: options.Artifacts = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text to score.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    score_from: Annotated[
        int, typer.Option(help="Tokens of each window that are a prompt: read first, not scored.")
    ] = 0,
    window: options.Window = 64,
    sinks: options.Sinks = 4,
    plot: Annotated[
        Optional[str], typer.Option(metavar="PNG", help="Draw perplexity increase over bytes per token.")
    ] = None,
    json: options.Json = False,
):
    """Score caches against the exact one.

    Perplexity, mean KL, top-1 agreement and bytes per token."""
    names, widths = check_methods(",".join(method)), check_bits(bits)
    for option, value, least in (
        ("--windows", windows, 1), ("--length", length, 2), ("--window", window, 1), ("--sinks", sinks, 0),
        ("--score-from", score_from, 0),
    ):  # fmt: skip
        check_at_least(option, value, least)
    if score_from > length - 2:
        raise ValueError(f"--score-from: got {score_from}, wanted at most {length - 2} (--length less 2)")
    if artifacts is not None and len(widths) > 1:
        raise ValueError("--bits: got several values with --artifacts, whose codebook decides the bits; wanted one")
    if plot is not None and not Path(plot).absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot: got {plot!r}, wanted a file in an existing directory")

    from veloxquant_mlx.evaluate import evaluate, read_windows
    from veloxquant_mlx.text import read_file

    contents = read_file(text, "--text")
    loaded, tokenizer = open_model(model)
    tokens = read_windows(tokenizer, contents, windows, length)
    chosen = make_methods(model, loaded, tokenizer, names, widths, artifacts, window, sinks)
    with output.progress() as report:
        builders = {m.label: (lambda m=m: m.build(loaded, strict=True)) for m in chosen}
        scores = evaluate(loaded, tokens, builders, report, score_from)
    for m in chosen:
        recorded.record(loaded, m, scores[m.label])
    if plot is not None:
        draw(scores, plot)
    if json:
        results = [_fields(m, scores[m.label]) for m in chosen]
        output.emit_json(results[0] if len(results) == 1 else {"results": results})
    else:
        _print(scores)


def _fields(method, score):
    return {
        "method": method.name,
        "bits_per_element": score.bits_per_element,
        "tokens": score.tokens,
        "window": method.window,
        "sinks": method.sinks,
        "ppl": score.ppl,
        "ppl_fp16": score.ppl_exact,
        "kl": score.kl,
        "top1": score.top1,
        "cache_bytes_per_token": score.cache_bytes_per_token,
        "shared_bytes": score.shared_bytes,
    }


def _print(scores):
    any_score = next(iter(scores.values()))
    output.table(
        f"{any_score.tokens} tokens scored; exact cache: perplexity {any_score.ppl_exact:.3f}",
        ["method", "ppl", "increase", "KL", "top-1", "bytes/token", "codebooks"],
        [
            [
                label,
                f"{score.ppl:.3f}",
                f"{100 * score.ppl_increase:+.2f} %",
                f"{score.kl:.4f}",
                f"{100 * score.top1:.1f} %",
                f"{score.cache_bytes_per_token:.0f}",
                output.megabytes(score.shared_bytes),
            ]
            for label, score in scores.items()
        ],
    )


def draw(scores, path):
    """Perplexity increase (%) over cache bytes per token, one labelled point per method, as a PNG file."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, score in scores.items():
        point = (score.cache_bytes_per_token, 100 * score.ppl_increase)
        axes.plot(*point, "o")
        axes.annotate(label, point, textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="cache bytes per token", ylabel="perplexity increase (%)", xscale="log")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png")
