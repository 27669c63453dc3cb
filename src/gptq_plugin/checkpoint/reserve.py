"""Quantized layers in a model built for float ones: `reserve` makes room for them, `fill` reads them into it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.description import contents_of, describe, most_and_others
from gptq_plugin.checkpoint.files import CONFIG
from gptq_plugin.checkpoint.formats.format import Contents, QuantizedLayer
from gptq_plugin.checkpoint.layer_checks import FLOATS
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.finite import not_finite_in
from gptq_plugin.errors import CheckpointError, brief, lines, some
from gptq_plugin.layers.hooks import share_hooks
from gptq_plugin.layers.packed_together import empty_layer
from gptq_plugin.layers.qlinear import QuantLinear, note_float_rest
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.model.experts import place_experts, possible_experts
from gptq_plugin.model.hf_models import tied_weights
from gptq_plugin.model.linears import is_linear, linear_shape
from gptq_plugin.model.stored_names import expert_parts, key_renaming, plain_renaming, renaming
from gptq_plugin.model.structure import Structure

_SPARE = 2**29  # values that a model may have beside those in the files: tables and masks that it computes


class Place(nn.Module):
    """Stands for a quantized layer while the rest of the model is loaded.

    Some models initialise their children by weights and sizes; those here are marked as initialised.

    Buffers:
        room: uint8 [bytes of the layer], on the meta device until the loader puts it where the layer will go.
    """

    room: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        meta = torch.device("meta")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = torch.empty(layer.out_features, layer.in_features, device=meta)
        self.bias = torch.empty(layer.out_features, device=meta)
        for nothing in (self.weight, self.bias):
            nothing._is_hf_initialized = True  # type: ignore[attr-defined]
        empty = empty_layer(layer.in_features, layer.out_features, layer.bits, layer.group_size, torch.float16)
        size = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())
        self.register_buffer("room", torch.empty(size, dtype=torch.uint8, device=meta), persistent=False)


def reserve(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Puts a `Place` where each quantized layer will be, in a transformers model without weights.

    Returns:
        {module name: name in the checkpoint}.

    Raises:
        CheckpointError: The checkpoint's layers do not fit the model; it is then as it was.
    """
    with contextlib.ExitStack() as undo:
        take_apart(checkpoint, model, plain_renaming(model), undo)
        names = match(checkpoint, model, renaming(model))
        _refuse_other_kinds(checkpoint, model, key_renaming(model))
        undo.pop_all()
    places = {name: Place(checkpoint.layers[stored]) for name, stored in names.items()}
    for name, place in places.items():
        share_hooks(model.get_submodule(name), place)
    swap_modules(model, places)
    _refuse_larger(checkpoint, model)
    return names


def _refuse_other_kinds(checkpoint: Checkpoint, model: nn.Module, rename: Callable[[str], Iterable[str]]) -> None:
    """Refuses tensors that the model computes with as floats and that the files hold as anything else."""
    state = model.state_dict(keep_vars=True)
    problems = [
        f"{name} is stored as {entry.dtype}, and is a float in the model"
        for name in checkpoint.float_names
        if (entry := checkpoint.tensors[name]).dtype not in FLOATS
        and any(key in state and state[key].is_floating_point() for key in (name, *rename(name)))
    ]
    refuse(checkpoint, type(model).__name__, problems)


