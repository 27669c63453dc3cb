"""What the float model predicts for each batch, computed once: `ask_teacher`.

Tested by tests/finish/test_finish_model.py: with what is learned.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import to_device
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.device.memory import available_bytes
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.finish.chain import Chain, Passage, to_keep
from gptq_plugin.finish.head_inputs import MOST_BYTES, Head, HeadInputs
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.rows import Rows
from gptq_plugin.finish.top_logits import TopLogits

LIKELIEST = 128  # tokens a position, where the head's inputs are not kept
_SHARE = 4  # of the host's free memory that heads' inputs of all ranks may take: one in so many
_EXACT = 2**31  # bytes on the CPU for this rank's held-out batches


@dataclass(frozen=True)
class Lesson:
    """A batch, and what the float model predicts for it.

    Attributes:
        data: The forward's input.
        shape: Of the logits.
        places: int64, the positions that count among all of them; None if all do.
        top: At those that count.
        exact: The same of a held-out batch, with as many tokens as `_EXACT` bytes hold; None if `top` tells all apart,
            and of others.
        passage: What the forward gives to the blocks of a chain; None without one.
    """

    data: Any
    shape: torch.Size
    places: Tensor | None
    top: TopLogits | HeadInputs
    exact: TopLogits | None = None
    passage: Passage | None = None

    @property
    def judged(self) -> TopLogits | HeadInputs:
        """What a held-out batch is judged by before and behind a change."""
        return self.top if self.exact is None else self.exact

    def counted(self, logits: Tensor) -> Tensor:
        """The logits of positions that count, [positions, classes], of another forward of the batch.

        Raises:
            TargetError: They are for other positions or classes than the float model's.
        """
        if logits.shape != self.shape:
            raise TargetError(
                f"the quantized model gives logits {list(logits.shape)} for a batch of the finish, and the float model "
                f"{list(self.shape)}: give the float model that was quantized"
            )
        rows = logits.flatten(0, -2)
        return rows if self.places is None else rows[self.places.to(rows.device)]

    def on(self, device: torch.device) -> Lesson:
        """What is trained on, with its tensors on a device."""
        places = None if self.places is None else self.places.to(device)
        data = to_device(self.data, device)
        return Lesson(data, self.shape, places, self.top.on(device))


def ask_teacher(
    model: nn.Module,
    rows: Rows,
    run: Callable[[nn.Module, Any], Any],
    token_weighting: str,
    k: int | None,
    head: nn.Module | None = None,
    chain: Chain | None = None,
    samples: int = 0,
) -> tuple[list[Lesson], list[str]]:
    """Runs the float model on batches.

    Args:
        model: The float model, in evaluation mode.
        rows: This rank's batches.
        run: Runs the data of one.
        token_weighting: As in QuantizeConfig: which positions count.
        k: Tokens a position that are kept; None keeps what the head reads.
        head: That of the model that is trained, if it is float.
        chain: Of the model's blocks, for the passages of the first batches to train on and of those held out.
        samples: How many of them: batches with so many samples, one at least.

    Returns:
        A lesson for each of `rows.batches`, and sentences on positions that cannot be told from padding.

    Raises:
        TargetError, CalibrationError: As `LogitReader` and `Chain.take`; or a batch has no labels, and
            `token_weighting` is "labels"; or what the head reads is kept,
            and a later batch's logits are not what it gave.
    """
    reader, positions = LogitReader(model), Positions(model, rows.batches, token_weighting)
    lessons: list[Lesson] = []
    told: dict[str, None] = {}
    is_open, k = k is None, LIKELIEST if k is None else k
    heads = Head(reader.head, head) if is_open and reader.head is not None and head is not None else None
    watching = [reader.watching(), *([] if chain is None else [chain.watching(model)])]
    passed = {*range(_batches_of(rows, samples)), *range(len(rows.train), len(rows.batches))}
    with torch.no_grad(), positions.watching(), contextlib.ExitStack() as stack:
        for one in watching:
            stack.enter_context(one)
        watching_head = stack.enter_context(contextlib.ExitStack())
        if heads is not None:
            watching_head.enter_context(heads.watching())
        why = _agreed("") if is_open and not rows.batches else ""
        for number, batch in enumerate(rows.batches):
            with positions.running(number):
                logits = reader.read(partial(run, model, batch.data), f"batch {number} of the finish")
                x = None if heads is None else heads.take(logits)
                if is_open and number == 0:
                    why = _agreed(_why_not(heads, x, logits, len(rows.batches)))
                if why and heads is not None:
                    watching_head.close()
                    heads = None
                found = positions.rows(number, reader.name, logits)
                passage = None
                if chain is not None:
                    taken = chain.take()
                    if number in passed:
                        counted = positions.rows(number, chain.names[0], taken.hidden)
                        told |= _remarks("the blocks' input", counted.remark)
                        passage = to_keep(taken, counted.mask)
            told |= _remarks("the output", found.remark)
            places = None if found.mask is None else found.mask.nonzero()[:, 0].cpu()
            exact = None
            if heads is not None:
                top: TopLogits | HeadInputs = heads.of(_counted(x, found.mask, number))
            elif number < len(rows.train):
                top = TopLogits.of(found.counted, k)
            else:
                bytes_of_token = 8 * len(rows.held_out) * max(1, len(found.counted))
                exact = TopLogits.of(found.counted, max(k, _EXACT // bytes_of_token))
                top = exact.narrowed(k)
            lessons.append(Lesson(batch.data, logits.shape, places, top, exact, passage))
    if chain is not None:
        with torch.no_grad():
            chain.check_alone(model)
    apart = f"finish: of the float model's predictions the {k} likeliest tokens are told apart: {why}"
    return lessons, [*([apart] if why else []), *told]


def _agreed(why: str) -> str:
    """Why what the head reads does not tell all that the model predicts, on any rank; empty if it does. Collective."""
    return next(filter(None, distributed.gather_objects(why)), "")


def _why_not(head: Head | None, x: Tensor | None, logits: Tensor, batches: int) -> str:
    if head is None:
        return "the model has no float head"
    if x is None or not head.gives(x, logits):
        return "the logits are not what the model's head gives by itself"
    if not head.is_that_of_both():
        return "the model that is trained has another head than the float model"
    wanted, available = x.nbytes * batches, available_bytes()
    room = MOST_BYTES if available is None else min(MOST_BYTES, available // (_SHARE * distributed.world_size()))
    if wanted > room:
        return f"what the head reads would take {wanted / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are there for it"
    return ""


def _counted(x: Tensor | None, mask: Tensor | None, number: int) -> Tensor:
    if x is None:
        raise CalibrationError(
            f"batch {number} of the finish: the float model's logits are not what its head gave, as they were for "
            "batch 0: give top_logits a number, or leave such batches out"
        )
    rows = x.flatten(0, -2)
    return rows if mask is None else rows[mask]


def _batches_of(rows: Rows, samples: int) -> int:
    """How many of the batches to train on have so many samples."""
    seen = list(itertools.accumulate((batch.samples for batch in rows.train), initial=0))
    return sum(one < samples for one in seen[:-1])


def _remarks(subject: str, remark: str | None) -> dict[str, None]:
    return {} if remark is None else {f"finish: {subject} {remark}": None}
