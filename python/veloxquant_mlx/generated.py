"""The built-in calibration text: what the model writes itself, mixed with what text.py finds.

What a model says is near to what it will be asked to remember; what others wrote is more varied. Which share is
best has not been measured (docs/quality.md).
"""

import re

import mlx.core as mx
import numpy as np

from veloxquant_mlx.cache.layout import native_caches
from veloxquant_mlx.prose import PASSAGES
from veloxquant_mlx.text import calibration_text

OWN_SHARE = 0.5  # of the text, by length
PASSAGE_TOKENS = 128
WORTH_WRITING = 2048  # tokens: few passages take as many steps as many, and a calibration of so few tokens is a trial
_BATCH = 96  # passages at a time: a step reads the weights once for all
_OPENING_TOKENS = 8  # of a sentence from prose.py that a passage begins with: a genre and a subject
_TEMPERATURE = 1.0
_SEED = 1684


def built_in_texts(model, tokenizer, num_tokens, own_share=OWN_SHARE, progress=None):
    """Yields passages of `num_tokens` tokens in all or more; any prefix has about the share that the model wrote.

    The model writes when the first passage is asked for. progress(fraction) of that. Nothing where it would be
    fewer than WORTH_WRITING tokens, or with a tokenizer that only encodes.
    """
    wanted = round(own_share * num_tokens)
    able = wanted >= WORTH_WRITING and hasattr(tokenizer, "decode")
    own = generated_passages(model, tokenizer, wanted, progress) if able else []
    written = found = 0
    for passage in calibration_text():
        while own and written * (1 - own_share) <= found * own_share:
            written += len(own[0])
            yield own.pop(0)
        if own_share < 1 or not able:
            found += len(passage)
            yield passage


def generated_passages(model, tokenizer, num_tokens, progress=None):
    """A list of strings of about PASSAGE_TOKENS tokens each, `num_tokens` in all or a little more.

    Sampled at temperature 1, each from the opening of another sentence, special tokens left out. The same for the
    same model on the same machine. progress(fraction).
    """
    openings = _openings(tokenizer)
    wanted = -(-num_tokens // PASSAGE_TOKENS)
    key, passages = mx.random.key(_SEED), []
    while len(passages) < wanted:
        n = min(_BATCH, wanted - len(passages))
        rows = [openings[(len(passages) + i) % len(openings)] for i in range(n)]

        def step(done, begun=len(passages), n=n):
            if progress:
                progress((begun + n * done) / wanted)

        key, now = mx.random.split(key)
        tokens = _sample(model, tokenizer, np.array(rows, np.int32), PASSAGE_TOKENS - _OPENING_TOKENS, now, step)
        passages += [tokenizer.decode(row) for row in tokens.tolist()]
    return passages


def _sample(model, tokenizer, openings, n, key, progress):
    """openings: [B, k] -> int32 [B, k + n]."""
    caches = native_caches(model)
    silent = mx.array(sorted(_special_tokens(tokenizer)))
    tokens = [mx.array(openings)]
    for i in range(n):
        key, now = mx.random.split(key)
        logits = model(tokens[-1], cache=caches)[:, -1].astype(mx.float32) / _TEMPERATURE
        logits[:, silent] = -mx.inf
        tokens.append(mx.random.categorical(logits, key=now)[:, None].astype(mx.int32))
        mx.eval(tokens[-1], [cache.state for cache in caches])
        progress((i + 1) / n)
    return np.array(mx.concatenate(tokens, axis=1))


def _special_tokens(tokenizer):
    return {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "eos_token_ids", ())}


def _openings(tokenizer):
    """The first tokens of sentences, those of different passages after one another."""
    sentences = [[s for s in re.split(r"(?<=[.!?])\s+", passage) if len(s) > 60] for passage in PASSAGES]
    rounds = max(map(len, sentences))
    found = []
    for i in range(rounds):
        for of_passage in sentences:
            if i < len(of_passage):
                tokens = tokenizer.encode(of_passage[i], add_special_tokens=False)[:_OPENING_TOKENS]
                if len(tokens) == _OPENING_TOKENS:
                    found.append(tokens)
    return found
