"""The places of parameters and buffers in modules, and other tensors put there for a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from gptq_plugin.device.modules import modules_of


@dataclass(frozen=True)
class Slot:
    """The place of a parameter or buffer.

    Attributes:
        name: Dotted, from the root of the module tree; the same on every rank.
        module: The module that holds it.
        key: Its name there.
    """

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """The tensor there now; of a sharded one, this rank's part."""
        parameter = self.module._parameters.get(self.key)
        tensor = self.module._buffers[self.key] if parameter is None else parameter
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        setattr(self.module, self.key, tensor)  # not _parameters[key]: recurrent layers keep a list of theirs


def own_slots(module: nn.Module, name: str = "") -> Iterator[Slot]:
    """The slots of the module itself, without its children.

    Args:
        module: Any module.
        name: Its dotted name.
    """
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            if tensor is not None:
                yield Slot(f"{name}.{key}".lstrip("."), module, key)


def all_slots(root: nn.Module) -> Iterator[Slot]:
    """The slots of the module and all its descendants."""
    for name, module in modules_of(root).items():
        yield from own_slots(module, name)


def distinct_tensors(root: nn.Module) -> list[Tensor]:
    """Parameters and buffers of the module and all its descendants, each once however often it is used."""
    dictionaries = (
        tensors for module in modules_of(root).values() for tensors in (module._parameters, module._buffers)
    )
    tensors = (tensor for dictionary in dictionaries for tensor in dictionary.values() if tensor is not None)
    return list({id(tensor): tensor for tensor in tensors}.values())


def like(original: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, as a parameter if the original is one: a module takes nothing else in its place."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor


class Substitution:
    """A slot in which other tensors take the place of its own for a time.

    Args:
        slot: Filled with its own tensor now.

    Attributes:
        slot: As given.
        home: Its own tensor.
        of_walks: Of a quantized weight on the device, that of the float model and the quantized one.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.home = slot.tensor
        self.of_walks: tuple[Tensor, Tensor] | None = None
        self._given: Tensor | None = None
        self._version: int | None = 0  # of the given tensor when it was put there; None: it does not matter

    @property
    def is_of_forward(self) -> bool:
        """True if the forward assigned the tensor there now, as rotary embeddings do: it is left alone then."""
        current = self._current
        return current is None or (current is not self.home and current is not self._given)

    def is_lent(self, tensor: Tensor) -> bool:
        """True for the tensor that was put there, as long as nothing was written to it."""
        return tensor is self._given and self._version in (None, tensor._version)

    def put(self, tensor: Tensor, *, lasting: bool = True) -> None:
        """Puts a tensor there.

        Args:
            tensor: In place of the slot's own.
            lasting: If the forward writes to it, it stays.
        """
        self._given, self._version = tensor, tensor._version if lasting else None  # noted first: it may fail
        self.slot.put(tensor)

    def undo(self) -> None:
        """Puts the slot's own tensor back, unless the forward assigned another or wrote to a lasting one."""
        given = self._given
        if given is not None and self._current is given and self._version in (None, given._version):
            self.slot.put(self.home)
        self._given = None  # forgotten last: what raises before leaves it to the next `undo`

    def move_to_home_device(self) -> None:
        """After `undo`: moves a tensor that is still not the slot's own to the device of the one that is."""
        current = self._current
        if isinstance(current, Tensor) and current.device != self.home.device:
            self.slot.put(current.to(self.home.device))

    @property
    def _current(self) -> Tensor | None:
        return getattr(self.slot.module, self.slot.key, None)  # a forward may even delete it
