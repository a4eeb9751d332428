"""Batches of a collection, in order, within a memory limit.

Threads read pieces straight into the memory of the batches that they belong to, ahead of the consumer. What may be read
ahead is decided in the consumer's own thread, whenever it asks for a batch: every byte that is held (batches being
filled, finished ones, the one that the consumer works on, decoded metadata, what decoding needs) counts against the
limit before a piece is started. Nothing runs that was not asked for, so that leaving the loop has nothing to wait for.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from dask_embedding_reader._common.memory import Buffers, Slot
from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.batches.jobs import Job, JobQueue, OpenReader, Pool, Wanted, jobs_of_plan, jobs_of_reads
from dask_embedding_reader.batches.metadata import FRAMES, TABLES, Form, numbered
from dask_embedding_reader.batches.request import Batch, BatchRequest, TableBatch
from dask_embedding_reader.batches.selected import metadata_reads, vector_reads
from dask_embedding_reader.batches.windows import WindowReading, are_few, window_nbytes, window_rows
from dask_embedding_reader.collection.manifest import FileTable, Manifest
from dask_embedding_reader.collection.plan import make_plan
from dask_embedding_reader.formats.base import (
    DEFAULT_PIECE_NBYTES,
    Array,
    FileHeader,
    GroupedFormat,
    default_piece_rows,
)
from dask_embedding_reader.formats.columns import open_columns
from dask_embedding_reader.formats.parquet.read import DECODER_NBYTES, decoder_nbytes, footers_nbytes
from dask_embedding_reader.formats.picking import SCRATCH_NBYTES
from dask_embedding_reader.rows import Rows
from dask_embedding_reader.storage.store import most_connections

_LOCAL_PIECE_NBYTES = 8 * 2**20
"""Local pieces: large enough that a read costs nothing beside its bytes, small enough that all threads get some."""

_REMOTE_THREADS = 16

_MIN_PIECE_NBYTES = 2**18

_METADATA_ROWS = 8_192
"""Rows of metadata that are decoded and turned into a frame together."""

METADATA_ROW_NBYTES = 256
"""What a row of metadata is taken to weigh until the first have been seen."""

T = TypeVar("T")


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
# Reading ahead


class _Reading:
    """One pass over a range of rows: what has been started, what is finished, and what it all weighs."""

    def __init__(self, manifest: Manifest, request: BatchRequest, form: Form) -> None:
        self._manifest, self._request, self._form = manifest, request, form
        vectors = manifest.vectors
        local = all(store.is_local for store in vectors.stores)
        threads = request.threads or most_connections(vectors.stores)
        piece_rows = _piece_rows(manifest, request, threads, local)
        self._pool = Pool(threads)
        self._threads, self._piece_rows = threads, piece_rows
        # Pieces are cut where large batches end: else the end of one could not be read before the next one has memory.
        self._large = local and request.batch_rows > piece_rows
        bounds = range(request.start, request.stop, request.batch_rows) if self._large else range(0)
        plan = make_plan(vectors, request.start, request.stop, piece_rows)
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

    def _selected_jobs(self, rows: Rows, piece_rows: int, bounds: range) -> tuple[Iterator[Job], Iterator[Job]]:
        """Return the jobs for the vectors of selected rows that ascend, and for their metadata."""
        manifest, span = self._manifest, (self._request.start, self._request.stop)
        vectors = jobs_of_reads(vector_reads(manifest, rows, span, piece_rows, bounds), self._pool)
        if manifest.metadata is None:
            return vectors, iter(())
        metadata = metadata_reads(manifest, manifest.metadata, rows, span, _METADATA_ROWS, self._form)
        return vectors, jobs_of_reads(metadata, self._pool)

    def _metadata_jobs(self, files: FileTable | None) -> Iterator[Job]:
        if files is None:
            return iter(())
        fields, make = self._manifest.fields, self._form.make
        names = [field.name for field in fields]

        def open_frames(header: Any, start: int, stop: int) -> Callable[[range], tuple[Any, int]]:
            read = open_columns(header, names, start, stop)
            return lambda rows: make(fields, read(len(rows)), rows, header.file.url)

        plan = make_plan(files, self._request.start, self._request.stop, _METADATA_ROWS)
        return jobs_of_plan(plan, open_frames, self._pool)

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

    def _fits(self, job: Job, window: JobQueue) -> bool:
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
        return lambda header, start, stop: vectors.open_rows(header, columns, start, stop)

    def open_rows(header: FileHeader, start: int, stop: int) -> Callable[[Any], Any]:
        read = vectors.open_parts(header, columns, start, stop)

        def read_parts(outs: Sequence[Array]) -> Callable[[], None] | None:
            rest = read(outs)
            if rest is None:
                decodes_groups.set()
            return rest

        return read_parts

    return open_rows


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


def _next_start(window: JobQueue, default: int = 0) -> int:
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
