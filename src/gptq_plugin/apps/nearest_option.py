"""Options of a composed configuration by their dotted names, and the one most like a name: `nearest`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any

TARGET = "_target_"


def nearest(key: str, tree: Mapping[str, Any]) -> str | None:
    """The option of a configuration whose dotted name is most like `key`; None if none is like it.

    An option of the same last name elsewhere comes first (``bits`` is ``quantizer.bits``), then one that is alike part
    by part; for a key of no part of the configuration, then one whose last name is alike.
    """
    leaf, paths = key.rpartition(".")[2], list(option_paths(tree))
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


def known_part(key: str, tree: Mapping[str, Any]) -> tuple[list[str], str, Any]:
    """The parts of a key that do not exist, the name of the part that does, and what is there."""
    node: Any = tree
    parts = key.split(".")
    for number, part in enumerate(parts):
        if not isinstance(node, Mapping) or part not in node:
            return parts[number:], ".".join(parts[:number]), node
        node = node[part]
    return [], key, node


def option_paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options; Hydra's own are left out."""
    for name, value in tree.items():
        if not prefix and name == "hydra":
            continue
        if name != TARGET:
            yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from option_paths(value, f"{prefix}{name}.")


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