def _refuse_larger(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuses, before memory is taken, a model that config.json makes far larger than the files are.

    Args:
        checkpoint: The files.
        model: Without weights, its places made. A tied weight counts once.
    """
    tied = tied_weights(model)
    sizes = {name: tensor.numel() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    asked = {name: size for name, size in sizes.items() if name not in tied and not name.endswith(".room")}
    stored = sum(math.prod(checkpoint.tensors[name].shape) for name in checkpoint.float_names)
    if sum(asked.values()) > stored + _SPARE:
        largest = max(asked, key=lambda name: asked[name])
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG} describes a {type(model).__name__} with {sum(asked.values()):,} values "
            f"that are not quantized, such as {largest} with {asked[largest]:,}, and the files hold {stored:,}: "
            "correct it, or fetch the checkpoint again"
        )


def take_apart(
    checkpoint: Checkpoint, model: nn.Module, rename: Callable[[str], str], undo: contextlib.ExitStack
) -> None:
    """Replaces parameters that hold experts' matrices by a Linear each, where the checkpoint quantized them.

    Args:
        checkpoint: Its layers.
        model: For float ones.
        rename: Gives the model's name of a layer in the checkpoint.
        undo: Gets what puts each parameter back.

    Raises:
        CheckpointError: Some experts of a parameter are quantized and others are not, or they have other sizes.
    """
    quantized = {rename(name): layer for name, layer in checkpoint.layers.items()}
    problems: dict[tuple[str, str], str] = {}
    for stacks in possible_experts(model):
        parts = expert_parts(model, stacks)
        for experts in stacks:
            key = experts.name, experts.parameter
            named = {f"{experts.name}.{part.name}": part for own in parts[key] for part in own}
            found = {name: quantized[name] for name in named if name in quantized}
            rows = {name: part.rows.stop - part.rows.start for name, part in named.items()}
            if not found:
                continue
            wrong = [n for n, x in found.items() if (x.out_features, x.in_features) != (rows[n], experts.in_features)]
            lacking = [name for name in named if name not in found]
            if wrong or lacking:
                what = (
                    f"{some(lacking)} of its experts are not quantized" if lacking else f"{some(wrong)} has other sizes"
                )
                problems[key] = f"{experts.name}.{experts.parameter} {tuple(experts.whole.shape)}: {what}"
                continue
            problems.pop(key, None)
            empty = [
                [
                    nn.Linear(experts.in_features, part.rows.stop - part.rows.start, bias=False, device="meta")
                    for part in own
                ]
                for own in parts[key]
            ]
            undo.callback(place_experts(experts, parts[key], empty))
    refuse(checkpoint, type(model).__name__, list(problems.values()))


def fill(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> None:
    """Reads the quantized layers into their places, one by one, each straight onto its place's device.

    Args:
        checkpoint: Where they are read.
        model: A transformers model in which `reserve` made the places, loaded and dispatched.
        names: What `reserve` returned.

    Raises:
        CheckpointError: The model's device map offloads modules, or it holds NaN.
    """
    placed = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in placed or ("cpu" in placed and len(placed) > 1):
        raise CheckpointError(
            f"{checkpoint.directory}: the device map offloads modules ({', '.join(sorted(placed))}), and quantized "
            "layers are not offloaded: give it devices whose memory holds the model, or device='cpu'"
        )
    layers: dict[str, nn.Module] = {}
    for name, stored in names.items():
        place = model.get_submodule(name)
        device = place.room.device
        place.room = None  # its memory is the layer's from here on
        layers[name] = checkpoint.read_layer(stored, dtype=model.dtype, device=device).train(place.training)
        hook = getattr(place, "_hf_hook", None)
        if hook is not None:  # accelerate's, which brings inputs to the device: the map names this layer
            from accelerate.hooks import add_hook_to_module

            # Otherwise the output would stay on this device and meet its block's tensors (a residual) on another.
            hook.io_same_device = True
            add_hook_to_module(layers[name], hook)
    swap_modules(model, layers)
    note_float_rest(model)
    refuse_not_finite(checkpoint, model)


def refuse_missing(checkpoint: Checkpoint, model: Any, stored: set[str]) -> None:
    """Refuses a model with parameters that no file holds: transformers would only report them, and use random values.

    Args:
        checkpoint: For the message.
        model: After `reserve`, so without the weights of quantized layers.
        stored: Names, in the model, of the tensors in the files.

    Raises:
        CheckpointError: It names them.
    """
    state = model.state_dict(keep_vars=True)
    filled = {id(state[name]) for name in stored & state.keys()}  # a shared module has several names
    tied = [{target, source} for target, source in tied_weights(model).items()]
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name, tensor in state.items()
        if id(tensor) not in filled
        and not any(name in names and names & stored for names in tied)
        and not any(pattern.search(name) for pattern in ignored)
    ]
    refuse(
        checkpoint,
        type(model).__name__,
        [f"{name} is missing: there is neither it nor its quantized form" for name in missing],
    )


def in_memory(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The quantization_config of a loaded model: true zeros, so what `save_pretrained` writes is gptq_v2.

    Args:
        checkpoint: What was loaded.
        model: With its quantized layers.
        names: What `reserve` returned.
    """
    layers = {name: checkpoint.layers[stored] for name, stored in names.items()}
    most, rules = most_and_others(
        {name: {"bits": x.bits, "group_size": x.group_size, "sym": x.sym} for name, x in layers.items()}
    )
    config = QuantizeConfig(**most, dynamic=rules, checkpoint_format="gptq_v2")

    def contents() -> Contents:
        loaded: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        return contents_of(Structure.of_unfused(model), loaded, config)

    try:
        changed = checkpoint.format.loaded(checkpoint.quantization, contents)
        if changed is None:
            return describe(contents(), config)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.directory / CONFIG}: {brief(error)}") from error
    head = isinstance(model.get_output_embeddings(), QuantLinear)
    return {**changed, **({"lm_head": True} if head else {})}  # also where the files tell otherwise


