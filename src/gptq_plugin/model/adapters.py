"""PEFT adapters: finds them, and merges them into a copy of the model that shares all other weights.

PEFT merges each layer as it defines its kinds of adapters (LoRA: https://arxiv.org/abs/2106.09685, DoRA:
https://arxiv.org/abs/2402.09353). Here it is given copies in float32, and the result is rounded once. Nothing here
imports peft: without it in the process there are no adapters.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.device.precision import full_precision
from gptq_plugin.errors import TargetError, brief, some
from gptq_plugin.model.hf_models import transformers_models
from gptq_plugin.model.sharing_copy import sharing_copy

log = logging.getLogger(__name__)


def has_adapters(module: nn.Module) -> bool:
    """True if the tree holds a wrapper of PEFT's, of a model or of a layer."""
    kinds = (*_models(), *_layers())
    return any(isinstance(part, kinds) for part in modules_of(module).values())


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without PEFT, with the active adapters merged into its weights.

    The model itself stays the same, bit for bit. Weights that no adapter changes lie in the same memory in both: do not
    train the copy or write into its weights. Its parameters need no gradients. Moving or quantizing it is safe.

    Args:
        model: A PeftModel, a transformers model with adapters (`add_adapter`), or any module that holds one. Adapters
            that are merged already (`merge_adapter`) are not merged twice; a module of `modules_to_save` replaces the
            original. If the input and the output embedding share a weight and no longer can, the copy and its
            configuration are untied, and this is logged.

    Returns:
        The model that `merge_and_unload` would return. A merged layer has its base's dtype, rounded once from float32.

    Raises:
        TargetError: Adapters are disabled or inactive, do not change weights (a learned prompt, say), or sit on
            quantized weights. The message names them and tells what to do.
    """
    _check_kinds(model)
    _check_layers(model)
    merged = _unwrapped(sharing_copy(model), "", _merged)
    for _, part in transformers_models(merged):
        _settle_tie(part)
    return merged


def merged_in_place(model: nn.Module) -> nn.Module:
    """`merged_copy` on the model's device; the model itself moves to the CPU, so that the device does not hold both.

    Raises:
        TargetError: As `merged_copy`.
    """
    device = next(model.parameters()).device
    return merged_copy(model.to("cpu")).to(device)


def note_untied(model: nn.Module, merged: nn.Module) -> list[str]:
    """A sentence for each transformers model whose two embeddings `merged_copy` untied."""
    pairs = zip(transformers_models(model), transformers_models(merged), strict=False)
    return [
        f"{name or type(part).__name__}: the adapters changed one of two embeddings that shared a weight: the merged "
        "model holds both, with tie_word_embeddings=false"
        for (name, part), (_, copied) in pairs
        if _ties(part) and not _ties(copied)
    ]


def base_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without PEFT and without the adapters' changes, to look at its layers before training. It takes
    no memory for weights.

    Raises:
        TargetError: `merged_copy` could not merge the adapters.
    """
    _check_kinds(model)
    _check_layers(model)
    return _unwrapped(sharing_copy(model), "", lambda layer, _: _base(layer))


