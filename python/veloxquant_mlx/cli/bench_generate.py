"""veloxquant bench generate: prefill and decode speed of a model by cache, side by side in one run."""

from typing import Annotated, Optional

import typer

from veloxquant_mlx.cli import options, output
from veloxquant_mlx.cli.bench_attention import count, shape
from veloxquant_mlx.cli.methods import (
    METHODS,
    REFERENCES,
    check_at_least,
    check_bits,
    check_directories,
    check_methods,
    methods_with_bits,
)
from veloxquant_mlx.cli.setup import Settings, make_methods, open_model

NAME = "generate"
EXAMPLE = "veloxquant bench generate smollm2 --bits 2,4 --contexts 1024,4096,8192 --text wikitext2-test.txt"

_COLUMNS = ["cache", "tokens", "tokens/s", "times", "prefill/s", "times", "cache", "prefill peak", "perplexity"]
_STACK_COLUMNS = ["cache", "tokens", "attend ms", "times", "append ms", "of attend", "steps/s", "cache"]


def command(
    model: Annotated[str, typer.Argument(help="A folder, a name on the hub, or smollm2.")] = "smollm2",
    method: Annotated[
        str, typer.Option(help=f"Some of {', '.join(n for n in METHODS if n not in REFERENCES)}.")
    ] = "fp16,vecinfer",
    bits: Annotated[str, typer.Option(help="Bits per element of the methods that have them, e.g. 2,4.")] = "2",
    contexts: Annotated[str, typer.Option(metavar="N,..", help="Tokens read before the decode steps.")] = "1024,4096",
    steps: Annotated[int, typer.Option(help="Decode steps timed at each context.")] = 32,
    text: Annotated[Optional[str], typer.Option(metavar="FILE", help="What is read; else the built-in text.")] = None,
    artifacts: options.Artifacts = None,
    stack: Annotated[
        Optional[str],
        typer.Option(metavar="N,..", help="Instead of a model: the attention of 32 layers on so many random tokens."),
    ] = None,
    stack_shape: Annotated[str, typer.Option(metavar="HQ/HKVxD", help="Heads of --stack.")] = "32/8x128",
    stack_methods: Annotated[
        str, typer.Option(metavar="NAME,..", help="Methods of bench attention for --stack.")
    ] = "fp16,vecinfer 2 bits",
    threads: Annotated[Optional[int], typer.Option(help="Worker threads; every core if left out.")] = None,
    json: options.Json = False,
):
    """Tokens per second of a model at several contexts, all caches in one run.

    Every chunk of the text is read for each cache in turn, and decode steps alternate; the perplexity is that of
    the same caches on the same text."""
    from veloxquant_mlx import _ext

    check_at_least("--steps", steps, 1)
    if threads is not None:
        _ext.set_num_threads(count("--threads", threads, 1))
    if stack:
        rows = _stack(stack, stack_shape, stack_methods, steps)
    else:
        rows = _model(model, method, bits, contexts, steps, text, artifacts)
    if json:
        output.emit_json({"command": "bench generate", "model": None if stack else model, "rows": rows})
        return
    first = rows[0]
    where = f"{first['simd']}, {first['threads']} threads"
    if stack:
        output.table(f"{first['stack']}; {where}", _STACK_COLUMNS, [_stack_cells(row, rows) for row in rows])
    else:
        output.table(f"{model}; {where}", _COLUMNS, [_cells(row, rows) for row in rows])


def _model(name, method, bits, contexts, steps, text, artifacts):
    from veloxquant_mlx.benchmarks import generate as suite
    from veloxquant_mlx.text import read_file

    lengths = _ascending("--contexts", contexts, 64)
    wanted = methods_with_bits(check_methods(method), check_bits(bits))
    for one in wanted:
        if one.name in REFERENCES:
            raise ValueError(f"--method: got {one.name!r}, which eval alone has, wanted another")
    settings = Settings(artifacts=check_directories(artifacts))
    model, tokenizer = open_model(name)
    methods = make_methods(name, model, tokenizer, wanted, settings)
    tokens = _tokens(tokenizer, text and read_file(text, "--text"), lengths[-1] + steps * len(lengths) + 1)
    with output.progress() as report:
        return suite.rows(model, tokens, lengths, {m.label: m for m in methods}, steps, report)


def _tokens(tokenizer, text, n):
    from veloxquant_mlx.text import calibration_text

    found = []
    for passage in [text] if text else calibration_text():
        found += tokenizer.encode(passage, add_special_tokens=False)
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"--text: got {len(found)} tokens, wanted at least {n}; use a longer text or shorter --contexts")


def _stack(contexts, text, methods, steps):
    from veloxquant_mlx.benchmarks import attention
    from veloxquant_mlx.benchmarks import generate as suite

    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in attention.METHODS:
            raise ValueError(f"--stack-methods: got {name!r}, wanted some of {', '.join(attention.METHODS)}")
    layers = suite.Stack(shape("--stack-shape", text, attention.Shape))
    with output.progress() as report:
        return suite.stack_rows(layers, _ascending("--stack", contexts, 64), names, steps, report)


def _ascending(option, text, least):
    lengths = [count(option, part, least) for part in text.split(",")]
    if lengths != sorted(set(lengths)):
        raise ValueError(f"{option}: got {text!r}, wanted ascending numbers")
    return lengths


def _baseline(row, rows):
    """The first method's row at the same context."""
    return next(other for other in rows if other["context"] == row["context"])


def _cells(row, rows):
    base = _baseline(row, rows)
    return [
        row["method"],
        f"{row['context']:,}",
        f"{row['tokens_per_s']:.1f}",
        f"{row['tokens_per_s'] / base['tokens_per_s']:.2f} x",
        f"{row['prefill_tokens_per_s']:,.0f}",
        f"{row['prefill_tokens_per_s'] / base['prefill_tokens_per_s']:.2f} x",
        output.megabytes(row["cache_bytes"]),
        output.megabytes(row["prefill_peak_bytes"]),
        "-" if row["perplexity"] is None else f"{row['perplexity']:.3f}",
    ]


def _stack_cells(row, rows):
    return [
        row["method"],
        f"{row['context']:,}",
        f"{row['attend_ms']:,.1f}",
        f"{_baseline(row, rows)['attend_ms'] / row['attend_ms']:.2f} x",
        f"{row['append_ms']:.2f}",
        f"{100 * row['append_share']:.1f} %",
        f"{row['steps_per_s']:.2f}",
        output.megabytes(row["cache_bytes"]),
    ]
