"""The finish of a training run: `FinishRun`.

Tested by tests/training/test_attempts.py: with the attempts that it follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_plugin import distributed
from gptq_plugin.finish.options import Finish
from gptq_plugin.quantize.finishing import TaskLoss
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.options import PassOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishRun:
    """How the model of a run is finished.

    Attributes:
        finish: The options.
        data: Called once per finish; returns its data.
        task_loss: As for `QuantizeModule.finish`.
    """

    finish: Finish
    data: Callable[[], Iterable[Any]]
    task_loss: TaskLoss | None = None

    def run(self, quantizer: QuantizeModule, model: nn.Module, options: PassOptions, *, exported: bool) -> bool:
        """Finishes a model inside the with block of `temporarily`; returns whether that changed it.

        Args:
            quantizer: Has quantized the model.
            model: The model.
            options: Of the quantization.
            exported: GPTQ's result is exported, which an error leaves as it is.
        """
        try:
            record = quantizer.finish(
                model,
                None,
                self.data(),
                self.finish,
                forward=options.forward,
                tokenizer=options.tokenizer,
                device=options.device,
                device_memory=options.device_memory,
                progress=options.progress,
                task_loss=self.task_loss,
            )
        except BaseException:
            if exported and distributed.rank() == 0:
                log.error("the finish failed; what GPTQ gave is exported")
            raise
        return record.kept
