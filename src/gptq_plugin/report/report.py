"""The report of a quantization: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.report.allocation import Allocation
from gptq_plugin.report.benchmark import Benchmark
from gptq_plugin.report.cache import cache_summary
from gptq_plugin.report.coverage import Coverage
from gptq_plugin.report.deviations import Deviation, grouped
from gptq_plugin.report.finish_record import FinishRecord
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.numbers import align, format_bits_per_weight, format_bytes
from gptq_plugin.report.spread import Spread
from gptq_plugin.report.table import layer_table


@dataclass(frozen=True)
class ExportSize:
    """Bytes of an export's safetensors files.

    Attributes:
        bytes: Of the files.
        float_bytes: Of the tensors that belong to no quantized weight: embeddings, norms, biases, float layers.
    """

    bytes: int
    float_bytes: int


@dataclass
class QuantizeReport:
    """The record of a model's quantization.

    Attributes:
        config: The request.
        modules: Every linear layer, quantized or not.
        samples: Calibration samples used, over all ranks.
        tokens: Calibration tokens used, over all ranks: the largest number in any layer's Hessian.
        batch_size: The most calibration samples that ran in one forward, on any rank; 0 without calibration.
        seconds: Wall-clock seconds by phase.
        deviations: Differences from the request that concern no single module.
        calibration: Source of the samples, in a few words; empty if unknown.
        calibration_sha256: Digest of the samples (`batches.digest`); empty without samples.
        run_id: The training run's id, else a random one. Empty without calibration.
        float_checkpoint: Path of the float weights that training saved; empty if it did not.
        coverage: The planned division into quantized and float parameters; None if not computed.
        size: The export's size; None without an export.
        positions: How padding was told from positions that count: by the name of each mask that hides some, a sentence.
        allocation: What `target_bits` chose, and why; None without it.
        cache: With `cache_dir`, what was taken from earlier runs and what was not; see `cache_summary`.
        finish: What training the quantized model towards the float one gave; None without that.
        metrics: Results of the user's evaluation by metric, such as ``val_loss``: ``{"float": 2.31, "gptq": 2.33}``.
        spreads: How well their changes are known, by metric; those of which that can be told.
        benchmarks: How those were measured that a benchmark gave, by metric.
    """

    config: QuantizeConfig
    modules: list[ModuleReport] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    batch_size: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    deviations: list[str] = field(default_factory=list)
    calibration: str = ""
    calibration_sha256: str = ""
    run_id: str = ""
    float_checkpoint: str = ""
    coverage: Coverage | None = None
    size: ExportSize | None = None
    positions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    allocation: Allocation | None = None
    cache: dict[str, int] = field(default_factory=dict)
    finish: FinishRecord | None = None

    @property
    def quantized(self) -> list[ModuleReport]:
        return [module for module in self.modules if module.method != "float"]

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(module.weights for module in self.quantized)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the codes, scales and zeros in the export; see `checkpoint.sizes.stored_bytes`."""
        return sum(module.stored_bytes for module in self.quantized)

    @property
    def float_share(self) -> float:
        """Share of the export's bytes that is float, g_idx left out; as planned if nothing was exported. NaN without
        either."""
        if self.size is not None and self.size.float_bytes + self.stored_bytes:
            return self.size.float_bytes / (self.size.float_bytes + self.stored_bytes)
        return math.nan if self.coverage is None else self.coverage.exported_share

    @property
    def bits_per_weight(self) -> float:
        """`stored_bytes` as bits, averaged over the quantized weights; NaN without any."""
        return 8 * self.stored_bytes / self.weights if self.weights else math.nan

    def note(self, coverage: Coverage, allocation: Allocation | None) -> None:
        """Takes in what stays float and how the grids were chosen; notes if the layers quantized take more than
        `target_bits` allows, since the pass left others float."""
        self.coverage, self.allocation = coverage, allocation
        if allocation is not None:
            self.seconds = {"allocate": allocation.seconds, **self.seconds}
            if self.bits_per_weight > allocation.target_bits:
                self.deviations.append(
                    f"the quantized layers take {self.bits_per_weight:.4g} bits per weight, more than "
                    f"target_bits={allocation.target_bits:g}: layers that were to take fewer stayed float in the pass"
                )

    def all_deviations(self) -> Iterator[str]:
        """Yields every deviation as a sentence that names its module."""
        yield from self.deviations
        for module in self.modules:
            for deviation in module.deviations:
                yield f"{module.name}: {deviation}"

    def grouped_deviations(self) -> list[Deviation]:
        """The deviations for people: one of each kind, with the modules that share it."""
        return grouped(self.deviations, {module.name: module.deviations for module in self.modules})

    def deviation_lines(self) -> list[str]:
        """`grouped_deviations` as lines."""
        return [deviation.line for deviation in self.grouped_deviations()]

    def totals(self) -> dict[str, float]:
        """The whole model's losses, counts and seconds, for loggers."""
        solved = [m for m in self.quantized if not math.isnan(m.loss)]
        loss, rtn_loss = sum(m.loss for m in solved), sum(m.rtn_loss for m in solved)
        return {
            "modules": len(self.quantized),
            "modules_float": len(self.modules) - len(self.quantized),
            "modules_rtn": sum(m.method == "rtn" for m in self.modules),
            "weights": self.weights,
            "samples": self.samples,
            "tokens": self.tokens,
            "loss": loss,
            "rtn_loss": rtn_loss,
            "deviations": len(list(self.all_deviations())),
            "seconds": self.seconds.get("total", sum(self.seconds.values())),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values; unknown figures (NaN) are None, so that the JSON is standard."""
        values = {
            "config": self.config.to_dict(),
            "totals": self.totals(),
            "seconds": self.seconds,
            "batch_size": self.batch_size,
            "calibration": self.calibration,
            "calibration_sha256": self.calibration_sha256,
            "run_id": self.run_id,
            "float_checkpoint": self.float_checkpoint,
            "size": None if self.size is None else dataclasses.asdict(self.size),
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "positions": self.positions,
            "metrics": self.metrics,
            "spreads": {name: dataclasses.asdict(spread) for name, spread in self.spreads.items()},
            "benchmarks": {name: dataclasses.asdict(one) for name, one in self.benchmarks.items()},
            "allocation": None if self.allocation is None else dataclasses.asdict(self.allocation),
            "cache": self.cache,
            "finish": None if self.finish is None else dataclasses.asdict(self.finish),
            "deviations": self.deviations,
            "modules": [{**vars(m), "relative_error": m.relative_error} for m in self.modules],
        }
        plain: dict[str, Any] = without_nan(values)
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def table(self) -> str:
        """One line per module, then totals, coverage and deviations."""
        lines = layer_table(self.modules)
        totals = self.totals()
        ratio = f", {totals['loss'] / totals['rtn_loss']:.3f} of round-to-nearest's" if totals["rtn_loss"] else ""
        lines.append(
            f"{totals['modules']} modules quantized, {totals['modules_float']} left float; "
            + (
                f"{format_bytes(self.stored_bytes)}, {format_bits_per_weight(self.bits_per_weight)}; "
                if self.weights
                else ""
            )
            + f"{self.samples} samples, {self.tokens} tokens; loss {totals['loss']:.4g}{ratio}; "
            + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        )
        lines += [self.coverage.summary()] if self.coverage is not None else []
        lines += [] if self.allocation is None else [self.allocation.summary(), *align(self.allocation.rows())]
        lines += filter(None, [cache_summary(self.cache)])
        lines += [] if self.finish is None else [self.finish.summary(), *align(self.finish.rows())]
        lines += [f"! {deviation}" for deviation in self.deviation_lines()]
        return "\n".join(lines)


def without_nan(value: Any) -> Any:
    """Plain values for JSON: tuples as lists, and NaN and infinity as None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
