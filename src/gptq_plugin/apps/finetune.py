"""``gptq-finetune``: the order of its steps.

Tested by tests/apps/test_cli.py: by runs of the command.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig

from gptq_plugin.apps.comparison import Run, compare
from gptq_plugin.apps.language_model import SaveFloat
from gptq_plugin.apps.paths import folder_or_id
from gptq_plugin.apps.progress_bar import StepsBar
from gptq_plugin.apps.run_folder import refuse_new_folder
from gptq_plugin.apps.setting_up import data_and_model, instantiate_plain, start
from gptq_plugin.apps.summary import Clock
from gptq_plugin.apps.sweeps import Objective, check_objectives, run_alone, runs_a_sweep, starts_ranks
from gptq_plugin.lightning.callback import GPTQCallback

log = logging.getLogger(__name__)


def finetune(cfg: DictConfig) -> Objective:
    """Fine-tunes, quantizes, exports, reloads and compares; returns the exported model's mean NLL."""
    clock, run_dir = Clock(), start(cfg)
    check_objectives(cfg.evaluate)
    with clock("prepare"):
        callbacks = [instantiate_plain(node) for node in cfg.callbacks.values()]
        gptq = _gptq_callback(callbacks)
        assert gptq.export_dir is not None  # `_gptq_callback` has checked it
        refuse_new_folder(gptq.quantizer, gptq.export_dir)
        save_float = SaveFloat(run_dir / "float" if cfg.save_float else None)
        if cfg.trainer.get("enable_progress_bar") and not any(isinstance(one, ProgressBar) for one in callbacks):
            callbacks.append(StepsBar())
        trainer: Trainer = instantiate_plain(cfg.trainer, callbacks=[save_float, *callbacks])
        if runs_a_sweep() and starts_ranks(trainer):
            return run_alone(run_dir)
        data, model = data_and_model(cfg)
        gptq.tokenizer = gptq.tokenizer or model.tokenizer
        gptq.weights = folder_or_id(gptq.weights)
    with clock("train"):
        model.train()  # `from_pretrained` gives evaluation mode, in which there is no dropout
        try:
            trainer.fit(model, data)
        except Exception:
            if save_float.seconds:
                log.error("the fine-tuned float model is safe in %s", save_float.directory)
            raise
    if not trainer.is_global_zero or gptq.report is None:  # no report after a fast_dev_run
        return None
    clock.move(gptq.report.seconds["total"], "train", "quantize")
    clock.move(save_float.seconds, "train", "save float")
    device = trainer.strategy.root_device
    model.to(device)
    return compare(Run(cfg, run_dir, clock, data, model), gptq.quantizer, gptq.report, gptq.export_dir, device)


def _gptq_callback(callbacks: list[Any]) -> GPTQCallback:
    found = [callback for callback in callbacks if isinstance(callback, GPTQCallback)]
    if len(found) != 1 or found[0].export_dir is None or found[0].swap:
        raise ValueError(
            "gptq-finetune compares the float model with its export, so `callbacks` must hold one "
            "GPTQCallback with an export_dir and swap=false, as conf/callbacks/gptq.yaml does"
        )
    return found[0]
