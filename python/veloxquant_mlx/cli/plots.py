"""What `veloxquant eval --plot` draws."""


def draw(scores, path):
    """scores: {label: evaluate.Score}. A PNG file: quality against bytes, and the errors by layer where known."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    with_layers = {label: score for label, score in scores.items() if score.layers}
    n = 2 if with_layers else 1
    figure = Figure(figsize=(7 * n, 5), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    _pareto(axes[0], scores)
    if with_layers:
        _by_layer(axes[1], with_layers)
    figure.savefig(path, dpi=150, format="png")


def front(points):
    """Those of [(bits, loss)] that no other beats in both, by bits."""
    best, found = float("inf"), []
    for bits, loss in sorted(points):
        if loss < best:
            best = loss
            found.append((bits, loss))
    return found


def _pareto(axes, scores):
    """Perplexity increase over bits an element with everything counted, at the longest length it is known for."""
    n = max(next(iter(scores.values())).bits_with_everything)
    points = {label: (score.bits_with_everything[n], 100 * score.ppl_increase) for label, score in scores.items()}
    for label, point in points.items():
        axes.plot(*point, "o")
        axes.annotate(label, point, textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.plot(*zip(*front(points.values())), "--", color="grey", linewidth=1, label="Pareto front")
    axes.set(
        xlabel=f"bits per element at {n} tokens: codes, scalars, tables, rotations, window, sinks",
        ylabel="perplexity increase (%)",
        xscale="log",
    )
    axes.set_yscale("symlog", linthresh=0.1)
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _by_layer(axes, scores):
    for label, score in scores.items():
        layers = [error.layer for error in score.layers]
        (line,) = axes.plot(layers, [error.score for error in score.layers], label=f"{label}: scores (nats)")
        axes.plot(
            layers, [error.value for error in score.layers], ":", color=line.get_color(), label=f"{label}: values"
        )
    axes.set(xlabel="layer", ylabel="error: of scores in nats, of values relative", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
