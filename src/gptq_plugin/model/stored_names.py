"""The names under which transformers stores a model's weights, which may differ from those of its modules.

transformers has tables that rename, split and join weights between a checkpoint and the model. This module only asks
those tables, with small stand-ins for the weights.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_plugin.model.hf_models import is_transformers, transformers_models

_ASKED = 3  # experts whose names transformers' rules are asked for
_EXPERT = re.compile(r"(.*?\w*experts?)\.(\d+)(?:\.(.+))?$")  # a layer of one expert: its block, number, and own name


@dataclass(frozen=True)
class Part:
    """A matrix that a checkpoint stores of one expert: some rows of the model's matrix.

    Attributes:
        name: Relative to the experts' module, such as ``"3.w1"``.
        rows: The output channels.
    """

    name: str
    rows: slice


class _Stack(Protocol):
    """The attributes of `experts.Experts` that are needed here."""

    @property
    def name(self) -> str: ...
    @property
    def parameter(self) -> str: ...
    @property
    def layout(self) -> str: ...
    @property
    def whole(self) -> Tensor: ...


def stored_names(model: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Maps linear layers to their names in the checkpoint, by transformers' rules for `save_pretrained`.

    A layer whose weight those rules would split, join or permute keeps the model's name, because packed weights cannot
    be split, joined or permuted. Two experts are asked about, and the others' names have other numbers.

    Args:
        model: Any module. Without rules, outside transformers, the names stay the same.
        shapes: (out_features, in_features) by layer.
    """
    if not is_transformers(model):
        return {name: name for name in shapes}
    from transformers.core_model_loading import revert_weight_conversion

    def reverted(names: Iterable[str]) -> dict[str, str]:
        # All at once: some rules apply only after another layer's name.
        state = {f"{name}.qweight": torch.empty(shapes[name], device="meta") for name in names}
        of_tensors = {id(tensor): name.removesuffix(".qweight") for name, tensor in state.items()}
        found = revert_weight_conversion(model, dict(state))
        stored = {of_tensors[id(t)]: key.removesuffix(".qweight") for key, t in found.items() if id(t) in of_tensors}
        return {name: stored.get(name, name) for name in of_tensors.values()}

    by_kind = _by_expert(shapes)
    others = {name for of_kind in by_kind.values() for name in list(of_kind.values())[2:]}
    asked = reverted(name for name in shapes if name not in others)
    for of_kind in by_kind.values():
        first, second, *_ = of_kind
        template = _template(asked[of_kind[first]], asked[of_kind[second]], first, second)
        if template is None:
            return reverted(shapes)
        asked.update((name, template.format(number)) for number, name in of_kind.items())
    return {name: asked[name] for name in shapes}


