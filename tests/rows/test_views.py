"""Readers of selected rows: every way of picking and of reading, in every format, against numpy and pandas."""

from __future__ import annotations

import datetime as dt
import io
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.base import compute, tokenize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, iter_batches, nearest, write_embeddings
from dask_embedding_reader.errors import (
    ArgumentError,
    ArgumentTypeError,
    ColumnError,
    FileChangedError,
    MismatchError,
    RowError,
)
from dask_embedding_reader.formats import columns, picking
from dask_embedding_reader.formats.base import Columns, FileHeader, StretchReader
from dask_embedding_reader.formats.parquet import read as decoding
from dask_embedding_reader.formats.parquet.decode import DECODE_ROWS
from dask_embedding_reader.storage.fsspec import FsspecStore
from tests.support.collections import (
    FORMATS,
    WITH_METADATA,
    Collection,
    as_batch,
    assert_same_frame,
    assert_same_rows,
    write_collection,
)
from tests.support.stores import Bucket, Request, emptied_bucket

Int64s = npt.NDArray[np.int64]
Step = tuple[Callable[[EmbeddingReader], EmbeddingReader], Callable[[Int64s], Int64s]]

COLUMNS = ("id", "rank", "caption", "kind", "taken", "tags")
FILE_ROWS = (70, 0, 120, 1, 200, 5)


