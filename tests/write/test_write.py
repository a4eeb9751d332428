"""What is written opens to exactly the same, from every source, in every format, on every storage, or is an error."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import dask
import dask.array as da
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.delayed import Delayed, delayed
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.batches.read import read_table_batches
from dask_embedding_reader.cli.commands import main
from dask_embedding_reader.errors import (
    ArgumentError,
    ArgumentTypeError,
    CastError,
    ColumnError,
    DestinationError,
    EmbeddingReaderError,
    MismatchError,
    NoFilesError,
    WriteError,
)
from dask_embedding_reader.formats import vectors as casting_module
from dask_embedding_reader.formats.parquet import encode as encoding
from dask_embedding_reader.formats.vectors import Vectors, check_casting, plan_casting
from dask_embedding_reader.storage.urls import resolve
from dask_embedding_reader.write import request, sources, tasks, threads, verify
from dask_embedding_reader.write.folder import Folder
from dask_embedding_reader.write.request import Request, choose_rows_per_file, count_writers, estimate_nbytes
from tests.support import servers
from tests.support.collections import (
    FORMATS,
    Collection,
    assert_batches,
    assert_same_frame,
    wait_until,
    write_collection,
)

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)
FRAME = pd.DataFrame({"id": np.arange(20), "word": pd.array([f"word {k}" for k in range(20)], dtype="string")})


def frame_of(collection: Collection) -> pd.DataFrame | None:
    return collection.metadata if collection.columns else None


def from_reader(collection: Collection) -> dict[str, Any]:
    return {"array": collection.open()}


def from_numpy(collection: Collection) -> dict[str, Any]:
    return {"array": collection.rows, "meta": frame_of(collection)}


def from_dask(collection: Collection) -> dict[str, Any]:
    reader = collection.open()
    meta = reader.to_dask_dataframe(max_piece_size=3) if collection.columns else None
    return {"array": reader.to_dask_array(max_piece_size=3), "meta": meta}


def from_dask_with_pandas(collection: Collection) -> dict[str, Any]:
    return {"array": collection.open().to_dask_array(max_piece_size=4), "meta": frame_of(collection)}


def from_batches(collection: Collection) -> dict[str, Any]:
    return {"array": collection.open()(5, dtype=None, show_progress=False)}


SOURCES: dict[str, Callable[[Collection], dict[str, Any]]] = {
    "reader": from_reader,
    "numpy": from_numpy,
    "dask": from_dask,
    "dask with pandas": from_dask_with_pandas,
    "batches": from_batches,
}


def assert_written(folder: Any, file_format: str, collection: Collection, **options: Any) -> EmbeddingReader:
    """The folder holds the collection to the last bit, opened in both ways; and nothing but it."""
    reader = EmbeddingReader(folder, file_format, meta_columns=collection.columns or None, **options)
    assert_batches(reader(7, dtype=None, show_progress=False), collection, 7, dtype=None)
    again = EmbeddingReader.from_manifest(f"{folder}/.manifest.embeddings", **options)
    assert_batches(again(7, dtype=None, show_progress=False), collection, 7, dtype=None)
    assert again.manifest.vectors.paths == reader.manifest.vectors.paths
    assert verify_embeddings(folder, **options).empty
    return reader


# --------------------------------------------------------------------------------------------------------------------
# The same rows, whatever they come from and go to


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format_name", ["npy", "parquet-list", "parquet_npy"])
def test_every_source_to_every_format(tmp_path: Path, format_name: str, source: str) -> None:
    collection = write_collection(tmp_path, format_name)
    for file_format in ("parquet", "parquet_npy") if collection.columns else ("npy", "parquet"):
        folder = tmp_path / file_format
        given = SOURCES[source](collection)
        write_embeddings(folder=folder, file_format=file_format, rows_per_file=6, **given)
        reader = assert_written(folder, file_format, collection)
        assert reader.manifest.vectors.rows.tolist() == [6] * 6 + [4]
        assert not (folder / "_writing").exists()
        if collection.columns:
            assert_same_frame(reader.to_dask_dataframe().compute(), collection.metadata)


@pytest.mark.parametrize("format_name", sorted(set(FORMATS) - {"npy", "parquet-list", "parquet_npy"}))
def test_every_way_of_storing_can_be_converted(tmp_path: Path, format_name: str) -> None:
    collection = write_collection(tmp_path, format_name)
    write_embeddings(collection.open(), tmp_path / "out", "parquet")
    assert_written(tmp_path / "out", "parquet", collection)


@pytest.mark.parametrize("dtype", sorted({dtype for kind in FORMATS.values() for dtype in kind.dtypes}))
def test_every_dtype_is_kept(tmp_path: Path, dtype: str) -> None:
    collection = write_collection(tmp_path, "npy", dtype=dtype)
    for file_format in ("npy", "parquet"):
        write_embeddings(collection.rows, tmp_path / file_format, file_format, rows_per_file=9)
        assert_written(tmp_path / file_format, file_format, collection)


@given(data=st.data())
def test_any_chunks_and_any_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 30))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: 0 < sum(s) <= rows))
    chunks = (*sizes, rows - sum(sizes))
    per_file = data.draw(st.one_of(st.none(), st.integers(1, 40)))
    array, numbers = np.arange(rows * 2, dtype=np.int16).reshape(rows, 2), np.arange(rows)
    lazy = da.from_array(array, chunks=(chunks, data.draw(st.sampled_from([1, 2]))))
    frame = dd.from_delayed(
        [delayed(pd.DataFrame({"n": part})) for part in np.split(numbers, np.cumsum(chunks)[:-1])],
        meta=pd.DataFrame({"n": numbers[:0]}),
    )
    folder = tmp_path_factory.mktemp("out")
    with dask.config.set(scheduler="synchronous"):
        write_embeddings(lazy, folder, "parquet", frame, rows_per_file=per_file)
    got, meta = next(EmbeddingReader(folder, "parquet", meta_columns="n")(100, dtype=None, show_progress=False))
    np.testing.assert_array_equal(got, array)
    assert meta["n"].tolist() == numbers.tolist()


def test_masked_columns_without_a_null_stay_masked_and_nan_stays_a_value(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "masked": pd.array([1, 2, 3], dtype="Int64"),
            "flag": pd.array([True, False, True], dtype="boolean"),
            "score": [1.5, np.nan, np.inf],
            "kind": pd.Categorical(["a", "b", "a"]),
            "list": [[1], [], [2, 3]],
        }
    )
    write_embeddings(ROWS[:3], tmp_path, "parquet", frame)
    got = EmbeddingReader(tmp_path, "parquet", meta_columns=list(map(str, frame))).to_dask_dataframe().compute()
    assert got.dtypes.astype(str).to_dict() == {
        "masked": "Int64",
        "flag": "boolean",
        "score": "float64",
        "kind": "string",
        "list": "list<item: int64>[pyarrow]" if "item" in str(got["list"].dtype) else "list<element: int64>[pyarrow]",
    }
    assert got["score"].isna().tolist() == [False, True, False]
    assert pq.read_table(tmp_path / "00000000.parquet")["score"].null_count == 0
    assert got["kind"].tolist() == ["a", "b", "a"]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_what_is_missing_among_objects_is_null(tmp_path: Path, missing: Any) -> None:
    frame = pd.DataFrame({"word": pd.Series(["a", missing, "b"], dtype=object)})
    write_embeddings(ROWS[:3], tmp_path, "parquet", frame)
    assert pq.read_table(tmp_path / "00000000.parquet")["word"].to_pylist() == ["a", None, "b"]


def test_columns_are_kept_or_dropped_as_the_reader_was_opened(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet-list", columns=["id", "caption", "tags"])
    write_embeddings(collection.open(meta_columns=["tags", "id"]), tmp_path / "two", "parquet")
    assert pq.read_schema(tmp_path / "two" / "00000000.parquet").names == ["embedding", "tags", "id"]
    write_embeddings(collection.open(meta_columns=None), tmp_path / "none", "npy")
    np.testing.assert_array_equal(np.load(tmp_path / "none" / "00000000.npy"), collection.rows)


# --------------------------------------------------------------------------------------------------------------------
# Files that others read, and read fast


def test_the_layout_of_parquet(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((30_000, 512)).astype(np.float32)  # 61 MB
    words = pd.DataFrame({"word": ["lion", "bear", "oak"] * 10_000})
    write_embeddings(rows, tmp_path, "parquet", words)
    file = pq.ParquetFile(tmp_path / "00000000.parquet")
    assert file.schema_arrow.field("embedding").type == pa.list_(pa.field("element", pa.float32(), nullable=False), 512)
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [24_414, 5_586]  # 50 MB
    vectors, word = file.metadata.row_group(0).column(0), file.metadata.row_group(0).column(1)
    assert (vectors.compression, word.compression) == ("UNCOMPRESSED", "ZSTD")
    assert "PLAIN" in vectors.encodings
    assert not vectors.has_dictionary_page
    assert word.has_dictionary_page
    assert vectors.has_offset_index  # the page index
    table = pq.read_table(tmp_path / "00000000.parquet")
    np.testing.assert_array_equal(table["embedding"].combine_chunks().flatten().to_numpy().reshape(rows.shape), rows)


def test_npy_is_what_numpy_loads_and_would_have_saved(tmp_path: Path) -> None:
    write_embeddings(np.asfortranarray(ROWS.astype(">f8")), tmp_path, rows_per_file=12)
    np.save(tmp_path / "by_numpy.npy", ROWS[12:].astype(np.float64))
    np.testing.assert_array_equal(np.load(tmp_path / "00000000.npy"), ROWS[:12])
    assert (tmp_path / "00000001.npy").read_bytes() == (tmp_path / "by_numpy.npy").read_bytes()


def test_files_are_about_200_mb_or_whole_chunks_near_that(tmp_path: Path) -> None:
    def rows_of(chunks: Any, **options: Any) -> list[int]:
        folder = tmp_path / uuid.uuid4().hex
        lazy = da.zeros((700, 100_000), dtype=np.float32, chunks=(chunks, -1))  # 400 kB a row
        write_embeddings(lazy, folder, dtype=np.float16, scale=None, **options)
        rows: list[int] = EmbeddingReader(folder).manifest.vectors.rows.tolist()
        return rows

    assert rows_of(60, max_ram_usage_in_bytes=2**28) == [60] * 11 + [40]
    assert rows_of((7, 350, 343), max_ram_usage_in_bytes=2**28) == [83] * 8 + [36]
    assert rows_of(60, max_ram_usage_in_bytes="256MiB") == [60] * 11 + [40]


# --------------------------------------------------------------------------------------------------------------------
# What follows from the arguments


def asked_for(
    *, store: str = "/", rows_per_file: int | None = None, dtype: str | None = None, limit_nbytes: int = 2**32
) -> Request:
    opened, path = resolve(store)
    return Request(
        folder=Folder(opened, path, store, None),
        file_format="npy",
        embedding_column="embedding",
        rows_per_file=rows_per_file,
        dtype=None if dtype is None else np.dtype(dtype),
        scale=None,
        overwrite=False,
        show_progress=False,
        limit_nbytes=limit_nbytes,
    )


@pytest.mark.parametrize(
    ("request_", "rows", "chosen"),
    [
        (asked_for(rows_per_file=7), None, 7),
        (asked_for(rows_per_file=7), 20, 7),
        (asked_for(rows_per_file=7), 6, 6),
        (asked_for(rows_per_file=7), 0, 1),
        (asked_for(), None, 5_000_000),  # of 40 bytes
        (asked_for(), 20, 20),
        (asked_for(), 0, 1),
        (asked_for(dtype="f8"), None, 2_500_000),
        (asked_for(dtype="f2"), None, 5_000_000),  # they are in memory as they are
        (asked_for(limit_nbytes=8_000), None, 25),
        (asked_for(limit_nbytes=8 * 39), None, 1),
    ],
)
def test_how_many_rows_a_file_has(request_: Request, rows: int | None, chosen: int) -> None:
    assert choose_rows_per_file(request_, rows, 10, np.dtype("f4")) == chosen


def test_what_a_file_holds_in_memory() -> None:
    def estimate(rows: int, **given: Any) -> int:
        return estimate_nbytes(asked_for(**given), rows, 10, np.dtype("f4"))

    assert estimate(5) == 200
    assert estimate(5, dtype="f2") == 200
    assert estimate(5, store="memory://x") == 200 + 200, "it is put as a whole"
    assert estimate(5, store="memory://x", dtype="f2") == 200 + 100
    assert estimate(2, limit_nbytes=160) == 80
    with pytest.raises(ArgumentError, match=r"files of 2 rows takes about 160 bytes .*80 for a file.* limit is 159"):
        estimate(2, limit_nbytes=159)
    assert estimate(1, limit_nbytes=1) == 40, "smaller ones there are not"


@pytest.mark.parametrize(
    ("store", "limit", "nbytes", "writers"),
    [
        ("/", 1_000, 100, 5),
        ("/", 1_000, 101, 4),
        ("/", 1_000, 1, 6),
        ("/", 1_000, 501, 1),
        ("/", 1_000, 0, 6),
        ("/", 4, 0, 2),
        ("/", 4, 1, 2),
        ("memory://x", 10_000, 1, 16),
    ],
)
def test_half_of_the_memory_is_for_files_that_are_written(
    monkeypatch: pytest.MonkeyPatch, store: str, limit: int, nbytes: int, writers: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert count_writers(asked_for(store=store, limit_nbytes=limit), nbytes) == writers


@pytest.mark.parametrize(
    ("step", "chunks", "rows"),
    [
        (10, (5, 5, 5, 3), 10),
        (10, (4, 4, 4), 8),
        (10, (4, 4, 5), 10),  # not alike
        (10, (4, 3, 4), 10),
        (10, (10, 10), 10),
        (10, (11, 5), 6),
        (10, (25, 25), 9),
        (10, (7,), 7),
        (10, (0,), 10),
        (10, (0, 4), 10),
    ],
)
def test_files_are_whole_chunks_or_whole_parts_of_them(step: int, chunks: tuple[int, ...], rows: int) -> None:
    assert tasks._align(step, chunks, asked_for()) == rows
    assert tasks._align(step, chunks, asked_for(rows_per_file=step)) == step


@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any), data=st.data())
def test_a_file_needs_the_chunks_that_hold_its_rows_and_no_others(rows: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, sum(rows) - 1))
    stop = data.draw(st.integers(start + 1, sum(rows)))
    starts = list(accumulate(rows, initial=0))
    found = tasks._Pieces(range(len(rows)), rows).overlapping(starts, start, stop)
    held = [
        (key, max(start - first, 0), min(stop - first, count), count)
        for key, (first, count) in enumerate(zip(starts, rows, strict=False))
        if first < stop and first + count > start
    ]
    assert found == held
    assert sum(b - a for _, a, b, _ in found) == stop - start


@given(st.integers(0, 6).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count)))))
def test_what_is_missing_is_written_in_runs(case: tuple[int, set[int]]) -> None:
    count, known = case
    known = {number for number in known if number < count}
    runs = list(sources._missing_runs(known, count))
    assert [number for run in runs for number in range(*run)] == sorted(set(range(count)) - known)
    assert all(a[1] < b[0] for a, b in pairwise(runs)), "neighbours are one run"


@pytest.mark.parametrize("source", ["reader", "numpy", "dask", "dask in columns", "batches"])
def test_every_source_has_files_of_the_same_size_and_counts_their_memory_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    rows = np.ones((40, 6), np.float32)
    np.save(tmp_path / "0.npy", rows)
    reader = EmbeddingReader(tmp_path / "0.npy")
    arrays: dict[str, Callable[[], Any]] = {
        "reader": lambda: reader,
        "numpy": lambda: rows,
        "dask": lambda: da.from_array(rows, chunks=(4, 6)),
        "dask in columns": lambda: da.from_array(rows, chunks=(40, 3)),
        "batches": lambda: iter([(rows[:7], None), (rows[7:], None)]),
    }
    with pytest.raises(ArgumentError, match=r"files of 20 rows takes about 960 bytes of memory \(480 for a file"):
        write_embeddings(arrays[source](), tmp_path / "a", rows_per_file=20, max_ram_usage_in_bytes=959)
    write_embeddings(arrays[source](), tmp_path / "a", rows_per_file=20, max_ram_usage_in_bytes=960)
    assert EmbeddingReader(tmp_path / "a").manifest.vectors.rows.tolist() == [20, 20]
    monkeypatch.setattr(request, "_FILE_NBYTES", 12 * 24)
    write_embeddings(arrays[source](), tmp_path / "b")
    lengths = {"dask in columns": [10] * 4}.get(source, [12, 12, 12, 4])
    assert EmbeddingReader(tmp_path / "b").manifest.vectors.rows.tolist() == lengths


@pytest.mark.parametrize("batch", [(ROWS,), (ROWS, None, None), (1, None), [[1], None], "ab", 7, ROWS[:2]], ids=type)
def test_batches_that_are_no_pairs_are_refused(tmp_path: Path, batch: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"batch 1 \(from row 20 on\) must be a pair"):
        write_embeddings(iter([(ROWS, None), batch]), tmp_path)


def test_a_row_that_is_larger_than_the_limit_is_written_all_the_same(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path / "0")
    write_embeddings(EmbeddingReader(tmp_path / "0"), tmp_path / "1", rows_per_file=1, max_ram_usage_in_bytes=1)
    assert EmbeddingReader(tmp_path / "1").manifest.vectors.rows.tolist() == [1] * 20


class Bar:
    """What is told of progress."""

    def __init__(self, *given: Any) -> None:
        self.total, self.done, self.ends = given[1], 0, 0

    def update(self, n: int) -> None:
        self.done += n

    def close(self) -> None:
        self.ends += 1

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.parametrize("source", ["reader", "numpy", "dask", "batches", "verify"])
def test_progress_comes_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    bars: list[Bar] = []

    def bar(*given: Any) -> Bar:
        bars.append(Bar(*given))
        return bars[-1]

    for module in (threads, tasks, verify):
        monkeypatch.setattr(module, "progress_bar", bar)
    monkeypatch.setattr(tasks, "_LOOK_SECONDS", 0.001)
    write_embeddings(ROWS, tmp_path / "0", rows_per_file=5)
    bars.clear()
    total = 20
    if source == "verify":
        assert verify_embeddings(tmp_path / "0", show_progress=True).empty
        total = sum(path.stat().st_size for path in (tmp_path / "0").glob("*.npy"))
    else:
        array: Any = {
            "reader": EmbeddingReader(tmp_path / "0"),
            "numpy": ROWS,
            "dask": da.from_array(ROWS, chunks=(2, 3)),
            "batches": iter([(ROWS[:7], None), (ROWS[7:], None)]),
        }[source]
        write_embeddings(array, tmp_path / "1", rows_per_file=3, show_progress=True)
    [told] = bars
    assert (told.total, told.done, told.ends) == (0 if source == "batches" else total, total, 1)


def test_progress_comes_while_files_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bar = Bar(False, 20)
    monkeypatch.setattr(tasks, "progress_bar", lambda *_: bar)
    monkeypatch.setattr(tasks, "_LOOK_SECONDS", 0.001)
    shown: list[bool] = []

    def last_is_late(block: Any, block_info: Any) -> Any:
        if block_info[0]["chunk-location"] == (6, 0):
            shown.append(wait_until(lambda: bar.done > 0, 60))
        return block

    late = da.from_array(ROWS, chunks=(3, 3)).map_blocks(last_is_late, dtype=ROWS.dtype, meta=ROWS[:0])
    with dask.config.set(scheduler="threads", num_workers=4):
        write_embeddings(late, tmp_path / "0", rows_per_file=3, show_progress=True)
    assert shown == [True]
    assert bar.done == 20


def test_a_file_that_somebody_else_puts_beside_those_written_is_told(tmp_path: Path) -> None:
    def batches() -> Iterator[Any]:
        yield ROWS[:7], None
        np.save(tmp_path / "0" / "other.npy", ROWS)
        yield ROWS[7:], None

    said = "20 rows written, but 40 are found there: something else wrote to this folder; remove what does not belong"
    with pytest.raises(WriteError, match=f"{re.escape(str(tmp_path))}/0: {said}"):
        write_embeddings(batches(), tmp_path / "0", rows_per_file=5)


# --------------------------------------------------------------------------------------------------------------------
# Other dtypes


def test_narrower_floats_keep_what_fits_and_refuse_what_overflows(tmp_path: Path) -> None:
    rows = np.array([[1.1, -65504], [3e-9, 70_000], [1e9, 2]], np.float32)
    message = r"2 of 6 values cannot be stored as float16, which holds -65504 to 65504; the first is in row 1 "
    with pytest.raises(CastError, match=message):
        write_embeddings(rows, tmp_path, dtype="float16")
    write_embeddings(rows[:1], tmp_path, dtype="float16", overwrite=True)
    np.testing.assert_array_equal(np.load(tmp_path / "00000000.npy"), rows[:1].astype(np.float16))


@pytest.mark.parametrize("lazy", [False, True])
def test_nan_and_infinity_are_kept_and_counted(tmp_path: Path, lazy: bool) -> None:
    rows = ROWS.copy()
    rows[2, 1], rows[7, 0], rows[8, 2] = np.nan, np.inf, -np.inf
    array = da.from_array(rows, chunks=(5, 3)) if lazy else rows
    with pytest.warns(UserWarning, match=r"3 of the values .* NaN or infinite.*in 2 files, the first is number 0"):
        write_embeddings(array, tmp_path, dtype="float16", rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), rows.astype(np.float16))
    write_embeddings(rows, tmp_path / "same", rows_per_file=5)  # nothing is narrowed, nothing to say


NUMBERS = [0.0, -0.0, 1.4, -3.7, 126.6, -128.4, 2e4, 65_519.0, 65_520.0, 3e38, 1e-8]
ODD = [np.nan, np.inf, -np.inf]


@given(
    items=st.lists(st.sampled_from(NUMBERS + ODD), min_size=1, max_size=40),
    stored=st.sampled_from(["f8", ">f4", "f4", "f2", "c16", "i8", "u2", "i1"]),
    wanted=st.sampled_from(["f4", "f2", "c8", "i4", "u1", "i1"]),
    scale=st.sampled_from([None, 1.0, 0.3, 1e-308]),
    is_fortran=st.booleans(),
)
def test_any_cast_is_numpys_or_an_error_that_counts_what_it_would_lose(
    items: list[float], stored: str, wanted: str, scale: float | None, is_fortran: bool
) -> None:
    """Values are looked at a few rows at a time here: some of these lose nothing, some do."""
    with np.errstate(all="ignore"):
        rows = np.resize(np.array(items), (len(items), 3)).astype(stored, order="F" if is_fortran else "C")
        try:
            casting = plan_casting(rows.dtype, np.dtype(wanted), scale)
        except ArgumentError:
            return
        exact = rows if scale is None else np.rint(rows.astype("f8") / scale)
        expected = exact.astype(wanted)
    is_finite = np.isfinite(rows)
    if casting.dtype.kind in "fc":
        lost, kept = is_finite & ~np.isfinite(expected), int((~is_finite).sum())
    else:
        limits = np.iinfo(wanted)
        lost, kept = ~((exact >= limits.min) & (exact <= limits.max)), 0
    vectors = Vectors(rows, casting)
    with patch.object(casting_module, "_BLOCK_ITEMS", 6):
        if lost.any():
            first = int(np.argmax(lost.any(axis=1)))
            with pytest.raises(
                CastError, match=rf"^{lost.sum()} of {rows.size} values .* first is in row {first + 7} "
            ):
                check_casting(vectors, 7)
            return
        widened = scale is None and np.can_cast(stored, wanted, "safe")
        assert check_casting(vectors) == (0 if widened else kept)
    got = np.concatenate([vectors.stored(0, 2), vectors.stored(2, len(rows))])
    assert got.dtype == expected.dtype
    assert got.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_integers_with_a_stated_scale(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (50, 4)).astype(np.float32)
    write_embeddings(rows, tmp_path, "parquet", dtype="int8", scale=1 / 127)
    got = EmbeddingReader(tmp_path, "parquet").to_dask_array().compute()
    np.testing.assert_array_equal(got, np.rint(rows.astype(np.float64) * 127).astype(np.int8))
    assert np.abs(got / 127 - rows).max() <= 0.5 / 127 + 1e-6
    rows[3, 1] = np.nan
    with pytest.raises(CastError, match=r"7 of 200 values.*int8 with scale=0.007.*neither NaN nor infinity.*row"):
        write_embeddings(
            np.where(np.arange(200).reshape(50, 4) < 6, 5, rows), tmp_path / "b", dtype="int8", scale=1 / 127
        )
    with pytest.raises(CastError, match=r"1 of 4 values cannot be stored as int8, which holds -128 to 127"):
        write_embeddings(np.array([[1, 2], [3, 128]]), tmp_path / "c", dtype="int8")


@pytest.mark.parametrize(
    ("dtype", "most", "beyond"), [("int64", 2**63 - 1024, 2.0**63), ("uint64", 2**64 - 2048, 2.0**64)]
)
def test_the_greatest_integer_of_64_bits_is_no_float(tmp_path: Path, dtype: str, most: int, beyond: float) -> None:
    write_embeddings(np.array([[float(most), 1.0]]), tmp_path / "most", dtype=dtype, scale=1)
    assert np.load(tmp_path / "most/00000000.npy").tolist() == [[most, 1]]
    with pytest.raises(CastError, match=rf"1 of 2 values cannot be stored as {dtype} with scale=1"):
        write_embeddings(np.array([[1.0, beyond]]), tmp_path / "beyond", dtype=dtype, scale=1)


def test_integers_that_are_told_and_computed_as_fractions_are_not_cut_off(tmp_path: Path) -> None:
    array = da.from_array(np.arange(6, dtype="int8").reshape(3, 2)).map_blocks(lambda block: block / 2, dtype="int8")
    with pytest.raises(
        MismatchError, match=r"rows from 0 on was computed as float.*, the array tells int8; give map_b"
    ):
        write_embeddings(array, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "give scale="),
        ({"dtype": "float16", "scale": 0.5}, "only for floating-point vectors that are stored as integers"),
        ({"dtype": "int8", "scale": 0.0}, "must be a positive number"),
        ({"dtype": "int8", "scale": float("nan")}, "must be a positive number"),
        ({"file_format": "parquet", "dtype": "complex64"}, "parquet files hold no vectors of complex64"),
        ({"file_format": "hdf5"}, "unknown file_format"),
        ({"rows_per_file": 0}, "at least 1"),
        (
            {"rows_per_file": 20, "max_ram_usage_in_bytes": 300},
            r"takes about 480 bytes.*the limit is 300.*rows_per_file",
        ),
        ({"compute": False}, "only for Dask arrays"),
        ({"file_format": "parquet_npy"}, "no metadata to be written"),
        ({"meta": FRAME}, "npy files hold no metadata"),
        ({"folder": []}, "empty list"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        write_embeddings(**{"array": ROWS, "folder": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("array", "kind", "message"),
    [
        ("text", ArgumentTypeError, "must be a numpy or Dask array"),
        (7, ArgumentTypeError, "must be a numpy or Dask array"),
        (FRAME, ArgumentTypeError, r"not DataFrame; np\.stack\(frame\[column\]\) makes an array"),
        (ROWS[0], ArgumentError, r"shape \(3,\)"),
        (ROWS[:0], ArgumentError, "nothing to write"),
        (ROWS[:, :0], ArgumentError, "nothing to write"),
        (np.array([["a"]]), ArgumentTypeError, "not numbers"),
        (iter([]), ArgumentError, "nothing to write"),
        ([ROWS], ArgumentTypeError, r"batch 0 .* must be a pair"),
        (
            [(ROWS, None), (ROWS[:, :2], None)],
            MismatchError,
            r"batch 1 \(from row 20 on\) holds vectors of 2 x float32",
        ),
        (
            [(ROWS, None), (ROWS.astype(int), None)],
            MismatchError,
            r"batch 1 .* 3 x int64, those before it are 3 x float",
        ),
        ([(ROWS, FRAME[:19])], MismatchError, r"batch 0 .* has 20 vectors, but 19 rows of metadata"),
        ([(ROWS, FRAME), (ROWS, FRAME[["id"]])], MismatchError, r"batch 1 .* has the metadata columns \['id'\]"),
        ([(ROWS, FRAME), (ROWS, None)], MismatchError, r"batch 1 .* has the metadata columns \[\]"),
        (da.from_array(ROWS)[0], ArgumentError, "2-D"),
        *(
            (array, ArgumentError, r"an array of shape \(\d, \d\) holds no embeddings: there is nothing to write")
            for shape in ((0, 4), (4, 0), (0, 0))
            for array in (
                np.zeros(shape),
                da.zeros(shape),
                da.zeros(shape, chunks=2),
                da.zeros((9, *shape[1:]))[: shape[0]],
            )
        ),
        (da.concatenate([da.zeros((0, 4)), da.zeros((0, 4))]), ArgumentError, "holds no embeddings"),
        (da.from_array(ROWS)[da.from_array(ROWS)[:, 0] > 5], ArgumentError, "compute_chunk_sizes"),
    ],
)
def test_arrays_that_make_no_sense(tmp_path: Path, array: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        write_embeddings(array, tmp_path, "parquet", rows_per_file=30)
    write_embeddings(ROWS, tmp_path)  # the folder is as good as before


@pytest.mark.parametrize(
    ("frame", "kind", "message"),
    [
        (FRAME[:19], MismatchError, "meta has 19 rows, the array 20"),
        (FRAME.rename(columns={"id": 5}), ColumnError, "the metadata column 5 has no string for a name"),
        (FRAME.rename(columns={"id": "word"}), ColumnError, "more than one column 'word'"),
        (FRAME.rename(columns={"id": "embedding"}), ColumnError, "name of the column of vectors"),
        (FRAME.assign(i=7), MismatchError, r"'i' of the frame is 7 beside row 1 of the array, where 8 was expected"),
        (FRAME.assign(i=FRAME["word"]), MismatchError, r"'i' of the frame is 'word 0' \(str.*an integer was expected"),
        (FRAME.rename_axis("i")[::-1], MismatchError, r"'i' of the frame is 18 beside row 1 .*, where 20 was expected"),
        (FRAME.rename_axis("i").assign(i=range(20)), ArgumentError, "both an index and a column"),
        (FRAME.set_index("id"), ColumnError, "index .* would not be stored"),
        (
            FRAME.set_axis(pd.Index(["id", "\ud800"], dtype=object), axis=1),
            ColumnError,
            r"the name of the metadata column '\\ud800' holds half a character",
        ),
        *(
            (
                FRAME.assign(odd=pd.Series([value] * 20, dtype=object)),
                ColumnError,
                r"'odd' .* cannot be stored, in rows 0 to",
            )
            for value in ("\udcff", ["\ud800"], {"\ud800": 1})
        ),
        (FRAME.assign(odd=np.full(20, object())), ColumnError, "'odd' .*object.* cannot be stored, in rows 0 to 20"),
        ("words", ArgumentTypeError, "pandas DataFrame"),
    ],
)
def test_metadata_that_would_be_lost_is_refused(tmp_path: Path, frame: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        write_embeddings(ROWS, tmp_path, "parquet", frame)
    write_embeddings(ROWS, tmp_path, "parquet", FRAME.assign(i=range(100, 120)))  # row numbers are made anew
    assert pq.read_schema(tmp_path / "00000000.parquet").names == ["embedding", "id", "word"]


def open_folder(folder: Path, columns: list[str]) -> pd.DataFrame:
    """The metadata beside the first item of each vector."""
    reader = EmbeddingReader(folder, "parquet", meta_columns=columns)
    frame: pd.DataFrame = reader.to_dask_dataframe().compute()
    return frame.assign(first=reader.to_dask_array().compute()[:, 0])


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda block: np.repeat(block, 2, axis=0), r"\(4, 3\)"),  # rows would be left out
        (lambda block: block[:1], r"\(1, 3\)"),
        (lambda block: block[:, :2], r"\(2, 2\)"),
        (lambda block: block[:, 0], r"\(2,\)"),
        (lambda block: None, r"\(\)"),
    ],
)
@pytest.mark.parametrize("rows_per_file", [1, 20])
def test_chunks_of_other_shapes_than_the_array_tells_are_refused(
    make: Callable[[Any], Any], found: str, rows_per_file: int, tmp_path: Path
) -> None:
    array = da.from_array(np.arange(18.0).reshape(6, 3), chunks=(2, 3)).map_blocks(make, dtype=float, meta=ROWS[:0])
    with pytest.raises(MismatchError, match=rf"rows from \d on was computed with the shape {found}, the array tells"):
        write_embeddings(array, tmp_path, rows_per_file=rows_per_file)
    with pytest.raises(EmbeddingReaderError):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize("of", ["array", "batches", "chunks"])
def test_masked_values_are_not_written(of: str, tmp_path: Path) -> None:
    def write(rows: Any, folder: str) -> None:
        lazy = da.from_array(np.zeros((4, 2)), chunks=(2, 2)).map_blocks(lambda block: rows, meta=np.empty((0, 0)))
        write_embeddings({"array": rows, "batches": iter([(rows, None)]), "chunks": lazy}[of], tmp_path / folder)

    rows = np.ma.masked_array(np.ones((2, 2)), [[False, True], [False, False]])
    with pytest.raises(ArgumentError, match=r"has masked values, .* fill them"):
        write(rows, "masked")
    write(rows.filled(3), "filled")
    assert EmbeddingReader(tmp_path / "filled").to_dask_array()[:2].compute().tolist() == [[1, 3], [1, 1]]


@pytest.mark.parametrize("frame", [FRAME, dd.from_pandas(FRAME, 1)])
def test_a_frame_is_no_array(frame: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"array must be a .* not DataFrame"):
        write_embeddings(frame, tmp_path)


@pytest.mark.parametrize("compute", [True, False])
@pytest.mark.parametrize("kind", ["lazy", "pandas", "column", "foreign", "foreign pandas"])
def test_a_frame_of_other_rows_is_refused(tmp_path: Path, kind: str, compute: bool) -> None:
    """20 rows in files of 7 and 13; "id" is the row number, and so is a third of the first item."""
    collection = tmp_path / "collection"
    write_embeddings(ROWS, collection, "parquet", FRAME, rows_per_file=7)
    reader = EmbeddingReader(collection, "parquet", meta_columns="id")
    x, lazy = reader.to_dask_array(max_piece_size=3), reader.to_dask_dataframe(max_piece_size=3)
    if kind.startswith("foreign"):  # does not tell its rows
        x = da.from_array(ROWS, chunks=(x.chunks[0], 3))
    frame = lazy.compute() if kind.endswith("pandas") else lazy.reset_index() if kind == "column" else lazy

    def write(array: da.Array, meta: Any, name: str) -> None:
        done = write_embeddings(array, tmp_path / name, "parquet", meta, rows_per_file=4, compute=compute)
        assert done is None or done.compute() is None

    # Each of its files would be right by itself.
    leap = lazy.map_partitions(lambda part: part.set_axis(part.index + 50 * (part.index >= 8), axis=0), meta=lazy._meta)
    for number, other in enumerate([frame.sample(frac=1, random_state=0), leap.clear_divisions()]):
        with pytest.raises(MismatchError, match=r"'i' of the frame is \d+ beside row \d+ of the array"):
            write(x, other, f"other-{number}")
        with pytest.raises(EmbeddingReaderError):
            EmbeddingReader(tmp_path / f"other-{number}", "parquet")
    write(x, frame, "same")
    same = open_folder(tmp_path / "same", ["id"])
    assert (same["first"] == 3 * same["id"]).all()
    if kind == "lazy":
        write(x[5:15], lazy.loc[5:14], "part")
        assert open_folder(tmp_path / "part", ["id"])["id"].tolist() == list(range(5, 15))
        with pytest.raises(MismatchError, match=r"is \d+ beside row \d+ of the array, where \d+ was expected"):
            write(x[:10], lazy.loc[5:14], "other")
    if kind == "foreign":  # the first number is looked for where there is none
        with pytest.raises(MismatchError, match="0 rows"):
            write(x, lazy[lazy["id"] > 99].clear_divisions(), "nothing")


@pytest.mark.parametrize("step", [1, 4, 20])
def test_batches_of_readers_that_lost_rows_are_written(tmp_path: Path, step: int) -> None:
    write_embeddings(ROWS, tmp_path / "all", "parquet", FRAME, rows_per_file=7)
    reader = EmbeddingReader(tmp_path / "all", "parquet", meta_columns=["id", "word"])

    def kept() -> Iterator[Any]:
        for _ in range(2):  # another collection after the first
            for rows, frame in reader(step, dtype=None, show_progress=False):
                keep = (frame["id"] % 5 != 2).to_numpy()
                yield rows[keep], frame[keep]

    write_embeddings(kept(), tmp_path / "kept", "parquet", rows_per_file=9)
    got = open_folder(tmp_path / "kept", ["id", "word"])
    assert got["id"].tolist() == 2 * [k for k in range(20) if k % 5 != 2]
    assert (got["first"] == 3 * got["id"]).all()
    assert (got["word"] == "word " + got["id"].astype(str)).all()


@pytest.mark.parametrize("numbers", [[3, 2, -1], [0.5, 1.0, 2.0], ["a", "b", "c"], [None, 1, 2], [True, False, True]])
@pytest.mark.parametrize("place", ["column", "index"])
def test_what_batches_call_row_numbers_is_not_lost(tmp_path: Path, numbers: list[Any], place: str) -> None:
    frame = FRAME[:3].assign(i=numbers)
    frame = frame.set_index("i") if place == "index" else frame
    batches = [(ROWS[:3], FRAME[:3].assign(i=[1, 5, 9])), (ROWS[3:6], frame)]
    with pytest.raises(ColumnError, match=r"batch 1 \(from row 3 on\) has metadata called 'i' .* rename them"):
        write_embeddings(iter(batches), tmp_path, "parquet")


@pytest.mark.parametrize(
    "frame",
    [
        FRAME[:3].assign(i=np.array([7, 8, 9], "int32")),
        pd.DataFrame({"i": [4, 5, 6], "word": ["a", "b", "c"]}),
    ],
    ids=["of another type", "not the last column"],
)
def test_a_column_of_users_that_is_taken_for_row_numbers_is_told(tmp_path: Path, frame: pd.DataFrame) -> None:
    with pytest.warns(UserWarning, match=r"batch 0 .* has a column of integers 'i', .* not stored: .*; rename it"):
        write_embeddings(iter([(ROWS[:3], frame)]), tmp_path, "parquet")
    assert "i" not in pq.read_schema(min(tmp_path.glob("*.parquet"))).names


@pytest.mark.parametrize(
    ("source", "target", "refused"),
    [
        ("", "/inner", True),
        ("", "/a/b", True),
        ("", "/x/../inner", True),
        ("/**/*.npy", "/inner", True),
        ("", "/_aside", True),
        ("", "-beside", False),
        ("/*.npy", "/inner", False),
        ("/0.npy", "/inner", False),
    ],
)
@pytest.mark.parametrize("place", ["local", "memory", "link"])
def test_no_collection_is_written_to_where_it_would_be_found_again(
    tmp_path: Path, place: str, source: str, target: str, refused: bool
) -> None:
    root = f"memory://{uuid.uuid4().hex}/read" if place == "memory" else str(tmp_path / "read")
    fsspec.core.url_to_fs(root)[0].makedirs(root, exist_ok=True)
    with fsspec.open(f"{root}/0.npy", "wb") as file:
        np.save(file, ROWS)
    reader = EmbeddingReader(root + source)
    if place == "link":
        (tmp_path / "link").symlink_to(root)
        target = str(tmp_path / "link") + target
    else:
        target = root + target
    if refused:
        with pytest.raises(DestinationError, match=r"lies in .*read.*, which is read: .* its rows twice; name a fold"):
            write_embeddings(reader, target)
    else:
        write_embeddings(reader, target)
    assert EmbeddingReader(root + source).count == 20


#: A column of ten values that all come from k, in memory that can be written to.
COLUMNS: dict[str, Callable[[int], Any]] = {
    **{name: partial(np.full, 10, dtype=name) for name in ("int8", "uint16", "float16", "float32", "bool")},
    "time": lambda k: np.full(10, k, "M8[us]"),
    "interval": lambda k: np.full(10, k, "m8[ms]"),
    "Int64": lambda k: pd.array([k] * 9 + [None], dtype="Int64"),
    "boolean": lambda k: pd.array([k % 2 == 0] * 9 + [None], dtype="boolean"),
    "Float32": lambda k: pd.array([k] * 10, dtype="Float32"),
    "zone": lambda k: pd.array(np.full(10, k, "M8[us]")).tz_localize("UTC"),
    "object": lambda k: np.array([f"text {k}"] * 10, object),
    "string": lambda k: pd.array([f"text {k}"] * 10, dtype="string"),
    "category": lambda k: pd.Categorical(["abc"[k % 3]] * 10, categories=list("abc")),
    "lists": lambda k: pd.Series([np.full(2, k) for _ in range(10)]).array,
}


def _as_arrow(numbers: Any) -> Any:
    """A column in the memory of a numpy array."""
    return pd.array(pa.array(numbers), dtype=pd.ArrowDtype(pa.float64()))


@pytest.mark.parametrize("rows_per_file", [3, 10, 20, 80])
def test_who_yields_batches_may_use_all_their_memory_again(tmp_path: Path, rows_per_file: int) -> None:
    frames = [pd.DataFrame({name: column(k) for name, column in COLUMNS.items()}) for k in range(6)]

    def batches(reusing: bool) -> Iterator[Any]:
        rows, numbers = np.empty((10, 3), np.float32), np.empty(10)
        reused = frames[0].copy(deep=True).assign(arrow=_as_arrow(numbers))
        for k in (*range(6), 1):
            rows[:] = numbers[:] = k
            for name in COLUMNS:
                reused[name].array[:] = frames[k][name].array
            yield (rows, reused) if reusing else (rows.copy(), frames[k].assign(arrow=_as_arrow(numbers.copy())))

    for name in ("new", "reused"):
        write_embeddings(batches(name == "reused"), tmp_path / name, "parquet", rows_per_file=rows_per_file)
    new, reused = (open_folder(tmp_path / name, [*COLUMNS, "arrow"]) for name in ("new", "reused"))
    assert new["int8"].tolist() == new["arrow"].tolist() == np.repeat([*range(6), 1], 10).tolist()
    pd.testing.assert_frame_equal(new, reused)


def test_a_frame_that_belongs_to_another_array(tmp_path: Path) -> None:
    lazy = da.from_array(ROWS, chunks=(5, 3))
    with pytest.raises(MismatchError, match="partitions"):
        write_embeddings(lazy, tmp_path, "parquet", dd.from_pandas(FRAME.reset_index(drop=True)[:18], npartitions=3))
    shifted = dd.from_map(lambda k: FRAME[:4] if k else FRAME[:6], range(4), meta=FRAME[:0])
    with pytest.raises(MismatchError, match=r"partition of the metadata has 6 rows where 5 were expected"):
        write_embeddings(lazy, tmp_path, "parquet", shifted)
    with dask.config.set({"dataframe.convert-string": False}):
        types = dd.from_map(
            lambda k: pd.DataFrame({"x": pd.Series([k or "a"] * 5, dtype=object)}),
            range(4),
            meta=pd.DataFrame({"x": ["a"]}),
        )
        with pytest.raises(MismatchError, match="'x' is"):
            write_embeddings(lazy, tmp_path, "parquet", types, overwrite=True, rows_per_file=5)
    write_embeddings(lazy, tmp_path, "parquet", FRAME, overwrite=True)
    assert EmbeddingReader(tmp_path, "parquet", meta_columns=["id"]).count == 20


# --------------------------------------------------------------------------------------------------------------------
# Dask


def test_a_lazy_object_does_nothing_until_it_is_computed(tmp_path: Path) -> None:
    lazy = da.from_array(ROWS, chunks=(6, 3))
    later = write_embeddings(lazy, tmp_path / "out", "parquet", FRAME, rows_per_file=7, compute=False)
    assert isinstance(later, Delayed)
    assert not (tmp_path / "out").exists()
    assert later.compute() is None
    reader = EmbeddingReader(tmp_path / "out", "parquet", meta_columns=["id"])
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    assert not (tmp_path / "out" / "_writing").exists()
    later.compute()  # again: the same
    np.testing.assert_array_equal(EmbeddingReader(tmp_path / "out", "parquet").to_dask_array().compute(), ROWS)


def test_on_a_cluster(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet_npy", columns=["id", "caption"])
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
    ):
        write_embeddings(folder=tmp_path / "now", file_format="parquet", rows_per_file=6, **from_dask(collection))
        given = from_dask(collection)
        later = write_embeddings(folder=tmp_path / "later", file_format="parquet", compute=False, **given)
        assert later is not None
        later.compute()
    assert_written(tmp_path / "now", "parquet", collection)
    assert_written(tmp_path / "later", "parquet", collection)


class Crowd:
    """Counts who is there at once; each waits a little for more than there should be."""

    def __init__(self, most: int) -> None:
        self.allowed, self.here, self.most = most, 0, 0
        self._changed = threading.Condition()

    @contextmanager
    def joined(self) -> Iterator[None]:
        with self._changed:
            self.here += 1
            self.most = max(self.most, self.here)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.here > self.allowed, 0.05)
        try:
            yield
        finally:
            with self._changed:
                self.here -= 1


@pytest.mark.parametrize(("limit", "most"), [(4, 2), (2, 1), (8, 4), (10**6, 4)])
def test_few_files_are_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    """Half of the memory is for them, though four would be written at once on two cores."""
    crowd = Crowd(most)
    plain: Any = vars(threads)["write_part"]

    def counting(*args: Any) -> Any:
        with crowd.joined():
            return plain(*args)

    monkeypatch.setattr(threads, "write_part", counting)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    batches = ((np.ones((100, 64), np.float32), None) for _ in range(12))
    write_embeddings(batches, tmp_path, rows_per_file=100, max_ram_usage_in_bytes=limit * 4 * 100 * 64)
    assert 1 <= crowd.most <= most


@pytest.mark.parametrize(("limit", "most"), [(4, 2), (2, 1), (8, 4), (10**6, 4)])
def test_no_more_files_wait_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    """Nothing is written here before it is waited for."""
    waiting, counts = 0, []

    class Later:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def submit(self, function: Any, *args: Any) -> Any:
            nonlocal waiting
            waiting += 1
            counts.append(waiting)

            def result() -> Any:
                nonlocal waiting
                waiting -= 1
                return function(*args)

            return SimpleNamespace(result=result)

        def shutdown(self) -> None: ...

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Later)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    batches = ((np.ones((100, 64), np.float32), None) for _ in range(12))
    write_embeddings(batches, tmp_path, rows_per_file=100, max_ram_usage_in_bytes=limit * 4 * 100 * 64)
    assert max(counts) == most
    assert len(counts) == 12


@pytest.mark.parametrize(("limit", "most"), [(4, 2), (2, 1), (8, 4), (10**6, 6)])
def test_few_files_of_a_lazy_array_are_in_memory_at_once(tmp_path: Path, limit: int, most: int) -> None:
    crowd = Crowd(most)

    def make(block: Any) -> Any:
        with crowd.joined():
            return block + 1

    x = da.zeros((1200, 64), chunks=(100, -1), dtype="f4").map_blocks(make, dtype="f4", meta=np.empty((0, 0), "f4"))
    with dask.config.set(num_workers=6):
        write_embeddings(x, tmp_path, rows_per_file=100, max_ram_usage_in_bytes=limit * 4 * 100 * 64)
    assert 1 <= crowd.most <= most
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), np.ones((1200, 64), "f4"))


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong on the way: the error says what, and the same call again goes on from there


def assert_goes_on(folder: Any, **options: Any) -> None:
    write_embeddings(ROWS, folder, rows_per_file=5, storage_options=options or None)
    reader = EmbeddingReader(folder, storage_options=options or None)
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    assert verify_embeddings(folder, storage_options=options or None).empty


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs the rights of root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("lazy", "file_format"), [(False, "npy"), (True, "npy"), (False, "parquet")])
def test_a_full_disk(tmp_path: Path, lazy: bool, file_format: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs the rights of root")
    rows = np.ones((300, 1000), np.float32)  # 1.2 MB
    array = da.from_array(rows, chunks=(30, -1)) if lazy else rows
    folder = tmp_path / "disk" / "out"
    # Memory for one file at a time: of several that are under way any may be the one that finds no room, and Dask
    # leaves the others to themselves when one has failed.
    limit = 2 * rows[:30].nbytes
    with small_disk(tmp_path / "disk", "1m"):
        with pytest.raises(WriteError, match=r"No space left.*make room.*running the same again"):
            write_embeddings(array, folder, file_format, rows_per_file=30, max_ram_usage_in_bytes=limit)
        # A file may be the last that found room, so that its record found none: it is written again.
        recorded = {path.stem for path in (folder / "_writing" / "done").glob("0*.json")}
        files = [path for path in folder.glob(f"0*.{file_format}") if path.stem in recorded]
        written = {path.name: path.stat().st_mtime_ns for path in files}
        assert written
        assert not list((folder / "_writing").glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=3m", str(tmp_path / "disk")], check=True)
        write_embeddings(array, folder, file_format, rows_per_file=30)
        after = {path.name: path.stat().st_mtime_ns for path in folder.glob(f"0*.{file_format}")}
        assert written.items() <= after.items()
        np.testing.assert_array_equal(EmbeddingReader(folder, file_format).to_dask_array().compute(), rows)


def test_a_disk_that_fills_up_while_data_are_replaced(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs the rights of root")
    old, rows = np.zeros((100, 1000), np.float32), np.ones((300, 1000), np.float32)
    with small_disk(tmp_path / "disk", "1m"):
        write_embeddings(old, tmp_path / "disk", rows_per_file=30)
        with pytest.raises(WriteError, match=r"No space left.*make room"):
            write_embeddings(rows, tmp_path / "disk", rows_per_file=30, overwrite=True)
        np.testing.assert_array_equal(EmbeddingReader(tmp_path / "disk").to_dask_array().compute(), old)
        assert verify_embeddings(tmp_path / "disk").empty
        subprocess.run(["mount", "-o", "remount,size=3m", str(tmp_path / "disk")], check=True)
        write_embeddings(rows, tmp_path / "disk", rows_per_file=30, overwrite=True)
        np.testing.assert_array_equal(EmbeddingReader(tmp_path / "disk").to_dask_array().compute(), rows)


DENIED = """
import os, sys
import numpy as np
from dask_embedding_reader import write_embeddings
rows = np.arange(60, dtype=np.float32).reshape(20, 3)
write_embeddings(rows, sys.argv[1] + "/first", rows_per_file=5)  # imports all that is needed
os.chmod(sys.argv[1], 0o555)
if os.geteuid() == 0:  # root may write anywhere, nobody may not
    os.setuid(65534)
