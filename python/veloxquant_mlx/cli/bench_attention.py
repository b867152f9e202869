"""veloxquant bench attention: a decode step of one layer, by method, shape and context."""

import re
from typing import Annotated, Optional

import typer

from veloxquant_mlx.cli import options, output

NAME = "attention"
EXAMPLE = "veloxquant bench attention --contexts 1024,8192,32768 --plot attention.png"

_COLUMNS = ["cache", "tokens", "bits", "us", "GB/s", "of read", "times", "than", "error", "perplexity, KL"]


def command(
    shapes: Annotated[str, typer.Option(metavar="HQ/HKVxD,..", help="Layers to measure.")] = "32/8x128,9/3x64",
    contexts: Annotated[str, typer.Option(metavar="N,..", help="Tokens in the cache.")] = "1024,8192,32768",
    methods: Annotated[
        str, typer.Option(metavar="NAME,..", help="Our caches beside fp16, by name; 'all' for every one.")
    ] = "vecinfer 2 bits,vecinfer 4 bits",
    rounds: Annotated[int, typer.Option(help="Rounds of interleaved calls; the median counts.")] = 7,
    threads: Annotated[Optional[int], typer.Option(help="Worker threads; every core if left out.")] = None,
    backend: Annotated[
        str,
        typer.Option(help="cpu, or cuda: the package veloxquant beside PyTorch's cuDNN and flash, rows of its own."),
    ] = "cpu",
    with_llama: Annotated[
        bool,
        typer.Option("--llama", help="Also llama.cpp's f16, q8_0 and q4_0; compiles it on first use (80 MB, minutes)."),
    ] = False,
    json: options.Json = False,
    plot: Annotated[Optional[str], typer.Option(metavar="FILE.png", help="Draw time against context.")] = None,
):
    """One query token against a cache of random tokens, every output verified.

    Baseline: the fastest exact attention of the run, of MLX (fp32, fp16), llama.cpp (f16) or ours (fp16).
    Perplexity and KL: what `veloxquant eval` printed of the same setting on SmolLM2, if anyone ran it.
    """
    if backend != "cpu":
        _on_cuda(backend, json)
        return
    from veloxquant_mlx import _ext
    from veloxquant_mlx.benchmarks import attention as suite
    from veloxquant_mlx.benchmarks import llama, quality

    layers = [shape("--shapes", text, suite.Shape) for text in shapes.split(",")]
    lengths = [count("--contexts", text, 64) for text in contexts.split(",")]
    names = list(suite.METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in suite.METHODS:
            raise ValueError(f"--methods: got {name!r}, wanted 'all' or some of {', '.join(suite.METHODS)}")
    count("--rounds", rounds, 1)
    if threads is not None:
        _ext.set_num_threads(count("--threads", threads, 1))
    names = ["fp16", *(name for name in names if name != "fp16")]
    rows = []
    with output.progress() as report:
        if with_llama:
            llama.build(lambda what: report(0.0, what))
        for i, layer in enumerate(layers):
            for k, length in enumerate(lengths):
                done = (i * len(lengths) + k) / (len(layers) * len(lengths))
                rows += suite.rows(layer, length, names, rounds, lambda what, done=done: report(done, what), with_llama)
    if plot:
        _plot(rows, plot)
    if json:
        output.emit_json({"command": "bench attention", "rows": rows, "plot": plot})
        return
    for name in dict.fromkeys(row["shape"] for row in rows):
        first = rows[0]
        title = f"{name}, one query token; {first['simd']}, {first['threads']} threads, read {first['read_gbps']} GB/s"
        output.table(title, _COLUMNS, [[*_cells(row), quality.text(row)] for row in rows if row["shape"] == name])


def _on_cuda(backend, json):
    bench = options.on_cuda(backend, "bench")
    try:
        with output.progress() as report:
            rows = bench.rows(report=lambda what: report(0.0, what))
    except bench.Error as error:
        raise ValueError(str(error)) from None
    if json:
        output.emit_json({"command": "bench attention", "backend": "cuda", "rows": rows})
        return
    first = rows[0]
    title = f"{first['device']}, torch {first['torch']}, cuDNN {first['cudnn']}; one query token"
    output.table(title, list(bench.COLUMNS), [bench.cells(row) for row in rows])


def count(option, text, least):
    value = int(text) if re.fullmatch(r"\d+", str(text).strip()) else -1
    if value < least:
        raise ValueError(f"{option}: got {text!r}, wanted whole numbers from {least} on")
    return value


def shape(option, text, make):
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text.strip())
    numbers = [int(x) for x in match.groups()] if match else [0, 0, 0]
    if min(numbers) < 1 or numbers[0] % numbers[1] or numbers[2] % 64:
        raise ValueError(
            f"{option}: got {text!r}, wanted query heads/KV heads x head_dim (a multiple of 64), as in 32/8x128"
        )
    return make(*numbers)


def _cells(row):
    return [
        row["method"],
        f"{row['context']:,}",
        f"{row['bits']:g}",
        f"{row['us']:,.0f}",
        f"{row['gbps']:.2f}",
        f"{100 * row['fraction_of_read_bandwidth']:.0f} %",
        f"{row['speedup']:.2f} x",
        row["baseline"],
        f"{row['error']:.0e}",
    ]


def _plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(6 * len(shapes), 4.5), layout="constrained", squeeze=False)
    for axis, shape in zip(axes[0], shapes):
        of_shape = [row for row in rows if row["shape"] == shape]
        for method in dict.fromkeys(row["method"] for row in of_shape):
            points = [(row["context"], row["us"]) for row in of_shape if row["method"] == method]
            axis.plot(*zip(*points), marker="o", label=method)
        axis.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="us a decode step", title=shape)
        axis.legend(fontsize=7)
    figure.suptitle(f"Decode attention, {rows[0]['simd']}, {rows[0]['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
