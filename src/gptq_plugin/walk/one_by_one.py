"""Calibration with one batch at a time, for models whose batches disturb each other in lock-step: `walk_one_by_one`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gptq_plugin.walk.batch_thread import END, BatchThread, Forward
from gptq_plugin.walk.float_walk import ONE_WALK, Walks
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.kept_state import KeptState, Values
from gptq_plugin.walk.layer_inputs import SeenInput, watch_inputs
from gptq_plugin.walk.lockstep import Stop


def walk_one_by_one(
    groups: Sequence[Group],
    layers: Mapping[str, nn.Module],
    forwards: Sequence[Forward],
    observe: Callable[[Group, int, Tensor], None],
    agree: Callable[[int], int] = lambda position: position,
    state: KeptState | None = None,
    walks: Walks = ONE_WALK,
) -> Generator[Stop, None, None]:
    """Yields each group once, when it is ready to be quantized, as `lockstep.walk` does and with the same inputs.

    For every group each batch runs from its beginning to that group, through what is quantized by then: with n groups
    this takes about n/2 forwards of all batches. Each ends before the next begins, in order.

    Args:
        groups: As for `lockstep.walk`, as are all others.
        layers: The layers by name.
        forwards: One callable a batch; called for each group.
        observe: Called as (group, batch number, input).
        agree: Given a position, or END, returns the least over all ranks.
        state: As `groups.find_groups` left it.
        walks: As for `lockstep.walk`.

    Raises:
        Exception: An exception of a forward, with the number of its batch in a note.
    """
    for position, group in enumerate(groups):
        inputs: dict[int, Tensor] = {}
        observed = False
        for number, forward in enumerate(forwards):
            if all(walks.passes(number, name) for name in group.called):
                continue
            run = _RunTo(group, number, forward, observe, state)
            with watch_inputs({name: layers[name] for name in group.called}, run.arrive):
                found = run.result()
            observed |= run.calls > 0 and not walks.is_float(number)
            if found is not None:
                inputs[number] = found
        if agree(position if observed else END) != END:
            yield Stop(group, inputs)
        inputs.clear()


class _RunTo:
    """A run of a batch up to the last call of a group that counts."""

    def __init__(
        self,
        group: Group,
        number: int,
        forward: Forward,
        observe: Callable[[Group, int, Tensor], None],
        state: KeptState | None,
    ) -> None:
        self.calls = 0
        self._group, self._observe = group, observe
        self._seen: list[SeenInput] = []
        self._batch = BatchThread(number, forward, kept=Values(state, alone=True) if state is not None else None)

    def result(self) -> Tensor | None:
        """Runs it. Returns the input of the last call if it holds NaN or infinity, else an empty one; None without."""
        try:
            self._batch.resume()
            x = self._batch.input
            return None if x is None else x if not torch.isfinite(x).all() else x.new_empty(0)
        finally:
            self._batch.cancel()

    def arrive(self, name: str, x: Tensor) -> None:
        if threading.current_thread() is not self._batch.thread or any(one.is_same(x) for one in self._seen):
            return
        self._observe(self._group, self._batch.number, x)
        self._seen.append(SeenInput(x))
        self.calls += 1
        if self.calls == self._group.calls:
            self._batch.wait_at(0, name, x)
