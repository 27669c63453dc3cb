"""The commands ``gptq-finetune`` and ``gptq-quantize``: the order of their steps.

Both are Hydra applications. ``conf/`` holds every option with a comment, and ``--help`` prints the defaults.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from gptq_plugin.apps.comparison import Run, compare
from gptq_plugin.apps.data import TextData
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.language_model import LanguageModel, SaveFloat
from gptq_plugin.apps.run_folder import launched
from gptq_plugin.apps.summary import Clock
from gptq_plugin.apps.sweeps import run_alone, runs_a_sweep, starts_ranks
from gptq_plugin.device.memory import with_index
from gptq_plugin.export.staging import check_export_dir
from gptq_plugin.lightning.callback import GPTQCallback
from gptq_plugin.memory.placement import fits
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.training.progress import tqdm_progress

log = logging.getLogger(__name__)

_CONF = "pkg://gptq_plugin.conf"


@hydra.main(version_base="1.3", config_path=_CONF, config_name="finetune")
def finetune(cfg: DictConfig) -> float | None:
    """Fine-tunes, quantizes, exports, reloads and compares; returns the exported model's mean NLL."""
    clock, run_dir = Clock(), _start(cfg)
    with clock("prepare"):
        callbacks = [_instantiate(node) for node in cfg.callbacks.values()]
        gptq = _gptq_callback(callbacks)
        save_float = SaveFloat(run_dir / "float" if cfg.save_float else None)
        trainer: Trainer = _instantiate(cfg.trainer, callbacks=[save_float, *callbacks])
        if runs_a_sweep() and starts_ranks(trainer):
            return run_alone(run_dir)
        data, model = _data_and_model(cfg)
        gptq.tokenizer = gptq.tokenizer or model.tokenizer
    with clock("train"):
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
    assert gptq.export_dir is not None  # `_gptq_callback` has checked it
    return compare(Run(cfg, run_dir, clock, data, model), gptq.quantizer, gptq.report, gptq.export_dir, device)


@hydra.main(version_base="1.3", config_path=_CONF, config_name="quantize")
def quantize(cfg: DictConfig) -> float | None:
    """Quantizes a model, fine-tuned or not, exports, reloads and compares; returns the exported model's mean NLL."""
    clock, run_dir = Clock(), _start(cfg)
    if launched() > 1:
        raise ValueError(
            f"gptq-quantize is one process, and {launched()} were started: run it without torchrun or srun (a model "
            "larger than the GPU is streamed through it); gptq-finetune quantizes on all ranks"
        )
    export_dir = Path(cfg.export_dir)
    check_export_dir(export_dir, overwrite=cfg.overwrite)
    if cfg.ckpt is None and cfg.model.get("weights") is False:
        raise ValueError("model.weights=false leaves the model's weights random: give ckpt=PATH to load them from")
    with clock("prepare"):
        quantizer: QuantizeModule = _instantiate(cfg.quantizer)
        data, model = _data_and_model(cfg)
        model.network = fine_tuned(model.network, ckpt=cfg.ckpt, adapter=cfg.adapter)
        device = _device(cfg.device)
        if not quantizer.offload_weights and fits(model, device):
            model.to(device)  # otherwise it is streamed from the CPU
        rows = data.calibration_source(quantizer.config.nsamples)
    with (
        clock("quantize"),
        tqdm_progress() as progress,
        quantizer.temporarily(
            model.network,
            rows,
            tokenizer=model.tokenizer,
            device=device,
            export_dir=export_dir,
            overwrite=cfg.overwrite,
            target=_plain(cfg.target),
            progress=progress,
        ) as report,
    ):
        pass
    quantizer.run_log.end(report, export_dir)
    clock.move(report.seconds["export"], "quantize", "export")
    return compare(Run(cfg, run_dir, clock, data, model), quantizer, report, export_dir, device)


def _start(cfg: DictConfig) -> Path:
    """Seeds everything and returns the folder Hydra gave this run."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    return Path(HydraConfig.get().runtime.output_dir)


def _instantiate(node: Any, *args: Any, **kwargs: Any) -> Any:
    # _convert_="all": plain dicts and lists, since libraries do not take OmegaConf's.
    return instantiate(node, *args, _convert_="all", **kwargs)


def _plain(node: Any) -> Any:
    return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node


def _data_and_model(cfg: DictConfig) -> tuple[TextData, LanguageModel]:
    """Makes the data and the model. The tokenizer comes first, and may have to be trained on the text."""
    data: TextData = _instantiate(cfg.data)
    model: LanguageModel = _instantiate(cfg.model, texts(data.documents))
    return data.encode(model.tokenizer), model


def _gptq_callback(callbacks: list[Any]) -> GPTQCallback:
    found = [callback for callback in callbacks if isinstance(callback, GPTQCallback)]
    if len(found) != 1 or found[0].export_dir is None or found[0].swap:
        raise ValueError(
            "gptq-finetune compares the float model with its export, so `callbacks` must hold one "
            "GPTQCallback with an export_dir and swap=false, as conf/callbacks/gptq.yaml does"
        )
    return found[0]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return with_index(torch.device(name))


if __name__ == "__main__":  # for torchrun, and for runs of a sweep that need a separate process
    finetune()
