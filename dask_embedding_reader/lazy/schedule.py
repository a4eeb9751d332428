"""Sorting a graph: what is computed first, for all rows, and what for which rows.

What is combined from all rows and used for all rows (a mean, say) is *global*: it is computed first and kept, and what
it was computed from is let go. Everything else belongs to *units*, one for each band of chunks along the rows and one
for each partition of the frame. A unit has the tasks that no unit before it has computed, and lends to later ones what
they need too. How tasks are sorted decides what is held and what is computed again, never what comes out.

Arithmetic on keys and dependencies; nothing is computed here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import dask.array as da
import dask.dataframe as dd
from dask.array.optimization import optimize
from dask.base import is_dask_collection
from dask.core import flatten
from dask.order import order

from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.lazy._dask import (
    P2P_BARRIER,
    Alias,
    DataNode,
    GraphNode,
    TaskRef,
    convert_legacy_graph,
)

Key = Any
"""A key of Dask's graph: a string, or a tuple of a name and numbers."""
Graph = dict[Key, GraphNode]

_WIDE = 0.75
"""A task that combines, or is used for, more than this share of the rows has to do with all of them."""

_MOST_TIMES = 2
"""A task is not computed more often than this for the sake of memory."""

_MANY_TASKS = 256
"""From so many tasks on, it pays to ask Dask in which order a unit holds the least."""


class Unit(NamedTuple):
    """What is computed and consumed together: a band of chunks, or a partition of the frame."""

    start: int
    """The first row."""
    stop: int
    """The row after the last one."""
    keys: tuple[Key, ...]
    """The results."""
    is_frame: bool
    """Whether it is a partition of the frame."""


def make_graph(array: da.Array, frame: Any, frame_rows: Sequence[int]) -> tuple[Graph, list[Unit], list[Key]]:
    """Return the graph of the array and the frame, the units in the order of their rows, and what is persisted.

    The graph has a node for each key of a result that is persisted on a cluster, which depends on nothing: where it
    lies among the rows counts as for any task, but it is not computed.

    Raises
    ------
    ArgumentError
        If the workers would have to find tasks by their keys (P2P), which are others in each pass.
    """
    graph: Any = array.__dask_graph__()
    keys = list(flatten(array.__dask_keys__()))
    tasks = dict(graph.cull(set(keys)) if hasattr(graph, "cull") else graph)
    bands: list[list[Key]] = [[] for _ in array.chunks[0]]
    for key in keys:
        bands[key[1]].append(key)
    units = _units(array.chunks[0], bands, is_frame=False)
    if isinstance(frame, dd.DataFrame):
        optimized = frame.optimize()
        partitions = list(flatten(optimized.__dask_keys__()))
        tasks |= _by_own_keys(dict(optimized.__dask_graph__()))
        units += _units(frame_rows, [[key] for key in partitions], is_frame=True)
        keys += partitions
    if any(isinstance(key, str) and key.startswith(P2P_BARRIER) for key in tasks):
        raise ArgumentError(
            "array or frame are sorted, shuffled, merged or rechunked by P2P, as Dask does on a cluster: that cannot "
            "be computed batch by batch. Call persist() on it first, or have tasks do it, with dask.config.set("
            '{"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}) when it is made'
        )
    units.sort(key=lambda unit: unit.start)
    # A plain dictionary, so that Dask only joins chains of tasks and moves slices into reads. With its layers Dask
    # would also join what several tasks use to each of them, and compute it as often.
    joined: Graph = convert_legacy_graph(dict(optimize(tasks, keys)))
    persisted = persisted_keys(joined, keys)
    return joined | {key: DataNode(key, None) for key in persisted}, units, persisted


def _by_own_keys(tasks: Mapping[Key, Any]) -> dict[Key, Any]:
    """Return tasks with the keys that they are found under.

    Frames cut by ``loc`` and those of ``from_delayed`` have aliases that are named as what they stand for. Dask takes
    these for tasks that depend on themselves when it joins chains of tasks.
    """
    return {
        key: Alias(key, task.target) if isinstance(task, Alias) and task.key != key else task
        for key, task in tasks.items()
    }


def persisted_keys(graph: Graph, keys: Iterable[Key]) -> list[Key]:
    """Return the keys that a graph needs and has no tasks for: those of what was persisted or scattered on a cluster.

    Dask has futures in the place of such tasks, and no more than their keys once a graph is optimized.
    """
    needed = chain(keys, *(node.dependencies for node in graph.values()))
    return [key for key in dict.fromkeys(needed) if key not in graph]


