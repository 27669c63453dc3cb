"""Tries if calibration batches can take turns: `disturbance`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from gptq_plugin.calibration.batches import row_of, sample_count
from gptq_plugin.walk.disturbance import disturbed_layer
from gptq_plugin.walk.kept_state import KeptState, NotCopied


def disturbance(
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    run: Callable[[Any], Any],
    present: Callable[[str], object],
    state: KeptState,
    two_walks: bool = False,
) -> str | None:
    """Returns why the batches cannot take turns, or None if they can: tried on one sample of each of two batches.

    Args:
        layers: The layers by name.
        batches: Data of batches; the first two are used, and fewer take no turns.
        run: Runs a batch through the model.
        present: Brings the weights of a layer back before it runs.
        state: What forwards keep on the model.
        two_walks: A batch by itself takes turns with its float forward: its first two samples are tried then.
    """
    if two_walks and len(batches) == 1 and (sample_count(batches[0]) or 0) > 1:
        batches = [batches[0], row_of(batches[0], 1)]
    try:
        state.copies(state.initial)
    except NotCopied as error:
        return str(error)
    if len(batches) < 2:
        return None

    @contextlib.contextmanager
    def waiting(number: int, name: str) -> Iterator[None]:
        yield
        present(name)

    def first_disturbed(first: Any, second: Any) -> str | None:
        return disturbed_layer(layers, lambda: run(first), lambda: run(second), waiting, state)

    try:
        layer = first_disturbed(row_of(batches[0], 0), row_of(batches[1], 0))
    except Exception:  # noqa: BLE001 - a forward may need whole batches, and those it is known to take
        layer = first_disturbed(batches[0], batches[1])
    return f"the input of {layer} depends on which batch ran before it" if layer is not None else None
