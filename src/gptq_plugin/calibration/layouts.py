"""Where the positions of a sequence lie among the rows of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool1d


def _along(kept: Tensor, sizes: Sequence[int], samples: int, positions: int) -> Tensor | None:
    """With samples and positions along these axes; further axes (heads) repeat."""
    if len(sizes) <= max(samples, positions) or (sizes[samples], sizes[positions]) != tuple(kept.shape):
        return None
    view = [1] * len(sizes)
    view[samples], view[positions] = kept.shape
    return (kept if samples < positions else kept.T).reshape(view).expand(*sizes).reshape(-1)


def _as_many(kept: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Split into windows, or flattened: samples stay one behind the other."""
    if kept.numel() != _product(sizes) or not (len(sizes) == 1 or sizes[0] == kept.shape[0]):
        return None
    return kept.reshape(-1)


def _flat_positions_first(kept: Tensor, sizes: Sequence[int]) -> Tensor | None:
    return kept.T.reshape(-1) if tuple(sizes) == (kept.numel(),) else None


def _shortened(kept: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """By strided convolutions: a row counts if it is over a position that does."""
    if len(sizes) != 2 or sizes[0] != kept.shape[0] or not 1 < sizes[1] < kept.shape[1]:
        return None
    return adaptive_max_pool1d(kept.float(), sizes[1]).bool().reshape(-1)


def _repeated(kept: Tensor, sizes: Sequence[int], *, each: bool) -> Tensor | None:
    """Flat, several times: one copy behind the other, or every row."""
    times = sizes[0] // max(1, kept.numel()) if len(sizes) == 1 else 0
    if times < 2 or sizes[0] != times * kept.numel():
        return None
    flat = kept.reshape(-1)
    return flat.repeat_interleave(times) if each else flat.repeat(times)


# In the order in which they are tried. All but the first four are taken only if they were observed.
LAYOUTS: dict[str, Callable[[Tensor, Sequence[int]], Tensor | None]] = {
    "samples first": lambda kept, sizes: _along(kept, sizes, 0, 1),
    "in windows or flat": _as_many,
    "positions first": lambda kept, sizes: _along(kept, sizes, 1, 0),
    "behind heads": lambda kept, sizes: _along(kept, sizes, 0, 2),
    "positions first, flat": _flat_positions_first,
    "repeated": partial(_repeated, each=False),
    "each repeated": partial(_repeated, each=True),
    "shortened": _shortened,
}
BY_SHAPE = tuple(LAYOUTS)[:4]
UNKNOWN = ""


def rows_in(layout: str, kept: Tensor, shape: torch.Size) -> Tensor | None:
    """The mask of a tensor's rows, bool [rows]; None if the tensor has other sizes than the layout.

    Args:
        layout: A key of `LAYOUTS`; UNKNOWN is none.
        kept: bool [samples, positions].
        shape: [..., width] of the tensor.
    """
    return None if layout == UNKNOWN else LAYOUTS[layout](kept, shape[:-1])


def fitting(kept: Tensor, shape: torch.Size, layouts: Sequence[str] = BY_SHAPE) -> Iterator[tuple[str, Tensor]]:
    """Yields the layouts that fit a tensor's sizes, each with its mask of rows."""
    for layout in layouts:
        rows = rows_in(layout, kept, shape)
        if rows is not None:
            yield layout, rows


def within(kept: Tensor, content: Tensor) -> Tensor | None:
    """The elements of a call's argument that stand at kept positions, bool of its sizes or (one text without samples,
    [positions, width]) of its leading ones; None if it has other sizes."""
    for sizes in (content.shape, content.shape[:-1]):
        for _, rows in fitting(kept, torch.Size((*sizes, 1))):
            return rows.reshape(sizes)
    return None


def by_sample(rows: Tensor, shape: torch.Size, samples: int) -> Tensor | None:
    """Rows [rows] of a tensor [..., width] as [samples, rows of each]; None if its sizes do not tell."""
    sizes = shape[:-1]
    if sizes and sizes[0] == samples:
        return rows.reshape(samples, -1)
    if len(sizes) > 1 and sizes[1] == samples:
        return rows.reshape(sizes[0], samples, -1).transpose(0, 1).reshape(samples, -1)
    return None


def _product(sizes: Sequence[int]) -> int:
    return torch.Size(sizes).numel()
