"""Reads from a mask which positions it keeps, whatever its dtype, its shape and the sense of its ones."""

from __future__ import annotations

import torch
from torch import Tensor

# Additive masks hide with -inf, a dtype's lowest value, -1e9 or -1e4 (-9984 in bfloat16). Biases by distance (ALiBi)
# end above that.
_HIDDEN_BELOW = -9e3
_HIDDEN_OF_TWO = -10.0  # in a mask of two values, 0 and this or less


def kept_positions(mask: Tensor, hides: bool, samples: int | None = None) -> Tensor | None:
    """The positions that a mask keeps, bool [samples, positions]; None if it does not tell.

    Args:
        mask: Of positions, [samples, positions] (or with sizes of 1 between or behind them); or of queries and keys,
            [queries, keys], [samples (x heads), queries, keys] or [samples, heads, queries, keys]. Of booleans, of
            numbers that are 0 or not, or of floats to be added to scores.
        hides: Nonzero entries hide, as in torch.nn; else they keep, as in transformers. Floats to be added, of which
            very negative ones hide, tell by themselves.
        samples: Number of samples, where it is known: tells [queries, keys] from [samples, positions].
    """
    allowed = _allowed(mask, hides)
    if allowed is None or allowed.dim() < 2:
        return None
    if allowed.dim() == 3 and allowed.shape[2] == 1 != allowed.shape[1]:
        allowed = allowed[..., 0]
    if allowed.dim() == 2:
        if samples is None or allowed.shape[0] == samples:
            return allowed
        if allowed.shape[0] != allowed.shape[1]:
            return None
        allowed = allowed[None].expand(samples, -1, -1)
    if allowed.dim() == 3:
        count = allowed.shape[0] if samples is None or allowed.shape[0] == 1 else samples
        if allowed.shape[0] % count:
            return None
        allowed = allowed.reshape(count, -1, *allowed.shape[1:])
    if allowed.dim() != 4:
        return None
    if samples is not None and allowed.shape[0] == 1 < samples:
        allowed = allowed.expand(samples, -1, -1, -1)
    pairs = allowed.any(1)
    return _kept_keys(pairs) if pairs.shape[1] == pairs.shape[2] else pairs.any(1)


def _allowed(mask: Tensor, hides: bool) -> Tensor | None:
    """bool, of the mask's shape; None for numbers that are no mask."""
    if mask.dtype == torch.bool or not mask.is_floating_point():
        return (mask == 0) if hides else (mask != 0)
    values = mask.detach().float()
    lowest, highest = values.min(), values.max()
    if lowest < 0:
        two = bool(((values == lowest) | (values == 0)).all())
        hidden = values <= (_HIDDEN_OF_TWO if two else _HIDDEN_BELOW)
        return ~hidden if bool(hidden.any()) or bool(highest <= 0) else None
    if bool(((values == 0) | (values == 1)).all()):
        if highest == 0:  # to be added, and nothing hidden
            return torch.ones_like(values, dtype=torch.bool)
        return (values == 0) if hides else (values != 0)
    return None


def _kept_keys(pairs: Tensor) -> Tensor:
    """The positions that matter to others, by a mask of which attends to which: bool [samples, queries, keys].

    A position attends to itself unless it is padding. Two ways to keep softmax defined give padding a row all the same:
    it attends to everything (though no other row attends to it), or to itself beside what it would attend to.
    """
    length = pairs.shape[1]
    diagonal = torch.eye(length, dtype=torch.bool, device=pairs.device)
    kept = pairs.diagonal(dim1=1, dim2=2)
    full = pairs.all(-1) & ~pairs.all(-1).all(-1, keepdim=True)
    full[:, -1] = False  # a causal mask's last row
    by_others = (pairs & ~full[..., None] & ~diagonal).any(1)
    # The last token of one of several documents is attended to by itself only, too; but no later row looks back past
    # it, and it does not look ahead.
    first = torch.where(pairs.any(-1), pairs.int().argmax(-1), length)
    later = torch.full_like(first, length)
    if length > 1:
        later[:, :-1] = first.flip(1).cummin(1).values.flip(1)[:, 1:]
    ahead = pairs.triu(1).any(-1)
    skipped = ~by_others & (ahead | (later < torch.arange(length, device=pairs.device)))
    if length > 1:
        skipped[:, -1] = skipped[:, -2] & ~by_others[:, -1]
    alone = ((pairs.sum(-1) == 1) & ~by_others).int().cumprod(1).bool()  # at the left end
    return kept & ~skipped & ~(alone & ~alone.all(1, keepdim=True))
