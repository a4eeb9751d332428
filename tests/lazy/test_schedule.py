"""How the tasks of a graph are shared among units, and that threads compute and hold what that says."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import cache, partial
from typing import Any, NamedTuple

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import iter_batches
from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.lazy._dask import Task, TaskRef
from dask_embedding_reader.lazy.engines import Threads
from dask_embedding_reader.lazy.schedule import (
    Graph,
    Key,
    check_persisted,
    depth_first,
    find_globals,
    make_graph,
    make_schedule,
)
from tests.support.collections import finishes


def graph_of(needs: Mapping[Key, Iterable[Key]], function: Any = tuple) -> Graph:
    """Tasks, given what each depends on."""
    return {key: Task(key, function, key, *map(TaskRef, deps)) for key, deps in needs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What is computed first


def numbered(name: str, numbers: Iterable[int], *others: int) -> list[Key]:
    return [(name, number, *others) for number in numbers]


def centred(combined: Iterable[int], used: Iterable[int], chunks: int = 8, first: int = 0) -> dict[Key, list[Key]]:
    """What some chunks are combined to, and some results use, of as many chunks."""
    mean = {"mean": [("x", first + k, 0) for k in combined]}
    users = set(used)
    return {
        **{key: [] for key in numbered("x", range(first, first + chunks), 0)},
        **mean,
        **{("y", first + k, 0): [("x", first + k, 0), *(["mean"] if k in users else [])] for k in range(chunks)},
    }


def chain_of(needs: Mapping[Key, Iterable[Key]]) -> dict[Key, list[Key]]:
    """The chunks, and what is made of them."""
    return {**{key: [] for key in numbered("x", range(8), 0)}, **{key: list(deps) for key, deps in needs.items()}}


X = numbered("x", range(8), 0)
Y = numbered("y", range(8), 0)

#: The graph, its results, and what is computed before all others.
GLOBALS: dict[str, tuple[dict[Key, list[Key]], Sequence[Key], list[list[Key]]]] = {
    "all of all": (centred(range(8), range(8)), Y, [["mean"]]),
    "seven of eight": (centred(range(7), range(7)), Y, [["mean"]]),
    "for the last seven, last first": (centred(range(8), range(1, 8)), Y[::-1], [["mean"]]),
    "for the first seven, last first": (centred(range(8), range(7)), Y[::-1], [["mean"]]),
    "the ends alone": (centred([0, 7], [0, 7]), Y, [["mean"]]),
    "of three quarters": (centred(range(6), range(8)), Y, []),
    "of the last three quarters": (centred(range(2, 8), range(8)), Y, []),
    "for three quarters": (centred(range(8), range(6)), Y, []),
    "for the last three quarters": (centred(range(8), range(2, 8)), Y, []),
    "in any order": (centred([3, 7, 0, 5], [6, 0, 7, 2]), Y, [["mean"]]),
    "numbered from elsewhere": (centred(range(7), range(7), 8, 5), numbered("y", range(5, 13), 0), [["mean"]]),
    "numbered from elsewhere, of few": (centred(range(6), range(7), 8, 5), numbered("y", range(5, 13), 0), []),
    "of two, all": (centred(range(2), range(2), 2), Y[:2], [["mean"]]),
    "of two, one": (centred(range(1), range(2), 2), Y[:2], []),
    "of one": (centred(range(1), range(1), 1), Y[:1], []),
    "a result": (chain_of({"sum": X}), ["sum"], [["sum"]]),
    "a result of some": (chain_of({"sum": X[:6]}), ["sum", *X[6:]], []),
    "a numbered result that is the only one": (chain_of({("sum", 0): X}), [("sum", 0)], [[("sum", 0)]]),
    "numbered results": (chain_of({("sum", k): X for k in range(2)}), numbered("sum", range(2)), []),
    "two, one of the other": (
        chain_of(
            {
                "mean": X,
                **{("d", k, 0): [X[k], "mean"] for k in range(8)},
                "std": numbered("d", range(8), 0),
                **{("y", k, 0): [X[k], "mean", "std"] for k in range(8)},
            }
        ),
        Y,
        [["mean"], ["std"]],
    ),
    "two of one level": (
        chain_of({"mean": X, "most": X, **{("y", k, 0): [X[k], "mean", "most"] for k in range(8)}}),
        Y,
        [["mean", "most"]],
    ),
    "made of what is combined": (
        chain_of({"sum": X, "root": ["sum"], **{("y", k, 0): [X[k], "root"] for k in range(8)}}),
        Y,
        [["root"]],
    ),
    "combined in steps": (
        chain_of(
            {
                ("part", 0): X[:4],
                ("part", 1): X[4:],
                "sum": numbered("part", range(2)),
                **{("y", k, 0): [X[k], "sum"] for k in range(8)},
            }
        ),
        Y,
        [["sum"]],
    ),
    "a matrix to multiply with": (
        chain_of({"matrix": [], "inverse": ["matrix"], **{("y", k, 0): [X[k], "inverse"] for k in range(8)}}),
        Y,
        [],
    ),
    "a chunk cut into many": (
        {("x", 0, 0): [], ("x", 1, 0): [], **{("y", k, 0): [("x", k // 4, 0)] for k in range(8)}},
        Y,
        [],
    ),
    "along the axis that is cut more often": (
        {
            **{("x", j, k): [] for j in range(2) for k in range(8)},
            "mean": [("x", 0, k) for k in range(7)],
            **{("y", j, k): [("x", j, k), "mean"] for j in range(2) for k in range(8)},
        },
        [("y", j, k) for j in range(2) for k in range(8)],
        [["mean"]],
    ),
    "along the axis that is cut less often": (
        {
            **{("x", j, k): [] for j in range(2) for k in range(8)},
            "mean": [("x", 0, 3), ("x", 1, 3)],
            **{("y", j, k): [("x", j, k), "mean"] for j in range(2) for k in range(8)},
        },
        [("y", j, k) for j in range(2) for k in range(8)],
        [],
    ),
    "named, not numbered": (
        {("x", "a"): [], ("x", "b"): [], "sum": [("x", "a"), ("x", "b")], ("y", "a"): ["sum"], ("y", "b"): ["sum"]},
        [("y", "a"), ("y", "b")],
        [],
    ),
    "not by numbers alone": (
        {
            ("x", 0, (0, 0)): [],
            ("x", 1, (0, 1)): [],
            "sum": [("x", 0, (0, 0)), ("x", 1, (0, 1))],
            ("y", 0, "a"): ["sum"],
        },
        [("y", 0, "a")],
        [],
    ),
    "of one name with more numbers and fewer": (
        {**centred(range(8), range(8)), ("x", 0): [], ("y", 8, 0): [("x", 0), "mean"]},
        [*Y, ("y", 8, 0)],
        [["mean"]],
    ),
}


@pytest.mark.parametrize("name", GLOBALS)
def test_what_combines_nearly_all_rows_for_nearly_all_rows_is_computed_first(name: str) -> None:
    needs, outputs, expected = GLOBALS[name]
    found = find_globals(graph_of(needs), outputs)
    assert list(map(sorted, found)) == expected  # within a level in any order


# ---------------------------------------------------------------------------------------------------------------------
# Who computes what, and holds it for whom


class Drawn(NamedTuple):
    """Tasks numbered so that each depends on earlier ones, and what is made of them."""

    needs: dict[Key, list[Key]]
    outputs: list[list[Key]]
    known: list[Key]
    near: int

    @property
    def graph(self) -> Graph:
        return graph_of(self.needs, evaluate)

    def users(self, key: Key) -> list[Key]:
        return [user for user in self.needed() if key in self.needs[user]]

    @cache  # noqa: B019 - as long as the test
    def needed(self) -> frozenset[Key]:
        """What has to be computed."""
        found: set[Key] = set()
        left = [key for keys in self.outputs for key in keys]
        while left:
            key = left.pop()
            if key not in found and key not in self.known:
                found.add(key)
                left += self.needs[key]
        return frozenset(found)

    @cache  # noqa: B019
    def groups(self, key: Key) -> list[list[int]]:
        """The units that share a result; the first of each computes it."""
        units = {unit for unit, keys in enumerate(self.outputs) if key in keys}
        units |= {group[0] for user in self.users(key) for group in self.groups(user)}
        some = sorted(units)
        cuts = [k for k in range(1, len(some)) if some[k] - some[k - 1] > self.near]
        if len(cuts) > 1:
            return [some]
        return [some[a:b] for a, b in itertools.pairwise([0, *cuts, len(some)])]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def evaluate(number: Key, *given: Any) -> Any:
    """An array of as many items as the task's number tells, of what goes in."""
    return np.full(number + 1, 1 + number + 3 * sum(int(one[0]) for one in given))


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    tasks = draw(st.integers(1, 14))
    needs: dict[Key, list[Key]] = {
        key: sorted(draw(st.sets(st.integers(0, key - 1), max_size=3))) if key else [] for key in range(tasks)
    }
    some = st.lists(st.integers(0, tasks - 1), max_size=2, unique=True)
    outputs: Any = draw(st.lists(some, min_size=1, max_size=9))
    known: Any = sorted(draw(st.sets(st.integers(0, tasks - 1), max_size=2)))
    return Drawn(needs, outputs, known, draw(st.integers(0, 4)))


