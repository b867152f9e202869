"""What a setting of `bench attention` costs in quality: figures that `veloxquant eval` printed, kept in quality.json.

A figure belongs to one setting as it is timed: its bits, its transform, its precision. A setting that nobody has
evaluated has none, and says so; nothing is taken over from a neighbour.
"""

import json
import os
from functools import cache
from pathlib import Path

NOT_MEASURED = "not measured"
_FIELDS = {"perplexity_increase": (int, float), "kl": (int, float), "windows": int, "command": str}


@cache
def table(file=Path(__file__).with_name("quality.json")):
    """{setting: {"perplexity_increase", "kl", "windows", "command"}}; ValueError for an entry without one of them."""
    settings = json.loads(Path(file).read_text(encoding="utf-8"))["settings"]
    for name, entry in settings.items():
        missing = [field for field, kind in _FIELDS.items() if not isinstance(entry.get(field), kind)]
        if missing or len(entry) != len(_FIELDS):
            raise ValueError(f"{file}: got {entry} for {name!r}, wanted {', '.join(_FIELDS)}")
    return settings


def setting(method, ours=True):
    """The name that figures of `method` have in the table. Ours in the fast precision mode is a setting of its own."""
    fast = ours and os.environ.get("VELOXQUANT_LOOKUPS") == "registers"
    return f"{method}, 16-bit look-ups" if fast else method


def fields(method, ours=True):
    """What a row of the bench says of its setting: all None where it was not measured."""
    entry = table().get(setting(method, ours), {})
    return {
        "setting": setting(method, ours),
        "perplexity_increase": entry.get("perplexity_increase"),
        "kl": entry.get("kl"),
        "quality_windows": entry.get("windows"),
        "quality_command": entry.get("command"),
    }


def text(row):
    """ "+2.05 %, .0229" of a row with fields()."""
    if row["perplexity_increase"] is None:
        return NOT_MEASURED
    if not row["perplexity_increase"] and not row["kl"]:
        return "reference"
    return f"{100 * row['perplexity_increase']:+.2f} %, {row['kl']:.4f}"
