"""Columns of files, whatever their format: what there is, and rows of it decoded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dask_embedding_reader.formats.arrow import ARROW
from dask_embedding_reader.formats.arrow_tables import (
    arrow_has_rows,
    arrow_row_nbytes,
    arrow_schema,
    iter_arrow_tables,
)
from dask_embedding_reader.formats.base import FileFormat, FileHeader, FilePart, for_each_file
from dask_embedding_reader.formats.column_names import number_columns
from dask_embedding_reader.formats.metadata import MetaField, make_table
from dask_embedding_reader.formats.parquet.decode import DECODE_ROWS, TableReader, iter_tables
from dask_embedding_reader.formats.parquet.footers import has_rows as parquet_has_rows
from dask_embedding_reader.formats.parquet.footers import may_match as parquet_may_match
from dask_embedding_reader.formats.parquet.footers import parquet_schema, read_footer
from dask_embedding_reader.formats.parquet.footers import row_nbytes as parquet_row_nbytes
from dask_embedding_reader.formats.partitions import told_by_folders
from dask_embedding_reader.storage.store import StoredFile

_NARROW_ROWS = 2**17
"""Numbers are decoded so many rows at a time: 100,000 integers in 0.5 ms, in steps of 8,192 in 1.8 ms."""


def first_schema(kind: FileFormat, files: Sequence[StoredFile]) -> pa.Schema:
    """Return the columns of the first file that has rows: the others may have fewer columns, or none."""
    read, has_rows = (arrow_schema, arrow_has_rows) if kind is ARROW else (parquet_schema, parquet_has_rows)
    return next((read(file) for file in files if has_rows(file)), pa.schema([]))


def expand_glob(kind: FileFormat, file: StoredFile, glob: str) -> tuple[str, ...] | None:
    """Return the columns of a file that a pattern names, in order; None if the file has no rows, and maybe no columns.

    There are none where one column is called like the pattern.

    Raises
    ------
    ColumnError
        If the pattern names others.
    """
    if not (arrow_has_rows if kind is ARROW else parquet_has_rows)(file):
        return None
    names = (arrow_schema(file) if kind is ARROW else read_footer(file, ()).schema).names
    return () if glob in names else number_columns(file.url, glob, names)


def iter_columns(
    header: FileHeader, names: Sequence[str], start: int, stop: int, step: int = DECODE_ROWS
) -> Iterator[pa.RecordBatch]:
    """Decode the rows ``[start, stop)`` of some columns, in order, a few rows at a time.

    Raises
    ------
    FormatError
        If they cannot be decoded.
    ReadError
        If the storage does not deliver them.
    """
    # What only its format understands: parquet has nothing to say there.
    read = iter_arrow_tables if header.layout else iter_tables
    stored = (arrow_schema if header.layout else parquet_schema)(header.file).names if header.partitions else ()
    told = told_by_folders(header, names, stored) if header.partitions else {}
    if not told:
        return read(header, names, start, stop, step)
    others = [name for name in names if name not in told]
    batches = read(header, others, start, stop, step) if others else _of_no_columns(start, stop, step)
    return (_with_values(batch, names, told) for batch in batches)


def _of_no_columns(start: int, stop: int, step: int) -> Iterator[pa.RecordBatch]:
    for first in range(start, stop, step):
        rows = pa.nulls(min(step, stop - first))
        yield pa.RecordBatch.from_arrays([rows], [""])


def _with_values(batch: pa.RecordBatch, names: Sequence[str], told: Mapping[str, pa.Scalar]) -> pa.RecordBatch:
    """Take columns of a batch, and others that have one value in all rows."""
    columns = [pa.repeat(told[name], batch.num_rows) if name in told else batch.column(name) for name in names]
    return pa.RecordBatch.from_arrays(columns, list(names))


def row_nbytes(header: FileHeader, names: Sequence[str]) -> int:
    """Return about what a row of some columns takes; 0 where nothing tells that is at hand."""
    return arrow_row_nbytes(header, names) if header.layout else parquet_row_nbytes(header.file, names)


def may_match(header: FileHeader, expression: Any, floats: Collection[str] = ()) -> set[int] | None:
    """Return the row groups that may hold rows for which an expression is true; None where nothing can be told.

    It compares the columns ``floats`` with floats, which Arrow rounds decimals to.
    """
    if header.layout:
        return None
    if floats and any(
        field.name in floats and pa.types.is_decimal(field.type) for field in parquet_schema(header.file)
    ):
        return None
    return parquet_may_match(header.file, expression)  # by statistics


def step_rows(header: FileHeader, names: Sequence[str]) -> int:
    """Return how many rows of some columns are best decoded at a time: many where all are numbers.

    Text may be of any length, whatever a file tells of it: dictionaries have it once.
    """
    schema = (arrow_schema if header.layout else parquet_schema)(header.file)
    told = dict(header.partitions)
    columns = [schema.get_all_field_indices(name) for name in names if name not in told]
    if all(len(found) == 1 and pa.types.is_primitive(schema.types[found[0]]) for found in columns):
        return max(DECODE_ROWS, _NARROW_ROWS // len(names))
    return DECODE_ROWS


def read_columns(parts: Sequence[FilePart], fields: Sequence[MetaField]) -> pa.Table:
    """Decode columns of parts of files, one below the other.

    Those of several files have the types that hold the values of the whole collection: decoded values of a single one
    are turned into these when they become a frame, which takes as long for four rows as for thousands.
    """
    names = [field.name for field in fields]

    def read(part: FilePart) -> pa.Table:
        table = open_columns(part.header, names, part.start, part.stop)(part.rows)
        return table if len(parts) == 1 else make_table(fields, table, part.header.file.url)

    return pa.concat_tables(for_each_file(read, [part.header for part in parts], parts))


def open_columns(
    header: FileHeader, names: Sequence[str], start: int, stop: int, step: int = DECODE_ROWS
) -> TableReader:
    """Return a function that decodes the next so many of the rows ``[start, stop)`` of some columns."""
    decoded = iter_columns(header, names, start, stop, step)
    rest: list[pa.RecordBatch] = []

    def read(rows: int) -> pa.Table:
        taken = []
        while rows:
            batch = rest.pop() if rest else next(decoded)
            taken.append(batch.slice(0, rows))
            if batch.num_rows > rows:
                rest.append(batch.slice(rows))
            rows -= taken[-1].num_rows
        return pa.Table.from_batches(taken)

    return read
