"""GPTQTrainerCallback: the same as GPTQCallback for transformers.Trainer and what derives from it. No numerics.

The hook is `on_train_end`: the best model is loaded if the run asked for it, the process group is up, and
`evaluate` and `save_model` still work afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gptq_plugin import distributed
from gptq_plugin.calibration import kept
from gptq_plugin.export import check_export_dir
from gptq_plugin.forward import call, to_device
from gptq_plugin.handover import check_own_folders, export_from_first
from gptq_plugin.job import ModelForward, Progress
from gptq_plugin.pretrained import is_transformers
from gptq_plugin.progress import tqdm_progress
from gptq_plugin.quantize import QuantizeModule
from gptq_plugin.report import QuantizeReport
from gptq_plugin.sampling import calibration_batches

log = logging.getLogger(__name__)

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # accelerate's names


class GPTQTrainerCallback(TrainerCallback):
    """Quantizes what training ended with, at the end of `Trainer.train`, and exports it.

    With `load_best_model_at_end` that is the best model. What cannot work (no layer to quantize, a group size that
    does not divide, data that does not fit, an export folder that exists, sharded parameters) is refused before the
    first training step. If quantization fails, the exception leaves `train` with the trained weights in place; where
    no checkpoint of the run holds them, they are saved to ``trained-STEP`` in its `output_dir`.

    Args:
        quantizer: What to do.
        export_dir: Folder to write; None quantizes without export.
        tokenizer: Saved with the export, and used on `calibration` texts; None is the trainer's
            `processing_class`.
        calibration: Texts, token lists or batches (see `calibration.collect`), the same on every rank: each
            uses its part. None takes `config.nsamples` samples of the trainer's train dataset, each once, put
            together by its collator.
        forward: How to run one batch, called as forward(model, batch) with the batch on the model's device;
            None calls the model with the batch's keys.
        swap: True leaves the model quantized, so that `trainer.evaluate()` and `trainer.save_model()` use it;
            False exports and gives it its float weights back.
        overwrite: Replace an earlier export of ours in `export_dir`.

    Attributes:
        report: What happened, after `train`; None before.

    The optimizer's state is released before quantization: a later `train` begins with a new one.
    """

    def __init__(
        self,
        quantizer: QuantizeModule,
        export_dir: str | Path | None = None,
        *,
        tokenizer: Any = None,
        calibration: Iterable[Any] | None = None,
        forward: ModelForward | None = None,
        swap: bool = True,
        overwrite: bool = False,
    ):
        if not isinstance(quantizer, QuantizeModule):
            raise TypeError(f"quantizer must be a QuantizeModule, got {type(quantizer).__name__}")
        if export_dir is None and not swap:
            raise ValueError("with swap=False and no export_dir nothing of the quantization would remain")
        self.quantizer = quantizer
        self.export_dir = Path(export_dir) if export_dir is not None else None
        self.tokenizer = tokenizer
        self.calibration = None if calibration is None else kept(calibration, quantizer.config.nsamples)
        self.forward = forward
        self.swap = swap
        self.overwrite = overwrite
        self.report: QuantizeReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        """Refuses what cannot work; one calibration batch runs, so that data that does not fit is found now."""
        model = training["model"]
        _check_whole(model)
        if state.is_hyper_param_search:
            raise ValueError(
                "a hyperparameter search ends training many times, and every end would be quantized to the same "
                "folder: search without the callback, and add it to the run with the parameters found"
            )
        if self.quantizer.offload_weights and args.device.type == "cuda":
            raise ValueError(
                "offload_weights=True streams a model from the CPU, and training has it on the GPU: leave the option "
                "out, or save a checkpoint and run gptq-quantize on it"
            )
        if self.export_dir is not None:
            own = [("output_dir", args.output_dir), ("logging_dir", getattr(args, "logging_dir", None))]
            check_own_folders(self.export_dir, own)
            check_export_dir(self.export_dir, overwrite=self.overwrite)
        self.quantizer.check(model)
        whole = self.calibration is not None
        with _random_numbers_kept(args.device), torch.compiler.set_stance("force_eager"):
            if not whole and not isinstance(training["train_dataloader"], DataLoader):
                return  # a stream of the user's own is not read ahead of its training
            data = self.calibration_data(training["train_dataloader"])
            self.quantizer.rehearse(
                model,
                data if whole else islice(data, 1),
                forward=self.calibration_forward(args),
                tokenizer=self._tokenizer(training),
                whole=whole,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        model, optimizer = training["model"], training["optimizer"]
        model.zero_grad(set_to_none=True)
        optimizer.state.clear()
        with (
            _weights_saved_on_failure(model, args, state),
            _random_numbers_kept(args.device),
            torch.compiler.set_stance("force_eager"),  # hooks and threads are not for compiled code
            _progress(args, state) as progress,
        ):
            quantized = self.quantizer.temporarily(
                model,
                self.calibration_data(training["train_dataloader"]),
                forward=self.calibration_forward(args),
                tokenizer=self._tokenizer(training),
                progress=progress,
                keep=self.swap,
            )
            with quantized as self.report:
                if self.export_dir is not None:
                    self.export_dir = export_from_first(
                        self.quantizer,
                        model,
                        self.export_dir,
                        tokenizer=self._tokenizer(training),
                        overwrite=self.overwrite,
                    )
        _forget_replaced(optimizer, model)
        state.log_history.append({**_finite(self.report), "step": state.global_step})

    def calibration_data(self, train_dataloader: Any) -> Iterable[Any]:
        """What this rank calibrates on; override to choose other samples."""
        from accelerate.data_loader import DataLoaderDispatcher  # an extra; every Trainer needs it

        if self.calibration is not None:
            return _dealt(self.calibration)
        batches = calibration_batches(_undivided(train_dataloader), self.quantizer.config)
        # A stream that rank 0 reads for all would be read whole by each of them.
        dispatched = isinstance(train_dataloader, DataLoaderDispatcher)
        return _dealt(batches) if dispatched and isinstance(train_dataloader.dataset, IterableDataset) else batches

    def calibration_forward(self, args: TrainingArguments) -> Callable[[nn.Module, Any], Any]:
        """How one batch is run: on the training's device, under its autocast, through `forward` or the model."""
        every_logit = self.quantizer.config.lm_head
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        mixed = args.bf16 or args.fp16

        def forward(model: nn.Module, batch: Any) -> Any:
            batch = to_device(batch, args.device)
            with torch.autocast(args.device.type, dtype=dtype, enabled=mixed):
                if self.forward is not None:
                    return self.forward(model, batch)
                return call(model, batch, every_logit=every_logit)

        return forward

    def _tokenizer(self, training: dict[str, Any]) -> Any:
        return self.tokenizer if self.tokenizer is not None else training["processing_class"]


