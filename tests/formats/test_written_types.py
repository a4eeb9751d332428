"""Metadata come back with the dtype, the values and the nulls that they were written with, or are refused before."""

from __future__ import annotations

import datetime as dt
import decimal
import tempfile
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.delayed import delayed
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, write_embeddings
from dask_embedding_reader.errors import ColumnError
from tests.support.collections import as_batch

PYARROW = int(pa.__version__.split(".")[0])

VECTORS = np.arange(40, dtype=np.float32).reshape(20, 2)

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
ZONES = ["UTC", "Europe/Berlin"]
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)

SECONDS = st.integers(-(10**9), 4 * 10**9)
DECIMALS = st.decimals(-(10**6), 10**6, places=2)
ARROW: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "date": (pa.date32(), st.dates()),
    "time in seconds": (pa.time32("s"), st.times().map(lambda time: time.replace(microsecond=0))),
    "time in microseconds": (pa.time64("us"), st.times()),
    "decimal": (pa.decimal128(10, 2), DECIMALS),
    "large decimal": (pa.decimal256(50, 2), DECIMALS),
    "bytes": (pa.binary(), st.binary(max_size=4)),
    "fixed bytes": (pa.binary(2), st.binary(min_size=2, max_size=2)),
    "list": (pa.list_(pa.int32()), st.lists(st.none() | st.integers(0, 9), max_size=3)),
    "lists of lists": (pa.list_(pa.list_(pa.string())), st.lists(st.none() | st.lists(TEXT, max_size=2), max_size=2)),
    "vector": (pa.list_(pa.float64(), 2), st.lists(st.floats(), min_size=2, max_size=2)),
    "struct": (
        pa.struct([("a", pa.int8()), ("b", pa.string())]),
        st.fixed_dictionaries({"a": st.none() | st.integers(0, 9), "b": st.none() | TEXT}),
    ),
    "map": (pa.map_(pa.string(), pa.int8()), st.lists(st.tuples(TEXT, st.integers(0, 9)), max_size=2)),
    "float": (pa.float64(), st.floats()),
    "half float": (pa.float16(), st.floats(width=16).map(np.float16)),
    "nothing": (pa.null(), st.none()),
}


def numbers_of(name: str) -> st.SearchStrategy[Any]:
    if name.startswith("float"):
        return st.floats(width=int(name[5:]))  # type: ignore[arg-type]
    limits = np.iinfo(name)
    return st.integers(int(limits.min), int(limits.max))


@st.composite
def columns(draw: st.DrawFn, rows: int) -> pd.Series[Any]:
    """A column of any dtype that readers have, any values, nulls where it can hold them."""

    def values(one: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(one, min_size=rows, max_size=rows))

    kind = draw(st.sampled_from(["number", "bool", "masked", "text", "time", "zone", "duration", "arrow"]))
    if kind == "number":
        name = draw(st.sampled_from([*INTEGERS, "float16", "float32", "float64"]))
        return pd.Series(np.array(values(numbers_of(name)), name))
    if kind == "bool":
        return pd.Series(np.array(values(st.booleans())))
    if kind == "masked":
        name = draw(st.sampled_from([*INTEGERS, "float32", "float64"]))
        numbers = st.floats(width=32, allow_nan=False) if name.startswith("f") else numbers_of(name)
        word = name.rstrip("0123456789")
        dtype: Any = {"uint": "UInt", "int": "Int", "float": "Float"}[word] + name[len(word) :]
        return pd.Series(pd.array(values(st.none() | numbers), dtype=dtype))
    if kind == "text":
        return pd.Series(pd.array(values(st.none() | TEXT), dtype=pd.StringDtype("pyarrow")))
    if kind == "arrow":
        arrow_type, one = ARROW[draw(st.sampled_from(sorted(ARROW)))]
        if not (pa.types.is_fixed_size_list(arrow_type) and PYARROW < 26):  # it cannot read nulls among these
            one = st.none() | one
        return pd.Series(pd.array(pa.array(values(one), arrow_type), dtype=pd.ArrowDtype(arrow_type)))
    unit = draw(st.sampled_from(sorted(UNITS)))
    ticks = np.array([np.iinfo(np.int64).min if v is None else v * UNITS[unit] for v in values(st.none() | SECONDS)])
    if kind == "duration":
        return pd.Series(ticks.view(f"m8[{unit}]"))
    times = pd.Series(ticks.view(f"M8[{unit}]"))
    return times if kind == "time" else times.dt.tz_localize("UTC").dt.tz_convert(draw(st.sampled_from(ZONES)))


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.integers(1, 8))
    free = TEXT.filter(lambda name: name not in ("i", "embedding"))
    names = draw(st.lists(free | st.sampled_from(["a", "a.b", "list.element", "Größe"]), max_size=4, unique=True))
    return pd.DataFrame({name: draw(columns(rows)) for name in names}, index=range(rows))


