"""Fills a plain module from a checkpoint: its Linears are replaced, its other tensors read from the files."""

from __future__ import annotations

import contextlib
from collections import defaultdict

import torch
from torch import Tensor, nn

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.layer_checks import FLOATS
from gptq_plugin.checkpoint.reserve import match, refuse, take_apart
from gptq_plugin.device.finite import all_finite, any_nan
from gptq_plugin.errors import CheckpointError
from gptq_plugin.layers.qlinear import note_float_rest
from gptq_plugin.layers.stored_weight import arrange_layers
from gptq_plugin.layers.swap import swap_modules


def load_into(checkpoint: Checkpoint, model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Fills a float model, in place, after everything has been compared by name and shape.

    Raises:
        CheckpointError: The checkpoint does not fit the model.
    """
    _refuse_other_root(checkpoint, model)
    with contextlib.ExitStack() as undo:
        take_apart(checkpoint, model, lambda name: name, undo)
        _fill(checkpoint, model, device, dtype, undo)
        undo.pop_all()
    arrange_layers(model)
    return model.eval()


def _fill(
    checkpoint: Checkpoint,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
    undo: contextlib.ExitStack,
) -> None:
    """Compares everything, reads everything, and only then changes the model; `undo` gets what changes it back."""
    names = match(checkpoint, model, lambda name: name)
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = {modules[name] for name in names}
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if modules[name.rpartition(".")[0]] not in replaced
    }
    stored = set(checkpoint.float_names)
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        aliases[id(tensor)].append(name)
    problems = []
    sources: dict[str, Tensor] = {}  # name in the file -> the model's tensor
    for group in aliases.values():
        present = [name for name in group if name in stored]
        stored.difference_update(present)
        if not present:
            problems.append(f"{' (tied to '.join(group)}{')' * (len(group) - 1)} is missing")
            continue
        wanted, found = tuple(state[group[0]].shape), checkpoint.tensors[present[0]].shape
        if wanted != found:
            problems.append(f"{present[0]} has shape {list(found)}, the model needs {list(wanted)}")
        if state[group[0]].is_floating_point() and checkpoint.tensors[present[0]].dtype not in FLOATS:
            problems.append(f"{present[0]} is stored as {checkpoint.tensors[present[0]].dtype}, and is a float there")
        sources[present[0]] = state[group[0]]
    problems += [f"{name} belongs to no module of the model" for name in sorted(stored)]
    refuse(checkpoint, type(model).__name__, problems)
    values = {name: checkpoint.read(name) for name in sources}
    parameters = {id(parameter) for parameter in model.parameters()}
    wrong = [
        name
        for name, value in values.items()
        if (any_nan(value) if id(sources[name]) not in parameters else not all_finite(value))
    ]
    refuse(checkpoint, type(model).__name__, [f"{name} holds NaN or infinity" for name in wrong])
    layers = {name: checkpoint.read_layer(stored, dtype=dtype, device=device) for name, stored in names.items()}
    moved = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in values.items()}
    floats = {name: modules[name] for name in names}
    for name, tensor in sources.items():
        undo.callback(setattr, tensor, "data", tensor.data)
        tensor.data = moved[name]
    undo.callback(swap_modules, model, floats)
    swap_modules(model, layers)
    note_float_rest(model)
    model.to(device)


def _refuse_other_root(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuses the export of what holds the model, or of a part of it, with the way to load it.

    Raises:
        CheckpointError: All layers of one have the names of the other's, but for a prefix.
    """
    stored, kind = list(checkpoint.layers), type(model).__name__
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if not stored or any(name in modules for name in stored):
        return
    exported = checkpoint.model_config.get("module_class", "a module")
    for holder in _beginnings(stored[0]):
        if all(name.startswith(f"{holder}.") and name[len(holder) + 1 :] in modules for name in stored):
            raise CheckpointError(
                f"{checkpoint.directory} is the export of {exported}, which holds its layers in {holder!r} "
                f"({stored[0]}), and {kind} has them without. To export {kind} alone, give "
                f"GPTQCallback(module={holder!r}); to load this export, build what holds it, and take its {holder}"
            )
    for name, _ in model.named_modules():
        if name and all(f"{name}.{layer}" in modules for layer in stored):
            raise CheckpointError(
                f"{checkpoint.directory} is the export of {exported}, which is {name!r} in {kind}: load it into that, "
                f"load_quantized(folder, model=model.{name})"
            )


def _beginnings(name: str) -> list[str]:
    """The names of what holds `name`, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]
