"""The commands ``gptq-finetune`` and ``gptq-quantize``: only the order of the steps.

Both are Hydra applications; every option is in ``conf/``, commented, and ``--help`` prints the defaults.
"""

from __future__ import annotations

import logging
import shlex
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

from gptq_plugin.apps.data import TextData
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.evaluate import evaluate_export, mean_nll
from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.language_model import LanguageModel, SaveFloat
from gptq_plugin.apps.run_folder import launched
from gptq_plugin.apps.summary import SUMMARY, Clock, Summary, files_size, weights_size
from gptq_plugin.apps.sweeps import in_sweep, run_alone, runs_a_sweep, starts_ranks
from gptq_plugin.device.memory import numbered
from gptq_plugin.export.staging import check_export_dir
from gptq_plugin.lightning.callback import GPTQCallback
from gptq_plugin.memory.placement import fits
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.progress import tqdm_progress

log = logging.getLogger(__name__)

_CONF = "pkg://gptq_plugin.conf"


@hydra.main(version_base="1.3", config_path=_CONF, config_name="finetune")
def finetune(cfg: DictConfig) -> float | None:
    """Fine-tune, quantize, export, reload, compare; returns the exported model's mean NLL."""
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
    if not trainer.is_global_zero or gptq.report is None:  # without a report it was a fast_dev_run
        return None
    clock.move(gptq.report.seconds["total"], "train", "quantize")
    clock.move(save_float.seconds, "train", "save float")
    device = trainer.strategy.root_device
    model.to(device)
    return _finish(cfg, clock, run_dir, data, model, gptq.quantizer, gptq.report, gptq.export_dir, device)


@hydra.main(version_base="1.3", config_path=_CONF, config_name="quantize")
def quantize(cfg: DictConfig) -> float | None:
    """Quantize a model as it is or was fine-tuned, export, reload, compare; returns the exported model's mean NLL."""
    clock, run_dir = Clock(), _start(cfg)
    if launched() > 1:
        raise ValueError(
            f"gptq-quantize is one process, and {launched()} were started: run it without torchrun or srun (a model "
            "larger than the GPU is streamed through it); to quantize on all ranks, do it at the end of gptq-finetune"
        )
    export_dir = Path(cfg.export_dir)
    check_export_dir(export_dir, overwrite=cfg.overwrite)
    if cfg.ckpt is None and cfg.model.get("weights") is False:
        raise ValueError("model.weights=false leaves the model's weights random: give ckpt=PATH, where they are")
    with clock("prepare"):
        quantizer: QuantizeModule = _instantiate(cfg.quantizer)
        data, model = _data_and_model(cfg)
        model.network = fine_tuned(model.network, ckpt=cfg.ckpt, adapter=cfg.adapter)
        device = _device(cfg.device)
        if not quantizer.offload_weights and fits(model, device):
            model.to(device)  # else it is streamed from where it is
        rows = data.calibration(quantizer.config.nsamples)
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
    clock.move(report.seconds["export"], "quantize", "export")
    return _finish(cfg, clock, run_dir, data, model, quantizer, report, export_dir, device)


def _start(cfg: DictConfig) -> Path:
    """Seeds everything and returns the folder Hydra gave this run."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    return Path(HydraConfig.get().runtime.output_dir)


def _instantiate(node: Any, *args: Any, **kwargs: Any) -> Any:
    # _convert_="all": plain dicts and lists, so that no library meets OmegaConf's.
    return instantiate(node, *args, _convert_="all", **kwargs)


def _plain(node: Any) -> Any:
    return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node


def _data_and_model(cfg: DictConfig) -> tuple[TextData, LanguageModel]:
    """The text, the model (whose tokenizer may have to be trained on that text), and the text as tokens."""
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
    return numbered(torch.device(name))


def _finish(
    cfg: DictConfig,
    clock: Clock,
    run_dir: Path,
    data: TextData,
    model: LanguageModel,
    quantizer: QuantizeModule,
    report: QuantizeReport,
    export_dir: Path | None,
    device: torch.device,
) -> float | None:
    """Compares float, round-to-nearest (in place: the float weights end here) and what the files hold."""
    assert export_dir is not None
    float_bytes, float_dtype = weights_size(model.network)
    summary = Summary(
        bits=quantizer.config.bits,
        group_size=quantizer.config.group_size,
        float_bytes=float_bytes,
        float_dtype=float_dtype,
        gptq_bytes=files_size(export_dir),
        seconds=clock.seconds,
        deviations=list(report.all_deviations()),
    )
    if cfg.evaluate:
        windows = data.validation
        summary.windows = (windows.shape[0], windows.shape[1])
        if model.device.type == device.type:
            with clock("evaluate float"):
                summary.nll["float"] = mean_nll(model.network, windows, cfg.eval_batch_size)
            with clock("evaluate RTN"):
                quantizer.round_to_nearest(model.network)
                summary.nll["rtn"] = mean_nll(model.network, windows, cfg.eval_batch_size)
        else:
            summary.deviations.append(f"the float model is not on {device}, so only its export is evaluated")
        with clock("reload, evaluate, generate"):
            result = evaluate_export(export_dir, run_dir, windows, batch_size=cfg.eval_batch_size, device=str(device))
        summary.nll["gptq"] = result["nll"]
        summary.prompt, summary.text = result["prompt"], result["text"]
    summary.files = _files(run_dir, export_dir)
    summary.next_command = _next_command(run_dir)
    summary.write(run_dir)
    print(f"\n{summary.table()}\n")
    return summary.nll.get("gptq")


def _files(run_dir: Path, export_dir: Path) -> dict[str, str]:
    places = {
        "GPTQ model": export_dir,
        "float model": run_dir / "float",
        "every layer": export_dir / "report.html",
        "this table": run_dir / SUMMARY,
    }
    return {what: str(path.resolve()) for what, path in places.items() if path.exists() or path.name == SUMMARY}


def _next_command(run_dir: Path) -> str:
    """The same data at every width, in one table; nothing while a sweep is running."""
    hydra_config = HydraConfig.get()
    if in_sweep():
        return ""
    own = ("quantizer.bits=", "export_dir=", "target")  # no target takes every width
    overrides = [o for o in hydra_config.overrides.task if not o.startswith(own)]
    float_dir = run_dir / "float"
    if hydra_config.job.config_name == "finetune":
        if not float_dir.exists():
            return ""
        overrides = [o for o in overrides if o.startswith(("data", "+data", "quantizer", "+quantizer"))]
        overrides = [f"model.name_or_path={float_dir}", f"data={hydra_config.runtime.choices['data']}"] + [
            o for o in overrides if not o.startswith("data=")
        ]
    return shlex.join(["gptq-quantize", "-m", *overrides, "quantizer.bits=2,3,4,8"])


if __name__ == "__main__":  # for torchrun, and for the runs of a sweep that need a process of their own
    finetune()
