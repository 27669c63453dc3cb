"""Experts that a model keeps in one parameter [experts, ., .]: one Linear each while they are apart, or fused again.

No models are named here. Such a parameter is found by its shape. Which of its sides are inputs is declared by the
module (``is_transposed``, as in transformers) or learned from a forward in which the parameter is watched. The module's
forward stays as it is: an `ExpertWeights` replaces the parameter, and multiplying by one of its entries calls that
expert's Linear. So everything that works for a Linear (hooks, Hessians, QuantLinear in its place) works for an expert.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from gptq_plugin.device.modules import module_at, modules_of
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.expert_weights import ExpertWeights, MatrixLayout, WatchedWeights, as_linear
from gptq_plugin.model.stored_names import Part, expert_parts

_LEAST = 8  # rows and columns of an expert's matrix

# Learned from forwards, for classes that do not declare it: each parameter's layout, or None if it is used otherwise.
_seen: WeakKeyDictionary[type, dict[str, MatrixLayout | None]] = WeakKeyDictionary()


class ExpertLinear(nn.Linear):
    """One expert's matrix: a Linear without bias, whose weight is a view of the fused parameter.

    Args:
        weight: [out, in].
        parameter: Full name of the fused parameter.
    """

    keeps_nothing = True  # see `walk.watched_places`
    parameter: str

    def __init__(self, weight: Tensor, parameter: str) -> None:
        nn.Module.__init__(self)  # Linear's would make a weight, and initialise it
        own = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
        self._parameters.update(own)  # as attributes they take longer than the rest
        vars(self).update(out_features=weight.shape[0], in_features=weight.shape[1], parameter=parameter)  # so do these


class _Expert(nn.ModuleDict):
    """An expert's layers by name."""

    keeps_nothing = True


@dataclass(frozen=True)
class Experts:
    """A fused parameter, which holds one matrix of every expert.

    Attributes:
        name: Name of the module.
        module: The module that has the parameter.
        parameter: Name of the parameter in the module.
        layout: Order of the sides of [experts, ., .].
    """

    name: str
    module: nn.Module
    parameter: str
    layout: MatrixLayout

    @property
    def whole(self) -> Tensor:
        return self.module.get_parameter(self.parameter)

    @property
    def in_features(self) -> int:
        return self.whole.shape[2 if self.layout == "out, in" else 1]

    def matrices(self) -> list[Tensor]:
        """The matrix of every expert, [out, in]; views."""
        return [as_linear(one, self.layout) for one in self.whole.detach().unbind()]


def find_experts(model: nn.Module) -> list[Experts]:
    """The parameters of a model that are known to hold experts' matrices."""
    layouts = ((one, _layouts(*one[1:])) for one in _candidates(model))
    return [Experts(*one, known[0]) for one, known in layouts if len(known) == 1]


def possible_experts(model: nn.Module) -> Iterator[list[Experts]]:
    """Yields twice: the parameters that hold experts' matrices or may by their shape, then those of unknown layout in
    the other one. Parameters replaced between the two are left out."""
    for number in range(2):
        layouts = ((one, _layouts(*one[1:])) for one in _candidates(model))
        yield [Experts(*one, possible[number]) for one, possible in layouts if number < len(possible)]


