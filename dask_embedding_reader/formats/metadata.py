"""Metadata columns: one dtype for each, the same in every partition and every batch of a collection.

pandas guesses dtypes from values, so that an integer column becomes floating-point in the one batch that holds a null.
Here the dtype of a column follows from what all files say of it before any value is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_embedding_reader.errors import FormatError, MismatchError
from dask_embedding_reader.formats import MetaColumn
from dask_embedding_reader.retries import describe

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
    pa.float32(): pd.Float32Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""What a numeric column becomes when it may hold nulls: numpy's own types cannot."""


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
        kind = self.type
        if pa.types.is_large_string(kind):
            return pd.StringDtype("pyarrow")
        if kind in _MASKED:
            return _MASKED[kind] if self.has_nulls else np.dtype(kind.to_pandas_dtype())
        if pa.types.is_float16(kind) and not self.has_nulls:  # pandas has no masked one
            return np.dtype(np.float16)
        if pa.types.is_timestamp(kind):
            return np.dtype(f"M8[{kind.unit}]") if kind.tz is None else pd.DatetimeTZDtype(kind.unit, kind.tz)
        if pa.types.is_duration(kind):
            return np.dtype(f"m8[{kind.unit}]")
        return pd.ArrowDtype(kind)


def merge_columns(names: Sequence[str], urls: Sequence[str], files: Sequence[Sequence[MetaColumn]]) -> list[MetaField]:
    """Find the type of each column that holds the values of every file without changing any.

    Parameters
    ----------
    names
        The columns.
    urls
        The files, for messages.
    files
        What each file holds for each column.

    Raises
    ------
    MismatchError
        If two files hold what no common type can hold exactly, such as integers and floating-point numbers.
    FormatError
        If pandas has no type for a column, as for times of an unknown zone.
    """
    fields = []
    for position, name in enumerate(names):
        merged, origin = pa.null(), ""
        has_nulls = False
        for kind, url in _distinct(name, urls, [columns[position] for columns in files]):
            has_nulls |= kind.has_nulls
            common = _common_type(merged, _plain(kind.type))
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


def _distinct(name: str, urls: Sequence[str], columns: Sequence[MetaColumn]) -> list[tuple[MetaColumn, str]]:
    """Keep the first file of each kind: thousands of files mostly agree."""
    first: dict[MetaColumn, str] = {}
    for column, url in zip(columns, urls, strict=True):
        try:
            first.setdefault(column, url)
        except TypeError:  # such a type has no hash; pyarrow before 18 makes one, and rightly unpickles nothing for it
            raise FormatError(
                f"{url}: column {name!r} is {column.type}, a pickled Python type, which is not opened; write the file "
                "again with plain types, or leave the column out of meta_columns"
            ) from None
    return list(first.items())


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind) or kind == _STRING_VIEW:
        return pa.large_string()
    return pa.large_binary() if kind == _BINARY_VIEW else kind


_STRING_VIEW, _BINARY_VIEW = (pa.string_view(), pa.binary_view()) if hasattr(pa, "string_view") else (None, None)
"""pyarrow cannot take rows of these."""


def _common_type(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    for same_kind in (pa.types.is_signed_integer, pa.types.is_unsigned_integer, pa.types.is_floating):
        if same_kind(left) and same_kind(right):
            return max(left, right, key=lambda kind: kind.bit_width)
    for coarse, fine in ((left, right), (right, left)):  # parquet has no seconds, but some files tell of them
        if pa.types.is_timestamp(coarse) and (coarse.unit, fine) == ("s", pa.timestamp("ms", coarse.tz)):
            return fine
        if (coarse, fine) == (pa.time32("s"), pa.time32("ms")):
            return fine
    return None


def empty_frame(fields: Sequence[MetaField]) -> pd.DataFrame:
    """Return a frame of no rows with the right columns: what Dask calls its meta."""
    return pd.DataFrame({field.name: pd.array([], dtype=field.dtype) for field in fields})


def make_frame(fields: Sequence[MetaField], table: pa.Table, index: pd.Index, url: str) -> pd.DataFrame:
    """Turn decoded columns of a file into a frame with the dtypes that the whole collection has.

    Raises
    ------
    FormatError
        If a column is not what the file, or the manifest that tells of it, has promised.
    """
    columns = {field.name: _values(field, table.column(field.name), url) for field in fields}
    return pd.DataFrame(columns, index=index, copy=False)


def _values(field: MetaField, values: pa.ChunkedArray, url: str) -> Any:
    dtype = field.dtype
    values = _cast(field, values, url)
    # Where the dtype has a place for nulls, it does not matter that they were denied.
    if values.null_count and not field.has_nulls and isinstance(dtype, np.dtype) and dtype.kind in "biu":
        raise FormatError(
            f"{url}: column {field.name!r} holds nulls, but its statistics promise that there is none; write the file "
            "again, or leave the column out of meta_columns"
        )
    if hasattr(dtype, "__from_arrow__"):
        return dtype.__from_arrow__(values)
    if dtype.kind in "mM":
        return values.to_pandas().to_numpy()
    array = values.to_numpy()
    return array if array.flags.writeable else array.copy()  # users write into their batches


def _cast(field: MetaField, values: pa.ChunkedArray, url: str) -> pa.ChunkedArray:
    """Return values in the type that holds those of every file. What was told of them, and led to it, may be wrong."""
    stored = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    common = _common_type(field.type, _plain(stored))
    # What has a common type only with what is finer, is seconds, which are stored as milliseconds.
    if common == field.type or (common is not None and pa.types.is_temporal(field.type)):
        with suppress(pa.ArrowException):  # milliseconds may be no whole seconds
            return values.cast(field.type)
    raise FormatError(
        f"{url}: column {field.name!r} is {stored}, which does not hold the promised {field.type}; save the manifest "
        "again if there is one, else write the file again, or leave the column out of meta_columns"
    )
