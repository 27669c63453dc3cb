"""The finish of a model that `QuantizeModule` has quantized: `Finishing`, the part of it that knows how.

Tested by tests/finish/test_finish_model.py: as users call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.forward import evaluating, takes_of
from gptq_plugin.calibration.loss import loss_of, terms_of
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.memory import with_index
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.finish.finish_model import Finished, finish_model
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.options import Finish, check_finish
from gptq_plugin.finish.rows import Rows, rows_of
from gptq_plugin.finish.surroundings import Solver, Surroundings, Teacher
from gptq_plugin.gptq.grid import QuantizedWeight
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swapped
from gptq_plugin.model.plan import MODEL, Plan
from gptq_plugin.quantize.allocate import Allocated
from gptq_plugin.quantize.model_of_report import ModelOfReport
from gptq_plugin.quantize.options import ModelForward, PassOptions, Progress
from gptq_plugin.quantize.prepare import undisturbed
from gptq_plugin.quantize.run_log import RunLog
from gptq_plugin.quantize.solve_on_ranks import solve_shared
from gptq_plugin.report.finish_record import FinishRecord
from gptq_plugin.report.report import QuantizeReport

TaskLoss = Callable[[nn.Module, Any], Tensor]
_WITHOUT_LABELS = "a task_loss that computes the loss of a batch, or leave task_weight out"


class Finishing:
    """Trains quantized models towards their float ones. `QuantizeModule` is one.

    Attributes:
        config, report, allocated, run_log: As of `QuantizeModule`.
    """

    config: QuantizeConfig
    report: QuantizeReport | None
    allocated: Allocated | None
    run_log: RunLog
    _finished: Finished | None = None  # that of the quantization under way
    _reported: ModelOfReport = ModelOfReport()

    def finish(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        batches: Iterable[Any],
        finish: Finish | None = None,
        *,
        forward: ModelForward | None = None,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        device_memory: int | None = None,
        progress: Progress | None = None,
        task_loss: TaskLoss | None = None,
    ) -> FinishRecord:
        """Trains a quantized model towards its float model, and keeps the result only if held-out samples tell it is
        better.

        What is exported afterwards is a checkpoint like any other. In a process group every rank calls this with the
        same models and its own batches, as `quantize`; all get the same result. `report` tells of it if it is that of
        the model.

        Args:
            model: With quantized layers, all other parameters as in the float model; changed in place.
            teacher: The float model, which is not changed. None inside the with block of `temporarily`: the model with
                its float layers.
            batches: As for `quantize`: `finish.nsamples` to train on, and behind them those to judge on.
            finish: How to train; None is ``Finish()``.
            forward: As for `quantize`; it has to compute the logits of every position.
            tokenizer: As for `quantize`.
            device: As for `quantize`.
            device_memory: As for `quantize`.
            progress: Called as progress(steps done, steps at most, the divergence of held-out samples).
            task_loss: With a `task_weight`, the loss of the run, called as task_loss(model, batch): a scalar, the mean
                over the batch. None is the cross-entropy of the batch's labels or, without any, of its next tokens.

        Raises:
            TargetError: The model has no quantized layers, or is not a transformers model that predicts a distribution;
                its blocks cannot be trained one by one (`kind` of "blocks" or "full"); or, inside the with block of
                `temporarily`, it was finished before.
            CalibrationError: There are fewer than two batches, or they do not fit, or logits are not finite; or, with
                a `task_weight`, a batch has no loss, or none of their labels counts in it.
            ValueError: There is a `task_loss` without a `task_weight`.
            RankError: Another rank was lost, or raised one of these or any other error.

        On any error the model is as it was before.
        """
        finish = Finish() if finish is None else check_finish(finish)
        MODEL.check("model", model)
        if finish.kind == "none":
            raise ValueError("finish=Finish(kind='none') is no finish: leave the call out, or give kind='scales'")
        if task_loss is not None and not finish.task_weight:
            raise ValueError(
                "task_loss is trained with the share task_weight, which is 0: give Finish(task_weight=...)"
            )
        options = PassOptions(forward, tokenizer, device=device, device_memory=device_memory, progress=progress)
        if torch.is_inference_mode_enabled():
            raise TargetError("a finish runs backward, and torch.inference_mode is on: call it outside of that")
        LogitReader(model)  # refuses before any work
        if self.allocated is not None and self._finished is not None and self._finished.record.kept:
            raise TargetError(
                "the model is finished already, and its norms are no longer those of the float model: give one finish "
                "more steps, or call undo_finish(reason) before the next"
            )
        with undisturbed(), evaluating(model), contextlib.ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # a block's forward is replaced
            takes = takes_of(model, options.forward if task_loss is None else task_loss)
            config = finish.data_config(self.config)
            rows = rows_of(batches, config, finish.held_out, options.tokenizer, takes, finish.seed)
            if finish.task_weight and task_loss is None:
                _refuse_unlabelled(model, rows)
            home = next(model.parameters()).device
            surroundings = Surroundings(
                options.runner(every_logit=True),
                self._solver(model),
                with_index(options.where or home),
                options.where,
                device_memory,
                self.config.token_weighting if self.config.token_weighting == "labels" else "all",
                progress,
                _task(options, task_loss) if finish.task_weight else None,
            )
            found = finish_model(model, self._teacher(model, teacher, options), rows, finish, surroundings)
        self._finished = found
        if self.report is not None and self._reported.is_of(model):
            self.report.finish = found.record
            self.report.seconds["finish"] = found.record.seconds
            self.report.deviations += found.deviations
        for deviation in found.deviations:
            self.run_log.warn(deviation)
        return found.record

    def undo_finish(self, reason: str) -> None:
        """Gives the model back what GPTQ gave it, if a finish has changed that, and notes why in the report."""
        found, self._finished = self._finished, None
        if found is not None and found.record.kept:
            found.undo()
            if self.report is not None and self.report.finish is found.record:
                self.report.finish = found.record.undone(reason)

    @contextlib.contextmanager
    def _under_way(self, allocated: Allocated) -> Iterator[Allocated]:
        """Holds the layers of a quantization inside the block, behind which nothing of a finish is left unless
        `_finished` is None."""
        self.allocated, self._finished = allocated, None
        try:
            yield allocated
        finally:
            if self._finished is not None:
                self._finished.undo()
            self.allocated = self._finished = None

    def _solver(self, model: nn.Module) -> Solver:
        """Solves layers as the model's were, with their own bits and groups."""
        plan = None if self.allocated is None else self.allocated.plan
        of_plan = {} if plan is None or plan.model is not model else {one.name: one.config for one in plan.targets}

        def solve_layer(
            name: str, layer: QuantLinear, weight: Tensor, hessian: Tensor, drift: Tensor
        ) -> QuantizedWeight | None:
            config = of_plan.get(name) or self.config.for_module(name)
            if config is None:
                return None
            config = replace(config, bits=layer.bits, group_size=layer.group_size)
            exact = PassOptions().sums_exactly(weight.device)
            return solve_shared(weight, hessian, config, drift, in_blocks=exact).weight

        return solve_layer

    def _teacher(self, model: nn.Module, teacher: nn.Module | None, options: PassOptions) -> Teacher:
        plan = None if self.allocated is None else self.allocated.plan
        if teacher is not None:
            MODEL.check("teacher", teacher)
        elif plan is None or plan.model is not model:
            raise TargetError(
                "a finish needs the float model that the quantized one is to come near to: give finish(model, teacher, "
                "batches) a copy that was made before quantization"
            )

        @contextlib.contextmanager
        def at_hand(part: str) -> Iterator[nn.Module]:
            with contextlib.ExitStack() as stack:
                if teacher is None:
                    assert plan is not None
                    stack.enter_context(_float_again(plan, part))
                one = (model if teacher is None else teacher).get_submodule(part)
                stack.enter_context(evaluating(one))
                yield one

        return at_hand


