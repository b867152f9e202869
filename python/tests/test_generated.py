"""The built-in calibration text: what the model writes, mixed with what is found, and nothing that we score on."""

import os
import re
from pathlib import Path

import pytest
from tiny_model import save

from veloxquant_mlx.allocators.recording import collect
from veloxquant_mlx.allocators.vecinfer import calibrate
from veloxquant_mlx.generated import built_in_texts, generated_passages
from veloxquant_mlx.models import load_model
from veloxquant_mlx.text import calibration_text

WORDS = 8  # of an n-gram; common phrases are shorter
# Beside the checkout here and in CI only.
DATA = Path(os.environ.get("DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save(tmp_path_factory.mktemp("model"))))


def test_the_model_writes_the_same_every_time(loaded):
    once, again = (generated_passages(*loaded, 300) for _ in range(2))
    assert once == again and len(once) == 3 and len(set(once)) == 3
    assert all("<eos>" not in passage for passage in once)
    done = []
    generated_passages(*loaded, 128, done.append)
    assert done == sorted(done) and done[-1] == 1.0 and 0 < done[0] < 0.1


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_any_prefix_has_its_share(loaded, share):
    """To within a passage: how long those are that are found depends on what is installed."""
    found, own, total, longest = set(calibration_text()), 0, 0, 0
    for text in built_in_texts(*loaded, 10_000, share):  # a token is a byte here
        own += len(text) * (text not in found)
        total += len(text)
        longest = max(longest, len(text))
        if total < 9_000:
            assert abs(own - share * total) <= longest
    assert longest < 4_000
    assert total >= 9_000


def test_calibration_reads_the_mixture(loaded):
    model, tokenizer = loaded
    steps = []
    data = collect(model, tokenizer, 4096, progress=lambda fraction, text: steps.append((fraction, text)))
    assert sum(n for _, n in data.windows) == 4096
    assert steps == sorted(steps, key=lambda step: step[0]) and steps[-1][0] == 1.0
    assert {text for _, text in steps} == {"the model writes calibration text", "running the model"}
    found = collect(model, tokenizer, 4096, own_share=0)
    assert (data.keys[0] != found.keys[0]).any().item()
    # A trial is not worth the writing.
    assert list(built_in_texts(model, tokenizer, 4000)) == list(calibration_text())
    # A list of texts is read as it stands.
    assert calibrate(model, tokenizer, texts=["some words " * 100], num_tokens=300)[1].bits_per_element == (2, 2)


def n_grams(text):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return set(zip(*(words[i:] for i in range(WORDS))))


def test_no_n_gram_of_it_is_in_the_text_that_we_score_on():
    file = DATA / "wikitext2-test.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    scored = n_grams(file.read_text())
    assert len(scored) > 100_000  # the text was read, and cut as ours is
    for passage in calibration_text():
        assert not n_grams(passage) & scored, passage[:200]
