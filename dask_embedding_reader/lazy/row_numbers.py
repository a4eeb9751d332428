"""Which rows of its collection an array is made of, so that no frame of other rows is put beside it.

The tasks of its graph tell: they begin with pieces, which know their rows, and cut, pick and join them. Nothing is
computed or read here.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import pandas as pd
from dask.core import flatten

from dask_embedding_reader.collection.files import Int64s
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.lazy._dask import (
    JOINING_IN_ORDER,
    JOINING_SHUFFLED,
    LISTING,
    PICKING,
    PICKING_BY_PAIR,
    TURNING,
    Alias,
    DataNode,
    GraphNode,
    List,
    Task,
    TaskRef,
    convert_legacy_graph,
)
from dask_embedding_reader.lazy.pieces import LazyPiece, LazySelection
from dask_embedding_reader.lazy.schedule import Graph, Key, depth_first

Rows = range | Int64s
"""Row numbers of a collection, in any order."""


class _Turned(NamedTuple):
    """What a task makes that turns pieces, as ``(x.T / norms).T`` does: the rows are along its last axis."""

    of: Rows
    """Their numbers."""


_Traced = Rows | _Turned | None
"""What a task tells; None where it does not tell of which rows it is."""

_BLOCK_ROWS = 2**20
"""So many rows of a frame in memory are compared at once."""


# ---------------------------------------------------------------------------------------------------------------------
# What belongs beside an array


class RowNumbers(NamedTuple):
    """The row numbers that belong beside an array; where it does not tell them, they count on by one."""

    starts: tuple[int, ...]
    """The positions in the array at which a stretch starts."""
    rows: tuple[Rows, ...]
    """The row numbers of each stretch."""
    untold: int
    """Before this position they count from a number that is not known: ``rows`` counts from zero there."""

    def cut(self, start: int, stop: int) -> RowNumbers:
        """Return those of the positions ``[start, stop)``."""
        starts, rows = [], []
        for place in range(max(0, bisect_right(self.starts, start) - 1), len(self.starts)):
            first = self.starts[place]
            if first >= stop:
                break
            part = self.rows[place][max(0, start - first) : stop - first]
            if len(part):
                starts.append(max(start, first))
                rows.append(part)
        return RowNumbers(tuple(starts), tuple(rows), self.untold)

    def check(self, frame: pd.DataFrame, start: int, base: int) -> None:
        """Compare them with those of a frame, given its rows from ``start`` on, which counts from ``base``.

        Raises
        ------
        MismatchError
            If they are not the same.
        """
        for first in range(start, start + len(frame), _BLOCK_ROWS):
            numbers = _numbers(frame.iloc[first - start : first - start + _BLOCK_ROWS], first)
            rows = self.cut(first, first + len(numbers)).rows
            expected = np.concatenate([_as_array(part) for part in rows])
            expected[: max(0, self.untold - first)] += base
            if len(differ := np.flatnonzero(numbers != expected)):
                place = int(differ[0])
                raise _mismatch(first + place, f"is {numbers[place]}", f"{expected[place]:,} was expected")


def _mismatch(position: int, found: str, expected: str) -> MismatchError:
    return MismatchError(
        f"{ROW_NUMBER!r} of the frame {found} beside row {position:,} of the array, where {expected}: it is the number "
        "of the row in its collection, which counts up by one where the array does not tell. Pick, sort and join rows "
        "of both alike; to pair what is at the same position all the same, drop the numbers: "
        f"frame.reset_index(drop=True), or frame.drop(columns={ROW_NUMBER!r})"
    )


def has_row_numbers(frame: Any) -> bool:
    """Tell whether a frame, a Dask one or a pandas one, tells its row numbers: as index or as a column."""
    return frame.index.name == ROW_NUMBER or ROW_NUMBER in frame.columns


_MOST_ROWS = 2**62
"""Row numbers are counted in 64 bits."""


def row_base(frame: pd.DataFrame, start: int = 0) -> int:
    """Return the number that a frame counts from, given its rows from ``start`` on."""
    if not len(frame):  # that it has too few rows is told elsewhere
        return 0
    [first] = _numbers(frame.iloc[:1], start)
    if not -_MOST_ROWS <= first <= _MOST_ROWS:  # NaN neither
        raise _mismatch(start, f"is {first}", "an integer was expected")
    return int(first) - start


def row_numbers_of(frame: pd.DataFrame) -> Array | None:
    """Return the row numbers of a frame; None if they are no numbers."""
    values = frame.index if frame.index.name == ROW_NUMBER else frame[ROW_NUMBER]
    numbers: Array = values.to_numpy()
    if numbers.dtype.kind == "O":  # as joined indices may be
        numbers = pd.Index(numbers).infer_objects().to_numpy()
    return numbers if numbers.dtype.kind in "iuf" else None


def _numbers(frame: pd.DataFrame, start: int) -> Array:
    if (numbers := row_numbers_of(frame)) is None:
        values = frame.index if frame.index.name == ROW_NUMBER else frame[ROW_NUMBER]
        raise _mismatch(start, f"is {values[:1].tolist()[0]!r} ({values.dtype})", "an integer was expected")
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# What the tasks tell


def trace_rows(array: da.Array) -> RowNumbers:
    """Return the row numbers that belong beside an array."""
    keys = list(flatten(array.__dask_keys__()))
    graph: Any = array.__dask_graph__()
    graph = convert_legacy_graph(dict(graph.cull(set(keys)) if hasattr(graph, "cull") else graph))
    rows = _Trace(graph, {}).run(keys)
    blocks: list[list[Rows | None]] = [[] for _ in array.chunks[0]]
    for key in keys:
        blocks[key[1]].append(_upright(rows[key]))
    return count_on(array.chunks[0], [_broadcast(block) for block in blocks])


def count_on(chunks: Sequence[int], told: Sequence[Rows | None]) -> RowNumbers:
    """Return the row numbers of an array of which some chunks tell theirs."""
    starts: list[int] = []
    stretches: list[Rows] = []
    untold = position = following = 0
    for count, known in zip(map(int, chunks), told, strict=True):
        if not count:
            continue
        rows = known
        if rows is None or len(rows) != count:
            untold += count if untold == position else 0
            rows = range(following, following + count)
        following = int(rows[-1]) + 1
        if stretches and _follows(stretches[-1], rows):
            stretches[-1] = range(stretches[-1][0], following)
        else:
            starts.append(position)
            stretches.append(rows)
        position += count
    return RowNumbers(tuple(starts), tuple(stretches), untold)


def _follows(rows: Rows, others: Rows) -> bool:
    alike = isinstance(rows, range) and isinstance(others, range) and rows.step == others.step == 1
    return alike and rows[-1] + 1 == others[0]


class _Trace:
    """Follows the rows of pieces through the tasks of a graph."""

    def __init__(self, graph: Graph, known: Mapping[Key, _Traced]) -> None:
        self._graph = graph
        self._rows = dict(known)

    def run(self, keys: Iterable[Key]) -> Mapping[Key, _Traced]:
        """Return the rows that each task makes."""
        asked = list(keys)
        # What is persisted on a cluster is not in the graph: nobody knows of what it was made.
        needed = chain(asked, *(node.dependencies for node in self._graph.values()))
        self._rows = {**{key: None for key in needed if key not in self._graph}, **self._rows}
        for key in depth_first(self._graph, asked, self._rows.keys()):
            self._rows[key] = self._rows_of(self._graph[key])
        return self._rows

    def _rows_of(self, node: Any) -> _Traced:
        """Return the rows that a task makes, or that an argument of one stands for."""
        if isinstance(node, TaskRef | Alias):
            return self._rows.get(_target(node))
        if isinstance(node, DataNode):
            return self._rows_of(node.value)
        if isinstance(node, LazyPiece | LazySelection):
            return node.rows
        if not isinstance(node, Task):
            return None
        if node.has_subgraph():
            return self._follow_into(*node.args)
        name = f"{getattr(node.func, '__module__', '')}.{getattr(node.func, '__name__', '')}"
        if isinstance(node, List) or name == LISTING:
            # Blocks are in a list to be put together: only what all of them tell is told.
            parts = self._parts_of(node)
            alike = len({None if rows is None else len(rows) for rows in parts}) == 1
            return _broadcast(parts) if alike else None
        if name in PICKING and (source := self._rows_of(node.args[0])) is not None:
            index = self._value_of(node.args[1])
            return _pick(source, index[1] if name == PICKING_BY_PAIR and index is not None else index)
        if name == JOINING_IN_ORDER and (shape := self._value_of(node.args[1])):
            parts, width = self._parts_of(node.args[0]), math.prod(shape[1:])
            return _join([_broadcast(parts[first : first + width]) for first in range(0, len(parts), width)])
        if name == JOINING_SHUFFLED and self._value_of(node.args[2]) == 0:
            joined, order = _join(self._parts_of(node.args[0])), self._value_of(node.args[1])
            return None if joined is None or not order else _as_array(joined)[np.argsort(order[1])]
        # Some function: row for row what goes into it.
        made = [self._rows_of(arg) for arg in (*node.args, *node.kwargs.values())]
        of_turned = [rows.of if isinstance(rows, _Turned) else rows for rows in made]
        if name == TURNING:
            rows = of_turned[0]
            if rows is None or self._value_of(node.kwargs.get("axes")) != (1, 0):
                return None
            return rows if isinstance(made[0], _Turned) else _Turned(rows)
        if any(isinstance(rows, _Turned) for rows in made) and _is_item_by_item(node.func):
            same = _broadcast(of_turned)
            return None if same is None else _Turned(same)
        return None if self._combines_rows(node) else _broadcast(map(_upright, made))

    def _combines_rows(self, node: Task) -> bool:
        """Tell whether a task is part of a reduction over the rows."""
        options = {**getattr(node.func, "keywords", {}), **node.kwargs}
        axes = self._value_of(options.get("axis"))
        return "keepdims" in options and (axes == 0 or (isinstance(axes, tuple) and 0 in axes))

    def _follow_into(self, inner: Graph, key: Key, keys: Sequence[Key], *args: Any) -> _Traced:
        """Return the rows that tasks make which were joined to one."""
        nodes = {name: self._node_of(arg) for name, arg in zip(keys, args, strict=True)}
        values = {name: node for name, node in nodes.items() if isinstance(node, DataNode)}
        known = {name: self._rows_of(arg) for name, arg in zip(keys, args, strict=True)}
        return _Trace({**inner, **values}, known).run([key])[key]

    def _parts_of(self, parts: Any) -> list[Rows | None]:
        return [_upright(self._rows_of(part)) for part in getattr(parts, "args", parts)]

    def _node_of(self, arg: Any) -> Any:
        return self._graph.get(_target(arg)) if isinstance(arg, TaskRef | Alias) else arg

    def _value_of(self, arg: Any) -> Any:
        """Return an argument that is known before anything is computed; None for others."""
        node = self._node_of(arg)
        if isinstance(node, DataNode):
            return node.value
        return None if isinstance(node, GraphNode) else node


def _is_item_by_item(function: Any) -> bool:
    """Tell whether a function makes each item of what is at the same place in all arrays, along their last axes."""
    if isinstance(function, np.ufunc):
        return function.signature is None
    return getattr(function, "__module__", "") == "_operator" and function is not operator.matmul


def _target(node: TaskRef | Alias) -> Key:
    return node.key if isinstance(node, TaskRef) else node.target


def _upright(rows: _Traced) -> Rows | None:
    return None if isinstance(rows, _Turned) else rows


def _pick(rows: Rows | _Turned, index: Any) -> _Traced:
    if isinstance(rows, _Turned):
        items, some = index if isinstance(index, tuple) and len(index) == 2 else (None, None)
        return _Turned(rows.of[some]) if isinstance(items, slice) and isinstance(some, slice) else None
    first = index[0] if isinstance(index, tuple) and index else index
    if isinstance(first, slice):
        return rows[first]
    if isinstance(first, list | np.ndarray) and np.ndim(first) == 1 and len(rows):
        picked: Int64s = _as_array(rows)[np.asarray(first)]
        return picked
    return None


def _join(parts: Sequence[Rows | None]) -> Rows | None:
    told = [_as_array(rows) for rows in parts if rows is not None]
    return np.concatenate(told) if len(told) == len(parts) else None


def _broadcast(made: Iterable[Rows | None]) -> Rows | None:
    """Return the rows that all tell which tell most: a single row, or a mean of some, may go into all of a chunk."""
    found = [rows for rows in made if rows is not None]
    most = max(map(len, found), default=0)
    told = [rows for rows in found if len(rows) == most]
    return told[0] if most and all(_are_same(told[0], rows) for rows in told[1:]) else None


def _are_same(rows: Rows, others: Rows) -> bool:
    if isinstance(rows, range) and isinstance(others, range):
        return rows == others
    return np.array_equal(_as_array(rows), _as_array(others))


def _as_array(rows: Rows) -> Int64s:
    return np.arange(rows.start, rows.stop, rows.step, dtype=np.int64) if isinstance(rows, range) else rows