def undeclared(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and names of their parameters that may hold experts' matrices: only a forward shows whether they do, and
    in which layout. What modules declare is believed to transformers' own only."""
    return [
        (module, parameter)
        for _, module, parameter in _candidates(model)
        if not (_declares(module) and type(module).__module__.startswith("transformers."))
    ]


def learn_layouts(model: nn.Module, run: Callable[[], object]) -> None:
    """Learns from a forward how modules use the parameters that `undeclared` finds.

    Args:
        model: Any module; not changed.
        run: Runs a forward of the model. Not called if there is nothing to learn.
    """
    watched = [
        (module, parameter, WatchedWeights(module.get_parameter(parameter))) for module, parameter in undeclared(model)
    ]
    if not watched:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_plain_code([module for module, _, _ in watched]))
        for module, parameter, stand_in in watched:
            _use_plain_code(module)
            _replace(module, parameter, stand_in, stack)
        run()
    for module, parameter, stand_in in watched:
        if stand_in.uses:
            use = next(iter(stand_in.uses)) if len(stand_in.uses) == 1 else None
            _seen.setdefault(type(module), {})[parameter] = use


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside the block every expert is a Linear. On exit, experts that are still float are fused again.

    A parameter is quantized for all its experts or for none: experts of which only some are QuantLinear stay apart.

    Yields:
        Fuses the float experts before the end of the block.
    """
    with contextlib.ExitStack() as stack:
        put_back: list[Callable[[], None]] = []
        experts = find_experts(model)
        parts = expert_parts(model, experts)
        stack.enter_context(_plain_code([one.module for one in experts]))
        for one in experts:
            own = parts[one.name, one.parameter]
            whole = f"{one.name}.{one.parameter}"
            each = zip(one.matrices(), own, strict=True)
            linears = [[ExpertLinear(matrix[part.rows], whole) for part in of_one] for matrix, of_one in each]
            put_back.append(place_experts(one, own, linears, one.layout))
            stack.callback(put_back[-1])

        def fuse() -> None:
            for put in put_back:
                put()

        yield fuse


@contextlib.contextmanager
def _plain_code(modules: list[nn.Module]) -> Iterator[None]:
    """Restores transformers' fused kernels, which `place_experts` switches off, for modules whose experts are fused
    again at the end of the block."""
    configs = {id(config): config for module in modules if (config := _config(module)) is not None}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        yield
    finally:
        apart = {id(_config(m)) for m in modules if any(isinstance(v, ExpertWeights) for v in m.__dict__.values())}
        for key, config in configs.items():
            if key not in apart:
                config._experts_implementation = before[key]


def _use_plain_code(module: nn.Module) -> None:
    config = _config(module)
    if config is not None:
        config._experts_implementation = "eager"


def _config(module: nn.Module) -> Any:
    """The configuration that selects transformers' kernels for the module's experts, or None."""
    config = getattr(module, "config", None)
    return config if getattr(config, "_experts_implementation", None) is not None else None


def experts_of(name: str, module: nn.Module) -> str | None:
    """Name of the module that holds the experts, for a layer of one of them: taken from a fused parameter, or in a list
    named experts. None for any other layer."""
    found = re.match(r"(.+?)\.\d+(?:\.\w+)?$", name) if isinstance(module, ExpertLinear) else None
    return found[1] if found else block_of_experts(name)


def block_of_experts(name: str) -> str | None:
    """Like `experts_of`, by the layer's name alone: ``"mlp.experts"`` of ``"mlp.experts.3.up_proj"``."""
    found = re.match(r"(.*?\w*experts?)\.\d+(?:\.|$)", name)
    return found[1] if found else None


def in_expert(experts: str, layer: str) -> str:
    """A layer's name within its expert: ``"up_proj"`` of ``"mlp.experts.3.up_proj"``."""
    return layer[len(experts) + 1 :].partition(".")[2]


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers by name: modules beside the experts with one weight row per expert, projections excluded. Most of
    them are not Linear layers."""
    modules = modules_of(model)
    counts: dict[str, int] = {}  # experts, by the module around them
    for name, module in modules.items():
        around, _, own = name.rpartition(".")
        sizes = [len(value) for value in module.__dict__.values() if isinstance(value, ExpertWeights)]
        if isinstance(module, nn.ModuleList) and "expert" in own:
            sizes.append(len(module))
        if sizes:
            counts[around] = max(sizes)
    return {
        f"{around}.{name}" if around else name: child
        for around, count in counts.items()
        for name, child in modules_of(modules[around]).items()
        if _rows(child) == count and not name.endswith("_proj")
    }


def _rows(module: nn.Module) -> int | None:
    """Rows of a module's weight, if that is a matrix."""
    weight = module._parameters.get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else None


