"""Arrow types: the one that holds the values of several, and values brought into it, exactly or not at all.

``pyarrow.concat_tables(promote_options="permissive")`` finds nearly the same types. It also rounds, knows neither views
nor dictionaries nor extension types, and pyarrow's own casts do not reach into everything that is nested.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_INTEGERS = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}
_FLOATS = {16: pa.float16(), 32: pa.float32(), 64: pa.float64()}
_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}
"""The decimal digits of integers of so many bits."""

_UNITS = ("s", "ms", "us", "ns")
_UTC = frozenset({"UTC", "Etc/UTC", "+00:00", "-00:00", "Z"})

Change = Callable[[pa.DataType], pa.DataType]


def decoded_type(kind: pa.DataType) -> pa.DataType:
    """Return a type without dictionaries, and without views, which pandas cannot take rows of nor pyarrow slice."""
    return _change_inside(kind, _decoded)


def can_be_framed(kind: pa.DataType) -> bool:
    """Tell whether pandas can hold a column of a type, and pyarrow take rows of it: not of unions and of runs.

    Examples
    --------
    >>> can_be_framed(pa.list_(pa.int8())), can_be_framed(pa.list_(pa.run_end_encoded(pa.int32(), pa.int8())))
    (True, False)
    """
    return re.search("(union|run_end_encoded)<", str(kind)) is None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that a column is held in: decoded, and text as large text."""
    return _large_text(decoded_type(kind))


def frame_type(kind: pa.DataType) -> pa.DataType:
    """Return what pandas is given: extension types as they are stored, which all that pandas does can be done with."""
    return _large_text(_change_inside(kind, _stored))


def _large_text(kind: pa.DataType) -> pa.DataType:
    return pa.large_string() if pa.types.is_string(kind) else kind


