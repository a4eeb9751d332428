"""Batches of any lazy array, in order, within a memory limit: every task of its graph is computed once.

The graph is split before anything is computed. What is combined from all rows and used for all rows (a mean, say) is
*global*: it is computed first and kept, and what it was computed from is let go. Everything else belongs to *units*,
one for each band of chunks along the rows and one for each partition of the frame. A unit has the tasks that no unit
before it has computed, and lends to later ones what they need too. Units are started in order, ahead of the consumer,
as far as they fit into the limit. How tasks are sorted decides what is held and what is computed again, never what
comes out.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import warnings
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import dask
import dask.array as da
import dask.dataframe as dd
import dask.threaded
import numpy as np
import pandas as pd
from dask._task_spec import DataNode, GraphNode, convert_legacy_graph
from dask.array.optimization import optimize
from dask.base import get_scheduler
from dask.core import flatten
from dask.dataframe.dispatch import concat
from dask.order import order
from dask.sizeof import sizeof
from dask.system import CPU_COUNT

from dask_embedding_reader.arguments import check_positive
from dask_embedding_reader.batches import METADATA_ROW_NBYTES, Batch, Buffers
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, MismatchError
from dask_embedding_reader.formats import Array
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.progress import progress_bar

if TYPE_CHECKING:
    import distributed

Key = Any
"""A key of Dask's graph: a string, or a tuple of a name and numbers."""
Graph = dict[Key, GraphNode]

_WIDE = 0.75
"""A task that combines, or is used for, more than this share of the rows has to do with all of them."""

_NEAR_UNITS = 8
"""What is used again so few units later is held rather than computed again, whatever it weighs."""

_MOST_TIMES = 2
"""A task is not computed more often than this for the sake of memory."""

_MANY_TASKS = 256
"""From so many tasks on, it pays to ask Dask in which order a unit holds the least."""


def iter_batches(
    array: da.Array,
    frame: dd.DataFrame | pd.DataFrame | None = None,
    *,
    batch_size: int,
    max_ram_usage_in_bytes: int = 2**32,
    show_progress: bool = False,
) -> Iterator[Batch]:
    """Iterate over the rows of any Dask array in batches, in order, computed ahead within a memory limit.

    Every chunk is computed once, however many batches it falls into, and let go when its last row is out. What is
    combined from all rows and needed for all of them, such as ``x.mean(axis=0)``, is computed first; the chunks it
    was computed from are computed again for the batches rather than held.

    Runs on the threads of this process, or on the active ``distributed.Client`` where there is one. Leaving the loop
    early stops the computation.

    Parameters
    ----------
    array : dask.array.Array
        Any array whose first axis is the rows, with known chunks along it.
    frame : dask.dataframe.DataFrame or pandas.DataFrame, optional
        Metadata, row for row beside the array: a frame with as many rows in each partition as the array has in the
        chunk, or with divisions that number the rows.
    batch_size : int
        Rows in each batch; the last one may have fewer.
    max_ram_usage_in_bytes : int, default 4 GiB
        The memory that computing may hold, together with the batch that the loop is working on. A chunk that is larger
        by itself is still computed, with a warning.
    show_progress : bool, default False
        Whether to show a progress bar, in a terminal or notebook.

    Returns
    -------
    iterator of (numpy.ndarray, pandas.DataFrame)
        The rows, a writable array in C order with the dtype of ``array``, and their metadata with ``i`` as last
        column: the index of ``frame`` where it is named so, else the position of the row in ``array``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        At the call, if an argument makes no sense.
    MismatchError
        If the frame does not have the rows of the array, before a wrong pair is returned.

    Warns
    -----
    UserWarning
        If the largest chunk and two batches are larger than the memory limit: chunks are then computed one at a time.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> x = da.from_array(np.arange(10.0).reshape(5, 2), chunks=(2, 2))
    >>> for rows, meta in iter_batches(x - x.mean(axis=0), batch_size=3):
    ...     print(rows.tolist(), meta["i"].tolist())
    [[-4.0, -4.0], [-2.0, -2.0], [0.0, 0.0]] [0, 1, 2]
    [[2.0, 2.0], [4.0, 4.0]] [3, 4]
    """
    request = _Request(
        array=_checked_array(array),
        frame=_checked_frame(frame),
        frame_rows=_frame_rows(array, frame),
        batch_rows=check_positive("batch_size", batch_size),
        limit_nbytes=check_positive("max_ram_usage_in_bytes", max_ram_usage_in_bytes),
        show_progress=bool(show_progress),
        client=_active_client(),
    )
    request.warn_if_too_large()
    return _iterate(request)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments, checked."""

    array: da.Array
    """The array."""
    frame: Any
    """The frame, a Dask one or a pandas one, or None."""
    frame_rows: tuple[int, ...]
    """Rows of each partition of the frame; none for a pandas frame."""
    batch_rows: int
    """Rows of each batch but the last."""
    limit_nbytes: int
    """How much memory may be held."""
    show_progress: bool
    """Whether to show a progress bar, where somebody watches."""
    client: distributed.Client | None
    """The cluster to compute on; None for threads."""

    @property
    def rows(self) -> int:
        """Rows of the array."""
        return int(self.array.shape[0])

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row of the array."""
        return int(math.prod(self.array.shape[1:])) * int(self.array.dtype.itemsize)

    @property
    def batch_nbytes(self) -> int:
        """Bytes of the array of a batch."""
        return min(self.batch_rows, self.rows) * self.row_nbytes

    @property
    def inner_nbytes(self) -> int:
        """Bytes that a running unit holds beside its result: what a task takes and what it makes on the way."""
        return 2 * _largest_inner_chunk(self.array)

    def warn_if_too_large(self) -> None:
        """Warn where the limit cannot be kept."""
        chunk = max(self.array.chunks[0], default=0) * self.row_nbytes
        needed = 2 * self.batch_nbytes + chunk + self.inner_nbytes
        if needed > self.limit_nbytes:
            warnings.warn(
                f"computing one chunk takes about {needed:,} bytes: {chunk:,} for the largest chunk, "
                f"{self.inner_nbytes:,} for what it is computed from, {2 * self.batch_nbytes:,} for two batches of "
                f"{min(self.batch_rows, self.rows):,} rows; the limit is {self.limit_nbytes:,} "
                "(max_ram_usage_in_bytes): chunks are computed one at a time; smaller chunks, a smaller batch_size or "
                "a higher limit is faster",
                stacklevel=3,
            )


