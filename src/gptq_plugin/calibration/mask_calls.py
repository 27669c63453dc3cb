"""Watches the calls of modules for the masks among their arguments."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.batches import map_tensors
from gptq_plugin.calibration.sequences import Sequence, arguments_of, masks_among, sequences_in

Key = tuple[str, str]  # a module's name, and that of a mask in its calls
Visit = Callable[[str, nn.Module, dict[str, Tensor]], Mapping[int, Tensor] | None]


@contextlib.contextmanager
def watch_calls(modules: Mapping[str, nn.Module], visit: Visit) -> Iterator[None]:
    """Calls visit(name, module, arguments) before every forward of a module while the context is open.

    Args:
        modules: By name.
        visit: Gets the tensors among the arguments by name; returns replacements by a tensor's `id`, if any.
    """

    def hook(name: str, signature: inspect.Signature) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            try:
                bound = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:
                return None  # the call itself will raise it
            replaced = visit(name, module, arguments_of({**bound, **kwargs}))
            if not replaced:
                return None

            def swap(tensor: Tensor) -> Tensor:
                return replaced.get(id(tensor), tensor)

            return map_tensors(args, swap), map_tensors(kwargs, swap)

        return before

    signatures: dict[Any, inspect.Signature] = {}  # by function: a model has a few classes of many modules
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            method = getattr(module.forward, "__func__", module.forward)
            if method not in signatures:
                signatures[method] = inspect.signature(module.forward)
            before = hook(name, signatures[method])
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


class MaskCalls:
    """The sequences that the calls of one forward describe, by key, in the order in which they come.

    Of a call inside another that describes sequences, only what is new counts: transformers' layers are given the
    model's mask again, in other shapes.

    Args:
        of_batch: Masks in the batch itself, for a first call without any.

    Attributes:
        sequences: By key.
    """

    def __init__(self, of_batch: Mapping[str, Tensor]) -> None:
        self.sequences: dict[Key, Sequence] = {}
        self._of_batch = of_batch
        self._read: set[int] = set()  # ids of masks, which each layer of a model is given again
        self._alive: list[Tensor] = []

    def visit(self, name: str, module: nn.Module, arguments: dict[str, Tensor]) -> None:
        """Takes in a call; see `watch_calls`."""
        inside = any(name != known and (not known or name.startswith(known + ".")) for known, _ in self.sequences)
        if inside and all(id(mask) in self._read for mask in masks_among(arguments).values()):
            return
        known = [sequence.kept for sequence in self.sequences.values()]
        for mask, sequence in sequences_in(module, with_masks(arguments, self._of_batch, inside)).items():
            if inside and (bool(sequence.kept.all()) or any(_equal(sequence.kept, one) for one in known)):
                continue
            if (name, mask) not in self.sequences:
                self.sequences[name, mask] = sequence
        for given in masks_among(arguments).values():
            self._read.add(id(given))
            self._alive.append(given)  # or its id could be another's


def with_masks(arguments: dict[str, Tensor], of_batch: Mapping[str, Tensor], inside: bool = False) -> dict[str, Tensor]:
    """A call's arguments, with the masks of the batch if it has none."""
    if inside or masks_among(arguments):
        return arguments
    missing = {name: mask for name, mask in of_batch.items() if name not in arguments}
    return {**arguments, **missing}


def _equal(kept: Tensor, other: Tensor) -> bool:
    return kept.shape == other.shape and torch.equal(kept, other.to(kept.device))
