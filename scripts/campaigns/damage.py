"""What a mutation of a checkpoint did."""

from __future__ import annotations

from typing import NamedTuple


class Damage(NamedTuple):
    """A mutation.

    Attributes:
        what: For those who look for the fault.
        changes: The files now describe other numbers, and no reader can know that: a norm's epsilon, a code. After
            all other mutations the checkpoint computes what it did, or is refused.
        field: What a refusal must name; empty if the file is enough.
    """

    what: str
    changes: bool = False
    field: str = ""


NOTHING = Damage("nothing")
