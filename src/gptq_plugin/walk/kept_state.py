"""State that a forward keeps outside its local variables, exchanged when another batch runs: `KeptState`.

An outer forward may store its conditioning on submodules, a block may keep memory or a cache on itself. A batch that
runs to its end before the next begins never notices that others use the same attributes; one that waits at every layer
reads what the last batch wrote. So the places a forward writes to are found (`watched_places`), and every batch has
values of its own there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.walk.places import Place
from gptq_plugin.walk.watched_places import WatchedPlaces

log = logging.getLogger(__name__)

_LOOKS = 2  # stops of a batch at which all places are looked at, besides its end: an outer forward writes before those


class KeptState:
    """What the places that forwards write to hold while no batch runs: what they held when this object was made.

    A batch begins with a copy of that, see `Values`, and a walk leaves nothing else behind. Weights are not exchanged;
    where the first forward changed some in place (RWKV rescales them once, and remembers it on the model), every place
    holds what that forward left there instead. So do flags where a forward registered hooks, which stay too.

    Args:
        model: Its modules, and what their attributes, classes and forwards refer to, are watched.
        is_lent: True for a tensor that was put in the place of a buffer by others than the forward, and that the
            forward has not written to.
        device: Where a batch's own buffers have to be; None for where the model's are.

    Attributes:
        initial: By place that forwards were seen writing to, what it holds.
    """

    def __init__(
        self,
        model: nn.Module,
        is_lent: Callable[[Tensor], bool] = lambda _: False,
        device: torch.device | None = None,
    ) -> None:
        self.initial: dict[Place, Any] = {}
        self._model, self._is_lent, self._device = model, is_lent, device
        self._shared = {
            id(one): one for module in modules_of(model).values() for one in (module, *module._parameters.values())
        }
        self._versions = [(one, one._version) for one in model.parameters() if not one.is_inference()]
        self._watched = WatchedPlaces(model, is_lent)
        self._hooks = _hooks_of(model)

    def look(self) -> dict[Place, Any]:
        """Finds what has been written; returns the places that are new, and what they held.

        To be called while the first forward runs.
        """
        new = {place: held for place, held in self._watched.written().items() if place not in self.initial}
        self.initial |= new
        return new

    def end_first(self) -> None:
        """Called after the first forward: puts everything back."""
        self.look()
        if any(parameter._version != version for parameter, version in self._versions):
            self.initial = {place: place.get() for place in self.initial}
            self._watched = WatchedPlaces(self._model, self._is_lent)
        else:
            self.restore()
        log.debug("exchanged between batches: %s", ", ".join(map(str, self.initial)) or "nothing")

    def put_back(self) -> None:
        """Makes the initial values the current ones."""
        for place, value in self.initial.items():
            place.put(value)

    def restore(self) -> None:
        """After a `look`: gives changed containers and tensors their contents back, too."""
        flags = {place: place.get() for place in self.initial if isinstance(place.get(), bool)}
        self._watched.restore()
        hooks = _hooks_of(self._model)
        if not hooks <= self._hooks:  # they stay, and so does what tells that they are there
            self.initial |= flags
            self._hooks |= hooks

    def copies(self, values: Mapping[Place, Any]) -> dict[Place, Any]:
        """Copies of values, together, so that what they share stays shared.

        Raises:
            NotCopied: One cannot be copied.
        """
        try:
            copied = copy.deepcopy(list(values.values()), dict(self._shared))
        except Exception as error:
            named = ", ".join(map(str, values))
            raise NotCopied(f"what the forward keeps at {named} cannot be copied: {error}") from error
        return {place: self._moved(place, value) for place, value in zip(values, copied, strict=True)}

    def _moved(self, place: Place, value: Any) -> Any:
        is_here = self._device is None or not (place.is_buffer and isinstance(value, Tensor))
        return value if is_here else value.to(self._device)


def _hooks_of(model: nn.Module) -> set[int]:
    """Forward hooks on the modules of a model but for ours, by `id`."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = (hook for module in modules_of(model).values() for kind in kinds for hook in getattr(module, kind).values())
    return {id(hook) for hook in hooks if not str(getattr(hook, "__module__", None)).startswith("gptq_plugin")}


class NotCopied(Exception):
    """A value that a forward keeps on a module cannot be copied, so batches cannot have one each."""


class Values:
    """What one batch keeps. `put` before it runs, `take` when it waits; it begins with the initial values.

    Args:
        state: Of the walk.
        alone: No other batch runs before this one has ended: it begins with an initial value itself if that cannot be
            copied.
        looks: Find what it writes elsewhere; False if modules were replaced, which looks like that.
    """

    def __init__(self, state: KeptState, *, alone: bool = False, looks: bool = True) -> None:
        self._state = state
        self._alone, self._looks_at_all = alone, looks
        self._own: dict[Place, Any] = {}
        self._looks = 0

    def put(self) -> None:
        """Makes the batch's values the current ones.

        Raises:
            NotCopied: A value cannot be copied.
        """
        initial = self._state.initial
        missing = {place: value for place, value in initial.items() if place not in self._own}
        if missing:
            self._own |= self._copies(missing)
        for place, value in self._own.items():
            place.put(value)

    def take(self, *, at_end: bool) -> None:
        """Keeps the batch's values, and makes the initial ones current.

        Raises:
            NotCopied: A value cannot be copied.
        """
        self._looks += 1
        new = self._state.look() if self._looks_at_all and (at_end or self._looks <= _LOOKS) else {}
        for place in self._own:
            self._own[place] = place.get()
        if new:  # the first forward, of another batch, wrote nothing there
            self._own |= self._copies({place: place.get() for place in new})
            self._state.restore()
        if at_end:
            self._own.clear()
        self._state.put_back()

    def _copies(self, values: Mapping[Place, Any]) -> dict[Place, Any]:
        try:
            return self._state.copies(values)
        except NotCopied:
            if not self._alone:
                raise
        copied: dict[Place, Any] = {}
        for place, value in values.items():
            try:
                copied |= self._state.copies({place: value})
            except NotCopied:
                copied[place] = value
        return copied
