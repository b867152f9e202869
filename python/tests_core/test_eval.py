"""veloxquant.eval: settings by name, and the scores of a small model against plain loops."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_torch_cache import DEVICES, feed, on, tokens  # noqa: E402

import veloxquant.torch as vt  # noqa: E402
from veloxquant import Error, _core  # noqa: E402
from veloxquant import eval as evaluation  # noqa: E402


def test_settings_by_name():
    found = evaluation.settings_of("2:lane, 4/2:subvector,2:head:hadamard,2/2:lane")
    assert found == [((2, 2), "lane", "learned"), ((4, 2), "subvector", "learned"), ((2, 2), "head", "hadamard")]
    assert [one.label for one in found] == [
        "2 bits, tables by lane", "4/2 bits, a table a sub-vector", "2 bits, a table a head, hadamard"
    ]  # fmt: skip
    assert evaluation.settings_of("3/2:turboquant")[0].label == "3/2 bits, turboquant"
    for text in ("3:lane", "2", "2:layer", "2/2/2:lane", "2:lane:none", "5:turboquant", ""):
        with pytest.raises(Error, match="compare: got"):
            evaluation.settings_of(text)
    assert len(evaluation.settings_of(evaluation.COMPARED)) == evaluation.COMPARED.count(",") + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transform", ["learned", "turboquant"])
def test_scores_are_those_of_decoding_token_by_token(device, transform):
    model, tables = on(device, bits=2, per="lane", transform=transform)
    ids = tokens(220, 2)
    scores = evaluation.evaluate(model, ids, {"2 bits": tables})
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        exact = model(ids.to(device)).logits.float().cpu()[:, :-1].log_softmax(-1).double()
    got = feed(model, vt.VeloxQuantCache(model, tables), ids, [1] * 219).log_softmax(-1).double()
    target = ids[:, 1:, None]
    want = {
        "ppl": (-got.gather(2, target).mean()).exp().item(),
        "kl": (exact.exp() * (exact - got)).sum(-1).mean().item(),
        "top1": (exact.argmax(-1) == got.argmax(-1)).double().mean().item(),
    }
    ours, reference = scores["2 bits"], scores["exact"]
    assert reference["ppl"] == pytest.approx((-exact.gather(2, target).mean()).exp().item(), rel=1e-4)
    assert reference["kl"] == 0 and reference["top1"] == 1
    assert ours["ppl"] == pytest.approx(want["ppl"], rel=2e-3)
    assert ours["kl"] == pytest.approx(want["kl"], rel=2e-2) and ours["kl"] > 0
    assert ours["top1"] == pytest.approx(want["top1"], abs=0.02)
    assert ours["increase"] == pytest.approx(ours["ppl"] / reference["ppl"] - 1)
    assert ours["table_bytes"] == tables.nbytes and len(ours["ppl_by_window"]) == 2
    assert len(evaluation.cells("2 bits", ours)) == len(evaluation.COLUMNS)


def test_without_a_device_it_says_what_is_missing():
    if _core.cuda_built() and torch.cuda.is_available():
        pytest.skip("there is a device here")
    command = [sys.executable, "-m", "veloxquant.eval", "none.gguf", "--text", "none.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "[eval] backend: got" in done.stderr
