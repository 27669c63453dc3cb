"""From a quantized checkpoint to a model that runs: `load_quantized`.

A transformers model is built by transformers' own `from_pretrained`, so that renamed weights, tied weights,
rotary buffers, dtypes and the generation config come out as it makes them. Between building the (weightless)
model and loading it, `reserve` replaces every quantized Linear by an empty placeholder of the layer's size: no float
weight is allocated for it, none is missed, and a device map counts what the layer will take. `fill` then reads the
quantized layers one by one, each onto its placeholder's device. `hf_quantizer` uses the same two.

Any other model is built by the user; its Linears are replaced and its other tensors filled from the file,
after everything has been compared by name and shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.checkpoint.checkpoint import CONFIG, Checkpoint
from gptq_plugin.checkpoint.description import client_config, most_and_others
from gptq_plugin.checkpoint.layouts import QuantizedLayer
from gptq_plugin.config import COMPRESSED, QuantizeConfig
from gptq_plugin.errors import CheckpointError, some
from gptq_plugin.layers.qlinear import QuantLinear, swap_modules
from gptq_plugin.model.experts import place_experts, possible_experts
from gptq_plugin.model.stored_names import expert_parts, plain_renaming, renaming
from gptq_plugin.model.targets import is_linear, linear_shape


def load_quantized(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Loads a checkpoint of this package, GPTQModel, AutoGPTQ, optimum or llm-compressor (pack-quantized) with
    `QuantLinear` layers, in evaluation mode.

    Args:
        directory: Folder with config.json, the safetensors files and (AutoGPTQ) quantize_config.json.
        device: Where the model goes. Tensors are read from the files onto it one by one; a transformers model needs
            accelerate for that, and without it passes through the CPU's memory.
        device_map: Instead of `device`, as transformers and accelerate understand it: ``"auto"``, ``"balanced"``,
            ``"sequential"`` or ``{module name: device}``, the longest name first. A quantized layer may be away from
            its block; other parts of a block may not, in float models neither. Needs accelerate. Quantized layers are
            not offloaded: a map with both an accelerator and ``"cpu"`` or ``"disk"`` is refused. For transformers
            models only.
        dtype: Floating dtype of everything that is not quantized, and so of the computation; the checkpoint's
            own (usually float16 or bfloat16) when None. Scales stay float16.
        model: For an export of a plain nn.Module: the float model it was made from, freshly built. It is
            changed in place and returned. Without it, config.json must name a transformers architecture.
        trust_remote_code: Run the Python files in the folder, where config.json says (``auto_map``) that the model's
            class is in them; without it such a folder is refused. For folders whose code you have read.

    Returns:
        The transformers model, ready for `generate`, or `model`. Its config describes what is in memory
        (``checkpoint_format="gptq_v2"``, true zeros), so that `save_pretrained` writes a valid checkpoint
        too.

    Raises:
        CheckpointError: The checkpoint is incomplete, corrupt, contradicts itself or does not fit the model.
            The message names every file, tensor and module; `model` is then as it was.
        ValueError: `device_map` together with `device` or `model`.
    """
    if device_map is not None and (model is not None or torch.device(device).type != "cpu"):
        raise ValueError(
            "device_map says where every module of a transformers model goes: give it without `device`, and place a "
            "`model` of your own with `device`"
        )
    checkpoint = Checkpoint.open(directory)
    if model is not None:
        return _load_into(checkpoint, model, torch.device(device), dtype)
    if not checkpoint.model_config.get("architectures"):
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG} names no transformers architecture, so it is the export of a "
            "plain "
            f"nn.Module ({checkpoint.model_config.get('module_class', 'of unknown class')}): build that "
            "model and call "
            "load_quantized(directory, model=it)"
        )
    architecture, config = _architecture(checkpoint, trust_remote_code)
    return _load_transformers(checkpoint, architecture, config, torch.device(device), device_map, dtype)


def load_as(directory: str | Path, architecture: Any, config_class: Any) -> Any:
    """`load_quantized` on the CPU with classes that are in memory: the folder's copy of their code is not imported.

    Args:
        directory: The checkpoint.
        architecture: The transformers model's class.
        config_class: That of its configuration.

    Raises:
        CheckpointError: As `load_quantized`.
    """
    config = config_class.from_pretrained(directory)
    forget_quantization(config)
    return _load_transformers(Checkpoint.open(directory), architecture, config, torch.device("cpu"))


