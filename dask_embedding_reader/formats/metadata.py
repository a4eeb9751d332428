"""Metadata columns: one dtype for each, the same in every partition and every batch of a collection.

pandas guesses dtypes from values, so that an integer column becomes floating-point in the one batch that holds a null.
Here the dtype of a column follows from what all files say of it before any value is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_embedding_reader.errors import FormatError, MismatchError
from dask_embedding_reader.formats.arrow_types import (
    common_type,
    convert,
    frame_type,
    is_same,
    plain_type,
    takeable_chunks,
)
from dask_embedding_reader.formats.base import Array, MetaColumn
from dask_embedding_reader.storage.retries import describe

ROW_NUMBER = "i"
"""The name of the global row number: a column of batches, the index of the lazy frame."""

_MASKED = {
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""What a column becomes when it may hold nulls and numpy's own type cannot. Floating-point numbers can: NaN."""


class MetaField(NamedTuple):
    """One metadata column of the whole collection."""

    name: str
    """Its name."""
    type: pa.DataType
    """The Arrow type that holds the values of every file."""
    has_nulls: bool
    """Whether a null may occur in any file."""

    @property
    def dtype(self) -> Any:
        """The pandas dtype in partitions and batches."""
        kind = frame_type(self.type)
        if pa.types.is_large_string(kind):
            return pd.StringDtype("pyarrow")
        if self.is_masked:
            return _MASKED[kind]
        if kind in _MASKED or pa.types.is_floating(kind):
            return np.dtype(kind.to_pandas_dtype())
        if pa.types.is_timestamp(kind):
            return np.dtype(f"M8[{kind.unit}]") if kind.tz is None else pd.DatetimeTZDtype(kind.unit, kind.tz)
        if pa.types.is_duration(kind):
            return np.dtype(f"m8[{kind.unit}]")
        return pd.ArrowDtype(kind)

    @property
    def is_masked(self) -> bool:
        """Whether pandas holds it with a mask of nulls."""
        return self.has_nulls and frame_type(self.type) in _MASKED


def merge_columns(names: Sequence[str], urls: Sequence[str], files: Sequence[Sequence[MetaColumn]]) -> list[MetaField]:
    """Find the type of each column that holds the values of every file, which tell theirs, without changing any.

    Raises
    ------
    MismatchError
        If two files hold what no common type can hold, such as text and numbers.
    FormatError
        If pandas has no type for a column, as for times of an unknown zone.
    """
    fields = []
    for position, name in enumerate(names):
        merged, origin = pa.null(), ""
        has_nulls = False
        for kind, url in _distinct(urls, [columns[position] for columns in files]):
            has_nulls |= kind.has_nulls
            common = common_type(merged, plain_type(kind.type))
            if common is None:
                raise MismatchError(
                    f"{url}: column {name!r} is {kind.type}, but in {origin} it is {merged}; one column must have one "
                    "type in all files: write the file again, or leave the column out of meta_columns"
                )
            if common != merged:
                merged, origin = common, url
        fields.append(_checked(MetaField(name, merged, has_nulls), origin))
    return fields


def _checked(field: MetaField, url: str) -> MetaField:
    """Return a column if pandas has a type for it; the time zone may be unknown here, or damaged."""
    try:
        assert field.dtype is not None
    except Exception as error:
        raise FormatError(
            f"{url}: column {field.name!r} is {field.type}, for which there is no pandas type here: {describe(error)}; "
            "a newer tzdata may know its time zone (pip install tzdata), else leave the column out of meta_columns"
        ) from error
    return field


def _distinct(urls: Sequence[str], columns: Sequence[MetaColumn]) -> list[tuple[MetaColumn, str]]:
    """Keep the first file of each kind: thousands of files mostly agree."""
    first: dict[MetaColumn, str] = {}
    for column, url in zip(columns, urls, strict=True):
        try:
            first.setdefault(column, url)
        except TypeError:  # extension types that Python defines have no hash; what they are stored as has one
            first.setdefault(column._replace(type=frame_type(column.type)), url)
    return list(first.items())


def empty_frame(fields: Sequence[MetaField]) -> pd.DataFrame:
    """Return a frame of no rows with the right columns: what Dask calls its meta."""
    return pd.DataFrame({field.name: pd.array([], dtype=field.dtype) for field in fields})


def make_frame(
    fields: Sequence[MetaField],
    table: pa.Table,
    index: pd.Index,
    url: str,
    *,
    text_as_objects: bool = False,
    numbers: Array | None = None,
) -> pd.DataFrame:
    """Turn decoded columns of a file into a frame with the dtypes that the whole collection has.

    With ``text_as_objects`` text comes as Python's own strings, and None where it is null. Row ``numbers`` are the last
    column: put in afterwards, pandas would warn where there are a hundred others.

    Raises
    ------
    FormatError
        If a column is not what the file, or the manifest that tells of it, has promised.
    """
    columns: dict[str, Any] = {}
    for field in fields:
        values = _cast(field, table.column(field.name), frame_type(field.type), url)
        if text_as_objects and pa.types.is_large_string(values.type):
            columns[field.name] = pd.Series(values.to_numpy(), index, object, copy=False)  # pandas 3 would guess
        else:
            columns[field.name] = _values(field.dtype, values)
    if numbers is not None:
        columns[ROW_NUMBER] = numbers
    return pd.DataFrame(columns, index=index, copy=False)


def make_table(fields: Sequence[MetaField], table: pa.Table, url: str) -> pa.Table:
    """Turn decoded columns of a file into those that the whole collection has, as :func:`make_frame` does.

    Nothing is lost: NaN and null stay two things, and extension types stay.
    """
    columns = [_cast(field, table.column(field.name), field.type, url) for field in fields]
    return pa.Table.from_arrays(columns, [field.name for field in fields])


def _values(dtype: Any, values: pa.ChunkedArray) -> Any:
    if isinstance(dtype, pd.ArrowDtype):  # whose own way is a cast, by which pyarrow loses nulls in lists (pyarrow 26)
        return pd.arrays.ArrowExtensionArray(takeable_chunks(values))
    if hasattr(dtype, "__from_arrow__"):
        return dtype.__from_arrow__(values)
    array = values.to_numpy()
    return array if array.flags.writeable else array.copy()  # users write into their batches


def _cast(field: MetaField, values: pa.ChunkedArray, kind: pa.DataType, url: str) -> pa.ChunkedArray:
    """Return values in the type that holds those of every file. What was told of them, and led to it, may be wrong."""
    if values.null_count and not field.has_nulls and frame_type(field.type) in _MASKED:
        raise FormatError(
            f"{url}: column {field.name!r} holds nulls, but its statistics promise that there is none; write the file "
            "again, or leave the column out of meta_columns"
        )
    if is_same(values.type, kind):
        return values
    problem = ""
    common = common_type(field.type, plain_type(values.type))
    # Seconds are stored as milliseconds, which may be no whole seconds.
    if common == field.type or (common is not None and getattr(field.type, "unit", None) == "s"):
        try:
            return pa.chunked_array([convert(chunk, kind) for chunk in values.chunks], kind)
        except pa.ArrowException as error:
            problem = f" ({describe(error)})"
    raise FormatError(
        f"{url}: column {field.name!r} is {values.type}, which does not hold the promised {field.type}{problem}; save "
        "the manifest again if there is one, else write the file again, or leave the column out of meta_columns"
    )
