"""quantization_report.json: a report and the facts of its model as text, `report_text`, and back, `read_report`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.options.limited_files import parse_json
from gptq_plugin.report.allocation import Allocation, UnitChoice
from gptq_plugin.report.base_card import License
from gptq_plugin.report.benchmark import Benchmark
from gptq_plugin.report.coverage import Coverage, FloatWeight
from gptq_plugin.report.finish_record import BlockRecord, FinishRecord, Judgement
from gptq_plugin.report.model_card import ModelFacts
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import ExportSize, QuantizeReport
from gptq_plugin.report.spread import Spread

_Record = TypeVar("_Record")


def report_text(report: QuantizeReport, facts: ModelFacts) -> str:
    """`QuantizeReport.to_dict` as JSON, with the facts under ``model``."""
    model = {**dataclasses.asdict(facts), "dtype": str(facts.dtype).removeprefix("torch.")}
    return json.dumps({**report.to_dict(), "model": model}, indent=2, allow_nan=False)


def read_report(text: str) -> tuple[QuantizeReport, ModelFacts]:
    """The inverse of `report_text`; figures that are no finite number come back as NaN.

    Raises:
        ValueError: The text is no report of this version.
    """
    try:
        values = parse_json(text)
        return _of_its_kinds(_report(values)), _facts(values["model"])
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"no report of this version: {error!r}") from error


def _report(values: Mapping[str, Any]) -> QuantizeReport:
    texts = ("calibration", "calibration_sha256", "run_id", "float_checkpoint")
    as_they_are = ("deviations", *texts, "positions", "cache")
    return QuantizeReport(
        config=QuantizeConfig.from_dict(values["config"]),
        modules=[_module(module) for module in values["modules"]],
        samples=values["totals"]["samples"],
        tokens=values["totals"]["tokens"],
        batch_size=values["batch_size"],
        seconds=_numbers(values["seconds"]),
        coverage=_coverage(values["coverage"]),
        size=None if values["size"] is None else _of_its_kinds(ExportSize(**values["size"])),
        allocation=_allocation(values["allocation"]),
        finish=_finish(values["finish"]),
        metrics={name: _numbers(metric) for name, metric in values["metrics"].items()},
        spreads={
            name: _of_its_kinds(Spread(**_numbers(one, "parts", "unit", "why")))
            for name, one in values["spreads"].items()
        },
        benchmarks={name: _benchmark(one) for name, one in values["benchmarks"].items()},
        **{name: values[name] for name in as_they_are},
    )


def _benchmark(values: Mapping[str, Any]) -> Benchmark:
    return _of_its_kinds(Benchmark(**{**values, "error": _number(values["error"])}))


def _module(values: Mapping[str, Any]) -> ModuleReport:
    fields = {field.name: values[field.name] for field in dataclasses.fields(ModuleReport)}
    for field in dataclasses.fields(ModuleReport):
        if field.type == "float":
            fields[field.name] = _number(fields[field.name])
    fields = {**fields, "shape": tuple(fields["shape"]), "deviations": tuple(fields["deviations"])}
    return _of_its_kinds(ModuleReport(**fields))


def _coverage(values: Mapping[str, Any] | None) -> Coverage | None:
    if values is None:
        return None
    floats = [_of_its_kinds(FloatWeight(**{**one, "shape": tuple(one["shape"])})) for one in values["floats"]]
    return _of_its_kinds(Coverage(floats, values["quantized_bytes"], values["packed_bytes"]))


def _allocation(values: Mapping[str, Any] | None) -> Allocation | None:
    if values is None:
        return None
    units = [
        _of_its_kinds(
            UnitChoice(**{**one, "divergence": _number(one["divergence"]), "measured": _numbers(one["measured"])})
        )
        for one in values["units"]
    ]
    figures = {name: _number(values[name]) for name in ("target_bits", "bits", "seconds")}
    return _of_its_kinds(Allocation(**{**values, **figures, "units": units}))


def _finish(values: Mapping[str, Any] | None) -> FinishRecord | None:
    if values is None:
        return None
    curve = [
        _of_its_kinds(Judgement(**{**one, **{name: _number(one[name]) for name in ("training", "held_out")}}))
        for one in values["curve"]
    ]
    blocks = tuple(
        _of_its_kinds(BlockRecord(**{**one, **{name: _number(one[name]) for name in ("before", "after")}}))
        for one in values.get("blocks", ())  # reports of earlier versions have none
    )
    figures = {name: _number(values[name]) for name in ("before", "after", "seconds")}
    return _of_its_kinds(FinishRecord(**{**values, **figures, "curve": curve, "blocks": blocks}))


def _facts(values: Mapping[str, Any]) -> ModelFacts:
    dtype, known = getattr(torch, values["dtype"]), values["base_license"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{values['dtype']} is no dtype")
    license = None if known is None else _of_its_kinds(License(**known))
    return _of_its_kinds(ModelFacts(**{**values, "dtype": dtype, "base_license": license}))


def _numbers(values: Mapping[str, Any], *counts: str) -> dict[str, Any]:
    """Figures by name; those named in `counts` as they are."""
    return {name: value if name in counts else _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    """The value of a figure; anything but None and numbers stays, to be refused."""
    return math.nan if value is None else float(value) if type(value) is int else value


def _of_its_kinds(record: _Record) -> _Record:
    """The record, if its fields are of the kinds that its class declares: a stranger's file may hold others.

    Raises:
        TypeError: One is not.
    """
    for name, kind in get_type_hints(type(record)).items():
        type_validator(name, getattr(record, name), kind)
    return record
