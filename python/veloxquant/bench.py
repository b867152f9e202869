"""Decode attention on packed codes beside the fp16 attention of PyTorch, on the CUDA device.

    python -m veloxquant.bench attention [--rows 1x131k,32x4k] [--bits 2,4] [--per lane,subvector] [--json]

One query token a sequence. Ours: random int8-rounded tables, random codes, dense rotations of query and output and 100
exact tokens a sequence. Baselines: cuDNN and flash (enable_gqa), fp16. Times are medians of replays of a CUDA graph of 8
or more calls over rotating buffers of more than 300 MB, so that nothing stays in a cache; every output is compared with
fp64 before the timing and after it, and ours must be the same bits both times.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from veloxquant import Error, _core

EXACT, SINKS, WINDOW = 100, 4, 64  # exact tokens of a sequence; its storage
ROTATED_BYTES = 300 << 20
ALLOWED = {"ours": 2e-3, "fp16": 4e-3}  # relative error to fp64; fp16 outputs alone are good to 3e-4


class Row(NamedTuple):
    name: str
    batch: int
    context: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int


ROWS = [
    Row("1x131k", 1, 131072, 32, 8, 128),
    Row("1x196k", 1, 196608, 32, 8, 128),
    Row("32x4k", 32, 4096, 32, 8, 128),
    Row("8x32k", 8, 32768, 32, 8, 128),
    Row("32x16k", 32, 16384, 32, 8, 128),
    Row("mha16x4k", 16, 4096, 32, 32, 128),
    Row("1x32k", 1, 32768, 32, 8, 128),
    Row("1x4k", 1, 4096, 32, 8, 128),
    Row("d64 8x8k", 8, 8192, 9, 3, 64),
    Row("g8 1x131k", 1, 131072, 64, 8, 128),
]


def require_device(command="bench attention"):
    """torch, or an Error that says what is missing."""
    if importlib.util.find_spec("torch") is None:
        raise Error(f"[{command}] backend: got cuda without PyTorch, wanted `pip install 'python/core[torch]'`")
    import torch

    if not _core.cuda_built():
        raise Error(f"[{command}] backend: got a build of veloxquant without CUDA kernels, wanted one made with nvcc")
    if not torch.cuda.is_available():
        raise Error(f"[{command}] backend: got cuda on a machine without a CUDA device, wanted one")
    return torch


def quality_of(bits, per):
    """(perplexity over fp16's - 1, KL) of the setting that a row times; (None, None) where nobody measured it."""
    found = importlib.util.find_spec("veloxquant_mlx")
    file = Path(found.origin).parent / "benchmarks" / "quality.json" if found and found.origin else None
    if file is None or not file.exists():
        return None, None
    how = {"head": ", a table a head", "lane": ", tables by lane", "subvector": ""}[per]
    name = f"vecinfer {bits} bits{how}" + (", int8 tables" if bits == 2 else "")
    entry = json.loads(file.read_text(encoding="utf-8"))["settings"].get(name, {})
    return entry.get("perplexity_increase"), entry.get("kl")


def median_us(torch, call, copies):
    """One call over rotating buffers, captured in a graph."""
    calls = -(-8 // copies) * copies
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    times = []
    for i in range(24):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 4:
            times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times)


def verified(torch, what, kind, call, reference, timed):
    """us and error of `call`, near `reference` before the timing and after it; ours must also be the same bits."""

    def checked():
        out = call(0).clone()
        error = ((out.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()
        if not error <= ALLOWED[kind]:
            raise Error(f"[bench attention] {what}: got an error of {error:.1e}, wanted at most {ALLOWED[kind]:.0e}")
        return out, error

    before, error = checked()
    us = timed()
    after, error_after = checked()
    if kind == "ours" and not torch.equal(after, before):
        raise Error(f"[bench attention] {what}: got another output after the timing, wanted the same bits")
    return us, max(error, error_after)


def attend_fp64(torch, parts, q, scale):
    """softmax(scale q K^T) V, head by head. parts: of one KV head, [(moved queries [G, D], K, V, V's way back)]."""
    scores = torch.cat([moved @ k.double().T for moved, k, _, _ in parts], dim=1) * scale
    weights = torch.softmax(scores, dim=1)
    out, at = torch.zeros_like(q, dtype=torch.float64), 0
    for _, k, v, back in parts:
        mine = weights[:, at : at + len(k)] @ v.double()
        out += mine if back is None else mine @ back
        at += len(k)
    return out


def exact_row(torch, row, scale, seed):
    """cuDNN and flash on fp16 keys and values: {name: (us, error)}."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (2, row.batch, row.n_kv_heads, row.context, row.head_dim)
    nbytes = 4 * row.batch * row.n_kv_heads * row.context * row.head_dim
    copies = max(2, ROTATED_BYTES // nbytes + 1)
    kv = [torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator) for _ in range(copies)]
    q = torch.randn(row.batch, row.n_q_heads, 1, row.head_dim, device="cuda", dtype=torch.float16, generator=generator)
    reference = torch.empty(q.shape, device="cuda", dtype=torch.float64)
    group = row.n_q_heads // row.n_kv_heads
    for b in range(row.batch):
        for h in range(row.n_kv_heads):
            heads = slice(h * group, (h + 1) * group)
            mine = q[b, heads, 0].double()
            part = (mine, kv[0][0, b, h], kv[0][1, b, h], None)
            reference[b, heads, 0] = attend_fp64(torch, [part], mine, scale)

    def call(i):
        return torch.nn.functional.scaled_dot_product_attention(
            q, kv[i][0], kv[i][1], scale=scale, enable_gqa=group > 1
        )

    found = {}
    for name, backend in (("cuDNN fp16", SDPBackend.CUDNN_ATTENTION), ("flash fp16", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            timed = lambda: median_us(torch, call, copies)  # noqa: E731
            found[name] = verified(torch, f"{row.name} {name}", "fp16", call, reference, timed)
    return found, nbytes


def random_side(side, bits, per, row, rng):
    import numpy

    from veloxquant.torch.tables import SideArrays

    sub_dim = 8 // bits
    n_subvectors = row.head_dim // sub_dim
    n_tables = {"head": 1, "lane": min(_core.LANE_TABLES[side], n_subvectors), "subvector": n_subvectors}[per]
    shape = (row.n_kv_heads, n_tables, 256, sub_dim)
    entries = rng.integers(-127, 128, shape) / 64 if bits == 2 else rng.standard_normal(shape)
    if per == "lane":
        entries = numpy.take(entries, numpy.arange(n_subvectors) % n_tables, axis=1)
    matrix = numpy.linalg.qr(rng.standard_normal((row.n_kv_heads, row.head_dim, row.head_dim)))[0].astype("float32")
    return SideArrays(side, "dense", entries.astype("float16"), encode_matrix=matrix, query_matrix=matrix)


def packed_row(torch, row, bits, per, scale, seed):
    """Ours: (us, error), bytes of codes."""
    import numpy

    rng = numpy.random.default_rng(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    sides = [random_side(side, bits, per, row, rng) for side in ("keys", "values")]
    packed, blocks = row.context - EXACT, -(-(row.context - EXACT) // 64)
    side_bytes = row.batch * row.n_kv_heads * blocks * sides[0].core.cuda_block_bytes
    copies = max(2, ROTATED_BYTES // (2 * side_bytes) + 1)
    shape = (row.batch, row.n_kv_heads, blocks, sides[0].core.cuda_block_bytes)
    counts = torch.tensor([[packed] * row.batch, [EXACT] * row.batch] * 2, dtype=torch.int32, device="cuda")
    exact = [
        torch.randn(
            row.batch, row.n_kv_heads, SINKS + WINDOW + 64, row.head_dim, device="cuda", dtype=torch.float16,
            generator=generator,
        )
        for _ in range(2)
    ]  # fmt: skip
    layers, codes = [], []
    for _ in range(copies):
        pair = [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator) for _ in range(2)]
        blobs = [side.blob(torch.device("cuda")) for side in sides]
        layers.append(_core.CudaLayer(*(side.core for side in sides), *blobs, row.n_q_heads, SINKS, WINDOW))
        layers[-1].bind(*pair, *exact, counts)
        codes.append(pair)
    q = torch.randn(row.batch, row.n_q_heads, row.head_dim, device="cuda", dtype=torch.float16, generator=generator)
    out = torch.empty_like(q)
    space = torch.empty(layers[0].workspace_bytes(), dtype=torch.uint8, device="cuda")

    def call(i):
        stream = torch.cuda.current_stream().cuda_stream
        layers[i].attend(q.data_ptr(), out.data_ptr(), 0, 1, scale, space.data_ptr(), space.numel(), stream)
        return out

    reference = torch.empty(q.shape, device="cuda", dtype=torch.float64)
    group = row.n_q_heads // row.n_kv_heads
    stream = torch.cuda.current_stream().cuda_stream
    moves = [sides[0].query_matrix(torch.device("cuda")), sides[1].inverse_matrix(torch.device("cuda"))]
    for b in range(row.batch):
        tiles = []
        for side, of_side in zip(sides, codes[0]):
            tiles.append(torch.empty(1, row.n_kv_heads, 64 * blocks, row.head_dim, dtype=torch.float16, device="cuda"))
            blob = side.blob(torch.device("cuda"))
            _core.cuda_decode(side.core, blob, of_side[b : b + 1], 0, tiles[-1], stream)
        for h in range(row.n_kv_heads):
            heads = slice(h * group, (h + 1) * group)
            mine = q[b, heads].double()
            parts = [
                (mine @ moves[0][h].double(), *(tile[0, h, :packed] for tile in tiles), moves[1][h].double()),
                (mine, *(tokens[b, h, :EXACT] for tokens in exact), None),
            ]
            reference[b, heads] = attend_fp64(torch, parts, mine, scale)
    timed = lambda: median_us(torch, call, copies)  # noqa: E731
    return verified(torch, f"{row.name}, {bits} bits, {per}", "ours", call, reference, timed), 2 * side_bytes


def rows(wanted=ROWS, bits=(2, 4), per=("lane", "subvector"), report=lambda what: None):
    """A dictionary a row and method, the baselines first."""
    torch = require_device()
    results = []
    for row in wanted:
        scale = row.head_dim**-0.5
        report(f"{row.name} fp16")
        baselines, nbytes = exact_row(torch, row, scale, 1)
        torch.cuda.empty_cache()
        common = {**row._asdict(), "device": torch.cuda.get_device_name(), "torch": torch.__version__}
        common["cudnn"] = torch.backends.cudnn.version()
        fastest = baselines["cuDNN fp16"][0]

        def add(method, us, error, code_bytes, all_bytes, quality):
            results.append(
                {
                    **common,
                    "method": method,
                    "us": us,
                    "error": error,
                    "codes_gbps": code_bytes / us / 1e3 if code_bytes else None,
                    "gbps": all_bytes / us / 1e3,
                    "speedup": fastest / us,
                    "perplexity_increase": quality[0],
                    "kl": quality[1],
                }
            )

        for name, (us, error) in baselines.items():
            add(name, us, error, 0, nbytes, (0, 0))
        for width in bits:
            for granularity in per:
                method = f"{width} bits, " + {"lane": "tables by lane"}.get(granularity, f"a table a {granularity}")
                report(f"{row.name} {method}")
                (us, error), code_bytes = packed_row(torch, row, width, granularity, scale, 2)
                exact_bytes = 4 * row.batch * row.n_kv_heads * EXACT * row.head_dim
                add(method, us, error, code_bytes, code_bytes + exact_bytes, quality_of(width, granularity))
                torch.cuda.empty_cache()
    return results


COLUMNS = ("work", "method", "us", "codes GB/s", "all GB/s", "times cuDNN", "error", "perplexity, KL")


def cells(result):
    quality = "not measured"
    if result["perplexity_increase"] is not None:
        quality = f"{100 * result['perplexity_increase']:+.2f} %, {result['kl']:.4f}"
    if result["method"].endswith("fp16"):
        quality = "reference"
    return [
        result["name"],
        result["method"],
        f"{result['us']:.1f}",
        "" if result["codes_gbps"] is None else f"{result['codes_gbps']:,.0f}",
        f"{result['gbps']:,.0f}",
        f"{result['speedup']:.2f} x",
        f"{result['error']:.0e}",
        quality,
    ]


def print_table(lines):
    """Lines of as many texts each, the first of them headings."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def chosen(text):
    """Rows by name, comma-separated; Error for a name that is none."""
    by_name = {row.name: row for row in ROWS}
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise Error(f"[bench attention] rows: got {unknown[0]!r}, wanted some of {', '.join(by_name)}")
    return [by_name[name] for name in names]


def several(name, text, allowed):
    values = [value.strip() for value in text.split(",")]
    for value in values:
        if value not in allowed:
            raise Error(f"[bench attention] {name}: got {value!r}, wanted some of {', '.join(allowed)}")
    return values


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m veloxquant.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["attention"])
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS))
    parser.add_argument("--bits", default="2,4")
    parser.add_argument(
        "--per", default="lane,subvector", help="tables: by lane or one a head (as fast), or one a sub-vector"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        wanted = chosen(given.rows)
        bits = [int(value) for value in several("bits", given.bits, ("2", "4"))]
        per = several("per", given.per, ("lane", "head", "subvector"))
        results = rows(wanted, bits, per, lambda what: print(what, file=sys.stderr, flush=True))
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps({"command": "bench attention", "backend": "cuda", "rows": results}))
        return 0
    first = results[0]
    print(f"{first['device']}, torch {first['torch']}, cuDNN {first['cudnn']}; one query token, {EXACT} exact tokens")
    print_table([COLUMNS, *(cells(result) for result in results)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
