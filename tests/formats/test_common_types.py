"""The type that holds the values of several, for each pair of types; and values in it, whatever they lie in."""

from __future__ import annotations

import datetime as dt
import decimal
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dask_embedding_reader.formats.arrow_types import (
    can_be_framed,
    common_type,
    convert,
    decoded_type,
    frame_type,
    plain_type,
)

NUMBERS = [pa.from_numpy_dtype(kind) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")]


def assert_common(left: pa.DataType, right: pa.DataType, expected: pa.DataType | None) -> None:
    for one, other in ((left, right), (right, left)):
        found = common_type(one, other)
        assert found == expected, f"{one}, {other}: {found}, not {expected}"
        assert (found is None) == (expected is None)


def test_numbers_have_the_type_that_numpy_promotes_them_to() -> None:
    """But for integers of 64 bits, which stay such."""
    for left, right in product(NUMBERS, NUMBERS):
        promoted = np.promote_types(left.to_pandas_dtype(), right.to_pandas_dtype())
        if pa.types.is_integer(left) and pa.types.is_integer(right) and promoted.kind == "f":
            promoted = np.dtype("i8")
        assert_common(left, right, pa.from_numpy_dtype(promoted))
        for other in (pa.string(), pa.bool_(), pa.timestamp("s"), pa.list_(left)):
            assert_common(left, other, None)
        assert_common(left, pa.null(), left)
    assert_common(pa.null(), pa.null(), pa.null())
    assert_common(pa.bool_(), pa.bool_(), pa.bool_())


def test_decimals_have_room_for_the_digits_of_both() -> None:
    small, wide = pa.decimal128, pa.decimal256
    for left, right, expected in (
        (small(5, 2), small(4, 3), small(6, 3)),
        (small(38, 0), small(1, 0), small(38, 0)),
        (small(38, 0), small(2, 1), wide(39, 1)),
        (small(5, 2), wide(5, 2), wide(5, 2)),
        (wide(76, 0), small(1, 0), wide(76, 0)),
        (wide(76, 0), small(2, 1), None),
        (small(5, 2), pa.int8(), small(5, 2)),
        (small(4, 2), pa.int8(), small(5, 2)),
        (small(4, 2), pa.uint16(), small(7, 2)),
        (small(4, 2), pa.int32(), small(12, 2)),
        (small(4, 2), pa.uint64(), small(22, 2)),
        (small(20, 19), pa.int64(), wide(39, 19)),
        (small(5, 2), pa.float64(), None),
        (small(5, 2), pa.string(), None),
        (pa.int8(), pa.decimal128(3, -1), small(4, 0)),
    ):
        assert_common(left, right, expected)


def test_text_and_bytes_are_joined() -> None:
    texts, binaries = [pa.string(), pa.large_string()], [pa.binary(), pa.large_binary(), pa.binary(3), pa.binary(4)]
    large = (pa.large_string(), pa.large_binary())
    for left, right in product(texts + binaries, texts + binaries):
        if left == right:
            expected = left
        elif left in texts and right in texts:
            expected = pa.large_string()
        else:
            expected = pa.large_binary() if left in large or right in large else pa.binary()
        assert_common(left, right, expected)
        assert_common(left, pa.date32(), None)


UNITS = ("s", "ms", "us", "ns")


def test_times_have_the_finer_unit_and_one_zone() -> None:
    def time(unit: str) -> pa.DataType:
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)

    for left, right in product(UNITS, UNITS):
        finer = max(left, right, key=UNITS.index)
        assert_common(time(left), time(right), time(finer))
        assert_common(pa.duration(left), pa.duration(right), pa.duration(finer))
        assert_common(pa.timestamp(left), pa.timestamp(right), pa.timestamp(finer))
        assert_common(time(left), pa.duration(right), None)
        assert_common(pa.timestamp(left), pa.duration(right), None)
        for zone, other, common in (
            ("Europe/Paris", "Europe/Paris", "Europe/Paris"),
            ("Etc/UTC", "Etc/UTC", "Etc/UTC"),
            ("UTC", "Z", "UTC"),
            ("+00:00", "-00:00", "UTC"),
            ("UTC", "Europe/Paris", None),
            (None, "UTC", None),
        ):
            expected = pa.timestamp(finer, common) if common else None
            assert_common(pa.timestamp(left, zone), pa.timestamp(right, other), expected)
    assert_common(pa.date32(), pa.timestamp("s"), None)


