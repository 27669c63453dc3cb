"""From a quantized checkpoint to a model that runs: `load_quantized`.

A transformers model is built by transformers' own `from_pretrained`, so that renamed weights, tied weights,
rotary buffers, dtypes and the generation config come out as it makes them. Between building the (weightless)
model and loading it, `reserve` replaces every quantized Linear by an empty placeholder of the layer's size: no float
weight is allocated for it, none is missed, and a device map counts what the layer will take. `fill` then reads the
quantized layers one by one, each onto its placeholder's device. `hf.quantizer` uses the same two.

Any other model is built by the user; its Linears are replaced and its other tensors filled from the file,
after everything has been compared by name and shape.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.files import CONFIG, GENERATION_CONFIG, read_json
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.checkpoint.load_plain import load_into
from gptq_plugin.checkpoint.many_modules import refuse_many_modules
from gptq_plugin.checkpoint.reserve import fill, in_memory, refuse, reserve
from gptq_plugin.device.cycles import rarely_collected
from gptq_plugin.device.memory import is_shortage
from gptq_plugin.device.named import device_named
from gptq_plugin.device.surroundings import alone, plain_defaults, same_random_numbers
from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.layers.autotune import autotune as tune_layers
from gptq_plugin.layers.fuse import fuse_layers
from gptq_plugin.layers.stored_weight import arrange_layers
from gptq_plugin.model.experts_at_once import stack_experts
from gptq_plugin.model.plan import MODEL
from gptq_plugin.options.fields import PATH, SWITCH, Kind, optional, shown

_DTYPE = Kind(
    "a floating torch.dtype, or None (the checkpoint's)",
    lambda value: value is None or (isinstance(value, torch.dtype) and value.is_floating_point),
)

log = logging.getLogger(__name__)


@rarely_collected()
@plain_defaults()
def load_quantized(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    autotune: bool | None = None,
    autotune_dir: str | Path | None = None,
    fuse: bool = False,
) -> Any:
    """Loads a checkpoint of this package, GPTQModel, AutoGPTQ, optimum or llm-compressor (pack-quantized) with
    `QuantLinear` layers, in evaluation mode.

    Args:
        directory: Folder with config.json, the safetensors files and (AutoGPTQ) quantize_config.json; or the id
            ``owner/name`` of a repository on the Hugging Face hub. A folder of that name wins.
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
        trust_remote_code: Run the Python files in the folder, if config.json finds the model's class in them
            (``auto_map``); without it such a folder is refused. For folders whose code you have read.
        revision: Branch, tag or commit of the repository.
        token: For a private or gated repository; None is the one of ``hf auth login``.
        cache_dir: Where downloads are kept; None is huggingface_hub's cache.
        local_files_only: Take the repository from the cache.
        autotune: Measure which kernels are fastest for layers on GPUs: for sizes that the package's table of a GPU's
            kind lacks (True), on GPUs without a table only (None), or never (False). It takes up to ten seconds for
            each size of layer, once: later loads read what was found. See `gptq_plugin.layers.autotune.autotune`.
        autotune_dir: Folder for what was found; None is one in Triton's cache.
        fuse: Let one product serve the layers on a GPU that are called with one tensor, such as the projections to
            queries, keys and values, in generation and other inference. Names, state dicts and files stay as they are.
            One forward with the model's ``dummy_inputs`` finds them; the log (INFO) tells what came of it. See
            `gptq_plugin.layers.fuse.fuse_layers`. For transformers models only.

    Returns:
        The transformers model, ready for `generate`, or `model`. Its config describes what is in memory
        (``checkpoint_format="gptq_v2"``, true zeros), so that `save_pretrained` writes a valid checkpoint
        too.

    Raises:
        CheckpointError: The checkpoint is incomplete, corrupt, contradicts itself or does not fit the model.
            The message names every file, tensor and module; `model` is then as it was. Or there is neither such a
            folder nor such a repository.
        ValueError: `device_map` together with `device` or `model`, `fuse` together with `model`, a `device` that is not
            there, or an `autotune`, `autotune_dir` or `fuse` of another type.
    """
    optional(SWITCH, "on GPUs without a table").check("autotune", autotune)
    optional(PATH, "a folder in Triton's cache").check("autotune_dir", autotune_dir)
    SWITCH.check("fuse", fuse)
    if fuse and model is not None:
        raise ValueError(
            "fuse=True is for transformers models, which tell what they can be called with: load yours without it, and "
            "then call gptq_plugin.layers.fuse.fuse_layers(model, inputs)"
        )
    if device_map is not None and (model is not None or torch.device(device).type != "cpu"):
        raise ValueError(
            "device_map places every module of a transformers model: give it without `device`, and place a `model` of "
            "your own with `device`"
        )
    optional(MODEL, "config.json names a transformers architecture").check("model", model)
    _DTYPE.check("dtype", dtype)
    device = device_named(device)
    folder = local_folder(
        directory, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    checkpoint = Checkpoint.open(folder)
    if model is not None:
        return _tuned(load_into(checkpoint, model, device, dtype), autotune, autotune_dir)
    if not checkpoint.model_config.get("architectures"):
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG} names no transformers architecture, so it is the export of a plain "
            f"nn.Module ({checkpoint.model_config.get('module_class', 'of unknown class')}): build that model and call "
            "load_quantized(directory, model=it)"
        )
    architecture, config = architecture_of(checkpoint, trust_remote_code)
    loaded: Any = _load_transformers(checkpoint, architecture, config, device, device_map, dtype)
    loaded.name_or_path = str(directory)
    if fuse:
        _fuse(loaded)
    return _tuned(loaded, autotune, autotune_dir)


def _fuse(model: Any) -> None:
    inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
    try:
        fuse_layers(model, inputs)
    except torch.AcceleratorError:  # the GPU is lost to this process
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model's forward leads to
        log.warning(
            "no layers are fused: %s does not run with its own dummy_inputs (%s). Call "
            "gptq_plugin.layers.fuse.fuse_layers(model, inputs) with inputs that it takes",
            type(model).__name__,
            brief(error) or type(error).__name__,
        )


def _tuned(model: nn.Module, autotune: bool | None, folder: str | Path | None) -> nn.Module:
    if autotune is not False:
        tune_layers(model, always=autotune is True, folder=folder)
    return model


@plain_defaults()
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
    hooked = _with_hook(architecture, checkpoint, lambda model: names.update(reserve(checkpoint, model)))
    floats = {name: checkpoint.lazy(name) for name in checkpoint.float_names if not checkpoint.is_taken_over(name)}
    try:
        with alone("loading"), same_random_numbers():  # some architectures initialize what is read afterwards
            model, info = hooked.from_pretrained(
                None,
                config=config,
                state_dict=floats,
                dtype=dtype or getattr(config, "dtype", None) or checkpoint.float_dtype,
                device_map=device_map,
                generation_config=_generation_config(checkpoint, architecture),
                ignore_mismatched_sizes=True,  # they are in `info`, all of them, and refused below
                output_loading_info=True,
            )
    except Exception as error:  # whatever values that nobody expected lead to
        if isinstance(error, (CheckpointError, MemoryError, torch.AcceleratorError)) or is_shortage(error):
            raise
        raise CheckpointError(
            f"{checkpoint.directory}: transformers cannot load it as {architecture.__name__} "
            f"({type(error).__name__}: {brief(error)})"
        ) from error
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
    model.config.quantization_config = in_memory(checkpoint, model, names)
    model = (model if device_map is not None else model.to(device)).eval()
    arrange_layers(model)
    stack_experts(model)
    return model


def architecture_of(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class and configuration that config.json names: transformers' own, or those of the folder's code.

    Raises:
        CheckpointError: There is no such class, or its code is not trusted, or config.json is no configuration of it.
    """
    import transformers

    file = checkpoint.directory / CONFIG
    name = checkpoint.model_config["architectures"][0]
    architecture = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        architecture = None
    reference = _own_class(checkpoint, name) if architecture is None else None
    if reference is not None and not trust_remote_code:
        raise CheckpointError(
            f"{file} finds {name} in the {_home(reference)} ({reference}), which loading it would run: read it, then "
            "give load_quantized(..., trust_remote_code=True)"
        )
    if reference is None and architecture is None:
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} has no architecture {shown(name)}: install a version "
            "that has it. The folder has no code for it: config.json names none in auto_map"
        )
    refuse_many_modules(checkpoint.model_config, file, checkpoint.tensors.values())
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=reference is not None)
        if reference is not None:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            architecture = get_class_from_dynamic_module(reference, str(checkpoint.directory))
    except Exception as error:  # whatever values that nobody expected lead to
        raise CheckpointError(
            f"{file} is not a configuration of transformers {transformers.__version__}: {brief(error)}"
        ) from error
    refuse_foreign_kernels(config, file)
    forget_quantization(config)
    return architecture, config


