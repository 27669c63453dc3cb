"""Groups of layers that read the very same tensor (q, k and v; gate and up) and share Hessian, factor and solve."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gptq_plugin.walk.batch_thread import BatchThread, Forward, Waiting
from gptq_plugin.walk.kept_state import KeptState
from gptq_plugin.walk.layer_inputs import SeenInput, watch_inputs


@dataclass(frozen=True)
class Group:
    """Layers that read the very same input in every call, so that they share one Hessian.

    Attributes:
        names: The layers, in the order they are called.
        calls: How often a forward calls each of them; the group is ready at the last call.
        at_once: Names under which `layers` have calls of all these layers together, in place of the layers; none for
            layers that are called one by one.
    """

    names: tuple[str, ...]
    calls: int = 1
    at_once: tuple[str, ...] = ()

    @property
    def called(self) -> tuple[str, ...]:
        """What is called, by its names in `layers`."""
        return self.at_once or self.names


def find_groups(
    layers: Mapping[str, nn.Module],
    forward: Forward,
    waiting: Waiting | None = None,
    number: int = 0,
    state: KeptState | None = None,
) -> list[Group]:
    """Runs one forward and groups `layers` by the inputs they read, in the order they are called.

    Layers that the forward does not call form groups of one, each behind the layer registered before it: another batch
    may call them.

    Args:
        layers: The layers by name.
        forward: One batch's forward; runs as in `lockstep.walk`.
        waiting: As in `lockstep.walk`. Entered as waiting(number, layer) and left at once wherever the batch would
            wait, so that what it holds there can be measured.
        number: The batch's number.
        state: Learns where the forward keeps something.
    """
    inputs: list[SeenInput] = []
    calls: dict[str, list[int]] = {}  # by layer, which of `inputs` it read, call by call

    def record(name: str, x: Tensor) -> None:
        known = next((i for i, seen in enumerate(inputs) if seen.is_same(x)), None)
        if known is None:
            known = len(inputs)
            inputs.append(SeenInput(x))
            if state is not None:
                state.look()
            with waiting(number, name) if waiting is not None else contextlib.nullcontext():
                pass
        calls.setdefault(name, []).append(known)

    with watch_inputs(layers, record):
        BatchThread(number, forward).resume()
    if state is not None:
        state.end_first()
    together: dict[tuple[int, ...], list[str]] = {}
    for name, read in calls.items():
        together.setdefault(tuple(read), []).append(name)
    groups = list(together.values())
    position = {name: i for i, names in enumerate(groups) for name in names}
    ordered = [(i, Group(tuple(names), len(calls[names[0]]))) for i, names in enumerate(groups)]
    anchor = -1
    for name in layers:
        anchor = position.get(name, anchor)
        if name not in position:
            ordered.append((anchor, Group((name,))))
    return [group for _, group in sorted(ordered, key=lambda pair: pair[0])]
