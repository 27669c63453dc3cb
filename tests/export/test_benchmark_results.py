"""Results of benchmarks written into an export, and what stays of it."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from reports import report

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.export.benchmark_results import BenchmarkResult, with_results, write_results
from gptq_plugin.report.benchmark import Benchmark
from gptq_plugin.report.spread import Spread

from models import tiny_llama

RESULT = BenchmarkResult(Benchmark("arc", "acc", "h 1", dataset="org/arc", samples=9), 0.5, 0.25, Spread(0, 1, 0, 1, 9))


def exported(folder):
    model, quantizer = tiny_llama(), QuantizeModule(group_size=32)
    quantizer.quantize(model, [{"input_ids": torch.arange(3, 30)[None]}] * 8)
    quantizer.report.metrics = {"val_loss": {"float": 1.0, "gptq": 1.5}}
    return quantizer.export(model, folder)


def test_results_stand_beside_a_runs_metrics_and_replace_earlier_ones(tmp_path):
    folder = exported(tmp_path / "out")
    before = sorted(path.name for path in folder.iterdir())
    write_results(folder, {"arc acc": RESULT})
    write_results(folder, {"arc acc": BenchmarkResult(Benchmark("arc", "acc", "h 2"), math.nan, 0.75)})
    stored = json.loads((folder / "quantization_report.json").read_text())
    assert stored["metrics"] == {"val_loss": {"float": 1.0, "gptq": 1.5}, "arc acc": {"gptq": 0.75}}
    assert stored["spreads"] == {} and stored["benchmarks"]["arc acc"]["harness"] == "h 2"
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing hidden is left
    load_quantized(folder)


def test_what_a_person_wrote_into_the_card_stays(tmp_path):
    folder = exported(tmp_path / "out")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    write_results(folder, {"arc acc": RESULT})
    card = (folder / "README.md").read_text()
    assert card.endswith("My own words.\n") and "org/arc" in card and "validation data of the training run" in card


def test_a_page_that_was_removed_is_there_again(tmp_path):
    folder = exported(tmp_path / "out")
    (folder / "report.html").unlink()
    write_results(folder, {"arc acc": RESULT})
    assert "arc acc" in (folder / "report.html").read_text() and "org/arc" in (folder / "README.md").read_text()


def test_a_folder_without_a_report_is_refused_and_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    folder = exported(tmp_path / "out")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("gptq_plugin.export.benchmark_results.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(folder, {"arc acc": RESULT})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    os.remove(folder / "quantization_report.json")
    with pytest.raises(ExportError, match="has no report of this version, into which results could be written"):
        write_results(folder, {"arc acc": RESULT})


def test_values_that_are_unknown_are_left_out_of_the_metrics():
    after = with_results(report(), {"a": BenchmarkResult(Benchmark("a", "acc", "h"), math.nan, math.nan), "b": RESULT})
    assert after.metrics == {"a": {}, "b": {"float": 0.5, "gptq": 0.25}} and set(after.spreads) == {"b"}
