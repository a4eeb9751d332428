"""New memory costs more than reading into it: the memory of a batch is filled again once the loop has let go of it."""

from __future__ import annotations

import ctypes
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.budget import cached_nbytes
from dask_embedding_reader.batches import pace, windows
from tests.support.collections import Collection, assert_batches, finishes, wait_until, write_collection
from tests.support.stores import emptied_bucket

BATCH = {"batch_size": 64, "max_piece_size": 8, "show_progress": False}


@pytest.fixture(scope="module", params=["npy", "npy-fortran", "parquet-list", "parquet_npy"])
def collection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Files whose ends are not those of batches."""
    return write_collection(
        tmp_path_factory.mktemp("memory"), request.param, file_rows=[90] * 8, columns=["id"], row_group_rows=45
    )


@pytest.mark.parametrize("spare", [0, 1])
def test_a_loop_needs_the_memory_of_its_batch_and_of_those_being_filled(
    collection: Collection, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a spare one where batches are not large."""
    monkeypatch.setattr(pace, "_SPARE_NBYTES", spare * 64 * 4 * collection.rows.shape[1])
    addresses = {batch.ctypes.data for batch, _ in collection.open()(**BATCH) if len(batch) == 64}
    # Three where row groups are decoded in parallel; the last batch is shorter and has memory of its own.
    assert len(addresses) <= (3 if collection.format_name == "parquet-list" else 2) + spare


def test_batches_that_are_kept_are_never_filled_again(collection: Collection) -> None:
    batches = finishes(lambda: list(collection.open()(**BATCH)))
    assert_batches(iter(batches), collection, 64)


@pytest.mark.parametrize("held", [1, 2, 5])
def test_batches_that_are_kept_for_a_while_are_left_alone(collection: Collection, held: int) -> None:
    kept: list[tuple[Any, Any]] = []
    start = 0
    for batch, _ in collection.open()(**BATCH):
        kept.append((batch, start))
        start += len(batch)
        kept = kept[-held:]
        for earlier, first in kept:
            np.testing.assert_array_equal(earlier, collection.rows[first : first + len(earlier)].astype(np.float32))
    assert start == len(collection.rows)


def test_nothing_is_read_ahead_while_batches_that_are_kept_fill_the_limit(tmp_path: Path) -> None:
    written = write_collection(tmp_path, "npy", file_rows=[64 * 20])
    limit = 8 * written.rows[:64].nbytes + cached_nbytes()
    batches = written.open()(64, max_piece_size=64, show_progress=False, max_ram_usage_in_bytes=limit)
    kept, ahead = [next(batches)], []
    reading = batches.gi_frame.f_locals["reading"]
    for batch in batches:
        kept.append(batch)
        ahead.append(len(reading._slots))
    assert ahead[0] > 1
    assert ahead[10] == 0
    assert_batches(iter(kept), written, 64)


def test_metadata_of_tiny_vectors_are_read_ahead_within_the_limit(tmp_path: Path) -> None:
    """Captions of 2 kB, of which those of the whole collection would be worth reading ahead."""
    captions = pa.table({"caption": [f"{row}".ljust(2_000, "x") for row in range(6_000)]})
    written = write_collection(
        tmp_path, "parquet_npy", file_rows=[6_000], dimension=2, tables=[captions], row_group_rows=500
    )
    limit = 60_000_000 + cached_nbytes()
    batches = written.open(meta_columns=["caption"])(100, show_progress=False, max_ram_usage_in_bytes=limit)
    most = 0
    for number, _ in enumerate(batches):
        reading = batches.gi_frame.f_locals["reading"]
        left = limit - reading._pace.reading_nbytes
        rows = reading._metadata_stop - 100 * number  # with those of this batch
        most = max(most, rows)
        assert rows * 6_000 <= left, "as Arrow's columns, twice, and as Python's strings"
        assert reading._budget.left_nbytes <= left - rows * 6_000
    assert most > 1_000


def test_metadata_that_weigh_more_than_their_footer_tells_are_weighed(tmp_path: Path) -> None:
    captions = pa.table({"caption": ["x" * 2_000] * 300})  # one in a dictionary
    written = write_collection(tmp_path, "parquet_npy", file_rows=[300], dimension=2, tables=[captions])
    batches = written.open(meta_columns=["caption"])(100, show_progress=False)
    next(batches)
    assert batches.gi_frame.f_locals["reading"]._metadata_row_nbytes >= 4_000


def test_many_short_texts_are_weighed_as_they_come(tmp_path: Path) -> None:
    """In 20 columns: each text takes one byte in the file, and 60 as an object of Python's."""
    texts = pa.table({f"c{k}": [f"{row % 10}" for row in range(3_000)] for k in range(20)})
    written = write_collection(
        tmp_path, "parquet_npy", file_rows=[3_000], dimension=2, tables=[texts], row_group_rows=1_000
    )
    batches = written.open(meta_columns="*")(100, show_progress=False)
    next(batches)
    assert batches.gi_frame.f_locals["reading"]._metadata_row_nbytes >= 20 * 50


