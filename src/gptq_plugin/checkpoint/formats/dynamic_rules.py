"""`dynamic` rules that mean the same in any order: `rules_in_any_order`.

Readers take the first rule that matches a name, and files do not keep the order: transformers sorts the keys of
config.json. So no name that a reader looks up may be matched by two rules.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from gptq_plugin.checkpoint.formats.format import Contents, Scheme
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.model.fused_names import fused_name
from gptq_plugin.options.rules import RuleTable

Rules = dict[str, dict[str, Any]]
_BELOW = r"(\..*)?"  # the name itself, and everything in it


def rules_in_any_order(contents: Contents, base: Mapping[str, Any], rules: Mapping[str, Mapping[str, Any]]) -> Rules:
    """Rules that describe the contents, of which no two match one name.

    A rule stays as it is where it decides for all names that it matches, and describes them rightly. In place of the
    others, and for layers that no rule describes, there are expressions for names: for one in all blocks where no other
    name is matched by that, else exact.

    Args:
        contents: The layers, and how they are quantized.
        base: bits, group_size and sym of layers that no rule matches.
        rules: Tried in order; the first that matches counts. Need not describe every layer.
    """
    kinds = set(contents.schemes.values())
    if not rules and not contents.floats and not any(_changes(kind, base, {}) for kind in kinds):
        return {}  # thousands of experts are quantized alike
    matching = _matching(contents, rules)
    results = _results(contents, base, rules, matching)
    wrong = {
        pattern
        for name, patterns in matching.items()
        for i, pattern in enumerate(patterns)
        if name in results and (i or results[name] != _result(pattern, rules))
    }
    kept = {pattern for name in results for pattern in matching[name]} - wrong
    names: dict[tuple[bool, str], list[str]] = defaultdict(list)
    fields: dict[tuple[bool, str], dict[str, Any]] = {}
    for name, result in results.items():
        if result != {} and kept.isdisjoint(matching[name]):
            key = result is None, repr(result)
            names[key].append(name)
            fields[key] = dict(result or {})
    every = _Names(matching)
    made = {
        ("-:" if key[0] else "") + expression: fields[key]
        for key in sorted(names, key=lambda key: not key[0])
        for expression in every.expressions(names[key])
    }
    return {**made, **{pattern: dict(rules[pattern] or {}) for pattern in rules if pattern in kept}}


def _matching(contents: Contents, rules: Mapping[str, Any]) -> dict[str, list[str]]:
    """The rules that match each name a reader looks up, in order: of layers, blocks of experts and fused layers."""
    units = contents.units()
    names = dict.fromkeys([*units, *units.values(), *filter(None, map(_fused, units))])
    table = RuleTable(rules)
    return {name: table.matching(name) for name in names}


def _results(
    contents: Contents, base: Mapping[str, Any], rules: Mapping[str, Any], matching: Mapping[str, list[str]]
) -> dict[str, dict[str, Any] | None]:
    """The fields that the rules have to change for each name; None where they have to leave it float.

    Of the names of fused layers, those that a rule matches and whose members are alike.
    """
    results: dict[str, dict[str, Any] | None] = {}
    fused: dict[str, list[str]] = defaultdict(list)
    for name, unit in contents.units().items():
        for known_as in dict.fromkeys((name, unit)):
            first = next(iter(matching[known_as]), "-:")
            rule = {} if first.startswith("-:") else dict(rules[first] or {})
            results[known_as] = _changes(contents.schemes.get(name), base, rule)
        fused[_fused(name) or ""].append(name)
    for whole, members in fused.items():
        alike = len({contents.schemes.get(name) for name in members}) == 1
        if matching.get(whole) and whole not in results and alike:
            results[whole] = results[members[0]]
    return results


def _changes(scheme: Scheme | None, base: Mapping[str, Any], rule: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rule with what it lacks to describe the scheme; None, which is float, has none."""
    if scheme is None:
        return None
    own = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
    described = {**base, **rule}
    return {**rule, **{key: value for key, value in own.items() if value != described.get(key)}}


def _result(pattern: str, rules: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if pattern.startswith("-:") else dict(rules[pattern] or {})


def _fused(name: str) -> str | None:
    return None if block_of_experts(name) else fused_name(name)


class _Names:
    """The names that readers look up, by the expressions that match them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._matched: dict[str, set[str]] = defaultdict(set)
        blocks = {block for block in map(block_of_experts, names) if block is not None}
        for name in names:
            self._matched[_any_number(name)].add(name)
            self._matched[re.escape(name)].add(name)
            for around in blocks.intersection(itertools.accumulate(name.split("."), "{}.{}".format)):
                for expression in (re.escape(around), _any_number(around)):
                    self._matched[expression + _BELOW].add(name)

    def expressions(self, names: Iterable[str]) -> list[str]:
        """Expressions of which one matches each of these names, and none any other."""
        left, found = set(names), list[str]()
        for wide, name in itertools.product(range(4), names):  # the widest first
            expression = _expressions(name)[wide]
            if expression and name in left and self._matched[expression] <= left:
                left -= self._matched[expression]
                found.append(f"{expression}$")
        return found


def _expressions(name: str) -> tuple[str, str, str, str]:
    """Expressions that match a name: with all of its block of experts, in any layer and in this one, where it is in
    such a block; in any layer; and exact."""
    block = block_of_experts(name)
    around = ("", "") if block is None else (_any_number(block) + _BELOW, re.escape(block) + _BELOW)
    return (*around, _any_number(name), re.escape(name))


def _any_number(name: str) -> str:
    """An expression for a name with any numbers in place of its own."""
    return r"\.".join([r"\d+" if part.isdecimal() else _escaped(part) for part in name.split(".")])


@functools.lru_cache(maxsize=1024)
def _escaped(part: str) -> str:
    """Thousands of names have the same few parts."""
    return re.escape(part)
