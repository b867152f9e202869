"""Calibration text: varied, repeatable, and the three forms of `texts=`."""

from itertools import islice

import pytest

from veloxquant_mlx.prose import PASSAGES
from veloxquant_mlx.text import calibration_text, read_texts, split_passages


def test_the_built_in_text_is_repeatable_and_enough():
    passages = list(calibration_text())
    assert passages == list(calibration_text())
    assert sum(map(len, passages)) > 200_000
    assert len(set(passages)) == len(passages)
    assert min(map(len, passages)) >= 400


def test_a_short_prefix_is_varied():
    prefix = list(islice(calibration_text(), 12))
    assert 2 <= sum(passage in PASSAGES for passage in prefix) <= 6
    assert max(map(len, prefix)) < 4000


def test_passages_lose_nothing():
    document = "".join(f"line {i}\n" for i in range(2000)) + "end"
    assert "".join(split_passages(document)) == document


def test_texts_may_be_a_file_or_strings(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\n")
    assert list(read_texts(file)) == list(read_texts(str(file))) == ["one\ntwo\n"]
    assert list(read_texts(["a", "b"])) == ["a", "b"]
    assert next(read_texts()) == next(calibration_text())


@pytest.mark.parametrize("texts, error, message", [
    ("/no/such/file", FileNotFoundError, "texts: got '/no/such/file'"),
    (7, ValueError, "texts: got int"),
    (["a", 1], ValueError, "texts: got an item of type int"),
])  # fmt: skip
def test_other_texts_are_refused(texts, error, message):
    with pytest.raises(error, match=message):
        list(read_texts(texts))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ValueError, match="which is empty"):
        read_texts(tmp_path / "empty")