def _checked_array(array: Any) -> da.Array:
    if not isinstance(array, da.Array):
        raise ArgumentTypeError(
            f"array must be a dask.array.Array, not {type(array).__name__}; da.from_array makes one of a numpy array"
        )
    if array.ndim == 0:
        raise ArgumentError("array has no axes; its first axis must be the rows")
    if np.isnan(array.shape).any():
        raise ArgumentError(
            f"array has unknown chunk sizes (shape {array.shape}), as boolean indexing leaves them; "
            "call array.compute_chunk_sizes() first"
        )
    meta = getattr(array, "_meta", None)
    if isinstance(meta, np.ma.MaskedArray) or (meta is not None and not isinstance(meta, np.ndarray | np.generic)):
        raise ArgumentTypeError(
            f"array has chunks of type {type(meta).__name__}, batches are plain numpy arrays; convert it first, as in "
            "array.map_blocks(np.asarray), or da.ma.filled for masked arrays"
        )
    return array


def _checked_frame(frame: Any) -> Any:
    if frame is None:
        return None
    if not isinstance(frame, dd.DataFrame | pd.DataFrame):
        raise ArgumentTypeError(f"frame must be a Dask or pandas DataFrame, not {type(frame).__name__}")
    if frame.index.name == ROW_NUMBER and ROW_NUMBER in frame.columns:
        raise ArgumentError(f'frame has both an index and a column named "{ROW_NUMBER}"; rename or drop one of them')
    return frame


def _frame_rows(array: da.Array, frame: Any) -> tuple[int, ...]:
    """Return how many rows each partition of the frame has to have."""
    rows = int(array.shape[0])
    if frame is None:
        return ()
    if isinstance(frame, pd.DataFrame):
        if len(frame) != rows:
            raise MismatchError(
                f"the frame has {len(frame):,} rows, the array {rows:,}: from row {min(len(frame), rows):,} on, one of "
                "them has nothing to go with the other"
            )
        return ()
    divided = _rows_by_divisions(frame.divisions)
    if divided and sum(divided) == rows:
        return divided
    chunks = tuple(map(int, array.chunks[0]))
    if frame.npartitions == len(chunks):
        return chunks
    by_divisions = f" and {sum(divided):,} rows by its divisions" if divided else ""
    raise MismatchError(
        f"the frame has {frame.npartitions:,} partitions{by_divisions}, the array {len(chunks):,} chunks and {rows:,} "
        "rows: which rows belong together cannot be told. Both need equal pieces, as to_dask_array and "
        "to_dask_dataframe with the same arguments give, or a frame with divisions that number its rows"
    )


