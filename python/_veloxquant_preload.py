"""Loads OpenBLAS right before MLX, whoever imports MLX first.

MLX's Linux wheel ships the Netlib reference BLAS, 15-40 times slower than OpenBLAS. The symbols of a
BLAS that is loaded globally before MLX win; afterwards it is too late. Scripts import mlx_lm before
they import us, so veloxquant_preload.pth imports this small module when Python starts; it costs an
entry in sys.meta_path until MLX is imported.

VELOXQUANT_BLAS names another library, or is 'off'.
"""

import ctypes
import glob
import os
import sys

_PATTERNS = (
    "/usr/lib/*/openblas-pthread/libopenblas.so.0",
    "/usr/lib/*/libopenblas.so.0",
    "/usr/lib64/libopenblas*.so.0",
)

loaded = None  # path of the library that MLX's symbols resolve to; None: MLX's own BLAS


class _BeforeMlx:
    """A finder that finds nothing: it sees the import of MLX coming."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "mlx":
            sys.meta_path.remove(_BeforeMlx)
            _load_openblas()


def _load_openblas() -> None:
    global loaded
    choice = os.environ.get("VELOXQUANT_BLAS", "")
    if choice == "off":
        return
    for path in [choice] if choice else sorted(p for pattern in _PATTERNS for p in glob.glob(pattern)):
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            loaded = path
            return
        except OSError as error:
            if choice:
                raise ImportError(f"VELOXQUANT_BLAS: got {path!r}, wanted a BLAS library ({error})") from error


if sys.platform == "linux" and "mlx" not in sys.modules and _BeforeMlx not in sys.meta_path:
    sys.meta_path.insert(0, _BeforeMlx)
