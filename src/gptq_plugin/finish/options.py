"""Options of the finish: `Finish`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.options import fields

KINDS = ("none", "scales")
_TO_COME = ("blocks", "full")

_RATE = fields.Kind("a number in (0, 1)", lambda value: fields.is_number(value) and 0 < value < 1)
_KINDS = {
    "kind": fields.one_of(*KINDS),
    "steps": fields.integer(1),
    "learning_rate": _RATE,
    "norm_learning_rate": fields.optional(fields.share(), "as learning_rate"),
    "tokens_per_step": fields.integer(1),
    "nsamples": fields.optional(fields.integer(1), "the configuration's"),
    "held_out": fields.integer(1),
    "batch_size": fields.integer(1),
    "judgements": fields.integer(1),
    "patience": fields.integer(1),
    "top_logits": fields.integer(1),
    "checkpoint_activations": fields.optional(fields.SWITCH, "once memory is short"),
    "seed": fields.integer(0, 2**32 - 1),
}


@dataclass(frozen=True)
class Finish:
    """How a quantized model is trained towards its float model, after GPTQ.

    Codes stay as they are; the scales of groups, and the weights of norms, are trained by the divergence KL(float ||
    quantized) of the predicted distributions (Adam, 5 % of warm-up, then a cosine). Held-out rows decide how long, and
    whether the result is kept.

    Args:
        kind: "none", or "scales".
        steps: Steps of the optimizer at most.
        learning_rate: Of scales: about how far one moves in a step, as a share of itself.
        norm_learning_rate: The same of the weights of norms, absolutely. None is `learning_rate`, 0 leaves them alone.
        tokens_per_step: Tokens whose gradients make a step, over all ranks.
        nsamples: Samples to train on, over all ranks; None is the quantizer's `nsamples`.
        held_out: Samples beside them that are judged on. Of fewer samples than asked, they are a quarter at most.
        batch_size: Samples in a forward.
        judgements: How often the held-out samples are judged in `steps`, evenly spaced.
        patience: So many judgements without a new best end the training.
        top_logits: Tokens a position whose probabilities in the float model are kept, in 8 bytes each, on the CPU; the
            others count as one.
        checkpoint_activations: True keeps only the blocks' inputs for the backward, and runs their forwards again. None
            does so once a GPU's memory runs short.
        seed: Of the order of batches.

    Raises:
        ValueError: An option is out of range.
    """

    kind: str = "scales"
    steps: int = 100
    learning_rate: float = 3e-4
    norm_learning_rate: float | None = None
    tokens_per_step: int = 8192
    nsamples: int | None = None
    held_out: int = 32
    batch_size: int = 4
    judgements: int = 10
    patience: int = 4
    top_logits: int = 128
    checkpoint_activations: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind in _TO_COME:
            raise ValueError(f"kind={self.kind!r} of a finish is not there yet: give 'scales', which keeps the codes")
        for name, kind in _KINDS.items():
            kind.check(name, getattr(self, name))

    @property
    def rate_of_norms(self) -> float:
        """The learning rate of norms; 0 leaves them alone."""
        return self.learning_rate if self.norm_learning_rate is None else self.norm_learning_rate

    def data_config(self, config: QuantizeConfig) -> QuantizeConfig:
        """The configuration by which the finish takes its samples, those held out included.

        Where the same seed draws from the same data, calibration's samples are the first of them.
        """
        nsamples = config.nsamples if self.nsamples is None else self.nsamples
        return dataclasses.replace(config, nsamples=nsamples + self.held_out, batch_size=self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


NONE = Finish(kind="none")


def check_finish(finish: Any) -> Finish:
    """The finish that an argument stands for: None is none.

    Raises:
        ValueError: It is no Finish.
    """
    fields.optional(fields.of_type("a Finish", Finish), "no finish").check("finish", finish)
    return NONE if finish is None else finish
