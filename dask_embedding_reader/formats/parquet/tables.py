"""Metadata as Arrow columns that come back with the same dtypes and nulls."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from dask_embedding_reader.errors import ArgumentError, ColumnError, MismatchError
from dask_embedding_reader.formats.arrow_types import convert, decoded_type, frame_type
from dask_embedding_reader.formats.base import MetaColumn
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField
from dask_embedding_reader.formats.parquet.schema import arrow_schema
from dask_embedding_reader.formats.parquet.write import empty_file
from dask_embedding_reader.storage.retries import describe

_MASKED = b"masked"
"""Marks a column that pandas holds with a mask, until it is written."""


def is_masked(field: pa.Field) -> bool:
    """Tell whether pandas holds a column with a mask."""
    return _MASKED in (field.metadata or {})


def plain_array(array: Any, what: str) -> npt.NDArray[Any]:
    """Return a numpy array without a mask; raise an error where values would be written that are masked."""
    if np.ma.is_masked(array):
        raise ArgumentError(f"{what} has masked values, which files of vectors cannot tell; fill them: array.filled(…)")
    return np.asarray(array)


def make_table(frame: pd.DataFrame | None, embedding_column: str, first_row: int) -> pa.Table | None:
    """Return a frame as Arrow columns that come back with the same dtypes and nulls; None where it has none.

    Raises
    ------
    ColumnError
        If a column cannot be stored, or would be lost.
    """
    if frame is None:
        return None
    frame = _without_row_numbers(frame)
    fields, columns = [], []
    for position, name in enumerate(frame.columns):
        _check_name(name, frame.columns, embedding_column)
        field, column = _column(frame.iloc[:, position], name, first_row)
        fields.append(field)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=pa.schema(fields)) if fields else None


def mark_table(table: pa.Table | None, fields: Sequence[MetaField], embedding_column: str) -> pa.Table | None:
    """Return Arrow columns of a reader as :func:`make_table` returns those of frames; None where there are none.

    Raises
    ------
    ColumnError
        If a column would be lost.
    """
    if table is None:
        return None
    marked = []
    for field, column in zip(fields, table.columns, strict=True):
        _check_name(field.name, table.column_names, embedding_column)
        marked.append(_field(field.name, column, field.is_masked))
    # In one piece: where pages end must not depend on how the columns were read.
    return pa.Table.from_arrays(table.columns, schema=pa.schema(marked)).combine_chunks()


def _check_name(name: Any, names: Sequence[str] | pd.Index, embedding_column: str) -> None:
    if not isinstance(name, str):
        raise ColumnError(f"the metadata column {name!r} has no string for a name; rename it")
    if name != name.encode(errors="ignore").decode():
        raise ColumnError(
            f"the name of the metadata column {name!r} holds half a character (a lone surrogate); rename it"
        )
    if list(names).count(name) > 1:
        raise ColumnError(f"the metadata has more than one column {name!r}; rename or drop one of them")
    if name == embedding_column:
        raise ColumnError(
            f"the metadata column {name!r} has the name of the column of vectors; rename it, or give another "
            "embedding_column="
        )


def _without_row_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out the row numbers that readers make anew, and nothing else."""
    if any(name is not None and name != ROW_NUMBER for name in frame.index.names):
        raise ColumnError(
            f"the index {list(frame.index.names)} of the metadata would not be stored: make columns of it with "
            "frame.reset_index(), or drop it with frame.reset_index(drop=True)"
        )
    # Only where it is there: pandas 2.2 cannot copy big-endian columns.
    return frame.drop(columns=ROW_NUMBER) if ROW_NUMBER in frame.columns else frame


def _column(values: pd.Series[Any], name: str, first_row: int) -> tuple[pa.Field, pa.Array]:
    dtype = values.dtype
    try:
        if isinstance(dtype, pd.PeriodDtype | pd.IntervalDtype):
            raise TypeError("only pandas knows this type, and readers would find other values")
        if isinstance(dtype, np.dtype) and dtype.kind != "O":
            # NaN is a value of its own, and no null.
            column = pa.array(values.to_numpy().astype(dtype.newbyteorder("="), copy=False), from_pandas=False)
        else:
            column = pa.array(values, from_pandas=True)
            if isinstance(dtype, np.dtype):
                column = _as_held(values, column)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        column = convert(column, decoded_type(column.type))  # parquet makes its own dictionaries, readers get values
        _check_type(column.type)
        _check_seconds(column)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ColumnError(
            f"the metadata column {name!r} ({dtype}) cannot be stored, in rows {first_row:,} to "
            f"{first_row + len(values):,}: {describe(error)}; convert it to one type that parquet knows"
        ) from error
    return _field(name, column, isinstance(dtype, pd.api.extensions.ExtensionDtype) and dtype.kind in "biu"), column


