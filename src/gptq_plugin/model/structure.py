"""`Structure`: the parts of a model that its quantization and its description are made from."""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import some
from gptq_plugin.layers.hooks import saves_its_own
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.experts import routers, unfused
from gptq_plugin.model.hf_models import (
    generates,
    is_encoder_decoder,
    is_transformers,
    tied_weights,
    transformers_models,
)
from gptq_plugin.model.linears import is_linear, linear_shape
from gptq_plugin.model.output_heads import output_heads
from gptq_plugin.model.stored_names import stored_names


@dataclass(frozen=True)
class Structure:
    """The linear layers of a model, its routers and its output embedding, found in one pass over its modules.

    Experts in one parameter are among the layers if `experts.unfused` had taken them apart. Names remain valid when
    layers are replaced by quantized ones and experts are fused again.

    Attributes:
        model: The model.
        linears: Every linear layer, float or quantized, by name; a shared one once, under its first name.
        routers: See `experts.routers`. Linear ones are among `linears` too.
        head: The output embedding, wherever it is in the tree; None without one.
        output_heads: The layers that give a classifier's output (`output_heads.output_heads`).
        published_head: The name of the output embedding of a transformers model, the only one clients look for.
        obstacles: Linear layers that cannot be quantized by themselves, and why.
        outside: Linear layers outside the language model, in a model that also reads images or sounds.
        shapes: (out_features, in_features) of every linear layer, under each of its names, and of every router.
        aliases: The further names of every linear layer that has several, by its first.
    """

    model: nn.Module
    linears: Mapping[str, nn.Module]
    routers: Mapping[str, nn.Module]
    head: nn.Module | None
    output_heads: Set[nn.Module]
    published_head: str | None
    obstacles: Mapping[nn.Module, str]
    outside: Set[nn.Module]
    shapes: Mapping[str, tuple[int, int]]
    aliases: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """The structure of a model as it is; see `of_unfused`."""
        linears = {name: module for name, module in modules_of(model).items() if _is_layer(module)}
        scorers, head = routers(model), _output_embedding(model)
        everywhere = {n: m for n, m in modules_of(model, once=False).items() if _is_layer(m)}
        shapes = {name: _shape(module) for name, module in linears.items()}
        of_modules = {linears[name]: shape for name, shape in shapes.items()}
        return cls(
            model,
            linears,
            scorers,
            head,
            {linears[name] for name in output_heads(model, shapes)},
            _published_head(model),
            _obstacles(model, head),
            _outside_language(model, linears),
            {name: of_modules.get(module) or _shape(module) for name, module in {**everywhere, **scorers}.items()},
            _aliases(linears, everywhere),
        )

    @classmethod
    def of_unfused(cls, model: nn.Module) -> Structure:
        """The structure of a model with its experts apart; they are together again afterwards."""
        with unfused(model):
            return cls.of(model)

    @functools.cached_property
    def stored_names(self) -> Mapping[str, str]:
        """The name in a checkpoint of every layer in `shapes`, by transformers' rules (`stored_names.stored_names`).

        Computed on first use, and once: thousands of experts take seconds.
        """
        return stored_names(self.model, self.shapes)

    @functools.cached_property
    def places(self) -> Mapping[str, Sequence[str]]:
        """The names in a checkpoint under which each layer is stored, its own first; see `further_places`."""
        stored, further = self.stored_names, self.further_places
        return {name: [own, *(stored[one] for one in further.get(name, ()))] for name, own in stored.items()}

    @functools.cached_property
    def further_places(self) -> Mapping[str, Sequence[str]]:
        """The other names under which a layer is stored once more, by each of the names of those that have such.

        These layers occur in several places of a transformers model whose class does not tie them, such as replicated
        blocks: whoever loads it makes a layer for each. A plain module is built with its layers shared.
        """
        if not is_transformers(self.model):
            return {}
        tied = tied_weights(self.model)
        return {
            name: [one for one in family if one != name and f"{one}.weight" not in tied]
            for family in (self.all_names([first]) for first in self.aliases)
            for name in family
        }

    def all_names(self, names: Iterable[str]) -> list[str]:
        """Each of these layers' names, then the further ones of those that have several."""
        return [every for name in names for every in (name, *self.aliases.get(name, ()))]


