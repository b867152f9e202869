"""The installed package is the one that pyproject.toml and CMakeLists.txt describe."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_version_is_the_one_of_cmake():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert version("veloxquant-mlx") == re.search(r"project\(VeloxQuant VERSION ([0-9.]+)", text)[1]


def test_mlx_is_pinned_alike_for_build_and_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = {r for r in project["build-system"]["requires"] if r.startswith("mlx")}
    assert pins == {r for r in project["project"]["dependencies"] if re.match(r"mlx[\[=]", r)}
    assert any(r.startswith("mlx") and f"=={version('mlx')}" in r for r in requires("veloxquant-mlx"))


def test_the_extension_knows_mlx_arrays():
    import mlx.core  # noqa: F401  (loads libmlx, whose types the extension shares)

    from veloxquant_mlx import _ext

    # A module outside nanobind's `mlx` domain imports well and writes C++ type names here.
    signatures = " ".join(str(getattr(_ext, name).__doc__) for name in dir(_ext))
    assert "mlx.core.array" in signatures and "mlx::core" not in signatures


def test_an_extension_of_other_sources_is_told_apart(monkeypatch):
    from veloxquant_mlx import _ext, _runtime

    assert _runtime.bindings_digest() == _ext.bindings
    monkeypatch.setattr(_runtime, "bindings_digest", lambda: "of a later commit")
    with pytest.raises(ImportError, match="run `make setup`"):
        _runtime.prepare()


def test_command_line_starts():
    (command,) = entry_points(group="console_scripts", name="veloxquant")
    assert command.value == "veloxquant_mlx.cli:main"
    result = subprocess.run([Path(sys.executable).parent / "veloxquant", "--help"], capture_output=True)
    assert result.returncode == 0, result.stderr
