"""veloxquant demo: the same prompt answered from the exact cache and from VecInfer at 4 and at 2 bits."""

from veloxquant_mlx.cli import options, output
from veloxquant_mlx.cli.demo_prompt import PROMPT, QUESTION
from veloxquant_mlx.cli.generate import chat_tokens, run
from veloxquant_mlx.cli.methods import methods_with_bits
from veloxquant_mlx.cli.setup import make_methods, open_model
from veloxquant_mlx.models import smollm2

NAME = "demo"
EXAMPLE = "veloxquant demo"

_BITS = [(4.0, 4.0), (2.0, 2.0)]
_MAX_TOKENS = 80


def command(json: options.Json = False):
    """Compare the exact cache with VecInfer at 4 and 2 bits."""
    model, tokenizer = open_model(smollm2.NAME)
    methods = make_methods(smollm2.NAME, model, tokenizer, methods_with_bits(["exact", "vecinfer"], _BITS))
    prompt = chat_tokens(tokenizer, PROMPT)
    results = []
    for method in methods:
        output.note(f"{method.label}: reading {len(prompt)} tokens, writing up to {_MAX_TOKENS}")
        results.append({"label": method.label, **run(model, tokenizer, prompt, method, _MAX_TOKENS)})
    answer = tokenizer.encode(results[0]["text"], add_special_tokens=False)
    divergences = answer_divergences(model, prompt, answer, methods)
    for result, kl in zip(results, divergences):
        result["kl"] = kl
        result["ratio"] = result["fp16_cache_bytes"] / result["cache_bytes"]
    if json:
        output.emit_json({"prompt": PROMPT, "results": results})
    else:
        _print(results)


def answer_divergences(model, prompt, answer, methods):
    """Mean KL (nats) from methods[0] to each method of the next-token distributions along `answer`.

    Teacher-forced: all read the same tokens, the prompt and the answer that methods[0] gave.
    """
    from veloxquant_mlx.evaluate import LogProbs, mean_kl

    tokens, start = prompt + answer, len(prompt) - 1
    exact, divergences = None, []
    with output.progress() as report:
        for i, method in enumerate(methods):
            report(i / len(methods), f"comparing next-token distributions: {method.label}")
            log_probs = LogProbs(model, tokens, method.build(model, strict=True), start)
            exact = exact or log_probs
            divergences.append(mean_kl(exact, log_probs))
    return divergences


def _print(results):
    output.text(f"A text about the history of calculus, then: {QUESTION}\n")
    rows = [
        ["answer", *(result["text"].strip() for result in results)],
        ["tokens/s", *(f"{result['tokens_per_s']:.1f}" for result in results)],
        ["cache bytes", *(f"{result['cache_bytes']:,}" for result in results)],
        ["codebook bytes", *(f"{result['shared_bytes']:,}" for result in results)],
        ["smaller than fp16", *(f"{result['ratio']:.2f} x" for result in results)],
        ["KL to exact", *(f"{result['kl']:.4f}" for result in results)],
        ["attention", *(result["kernel"] for result in results)],
    ]
    exact = results[0]
    title = (
        f"SmolLM2-135M, {exact['prompt_tokens']} tokens read; an fp16 cache takes {exact['fp16_cache_bytes']:,} bytes"
    )
    output.table(title, ["", *(result["label"] for result in results)], rows)
