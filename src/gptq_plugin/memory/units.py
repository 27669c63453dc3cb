"""Units: the tensors of a model that are brought to the device and sent home together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor, nn

from gptq_plugin.device.finite import has_values
from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import TargetError, some
from gptq_plugin.memory.copier import Transfer
from gptq_plugin.memory.slots import Substitution, all_slots, distinct_tensors, own_slots

PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)  # modules that are never called


@dataclass(eq=False)
class Unit:
    """A module that is small enough as a whole, or the tensors a larger module holds itself.

    Attributes:
        name: The module's name, for errors.
        tensors: Its tensors.
        bytes: Size of the temporary ones among them, on the device or on their way.
        transfer: Copies on their way.
        present: True while its modules point to the tensors they run with.
        used: Count of stops at its last use.
        float_walk: True while its quantized layers have the float model's weights.
        next: The unit first brought after this one.
    """

    name: str
    tensors: list[Substitution]
    bytes: int = 0
    transfer: Transfer | None = None
    present: bool = False
    used: int = -1
    float_walk: bool = False
    next: Unit | None = None

    def weights(self) -> dict[nn.Module, Substitution]:
        """The weights in this unit, by module."""
        return {one.slot.module: one for one in self.tensors if one.slot.key == "weight"}

    def put_quantized(self, weight: Substitution, made: Tensor, original: Tensor | None) -> None:
        """Puts a quantized layer's weight in its place; also keeps the original if the float model walks too."""
        weight.of_walks = None if original is None else (original, made)
        weight.put(made if original is None or not self.float_walk else original, lasting=False)

    def serve(self, *, float_walk: bool) -> None:
        """Has quantized layers run with the weights of that walk, where they have both."""
        if self.float_walk == float_walk:
            return
        self.float_walk = float_walk
        for tensor in self.tensors:
            if tensor.of_walks is not None and not tensor.is_of_forward:
                tensor.put(tensor.of_walks[0 if float_walk else 1], lasting=False)


def divide(model: nn.Module, unit_bytes: int) -> dict[nn.Module, tuple[Unit, ...]]:
    """For every module with tensors in or around it, the units it needs when it runs, the outermost first.

    Those around it belong to them because the forward of a module goes on after its submodules', and reads its own
    tensors then.

    Args:
        model: Any module, with its weights loaded.
        unit_bytes: Size up to which a module is one unit.

    Raises:
        TargetError: A tensor is on the meta device.
    """
    meta = [slot.name for slot in all_slots(model) if not has_values(slot.tensor)]
    if meta:
        raise TargetError(
            f"{some(meta)} of {type(model).__name__} are on the meta device, or of FakeTensorMode, and have no values: "
            "load the weights first, all of them into memory (no device_map that offloads, no init_empty_weights)"
        )
    names = {module: name for name, module in modules_of(model).items()}
    needs: dict[nn.Module, dict[Unit, None]] = defaultdict(dict)
    owner: dict[nn.Module, Unit] = {}  # a module that occurs in several places belongs to the first one's unit

    def visit(module: nn.Module, around: dict[Unit, None]) -> None:
        is_whole = sum(tensor.nbytes for tensor in distinct_tensors(module)) <= unit_bytes
        lists = [child for child in module.children() if isinstance(child, PARAMETER_LISTS)]
        members = list(modules_of(module).values()) if is_whole else [module, *lists]
        new = [member for member in members if member not in owner]
        tensors = [Substitution(slot) for member in new for slot in own_slots(member, names[member])]
        unit = Unit(names[module] or type(model).__name__, tensors)
        for member in new:
            owner[member] = unit
        units = around | {owner[member]: None for member in members if owner[member].tensors}
        for member in members:
            needs[member].update(units)
        for child in module.children():
            if child not in members:
                visit(child, units)

    visit(model, {})
    return {module: tuple(units) for module, units in needs.items() if units}
