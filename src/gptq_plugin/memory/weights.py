"""The tensors modules run with while batches walk the model: `Weights`.

Every module's own parameters and buffers are its home, and nobody writes to them. For as long as a module is
needed it points to others instead: copies on the execution device, when home is elsewhere, and, once a layer is
quantized, its dequantized weight. To go home is to point back, so undoing everything cannot fail, and a model on
the device never exists twice.

What comes and goes together is a unit: a module that is small enough as a whole, or the tensors a larger module
holds itself. So transformer blocks are found by their size, and what a block reads from its parts without calling
them is there because the block was called.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gptq_plugin.device.memory import free_bytes, numbered
from gptq_plugin.errors import TargetError, some
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory.placement import UNLIMITED, unit_bytes
from gptq_plugin.model.targets import Target

_T = TypeVar("_T")
_Copies = dict[int, Tensor]  # by the id of the tensor at home
_LISTS = (nn.ParameterList, nn.ParameterDict)  # of parameters: never called


class Weights:
    """While the context is open, every module of `model` finds its tensors on `device` when it is called.

    Forward pre-hooks on all modules bring the unit a module belongs to, and those of the modules around it.
    Whatever lets other batches run between these hooks and the forward (lock-step) has to call `present` afterwards,
    because those may have sent the unit home. Units go home, least recently used first, when their
    tensors would exceed `capacity`; a call brings them again. The unit that followed in the first pass is copied
    in the background while the one before it is in use.

    At the end every module has its own tensors again, the same objects. Only what the forward itself assigned or
    wrote to a buffer stays, moved to the device the buffer was on.

    A module larger than `unit_bytes` that reads the weights of its submodules without calling them does not find
    them on the device; PyTorch then reports tensors on two devices. Raise `unit_bytes` to the size of that module.

    Args:
        model: Any module, with its weights loaded.
        device: Where the batches run.
        stream: Copy to `device` what lies elsewhere; on a CPU, where nothing lies elsewhere, copy everything.
            Otherwise only the weights of quantized layers are temporary.
        capacity: Bytes of temporary tensors to keep on the device; the units of one call stay even if they are more.
        unit_bytes: Size up to which a module is brought as a whole.

    Attributes:
        bytes_brought: Bytes copied to the device so far.
        bytes: The most bytes of temporary tensors at any time, those on their way included.
        total: Bytes of all units together, as far as they have to be copied to the device.
        few: Bytes of the three neighbours among them that need most; with less, blocks come and go needlessly.
        capacity: As given; setting it while no batch runs sends home what is now too much.

    Raises:
        TargetError: A tensor is on the meta device.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, stream: bool, capacity: int, unit_bytes: int) -> None:
        self.bytes_brought = 0
        self.bytes = 0
        self._device = device = numbered(device)
        self._stream = stream
        self._capacity = capacity
        self._quantized: dict[nn.Module, tuple[Target, QuantLinear]] = {}
        self._needs = _divide(model, unit_bytes)
        sizes = [self._size(unit) for unit in self._units()]
        self.total, self.min_resident_bytes = sum(sizes), max(sum(sizes[i : i + 3]) for i in range(max(1, len(sizes))))
        self._copier = _Copier(device)
        self._here: OrderedDict[_Unit, None] = OrderedDict()  # present or on their way, least recently used first
        self._held = 0  # bytes of all of them
        self._last: _Unit | None = None  # the unit first brought after all others
        self._stops = 0  # times the batches stood still for a layer to be quantized
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Weights:
        self._handles += [module.register_forward_pre_hook(self._hook, with_kwargs=True) for module in self._needs]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for unit in list(self._here):
            self._send_home(unit)
        for unit in self._units():
            for slot in unit.slots:
                slot.settle()
        self._quantized.clear()
        self._copier.close()

    @property
    def capacity(self) -> int:
        return self._capacity

    @capacity.setter
    def capacity(self, value: int) -> None:
        self._capacity = value
        self._make_room(0, keep=())

    def present(self, target: Target) -> Tensor:
        """The weight the layer runs with, [out, in] in its dtype, on the device: float until it is quantized.

        Raises:
            RuntimeError: Its unit cannot be copied to the device.
        """
        self._use(target.module)
        return target.weight

    def quantize(self, target: Target, layer: QuantLinear) -> None:
        """From now on the layer runs with the weights of `layer`, which may move to another device meanwhile.

        To be called when no batch runs, and not on a batch's thread.
        """
        self._stops += 1
        self._quantized[target.module] = (target, layer)
        for unit in self._needs[target.module]:
            slot = next((slot for slot in unit.slots if slot.module is target.module and slot.name == "weight"), None)
            if slot is not None and unit.present:
                self._make_room(self._size(unit) - unit.bytes, keep=self._needs[target.module])
                slot.give(_dequantized(target, layer, self._device))
                self._count(unit, self._size(unit))

    def _units(self) -> list[_Unit]:
        return list(dict.fromkeys(unit for units in self._needs.values() for unit in units))

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._use(module)
        if self._device.type == "cpu":
            return None
        # Some models send an input to where a weight is, which they ask before the weight has been brought.
        if not any(self._strays(value) for value in (*args, *kwargs.values())):
            return None
        moved = tuple(self._moved(value) for value in args)
        return moved, {name: self._moved(value) for name, value in kwargs.items()}

    def _strays(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() > 0

    def _moved(self, value: Any) -> Any:
        return value.to(self._device) if self._strays(value) else value

    def _use(self, module: nn.Module) -> None:
        units = self._needs[module]
        first = False  # whether the module's unit was not in use since the last stop
        for unit in units:
            first = not unit.present or unit.used != self._stops
            if not unit.present:
                self._bring(unit, units)
            unit.used = self._stops
            self._here.move_to_end(unit)
        if first:
            self._prefetch(units[-1].next)

    def _bring(self, unit: _Unit, keep: Collection[_Unit]) -> None:
        if unit not in self._here:
            self._make_room(self._size(unit), keep)
            self._start(unit)
        assert unit.copies is not None
        try:
            copies = self._copier.result(unit.copies)
            for slot in unit.slots:
                self._point(slot, copies)
        except Exception as error:
            self._send_home(unit)
            raise RuntimeError(f"the weights of {unit.name} could not be brought to {self._device}: {error}") from error
        unit.copies = None
        unit.present = True
        self._count(unit, self._size(unit))
        if unit.next is None and unit is not self._last:
            if self._last is not None:
                self._last.next = unit
            self._last = unit

    def _point(self, slot: _Slot, copies: _Copies) -> None:
        if slot.is_models_own:
            return
        quantized = self._layer(slot)
        if quantized is not None:
            target, layer = quantized
            slot.give(self._copier.call(lambda: _dequantized(target, layer, self._device)))
        elif id(slot.home) in copies:
            slot.give(copies[id(slot.home)])

    def _prefetch(self, unit: _Unit | None) -> None:
        """Takes free room, or that of units no batch used since the last stop: the batches come by one after the
        other, and what the first has left the second still needs."""
        if unit is None or unit in self._here:
            return
        needed = {other for other in self._here if other.used == self._stops}
        size = self._size(unit)
        if size + sum(other.bytes for other in needed) <= self._capacity:
            self._make_room(size, keep=needed)
            self._start(unit)

    def _start(self, unit: _Unit) -> None:
        away = self._away(unit)
        self.bytes_brought += sum(tensor.nbytes for tensor in away.values())
        unit.copies = self._copier.start(away)
        self._here[unit] = None
        self._count(unit, self._size(unit))

    def _make_room(self, incoming: int, keep: Collection[_Unit]) -> None:
        for unit in list(self._here):
            if self._held + incoming <= self._capacity:
                break
            if unit not in keep:
                self._send_home(unit)

    def _send_home(self, unit: _Unit) -> None:
        del self._here[unit]
        if unit.copies is not None:
            unit.copies.cancel()  # what is already being copied is freed before the next copy begins
            unit.copies = None
        for slot in unit.slots:
            slot.go_home()
        unit.present = False
        self._count(unit, 0)
        self._copier.note_freed()

    def _count(self, unit: _Unit, size: int) -> None:
        self._held += size - unit.bytes
        unit.bytes = size
        self.bytes = max(self.bytes, self._held)

    def _size(self, unit: _Unit) -> int:
        """Bytes of temporary tensors the unit has, or will have, on the device."""
        dequantized = sum(slot.home.nbytes for slot in unit.slots if self._layer(slot) is not None)
        return dequantized + sum(tensor.nbytes for tensor in self._away(unit).values())

    def _away(self, unit: _Unit) -> _Copies:
        """The tensors at home that the unit runs with copies of, each once however often it is tied."""
        return {
            id(slot.home): slot.home
            for slot in unit.slots
            if self._stream
            and (slot.home.device != self._device or self._device.type == "cpu")
            and self._layer(slot) is None
        }

    def _layer(self, slot: _Slot) -> tuple[Target, QuantLinear] | None:
        return self._quantized.get(slot.module) if slot.name == "weight" else None


@contextlib.contextmanager
def streamed_to(
    model: nn.Module, device: torch.device | None, *, besides: nn.Module | None = None, capacity: int | None = None
) -> Iterator[None]:
    """The model's parts run on the device for the length of a with block, wherever their tensors are and however large
    they are. What the model holds itself is there all the time: nobody may call it as a whole.

    Args:
        model: Any module.
        device: None, or a CPU, changes nothing.
        besides: Somewhere in the model: to be left alone, with all that is in it.
        capacity: Bytes of weights to keep on the device; half of what is free there when None.
    """
    if device is None or device.type == "cpu":
        yield
        return
    device = numbered(device)
    around = [m for m in model.modules() if m is model or any(part is besides for part in list(m.modules())[1:])]
    children = {} if besides is model else {child: None for m in around for child in m.children()}
    held = [*around, *(child for child in children if isinstance(child, _LISTS))]
    parts = [child for child in children if child is not besides and child not in held]
    own = [_Slot(m, name, tensor) for m in held for name, tensor in _tensors(m).items() if tensor.device != device]
    free = free_bytes(device)
    with contextlib.ExitStack() as stack:
        for slot in own:
            stack.callback(slot.go_home)
            slot.give(_alike({0: slot.home.to(device)}, {0: slot.home})[0])
        if parts:
            if capacity is None:
                capacity = UNLIMITED if free is None else free // 2
            together = nn.ModuleList(parts)
            unit = unit_bytes(together, free)
            stack.enter_context(Weights(together, device, stream=True, capacity=capacity, unit_bytes=unit))
        yield


class _Slot:
    """A parameter or buffer of a module by its name: the tensor at home, and the one in its place."""

    def __init__(self, module: nn.Module, name: str, home: Tensor) -> None:
        self.module = module
        self.name = name
        self.home = home
        self._given: Tensor | None = None
        self._version = 0  # of the given tensor when it was given

    @property
    def is_models_own(self) -> bool:
        """Whether the forward assigned or wrote what is here, as rotary embeddings do: it is left alone then."""
        return self._value is not self.home and self._value is not self._given

    def give(self, value: Tensor) -> None:
        self._value = value
        self._given, self._version = value, value._version

    def go_home(self) -> None:
        given, self._given = self._given, None
        if given is not None and self._value is given and given._version == self._version:
            self._value = self.home

    def settle(self) -> None:
        """Moves what is the model's own to where the tensor at home is."""
        if isinstance(self._value, Tensor) and self._value.device != self.home.device:
            self._value = self._value.to(self.home.device)

    @property
    def _value(self) -> Tensor | None:
        return getattr(self.module, self.name, None)

    @_value.setter
    def _value(self, value: Tensor) -> None:
        setattr(self.module, self.name, value)  # not _parameters[name]: recurrent layers keep a list of their own


@dataclass(eq=False)
class _Unit:
    """What is brought and sent home together.

    Attributes:
        name: Of its module, for errors.
        slots: Its tensors.
        bytes: Size of the temporary ones among them, on the device or on their way.
        copies: On their way.
        present: Whether its modules point to what they run with.
        used: Count of stops at its last use.
        next: The unit first brought after this one.
    """

    name: str
    slots: list[_Slot]
    bytes: int = 0
    copies: Future[tuple[_Copies, torch.cuda.Event | None]] | None = None
    present: bool = False
    used: int = -1
    next: _Unit | None = None


class _Copier:
    """One thread that copies tensors to the device, with a CUDA stream of its own.

    No copy is made on a batch's thread: the modes that are on there, such as one that watches the batch's
    activations, must not see it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._freed: torch.cuda.Event | None = None

    def start(self, tensors: Mapping[int, Tensor]) -> Future[tuple[_Copies, torch.cuda.Event | None]]:
        return self._pool.submit(self._copy, tensors, self._freed)

    def result(self, copies: Future[tuple[_Copies, torch.cuda.Event | None]]) -> _Copies:
        """The copies, ready for the current stream; raises what went wrong on the thread."""
        tensors, arrived = copies.result()
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            for tensor in tensors.values():
                tensor.record_stream(current)  # its memory belongs to the copying stream
        return tensors

    def call(self, function: Callable[[], _T]) -> _T:
        """Runs the function on the thread, on the caller's stream, and waits for it to return."""
        stream = torch.cuda.current_stream(self._device) if self._stream is not None else None

        def run() -> _T:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                return function()

        return self._pool.submit(run).result()

    def note_freed(self) -> None:
        """Later copies wait until the current stream is here: memory it still reads is free only then."""
        if self._stream is not None:
            self._freed = torch.cuda.Event(blocking=True)
            self._freed.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _copy(
        self, tensors: Mapping[int, Tensor], freed: torch.cuda.Event | None
    ) -> tuple[_Copies, torch.cuda.Event | None]:
        if self._stream is None:
            copies = {key: tensor.detach().to(self._device, copy=True) for key, tensor in tensors.items()}
            return _alike(copies, tensors), None
        if freed is not None:
            freed.synchronize()
        with torch.cuda.stream(self._stream):
            copies = {}
            for key, tensor in tensors.items():
                pinned = tensor.detach().pin_memory() if tensor.device.type == "cpu" else tensor.detach()
                copies[key] = pinned.to(self._device, non_blocking=True)
            return _alike(copies, tensors), self._stream.record_event()


def _alike(copies: _Copies, tensors: Mapping[int, Tensor]) -> _Copies:
    """Copies of parameters as parameters, which is what a module takes in place of one."""
    return {
        key: nn.Parameter(value, requires_grad=False) if isinstance(tensors[key], nn.Parameter) else value
        for key, value in copies.items()
    }


@torch.no_grad()
def _dequantized(target: Target, layer: QuantLinear, device: torch.device) -> nn.Parameter:
    """The layer's weights as the target's parameter, on `device`; the layer stays where it is."""
    if layer.qweight.device != device:
        layer = copy.deepcopy(layer).to(device)
    return target.with_weight(layer.dequantize(target.parameter.dtype))


def _divide(model: nn.Module, unit_bytes: int) -> dict[nn.Module, tuple[_Unit, ...]]:
    """For every module with tensors in or around it, the units it needs when it runs, the outermost first.

    Those around it too: the forward of a module goes on after its submodules', and reads its own tensors then.
    """
    names = {module: name for name, module in model.named_modules()}
    meta = [f"{names[m]}.{name}".lstrip(".") for m in names for name, tensor in _tensors(m).items() if tensor.is_meta]
    if meta:
        raise TargetError(
            f"{some(meta)} of {type(model).__name__} are on the meta device, where tensors have no values: load the "
            "weights first, all of them into memory (no device_map that offloads, no init_empty_weights)"
        )
    needs: dict[nn.Module, dict[_Unit, None]] = defaultdict(dict)
    owner: dict[nn.Module, _Unit] = {}  # a module that occurs in several places belongs to the first one's unit

    def divide(module: nn.Module, around: dict[_Unit, None]) -> None:
        distinct = {id(tensor): tensor for part in module.modules() for tensor in _tensors(part).values()}
        is_whole = sum(tensor.nbytes for tensor in distinct.values()) <= unit_bytes
        lists = [child for child in module.children() if isinstance(child, _LISTS)]
        members = list(module.modules()) if is_whole else [module, *lists]
        new = [member for member in members if member not in owner]
        slots = [_Slot(member, name, tensor) for member in new for name, tensor in _tensors(member).items()]
        unit = _Unit(names[module] or type(model).__name__, slots)
        for member in new:
            owner[member] = unit
        units = around | {owner[member]: None for member in members if owner[member].slots}
        for member in members:
            needs[member].update(units)
        for child in module.children():
            if child not in members:
                divide(child, units)

    divide(model, {})
    return {module: tuple(units) for module, units in needs.items() if units}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers."""
    return {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
