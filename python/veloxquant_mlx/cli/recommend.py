"""veloxquant recommend: the setting that keeps a model best within a budget of memory."""

from dataclasses import dataclass
from typing import Annotated

import typer

from veloxquant_mlx.cache.codebook import TABLE_SHAPES, key_and_value_bits
from veloxquant_mlx.cli import calibration, options, output, scores
from veloxquant_mlx.cli.methods import CacheMethod, bits_text, check_at_least
from veloxquant_mlx.cli.setup import open_model

NAME = "recommend"
EXAMPLE = "veloxquant recommend smollm2 --context 32768 --memory 0.2"

BITS = (8, 6, 4, 3, 2.5, 2, 1.5, 1)  # vecinfer with learned rotations, best first
MEASURED = 3  # settings that are calibrated and tried where no evaluation is on record
_TRIAL_TOKENS = 1024
_BLOCK = 64


@dataclass(frozen=True)
class Candidate:
    """bits: (16, 16) is the exact cache. cache_bytes: one sequence at the context; shared_bytes: once per model.
    score: what scores.known has of it, or None. error: mean estimated loss of a layer, or None."""

    bits: tuple
    cache_bytes: int
    shared_bytes: int
    fits: bool
    score: dict | None = None
    error: float | None = None

    @property
    def label(self):
        return "fp16" if self.bits == (16, 16) else f"vecinfer {bits_text(self.bits)} bits"


def command(
    model: options.Model,
    context: Annotated[int, typer.Option(help="Tokens that the cache is to hold.")],
    memory: Annotated[
        float, typer.Option(metavar="GB", help="For the cache of one sequence and its tables, 10^9 bytes.")
    ],
    window: options.Window = 64,
    sinks: options.Sinks = 4,
    json: options.Json = False,
):
    """Pick the bits for a memory budget.

    Ranked by what `veloxquant eval` measured on this machine; for a model without such evaluations the
    largest settings that fit are calibrated on built-in text and ranked by their error in each layer: estimated."""
    check_at_least("--context", context, 1)
    if not memory > 0:
        raise ValueError(f"--memory: got {memory:g}, wanted more than 0")
    check_at_least("--window", window, 1)
    check_at_least("--sinks", sinks, 0)
    loaded, tokenizer = open_model(model)
    known = scores.known(loaded)
    found = candidates(loaded, context, memory * 1e9, window, sinks, known)
    fitting = [c for c in found if c.fits]
    estimated = bool(fitting) and fitting[0].bits != (16, 16) and not any(c.score for c in fitting)
    if estimated:
        found = measured(model, loaded, tokenizer, found, window, sinks)
        fitting = [c for c in found if c.fits]
    choice = best(fitting)
    if json:
        output.emit_json(
            {
                "choice": None if choice is None else choice.label,
                "basis": "estimated" if estimated else "evaluated",
                "context": context,
                "memory_bytes": int(memory * 1e9),
                "candidates": [_fields(c) for c in found],
            }
        )
    else:
        _print(model, context, memory, found, choice, estimated)
    if choice is None:
        raise typer.Exit(1)


def candidates(model, context, budget, window, sinks, known):
    """fp16 and every entry of BITS with its bytes at `context`, those with most bits first."""
    from veloxquant_mlx.cache.layout import attention_layers

    layers = attention_layers(model)
    found = []
    for pair in [(16, 16), *map(key_and_value_bits, BITS)]:
        cache_bytes = sum(_layer_bytes(layer, pair, context, window, sinks) for layer in layers)
        shared = sum(_table_bytes(layer, pair) for layer in layers)
        fits = cache_bytes + shared <= budget
        found.append(Candidate(tuple(map(float, pair)), cache_bytes, shared, fits, known.get(tuple(map(float, pair)))))
    return found


def _layer_bytes(layer, pair, context, window, sinks):
    """Exact storage has a fixed capacity; blocks seal once all their tokens are older than the window."""
    per_element = 2 * layer.n_kv_heads * layer.head_dim
    sealed = max(0, context - sinks - window) // _BLOCK * _BLOCK
    exact = 2 * per_element * (sinks + window + _BLOCK)
    return int(exact + sealed * sum(pair) / 8 * layer.n_kv_heads * layer.head_dim)


def _table_bytes(layer, pair):
    """Tables of keys and values in fp16, and rotations in fp32: two matrices for keys, one for values."""
    if pair == (16, 16):
        return 0
    dim, total = layer.head_dim, 0
    for bits in pair:
        _, centroids = TABLE_SHAPES[bits]
        total += 2 * dim * centroids
    return layer.n_kv_heads * (total + 3 * 4 * dim * dim)


def measured(model_name, model, tokenizer, found, window, sinks):
    """`found` with the error of the MEASURED largest settings that fit, each calibrated and tried."""
    from veloxquant_mlx.layer_errors import layer_errors
    from veloxquant_mlx.text import read_texts

    chosen = [c for c in found if c.fits and c.bits != (16.0, 16.0)][:MEASURED]
    with output.progress() as report:
        made = calibration.calibrate_quickly(model, tokenizer, [c.bits for c in chosen], report)
        # The end of the text, which calibration did not reach.
        trial = "\n".join(list(read_texts(None))[-20:])
        tokens = tokenizer.encode(trial, add_special_tokens=False)[-_TRIAL_TOKENS:]
        errors = {}
        for i, c in enumerate(chosen):
            report(i / len(chosen), f"trying {c.label}")
            method = CacheMethod("vecinfer", c.bits, window, sinks, made[c.bits])
            layers = layer_errors(model, tokens, method.build(model, strict=True))
            errors[c.bits] = sum(e.score**2 / 2 + e.value for e in layers) / len(layers)
    return [
        Candidate(c.bits, c.cache_bytes, c.shared_bytes, c.fits, c.score, errors.get(c.bits, c.error)) for c in found
    ]


def best(fitting):
    """The exact cache where it fits, else the least KL on record, else the least estimated error, else most bits."""
    exact = [c for c in fitting if c.bits == (16.0, 16.0)]
    if exact:
        return exact[0]
    scored = [c for c in fitting if c.score]
    if scored:
        return min(scored, key=lambda c: c.score["kl"])
    tried = [c for c in fitting if c.error is not None]
    return min(tried, key=lambda c: c.error) if tried else next(iter(fitting), None)


def _fields(c):
    return {
        "setting": c.label,
        "cache_bytes": c.cache_bytes,
        "shared_bytes": c.shared_bytes,
        "fits": c.fits,
        "ppl_increase": c.score and c.score["ppl_increase"],
        "kl": c.score and c.score["kl"],
        "estimated_error": c.error,
    }


def _print(model, context, memory, found, choice, estimated):
    rows = [
        [
            ("> " if c is choice else "") + c.label,
            output.megabytes(c.cache_bytes),
            output.megabytes(c.shared_bytes),
            "yes" if c.fits else "no",
            f"{100 * c.score['ppl_increase']:+.2f} %" if c.score else "",
            f"{c.score['kl']:.4f}" if c.score else "",
            f"{c.error:.4f}" if c.error is not None else "",
        ]
        for c in found
    ]
    columns = ["setting", "cache", "tables", "fits", "perplexity", "KL", "estimated error"]
    output.table(f"{model}, {context} tokens, at most {memory:g} GB", columns, rows)
    if choice is None:
        output.note(f"nothing fits {memory:g} GB: use a shorter context or more memory")
    else:
        basis = "estimated from the error in each layer" if estimated else "by evaluations on record"
        output.note(f"{choice.label}, {basis}; calibrate MODEL --bits B makes its tables")
