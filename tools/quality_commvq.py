#!/usr/bin/env python3
"""CommVQ on SmolLM2: trains, evaluates as shared/spec/QUALITY.md says, prints one JSON object per setting.

    .venv/bin/python tools/quality_commvq.py TRAIN.txt TEST.txt [--bits 1,2] [--windows 4] [--tokens 8192] [-o DIR]

Training time is that of the C++ part as CPU and wall seconds, the model's run over the text apart.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm import load

from veloxquant_mlx.allocators import commvq
from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.evaluate import evaluate, read_windows
from veloxquant_mlx.models import smollm2


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def train(model, tokenizer, bits, value_bits, arguments, timings):
    marks = []

    def progress(fraction, text):
        if text == "training codebooks" and not marks:
            marks.append((time.time(), cpu_seconds()))
        print(f"\r{bits:g} bits: {100 * fraction:3.0f} % {text}    ", end="", file=sys.stderr)

    texts = arguments.train
    codebook = commvq.train_commvq(
        model, tokenizer, bits, value_bits, num_tokens=arguments.tokens, texts=texts, progress=progress
    )
    wall, cpu = marks[0]
    timings[bits] = {"train_wall_s": round(time.time() - wall, 1), "train_cpu_s": round(cpu_seconds() - cpu, 1)}
    print(json.dumps({"bits": bits, **timings[bits], "tables_bytes": codebook.nbytes}), flush=True)
    return codebook


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--bits", default="1,2")
    parser.add_argument("--value-bits", type=float, default=2)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("-o", "--out")
    arguments = parser.parse_args()
    model, tokenizer = load(str(smollm2.directory()))
    store = NpyArtifactStore(arguments.out) if arguments.out else None
    methods, timings = {}, {}
    for bits in map(float, arguments.bits.split(",")):
        name = f"commvq_{bits:g}_{arguments.value_bits:g}".replace(".", "_")
        if store is not None and store.exists(name):
            codebook = store.load(name)
        else:
            codebook = train(model, tokenizer, bits, arguments.value_bits, arguments, timings)
            if store is not None:
                store.save(name, codebook)
        for window, label in ((64, ""), (0, " window 0")):
            config = KVCacheConfig(
                method="commvq", codebook=codebook, window=window, sinks=4 if window else 0, strict=True
            )
            methods[f"commvq {bits:g}/{arguments.value_bits:g}{label}"] = lambda config=config: KVCacheBuilder.build(
                model, config
            )
            keys_only = KVCacheConfig(
                method="commvq",
                codebook=codebook,
                value_method="fp16",
                window=window,
                sinks=4 if window else 0,
                strict=True,
            )
            if window:
                methods[f"commvq {bits:g}, exact values"] = lambda config=keys_only: KVCacheBuilder.build(model, config)
    windows = read_windows(tokenizer, Path(arguments.test).read_text(), arguments.windows, 2048)
    for label, score in evaluate(
        model, windows, methods, lambda f, t: print(f"\r{100 * f:3.0f} % {t}   ", end="", file=sys.stderr)
    ).items():
        row = {"method": label, **vars(score), "ppl_increase": score.ppl_increase}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    main()
