"""Provenance of an export, for its ``meta``, without anything that identifies the machine.

Exports are published: no path, user or host name may enter ``meta`` or the report beside it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

from gptq_plugin import __version__
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.report.finish_record import FinishRecord
from gptq_plugin.report.report import QuantizeReport, without_nan

_LIBRARIES = ("torch", "transformers", "lightning", "pytorch_lightning")  # named if imported
_START = r"(?:(?<=[\s'\"(=\[])|^)(?:file://)?(?:~|[A-Za-z]:|\.{1,2})?[/\\]"
_PART = r"[^\s'\",;)\]]*"
# A word after a space continues a path if it holds a separator.
_PATH = re.compile(rf"{_START}{_PART}(?: [^\s'\",;)\]/\\]+[/\\]{_PART})*(?<![\s'\",;)\].:/\\])")
_PLAIN = re.compile(r"\w[\w.+-]{0,127}")
_GIT = ("git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no")
_GIT_SECONDS = 5


def provenance(report: QuantizeReport) -> dict[str, Any]:
    """Plain values for JSON: versions, seed, nsamples, samples, tokens, calibration (description and sha256), metrics,
    finish and git (revision of the working directory's repository, and whether tracked files differ from it).

    Unknown values are left out. Repeating a run gives the same values.
    """
    calibration = {"description": strip_paths(report.calibration), "sha256": report.calibration_sha256}
    known = {
        "versions": _versions(),
        "seed": report.config.seed,
        "nsamples": report.config.nsamples,
        "samples": report.samples,
        "tokens": report.tokens,
        "calibration": {key: text for key, text in calibration.items() if text},
        "metrics": without_nan(report.metrics),
        "finish": None if report.finish is None else _finish(report.finish),
        "git": _git(),
    }
    return {key: value for key, value in known.items() if value not in ("", None, {})}


def _finish(record: FinishRecord) -> dict[str, Any]:
    plain = ("kind", "kept", "best_step", "steps", "tokens", "samples", "held_out_tokens")
    known: dict[str, Any] = {name: getattr(record, name) for name in plain}
    divergences = {"before": record.before, "after": record.after}
    known["kl"] = {name: value if math.isfinite(value) else None for name, value in divergences.items()}
    return known | {"data": {"description": strip_paths(record.data), "sha256": record.data_sha256}}


def run_stamp(report: QuantizeReport) -> dict[str, str]:
    """Date (UTC) and run_id, if there is one: these differ between repeated runs."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date} | ({"run_id": report.run_id} if report.run_id else {})


def publishable(report: QuantizeReport) -> QuantizeReport:
    """The report as exported, with every path cut to its last part."""
    return dataclasses.replace(
        report,
        modules=[
            dataclasses.replace(m, reason=strip_paths(m.reason), deviations=tuple(map(strip_paths, m.deviations)))
            for m in report.modules
        ],
        deviations=[strip_paths(deviation) for deviation in report.deviations],
        calibration=strip_paths(report.calibration),
        finish=None
        if report.finish is None
        else dataclasses.replace(report.finish, data=strip_paths(report.finish.data)),
        float_checkpoint=PurePath(report.float_checkpoint).name,
    )


def strip_paths(text: str) -> str:
    """Cuts paths of this machine to their last part."""
    return _PATH.sub(lambda path: re.split(r"[/\\]", path[0])[-1], _without_folders(text))


def _without_folders(text: str) -> str:
    """Removes folders that exist here from the paths in a text: their names may hold any character."""
    for start in reversed([found.start() for found in re.finditer(_START, text)]):
        for end in reversed([found.start() for found in re.finditer(r"[/\\]", text)]):
            if end > start and os.path.isdir(os.path.expanduser(text[start:end].removeprefix("file://"))):
                text = text[:start] + text[end:]
                break
    return text


def plain_name(name: Any) -> str:
    """A run's name if it may be published, that is, consists of letters, digits and ``_.+-``; else empty."""
    return name if isinstance(name, str) and _PLAIN.fullmatch(name) else ""


def _versions() -> dict[str, str]:
    versions = {QUANTIZER_NAME: __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        if library in sys.modules:
            try:
                versions[library] = version(library.replace("_", "-"))
            except PackageNotFoundError:
                versions[library] = str(getattr(sys.modules[library], "__version__", "unknown"))
    return versions


def _git() -> dict[str, Any] | None:
    """Revision and state of the working directory's repository; None without git, a repository or a commit."""
    try:
        status = subprocess.run(_GIT, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    revision = re.search(r"^# branch\.oid ([0-9a-f]+)$", status, re.MULTILINE)
    dirty = any(line and not line.startswith("#") for line in status.splitlines())
    return {"revision": revision[1], "dirty": dirty} if revision else None
