"""The command line on a small random model: output, exit codes, and errors of one sentence."""

import json

import numpy as np
import pytest
import tiny_model

from veloxquant_mlx.cli import calibration, main

GENERATE_FIELDS = {
    "text": str,
    "method": str,
    "bits_per_element": float,
    "prompt_tokens": int,
    "generated_tokens": int,
    "tokens_per_s": float,
    "cache_bytes": int,
    "shared_bytes": int,
    "lookup_bytes": int,
    "fp16_cache_bytes": int,
    "kernel": str,
    "dequantize_calls": int,
}
EVAL_FIELDS = {
    "label": str,
    "method": str,
    "bits_per_element": float,
    "tokens": int,
    "window": int,
    "sinks": int,
    "ppl": float,
    "ppl_fp16": float,
    "ppl_increase": float,
    "kl": float,
    "top1": float,
    "cache_bytes_per_token": float,
    "shared_bytes": int,
    "bits_with_everything": dict,
    "layers": list,
    "fit": type(None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model.save(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("How vexingly quick daft zebras jump. The five boxing wizards jump quickly. " * 40)
    return str(file)


@pytest.fixture(scope="module")
def cache_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(capsys, monkeypatch, cache_directory):
    """run(*arguments) -> (exit code, stdout, stderr). Calibrations are kept from test to test."""
    monkeypatch.setenv("VELOXQUANT_CACHE", str(cache_directory))
    monkeypatch.delenv("VELOXQUANT_DEBUG", raising=False)

    def run(*arguments):
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def check_fields(fields, wanted):
    assert {key: type(value) for key, value in fields.items()} == wanted


@pytest.mark.parametrize(
    "command", [[], *([name] for name in "demo generate calibrate eval recommend inspect devices".split())]
)
def test_help_has_an_example(run, command):
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert "Example: veloxquant" in out or not command


def test_no_arguments_print_the_help(run):
    assert run() == run("--help")


@pytest.mark.parametrize("method", ["exact", "fp16", "vecinfer"])
def test_generate_json(run, model, method):
    code, out, err = run("generate", model, "--method", method, "--prompt", "a" * 300, "--max-tokens", "20", "--json")
    assert code == 0, err
    fields = json.loads(out)
    check_fields(fields, GENERATE_FIELDS)
    assert (fields["method"], fields["prompt_tokens"], fields["dequantize_calls"]) == (method, 300, 0)
    per_token = 2 * tiny_model.N_LAYERS * 2 * tiny_model.N_KV_HEADS * tiny_model.HEAD_DIM
    cached = fields["fp16_cache_bytes"] / per_token  # mlx_lm may have fed the last token already
    assert cached - 300 - fields["generated_tokens"] in (-1, 0)
    if method == "vecinfer":
        assert fields["cache_bytes"] < fields["fp16_cache_bytes"] / 2
        assert fields["shared_bytes"] > 0
    if method == "fp16":
        assert fields["cache_bytes"] == pytest.approx(fields["fp16_cache_bytes"], rel=0.25)


def test_generate_streams_text_on_stdout_only(run, model):
    code, out, err = run("generate", model, "--method", "exact", "--prompt", "abc", "--max-tokens", "8")
    assert code == 0
    assert len(out) >= 1 and "tokens/s" not in out and "tokens/s" in err
    again = run("generate", model, "--method", "exact", "--prompt", "abc", "--max-tokens", "8", "--json")
    assert json.loads(again[1])["text"] == out.removesuffix("\n")


def test_a_second_run_reuses_the_calibration(run, model, monkeypatch, tmp_path):
    monkeypatch.setenv("VELOXQUANT_CACHE", str(tmp_path))
    first = run("generate", model, "--prompt", "abc", "--max-tokens", "4", "--json")
    second = run("generate", model, "--prompt", "abc", "--max-tokens", "4", "--json")
    assert "calibrating on" in first[2] and "calibrating on" not in second[2]
    assert json.loads(first[1])["text"] == json.loads(second[1])["text"]


def test_eval_json_of_one_method(run, model, text):
    code, out, err = run(
        "eval", model, "--method", "mlx4", "--text", text, "--windows", "2", "--length", "256", "--json"
    )
    assert code == 0, err
    fields = json.loads(out)
    check_fields(fields, EVAL_FIELDS)
    assert fields["tokens"] == 2 * 255
    assert fields["kl"] > 0


def test_eval_of_several_methods_with_a_plot(run, model, text, tmp_path):
    plot = tmp_path / "plot.png"
    arguments = ["--method", "vecinfer,exact", "--method", "mlx4", "--bits", "4,2"]
    code, out, err = run(
        "eval", model, *arguments, "--text", text, "--windows", "1", "--length", "512", "--plot", str(plot), "--json"
    )
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [(r["method"], r["bits_per_element"]) for r in results] == [
        ("vecinfer", 4.0), ("vecinfer", 2.0), ("exact", 32.0), ("mlx4", 5.0)
    ]  # fmt: skip
    for fields in results:
        check_fields(fields, EVAL_FIELDS)
    assert results[2]["kl"] == 0 and results[2]["ppl"] == results[2]["ppl_fp16"]
    assert 0 < results[0]["kl"] < results[1]["kl"]
    for four, two in zip(results[0]["layers"], results[1]["layers"], strict=True):
        assert 0 < four["score"] < two["score"] and four["value"] > 0 and two["value"] > 0
    assert [r["layers"] for r in results[2:]] == [[], []]
    bits = [r["bits_with_everything"] for r in results]
    assert [b["8192"] for b in bits[2:]] == [32, 5]
    assert 2 < bits[1]["8192"] < bits[1]["2048"] and bits[1]["8192"] < bits[0]["8192"] < bits[0]["2048"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_prints_a_table(run, model, text):
    code, out, _ = run("eval", model, "--method", "exact", "--text", text, "--windows", "1", "--length", "128")
    assert code == 0
    assert "perplexity" in out and "exact" in out and "bytes/token" in out


@pytest.mark.parametrize("transform", ["hadamard", "learned"])
def test_calibrate_then_inspect_then_generate(run, model, text, tmp_path, transform):
    artifacts = str(tmp_path / "artifacts")
    arguments = ["--text", text, "--bits", "4", "--tokens", "1024", "--transform", transform, "-o", artifacts]
    code, out, err = run("calibrate", model, *arguments, "--json")
    assert code == 0, err
    calibrated = json.loads(out)
    assert calibrated["bits_per_element"] == 4.0
    assert calibrated["transform"] == transform
    assert list(calibrated["seconds"]) == ["running the model", "training codebooks"]

    code, out, err = run("inspect", artifacts, "--json")
    assert code == 0, err
    found = json.loads(out)["artifacts"]
    assert {artifact["name"] for artifact in found} == {"vecinfer_smooth", "vecinfer_codebook"}
    assert all(artifact["state"] == "whole" and artifact["arrays"] for artifact in found)
    assert f"{transform} transform" in run("inspect", artifacts)[1]

    generate = ["generate", model, "--prompt", "b" * 200, "--max-tokens", "4", "--artifacts", artifacts, "--json"]
    code, out, err = run(*generate)
    assert code == 0, err
    assert json.loads(out)["bits_per_element"] == 4.0
    assert json.loads(out)["shared_bytes"] == calibrated["shared_bytes"]


@pytest.mark.parametrize("method, bits", [("commvq", 1.9375), ("vecinfer_rope", 2.0), ("pre_rope", 2.0)])
def test_methods_before_rope_from_calibration_to_text(run, model, text, tmp_path, method, bits):
    artifacts = str(tmp_path / "artifacts")
    arguments = ["--method", method, "--text", text, "--tokens", "512", "-o", artifacts]
    code, out, err = run("calibrate", model, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["bits_per_element"] == (bits + 2) / 2
    (found,) = [a for a in json.loads(run("inspect", artifacts, "--json")[1])["artifacts"] if "codebook" in a["name"]]
    assert found["state"] == "whole" and found["bits_per_element"] == (bits + 2) / 2

    arguments = ["--method", method, "--artifacts", artifacts, "--text", text, "--windows", "1", "--length", "400"]
    code, out, err = run("eval", model, *arguments, "--json")
    assert code == 0, err
    fields = json.loads(out)
    assert fields["method"] == method and 0 < fields["kl"] < 1 and fields["bits_with_everything"]["8192"] > bits

    code, out, err = run(
        "generate", model, "--method", method, "--artifacts", artifacts, "--prompt", "b" * 200, "--json"
    )
    if method == "pre_rope":
        assert code == 2 and "which eval alone has" in err
    else:
        assert code == 0, err
        assert json.loads(out)["shared_bytes"] == fields["shared_bytes"]


def test_tables_of_integers_for_whole_heads(run, model, text, tmp_path):
    sizes = {}
    for per, entries in (("subvector", "fp16"), ("head", "int8")):
        artifacts = str(tmp_path / per)
        arguments = ["--text", text, "--tokens", "1024", "--codebook-per", per, "--entries", entries, "-o", artifacts]
        code, out, err = run("calibrate", model, *arguments, "--json")
        assert code == 0, err
        sizes[per] = json.loads(out)["shared_bytes"]
    assert sizes["head"] < 0.6 * sizes["subvector"]
    tables = calibration.load(tmp_path / "head").codebook.keys.astype(np.float32)
    assert tables.shape[2] == 1
    for table in tables.reshape(-1, *tables.shape[-2:]):
        steps = table / 2.0 ** (np.ceil(np.log2(np.abs(table).max() / 127.5)))
        assert np.array_equal(steps, np.round(steps)) and np.abs(steps).max() <= 127

    arguments = [
        "--compare",
        "vecinfer2",
        "--artifacts",
        str(tmp_path / "subvector"),
        "--artifacts",
        str(tmp_path / "head"),
    ]
    code, out, err = run("eval", model, *arguments, "--text", text, "--windows", "1", "--length", "400", "--json")
    assert code == 0, err
    assert [r["label"] for r in json.loads(out)["results"]] == ["vecinfer 2 bits, subvector", "vecinfer 2 bits, head"]


def test_eval_compares_what_is_listed(run, model, text):
    wanted = "fp16,mlx4,mlx4:64/4,vecinfer2,vecinfer2:0/0,vecinfer4/2,adaptive2,turboquant3/2"
    arguments = [
        "--compare",
        wanted,
        "--fit-tokens",
        "200",
        "--score-from",
        "200",
        "--text",
        text,
        "--windows",
        "1",
        "--length",
        "600",
    ]
    code, out, err = run("eval", model, *arguments, "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [r["label"] for r in results] == [
        "fp16", "mlx4", "mlx4, window 64, sinks 4", "vecinfer 2 bits, window 64, sinks 4",
        "vecinfer 2 bits, window 0, sinks 0", "vecinfer 4/2 bits", "adaptive 2 bits", "turboquant 3/2 bits",
    ]  # fmt: skip
    kl = [r["kl"] for r in results]
    assert kl[0] < kl[2] < kl[1]  # what is exact near the query helps mlx_lm's codes too
    assert kl[3] < kl[4]
    assert [(r["window"], r["sinks"]) for r in results[2:5]] == [(64, 4), (64, 4), (0, 0)]
    assert results[2]["bits_per_element"] == 4.5
    fit = results[6]["fit"]
    assert fit["tokens"] == 200 and fit["seconds"] > 0 and fit["prompt_seconds"] > 0 and fit["peak_bytes"] > 0


def test_inspect_finds_a_changed_byte(run, model, text, tmp_path):
    artifacts = tmp_path / "artifacts"
    assert run("calibrate", model, "--text", text, "--tokens", "512", "-o", str(artifacts))[0] == 0
    array = max(artifacts.glob("vecinfer_codebook.*.npy"), key=lambda file: file.stat().st_size)
    contents = bytearray(array.read_bytes())
    contents[-100] ^= 1
    array.write_bytes(contents)
    code, out, _ = run("inspect", str(artifacts), "--json")
    states = {artifact["name"]: artifact["state"] for artifact in json.loads(out)["artifacts"]}
    assert code == 1
    assert states["vecinfer_smooth"] == "whole" and states["vecinfer_codebook"] != "whole"
    code, out, err = run("generate", model, "--prompt", "x", "--artifacts", str(artifacts), "--json")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1


def test_artifacts_of_another_model_are_refused(run, model, text, tmp_path):
    other = str(tiny_model.save(tmp_path / "other", seed=1))
    artifacts = str(tmp_path / "artifacts")
    assert run("calibrate", other, "--text", text, "--tokens", "512", "-o", artifacts)[0] == 0
    code, out, err = run("generate", model, "--prompt", "x", "--artifacts", artifacts, "--json")
    assert (code, out) == (2, "")
    assert "model" in err and len(err.splitlines()) == 1


def test_devices(run):
    code, out, err = run("devices", "--json")
    assert code == 0, err
    fields = json.loads(out)
    cpu = next(backend for backend in fields["backends"] if backend["name"] == "cpu")
    assert cpu["simd_level"] in cpu["simd_levels"]
    assert fields["blas"]["name"] and fields["threads"] >= 1
    assert "OpenBLAS" in fields["advice"] or fields["blas"]["fast"]
    assert run("devices")[0] == 0


MISTAKES = [
    (["frobnicate"], "No such command 'frobnicate'"),
    (["generate"], "Missing argument"),
    (["generate", "{model}"], "Missing option '--prompt'"),
    (["generate", "{model}", "--prompt", " "], "--prompt: got an empty text"),
    (["generate", "{model}", "--prompt", "x", "--method", "zip"], "--method: got 'zip', wanted one of"),
    (["generate", "{model}", "--prompt", "x", "--method", "fp16,exact"], "--method: got 2 values, wanted one"),
    (
        ["generate", "{model}", "--prompt", "x", "--bits", "5"],
        "--bits: got '5', wanted one of 1, 1.5, 2, 2.5, 3, 4, 6, 8",
    ),
    (["generate", "{model}", "--prompt", "x", "--bits", "two"], "--bits: got 'two'"),
    (["generate", "{model}", "--prompt", "x", "--max-tokens", "0"], "--max-tokens: got 0, wanted at least 1"),
    (["generate", "{model}", "--prompt", "x", "--max-tokens", "few"], "--max-tokens"),
    (["generate", "{model}", "--prompt", "x", "--sinks", "-1"], "--sinks: got -1, wanted at least 0"),
    (["generate", "nowhere", "--prompt", "x"], "model: got 'nowhere'"),
    (["generate", "{model}", "--prompt", "x", "--artifacts", "/no/where"], "--artifacts: got '/no/where'"),
    (["eval", "{model}", "--text", "/no/file"], "--text: got '/no/file'"),
    (["eval", "{model}", "--text", "{text}", "--windows", "0"], "--windows: got 0"),
    (["eval", "{model}", "--text", "{text}", "--method", "exact", "--windows", "9"], "tokens, wanted at least 18432"),
    (["eval", "{model}", "--text", "{text}", "--plot", "/no/where/plot.png"], "--plot: got '/no/where/plot.png'"),
    (["eval", "{model}", "--text", "{text}", "--bits", "4,2", "--artifacts", "/"], "--bits: got several values"),
    (["eval", "{model}", "--text", "{text}", "--compare", "fp17"], "--compare: got 'fp17', wanted one of"),
    (["eval", "{model}", "--text", "{text}", "--compare", "exact:1/1"], "--compare: got 'exact:1/1', wanted one of"),
    (["eval", "{model}", "--text", "{text}", "--compare", "vecinfer5"], "--compare: got '5', wanted one of 1, 1.5"),
    (["eval", "{model}", "--text", "{text}", "--compare", "fp16", "--bits", "4"], "--compare: got it with --method"),
    (["eval", "{model}", "--text", "{text}", "--compare", "adaptive2"], "--score-from: got 0, wanted at least --fit"),
    (["calibrate", "{model}", "--own-text", "2", "-o", "out"], "--own-text: got 2, wanted a share"),
    (["eval", "{model}", "--text", "{text}", "--codebook-per", "layer"], "--codebook-per: got 'layer', wanted one of"),
    (["calibrate", "{model}", "--method", "qjl", "-o", "out"], "--method: got 'qjl', wanted one of vecinfer"),
    (["calibrate", "{model}", "--method", "commvq", "--entries", "int8", "-o", "out"], "--method: got 'commvq' with"),
    (["calibrate", "{model}"], "Missing option '-o'"),
    (["calibrate", "{model}", "--text", "/no/file", "-o", "out"], "--text: got '/no/file'"),
    (["calibrate", "{model}", "--transform", "dct", "-o", "out"], "--transform: got 'dct', wanted one of hadamard"),
    (["calibrate", "{model}", "--tokens", "10", "-o", "out"], "--tokens: got 10, wanted at least 256"),
    (["inspect", "/no/where"], "path: got '/no/where'"),
]


@pytest.mark.parametrize(
    "arguments, message", MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_sentence(run, model, text, arguments, message):
    code, out, err = run(*(argument.format(model=model, text=text) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1 and err.startswith("veloxquant: error: ")


def test_a_directory_without_artifacts(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, out, err = run("inspect", str(tmp_path))
    assert (code, out) == (2, "") and "holds no artifacts" in err


def test_debugging_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("VELOXQUANT_DEBUG", "1")
    code, _, err = run("inspect", "/no/where")
    assert code == 2 and "Traceback" in err
