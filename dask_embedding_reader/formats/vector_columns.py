"""Columns of vectors: which types hold them, and decoded columns as arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import ArgumentError, ColumnError, FormatError
from dask_embedding_reader.formats.base import Array, Columns, FileHeader
from dask_embedding_reader.formats.column_names import few, number_columns

_PARSING = (
    "parse it and write the files again: frame[{name!r}].map(json.loads) for JSON, "
    "frame[{name!r}].map(lambda text: np.array(text.strip('[]').split(), 'float32')) for numbers between blanks, "
    "frame[{name!r}].map(lambda text: np.frombuffer(base64.b64decode(text), 'float32')) for base64"
)
"""What to do with text."""


def type_of_items(
    url: str, field: pa.Field, columns: Columns, remedy: Callable[[], str]
) -> tuple[np.dtype[Any], int | None]:
    """Return the dtype of the items of a column of vectors, and its dimension if the type tells it.

    Raises
    ------
    FormatError
        If it holds no vectors; the remedy says what to do.
    ArgumentError
        If the dtype is not told, or told twice.
    """
    kind, where = _stored(field.type), f"{url}: column {field.name!r}"
    if pa.types.is_fixed_size_binary(kind):
        dtype = _binary_dtype(f"{where} is binary of {kind.byte_width} bytes", columns)
        return dtype, binary_dimension(f"{where} is binary of {kind.byte_width} bytes", kind.byte_width, dtype)
    if is_binary(kind):
        return _binary_dtype(f"{where} is {kind}", columns), None
    item = item_type(kind)
    if item is None:
        if isinstance(kind, pa.FixedShapeTensorType):
            raise FormatError(
                f"{where} holds tensors of shape {tuple(kind.shape)}; only those of one axis or row are vectors: "
                "reshape them, and write the file again"
            )
        if columns.embedding_dtype is not None:
            raise ArgumentError(f"{where} is {kind}, which is not binary: embedding_dtype says nothing of it")
        if is_list(kind) or pa.types.is_fixed_size_list(kind):
            what = "; its items must be integers or floating-point numbers"
        elif pa.types.is_struct(kind) and (fields := [each.name for each in kind if item_type(each.type) is not None]):
            raise FormatError(
                f"{where} is {kind}, not a list of numbers; name its field: "
                f"embedding_column={f'{field.name}.{fields[0]}'!r}"
            )
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view":
            likely = f"{remedy()}, or " if "such as" in remedy() else ""
            raise FormatError(f"{where} is {kind}, not a list of numbers; {likely}{_PARSING.format(name=field.name)}")
        else:
            what = ", not a list of numbers"
        raise FormatError(f"{where} is {kind}{what}; {remedy()}")
    if columns.embedding_dtype is not None:
        raise ArgumentError(f"{where} is {kind}, which tells its own dtype; leave embedding_dtype out")
    if isinstance(kind, pa.FixedShapeTensorType):
        dimension = math.prod(kind.shape)
    else:
        dimension = kind.list_size if pa.types.is_fixed_size_list(kind) and not is_nested(kind) else None
    return np.dtype(item.to_pandas_dtype()), dimension


def type_of_columns(
    url: str, columns: Columns, fields: Sequence[pa.Field], names: Sequence[str]
) -> tuple[np.dtype[Any], int]:
    """Return the dtype that columns of items share, and how many they are, of a file that has more columns.

    Raises
    ------
    ColumnError
        If they are not all that their pattern names.
    FormatError
        If they do not hold numbers of one type.
    """
    if columns.glob and (others := set(number_columns(url, columns.glob, names)) - set(columns.vectors)):
        raise ColumnError(
            f"{url}: {columns.glob!r} names the columns {few(sorted(others))}, too, which the first file lacks; open "
            "the files separately, or list the names (embedding_column=[...])"
        )
    first = fields[0]
    for field in fields:
        if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            raise FormatError(
                f"{url}: column {field.name!r} is {field.type}, not a number; where it is the column of vectors "
                "itself, name it alone"
            )
        if field.type != first.type:
            raise FormatError(
                f"{url}: column {field.name!r} is {field.type}, but {first.name!r} is {first.type}; items of vectors "
                "have one type: cast the columns, and write the file again"
            )
    return np.dtype(first.type.to_pandas_dtype()), len(fields)


def item_type(kind: pa.DataType) -> pa.DataType | None:
    """Return what lists that may be vectors consist of; None for other types."""
    if isinstance(kind, pa.FixedShapeTensorType):
        # Of shape (D,), or (1, D) and the like, which is the same.
        item = kind.value_type if sum(length != 1 for length in kind.shape) <= 1 else None
    else:
        kind = _stored(kind)
        item = kind.value_type.value_type if is_nested(kind) else kind.value_type if _is_any_list(kind) else None
    return item if item is not None and (pa.types.is_floating(item) or pa.types.is_integer(item)) else None


def is_ml_vector(kind: pa.DataType) -> bool:
    """Tell whether a type is what Spark ML stores its vectors as, dense ones and sparse ones."""
    if not pa.types.is_struct(kind) or [field.name for field in kind] != ["type", "size", "indices", "values"]:
        return False
    code, size, indices, values = (field.type for field in kind)
    # The items of lists as such: whether they may be null is part of the type of a list.
    return (code, size) == (pa.int8(), pa.int32()) and all(
        is_list(each) and each.value_type == item for each, item in ((indices, pa.int32()), (values, pa.float64()))
    )


_DENSE = 1
"""What Spark ML calls dense vectors by."""


def is_nested(kind: pa.DataType) -> bool:
    """Tell whether a type is that of lists of lists, of which each may hold one vector."""
    kind = _stored(kind)
    return _is_any_list(kind) and _is_any_list(kind.value_type)


def _stored(kind: pa.DataType) -> pa.DataType:
    """Return the type that values are stored as.

    Types of other libraries (``Array2D`` of datasets) are known as such only where these are imported. Those of Arrow
    itself, tensors and UUIDs, say what they are.
    """
    return kind.storage_type if isinstance(kind, pa.ExtensionType) else kind


def _is_any_list(kind: pa.DataType) -> bool:
    return is_list(kind) or bool(pa.types.is_fixed_size_list(kind))


def is_list(kind: pa.DataType) -> bool:
    """Tell whether a type is that of lists that tell their lengths, in any of Arrow's ways."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) or is_list_view(kind)