@given(drawn())
def test_a_task_belongs_to_the_first_unit_of_those_that_use_it(case: Drawn) -> None:
    schedule = make_schedule(case.graph, case.outputs, case.known, case.near)
    groups = {key: case.groups(key) for key in case.needed()}
    units = range(len(case.outputs))
    assert schedule.computed_at == {key: tuple(group[0] for group in some) for key, some in groups.items()}
    lent = {(key, group[0]): group for key, some in groups.items() for group in some if len(group) > 1}
    assert schedule.loans == lent
    for unit in units:
        mine = schedule.tasks[unit]
        assert Counter(mine) == Counter(key for key, some in groups.items() if unit in [group[0] for group in some])
        for place, key in enumerate(mine):
            assert not set(case.needs[key]) & set(mine[place:]), "dependencies come first"
        assert Counter(schedule.lent[unit]) == Counter(key for key, first in lent if first == unit)
        assert Counter(schedule.borrowed[unit]) == Counter(loan for loan, some in lent.items() if unit in some[1:])
        for key, some in groups.items():
            for group in some:
                if unit in group:
                    assert schedule.lender(key, unit) == group[0]


@given(drawn())
def test_what_is_needed_is_told_once_after_what_it_needs(case: Drawn) -> None:
    found = depth_first(case.graph, [key for keys in case.outputs for key in keys], case.known)
    assert Counter(found) == Counter(case.needed())
    for place, key in enumerate(found):
        assert not set(case.needs[key]) & set(found[place:])


