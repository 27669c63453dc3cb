"""Kept files as all ranks find them: `KeptOnRanks`.

Tested by tests/ranks/test_kept.py: with ranks that find the same, and others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.cache.files import Kept, KeptFiles


class KeptOnRanks:
    """Reads what all ranks find, and writes on rank 0. All ranks make the same calls.

    Args:
        files: This rank's.
        option: What asks for them.

    Attributes:
        option: As given.
        problems: Sentences on what is not kept, on this rank.
    """

    def __init__(self, files: KeptFiles, option: str) -> None:
        self._files, self.option = files, option
        self._differ = f"{option} does not find the same files on every rank: what some of them lack was computed again"
        self.problems: list[str] = []

    def read(self, kind: str, key: str) -> Kept | None:
        """What is kept under a key; None if some rank finds nothing, or something else."""
        kept = self._files.read(kind, key)
        found = set(distributed.gather_objects(kept.checksum if kept is not None else None))
        if len(found) > 1 and self._differ not in self.problems:
            self.problems.append(self._differ)
        return kept if len(found) == 1 else None

    def write(self, kind: str, key: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keeps something."""
        if distributed.rank() == 0:
            self._files.write(kind, key, facts, tensors)

    def told(self) -> list[str]:
        """The problems of all ranks."""
        of_all = distributed.gather_objects(self.problems + self._files.problems)
        return list(dict.fromkeys(problem for of_rank in of_all for problem in of_rank))

    def written(self) -> int:
        """Bytes written."""
        return sum(distributed.gather_objects(self._files.written))
