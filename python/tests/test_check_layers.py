"""tools/check_layers.py finds what it is for, and passes this repository."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(root):
    command = [sys.executable, ROOT / "tools" / "check_layers.py", root]
    return subprocess.run(command, capture_output=True, text=True)


def test_this_repository_passes():
    result = run(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "path, line, message",
    [
        ("src/math/a.h", '#include "src/backends/b.h"', "src/math includes only"),
        ("src/math/a.h", "#include <hwy/highway.h>", "src/math includes only"),
        ("src/codecs/x/cpu.cpp", '#include "src/attention/problem.h"', "src/codecs is below src/attention"),
        ("src/codecs/x/cpu.cpp", '#include "mlx/array.h"', "no MLX, Python or torch"),
        ("src/cache/a.cpp", "#include <Python.h>", "no MLX, Python or torch"),
        ("include/veloxquant/a.h", "#include <tbb/tbb.h>", "public headers include only"),
        ("src/artifacts/a.cpp", "  std::abort();", "throws veloxquant::Error"),
        ("src/other/a.cpp", "#include <vector>", "no known layer"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, path, line, message):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    result = run(tmp_path)
    assert result.returncode == 1
    assert f"{path}:1: " in result.stdout and message in result.stdout


@pytest.mark.parametrize(
    "path, line",
    [
        ("src/math/a.h", "#include <stdint.h>"),
        ("src/attention/a.cpp", '#include "src/codecs/x/format.h"'),
        ("src/mlx/ops.h", '#include "mlx/array.h"'),
        ("src/codecs/x/x_test.cpp", "  std::abort();"),
    ],
)
def test_what_is_allowed_passes(tmp_path, path, line):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert run(tmp_path).returncode == 0


def test_a_long_file_is_a_warning_only(tmp_path):
    file = tmp_path / "src" / "cache" / "a.cpp"
    file.parent.mkdir(parents=True)
    file.write_text("\n" * 601)
    result = run(tmp_path)
    assert result.returncode == 0 and "601 lines" in result.stdout
