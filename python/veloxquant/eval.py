"""What a compressed cache costs a transformers model: perplexity, KL divergence and top-1 agreement with the exact one.

    python -m veloxquant.eval MODEL --text TEST.txt --calibration VALID.txt [--compare 2:lane,4/2:lane] [--json]

The protocol is that of `veloxquant eval`: the text is tokenised once, without BOS; its first windows * length tokens
are the windows; positions 1..length-1 of each are scored; every query sees as codes exactly what decoding token by
token would have left as codes. On a CPU that is one strict pass over a window; on a GPU it is decoding token by token,
all windows at once, a step captured in a CUDA graph.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

from veloxquant import Error, bench

WINDOW, SINKS = 64, 4
COMPARED = "2:subvector,2:lane,2:head,4:subvector,4:lane,4/2:lane,4:turboquant"
HOW = {
    "subvector": "a table a sub-vector",
    "lane": "tables by lane",
    "head": "a table a head",
    "turboquant": "turboquant",
}
GGUF_NEEDS = ("gguf", "accelerate")  # the extra `gguf` of python/core
COLUMNS = ("cache", "perplexity", "increase", "KL", "top-1", "tables MB", "bytes/token")


class Setting(NamedTuple):
    """bits: of keys and of values. per: what shares a table, or a codec without any. transform: learned or hadamard."""

    bits: tuple
    per: str
    transform: str = "learned"

    @property
    def file(self):
        """A name for its tables."""
        bits, transform = "-".join(map(str, self.bits)), "_hadamard" if self.transform == "hadamard" else ""
        return f"{bits}_{self.per}{transform}.safetensors"

    @property
    def label(self):
        bits = "/".join(map(str, dict.fromkeys(self.bits)))
        return f"{bits} bits, {HOW[self.per]}" + (", hadamard" if self.transform == "hadamard" else "")


def settings_of(text):
    """ "2:lane,4/2:subvector,2:head:hadamard" -> Settings."""
    found = []
    for part in text.split(","):
        bits, _, how = part.strip().partition(":")
        per, _, transform = how.partition(":")
        numbers = bits.split("/")
        allowed = ("1", "2", "3", "4") if per == "turboquant" else ("2", "4")
        known = per in HOW and len(numbers) <= 2 and all(n in allowed for n in numbers)
        if not known or transform not in ("", "learned", "hadamard"):
            raise Error(
                f"[eval] compare: got {part!r}, wanted bits (2 or 4; 4/2 for keys/values), and subvector, lane or head "
                "after a colon: 2:lane, 4/2:lane, 2:subvector:hadamard; or 1 to 4 bits and turboquant: 4:turboquant"
            )
        found.append(Setting((int(numbers[0]), int(numbers[-1])), per, transform or "learned"))
    return list(dict.fromkeys(found))


def load(name, device, dtype):
    """(model, tokenizer) of a folder, a hub name or a .gguf file."""
    path = Path(name)
    if path.suffix == ".gguf" and (missing := [one for one in GGUF_NEEDS if importlib.util.find_spec(one) is None]):
        raise Error(
            f"[eval] model: got {name} without {' and '.join(missing)}, with which transformers reads .gguf, "
            'wanted `pip install "python/core[torch,gguf]"`'
        )
    import torch
    import transformers

    kind = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent) if kind else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **kind)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **kind)
    except (OSError, ValueError, ImportError) as error:
        raise Error(f"[eval] model: got {name}, which transformers does not load: {error}") from None
    return model.eval().to(device), tokenizer


def windows_of(tokenizer, file, count, length):
    """int64 [count, length]: the first tokens of the text, without BOS."""
    import torch

    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"[eval] text: got {file}, which cannot be read: {error}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        raise Error(f"[eval] {file}: got {len(ids)} tokens, wanted {count * length} ({count} windows of {length})")
    return torch.tensor(ids[: count * length]).reshape(count, length)


class Sums:
    """What is added up over positions, for each window: fp64 on the device."""

    def __init__(self, torch, windows, device):
        self.nll, self.kl, self.same = (torch.zeros(windows, dtype=torch.float64, device=device) for _ in range(3))

    def add(self, rows, exact, got, targets):
        """exact, got: log-probabilities [len(rows), ..., vocabulary], targets: the tokens that came."""
        axes = tuple(range(1, targets.dim()))

        def total(x):
            return x.sum(axes, dtype=x.new_zeros(0).double().dtype) if axes else x.double()

        self.nll[rows] -= total(got.gather(-1, targets[..., None])[..., 0])
        self.kl[rows] += total((exact.exp() * (exact - got)).sum(-1))
        self.same[rows] += total((exact.argmax(-1) == got.argmax(-1)).float())

    def score(self, length):
        n = self.nll.numel() * (length - 1)
        return {
            "ppl": math.exp(self.nll.sum().item() / n),
            "kl": self.kl.sum().item() / n,
            "top1": self.same.sum().item() / n,
            "ppl_by_window": [math.exp(nll / (length - 1)) for nll in self.nll.tolist()],
        }


def log_probs(model, ids, cache=None):
    """fp32 [length - 1, vocabulary] of one window, in one pass."""
    logits = model(ids[None], past_key_values=cache, use_cache=cache is not None).logits[0, :-1]
    return logits.float().log_softmax(-1)


def in_one_pass(torch, model, ids, makers, report):
    """{label: (Sums, bytes of the cache)} on a CPU, window by window, so that memory holds two windows of logits."""
    sums = {label: Sums(torch, len(ids), "cpu") for label in ("exact", *makers)}
    nbytes = {}
    for number, window in enumerate(ids):
        model.set_attn_implementation("sdpa")
        exact, rows, targets = log_probs(model, window), slice(number, number + 1), window[None, 1:]
        sums["exact"].add(rows, exact[None], exact[None], targets)
        for label, make in makers.items():
            report(f"window {number + 1} of {len(ids)}: {label}")
            cache = make(strict=True)
            sums[label].add(rows, exact[None], log_probs(model, window, cache)[None], targets)
            nbytes[label] = cache.nbytes * len(ids)
    return {label: (sums[label], nbytes.get(label, 0)) for label in sums}


def token_by_token(torch, model, ids, makers, report):
    """The same on a CUDA device: all windows at once, steps of one token captured in a graph and replayed. Caches go on
    beside each other, each on a stream of its own: the kernels of so small a step leave most of a device idle."""
    from veloxquant.torch import CapturedStep

    device, (count, length) = ids.device, ids.shape
    model.set_attn_implementation("sdpa")
    exact = torch.stack([log_probs(model, window) for window in ids])
    sums = {label: Sums(torch, count, device) for label in ("exact", *makers)}
    sums["exact"].add(slice(None), exact, exact, ids[:, 1:])
    caches = {label: make(max_length=length) for label, make in makers.items()}
    streams = {label: torch.cuda.Stream(device) for label in makers}
    steps = {}
    torch.cuda.synchronize(device)
    for t in range(length - 1):
        tokens, targets = ids[:, t : t + 1], ids[:, t + 1]
        if t % 256 == 0:
            report(f"token {t} of {length}, {count} windows and {len(makers)} caches at once")
        for label, cache in caches.items():
            with torch.cuda.stream(streams[label]):
                if t == 0:
                    logits, steps[label] = model(tokens, past_key_values=cache).logits, CapturedStep(model, cache)
                else:
                    logits = steps[label](tokens)
                sums[label].add(slice(None), exact[:, t], logits[:, 0].float().log_softmax(-1), targets)
    torch.cuda.synchronize(device)
    return {label: (sums[label], caches[label].nbytes if label in caches else 0) for label in sums}


def evaluate(model, ids, tables, report=lambda what: None):
    """tables: {label: veloxquant.torch.Tables}. ids: int64 [windows, length]. {label: dictionary}, 'exact' first."""
    import torch

    from veloxquant.torch import VeloxQuantCache

    makers = {
        label: lambda one=one, **options: VeloxQuantCache(model, one, sinks=SINKS, window=WINDOW, **options)
        for label, one in tables.items()
    }
    run = in_one_pass if model.device.type == "cpu" else token_by_token
    with torch.no_grad():
        found = run(torch, model, ids.to(model.device), makers, report)
    scores = {}
    for label, (sums, nbytes) in found.items():
        scores[label] = sums.score(ids.shape[1])
        scores[label]["increase"] = scores[label]["ppl"] / scores["exact"]["ppl"] - 1
        scores[label]["bytes_per_token"] = nbytes / ids.numel()
        scores[label]["table_bytes"] = tables[label].nbytes if label in tables else 0
    return scores


def fitted(model, tokenizer, settings, calibration, tokens, kept, report):
    """{label: Tables}: read from the folder `kept` where they are, else fitted, all of them to one recording."""
    from veloxquant.torch import Tables
    from veloxquant.torch.calibration import fit, record
    from veloxquant.torch.codecs import codec_tables_for

    made, layers = {}, None
    for setting in settings:
        if setting.per == "turboquant":
            made[setting.label] = codec_tables_for(model.config, "turboquant", *setting.bits)
            continue
        file = kept and Path(kept) / setting.file
        if file and file.exists():
            made[setting.label] = Tables.load(file)
            continue
        if calibration is None:
            raise Error("[eval] calibration: got none, wanted a text to fit tables to")
        start = time.perf_counter()
        if layers is None:
            report("recording keys and values")
            layers = record(model, list(windows_of(tokenizer, calibration, tokens // 2048, 2048)), tokens)
        made[setting.label] = fit(model, layers, *setting.bits, setting.transform, setting.per, tokens)
        report(f"{setting.label}: fitted after {time.perf_counter() - start:.0f} s")
        if file:
            made[setting.label].save(file)
    return made


def compare(name, text, settings, calibration, windows=8, length=2048, tokens=24576, backend="cuda", dtype="float32",
            kept=None, report=lambda what: None):  # fmt: skip
    """{label: dictionary} of the model called `name`; 'exact' first."""
    if backend == "cuda":
        torch = bench.require_device("eval")
        torch.backends.cuda.matmul.allow_tf32 = False
    report("loading the model")
    model, tokenizer = load(name, backend, dtype)
    ids = windows_of(tokenizer, text, windows, length)
    tables = fitted(model, tokenizer, settings, calibration, tokens, kept, report)
    start = time.perf_counter()
    scores = evaluate(model, ids, tables, report)
    report(f"scored in {time.perf_counter() - start:.0f} s")
    return scores


def cells(label, score):
    return [
        label,
        f"{score['ppl']:.4f}",
        "" if label == "exact" else f"{100 * score['increase']:+.2f} %",
        "" if label == "exact" else f"{score['kl']:.4f}",
        "" if label == "exact" else f"{100 * score['top1']:.1f} %",
        f"{score['table_bytes'] / 1e6:.1f}",
        f"{score['bytes_per_token']:.0f}",
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m veloxquant.eval", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a folder, a hub name or a .gguf file")
    parser.add_argument("--text", required=True, help="to score")
    parser.add_argument("--calibration", help="to fit tables to")
    parser.add_argument("--compare", default=COMPARED, help="bits and what shares a table: " + COMPARED)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=24576, help="of calibration")
    parser.add_argument("--backend", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of the model")
    parser.add_argument("--tables", metavar="DIR", help="tables are read from here where they are there, else written")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        scores = compare(
            given.model, given.text, settings_of(given.compare), given.calibration, given.windows, given.length,
            given.tokens, given.backend, given.dtype, given.tables,
            lambda what: print(what, file=sys.stderr, flush=True),
        )  # fmt: skip
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps({"command": "eval", "backend": given.backend, "windows": given.windows, "results": scores}))
        return 0
    how = f"window {WINDOW}, sinks {SINKS}, {given.dtype}, {given.backend}"
    print(f"{given.windows} windows of {given.length} tokens, {how}")
    bench.print_table([COLUMNS, *(cells(label, score) for label, score in scores.items())])
    return 0


if __name__ == "__main__":
    sys.exit(main())
