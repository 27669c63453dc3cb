"""The plan of the house: folders on floors, small modules, a test file for each; and that its checks can fail."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from paths import REPOSITORY

PACKAGE = REPOSITORY / "src" / "gptq_plugin"
KERNELS = REPOSITORY / "kernels" / "gptq_triton"
MODULES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
AT_THE_TOP = {
    "__init__.py",
    "__main__.py",
    "check_ins.py",
    "config.py",
    "distributed.py",
    "errors.py",
    "py.typed",
}
# Folders that users import from. autogptq/ stands in for a library: only the import line of its scripts changes.
PUBLIC_FOLDERS = {"autogptq"}
MODULE_LINES, CLASS_LINES, FUNCTION_CODE_LINES = 350, 250, 60


def name_of(module: Path) -> str:
    return str(module.relative_to(REPOSITORY))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter on the package and the kernels in `folder`, by the contracts of its pyproject.toml."""
    code = (
        "import sys; sys.path[:0] = ['src', 'kernels']; from importlinter.cli import lint_imports_command as run; run()"
    )
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_go_down_the_floors() -> None:
    done = lint_imports(REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        (
            "src/gptq_plugin/gptq/grid.py",
            "import gptq_plugin.quantize.module",
            "Each folder",
        ),
        (
            "src/gptq_plugin/walk/hessian.py",
            "def late():\n    import gptq_plugin.layers.packing",
            "Each folder",
        ),
        ("src/gptq_plugin/hf/dataloaders.py", "import gptq_plugin.lightning.roots", "Each folder"),
        ("src/gptq_plugin/layers/packing.py", "import transformers", "The mathematics"),
        ("src/gptq_plugin/gptq/solver.py", "from gptq_plugin import distributed", "The mathematics"),
        ("src/gptq_plugin/hf/dataloaders.py", "import lightning.pytorch", "Lightning is imported"),
        ("src/gptq_plugin/lightning/roots.py", "from omegaconf import OmegaConf", "Hydra is imported"),
        ("kernels/gptq_triton/passes.py", "import transformers", "The kernels are a leaf"),
    ],
)
def test_an_import_against_the_floors_breaks_its_contract(
    module: str, statement: str, contract: str, tmp_path: Path
) -> None:
    for part in ("src", "kernels"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(line.startswith(contract) and line.endswith("BROKEN") for line in done.stdout.splitlines()), done.stdout


def test_a_new_folder_must_be_given_a_floor(tmp_path: Path) -> None:
    for part in ("src", "kernels"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "src" / "gptq_plugin" / "attic").mkdir()
    (tmp_path / "src" / "gptq_plugin" / "attic" / "__init__.py").write_text('"""Anything."""\n')
    assert lint_imports(tmp_path).returncode == 1


def imports_of(package: Path) -> dict[str, set[str]]:
    """The package's modules that each of them imports anywhere, in functions and for types only too."""
    files = {
        ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        imported = found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if alias.name != "__version__"]  # needs no import first
                both = [(f"{node.module}.{name}", node.module or "") for name in names]
                imported |= {module if module in files else parent for module, parent in both}
        imported &= files.keys()
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The names of one circle of imports, the first again at the end; empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_leads_back_to_its_module_not_even_within_a_folder() -> None:
    assert circle(imports_of(PACKAGE)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from gptq_plugin.clients.loading import loading_sections",
        "from gptq_plugin.clients import loading",
        "import gptq_plugin.clients.loading",
        "if TYPE_CHECKING:\n    from gptq_plugin.clients.loading import loading_sections",
        "def late():\n    from gptq_plugin.clients import loading",
        "from gptq_plugin import QuantizeModule",
    ],
)
def test_a_circle_within_a_folder_is_found(statement: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "gptq_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "gptq_plugin" / "clients" / "client.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")
    found = circle(imports_of(tmp_path / "gptq_plugin"))
    assert "gptq_plugin.clients.client" in found


def test_the_package_holds_folders_and_five_modules() -> None:
    assert {entry.name for entry in PACKAGE.iterdir() if entry.is_file()} == AT_THE_TOP


def test_every_folder_tells_what_lives_there_and_what_it_may_import() -> None:
    for folder in (entry for entry in PACKAGE.iterdir() if (entry / "__init__.py").exists()):
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        others = [ast.unparse(node) for node in tree.body[1:]]
        if folder.name in PUBLIC_FOLDERS:
            own = (f"from gptq_plugin.{folder.name}.", "__all__ = ")
            others = [statement for statement in others if not statement.startswith(own)]
        assert others == [], f"{folder.name}/__init__.py is more than a docstring"
        assert "\n\nImports " in (ast.get_docstring(tree) or ""), folder.name


@pytest.mark.parametrize("folder", sorted(init.parent.name for init in PACKAGE.glob("*/__init__.py")))
def test_what_a_folder_tells_of_its_imports_is_true(folder: str) -> None:
    """All it imports, unless it tells of what is below, and nothing that it never does."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in (PACKAGE / folder).rglob("*.py"))
    imported = set(re.findall(r"^ *(?:from|import) gptq_plugin(?:\.| import )([a-z]\w*)", code, re.MULTILINE)) - {
        folder
    }
    init = ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8"))
    sentence = (ast.get_docstring(init) or "").partition("\n\nImports ")[2].partition("\n\n")[0]
    first, _, never = sentence.replace("\n", " ").partition("; never ")
    assert not imported & set(re.findall(r"\w+", never))
    if "below" not in first and "any folder" not in first:
        assert imported == set(re.findall(r"\w+", first)) - {"and", "nothing", "of", "this", "package"}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, code: set[int]) -> int:
    """Lines of a function with code on them, its docstring left out."""
    lines = {line for line in code if function.lineno <= line <= (function.end_lineno or 0)}
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(lines)


def lines_of_code(module: Path) -> set[int]:
    """Line numbers that hold a token other than a comment."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    with module.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in skipped and token.type != tokenize.ENCODING:
                lines |= set(range(token.start[0], token.end[0] + 1))
    return lines


def too_long(module: Path) -> Iterator[str]:
    text = module.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > MODULE_LINES:
        yield f"{name_of(module)}: {lines} lines"
    code = lines_of_code(module)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            lines, most, unit = (node.end_lineno or 0) - node.lineno + 1, CLASS_LINES, "lines"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines, most, unit = code_lines(node, code), FUNCTION_CODE_LINES, "lines of code"
        else:
            continue
        if lines > most:
            yield f"{name_of(module)}: {node.name}, {lines} {unit}"


def test_modules_classes_and_functions_are_small() -> None:
    assert [one for module in MODULES for one in too_long(module)] == []


@pytest.mark.parametrize(("statements", "found"), [(58, []), (59, ["long.py: f, 61 lines of code"])])
def test_a_function_is_measured_by_its_lines_of_code(
    statements: int, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    body = "    # a comment\n\n    x = 1\n" * statements + "    return x\n"
    (tmp_path / "long.py").write_text(f'def f():\n    """Two\n    lines."""\n{body}')
    assert list(too_long(tmp_path / "long.py")) == found


def test_every_module_has_a_test_file_or_names_the_one_that_tests_it() -> None:
    lacking = []
    for module in (module for module in MODULES if module.name != "__init__.py"):
        folder = "kernels" if KERNELS in module.parents else module.parent.relative_to(PACKAGE)
        if (REPOSITORY / "tests" / folder / f"test_{module.name}").exists():
            continue
        docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        named = docstring.partition("Tested by ")[2].partition(":")[0].strip("`")
        if not named or not (REPOSITORY / named).exists():
            lacking.append(name_of(module))
    assert lacking == []


def test_no_test_imports_another_test_file() -> None:
    tests = [file for file in (REPOSITORY / "tests").rglob("*.py") if file != Path(__file__)]
    importing = {name_of(file) for file in tests if "from test_" in file.read_text(encoding="utf-8")}
    assert importing == set()
