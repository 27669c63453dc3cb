"""What a Trainer tells of its checkpoints: which step the last one is of, and whether it was saved to be resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gptq_plugin import distributed

log = logging.getLogger(__name__)

_STATE = "trainer_state.json"  # of each checkpoint


class FollowsCheckpoints(TrainerCallback):
    """Callbacks that know which checkpoint their training wrote last.

    A folder's name alone does not tell: an earlier run may have left it in the same `output_dir`.

    Attributes:
        saved: Step of the last checkpoint that this training wrote or began with; 0 if there is none.
        is_preempted: SIGTERM ended this training, and the trainer saved a checkpoint to resume it from
            (``enable_jit_checkpoint=True``).
    """

    saved = 0
    is_preempted = False
    _earlier: Mapping[Path, int] = {}  # of checkpoints that were there when this training began: when they were written

    def follow(self, args: TrainingArguments, state: TrainerState) -> None:
        """To be called when a training begins."""
        self.saved, self.is_preempted = state.global_step, False
        self._earlier = {
            file: file.stat().st_mtime_ns for file in checkpoint_of(args, state).parent.glob(f"checkpoint-*/{_STATE}")
        }

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any) -> None:
        self.saved = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        self.is_preempted |= _may_be_preempted(args) and control.should_training_stop  # else no step would begin

    on_pre_optimizer_step = on_step_begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **training: Any
    ) -> None:
        """Others may stop a training here: of a preempted one there is a checkpoint that no `on_save` told of."""
        if _may_be_preempted(args) and control.should_training_stop and state.global_step < state.max_steps:
            self.is_preempted |= self.saved != state.global_step and self._wrote_checkpoint(args, state)

    on_epoch_end = on_step_end

    def _wrote_checkpoint(self, args: TrainingArguments, state: TrainerState) -> bool:
        file = checkpoint_of(args, state) / _STATE
        return file.exists() and file.stat().st_mtime_ns != self._earlier.get(file)

    def ended_too_early(self, state: TrainerState) -> bool:
        """Returns whether training is to be resumed before it is quantized, and logs that. Every rank calls it."""
        too_early = bool(distributed.object_from_first(self.is_preempted))
        if too_early:
            log.warning(
                "SIGTERM ended training at step %d: nothing is quantized until it is resumed", state.global_step
            )
        return too_early


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of a checkpoint of this step."""
    assert args.output_dir is not None  # TrainingArguments has set its default
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _may_be_preempted(args: TrainingArguments) -> bool:
    return getattr(args, "enable_jit_checkpoint", False)  # not in all versions