@pytest.fixture(scope="module", params=list(FORMATS))
def collection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """A collection of each format, with several row groups a file."""
    root = tmp_path_factory.mktemp("views")
    columns = COLUMNS if FORMATS[request.param].metadata else None
    return write_collection(root, request.param, file_rows=FILE_ROWS, columns=columns, row_group_rows=32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """npy files with metadata beside them."""
    root = tmp_path_factory.mktemp("pair")
    return write_collection(root, "parquet_npy", file_rows=FILE_ROWS, columns=COLUMNS, row_group_rows=32)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An object store that counts."""
    with emptied_bucket() as store:
        yield store


def read(reader: EmbeddingReader, batch_size: int, *args: Any, **options: Any) -> Any:
    """Batches without a word about how well they are mixed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batches of .* are mixed from")
        return reader(batch_size, *args, **{"show_progress": False, **options})


def assert_reads(view: EmbeddingReader, numbers: Int64s, collection: Collection) -> None:
    """Every way of reading brings these rows of a collection, in this order."""
    rows, frame = collection.rows[numbers], collection.metadata.iloc[numbers]
    assert len(view) == view.count == len(view.rows) == len(numbers)
    assert np.asarray(view.rows).tolist() == numbers.tolist()
    assert view.total_size == rows.nbytes
    for max_piece_size in (None, 37):
        array = view.to_dask_array(max_piece_size=max_piece_size)
        meta = view.to_dask_dataframe(max_piece_size=max_piece_size)
        assert_same_rows(array.compute(scheduler="sync"), rows)
        parts = compute(*meta.to_delayed(), scheduler="sync")
        assert tuple(map(len, parts)) == array.chunks[0]
        assert_same_frame(pd.concat(parts), frame)
        assert list(meta.columns) == collection.columns
        if meta.known_divisions:
            assert meta.divisions == (*(part.index[0] for part in parts), parts[-1].index[-1])
    middle = slice(len(numbers) // 3, -(len(numbers) // 4) or None)
    assert_same_rows(view.to_dask_array()[middle].compute(scheduler="sync"), rows[middle])
    assert_same_rows(view.to_dask_array()[::-2, 1:].compute(scheduler="sync"), rows[::-2, 1:])
    batches: list[tuple[int, dict[str, Any]]] = [
        (50, {"dtype": None}),
        (10_000, {"dtype": np.float64, "max_piece_size": 16, "parallel_pieces": 1}),
        (33, {"start": len(numbers) // 5, "end": len(numbers) - len(numbers) // 7}),
    ]
    for size, options in batches:
        start, end = options.get("start", 0), options.get("end", len(numbers))
        dtype = np.float32 if "dtype" not in options else options["dtype"] or rows.dtype
        for vectors, metadata in read(view, size, **options):
            stop = min(start + size, end)
            assert_same_rows(vectors, rows[start:stop].astype(dtype))
            assert vectors.flags.writeable
            batch = frame.iloc[start:stop].assign(i=numbers[start:stop]).reset_index(drop=True)
            assert_same_frame(metadata, as_batch(batch))
            start = stop
        assert start == end


def _steps(count: int) -> dict[str, Step]:
    rng = np.random.default_rng(count)
    anywhere, mask = rng.integers(0, count, count // 2), rng.random(count) < 0.3
    return {
        "all": (lambda r: r, lambda n: n),
        "slice": (lambda r: r.take(slice(40, -30)), lambda n: n[40:-30]),
        "every third": (lambda r: r.take(slice(1, None, 3)), lambda n: n[1::3]),
        "backwards": (lambda r: r.take(slice(None, None, -1)), lambda n: n[::-1]),
        "anywhere": (lambda r: r.take(anywhere), lambda n: n[anywhere]),
        "mask": (lambda r: r.take(mask), lambda n: n[mask]),
        "few": (lambda r: r.take([count - 1, 0, 75, 75]), lambda n: n[[count - 1, 0, 75, 75]]),
        "none": (lambda r: r.take([]), lambda n: n[:0]),
        "one": (lambda r: r.take(np.array([3], np.uint8)), lambda n: n[[3]]),
        "shard": (lambda r: r.shard(3, 1), lambda n: n[count // 3 : 2 * count // 3]),
        "twice": (lambda r: r.take(anywhere).take(slice(5, 50)), lambda n: n[anywhere[5:50]]),
    }


@pytest.mark.parametrize("name", ["anywhere", "mask", "few"])
def test_rows_are_picked_in_every_format(collection: Collection, name: str) -> None:
    pick, expected = _steps(len(collection))[name]
    assert_reads(pick(collection.open()), expected(np.arange(len(collection))), collection)


@pytest.mark.parametrize("name", list(_steps(100)))
def test_rows_are_picked(pair: Collection, name: str) -> None:
    pick, expected = _steps(len(pair))[name]
    assert_reads(pick(pair.open()), expected(np.arange(len(pair))), pair)


@pytest.mark.parametrize(("buffer_rows", "shards"), [(None, None), (64, None), (150, 4)])
def test_rows_are_shuffled(collection: Collection, buffer_rows: int | None, shards: int | None) -> None:
    epoch = collection.open().take(slice(3, None)).shuffle(seed=5, epoch=2, buffer_rows=buffer_rows)
    assert sorted(epoch.rows) == list(range(3, len(collection)))
    view = epoch if shards is None else epoch.shard(shards, 1)
    expected = np.asarray(epoch.rows)[slice(1, len(epoch) // 64 * 64, shards) if shards else slice(None)]
    assert_reads(view, expected, collection)


@pytest.mark.parametrize("name", ["parquet-list", "arrow-zstd"])
@pytest.mark.parametrize("group_rows", [1, 2, 60])
def test_batches_that_end_within_row_groups_read_together_have_all_rows(
    tmp_path: Path, name: str, group_rows: int
) -> None:
    """One reader decodes them for all of these batches: from the first row that is picked to the last one."""
    collection = write_collection(tmp_path, name, file_rows=(41, 60), columns=["id"], row_group_rows=group_rows)
    for step in (1, 2):
        view, numbers = collection.open().take(slice(0, None, step)), np.arange(0, 101, step)
        for piece in (3, 8, 30):
            for size in (5, 20):
                starts = range(0, len(numbers), size)
                for start, (rows, frame) in zip(starts, view(size, max_piece_size=piece), strict=True):
                    here = numbers[start : start + size]
                    assert_same_rows(rows, collection.rows[here])
                    assert frame["id"].tolist() == collection.metadata["id"].iloc[here].tolist()


CHAINS = st.lists(
    st.one_of(
        st.tuples(st.just("slice"), st.slices(300)),
        st.tuples(st.just("take"), st.lists(st.floats(0, 0.999), max_size=40)),
        st.tuples(st.just("mask"), st.integers(0, 9)),
        st.tuples(st.just("sample"), st.floats(0, 1)),
        st.tuples(st.just("filter"), st.integers(0, 99)),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHAINS, st.sampled_from(["", "shuffle", "shard", "both"]), st.integers(1, 400))
def test_steps_compose_as_on_a_sequence(pair: Collection, chain: Any, last: str, buffer: int) -> None:
    view, numbers = pair.open(), np.arange(len(pair))
    rank = pair.table["rank"].to_pandas().to_numpy()
    for kind, how in chain:
        if kind == "slice":
            view, numbers = view.take(how), numbers[how]
        elif kind == "take":
            at = (np.array(how) * len(numbers)).astype(int) if len(numbers) else np.empty(0, int)
            view, numbers = view.take(at), numbers[at]
        elif kind == "mask":
            mask = np.arange(len(numbers)) % (how + 1) == 0
            view, numbers = view.take(mask), numbers[mask]
        elif kind == "sample":
            view = view.sample(frac=how, seed=1)
            drawn = np.asarray(pair.open().take(np.arange(len(numbers)) % len(pair)).rows)
            assert len(view) == round(how * len(numbers)) <= len(drawn)
            assert set(view.rows) <= set(numbers.tolist())
            numbers = np.asarray(view.rows)
        else:
            view, numbers = view.filter([("rank", "<", how)]), numbers[rank[numbers] < how]
    if last in ("shuffle", "both"):
        view = view.shuffle(3, buffer_rows=buffer)
        assert sorted(view.rows) == sorted(numbers.tolist())
        numbers = np.asarray(view.rows)
    if last in ("shard", "both"):
        view = view.shard(2, 1)
        assert set(view.rows) <= set(numbers.tolist())
        numbers = np.asarray(view.rows)
    assert np.asarray(view.rows).tolist() == numbers.tolist()
    assert_same_rows(view.to_dask_array(max_piece_size=90).compute(scheduler="sync"), pair.rows[numbers])
    batches = list(read(view, 77))
    assert sum(len(rows) for rows, _ in batches) == len(numbers)
    for start, (rows, frame) in zip(range(0, len(numbers), 77), batches, strict=True):
        assert_same_rows(rows, pair.rows[numbers[start : start + 77]])
        assert frame["id"].tolist() == pair.metadata["id"].iloc[numbers[start : start + 77]].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Filters


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([("rank", ">=", 50)], "rank >= 50"),
        ([("rank", "=", 7), ("id", ">", 0)], "rank == 7"),
        ([("rank", "!=", 7)], "rank != 7 and rank == rank"),
        ([[("rank", "<", 10)], [("rank", ">", 90.5)]], "rank < 10 or rank > 90.5"),
        ([("kind", "==", "cat")], "kind == 'cat'"),
        ([("caption", "in", ["cat", "日本", None])], "caption in ['cat', '日本']"),
        ([("caption", "in", [])], "rank < 0"),
        ([("caption", "not in", {"cat"})], "caption != 'cat' and caption == caption"),
        ([("rank", "in", np.array([1, 2, 3]))], "rank in [1, 2, 3]"),
        ([("taken", "<", pd.Timestamp("2020-01-01"))], "taken < '2020-01-01'"),
        ([("rank", "==", None)], "rank < 0"),
    ],
)
def test_filters_pick_what_pandas_picks(pair: Collection, filters: Any, expected: str) -> None:
    frame = pair.table.to_pandas()
    frame["kind"] = frame["kind"].astype(object)
    numbers = np.flatnonzero(frame.eval(expected, engine="python").fillna(value=False).to_numpy(bool))
    view = pair.open().filter(filters)
    assert list(view.rows) == numbers.tolist()
    some = np.array([200, 5, 5, 90, 30, 31, 32])
    assert list(pair.open().take(some).filter(filters).rows) == [n for n in some.tolist() if n in set(numbers)]


@pytest.mark.parametrize("column", ["taken", "zoned", "length"])
def test_filters_compare_nanoseconds(tmp_path: Path, column: str) -> None:
    """pyarrow takes pandas' times for Python's, which end at microseconds, and numpy makes integers of arrays."""
    length = pd.Series(pd.to_timedelta([1005, 1006, 1007, 1008, None], unit="ns"))
    taken = pd.Timestamp("2020-01-01") + length
    frame = pd.DataFrame({"taken": taken, "zoned": taken.dt.tz_localize("Asia/Kathmandu"), "length": length})
    write_embeddings(np.ones((5, 2), np.float32), tmp_path, "parquet", frame, rows_per_file=2)
    reader = EmbeddingReader(tmp_path, "parquet")

    def found(operator: str, value: Any) -> list[int]:
        return list(reader.filter([(column, operator, value)]).rows)

    first, second = frame[column][1], frame[column][3]
    assert [found(operator, first) for operator in ("==", "!=", "<", ">=")] == [[1], [0, 2, 3], [0], [1, 2, 3]]
    for several in ([first, second], {first, second}, (first, second, None)):
        assert (found("in", several), found("not in", several)) == ([1, 3], [0, 2])
    assert found("in", [first, first.floor("us")]) == [1]
    with pytest.raises(ArgumentError, match="cannot be compared"):
        found("in", [first, "text"])


@pytest.mark.parametrize("unit", ["us", "ns"])
def test_filters_take_arrays_of_times(tmp_path: Path, unit: str) -> None:
    taken = np.array(["2020-01-01", "2021-01-01"], f"M8[{unit}]")
    frame = pd.DataFrame({"taken": taken, "length": taken - taken[0]})
    write_embeddings(np.ones((2, 2), np.float32), tmp_path, "parquet", frame)
    reader = EmbeddingReader(tmp_path, "parquet")
    for column in ("taken", "length"):
        for other in ("us", "ns"):
            values = frame[column].to_numpy()[1:].astype(f"{frame[column].dtype.kind}8[{other}]")
            assert list(reader.filter([(column, "in", values)]).rows) == [1]


@pytest.mark.parametrize("name", WITH_METADATA)
def test_filtered_rows_are_read_in_every_way(tmp_path: Path, name: str) -> None:
    collection = write_collection(tmp_path, name, file_rows=FILE_ROWS, columns=COLUMNS, row_group_rows=32)
    rank = collection.table["rank"].to_pandas()
    assert_reads(collection.open().filter([("rank", ">", 60)]), np.flatnonzero(rank > 60), collection)
    by_function = collection.open().filter(lambda frame: frame["rank"] > 60, columns="rank")
    assert by_function == collection.open().filter([("rank", ">", 60)])
    assert by_function.token == collection.open().filter([("rank", ">", 60)]).token


def test_nothing_of_a_selection_is_nothing(pair: Collection) -> None:
    x = pair.open().take([5, 3, 3]).to_dask_array()
    for nothing in (x[1:1], x[[]], x[np.zeros(3, bool)], x[::-1][3:]):
        assert nothing.compute().shape == (0, x.shape[1])


def test_rows_are_not_filtered_by_their_numbers(pair: Collection) -> None:
    reader = pair.open()
    for filters, names in (([("i", ">", 3)], None), (lambda frame: frame["i"] > 3, ["i"])):
        with pytest.raises(ColumnError, match=r"'i' is the row number, not a column; take\(slice\(start, stop\)\)"):
            reader.filter(filters, columns=names)


def test_filters_may_name_columns_that_were_not_opened(pair: Collection) -> None:
    reader = pair.open(meta_columns=["id"])
    rank = pair.table["rank"].to_pandas()
    for view in (reader.filter([("rank", ">", 60)]), reader.filter(lambda frame: frame["rank"] > 60, columns=["rank"])):
        assert list(view.rows) == np.flatnonzero(rank > 60).tolist()
        assert list(view.to_dask_dataframe().columns) == ["id"]


@pytest.mark.parametrize("file_format", ["npy", "fbin"])
def test_files_without_columns_say_how_columns_beside_them_are_read(tmp_path: Path, file_format: str) -> None:
    frame = pd.DataFrame({"n": range(3)})
    write_embeddings(np.ones((3, 2), "f4"), tmp_path, f"parquet_{file_format}", frame)
    with pytest.raises(ArgumentError, match="no columns to filter by") as caught:
        EmbeddingReader(tmp_path, file_format).filter([("n", ">", 1)])
    said = re.search('file_format="(.*?)"', str(caught.value))
    assert said
    assert list(EmbeddingReader(tmp_path, said[1], meta_columns="n").filter([("n", ">", 1)]).rows) == [2]


@pytest.mark.parametrize("name", ["number", "text"])
def test_filters_look_at_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Neighbours and others, in steps: long ones of numbers only, since text may weigh anything."""
    count, most = 40_000, 15_000
    monkeypatch.setattr(columns, "_NARROW_ROWS", most)
    steps: list[int] = []
    values = np.arange(count) % 7
    table = {"number": pa.array(values), "text": pa.array(values.astype(str))}
    np.save(tmp_path / "0.npy", np.zeros((count, 2), np.float32))
    pq.write_table(pa.table(table), tmp_path / "0.parquet", row_group_size=35_000)
    reader = EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["number", "text"])

    def is_three(frame: pd.DataFrame) -> Any:
        steps.append(len(frame))
        return frame[name].astype(str) == "3"

    for rows in (np.arange(count), np.arange(100, 39_990), np.arange(5, count, 3)):
        found = reader.take(rows).filter(is_three, columns=name)
        np.testing.assert_array_equal(np.asarray(found.rows), rows[values[rows] == 3])
    assert max(steps) == (most if name == "number" else DECODE_ROWS)


def test_row_groups_that_statistics_rule_out_are_not_read(bucket: Bucket) -> None:
    table = pa.table({"n": np.arange(100_000), "text": [f"{k:099}" for k in range(100_000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10_000, compression="none", use_dictionary=False)
    bucket.put("emb/0.parquet", bytes(sink.getvalue()))
    bucket.put("emb/0.npy", _npy(np.zeros((100_000, 1), np.float32)))
    reader = EmbeddingReader("bucket://emb", "parquet_npy", meta_columns=["n", "text"])
    bucket.forget()
    assert list(reader.filter([("n", ">=", 55_000), ("n", "<", 55_003)]).rows) == [55_000, 55_001, 55_002]
    assert bucket.nbytes < 200_000  # one of ten row groups of a column of 800 kB, and no other column


def test_either_zero_is_found_as_the_other(tmp_path: Path) -> None:
    score = pa.array([0.0, 0.0, -0.0, None, 1.0, -0.0])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(6, np.float32)), 1)
    pq.write_table(pa.table({"embedding": vectors, "score": score}), tmp_path / "0.parquet", row_group_size=2)
    reader = EmbeddingReader(tmp_path)
    for zero in (0.0, -0.0, 0):
        assert list(reader.filter([("score", "==", zero)]).rows) == [0, 1, 2, 5]
        assert list(reader.filter([("score", "in", [zero])]).rows) == [0, 1, 2, 5]
        assert list(reader.filter([("score", "not in", [zero])]).rows) == [4]


@pytest.mark.parametrize(
    ("first", "second", "values", "rows"),
    [
        (pa.nulls(2), pa.array(["a", "b"]), ["a"], [2]),
        (pa.array([1, 2], pa.int8()), pa.array([300, 2], pa.int64()), [300, 2], [1, 2, 3]),
        (pa.array([1, 2], pa.int32()), pa.array([1.5, 2.0]), [1.5, 1], [0, 2]),
        (pa.array([0.1, 2.0], pa.float32()), pa.array([0.1, np.nan], from_pandas=False), [0.1, np.nan], [2, 3]),
        (pa.array([1, 2], pa.date32()), pa.array([1, 2], pa.date32()), [dt.datetime(1970, 1, 2, 5)], []),
        (pa.array([1, 2], pa.date32()), pa.array([1, 2], pa.date32()), ["1970-01-02"], [0, 2]),
    ],
)
@pytest.mark.parametrize("write_statistics", [True, False])
def test_values_that_the_type_of_a_file_cannot_hold_are_in_none_of_its_rows(
    tmp_path: Path, first: pa.Array, second: pa.Array, values: list[Any], rows: list[int], write_statistics: bool
) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2, np.float32)), 1)
    for number, column in enumerate([first, second]):
        table = pa.table({"embedding": vectors, "c": column})
        pq.write_table(table, tmp_path / f"{number}.parquet", write_statistics=write_statistics)
    reader = EmbeddingReader(tmp_path)
    assert list(reader.filter([("c", "in", values)]).rows) == rows
    valid = [row for row, value in enumerate([*first.to_pylist(), *second.to_pylist()]) if value is not None]
    assert list(reader.filter([("c", "not in", values)]).rows) == [row for row in valid if row not in rows]


def test_nan_of_which_statistics_know_nothing_is_found(tmp_path: Path) -> None:
    # Of both row groups they tell that one value is all there is.
    score = pa.array([5.0, np.nan, 7.0, np.nan, None, 7.0])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(6, np.float32)), 1)
    pq.write_table(pa.table({"embedding": vectors, "score": score}), tmp_path / "0.parquet", row_group_size=2)
    reader = EmbeddingReader(tmp_path)
    cases: list[tuple[list[Any], list[int]]] = [
        ([("score", "!=", 5)], [1, 2, 3, 5]),
        ([("score", "not in", [5.0, 7.0])], [1, 3]),
        ([("score", "in", [np.float32("nan"), 7.0])], [1, 2, 3, 5]),
        ([("score", ">", 5), ("score", "!=", 6)], [2, 5]),
        ([[("score", "!=", 5), ("score", "!=", 7)], [("score", "<", 6)]], [0, 1, 3]),
    ]
    for conditions, rows in cases:
        assert list(reader.filter(conditions).rows) == rows


@pytest.mark.parametrize("write_statistics", [True, False])
def test_times_are_compared_with_text_and_sets_may_be_of_pandas(tmp_path: Path, write_statistics: bool) -> None:
    days = pd.date_range("2021-01-01", periods=6)
    columns = {
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(6, np.float32)), 1),
        "day": pa.array(days.date),
        "time": pa.array(days, pa.timestamp("us")),
        "there": pa.array(days.tz_localize("UTC"), pa.timestamp("ns", "UTC")),
        "n": range(6),
        "text": list("abcdef"),
    }
    pq.write_table(pa.table(columns), tmp_path / "0.parquet", row_group_size=2, write_statistics=write_statistics)
    reader = EmbeddingReader(tmp_path)

    def found(*condition: Any) -> list[int]:
        return list(reader.filter([condition]).rows)

    for name, text in [("day", "2021-01-03"), ("time", "2021-01-03 00:00"), ("there", "2021-01-03T00:00Z")]:
        assert found(name, ">", text) == [3, 4, 5]
        assert found(name, "<=", text) == [0, 1, 2]
        assert found(name, "==", text) == found(name, "in", [text]) == [2]
    picked: list[tuple[str, Any]] = [
        ("n", pd.Series([1, 3])),
        ("n", pd.Index([1, 3])),
        ("n", pd.Series([1, np.nan, 3])),
        ("n", pd.Series([1, None, 3], dtype="Int64")),
        ("n", pd.Series([1, 3], dtype="int64[pyarrow]")),
        ("text", pd.Series(["b", None, "d"])),
        ("text", pd.Series(["b", "d"], dtype="category")),
        ("time", pd.Series(days[[1, 3]])),
        ("time", days[[1, 3]]),
        ("there", days[[1, 3]].tz_localize("UTC")),
    ]
    for name, values in picked:
        assert found(name, "in", values) == [1, 3]
        assert found(name, "not in", values) == [0, 2, 4, 5]
    for name, values, zone in [("time", days.tz_localize("UTC"), "no"), ("there", days, "a")]:
        for condition in [(name, "in", values), (name, "==", values[0])]:
            with pytest.raises(ArgumentError, match=f"give a pandas.Timestamp with {zone} time zone$") as caught:
                reader.filter([condition])
            assert len(str(caught.value)) < 700


def test_masks_of_pandas_pick_by_position_and_may_not_tell_of_another_order(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.arange(12).reshape(6, 2))
    pd.DataFrame({"score": [3, 1, 5, 2, 4, 6]}).to_parquet(tmp_path / "0.parquet")
    reader = EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["score"])
    frame, shuffled = reader.to_dask_dataframe().compute(), reader.shuffle(seed=1)
    high = frame["score"] > 3
    by_score = (frame.sort_values("score")["score"] > 3, frame.reset_index().sort_values("score")["score"] > 3)
    assert list(reader.take(high).rows) == list(reader.take(by_score[0].sort_index()).rows) == [2, 4, 5]
    # An index of something else, and one of several frames put together, tell no order.
    for index in ([0, 1, 2, 0, 1, 2], list("fedcba"), range(1, 7)):
        assert list(reader.take(high.set_axis(pd.Index(index))).rows) == [2, 4, 5]
    nullable = high.astype("boolean")
    nullable[4] = None
    assert list(reader.take(nullable).rows) == list(reader.take(nullable.astype("bool[pyarrow]")).rows) == [2, 5]
    lazy = reader.to_dask_dataframe()
    assert list(reader.take(lazy["score"] > 3).rows) == [2, 4, 5]
    assert list(reader.take((reader.to_dask_array() > 5)[:, 0]).rows) == [3, 4, 5]
    with pytest.raises(MismatchError, match=r"of row 1 [(].*[)] at position 0"):
        reader.take(lazy.sort_values("score")["score"] > 3)
    with pytest.raises(ArgumentError, match="a mask of 5 booleans where there are 6 rows"):
        reader.take(high[1:])
    # Numbers pick by themselves.
    assert list(reader.take(frame.sort_values("score")["score"] - 1).rows) == [0, 1, 2, 3, 4, 5]
    some = reader.take([5, 0, 2])
    assert list(some.take(high[[5, 0, 2]]).rows) == [5, 2]
    told = "the mask is of row 1 \\('i' in its index\\) at position 0, where the reader has row 0"
    with pytest.raises(MismatchError, match=told):
        reader.take(by_score[0])
    with pytest.raises(MismatchError, match="does not ascend \\(it begins with 1, 3, 0, 4\\)"):
        reader.take(by_score[1])
    with pytest.raises(MismatchError, match=r"of row 0 [(].*[)] at position 0, where the reader has row 5"):
        some.take(high[[0, 5, 2]])
    in_order = shuffled.to_dask_dataframe().compute()["score"] > 3
    assert sorted(np.asarray(reader.take(in_order.sort_index()).rows)) == [2, 4, 5]
    with pytest.raises(MismatchError, match="where the reader has row"):
        reader.take(in_order)


@pytest.mark.parametrize("made", ["sorted", "indexed"])
def test_a_function_returns_its_mask_in_the_order_of_its_frame(tmp_path: Path, made: str) -> None:
    np.save(tmp_path / "0.npy", np.arange(12).reshape(6, 2))
    pd.DataFrame({"score": [3, 1, 5, 2, 4, 6]}).to_parquet(tmp_path / "0.parquet")
    reader = EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["score"])

    def high(frame: pd.DataFrame) -> pd.Series[bool]:
        return (frame.sort_values("score") if made == "sorted" else frame.set_index("score", drop=False))["score"] > 3

    with pytest.raises(MismatchError, match="a mask with another index than that of its frame"):
        reader.filter(high, columns="score")
    for good in (lambda frame: frame["score"] > 3, lambda frame: list(frame["score"] > 3)):
        assert list(reader.filter(good, columns="score").rows) == [2, 4, 5]
    if made == "sorted":
        assert list(reader.filter(lambda frame: high(frame).sort_index(), columns="score").rows) == [2, 4, 5]
    else:
        assert list(reader.filter(lambda frame: high(frame).to_numpy(), columns="score").rows) == [2, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda r: r.take([0, 396]), IndexError, "396 at position 1, but there are rows from 0 to 395"),
        (lambda r: r.take([3, -1]), ArgumentError, "searches give -1 for hits"),
        (lambda r: r.take([True] * 5), ArgumentError, "mask of 5 booleans where there are 396 rows"),
        (lambda r: r.take([[1, 2]]), ArgumentTypeError, "shape \\(1, 2\\)"),
        (lambda r: r.take([1.5]), ArgumentTypeError, "float64"),
        (lambda r: r.take("3"), ArgumentTypeError, "str"),
        (lambda r: r.take(slice(0, 9, 0)), ArgumentError, "step of 0"),
        (lambda r: r.take([1]).take([1]), IndexError, "rows from 0 to 0"),
        (lambda r: r.take([]).take([0]), IndexError, "there are no rows"),
        (lambda r: r.filter([("rnak", ">", 3)]), ColumnError, "no column 'rnak'; its columns are 'rank'"),
        (lambda r: r.filter([("caption", "<", 3)]), ArgumentError, "'caption' is"),
        (lambda r: r.filter([("rank", "in", ["a"])]), ArgumentError, "cannot be compared"),
        (lambda r: r.sample(), ArgumentError, "either n= or frac="),
        (lambda r: r.sample(0.1), ArgumentTypeError, "not 0.1; a share of the rows is frac=0.1"),
        (lambda r: r.sample(3, frac=0.5), ArgumentError, "either n= or frac="),
        (lambda r: r.sample(397), ArgumentError, "397 rows cannot be drawn from 396"),
        (lambda r: r.sample(frac=1.5), ArgumentError, "from 0 to 1"),
        (lambda r: r.shuffle("a"), ArgumentTypeError, "seed"),
        (lambda r: r.shuffle(buffer_rows=0), ArgumentError, "buffer_rows"),
        (lambda r: r.shard(4, 4), ArgumentError, "index=4 is no shard"),
        (lambda r: r.shard(4, -1), ArgumentError, "0 to 3"),
        (lambda r: r.shard(0, 0), ArgumentError, "num_shards"),
        (lambda r: r.shuffle().take([0]), ArgumentError, "take comes before shuffle and shard"),
        (lambda r: r.shuffle().filter([("rank", ">", 3)]), ArgumentError, "filter comes before"),
        (lambda r: r.shuffle().sample(3), ArgumentError, "sample comes before"),
        (lambda r: r.shuffle().shuffle(), ArgumentError, "shuffle comes once, and before shard, .* is shuffled"),
        (lambda r: r.shard(2, 0).shuffle(), ArgumentError, "this reader is a shard"),
        (lambda r: r.shuffle().shard(2, 0).shard(2, 0), ArgumentError, "is a shard already \\(shard 0 of 2\\)"),
        (lambda r: r.take([1, 2]).locate(2), IndexError, "the selection has 2 rows"),
        (lambda r: r.take([1, 2])(2, start=3), ArgumentError, "the selection has 2 rows"),
    ],
)
def test_bad_input_is_refused_at_the_call(
    pair: Collection, call: Callable[[EmbeddingReader], object], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        call(pair.open())
    assert isinstance(caught.value, ArgumentError | ArgumentTypeError | ColumnError)


def test_half_floats_are_compared(tmp_path: Path) -> None:
    # pyarrow compares them with nothing, not even with each other.
    halves = np.array([0, -0.0, 0.1, np.nan, np.inf, 1], np.float16)
    missing = np.arange(6) == 5
    columns = {"half": pa.array(halves, mask=missing), "float": pa.array(halves.astype(np.float32), mask=missing)}
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(6, np.float32)), 1)
    table = pa.table({"embedding": vectors, "nothing": pa.nulls(6), **columns})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=2)
    reader = EmbeddingReader(tmp_path)
    tenth = np.float16(0.1)
    for name in columns:
        for operator, value, rows in [
            ("==", 0, [0, 1]), ("==", 0.1, []), ("==", tenth, [2]), ("<", 0.1, [0, 1, 2]), ("!=", tenth, [0, 1, 3, 4]),
            (">=", np.float16(1), [4]), ("in", [0.0, tenth], [0, 1, 2]), ("in", halves[3:], [3, 4]),
            ("not in", {tenth, 5}, [0, 1, 3, 4]),
        ]:  # fmt: skip
            assert list(reader.filter([(name, operator, value)]).rows) == rows, (name, operator, value)
    for operator, value in (("==", tenth), ("<", tenth), ("in", [tenth]), ("not in", [tenth])):
        assert list(reader.filter([("nothing", operator, value)]).rows) == []


def test_readers_without_columns_say_how_to_open_them(tmp_path: Path) -> None:
    plain = write_collection(tmp_path / "npy", "npy").open()
    with pytest.raises(ArgumentError, match="parquet_npy"):
        plain.filter([("a", "==", 1)])
    pair = write_collection(tmp_path / "pair", "parquet_npy", columns=["rank"])
    found = pair.open(meta_columns=None).filter([("rank", ">", 10)])
    assert list(found.rows) == np.flatnonzero((pair.metadata["rank"] > 10).fillna(False)).tolist()


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet_npy", columns=["rank"], file_rows=(50, 50))
    view = collection.open().filter([("rank", ">", 10)]).shuffle(1)
    np.save(collection.files[1], np.zeros((60, 4), np.float32))
    for use in (lambda: view.to_dask_array().compute(scheduler="sync"), lambda: list(read(view, 10))):
        with pytest.raises(FileChangedError, match=collection.files[1].name):
            use()


# ---------------------------------------------------------------------------------------------------------------------
# What a view is


def test_views_show_what_they_are(pair: Collection) -> None:
    reader = pair.open()
    view = reader.take([0, 1, 80])
    assert repr(view).startswith("<EmbeddingReader: 3 of 396 x 4 float32 in 2 parquet_npy files, 48 bytes>")
    assert (view.nb_files, view.max_file_size) == (2, 32)
    assert view.locate(2) == reader.locate(80)
    assert "3 of 396" in view._repr_html_()
    assert "3 of 396" not in reader._repr_html_()
    shuffled = reader.shuffle().shard(2, 0)
    assert (shuffled.nb_files, shuffled.max_file_size) == (reader.nb_files, reader.max_file_size)
    assert repr(shuffled).startswith(f"<EmbeddingReader: {len(shuffled)} of 396 x 4 float32, shuffled, in ")
    assert repr(reader.take([80, 1])).startswith("<EmbeddingReader: 2 of 396 x 4 float32, as picked, in 2 parquet_npy")


def test_views_are_equal_by_what_they_read(pair: Collection) -> None:
    reader = pair.open()
    steps: list[Callable[[EmbeddingReader], EmbeddingReader]] = [
        lambda r: r,
        lambda r: r.take([5, 3]),
        lambda r: r.take([3, 5]),
        lambda r: r.filter([("rank", ">", 60)]),
        lambda r: r.sample(9),
        lambda r: r.sample(9, seed=1),
        lambda r: r.shuffle(),
        lambda r: r.shuffle(epoch=1),
        lambda r: r.shuffle().shard(2, 1),
        lambda r: r.shard(2, 1),
    ]
    views, again = [step(reader) for step in steps], [step(pair.open()) for step in steps]
    assert views == again == [pickle.loads(pickle.dumps(view)) for view in views]
    assert list(map(tokenize, views)) == list(map(tokenize, again))
    assert [view.to_dask_array().name for view in views] == [view.to_dask_array().name for view in again]
    assert [view.to_dask_dataframe()._name for view in views] == [view.to_dask_dataframe()._name for view in again]
    for values in (views, map(tokenize, views), (view.to_dask_array().name for view in views)):
        assert len(set(values)) == len(views)
    assert reader.take(slice(None)) == reader
    assert reader.take(slice(None)).to_dask_array().name == reader.to_dask_array().name
    assert reader.take(slice(10, 20)).to_dask_array().name == reader.to_dask_array(10, 20).name


@pytest.mark.parametrize("name", ["every third", "anywhere", "mask", "shard"])
def test_views_are_written_and_converted(pair: Collection, tmp_path: Path, name: str) -> None:
    pick, expected = _steps(len(pair))[name]
    numbers = expected(np.arange(len(pair)))
    view = pick(pair.open())
    for file_format in ("parquet", "parquet_npy"):
        folder = tmp_path / file_format
        write_embeddings(view, folder, file_format, rows_per_file=30)
        copy = EmbeddingReader(str(folder), file_format, meta_columns=list(COLUMNS))
        assert_same_rows(copy.to_dask_array().compute(), pair.rows[numbers])
        assert copy.to_dask_dataframe().compute()["id"].tolist() == pair.metadata["id"].iloc[numbers].tolist()
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        write_embeddings(view, folder, file_format, rows_per_file=30)
        assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        with pytest.raises(FileExistsError):
            write_embeddings(pair.open().take([1, 2]), folder, file_format, rows_per_file=30)


@pytest.mark.parametrize("name", ["anywhere", "mask", "few", "backwards", "shuffled"])
def test_batches_of_views_are_written_in_their_order_to_every_format(
    pair: Collection, tmp_path: Path, name: str
) -> None:
    shuffled: Step = (lambda r: r.shuffle(1, buffer_rows=64).shard(2, 1), lambda n: n)
    pick, _ = {**_steps(len(pair)), "shuffled": shuffled}[name]
    for kind in {kind.file_format: kind for kind in FORMATS.values()}.values():
        view = pick(pair.open() if kind.metadata else pair.open(meta_columns=None))
        numbers = np.asarray(view.rows)
        folder = tmp_path / kind.file_format
        write_embeddings(read(view, 37), folder, kind.file_format, rows_per_file=30)
        copy = EmbeddingReader(str(folder), kind.file_format, meta_columns=["id"] if kind.metadata else None)
        assert_same_rows(copy.to_dask_array().compute(scheduler="sync"), pair.rows[numbers])
        if kind.metadata:
            ids = copy.to_dask_dataframe().compute(scheduler="sync")["id"]
            assert ids.tolist() == pair.metadata["id"].iloc[numbers].tolist()


@pytest.mark.parametrize("name", ["every third", "anywhere", "mask", "shard", "backwards"])
def test_arrays_and_frames_of_a_view_go_together(pair: Collection, name: str) -> None:
    pick, expected = _steps(len(pair))[name]
    numbers = expected(np.arange(len(pair)))
    view, weights = pick(pair.open()), np.ones((4, 2), np.float32)
    start = 0
    for rows, frame in iter_batches(view.to_dask_array() @ weights, view.to_dask_dataframe(), batch_size=17):
        here = numbers[start : start + 17]
        np.testing.assert_allclose(rows, pair.rows[here] @ weights, rtol=1e-5)
        assert frame["i"].tolist() == here.tolist()
        start += 17


# ---------------------------------------------------------------------------------------------------------------------
# How much is read, held and sent


def _npy(rows: npt.NDArray[Any]) -> bytes:
    with io.BytesIO() as f:
        np.save(f, rows)
        return f.getvalue()


@pytest.fixture
def remote(bucket: Bucket) -> EmbeddingReader:
    """Four remote files of 2,500 rows of 4 kB."""
    for k in range(4):
        bucket.put(
            f"emb/{k}.npy", _npy(np.arange(k * 2_500, (k + 1) * 2_500).repeat(1_000).reshape(2_500, 1_000) * 1.0)
        )
    reader = EmbeddingReader("bucket://emb")
    bucket.forget()
    return reader


def _everything(view: EmbeddingReader, way: str) -> npt.NDArray[Any]:
    if way == "array":
        return view.to_dask_array(dtype=np.float64).compute(scheduler="threads")[:, 0]  # type: ignore[no-any-return]
    return np.concatenate([rows[:, 0] for rows, _ in read(view, 1_000, dtype=np.float64)])


@pytest.mark.parametrize("way", ["array", "batches"])
def test_near_rows_are_asked_for_at_once(remote: EmbeddingReader, bucket: Bucket, way: str) -> None:
    numbers = np.array([10, 11, 40, 2_000, 2_600, 9_999, 9_990])
    for rows in (numbers, np.sort(numbers)):
        bucket.forget()
        assert _everything(remote.take(rows), way).tolist() == rows.tolist()
        # Gaps of less than 1 MB are read: 10 to 40, and 9,990 to 9,999; the file between is not touched.
        assert len(bucket.reads) == 4
        assert bucket.nbytes == (31 + 1 + 1 + 10) * 8_000
        assert not bucket.of_kind("read", "emb/2.npy")


@pytest.mark.parametrize("way", ["array", "batches"])
def test_nearly_all_rows_are_read_as_all(remote: EmbeddingReader, bucket: Bucket, way: str) -> None:
    view = remote.take(np.arange(10_000) % 3 != 0)
    assert _everything(view, way).tolist() == [n for n in range(10_000) if n % 3]
    assert bucket.nbytes <= 10_000 * 8_000
    assert len(bucket.reads) <= 4 * 4


def _read_no_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FsspecStore, "request_nbytes", 1)
    monkeypatch.setattr(picking, "_GAP_NBYTES", 0)


@pytest.mark.parametrize("way", ["array", "batches"])
def test_a_shuffled_epoch_asks_once_for_each_block(
    remote: EmbeddingReader, bucket: Bucket, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _read_no_gaps(monkeypatch)  # which would be worth it where blocks are so small
    epoch = remote.shuffle(1, buffer_rows=2_560)
    blocks: Any = epoch.rows
    assert sorted(_everything(epoch, way).tolist()) == list(range(10_000))
    assert bucket.nbytes == 10_000 * 8_000
    # Neighbouring blocks of a window are asked for at once; what is read in parts, and what two files share, in two.
    assert len(bucket.reads) <= 10_000 / blocks.block_rows + 20


@pytest.mark.parametrize("way", ["batches", "array"])
def test_a_window_decodes_each_row_group_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    opened: list[int] = []
    open_stretches = decoding.open_stretches

    def opening(header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        opened.append(header.first_group)
        return open_stretches(header, columns, start, stop)

    collection = write_collection(tmp_path, "parquet-list", file_rows=(600, 700), columns=[], row_group_rows=100)
    epoch = collection.open().shuffle(1, buffer_rows=256)
    monkeypatch.setattr(decoding, "open_stretches", opening)
    numbers = np.asarray(epoch.rows)
    assert _everything(epoch, way).tolist() == collection.rows[numbers, 0].tolist()
    windows = np.split(numbers, epoch.rows.windows(0, len(epoch)))
    assert len(windows) == 6
    assert len(opened) == sum(len(np.unique(window // 100)) for window in windows)


def test_ranks_read_what_is_theirs(remote: EmbeddingReader, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    _read_no_gaps(monkeypatch)
    epoch = remote.shuffle(1, buffer_rows=2_560)
    for rank in range(4):
        _everything(epoch.shard(4, rank), "batches")
    assert bucket.nbytes == 10_000 // 64 * 64 * 8_000


def test_resuming_reads_one_window(remote: EmbeddingReader, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    _read_no_gaps(monkeypatch)  # how much of the next window is read by then is not told
    epoch = remote.shuffle(1, buffer_rows=1_280)
    expected = [rows[:, 0].tolist() for rows, _ in read(epoch, 100)]
    bucket.forget()
    batches = read(epoch, 100, start=5_000, max_ram_usage_in_bytes=500_000_000)
    assert next(batches)[0][:, 0].tolist() == expected[50]
    batches.close()
    assert bucket.nbytes <= 2 * 1_280 * 8_000


def test_the_window_after_the_next_is_asked_for_while_that_one_comes(remote: EmbeddingReader, bucket: Bucket) -> None:
    """Also where a batch has rows of two windows."""
    epoch = remote.shuffle(1, buffer_rows=1_280)
    first, second, third = np.split(np.asarray(epoch.rows), epoch.rows.windows(0, len(epoch)))[:3]
    asked = threading.Event()
    were_asked: list[bool] = []

    def wait_for_third(request: Request) -> None:
        row = int(request.path[-5]) * 2_500 + max(0, request.start - 128) // 8_000
        if row in third and row not in second:
            asked.set()
        elif row in second and row not in first:
            were_asked.append(asked.wait(10))
            asked.set()  # so that the others need not wait, either

    bucket.before_read = wait_for_third
    batches = read(epoch, 100)
    for _ in range(-(-(len(first) + len(second)) // 100)):
        next(batches)
    bucket.before_read = None
    batches.close()
    assert were_asked
    assert all(were_asked)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingReader:
    """500 files of a million rows, 768 GB that nobody has to write."""
    root = tmp_path_factory.mktemp("sparse")
    head = _npy(np.empty((0, 768), np.float16)).replace(b"(0, 768)", b"(1000000, 768)")
    head = head.replace(b" " * 6, b"", 1)
    for k in range(500):
        with open(root / f"{k:03}.npy", "wb") as file:
            file.write(head)
            file.truncate(len(head) + 1_000_000 * 768 * 2)
    return EmbeddingReader(str(root))


def test_views_of_half_a_billion_rows_are_small(sparse: EmbeddingReader) -> None:
    assert len(sparse) == 500_000_000
    tracemalloc.start()
    try:
        shard = sparse.shuffle(1, epoch=3).shard(64, 7)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        (rows, frame) = next(read(shard, 128, 600_000 * 8))
        assert rows.shape == (128, 768)
        assert frame["i"].tolist() == list(shard.rows[600_000 * 8 : 600_000 * 8 + 128])
    finally:
        tracemalloc.stop()


def test_rows_of_another_reader_are_taken_part_by_part(sparse: EmbeddingReader) -> None:
    given = sparse.rows[::60]
    tracemalloc.start()
    try:
        taken = sparse.take(given)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000  # three copies of all numbers would take twice as much
    finally:
        tracemalloc.stop()
    assert taken.rows == given
    shuffled = sparse.shuffle(1).rows[:2_000]
    assert sparse.take(shuffled).rows == shuffled
    with pytest.raises(
        ArgumentError, match=r"rows holds 60 at position 1 \(and 8,333,332 more\), but there are rows from"
    ):
        sparse.take(slice(0, 50)).take(given)


@pytest.mark.parametrize(
    "rows", [range(5), range(9, -1, -1), range(7, 2, -3), range(2, 10, 3), range(4, 5, 9), range(-3, -5)]
)
def test_ranges_are_taken_as_lists_of_their_numbers_are(tmp_path: Path, rows: range) -> None:
    np.save(tmp_path / "0.npy", np.arange(20).reshape(10, 2))
    reader = EmbeddingReader(tmp_path)
    for view in (reader, reader.take([9, 3, 3, 4, 0, 1, 2, 8, 7, 5]), reader.sample(10)):
        assert view.take(rows).rows == view.take(list(rows)).rows
        np.testing.assert_array_equal(
            view.take(rows).to_dask_array().compute(), view.to_dask_array().compute()[list(rows)]
        )


def test_ranges_take_no_memory_and_are_checked(sparse: EmbeddingReader) -> None:
    assert sparse.take(range(499_999_999, -1, -1)).rows.nbytes == 24
    for rows in (range(500_000_001), range(10**30), range(3, -2, -1), range(10**30, 0, -7)):
        with pytest.raises(RowError, match=re.escape(f"rows is {rows}, but there are rows from 0 to 499,999,999 only")):
            sparse.take(rows)
    with pytest.raises(RowError, match="but there are no rows"):
        sparse.take(range(0)).take(range(1))


def test_arrays_of_a_percent_are_made_at_once_of_small_tasks(sparse: EmbeddingReader) -> None:
    some = sparse.take(slice(0, 50_000_000)).sample(500_000)
    assert some.rows.nbytes < 2_500_000
    array = some.to_dask_array()
    assert array.shape == (500_000, 768)
    assert len(array.dask.layers) == 1
    tasks = array[: array.chunks[0][0]].__dask_graph__().to_dict()
    assert max(len(cloudpickle.dumps(task)) for task in tasks.values()) < 4_000
    assert (array[:3].compute(scheduler="sync") == 0).all()
    assert sparse.take([7, 400_000_000, 3]).to_dask_array().npartitions == 1


@pytest.mark.parametrize("limit", [1, 10, 500, 990])
def test_what_a_filter_finds_takes_a_bit_a_row_at_most(tmp_path: Path, limit: int) -> None:
    count, share = 300_000, np.random.default_rng(0).integers(0, 1_000, 300_000)
    np.save(tmp_path / "0.npy", share.astype(np.float16).reshape(-1, 1))
    pq.write_table(pa.table({"share": share}), tmp_path / "0.parquet", row_group_size=70_000)
    found = EmbeddingReader(tmp_path, "parquet_npy").filter([("share", "<", limit)])
    assert np.array_equal(np.asarray(found.rows), np.flatnonzero(share < limit))
    assert found.rows.nbytes <= count / 8 * 1.01
    array = found.to_dask_array()
    first = array.blocks[0].__dask_graph__().to_dict()
    assert max(len(cloudpickle.dumps(task)) for task in first.values()) < 4_000
    assert np.array_equal(array.compute(scheduler="sync")[:, 0], share[share < limit])


@pytest.mark.parametrize("order", ["ascending", "any"])
def test_few_rows_are_read_without_another_thread(
    pair: Collection, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    rows = np.arange(0, 40, 3) if order == "ascending" else np.random.default_rng(0).permutation(40)
    view = pair.open().take(rows)
    expected, frame = pair.rows[rows], pair.frame()
    monkeypatch.setattr(threading.Thread, "start", None)  # calling it would fail
    batches, done = [], 0
    for vectors, metadata in view(4, show_progress=False):
        batches.append(vectors.copy())
        here = rows[done : done + 4]
        np.testing.assert_array_equal(metadata["i"], here)
        assert metadata["rank"].equals(frame["rank"].iloc[here].reset_index(drop=True))
        assert metadata.index.equals(pd.RangeIndex(len(here)))
        vectors[:] = -1  # nothing of later batches
        metadata["rank"] = 0
        done += len(here)
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_few_wide_rows_keep_the_limit(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.ones((10, 5_000), np.float32))
    view = EmbeddingReader(tmp_path).take([1, 3, 5, 6])
    with pytest.warns(UserWarning, match=r"take 80,\d\d\d bytes; the limit is 50,000") as told:
        assert [len(x) for x, _ in view(2, show_progress=False, max_ram_usage_in_bytes=50_000)] == [2, 2]
    assert [warning.filename for warning in told] == [__file__]


def test_memory_that_two_windows_do_not_fit_into_is_told(pair: Collection) -> None:
    epoch = pair.open().shuffle(1, buffer_rows=128)
    expected = np.asarray(epoch.rows)
    with pytest.warns(
        UserWarning, match=r"two windows of 128 rows.*the limit is 4,000 \(max_ram_usage_in_bytes\)"
    ) as told:
        batches = epoch(10, show_progress=False, max_ram_usage_in_bytes=4_000)
    assert [warning.filename for warning in told] == [__file__]
    assert np.concatenate([frame["i"] for _, frame in batches]).tolist() == expected.tolist()


def test_what_is_left_of_chance_is_told(pair: Collection) -> None:
    epoch = pair.open().shuffle(1, buffer_rows=128)
    with pytest.warns(UserWarning, match="256 rows are mixed from 64 blocks of 2 neighbouring rows.* 2 times") as told:
        epoch(256, show_progress=False)
    assert [warning.filename for warning in told] == [__file__]
    with pytest.warns(UserWarning, match=r"batches of 200 rows \(of all shards\)"):
        epoch.shard(4, 0)(50, show_progress=False)
    epoch(64, show_progress=False)
    epoch(len(epoch), show_progress=False)  # all rows, whatever their order
    nearest(epoch, np.ones((3, 4)), 5, max_ram_usage_in_bytes=40_000)  # and that of 312 here


def test_as_much_is_left_of_chance_as_is_told(tmp_path: Path) -> None:
    # A thousand kinds of 64 neighbours each: what a batch has of one kind varies as told, compared with chance.
    np.save(tmp_path / "0.npy", np.arange(64_000)[:, None])
    reader = EmbeddingReader(tmp_path)
    for batch_rows in (1_024, 4_096, 8_192):
        found = []
        for seed in range(4):
            epoch = reader.shuffle(seed, buffer_rows=4_096)
            with pytest.warns(UserWarning, match=r"varies ([\d.]+) times as much") as told:
                batches = [x[:, 0] // 64 for x, _ in epoch(batch_rows, show_progress=False, dtype=None)]
            for batch in batches:
                if len(batch) == batch_rows:
                    counts = np.bincount(batch, minlength=1_000)
                    found.append(((counts - batch_rows / 1_000) ** 2).mean() / (batch_rows / 1_000))
        [times] = re.findall(r"varies ([\d.]+) times", str(told[0].message))
        assert 0.5 < np.mean(found) / float(times) < 1.5


@pytest.mark.timeout(700)  # six processes, each of which imports all: a minute and more on a busy machine
def test_killed_epochs_are_resumed_by_any_number_of_ranks(pair: Collection, tmp_path: Path) -> None:
    """Two ranks are killed in the middle; four others go on at the step that was noted."""
    program = """
        import os, signal, sys, warnings
        from dask_embedding_reader import EmbeddingReader
        warnings.simplefilter("ignore")
        folder, metadata, ranks, rank, start, stop, note = sys.argv[1:]
        reader = EmbeddingReader(folder, "parquet_npy", meta_columns=["id"], metadata_folder=metadata)
        epoch = reader.shuffle(4, epoch=1, buffer_rows=128).shard(int(ranks), int(rank))
        own = 32 // int(ranks)
        with open(note, "a") as notes:
            for step, (_, frame) in enumerate(epoch(own, int(start) * own, show_progress=False), int(start)):
                print(step, *frame["id"], file=notes, flush=True)
                if step + 1 == int(stop):
                    os.kill(os.getpid(), signal.SIGKILL)
    """
    file = tmp_path / "rank.py"
    file.write_text(textwrap.dedent(program))

    def run(ranks: int, start: int, stop: int) -> list[set[int]]:
        notes = [tmp_path / f"{ranks}-{rank}-{start}" for rank in range(ranks)]
        arguments = [str(pair.folder), str(pair.metadata_folder), str(ranks)]
        started = [
            subprocess.Popen([sys.executable, str(file), *arguments, str(rank), str(start), str(stop), str(note)])
            for rank, note in enumerate(notes)
        ]
        assert {process.wait(600) for process in started} == {-signal.SIGKILL if stop else 0}
        lines = [[line.split() for line in note.read_text().splitlines()] for note in notes]
        steps = zip(*lines, strict=True)
        return [{int(number) for parts in step for number in parts[1:]} for step in steps]

    first, rest = run(2, 0, 5), run(4, 5, 0)
    ids = pair.table["id"].to_numpy()
    epoch = np.asarray(pair.open().shuffle(4, epoch=1, buffer_rows=128).rows)[: len(pair) // 64 * 64]
    assert first + rest == [set(ids[epoch[a:b]].tolist()) for a, b in pairwise(range(0, len(epoch) + 1, 32))]
