"""Where parts come from that the threads of this process write: a reader, a numpy array, or batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_embedding_reader._common.notices import warn
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.batches.read import read_table_batches
from dask_embedding_reader.batches.request import BatchRequest, span_of
from dask_embedding_reader.collection.reopen import check_outside
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, ColumnError, MismatchError
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.parquet.tables import check_fields, join_tables, make_table, mark_table, plain_array
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.lazy.iter_batches import checked_frame
from dask_embedding_reader.lazy.row_numbers import count_on, has_row_numbers, row_base, row_numbers_of
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.write.parts import Part, Settings
from dask_embedding_reader.write.request import (
    Request,
    choose_rows_per_file,
    count_writers,
    estimate_nbytes,
    make_settings,
)


class PartSource(NamedTuple):
    """What is written by the threads of this process."""

    settings: Settings
    """All that decides the bytes."""
    parts: Callable[[set[int]], Generator[Part, None, None]]
    """Yields parts in order; it may leave out those that are named, if it knows that they are the same."""
    part_nbytes: int
    """What a part holds in memory until it is written."""


def of_reader(reader: EmbeddingReader, request: Request) -> PartSource:
    """Parts of a collection: batches of a whole file each, read ahead while others are written."""
    check_outside(reader.manifest, request.folder.store, request.folder.path)
    shape, fields = (reader.count, reader.dimension), reader.manifest.fields
    step = choose_rows_per_file(request, reader.count, reader.dimension, reader.dtype)
    part_nbytes = estimate_nbytes(request, step, reader.dimension, reader.dtype)
    settings = make_settings(request, reader.token, shape, reader.dtype, step, bool(fields))
    layout = get_format(request.file_format)
    if layout.metadata == "beside" or layout.vectors is PARQUET:
        check_fields(fields)

    def parts(known: set[int]) -> Generator[Part, None, None]:
        limit = request.limit_nbytes - count_writers(request, part_nbytes) * part_nbytes
        for first, last in _missing_runs(known, -(-reader.count // step)):
            start, stop, selected = span_of(reader.rows[first * step : last * step])
            batches = read_table_batches(
                reader.manifest,
                BatchRequest(
                    batch_rows=step,
                    start=start,
                    stop=stop,
                    rows=selected,
                    max_piece_rows=None,
                    threads=None,
                    limit_nbytes=max(limit, step * reader.byte_per_item),
                    dtype=reader.dtype,
                    show_progress=False,
                ),
            )
            for number, (rows, table) in enumerate(batches, first):
                yield Part(number, number * step, rows, mark_table(table, fields, request.embedding_column))

    return PartSource(settings, parts, part_nbytes)


def _missing_runs(known: set[int], count: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of numbers below ``count`` that are not known."""
    first = 0
    for number in [*sorted(known), count]:
        if first < number:
            yield first, number
        first = number + 1


def _name_of(kind: type) -> str:
    """Return the name of a type with its library: others have a DataFrame, too."""
    library = kind.__module__.partition(".")[0]
    return kind.__qualname__ if library == "builtins" else f"{library}.{kind.__qualname__}"


def of_numpy(array: Array, meta: Any, request: Request) -> PartSource:
    """Parts of an array in memory."""
    array = plain_array(array, "array")
    if array.ndim != 2:
        raise ArgumentError(f"array has the shape {array.shape}; embeddings are 2-D: (rows, dimension)")
    if meta is not None and not isinstance(meta, pd.DataFrame):
        raise ArgumentTypeError(
            f"meta of a numpy array must be a pandas DataFrame, not {_name_of(type(meta))}; compute or convert it "
            "(to_pandas), or make a Dask array with da.from_array"
        )
    if meta is not None and len(meta) != len(array):
        raise MismatchError(
            f"meta has {counted(len(meta), 'row')}, the array {len(array):,}; they must be row for row the same"
        )
    if meta is not None and len(meta) and has_row_numbers(checked_frame(meta)):
        count_on([len(array)], [None]).check(meta, 0, row_base(meta))
    step = choose_rows_per_file(request, len(array), array.shape[1], array.dtype)
    part_nbytes = estimate_nbytes(request, step, array.shape[1], array.dtype)
    table = make_table(meta, request.embedding_column, 0)
    settings = make_settings(request, None, array.shape, array.dtype, step, table is not None)

    def parts(_: set[int]) -> Generator[Part, None, None]:
        for number, start in enumerate(range(0, len(array), step)):
            yield Part(number, start, array[start : start + step], None if table is None else table.slice(start, step))

    return PartSource(settings, parts, part_nbytes)


