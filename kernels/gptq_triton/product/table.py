"""What was measured to be fastest, for one kind of GPU: `Table`, and the tables that this package ships, `shipped`.

A table is JSON::

    {"gpu": "NVIDIA H100 80GB HBM3", "processors": 132, "made_by": "how, with which versions", "layouts": [
      {"bits": 4, "group": 128, "symmetric": true, "n_in": 4096, "n_out": 4096, "dtype": "float16",
       "rows": {"1": "few_rows BN=32 BM=8 SPLIT=4 STAGES=3 warps=2", "2048": "many_rows BM=256 STAGES=5 AHEAD=2"}}
    ]}

`rows` names ranges as `choice.ROWS` does. What is kept on a user's disk has the same form.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .choice import ROWS, Choice, Gpu, range_of
from .layout import Layout
from .registry import fits

_DTYPES = ("float16", "bfloat16", "float32")
_SIZES = {"bits": int, "group": int, "symmetric": bool, "n_in": int, "n_out": int, "dtype": str}


class Key(NamedTuple):
    """What a choice is looked up by; `rows` is a member of `choice.ROWS`."""

    bits: int
    group: int
    symmetric: bool
    n_in: int
    n_out: int
    dtype: str
    rows: int

    @classmethod
    def of(cls, layout: Layout, rows: int, dtype: torch.dtype) -> Key:
        name = str(dtype).removeprefix("torch.")
        sizes = (layout.bits, layout.group, layout.symmetric, layout.n_in, layout.n_out)
        return cls(*sizes, name, range_of(rows))


@dataclass
class Table:
    """Choices for one kind of GPU.

    Attributes:
        gpu: Its name.
        processors: Its number of multiprocessors: part of a GPU may have the name of all of it.
        made_by: How the choices were found.
        choices: They, by what they are for.
    """

    gpu: str
    processors: int
    made_by: str = ""
    choices: dict[Key, Choice] = field(default_factory=dict)

    def find(self, layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Choice | None:
        """The choice for a product on a GPU of this kind; what was measured in float16 counts for bfloat16 too."""
        key = Key.of(layout, rows, dtype)
        choice = self.choices.get(key)
        if choice is None and key.dtype == "bfloat16":
            choice = self.choices.get(key._replace(dtype="float16"))
        return choice if choice is not None and fits(choice, layout, key.rows, dtype, gpu) else None

    def is_for(self, gpu: Gpu) -> bool:
        """True for GPUs of its kind."""
        return (self.gpu, self.processors) == (gpu.name, gpu.processors)

    def to_json(self) -> str:
        """The file's text; layouts and rows in order, so that one changed choice is one changed line."""
        lines: dict[tuple[Any, ...], dict[str, str]] = {}
        for key, choice in sorted(self.choices.items()):
            lines.setdefault(key[:-1], {})[str(key.rows)] = str(choice)
        layouts = [
            {**dict(zip(_SIZES, sizes, strict=True)), "rows": dict(sorted(rows.items(), key=lambda item: int(item[0])))}
            for sizes, rows in lines.items()
        ]
        head = {"gpu": self.gpu, "processors": self.processors, "made_by": self.made_by}
        return json.dumps({**head, "layouts": layouts}, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str | bytes) -> Table:
        """Reads a file's text.

        Raises:
            ValueError: It is no such table. Whether a choice fits is seen when it is looked for: this Triton may lack
                its kernel.
        """
        try:
            read = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(read, dict) or not isinstance(read.get("layouts"), list):
            raise ValueError("no object with a list of layouts")
        gpu, processors, made_by = (read.get(name) for name in ("gpu", "processors", "made_by"))
        if not isinstance(gpu, str) or type(processors) is not int or not isinstance(made_by, str):
            raise ValueError("gpu and made_by must be texts, and processors an integer")
        table = cls(gpu, processors, made_by)
        for layout in read["layouts"]:
            table.choices.update(_choices(layout))
        return table


def _choices(layout: Any) -> dict[Key, Choice]:
    """Choices of one of a table's layouts."""
    if not isinstance(layout, dict) or not isinstance(layout.get("rows"), dict):
        raise ValueError("a layout is no object with rows")
    sizes: list[Any] = [layout.get(name) for name in _SIZES]
    if any(type(size) is not kind for size, kind in zip(sizes, _SIZES.values(), strict=True)):
        raise ValueError(f"a layout needs {', '.join(_SIZES)}: {str(layout)[:200]}")
    bits, group, _, n_in, n_out, dtype = sizes
    if bits not in (2, 3, 4, 8) or group not in (32, 64, 128) or n_in < 1 or n_out < 1 or dtype not in _DTYPES:
        raise ValueError(f"sizes of no layout: {str(layout)[:200]}")
    found = {}
    for rows, text in layout["rows"].items():
        if rows not in map(str, ROWS) or not isinstance(text, str):
            raise ValueError(f"rows must be of {ROWS} with texts, not {rows[:20]!r}: {str(text)[:80]}")
        found[Key._make([*sizes, int(rows)])] = Choice.parse(text)
    return found


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80]


def shipped(gpu: Gpu) -> Table | None:
    """The package's table for a kind of GPU, or None."""
    table = _read(f"{slug(gpu.name)}.json")
    return table if table is not None and table.is_for(gpu) else None


@functools.cache
def _read(name: str) -> Table | None:
    file = importlib.resources.files(__package__).joinpath("tables").joinpath(name)
    return Table.parse(file.read_bytes()) if file.is_file() else None
