"""The comparison of float, round-to-nearest and GPTQ at the end of a run."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from omegaconf import OmegaConf

from gptq_plugin import QuantizeModule, QuantLinear
from gptq_plugin.apps import comparison
from gptq_plugin.apps.comparison import Run, compare
from gptq_plugin.apps.evaluate import mean_nll
from gptq_plugin.apps.summary import SUMMARY, Clock

from language_models import tiny


class Data:
    validation = torch.randint(0, 250, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """compared(evaluate, device): the result and the summary of a run; its export is evaluated as 1.5 nats."""
    evaluated = {"nll": 1.5, "nlls": [1.0, 2.0] * (len(Data.validation) // 2), "prompt": "The", "text": "value"}
    monkeypatch.setattr(comparison, "evaluate_export", lambda *_, **__: evaluated)
    monkeypatch.setattr(comparison, "next_command", lambda _: "try this")

    def run(evaluate=True, device="cpu"):
        cfg = OmegaConf.create({"evaluate": evaluate, "eval_batch_size": 2})
        model, quantizer = tiny(1), QuantizeModule(group_size=32)
        export = tmp_path / "gptq"
        with quantizer.temporarily(model.network, torch.randint(0, 250, (8, 16)).unbind()) as report:
            quantizer.export(model.network, export)
        run = Run(cfg, tmp_path, Clock(), Data(), model)
        found = compare(run, quantizer, report, export, torch.device(device))
        return found, json.loads((tmp_path / SUMMARY).read_text()), model.network

    return run


def test_the_float_model_and_its_rounding_are_measured_here_and_the_export_from_its_files(compared, capsys, tmp_path):
    found, summary, network = compared()
    assert found == summary["nll"]["gptq"] == 1.5
    assert summary["nll"]["float"] == pytest.approx(mean_nll(tiny(1).network, Data.validation), rel=1e-5)
    assert summary["nll"]["rtn"] == pytest.approx(mean_nll(network, Data.validation), rel=1e-5)
    assert summary["nll"]["rtn"] != summary["nll"]["float"]
    assert sum(isinstance(layer, QuantLinear) for layer in network.modules()) == 7  # rounded in place
    assert list(summary["seconds"]) == ["evaluate float", "evaluate RTN", "reload, evaluate, generate"]
    assert summary["windows"] == [12, 16] and (summary["prompt"], summary["text"]) == ("The", "value")
    assert summary["files"] == {
        "GPTQ model": str(tmp_path / "gptq"),
        "every layer": str(tmp_path / "gptq" / "report.html"),
        "this table": str(tmp_path / SUMMARY),
    }
    shown = capsys.readouterr().out
    assert "GPTQ, 4 bits" in shown and summary["next_command"] == "try this"
    change = [value - 1.0 - n % 2 for n, value in enumerate(mean_nll(tiny(1).network, Data.validation).values)]
    error = 2.2 * statistics.stdev(change) / 12**0.5  # Student's t
    known = summary["spread"]["high"] - summary["spread"]["low"]
    assert summary["spread"]["parts"] == 12 and known / 2 == pytest.approx(error, rel=0.1)
    assert f" ± {known / 2:.2g}" in shown and "a paired bootstrap over 12 windows." in shown


def test_a_float_model_that_is_not_on_the_device_is_not_measured_and_that_is_noted(compared):
    _, summary, network = compared(device="meta")
    assert list(summary["nll"]) == ["gptq"] and summary["spread"] is None
    assert summary["deviations"][-1] == "the float model is not on meta, so only its export is evaluated"
    assert not any(isinstance(layer, QuantLinear) for layer in network.modules())


def test_without_an_evaluation_only_sizes_and_files_are_told(compared):
    found, summary, _ = compared(evaluate=False)
    assert found is None and summary["nll"] == {} and summary["gptq_bytes"] > 0 and summary["float_bytes"] > 0
