"""The window: which units are under way, what they weigh, and the batches that are made of what is finished.

Units are started in order, ahead of the consumer, as far as they fit into the limit. That is decided in the consumer's
own thread, whenever it asks for a batch.
"""

from __future__ import annotations

import math
import os
import sys
import sysconfig
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import dask.array as da
import numpy as np
import pandas as pd
from dask.dataframe.dispatch import concat
from dask.sizeof import sizeof

from dask_embedding_reader._common.arguments import is_numeric
from dask_embedding_reader._common.budget import Budget, Projection
from dask_embedding_reader._common.memory import Buffers, has_own_memory
from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.threads import check_process
from dask_embedding_reader.batches.metadata import numbered
from dask_embedding_reader.batches.pace import METADATA_ROW_NBYTES
from dask_embedding_reader.batches.request import Batch
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.lazy.engines import Cluster, Threads
from dask_embedding_reader.lazy.row_numbers import RowNumbers, has_row_numbers, row_base, trace_rows
from dask_embedding_reader.lazy.schedule import Unit, check_persisted, find_globals, make_graph, make_schedule

if TYPE_CHECKING:
    import distributed

_NEAR_UNITS = 8
"""What is used again so few units later is held rather than computed again, whatever it weighs."""


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments, checked."""

    array: da.Array
    """The array."""
    frame: Any
    """The frame, a Dask one or a pandas one, or None."""
    frame_rows: tuple[int, ...]
    """Rows of each partition of the frame; none for a pandas frame."""
    inner_nbytes: int
    """Bytes that a running unit holds beside its result: what a task takes and what it makes on the way."""
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
    def is_numeric(self) -> bool:
        """Whether the array is of plain numbers, whose bytes say all."""
        return is_numeric(self.array.dtype)

    @property
    def batch_nbytes(self) -> int:
        """Bytes of the array of a batch."""
        return min(self.batch_rows, self.rows) * self.row_nbytes

    def project(self, ahead: int = 0) -> Projection:
        """Return what batches hold, and so many chunks ahead with what they are computed from."""
        chunk = max(self.array.chunks[0], default=0) * self.row_nbytes + self.inner_nbytes
        return Projection(2 * self.batch_nbytes, chunk, ahead * chunk)


def iterate(request: Request) -> Iterator[Batch]:
    """Yield the batches; nothing is computed before the first is asked for."""
    stream, process = _Stream(request), os.getpid()
    progress = progress_bar(request.show_progress, request.rows, "computing", " rows", request.row_nbytes)
    try:
        stream.open()
        for start in range(0, request.rows, request.batch_rows):
            stop = min(start + request.batch_rows, request.rows)
            check_process(process)
            batch = stream.take(start, stop)
            progress.update(stop - start)
            yield batch
            del batch
    finally:
        stream.close()
        progress.close()


class _Stream:
    """One pass over the rows: what has been started, what is finished, and what it all weighs."""

    def __init__(self, request: Request) -> None:
        self._request = request
        graph, self._units, persisted = make_graph(request.array, request.frame, request.frame_rows)
        check_persisted(persisted, request.client)
        self._outputs = [unit.keys for unit in self._units]
        self._graph, self._persisted = graph, persisted
        self._engine: Threads | Cluster = (
            Cluster(graph, self._outputs, persisted, request.client)
            if request.client
            else Threads(graph, self._outputs, request.limit_nbytes, request.inner_nbytes)
        )
        self._inner_nbytes = request.inner_nbytes
        self._next = 0
        self._started: deque[tuple[int, Future[list[Any]]]] = deque()
        self._chunks: deque[_Chunk] = deque()
        self._parts: list[tuple[weakref.ref[_Part], int]] = []
        self._places = _places(request.array.chunks[1:])
        self._frames: deque[tuple[int, pd.DataFrame]] = deque()
        self._held_frame_rows = 0
        self._row_numbers: RowNumbers | None = None
        self._row_base = 0
        self._frame_row_nbytes = METADATA_ROW_NBYTES
        self._row_nbytes = request.row_nbytes
        self._buffers = Buffers(2 * request.batch_nbytes)
        engine = self._engine
        self._budget = Budget(
            request.limit_nbytes, self._batches_nbytes, self._units_nbytes, lambda: engine.held_nbytes
        )

    def open(self) -> None:
        """Check a frame in memory, and compute what all units need."""
        if isinstance(self._request.frame, pd.DataFrame):
            self._check_row_numbers(self._request.frame, 0)
        levels = find_globals(self._graph, list(chain.from_iterable(self._outputs)))
        known = {*chain.from_iterable(levels), *self._persisted}
        chunk_nbytes = max(map(self._nbytes, self._units), default=0) + self._inner_nbytes
        near = max(_NEAR_UNITS, self._request.limit_nbytes // (4 * max(1, chunk_nbytes)))
        self._engine.schedule = make_schedule(self._graph, self._outputs, known, near)
        self._engine.compute_globals(levels)

    def take(self, start: int, stop: int) -> Batch:
        """Return the rows of a batch, as soon as they are there; keep computing ahead all the while."""
        array: Array | None = None
        filled = start
        self._start_units(stop)
        while True:
            if array is None and self._chunks:
                array = self._lend(start, stop)
                filled = start if array is None else stop
            if array is None and self._chunks:
                array = self._new_array(stop - start)
            if array is not None:
                filled = self._fill(array, start, filled, stop)
            if not self._started or self._units[self._started[0][0]].start >= stop:
                break
            self._finish_first()
            self._start_units(stop)
        assert array is not None  # no batch is empty
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
        left = self._budget.left_nbytes
        starting: list[int] = []
        while self._next < len(self._units):
            unit = self._units[self._next]
            running = len(self._started) + len(starting)
            nbytes = self._nbytes(unit) + self._inner_nbytes
            # More would only lengthen the queue, and counting what it holds.
            if running and (nbytes > left or running >= self._engine.ahead):
                break
            if unit.start >= needed and nbytes > left:
                break  # not even one ahead of need
            left -= nbytes
            starting.append(self._next)
            self._next += 1
        if starting:
            self._started.extend(zip(starting, self._engine.start(starting), strict=True))

    def _nbytes(self, unit: Unit) -> int:
        return (unit.stop - unit.start) * (self._frame_row_nbytes if unit.is_frame else self._row_nbytes)

    def _batches_nbytes(self) -> int:
        """Return what the batch takes that is worked on, the one to be filled, and those that are kept."""
        lent = sum(nbytes for part, nbytes in self._parts if part() is not None)
        return max(2 * self._request.batch_nbytes, self._buffers.lent_nbytes + self._buffers.free_nbytes) + lent

    def _units_nbytes(self) -> int:
        """Return what is under way, and what is there and has not been handed out."""
        held = sum(self._nbytes(chunk.unit) for chunk in self._chunks)
        for number, future in self._started:
            held += self._nbytes(self._units[number]) + (0 if future.done() else self._inner_nbytes)
        return held + self._held_frame_rows * self._frame_row_nbytes

    def _finish_first(self) -> None:
        number, future = self._started[0]
        results = self._engine.result(future)
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
            # In place: another list would be a second reference to each block.
            results[:] = (block if isinstance(block, np.ndarray) else np.asarray(block) for block in results)
            self._check_blocks(unit, results)
            if unit.stop > unit.start:
                self._chunks.append(_make_chunk(unit, results))

    def _check_frame(self, unit: Unit, frame: Any) -> None:
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
        self._check_row_numbers(frame, unit.start)

    def _check_row_numbers(self, frame: pd.DataFrame, start: int) -> None:
        """Raise an error if the row numbers that a frame tells are not those of the array."""
        if not len(frame) or not has_row_numbers(frame):
            return
        if self._row_numbers is None:  # here: not for frames without row numbers, which need none
            self._row_numbers = trace_rows(self._request.array)
            self._row_base = row_base(frame, start)
        self._row_numbers.check(frame, start, self._row_base)

    def _check_blocks(self, unit: Unit, blocks: list[Array]) -> None:
        dtype = self._request.array.dtype
        for block, (shape, _) in zip(blocks, self._places, strict=True):
            if isinstance(block, np.ma.MaskedArray):
                raise MismatchError(
                    f"a chunk of the rows [{unit.start:,}, {unit.stop:,}) was computed as a masked array, the array "
                    "tells plain numbers; fill it, as da.ma.filled does"
                )
            if block.shape != (unit.stop - unit.start, *shape):
                raise MismatchError(
                    f"a chunk of the rows [{unit.start:,}, {unit.stop:,}) was computed with the shape {block.shape}, "
                    f"the array tells {(unit.stop - unit.start, *shape)}; give map_blocks the right chunks="
                )
            if not np.can_cast(block.dtype, dtype, "same_kind"):
                raise MismatchError(
                    f"a chunk of the rows [{unit.start:,}, {unit.stop:,}) was computed as {block.dtype}, the array "
                    f"tells {dtype}; give map_blocks the right dtype="
                )
            if _loses(block, dtype):
                raise MismatchError(
                    f"a chunk of the rows [{unit.start:,}, {unit.stop:,}) was computed as {block.dtype}, the array "
                    f"tells {dtype}, which cannot hold all of its values; give map_blocks the right dtype="
                )

    # Batches

    def _lend(self, start: int, stop: int) -> Array | None:
        """Return the rows as a part of a chunk that nobody else has; None where they must be copied.

        A batch that is kept keeps its whole chunk, so this is for loops that let go of each batch when they get the
        next one: the first batch is always a copy, and so are all others as long as two of them are kept.
        """
        self._parts = [(part, nbytes) for part, nbytes in self._parts if part() is not None]
        chunk, block = self._chunks[0], self._chunks[0].blocks[0]
        if not start or len(self._parts) > 1 or stop > chunk.unit.stop or not self._request.is_numeric:
            return None
        if not chunk.is_ours or block.dtype != self._request.array.dtype or not block.nbytes:
            return None
        part = _Part(block[start - chunk.unit.start : stop - chunk.unit.start])
        self._parts.append((weakref.ref(part), block.nbytes))
        if stop == chunk.unit.stop:
            self._chunks.popleft()
        return np.asarray(part)

    def _fill(self, batch: Array, start: int, filled: int, stop: int) -> int:
        """Copy what has been computed of the rows from ``filled`` on; return how far it goes."""
        while self._chunks and filled < stop:
            unit, blocks, _ = self._chunks[0]
            last = min(stop, unit.stop)
            for block, (_, place) in zip(blocks, self._places, strict=True):
                rows = block[filled - unit.start : last - unit.start]
                np.copyto(batch[(slice(filled - start, last - start), *place)], rows, casting="same_kind")
            filled = last
            if last == unit.stop:
                self._chunks.popleft()
        return filled

    def _new_array(self, rows: int) -> Array:
        """Return an array of undefined content, in memory used again where that is possible."""
        shape, dtype = (rows, *self._request.array.shape[1:]), self._request.array.dtype
        if not self._request.is_numeric or not math.prod(shape):
            return np.empty(shape, dtype)
        return self._buffers.take(shape, dtype)

    def _take_frame(self, start: int, stop: int) -> pd.DataFrame:
        frame = self._request.frame
        if frame is None:
            return numbered(np.arange(start, stop, dtype=np.int64))
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


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


class _Chunk(NamedTuple):
    """A band of chunks along the rows that has been computed."""

    unit: Unit
    """Its rows."""
    blocks: list[Array]
    """One for each chunk on the other axes."""
    is_ours: bool
    """Whether it is one array that nothing else refers to, so that batches may be parts of it."""


def _make_chunk(unit: Unit, blocks: list[Array]) -> _Chunk:
    is_ours = _COUNTS_TELL and len(blocks) == 1 and _references(blocks) == _ONLY_OURS and _is_plain(blocks[0])
    return _Chunk(unit, blocks, is_ours)


def _loses(block: Array, dtype: np.dtype[Any]) -> bool:
    """Tell whether integers or text are others in a narrower dtype; fractions are rounded as everywhere."""
    if block.dtype.kind not in "iuSU" or dtype.kind not in "iuSU" or np.can_cast(block.dtype, dtype, "safe"):
        return False
    return bool((block.astype(dtype) != block).any())


def _is_plain(block: Array) -> bool:
    flags = block.flags
    return has_own_memory(block) and flags.writeable and flags.c_contiguous


def _references(blocks: list[Array]) -> int:
    """Count what refers to an array: a loan to a later unit, a view, what was persisted or cached by a task."""
    return sys.getrefcount(blocks[0])


_ONLY_OURS = _references([np.empty(1)])
"""References to an array that is in one list only: differs between versions of Python."""

_COUNTS_TELL = not sysconfig.get_config_var("Py_GIL_DISABLED")
"""Whether all references are counted in one place: builds of Python without the GIL count by threads."""


class _Part:
    """Lends rows of a chunk to an array. numpy keeps it alive as long as the array or any view of it lives."""

    __slots__ = ("__array_interface__", "__weakref__", "_rows")

    def __init__(self, rows: Array) -> None:
        self._rows = rows
        self.__array_interface__ = rows.__array_interface__


Place = tuple[tuple[int, ...], tuple[slice, ...]]


def _places(chunks: Sequence[Sequence[int]]) -> list[Place]:
    """Return the shape of each block of a band, and its place, on the axes other than the rows."""
    places: list[Place] = [((), ())]
    for sizes in chunks:
        stops = np.cumsum(sizes).tolist()
        slices = [slice(stop - int(size), stop) for size, stop in zip(sizes, stops, strict=True)]
        places = [((*shape, s.stop - s.start), (*place, s)) for shape, place in places for s in slices]
    return places
