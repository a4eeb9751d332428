"""What threads read for batches: jobs in order, of which those of one row group go on where the last one stopped."""

from __future__ import annotations

import heapq
import itertools
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader.batches.selected import SelectedRead
from dask_embedding_reader.collection.plan import ReadPlan
from dask_embedding_reader.formats.base import FilePart, cut_parts

OpenReader = Callable[[Sequence[FilePart]], Callable[[Any], Any]]
"""Given parts of files, returns what reads the next rows of them."""


Wanted = Callable[[], Any]
"""Returns what a job shall read: rows, or arrays to fill; None while there is no memory for them."""


@dataclass(slots=True)
class Job:
    """The rows of one piece, to be read in one go."""

    start: int
    """The first row, counted in the collection."""
    stop: int
    """The row after the last one."""
    lane: Lane
    """Where it is read."""


def jobs_of_plan(plan: ReadPlan, open_reader: OpenReader, pool: Pool, bounds: range = range(0)) -> Iterator[Job]:
    """Turn a plan into jobs, in order. The pieces of one row group share a lane, which decodes it once.

    Pieces that reach over one of the rows ``bounds`` are cut there.
    """
    segments = plan.whole_segments()
    for position in range(len(segments)):
        start, stop = segments[position]
        parts = plan.files.parts(start, stop)
        lane = Lane(pool, partial(open_reader, parts))
        for a, b in _cut(start, stop, int(plan.piece_rows[position]), bounds):
            if not plan.files.has_groups:
                lane = Lane(pool, partial(open_reader, tuple(cut_parts(parts, a - start, b - start))))
            yield Job(a, b, lane)


def jobs_of_reads(reads: Iterator[SelectedRead], pool: Pool) -> Iterator[Job]:
    """Turn reads into jobs, in order."""
    lane = opened = None
    for read in reads:
        if lane is None or read.open is not opened:
            lane, opened = Lane(pool, read.open), read.open
        yield Job(read.start, read.stop, lane)


def _cut(start: int, stop: int, rows: int, bounds: range) -> Iterator[tuple[int, int]]:
    """Cut the rows ``[start, stop)`` at bounds, and what lies between them into pieces."""
    while start < stop:
        bound = next(iter(bounds[bisect_right(bounds, start) :]), stop)
        yield start, (start := min(start + rows, bound, stop))


class Pool:
    """Threads that read. Ended without waiting: a read that is under way fills memory that nobody looks at.

    What was wanted first is read first: all others may wait for memory that comes only when it is there.
    """

    def __init__(self, threads: int) -> None:
        self.closed = threading.Event()
        self._executor = stoppable_pool(threads, self.closed)
        self._orders = itertools.count()
        self._ready: list[tuple[int, Callable[[], None]]] = []
        self._lock = threading.Lock()

    def next_order(self) -> int:
        """Return a greater number each time."""
        return next(self._orders)

    def submit(self, order: int, run: Callable[[], None]) -> None:
        """Run this before what has a greater number."""
        with self._lock:
            heapq.heappush(self._ready, (order, run))
        try:
            self._executor.submit(self._run_first)
        except RuntimeError:  # the program ends: nobody waits any more
            self.closed.set()
            raise

    def _run_first(self) -> None:
        with self._lock:
            _, run = heapq.heappop(self._ready)
        run()

    def close(self) -> None:
        """End the threads, without waiting for them."""
        self.closed.set()
        self._executor.shutdown(wait=False, cancel_futures=True)


class Lane:
    """Runs jobs one after the other, each continuing to read where the last one stopped.

    What reads may return a function, which does the rest of a job: at the same time as the next one is run.
    """

    def __init__(self, pool: Pool, open_reader: Callable[[], Callable[[Any], Any]]) -> None:
        self._pool = pool
        self._open_reader = open_reader
        self._reader: Callable[[Any], Any] | None = None
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, Future[Any], Wanted]] = deque()
        self._running = False

    def submit(self, wanted: Wanted) -> Future[Any]:
        """Read what is wanted, after all that was wanted before."""
        future: Future[Any] = Future()
        with self._lock:
            order = self._pool.next_order()
            self._waiting.append((order, future, wanted))
            idle, self._running = not self._running, True
        if idle:
            self._pool.submit(order, self._work)
        return future

    def _work(self) -> None:
        """Do what waits, rather than hand it back to the pool: the next pieces of this row group are wanted first."""
        while True:
            with self._lock:
                if not self._waiting or self._pool.closed.is_set():
                    self._running = False
                    return
                _, future, wanted = self._waiting[0]
            rest: Callable[[], Any] | None = None
            try:
                target = None
                while target is None and not self._pool.closed.is_set():
                    target = wanted()
                if target is None:
                    continue
                if self._reader is None:
                    self._reader = self._open_reader()
                result = self._reader(target)
                target = None  # before anybody wakes up: this thread must not keep a batch alive
                if callable(result):
                    rest, result = result, None
                else:
                    future.set_result(result)
            except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
                future.set_exception(error)
            with self._lock:
                self._waiting.popleft()
                self._running = rest is None or bool(self._waiting)
                following = self._waiting[0][0] if self._waiting else None
            target = None
            if rest is None:
                del future, wanted
                continue
            try:
                if following is not None:
                    self._pool.submit(following, self._work)
                result = rest()
                rest = None
                future.set_result(result)
            except BaseException as error:  # noqa: BLE001 - as above
                rest = None
                future.set_exception(error)
            return


class JobQueue:
    """Jobs in order, of which some have been started and not been waited for."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self.next = next(jobs, None)
        self.started: deque[tuple[Job, Future[Any]]] = deque()

    def start(self, wanted: Wanted) -> None:
        """Start the next job."""
        job = self.next
        assert job is not None
        self.started.append((job, job.lane.submit(wanted)))
        self.next = next(self._jobs, None)

    def finish(self, stop: int) -> list[tuple[Job, Any]]:
        """Wait for the rows before ``stop``; return what was read of them."""
        wanted = list(takewhile(lambda started: started[0].start < stop, self.started))
        if wanted:
            # For the last one first: to wake up for each of them takes the cores from those who read.
            wanted[-1][1].exception()
        results = [(job, future.result()) for job, future in wanted]
        for _ in wanted:
            self.started.popleft()
        return results
