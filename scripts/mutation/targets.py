"""The modules to mutate, and the tests nearest to each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_SOURCE = REPOSITORY / "src" / "gptq_plugin"
_FOLDERS = ("gptq", "walk", "layers")
_MODULES = ("calibration/positions.py", "training/quality_gate.py")


@dataclass(frozen=True)
class Target:
    """A module.

    Attributes:
        name: As it is imported.
        file: Its source.
        tests: What pytest is given.
    """

    name: str
    file: Path
    tests: list[str]

    @property
    def short(self) -> str:
        """Its name without the package's."""
        return self.name.removeprefix("gptq_plugin.")


def targets() -> list[Target]:
    files = [file for folder in _FOLDERS for file in sorted((_SOURCE / folder).glob("*.py"))]
    files += [_SOURCE / module for module in _MODULES]
    found = [_target(file.parent.name, file) for file in files if file.name != "__init__.py"]
    plain = ("plain_solve.py", "reference.py")
    return [*found, *(_target("kernels", REPOSITORY / "kernels" / "gptq_triton" / name) for name in plain)]


def _target(folder: str, file: Path) -> Target:
    elsewhere = re.search(r"^Tested by (\S+?\.py)\b", file.read_text(encoding="utf-8"), re.MULTILINE)
    nearest = REPOSITORY / "tests" / folder
    found = [nearest / f"test_{file.stem}.py", *sorted(nearest.glob(f"test_{file.stem}_*.py"))]
    tests = [elsewhere[1]] if elsewhere else [str(test.relative_to(REPOSITORY)) for test in found]
    return Target(f"gptq_plugin.{folder}.{file.stem}", file, tests)
