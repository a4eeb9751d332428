"""Columns of files of Arrow's IPC format, by their names: what they are, and rows of them decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import pyarrow as pa

from dask_embedding_reader.errors import EmbeddingReaderError, FormatError, ReadError
from dask_embedding_reader.formats.arrow_types import can_be_framed
from dask_embedding_reader.formats.base import FileHeader, MetaColumn
from dask_embedding_reader.formats.column_names import find_field, no_column, no_column_of_vectors
from dask_embedding_reader.formats.ipc import Index, read_index
from dask_embedding_reader.formats.ipc_columns import (
    WINDOW_NBYTES,
    Path,
    find_column,
    inflated_nbytes,
    open_columns,
)
from dask_embedding_reader.formats.parquet.tables import is_masked
from dask_embedding_reader.formats.partitions import TOLD_BY_FOLDERS, partition_values
from dask_embedding_reader.formats.vector_columns import item_type
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import StoredFile


def arrow_schema(file: StoredFile) -> pa.Schema:
    """Return the columns of a file."""
    return read_index(file).schema


def arrow_has_rows(file: StoredFile) -> bool:
    """Tell whether a file has rows."""
    return any(read_index(file).batch_rows)


def column_path(file: StoredFile, index: Index, name: str) -> Path:
    """Return where a column is."""
    positions = index.schema.get_all_field_indices(name)
    if len(positions) != 1:
        raise no_column(file.url, index.schema.names, name)
    return (int(positions[0]),)


def vectors_path(file: StoredFile, index: Index, name: str) -> Path:
    """Return where a column of vectors is, or a field of a struct."""
    path = find_field(index.schema, name)
    if path is None:
        schema = index.schema
        raise no_column_of_vectors(file.url, schema, schema.names, name, columns_of_vectors(file, index))
    return path


def columns_of_vectors(file: StoredFile, index: Index) -> list[str]:
    """Return the columns of numbers in lists of one length, as far as their counts tell."""
    found = []
    for position, field in enumerate(index.schema):
        if item_type(field.type) is None or index.schema.names.count(field.name) > 1:
            continue
        columns = [(batch.rows, find_column(file, index, batch, (position,))) for batch in index.batches if batch.rows]
        lengths = {divmod(int(column.nodes[-1, 0]), rows) for rows, column in columns}
        if len(lengths) == 1 and lengths.pop()[1] == 0:
            found.append(field.name)
    return found


def meta_column(file: StoredFile, index: Index, name: str) -> MetaColumn:
    """Return what a file holds for a metadata column."""
    if name not in index.schema.names and name in partition_values(file.path):
        return TOLD_BY_FOLDERS
    path = column_path(file, index, name)
    field = index.schema.field(path[0])
    if not can_be_framed(field.type):
        raise FormatError(
            f"{file.url}: column {name!r} is {field.type}, which no frame holds; write its values themselves, or leave "
            "it out of meta_columns"
        )
    has_nulls = is_masked(field) or any(
        find_column(file, index, batch, path).has_nulls for batch in index.batches if batch.rows
    )
    if not pa.types.is_dictionary(field.type):
        return MetaColumn(field.type, has_nulls or pa.types.is_null(field.type))
    number = index.dictionary_of[path[0]] or 0
    parts = {id(part): part for known in index.dictionaries for part in known.get(number, ())}.values()
    return MetaColumn(field.type.value_type, has_nulls or any(int(part.nodes[0, 1]) for part in parts))


def arrow_row_nbytes(header: FileHeader, names: Sequence[str]) -> int:
    """Return about what a row of some columns takes."""
    nbytes, rows = _largest_nbytes(header.file, tuple(names))
    return nbytes // max(1, rows)


def decoder_nbytes(header: FileHeader, names: Sequence[str]) -> int:
    """Return what decoding some columns holds: a window of them, or those of a whole record batch if compressed."""
    nbytes = _largest_nbytes(header.file, tuple(names))[0]
    index = read_index(header.file)
    return nbytes if any(batch.codec for batch in index.batches) else min(nbytes, 2 * WINDOW_NBYTES)


@lru_cache(maxsize=64)
def _largest_nbytes(file: StoredFile, names: tuple[str, ...]) -> tuple[int, int]:
    """Return what some columns take in the largest record batch, and its rows."""
    index = read_index(file)
    paths = [path for name in names if (path := find_field(index.schema, name)) is not None]
    batch = max(index.batches, key=lambda batch: batch.rows, default=None)
    if batch is None:
        return 0, 0
    return sum(inflated_nbytes(file, find_column(file, index, batch, path)) for path in paths), batch.rows


def iter_arrow_tables(
    header: FileHeader, names: Sequence[str], start: int, stop: int, step: int
) -> Iterator[pa.RecordBatch]:
    """Decode the rows ``[start, stop)`` of some columns, in order, a few rows at a time.

    Raises
    ------
    FormatError
        If a record batch cannot be decoded.
    ReadError
        If the storage does not deliver it.
    """
    try:
        index = promised_index(header)
        paths = {name: column_path(header.file, index, name) for name in names}
        first = 0
        for number, batch in enumerate(index.batches):
            low, high = max(0, start - first), min(batch.rows, stop - first)
            if low < high:
                yield from open_batch(header.file, index, number, first, paths)(low, high, step)
            first += batch.rows
    except ReadError as error:
        raise type(error)(f"rows {start:,} to {stop:,}: {error}") from error


def promised_index(header: FileHeader) -> Index:
    """Return what a file holds, which has the rows that the header tells, maybe from a manifest that is wrong."""
    index = read_index(header.file)
    rows = index.batch_rows
    wanted = rows[header.first_group : header.first_group + len(header.group_rows)]
    if sum(rows) != header.rows or header.group_rows not in ((), (header.rows,), wanted):
        raise FormatError(
            f"{header.file.url}: holds {sum(rows):,} rows in {len(rows):,} record batches, "
            f"where {header.rows:,} rows in other ones were promised; save the manifest again if there is one, else "
            "open the collection again"
        )
    return index


def open_batch(
    file: StoredFile, index: Index, number: int, first: int, paths: Mapping[str, Path]
) -> Callable[[int, int, int], Iterator[pa.RecordBatch]]:
    """Return what decodes rows of columns of a record batch, which begins at a row: so many of them at a time."""
    decoders, window_rows = open_columns(file, index, number, list(paths.values()))

    def iter_rows(low: int, high: int, step: int) -> Iterator[pa.RecordBatch]:
        window = max(step, window_rows)
        for begin in range(low, high, window):
            end = min(high, begin + window)
            arrays = []
            for name, decode in zip(paths, decoders, strict=True):
                with decoding(file, first + begin, first + end, f"column {name!r}"):
                    arrays.append(decode(begin, end))
            for at in range(0, end - begin, step):
                yield pa.RecordBatch.from_arrays([_values_of(array.slice(at, step)) for array in arrays], list(paths))

    return iter_rows


def _values_of(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


@contextmanager
def decoding(file: StoredFile, start: int, stop: int, what: str) -> Iterator[None]:
    """Have what goes wrong when rows are decoded say which they are."""
    try:
        yield
    except EmbeddingReaderError:
        raise
    except Exception as error:
        raise FormatError(
            f"{file.url}, rows {start:,} to {stop:,}: {what} cannot be decoded: {describe(error)}; write the file again"
        ) from error
