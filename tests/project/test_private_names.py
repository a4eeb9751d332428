"""Private names of other libraries are used in a few rooms only, with comments that say what happens without them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import dask_embedding_reader

PACKAGE = Path(dask_embedding_reader.__file__).parent

ROOMS = ("storage/clients/", "storage/direct/", "lazy/_dask.py")
"""Where they may be."""

ALLOWED = {
    (
        "_common/threads.py",
        "_register_atexit",
    ): "of Python: nothing public runs before the threads of pools are awaited",
    (
        "lazy/iter_batches.py",
        "_meta",
    ): "of Dask: what kind its chunks are; where it is gone, they are taken for numpy's",
}
"""Further ones, by file, each with the reason why it is not in one of the rooms."""

NAMED_TUPLES = frozenset({"_asdict", "_fields", "_field_defaults", "_make", "_replace"})
"""These look private, so that they are no names of fields."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLES and name != "_"


def members(tree: ast.Module) -> set[str]:
    """Names of the methods of the classes in a module, and of the attributes of their objects."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {node.name for each in classes for node in each.body if isinstance(node, kinds)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            names.add(node.attr)
    return names


def is_own(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def private_names(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Lines and names of what is taken from other modules, and from objects, unless our own ones have such a member."""
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute(value=value, attr=name) if not is_own(value) and name not in own:
                names = [name]
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                names = [name]
            case ast.ImportFrom(module=str(module), names=aliases) if not module.startswith("dask_embedding_reader"):
                names = [*module.split("."), *(alias.name for alias in aliases)]
            case ast.Import(names=aliases):
                names = [part for alias in aliases for part in alias.name.split(".")]
        yield from ((node.lineno, name) for name in names if private(name))  # type: ignore[attr-defined]


def test_private_names_are_found() -> None:
    source = """
import library._inside
from library import _name
from library._inside import name
class Own:
    def __init__(self): self._own = 1
    def _method(self, other): return other._own, other._method(), self._inherited, other._replace(x=1)
library._attribute
library.x._call()
getattr(library, "_asked")
"""
    tree = ast.parse(source)
    assert sorted(private_names(tree, members(tree))) == [
        (2, "_inside"),
        (3, "_name"),
        (4, "_inside"),
        (8, "_attribute"),
        (9, "_call"),
        (10, "_asked"),
    ]


def test_private_names_of_others_are_in_their_rooms() -> None:
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    trees = {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in paths.items()}
    own = set[str]().union(*map(members, trees.values()))
    found = {
        (file, name): line
        for file, tree in trees.items()
        if not file.startswith(ROOMS)
        for line, name in private_names(tree, own)
    }
    assert {f"{file}:{line}: {name}" for (file, name), line in found.items() if (file, name) not in ALLOWED} == set()
    assert ALLOWED.keys() <= found.keys(), "some are not used any more: leave them out"
