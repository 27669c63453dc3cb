"""GPTQTrainerCallback: the same as GPTQCallback for transformers.Trainer and what derives from it. No numerics.

The hook is `on_train_end`: the best model is loaded if the run asked for it, the process group is up, and
`evaluate` and `save_model` still work afterwards. A Trainer tells its callbacks its train dataloader before training,
but an evaluation dataloader only when it evaluates.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gptq_plugin import distributed
from gptq_plugin.calibration.forward import call, to_device
from gptq_plugin.calibration.training_data import RunData
from gptq_plugin.clients.client import Client
from gptq_plugin.device import memory
from gptq_plugin.errors import CalibrationError
from gptq_plugin.export.staging import check_export_dir
from gptq_plugin.hf.dataloaders import undivided
from gptq_plugin.model.adapters import base_copy, has_adapters, merged_in_place, note_untied
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.one_pass import ModelForward, Progress
from gptq_plugin.report.provenance import plain_name
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.preflight import (
    check_arguments,
    leaves_quantized,
    refuse_adapters,
    refuse_export,
    refuse_offload,
    refuse_quantized,
)
from gptq_plugin.training.progress import tqdm_progress
from gptq_plugin.training.rank0_export import check_own_folders, export_from_first, from_first

log = logging.getLogger(__name__)

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # accelerate's names


class GPTQTrainerCallback(TrainerCallback):
    """Quantizes what training ended with, at the end of `Trainer.train`, and exports it.

    With `load_best_model_at_end` that is the best model. What cannot work (no layer to quantize, a group size that
    does not divide, data that does not fit, an export folder that exists, sharded parameters) is refused before the
    first training step. If quantization fails, the exception leaves `train` with the trained weights in place; where
    no checkpoint of the run holds them, they are saved to ``trained-STEP`` in its `output_dir`.

    PEFT adapters are merged on a copy, which is quantized and exported; the adapters and their base stay as they are.

    Args:
        quantizer: What to do.
        export_dir: Folder to write; None quantizes without export.
        tokenizer: Saved with the export, and used on texts; None is the trainer's `processing_class`.
        calibration: ``"train"`` (as None): `config.nsamples` samples of the trainer's train dataset, each once, put
            together by its collator. ``"val"``: so many of the datasets of its last evaluation in training, whose
            first one is when data that does not fit is found (``eval_on_start=True`` makes that before the first
            step). A DataLoader is sampled like them (``trainer.get_eval_dataloader()`` is one); texts, token lists or
            batches (see `calibration.collect`) are the same on every rank: each uses its part.
        forward: How to run one batch, called as forward(model, batch) with the batch on the model's device, and the
            merged copy of a model with adapters; None calls the model with the batch's keys.
        mix: General text beside the run's own data: a DataLoader, or texts, token lists or batches, as above. Under
            ``token_weighting="labels"`` every token of a text is its own label.
        mix_fraction: The share of `config.nsamples` that comes from `mix`, at least one sample; 0 takes none.
        swap: True leaves the model quantized, so that `trainer.evaluate()` and `trainer.save_model()` use it;
            False exports and gives it its float weights back. None is True, but False for a model with PEFT adapters.
        overwrite: Replace an earlier export of ours in `export_dir`.
        target: The client that is to load the export ("vllm", "transformers", "sglang", "gptqmodel", or
            ``{"client": "vllm", "tensor_parallel_size": 2}``): what it would not take is refused before training.

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
        mix: Iterable[Any] | None = None,
        mix_fraction: float = 0.25,
        swap: bool | None = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
    ):
        check_arguments(quantizer, export_dir, swap)
        self.quantizer = quantizer
        self.export_dir = Path(export_dir) if export_dir is not None else None
        self.tokenizer = tokenizer
        self.data = RunData(quantizer.config, undivided(calibration), undivided(mix), mix_fraction)
        self.forward = forward
        self.swap = swap
        self.overwrite = overwrite
        self.target = Client.of(target)
        self.report: QuantizeReport | None = None
        self._evaluations: _Evaluations | None = None  # of the training that is going on

    @distributed.ending_together()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        """Refuses what cannot work; one calibration batch of every source runs (of ``"val"``, in `on_evaluate`)."""
        model = training["model"]
        _check_whole(model)
        checkpoint = self.report.float_checkpoint if self.report is not None else ""
        refuse_quantized(model, checkpoint or "from_pretrained")
        if state.is_hyper_param_search:
            raise ValueError(
                "a hyperparameter search ends training many times, and every end would be quantized to the same "
                "folder: search without the callback, and add it to the run with the parameters found"
            )
        refuse_offload(self.quantizer, args.device)
        refuse_adapters(model, self.swap, self.export_dir)
        if self.export_dir is not None:
            self.export_dir = from_first(self.export_dir)
            own = [("output_dir", args.output_dir), ("logging_dir", getattr(args, "logging_dir", None))]
            check_own_folders(self.export_dir, own)
            check_export_dir(self.export_dir, overwrite=self.overwrite)
        plain = _without_adapters(model, base_copy)
        self.quantizer.check(plain)
        refuse_export(self.quantizer, plain, self.export_dir, self.target)
        if self.data.calibration != "val":
            self._rehearse(args, training)
        elif args.eval_strategy == "no" and not args.eval_on_start:
            raise CalibrationError(
                "calibration='val' takes its samples from what the trainer evaluates in training, and it does not: "
                "give it an eval_strategy, or trainer.add_callback(GPTQTrainerCallback(..., "
                "calibration=trainer.get_eval_dataloader()))"
            )
        self._evaluations = _Evaluations()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        """``calibration="val"``: what is evaluated is known now, and the first time tried."""
        if self.data.calibration != "val" or self._evaluations is None:
            return
        if self._evaluations.add(state.global_step, undivided(training["eval_dataloader"])):
            with distributed.ending_together(), _weights_saved_on_failure(training["model"], args, state):
                self._rehearse(args, training)

    @distributed.ending_together()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        model, optimizer = training["model"], training["optimizer"]
        peak = memory.peak_bytes(args.device)
        model.zero_grad(set_to_none=True)
        optimizer.state.clear()
        with (
            _weights_saved_on_failure(model, args, state),
            _random_numbers_kept(args.device),
            torch.compiler.set_stance("force_eager"),  # hooks and threads are not for compiled code
            _progress(args, state) as progress,
            _back_afterwards(model, args.device),
        ):
            module = _without_adapters(model, merged_in_place)
            quantized = self.quantizer.temporarily(
                module,
                self.calibration_data(training["train_dataloader"]),
                forward=self.calibration_forward(args),
                tokenizer=self._tokenizer(training),
                progress=progress,
                keep=leaves_quantized(model, self.swap),
                device_memory=peak,
            )
            with quantized as self.report:
                self.report.float_checkpoint = _checkpoint(args, state)
                if args.run_name != args.output_dir:  # which some versions take for a name
                    self.report.run_id = plain_name(args.run_name) or self.report.run_id
                self.report.deviations += note_untied(model, module)
                if self.export_dir is not None:
                    self.export_dir = export_from_first(
                        self.quantizer,
                        module,
                        self.export_dir,
                        tokenizer=self._tokenizer(training),
                        overwrite=self.overwrite,
                        target=self.target,
                    )
        self._evaluations = None
        _forget_replaced(optimizer, model)
        state.log_history.append({**_finite(self.report), "step": state.global_step})

    def calibration_data(self, train_dataloader: Any) -> Iterable[Any]:
        """What this rank calibrates on; override to choose other samples."""
        return self.data.sources(undivided(train_dataloader), self._evaluation_dataloaders)

    def _evaluation_dataloaders(self) -> list[Any]:
        if self._evaluations is None or not self._evaluations.loaders:
            raise CalibrationError(
                "calibration='val' takes its samples from what the trainer evaluates in training, and training ended "
                "without an evaluation: give eval_on_start=True, or a smaller eval_delay"
            )
        return self._evaluations.loaders

    def _rehearse(self, args: TrainingArguments, training: dict[str, Any]) -> None:
        with _random_numbers_kept(args.device), torch.compiler.set_stance("force_eager"):
            first = self.data.beginning(self.calibration_data(training["train_dataloader"]))
            if first is None:
                return  # a stream of the user's own is not read ahead of its training
            self.quantizer.rehearse(
                _without_adapters(training["model"], base_copy),
                first,
                forward=self.calibration_forward(args),
                tokenizer=self._tokenizer(training),
                whole=self.data.is_given,
            )

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


