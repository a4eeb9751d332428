"""What is changed under a lock is touched nowhere without it: a lock that is left out shows in hardly any run.

Of each class that makes itself a lock: attributes that a method changes while it holds that lock.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dask_embedding_reader

PACKAGE = Path(dask_embedding_reader.__file__).parent

KINDS = frozenset({"Lock", "RLock", "Condition"})

CHANGING = frozenset(
    {"append", "add", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove", "setdefault"}
    | {"update", "heappush", "heappop"}
)
"""Functions that change what they are called of, or their first argument."""

ALLOWED = {
    ("Buffers", "_ended"): ({"wait_while"}, "a queue, which is locked itself"),
    ("CountedCache", "_nbytes"): ({"nbytes"}, "read as one number"),
    ("Threads", "_held_nbytes"): ({"held_nbytes", "compute_globals"}, "read as one number; counted before all units"),
    ("Threads", "_loans"): ({"start", "_compute", "_run"}, "a loan is there until the last who uses it gives it back"),
}
"""By class and attribute, the methods that may touch it without the lock, and why."""


class Touch(NamedTuple):
    """That a method reads or changes an attribute of its object."""

    method: str
    attribute: str
    line: int
    is_locked: bool
    is_change: bool


def own_attribute(node: ast.AST) -> str | None:
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own and isinstance(node, ast.Attribute) else None


def locks_of(kind: ast.ClassDef) -> set[str]:
    """The attributes that hold locks."""
    found = set()
    for node in ast.walk(kind):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = node.value.func
            name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
            found |= {name_ for target in node.targets if (name_ := own_attribute(target)) and name in KINDS}
    return found


def changed_by(node: ast.AST) -> list[ast.expr]:
    """What a statement or a call changes."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=args) if name in CHANGING:
            return [value, *args[:1]]
        case ast.Delete(targets=targets) | ast.Assign(targets=targets):
            return targets
        case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
            return [target]
    return []


def touches(method: ast.FunctionDef, locks: set[str], *, is_locked: bool) -> Iterator[Touch]:
    """Yield what a method touches of its object, and the methods of it that it calls."""
    changes = {inner for node in ast.walk(method) for part in changed_by(node) for inner in ast.walk(part)}

    def within(node: ast.AST, is_locked: bool) -> Iterator[Touch]:
        if isinstance(node, ast.With):
            is_locked = is_locked or any(own_attribute(item.context_expr) in locks for item in node.items)
        if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not method:
            is_locked = False  # called at any time
        if attribute := own_attribute(node):
            yield Touch(method.name, attribute, getattr(node, "lineno", 0), is_locked, node in changes)
        for child in ast.iter_child_nodes(node):
            yield from within(child, is_locked)

    yield from within(method, is_locked)


def unguarded(kind: ast.ClassDef) -> list[Touch]:
    """What is touched without the lock under which it is changed elsewhere."""
    locks = locks_of(kind)
    methods = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    locked: set[str] = set()
    while True:
        found = [touch for method in methods for touch in touches(method, locks, is_locked=method.name in locked)]
        names = {method.name for method in methods}
        called = {name: [touch for touch in found if touch.attribute == name] for name in names}
        # Private methods that are called under the lock alone.
        more = {n for n, calls in called.items() if n.startswith("_") and calls and all(c.is_locked for c in calls)}
        if more <= locked:
            break
        locked |= more
    guarded = {touch.attribute for touch in found if touch.is_locked and touch.is_change} - names - locks
    return [touch for touch in found if touch.attribute in guarded and not touch.is_locked]


def test_what_is_changed_under_a_lock_is_touched_under_it_alone() -> None:
    allowed = {(*place, method) for place, (methods, _) in ALLOWED.items() for method in methods}
    found: dict[tuple[str, str, str], str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for kind in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(kind, ast.ClassDef) or not locks_of(kind):
                continue
            for touch in unguarded(kind):
                found[kind.name, touch.attribute, touch.method] = f"{path.relative_to(PACKAGE)}:{touch.line}"
    assert found.keys() <= allowed, {place: where for place, where in found.items() if place not in allowed}


def test_a_lock_that_is_left_out_is_seen() -> None:
    source = """
class Queue:
    def __init__(self):
        self._lock = threading.Lock()
        self._ready = []
    def put(self, item):
        with self._lock:
            heapq.heappush(self._ready, item)
            self._count += 1
    def get(self):
        with self._lock:
            return self._take()
    def _take(self):
        self._count -= 1
        return self._ready.pop()
"""
    (kind,) = ast.parse(source).body
    assert isinstance(kind, ast.ClassDef)
    assert not unguarded(kind)
    (kind,) = ast.parse(source.replace("with self._lock:", "if True:", 1)).body
    assert isinstance(kind, ast.ClassDef)
    assert {touch.attribute for touch in unguarded(kind)} == {"_ready", "_count"}
    (kind,) = ast.parse(source.replace("with self._lock:\n            return", "if True:\n            return")).body
    assert isinstance(kind, ast.ClassDef)
    assert {touch.attribute for touch in unguarded(kind)} == {"_ready", "_count"}