def _check_whole(model: nn.Module) -> None:
    from accelerate.state import AcceleratorState

    kind = AcceleratorState().distributed_type.value
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if kind in _SHARDED or sharded:
        raise NotImplementedError(
            f"GPTQTrainerCallback needs whole parameters on every rank, and {kind if kind in _SHARDED else 'DTensor'} "
            "shards them. Train without the callback, save the full model and run gptq-quantize on it"
        )


def _dealt(items: Iterable[Any]) -> Iterable[Any]:
    return islice(items, distributed.rank(), None, distributed.world_size())


def _undivided(loader: Any) -> Any:
    """The dataloader under accelerate's, whose batches are dealt to no rank yet (a stream's shards stay shards)."""
    base = getattr(loader, "base_dataloader", loader)
    inner = getattr(getattr(base, "batch_sampler", None), "batch_sampler", None)
    return base if inner is None else DataLoader(base.dataset, batch_sampler=inner, collate_fn=base.collate_fn)


@contextlib.contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whatever a dataset or a collator draws in the block, training goes on as without it."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextlib.contextmanager
def _weights_saved_on_failure(model: nn.Module, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
    """A script whose `train` raises does not reach its `save_model`, and the run may have saved no checkpoint."""
    try:
        yield
    except Exception:
        assert args.output_dir is not None  # TrainingArguments has set its default
        output = Path(args.output_dir)
        last = output / f"checkpoint-{state.global_step}"
        held = last.exists() or (args.load_best_model_at_end and state.best_model_checkpoint is not None)
        if state.is_world_process_zero and not held:
            folder = output / f"trained-{state.global_step}"
            log.error("quantization failed, and no checkpoint holds the trained weights: saving them to %s", folder)
            _save(model, folder)
        raise


def _save(model: nn.Module, folder: Path) -> None:
    if is_transformers(model):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


@contextlib.contextmanager
def _progress(args: TrainingArguments, state: TrainerState) -> Iterator[Progress | None]:
    if args.disable_tqdm or not state.is_world_process_zero:
        yield None
    else:
        with tqdm_progress() as progress:
            yield progress


def _forget_replaced(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The float weights of layers that were replaced would stay in memory as long as the optimizer has them."""
    left = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in left]


def _finite(report: QuantizeReport) -> dict[str, float]:
    return {f"gptq/{key}": value for key, value in report.totals().items() if math.isfinite(value)}
