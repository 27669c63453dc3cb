"""The logits that a model's forward computes: `LogitReader`.

Tested by tests/finish/test_finish_model.py: with the forwards of models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.model.hf_models import transformers_models
from gptq_plugin.model.linears import is_linear

_REGRESSIONS = ("regression", "multi_label_classification")


class LogitReader:
    """Reads the logits of the transformers model inside a model, whichever forward calls it.

    Args:
        model: Any module.

    Attributes:
        name: Of the transformers model in it.

    Raises:
        TargetError: The model holds no transformers model, or several, or one whose outputs are no distribution.
    """

    def __init__(self, model: nn.Module) -> None:
        inside = list(transformers_models(model))
        if len(inside) != 1:
            raise TargetError(
                "a finish compares the distributions that a transformers model predicts, and "
                f"{type(model).__name__} holds {len(inside) or 'none'} of them: leave the finish out"
            )
        self.name, self._whole = inside[0]
        config: Any = self._whole.config
        if getattr(config, "problem_type", None) in _REGRESSIONS:
            raise TargetError(
                f"a finish compares distributions, and the outputs of {type(self._whole).__name__} with problem_type="
                f"{config.problem_type!r} are none: leave the finish out"
            )
        self._found: list[Tensor] = []

    @property
    def head(self) -> nn.Module | None:
        """What transformers calls the model's output embeddings, if that is a float layer."""
        found: Any = self._whole.get_output_embeddings()  # type: ignore[operator]
        return found if isinstance(found, nn.Module) and is_linear(found) else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Reads logits inside the block."""

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            logits = getattr(output, "logits", None)
            if isinstance(logits, Tensor):
                self._found.append(logits)

        handle = self._whole.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._found.clear()

    def read(self, run: Callable[[], Any], what: str, *, finite: bool = True) -> Tensor:
        """Runs a forward inside `watching`; returns its logits, [..., classes].

        Args:
            run: The forward.
            what: It is the forward of, for errors.
            finite: Refuse logits that are not, as of broken samples.

        Raises:
            TargetError: It computes none, logits of one class, or several times.
            CalibrationError: They are not finite.
        """
        self._found.clear()
        run()
        found, self._found = self._found, []
        if len(found) != 1 or found[0].shape[-1] < 2:
            shapes = ", ".join(str(list(one.shape)) for one in found) or "none"
            raise TargetError(
                f"a finish compares the logits that {type(self._whole).__name__} computes for each batch, and the "
                f"forward of {what} computed {shapes}: define a forward (or a calibration_step) that calls the model "
                "once, for logits of two classes or more, or leave the finish out"
            )
        (logits,) = found
        if finite and (not torch.isfinite(logits.detach()).any(-1).all() or torch.isnan(logits.detach()).any()):
            raise CalibrationError(
                f"the logits of {what} (rank {distributed.rank()}) are not finite: look for broken samples, or run the "
                "model in a wider dtype"
            )
        return logits
