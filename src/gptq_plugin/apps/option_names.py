"""Names in a Hydra command line that do not exist, each with the nearest one that does.

Hydra's own advice for an unknown key is to add it with ``+``, after which nothing reads it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = "gptq_plugin.conf"
_TARGET = "_target_"


def unknown_names(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for each override whose key, group or choice does not exist. Hydra judges everything else.

    Args:
        config_name: ``"finetune"`` or ``"quantize"``.
        overrides: As on the command line: ``quantizer.bits=3``, ``quantizer=w3g128``, ``+trainer.min_epochs=2``.
    """
    bare = [one for one in overrides if "=" not in one and not one.startswith("~")]
    if bare:
        return [f"{one} has no value: options are written name=value, such as quantizer.bits=3" for one in bare]
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return []
    with initialize_config_module(CONF, version_base="1.3"):
        repository = GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]
        groups = {one.key_or_group for one in parsed if repository.group_exists(one.key_or_group)}
        choices = [one for one in parsed if one.key_or_group in groups]
        wrong = [sentence for one in choices for sentence in _wrong_choices(one)]
        if wrong:
            return wrong
        keys = [one for one in parsed if one.key_or_group not in groups]
        tree = _composed(config_name, choices)
        result = _composed(config_name, parsed)
        if tree is None:
            return []
        added = [one for one in keys if one.is_add() or one.is_force_add()]
        if result is not None:
            sentences = [_wrong_addition(one, tree, result) for one in added]
        else:
            sentences = [
                _of_another_choice(one, config_name, tree) or _wrong_key(one, tree) for one in keys if one not in added
            ]
    return [sentence for sentence in sentences if sentence]


def nearest(key: str, tree: Mapping[str, Any]) -> str | None:
    """The option of a configuration whose dotted name is most like `key`; None if none is like it.

    An option of the same last name elsewhere comes first (``bits`` is ``quantizer.bits``), then one that is alike part
    by part; for a key of no part of the configuration, then one whose last name is alike.
    """
    leaf, paths = key.rpartition(".")[2], list(_paths(tree))
    by_leaf: dict[str, list[str]] = {}
    for path in paths:
        by_leaf.setdefault(path.rpartition(".")[2], []).append(path)
    if leaf in by_leaf:
        return _most_alike(key, by_leaf[leaf])
    alike = _part_by_part(key.split("."), tree)
    if alike is not None or key.partition(".")[0] in tree:
        return alike
    close = get_close_matches(leaf, by_leaf, n=1, cutoff=0.8)
    return _most_alike(key, by_leaf[close[0]]) if close else None


