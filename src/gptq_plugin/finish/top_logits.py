"""The most likely tokens of the float model, and the divergence from them: `TopLogits`, `Divergence`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_PIECE = 2**24  # logits that are worked on at a time, in float32


class Told(Protocol):
    """What positions of the float model predict."""

    def of_piece(self, logits: Tensor, piece: slice, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The divergence at each position, and its gradient for the logits."""
        ...

    def divergence(self, logits: Tensor) -> float:
        """The sum over positions of KL(float || logits), in nats; tokens that are not told apart count as one."""
        total = 0.0
        for piece in pieces(logits):
            values, _ = self.of_piece(logits[piece], piece, with_gradient=False)
            total += float(values.sum(dtype=torch.float64))
        return total


@dataclass(frozen=True)
class TopLogits(Told):
    """What positions of the float model predict.

    Attributes:
        ids: int32 [positions, k], the most likely tokens, the likeliest first.
        logs: float32 [positions, k], the logarithms of their probabilities.
        rest: float32 [positions], the logarithm of the probability of all other tokens together; -inf without any.
    """

    ids: Tensor
    logs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopLogits:
        """Those of logits [positions, vocabulary], on the CPU."""
        k = min(k, logits.shape[-1])
        parts = []
        for piece in pieces(logits):
            logs = logits[piece].float().log_softmax(-1)
            top, ids = logs.topk(k)
            parts.append((ids.int().cpu(), top.cpu(), _all_but(logs, ids).cpu()))
        if not parts:
            ids = torch.empty(0, k, dtype=torch.int32, device="cpu")
            return cls(ids, torch.empty(0, k, device="cpu"), torch.empty(0, device="cpu"))
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.rest)

    def narrowed(self, k: int) -> TopLogits:
        """The same with k tokens."""
        left_out = self.logs[:, k:]
        if not left_out.shape[1]:
            return self
        rest = torch.logaddexp(self.rest, left_out.logsumexp(1))
        return TopLogits(self.ids[:, :k].contiguous(), self.logs[:, :k].contiguous(), rest)

    def on(self, device: torch.device) -> TopLogits:
        """The same on a device."""
        return self.to(device)

    def to(self, device: torch.device) -> TopLogits:
        return TopLogits(self.ids.to(device), self.logs.to(device), self.rest.to(device))

    def of_piece(self, logits: Tensor, piece: slice, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The divergence at each position, and its gradient for the logits."""
        ids, theirs, their_rest = self.ids[piece].long(), self.logs[piece], self.rest[piece]
        ours = logits.float().log_softmax(-1)
        our_rest = _all_but(ours, ids)
        shares, rest_share = theirs.exp(), their_rest.exp()
        counted = rest_share > 0
        of_rest = torch.where(counted, rest_share * (their_rest - our_rest), 0.0)
        of_top = torch.where(shares > 0, shares * (theirs - ours.gather(1, ids)), 0.0)
        values = of_top.sum(-1) + of_rest
        if not with_gradient:
            return values, None
        # Of the rest, each token gets its part of their probability as our model divides it.
        factor = torch.where(counted, 1 - (their_rest - our_rest).exp(), 1.0)
        gradient = ours.exp_()
        at_top = gradient.gather(1, ids) - shares
        gradient.mul_(factor[:, None]).scatter_(1, ids, at_top)
        return values, gradient


class Divergence(torch.autograd.Function):
    """The sum over positions of KL(float || logits), with a gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, told: Told) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradients = torch.empty_like(logits)
        for piece in pieces(logits):
            values, gradient = told.of_piece(logits[piece], piece, with_gradient=True)
            assert gradient is not None
            gradients[piece] = gradient.to(logits.dtype)
            total += values.sum(dtype=torch.float64)
        ctx.save_for_backward(gradients)
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad.to(gradients.dtype), None


def pieces(logits: Tensor) -> Iterator[slice]:
    """Positions to work on at a time."""
    rows = max(1, _PIECE // max(1, logits.shape[-1]))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _all_but(logs: Tensor, ids: Tensor) -> Tensor:
    """The logarithm of the probability of all tokens but these, [positions]."""
    return logs.scatter(1, ids, -torch.inf).logsumexp(-1)
