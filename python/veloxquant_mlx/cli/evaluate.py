"""veloxquant eval: perplexity, KL divergence and top-1 agreement of caches against the exact one."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from veloxquant_mlx.cli import options, output, plots
from veloxquant_mlx.cli import scores as recorded
from veloxquant_mlx.cli.methods import (
    CODEBOOKS,
    METHODS,
    Wanted,
    check_at_least,
    check_bits,
    check_compare,
    check_directories,
    check_methods,
    labels,
    methods_with_bits,
)
from veloxquant_mlx.cli.setup import Settings, make_methods, open_model

NAME = "eval"
EXAMPLE = "veloxquant eval smollm2 --compare fp16,mlx4,vecinfer4,vecinfer2 --text wikitext2-test.txt --plot out.png"


def command(
    model: options.Model,
    text: Annotated[str, typer.Option(metavar="FILE", help="UTF-8 text to score; its first tokens are used.")],
    method: Annotated[
        Optional[list[str]], typer.Option(help=f"One of {', '.join(METHODS)}; repeated or comma separated for several.")
    ] = None,
    bits: Annotated[
        str,
        typer.Option(help="Bits per element, e.g. 2 or 4/2 for keys/values; comma separated for several."),
    ] = "2",
    compare: Annotated[
        Optional[str],
        typer.Option(
            metavar="LIST",
            help="Instead of --method and --bits: methods with their bits, e.g. fp16,mlx4,vecinfer2,vecinfer4/2; a "
            "window and sinks of its own after a colon: vecinfer4:0/0, mlx4:64/4.",
        ),
    ] = None,
    artifacts: options.Artifacts = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text to score.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    score_from: Annotated[
        int, typer.Option(help="Tokens of each window that are a prompt: read first, not scored.")
    ] = 0,
    window: options.Window = 64,
    sinks: options.Sinks = 4,
    transform: options.Transform = None,
    codebook_per: options.CodebookPer = "subvector",
    entries: options.Entries = "fp16",
    fit_tokens: Annotated[int, typer.Option(help="adaptive: tokens that are read before tables are fitted.")] = 1024,
    plot: Annotated[
        Optional[str], typer.Option(metavar="PNG", help="Draw quality against bytes, and the errors by layer.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="cpu, or cuda: the package veloxquant on a transformers model, for vecinfer.")
    ] = "cpu",
    calibration: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="cuda: the text that tables are fitted to.")
    ] = None,
    json: options.Json = False,
):
    """Score caches against the exact one.

    Perplexity, mean KL, top-1 agreement, bytes with everything counted, and the error in each layer."""
    if backend != "cpu":
        for option, value, usual in (
            ("--artifacts", artifacts, None), ("--window", window, 64), ("--sinks", sinks, 4),
            ("--score-from", score_from, 0), ("--entries", entries, "fp16"), ("--plot", plot, None),
        ):  # fmt: skip
            if value != usual:
                raise ValueError(f"--backend: got {backend} with {option} {value}, wanted that with cpu alone")
        wanted = None if compare is None and method is None else _wanted(method, bits, compare, None)
        _on_cuda(backend, model, text, wanted, transform, codebook_per, windows, length, calibration, json)
        return
    artifacts = check_directories(artifacts)
    wanted = _wanted(method, bits, compare, artifacts)
    for option, value, least in (
        ("--windows", windows, 1), ("--length", length, 2), ("--window", window, 0), ("--sinks", sinks, 0),
        ("--score-from", score_from, 0), ("--fit-tokens", fit_tokens, 1),
    ):  # fmt: skip
        check_at_least(option, value, least)
    if score_from > length - 2:
        raise ValueError(f"--score-from: got {score_from}, wanted at most {length - 2} (--length less 2)")
    fitted = any(one.name == "adaptive" for one in wanted)
    if fitted and score_from < fit_tokens:
        raise ValueError(
            f"--score-from: got {score_from}, wanted at least --fit-tokens = {fit_tokens}: adaptive codebooks are "
            "fitted on the prompt"
        )
    if plot is not None and not Path(plot).absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot: got {plot!r}, wanted a file in an existing directory")
    settings = Settings(window, sinks, artifacts, transform, codebook_per, entries, fit_tokens)
    settings.recipe("vecinfer")  # which checks the values

    from veloxquant_mlx.evaluate import evaluate, read_windows
    from veloxquant_mlx.text import read_file

    contents = read_file(text, "--text")
    loaded, tokenizer = open_model(model)
    tokens = read_windows(tokenizer, contents, windows, length)
    chosen = make_methods(model, loaded, tokenizer, wanted, settings)
    named = dict(zip(labels(chosen), chosen))
    with output.progress() as report:
        builders = {label: (lambda m=m: m.build(loaded, strict=True)) for label, m in named.items()}
        scores = evaluate(loaded, tokens, builders, report, score_from)
    for label, m in named.items():
        recorded.record(loaded, m, scores[label])
    if plot is not None:
        plots.draw(scores, plot)
    if json:
        results = [_fields(label, m, scores[label]) for label, m in named.items()]
        output.emit_json(results[0] if len(results) == 1 else {"results": results})
    else:
        _print(scores)


def _on_cuda(backend, model, text, wanted, transform, codebook_per, windows, length, calibration, json):
    """By the package veloxquant, on a transformers model: the same protocol, rows of its own."""
    on_device = options.on_cuda(backend, "eval")
    if model == "smollm2":
        from veloxquant_mlx.models.smollm2 import find_gguf

        model = str(find_gguf())
    try:
        settings = on_device.settings_of(on_device.COMPARED)
        if wanted is not None:
            pairs = [one.bits or (2, 2) for one in wanted if one.name == "vecinfer"]
            if len(pairs) != len(wanted):
                raise ValueError("--compare: got other methods with --backend cuda, wanted vecinfer alone")
            settings = on_device.settings_of(
                ",".join(f"{k:g}/{v:g}:{codebook_per}:{transform or 'learned'}" for k, v in pairs)
            )
        with output.progress() as report:
            scores = on_device.compare(
                model, text, settings, calibration, windows, length, report=lambda what: report(0.0, what)
            )
    except on_device.Error as error:
        raise ValueError(str(error)) from None
    if json:
        output.emit_json({"command": "eval", "backend": "cuda", "windows": windows, "results": scores})
        return
    title = f"{windows} windows of {length} tokens on the CUDA device"
    output.table(title, list(on_device.COLUMNS), [on_device.cells(label, score) for label, score in scores.items()])


def _wanted(method, bits, compare, artifacts):
    if compare is not None:
        if method is not None or bits != "2":
            raise ValueError("--compare: got it with --method or --bits, wanted the bits in its list: vecinfer2")
        return check_compare(compare)
    names, widths = check_methods(",".join(method or ["vecinfer"])), check_bits(bits)
    if not artifacts or not set(names) & set(CODEBOOKS):
        return methods_with_bits(names, widths)
    if len(widths) > 1:
        raise ValueError("--bits: got several values with --artifacts, whose codebook decides the bits; wanted one")
    return [Wanted(one.name) if one.name in CODEBOOKS else one for one in methods_with_bits(names, widths)]


def _fields(label, method, score):
    return {
        "label": label,
        "method": method.name,
        "bits_per_element": score.bits_per_element,
        "tokens": score.tokens,
        "window": method.window,
        "sinks": method.sinks,
        "ppl": score.ppl,
        "ppl_fp16": score.ppl_exact,
        "ppl_increase": score.ppl_increase,
        "kl": score.kl,
        "top1": score.top1,
        "cache_bytes_per_token": score.cache_bytes_per_token,
        "shared_bytes": score.shared_bytes,
        "bits_with_everything": {str(n): bits for n, bits in score.bits_with_everything.items()},
        "layers": [vars(error) for error in score.layers],
        "fit": score.fit,
    }


def _print(scores):
    any_score = next(iter(scores.values()))
    lengths = list(any_score.bits_with_everything)
    output.table(
        f"{any_score.tokens} tokens scored; exact cache: perplexity {any_score.ppl_exact:.3f}",
        ["method", "ppl", "increase", "KL", "top-1", "bytes/token", "tables", *(f"bits at {n}" for n in lengths)],
        [
            [
                label,
                f"{score.ppl:.3f}",
                f"{100 * score.ppl_increase:+.2f} %",
                f"{score.kl:.4f}",
                f"{100 * score.top1:.1f} %",
                f"{score.cache_bytes_per_token:.0f}",
                output.megabytes(score.shared_bytes),
                *(f"{score.bits_with_everything[n]:.2f}" for n in lengths),
            ]
            for label, score in scores.items()
        ],
    )
    for label, score in scores.items():
        if score.fit is not None:
            output.note(
                f"{label}: fitted on {score.fit['tokens']} tokens in {score.fit['seconds']:.1f} s, "
                f"{100 * score.fit['seconds'] / score.fit['prompt_seconds']:.0f} % of reading the prompt; "
                f"{output.megabytes(score.fit['peak_bytes'])} more memory while it lasted"
            )
    with_layers = {label: score.layers for label, score in scores.items() if score.layers}
    if with_layers:
        n = max(len(layers) for layers in with_layers.values())
        rows = [[str(i), *(_layer(layers, i) for layers in with_layers.values())] for i in range(n)]
        output.table(
            "Error by layer on the first window: of scores (nats) / of values (relative)", ["layer", *with_layers], rows
        )


def _layer(layers, i):
    return f"{layers[i].score:.4f} / {layers[i].value:.4f}" if i < len(layers) else ""
