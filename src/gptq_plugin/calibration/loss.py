"""The loss of a calibration batch: `loss_of`; and what it is of: `terms_of`.

Tested by tests/quantize/test_gradient_weights.py: with the weights that it gives tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from gptq_plugin.calibration.batches import fields_of, labels_of, leaves
from gptq_plugin.calibration.sequences import IGNORED_LABEL
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.hf_models import predicts_next, transformers_models


def reads_every_logit(config: QuantizeConfig) -> bool:
    """True if calibration needs the logits of all positions: for the output embedding, the loss, or to compare them."""
    return config.lm_head or config.token_weighting == "gradients" or config.target_bits is not None


class Loss(NamedTuple):
    """The loss of a batch.

    Attributes:
        value: A scalar.
        terms: Positions or samples that it is the sum over; None if that is unknown, as of a mean.
    """

    value: Tensor
    terms: Tensor | None

    @property
    def mean(self) -> Tensor:
        """The same as a mean, where the terms are known."""
        return self.value if self.terms is None else self.value / self.terms.clamp(min=1)


def loss_of(model: nn.Module, output: Any, data: Any, *, option: str, instead: str) -> Loss:
    """The loss that a forward computed, or that of its logits.

    Args:
        model: What was quantized; holds the transformers model, if any.
        output: A scalar, which is the loss; or logits, or an output of transformers with `logits`: the sum of the
            cross-entropies of the batch's labels, or, if it has none and the model generates, of its next tokens. Else
            the output's `loss`.
        data: The batch.
        option: What needs it, for errors.
        instead: What to do without it.

    Raises:
        CalibrationError: The batch has no such loss.
    """
    if isinstance(output, Tensor) and output.numel() == 1:
        return Loss(output.reshape(()), None)
    logits = output if isinstance(output, Tensor) else _part(output, "logits")
    generates = _generates(model)
    targets = _targets(data, generates)
    if logits is None or targets is None or logits.shape[:-1] != targets.shape:
        loss = _part(output, "loss")
        if loss is not None and loss.numel() == 1:
            return Loss(loss.reshape(()), None)
        raise CalibrationError(
            f"{option} needs the loss of every calibration batch: give token or class `labels` with logits of their "
            f"shape, or {instead}"
        )
    if generates and targets.dim() == 2:
        logits, targets = logits[:, :-1], targets[:, 1:]
    targets = targets.to(logits.device).reshape(-1)
    rows = logits.reshape(-1, logits.shape[-1]).float()
    value = nn.functional.cross_entropy(rows, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return Loss(value, (targets != IGNORED_LABEL).sum())


def terms_of(model: nn.Module, data: Any) -> int | None:
    """How many positions or samples the loss of a batch's labels or next tokens is the sum over; None if unknown.

    Args:
        model, data: As for `loss_of`.
    """
    generates = _generates(model)
    targets = _targets(data, generates)
    if targets is None:
        return None
    return int(((targets[:, 1:] if generates and targets.dim() == 2 else targets) != IGNORED_LABEL).sum())


def _generates(model: nn.Module) -> bool:
    return any(predicts_next(one) for _, one in transformers_models(model))


def _part(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _are_classes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()


def _targets(data: Any, generates: bool) -> Tensor | None:
    """Labels, int64 [samples, positions] or [samples], or the tokens themselves where the attention mask keeps them."""
    labels = labels_of(data)
    if labels is None:
        labels = next((value for name, value in leaves(data) if name == "labels" and _are_classes(value)), None)
    if labels is not None or not generates:
        return None if labels is None else labels.long()
    fields = fields_of(data) or ({"input_ids": data} if isinstance(data, Tensor) else {})
    ids, mask = fields.get("input_ids"), fields.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return ids.long().masked_fill(mask.to(ids.device) == 0, IGNORED_LABEL)
    return ids.long()
