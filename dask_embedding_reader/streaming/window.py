"""The window: which units are under way, what they weigh, and the batches that are made of what is finished.

Units are started in order, ahead of the consumer, as far as they fit into the limit. That is decided in the consumer's
own thread, whenever it asks for a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pandas as pd
from dask.dataframe.dispatch import concat
from dask.sizeof import sizeof

from dask_embedding_reader.batches import METADATA_ROW_NBYTES, Batch, Buffers, row_numbers
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.formats import Array
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.progress import progress_bar
from dask_embedding_reader.streaming.engines import Cluster, Threads
from dask_embedding_reader.streaming.schedule import Unit, find_globals, make_graph, make_schedule

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
    def batch_nbytes(self) -> int:
        """Bytes of the array of a batch."""
        return min(self.batch_rows, self.rows) * self.row_nbytes


def iterate(request: Request) -> Iterator[Batch]:
    """Yield the batches; nothing is computed before the first is asked for."""
    stream = _Stream(request)
    progress = progress_bar(request.show_progress, request.rows, "computing", " rows")
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

    def __init__(self, request: Request) -> None:
        self._request = request
        graph, self._units = make_graph(request.array, request.frame, request.frame_rows)
        self._outputs = [unit.keys for unit in self._units]
        self._graph = graph
        self._engine: Threads | Cluster = (
            Cluster(graph, self._outputs, request.client)
            if request.client
            else Threads(graph, self._outputs, request.limit_nbytes, request.inner_nbytes)
        )
        self._inner_nbytes = request.inner_nbytes
        self._next = 0
        self._started: deque[tuple[int, Future[list[Any]]]] = deque()
        self._chunks: deque[tuple[Unit, list[Any]]] = deque()
        self._frames: deque[tuple[int, pd.DataFrame]] = deque()
        self._held_frame_rows = 0
        self._frame_row_nbytes = METADATA_ROW_NBYTES
        self._row_nbytes = request.row_nbytes
        self._buffers = Buffers(2 * request.batch_nbytes)

    def open(self) -> None:
        """Compute what all units need."""
        levels = find_globals(self._graph, list(chain.from_iterable(self._outputs)))
        chunk_nbytes = max(map(self._nbytes, self._units), default=0) + self._inner_nbytes
        near = max(_NEAR_UNITS, self._request.limit_nbytes // (4 * max(1, chunk_nbytes)))
        self._engine.schedule = make_schedule(self._graph, self._outputs, set(chain.from_iterable(levels)), near)
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

    def _nbytes(self, unit: Unit) -> int:
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

    def _checked_blocks(self, unit: Unit, blocks: list[Any]) -> list[Any]:
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

    def _block_places(self, unit: Unit) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
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
            return row_numbers(start, stop)
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
