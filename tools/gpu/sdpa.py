"""The denominator: torch's fp16 attention, cuDNN and flash, timed as cuda_bench and general_bench time ours.

sdpa.py [WORD...]: rows whose name has one of the words. Without words those of one query."""

import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS = [
    ("1x131k", 1, 131072, 32, 8, 128),
    ("1x196k", 1, 196608, 32, 8, 128),
    ("32x4k", 32, 4096, 32, 8, 128),
    ("8x32k", 8, 32768, 32, 8, 128),
    ("32x16k", 32, 16384, 32, 8, 128),
    ("mha16x4k", 16, 4096, 32, 32, 128),
    ("1x32k", 1, 32768, 32, 8, 128),
    ("1x4k", 1, 4096, 32, 8, 128),
    ("d64 8x8k", 8, 8192, 9, 3, 64),
    ("g8 1x131k", 1, 131072, 64, 8, 128),
    *[(f"1x32k q{n}", 1, 32768, 32, 8, 128, n) for n in (8, 64, 512, 2048)],  # every query sees every token
]


def time_us(backend, batch, context, n_q, n_kv, dim, queries=1):
    nbytes = 4 * batch * context * n_kv * dim
    copies = max(2, (300 << 20) // nbytes + 1)
    q = torch.randn(batch, n_q, queries, dim, device="cuda", dtype=torch.float16)
    kv = [torch.randn(2, batch, n_kv, context, dim, device="cuda", dtype=torch.float16) for _ in range(copies)]

    def call(i):
        return F.scaled_dot_product_attention(q, kv[i][0], kv[i][1], enable_gqa=n_q != n_kv)

    calls = -(-8 // copies) * copies
    with sdpa_kernel(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(copies):
                call(i)
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
    return statistics.median(times), nbytes


def main():
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(f"{'work':12} {'cuDNN us':>10} {'flash us':>10} {'cuDNN TB/s':>10}")
    for row in ROWS:
        if not any(word in row[0] for word in sys.argv[1:]) and (len(sys.argv) > 1 or len(row) > 6):
            continue
        times = []
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            try:
                us, nbytes = time_us(backend, *row[1:])
            except RuntimeError as error:
                print(f"  {row[0]} {backend}: {str(error).splitlines()[0]}")
                us = float("nan")
            times.append(us)
            torch.cuda.empty_cache()
        print(f"{row[0]:12} {times[0]:10.1f} {times[1]:10.1f} {nbytes / times[0] / 1e6:10.2f}", flush=True)


if __name__ == "__main__":
    main()