def import_peft() -> ModuleType:
    """Imports peft, to read adapters from disk. The ImportError tells what to install."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"PEFT adapters need peft ({brief(error)}): pip install 'gptq-plugin[peft]'") from error
    return peft


def _peft(module: str) -> ModuleType | None:
    return sys.modules.get(f"peft.{module}")


def _known(*names: tuple[str, str]) -> tuple[Any, ...]:
    """Classes of PEFT, given as (module, name), of modules that are imported."""
    return tuple(getattr(_peft(module), name) for module, name in names if _peft(module) is not None)


def _models() -> tuple[Any, ...]:
    return _known(("peft_model", "PeftModel"), ("mixed_model", "PeftMixedModel"))


def _tuners() -> tuple[Any, ...]:
    return _known(("tuners.tuners_utils", "BaseTuner"))


def _layers() -> tuple[Any, ...]:
    return _known(("tuners.tuners_utils", "BaseTunerLayer"), ("utils.other", "AuxiliaryTrainingWrapper"))


def _check_kinds(model: nn.Module) -> None:
    for name, part in model.named_modules():
        if not isinstance(part, _models()):
            continue
        merges = isinstance(part.base_model, _tuners())
        kinds = sorted(
            {
                config.peft_type.value
                for config in part.peft_config.values()
                if not merges or config.is_prompt_learning or config.peft_type.value == "XLORA"
            }
        )
        if kinds:
            raise TargetError(
                f"{name or type(part).__name__} has an adapter of type {' and '.join(kinds)}, which does not change "
                "weights and cannot be merged into them. Quantize the base model alone (model.get_base_model()) and "
                "load the adapter on the result, or train LoRA instead"
            )


def _check_layers(model: nn.Module) -> None:
    layers: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, _layers())}
    disabled = [name for name, layer in layers.items() if layer.disable_adapters]
    if disabled:
        raise TargetError(
            f"the adapters of {some(disabled)} are disabled, so the model computes without what was trained. Enable "
            "them (enable_adapter_layers, or enable_adapters on a transformers model), or quantize the base model "
            "alone: model.unload()"
        )
    if layers and not any(layer.active_adapters or getattr(layer, "merged", False) for layer in layers.values()):
        raise TargetError(f"no adapter of {some(layers)} is active: choose the one to merge with set_adapter(NAME)")
    for name, layer in layers.items():
        if isinstance(layer, _known(("tuners.tuners_utils", "BaseTunerLayer"))):
            _check_base(name, layer.get_base_layer())


def _check_base(name: str, base: nn.Module) -> None:
    parameters = list(base.parameters())
    strange = [p for p in parameters if not (p.is_floating_point() and p.dtype.itemsize > 1 and _is_plain(p))]
    if strange or not parameters:
        what = f", with weights of {strange[0].dtype} in a {type(strange[0].data).__name__}" if strange else ""
        raise TargetError(
            f"the adapters of {name} sit on a {type(base).__name__}{what}: it is quantized already, and merged weights "
            "would be rounded twice. Load the base model in bfloat16 or float32, without a quantization_config, load "
            "the adapter on it (PeftModel.from_pretrained), and quantize that"
        )


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor


def _unwrapped(module: Any, name: str, merged: Callable[[Any, str], nn.Module]) -> nn.Module:
    """The module with PEFT's wrappers replaced by what they wrap, and PEFT's layers by merged(layer, name)."""
    if isinstance(module, _models()):
        return _unwrapped(module.base_model, name, merged)
    if isinstance(module, _tuners()):
        return _unwrapped(module.model, name, merged)
    if isinstance(module, _known(("utils.other", "ModulesToSaveWrapper"))):
        return _unwrapped(_saved(module), name, merged)
    if isinstance(module, _layers()):
        return merged(module, name)
    for key, child in module._modules.items():
        if child is not None:
            module._modules[key] = _unwrapped(child, f"{name}.{key}" if name else key, merged)
    module.__dict__.pop("peft_config", None)
    module.__dict__.pop("_hf_peft_config_loaded", None)
    return module  # type: ignore[no-any-return]


def _saved(wrapper: Any) -> nn.Module:
    """The trained module of `modules_to_save`, in the dtypes of the original."""
    trained = [wrapper.modules_to_save[name] for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    if not trained:
        return wrapper.original_module  # type: ignore[no-any-return]
    dtypes = _dtypes(wrapper.original_module)
    _cast(trained[0], lambda key, tensor: dtypes.get(key, tensor.dtype))
    return trained[0]  # type: ignore[no-any-return]


def _merged(layer: Any, name: str) -> nn.Module:
    """The layer's base, with the active adapters merged."""
    base = _base(layer)
    dtypes = _dtypes(base)
    merge = not getattr(getattr(layer, "token_adapter", layer), "merged", False)
    if merge:
        _cast(layer, lambda _, tensor: torch.promote_types(tensor.dtype, torch.float32), copy=True)
    with full_precision(next(base.parameters()).device):
        try:
            # safe_merge refuses values that are not finite, and does not write into tensors
            if hasattr(layer, "unload_and_optionally_merge_module"):
                base = layer.unload_and_optionally_merge_module(merge=merge, safe_merge=True, adapter_names=None)
            elif merge:
                layer.merge(safe_merge=True)
                base = _base(layer)  # LN tuning exchanges it
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise TargetError(f"the adapters of {name} cannot be merged into its weights: {brief(error)}") from error
    _cast(base, lambda key, tensor: dtypes.get(key, tensor.dtype))
    return base  # type: ignore[no-any-return]


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module


def _dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Dtypes of a base layer's tensors, by the names they have once layers inside it are unwrapped."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {key.replace("base_layer.", ""): tensor.dtype for key, tensor in tensors}


def _cast(module: nn.Module, dtype: Callable[[str, Tensor], torch.dtype], copy: bool = False) -> None:
    """Replaces the module's floating-point tensors by casts; the old tensors are not changed."""
    for prefix, part in module.named_modules():
        for tensors in (part._parameters, part._buffers):
            for key, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                name = f"{prefix}.{key}" if prefix else key
                value = tensor.detach().to(dtype(name, tensor), copy=copy)
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[key] = nn.Parameter(value, requires_grad=False) if is_parameter else value


def _ties(model: Any) -> bool:
    configs = [model.config, model.config.get_text_config()]
    return any(getattr(config, "tie_word_embeddings", False) for config in configs)


def _settle_tie(model: Any) -> None:
    """Ties two embeddings again that the configuration ties and that are equal; otherwise unties the configuration."""
    configs = [model.config, model.config.get_text_config()]
    if not _ties(model):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or head.weight is embedding.weight:
        return
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        return
    for config in configs:
        config.tie_word_embeddings = False
    log.warning(
        "the adapters changed the output embedding and the input embedding, which shared a weight, in different ways: "
        "the merged copy holds both, with tie_word_embeddings=false"
    )
