"""Names in a Hydra command line that do not exist, each with the nearest one that does.

Hydra's own advice for an unknown key is to add it with ``+``, after which nothing reads it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf

from gptq_plugin.apps.composition import first_of, parsed
from gptq_plugin.apps.nearest_option import TARGET, known_part, nearest
from gptq_plugin.apps.other_choices import UNUSED, Options

CONF = "gptq_plugin.conf"


def unreadable_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for each override that Hydra's grammar does not take, and for each group whose choice is no
    name; Hydra's own sentences do not tell which."""
    groups = {folder.name for folder in files(CONF).iterdir() if folder.is_dir()}
    found = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
            chosen = parsed.value()
            if (
                parsed.key_or_group in groups
                and isinstance(chosen, list)
                and not all(isinstance(x, str) for x in chosen)
            ):
                found.append(f"{override}: {parsed.key_or_group} is chosen by names, such as those that --help lists")
        except HydraException as error:
            what = str(error).partition("\nSee ")[0].strip()
            hint = f"'{override.partition('=')[0]}=\"...\"'"
            found.append(f"{override} cannot be read: {what}. Quote its value: {hint}")
    return found


def unknown_names(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for each override whose key, group or choice does not exist. Hydra judges everything else.

    Args:
        config_name: ``"finetune"`` or ``"quantize"``.
        overrides: As on the command line: ``quantizer.bits=3``, ``quantizer=w3g128``, ``+trainer.min_epochs=2``; those
            that can be read.
    """
    bare = [one for one in overrides if "=" not in one and not one.startswith("~")]
    if bare:
        return [f"{one} has no value: options are written name=value, such as quantizer.bits=3" for one in bare]
    with initialize_config_module(CONF, version_base="1.3"):
        given = parsed(overrides)
        repository = GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]
        groups = {one.key_or_group for one in given if repository.group_exists(one.key_or_group)}
        choices = [one for one in given if one.key_or_group in groups]
        wrong = [sentence for one in choices for sentence in _wrong_choices(one)]
        wrong = wrong or [sentence for one in choices for sentence in _unread_choices(one, config_name)]
        if wrong:
            return wrong
        keys = [one for one in given if one.key_or_group not in groups]
        tree = _composed(config_name, choices)
        result = _composed(config_name, given)
        if tree is None:
            return []
        added = [one for one in keys if one.is_add() or one.is_force_add()]
        options = Options(config_name, tree)
        if result is not None:
            sentences = [_wrong_addition(one, options, result) for one in added]
        else:
            sentences = [_wrong_key(one, options) for one in keys if one not in added]
    return [sentence for sentence in sentences if sentence]


def _composed(config_name: str, overrides: Sequence[Override]) -> dict[str, Any] | None:
    """The configuration as plain values, of a sweep its first; None if it cannot be composed."""
    try:
        config = compose(config_name, [first_of(one) for one in overrides], return_hydra_config=True)
    except Exception:  # noqa: BLE001  `composition` tells of it
        return None
    tree: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    return tree


def _wrong_choices(override: Override) -> Iterator[str]:
    group, values = override.key_or_group, _chosen(override)
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    for value in values:
        is_none = isinstance(value, (int, float)) or (isinstance(value, str) and value not in known)
        if is_none and not override.is_delete():
            near = get_close_matches(str(value), known, n=1)
            hint = f"did you mean {group}={near[0]}? " if near else ""
            yield f"there is no {group}={value}: {hint}{group} is one of {', '.join(known)}"


def _unread_choices(override: Override, config_name: str) -> Iterator[str]:
    """Sentences for choices of a group that the command does not have, and for those it has no use for."""
    group = override.key_or_group
    own = compose(config_name, return_hydra_config=True).hydra.runtime.choices
    if group not in own and not group.startswith("hydra/"):
        names = ", ".join(sorted(one for one in own if "/" not in one and one != "run"))
        yield f"{group} is no group of this command, which has {names}"
    for value in _chosen(override):
        why = UNUSED.get((config_name, f"{group}={value}"))
        if why:
            yield f"{group}={value} is no choice of this command: {why}"


def _chosen(override: Override) -> list[Any]:
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]


def _wrong_key(override: Override, options: Options) -> str | None:
    key, value = override.key_or_group, _value(override)
    parts, parent, node = known_part(key, options.tree)
    if not parts:
        return None
    if not isinstance(node, Mapping):
        hint = f"+{key}{value} adds it" if node is None else f"it is {node!r}"
        return f"{parent} has no {'.'.join(parts)}: {hint}"
    takes, _ = _parameters(node)
    if len(parts) == 1 and parts[0] in takes and not options.only_in(key):
        return f"{key} is not in the configuration, but {node[TARGET]} takes it: +{key}{value} adds it"
    return _unknown(override, options, parent, node)


def _wrong_addition(override: Override, options: Options, result: Mapping[str, Any] | None) -> str | None:
    """A sentence for an added option that nothing would read."""
    parts, parent, node = known_part(override.key_or_group, options.tree)
    if not parts or not isinstance(node, Mapping) or parent.partition(".")[0] == "hydra":
        return None
    if not parent:
        if re.search(rf"\$\{{\.?{re.escape(parts[0])}[.\[}}]", yaml.safe_dump(result)):
            return None  # an interpolation reads it
    elif TARGET in (target := _at(result or {}, parent) or {}):
        takes, any_name = _parameters(target)
        # This package's own options are all in the configuration, whatever a signature leaves open.
        read = parts[0] in takes or (any_name and not str(target[TARGET]).startswith("gptq_plugin."))
        if read and not options.only_in(override.key_or_group):
            return None
    else:
        made = _at(result or {}, f"{parent}.{parts[0]}")
        if not isinstance(made, Mapping) or TARGET in made or not get_close_matches(parts[0], node):
            return None
    return _unknown(override, options, parent, node)


def _unknown(override: Override, options: Options, parent: str, node: Mapping[str, Any]) -> str:
    key, value = override.key_or_group, _value(override)
    takes, _ = _parameters(node)
    close = get_close_matches(key.rpartition(".")[2], [*node, *takes], n=1)
    near, sign = nearest(key, options.tree), "~" if override.is_delete() else ""
    if close and close[0] not in node:
        near, sign = f"{parent}.{close[0]}", "+"
    elsewhere = [] if override.is_delete() else options.only_in(key) or options.nearer(key, near)
    if elsewhere:
        meant = " or ".join(f"{choice} {option}{value}" for choice, option in elsewhere)
        group, chosen = parent.partition(".")[0], options.chosen(parent)
        lack = f"{group}={chosen} has no {key}" if chosen else f"there is no option {key}"
        return f"{lack}: did you mean {meant}?"
    if near is not None:
        return f"there is no option {key}: did you mean {sign}{near}{value}?"
    names = ", ".join(str(name) for name in node if name not in (TARGET, "hydra"))
    others = "".join(f"; {choice} also {', '.join(new)}" for choice, new in options.of_other_choices(parent))
    return f"there is no option {key}: {parent or 'the configuration'} has {names or 'no options'}{others}"


def _value(override: Override) -> str:
    _, equals, value = (override.input_line or "").partition("=")
    return equals + value


def _at(tree: Mapping[str, Any], key: str) -> Any:
    parts, _, node = known_part(key, tree)
    return None if parts else node


def _parameters(node: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Names of the arguments that a node's target takes, and whether it takes any other."""
    try:
        parameters = inspect.signature(get_object(str(node[TARGET]))).parameters.values()
    except (KeyError, ImportError, AttributeError, ValueError, TypeError):
        return [], True
    kinds = inspect.Parameter
    names = [one.name for one in parameters if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    return names, any(one.kind is kinds.VAR_KEYWORD for one in parameters)
