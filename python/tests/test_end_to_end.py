"""SmolLM2-135M through the command line: calibrate, score, generate. Loose bars; `make quality` has the tables."""

import json

import pytest

from veloxquant_mlx.cli import calibration, main
from veloxquant_mlx.cli.demo_prompt import PROMPT
from veloxquant_mlx.models import smollm2
from veloxquant_mlx.models.paths import cache_root
from veloxquant_mlx.prose import PASSAGES
from veloxquant_mlx.text import calibration_text

CALIBRATION_TOKENS = 4096


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """The converted model is shared with other runs; calibrations are made anew."""
    try:
        smollm2.directory()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        (cache / "models").symlink_to(cache_root() / "models")
        patch.setenv("VELOXQUANT_CACHE", str(cache))
        patch.setattr(calibration, "QUICK_TOKENS", CALIBRATION_TOKENS)
        yield


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Prose and manuals that calibration does not see."""
    passages = list(calibration_text())[200:]
    assert CALIBRATION_TOKENS < sum(map(len, list(calibration_text())[:200])) / 5
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text(PROMPT + "".join(passages))
    return str(file)


def run_json(capsys, *arguments):
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_quality(capsys, held_out):
    arguments = ["--method", "vecinfer", "--bits", "4,2", "--text", held_out, "--windows", "2", "--length", "1024"]
    four, two = run_json(capsys, "eval", "smollm2", *arguments)["results"]
    assert (four["bits_per_element"], two["bits_per_element"]) == (4.0, 2.0)
    assert four["tokens"] == two["tokens"] == 2 * 1023
    assert four["ppl"] < 1.03 * four["ppl_fp16"]
    assert two["ppl"] < 1.20 * two["ppl_fp16"]
    assert 0 < four["kl"] < two["kl"] and four["top1"] > two["top1"]
    assert two["cache_bytes_per_token"] < four["cache_bytes_per_token"] < 23040 / 2


@pytest.mark.parametrize("bits", ["4", "2"])
def test_generate(capsys, bits):
    prompt = f"{PASSAGES[2]}\n{PASSAGES[9]}\nWhat is the capital of France?"
    fields = run_json(capsys, "generate", "smollm2", "--bits", bits, "--prompt", prompt, "--max-tokens", "24")
    assert fields["prompt_tokens"] > 400  # most of it is packed
    assert fields["dequantize_calls"] == 0
    assert fields["cache_bytes"] < fields["fp16_cache_bytes"] / 2
    assert fields["text"].strip()
    if bits == "4":
        assert "Paris" in fields["text"]
