"""The scripts in examples/python, run as a user would, on SmolLM2."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from veloxquant_mlx.models import smollm2
from veloxquant_mlx.prose import PASSAGES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"


@pytest.fixture(scope="module", autouse=True)
def the_model():
    try:
        smollm2.directory()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def run(script, *arguments):
    result = subprocess.run([sys.executable, EXAMPLES / script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_chat_with_a_document_and_its_saved_cache(tmp_path):
    document, cache = tmp_path / "town.txt", tmp_path / "town.safetensors"
    document.write_text("\n\n".join([PASSAGES[0], *PASSAGES[2:5]]))
    questions = ["How many inhabitants did the census of 2011 count?", "What does Vardholm's economy rest on?"]
    options = ["--cache", str(cache), "--max-tokens", "20"]
    first = run("chat_with_document.py", *questions, "--document", str(document), *options)
    document.unlink()  # it is in the cache
    second = run("chat_with_document.py", *questions, *options)
    assert "saved" in first and "loaded" in second
    (tokens,) = re.findall(r"read (\d+) tokens", first)
    assert int(tokens) > 400 and f"loaded {tokens} tokens" in second
    answers = [out[out.index(f"> {questions[0]}") :] for out in (first, second)]
    assert answers[0] == answers[1]
    assert "7,215" in answers[0]
    megabytes = float(re.search(r"holds ([\d.]+) MB", first)[1])
    assert megabytes < 0.7 * int(tokens) * 23040 / 1e6  # fp16: 23,040 bytes a token; these bytes include the tables


def test_batch():
    prompts = ["What is the capital of France?", "Say hello.", "Name a river in Egypt, and the sea that it flows into."]
    out = run("batch.py", *prompts, "--max-tokens", "24")
    assert [line.split("   ")[0] for line in out.splitlines() if line.startswith("> ")] == [f"> {p}" for p in prompts]
    assert "Paris" in out and "Nile" in out


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_server_with_the_curl_line_of_its_documentation():
    text = (EXAMPLES / "server.py").read_text()
    curl = re.search(r"curl .*?}'\n", text, re.DOTALL)[0].replace("\\\n", " ")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, EXAMPLES / "server.py", "--port", str(port)])
    try:
        for _ in range(1200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        out = subprocess.run(curl.replace("8080", str(port)), shell=True, check=True, capture_output=True).stdout
        assert "Paris" in json.loads(out)["choices"][0]["message"]["content"]
    finally:
        server.kill()
        server.wait()