def test_what_is_in_lists_maps_and_structs_is_joined() -> None:
    i1, i2, f4, s = pa.int8(), pa.int16(), pa.float32(), pa.string()
    must = pa.field("item", i2, nullable=False)
    for left, right, expected in (
        (pa.list_(i1), pa.list_(i2), pa.list_(i2)),
        (pa.list_(i1), pa.large_list(i2), pa.large_list(i2)),
        (pa.list_(i1, 3), pa.list_(i2, 3), pa.list_(i2, 3)),
        (pa.list_(i1, 3), pa.list_(i2, 4), pa.list_(i2)),
        (pa.list_(i1, 3), pa.list_(i2), pa.list_(i2)),
        (pa.list_(i1, 3), pa.large_list(i2), pa.large_list(i2)),
        (pa.list_(i1), pa.list_(s), None),
        (pa.list_(i1), pa.struct([("a", i1)]), None),
        (pa.list_(must), pa.list_(pa.field("item", i1, nullable=False)), pa.list_(must)),
        (pa.list_(must), pa.list_(i1), pa.list_(i2)),
        (pa.list_(pa.list_(i1, 2)), pa.large_list(pa.list_(f4, 2)), pa.large_list(pa.list_(f4, 2))),
        (pa.map_(s, i1), pa.map_(s, i2), pa.map_(s, i2)),
        (pa.map_(i1, i1), pa.map_(i2, s), None),
        (pa.map_(i1, i1), pa.map_(s, i1), None),
        (pa.map_(i1, i1, True), pa.map_(i2, i1, True), pa.map_(i2, i1, True)),
        (pa.map_(i1, i1, True), pa.map_(i2, i1, False), pa.map_(i2, i1, False)),
        (pa.map_(s, i1), pa.list_(i1), None),
        (pa.struct([("a", i1)]), pa.struct([("a", i2)]), pa.struct([("a", i2)])),
        (pa.struct([("a", i1)]), pa.struct([("a", s)]), None),
        (pa.struct([("a", i1), ("a", i1)]), pa.struct([("a", i2)]), None),
        (pa.struct([]), pa.struct([("a", i2)]), pa.struct([("a", i2)])),
    ):
        assert_common(left, right, expected)
    left, right = pa.struct([("a", i1), ("b", s)]), pa.struct([("c", f4), ("a", i2)])
    assert common_type(left, right) == pa.struct([("a", i2), ("b", s), ("c", f4)])
    assert common_type(right, left) == pa.struct([("c", f4), ("a", i2), ("b", s)])
    for kind in (common_type(pa.list_(must), pa.list_(i1)), common_type(pa.list_(i1), pa.list_(must))):
        assert kind == pa.list_(i2)
        assert kind.value_field.nullable
    missing = common_type(pa.struct([pa.field("a", i1, nullable=False)]), pa.struct([]))
    assert missing == pa.struct([("a", i1)]), "null"


def test_extension_types_are_joined_as_they_are_stored() -> None:
    tensor = pa.fixed_shape_tensor(pa.int8(), [3])
    assert_common(tensor, tensor, tensor)
    assert_common(tensor, pa.list_(pa.int16(), 3), pa.list_(pa.int16(), 3))
    assert_common(tensor, pa.fixed_shape_tensor(pa.int16(), [3]), pa.list_(pa.int16(), 3))
    assert_common(tensor, pa.null(), tensor)


def nested(kind: pa.DataType) -> list[pa.DataType]:
    """A type in each other one."""
    must = pa.field("x", kind, nullable=False)
    return [
        kind,
        *(pa.list_(kind), pa.large_list(must), pa.list_(must, 2), pa.struct([must, ("y", pa.int8())])),
        *(pa.map_(pa.int8(), must), pa.map_(pa.field("k", kind, nullable=False), pa.int8(), True)),
        pa.list_(pa.struct([("x", pa.large_list(kind))])),
    ]


