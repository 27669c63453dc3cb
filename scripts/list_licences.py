#!/usr/bin/env python
"""Writes docs/reference/licences.md: the licence of every package of constraints.txt, by its own metadata.

Run it in the environment of `bash scripts/test.sh`, which holds the pinned set.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "licences.md"
_LONGEST = 60  # a License field may hold the whole text
_HEAD = """# Licences of dependencies

gptq-plugin is under the Apache License 2.0 and contains no code of other packages. This is what it installs: the pinned
set of `constraints.txt`, each with the licence that its own metadata names. `python scripts/list_licences.py` writes
this page; a test compares it with what is installed.

torch's builds for CUDA also bring NVIDIA's libraries, which are under
[NVIDIA's own terms](https://docs.nvidia.com/cuda/eula/); `requirements.lock` names them.
"""
_SECTIONS = (
    ("With the package", ()),
    ("With the extras `peft` and `trainer`", ("peft", "trainer")),
    ("For tests, docs and development only", ("dev", "mutation")),
)


def pins() -> dict[str, str]:
    """Version by canonical name, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


def licence(name: str) -> str | None:
    """The licence a package's metadata names; None if it is not installed in its pinned version."""
    try:
        metadata = distribution(name).metadata
    except PackageNotFoundError:
        return None
    if metadata["Version"].partition("+")[0] != pins().get(canonicalize_name(name)):  # "+cpu" is the same release
        return None
    classifiers = metadata.get_all("Classifier") or []
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: OSI Approved ::")]
    field = (metadata.get("License") or "").strip()
    short = field if "\n" not in field and len(field) <= _LONGEST and field != "UNKNOWN" else ""
    title = field.partition("\n")[0].strip()  # of a whole text
    titled = title if "License" in title and len(title) <= _LONGEST else ""
    return metadata.get("License-Expression") or short or ", ".join(named) or titled or "not named"


def needed(name: str, extras: Iterable[str] = (), seen: set[tuple[str, str]] | None = None) -> set[str]:
    """Canonical names of all that a package needs with these extras, the package itself left out."""
    seen = set() if seen is None else seen
    found: set[str] = set()
    try:
        requirements = [Requirement(text) for text in distribution(name).requires or ()]
    except PackageNotFoundError:
        return found
    for extra in ("", *extras):
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found |= {canonicalize_name(requirement.name)} | needed(requirement.name, requirement.extras, seen)
    return found


def page() -> str:
    """The page's text."""
    versions, listed = pins(), {"gptq-plugin"}
    parts = [_HEAD]
    for title, extras in _SECTIONS:
        names = sorted((needed("gptq-plugin", extras) & set(versions)) - listed)
        listed |= set(names)
        parts.append(_table(title, names, versions))
    rest = sorted(set(versions) - listed)
    if rest:
        parts.append(_table("For releases, or for one version of Python only", rest, versions))
    return "\n".join(parts)


def _table(title: str, names: list[str], versions: dict[str, str]) -> str:
    rows = [f"| {name} | {versions[name]} | {licence(name) or 'not installed here'} |" for name in names]
    return "\n".join([f"## {title}", "", "| package | version | licence |", "| --- | --- | --- |", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page())
