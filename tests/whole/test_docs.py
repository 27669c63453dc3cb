"""The documentation: it builds without a warning, leaves nothing out, and its commands can be typed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException

import gptq_plugin
from gptq_plugin import QuantizeConfig, autogptq, errors
from gptq_plugin.apps import command, evaluate
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import QuantizeReport

from pages import DOCS, README, blocks, commands, links, name, pages
from paths import REPOSITORY

_REFERENCE = DOCS / "reference"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error (with --quiet it would be none)."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_the_site_is_built_without_a_warning_and_has_every_page(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).exists(), page


def test_what_the_notebook_exports_beside_itself_is_neither_a_page_nor_a_change_of_the_clone():
    notebook = (DOCS / "tutorials" / "fine_tune_quantize_generate.ipynb").read_text()
    (folder,) = set(re.findall(r'export_dir=\\"([\w-]+)\\"', notebook))
    assert re.search(rf"^exclude_docs: /tutorials/{folder}/", (REPOSITORY / "mkdocs.yml").read_text(), re.M)
    assert f"/docs/tutorials/{folder}/" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_the_api_page_shows_every_public_name_with_its_arguments(site):
    page = (site / "reference" / "api.html").read_text()
    for public in gptq_plugin.__all__:
        assert f'id="gptq_plugin.{public}"' in page, public
    for public in autogptq.__all__:
        assert f'id="gptq_plugin.autogptq.{public}"' in page, public
    for field in dataclasses.fields(QuantizeConfig):
        assert re.search(rf"<code[^>]*>{field.name}</code>", page), field.name


def test_the_errors_page_explains_every_error():
    page = (_REFERENCE / "errors.md").read_text()
    for public, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert f"| `{public}` |" in page and public in page.rpartition("members:")[2], public


def test_every_configuration_file_is_shown_or_differs_in_its_grid_and_method_only():
    shown = "".join((_REFERENCE / page).read_text() for page in ("configuration.md", "commands.md"))
    others = {file for file in (REPOSITORY / "conf" / "quantizer").glob("w*.yaml") if file.stem != "w4g128"}
    for file in others:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert given.pop("defaults") == ["w4g128", "_self_"] and given.keys() <= {"bits", "group_size", "method"}
        grid = re.fullmatch(r"w(\d)g(\d+)(_best)?", file.stem)
        wanted = {"bits": int(grid[1]), "group_size": int(grid[2]), "method": "best" if grid[3] else "gptq"}
        assert {"bits": 4, "group_size": 128, "method": "gptq", **given} == wanted
        assert f"`{file.stem}`" in shown
    for file in (REPOSITORY / "conf").rglob("*.yaml"):
        path = file.relative_to(REPOSITORY / "conf").as_posix()
        assert f'--8<-- "conf/{path}"' in shown or file in others, path


def test_every_file_that_a_page_shows_is_named_as_the_site_reads_it():
    """ruff formats blocks of Python in pages, and would spoil the mark in one."""
    for page in (REPOSITORY / "docs").rglob("*.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.match(r"\s*-+8", line):
                file = re.fullmatch(r'--8<-- "([\w./-]+)(:\w+)?"', line)
                assert file and (REPOSITORY / file[1]).is_file(), (page, line)


def test_the_report_page_names_every_key_of_a_report():
    page = (_REFERENCE / "report.md").read_text()
    report = QuantizeReport(QuantizeConfig()).to_dict()
    keys = {*report, *report["totals"], *(field.name for field in dataclasses.fields(ModuleReport))}
    for key in keys:
        assert f"`{key}`" in page, key


@pytest.mark.parametrize(
    ("heading", "parser"),
    [
        ("gptq-plugin check", lambda: _subparser("check")),
        ("gptq-plugin convert", lambda: _subparser("convert")),
        ("gptq-plugin eval", lambda: _subparser("eval")),
        ("gptq-plugin push", lambda: _subparser("push")),
        ("python -m gptq_plugin.apps.evaluate", lambda: evaluate._parser()),
    ],
)
def test_the_commands_page_names_every_option_and_no_other(heading: str, parser: Callable[[], argparse.ArgumentParser]):
    text = (_REFERENCE / "commands.md").read_text()
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    own = {string for action in parser()._actions for string in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"^\| `(--[\w-]+)", section, re.M)) == own


def _subparser(which: str) -> argparse.ArgumentParser:
    parsers = argparse.ArgumentParser().add_subparsers()
    getattr(command, f"_add_{which}")(parsers)
    return parsers.choices[which]


# --- commands that can be typed -----------------------------------------------------------------------------

# Programs of others, and scripts that a page writes itself.
_OTHERS = {"git", "cd", "python3", ".", "pip", "vllm", "curl", "hf", "jupyter"}
_WRITTEN = {"train.py", "app.py"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gptq-plugin reads its command lines, and does nothing."""
    monkeypatch.setattr(command, "_check", lambda parsed: 0)
    monkeypatch.setattr(command, "_convert", lambda parsed: 0)
    monkeypatch.setattr(command, "_eval", lambda parsed: 0)
    monkeypatch.setattr(command, "_push", lambda parsed: 0)
    with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
        yield


