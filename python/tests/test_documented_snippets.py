"""Every Python snippet of the README and of the system's description runs as written, on a tiny model."""

import os
import re
from pathlib import Path

import mlx_lm
import pytest
import tiny_model

ROOT = Path(__file__).resolve().parents[2]
# Beside the checkout here and in CI only.
SEED = Path(os.environ.get("VELOXQUANT_SEEDS") or ROOT.parent / "shared" / "seeds") / "vecinfer.txt"

# The seed is a page of text: each snippet starts and ends at these lines.
SEED_SNIPPETS = [
    ("import mlx_lm", "Inference"),
    ("from veloxquant_mlx.cache.base import", "Fused SDPA"),
    ("from veloxquant_mlx.metal.fused_sdpa import", "tip"),
    ('KVCacheConfig(\nmethod="vecinfer",\nbits=2, #', "ParameterType"),
]


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Runs code in a scratch directory; any model name loads the tiny model."""
    monkeypatch.chdir(tmp_path)
    directory = tiny_model.save(tmp_path / "model")
    load = mlx_lm.load
    monkeypatch.setattr(mlx_lm, "load", lambda name: load(str(directory)))
    return {"prompt": "Which came first, the derivative or the integral?"}


def short(code):
    """As written, but for the lengths: the tiny model never stops by itself."""
    return re.sub(r"max_tokens=\d+", "max_tokens=8", code)


def test_seed_snippets(loaded):
    if not SEED.exists():
        pytest.skip("the system's description is not on this machine")
    text = SEED.read_text()
    for start, end in SEED_SNIPPETS:
        begin = text.index(start)
        exec(compile(short(text[begin : text.index(end, begin)]), start, "exec"), loaded)
    assert loaded["response"]
    assert loaded["cache"][0].offset > 0
    assert loaded["codebook"].bits_per_element == (1.0, 1.0)  # 8 sub-vectors of 8 dimensions, 8-bit codes


def test_readme_snippets(loaded):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(short(snippet), "README.md", "exec"), loaded)
