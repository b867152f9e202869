"""Several prompts at once. Rows of different lengths share the model's steps, not their caches: a row says
what it would alone, and holds no padding.

    python examples/python/batch.py "What is a prime number?" "Name three rivers." "Why is the sky blue?"
"""

import argparse

import mlx_lm

from veloxquant_mlx.cache.base import KVCacheConfig, install
from veloxquant_mlx.models import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", default="smollm2", help="smollm2, a directory, or a hub name")
    parser.add_argument("--bits", type=int, default=4, help="1 to 4, of a key or value element in the cache")
    parser.add_argument("--max-tokens", type=int, default=60)
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    # From here on every cache that mlx_lm makes for this model is one of ours. This method needs no calibration.
    install(model, KVCacheConfig(method="rabitq", bits=arguments.bits))

    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        if tokenizer.has_chat_template
        else tokenizer.encode(prompt)
        for prompt in arguments.prompts
    ]
    response = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=arguments.max_tokens, return_prompt_caches=True
    )
    for prompt, text, caches in zip(arguments.prompts, response.texts, response.caches):
        held = sum(cache.nbytes for cache in caches)
        print(f"> {prompt}   [{caches[0].offset} tokens, {held / 1e3:.0f} kB of cache]\n{text.strip()}\n")


if __name__ == "__main__":
    main()
