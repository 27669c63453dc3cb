"""Variants of one forward, run side by side: each waits at every call of a layer for the others to make it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from gptq_plugin.walk.batch_thread import END, BatchThread, Forward, Waiting
from gptq_plugin.walk.kept_state import KeptState, Values
from gptq_plugin.walk.layer_inputs import watch_inputs


def side_by_side(
    layers: Mapping[str, nn.Module],
    forwards: Mapping[int, Forward],
    visit: Callable[[int, str, Tensor], None],
    waiting: Waiting | None = None,
    state: KeptState | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Runs the forwards, in their order up to the first call of a layer, then up to the second, and so on.

    So weights that come and go are brought once for all, and inputs of one call can be compared while they are alive.

    Args:
        layers: The layers by name.
        forwards: By number; each runs as in `lockstep.walk`.
        visit: Called as (number, layer, input) for every call, on the thread of its forward.
        waiting: As for `lockstep.walk`.
        state: As for `lockstep.walk`.
        enough: Asked after each call; the forwards end there if it returns True.

    Raises:
        Exception: That of a forward; the others are ended.
    """

    def arrive(name: str, x: Tensor) -> None:
        batch = owner.get(threading.current_thread())
        if batch is not None:
            visit(batch.number, name, x)
            batch.wait_at(0, name, x)

    batches = [
        BatchThread(number, forward, waiting, Values(state) if state is not None else None)
        for number, forward in forwards.items()
    ]
    owner = {batch.thread: batch for batch in batches}
    try:
        with watch_inputs(layers, arrive):
            while any(batch.position != END for batch in batches) and not enough():
                for batch in batches:
                    if batch.position != END:
                        batch.resume()
    finally:
        for batch in batches:
            batch.cancel()
