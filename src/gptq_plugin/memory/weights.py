"""The tensors modules run with while batches walk the model: `Weights`.

A module's own parameters and buffers are its home, and are never written to. For as long as the module is needed it
points to others instead: copies on the execution device, when home is elsewhere, and, once a layer is quantized, its
dequantized weight. To go home is to point back, so undoing everything cannot fail, and a model on the device never
exists twice.

Tensors come and go by units: a module that is small enough as a whole, or the tensors a larger module holds itself. So
transformer blocks are found by their size, and a weight that a block reads without calling its layer is there because
the block was called.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.device.memory import with_index, with_room
from gptq_plugin.layers.packed_together import dequantized_layers
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory.copier import Copier, Copies
from gptq_plugin.memory.slots import Substitution
from gptq_plugin.memory.units import Unit, divide
from gptq_plugin.model.targets import Target
from gptq_plugin.walk.float_walk import serves_float


class Weights:
    """While the context is open, every module of `model` finds its tensors on `device` when it is called.

    Forward pre-hooks on all modules bring the unit a module belongs to, and those of the modules around it. A caller
    that lets other batches run between these hooks and the forward (lock-step) has to call `present` afterwards,
    because those may have sent the unit home. Units go home, least recently used first, when their tensors would exceed
    `capacity`; a call brings them again. The unit that followed in the first pass is copied in the background while the
    one before it is in use.

    At the end every module has its own tensors again, the same objects. Only tensors the forward itself assigned, and
    buffers it wrote to, stay, moved to the device the buffer was on.

    A module larger than `unit_bytes` that reads the weights of its submodules without calling them does not find
    them on the device; PyTorch then reports tensors on two devices. Raise `unit_bytes` to the size of that module.

    Args:
        model: Any module, with its weights loaded.
        device: Where the batches run.
        stream: Copy tensors that are elsewhere to `device`; if that is a CPU, where none are, copy all. Otherwise only
            the weights of quantized layers are temporary.
        capacity: Bytes of temporary tensors to keep on the device; the units of one call stay even if they are more.
        unit_bytes: Size up to which a module is brought as a whole.
        two_walks: Quantized layers keep their float weights too, for the walk of the float model.
        make_room: Called when the device has no room for a copy; returns False if nothing was left to free.

    Attributes:
        copied_bytes: Bytes copied to the device so far.
        peak_bytes: The most bytes of temporary tensors at any time, those on their way included.
        total_bytes: Bytes of all units together that have to be copied to the device; twice for two walks.
        min_resident_bytes: Of the three neighbours that need most; with less, blocks come and go needlessly.
        capacity: As given. Setting it while no batch runs sends home units that are now too much.

    Raises:
        TargetError: A tensor is on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        stream: bool,
        capacity: int,
        unit_bytes: int,
        two_walks: bool = False,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.copied_bytes = 0
        self.peak_bytes = 0
        self._device = device = with_index(device)
        self._stream = stream
        self._two_walks = two_walks
        self._free_more = make_room
        self._capacity = capacity
        self._quantized: dict[nn.Module, tuple[Target, QuantLinear]] = {}
        self._needs = divide(model, unit_bytes)
        sizes = [self._size(unit) * (1 + two_walks) for unit in _units(self._needs)]
        self.total_bytes = sum(sizes)
        self.min_resident_bytes = _most_of_three(sizes)
        self._copier = Copier(device)
        self._resident: OrderedDict[Unit, None] = OrderedDict()  # present or on their way, least recently used first
        self._resident_bytes = 0
        self._latest: Unit | None = None  # the unit first brought after all others
        self._in_use: tuple[Unit, ...] = ()  # by the module that was called last
        self._stops = 0  # times the batches stood still for a layer to be quantized
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Weights:
        self._handles += [m.register_forward_pre_hook(partial(self._hook, m), with_kwargs=True) for m in self._needs]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        tensors = [tensor for unit in _units(self._needs) for tensor in unit.tensors]
        for tensor in tensors:  # before anything that could fail
            tensor.undo()
        for unit in list(self._resident):
            self._send_home(unit)
        for tensor in tensors:
            tensor.move_to_home_device()
        self._quantized.clear()
        self._copier.close()

    @property
    def capacity(self) -> int:
        return self._capacity

    @capacity.setter
    def capacity(self, value: int) -> None:
        self._capacity = value
        self._make_room(0, keep=())

    def keep_least(self) -> bool:
        """Keeps only the units in use from now on; returns whether that frees anything. Batches may run meanwhile."""
        before = self._resident_bytes
        self._capacity = min(self._capacity, self.min_resident_bytes)
        self._make_room(0, keep=self._in_use)
        return self._resident_bytes < before

    def present(self, target: Target) -> Tensor:
        """The weight the layer runs with on this thread, [out, in] in its dtype, on the device.

        Raises:
            RuntimeError: Its unit cannot be copied to the device.
        """
        self._use(target.module)
        return target.weight

    def is_lent(self, tensor: Tensor) -> bool:
        """True for a tensor that is in the place of another, and that the forward has not written to."""
        return any(one.is_lent(tensor) for unit in self._resident for one in unit.tensors)

    def quantize(self, layers: Sequence[tuple[Target, QuantLinear, Tensor | None]]) -> None:
        """From now on the layers run with these, which may move meanwhile, and are dequantized unless values are given.

        To be called when no batch runs, and not on a batch's thread.
        """
        self._stops += 1
        self._quantized.update((target.module, (target, layer)) for target, layer, _ in layers)
        for unit in dict.fromkeys(unit for target, _, _ in layers for unit in self._needs[target.module]):
            places = unit.weights() if unit.present else {}
            here = [one for one in layers if one[0].module in places]
            if here:
                self._make_room(self._size(unit) - unit.bytes, keep=self._needs[here[0][0].module])
                dequantize = partial(_dequantized, [one[:2] for one in here if one[2] is None], self._device)
                missing = iter(with_room(dequantize, self._free_more))
                if not unit.present:  # it went home to make room, and will come with these
                    continue
                for target, _, values in here:
                    of, made = places[target.module], next(missing) if values is None else target.with_weight(values)
                    unit.put_quantized(of, made, of.slot.tensor if self._two_walks else None)
                self._set_bytes(unit, self._size(unit))

    def restore(self, modules: Collection[nn.Module] | None = None) -> None:
        """From now on these layers, or all, run with their float weights again. To be called as `quantize`."""
        for module in list(self._quantized) if modules is None else modules:
            del self._quantized[module]
            for unit in filter(self._resident.__contains__, self._needs[module]):
                self._send_home(unit)

    def _hook(self, module: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._use(module)  # which may not be the one called: another has its place and hooks for a time
        return None if self._device.type == "cpu" else _on_device(args, kwargs, self._device)

    def _use(self, module: nn.Module) -> None:
        units = self._in_use = self._needs[module]
        first = False  # True for the first use of the module's unit since the last stop
        for unit in units:
            first = not unit.present or unit.used != self._stops
            if not unit.present:
                self._bring(unit, units)
            unit.used = self._stops
            self._resident.move_to_end(unit)
            unit.serve(float_walk=serves_float())
        if first:
            self._prefetch(units[-1].next)

    def _bring(self, unit: Unit, keep: Collection[Unit]) -> None:
        if unit not in self._resident:
            self._make_room(self._size(unit), keep)
            self._start(unit)
        try:
            copies = with_room(lambda: self._arrived(unit), self._free_more)
            self._substitute(unit, copies)
        except Exception as error:
            self._send_home(unit)
            raise RuntimeError(f"the weights of {unit.name} could not be brought to {self._device}: {error}") from error
        unit.present = True
        self._set_bytes(unit, self._size(unit))
        if unit.next is None and unit is not self._latest:
            if self._latest is not None:
                self._latest.next = unit
            self._latest = unit

    def _arrived(self, unit: Unit) -> Copies:
        transfer, unit.transfer = unit.transfer or self._copier.start(self._to_copy(unit)), None
        return self._copier.result(transfer)

    def _substitute(self, unit: Unit, copies: Copies) -> None:
        tensors = [(one, self._quantized_layer(one)) for one in unit.tensors if not one.is_of_forward]
        layers = [layer for _, layer in tensors if layer is not None]
        dequantize = partial(_dequantized, layers, self._device)
        made = iter(with_room(partial(self._copier.call, dequantize), self._free_more) if layers else ())
        for tensor, layer in tensors:
            copied = copies.get(id(tensor.home), tensor.home)
            if layer is not None:
                unit.put_quantized(tensor, next(made), copied if self._two_walks else None)
            elif copied is not tensor.home:
                tensor.put(copied)

    def _prefetch(self, unit: Unit | None) -> None:
        """Starts to copy the unit if there is room, or units that no batch used since the last stop leave some: the
        batches come by one after the other, and a unit that the first has left is still needed by the second."""
        if unit is None or unit in self._resident:
            return
        needed = {other for other in self._resident if other.used == self._stops}
        size = self._size(unit)
        if size + sum(other.bytes for other in needed) <= self._capacity:
            self._make_room(size, keep=needed)
            self._start(unit)

    def _start(self, unit: Unit) -> None:
        originals = self._to_copy(unit)
        self.copied_bytes += sum(tensor.nbytes for tensor in originals.values())
        unit.transfer = self._copier.start(originals)
        self._resident[unit] = None
        self._set_bytes(unit, self._size(unit))

    def _make_room(self, incoming: int, keep: Collection[Unit]) -> None:
        for unit in list(self._resident):
            if self._resident_bytes + incoming <= self._capacity:
                break
            if unit not in keep:
                self._send_home(unit)

    def _send_home(self, unit: Unit) -> None:
        del self._resident[unit]
        if unit.transfer is not None:
            unit.transfer.cancel()  # copies that are already being made are freed before the next copy begins
            unit.transfer = None
        for tensor in unit.tensors:
            tensor.undo()
            tensor.of_walks = None
        unit.present = False
        self._set_bytes(unit, 0)
        self._copier.note_freed()

    def _set_bytes(self, unit: Unit, size: int) -> None:
        self._resident_bytes += size - unit.bytes
        unit.bytes = size
        self.peak_bytes = max(self.peak_bytes, self._resident_bytes)

    def _size(self, unit: Unit) -> int:
        """Bytes of temporary tensors the unit has, or will have, on the device."""
        dequantized = sum(one.home.nbytes for one in unit.tensors if self._quantized_layer(one) is not None)
        return dequantized + sum(tensor.nbytes for tensor in self._to_copy(unit).values())

    def _to_copy(self, unit: Unit) -> dict[int, Tensor]:
        """The unit's own tensors that it runs with copies of, by id: each once however often it is tied."""
        return {
            id(one.home): one.home
            for one in unit.tensors
            if self._stream
            and (one.home.device != self._device or self._device.type == "cpu")
            and (self._two_walks or self._quantized_layer(one) is None)
        }

    def _quantized_layer(self, tensor: Substitution) -> tuple[Target, QuantLinear] | None:
        return self._quantized.get(tensor.slot.module) if tensor.slot.key == "weight" else None


def _units(needs: Mapping[nn.Module, tuple[Unit, ...]]) -> list[Unit]:
    return list(dict.fromkeys(unit for units in needs.values() for unit in units))


def neighbour_bytes(weights: Weights) -> int:
    """`Weights.min_resident_bytes`, if all tensors of the units were others than their own."""
    sizes = [sum(one.home.nbytes for one in unit.tensors) for unit in _units(weights._needs)]
    return _most_of_three(sizes) * (1 + weights._two_walks)


def _most_of_three(sizes: Sequence[int]) -> int:
    return max(sum(sizes[i : i + 3]) for i in range(max(1, len(sizes))))


def _on_device(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Any:
    """A call's arguments with the CPU's tensors on the device; None if there are none. Some models send an input to the
    device of a weight, which they ask for before the weight has been brought."""
    if not any(_is_on_cpu(value) for value in (*args, *kwargs.values())):
        return None
    moved = tuple(_moved(value, device) for value in args)
    return moved, {name: _moved(value, device) for name, value in kwargs.items()}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if _is_on_cpu(value) else value


def _is_on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() > 0


@torch.no_grad()
def _dequantized(layers: Sequence[tuple[Target, QuantLinear]], device: torch.device) -> list[nn.Parameter]:
    """The layers' weights as their targets' parameters, on `device`; the layers stay where they are."""
    dtypes = [target.parameter.dtype for target, _ in layers]
    values = dequantized_layers([layer for _, layer in layers], dtypes, device)
    return [target.with_weight(value) for (target, _), value in zip(layers, values, strict=True)]
