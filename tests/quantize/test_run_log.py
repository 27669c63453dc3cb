"""What users see of a quantization: each thing once, on rank 0, without configuring logging."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeModule
from gptq_plugin.calibration.forward import call
from gptq_plugin.quantize import run_log
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.training.attempts import Attempts, Quality
from gptq_plugin.training.quality_gate import QualityGate

from models import tiny_llama

BATCHES = [
    {"input_ids": row[None]} for row in torch.randint(0, 128, (8, 12), generator=torch.Generator().manual_seed(0))
]
SMALL = {"group_size": 32, "nsamples": 6}


def stays_float(caplog: pytest.LogCaptureFixture) -> int:
    return sum("stay float, which will be" in record.message for record in caplog.records)


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gptq_plugin")


def test_a_quantization_ends_with_its_layers_and_its_result(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    QuantizeModule(**SMALL).quantize(tiny_llama(), BATCHES, export_dir=tmp_path / "out")
    shown = caplog.records[-1].message
    assert shown.startswith("layers:\nmodule ") and "model.layers.1.mlp.down_proj" in shown
    assert shown.splitlines()[-2].startswith(f"exported to {tmp_path / 'out'}: ")
    assert f"every layer: {tmp_path / 'out' / 'report.html'}" in shown.splitlines()[-1]
    assert shown.count("stay float") == 1  # of the number of layers


def test_an_export_after_it_is_told_too_and_inside_it_only_by_its_end(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    quantizer, model = QuantizeModule(**SMALL), tiny_llama()
    with quantizer.temporarily(model, BATCHES, keep=True):
        quantizer.export(model, tmp_path / "inside")
    assert "exported" not in caplog.text
    quantizer.export(model, tmp_path / "out")
    assert caplog.records[-1].message.startswith(f"exported to {tmp_path / 'out'}: ")


def test_what_stays_float_is_logged_once_in_a_run_and_again_in_the_next(caplog: pytest.LogCaptureFixture) -> None:
    quantizer = QuantizeModule(**SMALL)
    for number in (1, 2):
        quantizer.rehearse(tiny_llama(), BATCHES)
        quantizer.quantize(tiny_llama(), BATCHES)
        assert stays_float(caplog) == number
    quantizer.coverage(tiny_llama())  # asked for
    assert stays_float(caplog) == 3


def test_another_model_is_logged_whatever_was_logged_before(caplog: pytest.LogCaptureFixture) -> None:
    quantizer = QuantizeModule(**SMALL)
    quantizer.rehearse(tiny_llama(), BATCHES)
    quantizer.rehearse(tiny_llama(vocab_size=256), BATCHES)
    assert stays_float(caplog) == 2


def test_an_escalation_warns_once_and_shows_only_the_accepted_result(caplog: pytest.LogCaptureFixture) -> None:
    values = iter([2.0, 2.0, 1.0])
    quality = Quality(QualityGate({"loss": 0.1}, "escalate"), {"loss": 1.0}, lambda: {"loss": next(values)})
    quantizer = QuantizeModule(group_size=64, nsamples=6)
    quantizer.rehearse(tiny_llama(), BATCHES)
    report = Attempts(tiny_llama(), lambda: BATCHES, PassOptions(forward=call), quality).quantize(
        quantizer, lambda *_: None
    )
    quantizer.run_log.end(report, None)
    assert len([deviation for deviation in report.deviations if "escalated" in deviation]) == 2
    assert stays_float(caplog) == 1
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(set(messages)) and sum(text.startswith("layers:\n") for text in messages) == 1


def test_other_ranks_show_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "distributed", SimpleNamespace(rank=lambda: 1))
    quantizer: Any = QuantizeModule(**{**SMALL, "nsamples": 20})
    report = quantizer.quantize(tiny_llama(), BATCHES)
    assert report.deviations and not [r for r in caplog.records if r.name == "gptq_plugin.quantize.run_log"]


def test_a_warning_is_given_once_in_a_run(caplog: pytest.LogCaptureFixture) -> None:
    log = run_log.RunLog()
    for line in ("one", "other", "one"):
        log.warn(line)
    assert caplog.messages == ["one", "other"]


def test_a_result_that_cannot_be_shown_is_no_failure(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is quantized and exported by then: an error would tell that it is as it was."""

    def fails(*_: Any) -> str:
        raise RuntimeError("no terminal")

    monkeypatch.setattr(run_log, "layers_shown", fails)
    model = tiny_llama()
    QuantizeModule(**SMALL).quantize(model, BATCHES, export_dir=tmp_path / "out")
    assert "its report could not be shown" in caplog.text and "no terminal" in caplog.text
    assert hasattr(model.model.layers[0].mlp.up_proj, "qweight") and (tmp_path / "out").is_dir()
