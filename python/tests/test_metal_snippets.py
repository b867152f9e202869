"""The snippets of the kernels' description that concern scalar quantisation and bit packing, as written."""

import os
from pathlib import Path

import mlx.core as mx
import pytest

# Beside the checkout here and in CI only.
SEED = (
    Path(os.environ.get("VELOXQUANT_SEEDS") or Path(__file__).resolve().parents[3] / "shared" / "seeds")
    / "metal-kernels.txt"
)


@pytest.fixture
def text():
    if not SEED.exists():
        pytest.skip("the system's description is not on this machine")
    return SEED.read_text()


def run(text, start, end):
    begin = text.index(start)
    code = text[begin : text.index(end, begin)]
    names = {}
    # A literal ... inside an array stands for more numbers.
    exec(compile(code.replace(", ...]", ", 0, 1, 1]"), start, "exec"), names)
    return names


def test_scalar_quantize(text):
    names = run(text, "import mlx.core as mx\n# This triggers", "Compiled kernels are cached")
    first, second = names["quantized"], names["quantized2"]
    assert mx.array_equal(first.packed, second.packed)
    assert first.shape == (1, 8, 512, 128)
    assert first.nbytes == 8 * 512 * (128 // 8 + 2)  # 1 bit an element and an fp16 scalar a row
    assert names["turboquant_scalar_quantize"].__module__ == "veloxquant_mlx.metal._scalar_quant"


def test_metal_available(text, capsys):
    # The page has lost its indentation.
    code = text[
        text.index("from veloxquant_mlx.metal import metal_available") : text.index("When Metal is unavailable")
    ]
    exec(compile(code.replace("\nprint", "\n    print"), "metal_available", "exec"), {})
    wanted = "Metal kernels active" if mx.metal.is_available() else "Falling back to MLX Python ops"
    assert wanted in capsys.readouterr().out


def test_bit_packing(text):
    names = run(text, "from veloxquant_mlx.metal._bit_packing", "Debugging kernel issues")
    indices, packed = names["indices"], names["packed"]
    assert packed.dtype == mx.uint32 and packed.shape == (1, 1)
    assert mx.array_equal(names["recovered"], indices)
    many = mx.zeros((1, 4096), mx.int32)
    assert names["turboquant_bit_pack"](many, bits=1).nbytes * 32 == many.nbytes