def _by_expert(names: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Names of layers that some experts have in common, by the rest of the name and the expert's number."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in names:
        match = _EXPERT.match(name)
        if match:
            found[match[1], match[3] or ""][match[2]] = name
    return {kind: of_kind for kind, of_kind in found.items() if len(of_kind) > 2}


def _template(one: str, other: str, number: str, other_number: str) -> str | None:
    """What two names have in common that differ in these numbers alone, for `str.format`; else None."""
    parts, other_parts = one.split("."), other.split(".")
    different = [place for place, pair in enumerate(zip(parts, other_parts, strict=False)) if pair[0] != pair[1]]
    if len(parts) != len(other_parts) or len(different) != 1 or any(mark in one for mark in "{}"):
        return None
    place = different[0]
    if (parts[place], other_parts[place]) != (number, other_number):
        return None
    return ".".join([*parts[:place], "{}", *parts[place + 1 :]])


def renaming(model: Any) -> Callable[[str], str]:
    """Maps a checkpoint's module name to the model's, by transformers' rules for that module's weights."""
    rename = key_renaming(model)
    return lambda name: rename(f"{name}.weight")[0].removesuffix(".weight")


def plain_renaming(model: Any) -> Callable[[str], str]:
    """Like `renaming`, for modules that are not in the model yet: rules that join weights are left out."""
    rename = _Rules(model)
    return lambda name: rename.plain(f"{name}.weight").removesuffix(".weight")


def key_renaming(model: Any) -> Callable[[str], list[str]]:
    """Maps a checkpoint's tensor name to the model's, by transformers' rules: to several if it fills several tensors.

    If a rule would join a module's weight with others, but the model has that module (an expert that is apart, see
    `experts`) and not what it is joined into, the name is that module's.
    """
    rules = _Rules(model)
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def rename(name: str) -> list[str]:
        plain = rules.plain(name)
        joined = rules.joined(name)
        return joined if plain.rpartition(".")[0] not in modules or rules.state.keys() >= set(joined) else [plain]

    return rename


class _Rules:
    """transformers' rules for a model, from checkpoint names to the model's."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._model = model
        self.state = model.state_dict()

    def plain(self, name: str) -> str:
        return self._renamed(name, [])[0]

    def joined(self, name: str) -> list[str]:
        key, source = self._renamed(name, self._converters)
        if source is None:
            return [key]
        targets = next(rule.target_patterns for rule in self._converters if source in rule.source_patterns)
        return [key.replace(targets[0], target) for target in targets]

    def _renamed(self, name: str, converters: list[Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, converters, self._model.base_model_prefix, self.state
        )
        return renamed


def expert_parts(root: nn.Module, stacks: Iterable[_Stack]) -> dict[tuple[str, str], list[list[Part]]]:
    """The parts in which experts' matrices are stored, by module and parameter: a list for each expert, by rows.

    If a checkpoint stores the experts one by one, parts have its names. Otherwise each expert has one part, with the
    parameter's name (``"3.down_proj"``).

    Args:
        root: Any module.
        stacks: Fused parameters in it.
    """
    found: dict[tuple[str, str], list[list[Part]]] = {}
    inner = [(f"{name}." if name else "", model) for name, model in transformers_models(root)]
    for stack in stacks:
        experts, rows = _sizes(stack)
        whole = "" if stack.parameter == "weight" else f".{stack.parameter}"
        found[stack.name, stack.parameter] = [[Part(f"{e}{whole}", slice(0, rows))] for e in range(experts)]
    for prefix, model in inner:
        own = [stack for stack in stacks if stack.name.startswith(prefix)]
        found.update(_stored_parts(model, prefix, own) if own else {})
    return found


def _stored_parts(model: Any, prefix: str, stacks: list[_Stack]) -> dict[tuple[str, str], list[list[Part]]]:
    """The parts of experts that a model's checkpoint stores one by one.

    A few experts are asked about, and the others' parts have other numbers.
    """
    found = {}
    for key, of_few in _parts_of(model, prefix, stacks, _ASKED).items():
        experts = next(_sizes(stack)[0] for stack in stacks if (stack.name, stack.parameter) == key)
        own = [[(part.name.partition(".")[2], part.rows) for part in parts] for parts in of_few]
        if any(one != own[0] for one in own):
            return _parts_of(model, prefix, stacks)
        found[key] = [[Part(f"{number}.{name}", rows) for name, rows in own[0]] for number in range(experts)]
    return found


def _parts_of(
    model: Any, prefix: str, stacks: list[_Stack], most: int | None = None
) -> dict[tuple[str, str], list[list[Part]]]:
    """The parts of the first experts, or of all.

    Each entry of a stand-in is the number of its row, so the stored tensors tell which rows they hold.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = {}
    starts: list[int] = []  # the number of each stack's first row
    count = 0
    for stack in stacks:
        experts, rows = _sizes(stack, most)
        numbers = torch.arange(experts * rows, device="cpu").view(experts, rows, 1).expand(-1, -1, 2) + count
        state[f"{stack.name.removeprefix(prefix)}.{stack.parameter}"] = (
            numbers if stack.layout == "out, in" else numbers.mT
        )
        starts.append(count)
        count += experts * rows
    found: dict[tuple[str, str], list[list[Part]]] = {}
    for key, tensor in revert_weight_conversion(model, state).items():
        if tensor.dim() != 2:
            continue
        numbers = tensor[:, 0] if tensor.shape[1] == 2 else tensor[0]
        first, last = int(numbers[0]), int(numbers[-1])
        place = bisect.bisect_right(starts, first) - 1
        stack, row = stacks[place], first - starts[place]
        experts, rows = _sizes(stack, most)
        expert = row // rows
        name = re.search(rf"(?:^|\.)({expert}\.\w+)\.weight$", key)
        if (
            name is None
            or not torch.equal(numbers, torch.arange(first, last + 1, device="cpu"))
            or (last - starts[place]) // rows != expert
        ):
            continue
        of_all = found.setdefault((stack.name, stack.parameter), [[] for _ in range(experts)])
        of_all[expert].append(Part(name[1], slice(row % rows, row % rows + len(numbers))))
    return {
        key: [sorted(parts, key=lambda part: part.rows.start) for parts in found[key]]
        for stack in stacks
        if (key := (stack.name, stack.parameter)) in found and _whole(found[key], _sizes(stack)[1])
    }


def _whole(of_all: list[list[Part]], rows: int) -> bool:
    return all(sum(part.rows.stop - part.rows.start for part in parts) == rows for parts in of_all)


def _sizes(stack: _Stack, most: int | None = None) -> tuple[int, int]:
    """The number of experts, or of the first ones, and the rows of each expert's matrix."""
    experts, *sides = stack.whole.shape
    return min(experts, most or experts), sides[0] if stack.layout == "out, in" else sides[1]
