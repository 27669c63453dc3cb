"""A model that runs on a device it need not fit on: `streamed_to`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from gptq_plugin.device.memory import free_bytes, trimmed, with_index
from gptq_plugin.memory.placement import UNLIMITED, unit_bytes
from gptq_plugin.memory.slots import Substitution, like, own_slots
from gptq_plugin.memory.units import PARAMETER_LISTS
from gptq_plugin.memory.weights import Weights


@contextlib.contextmanager
def streamed_to(
    model: nn.Module, device: torch.device | None, *, besides: nn.Module | None = None, capacity: int | None = None
) -> Iterator[None]:
    """Runs the model's children on the device for the length of a with block, wherever their tensors are and however
    large they are. Tensors that the model itself holds are there all the time, so it need not be called as a whole.

    Args:
        model: Any module.
        device: None, or a CPU, leaves the tensors where they are; what forwards on a CPU free goes back to the system.
        besides: A module somewhere in the model that is left alone, with all that is in it.
        capacity: Bytes of weights to keep on the device; None is half of what is free there.
    """
    if device is None or device.type == "cpu":
        with trimmed(model):
            yield
        return
    device = with_index(device)
    around = [m for m in model.modules() if m is model or any(part is besides for part in list(m.modules())[1:])]
    children = {} if besides is model else {child: None for m in around for child in m.children()}
    held = [*around, *(child for child in children if isinstance(child, PARAMETER_LISTS))]
    parts = [child for child in children if child is not besides and child not in held]
    own = [Substitution(slot) for module in held for slot in own_slots(module) if slot.tensor.device != device]
    free = free_bytes(device)
    with contextlib.ExitStack() as stack:
        for tensor in own:
            stack.callback(tensor.undo)
            tensor.put(like(tensor.home, tensor.home.to(device)))
        if parts:
            if capacity is None:
                capacity = UNLIMITED if free is None else free // 2
            together = nn.ModuleList(parts)
            unit = unit_bytes(together, free)
            stack.enter_context(Weights(together, device, stream=True, capacity=capacity, unit_bytes=unit))
        yield
