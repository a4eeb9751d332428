"""Numbers are compared for what they are worth: as Python compares them, whatever types hold them."""

from __future__ import annotations

import datetime as dt
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.collection import comparisons
from dask_embedding_reader.collection.comparisons import exact_value, make_comparison
from dask_embedding_reader.errors import ArgumentError

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda one, values: any(one == value or (one != one and value != value) for value in values),
    "not in": lambda one, values: not COMPARE["in"](one, values),
}
INTEGERS = [pa.int8(), pa.uint8(), pa.int32(), pa.int64(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
EDGES = [0, 2**7, 2**8, 2**11, 2**24, 2**31, 2**53, 2**63, 2**64, 10**40, 10**400]
"""Where types end, or hold each integer no longer."""


def integers() -> st.SearchStrategy[int]:
    return st.builds(lambda edge, near, sign: sign * edge + near, st.sampled_from(EDGES), st.integers(-2, 2), SIGNS)


SIGNS = st.sampled_from([-1, 1])
NUMBERS = st.one_of(
    integers(),
    st.floats(),
    integers().filter(lambda number: abs(number) < 10**300).map(float),
    st.floats(width=32).map(np.float32),
    st.floats(width=16).map(np.float16),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
)


def _as_type(number: float, kind: pa.DataType) -> Any:
    with np.errstate(over="ignore"):
        return kind.to_pandas_dtype()(number)


@st.composite
def columns(draw: st.DrawFn) -> pa.Array:
    """A column of numbers and nulls."""
    kind = draw(st.sampled_from(INTEGERS + FLOATS))
    if kind in INTEGERS:
        bounds = np.iinfo(kind.to_pandas_dtype())
        values: Any = integers().map(lambda number: min(max(number, int(bounds.min)), int(bounds.max)))
    else:
        values = st.one_of(st.floats(width=32), integers().filter(lambda number: abs(number) < 10**300).map(float))
        values = values.map(lambda number: _as_type(number, kind))
    return pa.array(draw(st.lists(st.none() | values, min_size=1, max_size=6)), kind, from_pandas=False)


def satisfying(column: pa.Array, compare: str, value: Any) -> list[bool | None]:
    """Compare as Python does."""

    def plain(one: Any) -> Any:
        return one.item() if isinstance(one, np.generic) else one

    value = [plain(one) for one in value] if isinstance(value, list) else plain(value)
    return [None if one is None else COMPARE[compare](plain(one), value) for one in column.to_pylist()]


@given(column=columns(), compare=st.sampled_from(sorted(COMPARE)), values=st.lists(NUMBERS, min_size=1, max_size=3))
def test_numbers_are_compared_as_python_compares_them(column: pa.Array, compare: str, values: list[Any]) -> None:
    value = values if compare.endswith("in") else values[0]
    table = pa.table({"c": column})
    assert make_comparison("c", compare, exact_value(value))(table).to_pylist() == satisfying(column, compare, value)


DECIMALS = [pa.decimal32(5, 2), pa.decimal64(18, 1), pa.decimal128(20, 2), pa.decimal256(60, 20)]
ODD = [
    Decimal(text) for text in ("0.1", "-1.505", "1e30", "-1e400", "1e-400", "NaN", "Infinity", "9999999999999999.99")
]


def written(number: Any) -> Any:
    """Beside decimals floats are what they are written as."""
    number = number.item() if isinstance(number, np.generic) else number
    is_finite = isinstance(number, float) and math.isfinite(number)
    return Decimal(repr(number)) if is_finite else float(number) if number != number else number


@given(
    kind=st.sampled_from(DECIMALS),
    steps=st.lists(st.none() | st.sampled_from([0, 1, -150, 10**17 - 1]) | st.integers(-999, 999), min_size=1),
    compare=st.sampled_from(sorted(COMPARE)),
    values=st.lists(st.one_of(NUMBERS, st.sampled_from(ODD), st.integers(-99, 99).map(lambda k: k / 10)), min_size=1),
)
def test_decimals_are_compared_with_numbers_as_they_are_written(
    kind: pa.DataType, steps: list[int | None], compare: str, values: list[Any]
) -> None:
    largest = 10**kind.precision - 1
    given = [None if step is None else Decimal(min(step, largest)).scaleb(-kind.scale) for step in steps]
    value = values if compare.endswith("in") else values[0]
    other = [written(one) for one in values] if compare.endswith("in") else written(value)

    def told(one: Decimal) -> bool:
        is_nan = isinstance(other, float) and math.isnan(other)
        return compare == "!=" if is_nan else COMPARE[compare](one, other)

    found = make_comparison("c", compare, exact_value(value))(pa.table({"c": pa.array(given, kind)}))
    assert found.to_pylist() == [None if one is None else told(one) for one in given]


def test_statistics_rule_out_no_decimal_that_satisfies_a_comparison(tmp_path: Path) -> None:
    """Arrow rounds decimals to floats: of 18 digits to another one than the nearest."""
    there = [Decimal("0.10"), Decimal("9999999999999999.99"), Decimal("10000000000000000.01"), None]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4, np.float32)), 1)
    table = pa.table({"embedding": vectors, "d": pa.array(there, pa.decimal128(20, 2))})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=1)
    reader = EmbeddingReader(tmp_path)
    for value in (0.1, 1e16, 10**16, 2**64, Decimal("1e16"), 10**40):
        for compare, is_true in COMPARE.items():
            other = [written(value)] if compare.endswith("in") else written(value)
            expected = [row for row, one in enumerate(there) if one is not None and is_true(one, other)]
            given = [value] if compare.endswith("in") else value
            assert list(reader.filter([("d", compare, given)]).rows) == expected, (compare, value)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingReader, dict[str, pa.Array]]:
    """Columns of all types, a row group a row, of which statistics tell all there is to know."""
    there = {str(kind): [*range(3), int(np.iinfo(kind.to_pandas_dtype()).max)] for kind in INTEGERS}
    there["int64"] = [2**53, 2**53 + 1, -5, 2**62 + 1]
    floats = [1.5, 2.0**24, 2.0**60, -0.5]
    given = {name: pa.array([*values, None], name) for name, values in there.items()}
    given |= {str(kind): pa.array([*floats, None], kind) for kind in FLOATS[1:]}
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(5, np.float32)), 1)
    path = tmp_path_factory.mktemp("numbers") / "0.parquet"
    pq.write_table(pa.table({"embedding": vectors, **given}), path, row_group_size=1)
    return EmbeddingReader(path), given