def _composed(config_name: str, overrides: Sequence[Override]) -> dict[str, Any] | None:
    """The configuration as plain values, of a sweep its first; None if it cannot be composed."""
    try:
        config = compose(config_name, [_first(one) for one in overrides], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        return None
    tree: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    return tree


def _first(override: Override) -> str:
    line = override.input_line or ""
    if not override.is_sweep_override():
        return line
    return f"{line.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"


def _wrong_choices(override: Override) -> Iterator[str]:
    group = override.key_or_group
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    for value in values:
        if isinstance(value, str) and value not in known and not override.is_delete():
            near = get_close_matches(value, known, n=1)
            hint = f"did you mean {group}={near[0]}? " if near else ""
            yield f"there is no {group}={value}: {hint}{group} is one of {', '.join(known)}"


def _of_another_choice(override: Override, config_name: str, tree: Mapping[str, Any]) -> str | None:
    """A sentence for an option that other choices of its group have."""
    key = override.key_or_group
    group = key.partition(".")[0]
    chosen = _at(tree, "hydra.runtime.choices") or {}
    if group not in chosen or not _known_part(key, tree)[0]:
        return None
    loader = GlobalHydra.instance().config_loader()
    others = []
    for option in loader.get_group_options(group):
        other = compose(config_name, [f"{group}={option}"])
        if OmegaConf.is_dict(other[group]) and not _known_part(key, OmegaConf.to_container(other, resolve=False))[0]:  # type: ignore[arg-type]
            others.append(f"{group}={option}")
    if not others:
        return None
    meant = " or ".join(f"{other} {override.input_line}" for other in others)
    return f"{group}={chosen[group]} has no {key}: did you mean {meant}?"


def _wrong_key(override: Override, tree: Mapping[str, Any]) -> str | None:
    key, value = override.key_or_group, _value(override)
    parts, parent, node = _known_part(key, tree)
    if not parts:
        return None
    if not isinstance(node, Mapping):
        hint = f"+{key}{value} adds it" if node is None else f"it is {node!r}"
        return f"{parent} has no {'.'.join(parts)}: {hint}"
    takes, _ = _parameters(node)
    if len(parts) == 1 and parts[0] in takes:
        return f"{key} is not in the configuration, but {node[_TARGET]} takes it: +{key}{value} adds it"
    return _unknown(override, tree, parent, node)


def _wrong_addition(override: Override, tree: Mapping[str, Any], result: Mapping[str, Any] | None) -> str | None:
    """A sentence for an added option that nothing would read."""
    parts, parent, node = _known_part(override.key_or_group, tree)
    if not parts or not isinstance(node, Mapping) or parent.partition(".")[0] == "hydra":
        return None
    if not parent:
        if re.search(rf"\$\{{\.?{re.escape(parts[0])}[.\[}}]", yaml.safe_dump(result)):
            return None  # an interpolation reads it
    elif _TARGET in (target := _at(result or {}, parent) or {}):
        takes, any_name = _parameters(target)
        # This package's own options are all in the configuration, whatever a signature leaves open.
        if parts[0] in takes or (any_name and not str(target[_TARGET]).startswith("gptq_plugin.")):
            return None
    else:
        made = _at(result or {}, f"{parent}.{parts[0]}")
        if not isinstance(made, Mapping) or _TARGET in made or not get_close_matches(parts[0], node):
            return None
    return _unknown(override, tree, parent, node)


def _unknown(override: Override, tree: Mapping[str, Any], parent: str, node: Mapping[str, Any]) -> str:
    key = override.key_or_group
    takes, _ = _parameters(node)
    close = get_close_matches(key.rpartition(".")[2], [*node, *takes], n=1)
    near, sign = nearest(key, tree), "~" if override.is_delete() else ""
    if close and close[0] not in node:
        near, sign = f"{parent}.{close[0]}", "+"
    if near is not None:
        return f"there is no option {key}: did you mean {sign}{near}{_value(override)}?"
    names = ", ".join(str(name) for name in node if name not in (_TARGET, "hydra"))
    return f"there is no option {key}: {parent or 'the configuration'} has {names or 'no options'}"


def _value(override: Override) -> str:
    _, equals, value = (override.input_line or "").partition("=")
    return equals + value


def _known_part(key: str, tree: Mapping[str, Any]) -> tuple[list[str], str, Any]:
    """The parts of a key that do not exist, the name of the part that does, and what is there."""
    node: Any = tree
    parts = key.split(".")
    for number, part in enumerate(parts):
        if not isinstance(node, Mapping) or part not in node:
            return parts[number:], ".".join(parts[:number]), node
        node = node[part]
    return [], key, node


def _at(tree: Mapping[str, Any], key: str) -> Any:
    parts, _, node = _known_part(key, tree)
    return None if parts else node


def _parameters(node: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Names of the arguments that a node's target takes, and whether it takes any other."""
    try:
        parameters = inspect.signature(get_object(str(node[_TARGET]))).parameters.values()
    except (KeyError, ImportError, AttributeError, ValueError, TypeError):
        return [], True
    kinds = inspect.Parameter
    names = [one.name for one in parameters if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    return names, any(one.kind is kinds.VAR_KEYWORD for one in parameters)


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options; Hydra's own are left out."""
    for name, value in tree.items():
        if not prefix and name == "hydra":
            continue
        if name != _TARGET:
            yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")


def _part_by_part(parts: Sequence[str], tree: Mapping[str, Any]) -> str | None:
    node: Any = tree
    found = []
    for part in parts:
        if not isinstance(node, Mapping):
            return None
        close = [part] if part in node else get_close_matches(part, map(str, node), n=1)
        if not close:
            return None
        found.append(close[0])
        node = node[close[0]]
    return ".".join(found)


def _most_alike(key: str, paths: Sequence[str]) -> str:
    return max(paths, key=lambda path: SequenceMatcher(None, key, path).ratio())
