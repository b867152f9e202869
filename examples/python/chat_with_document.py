"""Read a long document once, keep its cache in a file, ask about it whenever you like.

    python examples/python/chat_with_document.py --document report.txt --cache report.safetensors "Who wrote it?"

The first run reads the document through the model, fits the codes to it, and saves the packed cache;
every later run starts from the file and does not need the document. Each question starts from the
document anew, so that answers do not depend on the order of the questions.
"""

import argparse
import copy
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm

from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.models import load_model

CHUNK = 256  # tokens that are read at once


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", default="smollm2", help="smollm2, a directory, or a hub name")
    parser.add_argument("--document", type=Path, help="a text file; needed by the first run only")
    parser.add_argument("--cache", type=Path, default=Path("document.safetensors"))
    parser.add_argument("--bits", type=float, default=4, help="of a key or value element in the cache")
    parser.add_argument("--max-tokens", type=int, default=100)
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    started = time.perf_counter()
    if arguments.cache.exists():
        document = prompt_cache.load(arguments.cache, model)
        print(f"loaded {document[0].offset} tokens in {time.perf_counter() - started:.2f} s")
    else:
        if arguments.document is None:
            parser.error(f"--document: got none and {arguments.cache} does not exist yet")
        document = read(model, tokenizer, arguments.document.read_text(), arguments.bits)
        prompt_cache.save(arguments.cache, document)
        print(f"read {document[0].offset} tokens in {time.perf_counter() - started:.1f} s, saved {arguments.cache}")
    print(f"the cache holds {sum(cache.nbytes for cache in document) / 1e6:.2f} MB")

    _, after = prompt_around(tokenizer, "")
    for question in arguments.questions:
        caches = copy.deepcopy(document)  # shares the packed blocks
        print(f"\n> {question}")
        tokens = tokenizer.encode(question + after, add_special_tokens=False)
        for piece in mlx_lm.stream_generate(
            model, tokenizer, tokens, max_tokens=arguments.max_tokens, prompt_cache=caches
        ):
            print(piece.text, end="", flush=True)
        print()


def prompt_around(tokenizer, document):
    """(text before a question, text after it), as the model expects them."""
    if not tokenizer.has_chat_template:
        return f"{document}\n\nQuestion: ", "\nAnswer:"
    message = {"role": "user", "content": f"{document}\n\n<question>"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, after = text.split("<question>")
    return before, after


def read(model, tokenizer, document, bits):
    """The caches of `model` after reading `document`."""
    before, _ = prompt_around(tokenizer, document)
    tokens = mx.array(tokenizer.encode(before, add_special_tokens=False))
    # Tables fitted on what they are going to hold, once so much of it was read: no calibration.
    fit_tokens = min(2048, len(tokens) // 2)
    config = KVCacheConfig(codebook="adaptive", bits=bits, fit_tokens=fit_tokens, fit_per="head")
    caches = KVCacheBuilder.build(model, config)
    for start in range(0, len(tokens), CHUNK):
        model(tokens[None, start : start + CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


if __name__ == "__main__":
    main()
