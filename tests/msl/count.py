#!/usr/bin/env python3
"""LLVM IR of a kernel -> the same with a counter in every basic block.

count.py IN.ll OUT.ll      adds vq_counts [blocks], vq_weights [blocks][3] and vq_blocks to the text

A block's weights are what it executes: floating-point and integer operations (conversions, comparisons and selections
included, address arithmetic and moves not), loads and stores. Barriers and simdgroup operations count as nothing.
"""

import re
import sys

FLOAT = r"fadd|fsub|fmul|fdiv|fneg|fcmp|fpext|fptrunc|sitofp|uitofp|fptosi|fptoui"
INTEGER = r"add|sub|mul|udiv|sdiv|urem|srem|and|or|xor|shl|lshr|ashr|icmp|select|trunc"
FLOAT_CALLS = r"@llvm\.(?:fma|fmuladd|sqrt|exp2|fabs|minnum|maxnum|floor|rint)\.|@(?:exp2f|tanhf|log2f|sqrtf|fmaf)\("
INTEGER_CALLS = r"@llvm\.(?:ctpop|ctlz|cttz|umin|umax|smin|smax|abs|fshl|fshr|bswap)\."
PATTERNS = [
    re.compile(rf"= (?:tail )?(?:{FLOAT})\b|{FLOAT_CALLS}"),
    re.compile(rf"= (?:tail )?(?:{INTEGER})\b|{INTEGER_CALLS}"),
    re.compile(r"= load |^  store "),
]


def counted(text):
    lines, out, weights = text.split("\n"), [], []
    pending = False  # a block has begun, its counter is not written yet
    library = False  # a function of the emulated simdgroup operations
    for line in lines:
        begins = line.startswith("define ") or re.match(r"^[\w.\"$-]+:", line)
        inside = line.startswith("  ")
        if pending and inside and " = phi " not in line:
            k = len(weights) - 1
            at = f"getelementptr inbounds ([BLOCKS x i64], ptr @vq_counts, i64 0, i64 {k})"
            out += [
                f"  %vq.c{k} = load i64, ptr {at}",
                f"  %vq.d{k} = add i64 %vq.c{k}, 1",
                f"  store i64 %vq.d{k}, ptr {at}",
            ]
            pending = False
        if line.startswith("define "):
            library = "@_ZN5metal" in line
        if begins and not library:
            weights.append([0, 0, 0])
            pending = True
        elif inside and weights and not library:
            for kind, pattern in enumerate(PATTERNS):
                if pattern.search(line):
                    weights[-1][kind] += 1
                    break
        out.append(line)
    n = max(1, len(weights))
    rows = ", ".join(f"[3 x i32] [{', '.join(f'i32 {w}' for w in row)}]" for row in weights or [[0, 0, 0]])
    out += [
        f"@vq_counts = dso_local global [{n} x i64] zeroinitializer",
        f"@vq_weights = dso_local constant [{n} x [3 x i32]] [{rows}]",
        f"@vq_blocks = dso_local constant i32 {n}",
        "",
    ]
    return "\n".join(out).replace("[BLOCKS x i64]", f"[{n} x i64]")


if __name__ == "__main__":
    with open(sys.argv[1]) as source, open(sys.argv[2], "w") as target:
        target.write(counted(source.read()))
