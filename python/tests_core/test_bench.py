"""veloxquant.bench: what it says without a device, and its arithmetic on the CPU."""

import importlib.util
import json
import subprocess
import sys

import numpy
import pytest

from veloxquant import Error, _core, bench


def test_rows_are_chosen_by_name():
    assert [row.name for row in bench.chosen("32x4k, 1x131k")] == ["32x4k", "1x131k"]
    with pytest.raises(Error, match="wanted some of 1x131k"):
        bench.chosen("1x131k,2x7")
    with pytest.raises(Error, match="bits: got '3'"):
        bench.several("bits", "2,3", ("2", "4"))


def test_without_a_device_it_says_what_is_missing():
    torch = pytest.importorskip("torch")
    if _core.cuda_built() and torch.cuda.is_available():
        pytest.skip("there is a device here")
    done = subprocess.run(
        [sys.executable, "-m", "veloxquant.bench", "attention", "--rows", "1x4k"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "[bench attention] backend: got" in done.stderr and "wanted" in done.stderr


def test_quality_is_of_the_very_setting(tmp_path, monkeypatch):
    settings = {
        "vecinfer 2 bits": {"perplexity_increase": 0.02, "kl": 0.023},
        "vecinfer 2 bits, a table a head, int8 tables": {"perplexity_increase": 0.03, "kl": 0.04},
        "vecinfer 2 bits, tables by lane, int8 tables": {"perplexity_increase": 0.021, "kl": 0.02},
        "vecinfer 4 bits": {"perplexity_increase": 0.002, "kl": 0.0016},
    }
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "quality.json").write_text(json.dumps({"settings": settings}))
    spec = importlib.util.spec_from_loader("veloxquant_mlx", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert bench.quality_of(2, "head") == (0.03, 0.04)
    assert bench.quality_of(2, "lane") == (0.021, 0.02)
    assert bench.quality_of(4, "subvector") == (0.002, 0.0016)
    # 2-bit tables are int8 here, which "vecinfer 2 bits" is not; and nobody measured 4 bits by head.
    assert bench.quality_of(2, "subvector") == bench.quality_of(4, "head") == (None, None)


def test_the_reference_joins_packed_and_exact_tokens():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, 16, dtype=torch.float64, generator=generator) for n in (4, 90, 90))
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator))[0]
    parts = [(q @ turn, k[:70] @ turn, v[:70] @ turn, turn.T), (q, k[70:], v[70:], None)]
    wanted = torch.softmax(0.3 * q @ k.T, dim=1) @ v
    assert torch.allclose(bench.attend_fp64(torch, parts, q, 0.3), wanted, atol=1e-12)


def test_a_changed_output_is_not_timed():
    torch = pytest.importorskip("torch")
    reference = torch.ones(2, 8, dtype=torch.float64)
    outs = [torch.ones(2, 8), torch.ones(2, 8) * 1.0005]

    def verified(kind, outs):
        left = list(outs)
        return bench.verified(torch, "row", kind, lambda i: left.pop(0), reference, lambda: 7.0)

    assert verified("fp16", outs) == (7.0, pytest.approx(5e-4, rel=1e-2))
    with pytest.raises(Error, match="the same bits"):
        verified("ours", outs)
    with pytest.raises(Error, match="wanted at most"):
        verified("ours", [torch.ones(2, 8), torch.ones(2, 8) * 1.01])
    with pytest.raises(Error, match="wanted at most"):
        verified("fp16", [torch.full((2, 8), float("nan"))])


def test_what_is_timed_by_lane_is_looked_up_so():
    pytest.importorskip("torch")
    row = bench.Row("small", 1, 256, 4, 2, 128)
    for bits in (2, 4):
        for per, by_lane in (("lane", True), ("head", True), ("subvector", False)):
            for side in ("keys", "values"):
                made = bench.random_side(side, bits, per, row, numpy.random.default_rng(1))
                assert made.core.cuda_problem == "" and made.core.by_lane == by_lane
