"""llama.cpp's CPU attention as a baseline: ggml from the sdist of llama-cpp-python, built on first use and kept.

`build()` downloads the sdist with pip and compiles ggml's CPU part with llama/attention.cpp for this machine,
into veloxquant's folder of caches; nothing of it is needed elsewhere.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.models.paths import cache_root

VERSION = "0.3.36"
TYPES = ("f16", "q8_0", "q4_0")
_SOURCES = Path(__file__).with_name("llama")
_FLOATS = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")


def built():
    """The library's file. It is the machine's own: other sources or another SIMD level need another."""
    digest = hashlib.sha256(_ext.simd_level().encode())
    for source in ("CMakeLists.txt", "attention.cpp"):
        digest.update((_SOURCES / source).read_bytes())
    return _folder() / f"veloxquant_llama-{digest.hexdigest()[:12]}.so"


def build(report=lambda what: None):
    """Downloads and compiles where built() is missing: some 80 MB, and two minutes of two cores."""
    if built().exists():
        return
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not (ggml := folder / "ggml").exists():
        report(f"downloading llama-cpp-python {VERSION}")
        _extract_ggml(_sdist(folder), ggml)
    report("compiling ggml")
    work = folder / "build"
    configure = ["cmake", "-S", _SOURCES, "-B", work, "-DCMAKE_BUILD_TYPE=Release", f"-DGGML_SOURCE={ggml}"]
    _run(folder, *configure)
    _run(folder, "cmake", "--build", work, "--target", "veloxquant_llama", "--parallel", str(os.cpu_count()))
    os.replace(work / "libveloxquant_llama.so", built())


@cache
def library():
    """The functions of llama/attention.cpp; FileNotFoundError before build()."""
    if not built().exists():
        raise FileNotFoundError(f"llama.cpp: {built()} is missing, wanted the result of llama.build()")
    functions = ctypes.CDLL(str(built()))
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("new", pointer, [ctypes.c_char_p, i64, i64, i64, i64, _FLOATS, _FLOATS, ctypes.c_float, ctypes.c_int]),
        ("attend", ctypes.c_int, [pointer, _FLOATS, _FLOATS]),
        ("rest", None, [pointer]),
        ("held", None, [pointer, _FLOATS, _FLOATS]),
        ("bytes", i64, [pointer]),
        ("free", None, [pointer]),
        ("simd", ctypes.c_char_p, []),
    ):
        function = getattr(functions, f"vq_llama_{name}")
        function.restype, function.argtypes = result, arguments
    return functions


class Attention:
    """A cache of one of TYPES, and ggml's attention on it. Arrays: fp32 [heads, tokens, head_dim]."""

    def __init__(self, kind, q, keys, values, scale, threads):
        if kind not in TYPES:
            raise ValueError(f"llama.cpp: got a cache of {kind!r}, wanted one of {', '.join(TYPES)}")
        self._shape, heads = keys.shape, q.shape[0]
        self._q = np.ascontiguousarray(q.reshape(heads, -1), np.float32)
        self._output = np.empty_like(self._q)
        keys, values = (np.ascontiguousarray(x, np.float32) for x in (keys, values))
        dims = heads, keys.shape[0], keys.shape[2], keys.shape[1]
        self._handle = library().vq_llama_new(kind.encode(), *dims, keys, values, scale, threads)
        self.nbytes = library().vq_llama_bytes(self._handle)
        self.kernel = f"ggml of llama-cpp-python {VERSION}, {library().vq_llama_simd().decode()}"

    def __call__(self):
        """The output, [query_heads, head_dim]: the same array every time."""
        status = library().vq_llama_attend(self._handle, self._q, self._output)
        if status != 0:
            raise RuntimeError(f"llama.cpp: ggml_graph_compute gave status {status}, wanted 0")
        return self._output

    def rest(self):
        """Stops ggml's threads from spinning until the next call."""
        library().vq_llama_rest(self._handle)

    def held(self):
        """Keys and values as the cache gives them back."""
        keys, values = (np.empty(self._shape, np.float32) for _ in range(2))
        library().vq_llama_held(self._handle, keys, values)
        return keys, values

    def __del__(self):
        if getattr(self, "_handle", None):
            library().vq_llama_free(self._handle)


def _folder():
    return cache_root() / "llama.cpp" / VERSION


def _sdist(folder):
    def found():
        return next(folder.glob("llama_cpp_python-*.tar.gz"), None)

    if not found():
        _run(folder, sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", folder,
             f"llama-cpp-python=={VERSION}")  # fmt: skip
    return found()


def _extract_ggml(sdist, to):
    """ggml alone; complete, or not there."""
    inner = "/vendor/llama.cpp/ggml/"
    part = to.with_name("ggml.part")
    with tarfile.open(sdist) as archive:
        for member in archive:
            if inner in member.name and member.isfile():
                member.name = member.name.partition(inner)[2]
                archive.extract(member, part, filter="data")
    os.replace(part, to)


def _run(folder, *command):
    """RuntimeError with the end of the output where a command fails; all of it is in build.log. FileNotFoundError
    for a program that is not installed."""
    if not shutil.which(command[0]):
        raise FileNotFoundError(f"llama.cpp: got no program {command[0]!r} on PATH, wanted it to build ggml")
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(folder / "build.log", "a") as log:
        log.write(result.stdout)
    if result.returncode:
        raise RuntimeError(
            f"llama.cpp: {Path(command[0]).name} failed with status {result.returncode}; all of it is in "
            f"{folder / 'build.log'}\n{result.stdout[-1500:]}"
        )