def _decoded(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _change_inside(kind.value_type, _decoded)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _stored(kind: pa.DataType) -> pa.DataType:
    return _change_inside(kind.storage_type, _stored) if isinstance(kind, pa.BaseExtensionType) else _decoded(kind)


def _change_inside(kind: pa.DataType, change: Change) -> pa.DataType:
    """Change the types that one is made of, and list views to lists."""

    def changed(field: pa.Field) -> pa.Field:
        return field.with_type(_change_inside(field.type, change))

    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(changed(kind.value_field))
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(changed(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(changed(kind.value_field), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([changed(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(changed(kind.key_field), changed(kind.item_field), kind.keys_sorted)
    return change(kind)


# ---------------------------------------------------------------------------------------------------------------------
# What holds the values of two types


def common_type(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return the type for the values of two plain types; None where there is none.

    It holds all of them, with these exceptions, which :func:`convert` refuses value by value: the largest unsigned
    integers beside signed ones, integers beyond 2**53 beside floating-point numbers, far years in finer units.
    """
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    if isinstance(left, pa.BaseExtensionType) or isinstance(right, pa.BaseExtensionType):
        return common_type(frame_type(left), frame_type(right))
    for common in (_common_number, _common_decimal, _common_bytes, _common_time, _common_list, _common_struct):
        if (found := common(left, right)) is not None:
            return found
    return None


def _common_number(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    integers = [kind for kind in (left, right) if pa.types.is_integer(kind)]
    floats = [kind for kind in (left, right) if pa.types.is_floating(kind)]
    if len(integers) + len(floats) < 2:
        return None
    widest = max(left.bit_width, right.bit_width)
    if not integers:
        return _FLOATS[widest]
    if floats:  # twice the bits hold an integer exactly
        return _FLOATS[min(64, max(2 * integers[0].bit_width, floats[0].bit_width))]
    unsigned = [kind for kind in integers if pa.types.is_unsigned_integer(kind)]
    if len(unsigned) == 1:
        return _INTEGERS[min(64, max(2 * unsigned[0].bit_width, widest))]
    return max(left, right, key=lambda kind: kind.bit_width)


def _common_decimal(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    kinds = [kind for kind in (left, right) if pa.types.is_decimal(kind)]
    digits = [(kind.precision - kind.scale, kind.scale) for kind in kinds]
    digits += [(_DIGITS[kind.bit_width], 0) for kind in (left, right) if pa.types.is_integer(kind)]
    if not kinds or len(digits) < 2:
        return None
    whole, scale = map(max, zip(*digits, strict=True))
    if whole + scale <= 38 and not any(map(pa.types.is_decimal256, kinds)):
        return pa.decimal128(whole + scale, scale)
    return pa.decimal256(whole + scale, scale) if whole + scale <= 76 else None


def _common_bytes(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if _is_text(left) and _is_text(right):
        return pa.large_string()
    if not all(_is_text(kind) or _is_bytes(kind) for kind in (left, right)):
        return None
    is_large = any(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) for kind in (left, right))
    return pa.large_binary() if is_large else pa.binary()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _common_time(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    for is_kind in (pa.types.is_timestamp, pa.types.is_time, pa.types.is_duration):
        if is_kind(left) and is_kind(right):
            unit = max(left.unit, right.unit, key=_UNITS.index)
            if is_kind is pa.types.is_time:
                return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
            if is_kind is pa.types.is_duration:
                return pa.duration(unit)
            zones = {left.tz, right.tz}
            if len(zones) == 1 or zones <= _UTC:
                return pa.timestamp(unit, left.tz if len(zones) == 1 else "UTC")
    return None


def _common_list(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if pa.types.is_map(left) and pa.types.is_map(right):
        key, item = _common_field(left.key_field, right.key_field), _common_field(left.item_field, right.item_field)
        return None if key is None or item is None else pa.map_(key, item, left.keys_sorted and right.keys_sorted)
    if not (_is_list(left) and _is_list(right)):
        return None
    field = _common_field(left.value_field, right.value_field)
    if field is None:
        return None
    sizes = {kind.list_size if pa.types.is_fixed_size_list(kind) else None for kind in (left, right)}
    if len(sizes) == 1 and None not in sizes:
        return pa.list_(field, *sizes)
    is_large = pa.types.is_large_list(left) or pa.types.is_large_list(right)
    return pa.large_list(field) if is_large else pa.list_(field)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _common_struct(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_struct(left) and pa.types.is_struct(right)):
        return None
    fields = [{field.name: field for field in kind} for kind in (left, right)]
    if any(len(by_name) < kind.num_fields for by_name, kind in zip(fields, (left, right), strict=True)):
        return None  # two of one name
    common = []
    for name in dict.fromkeys([*fields[0], *fields[1]]):  # one that is missing is null
        absent = pa.field(name, pa.null())
        field = _common_field(fields[0].get(name, absent), fields[1].get(name, absent))
        if field is None:
            return None
        common.append(field)
    return pa.struct(common)


def _common_field(left: pa.Field, right: pa.Field) -> pa.Field | None:
    kind = common_type(left.type, right.type)
    return None if kind is None else pa.field(left.name, kind, left.nullable or right.nullable)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def is_same(one: pa.DataType, other: pa.DataType) -> bool:
    """Tell whether types are the same down to the names of the items of lists, for which others would cast."""
    return bool(one.equals(other, check_metadata=True))


def takeable(values: pa.Array) -> pa.Array:
    """Return values of which pyarrow takes the right rows, which all that takes or filters some must ask for.

    It cannot take views of text. Of a slice of lists of one size, that hold lists of one size, it takes other rows,
    without a word (pyarrow 19 to 26).
    """
    if re.search("(string|binary)_view", str(values.type)):
        values = convert(values, decoded_type(values.type))
    if str(frame_type(values.type)).count("fixed_size_list<") > 1:
        return pa.concat_arrays([values, values.slice(0, 0)])  # a copy, which is no slice
    return values


def takeable_chunks(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of which pyarrow takes the right rows; of a type without views, which therefore stays."""
    return pa.chunked_array(map(takeable, values.chunks), values.type)


def convert(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return values in the common type of theirs and others.

    Raises
    ------
    pyarrow.ArrowException
        If a value does not fit exactly.
    """
    stored = values.type
    if is_same(stored, kind):
        return values
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, convert(values, kind.storage_type))
    if isinstance(stored, pa.BaseExtensionType):
        return convert(values.storage, kind)
    if pa.types.is_null(stored):
        return pa.nulls(len(values), kind)
    if pa.types.is_dictionary(stored):
        return convert(values.dictionary_decode(), kind)
    if pa.types.is_struct(kind) and pa.types.is_struct(stored):
        return _convert_struct(values, kind)
    if pa.types.is_map(kind) and pa.types.is_map(stored):
        keys, items = convert(values.keys, kind.key_type), convert(values.items, kind.item_type)
        entries = pa.StructArray.from_arrays([keys, items], fields=[kind.key_field, kind.item_field])
        return _replace_items(values, kind, entries, 2)
    if pa.types.is_fixed_size_list(kind) and pa.types.is_fixed_size_list(stored):
        return _replace_items(values, kind, convert(values.values, kind.value_type), 1)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _convert_list(values, kind)
    return values.cast(kind)


def _convert_struct(values: pa.StructArray, kind: pa.StructType) -> pa.StructArray:
    places = {field.name: place for place, field in enumerate(values.type)}
    children = [
        convert(values.field(places[field.name]) if field.name in places else pa.nulls(len(values)), field.type)
        for field in kind
    ]
    return pa.StructArray.from_arrays(children, fields=list(kind), mask=values.is_null())


def _replace_items(values: pa.Array, kind: pa.DataType, items: pa.Array, own_buffers: int) -> pa.Array:
    """Return lists of the same lengths of other items."""
    buffers = values.buffers()[:own_buffers]
    return pa.Array.from_buffers(kind, len(values), buffers, values.null_count, values.offset, children=[items])


def _convert_list(values: pa.Array, kind: pa.DataType) -> pa.Array:
    # Lists of any kind. pyarrow's cast of list views loses what follows a null (pyarrow 26).
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    lengths = np.where(values.is_valid().to_numpy(zero_copy_only=False), lengths, 0).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = convert(values.flatten(), kind.value_type)
    array, offset_type = (pa.LargeListArray, pa.int64()) if pa.types.is_large_list(kind) else (pa.ListArray, pa.int32())
    return array.from_arrays(pa.array(offsets, offset_type), items, type=kind, mask=values.is_null())
