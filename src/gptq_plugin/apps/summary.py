"""The results of a run as a readable table and as JSON, and the runs of a sweep side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.report.numbers import align
from gptq_plugin.report.spread import Spread

SUMMARY = "summary.json"


class Clock:
    """Wall-clock seconds by phase, in the order the phases ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves part of one phase's time to another phase."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds


@dataclass
class Summary:
    """One run of gptq-finetune or gptq-quantize.

    Attributes:
        bits: Width of a code; with `target_bits` the most common one.
        group_size: Channels a group, or -1.
        nll: Mean negative log-likelihood in nats by model: ``float``, ``rtn`` (round-to-nearest), ``gptq``.
            Empty if nothing was evaluated.
        windows: Number of windows it was measured on, and tokens in each.
        spread: How well GPTQ's difference from the float model is known, by the windows; None if that cannot be told.
        float_bytes: Size of the float weights as safetensors store them, in `float_dtype`.
        float_dtype: Dtype of the float weights.
        gptq_bytes: Size of the exported safetensors files.
        seconds: Time by phase.
        files: Path by content.
        prompt: The beginning of the first window.
        text: The exported model's continuation of it.
        deviations: Differences from what was requested, a sentence each.
        next_command: A command to try.
        bits_per_weight: Average with scales and zeros, where `target_bits` gave layers widths of their own; else None.
    """

    bits: int
    group_size: int
    float_bytes: int
    float_dtype: str
    gptq_bytes: int
    nll: dict[str, float] = field(default_factory=dict)
    windows: tuple[int, int] = (0, 0)
    spread: Spread | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    text: str = ""
    deviations: list[str] = field(default_factory=list)
    next_command: str = ""
    bits_per_weight: float | None = None

    def write(self, directory: Path) -> None:
        """Writes ``summary.json``."""
        (directory / SUMMARY).write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")

    def table(self) -> str:
        """Returns the summary as text."""
        width = f"{self.bits} bits" if self.bits_per_weight is None else f"{self.bits_per_weight:.2f} bits per weight"
        names = {"float": "float", "rtn": f"round-to-nearest, {width}", "gptq": f"GPTQ, {width}"}
        sizes = {
            "float": f"{_megabytes(self.float_bytes)} ({self.float_dtype})",
            "gptq": _megabytes(self.gptq_bytes),
        }
        measured = ("perplexity", "mean NLL", "above float") if self.nll else ()
        rows = [("model", *measured, "weights on disk")]
        for key, name in names.items():
            if key in self.nll or key in sizes:
                rows.append((name, *(self._nll_cells(key) if self.nll else ()), sizes.get(key, "")))
        lines = align(rows)
        lines.insert(1, "-" * max(map(len, lines)))
        if self.float_dtype == "float32":
            lines.append(f"(At 16 bits the float weights would take {_megabytes(self.float_bytes // 2)}.)")
        if self.nll:
            lines.append("")
            lines.append(f"Measured on {self.windows[0]} held-out windows of {self.windows[1]} tokens; the GPTQ model")
            lines.append("was reloaded from its files in a new process.")
            if self.spread is not None:
                lines.append(f"±: the 95 % interval of a paired bootstrap over {self.spread.parts} windows.")
        if self.text:
            lines.append(f"It continues  {_one_line(self.prompt)}")
            lines.append(f"with          {_one_line(self.text)}")
        lines.append("")
        lines += align([("seconds", *self.seconds), ("", *(f"{s:.1f}" for s in self.seconds.values()))])
        lines.append("")
        lines += align([(what, where) for what, where in self.files.items()], numeric=False)
        lines += [f"! {deviation}" for deviation in self.deviations]
        if self.next_command:
            lines += ["", "Try next:", f"  {self.next_command}"]
        return "\n".join(lines)

    def _nll_cells(self, key: str) -> tuple[str, str, str]:
        if key not in self.nll:
            return "", "", ""
        above = f"{self.nll[key] - self.nll['float']:+.5f}" if "float" in self.nll and key != "float" else ""
        known = f" ± {self.spread.margin:.2g}" if key == "gptq" and self.spread is not None else ""
        return _perplexity(self.nll[key]), f"{self.nll[key]:.5f}", above + known


class SweepTable(Callback):
    """Hydra callback: at the end of a multirun (``-m``), puts its runs side by side in one table.

    Reads the runs' ``summary.json``, so it works with every launcher. Rank 0 prints the table and writes it to
    ``sweep.txt`` in the sweep's folder.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.rank() > 0:
            return
        directory = Path(config.hydra.sweep.dir)
        table = sweep_table(directory)
        if table:
            (directory / "sweep.txt").write_text(table + "\n", encoding="utf-8")
            print(f"\n{table}\n\n{directory.resolve()}")


def sweep_table(directory: Path) -> str:
    """Returns a table of the runs below `directory`, in the order they were started; empty if there are none."""
    rows = []
    for file in sorted(directory.glob(f"*/{SUMMARY}"), key=lambda file: _run_number(file.parent.name)):
        run = json.loads(file.read_text(encoding="utf-8"))
        overrides = file.parent / ".hydra" / "overrides.yaml"
        lines = overrides.read_text(encoding="utf-8").splitlines() if overrides.exists() else []
        name = ", ".join(line[2:] for line in lines)
        nll, saved = run["nll"], f"{_megabytes(run['gptq_bytes'])} of {_megabytes(run['float_bytes'])}"
        perplexities = [_perplexity(nll.get(key)) for key in ("float", "rtn", "gptq")]
        rows.append(
            (file.parent.name, name, *perplexities, _difference(nll), saved, f"{sum(run['seconds'].values()):.0f}")
        )
    if not rows:
        return ""
    shared = set.intersection(*(set(row[1].split(", ")) for row in rows)) if len(rows) > 1 else set()
    rows = [(row[0], ", ".join(o for o in row[1].split(", ") if o not in shared), *row[2:]) for row in rows]
    head = ("run", "overrides", "float ppl", "RTN ppl", "GPTQ ppl", "above float", "weights on disk", "s")
    lines = align([head, *rows])
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def weights_size(network: nn.Module) -> tuple[int, str]:
    """Returns the bytes of the network's weights in safetensors (tied ones once), and their dtype."""
    parameters = list(network.parameters())  # yields shared parameters once
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters), "/".join(dtypes)


def files_size(directory: Path) -> int:
    """Returns the bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _difference(nll: dict[str, float]) -> str:
    return f"{nll['gptq'] - nll['float']:+.5f}" if "gptq" in nll and "float" in nll else ""


def _perplexity(nll: float | None) -> str:
    return "" if nll is None else f"{math.exp(min(nll, 700)):.3f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _one_line(text: str, most: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _run_number(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdigit() else (1 << 30, name)
