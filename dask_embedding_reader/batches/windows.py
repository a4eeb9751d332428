"""Batches of selected rows in any order: the rows of a window are read as they lie in files, and picked from memory.

A window is what a shuffled selection mixes, or as much of another one as is worth sorting. While batches are picked
from one window, the next one is read, as far as both fit into the memory limit.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dask_embedding_reader._common.budget import Budget, Projection
from dask_embedding_reader._common.memory import Buffers
from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader.batches.metadata import Form
from dask_embedding_reader.batches.pace import (
    PICKED_ROW_NBYTES,
    count_threads,
    metadata_row_nbytes,
    read_row_nbytes,
    reading_nbytes,
)
from dask_embedding_reader.batches.request import BatchRequest
from dask_embedding_reader.batches.selected import read_metadata
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import PickedFile, picked_files
from dask_embedding_reader.formats.base import Array, default_piece_rows
from dask_embedding_reader.formats.casting import cast_into
from dask_embedding_reader.formats.picking import SCRATCH_NBYTES, by_group, read_picked
from dask_embedding_reader.rows.selection import Int64s, Rows

_WINDOW_NBYTES = 128_000_000
"""Rows in any other order than a shuffled one are sorted and read so many at a time, unless the limit is narrower."""

_TIMES_THREADS = 4
"""So many times as many threads read the parts of a window of files elsewhere, which are smaller than pieces."""

_LARGE_NBYTES = 2**20
"""Batches of so many bytes are made in memory that is used again: new memory takes longer than what is put into it."""


def _window_dtype(manifest: Manifest, request: BatchRequest) -> np.dtype[Any]:
    """Return what a window holds: the stored dtype, which is mostly the smaller one, if the other can hold all of it.

    Else vectors are cast while they are read, which tells what is lost, and of which file.
    """
    return manifest.dtype if np.can_cast(manifest.dtype, request.dtype, "safe") else request.dtype


def _row_nbytes(manifest: Manifest, request: BatchRequest) -> int:
    """Return what a row of a window takes: its vector, its metadata, and its number."""
    vector_nbytes = manifest.dimension * _window_dtype(manifest, request).itemsize
    return vector_nbytes + metadata_row_nbytes(manifest) + PICKED_ROW_NBYTES


def window_rows(manifest: Manifest, request: BatchRequest) -> int:
    """Return how many rows of a selection are best read in one go."""
    assert request.rows is not None
    return request.rows.window_rows or default_piece_rows(read_row_nbytes(manifest, request), _WINDOW_NBYTES)


def project_windows(manifest: Manifest, request: BatchRequest) -> Projection:
    """Return what a window, a batch that is picked and another one that is worked on take; ahead is the next window."""
    span = request.stop - request.start
    window = min(window_rows(manifest, request), span) * _row_nbytes(manifest, request)
    batch_row_nbytes = manifest.dimension * request.dtype.itemsize + metadata_row_nbytes(manifest)
    batch = min(request.batch_rows, span) * batch_row_nbytes
    threads = _count_threads(manifest, request)
    reading = reading_nbytes(manifest, request, _part_rows(manifest, request), threads)
    return Projection(2 * batch + window, reading, window)


def _part_rows(manifest: Manifest, request: BatchRequest) -> int:
    """Return how many rows of a window are read by one thread in one go."""
    nbytes = 2 * SCRATCH_NBYTES if manifest.vectors.is_local else SCRATCH_NBYTES
    return request.max_piece_rows or default_piece_rows(read_row_nbytes(manifest, request), nbytes)


def _count_threads(manifest: Manifest, request: BatchRequest) -> int:
    """Return how many parts of a window are read at the same time.

    Of files elsewhere they are of some MB where pieces of consecutive rows have 32 MB: four times as many, 64, come in
    two thirds of the time, at 30 ms and 60 MB/s for each.
    """
    threads = count_threads(manifest, request)
    if request.threads or manifest.vectors.is_local or manifest.vectors.has_groups:
        return threads
    return max(threads, min(_TIMES_THREADS * threads, request.limit_nbytes // (8 * SCRATCH_NBYTES)))


class _Source(NamedTuple):
    """What windows are read from, into what, and by which threads."""

    manifest: Manifest
    """The collection."""
    rows: Rows
    """Its rows in the order in which they are handed out."""
    form: Form
    """What metadata are handed out as."""
    dtype: np.dtype[Any]
    """What a window holds."""
    part_rows: int
    """So many rows are read by one thread at a time."""
    preparing: Executor
    """A thread that sorts rows, and waits for memory: another one than those that read the window before."""
    pool: Executor
    """The threads that read."""
    buffers: Buffers
    """The memory of windows and of large batches."""


class WindowReading:
    """One pass over selected rows, window by window."""

    def __init__(self, manifest: Manifest, request: BatchRequest, form: Form) -> None:
        assert request.rows is not None
        self._request = request
        projected = project_windows(manifest, request)
        self._ahead = projected.needed + projected.ahead <= Budget(request.limit_nbytes).left_nbytes
        most = window_rows(manifest, request)
        if not self._ahead:
            most = max(1, min(most, request.limit_nbytes // (4 * _row_nbytes(manifest, request))))
        self._spans = _windows(request.rows, request.start, request.stop, most)
        window_dtype = _window_dtype(manifest, request)
        window_nbytes = most * manifest.dimension * window_dtype.itemsize
        batch_nbytes = request.batch_rows * manifest.dimension * request.dtype.itemsize
        self._stopped = threading.Event()
        self._source = _Source(
            manifest,
            request.rows,
            form,
            window_dtype,
            _part_rows(manifest, request),
            preparing=stoppable_pool(1, self._stopped),
            pool=stoppable_pool(_count_threads(manifest, request), self._stopped),
            buffers=Buffers(2 * window_nbytes + 2 * batch_nbytes),
        )
        self._windows: deque[_Window] = deque()

    def finish(self, stop: int) -> None:
        """Wait until the first of the rows before ``stop`` are there; have the next window read from then on."""
        del stop
        is_first = not self._windows
        if is_first:
            self._start()
        self._windows[0].wait()
        if is_first and self._ahead:  # not before: nothing shall come between the first rows
            self._start()

    def _start(self) -> None:
        span = next(self._spans, None)
        if span is not None:
            self._windows.append(_Window(self._source, span))

    def take(self, start: int, stop: int) -> tuple[Array, Any]:
        """Hand out a finished batch."""
        manifest, form, dtype = self._source.manifest, self._source.form, self._request.dtype
        shape = stop - start, manifest.dimension
        is_large = math.prod(shape) * dtype.itemsize >= _LARGE_NBYTES
        out = self._source.buffers.take(shape, dtype) if is_large else np.empty(shape, dtype)
        frames, first = [], start
        while first < stop:
            window = self._windows[0]
            window.wait()
            last = min(stop, window.stop)
            frames.append(window.pick(first, last, out[first - start : last - start]))
            if last == window.stop:
                self._windows.popleft()
                del window  # the one after the next is read into its memory
                self._start()
            first = last
        if len(frames) == 1 and manifest.metadata is None:  # made for this batch: nothing to be cut out or joined
            return out, frames[0]
        return out, form.join(frames) if frames[0] is not None else None

    def close(self) -> None:
        """Stop reading and let go of all memory."""
        self._stopped.set()
        for pool in (self._source.preparing, self._source.pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._windows.clear()
        self._source.buffers.close()


class _Window:
    """The rows of some positions: read in the order of files, handed out in their own."""

    def __init__(self, source: _Source, span: tuple[int, int]) -> None:
        self._source = source
        self.start, self.stop = span
        self._numbers = self._ranks = np.empty(0, np.int64)
        self._vectors: Array = np.empty((0, 0))
        self._frame: Any = None
        self._reads: list[Future[None]] = []
        self._prepared = source.preparing.submit(self._prepare)

    def _prepare(self) -> None:
        """Sort the rows, and start to read them."""
        manifest, submit = self._source.manifest, self._source.pool.submit
        numbers = self._source.rows.numbers(self.start, self.stop)
        ascending, ranks = _sort(numbers)
        self._numbers, self._ranks = numbers, ranks
        self._vectors = self._source.buffers.take((len(numbers), manifest.dimension), self._source.dtype)
        if manifest.metadata is not None:
            self._reads.append(submit(self._read_frame, manifest.metadata))
        for first, picked in _parts(manifest.vectors, ascending, self._source.part_rows):
            self._reads.append(submit(self._read, picked, self._vectors[first : first + len(picked.rows)]))

    def _read(self, picked: PickedFile, out: Array) -> None:
        manifest = self._source.manifest
        read_picked(manifest.format.vectors, manifest.columns, picked.header, picked.rows, [out])

    def _read_frame(self, files: FileTable) -> None:
        self._frame = read_metadata(self._source.manifest, files, self._numbers, self._source.form)

    def wait(self) -> None:
        """Wait until all is read."""
        self._prepared.result()
        while self._reads:
            self._reads[-1].result()
            self._reads.pop()

    def pick(self, start: int, stop: int, out: Array) -> Any:
        """Put the vectors of some positions into an array; return their metadata."""
        here = slice(start - self.start, stop - self.start)
        ranks = self._ranks[here]
        if out.dtype == self._vectors.dtype:
            np.take(self._vectors, ranks, axis=0, out=out, mode="clip")  # without clipping numpy makes a copy first
        else:
            cast_into(out, self._vectors[ranks])
        if self._frame is None:
            return self._source.form.of_none(self._numbers[here])
        return self._frame[here]


def _sort(numbers: Int64s) -> tuple[Int64s, Int64s]:
    """Return row numbers in ascending order, and where each of them is then."""
    # With their places in the same integers: sorted in half the time that it takes to find the order.
    bits, places = len(numbers).bit_length(), np.arange(len(numbers))
    both = numbers << bits
    both |= places
    both.sort()
    ranks = np.empty_like(numbers)
    ranks[both & ((1 << bits) - 1)] = places
    both >>= bits
    return both, ranks


def _windows(rows: Rows, start: int, stop: int, most_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the positions that are read in one go."""
    for first, last in pairwise([start, *rows.windows(start, stop).tolist(), stop]):
        count = -(-(last - first) // most_rows)
        step = -(-(last - first) // count)
        for position in range(first, last, step):
            yield position, min(position + step, last)


def _parts(files: FileTable, numbers: Int64s, part_rows: int) -> Iterator[tuple[int, PickedFile]]:
    """Cut sorted rows into parts of one file each, where row groups end, or by their number; with the first place."""
    place = 0
    for picked in picked_files(files, numbers, ascending=True):
        if picked.header.group_rows:
            spans = by_group(picked.header, picked.rows)
        else:
            spans = pairwise([*range(0, len(picked.rows), part_rows), len(picked.rows)])
        for start, stop in spans:
            yield place + start, picked._replace(rows=picked.rows[start:stop], places=None)
        place += len(picked.rows)