def _as_held(values: pd.Series[Any], column: pa.Array) -> pa.Array:
    """Return Python objects as Arrow columns; raise an error where what Arrow makes of them is something else.

    It cuts the nanoseconds off the times of pandas, the hours off times among dates, and zones off times of the day.
    """
    kind = column.type
    are_times = pa.types.is_timestamp(kind) or pa.types.is_duration(kind)
    # Of Python's own times pandas might make others that end in 2262.
    if are_times and any(isinstance(one, pd.Timestamp | pd.Timedelta) for one in values):
        times = values.infer_objects()
        if times.dtype.kind in "mM":
            return pa.array(times, from_pandas=True)
    if _may_lose(kind):
        for value in values:
            _check_held(value, kind)
    return column


def _may_lose(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_may_lose(kind.field(place).type) for place in range(kind.num_fields))
    return bool(pa.types.is_temporal(kind) or pa.types.is_binary(kind))


def _check_held(value: Any, kind: pa.DataType) -> None:
    """Raise an error if a value is not what Arrow holds of it as a type."""
    if value is pd.NaT:  # it is a time of any type
        return
    if isinstance(value, dict):
        for name, item in value.items():
            if pa.types.is_struct(kind) and kind.get_field_index(name) >= 0:
                _check_held(item, kind.field(name).type)
    elif isinstance(value, list | tuple | set | frozenset) or (isinstance(value, np.ndarray) and value.dtype == object):
        for item in value:
            if pa.types.is_list(kind):
                _check_held(item, kind.value_type)
    elif pa.types.is_binary(kind) and isinstance(value, str):
        raise TypeError("some are text, others bytes")
    elif pa.types.is_date(kind) and isinstance(value, datetime):
        raise TypeError("some are dates, others have a time of the day")
    elif pa.types.is_time(kind) and getattr(value, "tzinfo", None) is not None:
        raise TypeError("times of the day with a zone lose it")
    elif pa.types.is_timestamp(kind) and isinstance(value, datetime):
        if (value.tzinfo is None) != (kind.tz is None):
            raise TypeError("some times have a zone, others have none")
        if isinstance(value, pd.Timestamp) and value.nanosecond:
            raise TypeError("the nanoseconds of pandas' times would be lost")
    elif pa.types.is_duration(kind) and isinstance(value, pd.Timedelta) and value.nanoseconds:
        raise TypeError("the nanoseconds of pandas' times would be lost")


def _field(name: str, column: pa.Array | pa.ChunkedArray, masked: bool) -> pa.Field:
    # Where there is a null, that says enough.
    return pa.field(name, column.type, metadata={_MASKED: b""} if masked and not column.null_count else None)


def check_fields(fields: Sequence[MetaField]) -> None:
    """Raise an error where parquet has no place for what a reader's columns hold.

    Raises
    ------
    ColumnError
        If values would come back as another type, or not at all.
    """
    for field in fields:
        try:
            _check_type(field.type)
        except TypeError as error:
            raise ColumnError(
                f"the metadata column {field.name!r} ({field.type}) cannot be stored: {error}; write "
                'file_format="arrow", which holds it, or leave it out of meta_columns'
            ) from error


def _check_type(kind: pa.DataType) -> None:
    """Raise an error where values would come back as another type, or not at all."""
    kind = frame_type(kind)  # which has a hash, too
    if (stored := _stored_type(kind)) != kind:
        raise TypeError(f"parquet holds {kind} as {stored}")


def _check_seconds(column: pa.Array | pa.ChunkedArray) -> None:
    """Raise an error where a time is none in milliseconds, as which seconds are stored: far years do not fit."""
    if pa.types.is_timestamp(column.type) and column.type.unit == "s":
        column.cast(pa.timestamp("ms", column.type.tz))


@lru_cache(maxsize=1_000)
def _stored_type(kind: pa.DataType) -> pa.DataType:
    """Return as what readers find a column of a type; of one that parquet has not, raise an error."""
    try:
        content = empty_file(pa.schema([("column", kind)]))
    except (pa.ArrowException, OSError) as error:  # OSError of decimals that end before the point
        raise TypeError(f"parquet has no {kind}: {describe(error)}") from error
    return arrow_schema(content).field(0).type


def join_tables(tables: Sequence[pa.Table | None]) -> pa.Table | None:
    """Put tables below each other; columns without a value yet take the type of the others.

    Raises
    ------
    MismatchError
        If a column has types that do not fit together.
    """
    try:
        return None if tables[0] is None else pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise MismatchError(
            f"a metadata column has different types in different rows: {error}; give it one dtype"
        ) from error


def described(table: pa.Table | None) -> pa.Schema:
    """Return what a table of metadata holds as a schema: names, types, and as ``nullable`` whether nulls may occur."""
    if table is None:
        return pa.schema([])
    return pa.schema(
        [
            field.with_nullable(bool(column.null_count) or is_masked(field)).remove_metadata()
            for field, column in zip(table.schema, table.columns, strict=True)
        ]
    )


def meta_columns(schema: pa.Schema) -> tuple[MetaColumn, ...]:
    """Return what :func:`described` says of each column, as file headers hold it."""
    return tuple(MetaColumn(field.type, field.nullable) for field in schema)
