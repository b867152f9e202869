"""Calibration text: a varied built-in source that needs no network, and a reader for `texts=`.

Codebooks fit what they are shown, so a short prefix of the source must already be varied: passages of
many kinds (prose, a manual, read-mes and licences, docstrings), dealt round-robin, each kind shuffled with a
fixed seed. What is found depends on the Python installation; its order does not depend on anything else.
"""

import importlib
import os
import random
import sys
from importlib.metadata import distributions
from itertools import islice, zip_longest
from pathlib import Path

from veloxquant_mlx.prose import PASSAGES

_PASSAGE_CHARS = 1500  # some 350 tokens
_SHORTEST_PASSAGE = 400
_PER_DOCUMENT = 4  # a long change log must not crowd out the rest
_SEED = 1684  # any fixed number

# Modules whose docstrings are prose rather than signatures; importing them has no side effects.
_DOCUMENTED_MODULES = (
    "argparse ast asyncio.events bisect calendar cmd codecs collections configparser csv datetime decimal difflib "
    "doctest email.message enum fractions functools gettext heapq html.parser http.client inspect ipaddress "
    "itertools json locale logging mailbox optparse os pathlib pickle pickletools random re sched shelve shlex "
    "smtplib sqlite3 statistics string subprocess tarfile textwrap threading timeit tokenize trace typing "
    "unittest unittest.mock urllib.request uuid weakref xml.dom.minidom zipfile"
).split()


def calibration_text():
    """Yields passages (str, some 400 to 1500 characters), the same ones in the same order on every call."""
    shuffle = random.Random(_SEED).shuffle
    kinds = []
    for documents in (PASSAGES, _manual(), _package_files(), _docstrings()):
        passages = [passage for document in documents for passage in islice(split_passages(document), _PER_DOCUMENT)]
        passages = [passage for passage in dict.fromkeys(passages) if len(passage) >= _SHORTEST_PASSAGE]
        shuffle(passages)
        kinds.append(passages)
    for deal in zip_longest(*kinds):
        yield from (passage for passage in deal if passage is not None)


def read_texts(texts=None):
    """Yields the strings of `texts`: None (the built-in source), the path of a UTF-8 file, or an iterable of strings.

    A file is read in order, in passages. Raises ValueError for an empty source or one of another kind,
    FileNotFoundError for a path that is no file.
    """
    if texts is None:
        return calibration_text()
    if isinstance(texts, (str, os.PathLike)):
        return split_passages(read_file(texts, "texts"))
    try:
        return _strings(iter(texts))
    except TypeError:
        raise ValueError(
            f"texts: got {type(texts).__name__}, wanted an iterable of strings or the path of a text file"
        ) from None


def read_file(path, argument):
    """The contents of a UTF-8 text file (undecodable bytes replaced). `argument` names it in errors."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: got {str(path)!r}, wanted the path of an existing text file")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{argument}: got {str(path)!r}, which is empty, wanted a file with text")
    return text


def split_passages(document):
    """Cuts a document at line ends into passages of about 1500 characters; nothing is dropped."""
    passage, length = [], 0
    for line in document.splitlines(keepends=True):
        passage.append(line)
        length += len(line)
        if length >= _PASSAGE_CHARS:
            yield "".join(passage)
            passage, length = [], 0
    if passage:
        yield "".join(passage)


def _strings(items):
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"texts: got an item of type {type(item).__name__}, wanted strings")
        yield item


def _long_enough(texts):
    return (text for text in texts if text and len(text) >= _SHORTEST_PASSAGE)


def _manual():
    """The Python language reference, as the interactive help() has it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # left out by some distributions
        return
    yield from _long_enough(topics[name] for name in sorted(topics))


def _docstrings():
    for name in _DOCUMENTED_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # a Python built without it
            continue
        yield from _long_enough([module.__doc__])


def _package_files():
    """The read-me and the licences of every installed package, and the interpreter's licence; each text once."""
    texts = {_read_if_there(Path(sys.base_prefix) / "LICENSE.txt"): None}
    for package in sorted(distributions(), key=lambda package: package.metadata["Name"] or ""):
        texts[package.metadata.get_payload()] = None
        for file in package.files or ():
            if file.name.upper().startswith(("LICENSE", "COPYING")):
                texts[_read_if_there(file.locate())] = None
    return _long_enough(texts)


def _read_if_there(path):
    path = Path(path)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