def _without_adapters(model: nn.Module, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return copied(model) if has_adapters(model) else model


class _Evaluations:
    """The dataloaders of a Trainer's last evaluation: one for each dataset, and made anew for the next.

    Attributes:
        loaders: Those of the last step with an evaluation.
    """

    def __init__(self) -> None:
        self.loaders: list[Any] = []
        self._first: int | None = None
        self._last: int | None = None

    def add(self, step: int, loader: Any) -> bool:
        """Whether this is a part of the first evaluation, so that the loader is new in more than its object."""
        if step != self._last:
            self.loaders = []
        self.loaders.append(loader)
        self._first, self._last = step if self._first is None else self._first, step
        return step == self._first


@contextlib.contextmanager
def _back_afterwards(model: nn.Module, device: torch.device) -> Iterator[None]:
    try:
        yield
    finally:
        model.to(device)


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
        if state.is_world_process_zero and state.global_step and not _checkpoint(args, state):
            folder = _output(args) / f"trained-{state.global_step}"
            log.error("quantization failed, and no checkpoint holds the trained weights: saving them to %s", folder)
            _save(model, folder)
        raise


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    """The run's checkpoint that holds the trained weights; empty without one."""
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return state.best_model_checkpoint
    last = _output(args) / f"checkpoint-{state.global_step}"
    return str(last) if last.exists() else ""


def _output(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # TrainingArguments has set its default
    return Path(args.output_dir)


def _save(model: nn.Module, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):  # of a model with adapters, these
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
