"""Batches of a collection, in order, within a memory limit.

Threads read pieces straight into the memory of the batches that they belong to, ahead of the consumer. What may be read
ahead is decided in the consumer's own thread, whenever it asks for a batch: every byte that is held (batches being
filled, finished ones, the one that the consumer works on, decoded metadata, what decoding needs) counts against the
limit before a piece is started. Nothing runs that was not asked for, so that leaving the loop has nothing to wait for.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_embedding_reader._common.memory import Buffers, Slot
from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.batches.metadata import FRAMES, TABLES, Form, numbered
from dask_embedding_reader.batches.selected import SelectedRead, metadata_reads, vector_reads
from dask_embedding_reader.batches.windows import WindowReading, are_few, window_nbytes, window_rows
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import ReadPlan, make_plan
from dask_embedding_reader.formats.base import (
    DEFAULT_PIECE_NBYTES,
    Array,
    FilePart,
    GroupedFormat,
    PartReader,
    cut_parts,
    default_piece_rows,
)
from dask_embedding_reader.formats.columns import open_columns, read_columns
from dask_embedding_reader.formats.parquet.read import DECODER_NBYTES, decoder_nbytes, footers_nbytes
from dask_embedding_reader.formats.picking import SCRATCH_NBYTES
from dask_embedding_reader.rows import Int64s, Rows, Stretch
from dask_embedding_reader.storage.store import most_connections

_LOCAL_PIECE_NBYTES = 8 * 2**20
"""Local pieces: large enough that a read costs nothing beside its bytes, small enough that all threads get some."""

_REMOTE_THREADS = 16

_MIN_PIECE_NBYTES = 2**18

_MOST_FILES = 64
"""Of small files so many are read by one job, which takes ten times as long as to read a row."""

_MOST_REMOTE_FILES = 8
"""The same of metadata elsewhere: as many are asked for at the same time, by each of the threads that read."""

_METADATA_ROWS = 8_192
"""Rows of metadata that are decoded and turned into a frame together."""

METADATA_ROW_NBYTES = 256
"""What a row of metadata is taken to weigh until the first have been seen."""

Batch = tuple[Array, pd.DataFrame]
TableBatch = tuple[Array, "pa.Table | None"]
T = TypeVar("T")


class BatchRequest(NamedTuple):
    """What the caller of a reader asks for, checked."""

    batch_rows: int
    """Rows of each batch but the last."""
    start: int
    """The first row."""
    stop: int
    """The row after the last one."""
    max_piece_rows: int | None
    """The largest piece that is read at once; by default what suits the storage and the limit."""
    threads: int | None
    """Pieces read at the same time; by default what suits the storage."""
    limit_nbytes: int
    """How much memory may be held."""
    dtype: np.dtype[Any]
    """The dtype of the batches."""
    show_progress: bool
    """Whether to show a progress bar, where somebody watches."""
    rows: Rows | None = None
    """Selected rows, of which ``start`` and ``stop`` are positions; None where they are rows of the collection."""

    def numbers(self, start: int, stop: int) -> Int64s:
        """Return the row numbers of the rows ``[start, stop)``."""
        return np.arange(start, stop, dtype=np.int64) if self.rows is None else self.rows.numbers(start, stop)


def span_of(rows: Rows) -> tuple[int, int, Rows | None]:
    """Return what a request calls ``start``, ``stop`` and ``rows``, for all of a selection."""
    if isinstance(rows, Stretch) and rows.is_contiguous:
        return rows.values.start, rows.values.start + len(rows), None
    return 0, len(rows), rows


def read_batches(manifest: Manifest, request: BatchRequest) -> Iterator[Batch]:
    """Return an iterator of the batches of a collection.

    Warns
    -----
    UserWarning
        If a single batch is larger than the memory limit: batches are then read one at a time.
    """
    batch_nbytes = min(request.batch_rows, request.stop - request.start) * manifest.dimension * request.dtype.itemsize
    if batch_nbytes > request.limit_nbytes:
        warnings.warn(
            f"one batch of {counted(request.batch_rows, 'row')} is {batch_nbytes:,} bytes, the limit is "
            f"{request.limit_nbytes:,} (max_ram_usage_in_bytes): batches are read one at a time, with nothing read "
            "ahead; a smaller batch_size or a higher limit is faster",
            stacklevel=3,
        )
    elif _is_read_by_windows(manifest, request) and window_nbytes(manifest, request) > request.limit_nbytes:
        warnings.warn(
            f"rows in this order take about {window_nbytes(manifest, request):,} bytes: two windows of "
            f"{counted(window_rows(manifest, request), 'row')}, which are read in one go, and two batches; the limit "
            f"is {request.limit_nbytes:,} (max_ram_usage_in_bytes): windows are read in parts, with nothing read "
            "ahead; a smaller buffer_rows (of shuffle) or a higher limit is faster",
            stacklevel=3,
        )
    return _iterate(manifest, request, FRAMES)


def read_table_batches(manifest: Manifest, request: BatchRequest) -> Iterator[TableBatch]:
    """Return an iterator of the batches of a collection with their metadata as Arrow columns: no value is changed."""
    return _iterate(manifest, request, TABLES)


def _is_read_by_windows(manifest: Manifest, request: BatchRequest) -> bool:
    return request.rows is not None and (not request.rows.is_ascending or are_few(manifest, request))


def _iterate(manifest: Manifest, request: BatchRequest, form: Form) -> Iterator[tuple[Array, Any]]:
    reading = (WindowReading if _is_read_by_windows(manifest, request) else _Reading)(manifest, request, form)
    rows = request.stop - request.start
    progress = progress_bar(request.show_progress, rows, "reading", " embeddings", manifest.byte_per_item)
    try:
        for first in range(request.start, request.stop, request.batch_rows):
            last = min(first + request.batch_rows, request.stop)
            reading.finish(last)
            progress.update(last - first)
            yield reading.take(first, last)
    finally:
        reading.close()
        progress.close()


# ---------------------------------------------------------------------------------------------------------------------
# What is read, piece by piece


OpenReader = Callable[[Sequence[FilePart]], Callable[[Any], Any]]
"""Given parts of files, returns what reads the next rows of them."""


Wanted = Callable[[], Any]
"""Returns what a job shall read: rows, or arrays to fill; None while there is no memory for them."""


@dataclass(slots=True)
class _Job:
    """The rows of one piece, to be read in one go."""

    start: int
    """The first row, counted in the collection."""
    stop: int
    """The row after the last one."""
    lane: _Lane
    """Where it is read."""


def _jobs(plan: ReadPlan, open_reader: OpenReader, pool: _Pool, bounds: range = range(0)) -> Iterator[_Job]:
    """Turn a plan into jobs, in order. The pieces of one row group share a lane, which decodes it once.

    Pieces that reach over one of the rows ``bounds`` are cut there.
    """
    segments = plan.whole_segments()
    for position in range(len(segments)):
        start, stop = segments[position]
        parts = plan.files.parts(start, stop)
        lane = _Lane(pool, partial(open_reader, parts))
        for a, b in _cut(start, stop, int(plan.piece_rows[position]), bounds):
            if not plan.files.has_groups:
                lane = _Lane(pool, partial(open_reader, tuple(cut_parts(parts, a - start, b - start))))
            yield _Job(a, b, lane)


def _jobs_of(reads: Iterator[SelectedRead], pool: _Pool) -> Iterator[_Job]:
    """Turn reads into jobs, in order."""
    lane = opened = None
    for read in reads:
        if lane is None or read.open is not opened:
            lane, opened = _Lane(pool, read.open), read.open
        yield _Job(read.start, read.stop, lane)


def _cut(start: int, stop: int, rows: int, bounds: range) -> Iterator[tuple[int, int]]:
    """Cut the rows ``[start, stop)`` at bounds, and what lies between them into pieces."""
    while start < stop:
        bound = next(iter(bounds[bisect_right(bounds, start) :]), stop)
        yield start, (start := min(start + rows, bound, stop))


class _Pool:
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
        self.closed.set()
        self._executor.shutdown(wait=False, cancel_futures=True)


class _Lane:
    """Runs jobs one after the other, each continuing to read where the last one stopped.

    What reads may return a function, which does the rest of a job: at the same time as the next one is run.
    """

    def __init__(self, pool: _Pool, open_reader: Callable[[], Callable[[Any], Any]]) -> None:
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


class _Window:
    """Jobs in order, of which some have been started and not been waited for."""

    def __init__(self, jobs: Iterator[_Job]) -> None:
        self._jobs = jobs
        self.next = next(jobs, None)
        self.started: deque[tuple[_Job, Future[Any]]] = deque()

    def start(self, wanted: Wanted) -> None:
        """Start the next job."""
        job = self.next
        assert job is not None
        self.started.append((job, job.lane.submit(wanted)))
        self.next = next(self._jobs, None)

    def finish(self, stop: int) -> list[tuple[_Job, Any]]:
        """Wait for the rows before ``stop``; return what was read of them."""
        wanted = list(takewhile(lambda started: started[0].start < stop, self.started))
        if wanted:
            # For the last one first: to wake up for each of them takes the cores from those who read.
            wanted[-1][1].exception()
        results = [(job, future.result()) for job, future in wanted]
        for _ in wanted:
            self.started.popleft()
        return results


# ---------------------------------------------------------------------------------------------------------------------
# Reading ahead


class _Reading:
    """One pass over a range of rows: what has been started, what is finished, and what it all weighs."""

    def __init__(self, manifest: Manifest, request: BatchRequest, form: Form) -> None:
        self._manifest, self._request, self._form = manifest, request, form
        vectors = manifest.vectors
        local = all(store.is_local for store in vectors.stores)
        threads = request.threads or most_connections(vectors.stores)
        piece_rows = _piece_rows(manifest, request, threads, local)
        self._pool = _Pool(threads)
        self._threads, self._piece_rows = threads, piece_rows
        # Pieces are cut where large batches end: else the end of one could not be read before the next one has memory.
        self._large = local and request.batch_rows > piece_rows
        bounds = range(request.start, request.stop, request.batch_rows) if self._large else range(0)
        # Remote files are read each by itself, many at the same time: they are waited for.
        plan = make_plan(vectors, request.start, request.stop, piece_rows, _MOST_FILES if local else 1)
        # Whether row groups must be decoded whole, several at a time: local ones show it when they are read.
        self._decodes_groups = threading.Event()
        if request.rows is None:
            open_rows = _opener(manifest, self._decodes_groups if local else None)
            jobs = _jobs(plan, open_rows, self._pool, bounds)
            metadata_jobs = self._metadata_jobs(manifest.metadata)
        else:
            jobs, metadata_jobs = self._selected_jobs(request.rows, piece_rows, bounds)
        self._vectors, self._metadata = _Window(jobs), _Window(metadata_jobs)
        self._slots: dict[int, Slot] = {}
        self._frames: deque[tuple[int, Any]] = deque()
        self._numbered: deque[pd.DataFrame] = deque()
        self._batch_nbytes = request.batch_rows * manifest.dimension * request.dtype.itemsize
        self._buffers = Buffers(max(2 * self._batch_nbytes, request.limit_nbytes // 4))
        self._ahead_rows = 0
        self._most_batches: int | None = None
        self._look_ahead(decodes_groups=vectors.has_groups and (not local or request.rows is not None))
        self._reading_nbytes = _reading_nbytes(manifest, threads, piece_rows, local)
        if request.rows is not None:
            self._reading_nbytes += threads * SCRATCH_NBYTES
        self._reads_parquet = vectors.has_groups or manifest.metadata is not None
        self._metadata_row_nbytes = METADATA_ROW_NBYTES if manifest.metadata else 0
        self._metadata_start = request.start

    def _look_ahead(self, *, decodes_groups: bool) -> None:
        """Set how far to read ahead: as many row groups as there are threads where these must be decoded whole."""
        vectors, rows = self._manifest.vectors, self._piece_rows
        parallel_rows = self._threads * max(rows, int(vectors.group_rows.max()) if decodes_groups else 0)
        # Remote pieces end with their files. A batch and a piece for each connection keep all busy: more takes memory.
        local = all(store.is_local for store in vectors.stores)
        ahead = 4 * rows if local else min(rows, int(vectors.rows.max()))
        self._ahead_rows = max(
            self._request.batch_rows, self._threads * ahead, parallel_rows if vectors.has_groups else 0
        )
        # Those being filled, and the one that the caller works on; None: as many as there is room for.
        self._most_batches = 1 + -(-parallel_rows // self._request.batch_rows) if self._large else None

    def _selected_jobs(self, rows: Rows, piece_rows: int, bounds: range) -> tuple[Iterator[_Job], Iterator[_Job]]:
        """Return the jobs for the vectors of selected rows that ascend, and for their metadata."""
        manifest, span = self._manifest, (self._request.start, self._request.stop)
        vectors = _jobs_of(vector_reads(manifest, rows, span, piece_rows, bounds), self._pool)
        if manifest.metadata is None:
            return vectors, iter(())
        metadata = metadata_reads(manifest, manifest.metadata, rows, span, _METADATA_ROWS, self._form)
        return vectors, _jobs_of(metadata, self._pool)

    def _metadata_jobs(self, files: FileTable | None) -> Iterator[_Job]:
        if files is None:
            return iter(())
        fields, make = self._manifest.fields, self._form.make
        names = [field.name for field in fields]

        def open_frames(parts: Sequence[FilePart]) -> Callable[[range], tuple[Any, int]]:
            header, start, stop = parts[0]
            if len(parts) > 1:  # all rows at once
                return lambda rows: make(fields, read_columns(parts, fields), rows, header.file.url)
            read = open_columns(header, names, start, stop)
            return lambda rows: make(fields, read(len(rows)), rows, header.file.url)

        local = all(store.is_local for store in files.stores)
        most_files = _MOST_FILES if local else _MOST_REMOTE_FILES
        plan = make_plan(files, self._request.start, self._request.stop, _METADATA_ROWS, most_files)
        return _jobs(plan, open_frames, self._pool)

    def finish(self, stop: int) -> None:
        """Wait until all rows before ``stop`` are there; keep reading ahead all the while."""
        self._start_jobs(stop)
        if self._large:
            self._make_memory(stop)
        self._vectors.finish(stop)
        for job, (frame, nbytes) in self._metadata.finish(stop):
            self._frames.append((job.start, frame))
            self._metadata_row_nbytes = max(self._metadata_row_nbytes, nbytes // len(frame))

    def _make_memory(self, stop: int) -> None:
        """See that the batch that is asked for need not wait for memory."""
        slot = self._slots[self._batch_of(stop - 1)]
        if slot.lacks_memory():
            self._most_batches = None  # the caller keeps batches: there is nothing to wait for
        slot.make()

    def take(self, start: int, stop: int) -> tuple[Array, Any]:
        """Hand out a finished batch."""
        array = self._slots.pop(self._batch_of(start)).hand_over()
        self._metadata_start = start  # what the caller works on is held too
        return array, self._take_frame(start, stop)

    def _take_frame(self, start: int, stop: int) -> Any:
        if self._manifest.metadata is None:
            if self._form is TABLES:
                return None
            if not self._numbered:
                self._numbered.extend(self._number_rows(start))
            return self._numbered.popleft()
        parts = []
        while start < stop:
            first, frame = self._frames[0]
            last = min(stop, first + len(frame))
            parts.append(frame[start - first : last - first])
            if last == first + len(frame):
                self._frames.popleft()
            start = last
        return self._form.join(parts)

    def _number_rows(self, start: int) -> Iterator[pd.DataFrame]:
        """Make the frames of several batches without metadata.

        Made one by one they take three times as long: what is read drives pandas out of the processor's cache.
        """
        rows = self._request.batch_rows
        stop = min(self._request.stop, start + max(1, _METADATA_ROWS // rows) * rows)
        numbers = self._request.numbers(start, stop)
        return (numbered(numbers[first : first + rows]) for first in range(0, len(numbers), rows))

    def close(self) -> None:
        """Stop reading and let go of all memory."""
        self._pool.close()
        self._buffers.close()

    def _start_jobs(self, needed: int) -> None:
        """Start what the batch that ends at ``needed`` needs, and then what fits into the limit ahead of it."""
        if self._decodes_groups.is_set():
            self._decodes_groups = threading.Event()  # those that read set the one they know
            self._look_ahead(decodes_groups=True)
        while True:
            upcoming = [window for window in (self._metadata, self._vectors) if window.next]
            if not upcoming:
                return
            window = min(upcoming, key=_next_start)
            job = window.next
            assert job is not None
            if job.start >= needed and (job.start >= needed + self._ahead_rows or not self._fits(job, window)):
                return
            window.start(self._parts(job) if window is self._vectors else partial(_same, range(job.start, job.stop)))

    def _fits(self, job: _Job, window: _Window) -> bool:
        """Tell whether a job may be started ahead of need."""
        batches = len(self._slots) + 1
        if window is self._vectors:
            batches += sum(batch not in self._slots for batch in self._batches(job))
        if self._most_batches is not None:
            batches = min(batches, self._most_batches)
        held = max(batches * self._batch_nbytes, self._buffers.lent_nbytes + self._buffers.free_nbytes)
        if self._metadata.next is not None or self._frames or self._metadata.started:
            metadata_stop = job.stop if window is self._metadata else _next_start(self._metadata, job.stop)
            held += (metadata_stop - self._metadata_start) * self._metadata_row_nbytes
        held += footers_nbytes() if self._reads_parquet else 0
        return held + self._reading_nbytes <= self._request.limit_nbytes

    def _batch_of(self, row: int) -> int:
        return (row - self._request.start) // self._request.batch_rows

    def _batches(self, job: _Job) -> range:
        return range(self._batch_of(job.start), self._batch_of(job.stop - 1) + 1)

    def _parts(self, job: _Job) -> Wanted:
        """Return what gives the parts of batches that a job fills, as soon as there is memory for these batches."""
        request, parts = self._request, []
        for batch in self._batches(job):
            first = request.start + batch * request.batch_rows
            rows = min(request.batch_rows, request.stop - first)
            if batch not in self._slots:
                most_nbytes = None if self._most_batches is None else self._most_batches * self._batch_nbytes
                shape = rows, self._manifest.dimension
                self._slots[batch] = Slot(self._buffers, shape, request.dtype, most_nbytes)
            parts.append((self._slots[batch], slice(max(0, job.start - first), min(rows, job.stop - first))))
        return partial(_wait_for_parts, parts)


def _opener(manifest: Manifest, decodes_groups: threading.Event | None) -> OpenReader:
    """Return what opens readers of vectors: of local row groups those that read several parts at a time.

    These tell whether they decode row groups whole instead.
    """
    columns, vectors = manifest.columns, manifest.format.vectors
    if not manifest.vectors.has_groups or decodes_groups is None or not isinstance(vectors, GroupedFormat):
        if decodes_groups is not None and manifest.vectors.has_groups:
            decodes_groups.set()
        return _in_turn(lambda part: vectors.open_rows(part.header, columns, part.start, part.stop))

    def open_part(part: FilePart) -> PartReader:
        read = vectors.open_parts(part.header, columns, part.start, part.stop)

        def read_rows(outs: Sequence[Array]) -> Callable[[], None] | None:
            rest = read(outs)
            if rest is None:
                decodes_groups.set()
            return rest

        return read_rows

    return _in_turn(open_part)


def _in_turn(open_part: Callable[[FilePart], PartReader]) -> OpenReader:
    """Return what opens readers of parts of files that read one after the other."""

    def open_all(parts: Sequence[FilePart]) -> PartReader:
        if len(parts) == 1:
            return open_part(parts[0])
        waiting = deque(parts)
        left: list[tuple[PartReader, int]] = []  # what reads the part that was begun, and its rows

        def read(outs: Sequence[Array]) -> Callable[[], None] | None:
            rests = []
            for out in outs:
                done = 0
                while done < len(out):
                    reader, rows = left.pop() if left else (open_part(waiting[0]), waiting.popleft().rows)
                    count = min(rows, len(out) - done)
                    rests.append(reader([out[done : done + count]]))
                    if count < rows:
                        left.append((reader, rows - count))
                    done += count
            todo = [rest for rest in rests if rest is not None]
            return partial(_call_all, todo) if todo else None

        return read

    return open_all


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _wait_for_parts(parts: list[tuple[Slot, slice]]) -> list[Array] | None:
    arrays = []
    for slot, rows in parts:
        if (array := slot.wait()) is None:
            return None
        arrays.append(array[rows])
    return arrays


def _same(value: T) -> T:
    return value


def row_numbers(start: int, stop: int) -> pd.DataFrame:
    """Return the frame of a batch without metadata."""
    return numbered(np.arange(start, stop, dtype=np.int64))


def _next_start(window: _Window, default: int = 0) -> int:
    return window.next.start if window.next else default


def _piece_rows(manifest: Manifest, request: BatchRequest, threads: int, local: bool) -> int:
    """Return how many rows are read at once."""
    if request.max_piece_rows is not None:
        return request.max_piece_rows
    most = _LOCAL_PIECE_NBYTES if local else DEFAULT_PIECE_NBYTES
    share = request.limit_nbytes // (4 * threads)
    return default_piece_rows(manifest.byte_per_item, max(_MIN_PIECE_NBYTES, min(most, share)))


def _reading_nbytes(manifest: Manifest, threads: int, piece_rows: int, local: bool) -> int:
    """Estimate what reading itself holds beside the batches: decoders, and the bodies of answers."""
    most_rows = int(manifest.vectors.group_rows.max()) if manifest.vectors.has_groups else 0
    decoders = decoder_nbytes(manifest.columns, most_rows, manifest.dtype.itemsize) if most_rows else 0
    decoders += DECODER_NBYTES if manifest.metadata is not None else 0
    bodies = 0 if local or manifest.vectors.has_groups else threads * piece_rows * manifest.byte_per_item
    return decoders + bodies
