"""GPTQTrainerCallback: GPTQCallback's counterpart for transformers.Trainer and its subclasses. No numerics.

The hook is `on_train_end`: the best model is loaded if the run asked for it, the process group is up, and
`evaluate` and `save_model` still work afterwards. A Trainer hands callbacks its train dataloader before training, but
an evaluation dataloader only when it evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.forward import CallsModels, call, standing_for, takes_of, to_device
from gptq_plugin.clients.client import Client
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device import memory
from gptq_plugin.errors import CalibrationError
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.train import check_loss
from gptq_plugin.hf.checkpoints import FollowsCheckpoints
from gptq_plugin.hf.dataloaders import Evaluations, refuse_without_evaluation, undivided
from gptq_plugin.hf.sharded import Whole, back_on, refuse_for_shards, sharding_of, whole
from gptq_plugin.hf.surroundings import (
    drop_replaced_parameters,
    float_checkpoint,
    progress_like,
    random_state_restored,
    refuse_after_swap,
    weights_saved_on_failure,
)
from gptq_plugin.hf.validation import Validate, Validation
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.adapters import base_copy, has_adapters, merged_in_place, note_untied
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.options import ModelForward, PassOptions
from gptq_plugin.training.attempts import Attempts
from gptq_plugin.training.callback_base import CallbackBase, Origin, check_options, naming_the_nearest_option
from gptq_plugin.training.log_metrics import finish_metrics, quality_metrics, total_metrics
from gptq_plugin.training.optimizer_state import on_cpu
from gptq_plugin.training.preflight import leaves_quantized, refuse_adapters, refuse_offload, refuse_quantized
from gptq_plugin.training.quality_gate import QualityGate


@naming_the_nearest_option
class GPTQTrainerCallback(CallbackBase, FollowsCheckpoints):
    """Quantizes the trained model at the end of `Trainer.train`, and exports it.

    With `load_best_model_at_end` that is the best model. A run that could not be quantized (no layer to quantize, a
    group size that does not divide, data that does not fit, an export folder that exists) is
    refused before the first training step. If quantization fails, the exception leaves `train` with the trained weights
    in place; if no checkpoint of the run holds them, they are saved to ``trained-STEP`` in its `output_dir`.

    PEFT adapters are merged on a copy, which is quantized and exported; the adapters and their base do not change.
    Under accelerate's FSDP and DeepSpeed the whole weights lie in files beside `export_dir` meanwhile, mapped by all
    ranks of a node, and the model stays sharded and float.

    Args:
        quantizer: Quantizes; holds the configuration.
        export_dir: Folder to write; None quantizes without export.
        tokenizer: Saved with the export, and used on texts; or the folder or hub id to load it from. None is the
            trainer's `processing_class`.
        calibration: ``"train"`` (as None): `config.nsamples` samples of the trainer's train dataset, each once, put
            together by its collator. ``"val"``: so many of the datasets of its last evaluation in training; data that
            does not fit is found in the first one (``eval_on_start=True`` makes that before the first step). A
            DataLoader is sampled like them (``trainer.get_eval_dataloader()`` is one); texts, rows with texts or chats
            (a `datasets.Dataset`), token lists or batches (see `calibration.collect`) are the same on every rank: each
            uses its part.
        forward: Runs a batch, called as forward(model, batch) with the batch on the model's device; a model with
            adapters is passed as its merged copy. None calls the model with the batch's keys.
        mix: General text beside the run's own data: a DataLoader, or texts, token lists or batches, as above. Under
            ``token_weighting="labels"`` every token of a text is its own label.
        mix_fraction: The share of `config.nsamples` that comes from `mix`, at least one sample; 0 takes none.
        swap: True leaves the model quantized, so that `trainer.evaluate()` and `trainer.save_model()` use it;
            False exports and gives it its float weights back. None is True, but False for a model that has PEFT
            adapters or is sharded.
        overwrite: Replace an earlier export by this package in `export_dir`.
        target: The client that is to load the export ("vllm", "transformers", "sglang", "gptqmodel", or
            ``{"client": "vllm", "tensor_parallel_size": 2}``). If it would refuse the export, so does the callback,
            before training.
        validate: Called without arguments before and after quantization, on every rank; returns metrics by name, which
            are logged and reported. `trainer.evaluate` is such a function. None measures nothing.
        max_degradation: How far these metrics may move: ``{"eval_loss": 0.02}`` may rise by that, ``"2%"`` by a share
            of the float model's value; ``{"eval_accuracy": -0.01}`` may fall by 0.01; ``"2% at 95%"`` has to be that
            sure, which `trainer.evaluate` tells of losses, and your function of what it returns a sequence of, a number
            for each sample.
        on_fail: What to do when a metric moves further: "raise", "warn" or "escalate", as for `GPTQCallback`.
        max_bits: Average bits per weight that "escalate" may not exceed, as for `GPTQCallback`.
        push_to_hub: Uploads the export to the Hugging Face hub when all else is done: ``"owner/name"``, private unless
            ``{"repo_id": "owner/name", "private": False}``. Made, or checked, before training.
        finish: Trains the result towards the float model, on samples of the same data, and keeps what held-out samples
            tell is nearer to it. What GPTQ gave is exported before. None is no finish.
        task_loss: With a `task_weight` of the finish, the loss of the run, called as task_loss(model, batch), such as
            `trainer.compute_loss`. None is the cross-entropy of the batch's labels.

    Attributes:
        report: Result of the last `train`; None before.

    Where the model stays quantized, the optimizer's state is released before: a later `train` begins with a new one.
    Else it waits on the CPU.
    """

    def __init__(
        self,
        quantizer: QuantizeModule,
        export_dir: str | Path | None = None,
        *,
        tokenizer: Any = None,
        calibration: str | Iterable[Any] | None = None,
        forward: ModelForward | None = None,
        mix: Iterable[Any] | None = None,
        mix_fraction: float = 0.25,
        swap: bool | None = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
        validate: Validate | None = None,
        max_degradation: Mapping[str, float | str] | None = None,
        on_fail: str = "raise",
        max_bits: float | None = None,
        push_to_hub: str | Mapping[str, Any] | None = None,
        finish: Finish | None = None,
        task_loss: Callable[[nn.Module, Any], Any] | None = None,
    ):
        super().__init__(
            quantizer,
            export_dir,
            tokenizer=tokenizer,
            calibration=undivided(calibration),
            mix=undivided(mix),
            mix_fraction=mix_fraction,
            swap=swap,
            overwrite=overwrite,
            target=target,
            push_to_hub=push_to_hub,
            finish=finish,
        )
        check_options(forward=forward, task_loss=task_loss)
        if task_loss is not None and not self.finish.task_weight:
            raise ValueError(
                "task_loss is the loss of a finish with a task_weight: give finish=Finish(task_weight=...)"
            )
        self.forward, self.task_loss = forward, task_loss
        self.validation = Validation(validate, QualityGate(max_degradation, on_fail, max_bits))
        self._evaluations: Evaluations | None = None  # of the training in progress

    @distributed.ending_together()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        """Refuses what cannot work and runs one calibration batch of every source (of ``"val"``, in `on_evaluate`)."""
        self.follow(args, state)
        model = training["model"]
        refuse_for_shards(model, self.swap, self.export_dir, self.finish)
        earlier = self.report.float_checkpoint if self.report is not None else ""
        refuse_quantized(model, earlier or "from_pretrained")
        if state.is_hyper_param_search:
            raise ValueError(
                "a hyperparameter search ends training many times, and every end would be quantized to the same "
                "folder: search without the callback, and add it to the run with the parameters found"
            )
        refuse_offload(self.quantizer, args.device)
        refuse_adapters(model, self.swap, self.export_dir)
        refuse_after_swap(state, self, _stays_quantized(model, self.swap))
        self.validation.check_model(model)
        self.agree_on_export_dir([("output_dir", args.output_dir), ("logging_dir", getattr(args, "logging_dir", None))])
        if self.data.calibration == "val":
            refuse_without_evaluation(args)
        with whole(model, args, self.export_dir) as trained:
            self.check_layers(_without_adapters(trained.module, base_copy))
            if self.data.calibration != "val":
                self._rehearse(args, training, trained)
        self._evaluations = Evaluations()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        """Finds limits of metrics that evaluations do not give. For ``calibration="val"``, remembers the evaluation
        dataloader, and runs a batch of the first one."""
        if self.validation.measuring:
            return
        self.validation.check_names(training.get("metrics") or {})
        if self.data.calibration != "val" or self._evaluations is None:
            return
        if self._evaluations.add(state.global_step, undivided(training["eval_dataloader"])):
            with (
                distributed.ending_together(),
                whole(training["model"], args, self.export_dir) as trained,
                weights_saved_on_failure(trained.module, args, state, self.saved),
            ):
                self._rehearse(args, training, trained)

    @distributed.ending_together()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        if self.ended_too_early(state):
            return
        model, optimizer = training["model"], training["optimizer"]
        peak = memory.peak_bytes(args.device)
        model.zero_grad(set_to_none=True)
        keep = _stays_quantized(model, self.swap)
        if keep:
            optimizer.state.clear()
        with (
            on_cpu([optimizer]),
            whole(model, args, self.export_dir) as trained,
            weights_saved_on_failure(trained.module, args, state, self.saved),
            random_state_restored(args.device),
            torch.compiler.set_stance("force_eager"),  # hooks and threads do not go through compiled code
            progress_like(args, state) as progress,
            back_on(trained, args.device),
        ):
            with streamed_to(trained.module, trained.device):
                quality = self.validation.of_float_model()
            module = _without_adapters(trained.module, merged_in_place)
            options = PassOptions(
                forward=self.calibration_forward(args),
                tokenizer=self._tokenizer(training),
                device=trained.device,
                progress=progress,
                device_memory=peak,
                export_dir=self.export_dir,
            )
            attempts = Attempts(
                module,
                data=lambda: self.calibration_data(training["train_dataloader"]),
                options=options,
                keep=keep,
                layers_in=None if trained.files is None else trained.files.layers,
                quality=quality,
                finish=self.finish_run(
                    lambda: self.calibration_data(training["train_dataloader"]), _as_in_training(self.task_loss, args)
                ),
            )
            run_name = args.run_name if args.run_name != args.output_dir else None  # some versions make them equal
            origin = Origin(float_checkpoint(args, state, self.saved), run_name, note_untied(trained.module, module))
            report = self.quantize_and_export(attempts, origin)
        self._evaluations = None
        drop_replaced_parameters(optimizer, model)
        history = [(0, total_metrics(report) | quality_metrics(report)), *finish_metrics(report)]
        state.log_history += [{**metrics, "step": state.global_step + steps} for steps, metrics in history]
        self.tell_result(report)
        self.upload()

    def calibration_data(self, train_dataloader: Any) -> Iterable[Any]:
        """Returns this rank's calibration data, and that of a finish; override to choose other samples."""
        return self.data.sources(undivided(train_dataloader), self._evaluation_dataloaders)

    def calibration_forward(self, args: TrainingArguments) -> Callable[[nn.Module, Any], Any]:
        """Returns the function that runs a batch: on the training's device, under its autocast."""
        every_logit = self.every_logit
        dtype, mixed = _autocast(args)

        def forward(model: nn.Module, batch: Any) -> Any:
            batch = to_device(batch, args.device)
            with torch.autocast(args.device.type, dtype=dtype, enabled=mixed):
                if self.forward is not None:
                    return self.forward(model, batch)
                return call(model, batch, every_logit=every_logit)

        standing_for(forward, self.forward, mixed, dtype, args.device.type, every_logit)
        return forward if self.forward is not None else CallsModels(forward)

    def _evaluation_dataloaders(self) -> list[Any]:
        if self._evaluations is None or not self._evaluations.loaders:
            raise CalibrationError(
                "calibration='val' takes its samples from what the trainer evaluates in training, and training ended "
                "without an evaluation: give eval_on_start=True, or a smaller eval_delay"
            )
        return self._evaluations.loaders

    def _rehearse(self, args: TrainingArguments, training: dict[str, Any], trained: Whole) -> None:
        with random_state_restored(args.device), torch.compiler.set_stance("force_eager"):
            data = self.calibration_data(training["train_dataloader"])
            self.check_finish_data(lambda: self.calibration_data(training["train_dataloader"]))
            first = self.data.rehearsal_data(data)
            if first is None:
                return  # the user's stream is not read before training
            module = _without_adapters(trained.module, base_copy)
            self.quantizer.rehearse(
                module,
                first,
                forward=self.calibration_forward(args),
                tokenizer=self._tokenizer(training),
                device=trained.device,
                whole=self.data.is_given,
                entire=self.data.entire_data(data),
            )
            if (loss := _as_in_training(self.task_loss, args)) is not None:
                again = self.data.rehearsal_data(self.calibration_data(training["train_dataloader"])) or ()
                _check_task_loss(loss, module, again, self.quantizer.config, self._tokenizer(training), self.finish)

    def _tokenizer(self, training: dict[str, Any]) -> Any:
        return self.tokenizer if self.tokenizer is not None else training["processing_class"]


