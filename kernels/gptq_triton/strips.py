"""A symmetric matrix without most of what is above its diagonal: `Strips`."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


class Strips:
    """Where the parts of a symmetric matrix lie in a flat tensor: of each row the columns up to the end of its strip.

    Args:
        n: Rows and columns.
        width: Rows of a strip; the last one may have fewer.

    Attributes:
        n: As given.
        bounds: First row of each strip, and the one behind its last.
        size: Entries of all strips.
    """

    def __init__(self, n: int, width: int) -> None:
        self.n = n
        self.bounds = list(pairwise([*range(0, n, max(1, width)), n]))
        self._sizes = [(stop - start) * stop for start, stop in self.bounds]
        self.size = sum(self._sizes)

    def of(self, flat: Tensor) -> list[Tensor]:
        """The strips [..., rows, columns] of [..., size], as views."""
        parts = zip(flat.split(self._sizes, -1), self.bounds, strict=True)
        return [part.unflatten(-1, (stop - start, stop)) for part, (start, stop) in parts]
