"""Where an export comes from, for its ``meta``; and nothing that says whose machine made it.

Exports are published: no path, user or host name may enter one, neither here nor in the report beside it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

from gptq_plugin.config import QUANTIZER_NAME, package_version
from gptq_plugin.report.report import QuantizeReport

_LIBRARIES = ("torch", "transformers", "lightning", "pytorch_lightning")  # named if they are in this process
_START = r"(?:(?<=[\s'\"(=\[])|^)(?:file://)?(?:~|[A-Za-z]:|\.{1,2})?[/\\]"
_PART = r"[^\s'\",;)\]]*"
# A word behind a space is more of a path if there is a separator in it.
_PATH = re.compile(rf"{_START}{_PART}(?: [^\s'\",;)\]/\\]+[/\\]{_PART})*(?<![\s'\",;)\].:/\\])")
_PLAIN = re.compile(r"\w[\w.+-]{0,127}")
_GIT = ("git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no")
_GIT_SECONDS = 5


def provenance(report: QuantizeReport) -> dict[str, Any]:
    """Plain values for JSON: versions, seed, nsamples, samples, tokens, calibration (description and sha256), metrics
    and git (revision of the working directory's repository, and whether tracked files differ from it). What is not
    known is left out; nothing differs between two runs of the same."""
    plain = report.to_dict()
    calibration = {"description": strip_paths(report.calibration), "sha256": report.calibration_sha256}
    known = {
        "versions": _versions(),
        "seed": report.config.seed,
        "nsamples": report.config.nsamples,
        "samples": report.samples,
        "tokens": report.tokens,
        "calibration": {key: said for key, said in calibration.items() if said},
        "metrics": plain["metrics"],
        "git": _git(),
    }
    return {key: value for key, value in known.items() if value not in ("", None, {})}


def run_stamp(report: QuantizeReport) -> dict[str, str]:
    """What tells two runs of the same apart: date (UTC) and, where there is one, run_id."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date} | ({"run_id": report.run_id} if report.run_id else {})


def publishable(report: QuantizeReport) -> QuantizeReport:
    """The report as it lies in an export: of every path only its end is left."""
    return dataclasses.replace(
        report,
        modules=[
            dataclasses.replace(m, reason=strip_paths(m.reason), deviations=tuple(map(strip_paths, m.deviations)))
            for m in report.modules
        ],
        deviations=[strip_paths(deviation) for deviation in report.deviations],
        calibration=strip_paths(report.calibration),
        float_checkpoint=PurePath(report.float_checkpoint).name,
    )


def strip_paths(text: str) -> str:
    """The text with paths of this machine cut to their last part."""
    return _PATH.sub(lambda path: re.split(r"[/\\]", path[0])[-1], _without_folders(text))


def _without_folders(text: str) -> str:
    """The text without the folders that its paths are in, as far as they exist here: their names may hold anything."""
    for start in reversed([found.start() for found in re.finditer(_START, text)]):
        for end in reversed([found.start() for found in re.finditer(r"[/\\]", text)]):
            if end > start and os.path.isdir(os.path.expanduser(text[start:end].removeprefix("file://"))):
                text = text[:start] + text[end:]
                break
    return text


def plain_name(name: Any) -> str:
    """A run's name, if it is one to publish: a text of letters, digits and ``_.+-``; else empty."""
    return name if isinstance(name, str) and _PLAIN.fullmatch(name) else ""


def _versions() -> dict[str, str]:
    versions = {QUANTIZER_NAME: package_version(), "python": platform.python_version()}
    for library in _LIBRARIES:
        if library in sys.modules:
            try:
                versions[library] = version(library.replace("_", "-"))
            except PackageNotFoundError:
                versions[library] = str(getattr(sys.modules[library], "__version__", "unknown"))
    return versions


def _git() -> dict[str, Any] | None:
    """None without git, or where the working directory is in no repository with a commit."""
    try:
        said = subprocess.run(_GIT, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    revision = re.search(r"^# branch\.oid ([0-9a-f]+)$", said, re.MULTILINE)
    dirty = any(line and not line.startswith("#") for line in said.splitlines())
    return {"revision": revision[1], "dirty": dirty} if revision else None
