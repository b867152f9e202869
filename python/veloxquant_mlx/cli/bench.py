"""veloxquant bench: timings of this machine, every output verified before and after it is timed."""

from typing import Annotated, Optional

import typer

from veloxquant_mlx.cli import bench_attention, bench_generate, options, output

app = typer.Typer(help="Measure the kernels on this machine.", rich_markup_mode=None, no_args_is_help=True)
for part in (bench_attention, bench_generate):
    app.command(part.NAME, epilog=f"Example: {part.EXAMPLE}")(part.command)

KERNELS_EXAMPLE = "veloxquant bench kernels --json --plot kernels.png"

_COLUMNS = ["function", "shape", "us", "1 thread", "best MLX", "us", "times", "1 thread", "GB/s", "of copy"]


@app.command("kernels", epilog=f"Example: {KERNELS_EXAMPLE}")
def kernels(
    json: options.Json = False,
    plot: Annotated[Optional[str], typer.Option(metavar="FILE.png", help="Also draw the speed-ups.")] = None,
    only: Annotated[Optional[str], typer.Option(metavar="TEXT", help="Only functions with TEXT in their name.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per head; the seed's table has 4096.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Rounds of interleaved calls; the median counts.")] = 7,
):
    """Every function against the same operation in plain MLX, and against a copy of the same bytes.

    Two or more MLX formulations each, the best one counts. All candidates alternate in one run.
    """
    from veloxquant_mlx.benchmarks import kernels as suite
    from veloxquant_mlx.benchmarks import measure

    if tokens < 64:
        raise ValueError(f"--tokens: got {tokens}, wanted at least 64")
    if rounds < 1:
        raise ValueError(f"--rounds: got {rounds}, wanted at least 1")
    rows = []
    with output.progress() as report:
        for index, case in enumerate(suite.cases(tokens, only or "")):
            rows.append(measure.row(case, rounds, lambda what, i=index: report(min(0.99, i / 16), what)))
    if not rows:
        raise ValueError(f"--only: got {only!r}, wanted a part of a function's name")
    if plot:
        _plot(rows, plot)
    if json:
        output.emit_json({"command": "bench kernels", "rows": rows, "plot": plot})
        return
    output.table(
        f"Kernels on {_device(rows[0])} (medians)",
        _COLUMNS,
        [_cells(row) for row in rows],
    )


def _device(row):
    threads = "" if row["threads"] is None else f", {row['threads']} threads"
    return f"{row['backend']}/{row['simd']}{threads}"


def _cells(row):
    return [
        row["function"],
        row["shape"],
        f"{row['us']:,.0f}",
        "-" if row["us_1_thread"] is None else f"{row['us_1_thread']:,.0f}",
        row["baseline"],
        f"{row['baseline_us']:,.0f}",
        f"{row['speedup']:.1f} x",
        "-" if row["us_1_thread"] is None else f"{row['speedup_1_thread']:.1f} x",
        f"{row['gbps']:.1f}",
        f"{100 * row['fraction_of_copy']:.0f} %",
    ]


def _plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.6), layout="constrained")
    labels = [f"{row['function']}\n{row['shape']}" for row in rows]
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [row["speedup"] for row in rows], 0.4, label=_device(rows[0]))
    if rows[0]["threads"] is not None:
        axes.barh([p + 0.2 for p in places], [row["speedup_1_thread"] for row in rows], 0.4, label="1 thread")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the best of the MLX formulations")
    axes.set_title("VeloxQuant kernels", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
