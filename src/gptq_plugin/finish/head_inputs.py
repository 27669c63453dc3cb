"""What the float model's head reads, from which all that it predicts is computed again: `HeadInputs`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.finish.chain import same
from gptq_plugin.finish.top_logits import Told

MOST_BYTES = 2**35  # of a rank's batches, on the CPU
_TOLERANCE = 1e-3  # of logits that are computed again, as a share of the largest


@dataclass(frozen=True)
class HeadInputs:
    """What positions of the float model predict.

    Attributes:
        states: [positions, width], in the model's dtype, on the CPU.
        head: Of the model that is trained: float, and the float model's.
    """

    states: Tensor
    head: nn.Module

    def __len__(self) -> int:
        return len(self.states)

    def on(self, device: torch.device) -> HeadInputs:
        """The same on a device."""
        return HeadInputs(self.states.to(device), self.head)

    @torch.no_grad()
    def to(self, device: torch.device) -> AllLogits:
        """The logits, computed where the head is."""
        return AllLogits(self.head(self.states.to(device)))


@dataclass(frozen=True)
class AllLogits(Told):
    """What positions of the float model predict: logits [positions, vocabulary]."""

    logits: Tensor

    def of_piece(self, logits: Tensor, piece: slice, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The divergence at each position, and its gradient for the logits."""
        theirs, ours = self.logits[piece].float().log_softmax(-1), logits.float().log_softmax(-1)
        shares = theirs.exp()
        values = torch.where(shares > 0, shares * (theirs - ours), 0.0).sum(-1)
        return values, ours.exp_().sub_(shares) if with_gradient else None


class Head:
    """The head of a float model, whose inputs are kept in place of logits.

    Args:
        own: The head.
        trained: The head of the model that is trained, in which its inputs are to give the same.
    """

    def __init__(self, own: nn.Module, trained: nn.Module) -> None:
        self._own, self._trained = own, trained
        self._found: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes what it reads and gives, inside the block."""

        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self._found.append((args[0], output))

        handle = self._own.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()
            self._found.clear()

    def take(self, logits: Tensor) -> Tensor | None:
        """What it read in the forward that has just run inside `watching`, [..., width]; None if the model's logits are
        not what it gave."""
        found, self._found = self._found, []
        if len(found) != 1:
            return None
        x, output = found[0]
        same = output.shape == logits.shape and bool(torch.equal(output.to(logits.dtype), logits))
        return x if same else None

    def gives(self, x: Tensor, logits: Tensor) -> bool:
        """Whether it gives these logits by itself, as it will have to: not what autocast has changed."""
        weight: Any = self._own.weight
        if x.dtype != weight.dtype:
            return False
        apart = (self._own(x).float() - logits.float()).abs().max()
        self._found.clear()  # of this call
        return bool(apart <= _TOLERANCE * logits.float().abs().max())

    def is_that_of_both(self) -> bool:
        """Whether the model that is trained has the float model's head."""
        own, trained = (dict(one.named_parameters()) for one in (self._own, self._trained))
        return self._own is self._trained or same(own, trained)

    def of(self, states: Tensor) -> HeadInputs:
        return HeadInputs(states.cpu(), self._trained)
