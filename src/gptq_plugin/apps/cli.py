"""The commands ``gptq-finetune`` and ``gptq-quantize``: Hydra applications.

``conf/`` holds every option with a comment, and ``--help`` prints both. What a command does is imported when it runs:
its help, its version and errors in its options come at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from gptq_plugin.apps.command_line import hydra_command
from gptq_plugin.apps.composition import options_explained

if TYPE_CHECKING:
    from gptq_plugin.apps.sweeps import Objective


@hydra_command("finetune")
def finetune(cfg: DictConfig) -> Objective:
    """Runs `apps.finetune.finetune`."""
    from gptq_plugin.apps.finetune import finetune as run

    with options_explained(cfg):
        return run(cfg)


@hydra_command("quantize")
def quantize(cfg: DictConfig) -> Objective:
    """Runs `apps.quantize.quantize`."""
    from gptq_plugin.apps.quantize import quantize as run

    with options_explained(cfg):
        return run(cfg)


if __name__ == "__main__":  # for torchrun, and for runs of a sweep that need a separate process
    finetune()
