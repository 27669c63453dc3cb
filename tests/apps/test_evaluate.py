"""Perplexity of a model over rows of tokens, and of an export from its files."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch
from transformers import AutoTokenizer

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.apps import evaluate
from gptq_plugin.apps.documents import file_documents, texts
from gptq_plugin.apps.evaluate import mean_nll
from gptq_plugin.apps.rows import cut_rows

from forked_python import python
from language_models import tiny


def test_mean_nll_is_the_mean_over_every_predicted_token():
    class Known(torch.nn.Module):
        """Gives the next token (t + 1) a probability that depends on t alone."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(7, 7))

        def forward(self, input_ids):
            return type("Out", (), {"logits": self.table[input_ids]})

    network = Known()
    windows = torch.randint(0, 7, (5, 6))
    expected = [-network.table.log_softmax(-1)[window[i], window[i + 1]].item() for window in windows for i in range(5)]
    for batch_size in (1, 2, 5, 9):
        assert mean_nll(network, windows, batch_size) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The folder of a tiny quantized model with its tokenizer."""
    model, folder = tiny(1), tmp_path_factory.mktemp("export") / "out"
    quantizer = QuantizeModule(group_size=32)
    quantizer.round_to_nearest(model.network)
    return quantizer.export(model.network, folder, tokenizer=model.tokenizer)


def test_an_export_can_be_evaluated_on_files(export, tmp_path, capsys):
    (tmp_path / "some.txt").write_text("The value of the expression is the object itself. " * 40)
    options = [f"--text={tmp_path}/some.txt", "--seq-len=32", "--rows=3", f"--json={tmp_path}/result.json"]
    evaluate.main([str(export), *options])
    assert "over 3 windows" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["windows"] == 3 and result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    tokenizer = AutoTokenizer.from_pretrained(export)
    windows = cut_rows(texts(file_documents(str(tmp_path / "some.txt"))), tokenizer, 32, limit=3)
    assert result["nll"] == pytest.approx(mean_nll(load_quantized(export), windows), rel=1e-5)
    assert tokenizer.decode(windows[0, :24], skip_special_tokens=True) == result["prompt"]


@pytest.mark.parametrize("missing", ["export", "text"])
def test_what_cannot_be_read_is_told_in_a_line_with_the_exit_status_1(missing, export, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "empty" if missing == "export" else export
    assert evaluate.main([str(folder), "--text", f"{tmp_path}/none.txt"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("python -m gptq_plugin.apps.evaluate: ")
    assert ("empty" if missing == "export" else "none.txt") in told


def test_a_text_is_continued_greedily_with_so_many_tokens(export):
    network, tokenizer = load_quantized(export), AutoTokenizer.from_pretrained(export)
    start, expected = torch.arange(5, 12), []
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(network(torch.tensor([[*start.tolist(), *expected]])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in expected
    text = evaluate.continue_text(network, tokenizer, start, new_tokens=6)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.slow
def test_what_stopped_the_other_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", python())
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match=r"could not be evaluated: .*empty[\s\S]*evaluate: .*empty"):
        evaluate.evaluate_export(tmp_path / "empty", tmp_path, torch.randint(0, 100, (3, 20)))


def test_a_text_beyond_ascii_is_printed_as_escapes_where_the_output_is_ascii(export, tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(evaluate, "continue_text", lambda *_: "漢字")
    (tmp_path / "some.txt").write_text("The value of the expression is the object itself. " * 40)
    options = [f"--text={tmp_path}/some.txt", "--seq-len=32", "--rows=3", f"--json={tmp_path}/result.json"]
    evaluate.main([str(export), *options])
    assert b"is continued by '\\u6f22\\u5b57'" in raw.getvalue()
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["text"] == "漢字"
