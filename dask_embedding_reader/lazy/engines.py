"""Where units are computed: in threads of this process, or on a cluster."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import dask
import dask.threaded
from dask.sizeof import sizeof
from dask.system import CPU_COUNT

from dask_embedding_reader._common.memory import Buffers, used_again
from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader.lazy.schedule import Graph, Key, Schedule, depth_first, literals, renamed

if TYPE_CHECKING:
    import distributed


_COUNT_SECONDS = 1.0
"""How often the threads of a cluster are counted: workers come and go."""


class _Loan:
    """The result of a task that later units use, perhaps before it is there."""

    __slots__ = ("left", "nbytes", "result")

    def __init__(self, users: int) -> None:
        self.result: Future[Any] = Future()
        self.left = users
        self.nbytes = 0


class Threads:
    """Computes units in threads of its own. Ended without waiting: a running task is the last one of its thread."""

    def __init__(self, graph: Graph, outputs: Sequence[Sequence[Key]], limit_nbytes: int, inner_nbytes: int) -> None:
        self.parallel = int(dask.config.get("num_workers", None) or CPU_COUNT)
        # How many units are worth having under way: more would only be held, in memory that is new and thus slow.
        self.ahead = 2 * self.parallel
        self._graph, self._outputs = graph, outputs
        # Reductions hold what they combine: fewer at a time where chunks are large.
        self._parallel_globals = max(1, min(self.parallel, limit_nbytes // max(1, inner_nbytes)))
        self._closed = threading.Event()
        self._pool = stoppable_pool(self.parallel, self._closed)
        self._globals: dict[Key, Any] = {}
        self._loans: dict[tuple[Key, int], _Loan] = {}
        self._lock = threading.Lock()
        self._held_nbytes = 0
        self._buffers = Buffers(limit_nbytes // 8)
        self.schedule: Schedule

    @property
    def held_nbytes(self) -> int:
        """Globals, loans, and memory for the next chunks."""
        return self._held_nbytes + self._buffers.free_nbytes

    def compute_globals(self, levels: Sequence[Sequence[Key]]) -> None:
        """Compute what all units use, and keep it."""
        for keys in levels:
            graph = {key: self._graph[key] for key in depth_first(self._graph, keys, self._globals)}
            graph |= literals(self._globals)
            pool = stoppable_pool(self._parallel_globals, self._closed)
            try:
                values = dask.threaded.get(graph, list(keys), pool=pool)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            self._globals |= dict(zip(keys, values, strict=True))
            self._held_nbytes += sum(map(_nbytes, values))

    def start(self, units: Sequence[int]) -> list[Future[list[Any]]]:
        """Hand the next units to the threads."""
        for unit in units:
            for key in self.schedule.lent[unit]:
                self._loans[key, unit] = _Loan(len(self.schedule.loans[key, unit]) - 1)
        return [self._pool.submit(self._compute, unit) for unit in units]

    def result(self, future: Future[list[Any]]) -> list[Any]:
        """Wait for the results of a unit."""
        return future.result()

    def consumed(self, unit: int) -> None:
        """Nothing to do: what a unit borrowed was given back when it had been computed."""

    def _compute(self, unit: int) -> list[Any]:
        try:
            with used_again(self._buffers):
                return self._run(unit)
        except BaseException as error:
            # Those who wait for what this unit should have lent must not wait for ever.
            for key in self.schedule.lent[unit]:
                result = self._loans[key, unit].result
                if not result.done():
                    result.set_exception(error)
            raise

    def _run(self, unit: int) -> list[Any]:
        schedule, graph = self.schedule, self._graph
        tasks, outputs = schedule.tasks[unit], self._outputs[unit]
        lent = set(schedule.lent[unit])
        left = Counter(dep for key in tasks for dep in graph[key].dependencies)
        left.update(outputs)
        values: dict[Key, Any] = {}

        def value_of(key: Key) -> Any:
            if key in values:
                left[key] -= 1
                return values[key] if left[key] else values.pop(key)
            if key in self._globals:
                return self._globals[key]
            # Whoever lends it was started before, so that it is there or under way.
            return self._loans[key, schedule.lender(key, unit)].result.result()

        for key in tasks:
            if self._closed.is_set():
                raise CancelledError
            node = graph[key]
            value = node({dep: value_of(dep) for dep in node.dependencies})
            if key in lent:
                self._lend(self._loans[key, unit], value)
            if left[key]:
                values[key] = value
            del value
        results = [value_of(key) for key in outputs]
        self._give_back(schedule.borrowed[unit])
        return results

    def _lend(self, loan: _Loan, value: Any) -> None:
        loan.nbytes = _nbytes(value)
        with self._lock:
            self._held_nbytes += loan.nbytes
        loan.result.set_result(value)

    def _give_back(self, borrowed: Iterable[tuple[Key, int]]) -> None:
        with self._lock:
            for loan_key in borrowed:
                loan = self._loans[loan_key]
                loan.left -= 1
                if not loan.left:
                    del self._loans[loan_key]
                    self._held_nbytes -= loan.nbytes

    def close(self) -> None:
        """Start nothing more; a task that runs is the last one of its thread."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._buffers.close()


