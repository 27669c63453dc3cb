"""Suggests a command to try after a run: the same data at every width, in one table."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from gptq_plugin.apps.sweeps import in_sweep

PROGRAM = "gptq-quantize"


def next_command(run_dir: Path) -> str:
    """Returns a line for the shell, from the directory of this process; empty in a sweep, where `target_bits` chose the
    widths, or after gptq-finetune if it saved no float model."""
    hydra_config = HydraConfig.get()
    if in_sweep():
        return ""
    if any(o.startswith(("quantizer.target_bits=", "quantizer=mixed")) for o in hydra_config.overrides.task):
        return ""
    # No target takes every width; the folders of a sweep are new, so that nothing can be resumed.
    replaced = ("quantizer.bits=", "export_dir=", "target", "quantizer.resume=")
    overrides = [o for o in hydra_config.overrides.task if not o.startswith(replaced)]
    float_dir = run_dir / "float"
    if hydra_config.job.config_name == "finetune":
        if not float_dir.exists():
            return ""
        overrides = [o for o in overrides if o.startswith(("data", "+data", "quantizer", "+quantizer"))]
        overrides = [f"model.name_or_path={_quoted(float_dir)}", f"data={hydra_config.runtime.choices['data']}"] + [
            o for o in overrides if not o.startswith("data=")
        ]
    return shlex.join([*_program(), "-m", *overrides, "quantizer.bits=2,3,4,8"])


def _program() -> list[str]:
    """The words that start gptq-quantize: its name where PATH leads to the one of this environment, else its path."""
    folders = (Path(sys.argv[0]).parent, Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    script = next((folder / PROGRAM for folder in folders if (folder / PROGRAM).is_file()), None)
    if script is None:
        return [sys.executable, "-c", "from gptq_plugin.apps.cli import quantize; quantize()"]
    found = shutil.which(PROGRAM)
    return [PROGRAM] if found and Path(found).samefile(script) else [str(script.absolute())]


def _quoted(path: Path) -> str:
    """The path as Hydra reads it."""
    text = str(path)
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
