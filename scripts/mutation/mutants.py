"""The mutants of a module: mutmut's operators, and two of ours, on everything but what cannot matter."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper
from mutmut.mutation.mutators import mutation_operators

_DESCRIPTIONS = {"__repr__", "__str__", "extra_repr"}
_ASSERTIONS = {"strict"}  # of zip: it raises where the lengths differ, which they never do


@dataclass(frozen=True)
class Mutant:
    """A module with one node replaced.

    Attributes:
        tree: The whole module.
        where: The function or class around the node, dotted; empty at the module's top level.
        old, new: The node, and what takes its place.
    """

    tree: cst.Module
    where: str
    old: cst.CSTNode
    new: cst.CSTNode

    def source(self) -> str | None:
        """The module's new source; None where Python cannot compile it, or nothing changed."""
        source = self.tree.deep_replace(self.old, self.new).code  # type: ignore[union-attr]
        try:
            ast.parse(source)
        except SyntaxError:
            return None
        return source if source != self.tree.code else None

    def described(self) -> tuple[int, str]:
        """The first changed line, from 1, and the change as text: "where: before{old -> new}after"."""
        old, new = self.tree.code.splitlines(), (self.source() or "").splitlines()
        first = _same(old, new)
        last = _same(old[first:][::-1], new[first:][::-1])
        before, after = (" ".join(map(_code, lines[first : len(lines) - last])) for lines in (old, new))
        start = _same(before, after)
        end = _same(before[start:][::-1], after[start:][::-1])
        while start and _in_word(before[start - 1]):
            start -= 1
        while end and _in_word(before[len(before) - end]):
            end -= 1
        change = f"{before[start : len(before) - end]} -> {after[start : len(after) - end]}"
        return first + 1, f"{self.where or 'module'}: {before[:start]}{{{change}}}{before[len(before) - end :]}"


def mutants_of(source: str) -> list[Mutant]:
    tree = MetadataWrapper(cst.parse_module(source)).module  # a copy in which no node occurs twice
    visitor = _Changes(tree)
    tree.visit(visitor)
    return visitor.found


class _Changes(cst.CSTVisitor):
    def __init__(self, tree: cst.Module) -> None:
        super().__init__()
        self.found: list[Mutant] = []
        self._tree = tree
        self._where: list[str] = []
        self._on_gpu: set[cst.CSTNode] = set()  # what only a GPU runs
        self._gpu_names: set[str] = set()  # variables that hold whether there is one

    def on_visit(self, node: cst.CSTNode) -> bool:
        if node in self._on_gpu or self._asks_for_gpu(node) or _cannot_matter(node, top_level=not self._where):
            return False
        match node:
            case cst.If(test=test, body=body) | cst.IfExp(test=test, body=body) if self._asks_for_gpu(test):
                self._on_gpu.add(body)
                self._on_gpu.add(test)
            case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))], value=value):
                if self._asks_for_gpu(value):
                    self._gpu_names.add(name)
                    return False
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self._where.append(node.name.value)
        if isinstance(node, (cst.If, cst.IfExp)) and node.test in self._on_gpu:
            return True
        operators = [operator for kind, operator in mutation_operators if isinstance(node, kind)]
        for operator in (*operators, _negated, _dropped):
            changed = [new for new in operator(node) if not _drops_assertion(node, new)]
            self.found += [Mutant(self._tree, ".".join(self._where), node, new) for new in changed]
        return True

    def _asks_for_gpu(self, node: cst.CSTNode) -> bool:
        """Whether it is false on a CPU: `x.is_cuda`, alone or with others behind `and`."""
        match node:
            case cst.BooleanOperation(operator=cst.And(), left=left, right=right):
                return self._asks_for_gpu(left) or self._asks_for_gpu(right)
            case cst.Attribute(attr=cst.Name(value="is_cuda")):
                return True
            case cst.Name(value=name):
                return name in self._gpu_names
        return False

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, (cst.FunctionDef, cst.ClassDef)) and not _cannot_matter(original_node, False):
            self._where.pop()


def _cannot_matter(node: cst.CSTNode, top_level: bool) -> bool:
    """Text for people, types, and what only guards against programming errors; docs/mutation.md lists these rules."""
    match node:
        case cst.Annotation() | cst.Decorator() | cst.Import() | cst.ImportFrom():
            return True
        case cst.Raise() | cst.FormattedString() | cst.ConcatenatedString():
            return True
        case cst.Expr(value=cst.Call(func=cst.Attribute(value=cst.Name(value="log"), attr=cst.Name(value="debug")))):
            return True
        case cst.Call(func=cst.Attribute(value=cst.Name(value="logging"), attr=cst.Name(value="getLogger"))):
            return True
        case cst.SimpleString():
            return " " in node.value  # a sentence
        case cst.FunctionDef():
            return node.name.value in _DESCRIPTIONS
        case cst.Arg(keyword=cst.Name(value=keyword)):
            return keyword in _ASSERTIONS
        case cst.If(test=cst.Name(value="TYPE_CHECKING")):
            return True
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))]) if top_level:
            return name.lstrip("_")[:1].isupper() and not name.isupper()  # an alias of a type
    return False


def _drops_assertion(old: cst.CSTNode, new: cst.CSTNode) -> bool:
    if not (isinstance(old, cst.Call) and isinstance(new, cst.Call)):
        return False
    asserting = [arg for arg in old.args if arg.keyword is not None and arg.keyword.value in _ASSERTIONS]
    return any(all(arg is not other for other in new.args) for arg in asserting)


def _negated(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """`if x` and `while x` become `if not x` and `while not x`, where mutmut has no change of its own."""
    if isinstance(node, (cst.If, cst.While, cst.CompIf)) and not isinstance(
        node.test, (cst.Comparison, cst.UnaryOperation)
    ):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def _dropped(node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    """A call whose value is not used is left out."""
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield cst.Pass()


def _same(a: Sequence[object], b: Sequence[object]) -> int:
    """How many elements at the beginning are the same in both."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _code(line: str) -> str:
    """The line without indentation and comment."""
    return line.partition("  #")[0].strip()