def _aliases(linears: Mapping[str, nn.Module], everywhere: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    first = {module: name for name, module in linears.items()}
    found: dict[str, list[str]] = defaultdict(list)
    for name, module in everywhere.items():
        if first[module] != name:
            found[first[module]].append(name)
    return dict(found)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) or is_linear(module)


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, QuantLinear):
        return module.out_features, module.in_features
    return linear_shape(module) if is_linear(module) else tuple(module.weight.shape)  # type: ignore[return-value, arg-type]


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The output embedding by transformers' getter, else the Linear that shares an Embedding's weight."""
    for module in modules_of(model).values():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (NotImplementedError, AttributeError):
                head = None
            if isinstance(head, nn.Module):
                return head
    embeddings = {id(m.weight) for m in modules_of(model).values() if isinstance(m, nn.Embedding)}
    for module in modules_of(model).values():
        if is_linear(module) and id(module._parameters.get("weight")) in embeddings:
            return module
    return None


def _published_head(model: Any) -> str | None:
    head = model.get_output_embeddings() if is_transformers(model) else None
    return next((name for name, module in modules_of(model).items() if module is head), None)


def _obstacles(model: nn.Module, head: nn.Module | None) -> dict[nn.Module, str]:
    """See `Structure.obstacles`. A tie is none for the head, which may leave its embedding."""
    reasons: dict[nn.Module, str] = {}
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in modules_of(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append(f"{name}.{key}")
    for name, module in modules_of(model).items():
        if not is_linear(module):
            continue
        weight = module._parameters.get("weight")
        others = [user for user in users[id(weight)] if user != f"{name}.weight"]
        reason = _own_obstacle(module)
        if reason is None and module is not head and len(users[id(weight)]) > 1:
            reason = f"its weight is tied to {some(others)}"
        if reason is not None:
            reasons[module] = reason
    return reasons


def _own_obstacle(module: nn.Module) -> str | None:
    """Why a linear layer cannot be quantized, whatever is around it."""
    weight = module._parameters.get("weight")
    if weight is None or module.weight is not weight:
        return "its weight is computed by a parametrization or a property; remove it first to quantize"
    if getattr(module, "bias", None) is not module._parameters.get("bias"):
        return "its bias is computed by a parametrization or a property; remove it first to quantize"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if type(weight) not in (nn.Parameter, Tensor) and not _is_sharded(weight):
        return f"its weight is a {type(weight).__name__}, which may multiply in its own way; load it as a plain tensor"
    if type(module).__call__ is not nn.Module.__call__ or type(module)._call_impl is not nn.Module._call_impl:
        return f"{type(module).__name__} is called in its own way, around hooks and forward"
    if not saves_its_own(module):
        return "its state dict holds something else than its tensors, by a hook; remove it first to quantize"
    return None


def _is_sharded(weight: Tensor) -> bool:
    """Return whether it is a DTensor, of which the whole is quantized."""
    sharding = sys.modules.get("torch.distributed.tensor")  # without it in the process there is none
    return sharding is not None and isinstance(weight, sharding.DTensor)


def _outside_language(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[nn.Module]:
    """See `Structure.outside`: towers and projectors.

    The language model is the part whose configuration is of the class of the text's; in an encoder-decoder, the part
    that reads tokens belongs to it too.
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
    """Returns whether a transformers model has token embeddings, and no part for anything but text."""
    if type(model.config.get_text_config()) is not type(model.config):
        return False
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except (NotImplementedError, AttributeError):
        return False
