"""gptq-plugin eval: benchmarks by the lm-evaluation-harness itself, with a task and data of the test's own."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys

import pytest
import torch
import yaml

from gptq_plugin import QuantizeModule
from gptq_plugin.apps.benchmarks import shown_results
from gptq_plugin.apps.command import main
from gptq_plugin.export.benchmark_results import BenchmarkResult
from gptq_plugin.report.benchmark import Benchmark
from gptq_plugin.report.spread import Spread

from language_models import tiny

SAMPLES = 24
TASK = {
    "task": "mini_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 1.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, its 2-bit export, and a folder with a task of two answers each."""
    place = tmp_path_factory.mktemp("benchmarks")
    model, quantizer = tiny(1), QuantizeModule(bits=2, group_size=32)
    model.network.save_pretrained(place / "float")
    with quantizer.temporarily(model.network, batches()):
        quantizer.export(model.network, place / "out", tokenizer=model.tokenizer)
    (place / "tasks").mkdir()
    lines = [{"question": f"f{n} of x is", "choices": ["some", f"other {n}"], "answer": n % 2} for n in range(SAMPLES)]
    (place / "tasks/data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"data_files": {"test": str(place / "tasks/data.jsonl")}}
    (place / "tasks/mini.yaml").write_text(yaml.safe_dump({**TASK, "dataset_kwargs": files}))
    return place


def batches():
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 60, (1, 32), generator=g)} for _ in range(8)]


def run(folders, *options, tasks="mini_choice"):
    given = ["--include-path", str(folders / "tasks"), "--batch-size", "4", *options]
    return main(["eval", str(folders / "out"), "--tasks", tasks, *given])


def without_the_harness_own_tasks(monkeypatch):
    """Its thousands of files take it seconds to list."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


def test_results_of_both_models_are_shown_and_written_into_the_export(folders, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = (folders / "out/model.safetensors").read_bytes()
    plain = (folders / "out/config.json").read_bytes()
    with monkeypatch.context() as patched:
        without_the_harness_own_tasks(patched)
        assert run(folders, "--limit", "5") == 0
    assert "nothing is written" in capsys.readouterr().out
    assert "mini_choice" not in (folders / "out/README.md").read_text()
    assert run(folders, "--float", str(folders / "float")) == 0
    printed = capsys.readouterr().out
    assert "mini_choice acc_norm" in printed and "±" in printed and printed.count(str(SAMPLES)) >= 2
    stored = json.loads((folders / "out/quantization_report.json").read_text())
    metrics, benchmark = stored["metrics"], stored["benchmarks"]["mini_choice acc"]
    assert set(metrics) == {"mini_choice acc", "mini_choice acc_norm"} == set(stored["spreads"])
    assert set(metrics["mini_choice acc"]) == {"float", "gptq"} and stored["spreads"]["mini_choice acc"]["parts"] == 24
    assert {**benchmark, "harness": "", "error": 0} == {
        "task": "mini_choice", "metric": "acc", "harness": "", "version": "1.5", "dataset": "", "samples": 24,
        "shots": 0, "chat": False, "error": 0,
    }  # fmt: skip
    assert benchmark["harness"].startswith("lm_eval ") and benchmark["error"] > 0
    card = (folders / "out/README.md").read_text()
    (model,) = yaml.safe_load(card.split("---")[1])["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "mini_choice", "type": "unknown"}
    assert [one["name"] for one in result["metrics"]] == ["acc", "acc_norm"]
    assert model["results"][0]["metrics"][0]["value"] == metrics["mini_choice acc"]["gptq"]
    assert "mini_choice acc" in (folders / "out/report.html").read_text()
    ours = json.loads((folders / "out/quantize_config.json").read_text())["meta"]["gptq_plugin"]
    assert ours["metrics"] == metrics and ours["benchmarks"] == stored["benchmarks"] and "files" in ours
    assert str(folders) not in card + json.dumps(stored) + json.dumps(ours)  # no path of this machine
    assert (folders / "out/model.safetensors").read_bytes() == weights
    assert (folders / "out/config.json").read_bytes() == plain
    assert main(["check", str(folders / "out")]) == 0
    assert {file.name for file in (folders / "out").iterdir()} == set(ours["files"])


def test_a_task_that_is_not_known_is_refused_before_a_model_is_loaded(folders, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("gptq_plugin.load_quantized", None)
    without_the_harness_own_tasks(monkeypatch)
    assert run(folders, tasks="mini_choice,no_such_task") == 1
    assert "lm-eval knows no task no_such_task: `lm-eval ls tasks`" in capsys.readouterr().err


def test_without_the_harness_the_extra_is_named(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert run(folders) == 1
    assert "pip install 'gptq-plugin[eval]'" in capsys.readouterr().err


def test_an_export_without_a_report_is_refused_before_anything_runs(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptq_plugin.apps.benchmarks.run_benchmarks", None)
    shutil.copytree(folders / "out", tmp_path / "out")
    (tmp_path / "out/quantization_report.json").unlink()
    assert main(["eval", str(tmp_path / "out"), "--tasks", "x"]) == 1
    assert "has no report of this version" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--limit", "2"]])
def test_what_is_no_checkpoint_is_told_as_by_push_and_never_asked_of_the_hub(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptq_plugin.apps.benchmarks.run_benchmarks", None)
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("owner/name", "owner/name is not a folder"),
        ("empty", "so it is no quantized checkpoint"),
    ):
        monkeypatch.chdir(tmp_path)
        told = []
        for call in (["eval", folder, "--tasks", "x", *options], ["push", folder, "me/x"]):
            assert main(call) == 1
            told.append(capsys.readouterr().err.partition(": ")[2])
        assert message in told[0] and told[0] == told[1]


def test_a_table_has_a_line_for_each_metric_and_no_change_without_the_float_model():
    known = BenchmarkResult(
        Benchmark("a", "acc", "h", samples=9, error=0.1), 0.5, 0.25, Spread(-0.3, -0.2, -0.6, -0.4, 9)
    )
    alone = BenchmarkResult(Benchmark("b", "acc", "h", samples=7), math.nan, 0.25)
    head, first, second = shown_results({"a acc": known, "b acc": alone})
    assert " ".join(first.split()) == "a acc 0.5 0.25 (± 0.1 s.e.) -0.25 ± 0.05 -50.00 ± 10.00 % 9"
    assert second.split() == ["b", "acc", "0.25", "7"] and head.split()[:2] == ["float", "quantized"]
    assert shown_results({}) == ["the tasks gave no metric"]