# --- transformers -------------------------------------------------------------------------------------------


def _load_transformers(
    checkpoint: Checkpoint,
    architecture: Any,
    config: Any,
    device: torch.device,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    if device_map is None and device.type != "cpu" and find_spec("accelerate") is not None:
        device_map = {"": device}
    names: dict[str, str] = {}  # module name -> name in the checkpoint
    model, info = _with_hook(architecture, lambda model: names.update(reserve(checkpoint, model))).from_pretrained(
        None,
        config=config,
        state_dict={name: checkpoint.lazy(name) for name in checkpoint.float_names},
        dtype=dtype or getattr(config, "dtype", None) or checkpoint.float_dtype,
        device_map=device_map,
        generation_config=_generation_config(checkpoint, architecture),
        ignore_mismatched_sizes=True,  # they are in `info`, all of them, and refused below
        output_loading_info=True,
    )
    model.__class__ = architecture
    problems = [
        f"{name} is missing: there is neither it nor its quantized form" for name in sorted(info["missing_keys"])
    ]
    problems += [f"{name} belongs to no module of the model" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"{name} has shape {list(stored)}, the model needs {list(wanted)}"
        for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    refuse(checkpoint, architecture.__name__, problems)
    fill(checkpoint, model, names)
    model.name_or_path = str(checkpoint.directory)
    model.config.quantization_config = in_memory(checkpoint, model, names)
    return (model if device_map is not None else model.to(device)).eval()


def _architecture(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class and configuration that config.json names: transformers' own, or those of the folder's code."""
    import transformers

    file = checkpoint.directory / CONFIG
    name = checkpoint.model_config["architectures"][0]
    architecture = getattr(transformers, name, None)
    reference = _own_class(checkpoint, name) if architecture is None else None
    if reference is not None and not trust_remote_code:
        raise CheckpointError(
            f"{file} says that {name} is code in that folder ({reference}), which loading it would run: read it, then "
            "give load_quantized(..., trust_remote_code=True)"
        )
    if reference is None and architecture is None:
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} has no architecture {name!r}: install a version that has "
            "it. The folder brings no code for it: config.json names none in auto_map"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=reference is not None)
        if reference is not None:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            architecture = get_class_from_dynamic_module(reference, str(checkpoint.directory))
    except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a configuration of transformers {transformers.__version__}: {error}"
        ) from error
    forget_quantization(config)
    return architecture, config


def _own_class(checkpoint: Checkpoint, name: str) -> str | None:
    """Where in the folder's code a class is, as ``file.Class``; None when it is transformers' own."""
    for reference in (checkpoint.model_config.get("auto_map") or {}).values():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            return reference
    return None


def forget_quantization(config: Any) -> None:
    """Takes the description away, which would make transformers look for a GPTQ backend of its own."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _generation_config(checkpoint: Checkpoint, architecture: Any) -> Any:
    import transformers

    file = checkpoint.directory / "generation_config.json"
    if not file.is_file():
        return None
    try:
        kind = getattr(architecture, "generation_config_class", None) or transformers.GenerationConfig
        return kind.from_pretrained(checkpoint.directory)
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{file} cannot be used: {error}. Correct it, or remove it") from error


def _with_hook(architecture: Any, hook: Callable[[nn.Module], None]) -> Any:
    """`architecture`, calling `hook(model)` when constructed: before `from_pretrained` loads weights."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        architecture.__init__(self, *args, **kwargs)
        hook(self)

    return type(architecture.__name__, (architecture,), {"__init__": __init__, "__module__": architecture.__module__})


# --- plain modules ------------------------------------------------------------------------------------------


def _load_into(checkpoint: Checkpoint, model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    take_apart(checkpoint, model, lambda name: name)
    names = _match(checkpoint, model, lambda name: name)
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
        sources[present[0]] = state[group[0]]
    problems += [f"{name} belongs to no module of the model" for name in sorted(stored)]
    refuse(checkpoint, type(model).__name__, problems)
    layers = {name: checkpoint.read_layer(stored, dtype=dtype, device=device) for name, stored in names.items()}
    for name, tensor in sources.items():
        value = checkpoint.read(name)
        tensor.data = value.to(device, dtype if value.is_floating_point() else None)
    swap_modules(model, layers)
    return model.to(device).eval()


# --- both ---------------------------------------------------------------------------------------------------


class Place(nn.Module):
    """Holds the place of a quantized layer while the rest of the model is loaded.

    Some models' initialisation reaches for the weights of their children and for their sizes; what it finds here says
    that there is nothing left to initialise.

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
        empty = QuantLinear(layer.in_features, layer.out_features, layer.bits, layer.group_size, device=meta)
        size = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())
        self.register_buffer("room", torch.empty(size, dtype=torch.uint8, device=meta), persistent=False)


def reserve(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Puts a `Place` where each quantized layer will be, in a transformers model without weights.

    Returns:
        {module name: name in the checkpoint}.

    Raises:
        CheckpointError: The checkpoint's layers do not fit the model; it is then as it was.
    """
    take_apart(checkpoint, model, plain_renaming(model))
    names = _match(checkpoint, model, renaming(model))
    swap_modules(model, {name: Place(checkpoint.layers[stored]) for name, stored in names.items()})
    return names


def take_apart(checkpoint: Checkpoint, model: nn.Module, rename: Callable[[str], str]) -> None:
    """Makes a Linear of every expert's matrix that the model keeps in one parameter and the checkpoint quantized.

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
            place_experts(experts, parts[key], empty)
    refuse(checkpoint, type(model).__name__, list(problems.values()))


def fill(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> None:
    """Reads the quantized layers into their places, one by one, each straight onto its place's device.

    Args:
        checkpoint: Where they are read.
        model: A transformers model in which `reserve` made the places, loaded and dispatched.
        names: What `reserve` returned.

    Raises:
        CheckpointError: The model's device map offloads modules.
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
        layers[name] = checkpoint.read_layer(stored, dtype=model.dtype, device=device)
        hook = getattr(place, "_hf_hook", None)
        if hook is not None:  # accelerate's, which brings inputs to the device: the map names this layer
            from accelerate.hooks import add_hook_to_module

            # Left where it is computed, the output would meet its block's tensors (a residual) on another device.
            hook.io_same_device = True
            add_hook_to_module(layers[name], hook)
    swap_modules(model, layers)


def in_memory(checkpoint: Checkpoint, model: nn.Module, names: Mapping[str, str]) -> dict[str, Any]:
    """The quantization_config of a loaded model: true zeros, so what `save_pretrained` writes is gptq_v2.

    Args:
        checkpoint: What was loaded.
        model: With its quantized layers.
        names: What `reserve` returned.
    """
    if checkpoint.checkpoint_format != COMPRESSED:
        return {**checkpoint.quantization, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    layers = {name: checkpoint.layers[stored] for name, stored in names.items()}
    most, rules = most_and_others(
        {name: {"bits": x.bits, "group_size": x.group_size, "sym": x.sym} for name, x in layers.items()}
    )
    config = QuantizeConfig(**most, dynamic=rules, checkpoint_format="gptq_v2")
    return client_config(model, {name: model.get_submodule(name) for name in names}, config)  # type: ignore[misc]


def _match(checkpoint: Checkpoint, model: nn.Module, rename: Callable[[str], str]) -> dict[str, str]:
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
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    problems: list[str] = []
    names: dict[str, str] = {}
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
                f"{stored} has {layer.in_features} inputs and {layer.out_features} outputs at "
                f"bits={layer.bits}; the "
                f"model's Linear has {in_features} and {out_features}"
            )
        if module.bias is not None and not layer.has_bias:
            problems.append(f"{stored}.bias is missing; the model's Linear has one")
        if f"{name}.weight" in tied:
            problems.append(
                f"{stored} is quantized, but the model ties its weight to {tied[f'{name}.weight']}: set "
                f"tie_word_embeddings to false in {CONFIG}"
            )
        if all(modules[other] is not module for other in names):
            names[name] = stored
    refuse(checkpoint, type(model).__name__, problems)
    return names


def refuse(checkpoint: Checkpoint, model: str, problems: list[str]) -> None:
    """Raises a CheckpointError that names all `problems`, if there are any."""
    if problems:
        raise CheckpointError(
            f"{checkpoint.directory} does not fit {model}:\n  " + "\n  ".join(problems) + "\n"
            "Nothing was loaded. The checkpoint is incomplete or belongs to another model or another "
            "version of it"
        )
