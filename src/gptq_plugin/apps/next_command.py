"""Suggests a command to try after a run: the same data at every width, in one table."""

from __future__ import annotations

import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from gptq_plugin.apps.sweeps import in_sweep


def next_command(run_dir: Path) -> str:
    """Returns the command line; empty in a sweep, or after gptq-finetune if it saved no float model."""
    hydra_config = HydraConfig.get()
    if in_sweep():
        return ""
    replaced = ("quantizer.bits=", "export_dir=", "target")  # no target takes every width
    overrides = [o for o in hydra_config.overrides.task if not o.startswith(replaced)]
    float_dir = run_dir / "float"
    if hydra_config.job.config_name == "finetune":
        if not float_dir.exists():
            return ""
        overrides = [o for o in overrides if o.startswith(("data", "+data", "quantizer", "+quantizer"))]
        overrides = [f"model.name_or_path={float_dir}", f"data={hydra_config.runtime.choices['data']}"] + [
            o for o in overrides if not o.startswith("data=")
        ]
    return shlex.join(["gptq-quantize", "-m", *overrides, "quantizer.bits=2,3,4,8"])
