"""Columns of files, whatever their format: what there is, and rows of it decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from dask_embedding_reader.formats.arrow import ARROW, arrow_schema, iter_arrow_tables
from dask_embedding_reader.formats.base import FileFormat, FileHeader
from dask_embedding_reader.formats.parquet.read import DECODE_ROWS, TableReader, iter_tables, parquet_schema
from dask_embedding_reader.storage.store import StoredFile


def first_schema(kind: FileFormat, files: Sequence[StoredFile]) -> pa.Schema:
    """Return the columns of the first file that has any: files without rows may have none."""
    read = arrow_schema if kind is ARROW else parquet_schema
    return next((schema for file in files if (schema := read(file)).names), pa.schema([]))


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
    return read(header, names, start, stop, step)


def open_columns(header: FileHeader, names: Sequence[str], start: int, stop: int) -> TableReader:
    """Return a function that decodes the next so many of the rows ``[start, stop)`` of some columns."""
    decoded = iter_columns(header, names, start, stop)
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
