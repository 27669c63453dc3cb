"""The commands ``gptq-finetune`` and ``gptq-quantize``: Hydra applications.

``conf/`` holds every option with a comment, and ``--help`` prints both. What a command does is imported when it runs:
its help, its version and errors in its options come at once.
"""

from __future__ import annotations

from omegaconf import DictConfig

from gptq_plugin.apps.command_line import hydra_command
from gptq_plugin.apps.composition import options_explained


@hydra_command("finetune")
def finetune(cfg: DictConfig) -> float | None:
    """Runs `apps.finetune.finetune`."""
    from gptq_plugin.apps.finetune import finetune as run

    with options_explained(cfg):
        return run(cfg)


@hydra_command("quantize")
def quantize(cfg: DictConfig) -> float | None:
    """Runs `apps.quantize.quantize`."""
    from gptq_plugin.apps.quantize import quantize as run

    with options_explained(cfg):
        return run(cfg)


if __name__ == "__main__":  # for torchrun, and for runs of a sweep that need a separate process
    finetune()