@pytest.mark.parametrize(
    "value",
    [
        0.5, -1, -1.5, 300, 2**24 + 1, 20_000_000, 2.0**53, 2**53 + 1, 0.1 * 2**63, 2**63 - 1, 2**64 - 1, 2**70,
        10**400, float("inf"), float("-inf"), float("nan"), np.float16(1.5), np.float32(0.1), np.int64(2**53 + 1),
        np.uint64(2), np.uint64(2**64 - 1),
    ],
    ids=repr,
)  # fmt: skip
def test_statistics_rule_out_no_number_that_satisfies_a_comparison(
    numbers: tuple[EmbeddingReader, dict[str, pa.Array]], value: Any
) -> None:
    reader, there = numbers
    for name, column in there.items():
        for compare in COMPARE:
            for one in ([value], [value, 1], [value, 1.5]) if compare.endswith("in") else (value,):
                expected = np.flatnonzero([told is True for told in satisfying(column, compare, one)]).tolist()
                assert list(reader.filter([(name, compare, one)]).rows) == expected, (name, compare, one)


def test_a_set_is_made_ready_once_for_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be thousands of files, and millions of values."""
    for number in range(6):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2, np.float32)), 1)
        pq.write_table(pa.table({"embedding": vectors, "id": [number, 100]}), tmp_path / f"{number}.parquet")
    made: list[pa.DataType] = []
    held_numbers = comparisons._held_numbers

    def counted(numbers: list[Any], kind: pa.DataType) -> pa.Array:
        made.append(kind)
        return held_numbers(numbers, kind)

    monkeypatch.setattr(comparisons, "_held_numbers", counted)
    found = EmbeddingReader(tmp_path).filter([("id", "in", np.arange(2, 50))])
    assert list(found.rows) == [4, 6, 8, 10]
    assert made == [pa.int64()]


DAY, NOON, UTC = dt.date(2020, 1, 1), dt.datetime(2020, 1, 1, 12), dt.timezone.utc


def _found(column: pa.Array, compare: str, value: Any) -> list[int]:
    told = make_comparison("c", compare, exact_value(value))(pa.table({"c": column}))
    return np.flatnonzero(told.fill_null(False).to_pylist()).tolist()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_dates_and_times_in_one_list_are_each_what_they_are(unit: str) -> None:
    """Arrow takes all for dates where the first is one, and refuses dates after times."""
    midnight = NOON.replace(hour=0)
    times = pa.array([midnight, NOON, midnight + dt.timedelta(1), None], pa.timestamp(unit))
    days = times.cast(pa.date32(), safe=False)
    second = midnight + dt.timedelta(1)
    for several in ([DAY, NOON], [NOON, DAY], [None, DAY, pd.Timestamp(NOON)], [np.datetime64(NOON), DAY]):
        assert (_found(times, "in", several), _found(times, "not in", several)) == ([0, 1], [2])
        assert (_found(days, "in", several), _found(days, "not in", several)) == ([0, 1], [2])
    assert _found(days, "in", [second.date(), NOON]) == _found(days, "in", [NOON, second]) == [2]


@pytest.mark.parametrize("unit", ["Y", "D", "s", "ns"])
def test_times_of_numpy_are_those_of_pandas(unit: str) -> None:
    day = np.datetime64("2020-01-01").astype(f"M8[{unit}]")
    times = pa.array([NOON.replace(hour=0), NOON, None], pa.timestamp("us"))
    for column in (times, times.cast(pa.timestamp("ns"))):
        assert (_found(column, "==", day), _found(column, "in", [day, None])) == ([0], [0])
        assert (_found(column, ">", day), _found(column, "not in", [day, None])) == ([1], [1])
    assert _found(times.cast(pa.date32(), safe=False), "==", day) == [0, 1]
    spans = pa.array([dt.timedelta(1), dt.timedelta(2), None])
    for hours in (np.timedelta64(24, "h"), np.timedelta64(1, "D")):
        assert _found(spans, "==", hours) == _found(spans, "in", [hours]) == [0]


@pytest.mark.parametrize("missing", [None, pd.NaT, pd.NA, np.datetime64("NaT"), np.timedelta64("NaT")])
@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32(), pa.duration("us"), pa.int64(), pa.string()])
def test_what_is_missing_in_pandas_is_compared_as_a_null(kind: pa.DataType, missing: Any) -> None:
    column = pa.array([1, None]).cast(kind) if kind != pa.date32() else pa.array([DAY, None])
    for compare in ("==", "!=", "<"):
        assert _found(column, compare, missing) == []
    assert (_found(column, "in", [missing]), _found(column, "not in", [missing])) == ([], [0])


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32(), pa.duration("us"), pa.time64("us"), pa.bool_()])
@pytest.mark.parametrize("values", [[5], [True, 5], [dt.date(1970, 1, 1), 5], [dt.timedelta(0), 5], [dt.time(0), 5]])
def test_numbers_are_no_times(kind: pa.DataType, values: list[Any]) -> None:
    """They are refused in a list as they are alone; Arrow reads 5 as five days, or microseconds, or as true."""
    for value, compare in [(values, "in"), (values[::-1], "not in"), (5, "==")]:
        with pytest.raises(ArgumentError, match="cannot be compared with"):
            _found(pa.nulls(1, kind), compare, value)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "+05:30"])
@pytest.mark.parametrize("unit", ["s", "ns"])
def test_times_of_all_zones_are_compared(zone: str, unit: str) -> None:
    noon = pd.Timestamp("2020-01-01 12:00", tz="UTC")
    times = pa.array([noon + pd.Timedelta(hours=hours) for hours in range(3)], pa.timestamp(unit, zone))
    for other in ("UTC", "Asia/Tokyo"):
        one = (noon + pd.Timedelta(hours=1)).tz_convert(other)
        finer = one + pd.Timedelta(1, "ns")
        for value in (one, one.to_pydatetime()):
            assert _found(times, "==", value) == _found(times, "in", [value]) == [1]
            assert (_found(times, "<", value), _found(times, "not in", [value])) == ([0], [0, 2])
        assert (_found(times, "<", finer), _found(times, "in", [finer])) == ([0, 1], [])
    for several in ([noon, NOON], [NOON, noon]):  # the second has no zone
        with pytest.raises(ArgumentError, match=r"give a pandas.Timestamp with a time zone$"):
            _found(times, "in", several)