@given(drawn(), st.booleans())
def test_threads_compute_what_is_scheduled_and_hold_what_is_lent(case: Drawn, at_once: bool) -> None:
    values: dict[Key, Any] = {}
    for key, deps in case.needs.items():
        values[key] = evaluate(key, *(values[dep] for dep in deps))
    engine = Threads(case.graph, case.outputs, 10**6, 0)
    engine.schedule = make_schedule(case.graph, case.outputs, case.known, case.near)
    try:
        engine.compute_globals([[key] for key in case.known])
        units = list(range(len(case.outputs)))
        futures = engine.start(units) if at_once else []
        for unit in units:
            if not at_once:
                futures += engine.start([unit])
            results = finishes(partial(engine.result, futures[unit]))
            engine.consumed(unit)
            assert [value.tolist() for value in results] == [values[key].tolist() for key in case.outputs[unit]]
            held = [*case.known]
            held += [key for (key, first), users in engine.schedule.loans.items() if first <= unit < users[-1]]
            if not at_once:
                assert engine.held_nbytes == sum(values[key].nbytes for key in held)
        assert engine.held_nbytes == sum(values[key].nbytes for key in case.known)
    finally:
        engine.close()


@given(drawn())
def test_a_result_is_let_go_of_once_all_have_it(case: Drawn) -> None:
    """Of a unit those alone are held that a task to come or an output needs, and what is lent or known."""
    made: dict[Key, list[weakref.ref[Any]]] = {}
    held: list[set[Key]] = []

    def make(key: Key, *given: Any) -> Any:
        del given
        held.append({key for key, values in made.items() if any(value() is not None for value in values)})
        value = np.empty(1)
        made.setdefault(key, []).append(weakref.ref(value))
        return value

    graph = graph_of(case.needs, make)
    engine = Threads(graph, case.outputs, 10**6, 0)
    schedule = engine.schedule = make_schedule(graph, case.outputs, case.known, case.near)
    try:
        engine.compute_globals([[key] for key in case.known])
        handed_out: set[Key] = set()  # the thread that has made them may hold them for a moment longer
        for unit, outputs in enumerate(case.outputs):
            held.clear()
            handed_out |= {*outputs}
            [future] = engine.start([unit])
            finishes(partial(engine.result, future))
            lent = {key for (key, first), users in schedule.loans.items() if first <= unit <= users[-1]}
            tasks = schedule.tasks[unit]
            for place, found in enumerate(held):
                following = {dep for key in tasks[place:] for dep in case.needs[key]}
                assert found <= {*following, *handed_out, *lent, *case.known}
    finally:
        engine.close()


