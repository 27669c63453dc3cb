"""What came of the mutants: printed, and as docs/mutation.md."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

LEAST = 0.95  # share of mutants that must die
_REASONS = Path(__file__).with_name("reasons.yaml")

_HEAD = """# Mutation tests

A mutant is the source with one small change: another operator, number or constant, an argument left out or None, a
condition negated, a call left out. A mutant dies when a test fails, or when its tests never end. One that survives
shows a line that tests run and do not look at, or a change that changes nothing.

`python scripts/mutate.py` makes the mutants of the modules below, runs on each those of the nearest tests that call the
changed function, and writes this page.
At least {least:.0%} must die, and each survivor must have a reason in `scripts/mutation/reasons.yaml`; else it ends
with status 1. With modules' names it only prints what came of those. `--longest SECONDS` leaves out slow tests, with
which more mutants may survive (the solver and QuantLinear were measured so, without tests above 3 or 6 seconds).

**{share:.1%}** of the mutants die: {died} of {mutants}. Measured on the CPU: {machines}.

The operators are mutmut's ({mutmut}), and two of ours: conditions are negated, and calls whose value is not used are
left out. The runner is ours: mutmut's passes over decorated functions and the top level of modules, cannot leave out
messages by rule, and derives a module's name from its file's, which does not hold for `kernels/`. Not mutated, since no
test should depend on it:

- text for people: docstrings, f-strings, strings with a space, arguments of what is raised, `__repr__`, `extra_repr`,
  debug messages and the names of loggers;
- types: annotations and aliases;
- imports, decorators, and `strict=` of zip;
- what only a GPU runs: conditions with `.is_cuda`, and what they guard (the tests marked `gpu` are theirs).
"""


class Survivor(NamedTuple):
    """A mutant that no test noticed: its line, and the change as text."""

    line: int
    change: str


@dataclass(frozen=True)
class Result:
    """Of one module.

    Attributes:
        module: Its name without the package's.
        machine: When, where and with what it was measured.
        seconds: What its tests take without a mutant.
        killed, timeout: How many a test noticed, and how many never ended.
    """

    module: str
    machine: str
    seconds: float
    killed: int
    timeout: int
    survivors: list[Survivor]

    @property
    def mutants(self) -> int:
        return self.killed + self.timeout + len(self.survivors)

    @property
    def share(self) -> float:
        return (self.killed + self.timeout) / max(1, self.mutants)


def are_good(results: Sequence[Result]) -> bool:
    """Whether enough mutants died, and every survivor has a reason."""
    died, mutants = sum(r.killed + r.timeout for r in results), sum(r.mutants for r in results)
    return died >= LEAST * mutants and all(reason_of(r.module, one) for r in results for one in r.survivors)


def reason_of(module: str, survivor: Survivor) -> str | None:
    """Why no test can notice it, or none should."""
    return _reasons().get(module, {}).get(survivor.change)


@cache
def _reasons() -> dict[str, dict[str, str]]:
    """By module and change. The file has, by module, a list of {reason, changes}."""
    import yaml

    told = yaml.safe_load(_REASONS.read_text(encoding="utf-8")) or {}
    return {
        module: {change: one["reason"] for one in groups for change in one["changes"]}
        for module, groups in told.items()
    }


def machine(processes: int) -> str:
    return (
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} CPU cores, {processes} processes, "
        f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    )


def read(file: Path) -> dict[str, Result]:
    """The results in a file, by module."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    results = [Result(**{**one, "survivors": [Survivor(*two) for two in one["survivors"]]}) for one in kept]
    return {result.module: result for result in results}


def keep(file: Path, result: Result) -> None:
    """Writes a result to a file, beside those of other modules."""
    kept = {**read(file), result.module: result}
    file.write_text(json.dumps([dataclasses.asdict(one) for one in kept.values()], indent=1), encoding="utf-8")


def told(module: str, survivor: Survivor) -> str:
    known = "known" if reason_of(module, survivor) else "NO REASON"
    return f"  {known} {module}:{survivor.line} {survivor.change}"


def summary(result: Result) -> str:
    counts = (
        f"{result.module}: {result.killed + result.timeout} of {result.mutants} mutants died ({result.share:.1%}; "
        f"{result.timeout} of them never ended), {len(result.survivors)} survived; "
        f"tests without a mutant: {result.seconds:.1f} s"
    )
    unneeded = set(_reasons().get(result.module, {})) - {one.change for one in result.survivors}
    return "\n".join([counts, *(f"  reason no longer needed: {change}" for change in sorted(unneeded))])


def page(results: Sequence[Result], modules: Iterable[str]) -> str:
    """docs/mutation.md; `modules` that have no result are named."""
    missing = sorted(set(modules) - {result.module for result in results})
    died, mutants = (sum(counts) for counts in zip(*((r.killed + r.timeout, r.mutants) for r in results)))
    rows = [
        f"| {r.module} | {r.mutants} | {r.killed} | {r.timeout} | {len(r.survivors)} | {r.share:.1%} |" for r in results
    ]
    return "\n".join(
        [
            _HEAD.format(
                least=LEAST,
                share=died / mutants,
                died=died,
                mutants=mutants,
                machines="; ".join(sorted({result.machine for result in results})),
                mutmut=importlib.metadata.version("mutmut"),
            ),
            "| module | mutants | killed | never ended | survived | died |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            f"| all | {mutants} | {sum(r.killed for r in results)} | {sum(r.timeout for r in results)} | "
            f"{mutants - died} | {died / mutants:.1%} |",
            *([f"\nNot measured: {', '.join(missing)}."] if missing else []),
            "\n## Survivors\n\nBy module, why no test notices them, and which they are: "
            "the line, the function, and the change in braces.",
            *(_survivors(result) for result in results if result.survivors),
            "",
        ]
    )


def _survivors(result: Result) -> str:
    by_reason: dict[str, list[Survivor]] = {}
    for one in result.survivors:
        by_reason.setdefault(reason_of(result.module, one) or "No reason yet.", []).append(one)
    lines = [f"\n### {result.module}\n"]
    for reason, survivors in by_reason.items():
        lines += [f"- {reason}", *(f"  - {one.line} `{one.change}`" for one in survivors)]
    return "\n".join(lines)
