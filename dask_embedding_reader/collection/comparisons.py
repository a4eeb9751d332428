"""Which values of a column satisfy a comparison: numbers by what they are worth, whatever type holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import ROUND_FLOOR, Context, Decimal
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.storage.retries import describe

Comparison = Callable[[pa.Table], Any]
"""Tells of each row of a table whether it satisfies a comparison: true, false, or null where the column is null."""

_OnColumn = Callable[[pa.ChunkedArray], Any]

_COMPARISONS: dict[str, Callable[..., Any]] = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_EQUAL = ("=", "==", "!=")
SET_OPERATORS = ("in", "not in")
OPERATORS = (*_COMPARISONS, *SET_OPERATORS)


def make_comparison(name: str, operator: str, value: Any) -> Comparison:
    """Return what compares a column with a value, or looks it up in several.

    It raises ArgumentError where they cannot be compared.
    """
    # Files may have a column as different types: a set of a million values is made ready once for each of these.
    on_column = cache(partial(_in_set if operator in SET_OPERATORS else _with_value, operator, value))

    def compare(table: pa.Table) -> Any:
        column = _plain(table.column(name))
        try:
            return on_column(column.type)(column)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ArgumentError(
                f"the column {name!r} is {column.type}, which cannot be compared with {_short(value)} ({operator}): "
                f"{describe(error)}{_remedy(column.type)}"
            ) from error

    return compare


def exact_value(value: Any) -> Any:
    """Return a value, or several as a list, as Arrow takes them for what they are.

    It takes the times of pandas for Python's, without their nanoseconds, and numbers of numpy in a list for any other.
    """
    if isinstance(value, pd.Series | pd.Index):
        value = (value if value.dtype.kind == "f" else value.dropna()).tolist()  # a NaN is a number, not a null
    if isinstance(value, np.ndarray):
        # Of times that Python's own cannot hold, numpy makes integers.
        is_fine = value.dtype.kind in "mM" and np.datetime_data(value.dtype)[0] in ("ns", "ps", "fs", "as")
        value = list(pa.array(value)) if is_fine else value.tolist()
    return _exact_items(list(value)) if isinstance(value, list | tuple | set | frozenset) else _exact_items([value])[0]


def _exact_items(values: list[Any]) -> list[Any]:
    values = [one if type(one) in _OF_PYTHON else _without_numpy(one) for one in values]
    if not any(map(_has_nanoseconds, values)):
        return values
    times = pd.Index(values)
    if times.dtype.kind in "mM":
        return list(pa.array(times))
    # What pandas does not hold as times of one type, Arrow refuses.
    return [pa.array(pd.Index([one]))[0] if _has_nanoseconds(one) else one for one in values]


_OF_PYTHON = {int, float, str, bool, type(None)}


def _without_numpy(value: Any) -> Any:
    """Return a number or a time of numpy as Python or pandas has it, and what is missing in pandas as None."""
    if value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, np.datetime64 | np.timedelta64):
        if np.isnat(value):
            return None
        return pd.Timestamp(value) if isinstance(value, np.datetime64) else pd.Timedelta(value)
    return value.item() if isinstance(value, np.number) else value


def _has_nanoseconds(value: Any) -> bool:
    if isinstance(value, pd.Timestamp):
        return bool(value.nanosecond)
    return isinstance(value, pd.Timedelta) and bool(value.nanoseconds)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as a type that has functions: dictionaries, views of text, half floats, small decimals have few.

    Types of other libraries have none; they are known as such only where these are imported.
    """
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if str(kind) == "string_view":
        return column.cast(pa.large_string())
    if pa.types.is_float16(kind):
        return column.cast(pa.float32())
    if pa.types.is_decimal(kind) and kind.bit_width < 128:
        return column.cast(pa.decimal128(kind.precision, kind.scale))
    return column


def _with_value(operator: str, value: Any, kind: pa.DataType) -> _OnColumn:
    """Return what compares columns of a type with one value."""
    compare = _COMPARISONS[operator]
    if value is None:
        return lambda column: pa.nulls(len(column), pa.bool_())
    if _are_numbers([value], kind):
        return _with_number(operator, value, kind)
    if pa.types.is_null(kind):
        return lambda column: pa.nulls(len(column), pa.bool_())
    scalar = _in_zone(pa.scalar(value), kind)
    if isinstance(value, str) and pa.types.is_temporal(kind):  # as pandas and a set of values have it
        scalar = scalar.cast(kind)
    return lambda column: compare(column, scalar)


def _in_set(operator: str, values: Any, kind: pa.DataType) -> _OnColumn:
    """Return what looks up columns of a type in a set of values."""
    if pa.types.is_null(kind):
        return lambda column: pa.nulls(len(column), pa.bool_())
    items = [item for item in values if item is not None]
    is_floating = pa.types.is_floating(kind)
    held = _held_numbers(items, kind) if _are_numbers(items, kind) else _held_values(items, _widest(kind))
    if is_floating:  # two zeros are equal, but not found as each other
        held = pc.add(held, _ZERO)

    def compare(column: pa.ChunkedArray) -> Any:
        plain = pc.add(column, _ZERO) if is_floating else column
        found = pc.is_in(plain, value_set=held, skip_nulls=True)
        return pc.if_else(pc.is_null(column), None, found if operator == "in" else pc.invert(found))

    return compare


