"""Which layers are quantized: by type, name and configuration. No lists of models.

A target is a Linear (or a subclass that computes what Linear computes, or transformers' Conv1D) that nothing
excludes. What is excluded is returned with its reason, so that the report can say so; what contradicts the
configuration is refused here, before any work.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptq_plugin.config import QuantizeConfig, rule_regex
from gptq_plugin.errors import TargetError, some
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.model.experts import ExpertLinear, routers
from gptq_plugin.model.hf_models import generates, is_encoder_decoder, is_transformers, transformers_models

_ROUTER = "router of experts (a `dynamic` rule for routers alone quantizes it)"

_OUTSIDE = "outside the language model (a `dynamic` rule for such layers alone quantizes them)"


@dataclass(frozen=True)
class Target:
    """A layer to quantize, with the configuration that holds for it, and how that deviates from what was asked."""

    name: str
    module: nn.Module
    config: QuantizeConfig
    deviations: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The module's own parameter, in its own layout."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The weight as Linear has it, [out, in]; a view of Conv1D's [in, out]."""
        return self._transposed(self.parameter.detach())

    def with_weight(self, value: Tensor) -> nn.Parameter:
        """A parameter for the module that holds `value`, [out, in], in the dtype of its present one."""
        values = self._transposed(value).to(self.parameter.dtype)
        return nn.Parameter(values, requires_grad=False)

    def _transposed(self, value: Tensor) -> Tensor:
        return value if isinstance(self.module, nn.Linear) else value.T

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]


@dataclass(frozen=True)
class Skipped:
    """A layer that looks like a target and stays float, why, and whether the configuration asked for that."""

    name: str
    module: nn.Module
    reason: str
    asked: bool


def find_targets(model: nn.Module, config: QuantizeConfig) -> tuple[list[Target], list[Skipped]]:
    """The layers of `model` to quantize, in the order they are registered, and those left float.

    Experts that the model keeps in one parameter are among them while `experts.unfused` has taken them apart.

    Raises:
        TargetError: No target; a rule or name that matches nothing; experts of one parameter that are to be different;
            a model that is quantized already. Every message names the modules and the choices.
    """
    _refuse_adapters(model)
    if is_linear(model):
        raise TargetError(
            f"the module to quantize is itself a {type(model).__name__}, which cannot be replaced in place: name "
            "the module that holds it"
        )
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if quantized:
        raise TargetError(
            f"{some(quantized)} are quantized already. Quantize the float model: load it anew from its checkpoint"
        )
    _check_patterns(config, linears)
    targets: list[Target] = []
    skipped: list[Skipped] = []
    head = _output_embedding(model)
    obstacles = _obstacles(model, head)
    scorers = {module for module in routers(model).values() if is_linear(module)}
    outside = _outside_language(model, linears)
    for name, module in linears.items():
        resolved, is_head = config.for_module(name), module is head
        if resolved is None:
            skipped.append(Skipped(name, module, "left float by a `dynamic` rule", asked=True))
        elif any(_contains(name, part) for part in config.modules_to_not_convert):
            skipped.append(Skipped(name, module, "left float by `modules_to_not_convert`", asked=True))
        elif is_head and not config.lm_head:
            skipped.append(Skipped(name, module, "output embedding (lm_head=false)", asked=True))
        elif module in scorers and not _names_only(config.rule_for(name)[0], scorers, linears):
            skipped.append(Skipped(name, module, _ROUTER, asked=True))
        elif module in outside and not _names_only(config.rule_for(name)[0], outside, linears):
            skipped.append(Skipped(name, module, _OUTSIDE, asked=True))
        else:
            target = _fitted(Target(name, module, resolved))
            reason = obstacles.get(module) or unpackable(tuple(target.weight.shape), resolved.bits)
            if reason is None:
                targets.append(target)
            else:
                skipped.append(Skipped(name, module, reason, asked=False))
    if not targets:
        raise TargetError(_no_target(model, skipped))
    _check_experts(targets, skipped)
    return targets, skipped


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x·Wᵀ + b with a weight of its own: Linear, such a subclass, or Conv1D."""
    kind: Any = type(module)
    # transformers' Conv1D stores [in, out]; without transformers in the process there can be none.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(pytorch_utils, "Conv1D", None)
    if conv1d is not None and kind is conv1d:
        return True
    return isinstance(module, nn.Linear) and (kind.forward is nn.Linear.forward or _computes_linear(kind))


@functools.cache
def _computes_linear(kind: type[nn.Module]) -> bool:
    """Whether a subclass with a forward of its own computes what Linear does: tried on a small one, with a Linear's
    parameters and nothing else."""
    layer = kind.__new__(kind)
    nn.Linear.__init__(layer, 5, 3, device="cpu", dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        x = torch.linspace(-1, 1, 40, dtype=torch.float64, device="cpu").reshape(2, 4, 5)
        wanted = functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
        try:
            return bool(torch.allclose(layer(x), wanted))
        except Exception:  # noqa: BLE001 - it needs more
            return False


def _refuse_adapters(model: nn.Module) -> None:
    if has_adapters(model):
        raise TargetError(
            f"{type(model).__name__} carries PEFT adapters, which would be quantized beside the weights they change. "
            "Quantize gptq_plugin.merged_copy(model), a copy with the active ones merged, which "
            "leaves this model as it is. GPTQCallback does that by itself, and gptq-quantize with adapter=FOLDER"
        )


def _obstacles(model: nn.Module, head: nn.Module | None) -> dict[nn.Module, str]:
    """Linear layers that cannot be quantized by themselves, and why. The head may leave a tied embedding."""
    reasons: dict[nn.Module, str] = {}
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append(f"{name}.{key}")
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            reasons[module] = "its weight is computed by a parametrization; remove it first to quantize"
        elif not weight.is_floating_point():
            reasons[module] = f"its weight is {weight.dtype}, not floating point"
        elif module is not head and len(users[id(weight)]) > 1:
            others = [user for user in users[id(weight)] if user != f"{name}.weight"]
            reasons[module] = f"its weight is tied to {some(others)}"
    return reasons


def _outside_language(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[nn.Module]:
    """Of a model that writes text about images or sounds, what is not the part that writes: towers and projectors.

    transformers says which configuration is the text's; the part is the model in it that is made from one like that.
    Where an encoder reads for it, what reads tokens belongs to it too.
    """
    outside: set[nn.Module] = set()
    for prefix, whole in transformers_models(model):
        text = whole.config.get_text_config()  # type: ignore[union-attr, operator]
        if not generates(whole) or type(text) is type(whole.config):
            continue
        models = [module for module in whole.modules() if is_transformers(module)]
        parts = [model for model in models if type(model.config) is type(text)]
        parts += [model for model in models if is_encoder_decoder(whole) and _reads_tokens(model)]
        inside = {module for part in parts for module in part.modules()}
        own = {module for name, module in linears.items() if name.startswith(f"{prefix}." if prefix else "")}
        outside |= own - inside if own & inside else set()
    return outside


def _reads_tokens(model: Any) -> bool:
    """Whether a transformers model has token embeddings, and no part for anything else."""
    if type(model.config.get_text_config()) is not type(model.config):
        return False
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except (NotImplementedError, AttributeError):
        return False


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a Linear or of Conv1D, which stores its weight as [in, out]."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """transformers says which it is; elsewhere it is the Linear that shares an Embedding's weight."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (NotImplementedError, AttributeError):
                head = None
            if isinstance(head, nn.Module):
                return head
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if is_linear(module) and id(module._parameters.get("weight")) in embeddings:
            return module
    return None