def _home(reference: str) -> str:
    return f"code of the repository {reference.partition('--')[0]}" if "--" in reference else "folder's own code"


def _own_class(checkpoint: Checkpoint, name: str) -> str | None:
    """The class in the folder's code, as ``file.Class``; None if it is transformers' own."""
    for reference in (checkpoint.model_config.get("auto_map") or {}).values():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            return reference
    return None


def refuse_foreign_kernels(config: Any, source: object) -> None:
    """Refuses a configuration of transformers that names a repository with code for attention or experts.

    transformers would fetch and run it with the `kernels` package, whatever `trust_remote_code` is.

    Raises:
        CheckpointError: It names field and repository.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    for part in parts:
        for field in ("_attn_implementation", "_experts_implementation"):
            named = getattr(part, field, None)
            if isinstance(named, str) and "/" in named:
                raise CheckpointError(
                    f"{source}: {field.removeprefix('_')} is {shown(named)}, code of another repository, which loading "
                    "it would run: remove the field, and choose the code in your own program (set_attn_implementation)"
                )


def forget_quantization(config: Any) -> None:
    """Removes the description, for which transformers would look for its own GPTQ backend."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _generation_config(checkpoint: Checkpoint, architecture: Any) -> Any:
    import transformers

    file = checkpoint.directory / GENERATION_CONFIG
    if not os.path.lexists(file):
        return None
    read_json(file)
    try:
        kind = getattr(architecture, "generation_config_class", None) or transformers.GenerationConfig
        return kind.from_pretrained(checkpoint.directory)
    except Exception as error:  # whatever values that nobody expected lead to
        raise CheckpointError(f"{file} cannot be used: {brief(error)}. Correct it, or remove it") from error


def _with_hook(architecture: Any, checkpoint: Checkpoint, hook: Callable[[nn.Module], None]) -> Any:
    """`architecture`, calling `hook(model)` when constructed: before `from_pretrained` loads weights."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            architecture.__init__(self, *args, **kwargs)
        except Exception as error:  # whatever values that nobody expected lead to
            raise CheckpointError(
                f"{checkpoint.directory / CONFIG}: transformers cannot build {architecture.__name__} from it "
                f"({type(error).__name__}: {brief(error)}): correct it, or fetch it again"
            ) from error
        hook(self)

    return type(architecture.__name__, (architecture,), {"__init__": __init__, "__module__": architecture.__module__})