class Cluster:
    """Computes units on a cluster, and fetches their results in order."""

    def __init__(
        self, graph: Graph, outputs: Sequence[Sequence[Key]], persisted: Sequence[Key], client: distributed.Client
    ) -> None:
        self._graph, self._outputs, self._client = graph, outputs, client
        self._token = uuid.uuid4().hex
        # The scheduler has what is persisted. These futures are our own: to let go of them takes nothing from others.
        held = client.get({}, list(persisted), sync=False) if persisted else []
        self._globals: dict[Key, Any] = dict(zip(persisted, held, strict=True))
        self._lent: dict[tuple[Key, int], Any] = {}
        self._results: dict[int, list[Any]] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="embedding-reader")
        self._threads, self._counted_at = 0, -math.inf
        self._closed = False
        self.held_nbytes = 0  # globals and loans are held by the workers
        self.schedule: Schedule

    @property
    def parallel(self) -> int:
        """How many threads the workers have, as of a second ago: to ask the scheduler takes milliseconds."""
        now = time.monotonic()
        if now > self._counted_at + _COUNT_SECONDS:
            self._counted_at = now
            self._threads = max(2, sum(map(int, self._client.nthreads().values())))
        return self._threads

    @property
    def ahead(self) -> int:
        """Twice as many as in threads: what is sent takes a while to arrive."""
        return 4 * self.parallel

    def compute_globals(self, levels: Sequence[Sequence[Key]]) -> None:
        """Have the workers compute and keep what all units use."""
        for keys in levels:
            graph = {key: self._graph[key] for key in depth_first(self._graph, keys, self._globals)}
            self._globals |= self._submit(graph, self._globals, keys, priority=1)

    def start(self, units: Sequence[int]) -> list[Future[list[Any]]]:
        """Send the tasks of the next units to the scheduler."""
        schedule, graph = self.schedule, self._graph
        tasks: dict[Key, Any] = {key: graph[key] for unit in units for key in schedule.tasks[unit]}
        wanted = [key for unit in units for key in [*schedule.lent[unit], *self._outputs[unit]] if key in tasks]
        given = {
            dep: self._known(dep, unit)
            for unit in units
            for dep in chain(self._outputs[unit], *(graph[key].dependencies for key in schedule.tasks[unit]))
            if dep not in tasks
        }
        futures = self._submit(tasks, given, list(dict.fromkeys(wanted)), priority=-units[0])
        for unit in units:
            self._lent |= {(key, unit): futures[key] for key in schedule.lent[unit]}
            self._results[unit] = [futures[key] if key in futures else given[key] for key in self._outputs[unit]]
        return [self._pool.submit(self._fetch, unit) for unit in units]

    def _known(self, key: Key, unit: int) -> Any:
        """Return what was computed for a unit before it was started."""
        return self._globals[key] if key in self._globals else self._lent[key, self.schedule.lender(key, unit)]

    def _submit(self, tasks: Graph, given: Mapping[Key, Any], keys: Sequence[Key], priority: int) -> dict[Key, Any]:
        """Have tasks computed under keys of our own, and return the futures of some of them.

        Under their own keys the scheduler would take them for those of whatever else computes the same array, though
        they are joined in other ways: it warns of that, and may wait for ever.
        """
        if not keys:
            return {}
        names = {key: self._name(key) for key in tasks} | {key: future.key for key, future in given.items()}
        graph = {names[key]: renamed(node, names) for key, node in tasks.items()}
        futures = self._client.get(graph, [names[key] for key in keys], sync=False, priority=priority)
        return dict(zip(keys, futures, strict=True))

    def _name(self, key: Key) -> Key:
        return (f"{key[0]}-{self._token}", *key[1:]) if isinstance(key, tuple) else f"{key}-{self._token}"

    def _fetch(self, unit: int) -> list[Any]:
        if self._closed:
            raise CancelledError
        results: list[Any] = self._client.gather(self._results[unit])
        return results

    def result(self, future: Future[list[Any]]) -> list[Any]:
        """Wait for the results of a unit."""
        if future.done():
            return future.result()
        with _others_may_run():
            return future.result()

    def consumed(self, unit: int) -> None:
        """Let the workers forget what no later unit uses."""
        del self._results[unit]
        for loan in self.schedule.borrowed[unit]:
            if self.schedule.loans[loan][-1] == unit:
                self._lent.pop(loan, None)

    def close(self) -> None:
        """Let go of everything: the scheduler stops what nobody else waits for.

        Nothing is cancelled: where results depend on others the scheduler fails at that, and ends its connection to the
        client; and what the caller persisted would be lost. Nor is anything waited for: this may be called by the
        garbage collector, in the event loop of the client.
        """
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        # Threads that wait for results wake up when these are released. To take away what they are fetching would have
        # the scheduler complain; it is dropped when it is there. What has failed is held by the traceback of its error.
        ready = [unit for unit in self._results.values() if all(one.status == "finished" for one in unit)]
        fetched = set(chain.from_iterable(ready))
        futures = {*self._globals.values(), *self._lent.values(), *chain.from_iterable(self._results.values())}
        self._globals, self._lent, self._results = {}, {}, {}
        for future in futures - fetched:
            with suppress(AttributeError, RuntimeError):  # the client may be closed
                future.release()


@contextmanager
def _others_may_run() -> Iterator[None]:
    """Lend the thread of a worker to other tasks while this task waits for some of them, as ``compute`` does."""
    from distributed import rejoin, secede  # noqa: PLC0415 - takes time where there is no cluster

    try:
        secede()
    except (AttributeError, KeyError, ValueError):  # this is no thread of a worker, or it is lent already
        yield
        return
    try:
        yield
    finally:
        rejoin()


def _nbytes(value: Any) -> int:
    nbytes = getattr(value, "nbytes", None)
    return int(sizeof(value) if nbytes is None else nbytes)
