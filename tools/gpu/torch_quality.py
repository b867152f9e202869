"""Perplexity of a transformers model with a compressed cache, by the protocol of `veloxquant eval`.

    PYTHONPATH=python python3 tools/gpu/torch_quality.py MODEL CALIBRATION.txt TEST.txt [--bits 2] [--per head] [--windows 4]

MODEL: a folder, a hub name or a .gguf file. Every query sees what token by token decoding would show it: on the CPU in
one pass (strict), on a GPU token by token, all windows at once.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import transformers

import veloxquant.torch as vt


def load(name):
    path = Path(name)
    kind = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent) if kind else name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kind).eval()
    if torch.cuda.is_available():
        model = model.to("cuda", torch.float16)
    return model, tokenizer


def windows_of(tokenizer, file, count, length):
    """The first count * length tokens, without BOS."""
    ids = tokenizer(Path(file).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        raise SystemExit(f"{file}: got {len(ids)} tokens, wanted {count * length}")
    return torch.tensor(ids[: count * length]).reshape(count, length)


@torch.no_grad()
def log_probs(model, ids, make_cache):
    """fp32 log-probabilities on the CPU of every position but the last: [windows, length - 1, vocabulary] in turn."""
    if model.device.type == "cpu" or make_cache is None:
        for window in ids:
            cache = None if make_cache is None else make_cache(strict=True)
            logits = model(window[None].to(model.device), past_key_values=cache).logits[0, :-1]
            yield logits.float().log_softmax(-1).cpu()
        return
    cache, rows = make_cache(), []
    for t in range(ids.shape[1] - 1):
        logits = model(ids[:, t : t + 1].to(model.device), past_key_values=cache).logits[:, 0]
        rows.append(logits.float().log_softmax(-1).cpu())
    yield from torch.stack(rows, dim=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--value-bits", type=int)
    parser.add_argument("--per", default="head", choices=["head", "subvector"])
    parser.add_argument("--transform", default="learned", choices=["learned", "hadamard"])
    parser.add_argument("--tables", help="a file of tables: read where it is there, else written")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--calibration-tokens", type=int, default=24576)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    ids = windows_of(tokenizer, args.test, args.windows, args.length)
    if args.tables and Path(args.tables).exists():
        tables = vt.Tables.load(args.tables)
    else:
        start = time.perf_counter()
        tables = vt.calibrate(
            model,
            list(windows_of(tokenizer, args.calibration, args.calibration_tokens // 2048, 2048)),
            args.bits,
            args.value_bits,
            transform=args.transform,
            codebook_per=args.per,
            max_tokens=args.calibration_tokens,
        )
        print(f"calibrated in {time.perf_counter() - start:.0f} s, {tables.nbytes} bytes of tables", flush=True)
        if args.tables:
            tables.save(args.tables)
    model.set_attn_implementation("sdpa")
    exact = [x.half() for x in log_probs(model, ids, None)]
    nll = {"exact": 0.0, "ours": 0.0}
    kl = agreeing = 0.0
    for window, want, got in zip(
        ids, exact, log_probs(model, ids, lambda **options: vt.VeloxQuantCache(model, tables, **options))
    ):
        want, targets = want.float(), window[1:, None]
        nll["exact"] -= want.gather(1, targets).sum().item()
        nll["ours"] -= got.gather(1, targets).sum().item()
        kl += (want.exp() * (want - got)).sum().item()
        agreeing += (want.argmax(-1) == got.argmax(-1)).sum().item()
    n = args.windows * (args.length - 1)
    ppl = {name: math.exp(total / n) for name, total in nll.items()}
    print(
        f"{args.bits}/{args.value_bits or args.bits} bits, one codebook a {args.per}, {args.transform}, "
        f"{args.windows} windows of {args.length} on {model.device.type}: perplexity {ppl['ours']:.4f} against "
        f"{ppl['exact']:.4f} ({ppl['ours'] / ppl['exact'] - 1:+.2%}), KL {kl / n:.4f}, top-1 {agreeing / n:.1%}"
    )


if __name__ == "__main__":
    main()
