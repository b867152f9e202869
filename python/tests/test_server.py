"""mlx_lm.server with our caches: concurrent requests, reuse of prompts, its memory budget, malformed requests."""

import http.client
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_model as tiny

# As an application would start it: install() on the model that the server has loaded.
SERVER = """
import sys
import numpy as np
from veloxquant_mlx.cache.base import KVCacheConfig, install
from mlx_lm import server
from mlx_lm.models.cache import make_prompt_cache

tables = np.random.default_rng(0).standard_normal((256, 4)).astype(np.float32)

class Provider(server.ModelProvider):
    def load(self, *args, **kwargs):
        loaded = super().load(*args, **kwargs)
        if "make_cache" not in self.model.__dict__:
            install(self.model, KVCacheConfig(codebook=tables, strict=True))
            assert type(make_prompt_cache(self.model)[0]).__name__ == "VeloxQuantKVCache" and self.is_batchable
        return loaded

class Kept(server.LRUPromptCache):
    # Says, whenever the server trims what it keeps to its budget, what there was before and after.
    def trim_to(self, *, n_bytes=None, **kwargs):
        before = self.nbytes
        super().trim_to(n_bytes=n_bytes, **kwargs)
        print("budget", n_bytes, before, self.nbytes, flush=True)

server.ThreadingHTTPServer.request_queue_size = 64  # Python's default of 5 resets what comes beyond
server.ModelProvider = Provider
server.LRUPromptCache = Kept
directory, port, budget = sys.argv[1:]
sys.argv[1:] = ["--model", directory, "--port", port, "--prompt-cache-bytes", budget, "--prompt-cache-size", "1000"]
server.main()
"""
# Of all caches that the server holds, in use or kept for prompts to come. One request of 200 tokens takes 160 kB.
BUDGET = 1_200_000


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What the server prints."""
    return tmp_path_factory.mktemp("log") / "server.txt"


@pytest.fixture(scope="module")
def port(tmp_path_factory, log):
    directory = tiny.save(tmp_path_factory.mktemp("server") / "tiny")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-c", SERVER, str(directory), str(port), str(BUDGET)], stdout=file)
    try:
        for _ in range(600):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        yield port
        assert process.poll() is None  # it survived everything
    finally:
        process.kill()
        process.wait()


def post(port, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


def complete(port, prompt):
    status, body = post(port, json.dumps({"prompt": prompt, "max_tokens": 24, "temperature": 0}))
    assert status == 200, body
    return json.loads(body)["choices"][0]["text"]


def test_20_concurrent_requests_get_the_answers_they_get_alone(port):
    prompts = [f"{i} " + "How long is a piece of string? " * (1 + i % 7) for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda p: complete(port, p), prompts))
    # Asked again one by one: now from the caches that the server kept.
    assert [complete(port, p) for p in prompts] == together


def test_what_it_keeps_stays_within_its_budget(port, log):
    for i in range(20):
        complete(port, f"{i} is another number. " * 12)
    trims = [list(map(int, line.split()[1:])) for line in log.read_text().splitlines() if line.startswith("budget")]
    assert all(after <= max(allowed, 0) <= BUDGET for allowed, _, after in trims)
    assert any(before > after for _, before, after in trims)  # it had to forget
    assert trims[-1][2] > BUDGET / 2  # and only as much as it had to


def test_malformed_requests_do_not_end_it(port):
    for body in (
        "",
        "{",
        "[]",
        json.dumps({"prompt": "x", "max_tokens": -3}),
        json.dumps({"prompt": "x", "max_tokens": "y"}),
    ):
        try:
            assert post(port, body)[0] >= 400
        except (http.client.HTTPException, ConnectionError):
            pass  # mlx_lm closes some connections without an answer
    assert complete(port, "Still there?")
