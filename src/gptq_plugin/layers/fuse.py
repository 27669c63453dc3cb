"""Finds layers that one product can serve, such as the projections of an attention, and fuses them: `fuse_layers`."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptq_plugin.device.surroundings import same_random_numbers
from gptq_plugin.layers.kernel_layout import ArrangedWeight, is_served
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.siblings import Siblings
from gptq_plugin.layers.stacked_weight import difference

log = logging.getLogger(__name__)


def fuse_layers(model: nn.Module, inputs: Any) -> list[tuple[str, ...]]:
    """Lets one product serve the quantized layers of a module that are called with one tensor: of an attention the
    projections to queries, keys and values, of a gated MLP the first two.

    Which these are, one forward with `inputs` shows; names do not matter. They must be on one GPU that the kernels
    serve, and agree in bits, groups, zero-points and the order of channels. Their weights are then stacked in memory,
    in one copy. Modules keep their places, and state dicts, copies and exports their names and bytes.

    Outputs are slices of one tensor, and may differ in their last bits from those before: kernels are chosen by size.
    Without gradients only (`torch.no_grad`, as `generate` does); see `siblings.Siblings` for what a layer computes by
    itself. The log (INFO) tells how many groups were fused, and why other layers were not.

    Args:
        model: Any module, with its quantized layers where they are to stay.
        inputs: What the model is called with: a mapping gives its keyword arguments, a tuple or list its positional
            ones, anything else is its one argument. One or two rows do.

    Returns:
        The names of the layers of every group.

    Raises:
        Exception: The forward's own; the model is then as it was.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    unfused = {
        name: "it is fused already" for name, layer in layers.items() if layer.siblings and layer.siblings.present()
    }
    unfused |= {name: f"it is on {layer.device}" for name, layer in layers.items() if not is_served(layer.device)}
    if layers and not any(is_served(layer.device) for layer in layers.values()):
        log.warning(
            "no layers are fused: none is on a GPU that the kernels serve, and the others have one product each"
        )
        return []
    candidates = {name: layer for name, layer in layers.items() if name not in unfused}
    alike: dict[tuple[str, tuple[_Use, ...]], list[str]] = defaultdict(list)
    for name, uses in _watched(model, inputs, candidates).items():
        if not uses:
            unfused[name] = "the forward did not call it"
        elif any(use.call is None for use in uses) or len({use.call for use in uses}) < len(uses):
            unfused[name] = "its module does not call it once in a call of its own"
        else:
            alike[name.rpartition(".")[0], uses].append(name)
    groups: list[tuple[str, ...]] = []
    for (parent, _), names in alike.items():
        for group in _that_agree(names, candidates, unfused):
            if len(group) > 1:
                Siblings.of(model.get_submodule(parent), [candidates[name] for name in group])
                groups.append(group)
            else:
                unfused.setdefault(group[0], "no other layer has its input")
    for why, left in itertools.groupby(sorted(unfused, key=lambda name: unfused[name]), key=lambda name: unfused[name]):
        log.info("not fused, since %s: %s", why, ", ".join(left))
    log.info("%d groups of layers fused, each with one product: %s", len(groups), "; ".join(map(", ".join, groups)))
    return groups


class _Use(NamedTuple):
    """One call of a layer."""

    call: int | None  # of the layer's parent, by number; None outside of any
    input: int  # the tensor, by its address in Python
    version: int


class _Watch(Siblings):
    """In the place of siblings, notes what the layers of modules are called with."""

    def __init__(self, layers: Mapping[str, QuantLinear]) -> None:
        super().__init__(0)
        self.uses: dict[QuantLinear, list[_Use]] = {layer: [] for layer in layers.values()}
        self.parents = {layer: name.rpartition(".")[0] for name, layer in layers.items()}
        self._numbers = itertools.count()
        self._running: dict[str, int] = {}
        self._kept: list[Tensor] = []  # so that no two have one address

    def begin_of(self, parent: str) -> None:
        self._running[parent] = next(self._numbers)

    def end_of(self, parent: str) -> None:
        self._running.pop(parent, None)

    def part(self, layer: Any, input: Tensor, x: Tensor) -> None:
        self._kept.append(input)
        version = -len(self._kept) if input.is_inference() else input._version  # negative: like no other
        self.uses[layer].append(_Use(self._running.get(self.parents[layer]), id(input), version))


def _watched(model: nn.Module, inputs: Any, layers: Mapping[str, QuantLinear]) -> dict[str, tuple[_Use, ...]]:
    """How a forward calls layers."""
    watch = _Watch(layers)
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad(), same_random_numbers():
        for parent in set(watch.parents.values()):
            module = model.get_submodule(parent)
            begin = module.register_forward_pre_hook(lambda *_, parent=parent: watch.begin_of(parent))
            end = module.register_forward_hook(lambda *_, parent=parent: watch.end_of(parent), always_call=True)
            stack.callback(begin.remove)
            stack.callback(end.remove)
        for layer in watch.uses:
            layer.siblings = watch
            stack.callback(setattr, layer, "siblings", None)
        for module in [module for module in model.modules() if module.training]:
            module.training = False
            stack.callback(setattr, module, "training", True)
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
    return {name: tuple(watch.uses[layer]) for name, layer in layers.items()}


def _that_agree(names: list[str], layers: Mapping[str, QuantLinear], unfused: dict[str, str]) -> list[tuple[str, ...]]:
    """Splits layers with one input into groups that can be stacked, and notes why layers are not in the first."""
    groups: list[tuple[ArrangedWeight, list[str]]] = []
    for name in names:
        weight = layers[name].arranged() if layers[name].arrange() else None
        if weight is None:
            unfused[name] = "the kernels' layout does not take it"
            continue
        found = [difference(first, weight) for first, _ in groups]
        if None in found:
            groups[found.index(None)][1].append(name)
        else:
            groups.append((weight, [name]))
            if found:
                unfused[name] = f"of those with its input, {groups[0][1][0]} differs: it has {found[0]}"
    for _, group in groups:
        if len(group) > 1:
            unfused.pop(group[0], None)
    return [tuple(group) for _, group in groups]
