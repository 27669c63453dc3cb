"""A model that runs backward on a device where it is not: `resident_on`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptq_plugin.memory.slots import Substitution, all_slots, like


@contextlib.contextmanager
def resident_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Has copies of all parameters and buffers on the device for the length of a with block, each once, however often
    it is used; those that are there are not copied. Afterwards the model's own are in their places again.

    Unlike with `streamed_to` they all stay there, as a backward needs, so they have to fit.
    """
    copies: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for slot in list(all_slots(model)):
            if slot.tensor.device == device:
                continue
            substitution = Substitution(slot)
            stack.callback(substitution.undo)
            home = substitution.home
            if id(home) not in copies:
                copies[id(home)] = like(home, home.detach().to(device))
            substitution.put(copies[id(home)], lasting=False)
        yield