_ZERO = pa.scalar(0, pa.float64())


def _held_values(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return those of some values that a type holds exactly: a column of it has no others."""
    # Of several types Arrow takes the first for all: dates lose the hours of times after them, and 5 becomes a day.
    alike: dict[Any, list[Any]] = {}
    for value in values:
        alike.setdefault((type(value), getattr(value, "tzinfo", None) is None), []).append(value)
    held = [_held(_in_zone(pa.array(some), kind), kind) for some in alike.values()]
    return pa.concat_arrays(held) if held else pa.array([], kind)


def _held(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if values.type == kind:
        return values
    found = values.cast(kind, safe=False)
    try:
        return found.filter(pc.equal(found, values))
    except pa.ArrowException:
        # Not compared with columns of this type, but maybe read as such: text. Arrow would read 5 as a time, too.
        if not any(is_kind(values.type) for is_kind in (pa.types.is_string, pa.types.is_binary, pa.types.is_decimal)):
            raise
        return values.cast(kind)


def _in_zone(times: Any, kind: pa.DataType) -> Any:
    """Return times of another time zone, an array or one of them, in that of a type: Arrow compares no others."""
    if not all(pa.types.is_timestamp(one) and one.tz for one in (times.type, kind)):
        return times
    return times.cast(pa.timestamp(times.type.unit, kind.tz))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers. Arrow makes one type of two, which may hold neither exactly: it refuses 0.5 beside a hash of 64 bits, and
# 20,000,000 beside float32, and takes decimals of 18 digits for the nearest float.


def _are_numbers(values: Sequence[Any], kind: pa.DataType) -> bool:
    """Tell whether all values, and those of a type, are numbers that Python compares exactly with each other."""
    if pa.types.is_decimal(kind):
        return set(map(type, values)) <= {int, float, Decimal}
    return (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and set(map(type, values)) <= {int, float}


def _with_number(operator: str, number: Any, kind: pa.DataType) -> _OnColumn:
    """Return what compares columns of numbers with one, by way of the greatest of their type that is not above it."""
    number = _written(number, kind)
    floor = _floor(number, kind)
    if floor is None or (floor != number and operator in _EQUAL):
        is_true = operator == "!=" or (operator in (">", ">=") and not _is_nan(number))
        return lambda column: pc.if_else(pc.is_null(column), None, is_true)
    if floor != number:  # values below the number are at most the floor
        operator = {"<": "<=", ">=": ">"}.get(operator, operator)
    compare, scalar = _COMPARISONS[operator], pa.scalar(floor, _widest(kind))
    return lambda column: compare(column, scalar)


def _held_numbers(numbers: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return those of some numbers that a type holds, NaN among them."""
    native = int if pa.types.is_integer(kind) else Decimal if pa.types.is_decimal(kind) else float
    if set(map(type, numbers)) <= {native}:
        with suppress(OverflowError, pa.ArrowInvalid):  # a million in 0.1 s, one by one they take 2
            return pa.array(numbers, _widest(kind))
    written = (_written(number, kind) for number in numbers)
    floors = ((number, _floor(number, kind)) for number in written)
    return pa.array([floor for number, floor in floors if floor == number or _is_nan(floor)], _widest(kind))


def _written(number: Any, kind: pa.DataType) -> Any:
    """Return a number as it is compared: beside decimals a float is what it is written as, so that 0.10 equals 0.1."""
    if not pa.types.is_decimal(kind) or isinstance(number, int):
        return number
    if isinstance(number, Decimal):
        return number if number.is_finite() else math.nan if number.is_nan() else float(number)
    return Decimal(repr(number)) if math.isfinite(number) else number


def _floor(number: Any, kind: pa.DataType) -> Any:
    """Return the greatest number that a type can be compared with and that is not above a number; None if none is."""
    if pa.types.is_decimal(kind):
        return _decimal_floor(number, kind)
    if pa.types.is_integer(kind):
        bounds = np.iinfo(kind.to_pandas_dtype())
        return math.floor(min(number, int(bounds.max))) if number >= int(bounds.min) else None
    try:
        near = float(number)
    except OverflowError:  # an integer
        near = math.inf if number > 0 else -math.inf
    return math.nextafter(near, -math.inf) if near > number else near


def _decimal_floor(number: Any, kind: pa.DataType) -> Any:
    largest = Decimal((0, (9,) * kind.precision, -kind.scale))
    if _is_nan(number) or number < largest.copy_negate():
        return None
    if number >= largest:
        return largest
    # Contexts of others would round.
    return Decimal(number).quantize(Decimal((0, (1,), -kind.scale)), context=Context(kind.precision, ROUND_FLOOR))


def _widest(kind: pa.DataType) -> pa.DataType:
    """Return the type as which numbers are compared: float64 holds those of all floating-point types."""
    return pa.float64() if pa.types.is_floating(kind) else kind


def _is_nan(number: Any) -> bool:
    return isinstance(number, float) and math.isnan(number)


def _short(value: Any) -> str:
    """Write out a value, or the first of many."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


_MOST_SHOWN = 200  # characters


def _remedy(kind: pa.DataType) -> str:
    if not pa.types.is_timestamp(kind):
        return ""
    return f"; give a pandas.Timestamp with {'a' if kind.tz else 'no'} time zone"
