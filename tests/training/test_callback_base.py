"""What both callbacks share: their arguments, the checks before training, and the end of a run."""

from __future__ import annotations

import inspect

import pytest
import torch

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.calibration.forward import call
from gptq_plugin.clients.client import Client
from gptq_plugin.errors import CalibrationError, ExportError, QualityError, TargetError
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.training.attempts import Attempts, Quality
from gptq_plugin.training.callback_base import CallbackBase, Origin
from gptq_plugin.training.quality_gate import QualityGate

from models import tiny_llama

SMALL = {"group_size": 32, "nsamples": 8, "batch_size": 2}
CALLBACKS = [GPTQCallback, GPTQTrainerCallback]


class Saved:
    """What a callback asks of a tokenizer that it only saves."""

    def save_pretrained(self, folder):
        raise AssertionError("nothing is saved here")


@pytest.mark.parametrize("kind", CALLBACKS)
def test_both_callbacks_take_the_shared_arguments_under_the_same_names(kind):
    assert issubclass(kind, CallbackBase)
    shared, own = (inspect.signature(one).parameters for one in (CallbackBase, kind))
    assert list(shared)[:2] == list(own)[:2] == ["quantizer", "export_dir"] and shared.keys() <= own.keys()
    saved = Saved()
    callback = kind(QuantizeModule(**SMALL), "out", tokenizer=saved, overwrite=True, target="vllm", mix=[[1, 2]] * 9)
    assert (callback.tokenizer, callback.overwrite, callback.target) == (saved, True, Client("vllm"))
    assert str(callback.export_dir) == "out" and callback.swap is None and callback.report is None
    assert callback.data.nsamples_of_mix == 2  # a quarter of 8


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantizer": {"bits": 4}}, TypeError, "quantizer must be a QuantizeModule, got dict"),
        ({"swap": False}, ValueError, "nothing of the quantization would remain: give an export_dir"),
        ({"calibration": "a text"}, CalibrationError, "give a list of texts"),
        ({"mix": "a text"}, CalibrationError, "give a list of texts"),
        ({"mix": [[1]], "mix_fraction": 1}, ValueError, "mix_fraction must be a number"),
        ({"target": "ollama"}, ValueError, "ollama"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**{"quantizer": QuantizeModule(**SMALL), **options})


def callback(export_dir=None, **options):
    return GPTQTrainerCallback(QuantizeModule(**SMALL), export_dir, **options)


def test_the_export_folder_is_checked_against_the_runs_and_against_what_lies_there(tmp_path):
    callback().agree_on_export_dir([("output_dir", tmp_path)])  # nothing is exported
    callback(tmp_path / "out").agree_on_export_dir([("output_dir", tmp_path)])
    with pytest.raises(ExportError, match="is or holds output_dir"):
        callback(tmp_path).agree_on_export_dir([("output_dir", tmp_path)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="not an export of gptq_plugin"):
            callback(tmp_path / "out", overwrite=overwrite).agree_on_export_dir([])


def test_a_module_needs_layers_to_quantize_and_a_client_that_takes_them(tmp_path):
    callback(tmp_path / "out").check_layers(tiny_llama())
    with pytest.raises(TargetError, match="no nn.Linear"):
        callback(tmp_path / "out").check_layers(torch.nn.Conv1d(3, 3, 3))
    odd = GPTQTrainerCallback(QuantizeModule(group_size=16), tmp_path / "out", target="vllm")
    with pytest.raises(ExportError, match="not 16"):
        odd.check_layers(tiny_llama())


# --- the end of a run ---


def attempts(model, tokenizer=None, **how):
    ids = torch.randint(0, 128, (8, 12), generator=torch.Generator().manual_seed(0))
    return Attempts(model, lambda: [{"input_ids": row[None]} for row in ids], PassOptions(call, tokenizer), **how)


class Tokenizer:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def test_it_quantizes_notes_where_the_weights_come_from_and_exports(tmp_path):
    model, ending = tiny_llama(), callback(tmp_path / "out")
    origin = Origin("run/last.ckpt", "run-7", ["a tie was undone"])
    report = ending.quantize_and_export(attempts(model, tokenizer=Tokenizer(), keep=True), origin)
    assert ending.report is report and report.samples == 8
    assert (report.float_checkpoint, report.run_id) == ("run/last.ckpt", "run-7")
    assert report.deviations == ["a tie was undone"]
    assert ending.export_dir == tmp_path / "out" and (tmp_path / "out" / "tokenizer.json").exists()
    assert "a tie was undone" in (tmp_path / "out" / "quantization_report.json").read_text()
    exported, ids = load_quantized(tmp_path / "out"), torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits)


@pytest.mark.parametrize("run_id", [None, 7, "", "/home/me/run", "two words"])
def test_a_name_that_is_not_to_be_published_leaves_the_reports_own(run_id):
    ending = callback()
    report = ending.quantize_and_export(attempts(tiny_llama()), Origin("", run_id))
    assert report.run_id and report.run_id != run_id and ending.export_dir is None


def test_a_folder_that_was_taken_meanwhile_changes_export_dir(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.txt").touch()
    ending = callback(tmp_path / "out")
    report = ending.quantize_and_export(attempts(tiny_llama()), Origin(""))
    assert ending.export_dir != tmp_path / "out" and load_quantized(ending.export_dir)
    assert any(deviation.endswith(f"exported to {ending.export_dir.name} instead") for deviation in report.deviations)


@pytest.mark.parametrize("failing", ["gate", "export"])
def test_on_a_failure_there_is_no_report_no_export_and_the_model_is_float(failing, tmp_path):
    class Full:
        def save_pretrained(self, directory):
            raise OSError("disk full")

    model, ending = tiny_llama(), callback(tmp_path / "out")
    quality = Quality(QualityGate({"loss": 0.1}), {"loss": 1.0}, lambda: {"loss": 2.0 if failing == "gate" else 1.0})
    error, message = (
        (QualityError, "loss went from 1 to 2")
        if failing == "gate"
        else (ExportError, "could not be written: disk full")
    )
    with pytest.raises(error, match=message):
        ending.quantize_and_export(attempts(model, quality=quality, tokenizer=Full(), keep=True), Origin(""))
    assert ending.report is None and not (tmp_path / "out").exists()
    assert not any(isinstance(layer, QuantLinear) for layer in model.modules())
