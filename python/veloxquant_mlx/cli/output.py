"""What the commands print: one JSON object or a table on stdout; progress, notes and errors on stderr."""

import json
import sys
import time
from contextlib import contextmanager, redirect_stdout

_LINE_EVERY_S = 10.0  # between the plain progress lines of a stderr that is no terminal

_FILE_WIDTH = 120  # columns of a table that is not printed on a terminal

_stdout = None  # the real one while captured() is active


@contextmanager
def captured():
    """Keeps stdout for emit_json, table and text: whatever a library prints meanwhile goes to stderr."""
    global _stdout
    _stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


def emit_json(fields):
    print(json.dumps(fields, ensure_ascii=False), file=_stdout, flush=True)


def text(piece, end="\n"):
    """Writes to stdout at once: generated text streams."""
    print(piece, end=end, file=_stdout, flush=True)


def note(message):
    print(message, file=sys.stderr, flush=True)


def table(title, columns, rows):
    """Prints a table of strings on stdout."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", show_lines=any("\n" in cell for row in rows for cell in row))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console(file=_stdout)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(grid)


@contextmanager
def progress():
    """Yields report(fraction in 0..1, what): a bar on a terminal, else a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, started = bar.add_task("", total=1.0), time.monotonic()
        yield lambda fraction, what: bar.update(
            task, completed=fraction, description=what + time_left(time.monotonic() - started, fraction)
        )


def time_left(elapsed, fraction):
    """ ", 40 s left", once enough was done to tell."""
    if not (fraction >= 0.02 and elapsed >= 2.0) or fraction >= 1.0:
        return ""
    left = elapsed / fraction * (1.0 - fraction)
    return f", {left / 60:.0f} min left" if left >= 90 else f", {left:.0f} s left"


class _Lines:
    """Progress for a log file; nothing is printed for what takes less than two seconds."""

    def __init__(self):
        self._started = time.monotonic()
        self._next = self._started + 2.0

    def __call__(self, fraction, what):
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LINE_EVERY_S
            note(f"[{100 * fraction:3.0f} %] {what}{time_left(now - self._started, fraction)}")


def megabytes(n_bytes):
    return f"{n_bytes / 1e6:.2f} MB"
