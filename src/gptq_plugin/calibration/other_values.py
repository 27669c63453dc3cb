"""Puts something else at chosen positions of a call: noise on floats and embeddings, other ids where none embeds them.

Ids stay as they are where a `nn.Embedding` reads them, and what it returns is changed: a model may tell from ids where
padding, images or sentences end, and none of that is to move.
"""

from __future__ import annotations

import torch
from torch import Tensor


def other_floats(x: Tensor, chosen: Tensor) -> Tensor:
    """A copy with noise of the tensor's own size at the chosen rows.

    Args:
        x: [..., width].
        chosen: bool, of x's shape or of its leading sizes.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(int(chosen.sum()), *x.shape[chosen.dim() :], generator=generator, device="cpu")
    spread = float(x.detach().float().std()) if x.numel() > 1 else 0.0
    changed = x.detach().clone()
    changed[chosen] += (noise * (spread if 0 < spread < torch.inf else 1.0)).to(x)
    return changed


def other_ids(ids: Tensor, chosen: Tensor, known: Tensor) -> Tensor:
    """A copy with other ids at the chosen positions: each the next larger one among `known`, then the smallest."""
    pool = known.unique()
    if not len(pool):
        return ids
    number = torch.searchsorted(pool, ids[chosen].contiguous(), right=True) % len(pool)
    changed = ids.clone()
    changed[chosen] = pool[number]
    return changed


class Embedded:
    """Ids whose embeddings are to be changed, in the forward of one thread."""

    def __init__(self) -> None:
        self._chosen: list[tuple[Tensor, Tensor]] = []

    def add(self, ids: Tensor, chosen: Tensor) -> None:
        """Marks positions (bool, of the ids' shape)."""
        self._chosen.append((ids.reshape(-1), chosen.reshape(-1)))

    def changed(self, read: Tensor, out: Tensor) -> Tensor:
        """What an embedding that read these ids should return instead of `out`, [..., width]."""
        for ids, chosen in self._chosen:
            if read.numel() == ids.numel() and torch.equal(read.reshape(-1), ids.to(read.device)):
                rows = out.reshape(-1, out.shape[-1])
                return other_floats(rows, chosen.to(out.device)).reshape(out.shape)
        return out
