"""What came of campaigns: printed, and as rows of docs/campaigns.md."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from campaigns.campaign import FAULT, OK, REFUSED
from campaigns.processes import Ended

_HEAD = "| campaign | attacked | cases | attempts | ok | refused | faults | seconds | seed | commit | date |"
_RULE = "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"


@dataclass
class Result:
    """Of one campaign.

    Attributes:
        name, about, seed: The campaign.
        commit: Of the code.
        seconds: It took.
        cases: How many ended.
        counts: Of attempts, by kind of outcome.
        faulty: The cases with faults.
    """

    name: str
    about: str
    seed: int
    commit: str
    seconds: float = 0
    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faulty: list[Ended] = field(default_factory=list)

    def add(self, case: Ended) -> None:
        self.cases += 1
        self.counts.update(outcome.kind for outcome in case.outcomes)
        if case.faults:
            self.faulty.append(case)

    @property
    def row(self) -> str:
        counts = [sum(self.counts.values()), *(self.counts[kind] for kind in (OK, REFUSED, FAULT))]
        cells = [self.name, self.about, self.cases, *counts, f"{self.seconds:.0f}", self.seed, self.commit, _today()]
        return f"| {' | '.join(map(str, cells))} |"


def faults(name: str, seed: int, case: Ended) -> str:
    """A case's faults, with the command that runs it again."""
    again = f"python scripts/campaign.py {name} --seed {seed} --only {case.number}"
    lines = [f"FAULT {again}   # {case.what}"]
    return "\n".join([*lines, *(f"  {fault.attempt}: {fault.text}" for fault in case.faults)])


def table(results: list[Result]) -> str:
    return "\n".join([_HEAD, _RULE, *(result.row for result in results)])


def into_page(page: Path, new: list[str]) -> None:
    """Puts rows into a page's table, in place of those of the same campaigns."""
    before, rule, rows = page.read_text(encoding="utf-8").partition(f"{_RULE}\n")
    if not rule:
        raise ValueError(f"{page} has no table of campaigns")
    lines = rows.splitlines()
    end = next((at for at, line in enumerate(lines) if not line.startswith("|")), len(lines))
    kept = {line.split("|")[1].strip(): line for line in [*lines[:end], *new]}
    page.write_text("\n".join([before + rule.rstrip(), *kept.values(), *lines[end:], ""]), encoding="utf-8")


def commit() -> str:
    """The revision of the repository around this file, and whether it has changes; empty without one, or git."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', '--short', 'HEAD')}{' and changes' if changed else ''}"


def _today() -> str:
    return datetime.date.today().isoformat()