def refuse_not_finite(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuses a filled model whose parameters hold NaN or infinity, or whose buffers hold NaN (masks hold infinity).

    Raises:
        CheckpointError: It names them.
    """
    wrong = not_finite_in(model)
    if wrong:
        raise CheckpointError(
            f"{checkpoint.directory}: NaN or infinity in {some(wrong)} of {type(model).__name__}: the files are "
            "damaged, or hold values that the dtype it was loaded in does not"
        )


def match(checkpoint: Checkpoint, model: nn.Module, rename: Callable[[str], str]) -> dict[str, str]:
    """{module name: checkpoint's name} of every quantized layer, a shared one under its first name only.

    Raises:
        CheckpointError: A layer has no Linear in the model, one of other sizes, or one whose weight is tied.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = [name for name, module in modules.items() if isinstance(module, QuantLinear)]
    if quantized:
        raise CheckpointError(
            f"{quantized[0]} of the given {type(model).__name__} is quantized already: build the float model anew"
        )
    tied = tied_weights(model)
    problems: list[str] = []
    names: dict[str, str] = {}
    found: set[nn.Module] = set()
    for stored, layer in checkpoint.layers.items():
        name = stored if stored in modules else rename(stored)
        module = modules.get(name)
        if module is None or not is_linear(module):
            kind = "no module" if module is None else f"a {type(module).__name__}, not a Linear"
            problems.append(f"{stored} is quantized in the checkpoint and {kind} in the model")
            continue
        out_features, in_features = linear_shape(module)
        if (layer.in_features, layer.out_features) != (in_features, out_features):
            problems.append(
                f"{stored} has {layer.in_features} inputs and {layer.out_features} outputs at bits={layer.bits}; the "
                f"model's Linear has {in_features} and {out_features}"
            )
        if module.bias is not None and not layer.has_bias:
            problems.append(f"{stored}.bias is missing; the model's Linear has one")
        if f"{name}.weight" in tied:
            problems.append(
                f"{stored} is quantized, but the model ties its weight to {tied[f'{name}.weight']}: set "
                f"tie_word_embeddings to false in {CONFIG}"
            )
        if module not in found:
            names[name] = stored
            found.add(module)
    refuse(checkpoint, type(model).__name__, problems)
    return names


def refuse(checkpoint: Checkpoint, model: str, problems: list[str]) -> None:
    """Raises a CheckpointError that names the first of `problems` and their number, if there are any."""
    if problems:
        raise CheckpointError(
            f"{checkpoint.directory} does not fit {model}:{lines(problems)}\n"
            "Nothing was loaded. The checkpoint is incomplete, or of another model or another version of it"
        )
