"""Batches of a collection, in order, within a memory limit.

Threads read pieces straight into the memory of the batches that they belong to, ahead of the consumer. What may be read
ahead is decided in the consumer's own thread, whenever it asks for a batch: every byte that is held (batches being
filled, finished ones, the one that the consumer works on, decoded metadata, what decoding needs) counts against the
limit before a piece is started. Nothing runs that was not asked for, so that leaving the loop has nothing to wait for.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import pandas as pd

from dask_embedding_reader._common.budget import Budget
from dask_embedding_reader._common.memory import Buffers, Slot
from dask_embedding_reader._common.notices import warn
from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.threads import check_process
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.batches.few import FewReading, are_few
from dask_embedding_reader.batches.jobs import Job, JobQueue, OpenReader, Pool, Wanted, jobs_of_plan, jobs_of_reads
from dask_embedding_reader.batches.metadata import FRAMES, TABLES, Form, numbered
from dask_embedding_reader.batches.pace import MOST_FILES, MOST_REMOTE_FILES, make_pace, project_batches
from dask_embedding_reader.batches.request import Batch, BatchRequest, TableBatch
from dask_embedding_reader.batches.selected import metadata_reads, vector_reads
from dask_embedding_reader.batches.windows import WindowReading, project_windows, window_rows
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import make_plan
from dask_embedding_reader.formats.base import (
    Array,
    FilePart,
    GroupedFormat,
    PartReader,
)
from dask_embedding_reader.formats.columns import open_columns, read_columns
from dask_embedding_reader.rows.selection import Rows

_NUMBERED_ROWS = 8_192
"""Frames that hold nothing but the numbers of so many rows are made together."""

_Kind: TypeAlias = "type[FewReading] | type[WindowReading] | type[_Reading]"


def read_batches(manifest: Manifest, request: BatchRequest) -> Iterator[Batch]:
    """Return an iterator of the batches of a collection.

    Warns
    -----
    UserWarning
        If two batches are larger than the memory limit: they are then read one at a time.
    """
    kind = _kind_of_reading(manifest, request)
    if kind is FewReading:
        return _iterate(manifest, request, FRAMES, kind)
    by_windows = kind is WindowReading
    projected = (project_windows if by_windows else project_batches)(manifest, request)
    nbytes = projected.batches + (projected.ahead if by_windows else 0)
    if nbytes > request.limit_nbytes and by_windows:
        warn(
            f"rows in this order take about {nbytes:,} bytes: two windows of "
            f"{counted(window_rows(manifest, request), 'row')}, which are read in one go, and two batches; the limit "
            f"is {request.limit_nbytes:,} (max_ram_usage_in_bytes): windows are read in parts, with nothing read "
            "ahead; a smaller buffer_rows (of shuffle) or a higher limit is faster",
        )
    elif nbytes > request.limit_nbytes:
        warn(
            f"two batches of {counted(request.batch_rows, 'row')}, the one in use and the next, take {nbytes:,} bytes; "
            f"the limit is {request.limit_nbytes:,} (max_ram_usage_in_bytes): batches are read one at a time, with "
            "nothing read ahead; a smaller batch_size or a higher limit is faster",
        )
    return _iterate(manifest, request, FRAMES, kind)


def read_table_batches(manifest: Manifest, request: BatchRequest) -> Iterator[TableBatch]:
    """Return an iterator of the batches of a collection with their metadata as Arrow columns: no value is changed."""
    return _iterate(manifest, request, TABLES, _kind_of_reading(manifest, request))


def _kind_of_reading(manifest: Manifest, request: BatchRequest) -> _Kind:
    if request.rows is None:
        return _Reading
    if are_few(manifest, request):
        return FewReading
    return _Reading if request.rows.is_ascending else WindowReading


def _iterate(manifest: Manifest, request: BatchRequest, form: Form, kind: _Kind) -> Iterator[tuple[Array, Any]]:
    reading = kind(manifest, request, form)
    rows, process = request.stop - request.start, os.getpid()
    progress = progress_bar(request.show_progress, rows, "reading", " embeddings", manifest.byte_per_item)
    try:
        for first in range(request.start, request.stop, request.batch_rows):
            last = min(first + request.batch_rows, request.stop)
            check_process(process)
            reading.finish(last)
            progress.update(last - first)
            yield reading.take(first, last)
    finally:
        reading.close()
        progress.close()


# ---------------------------------------------------------------------------------------------------------------------
# Reading ahead


class _Reading:
    """One pass over a range of rows: what has been started, what is finished, and what it all weighs."""

    def __init__(self, manifest: Manifest, request: BatchRequest, form: Form) -> None:
        self._manifest, self._request, self._form = manifest, request, form
        vectors = manifest.vectors
        local = vectors.is_local
        decodes_groups = vectors.has_groups and (not local or request.rows is not None)
        pace = self._pace = make_pace(manifest, request, decodes_groups=decodes_groups)
        piece_rows = pace.piece_rows
        self._pool = Pool(pace.threads)
        # Pieces are cut where large batches end: else the end of one could not be read before the next one has memory.
        bounds = range(request.start, request.stop, request.batch_rows) if pace.is_large else range(0)
        # Remote files are read each by itself, many at the same time: they are waited for.
        plan = make_plan(vectors, request.start, request.stop, piece_rows, MOST_FILES if local else 1)
        # Whether row groups must be decoded whole, several at a time: local ones show it when they are read.
        self._decodes_groups = threading.Event()
        if request.rows is None:
            open_rows = _opener(manifest, self._decodes_groups if local else None)
            jobs = jobs_of_plan(plan, open_rows, self._pool, bounds)
            metadata_jobs = self._metadata_jobs(manifest.metadata)
        else:
            jobs, metadata_jobs = self._selected_jobs(request.rows, piece_rows, bounds)
        self._vectors, self._metadata = JobQueue(jobs), JobQueue(metadata_jobs)
        self._slots: dict[int, Slot] = {}
        self._frames: deque[tuple[int, Any]] = deque()
        self._numbered: deque[pd.DataFrame] = deque()
        self._batch_nbytes = request.batch_rows * manifest.dimension * request.dtype.itemsize
        # All that is let go of is kept, and counted: given back to the allocator of C, it would not be found by other
        # threads, and 95 MB held under 64.
        self._buffers = Buffers(max(2 * self._batch_nbytes, request.limit_nbytes))
        self._most_batches = pace.most_batches
        self._metadata_row_nbytes = pace.metadata_row_nbytes
        self._metadata_start = self._metadata_stop = request.start
        self._budget = Budget(
            request.limit_nbytes, self._batches_nbytes, self._metadata_nbytes, lambda: pace.reading_nbytes
        )

    def _selected_jobs(self, rows: Rows, piece_rows: int, bounds: range) -> tuple[Iterator[Job], Iterator[Job]]:
        """Return the jobs for the vectors of selected rows that ascend, and for their metadata."""
        manifest, span = self._manifest, (self._request.start, self._request.stop)
        vectors = jobs_of_reads(vector_reads(manifest, rows, span, piece_rows, bounds), self._pool)
        if manifest.metadata is None:
            return vectors, iter(())
        metadata = metadata_reads(manifest, manifest.metadata, rows, span, self._pace.metadata_rows, self._form)
        return vectors, jobs_of_reads(metadata, self._pool)

    def _metadata_jobs(self, files: FileTable | None) -> Iterator[Job]:
        if files is None:
            return iter(())
        fields, make = self._manifest.fields, self._form.make
        names = [field.name for field in fields]

        def open_frames(parts: Sequence[FilePart]) -> Callable[[range], tuple[Any, int]]:
            header, start, stop = parts[0]
            if len(parts) > 1:  # all rows at once
                return lambda rows: make(fields, read_columns(parts, fields), rows, header.file.url)
            read = open_columns(header, names, start, stop, self._pace.metadata_rows)
            return lambda rows: make(fields, read(len(rows)), rows, header.file.url)

        most_files = MOST_FILES if files.is_local else MOST_REMOTE_FILES
        plan = make_plan(files, self._request.start, self._request.stop, self._pace.metadata_rows, most_files)
        return jobs_of_plan(plan, open_frames, self._pool)

    def finish(self, stop: int) -> None:
        """Wait until all rows before ``stop`` are there; keep reading ahead all the while."""
        self._start_jobs(stop)
        if self._pace.is_large:
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
        stop = min(self._request.stop, start + max(1, _NUMBERED_ROWS // rows) * rows)
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
            self._pace = make_pace(self._manifest, self._request, decodes_groups=True)
            self._most_batches = self._pace.most_batches
        while True:
            upcoming = [window for window in (self._metadata, self._vectors) if window.next]
            if not upcoming:
                return
            window = min(upcoming, key=_next_start)
            job = window.next
            assert job is not None
            if job.start >= needed and (job.start >= needed + self._pace.ahead_rows or not self._fits(job, window)):
                return
            if window is self._vectors:
                window.start(self._parts(job))
            else:
                window.start(partial(range, job.start, job.stop))
                self._metadata_stop = job.stop

    def _fits(self, job: Job, window: JobQueue) -> bool:
        """Tell whether a job may be started ahead of need."""
        if window is self._metadata:
            return (job.stop - self._metadata_stop) * self._metadata_row_nbytes <= self._budget.left_nbytes
        batches = len(self._slots) + 1 + sum(batch not in self._slots for batch in self._batches(job))
        if self._most_batches is not None:
            batches = min(batches, self._most_batches)
        return max(0, batches * self._batch_nbytes - self._batches_nbytes()) <= self._budget.left_nbytes

    def _batches_nbytes(self) -> int:
        """Return what the batches take that are filled or worked on, or kept, and memory for those to come."""
        made = self._buffers.lent_nbytes + self._buffers.free_nbytes
        return max(made, min(len(self._slots) + 1, self._most_batches or 2**62) * self._batch_nbytes)

    def _metadata_nbytes(self) -> int:
        return (self._metadata_stop - self._metadata_start) * self._metadata_row_nbytes

    def _batch_of(self, row: int) -> int:
        return (row - self._request.start) // self._request.batch_rows

    def _batches(self, job: Job) -> range:
        return range(self._batch_of(job.start), self._batch_of(job.stop - 1) + 1)

    def _parts(self, job: Job) -> Wanted:
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


def _next_start(window: JobQueue) -> int:
    assert window.next is not None
    return window.next.start
