"""Mutation sites of `trainer/`, and a module's code with one mutation."""

from __future__ import annotations

import ast
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

SOURCES = Path("trainer")
LEFT_OUT = ("trainer/tensor_parallel/families",)
"""Tables, which `tools.parity` proves."""

PACKAGES: dict[str, tuple[str, ...]] = {
    "checkpoint": ("checkpoint", "checkpoint_format"),
    "config": ("config",),
    "data": ("data",),
    "distributed": ("distributed",),
    "engine": ("engine", "compat", "update"),
    "fault_tolerance": ("fault_tolerance",),
    "model": ("model", "tasks"),
    "pipeline": ("pipeline",),
    "tensor_parallel": ("tensor_parallel", "sharding"),
    "tracking and modules": ("tracking",),
}
"""Small packages are counted with the package that they serve; modules directly in `trainer/` are in the last group."""

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_MESSAGES = ("log", "logging", "warnings")
"""Calls on these names, and exceptions, contain messages, which are not mutated."""


@dataclass(frozen=True)
class Mutant:
    """One small fault."""

    file: str
    number: int
    """Number of the site, in the order of `_sites`."""

    lines: tuple[int, int]
    """First and last line of the mutated expression or statement."""

    scope: str
    """Qualified name of the enclosing function or class."""

    before: str
    after: str
    repetition: int = 0
    """Number of earlier sites with the same scope and text in the file."""

    runs_at_import: bool = False
    """Whether the code is outside functions."""

    @property
    def key(self) -> str:
        """A name that stays the same when code above it changes."""
        suffix = f" #{self.repetition + 1}" if self.repetition else ""
        return f"{self.file}: {self.scope}: {self.before} -> {self.after}{suffix}"

    @property
    def package(self) -> str:
        """The key of `PACKAGES` under which it is counted."""
        part = self.file.split("/")[1]
        return next((name for name, parts in PACKAGES.items() if part in parts), "tracking and modules")


class _Sites(ast.NodeVisitor):
    """Collects (node, mutated node, scope, runs at import) in source order.

    Annotations, assertions and messages are skipped.
    """

    def __init__(self) -> None:
        self.sites: list[tuple[ast.AST, ast.AST, str, bool]] = []
        self._scope: list[str] = []
        self._functions = 0

    def _add(self, node: ast.AST, mutated: ast.AST) -> None:
        scope = ".".join(self._scope) or "module"
        self.sites.append((node, ast.copy_location(mutated, node), scope, self._functions == 0))

    def _visit_scope(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._scope.append(node.name)
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self.visit(default)
        self._functions += not isinstance(node, ast.ClassDef)
        for statement in node.body:
            self.visit(statement)
        self._functions -= not isinstance(node, ast.ClassDef)
        self._scope.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _visit_scope

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Skip assertions, which repeat types."""

    def visit_Raise(self, node: ast.Raise) -> None:
        """Skip messages."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skip messages."""

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not (isinstance(node.value, ast.Name) and node.value.id in ("Literal", "Annotated")):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if not _is_message(node):
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not _is_message(node.value):
            self._add(node, ast.Pass())
            self.visit(node.value)
        elif not isinstance(node.value, ast.Constant):
            self.visit(node.value)

    def _visit_condition(self, node: ast.If | ast.IfExp | ast.While) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
            self._add(node.test, ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    visit_If = visit_IfExp = visit_While = _visit_condition

    def visit_Compare(self, node: ast.Compare) -> None:
        for index, operator in enumerate(node.ops):
            changed = [*node.ops[:index], _COMPARISONS[type(operator)](), *node.ops[index + 1 :]]
            self._add(node, ast.Compare(node.left, changed, node.comparators))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in _OPERATORS:
            self._add(node, ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _OPERATORS:
            self._add(node, ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value))
        self.visit(node.value)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._add(node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add(node, node.operand)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(node, ast.Constant(not node.value))
        elif isinstance(node.value, int | float):
            self._add(node, ast.Constant(node.value + 1))


def _is_message(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return function.value.id in _MESSAGES
    return isinstance(function, ast.Name) and function.id in ("Problem", "print")


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yield all mutants of a file."""
    sites = _Sites()
    sites.visit(ast.parse(path.read_text()))
    counts: Counter[tuple[str, str, str]] = Counter()
    for number, (node, mutated, scope, runs_at_import) in enumerate(sites.sites):
        before, after = (" ".join(ast.unparse(part).split()) for part in (node, mutated))
        if before == after:
            continue
        yield Mutant(
            path.as_posix(),
            number,
            (node.lineno, node.end_lineno or node.lineno),  # type: ignore[attr-defined]
            scope,
            before,
            after,
            counts[scope, before, after],
            runs_at_import,
        )
        counts[scope, before, after] += 1


def mutated_code(path: Path, number: int) -> CodeType:
    """Return a module's code with the mutation of one site."""
    tree = ast.parse(path.read_text())
    sites = _Sites()
    sites.visit(tree)
    node, mutated, *_ = sites.sites[number]
    if isinstance(mutated, ast.UnaryOp) and mutated.operand is node:  # a condition and its negation share the node
        mutated = ast.copy_location(ast.UnaryOp(ast.Not(), node), node)
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, field, mutated)
                return compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
            if isinstance(value, list) and any(item is node for item in value):
                value[next(index for index, item in enumerate(value) if item is node)] = mutated
                return compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
    raise AssertionError(f"{path}: site {number} is not in the tree")


def all_mutants() -> list[Mutant]:
    """Return every mutant of `trainer/`, in order."""
    files = (path for path in sorted(SOURCES.rglob("*.py")) if not path.as_posix().startswith(LEFT_OUT))
    return [mutant for path in files for mutant in mutants_of(path)]


def draw(mutants: list[Mutant], count: int, least: int, seed: int) -> list[Mutant]:
    """Draw about `count` mutants: `least` of each package (or all that it has), the rest in proportion to its size."""
    by_package: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_package[mutant.package].append(mutant)
    spare = max(0, count - least * len(by_package))
    chosen: list[Mutant] = []
    for package, members in sorted(by_package.items()):
        size = min(len(members), least + spare * len(members) // len(mutants))
        chosen += random.Random(f"{seed} {package}").sample(members, size)
    return chosen
