"""Read a long document once, keep its cache in a file, ask about it whenever you like.

    python examples/python/chat_with_document.py --document report.txt --cache report.safetensors "Who wrote it?"

The first run reads the document through the model and saves the packed cache; every later run starts
from the file, which needs neither the document nor a calibration. Each question starts from the
document anew, so that answers do not depend on the order of the questions.
"""

import argparse
import copy
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm

from veloxquant_mlx.allocators.vecinfer import calibrate
from veloxquant_mlx.cache import prompt_cache
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.models import load_model

CHUNK = 512  # tokens that are read at once


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

    for question in arguments.questions:
        caches = copy.deepcopy(document)  # shares the packed blocks
        prompt = f"\n\nQuestion: {question}\nAnswer:"
        print(f"\n> {question}")
        pieces = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=arguments.max_tokens, prompt_cache=caches)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()


def read(model, tokenizer, text, bits):
    """The caches of `model` after reading `text`."""
    # Calibrated on what it is going to hold: quality depends on that most of all.
    _, codebook = calibrate(model, tokenizer, bits=bits, num_tokens=4096, texts=[text])
    caches = KVCacheBuilder.build(model, KVCacheConfig(codebook=codebook))
    tokens = mx.array(tokenizer.encode(text))
    for start in range(0, len(tokens), CHUNK):
        model(tokens[None, start : start + CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


if __name__ == "__main__":
    main()