def _rows_by_divisions(divisions: Sequence[Any]) -> tuple[int, ...]:
    """Return the rows of each partition of a frame whose index numbers them; none if it does not."""
    if not all(isinstance(division, int | np.integer) for division in divisions):
        return ()
    return tuple(int(b) - int(a) for a, b in pairwise([*divisions[:-1], divisions[-1] + 1]))


def _largest_inner_chunk(array: da.Array) -> int:
    """Return the bytes of the largest chunk that the array is computed from, as far as its layers tell."""
    layers = getattr(array.__dask_graph__(), "layers", {})
    sizes = [0]
    for name, layer in layers.items():
        told = getattr(layer, "collection_annotations", None) or {}
        shape, dtype = told.get("chunksize"), told.get("dtype")
        if name != array.name and dtype is not None and shape and not np.isnan(shape).any():
            sizes.append(int(math.prod(shape)) * np.dtype(dtype).itemsize)
    return max(sizes)


def _active_client() -> distributed.Client | None:
    if "distributed" not in sys.modules:  # without it there is no client; importing it takes time
        return None
    from distributed import Client  # noqa: PLC0415

    # What compute() would use: also heeds dask.config.set(scheduler="threads").
    client = getattr(get_scheduler(), "__self__", None)
    return client if isinstance(client, Client) else None


# ---------------------------------------------------------------------------------------------------------------------
# The graph: arithmetic on its keys and dependencies


class _Unit(NamedTuple):
    """What is computed and consumed together: a band of chunks, or a partition of the frame."""

    start: int
    """The first row."""
    stop: int
    """The row after the last one."""
    keys: tuple[Key, ...]
    """The results."""
    is_frame: bool
    """Whether it is a partition of the frame."""


def _make_graph(request: _Request) -> tuple[Graph, list[_Unit]]:
    """Return the graph of the array and the frame, and the units in the order of their rows."""
    array, frame = request.array, request.frame
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
        tasks |= dict(optimized.__dask_graph__())
        units += _units(request.frame_rows, [[key] for key in partitions], is_frame=True)
        keys += partitions
    units.sort(key=lambda unit: unit.start)
    # A plain dictionary, so that Dask only joins chains of tasks and moves slices into reads. With its layers Dask
    # would also join what several tasks use to each of them, and compute it as often.
    return convert_legacy_graph(dict(optimize(tasks, keys))), units


def _units(rows: Iterable[int], keys: Iterable[Sequence[Key]], *, is_frame: bool) -> list[_Unit]:
    units, start = [], 0
    for count, unit_keys in zip(rows, keys, strict=True):
        units.append(_Unit(start, start + int(count), tuple(unit_keys), is_frame))
        start += int(count)
    return units


