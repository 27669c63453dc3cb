"""Weights of calibration tokens by how much the loss depends on what layers make of them: `GradientWeights`.

A layer's error matters where the loss reacts to its output y: there (∂loss/∂y)² is large. Its mean over the outputs
weights the token in the layer's Hessian (Kim et al., 2025, GuidedQuant, with one Hessian a layer). It takes one forward
and one backward of every batch through the float model before the walk.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.loss import loss_of
from gptq_plugin.device.memory import is_shortage
from gptq_plugin.errors import CalibrationError, brief
from gptq_plugin.model.experts import experts_of

_WITHOUT_LABELS = (
    "a forward that returns the loss (a calibration_step, or quantize(..., forward=lambda model, batch: "
    "model(**batch))), or leave token_weighting at 'all'"
)


class GradientWeights:
    """Measures and keeps the weights of some layers, by batch and call, until they are taken.

    Args:
        model: Their model, on one device.
        layers: By name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._model, self._layers = model, layers
        self._weights: dict[tuple[str, int], list[Tensor | None]] = defaultdict(list)  # by layer and batch
        self._exponents: dict[str, int] = {}  # of the power of two by which a layer's weights are about 1
        self._rows, self._exponent = 0, 0  # of the batch that runs: most rows of a layer; the loss is times 2^exponent

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module]) -> GradientWeights:
        """Those of the layers that get the same tokens in the float model as in the quantized one: experts do not."""
        return cls(model, {name: layer for name, layer in layers.items() if experts_of(name, layer) is None})

    def measure(self, number: int, forward: Callable[[], Any], data: Any) -> None:
        """Runs a batch forward and backward. To be called where no forward is being watched.

        Args:
            number: The batch's.
            forward: Runs it; returns what the loss is computed of (`loss_of`).
            data: The batch.

        Raises:
            CalibrationError: It has no loss, or the loss has no gradient.
        """
        if any(parameter.is_inference() for parameter in self._model.parameters()):
            raise CalibrationError(
                "token_weighting='gradients': the model has parameters made in torch.inference_mode, through which "
                "nothing runs backward: load it outside of that, or give token_weighting='all'"
            )
        with torch.enable_grad(), _frozen(self._model), self._watching(number):
            loss, terms = loss_of(
                self._model, forward(), data, option="token_weighting='gradients'", instead=_WITHOUT_LABELS
            )
            if not torch.isfinite(loss):
                raise CalibrationError(
                    f"token_weighting='gradients': the loss of calibration batch {number} is {loss.item()}: leave the "
                    "batch out, or give token_weighting='all'"
                )
            if not loss.requires_grad:
                raise CalibrationError(
                    f"token_weighting='gradients': the loss of calibration batch {number} depends on no layer that is "
                    "to be quantized (does its forward run under torch.no_grad?). Give token_weighting='all'"
                )
            # float16 does not hold the small gradients of a mean over a batch.
            self._exponent = 0 if terms is not None else self._rows.bit_length()
            try:
                (loss * 2.0**self._exponent).backward()
            except RuntimeError as error:
                short = is_shortage(error)
                why = "there is no room for its backward" if short else f"it has no backward ({brief(error)})"
                raise CalibrationError(
                    f"token_weighting='gradients', calibration batch {number}: {why}. Give "
                    + ("a smaller batch_size, or " if short else "")
                    + "token_weighting='all'"
                ) from error
        self._check_finite(number)

    def _check_finite(self, number: int) -> None:
        sums: dict[str, Tensor] = {}
        for (name, batch), calls in self._weights.items():
            known = [weights.sum() for weights in calls if weights is not None] if batch == number else []
            sums |= {name: torch.stack(known).sum()} if known else {}
        if sums and not torch.isfinite(torch.stack(list(sums.values()))).all():
            name = next(name for name, one in sums.items() if not torch.isfinite(one))
            raise CalibrationError(
                f"token_weighting='gradients': the gradients of calibration batch {number} at the outputs of {name} "
                "are not finite: leave the batch out, run in bfloat16 or float32, or give token_weighting='all'"
            )

    def over_ranks(self) -> None:
        """Scales each layer's weights, by a power of two, to a mean between 1 and 2 over all ranks. Collective.

        Raises:
            CalibrationError: All weights of all ranks are zero.
        """
        sums: dict[str, Tensor] = {}
        for (name, _), calls in self._weights.items():
            for weights in calls:
                if weights is not None:
                    values = torch.stack([weights.double().sum(), weights.new_tensor(len(weights), dtype=torch.double)])
                    sums[name] = sums[name] + values if name in sums else values
        total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for of_rank in distributed.gather_objects({name: one.tolist() for name, one in sums.items()}):
            for name, (weight, rows) in of_rank.items():
                total[name] = [total[name][0] + weight, total[name][1] + rows]
        for name, (weight, rows) in total.items():
            if weight > 0:
                self._exponents[name] = math.floor(math.log2(weight / rows))
        if total and not self._exponents:
            raise CalibrationError(
                "token_weighting='gradients': the loss of every calibration batch has gradients of zero alone (are all "
                "labels -100?). Give batches with labels that count, or token_weighting='all'"
            )

    def known(self) -> list[Any]:
        """All weights, and their exponents, as plain values and tensors."""
        return [sorted(self._weights.items(), key=lambda item: item[0]), sorted(self._exponents.items())]

    def left(self, name: str) -> int:
        """Number of batches that called a layer more often here than they asked for weights of."""
        return sum(bool(calls) for (one, _), calls in self._weights.items() if one == name)

    def take(self, name: str, number: int, rows: int) -> Tensor | None:
        """The roots of the weights in a batch's next call of a layer, float32 [rows]; None if they are not known."""
        calls = self._weights.get((name, number))
        weights = calls.pop(0) if calls else None
        if weights is None or name not in self._exponents or len(weights) != rows:
            return None
        return weights.mul(2.0 ** min(127, -self._exponents[name])).sqrt_()

    @contextlib.contextmanager
    def _watching(self, number: int) -> Iterator[None]:
        def watch(name: str, _: nn.Module, args: Any, output: Any) -> Tensor | None:
            calls = self._weights[name, number]
            calls.append(None)
            if isinstance(output, Tensor) and output.dim():
                self._rows = max(self._rows, output.numel() // max(1, output.shape[-1]))
            if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.is_floating_point()):
                return None
            # A leaf cannot be written to in place, as an activation may do.
            watched = output if output.requires_grad else output.detach().requires_grad_().clone()
            watched.register_hook(partial(keep, calls, len(calls) - 1))
            return watched

        def keep(calls: list[Tensor | None], call: int, gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).mul_(0.5**self._exponent)
            calls[call] = norms.square_().div_(rows.shape[-1])

        self._rows = 0
        with contextlib.ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.callback(layer.register_forward_hook(partial(watch, name)).remove)
            yield


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Computes no gradients of parameters inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