def unpackable(shape: tuple[int, ...], bits: int) -> str | None:
    """Why a weight [out, in] cannot be stored at that width; None when it can."""
    for label, size in zip(("out_features", "in_features"), shape, strict=True):
        if size * bits % 32:
            return f"{label} {size} at {bits} bits does not fill whole 32-bit words, which GPTQ clients need"
    return None


def _names_only(pattern: str, modules: set[nn.Module], linears: dict[str, nn.Module]) -> bool:
    """Whether a rule is meant for these modules: it matches no other."""
    others = (name for name, module in linears.items() if module not in modules)
    return bool(pattern) and not any(re.match(rule_regex(pattern), name) for name in others)


def _check_patterns(config: QuantizeConfig, linears: dict[str, nn.Module]) -> None:
    for pattern in config.dynamic:
        if not any(re.match(rule_regex(pattern), name) for name in linears):
            raise TargetError(
                f"dynamic: {pattern!r} matches none of the {len(linears)} linear layers "
                f"({some(list(linears))}). Rules are matched from the start of the full name, as re.match does"
            )
    for part in config.modules_to_not_convert:
        if not any(_contains(name, part) for name in linears):
            raise TargetError(
                f"modules_to_not_convert: {part!r} is no name, or run of a name's components, of any of the "
                f"{len(linears)} linear layers ({some(list(linears))})"
            )


def _fitted(target: Target) -> Target:
    """With groups that divide the layer's inputs."""
    asked, in_features = target.config.group_size, target.weight.shape[1]
    size = target.config.group_size_for(in_features)
    if size == asked:
        return target
    said = f"group_size {asked} does not divide its {in_features} inputs: {size} instead"
    return replace(target, config=replace(target.config, group_size=size), deviations=(said,))


def _check_experts(targets: list[Target], skipped: list[Skipped]) -> None:
    """The model multiplies by one parameter for all experts, and clients' kernels by one matrix for all."""
    grids: dict[str, dict[str, str]] = defaultdict(dict)  # by parameter, then grid: an expert
    for target in targets:
        if isinstance(target.module, ExpertLinear):
            own = target.config
            grids[target.module.parameter][f"bits={own.bits}, group_size={own.group_size}, sym={own.sym}"] = target.name
    for skip in skipped:
        if isinstance(skip.module, ExpertLinear):
            grids[skip.module.parameter]["float"] = skip.name
    wrong = {name: different for name, different in grids.items() if len(different) > 1}
    if wrong:
        lines = [
            f"{name}: " + ", ".join(f"{grid} for {expert}" for grid, expert in different.items())
            for name, different in wrong.items()
        ]
        raise TargetError(
            "all experts whose weights the model keeps in one parameter are quantized alike or not at all: "
            + "; ".join(lines)
            + ". Write `dynamic` rules and modules_to_not_convert that match all of them"
        )


def _no_target(model: nn.Module, skipped: list[Skipped]) -> str:
    if skipped:
        return "no layer is left to quantize: " + "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5])
    kinds = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
    return (
        f"{type(model).__name__} has no nn.Linear (or Conv1D) to quantize; its parameters are in "
        f"{', '.join(kinds) or 'no module at all'}"
    )


def _contains(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."
