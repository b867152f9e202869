"""veloxquant generate: text from a model whose KV cache is compressed."""

import sys
from itertools import chain
from typing import Annotated

import typer

from veloxquant_mlx.cli import options, output
from veloxquant_mlx.cli.methods import (
    CODEBOOKS,
    METHODS,
    REFERENCES,
    Wanted,
    check_at_least,
    check_bits,
    check_directories,
    check_methods,
    kernel,
    only,
)
from veloxquant_mlx.cli.setup import Settings, make_methods, open_model

NAME = "generate"
EXAMPLE = 'veloxquant generate smollm2 --bits 2 --prompt "What is the capital of France?"'


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to answer; '-' reads it from stdin.")],
    method: Annotated[
        str, typer.Option(help=f"One of {', '.join(name for name in METHODS if name not in REFERENCES)}.")
    ] = "vecinfer",
    bits: Annotated[str, typer.Option(help="Bits per element, e.g. 2, 2.5, or 4/2 for keys/values.")] = "2",
    artifacts: options.Artifacts = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    window: options.Window = 64,
    sinks: options.Sinks = 4,
    json: options.Json = False,
):
    """Generate text with a compressed KV cache.

    Greedy. The prompt becomes a chat message where the model has a chat template."""
    name, width = only("--method", check_methods(method)), only("--bits", check_bits(bits))
    if name in REFERENCES:
        raise ValueError(f"--method: got {name!r}, which eval alone has, wanted another")
    artifacts = check_directories(artifacts)
    for option, value, least in (("--max-tokens", max_tokens, 1), ("--window", window, 0), ("--sinks", sinks, 0)):
        check_at_least(option, value, least)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ValueError("--prompt: got an empty text, wanted at least one character")

    loaded, tokenizer = open_model(model)
    wanted = Wanted(name, None if artifacts and name in CODEBOOKS else width)
    settings = Settings(window, sinks, artifacts)
    chosen = only("--artifacts", make_methods(model, loaded, tokenizer, [wanted], settings))
    on_text = (lambda piece: None) if json else (lambda piece: output.text(piece, end=""))
    fields = run(loaded, tokenizer, chat_tokens(tokenizer, prompt), chosen, max_tokens, on_text)
    if json:
        output.emit_json(fields)
        return
    output.text("")
    output.note(
        f"{chosen.label}: {fields['prompt_tokens']} + {fields['generated_tokens']} tokens, "
        f"{fields['tokens_per_s']:.1f} tokens/s, cache {output.megabytes(fields['cache_bytes'])} "
        f"(fp16: {output.megabytes(fields['fp16_cache_bytes'])}), codebooks {output.megabytes(fields['shared_bytes'])}, "
        f"attention: {fields['kernel']}"
    )


def chat_tokens(tokenizer, prompt):
    """The token ids of `prompt` as a user's message; as it stands for a model without a chat template."""
    if tokenizer.has_chat_template:
        return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))
    return list(tokenizer.encode(prompt))


def run(model, tokenizer, tokens, method, max_tokens, on_text=lambda piece: None):
    """Answers the prompt `tokens` greedily with new caches of `method`. Returns the fields of generate --json."""
    from mlx_lm import stream_generate

    from veloxquant_mlx._ext import dequantize_calls
    from veloxquant_mlx.cache.kv_cache import lookup_nbytes, shared_nbytes
    from veloxquant_mlx.cache.layout import flat_caches
    from veloxquant_mlx.evaluate import bits_per_element, cache_bytes
    from veloxquant_mlx.models import kv_elements_per_token

    caches = method.build(model)
    dequantized_before = dequantize_calls()
    pieces = []
    with output.progress() as report:

        def on_prompt(done, total):
            report(done / total, f"reading the prompt, {done} of {total} tokens")

        responses = stream_generate(
            model, tokenizer, tokens, max_tokens=max_tokens, prompt_cache=caches, prompt_progress_callback=on_prompt
        )
        first = next(responses)
    for response in chain([first], responses):
        pieces.append(response.text)
        on_text(response.text)
    cached_tokens = max(getattr(cache, "offset", 0) for cache in flat_caches(caches))
    return {
        "text": "".join(pieces),
        "method": method.name,
        "bits_per_element": bits_per_element(caches),
        "prompt_tokens": response.prompt_tokens,
        "generated_tokens": response.generation_tokens,
        "tokens_per_s": response.generation_tps,
        "cache_bytes": cache_bytes(caches),
        "shared_bytes": shared_nbytes(caches),
        "lookup_bytes": lookup_nbytes(caches),
        "fp16_cache_bytes": 2 * kv_elements_per_token(model) * cached_tokens,
        "kernel": kernel(caches),
        "dequantize_calls": dequantize_calls() - dequantized_before,
    }
