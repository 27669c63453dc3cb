"""What is installed beside the package: no compromised release, hashes for the pinned set, licences on their page."""

from __future__ import annotations

import re
import runpy
from collections import defaultdict
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from paths import REPOSITORY

COMPROMISED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}  # GHSA-w37p-236h-pfx3


@pytest.fixture(scope="module")
def licences():
    return runpy.run_path(str(REPOSITORY / "scripts" / "list_licences.py"))


@pytest.fixture(scope="module")
def locked():
    """Of requirements.lock: by canonical name, the (version, hashes) of each entry."""
    entries = re.split(r"\n(?=\S)", (REPOSITORY / "requirements.lock").read_text())
    found = defaultdict(list)
    for entry in entries:
        first, *hashes = (line.strip().removesuffix("\\").strip() for line in entry.splitlines())
        requirement = Requirement(first)
        found[canonicalize_name(requirement.name)].append((str(requirement.specifier).removeprefix("=="), hashes))
    return found


@pytest.mark.parametrize("name", COMPROMISED)
def test_compromised_releases_are_never_installed(name, locked):
    asked = [Requirement(text) for text in distribution("gptq-plugin").requires or ()]
    declared = [Requirement(text) for text in _declared()]
    specifiers = [one.specifier for one in declared if one.name == name]
    assert specifiers and {one.name for one in asked} >= {"lightning"}
    for version in COMPROMISED[name]:
        assert not any(specifier.contains(version) for specifier in specifiers)
        assert version not in {locked_version for locked_version, _ in locked[name]}
    assert all(specifier.contains("2.6.6") for specifier in specifiers)


def _declared() -> list[str]:
    """The dependencies in pyproject.toml, which an editable install may be behind."""
    text = (REPOSITORY / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    return re.findall(r'^\s*"([^"]+)"', text, re.M)


def test_every_pin_is_locked_at_its_version_with_hashes(licences, locked):
    pins = licences["pins"]()
    assert len(pins) > 100
    assert not [name for name, version in pins.items() if version not in {at for at, _ in locked[name]}]
    for name, entries in locked.items():
        for version, hashes in entries:
            assert str(Version(version)) and hashes, name
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name


def test_the_page_names_the_licence_of_every_pin(licences):
    rows = {
        cells[1].strip(): (cells[2].strip(), cells[3].strip())
        for line in licences["PAGE"].read_text().splitlines()
        if len(cells := line.split("|")) == 5
    }
    compared = 0
    for name, version in licences["pins"]().items():
        listed, terms = rows[name]
        assert listed == version and terms not in ("", "not named", "not installed here"), name
        installed = licences["licence"](name)
        if installed is not None:
            assert terms == installed, name
            compared += 1
    assert compared > 80


def test_nothing_that_comes_with_the_package_forbids_use_beside_closed_code(licences):
    terms = {name: licences["licence"](name) for name in licences["needed"]("gptq-plugin", ("peft", "trainer"))}
    assert len(terms) > 50
    assert not [name for name, of in terms.items() if of and re.search(r"\bA?GPL|\bSSPL|not named", of)]
