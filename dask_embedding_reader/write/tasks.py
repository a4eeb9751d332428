"""A Dask array written on the active scheduler: one task a file, which needs the chunks that fall into it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.base import optimize, tokenize
from dask.core import flatten
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.system import CPU_COUNT

from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import ArgumentError, DestinationError, MismatchError
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.formats.parquet.tables import join_tables, make_table, plain_array
from dask_embedding_reader.lazy.iter_batches import active_client, checked_array, checked_frame, rows_of_partitions
from dask_embedding_reader.lazy.row_numbers import RowNumbers, has_row_numbers, row_base, trace_rows
from dask_embedding_reader.lazy.schedule import check_persisted, reference, with_persisted
from dask_embedding_reader.storage.put import list_files
from dask_embedding_reader.write.claim import Claim, Lease, claimed, new_job, take
from dask_embedding_reader.write.destination import (
    Destination,
    Prepared,
    begin,
    count_done,
    finish,
    prepare,
    write_part,
)
from dask_embedding_reader.write.parts import Part, Record, warn_of_not_finite
from dask_embedding_reader.write.request import Request, choose_rows_per_file, estimate_nbytes, make_settings

_LOOK_SECONDS = 2.0
"""How often the progress bar looks for finished files."""


class _Pieces(NamedTuple):
    """Rows that a graph computes in pieces: chunks of an array, or partitions of a frame."""

    keys: Sequence[Any]
    """The key of each piece."""
    rows: Sequence[int]
    """How many rows it has."""

    def overlapping(self, starts: Sequence[int], start: int, stop: int) -> list[tuple[Any, int, int, int]]:
        """Return the pieces that hold rows of ``[start, stop)``: their key, those rows counted in it, and all its rows.

        ``starts`` are the first rows of the pieces.
        """
        first = int(np.searchsorted(starts, start, "right")) - 1
        found = []
        for position in range(max(first, 0), len(self.keys)):
            offset, rows = starts[position], self.rows[position]
            if offset >= stop:
                break
            if offset + rows > start:
                found.append((self.keys[position], max(start - offset, 0), min(stop - offset, rows), rows))
        return found


def write_array(array: da.Array, meta: Any, request: Request, *, compute: bool) -> Delayed | None:
    """Write a Dask array with its frame; or return what does it when it is computed."""
    array, frame = checked_array(array), checked_frame(meta)
    if array.ndim != 2:
        raise ArgumentError(f"array has the shape {array.shape}; embeddings are 2-D: (rows, dimension)")
    frame_rows = rows_of_partitions(array, frame)
    numbers = None if frame is None or not has_row_numbers(frame) else trace_rows(array)
    if numbers and isinstance(frame, pd.DataFrame) and len(frame):
        numbers.check(frame, 0, row_base(frame))
    array = array.rechunk({1: -1}) if array.numblocks[1] > 1 else array
    rows, dimension = map(int, array.shape)
    step = _align(choose_rows_per_file(request, rows, dimension, array.dtype), array.chunks[0], request)
    part_nbytes = estimate_nbytes(request, step, dimension, array.dtype)
    has_columns = frame is not None and any(name != ROW_NUMBER for name in frame.columns)
    token = tokenize(array.name, frame)
    settings = make_settings(request, token, (rows, dimension), array.dtype, step, has_columns)
    folder = request.folder
    if not compute:
        # Nothing is changed, not even a folder made, unless there is something of a writer to be put in order.
        is_used = bool(list_files(folder.store, folder.work))
        unclaimed = nullcontext(Claim(folder.store, folder.work, new_job(), 0))
        with claimed(folder.store, folder.work) if is_used else unclaimed as claim:
            prepared = prepare(folder, settings, request.overwrite, claim)
        return _lazy(prepared, _graph(prepared, array, frame, frame_rows, numbers, step, request.embedding_column))
    client = active_client()
    with claimed(folder.store, folder.work) as claim:
        prepared = prepare(folder, settings, request.overwrite, claim)
        graph = _graph(prepared, array, frame, frame_rows, numbers, step, request.embedding_column)
        check_persisted(graph.persisted, client)
        if graph.writes or prepared.unfinished:
            begin(prepared)
            records = _compute(prepared, graph, request, part_nbytes)
            finish(prepared.destination, records)
            warn_of_not_finite(records)
    return None


def _align(step: int, chunks: Sequence[int], request: Request) -> int:
    """Make files of whole chunks where these are alike and the caller does not say otherwise."""
    chunk = chunks[0]
    if (
        not chunk
        or request.rows_per_file is not None
        or any(rows != chunk for rows in chunks[:-1])
        or chunks[-1] > chunk
    ):
        return step
    return chunk * (step // chunk) if chunk <= step else -(-chunk // -(-chunk // step))


# ---------------------------------------------------------------------------------------------------------------------
# The graph


class _Graph(NamedTuple):
    """Tasks that write parts, and all that they need."""

    tasks: dict[Any, Any]
    """The tasks by their keys."""
    writes: dict[int, str]
    """The key of the task that writes each part."""
    persisted: Sequence[Any]
    """What they need of a cluster that holds it."""
    token: str
    """Stands for all of it in the names of keys."""


def _graph(
    prepared: Prepared,
    array: da.Array,
    frame: Any,
    frame_rows: Sequence[int],
    numbers: RowNumbers | None,
    step: int,
    embedding_column: str,
) -> _Graph:
    destination = prepared.destination
    # Dask takes tasks of one name for one task: of folders of one path on two storages it would write to one.
    token = destination.claim.job
    rows = int(array.shape[0])
    missing = [number for number in range(-(-rows // step)) if number not in prepared.known]
    if not missing:
        return _Graph({}, {}, (), token)
    (optimized,) = optimize(array)
    tasks: dict[Any, Any] = dict(optimized.__dask_graph__())
    chunks = _Pieces(list(flatten(optimized.__dask_keys__())), tuple(map(int, array.chunks[0])))
    partitions, table = _Pieces((), ()), None
    if isinstance(frame, dd.DataFrame):
        lowered = frame.optimize()
        tasks |= dict(lowered.__dask_graph__())
        partitions = _Pieces(list(flatten(lowered.__dask_keys__())), frame_rows)
    elif isinstance(frame, pd.DataFrame):
        table = make_table(frame, embedding_column, 0)
    tasks, persisted = with_persisted(tasks, [*chunks.keys, *partitions.keys], [array, frame])
    chunk_starts = list(accumulate(chunks.rows, initial=0))
    partition_starts = list(accumulate(partitions.rows, initial=0))
    base = f"row-base-{token}"
    numbers = numbers if partitions.keys else None  # those of a frame in memory are compared
    if numbers and numbers.untold:
        [(first_partition, *_)] = partitions.overlapping(partition_starts, 0, 1)
        tasks[base] = (row_base, reference(first_partition))
    writes = {}
    for number in missing:
        start, stop = number * step, min((number + 1) * step, rows)
        own_chunks = chunks.overlapping(chunk_starts, start, stop)
        own_partitions = partitions.overlapping(partition_starts, start, stop)
        # Arguments that are no keys are bound: Dask would look for keys in them.
        write = _WritePart(
            destination,
            number,
            start,
            array.dtype,
            tuple(cut[1:] for cut in own_chunks),
            tuple(cut[1:] for cut in own_partitions),
            numbers and numbers.cut(start, stop),
            None if table is None else _to_bytes(table.slice(start, stop - start)),
        )
        writes[number] = f"write-embeddings-{token}-{number}"
        cuts = [[reference(cut[0]) for cut in own] for own in (own_chunks, own_partitions)]
        tasks[writes[number]] = (write, *cuts, base if numbers and start < numbers.untold else 0, None)
    return _Graph(tasks, writes, persisted, token)


class _WritePart(NamedTuple):
    """Writes a part, given the chunks and partitions that its rows are in."""

    destination: Destination
    """Where to."""
    number: int
    """Which part."""
    first_row: int
    """Its first row in the array."""
    dtype: np.dtype[Any]
    """What the array tells that its chunks are."""
    chunk_cuts: tuple[tuple[int, int, int], ...]
    """Which rows of each chunk, and how many it has to have."""
    partition_cuts: tuple[tuple[int, int, int], ...]
    """The same for partitions."""
    row_numbers: RowNumbers | None
    """Those that partitions have to have, if they tell any."""
    table: bytes | None
    """The metadata, where they are known before."""

    def __call__(
        self, chunks: Sequence[Any], partitions: Sequence[pd.DataFrame], row_base: int, begun: _Begun | None
    ) -> Record:
        """Write it, as what was begun says, if that was a task itself."""
        destination = self.destination if begun is None else begun.destination
        if begun is not None and self.number in begun.known:
            return begun.known[self.number]
        rows = []
        first_row = self.first_row
        for chunk, (a, b, count) in zip(chunks, self.chunk_cuts, strict=True):
            computed = plain_array(chunk, f"a chunk of the rows from {first_row - a:,} on")
            if computed.shape != (told := (count, destination.settings.dimension)):
                raise MismatchError(
                    f"a chunk of the rows from {first_row - a:,} on was computed with the shape {computed.shape}, the "
                    f"array tells {told}; give map_blocks the right chunks="
                )
            if not np.can_cast(computed.dtype, self.dtype, "same_kind"):
                raise MismatchError(
                    f"a chunk of the rows from {first_row - a:,} on was computed as {computed.dtype}, the array tells "
                    f"{self.dtype}; give map_blocks the right dtype="
                )
            rows.append(computed[a:b])
            first_row += b - a
        array = rows[0] if len(rows) == 1 else np.concatenate(rows)
        tables: list[pa.Table | None] = []
        first_row = self.first_row
        for frame, (a, b, expected) in zip(partitions, self.partition_cuts, strict=True):
            if len(frame) != expected:
                raise MismatchError(
                    f"a partition of the metadata has {counted(len(frame), 'row')} where "
                    f"{expected:,} were expected (rows from "
                    f"{first_row:,} on): it does not match the array row for row"
                )
            if self.row_numbers and has_row_numbers(frame):
                self.row_numbers.check(frame.iloc[a:b], first_row, row_base)
            tables.append(make_table(frame.iloc[a:b], destination.settings.embedding_column, first_row))
            first_row += b - a
        if self.table is not None:
            tables = [pa.ipc.open_stream(self.table).read_all()]
        table = join_tables(tables) if tables else None
        return write_part(destination, Part(self.number, self.first_row, array, table))


def _to_bytes(table: pa.Table) -> bytes:
    """Write out a part of a table: pickled as it is, it would carry the whole."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Computing it


