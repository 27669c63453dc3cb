"""Paths as users type them: relative to where the command was started, also where Hydra has left that folder."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path

from gptq_plugin.options import fields


def typed(path: str | Path) -> Path:
    """The path, absolute if Hydra runs: under ``hydra.job.chdir=true`` the process works in the run's folder."""
    fields.PATH.check("a path", path)
    path = Path(path).expanduser()
    return Path(to_absolute_path(str(path))) if HydraConfig.initialized() else path


def folder_or_id(name: str | Path) -> str:
    """The path of a local file or folder, or else the name as it is: a hub id looks like a relative path."""
    local = typed(name)
    return str(local) if os.path.exists(local) else str(name)  # of any text, however long