def expert_layouts(module: nn.Module, parameter: str) -> list[MatrixLayout] | None:
    """The possible layouts of a parameter with the shape of experts' matrices: none if it is known to be something
    else. None for a parameter of another shape."""
    return _layouts(module, parameter) if _is_stack(module, parameter) else None


def tied_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules have."""
    users = Counter(id(value) for module in modules_of(model).values() for value in module._parameters.values())
    return {one for one, count in users.items() if count > 1}


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Floating-point parameters with three dimensions, in modules outside torch (a convolution's weight has three too).
    A parameter of several modules is left out: quantized, it could not stay one."""
    tied = tied_parameters(model)
    for name, module in modules_of(model).items():
        for parameter, value in module._parameters.items():
            if name and _is_stack(module, parameter) and id(value) not in tied:
                yield name, module, parameter


def _is_stack(module: nn.Module, parameter: str) -> bool:
    value = module._parameters[parameter]
    if value is None or value.dim() != 3 or not value.is_floating_point():
        return False
    own = type(module).__module__.partition(".")[0] != "torch"
    return own and value.shape[0] > 1 and min(value.shape[1:]) >= _LEAST


def _declares(module: nn.Module) -> bool:
    return isinstance(getattr(module, "is_transposed", None), bool)


def _layouts(module: nn.Module, parameter: str) -> list[MatrixLayout]:
    """One layout if it is known, both if it is not, none if the parameter is known not to hold experts."""
    seen = _seen.get(type(module), {})
    if parameter not in seen:
        if _declares(module):
            return ["in, out" if module.is_transposed else "out, in"]
        return ["out, in", "in, out"]
    layout = seen[parameter]
    return [] if layout is None else [layout]


def place_experts(
    experts: Experts,
    parts: list[list[Part]],
    layers: Sequence[Sequence[nn.Module]],
    layout: MatrixLayout | None = None,
) -> Callable[[], None]:
    """Puts layers in place of a fused parameter.

    Args:
        experts: The parameter.
        parts: Names and rows of each expert's layers.
        layers: Each expert's layers.
        layout: The only one that the parameter may be used in, since the layers were made from it in that one.

    Returns:
        Puts the parameter back, unless layers are quantized by then.
    """
    module, whole = experts.module, experts.whole
    names = [[part.name for part in own] for own in parts]
    with contextlib.ExitStack() as undo:
        for name in {name for own in names for name in own}:
            undo.callback(_remove, module, name)
        for own_names, own in zip(names, layers, strict=True):
            for name, layer in zip(own_names, own, strict=True):
                layer.training = module.training
                _put(module, name, layer)
        _replace(module, experts.parameter, ExpertWeights(module, names, whole.shape, whole.dtype, layout), undo)
        _use_plain_code(module)
        put_parameter_back = undo.pop_all()

    def put_back() -> None:
        if experts.parameter not in module.__dict__:
            return
        there = [module_at(module, name) for own in names for name in own]
        if not any(isinstance(layer, QuantLinear) for layer in there):
            put_parameter_back.close()

    return put_back


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` under a dotted name below `module`."""
    around, _, leaf = name.rpartition(".")
    for part in around.split(".") if around else ():
        if part not in module._modules:
            module.add_module(part, _Expert())
        module = module_at(module, part)
    module.add_module(leaf, layer)


def _remove(module: nn.Module, name: str) -> None:
    first, _, rest = name.partition(".")
    inner = module._modules.get(first)
    if inner is not None and rest:
        _remove(inner, rest)
    if inner is not None and not (rest and inner._modules):
        module._modules.pop(first, None)


def _replace(module: nn.Module, name: str, stand_in: object, undo: contextlib.ExitStack) -> None:
    """Puts an attribute in place of a parameter. The parameters keep their order when `undo` puts it back."""
    order, parameter = list(module._parameters), module._parameters[name]

    def put_back() -> None:
        module.__dict__.pop(name, None)
        for one in order[order.index(name) :]:
            if one == name or one in module._parameters:
                module._parameters[one] = parameter if one == name else module._parameters.pop(one)

    undo.callback(put_back)
    module.__dict__[name] = stand_in
    del module._parameters[name]
