"""The faults: what cosmic-ray changes, and statements left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Keyword

Position = tuple[int, int]


_SETS_PART = re.compile(r"[\w.\[\]]+ [-+*/|&^]+= |\w+[.\[].* = ")


class LeaveOut(Operator):  # type: ignore[misc]  # cosmic-ray is not typed
    """Puts ``pass`` in the place of calls, of errors raised, and of what is put into objects."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Position, Position]]:
        """Tell where that may be. What names variables is left: without them all fails, which says nothing."""
        if node.type != "simple_stmt":
            return
        code = node.children[0].get_code(include_prefix=False)
        if node.children[0].type in ("atom_expr", "raise_stmt") or _SETS_PART.match(code):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Leave the statement out."""
        node.children[0] = Keyword("pass", node.start_pos, node.children[0].get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> Iterable[Any]:
        """None: they are for the tests of cosmic-ray."""
        return ()


_SWAPS = {
    "Binary": "Add_Sub Sub_Add Mul_FloorDiv FloorDiv_Mul Mod_FloorDiv LShift_RShift RShift_LShift BitAnd_BitOr "
    "BitOr_BitAnd",
    "Comparison": "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_GtE GtE_Lt Gt_LtE LtE_Gt Is_IsNot IsNot_Is",
    "Unary": "Delete_USub Delete_Invert Delete_Not",
}
_OTHERS = (
    "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
    "ReplaceContinueWithBreak ExceptionReplacer NumberReplacer ZeroIterationForLoop"
)
_OPERATORS: dict[str, Operator] = {
    "LeaveOut": LeaveOut(),
    **{name: get_operator(f"core/{name}")() for name in _OTHERS.split()},
    **{
        f"{kind}_{swap}": get_operator(f"core/Replace{kind}Operator_{swap}")()
        for kind, swaps in _SWAPS.items()
        for swap in swaps.split()
    },
}


class Fault(NamedTuple):
    """A place to plant a fault at."""

    path: str
    """The file."""
    line: int
    """Where in it."""
    operator: str
    """The kind of change."""
    occurrence: int
    """Which of the places where that can be done."""

    def planted(self, source: str) -> str:
        """Return the file with the fault."""
        found: str | None = mutate_code(source, _OPERATORS[self.operator], self.occurrence)
        assert found is not None
        return found

    def is_python(self, source: str) -> bool:
        """Tell whether the file can still be read: a ``*`` between arguments is no product.

        Of exceptions cosmic-ray replaces bare names alone, and fails where one is told with its module.
        """
        try:
            ast.parse(self.planted(source))
        except (SyntaxError, AttributeError):
            return False
        return True


def faults(path: str, source: str) -> Iterator[Fault]:
    """Yield all faults of a file, but for those that say nothing of its tests.

    These are in annotations, in messages of errors (their numbers), in what the code only asserts of itself
    (``strict=True``), in decorators (``slots=True``), and in what is set for the whole module: a buffer of 9 MB in the
    place of one of 8 is no fault.
    """
    spared = list(_spared(ast.parse(source)))
    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in _OPERATORS.items():
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(first <= start < last for first, last in spared):
                yield Fault(path, start[0], name, occurrence)


def _spared(tree: ast.Module) -> Iterator[tuple[Position, Position]]:
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            parts = [*node.decorator_list]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            parts = [node.value]
        elif isinstance(node, ast.JoinedStr):
            parts = [node]
        for part in parts:
            if part is not None:
                yield _span(part)
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.If):
            yield _span(statement)


def _span(node: Any) -> tuple[Position, Position]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
