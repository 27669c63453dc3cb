"""Where a run keeps its solved layers while its export is not there: `resume_folder`, beside the export.

It holds what `cache_dir` keeps, by the same keys, less the Hessians, which only a run with other options reads.

Tested by tests/quantize/test_resuming.py: with runs that are broken off.
"""

from __future__ import annotations

from pathlib import Path

from gptq_plugin.cache.files import KeptFiles
from gptq_plugin.export.export_dir import resolved
from gptq_plugin.export.hidden_folders import lasting_beside

_UNLIMITED = 2**63


def resume_folder(export_dir: str | Path) -> Path:
    """The hidden folder of a run that exports to `export_dir`, the same for every such run."""
    return lasting_beside(resolved(export_dir), "resume")


def resumable(export_dir: str | Path | None) -> KeptFiles:
    """The solved layers of a run that exports there.

    Raises:
        ValueError: There is no `export_dir`.
    """
    if export_dir is None:
        raise ValueError("resume=True keeps solved layers beside the export, and there is none: give an export_dir")
    return KeptFiles(resume_folder(export_dir), _UNLIMITED, leaves_out=("hessian",))