def test_types_are_decoded_wherever_they_are() -> None:
    tensor = pa.fixed_shape_tensor(pa.int8(), [3])
    for kind, decoded in (
        (pa.int8(), pa.int8()),
        (pa.string(), pa.string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (pa.dictionary(pa.int8(), pa.list_(pa.string_view())), pa.list_(pa.large_string())),
        (pa.string_view(), pa.large_string()),
        (pa.binary_view(), pa.large_binary()),
        (pa.list_view(pa.int8()), pa.list_(pa.int8())),
        (pa.large_list_view(pa.string_view()), pa.large_list(pa.large_string())),
        (tensor, tensor),
    ):
        for one, wanted in zip(nested(kind), nested(decoded), strict=True):
            assert decoded_type(one).equals(wanted, check_metadata=True)
            assert plain_type(one) == (pa.large_string() if wanted == pa.string() else wanted)
            if kind != tensor:
                assert frame_type(one) == plain_type(one)
    for one, wanted in zip(nested(tensor), nested(pa.list_(pa.int8(), 3)), strict=True):
        assert frame_type(one) == wanted
    assert decoded_type(pa.map_(pa.int8(), pa.string_view(), True)).keys_sorted
    odd = [pa.dense_union([pa.field("a", pa.int8())]), pa.run_end_encoded(pa.int32(), pa.int8())]
    assert [can_be_framed(kind) for one in odd for kind in nested(one)] == [False] * 16
    assert all(can_be_framed(kind) for kind in nested(pa.dictionary(pa.int8(), pa.string())))


DAY = dt.datetime(2024, 2, 29, 12, 30, tzinfo=dt.timezone.utc)

VALUES: dict[str, tuple[pa.DataType, pa.DataType, list[Any]]] = {
    "integers": (pa.int8(), pa.int16(), [1, None, -3, 4, 5]),
    "floats": (pa.float16(), pa.float64(), [np.float16(1), None, np.float16(0.5), np.float16(3), None]),
    "text": (pa.string(), pa.large_string(), ["a", None, "ccc", "", "e"]),
    "views of text": (pa.string_view(), pa.large_string(), ["a", None, "a text of more than twelve letters", "", "e"]),
    "decimals": (pa.decimal128(4, 1), pa.decimal256(40, 2), [decimal.Decimal("1.5"), None, decimal.Decimal(7)]),
    "times": (pa.timestamp("s", "UTC"), pa.timestamp("ns", "UTC"), [DAY, None, DAY]),
    "nothing": (pa.null(), pa.list_(pa.int8()), [None] * 4),
    "dictionaries": (pa.dictionary(pa.int8(), pa.string()), pa.large_string(), ["a", None, "b", "a"]),
    "lists": (pa.list_(pa.int8()), pa.large_list(pa.int32()), [[1, None], None, [], [2, 3, 4], [5]]),
    "large lists": (pa.large_list(pa.int8()), pa.list_(pa.int32()), [[1, None], None, [], [2, 3, 4], [5]]),
    "lists of equal length": (pa.list_(pa.int8(), 2), pa.list_(pa.int32(), 2), [[1, None], None, [3, 4], [5, 6]]),
    "lists of one length": (pa.list_(pa.int8(), 2), pa.list_(pa.int32()), [[1, None], None, [3, 4], [5, 6]]),
    "views": (pa.list_view(pa.int8()), pa.list_(pa.int8()), [[1, None], None, [], [2, 3, 4], [5]]),
    "large views": (pa.large_list_view(pa.int8()), pa.large_list(pa.int16()), [[1], None, [2, 3, 4], [5]]),
    "lists of lists": (
        pa.list_(pa.list_(pa.int8(), 1)),
        pa.list_(pa.list_(pa.int16())),
        [[[1], None], None, [], [[2]], [[3], [4]]],
    ),
    "maps": (
        pa.map_(pa.string(), pa.int8()),
        pa.map_(pa.large_string(), pa.int16()),
        [[("a", 1)], None, [], [("b", 2), ("c", None)], [("d", 4)]],
    ),
    "structs": (
        pa.struct([("a", pa.int8()), ("b", pa.string())]),
        pa.struct([("b", pa.large_string()), ("a", pa.int16())]),
        [{"b": "x", "a": 1}, None, {"b": None, "a": 2}, {"b": "y", "a": None}, {"b": "z", "a": 5}],
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_stay_what_they_are(name: str) -> None:
    """Also of some rows of an array, which then begins within its buffers."""
    stored, kind, values = VALUES[name]
    base = stored if not pa.types.is_dictionary(stored) else stored.value_type
    array = pa.array(values, base)
    array = array.dictionary_encode() if base != stored else array
    for start in range(len(values)):
        for stop in range(start, len(values) + 1):
            found = convert(array[start:stop], kind)
            found.validate(full=True)
            assert found.type.equals(kind)
            assert found.to_pylist() == values[start:stop]
            assert found.null_count == values[start:stop].count(None)
    assert convert(array, array.type) is array


def test_fields_that_are_missing_are_null() -> None:
    array = pa.array([{"a": 1}, None, {"a": 3}], pa.struct([("a", pa.int8())]))
    kind = pa.struct([("b", pa.list_(pa.int8())), ("a", pa.int16())])
    assert convert(array, kind).to_pylist() == [{"b": None, "a": 1}, None, {"b": None, "a": 3}]


def test_extension_types_come_from_what_they_are_stored_as_and_go_there() -> None:
    tensor = pa.fixed_shape_tensor(pa.int16(), [2])
    lists = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2))
    found = convert(lists, tensor)
    assert found.type == tensor
    assert found.storage.to_pylist() == lists.to_pylist()
    back = convert(found, pa.list_(pa.int32(), 2))
    assert back.type == pa.list_(pa.int32(), 2)
    assert back.to_pylist() == lists.to_pylist()


@pytest.mark.parametrize(
    ("stored", "kind", "value"),
    [
        (pa.uint64(), pa.int64(), 2**63),
        (pa.int64(), pa.float64(), 2**53 + 1),
        (pa.timestamp("s"), pa.timestamp("ns"), dt.datetime(3000, 1, 1)),
        (pa.timestamp("ms"), pa.timestamp("s"), dt.datetime(2000, 1, 1, 0, 0, 0, 1000)),
        (pa.list_(pa.uint64()), pa.list_(pa.int64()), [1, 2**63]),
        (pa.map_(pa.int8(), pa.uint64()), pa.map_(pa.int8(), pa.int64()), [(1, 2**63)]),
        (pa.struct([("a", pa.uint64())]), pa.struct([("a", pa.int64())]), {"a": 2**63}),
        (pa.list_(pa.uint64(), 1), pa.list_(pa.int64(), 1), [2**63]),
    ],
    ids=str,
)
def test_values_that_would_be_others_are_refused(stored: pa.DataType, kind: pa.DataType, value: Any) -> None:
    with pytest.raises(pa.ArrowException):
        convert(pa.array([value], stored), kind)