def is_list_view(kind: pa.DataType) -> bool:
    """Tell whether a type is that of lists that tell where their items are: in any order, maybe not all."""
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Tell whether a type is that of bytes that tell their lengths."""
    kind = _stored(kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) or str(kind) == "binary_view"


def is_bytes(kind: pa.DataType) -> bool:
    """Tell whether a type is that of bytes, of one length or of many."""
    return is_binary(kind) or bool(pa.types.is_fixed_size_binary(_stored(kind)))


def _binary_dtype(where: str, columns: Columns) -> np.dtype[Any]:
    if columns.embedding_dtype is None:
        raise ArgumentError(f"{where} and does not tell its dtype; give embedding_dtype=...")
    return columns.embedding_dtype


def binary_dimension(where: str, width: int, dtype: np.dtype[Any]) -> int:
    """Return how many items of a dtype so many bytes are."""
    if width == 0 or width % dtype.itemsize:
        raise FormatError(f"{where}, which is no whole number of {dtype} items")
    return width // dtype.itemsize


def as_vectors(header: FileHeader, columns: Columns, start: int, column: pa.Array) -> Array:
    """View a decoded column as a 2-D array; fail on the first vector that is null or of another length."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    rows, dimension = len(column), header.dimension
    if column.null_count:
        bad_vector(header, columns, start + _first_null(column), "is null")
    if is_ml_vector(column.type):
        is_dense = column.field("type").fill_null(_DENSE - 1).to_numpy() == _DENSE
        if not is_dense.all():
            what = "is sparse; make dense ones with pyspark.ml.functions.vector_to_array, and write the files again"
            raise FormatError(
                f"{header.file.url}, row {start + int(np.argmin(is_dense)):,}: column {columns.column!r} holds a "
                f"vector that {what}"
            )
        return as_vectors(header, columns, start, column.field("values"))
    if pa.types.is_fixed_size_binary(column.type):
        binary = np.frombuffer(column.buffers()[1], header.dtype)
        return binary[column.offset * dimension : (column.offset + rows) * dimension].reshape(rows, dimension)
    if is_nested(column.type):
        lengths = lengths_of(column)
        if (lengths != 1).any():
            bad = int(np.argmax(lengths != 1))
            what = f"is {counted(int(lengths[bad]), 'list')}"
            bad_vector(header, columns, start + bad, what, "one list", ", or give each list a row: frame.explode")
        column = column.flatten()
        if column.null_count:
            bad_vector(header, columns, start + _first_null(column), "is null")
    unit, size = "item", dimension
    if is_binary(column.type):
        column = column.cast(pa.large_binary())
        unit, size = "byte", dimension * header.dtype.itemsize
    if not pa.types.is_fixed_size_list(column.type):
        lengths = lengths_of(column)
        if (lengths != size).any():
            bad = int(np.argmax(lengths != size))
            bad_vector(header, columns, start + bad, f"has {counted(int(lengths[bad]), unit)}", counted(size, unit))
    if is_binary(column.type):
        _, offsets, values = column.buffers()
        first = int(np.frombuffer(offsets, np.int64)[column.offset]) if rows else 0
        raw = np.frombuffer(values, np.uint8, rows * size, first) if rows else np.empty(0, np.uint8)
        return raw.view(header.dtype).reshape(rows, dimension)
    values = column.flatten()
    if values.null_count:
        bad_vector(header, columns, start + _first_null(values) // dimension, "has a null item")
    items: Array = values.to_numpy()
    return items.reshape(rows, dimension)


def join_items(header: FileHeader, columns: Columns, start: int, batch: pa.RecordBatch) -> Array:
    """Return decoded columns, one for each item of the vectors, as a 2-D array; fail on the first null."""
    for name, column in zip(columns.vectors, batch.columns, strict=True):
        if column.null_count:
            raise FormatError(
                f"{header.file.url}, row {start + _first_null(column):,}: column {name!r} is null where an item of a "
                "vector was expected; drop or repair the row"
            )
    return np.stack([column.to_numpy() for column in batch.columns], axis=1)


def _first_null(column: pa.Array) -> int:
    return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))


def lengths_of(column: pa.Array) -> Array:
    """Return the length of each list or large binary value; of those that are null it may be any."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if is_ml_vector(column.type):
        column = column.field("values")
    if is_list_view(column.type):
        return column.sizes.to_numpy()  # type: ignore[no-any-return]
    if is_binary(column.type):
        _, offsets, _ = column.buffers()
        return np.diff(np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset))
    if pa.types.is_fixed_size_list(column.type):
        return np.full(len(column), column.type.list_size)
    return np.diff(column.offsets.to_numpy())


def bad_vector(
    header: FileHeader, columns: Columns, row: int, what: str, expected: str = "", otherwise: str = ""
) -> NoReturn:
    """Say which vector is none, and why."""
    expected = expected or (counted(header.dimension, "item") if header.dimension else "")
    others = f" where vectors of {expected} were expected" if expected else ""
    raise FormatError(
        f"{header.file.url}, row {row:,}: column {columns.embedding!r} holds a vector that {what}{others}; drop or "
        f"repair it{otherwise}"
    )