def plain(values: Any) -> str:
    """Values spelled so that NaN is like NaN, and unlike null."""
    return repr(pa.array(values, from_pandas=False).to_pylist())


def as_read(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame as readers give it: floating-point numbers are numpy's, where null is NaN."""

    frame = frame.copy(deep=False)
    for name in frame:
        kind = pa.array(frame[name], from_pandas=False).type
        if pa.types.is_floating(kind):
            frame[name] = frame[name].to_numpy(kind.to_pandas_dtype(), na_value=np.nan)
    return frame


def assert_same(got: pd.DataFrame, frame: pd.DataFrame) -> None:
    assert list(got.columns) == list(frame.columns)
    for name in frame:
        assert got[name].dtype == frame[name].dtype, name
        assert plain(got[name]) == plain(frame[name])


def assert_stored(folder: Path, frame: pd.DataFrame) -> None:
    """What lies in the files, where NaN and null are two things."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("0*.parquet"))]
    for name in frame:
        assert repr([value for table in tables for value in table[name].to_pylist()]) == plain(frame[name])


def lazily(frame: pd.DataFrame, rows: int) -> dict[str, Any]:
    chunks = tuple(min(rows, len(frame) - start) for start in range(0, len(frame), rows))
    parts = [delayed(frame[start : start + rows]) for start in range(0, len(frame), rows)]
    return {
        "array": da.from_array(VECTORS[: len(frame)], chunks=(chunks, 2)),
        "meta": dd.from_delayed(parts, meta=frame[:0], verify_meta=False),
    }


@given(
    frame=frames(),
    source=st.sampled_from(["pandas", "dask", "batches"]),
    file_format=st.sampled_from(["parquet", "parquet_npy"]),
    rows=st.integers(1, 9),
)
def test_any_column_comes_back_as_it_was(frame: pd.DataFrame, source: str, file_format: str, rows: int) -> None:
    file_format = file_format if len(frame.columns) else "parquet"
    given: dict[str, Any] = {"array": VECTORS[: len(frame)], "meta": frame}
    if source == "dask":
        given = lazily(frame, 3)
    elif source == "batches":
        given = {"array": ((VECTORS[a : min(a + 3, len(frame))], frame[a : a + 3]) for a in range(0, len(frame), 3))}
    names = list(map(str, frame))
    with tempfile.TemporaryDirectory() as folder, dask.config.set(scheduler="synchronous"):
        write_embeddings(folder=f"{folder}/a", file_format=file_format, rows_per_file=rows, **given)
        # A reader as source, and what it wrote, seen with its manifest and without.
        reader = EmbeddingReader(f"{folder}/a", file_format, meta_columns=names)
        write_embeddings(reader, f"{folder}/b", "parquet")
        assert_stored(Path(folder, "a"), frame)
        assert_stored(Path(folder, "b"), frame)
        Path(f"{folder}/b/.manifest.embeddings").unlink()
        again = EmbeddingReader(f"{folder}/b", "parquet", meta_columns=names)
        for opened in (reader, EmbeddingReader.from_manifest(f"{folder}/a/.manifest.embeddings"), again):
            assert_same(opened.to_dask_dataframe().compute(), as_read(frame))
            [(vectors, batch)] = opened(100, show_progress=False)
            assert_same(batch.drop(columns="i"), as_batch(as_read(frame)))
            np.testing.assert_array_equal(vectors, VECTORS[: len(frame)])


DAY = dt.date(2020, 1, 1)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (pd.Series(["a", None, ""], dtype="str"), "string"),
        (pd.Series(["a", None, "b"], dtype=object), "string"),
        (pd.Series(pd.Categorical(["a", None, "b"])), "string"),
        (pd.Series(pd.Categorical([3, 1, 3])), "int64"),
        (pd.Series([1, None, 3], dtype="int64[pyarrow]"), "Int64"),
        (pd.Series([1, None, 3], dtype=object), "Int64"),
        (pd.Series([True, None, False], dtype=object), "boolean"),
        (pd.Series([DAY, None, DAY], dtype=object), "date32[day][pyarrow]"),
        (pd.Series([decimal.Decimal("1.50"), None, None], dtype=object), "decimal128(3, 2)[pyarrow]"),
        (pd.Series([b"x", None, b""], dtype=object), "binary[pyarrow]"),
        (pd.Series([DAY, pd.NaT, DAY], dtype=object), "date32[day][pyarrow]"),
        (pd.Series([pd.Timestamp(1), None, pd.Timestamp(2**40 + 5)], dtype=object), "datetime64[ns]"),
        (pd.Series([pd.Timestamp(1, tz="UTC"), pd.NaT, None], dtype=object), "datetime64[ns, UTC]"),
        (pd.Series([pd.Timedelta(1), None, pd.Timedelta(-5)], dtype=object), "timedelta64[ns]"),
        (pd.Series([dt.datetime(3000, 1, 1), None, dt.datetime(2020, 1, 1)], dtype=object), "datetime64[us]"),
        (pd.Series(np.array([1, 2, 3], ">i4")), "int32"),
        (
            pd.Series(pd.arrays.ArrowExtensionArray(pa.array([np.float16(1), None, np.float16(2)], pa.float16()))),
            "float16",
        ),
    ],
)
def test_what_other_dtypes_become(tmp_path: Path, values: pd.Series[Any], dtype: str) -> None:
    write_embeddings(VECTORS[:3], tmp_path, "parquet", pd.DataFrame({"x": values}))
    got = EmbeddingReader(tmp_path, "parquet", meta_columns="x").to_dask_dataframe()["x"].compute()
    assert str(got.dtype) == dtype
    missing = got.isna()
    assert missing.tolist() == values.isna().tolist()
    assert got[~missing].tolist() == values[~values.isna()].tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pd.Series(pd.period_range("2020", periods=3, freq="D")), r"period\[D\].*only pandas knows"),
        (pd.Series(pd.interval_range(0, 3)), r"interval.*only pandas knows"),
        (pd.Series([DAY] * 3, dtype=pd.ArrowDtype(pa.date64())), r"parquet holds date64\[ms\] as date32"),
        (
            pd.Series([{"a": None}] * 3, dtype=pd.ArrowDtype(pa.struct([("a", pa.timestamp("s"))]))),
            r"parquet holds struct<a: timestamp\[s\]> as struct<a: timestamp\[ms\]>",
        ),
        (pd.Series([{}] * 3, dtype=pd.ArrowDtype(pa.struct([]))), "struct"),
        (pd.Series([(1, 2, 3)] * 3, dtype=pd.ArrowDtype(pa.month_day_nano_interval())), "month_day_nano_interval"),
        (pd.Series(np.array([2**60] * 3, "M8[s]")), "out of bounds"),
        (pd.Series([1j] * 3), "complex128"),
        (pd.Series([1, "a", 2.5], dtype=object), "object"),
        (pd.Series([2**70] * 3, dtype=object), "too large"),
        (pd.Series([DAY, dt.datetime(2020, 1, 1, 5), None], dtype=object), "some are dates, others have a time"),
        (pd.Series(["a", b"b", None], dtype=object), "some are text, others bytes"),
        (pd.Series([dt.time(1, tzinfo=dt.timezone.utc)] * 3, dtype=object), "times of the day with a zone lose it"),
        (
            pd.Series([dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc), dt.datetime(2020, 1, 1), None], dtype=object),
            "some times have a zone, others have none",
        ),
        (pd.Series([[pd.Timestamp(1)]] * 3, dtype=object), "the nanoseconds of pandas' times would be lost"),
        (pd.Series([{"a": pd.Timedelta(1)}] * 3, dtype=object), "the nanoseconds of pandas' times would be lost"),
        (pd.Series(pd.arrays.SparseArray([0, 0, 1])), "Sparse"),
    ],
)
def test_what_would_change_is_refused(tmp_path: Path, values: pd.Series[Any], message: str) -> None:
    with pytest.raises(ColumnError, match=rf"the metadata column 'x' .*{message}.*convert it"):
        write_embeddings(VECTORS[:3], tmp_path / "out", "parquet", pd.DataFrame({"x": values}))
    assert not list(tmp_path.rglob("*.parquet"))


def test_files_that_differ_in_how_fine_their_times_are(tmp_path: Path) -> None:
    for name, unit in (("0", "s"), ("1", "ms")):
        moments = pa.array([1, None], pa.timestamp(unit, "UTC"))
        table = pa.table({"embedding": [[1.0], [2.0]], "at": moments, "time": pa.array([1, 2], pa.time32(unit))})
        pq.write_table(table, tmp_path / f"{name}.parquet")

    def dtypes(url: Any) -> list[str]:
        frame = EmbeddingReader(url, "parquet", meta_columns=["at", "time"]).to_dask_dataframe()
        got = frame.compute()
        assert got.dtypes.tolist() == frame.dtypes.tolist()
        assert got["at"].dropna().astype("int64").unique().tolist() in ([1], [1000], [1000, 1])
        return list(map(str, got.dtypes))

    assert dtypes(tmp_path / "0.parquet") == ["datetime64[s, UTC]", "time32[s][pyarrow]"]
    assert dtypes(tmp_path) == dtypes(tmp_path / "1.parquet") == ["datetime64[ms, UTC]", "time32[ms][pyarrow]"]