def _refuse_unlabelled(model: nn.Module, rows: Rows) -> None:
    """Raises CalibrationError if no label to train on counts on any rank: the run's own loss would be 0. Collective."""
    counts = any(terms is None or terms > 0 for terms in (terms_of(model, batch.data) for batch in rows.train))
    if not any(distributed.gather_objects(counts)):
        raise CalibrationError(
            "task_weight: no label of the finish's samples to train on counts in their loss (all are -100): give "
            f"samples with labels that count, or {_WITHOUT_LABELS}"
        )


def _task(options: PassOptions, task_loss: TaskLoss | None) -> TaskLoss:
    """The loss of a run, of a model and a batch."""
    if task_loss is not None:
        return replace(options, forward=task_loss).runner(every_logit=True)
    run = options.runner(every_logit=True)

    def of_labels(model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, run(model, batch), batch, option="task_weight", instead=_WITHOUT_LABELS).mean

    return of_labels


@contextlib.contextmanager
def _float_again(plan: Plan, part: str) -> Iterator[None]:
    """Puts a plan's float layers in the place of the quantized ones in a part of the model, inside the block."""
    within = f"{part}." if part else ""
    modules = plan.model.named_modules()
    quantized = {name: one for name, one in modules if isinstance(one, QuantLinear) and name.startswith(within)}
    with swapped(plan.model, {target.name: target.module for target in plan.targets if target.name in quantized}):
        yield
