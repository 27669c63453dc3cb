"""Options of the finish: `Finish`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.options import fields
from gptq_plugin.options.known_names import naming_the_nearest

KINDS = ("none", "scales", "blocks", "full")
_PATIENCE = 4


class Rates(NamedTuple):
    """Peaks of learning rates: about how far one moves in a step.

    Attributes:
        scales: As a share of itself.
        codes: In steps of its grid.
        norms: Absolutely.
    """

    scales: float
    codes: float
    norms: float


# By the bits of a layer, up to so many; the coarser a grid, the further the best codes are from GPTQ's.
_USUAL = {2: Rates(1e-3, 3e-3, 1e-3), 3: Rates(1e-3, 3e-3, 1e-3), 8: Rates(3e-4, 1e-3, 3e-4)}
_USUAL_IN_BLOCKS = {2: Rates(1e-3, 4e-3, 1e-3), 3: Rates(3e-4, 2e-3, 3e-4), 8: Rates(3e-4, 1e-3, 3e-4)}

_RATE = fields.Kind("a number in (0, 1)", lambda value: fields.is_number(value) and 0 < value < 1)
_KINDS = {
    "kind": fields.one_of(*KINDS),
    "steps": fields.integer(1),
    "learning_rate": fields.optional(_RATE, "3e-4, and 1e-3 at 3 bits and 2"),
    "norm_learning_rate": fields.optional(fields.share(), "as learning_rate"),
    "code_learning_rate": fields.optional(_RATE, "1e-3, and 3e-3 at 3 bits and 2"),
    "block_steps": fields.integer(1),
    "block_nsamples": fields.integer(1),
    "block_learning_rate": fields.optional(_RATE, "3e-4, and 1e-3 at 2 bits"),
    "block_code_learning_rate": fields.optional(_RATE, "1e-3, 2e-3 at 3 bits, and 4e-3 at 2"),
    "tokens_per_step": fields.integer(1),
    "nsamples": fields.optional(fields.integer(1), "the configuration's"),
    "held_out": fields.integer(1),
    "batch_size": fields.integer(1),
    "judgements": fields.integer(1),
    "patience": fields.optional(fields.integer(1), "4 where scales are trained alone"),
    "top_logits": fields.optional(fields.integer(1), "all of them"),
    "task_weight": fields.share(),
    "checkpoint_activations": fields.optional(fields.SWITCH, "once memory is short"),
    "seed": fields.integer(0, 2**32 - 1),
}


@naming_the_nearest()
@dataclass(frozen=True)
class Finish:
    """How a quantized model is trained towards its float model, after GPTQ.

    With "scales", codes stay as they are; the scales of groups, and the weights of norms, are trained by the divergence
    KL(float || quantized) of the predicted distributions (Adam, 5 % of warm-up, then a cosine). With "blocks", every
    block is trained before that to reproduce the outputs of its float block on inputs that went through the trained
    blocks before it: codes, scales and norms. With "full", codes are trained by the divergence too, behind the blocks.
    Held-out rows decide how long, and whether a block's result, and that of the whole, is kept.

    Args:
        kind: "none", "scales", "blocks" or "full".
        steps: Steps of the optimizer at most, by the divergence.
        learning_rate: Of scales: about how far one moves in a step, as a share of itself. None is 3e-4, and 1e-3 for
            layers of 2 or 3 bits.
        norm_learning_rate: The same of the weights of norms, absolutely. None is `learning_rate` (in blocks
            `block_learning_rate`), 0 leaves them alone.
        code_learning_rate: Of codes with "full": about how far one moves in a step, in steps of its grid. None is
            1e-3, and 3e-3 for layers of 2 or 3 bits.
        block_steps: Steps at most for each block.
        block_nsamples: Samples that blocks are trained on, over all ranks: the first of those in their order, at most.
        block_learning_rate: As `learning_rate`, in blocks. None is 3e-4, and 1e-3 for layers of 2 bits.
        block_code_learning_rate: As `code_learning_rate`, in blocks. None is 1e-3, 2e-3 for layers of 3 bits, and 4e-3
            for those of 2.
        tokens_per_step: Tokens whose gradients make a step, over all ranks.
        nsamples: Samples to train on, over all ranks; None is the quantizer's `nsamples`.
        held_out: Samples beside them that are judged on. Of fewer samples than asked, they are a quarter at most.
        batch_size: Samples in a forward.
        judgements: How often the held-out samples are judged in `steps`, evenly spaced; and in a block's.
        patience: So many judgements without a new best end the training. None is 4 where scales are trained, and none
            where codes are: the held-out loss of those may rise at first, and falls as
            the learning rate does.
        top_logits: Tokens a position whose probabilities in the float model are kept, in 8 bytes each, on the CPU; the
            others count as one. None tells all apart, and keeps what the model's head reads, a number for each of its
            inputs; but 128 where the head is quantized, the logits are not what it gives, or that takes over 32 GiB or
            a quarter of the host's free memory.
        task_weight: The share of the run's own loss in what is trained behind the blocks, beside the divergence, which
            alone decides what is kept. 0 leaves it out.
        checkpoint_activations: True keeps only the blocks' inputs for the backward, and runs their forwards again. None
            does so once a GPU's memory runs short.
        seed: Of the order of samples and batches.

    Raises:
        ValueError: An option is out of range.
    """

    kind: str = "scales"
    steps: int = 100
    learning_rate: float | None = None
    norm_learning_rate: float | None = None
    code_learning_rate: float | None = None
    block_steps: int = 200
    block_nsamples: int = 1024
    block_learning_rate: float | None = None
    block_code_learning_rate: float | None = None
    tokens_per_step: int = 8192
    nsamples: int | None = None
    held_out: int = 32
    batch_size: int = 4
    judgements: int = 10
    patience: int | None = None
    top_logits: int | None = None
    task_weight: float = 0.0
    checkpoint_activations: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            kind.check(name, getattr(self, name))

    @property
    def by_blocks(self) -> bool:
        """Whether blocks are trained one by one."""
        return self.kind in ("blocks", "full")

    @property
    def trains_norms(self) -> bool:
        """Whether the weights of norms are trained."""
        return self.norm_learning_rate != 0

    def rates(self, bits: int) -> Rates:
        """The rates of a layer, and of norms beside it, behind the blocks."""
        return self._given(_USUAL, bits, self.learning_rate, self.code_learning_rate)

    def rates_in_blocks(self, bits: int) -> Rates:
        """The same in the training of its block."""
        return self._given(_USUAL_IN_BLOCKS, bits, self.block_learning_rate, self.block_code_learning_rate)

    def _given(self, usual: Mapping[int, Rates], bits: int, scales: float | None, codes: float | None) -> Rates:
        own = usual[min(width for width in usual if width >= bits)]
        scales = own.scales if scales is None else scales
        norms = scales if self.norm_learning_rate is None else self.norm_learning_rate
        return Rates(scales, own.codes if codes is None else codes, norms)

    def patience_with(self, codes: bool) -> int:
        """Judgements without a new best that end a training of codes, or of scales alone."""
        usual = self.judgements + 1 if codes else _PATIENCE
        return usual if self.patience is None else self.patience

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