def of_batches(batches: Iterator[Any], request: Request) -> PartSource:
    """Parts put together from batches of any size."""
    checked = _check_batches(batches, request.embedding_column)
    first = next(checked, None)
    if first is None:
        raise ArgumentError("there is not a single row in the batches: there is nothing to write")
    dimension, dtype = first[0].shape[1], first[0].dtype
    step = choose_rows_per_file(request, None, dimension, dtype)
    part_nbytes = estimate_nbytes(request, step, dimension, dtype)
    settings = make_settings(request, None, (None, dimension), dtype, step, first[1] is not None)

    def parts(_: set[int]) -> Generator[Part, None, None]:
        return _assemble(chain([first], checked), step, dimension, dtype)

    return PartSource(settings, parts, part_nbytes)


def _check_batches(batches: Iterator[Any], embedding_column: str) -> Iterator[tuple[Array, pa.Table | None]]:
    """Yield the batches that have rows, after a look at what each of them is."""
    first: tuple[Array, pa.Table | None] | None = None
    row = 0
    for number, batch in enumerate(batches):
        where = f"batch {number:,} (from row {row:,} on)"
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], np.ndarray)):
            raise ArgumentTypeError(
                f"{where} must be a pair (numpy array, DataFrame or None), not {type(batch).__name__}"
            )
        rows, frame = plain_array(batch[0], where), batch[1]
        if not (frame is None or isinstance(frame, pd.DataFrame)):
            raise ArgumentTypeError(f"{where} has metadata of type {_name_of(type(frame))}, not a pandas DataFrame")
        if rows.ndim != 2:
            raise ArgumentError(f"{where} has the shape {rows.shape}; embeddings are 2-D: (rows, dimension)")
        if frame is not None and len(frame) != len(rows):
            raise MismatchError(
                f"{where} has {counted(len(rows), 'vector')}, but {counted(len(frame), 'row')} of metadata"
            )
        if not len(rows):
            continue
        _check_row_numbers(frame, where)
        table = _in_own_memory(make_table(frame, embedding_column, row))
        first = first or (rows, table)
        if (rows.shape[1], rows.dtype) != (first[0].shape[1], first[0].dtype):
            raise MismatchError(
                f"{where} holds vectors of {rows.shape[1]} x {rows.dtype}, those before it are {first[0].shape[1]} x "
                f"{first[0].dtype}"
            )
        if (names := _names(table)) != (before := _names(first[1])):
            raise MismatchError(f"{where} has the metadata columns {names}, those before it have {before}")
        row += len(rows)
        yield rows, table


def _check_row_numbers(frame: pd.DataFrame | None, where: str) -> None:
    """Raise an error if what a frame calls row numbers cannot be those of a reader's batch, and would be lost."""
    if frame is None or not has_row_numbers(checked_frame(frame)):
        return
    numbers = row_numbers_of(frame)
    # In any order, and more than once: those of rows that were picked or shuffled.
    if numbers is None or numbers.dtype.kind not in "iu" or (numbers < 0).any():
        raise ColumnError(
            f"{where} has metadata called {ROW_NUMBER!r} that are no row numbers, and would be lost: that name stands "
            "for the row number, which readers make anew; rename them to keep them, or drop them"
        )
    # Those of readers are int64, and their last column.
    is_index = frame.index.name == ROW_NUMBER
    of_reader = numbers.dtype == np.int64 and (is_index or frame.columns[-1] == ROW_NUMBER)
    if not of_reader:
        warn(
            f"{where} has a column of integers {ROW_NUMBER!r}, which is taken for row numbers and not stored: readers "
            "make these anew; rename it to keep it, or drop it",
        )


def _in_own_memory(table: pa.Table | None) -> pa.Table | None:
    """Return a copy: columns made of a frame may lie in the frame's memory, which may be used again."""
    if table is None:
        return None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def _names(table: pa.Table | None) -> list[str]:
    return [] if table is None else list(table.column_names)


def _assemble(
    batches: Iterable[tuple[Array, pa.Table | None]], step: int, dimension: int, dtype: np.dtype[Any]
) -> Generator[Part, None, None]:
    """Turn batches of any size into parts. Vectors are copied at once: who yields them may use their memory again."""
    number, filled = 0, 0
    array = np.empty((step, dimension), dtype.newbyteorder("="))
    tables: list[pa.Table | None] = []
    for batch, batch_table in batches:
        rows, table = batch, batch_table
        while len(rows):
            count = min(step - filled, len(rows))
            array[filled : filled + count] = rows[:count]
            tables.append(None if table is None else table.slice(0, count))
            rows, table, filled = rows[count:], None if table is None else table.slice(count), filled + count
            if filled == step:
                yield Part(number, number * step, array, join_tables(tables))
                number, filled, tables = number + 1, 0, []
                array = np.empty((step, dimension), dtype.newbyteorder("="))
    if filled:
        yield Part(number, number * step, array[:filled], join_tables(tables))