@pytest.mark.parametrize("page", [page for page in pages() if commands(page)], ids=name)
def test_the_commands_on_a_page_are_understood(page: Path, asked: None):
    for words in commands(page):
        _understood(words)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["gptq-quantize", "quantiser.bits=3"], ConfigCompositionException),
        (["gptq-plugin", "check", "out", "--targets", "vllm"], SystemExit),
        (["pip", "install", "-e", ".[lightning]"], AssertionError),
        (["bash", "scripts/no.sh"], AssertionError),
        (["env", "A=1", "compute-sanitizer", "python", "scripts/no.py"], AssertionError),
        (["frobnicate"], AssertionError),
    ],
)
def test_a_command_that_would_be_refused_is_found(words: list[str], error: type[BaseException], asked: None):
    with pytest.raises(error):
        _understood(words)


def _understood(words: Sequence[str]) -> None:
    """Fails for a command line that would be refused."""
    launcher = {"torchrun": "gptq_plugin.apps.cli", "srun": "gptq-finetune"}.get(words[0])
    if launcher is not None:
        words = ["gptq-finetune", *words[list(words).index(launcher) + 1 :]]
    if words[0] == "env":
        words = words[list(words).index("python") :]
    program, *rest = words
    if program in ("gptq-finetune", "gptq-quantize"):
        _composed(program.removeprefix("gptq-"), [word for word in rest if word not in ("-m", "--help")])
    elif program == "gptq-plugin":
        assert command.main(rest) == 0
    elif program == "python" and rest[:2] == ["-m", "gptq_plugin.apps.evaluate"]:
        evaluate._parser().parse_args(rest[2:])
    elif program in ("python", "bash"):
        assert rest[0] in _WRITTEN or (REPOSITORY / rest[0]).is_file(), words
    else:
        assert program in _OTHERS, words
    extras = re.findall(r"\.\[([\w,]+)\]", " ".join(words))
    for extra in ",".join(extras).split(",") if extras else []:
        assert re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), re.M), extra


def _composed(which: str, overrides: list[str]) -> None:
    """Composes the configuration, of a sweep its first."""
    first = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        if override.is_sweep_override():
            text = f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}"
        if not text.startswith("hydra."):
            first.append(text)
    compose(which, first)


# --- README -------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.read_text().splitlines()) <= 150
    for page in (README, *(REPOSITORY / f"{other}.md" for other in ("CONTRIBUTING", "SECURITY", "CHANGELOG"))):
        for link in links(page):
            file = link.partition("#")[0]
            if file and "://" not in file and not file.startswith("../../actions"):  # of the host
                assert (page.parent / file).exists(), (page.name, link)


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/explanation/right-or-refused.md"])
def test_the_tests_that_keep_a_promise_exist(page):
    rows = [
        line
        for line in (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
        if line[:1] == "|" and ".py`" in line
    ]
    named = [re.findall(r"`(\w+/test_\w+\.py)`", row) for row in rows]
    assert len(rows) > 8 and all(named)
    assert [file for files in named for file in files if not (REPOSITORY / "tests" / file).is_file()] == []


def test_the_readmes_figures_are_those_of_the_benchmarks():
    measured = "".join(page.read_text() for page in (DOCS / "benchmarks").glob("*.md"))
    losses = re.findall(r"(?<![\d\w])\.\d{5}\b", README.read_text())
    assert len(losses) == 16
    assert all(loss in measured for loss in losses)


def test_the_picture_is_drawn_from_the_benchmarks_table():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        import draw_accuracy
    finally:
        sys.path.pop(0)
    curves = draw_accuracy.read_table(draw_accuracy.TABLE.read_text())
    assert len(curves) == 6 and all(sorted(curve.losses) == [2, 3, 4] for curve in curves)
    assert draw_accuracy.draw(curves) == draw_accuracy.PICTURE.read_text(), "run python scripts/draw_accuracy.py"


def test_no_page_names_an_option_that_quantize_config_does_not_have():
    known = {field.name for field in dataclasses.fields(QuantizeConfig)}
    known |= {"offload_weights", "offload_activations", "cache_dir"}
    for page in pages():
        for block in blocks(page, "python"):
            for call in re.findall(r"(?:QuantizeConfig|QuantizeModule)\(([^()]*)\)", block):
                assert set(re.findall(r"(\w+)=", call)) <= known, (name(page), call)


def test_files_for_the_host_can_be_read():
    version = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)[1]
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == version
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    assert any(step.get("run") == "bash .ci/run" for step in workflow["jobs"]["ci"]["steps"])
    for form in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text()), form
    notebook = json.loads((DOCS / "tutorials" / "fine_tune_quantize_generate.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