@pytest.mark.parametrize("chunks", [255, 256, 400])
def test_many_tasks_of_a_unit_hold_few_results(chunks: int) -> None:
    """Of a sum of pairs, in the order that Dask finds for it."""
    needs: dict[Key, list[Key]] = {"first": [], **{("a", k): ["first"] for k in range(chunks)}}
    needs |= {("b", k): [("a", k)] for k in range(chunks)}
    needs["sum"] = numbered("b", range(chunks))
    [mine] = make_schedule(graph_of(needs), [["sum"]], ["first"], 1).tasks
    assert set(mine) == needs.keys() - {"first"}
    assert len(mine) == 2 * chunks + 1
    for key, following in itertools.pairwise(mine):
        if key[0] == "a":
            assert following == ("b", key[1])


@pytest.mark.parametrize(
    ("limit", "inner", "expected"), [(100, 100, 1), (100, 30, 3), (100, 1_000, 1), (1_000, 100, 4), (399, 100, 3)]
)
def test_as_many_parts_of_reductions_are_computed_at_once_as_fit(limit: int, inner: int, expected: int) -> None:
    with dask.config.set(num_workers=4):
        engine = Threads({}, [], limit, inner)
    engine.close()
    assert engine.parallel == 4
    assert engine.ahead == 8
    assert engine._parallel_globals == expected


# ---------------------------------------------------------------------------------------------------------------------
# The units of an array and a frame


def test_units_are_bands_of_chunks_and_partitions_in_the_order_of_their_rows() -> None:
    x = da.zeros((9, 4), chunks=((4, 0, 5), (1, 3)))
    frame = dd.from_map(lambda k: pd.DataFrame({"a": [k]}), range(3), meta=pd.DataFrame({"a": [0]}))
    graph, units, persisted = make_graph(x, frame, (2, 6, 1))
    assert [(unit.start, unit.stop, unit.is_frame) for unit in units] == [
        (0, 4, False),
        (0, 2, True),
        (2, 8, True),
        (4, 4, False),
        (4, 9, False),
        (8, 9, True),
    ]
    assert [[key[1:] for key in unit.keys] for unit in units] == [
        [(0, 0), (0, 1)],
        [(0,)],
        [(1,)],
        [(1, 0), (1, 1)],
        [(2, 0), (2, 1)],
        [(2,)],
    ]
    assert all(key in graph for unit in units for key in unit.keys)
    assert not persisted


def test_a_frame_that_is_shuffled_in_stages() -> None:
    """Of more than 32 partitions: tasks between the stages are numbered by pairs."""
    pandas = pd.DataFrame({"a": np.arange(99)[::-1], "b": np.arange(99) * 2})
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        frame = dd.from_pandas(pandas, npartitions=33).shuffle("a")
    whole = frame.compute(scheduler="sync")
    rows = tuple(frame.map_partitions(len).compute(scheduler="sync").tolist())
    found = pd.concat([meta for _, meta in iter_batches(da.zeros((99, 1), chunks=(rows, 1)), frame, batch_size=50)])
    assert found["b"].tolist() == whole["b"].tolist()
    assert sorted(whole["b"]) == pandas["b"].tolist()


def test_what_lies_on_a_cluster_is_told_with_the_remedy() -> None:
    check_persisted([], None)
    check_persisted(["a"], object())
    with pytest.raises(ArgumentError, match=r"^2 chunks or partitions are held by a cluster \(.*; 'a' is the first"):
        check_persisted(["a", "b"], None)


def test_what_is_closed_begins_no_further_task() -> None:
    begun = []

    def close(key: Key, *_: Any) -> None:
        begun.append(key)
        engine.close()

    graph = graph_of({"a": [], "b": ["a"]}, close)
    engine = Threads(graph, [["b"]], 10**6, 0)
    engine.schedule = make_schedule(graph, [["b"]], [], 1)
    [future] = engine.start([0])
    with pytest.raises(CancelledError):
        finishes(partial(engine.result, future))
    assert begun == ["a"]


def test_who_waits_for_what_a_failed_unit_lends_is_told() -> None:
    def fail(key: Key, *_: Any) -> None:
        raise ZeroDivisionError(key)

    graph = graph_of({"a": []}, fail)
    engine = Threads(graph, [["a"], ["a"], ["a"]], 10**6, 0)
    engine.schedule = make_schedule(graph, [["a"]] * 3, [], 1)
    for future in engine.start([0, 1, 2]):
        with pytest.raises(ZeroDivisionError, match="a"):
            finishes(partial(engine.result, future))
    engine.close()
