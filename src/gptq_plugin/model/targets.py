"""Which layers are quantized: chosen by type, name and configuration. No lists of models.

A target is a linear layer (`linears.is_linear`) that nothing excludes. An excluded layer is returned with its reason,
for the report; a configuration that the model contradicts is refused here, before any work.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import TargetError, some
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.linears import is_linear, linear_shape
from gptq_plugin.model.rule_checks import check_aliases, check_effects, check_rules
from gptq_plugin.model.structure import Structure
from gptq_plugin.options.rules import matching_rules

# Too few bits for a weight alone: whoever stores it so keeps its scale elsewhere.
_SCALED_APART = {getattr(torch, name) for name in dir(torch) if name.startswith(("float8_", "float4_"))}

_ROUTER = "router of experts (a `dynamic` rule for routers alone quantizes it)"

_OUTSIDE = "outside the language model (a `dynamic` rule for such layers alone quantizes them)"


@dataclass(frozen=True)
class Target:
    """A layer to quantize, its configuration, and how that deviates from the request.

    Attributes:
        name: Full dotted name.
        module: The float layer.
        config: The configuration that holds for this layer.
        deviations: A sentence for each difference from the request.
        places: Number of times that an export stores it; see `Structure.further_places`.
    """

    name: str
    module: nn.Module
    config: QuantizeConfig
    deviations: tuple[str, ...] = ()
    places: int = 1

    @property
    def parameter(self) -> nn.Parameter:
        """The module's weight, in the module's layout."""
        return self.module.weight  # type: ignore[return-value]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; asked for so often that it is kept."""
        return linear_shape(self.module)

    @property
    def stored_weights(self) -> int:
        """Number of its weights in an export, in all places."""
        return self.places * math.prod(self.shape)

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in]; a view of Conv1D's [in, out]."""
        return self._transposed(self.parameter.detach())

    def with_weight(self, value: Tensor) -> nn.Parameter:
        """A parameter for the module that holds `value`, [out, in], in the weight's dtype."""
        values = self._transposed(value).to(self.parameter.dtype)
        return nn.Parameter(values, requires_grad=False)

    def product(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b, [..., out], of x, [..., in], in the operations that Linear and Conv1D have for it."""
        weight, bias = self.parameter, self.bias
        if isinstance(self.module, nn.Linear):
            return nn.functional.linear(x, weight, bias)
        assert bias is not None  # as every Conv1D has
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    def _transposed(self, value: Tensor) -> Tensor:
        return value if isinstance(self.module, nn.Linear) else value.T

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]


@dataclass(frozen=True)
class Skipped:
    """A linear layer that stays float.

    Attributes:
        name: Full dotted name.
        module: The layer.
        reason: Why it stays float.
        asked: Whether the configuration asks for it; otherwise it is a deviation.
    """

    name: str
    module: nn.Module
    reason: str
    asked: bool


def find_targets(structure: Structure, config: QuantizeConfig) -> tuple[list[Target], list[Skipped]]:
    """The layers of a model to quantize, in the order they are registered, and those left float.

    Raises:
        TargetError: No target; a rule or name that matches nothing; experts of one parameter that are to be different;
            a model that is quantized already. Every message names the modules and the choices.
    """
    _check_model(structure)
    linears = structure.linears
    _check_patterns(config, structure)
    targets: list[Target] = []
    skipped: list[Skipped] = []
    scaled: list[str] = []
    scorers = {module for module in structure.routers.values() if is_linear(module)}
    left_out = set(config.modules_to_not_convert)
    for name, module in linears.items():
        resolved = config.for_module(name)
        if resolved is None:
            skipped.append(Skipped(name, module, "left float by a `dynamic` rule", asked=True))
        elif left_out and any(not left_out.isdisjoint(_runs(one)) for one in structure.all_names([name])):
            skipped.append(Skipped(name, module, "left float by `modules_to_not_convert`", asked=True))
        elif module is structure.head and not config.lm_head:
            skipped.append(Skipped(name, module, "output embedding (lm_head=false)", asked=True))
        elif module in structure.output_heads and not config.lm_head:
            skipped.append(Skipped(name, module, "output head of a classifier (lm_head=false)", asked=True))
        elif module in scorers and not _names_only(config, name, scorers, linears):
            skipped.append(Skipped(name, module, _ROUTER, asked=True))
        elif module in structure.outside and not _names_only(config, name, structure.outside, linears):
            skipped.append(Skipped(name, module, _OUTSIDE, asked=True))
        elif module.weight.dtype in _SCALED_APART:
            scaled.append(name)
        else:
            places = 1 + len(structure.further_places.get(name, ()))
            target = _fitted(Target(name, module, resolved, places=places))
            reason = structure.obstacles.get(module) or unpackable(target.shape, resolved.bits)
            if reason is None:
                targets.append(target)
            else:
                skipped.append(Skipped(name, module, reason, asked=False))
    if scaled:
        dtype = linears[scaled[0]].weight.dtype
        raise TargetError(
            f"the weights of {some(scaled)} are {dtype}, whose scales are kept apart: they are quantized already. "
            "Load the model dequantized (transformers: FineGrainedFP8Config(dequantize=True) as quantization_config of "
            "from_pretrained), or leave these layers out with modules_to_not_convert"
        )
    kept_float = {name: skip.reason for skip in skipped if skip.asked for name in structure.all_names([skip.name])}
    check_effects(config, dict.fromkeys(structure.all_names(linears), "") | kept_float)
    if not targets:
        raise TargetError(_no_target(structure.model, skipped))
    _check_experts(targets, skipped)
    return targets, skipped


def _check_model(structure: Structure) -> None:
    model = structure.model
    _refuse_adapters(model)
    if is_linear(model):
        raise TargetError(
            f"the module to quantize is itself a {type(model).__name__}, which cannot be replaced in place: name "
            "the module that holds it"
        )
    quantized = [name for name, module in structure.linears.items() if isinstance(module, QuantLinear)]
    if quantized:
        raise TargetError(
            f"{some(quantized)} are quantized already. Quantize the float model: load it anew from its checkpoint"
        )
    packed = {name: module for name, module in modules_of(model).items() if _is_packed(module)}
    if packed:
        kinds = some(sorted({f"{type(one).__name__} ({_stored(one).dtype})" for one in packed.values()}))
        raise TargetError(
            f"{some(packed)} are quantized already, by another tool: {kinds}. What it rounded would be rounded again, "
            "or stay packed in the export. Load the base model in bfloat16 or float32, without a quantization_config"
        )


def _is_packed(module: nn.Module) -> bool:
    """Whether another tool keeps a linear layer's weights as integers: bitsandbytes (a Linear of uint8 or int8), or
    GPTQ's and AWQ's layers (`qweight`)."""
    stored = _stored(module)
    return isinstance(stored, Tensor) and not (stored.is_floating_point() or stored.is_complex())


def _stored(module: nn.Module) -> Any:
    if isinstance(module, QuantLinear):
        return None
    return module._parameters.get("weight") if isinstance(module, nn.Linear) else module._buffers.get("qweight")


def _refuse_adapters(model: nn.Module) -> None:
    if has_adapters(model):
        raise TargetError(
            f"{type(model).__name__} carries PEFT adapters, which would be quantized beside the weights they change. "
            "Quantize gptq_plugin.merged_copy(model), a copy with the active ones merged, which "
            "leaves this model as it is. GPTQCallback does that by itself, and gptq-quantize with adapter=FOLDER"
        )


def unpackable(shape: tuple[int, ...], bits: int) -> str | None:
    """The reason why a weight [out, in] cannot be stored at that width, or None if it can."""
    for label, size in zip(("out_features", "in_features"), shape, strict=True):
        if not size:
            return f"{label} is 0: it has no weights"
        if size * bits % 32:
            return f"{label} {size} at {bits} bits does not fill whole 32-bit words, which GPTQ clients need"
    return None


def _names_only(
    config: QuantizeConfig, name: str, modules: Collection[nn.Module], linears: Mapping[str, nn.Module]
) -> bool:
    """True if the rule that decides for a layer is for these modules alone: it matches no other layer."""
    pattern = config.rule_for(name)[0]
    others = (other for other, module in linears.items() if module not in modules)
    return bool(pattern) and not any(pattern in matching_rules(config.dynamic, other) for other in others)


def _check_patterns(config: QuantizeConfig, structure: Structure) -> None:
    linears, names = structure.linears, structure.all_names(structure.linears)
    check_rules(config, names)
    check_aliases(config, structure.aliases)
    known = {run for name in names for run in _runs(name)} if config.modules_to_not_convert else set()
    for part in config.modules_to_not_convert:
        if part not in known:
            raise TargetError(
                f"modules_to_not_convert: {part!r} is not a name, or a run of a name's components, of any of the "
                f"{len(linears)} linear layers ({some(list(linears))})"
            )


def _fitted(target: Target) -> Target:
    """The target with a group size that divides the layer's inputs."""
    asked, in_features = target.config.group_size, target.shape[1]
    size = target.config.group_size_for(in_features)
    if size == asked:
        return target
    deviation = f"group_size {asked} does not divide its {in_features} inputs: {size} instead"
    return replace(target, config=replace(target.config, group_size=size), deviations=(deviation,))


def _check_experts(targets: list[Target], skipped: list[Skipped]) -> None:
    """Refuses different grids for experts of one parameter: the model and clients' kernels multiply by all at once."""
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


def _runs(name: str) -> Iterator[str]:
    """A name's components, and all that stand in a row: a, a.b, b of a.b."""
    parts = name.split(".")
    for start in range(len(parts)):
        yield from itertools.accumulate(parts[start:], "{}.{}".format)