write_embeddings(rows, sys.argv[1] + "/out", rows_per_file=5)
"""


def test_a_disk_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", DENIED, name], capture_output=True, text=True, timeout=100)
        message = done.stderr.strip().rpartition("\n")[2]
        assert re.search(r"WriteError: .*cannot be written: .*Permission denied.*get the permission", message)
        assert [path.name for path in folder.iterdir()] == ["first"]
        folder.chmod(0o755)
        assert_goes_on(folder / "out")


def test_a_disk_that_is_only_read(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs the rights of root")
    with small_disk(tmp_path / "disk", "3m"):
        write_embeddings(list(batches_of_rows(2)), tmp_path / "disk", rows_per_file=5)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(WriteError, match=r"Read-only file system.*get the permission"):
            write_embeddings(ROWS, tmp_path / "disk", rows_per_file=5, overwrite=True)
        np.testing.assert_array_equal(EmbeddingReader(tmp_path / "disk").to_dask_array().compute(), ROWS[:10])
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        write_embeddings(ROWS, tmp_path / "disk", rows_per_file=5, overwrite=True)
        np.testing.assert_array_equal(EmbeddingReader(tmp_path / "disk").to_dask_array().compute(), ROWS)


def batches_of_rows(count: int) -> Iterator[tuple[Any, None]]:
    return ((ROWS[number * 5 : number * 5 + 5], None) for number in range(count))


def test_a_file_where_the_folder_should_be_and_storages_that_are_only_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="is a file where a folder was expected"):
        write_embeddings(ROWS, tmp_path / "file")
    with pytest.raises(ArgumentError, match="chain of storages"):
        write_embeddings(ROWS, f"zip://x::{tmp_path}/x.zip")
    with servers.http_files(tmp_path) as server, pytest.raises(WriteError, match="cannot be written"):
        write_embeddings(ROWS, f"{server.url}/out")


def test_reading_ends_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    def noting(*given: Any) -> Iterator[Any]:
        try:
            yield from read_table_batches(*given)
        finally:
            ended.append(True)

    def fail(*_: Any) -> Any:
        raise WriteError("no room")

    write_embeddings(ROWS, tmp_path / "0")
    monkeypatch.setattr(sources, "read_table_batches", noting)
    monkeypatch.setattr(threads, "write_part", fail)
    with pytest.raises(WriteError, match="no room") as caught:
        write_embeddings(EmbeddingReader(tmp_path / "0"), tmp_path / "1", rows_per_file=1)
    assert ended == [True], f"while somebody holds {caught.tb}, which holds all that there was"


def test_a_batch_that_fails_loses_nothing_that_was_read(tmp_path: Path) -> None:
    def fails() -> Iterator[tuple[Any, None]]:
        yield ROWS[:12], None
        raise ZeroDivisionError("in the middle")

    with pytest.raises(ZeroDivisionError, match="in the middle"):
        write_embeddings(fails(), tmp_path, rows_per_file=5)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["00000000.npy", "00000001.npy"]


# --------------------------------------------------------------------------------------------------------------------
# Other storages


@pytest.fixture(scope="module")
def s3() -> Iterator[servers.S3Server]:
    servers.require(servers.s3_available, "moto")
    with servers.s3() as server:
        yield server


def test_memory(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet_npy", columns=["id", "caption"])
    url = f"memory://out-{uuid.uuid4().hex}"
    write_embeddings(collection.open(), url, "parquet", rows_per_file=6)
    assert_written(url, "parquet", collection)


@pytest.mark.parametrize("format_name", ["npy", "parquet_npy"])
def test_s3_to_s3_and_back(tmp_path: Path, s3: servers.S3Server, format_name: str) -> None:
    collection = write_collection(tmp_path, format_name, columns=["id", "caption"] if format_name != "npy" else None)
    url = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    options = s3.storage_options
    write_embeddings(collection.open(), url, format_name, rows_per_file=6, storage_options=options)
    there = assert_written(url, format_name, collection, storage_options=options)
    write_embeddings(there, f"{url}-2", format_name, rows_per_file=9, storage_options=options)
    assert_written(f"{url}-2", format_name, collection, storage_options=options)
    with pytest.raises(DestinationError, match="other data"):
        write_embeddings(there, f"{url}-2", format_name, storage_options=options)
    write_embeddings(there, f"{url}-2", format_name, rows_per_file=40, overwrite=True, storage_options=options)
    assert_written(f"{url}-2", format_name, collection, storage_options=options)
    filesystem = fsspec.filesystem("s3", **options)
    filesystem.invalidate_cache()
    names = {path.rpartition("/")[2] for path in filesystem.find(f"{url}-2")}
    suffixes = {"npy"} if format_name == "npy" else {"npy", "parquet"}
    assert names == {f"00000000.{suffix}" for suffix in suffixes} | {".manifest.embeddings"}


def test_s3_without_a_bucket_or_a_connection(s3: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WriteError, match=r"s3://no-such-bucket/.*cannot be written") as caught:
        write_embeddings(ROWS, "s3://no-such-bucket/out", storage_options=s3.storage_options)
    assert servers.S3_SECRET not in str(caught.value)
    from s3fs import S3FileSystem

    plain, calls = S3FileSystem._call_s3, []

    async def breaks_off(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "put_object" and kwargs["Key"].endswith(".npy"):
            calls.append(method)
            if len(calls) > 2:
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return await plain(self, method, *args, **kwargs)

    url = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    with monkeypatch.context() as patched:
        patched.setattr(S3FileSystem, "_call_s3", breaks_off)
        patched.setattr("dask_embedding_reader.storage.retries.FIRST_PAUSE_SECONDS", 0.001)
        with pytest.raises(WriteError, match=r"reset by peer.*check the storage and the connection"):
            write_embeddings(ROWS, url, rows_per_file=5, storage_options=s3.storage_options)
    assert len(calls) > 3  # it was tried more than once
    assert_goes_on(url, **s3.storage_options)


@pytest.mark.parametrize("store", ["gcs", "azure"])
def test_other_object_stores(tmp_path: Path, store: str) -> None:
    clouds: Any = pytest.importorskip("tests.support.clouds")
    servers.require(getattr(clouds, f"{store}_available"), f"the server of {store}")
    collection = write_collection(tmp_path, "parquet_npy", columns=["id", "caption"])
    with getattr(clouds, store)() as server:
        url, options = f"{server.root}/out", server.storage_options
        write_embeddings(collection.open(), url, "parquet", rows_per_file=6, storage_options=options)
        there = assert_written(url, "parquet", collection, storage_options=options)
        write_embeddings(there, url, "parquet", rows_per_file=9, overwrite=True, storage_options=options)
        assert assert_written(url, "parquet", collection, storage_options=options).nb_files == 5


# --------------------------------------------------------------------------------------------------------------------
# Verifying


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, "parquet_npy", FRAME, rows_per_file=4)
    changed = bytearray((tmp_path / "00000001.npy").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "00000001.npy").write_bytes(changed)
    (tmp_path / "00000002.parquet").write_bytes(b"short")
    (tmp_path / "00000003.npy").unlink()
    np.save(tmp_path / "more.npy", ROWS)
    problems = verify_embeddings(tmp_path)
    assert list(problems.columns) == ["path", "problem"]
    found = {Path(path).name: problem for path, problem in problems.itertuples(index=False)}
    assert sorted(found) == ["00000001.npy", "00000002.parquet", "00000003.npy", "more.npy"]
    assert found["00000001.npy"].startswith("damaged")
    assert found["00000002.parquet"].startswith("has 5 bytes, was written with")
    assert found["00000003.npy"] == "missing"
    assert found["more.npy"].startswith("not in the manifest")


def test_a_copy_is_as_good(tmp_path: Path) -> None:
    import shutil

    write_embeddings(ROWS, tmp_path / "a", rows_per_file=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1, 1))
    assert verify_embeddings(tmp_path / "b").empty
    np.testing.assert_array_equal(EmbeddingReader(tmp_path / "b").to_dask_array().compute(), ROWS)


def test_there_must_be_something_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(NoFilesError, match=r"has no .manifest.embeddings"):
        verify_embeddings(tmp_path)
    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    [problem] = verify_embeddings(tmp_path)["problem"]
    assert problem == "its checksum is not known: it was not written by write_embeddings"


def test_the_names_of_columns_may_be_anything(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"a.b": [1, 2], "a": [3, 4], "list.element": ["x", "y"], "Größe": [True, False], "": [1.5, 2.5]}
    )
    write_embeddings(ROWS[:2], tmp_path, "parquet", frame)
    got = EmbeddingReader(tmp_path, "parquet", meta_columns=list(map(str, frame))).to_dask_dataframe().compute()
    for name in frame:
        assert got[name].tolist() == frame[name].tolist()


# --------------------------------------------------------------------------------------------------------------------
# As few questions to the storage as are needed


class Asked(NamedTuple):
    """What a storage was asked."""

    listed: list[str]
    read: list[str]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """What is asked of fsspec's memory filesystem, below /asked."""
    asked = Asked([], [])
    kind = fsspec.get_filesystem_class("memory")

    def note(method: str, names: list[str]) -> None:
        original = getattr(kind, method)

        def noting(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
            names.append(path.partition("/asked/")[2])
            return original(self, path, *arguments, **options)

        monkeypatch.setattr(kind, method, noting)

    note("find", asked.listed)
    note("cat_file", asked.read)
    yield asked
    fs = fsspec.filesystem("memory")
    if fs.exists("/asked"):
        fs.rm("/asked", recursive=True)


def data_in(names: list[str]) -> list[str]:
    return [name for name in names if "/_writing/" not in name and not name.endswith(".manifest.embeddings")]


@pytest.mark.parametrize("file_format", ["npy", "parquet", "parquet_npy"])
@pytest.mark.parametrize("source", ["numpy", "dask", "batches"])
def test_writing_lists_once_before_and_once_after_and_reads_nothing_back(
    asked: Asked, file_format: str, source: str
) -> None:
    def write(folder: str, rows: Any, **options: Any) -> list[str]:
        asked.listed.clear()
        asked.read.clear()
        if source == "batches":
            frames = [None, None] if file_format == "npy" else [FRAME[:5], FRAME[5:]]
            halves = zip([rows[:5], rows[5:]], frames, strict=True)
            write_embeddings(iter(halves), f"memory://asked/{folder}", file_format, rows_per_file=8, **options)
        else:
            array = rows if source == "numpy" else da.from_array(rows, chunks=(4, 3))
            meta = None if file_format == "npy" else FRAME
            write_embeddings(array, f"memory://asked/{folder}", file_format, meta, rows_per_file=8, **options)
        assert data_in(asked.read) == []
        return [name for name in asked.listed if "_writing" not in name]

    assert write("new", ROWS) == ["new", "new"]
    assert len(asked.listed) <= 3  # and one of the claims
    assert write("new", ROWS) == ["new"]  # it is there
    # Files that are moved into the place of others are other ones afterwards.
    assert write("new", ROWS + 1, overwrite=True) == ["new", "new", "new"]


@pytest.mark.parametrize("file_format", ["npy", "parquet", "parquet_npy"])
@pytest.mark.parametrize("place", ["local", "memory"])
def test_the_manifest_says_what_reading_each_header_would(
    tmp_path: Path, asked: Asked, file_format: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_GROUP_NBYTES", 50)
    monkeypatch.setattr(encoding, "_METADATA_GROUP_ROWS", 3)
    folder = str(tmp_path / "out") if place == "local" else "memory://asked/out"
    frame = pd.DataFrame(
        {
            "word": [None, *"abcdefghijklmnopqrs"],
            "number": np.arange(20, dtype=np.int16),
            "masked": pd.array([1] * 20, dtype="Int8"),
            "some": pd.array([None] * 8 + [True] * 12, dtype="boolean"),
            "none": pd.Series([None] * 8 + ["x"] * 12, dtype=object),
            "when": pd.date_range("2020", periods=20, tz="UTC", unit="s"),
            "tags": [["a"], None] * 10,
            "kind": pd.Series(list("ab") * 10, dtype="category"),
        }
    )
    columns = [] if file_format == "npy" else list(frame.columns)
    for dtype in ("float32", "float16", "int8"):
        write_embeddings(
            ROWS.astype(dtype), folder, file_format, frame if columns else None, rows_per_file=8, overwrite=True
        )
        written = EmbeddingReader(folder, file_format, meta_columns=columns)
        saved = EmbeddingReader.from_manifest(folder)
        fs, path = fsspec.core.url_to_fs(folder)
        fs.rm(f"{path}/.manifest.embeddings")
        read = EmbeddingReader(folder, file_format, meta_columns=columns)
        assert written == read
        for reader in (written, saved):
            assert reader.manifest.fields == read.manifest.fields
            for table, other in (
                (reader.manifest.vectors, read.manifest.vectors),
                (reader.manifest.metadata, read.manifest.metadata),
            ):
                headers = [table.header(k)._replace(checksum="") for k in range(len(table))] if table else []
                others = [other.header(k) for k in range(len(other))] if other else []
                if reader is saved:  # which knows less of the versions of local files
                    assert [header.file.path for header in headers] == [header.file.path for header in others]
                    others = [h._replace(file=own.file) for h, own in zip(others, headers, strict=True)]
                assert headers == others
        np.testing.assert_array_equal(read.to_dask_array().compute(), ROWS.astype(dtype))


def test_opening_lists_each_folder_once(asked: Asked) -> None:
    write_embeddings(ROWS, "memory://asked/both", "parquet_npy", FRAME, rows_per_file=8)
    write_embeddings(ROWS, "memory://asked/one", "parquet", FRAME, rows_per_file=8)
    for folder, file_format in (("both", "npy"), ("both", "parquet_npy"), ("one", "parquet")):
        asked.listed.clear()
        asked.read.clear()
        columns = [] if file_format == "npy" else ["id"]
        EmbeddingReader(f"memory://asked/{folder}", file_format, meta_columns=columns)
        assert asked == ([folder], [f"{folder}/.manifest.embeddings"])


def test_commands_list_each_folder_once(asked: Asked) -> None:
    write_embeddings(ROWS, "memory://asked/both", "parquet_npy", FRAME, rows_per_file=8)
    write_embeddings(ROWS, "memory://asked/one", "parquet", FRAME, rows_per_file=8)
    for command, expected in (
        (["info", "memory://asked/both"], ["both"]),
        (["info", "memory://asked/both", "-m", "id"], ["both"]),
        (["head", "memory://asked/one"], ["one"]),
        (["plan", "memory://asked/one", "-m", "id"], ["one"]),
        (["convert", "memory://asked/both", "memory://asked/new", "--to", "npy"], ["both", "new", "new"]),
        (["convert", "memory://asked/one", "memory://asked/other", "--to", "parquet_npy"], ["one", "other", "other"]),
    ):
        asked.listed.clear()
        with pytest.raises(SystemExit) as exited:
            main(command)
        assert not exited.value.code
        assert [name for name in asked.listed if "_writing" not in name] == expected


def test_one_is_not_counted_as_several(tmp_path: Path) -> None:
    one = ROWS[:1, :1].astype("int8")
    np.save(tmp_path / "0.npy", one)
    reader = EmbeddingReader(tmp_path)
    messages = [repr(reader), repr(reader.manifest.vectors), reader._repr_html_()]
    for wrong in (
        lambda: reader.locate(5),
        lambda: reader.to_dask_array(5),
        lambda: EmbeddingReader(tmp_path, "parquet"),
        lambda: write_embeddings(one, tmp_path),
        lambda: write_embeddings(one, tmp_path / "a", "parquet", FRAME),
        lambda: write_embeddings(ROWS, tmp_path / "b", "parquet", FRAME[:1]),
        lambda: write_embeddings(iter([(one, FRAME)]), tmp_path / "c", "parquet"),
    ):
        with pytest.raises(EmbeddingReaderError) as error:
            wrong()
        messages.append(str(error.value))
    for command in (["info"], ["plan", "--batch-size", "1"], ["stats"]):
        with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as printed:
            main([command[0], str(tmp_path), *command[1:]])
        messages.append(printed.getvalue())
    ones = [found for message in messages for found in re.findall(r"(?<![\d,.-])1 [a-z_.]+(?: [a-z]+)?", message)]
    assert len(ones) > 12
    assert not [found for found in ones if re.search(r"(files|rows|bytes|vectors)\b", found)]


def test_files_that_are_links_are_those_that_they_lead_to(tmp_path: Path) -> None:
    folder, store = tmp_path / "folder", tmp_path / "store"
    write_embeddings(ROWS, folder, rows_per_file=8)
    store.mkdir()
    for path in sorted(folder.glob("*.npy")):  # as snapshots of the Hugging Face hub are
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    assert verify_embeddings(folder).empty
    write_embeddings(ROWS, folder, rows_per_file=8)  # nothing is missing
    (store / "00000000.npy").write_bytes(b"short")
    assert verify_embeddings(folder)["problem"].str.startswith("has 5 bytes").tolist() == [True]


@pytest.mark.parametrize("overwrite", [False, True])
def test_data_behind_a_link_to_a_folder_are_in_the_way(tmp_path: Path, overwrite: bool) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    np.save(outside / "0.npy", ROWS)
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / "up").symlink_to(folder, target_is_directory=True)  # this is no way to other data
    with pytest.raises(DestinationError, match=r"1 file .*such as link/0\.npy"):
        write_embeddings(ROWS, folder, overwrite=overwrite)
    (folder / "link").unlink()
    write_embeddings(ROWS, folder)
    assert EmbeddingReader(folder, "npy").count == len(ROWS)
    (folder / "link").symlink_to(outside, target_is_directory=True)
    assert verify_embeddings(folder)["path"].tolist() == [f"{folder}/link/0.npy"]


def test_lazy_objects_of_one_array_and_one_path_on_two_storages_are_computed_at_once(tmp_path: Path) -> None:
    array = da.from_array(ROWS, chunks=(4, -1))
    folders = [str(tmp_path / "folder"), f"memory://{tmp_path}/folder"]
    lazy = [write_embeddings(array, folder, rows_per_file=4, compute=False) for folder in folders]
    delayed(lazy).compute()
    for folder in folders:
        np.testing.assert_array_equal(EmbeddingReader(folder).to_dask_array(), ROWS)
        assert verify_embeddings(folder).empty
