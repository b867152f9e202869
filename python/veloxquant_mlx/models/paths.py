"""Where VeloxQuant keeps what it makes: converted models, calibrated artifacts."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


def cache_root():
    """$VELOXQUANT_CACHE, else ~/.cache/veloxquant. Not created here."""
    return Path(os.environ.get("VELOXQUANT_CACHE") or Path.home() / ".cache" / "veloxquant").expanduser()


@contextmanager
def atomic_directory(target):
    """Yields a temporary directory beside `target` that becomes `target` when the block succeeds.

    A process that dies leaves no half-filled `target`; of two that run at once the first to finish wins.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