def with_persisted(
    tasks: Mapping[Key, Any], keys: Iterable[Key], collections: Iterable[Any]
) -> tuple[dict[Key, Any], list[Key]]:
    """Return the optimized tasks of collections with the futures that these hold, and the keys of what is persisted.

    Dask drops such futures when it optimizes a graph: who keeps the graph alone would lose the results.
    """
    graph: Graph = convert_legacy_graph(_by_own_keys(tasks))
    persisted = persisted_keys(graph, keys)
    if not persisted:
        return dict(graph), persisted
    graphs = [collection.__dask_graph__() for collection in collections if is_dask_collection(collection)]
    futures = {key: value for held in graphs for key, value in dict(held).items() if isinstance(value, TaskRef)}
    return graph | futures, persisted


def reference(key: Key) -> Any:
    """Return what stands for a result in the arguments of a task, even if the graph has no task for it."""
    return TaskRef(key)


def check_persisted(persisted: Sequence[Key], client: Any) -> None:
    """Raise an error where there is no client that could ask the cluster for what it holds."""
    if persisted and client is None:
        raise ArgumentError(
            f"{len(persisted):,} chunks or partitions are held by a cluster (persist, scatter; {persisted[0]!r} is the "
            "first), but no distributed.Client is active that could ask for them; use the client that they come from, "
            'without dask.config.set(scheduler="threads") and before it is closed'
        )


def literals(values: Mapping[Key, Any]) -> Graph:
    """Return a graph of what is known already."""
    return {key: DataNode(key, value) for key, value in values.items()}


def renamed(node: GraphNode, names: Mapping[Key, Key]) -> GraphNode:
    """Return a task that has another key, and finds what it depends on under other keys."""
    aliases = [Alias(key, names[key]) for key in node.dependencies if names[key] != key]
    return GraphNode.fuse(*aliases, node, key=names[node.key])


def _units(rows: Iterable[int], keys: Iterable[Sequence[Key]], *, is_frame: bool) -> list[Unit]:
    units, start = [], 0
    for count, unit_keys in zip(rows, keys, strict=True):
        units.append(Unit(start, start + int(count), tuple(unit_keys), is_frame))
        start += int(count)
    return units


def depth_first(graph: Graph, keys: Iterable[Key], known: Collection[Key] = ()) -> list[Key]:
    """Return what ``keys`` need, dependencies first, up to what is known."""
    found: list[Key] = []
    seen: set[Key] = set(known)
    for key in keys:
        stack = [key]
        while stack:
            top = stack[-1]
            if top in seen:
                stack.pop()
                continue
            missing = [dep for dep in graph[top].dependencies if dep not in seen]
            if missing:
                stack += missing
            else:
                seen.add(top)
                found.append(stack.pop())
    return found


Span = tuple[float, float]


def _positions(keys: Iterable[Key]) -> dict[Key, Span]:
    """Return where a task lies among those of its name, as a share of them: (name, 3, 0) of 4 lies in [0.75, 1).

    Tasks that are the only one of their name lie nowhere, as those do whose keys are not numbered, or not by numbers
    alone: a shuffle of more than 32 partitions has (name, 3, (0, 1)).
    """
    numbered = [key for key in keys if _is_numbered(key)]
    bounds: dict[Any, tuple[list[int], list[int]]] = {}
    for key in numbered:
        low, high = bounds.setdefault((key[0], len(key)), (list(key[1:]), list(key[1:])))
        for axis, number in enumerate(key[1:]):
            if number < low[axis]:
                low[axis] = number
            elif number > high[axis]:
                high[axis] = number
    axes = {}
    for name, (low, high) in bounds.items():
        counts = [b - a + 1 for a, b in zip(low, high, strict=True)]
        axis = counts.index(max(counts))  # the axis of the rows is the one cut most often
        axes[name] = axis + 1, low[axis], counts[axis]
    positions: dict[Key, Span] = {}
    for key in numbered:
        axis, first, count = axes[key[0], len(key)]
        if count > 1:
            positions[key] = ((key[axis] - first) / count, (key[axis] - first + 1) / count)
    return positions


def _is_numbered(key: Key) -> bool:
    return isinstance(key, tuple) and len(key) > 1 and all(isinstance(number, int) for number in key[1:])