def _autocast(args: TrainingArguments) -> tuple[torch.dtype, bool]:
    """The dtype of the training's autocast, and whether there is one."""
    return torch.bfloat16 if args.bf16 else torch.float16, args.bf16 or args.fp16


def _as_in_training(
    task_loss: Callable[[nn.Module, Any], Any] | None, args: TrainingArguments
) -> Callable[[nn.Module, Any], Any] | None:
    """A loss of batches, on the training's device and under its autocast."""
    if task_loss is None:
        return None
    dtype, mixed = _autocast(args)

    def loss(model: nn.Module, batch: Any) -> Any:
        with torch.autocast(args.device.type, dtype=dtype, enabled=mixed):
            return task_loss(model, to_device(batch, args.device))

    return loss


def _check_task_loss(
    loss: Callable[[nn.Module, Any], Any],
    model: nn.Module,
    data: Iterable[Any],
    config: QuantizeConfig,
    tokenizer: Any,
    finish: Finish,
) -> None:
    """Runs the loss of a batch as the finish takes it, without a step, and refuses what is none."""
    config, takes = finish.data_config(config), takes_of(model, loss)
    for batch in collect(data, config, tokenizer, config.collected_batch_size, alone=True, takes=takes).batches[:1]:
        with torch.enable_grad():
            check_loss(loss(model, batch.data), finish.task_weight)


def _stays_quantized(model: nn.Module, swap: bool | None) -> bool:
    """Whether a model is quantized after its training."""
    return sharding_of(model) is None and leaves_quantized(model, swap)


def _without_adapters(model: nn.Module, copy: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return copy(model) if has_adapters(model) else model
