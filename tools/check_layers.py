#!/usr/bin/env python3
"""Checks the rules of ARCHITECTURE.md that a compiler does not: who includes whom, and how.

    tools/check_layers.py [ROOT]      exit status 1 where a rule is broken

A layer includes only what is below it. The core knows nothing of MLX, Python or torch, and never
ends the process or writes to stderr. Files above 600 lines get a warning.
"""

import re
import sys
from pathlib import Path

# Folder of src/ -> the folders of src/ that it may include.
BELOW = {
    "math": {"math"},
    "backends": {"math", "backends"},
    "codecs": {"math", "backends", "codecs"},
    "attention": {"math", "backends", "codecs", "attention"},
    "calibration": {"math", "backends", "codecs", "calibration"},
    "cache": {"math", "backends", "codecs", "attention", "cache"},
    "artifacts": {"math", "backends", "artifacts"},
}
STANDARD = re.compile(r"<[a-z_0-9]+(\.h)?>")
FRAMEWORK = re.compile(r'[<"](mlx|nanobind|torch|ATen|c10|pybind11)/|[<"]Python\.h[>"]')
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"][^>"]+[>"])')
FORBIDDEN = re.compile(r"\b(std::)?(abort|exit|quick_exit)\s*\(|\bstd::cerr\b|\bstderr\b")
LOGS = "src/backends/backend.cpp"  # log_once: the only place that may write to stderr
LONG_FILE = 600


def include_problem(where, target):
    """Why a file in `where` (its path below ROOT) must not include `target`, or None."""
    top, layer = where.parts[0], where.parts[1]
    if top == "src" and layer not in BELOW:
        return None if layer == "mlx" else f"src/{layer} is no known layer"
    if FRAMEWORK.match(target):
        return "the core includes no MLX, Python or torch header"
    inner = target.strip('<>"')
    is_test = where.name.endswith("_test.cpp")
    if top == "include" and not (STANDARD.match(target) or inner.startswith("veloxquant/")):
        return "public headers include only the standard library and each other"
    if layer == "math" and not is_test:
        if not (STANDARD.match(target) or inner.startswith("src/math/")):
            return "src/math includes only src/math and the standard library"
    if top == "src" and inner.startswith("src/") and not is_test:
        other = inner.split("/")[1]
        if other not in BELOW[layer]:
            return f"src/{layer} is below src/{other}"
    return None


def check(root):
    problems, warnings = [], []
    files = [
        p
        for top in ("include", "src", "python", "tools", "tests", "examples")
        for p in sorted((root / top).rglob("*"))
        if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".py", ".sh"}
    ]
    for path in files:
        where = path.relative_to(root)
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > LONG_FILE:
            warnings.append(f"{where}: {len(lines)} lines, more than {LONG_FILE}: can it be split?")
        if where.parts[0] not in {"include", "src"} or path.suffix == ".py":
            continue
        may_stop = where.name.endswith("_test.cpp") or str(where) == LOGS
        for number, line in enumerate(lines, 1):
            problem = None
            if match := INCLUDE.match(line):
                problem = include_problem(where, match[1])
            elif not may_stop and (match := FORBIDDEN.search(line.split("//")[0])):
                problem = f"{match[0].strip()}: the library throws veloxquant::Error instead"
            if problem:
                problems.append(f"{where}:{number}: {problem}\n    {line.strip()}")
    return len(files), problems, warnings


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    n_files, problems, warnings = check(root)
    for line in problems + [f"warning: {w}" for w in warnings]:
        print(line)
    print(f"check_layers: {n_files} files, {len(problems)} problems, {len(warnings)} warnings")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
