"""A kernel with its options, a kind of GPU, and the numbers of rows that share a choice: `Choice`, `Gpu`, `ROWS`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..needs_triton import triton

# The largest number of rows of each range that shares a choice; the last one stands for everything above 1024.
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

Options = dict[str, int]  # a kernel's options, by name

_CHOICE = re.compile(r"[a-z_]{1,40}( [A-Za-z_]{1,20}=[0-9]{1,6}){0,12}")


def range_of(rows: int) -> int:
    """The member of `ROWS` that a number of rows belongs to."""
    return next((largest for largest in ROWS if rows <= largest), ROWS[-1])


@dataclass(frozen=True)
class Choice:
    """A kernel by its name in `registry.KERNELS`, and its options."""

    kernel: str
    options: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, kernel: str, **options: int) -> Choice:
        return cls(kernel, tuple(options.items()))

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The inverse of `str`.

        Raises:
            ValueError: It is none.
        """
        if not _CHOICE.fullmatch(text):
            raise ValueError(f"no kernel with options: {text[:80]!r}")
        kernel, *options = text.split(" ")
        pairs = (option.split("=") for option in options)
        return cls(kernel, tuple((name, int(value)) for name, value in pairs))

    def __str__(self) -> str:
        return self.kernel + "".join(f" {name}={value}" for name, value in self.options)


@dataclass(frozen=True)
class Gpu:
    """What a choice depends on.

    Attributes:
        name: Its kind, as the driver names it.
        processors: Number of multiprocessors.
        hopper: Compute capability 9.
        shared: Bytes of a multiprocessor's shared memory that one program may take.
        cache: Bytes of the L2 cache.
    """

    name: str
    processors: int
    hopper: bool
    shared: int
    cache: int

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        index = torch.cuda.current_device() if device.index is None else device.index
        found = triton.runtime.driver.active.utils.get_device_properties(index)
        told = torch.cuda.get_device_properties(index)
        return cls(
            told.name, found["multiprocessor_count"], told.major == 9, found["max_shared_mem"], told.L2_cache_size
        )