@pytest.mark.filterwarnings("ignore:batches of 1,024 rows are mixed from")
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_memory_of_batches_that_were_kept_is_not_all_kept(tmp_path: Path, shuffled: bool) -> None:
    """But as much as the limit; or what two windows and two batches take."""
    # 64 batches of 1 MB.
    np.save(tmp_path / "0.npy", np.zeros((64 * 1024, 256), np.float32))
    reader = EmbeddingReader(tmp_path)
    limit = 16 * 2**20 + cached_nbytes()
    if shuffled:
        reader = reader.shuffle(1, buffer_rows=2 * 1024)
    batches: Any = reader(1024, show_progress=False, max_ram_usage_in_bytes=limit)
    kept = [next(batches)[0] for _ in range(30)]
    buffers = batches.gi_frame.f_locals["reading"]._buffers
    assert buffers.lent_nbytes >= 30 * 2**20
    kept.clear()
    assert 0 < buffers.free_nbytes <= (9 * 2**20 if shuffled else limit)
    batches.close()


def test_a_window_of_remote_rows_is_read_by_as_many_threads_as_the_limit_allows() -> None:
    """Each may need 4 MB to pick rows from, and eight times that should fit."""
    options: dict[str, Any] = {"max_piece_size": None, "show_progress": False, "dtype": None}
    with emptied_bucket() as bucket:
        with io.BytesIO() as file:
            np.save(file, np.zeros((100, 4), np.float32))
            bucket.put("emb/0.npy", file.getvalue())
        reader = EmbeddingReader("bucket://emb").shuffle(1)
        threads = {
            (limit, given): windows._count_threads(
                reader.manifest,
                reader._request(10, 0, None, max_ram_usage_in_bytes=limit, parallel_pieces=given, **options),
            )
            for limit, given in ((2**32, None), (2**30, None), (2**28, None), (2**32, 3))
        }
    assert threads == {(2**32, None): 64, (2**30, None): 32, (2**28, None): 16, (2**32, 3): 3}


def test_metadata_of_a_window_is_projected(tmp_path: Path) -> None:
    table = pa.table({"n": np.arange(1_000)})
    written = write_collection(tmp_path, "parquet_npy", file_rows=[1_000], dimension=2, tables=[table])
    options: dict[str, Any] = {"max_piece_size": None, "show_progress": False, "dtype": None, "parallel_pieces": None}
    needed = []
    for names in ([], ["n"]):
        reader = written.open(meta_columns=names).shuffle(1, buffer_rows=500)
        request = reader._request(10, 0, None, max_ram_usage_in_bytes=2**32, **options)
        projected = windows.project_windows(reader.manifest, request)
        needed.append((projected.ahead, projected.batches))
    window_rows = reader.rows.windows(0, 1_000)[0]
    assert needed[1][0] - needed[0][0] == window_rows * 256
    assert needed[1][1] - needed[0][1] == (window_rows + 2 * 10) * 256


def test_batches_let_go_of_count_as_long_as_their_memory_is_kept(tmp_path: Path) -> None:
    written = write_collection(tmp_path, "npy", file_rows=[64 * 40])
    batches = written.open()(64, max_piece_size=64, show_progress=False, max_ram_usage_in_bytes=2**30)
    kept = [next(batches) for _ in range(20)]
    reading, nbytes = batches.gi_frame.f_locals["reading"], kept[0][0].nbytes
    assert reading._batches_nbytes() >= 20 * nbytes
    before = reading._budget.left_nbytes
    del kept
    next(batches)
    assert reading._budget.left_nbytes <= before + 2 * nbytes, "it is free, and there"


def test_a_view_of_a_batch_keeps_its_memory(collection: Collection) -> None:
    rows = [batch[-1] for batch, _ in collection.open()(**BATCH)]
    stops = [*range(64, len(collection.rows), 64), len(collection.rows)]
    np.testing.assert_array_equal(rows, collection.rows[[stop - 1 for stop in stops]].astype(np.float32))


def test_reading_goes_on_while_the_loop_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next large batch is read without being asked for: into memory that the loop has just let go of."""
    monkeypatch.setattr(pace, "_SPARE_NBYTES", 0)
    written = write_collection(tmp_path, "npy", file_rows=[640])
    batches = written.open()(**BATCH)
    seen = [next(batches)[0] for _ in range(2)]
    memory = np.ctypeslib.as_array((ctypes.c_float * seen[0].size).from_address(seen[0].ctypes.data))
    expected = written.rows[128:192].astype(np.float32).ravel()
    assert not np.array_equal(memory, expected)
    del seen[0]
    assert wait_until(lambda: np.array_equal(memory, expected))
    batches.close()