def _union(spans: Iterable[Span | None]) -> Span | None:
    known = [span for span in spans if span]
    return (min(span[0] for span in known), max(span[1] for span in known)) if known else None


def _is_wide(span: Span | None) -> bool:
    return span is not None and span[1] - span[0] > _WIDE


def find_globals(graph: Graph, outputs: Sequence[Key]) -> list[list[Key]]:
    """Return the tasks to compute before all others, by level: each needs only globals of the levels before it.

    These are tasks that combine (nearly) all rows and are used for all rows. A chunk that is cut into many, or a
    neighbour's edge, is used for few rows; a matrix to multiply with combines none.
    """
    tasks = depth_first(graph, outputs)
    positions = _positions(tasks)
    results = set(outputs)
    combined: dict[Key, Span | None] = {}  # of a task that lies nowhere, where its dependencies lie
    used: dict[Key, Span] = {}
    wide: set[Key] = set()
    for key in tasks:
        position = positions.get(key)
        spans = []
        for dep in graph[key].dependencies:
            spans.append(positions.get(dep) or combined[dep])
            if position:
                last = used.get(dep, position)
                used[dep] = (min(last[0], position[0]), max(last[1], position[1]))
        combined[key] = _union(spans)
        if _is_wide(combined[key]):
            wide.add(key)
    found = {key for key in wide if (key not in positions if key in results else _is_wide(used.get(key)))}
    levels: list[list[Key]] = []
    level_of: dict[Key, int] = {}
    for key in tasks:
        level = max((level_of[dep] + (dep in found) for dep in graph[key].dependencies), default=0)
        level_of[key] = level
        if key in found:
            while len(levels) <= level:
                levels.append([])
            levels[level].append(key)
    return [level for level in levels if level]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which unit computes which task, and who uses it."""

    tasks: list[list[Key]]
    """The tasks of each unit, dependencies first."""
    loans: dict[tuple[Key, int], list[int]]
    """For a task and the unit that computes it, that unit and the later ones that use the result."""
    lent: list[list[Key]]
    """The tasks of each unit whose results later ones use."""
    borrowed: list[list[tuple[Key, int]]]
    """What each unit uses of earlier ones."""
    computed_at: dict[Key, tuple[int, ...]]
    """The units that compute a task."""

    def lender(self, key: Key, unit: int) -> int:
        """Return the unit whose result of a task another one uses."""
        units = self.computed_at[key]
        return units[bisect_right(units, unit) - 1]


def make_schedule(graph: Graph, outputs: Sequence[Sequence[Key]], known: Collection[Key], near: int) -> Schedule:
    """Give each task to the first unit that needs it.

    The result is held for later units, unless the next one is more than ``near`` units away: then that one computes it
    again.
    """
    tasks = depth_first(graph, chain.from_iterable(outputs), known)
    uses: dict[Key, list[int]] = {}
    for unit, keys in enumerate(outputs):
        for key in keys:
            uses.setdefault(key, []).append(unit)
    schedule = Schedule([[] for _ in outputs], {}, [[] for _ in outputs], [[] for _ in outputs], {})
    for key in reversed(tasks):  # what uses a task comes before it
        groups = _split(uses.pop(key), near)
        firsts = tuple(group[0] for group in groups)
        schedule.computed_at[key] = firsts
        for group in groups:
            schedule.tasks[group[0]].append(key)
            if len(group) > 1:
                schedule.loans[key, group[0]] = group
                schedule.lent[group[0]].append(key)
                for unit in group[1:]:
                    schedule.borrowed[unit].append((key, group[0]))
        for dep in graph[key].dependencies:
            if dep not in known:
                uses.setdefault(dep, []).extend(firsts)
    for unit_tasks in schedule.tasks:
        unit_tasks.reverse()
        if len(unit_tasks) > _MANY_TASKS:
            mine = set(unit_tasks)
            ranks = order(
                {key: graph[key] for key in unit_tasks},
                dependencies={key: set(graph[key].dependencies) & mine for key in unit_tasks},
            )
            unit_tasks.sort(key=ranks.__getitem__)
    return schedule


def _split(units: list[int], near: int) -> list[list[int]]:
    """Split the units that use a task where they lie far apart, if that leaves few groups."""
    if len(units) == 1:
        return [units]
    units = sorted(set(units))
    groups = [[units[0]]]
    for previous, unit in pairwise(units):
        if unit - previous > near:
            groups.append([])
        groups[-1].append(unit)
    return groups if len(groups) <= _MOST_TIMES else [units]
