"""What a footer tells of the columns of a file: which hold vectors, of which dtype and dimension, and nulls."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.base import DEFAULT_COLUMN, Columns, FileHeader, MetaColumn
from dask_embedding_reader.formats.column_names import (
    MOST_COMPARED,
    fields_of,
    find_field,
    name_vectors,
    no_column,
    no_column_of_vectors,
)
from dask_embedding_reader.formats.parquet.decode import iter_tables
from dask_embedding_reader.formats.parquet.footer import Footer
from dask_embedding_reader.formats.parquet.footers import read_footer
from dask_embedding_reader.formats.partitions import TOLD_BY_FOLDERS, partition_values
from dask_embedding_reader.formats.vector_columns import (
    as_vectors,
    bad_vector,
    binary_dimension,
    is_binary,
    is_bytes,
    is_ml_vector,
    is_nested,
    item_type,
    lengths_of,
    type_of_columns,
    type_of_items,
)
from dask_embedding_reader.storage.store import StoredFile

_PEEK_NBYTES = 2**20
"""Of a large remote column as much is fetched at a time where only the first vectors are wanted."""

_PEEK_ROWS = 100
"""Most of so many tell how long the others should be."""


def read_header(file: StoredFile, columns: Columns) -> FileHeader:
    """Read the footer of a parquet file: rows, row groups, and what the wanted columns hold."""
    footer = read_footer(file, _names(columns))
    rows = sum(footer.group_rows)
    header = FileHeader(file, rows, 0, np.dtype(np.float32), group_rows=footer.group_rows)
    if not rows:  # its columns are of any type then, or missing: pandas and Dask write such shards
        return header._replace(meta=(MetaColumn(pa.null(), True),) * len(columns.meta))
    if columns.embedding is not None:
        find_type = columns_type if isinstance(columns.embedding, tuple) else _vector_type
        dtype, dimension = find_type(header, footer, columns)
        header = header._replace(dtype=dtype, dimension=dimension)
    return header._replace(meta=tuple(_meta_column(file, footer, name) for name in columns.meta))


def _names(columns: Columns) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*columns.vectors, *columns.meta]))


def find_vectors(file: StoredFile, columns: Columns) -> list[str] | None:
    """Return the columns that may be that of vectors; None if the file has no rows, and maybe no columns."""
    footer = read_footer(file, (DEFAULT_COLUMN,))
    if not sum(footer.group_rows):
        return None
    names = list(footer.schema.names)
    if DEFAULT_COLUMN in names:
        return [DEFAULT_COLUMN]
    if columns.embedding_dtype is not None:
        binary = [field.name for field in footer.schema.arrow if is_bytes(field.type)]
        return [name for name in binary if names.count(name) == 1]
    return _columns_of_vectors(footer)


def _field(file: StoredFile, footer: Footer, name: str) -> tuple[pa.Field, range]:
    """Return the field of a column and the indices of its leaves in the footer."""
    indices = footer.schema.arrow.get_all_field_indices(name)
    if len(indices) != 1:
        raise no_column(file.url, footer.schema.names, name)
    return footer.schema.arrow.field(indices[0]), footer.schema.leaves[indices[0]]


def vector_field(file: StoredFile, footer: Footer, name: str) -> tuple[pa.Field, range]:
    """The same of the column of vectors, which may be a field of a struct."""
    path = find_field(footer.schema.arrow, name)
    if path is None:
        schema = footer.schema
        raise no_column_of_vectors(file.url, schema.arrow, schema.names, name, _columns_of_vectors(footer))
    leaves = footer.schema.leaves[path[0]]
    inside = [leaf for leaf in leaves if len(path) == 1 or f"{footer.schema.paths[leaf]}.".startswith(f"{name}.")]
    return fields_of(footer.schema.arrow, path)[-1].with_name(name), range(inside[0], inside[-1] + 1)


def _columns_of_vectors(footer: Footer) -> list[str]:
    """Return the columns that may be that of vectors: those of numbers in lists of one length."""
    kinds = {field.name: field.type for field in footer.schema.arrow}
    names = [name for name, kind in kinds.items() if item_type(kind) is not None or is_ml_vector(kind)][:MOST_COMPARED]
    found = []
    for name in names:
        indices = footer.schema.arrow.get_all_field_indices(name)
        try:
            chunks = footer.chunks(footer.schema.leaves[indices[0]][0])
        except FormatError:  # what is wrong with others is not what was asked for
            continue
        lengths = {divmod(chunk.values, rows) for chunk, rows in zip(chunks, footer.group_rows, strict=True) if rows}
        if len(indices) == 1 and len(lengths) == 1 and lengths.pop()[1] == 0:
            found.append(name)
    return found


def _meta_column(file: StoredFile, footer: Footer, name: str) -> MetaColumn:
    if name not in footer.schema.names and name in partition_values(file.path):
        return TOLD_BY_FOLDERS
    field, leaves = _field(file, footer, name)
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    may_hold_nulls = [footer.may_hold_nulls(leaf) for leaf in leaves]  # all are asked: one may be encrypted
    told_wrongly = pa.types.is_dictionary(field.type) and _counts_nulls_wrongly(footer.writer)
    return MetaColumn(kind, field.nullable and (told_wrongly or any(may_hold_nulls)))


def _counts_nulls_wrongly(writer: str) -> bool:
    """Tell whether the writer says of dictionaries that they hold no nulls, whatever they hold: Arrow before 5."""
    version = re.match(r"parquet-cpp(?:-arrow)? version (\d+)\.", writer)
    return version is not None and int(version[1]) < 5


def _vector_type(header: FileHeader, footer: Footer, columns: Columns) -> tuple[np.dtype[Any], int]:
    """Return the dtype and dimension of the vector column, told by the footer alone wherever it can."""
    field, leaves = vector_field(header.file, footer, columns.column)
    dtype, dimension = items_of(header.file, field, columns, footer)
    if is_binary(field.type):
        dimension = _first_width(header, columns, dtype)
    elif not pa.types.is_fixed_size_binary(field.type):
        # The items come last of what Spark ML stores for a vector.
        dimension = _dimension(header._replace(dtype=dtype), columns, footer, leaves[-1], dimension)
    if not dimension:
        raise FormatError(f"{header.file.url}: column {field.name!r} holds vectors of no items")
    # The counts do not tell whether each has one list, or is dense; the others are looked at when read.
    if is_nested(field.type) or is_ml_vector(field.type):
        as_vectors(header._replace(dtype=dtype, dimension=dimension), columns, 0, _first_values(header, columns))
    return dtype, dimension


def columns_type(header: FileHeader, footer: Footer, columns: Columns) -> tuple[np.dtype[Any], int]:
    """Return the dtype that the columns of items share, and how many they are."""
    fields = [_field(header.file, footer, name)[0] for name in columns.vectors]
    return type_of_columns(header.file.url, columns, fields, footer.schema.names)


def items_of(file: StoredFile, field: pa.Field, columns: Columns, footer: Footer) -> tuple[np.dtype[Any], int | None]:
    """Return the dtype of the items of a column, and the dimension of its vectors if its type tells it."""
    if is_ml_vector(field.type) and columns.embedding_dtype is None:
        return np.dtype(np.float64), None
    return type_of_items(
        file.url, field, columns, lambda: name_vectors(footer.schema.arrow, _columns_of_vectors(footer))
    )


def _first_width(header: FileHeader, columns: Columns, dtype: np.dtype[Any]) -> int:
    """Return the dimension of the first vectors of a column of bytes: only the values tell their lengths."""
    lengths = Counter(len(value) for value in _first_values(header, columns).to_pylist() if value is not None)
    if not lengths:
        bad_vector(header, columns, 0, "is null")
    width = lengths.most_common(1)[0][0]
    return binary_dimension(f"{header.file.url}: column {columns.column!r} holds {width} bytes a row", width, dtype)


def _first_values(header: FileHeader, columns: Columns) -> pa.Array:
    stop = min(header.rows, _PEEK_ROWS)
    return next(iter_tables(header, (columns.column,), 0, stop, stop, _PEEK_NBYTES)).column(0)


def _dimension(header: FileHeader, columns: Columns, footer: Footer, leaf: int, dimension: int | None) -> int:
    """Return how many items each vector has, from the counts of items and rows; ragged vectors mostly show here."""
    groups = list(zip(footer.group_rows, footer.chunks(leaf), strict=True))
    if dimension is None:
        lengths: Counter[int] = Counter()
        for rows, chunk in groups:
            if rows and not chunk.nulls and chunk.values % rows == 0:
                lengths[chunk.values // rows] += rows
        dimension = lengths.most_common(1)[0][0] if lengths else _most_common_length(header, columns)
    header = header._replace(dimension=dimension)
    start = 0
    for rows, chunk in groups:
        if rows and (chunk.nulls or chunk.values != rows * dimension):
            # The counts do not tell which row it is; and they may be wrong themselves.
            first = start
            for table in iter_tables(header, (columns.column,), start, start + rows):
                as_vectors(header, columns, first, table.column(0))
                first += table.num_rows
        start += rows
    return dimension


def _most_common_length(header: FileHeader, columns: Columns) -> int:
    """Return the dimension of most vectors of the first row group, where some are null or of another length."""
    lengths: Counter[int] = Counter()
    start = 0
    stop = next(rows for rows in header.group_rows if rows)
    for table in iter_tables(header, (columns.column,), start, stop):
        column = table.column(0)
        lengths.update(lengths_of(column)[column.is_valid().to_numpy(zero_copy_only=False)].tolist())
    return lengths.most_common(1)[0][0] if lengths else 0
