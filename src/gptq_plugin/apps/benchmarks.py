"""Benchmarks of an export through EleutherAI's lm-evaluation-harness: ``gptq-plugin eval``.

The harness runs the model that `load_quantized` gives, and the float model beside it, on the same samples. Where a
metric is the mean of a value for each sample, the two are compared sample by sample, as a run's validation is.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.benchmark_results import BenchmarkResult, with_results
from gptq_plugin.options import fields
from gptq_plugin.report.benchmark import Benchmark
from gptq_plugin.report.figures import metric_values
from gptq_plugin.report.model_card import hub_id
from gptq_plugin.report.numbers import align, format_value
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.paired import Measured, spread

_TOLERANCE = 1e-6  # between the harness' mean and that of its samples


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        tasks: Names of tasks or groups that the harness knows.
        include_path: Folder with more of them, as YAML.
        shots: Examples before each sample; None takes each task's own number.
        limit: Samples of each task at most; None takes all.
        batch_size: Samples that run together.
        device: As torch names it.
        chat: Apply the tokenizer's chat template.
    """

    tasks: Sequence[str]
    include_path: str | None = None
    shots: int | None = None
    limit: int | None = None
    batch_size: int = 1
    device: str = "cpu"
    chat: bool = False


@dataclass(frozen=True)
class _Value:
    """A metric of one model; `Measured` if it is the mean of the samples'."""

    value: float
    benchmark: Benchmark = field(compare=False)


def run_benchmarks(directory: Path, float_dir: str | None, request: Request) -> dict[str, BenchmarkResult]:
    """Evaluates an export, and the float model if its folder or id is given.

    Args:
        directory: The export, with a tokenizer.
        float_dir: What `from_pretrained` loads; None evaluates the export alone.
        request: What to evaluate.

    Returns:
        By name (``TASK METRIC``), the results.

    Raises:
        ModuleNotFoundError: The harness is not installed.
        ValueError: It does not know a task.
        CheckpointError: The export cannot be loaded, or has no tokenizer.
    """
    from gptq_plugin import load_quantized

    harness = _Harness(request, _tokenizer(directory))
    quantized = harness.evaluate(lambda: load_quantized(directory, device=request.device))
    floats: Mapping[str, _Value] = {}
    if float_dir is not None:
        floats = harness.evaluate(lambda: _float_model(float_dir, request.device))
    results = {}
    for name, after in quantized.items():
        before = floats[name].value if name in floats else math.nan
        results[name] = BenchmarkResult(after.benchmark, float(before), float(after.value), spread(before, after.value))
    return results


def shown_results(results: Mapping[str, BenchmarkResult]) -> list[str]:
    """The lines of a table."""
    if not results:
        return ["the tasks gave no metric"]
    rows = [("", "float", "quantized", "change", "", "samples")]
    values = {
        one.metric: one
        for one in metric_values(with_results(QuantizeReport(QuantizeConfig()), results))
        if one.model != "float"
    }
    for name, result in results.items():
        change = values[name].shown if name in values else ("", "")
        after = format_value(result.after) + (
            "" if math.isnan(result.benchmark.error) else f" (± {result.benchmark.error:.2g} s.e.)"
        )
        rows.append((name, format_value(result.before), after, *change, str(result.benchmark.samples)))
    return align(rows)


def _float_model(name_or_path: str, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(name_or_path, dtype="auto")
    return model.to(device)


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    from gptq_plugin.options.limited_files import check_sizes

    check_sizes(directory)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no tokenizer that loads: export with one ({error})") from error


class _Harness:
    """lm-eval with a request's tasks.

    Args:
        request: What to evaluate.
        tokenizer: Of both models.

    Raises:
        ModuleNotFoundError, ValueError: See `run_benchmarks`.
    """

    def __init__(self, request: Request, tokenizer: Any) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"gptq-plugin eval needs the lm-evaluation-harness ({error}): pip install 'gptq-plugin[eval]'"
            ) from error
        self._request, self._tokenizer = request, tokenizer
        self._manager = TaskManager(include_path=request.include_path)
        unknown = [task for task in request.tasks if not self._manager.match_tasks([task])]
        if unknown:
            raise ValueError(f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")

    def evaluate(self, load: Callable[[], Any]) -> dict[str, _Value]:
        """Loads a model, evaluates it, and lets go of it."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        request = self._request
        model = HFLM(pretrained=load(), tokenizer=self._tokenizer, batch_size=request.batch_size)
        found = simple_evaluate(
            model,
            tasks=list(request.tasks),
            num_fewshot=request.shots,
            limit=request.limit,
            task_manager=self._manager,
            log_samples=True,
            apply_chat_template=request.chat,
        )
        del model
        gc.collect()
        return dict(_values(found, request.chat))


def _values(found: Mapping[str, Any], chat: bool) -> Iterator[tuple[str, _Value]]:
    """Every metric of every task and group, by name."""
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not fields.is_number(value):
                continue
            shown = metric if kind == "none" else f"{metric} ({kind})"
            benchmark = Benchmark(
                task,
                shown,
                harness=f"lm_eval {found['lm_eval_version']}",
                version=str(found["versions"].get(task, "")),
                dataset=hub_id(found["configs"].get(task, {}).get("dataset_path")) or "",
                samples=_samples(found, task),
                shots=found["n-shot"].get(task, -1),
                chat=chat,
                error=_error(results.get(f"{metric}_stderr,{kind}")),
            )
            yield f"{task} {shown}", _Value(_by_sample(found, task, metric, kind, float(value)), benchmark)


def _error(value: Any) -> float:
    return float(value) if fields.is_number(value) else math.nan


def _samples(found: Mapping[str, Any], task: str) -> int:
    counts = found["n-samples"]
    return sum(counts[one]["effective"] for one in (task, *found["group_subtasks"].get(task, ())) if one in counts)


def _by_sample(found: Mapping[str, Any], task: str, metric: str, kind: str, value: float) -> float:
    """The value with those of the samples, if it is their mean."""
    samples = [one for one in found["samples"].get(task, ()) if one["filter"] == kind]
    values = [one.get(metric) for one in samples]
    if not samples or not all(map(fields.is_number, values)):
        return value
    keys = [int(one["doc_hash"], 16) for one in samples]
    mean = Measured.mean([float(one) for one in values], [1.0] * len(values), keys)
    return mean if math.isclose(mean, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) else value
