"""Lock-step calibration: all batches walk the model together, one forward each, on any architecture.

Every batch's forward is a coroutine (`batch_thread`). A forward pre-hook on each target layer hands the layer's input
to an observer and suspends the batch there. When every batch that can still reach a layer waits at it, its Hessian is
complete, and was computed from inputs that went through the quantized layers before it. The consumer quantizes the
layer and the batches go on through it. So each batch runs once, and the result is exactly what other tools call
`true_sequential`.

One forward of one batch before the walk (`groups.find_groups`) shows in which order the layers are called and which of
them read the very same tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from gptq_plugin.walk.batch_thread import END, BatchThread, Forward, Waiting
from gptq_plugin.walk.float_walk import ONE_WALK, Walks
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.kept_state import KeptState, Values
from gptq_plugin.walk.layer_inputs import SeenInput, watch_inputs


@dataclass
class Stop:
    """A group at whose input every batch waits that can still reach it.

    Attributes:
        group: The group to quantize before going on.
        inputs: By batch number, the input of those that wait here, [..., in]. Empty once the walk goes on.
    """

    group: Group
    inputs: dict[int, Tensor]


@dataclass
class Notes:
    """Irregular calls that a walk met.

    Attributes:
        late: By layer, the number of calls that came when it was quantized: their inputs are not in its Hessian.
    """

    late: dict[str, int] = field(default_factory=dict)


def walk(
    groups: Sequence[Group],
    layers: Mapping[str, nn.Module],
    forwards: Sequence[Forward],
    observe: Callable[[Group, int, Tensor], None],
    agree: Callable[[int], int] = lambda position: position,
    notes: Notes | None = None,
    waiting: Waiting | None = None,
    state: KeptState | None = None,
    walks: Walks = ONE_WALK,
) -> Generator[Stop, None, None]:
    """Runs all forwards in lock-step and yields each group once, when it is ready to be quantized.

    Between two yields the consumer points the layers to other weights; the suspended batches go on through those.
    Closing the iterator, or an exception anywhere, ends all batches and removes all hooks.

    Args:
        groups: From `groups.find_groups`; the same on every rank.
        layers: The layers by name.
        forwards: One callable a batch. Each runs under no_grad on its own thread, with a copy of the caller's context
            variables.
        observe: Called as (group, batch number, input) for every input that belongs in the group's Hessian,
            while its batch is running; the model may overwrite the input afterwards.
        agree: Given this rank's next position in `groups` (END when it has finished), returns the next over all ranks.
            Ranks meet here only, so all yield the same groups in the same order.
        notes: Filled with what deviates.
        waiting: Given a batch's number and a layer's name, a context manager that is entered on the batch's thread
            before it waits at the layer and left when it goes on through it. A batch that is cancelled leaves it
            with an exception.
        state: As `groups.find_groups` left it; None where forwards keep nothing outside their local variables.
        walks: Which of the forwards are the float model's.

    Raises:
        Exception: An exception of a forward, with the number of its batch in a note.
    """
    steps = _Steps(groups, observe, notes if notes is not None else Notes(), walks)
    batches = [
        BatchThread(number, forward, waiting, Values(state) if state is not None else None)
        for number, forward in enumerate(forwards)
    ]
    steps.owner = {batch.thread: batch for batch in batches}
    try:
        with watch_inputs(layers, steps.arrive):
            for batch in batches:
                batch.resume()
            while True:
                leading = (batch.position for batch in batches if not walks.is_float(batch.number))
                position = agree(min(leading, default=END))
                if position == END:
                    break
                for batch in batches:
                    while batch.position < position:  # a float one, at a layer where no other comes
                        batch.resume()
                here = [batch for batch in batches if batch.position == position]
                stop = Stop(groups[position], {b.number: b.input for b in here if b.input is not None})
                try:
                    yield stop
                finally:
                    stop.inputs.clear()  # the consumer may keep the stop, but not every batch's input
                steps.done.add(position)
                for batch in here:
                    batch.resume()
            # Groups that some batch called, but none as often as the forward that found the groups.
            for position, group in enumerate(groups):
                if position not in steps.done and agree(position if position in steps.observed else END) != END:
                    yield Stop(group, {})
    finally:
        for batch in batches:
            batch.cancel()


class _Steps:
    """Decides at every call of a target layer if its input is counted and if the batch waits."""

    def __init__(
        self, groups: Sequence[Group], observe: Callable[[Group, int, Tensor], None], notes: Notes, walks: Walks
    ) -> None:
        self.walks = walks
        self.groups = groups
        self.position = {name: i for i, group in enumerate(groups) for name in group.called}
        self.observe = observe
        self.notes = notes
        self.done: set[int] = set()
        self.observed: set[int] = set()
        self.owner: dict[threading.Thread, BatchThread] = {}

    def arrive(self, name: str, x: Tensor) -> None:
        batch = self.owner.get(threading.current_thread())
        if batch is None or self.walks.passes(batch.number, name):
            return  # or a forward of the model outside the walk
        position = self.position[name]
        seen = batch.seen.setdefault(position, [])
        if any(one.is_same(x) for one in seen):
            return  # another layer of the group, reading the input that was counted
        if position in self.done:
            if self.walks.is_float(batch.number):
                return
            self.notes.late[name] = self.notes.late.get(name, 0) + 1
            return
        group = self.groups[position]
        self.observe(group, batch.number, x)
        if not self.walks.is_float(batch.number):
            self.observed.add(position)
        seen.append(SeenInput(x))
        if len(seen) == group.calls:
            batch.wait_at(position, name, x)
