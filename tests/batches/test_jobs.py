"""Threads that read: jobs in order, each where the last one of its lane stopped, and none that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader.batches.jobs import Job, JobQueue, Lane, Pool, jobs_of_reads
from dask_embedding_reader.batches.read import _in_turn
from dask_embedding_reader.batches.selected import SelectedRead
from dask_embedding_reader.formats.base import Array, FilePart, PartReader
from tests.support.collections import finishes


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Two threads."""
    made = Pool(threads=2)
    yield made
    made.close()


def same(value: Any) -> Any:
    return value


def test_what_was_read_is_handed_out_once_as_far_as_it_is_asked_for(pool: Pool) -> None:
    lane = Lane(pool, lambda: same)
    jobs = [Job(start, start + 5, lane) for start in range(0, 30, 5)]
    queue = JobQueue(iter(jobs))
    for job in jobs[:4]:
        assert queue.next is job
        queue.start(partial(same, -job.start))
    for stop, expected in ((0, []), (1, [0]), (5, []), (6, [5]), (20, [10, 15]), (30, [])):
        assert queue.finish(stop) == [(jobs[start // 5], -start) for start in expected]
    for job in jobs[4:]:
        assert queue.next is job
        queue.start(partial(same, 7))
    assert queue.next is None
    assert [job for job, _ in queue.started] == jobs[4:]
    assert JobQueue(iter(())).next is None


def test_a_lane_opens_its_reader_when_something_is_read_and_once(pool: Pool) -> None:
    opened: list[list[int]] = []

    def open_reader() -> Callable[[int], int]:
        opened.append([])
        return lambda number: opened[-1].append(number) or len(opened[-1])  # type: ignore[func-returns-value]

    lane = Lane(pool, open_reader)
    assert opened == []
    for first in (0, 10):  # the second time it has come to rest
        futures = [lane.submit(partial(same, first + number)) for number in range(10)]
        assert [future.result(60) for future in futures] == [*range(first + 1, first + 11)]
    assert opened == [[*range(20)]]


@pytest.mark.parametrize("later", [False, True])
def test_after_an_error_a_lane_goes_on(pool: Pool, later: bool) -> None:
    """Whether it is met at once, or by what is left to do."""

    def read(number: int) -> Any:
        def rest() -> int:
            if number % 3 == 1:
                raise ValueError(number)
            return number

        return rest if later else rest()

    lane = Lane(pool, lambda: read)
    for number, future in enumerate([lane.submit(partial(same, number)) for number in range(9)]):
        if number % 3 == 1:
            assert str(future.exception(60)) == str(number)
        else:
            assert future.result(60) == number


def test_a_reader_that_cannot_be_opened_is_tried_again(pool: Pool) -> None:
    tries = iter([ValueError("gone"), same])

    def open_reader() -> Any:
        if isinstance(found := next(tries), Exception):
            raise found
        return found

    lane = Lane(pool, open_reader)
    with pytest.raises(ValueError, match="gone"):
        lane.submit(partial(same, 1)).result(60)
    assert lane.submit(partial(same, 2)).result(60) == 2


def test_what_was_wanted_first_is_run_first() -> None:
    pool = Pool(threads=1)
    begin, done = threading.Event(), threading.Event()
    order: list[int] = []

    def hold() -> None:
        begin.wait(60)

    pool.submit(pool.next_order(), hold)
    orders = [pool.next_order() for _ in range(5)]
    assert orders == sorted({*orders})
    for number in (3, 0, 4, 1, 2):
        pool.submit(orders[number], partial(order.append, number))
    pool.submit(pool.next_order(), done.set)
    begin.set()
    assert done.wait(60)
    assert order == [*range(5)]
    pool.close()


def test_a_closed_pool_begins_nothing_and_is_not_waited_for() -> None:
    pool = Pool(threads=1)
    begun, left = threading.Event(), threading.Event()
    run: list[int] = []

    def hold(number: int) -> int:
        begun.set()
        left.wait(60)
        return number

    lane = Lane(pool, lambda: hold)
    first, second = (lane.submit(partial(same, number)) for number in range(2))
    assert begun.wait(60)
    pool.submit(pool.next_order(), lambda: run.append(1))
    finishes(pool.close, 30)
    assert not first.done()
    left.set()
    assert first.result(60) == 0
    for thread in pool._executor._threads:
        thread.join(60)
    assert not second.done()
    assert run == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(pool.next_order(), lambda: run.append(2))


def test_where_no_thread_can_be_started_nobody_waits_any_more() -> None:
    pool = Pool(threads=1)
    pool._executor.shutdown()  # as at the end of a program
    with pytest.raises(RuntimeError):
        Lane(pool, lambda: same).submit(partial(same, 1))
    assert pool.closed.is_set()


def test_reads_that_open_the_same_share_a_lane(pool: Pool) -> None:
    openers = [lambda: same, lambda: same]
    reads = [SelectedRead(start, start + 2, openers[which]) for start, which in ((0, 0), (2, 0), (4, 1), (6, 0))]
    jobs = list(jobs_of_reads(iter(reads), pool))
    assert [(job.start, job.stop) for job in jobs] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [job.lane is before.lane for before, job in pairwise(jobs)] == [True, False, False]
    assert [job.lane.submit(partial(same, 5)).result(60) for job in jobs] == [5] * 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.lists(st.integers(0, 12)), st.integers(0, 3), st.data())
def test_parts_of_files_are_read_one_after_the_other(
    rows: list[int], sizes: list[int], rests: int, data: st.DataObject
) -> None:
    """Into arrays of any size; each is opened when it is come to, and the rest of what is to do is told."""
    parts: list[FilePart] = [FilePart(None, start, start + count) for start, count in enumerate(rows)]  # type: ignore[arg-type]
    values = np.concatenate([100 * number + np.arange(count) for number, count in enumerate(rows)])
    opened: list[FilePart] = []

    def open_part(part: FilePart) -> PartReader:
        number, place = len(opened), 0
        opened.append(part)

        def read(outs: Sequence[Array]) -> Callable[[], None] | None:
            nonlocal place
            first, place = place, place + sum(map(len, outs))

            def fill() -> None:
                start = 100 * number + first
                for out in outs:
                    out[:] = np.arange(start, start + len(out))
                    start += len(out)

            if (number + first) % 4 < rests:
                return fill
            fill()
            return None

        return read

    read = _in_turn(open_part)(parts)
    done = 0
    while done < len(values):
        some = [np.full(size, -1) for size in data.draw(st.lists(st.sampled_from([1, *sizes]), min_size=1, max_size=4))]
        left = len(values) - done
        some = [
            one[: max(0, left - before)] for one, before in zip(some, np.cumsum([0, *map(len, some)]), strict=False)
        ]
        rest = read(some)
        if rest is not None:
            rest()
        found = np.concatenate(some)
        assert found.tolist() == values[done : done + len(found)].tolist()
        done += len(found)
        assert opened == parts[: 1 if len(parts) == 1 else np.searchsorted(np.cumsum(rows) - rows, done)]
        if not rests:
            assert rest is None
    assert opened == parts