def _delayed(name: str, tasks: dict[Any, Any]) -> Delayed:
    return Delayed(name, HighLevelGraph({name: tasks}, {name: set()}))


def _compute(prepared: Prepared, graph: _Graph, request: Request, part_nbytes: int) -> dict[int, Record]:
    name = f"written-{graph.token}"
    delayed = _delayed(name, {**graph.tasks, name: (list, list(graph.writes.values()))})
    # Of the schedulers only the one of threads heeds it; on a cluster, memory is what the workers have.
    workers = max(1, min(dask.config.get("num_workers", None) or CPU_COUNT, request.limit_nbytes // (2 * part_nbytes)))
    with _progress(prepared, request), dask.config.set(num_workers=workers):
        written: list[Record] = delayed.compute() if graph.writes else []
    return {**prepared.known, **dict(zip(graph.writes, written, strict=True))}


@contextmanager
def _progress(prepared: Prepared, request: Request) -> Iterator[None]:
    """Show how many files there are: the one measure that all schedulers have."""
    destination = prepared.destination
    settings = destination.settings
    rows = settings.rows or 0
    bar = progress_bar(request.show_progress, rows, "writing", " embeddings", settings.row_nbytes)
    ended, shown = threading.Event(), 0

    def look() -> None:
        nonlocal shown
        while not ended.wait(_LOOK_SECONDS):
            done = min(rows, count_done(destination) * settings.rows_per_file)
            bar.update(done - shown)
            shown = done

    thread = threading.Thread(target=look, name="embedding-writer-progress", daemon=True)
    if request.show_progress:
        thread.start()
    try:
        yield
        ended.set()
        if request.show_progress:
            thread.join()
        bar.update(rows - shown)
    finally:
        ended.set()
        bar.close()


class _Begun(NamedTuple):
    """What the first task of a lazy object has found: all others need it."""

    destination: Destination
    """Where to write."""
    known: dict[int, Record]
    """The parts that were complete then."""
    is_needed: bool
    """Whether there is something to be written or finished."""
    lease: Lease
    """The claim, held as long as somebody needs this."""


def _lazy(prepared: Prepared, graph: _Graph) -> Delayed:
    """Return a lazy object that begins, writes what is missing, and finishes."""
    destination = prepared.destination
    # However often it is computed, and in however many processes: the claim is that of this object.
    job = new_job()
    first, last = f"write-begin-{graph.token}-{job}", f"write-finish-{graph.token}-{job}"
    tasks = dict(graph.tasks)
    for key in graph.writes.values():
        tasks[key] = (*tasks[key][:-1], first)
    tasks[first] = (partial(_begin_lazily, destination._replace(job=job), frozenset(graph.writes)),)
    keys = list(graph.writes.values())
    tasks[last] = (partial(_finish_lazily, tuple(graph.writes)), keys, first)
    return _delayed(last, tasks)


def _begin_lazily(planned: Destination, numbers: frozenset[int]) -> _Begun:
    folder, settings = planned.folder, planned.settings
    lease = take(folder.store, folder.work, planned.job, is_shared=True)
    try:
        prepared = prepare(folder, settings, planned.overwrite, lease.claim)  # it may hold something else by now
        missing = set(range(-(-(settings.rows or 0) // settings.rows_per_file))) - set(prepared.known)
        if not missing <= numbers:
            raise DestinationError(
                f"{folder.shown}: {len(missing - numbers):,} files that were complete when this lazy object was made "
                "are no more; make it again"
            )
        is_needed = bool(missing) or prepared.unfinished
        if is_needed:
            begin(prepared)
    except BaseException:
        lease.give_back()  # now: whoever catches this has a traceback, and with it the lease
        raise
    return _Begun(prepared.destination, prepared.known, is_needed, lease)


def _finish_lazily(numbers: Sequence[int], written: Sequence[Record], begun: _Begun) -> None:
    records: Mapping[int, Record] = {**begun.known, **dict(zip(numbers, written, strict=True))}
    if begun.is_needed:
        finish(begun.destination, records)
        warn_of_not_finite(records)
    begun.lease.give_back()
