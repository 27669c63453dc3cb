"""The package as it is installed: wheel and editable, from any folder, without side effects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from paths import REPOSITORY

UNLIMITED = """
import gptq_plugin, sys
from importlib.resources import files
for name in gptq_plugin.__all__:
    assert getattr(gptq_plugin, name).__module__.startswith("gptq_plugin."), name
from gptq_plugin.kernels import reference
from gptq_plugin.apps import cli
from hydra import compose, initialize_config_module
with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
    assert compose("finetune").quantizer.bits == 4
    for group in ("model", "data", "quantizer", "trainer", "callbacks"):
        for file in files("gptq_plugin.conf").joinpath(group).iterdir():
            name = file.name.removesuffix(".yaml")
            assert compose("finetune", [f"{group}={name}"])[group], (group, name)
print(gptq_plugin.__file__, files("gptq_plugin.conf"), reference.__file__)
"""


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Runs code in a new interpreter that sees the environment's packages, and `path` before them."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    # Built from a copy: the build writes build/ and *.egg-info, which other tests must not meet.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "kernels", "conf"):
        subprocess.run(["cp", "-r", REPOSITORY / name, source], check=True)
    for leftover in source.glob("src/*.egg-info"):
        subprocess.run(["rm", "-r", leftover], check=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            target,
            source,
        ],
        check=True,
    )
    (file,) = target.glob("gptq_plugin-*.whl")
    return file


def test_a_wheel_holds_the_code_the_kernels_and_every_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"gptq_plugin/{folder}{path.relative_to(REPOSITORY / root).as_posix()}"
        for root, folder in (("src/gptq_plugin", ""), ("kernels/gptq_triton", "kernels/"), ("conf", "conf/"))
        for path in (REPOSITORY / root).rglob("*")
        if path.suffix in (".py", ".yaml", ".json", ".typed")
    }
    assert len(expected) > 40
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_works_from_another_folder(wheel, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            tmp_path / "site",
            wheel,
        ],
        check=True,
    )
    (tmp_path / "elsewhere").mkdir()
    printed = python(UNLIMITED, tmp_path / "elsewhere", tmp_path / "site")
    assert all(place.startswith(str(tmp_path / "site")) for place in printed.split())
    assert (tmp_path / "site" / "bin" / "gptq-finetune").exists()
    assert (tmp_path / "site" / "bin" / "gptq-quantize").exists()


def test_the_editable_install_works_from_another_folder(tmp_path):
    printed = python(UNLIMITED, tmp_path)
    installed = distribution("gptq-plugin")
    assert {entry.name for entry in installed.entry_points} == {"gptq-finetune", "gptq-quantize", "gptq-plugin"}
    assert printed.strip()


IMPORTS = """
import json, os, sys

def loaded():
    return sorted({name.split(".")[0] for name in sys.modules})

before = dict(os.environ)
import gptq_plugin
found = {"package": loaded(), "own": sorted(n for n in sys.modules if n.startswith("gptq_plugin")),
         "public": gptq_plugin.__all__, "dir": dir(gptq_plugin), "environment": dict(os.environ) == before}
try:
    gptq_plugin.GPTQCalback
except AttributeError as error:
    found["misspelt"] = str(error)
gptq_plugin.QuantizeModule, gptq_plugin.QuantizeConfig, gptq_plugin.QuantLinear, gptq_plugin.load_quantized
import torch
found |= {"library": loaded(), "cuda": torch.cuda.is_initialized()}
found["names"] = [getattr(gptq_plugin, name).__name__ for name in gptq_plugin.__all__]
sys.path.insert(0, "")
from transformers import LlamaForCausalLM
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported():
    """What one process found that imported the package, then the library, then every name, in the repository's root."""
    return json.loads(python(IMPORTS, REPOSITORY))


def test_importing_the_package_does_nothing_but_name_its_parts(imported):
    heavy = {"torch", "lightning", "transformers", "datasets", "hydra", "triton", "yaml", "numpy"}
    assert not heavy & {*imported["package"]}
    assert imported["own"] == ["gptq_plugin"]
    assert imported["environment"]
    public = ["Finish", "GPTQCallback", "GPTQTrainerCallback", "QuantLinear", "QuantizeConfig", "QuantizeModule",
              "in_every_trainer", "load_quantized", "merged_copy", "quantized_config"]  # fmt: skip
    assert imported["public"] == public == imported["names"] and set(public) <= {*imported["dir"]}
    assert "GPTQCalback" in imported["misspelt"]


def test_the_library_needs_neither_lightning_nor_hydra(imported):
    loaded = {*imported["library"]}
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "hydra", "omegaconf", "datasets"}
    assert not imported["cuda"]


def test_transformers_imports_llama_from_the_repositorys_root(imported):
    """The last import of the process above."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists(), "it would shadow the PyPI package `kernels`"


def pinned():
    """The requirements of constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("version", ["3.10.0", "3.11.0", "3.12.0", "3.13.0"])
def test_every_pin_that_applies_to_a_python_has_a_release_for_it(version):
    """By the metadata of what is installed: pins of other versions, and of what is not, are not looked at."""
    environment = {"python_version": version.rpartition(".")[0], "python_full_version": version}
    assert version in SpecifierSet(distribution("gptq-plugin").metadata["Requires-Python"])
    looked_at, refused = 0, []
    for pin in pinned():
        try:
            installed = distribution(pin.name)
        except PackageNotFoundError:
            continue
        applies = pin.marker is None or pin.marker.evaluate(environment)
        if applies and pin.specifier.contains(installed.version):
            looked_at += 1
            if version not in SpecifierSet(installed.metadata.get("Requires-Python") or ""):
                refused.append(f"{pin}: {installed.metadata.get('Requires-Python')}")
    assert looked_at > 80 and not refused


def test_the_pinned_versions_satisfy_what_the_package_asks_for():
    pins = {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==") for pin in pinned()}
    for text in distribution("gptq-plugin").requires or []:
        requirement = Requirement(text)
        if requirement.name != "gptq-plugin":
            assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text