def _depth_first(graph: Graph, keys: Iterable[Key], known: Collection[Key] = ()) -> list[Key]:
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

    Tasks that are the only one of their name lie nowhere, as those do whose keys are not numbered.
    """
    numbered = [key for key in keys if isinstance(key, tuple) and len(key) > 1 and isinstance(key[1], int)]
    bounds: dict[Any, tuple[list[int], list[int]]] = {}
    for key in numbered:
        low, high = bounds.setdefault(key[0], (list(key[1:]), list(key[1:])))
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
        axis, first, count = axes[key[0]]
        if count > 1:
            positions[key] = ((key[axis] - first) / count, (key[axis] - first + 1) / count)
    return positions


def _union(spans: Iterable[Span | None]) -> Span | None:
    known = [span for span in spans if span]
    return (min(span[0] for span in known), max(span[1] for span in known)) if known else None


def _is_wide(span: Span | None) -> bool:
    return span is not None and span[1] - span[0] > _WIDE


def _find_globals(graph: Graph, tasks: Sequence[Key], outputs: Collection[Key]) -> list[list[Key]]:
    """Return the tasks to compute before all others, by level: each needs only globals of the levels before it.

    These are tasks that combine (nearly) all rows and are used for all rows. A chunk that is cut into many, or a
    neighbour's edge, is used for few rows; a matrix to multiply with combines none.
    """
    positions = _positions(tasks)
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
    found = {key for key in wide if (key not in positions if key in outputs else _is_wide(used.get(key)))}
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
class _Schedule:
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


def _make_schedule(graph: Graph, outputs: Sequence[Sequence[Key]], known: Collection[Key], near: int) -> _Schedule:
    """Give each task to the first unit that needs it.

    The result is held for later units, unless the next one is more than ``near`` units away: then that one computes it
    again.
    """
    tasks = _depth_first(graph, chain.from_iterable(outputs), known)
    uses: dict[Key, list[int]] = {}
    for unit, keys in enumerate(outputs):
        for key in keys:
            uses.setdefault(key, []).append(unit)
    schedule = _Schedule([[] for _ in outputs], {}, [[] for _ in outputs], [[] for _ in outputs], {})
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


# ---------------------------------------------------------------------------------------------------------------------
# Where it is computed


class _Engine(Protocol):
    """Computes units."""

    def compute_globals(self, levels: Sequence[Sequence[Key]]) -> None:
        """Compute what all units use."""

    def start(self, units: Sequence[int]) -> list[Future[list[Any]]]:
        """Start the next units."""

    def consumed(self, unit: int) -> None:
        """Hear that the results of a unit have been taken."""

    @property
    def parallel(self) -> int:
        """How many units can be computed at the same time."""

    @property
    def held_nbytes(self) -> int:
        """Bytes held in this process beside the results of units."""

    def close(self) -> None:
        """Stop, and let go of everything."""


class _Loan:
    """The result of a task that later units use, perhaps before it is there."""

    __slots__ = ("left", "nbytes", "result")

    def __init__(self, users: int) -> None:
        self.result: Future[Any] = Future()
        self.left = users
        self.nbytes = 0


class _Threads:
    """Computes units in threads of its own. Ended without waiting: a running task is the last one of its thread."""

    def __init__(self, graph: Graph, outputs: Sequence[Sequence[Key]], limit_nbytes: int, inner_nbytes: int) -> None:
        self.parallel = int(dask.config.get("num_workers", None) or CPU_COUNT)
        self._graph, self._outputs = graph, outputs
        # Reductions hold what they combine: fewer at a time where chunks are large.
        self._parallel_globals = max(1, min(self.parallel, limit_nbytes // max(1, inner_nbytes)))
        self._pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="embedding-reader")
        self._globals: dict[Key, Any] = {}
        self._loans: dict[tuple[Key, int], _Loan] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.held_nbytes = 0
        self.schedule: _Schedule

    def compute_globals(self, levels: Sequence[Sequence[Key]]) -> None:
        for keys in levels:
            graph = {key: self._graph[key] for key in _depth_first(self._graph, keys, self._globals)}
            graph |= {key: DataNode(key, value) for key, value in self._globals.items()}
            pool = ThreadPoolExecutor(self._parallel_globals, thread_name_prefix="embedding-reader")
            try:
                values = dask.threaded.get(graph, list(keys), pool=pool)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            self._globals |= dict(zip(keys, values, strict=True))
            self.held_nbytes += sum(map(_nbytes, values))

    def start(self, units: Sequence[int]) -> list[Future[list[Any]]]:
        for unit in units:
            for key in self.schedule.lent[unit]:
                self._loans[key, unit] = _Loan(len(self.schedule.loans[key, unit]) - 1)
        return [self._pool.submit(self._compute, unit) for unit in units]

    def consumed(self, unit: int) -> None:
        """Nothing to do: what a unit borrowed was given back when it had been computed."""

    def _compute(self, unit: int) -> list[Any]:
        try:
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
            if self._closed:
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
            self.held_nbytes += loan.nbytes
        loan.result.set_result(value)

    def _give_back(self, borrowed: Iterable[tuple[Key, int]]) -> None:
        with self._lock:
            for loan_key in borrowed:
                loan = self._loans[loan_key]
                loan.left -= 1
                if not loan.left:
                    del self._loans[loan_key]
                    self.held_nbytes -= loan.nbytes

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Cluster:
    """Computes units on a cluster, and fetches their results in order."""

    def __init__(self, graph: Graph, outputs: Sequence[Sequence[Key]], client: distributed.Client) -> None:
        self._graph, self._outputs, self._client = graph, outputs, client
        self._globals: dict[Key, Any] = {}
        self._lent: dict[tuple[Key, int], Any] = {}
        self._results: dict[int, list[Any]] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="embedding-reader")
        self._closed = False
        self.held_nbytes = 0  # globals and loans are held by the workers
        self.schedule: _Schedule

    @property
    def parallel(self) -> int:
        return max(2, sum(map(int, self._client.nthreads().values())))

    def compute_globals(self, levels: Sequence[Sequence[Key]]) -> None:
        for keys in levels:
            graph = {key: self._graph[key] for key in _depth_first(self._graph, keys, self._globals)}
            self._globals |= self._submit(graph | self._globals, list(keys), priority=1)

    def start(self, units: Sequence[int]) -> list[Future[list[Any]]]:
        schedule, graph = self.schedule, self._graph
        tasks: dict[Key, Any] = {key: graph[key] for unit in units for key in schedule.tasks[unit]}
        wanted = [key for unit in units for key in [*schedule.lent[unit], *self._outputs[unit]] if key in tasks]
        given = {
            dep: self._known(dep, unit)
            for unit in units
            for dep in chain(self._outputs[unit], *(graph[key].dependencies for key in schedule.tasks[unit]))
            if dep not in tasks
        }
        futures = self._submit(tasks | given, list(dict.fromkeys(wanted)), priority=-units[0])
        for unit in units:
            self._lent |= {(key, unit): futures[key] for key in schedule.lent[unit]}
            self._results[unit] = [futures[key] if key in futures else given[key] for key in self._outputs[unit]]
        return [self._pool.submit(self._fetch, unit) for unit in units]

    def _known(self, key: Key, unit: int) -> Any:
        """Return what was computed for a unit before it was started."""
        return self._globals[key] if key in self._globals else self._lent[key, self.schedule.lender(key, unit)]

    def _submit(self, graph: dict[Key, Any], keys: list[Key], priority: int) -> dict[Key, Any]:
        if not keys:
            return {}
        return dict(zip(keys, self._client.get(graph, keys, sync=False, priority=priority), strict=True))

    def _fetch(self, unit: int) -> list[Any]:
        if self._closed:
            raise CancelledError
        results: list[Any] = self._client.gather(self._results[unit])
        return results

    def consumed(self, unit: int) -> None:
        """Let the workers forget what no later unit uses."""
        del self._results[unit]
        for loan in self.schedule.borrowed[unit]:
            if self.schedule.loans[loan][-1] == unit:
                self._lent.pop(loan, None)

    def close(self) -> None:
        self._closed = True
        futures = [*self._globals.values(), *self._lent.values(), *chain.from_iterable(self._results.values())]
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._globals, self._lent, self._results = {}, {}, {}
        if not futures:
            return
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            _cancel(self._client, futures)
        else:
            # Collected as garbage in an event loop, perhaps that of the client, which must not wait for itself.
            threading.Thread(target=_cancel, args=(self._client, futures), daemon=True).start()


def _cancel(client: distributed.Client, futures: Sequence[Any]) -> None:
    with suppress(Exception):  # the cluster may be gone, and the futures with it
        client.cancel(futures)


def _nbytes(value: Any) -> int:
    nbytes = getattr(value, "nbytes", None)
    return int(sizeof(value) if nbytes is None else nbytes)


# ---------------------------------------------------------------------------------------------------------------------
# The window


def _iterate(request: _Request) -> Iterator[Batch]:
    stream = _Stream(request)
    progress = progress_bar(request.show_progress, request.rows, "computing", " rows", request.row_nbytes)
    try:
        stream.open()
        for start in range(0, request.rows, request.batch_rows):
            stop = min(start + request.batch_rows, request.rows)
            batch = stream.take(start, stop)
            progress.update(stop - start)
            yield batch
            del batch
    finally:
        stream.close()
        progress.close()


class _Stream:
    """One pass over the rows: what has been started, what is finished, and what it all weighs."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        graph, self._units = _make_graph(request)
        self._outputs = [unit.keys for unit in self._units]
        self._graph = graph
        self._engine: _Threads | _Cluster = (
            _Cluster(graph, self._outputs, request.client)
            if request.client
            else _Threads(graph, self._outputs, request.limit_nbytes, request.inner_nbytes)
        )
        self._inner_nbytes = request.inner_nbytes
        self._next = 0
        self._started: deque[tuple[int, Future[list[Any]]]] = deque()
        self._chunks: deque[tuple[_Unit, list[Any]]] = deque()
        self._frames: deque[tuple[int, pd.DataFrame]] = deque()
        self._held_frame_rows = 0
        self._frame_row_nbytes = METADATA_ROW_NBYTES
        self._row_nbytes = request.row_nbytes
        self._buffers = Buffers(2 * request.batch_nbytes)

    def open(self) -> None:
        """Compute what all units need."""
        outputs = set(chain.from_iterable(self._outputs))
        levels = _find_globals(self._graph, _depth_first(self._graph, chain.from_iterable(self._outputs)), outputs)
        chunk_nbytes = max(map(self._nbytes, self._units), default=0) + self._inner_nbytes
        near = max(_NEAR_UNITS, self._request.limit_nbytes // (4 * max(1, chunk_nbytes)))
        self._engine.schedule = _make_schedule(self._graph, self._outputs, set(chain.from_iterable(levels)), near)
        self._engine.compute_globals(levels)

    def take(self, start: int, stop: int) -> Batch:
        """Return the rows of a batch, as soon as they are there; keep computing ahead all the while."""
        request = self._request
        array = _new_array(self._buffers, (stop - start, *request.array.shape[1:]), request.array.dtype)
        filled = start
        self._start_units(stop)
        while True:
            filled = self._fill(array, start, filled, stop)
            if not self._started or self._units[self._started[0][0]].start >= stop:
                break
            self._finish_first()
            self._start_units(stop)
        return array, self._take_frame(start, stop)

    def close(self) -> None:
        """Stop computing and let go of all memory."""
        self._engine.close()
        self._buffers.close()
        self._started.clear()
        self._chunks.clear()
        self._frames.clear()

    # Started and finished

    def _start_units(self, needed: int) -> None:
        """Start what the rows before ``needed`` need, as far as it fits, and then what fits ahead of it."""
        parallel = self._engine.parallel if self._next < len(self._units) else 0
        # Handing tasks over costs more than counting them: not one by one.
        if len(self._started) > parallel and self._units[self._started[0][0]].start >= needed:
            return
        held = self._held_nbytes()
        starting: list[int] = []
        while self._next < len(self._units):
            unit = self._units[self._next]
            running = len(self._started) + len(starting)
            nbytes = self._nbytes(unit) + self._inner_nbytes
            # More would only lengthen the queue, and counting what it holds.
            if running and (held + nbytes > self._request.limit_nbytes or running >= 4 * parallel):
                break
            if unit.start >= needed and held + nbytes > self._request.limit_nbytes:
                break  # not even one ahead of need
            held += nbytes
            starting.append(self._next)
            self._next += 1
        if starting:
            self._started.extend(zip(starting, self._engine.start(starting), strict=True))

    def _nbytes(self, unit: _Unit) -> int:
        return (unit.stop - unit.start) * (self._frame_row_nbytes if unit.is_frame else self._row_nbytes)

    def _held_nbytes(self) -> int:
        """Return what is held, the batch that the consumer works on and the one to be filled included."""
        held = 2 * self._request.batch_nbytes + self._engine.held_nbytes
        for number, future in self._started:
            held += self._nbytes(self._units[number]) + (0 if future.done() else self._inner_nbytes)
        held += sum(self._nbytes(unit) for unit, _ in self._chunks)
        return held + self._held_frame_rows * self._frame_row_nbytes

    def _finish_first(self) -> None:
        number, future = self._started[0]
        results = future.result()
        self._started.popleft()
        self._engine.consumed(number)
        unit = self._units[number]
        if unit.is_frame:
            (frame,) = results
            self._check_frame(unit, frame)
            self._frame_row_nbytes = max(self._frame_row_nbytes, int(sizeof(frame)) // max(1, len(frame)))
            self._frames.append((unit.start, frame))
            self._held_frame_rows += len(frame)
        else:
            self._chunks.append((unit, self._checked_blocks(unit, results)))

    def _check_frame(self, unit: _Unit, frame: Any) -> None:
        if not isinstance(frame, pd.DataFrame):
            raise MismatchError(f"a partition of the frame is no pandas DataFrame, but {type(frame).__name__}")
        rows = unit.stop - unit.start
        if len(frame) != rows:
            row = unit.start + min(len(frame), rows)
            raise MismatchError(
                f"array and frame differ from row {row:,} on: the partition of the frame for the rows "
                f"[{unit.start:,}, {unit.stop:,}) has {len(frame):,} rows, not {rows:,}; "
                "what picks rows of one has to pick them of the other too"
            )

    def _checked_blocks(self, unit: _Unit, blocks: list[Any]) -> list[Any]:
        dtype = self._request.array.dtype
        arrays = [np.asanyarray(block) for block in blocks]
        for block, (shape, _) in zip(arrays, self._block_places(unit), strict=True):
            if block.shape != shape:
                raise MismatchError(
                    f"a chunk of the rows [{unit.start:,}, {unit.stop:,}) was computed with the shape {block.shape}, "
                    f"the array tells {shape}; give map_blocks the right chunks="
                )
            if not np.can_cast(block.dtype, dtype, "same_kind"):
                raise MismatchError(
                    f"a chunk of the rows [{unit.start:,}, {unit.stop:,}) was computed as {block.dtype}, the array "
                    f"tells {dtype}; give map_blocks the right dtype="
                )
        return arrays

    def _block_places(self, unit: _Unit) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Return the shape of each block of a band, and its place on the other axes."""
        places: list[tuple[tuple[int, ...], tuple[slice, ...]]] = [((unit.stop - unit.start,), ())]
        for sizes in self._request.array.chunks[1:]:
            stops = np.cumsum(sizes).tolist()
            slices = [slice(stop - int(size), stop) for size, stop in zip(sizes, stops, strict=True)]
            places = [((*shape, s.stop - s.start), (*place, s)) for shape, place in places for s in slices]
        return places

    # Batches

    def _fill(self, batch: Array, start: int, filled: int, stop: int) -> int:
        """Copy what has been computed of the rows from ``filled`` on; return how far it goes."""
        while self._chunks and filled < stop:
            unit, blocks = self._chunks[0]
            last = min(stop, unit.stop)
            if last > filled:
                for block, (_, place) in zip(blocks, self._block_places(unit), strict=True):
                    rows = block[filled - unit.start : last - unit.start]
                    np.copyto(batch[(slice(filled - start, last - start), *place)], rows, casting="same_kind")
                filled = last
            if last == unit.stop:
                self._chunks.popleft()
        return filled

    def _take_frame(self, start: int, stop: int) -> pd.DataFrame:
        frame = self._request.frame
        if frame is None:
            return pd.DataFrame({ROW_NUMBER: np.arange(start, stop, dtype=np.int64)})
        if isinstance(frame, pd.DataFrame):
            return _batch_frame([frame.iloc[start:stop]], start, stop)
        parts, taken = [], start
        while self._frames and taken < stop:
            first, partition = self._frames[0]
            last = min(stop, first + len(partition))
            if last > taken:
                parts.append(partition.iloc[taken - first : last - first])
                taken = last
            if last == first + len(partition):
                self._frames.popleft()
                self._held_frame_rows -= len(partition)
        return _batch_frame(parts, start, stop)


def _batch_frame(parts: list[pd.DataFrame], start: int, stop: int) -> pd.DataFrame:
    """Join parts of partitions into a frame of its own, with the row numbers as last column."""
    batch: pd.DataFrame = concat(parts) if len(parts) > 1 else parts[0].copy()
    batch.index = pd.RangeIndex(len(batch))
    if parts[0].index.name == ROW_NUMBER:
        batch[ROW_NUMBER] = np.concatenate([part.index.to_numpy() for part in parts])
    elif ROW_NUMBER not in batch.columns:
        batch[ROW_NUMBER] = np.arange(start, stop, dtype=np.int64)
    elif batch.columns[-1] != ROW_NUMBER:
        batch[ROW_NUMBER] = batch.pop(ROW_NUMBER)
    return batch


def _new_array(buffers: Buffers, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an array of undefined content, in memory used again where that is possible."""
    if dtype.kind not in "biufc" or not math.prod(shape):
        return np.empty(shape, dtype)
    return buffers.take(shape[0], math.prod(shape[1:]), dtype).reshape(shape)
