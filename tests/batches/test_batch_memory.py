"""New memory costs more than reading into it: the memory of a batch is filled again once the loop has let go of it."""

from __future__ import annotations

import ctypes
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.budget import cached_nbytes
from dask_embedding_reader.batches import pace, windows
from dask_embedding_reader.batches.few import are_few
from dask_embedding_reader.batches.metadata import FRAMES
from dask_embedding_reader.batches.pace import (
    PICKED_ROW_NBYTES,
    count_threads,
    largest_header,
    make_pace,
    metadata_row_nbytes,
    project_batches,
    reading_nbytes,
)
from dask_embedding_reader.batches.read import _Reading
from dask_embedding_reader.batches.request import BatchRequest
from dask_embedding_reader.formats.base import GroupedFormat
from dask_embedding_reader.formats.parquet.decode import DECODER_NBYTES
from dask_embedding_reader.formats.parquet.footers import FOOTERS, read_footer
from dask_embedding_reader.formats.picking import SCRATCH_NBYTES
from dask_embedding_reader.rows.shuffled import shuffle
from dask_embedding_reader.rows.stretch import Stretch
from tests.support.collections import Collection, assert_batches, finishes, wait_until, write_collection
from tests.support.stores import Bucket, emptied_bucket

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
        assert reading._metadata_nbytes() == rows * reading._metadata_row_nbytes, "and no others"
    assert most > 1_000


def test_metadata_that_weigh_more_than_their_footer_tells_are_weighed(tmp_path: Path) -> None:
    captions = pa.table({"caption": ["x" * 2_000] * 300})  # one in a dictionary
    written = write_collection(tmp_path, "parquet_npy", file_rows=[300], dimension=2, tables=[captions])
    batches = written.open(meta_columns=["caption"])(100, show_progress=False)
    next(batches)
    assert batches.gi_frame.f_locals["reading"]._metadata_row_nbytes >= 4_000


def test_texts_in_a_dictionary_weigh_what_rows_have_of_them_before_any_is_read(tmp_path: Path) -> None:
    """Two of them, of which the footer tells 34 bytes a row."""
    captions = pa.table({"caption": ["x" * 5_000, "y" * 5_000] * 150})
    written = write_collection(tmp_path, "parquet_npy", file_rows=[300], dimension=2, tables=[captions])
    assert 15_000 <= metadata_row_nbytes(written.open(meta_columns=["caption"]).manifest) < 15_100


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
    reading = batches.gi_frame.f_locals["reading"]
    buffers = reading._source.buffers if shuffled else reading._buffers
    assert buffers.lent_nbytes >= 30 * 2**20
    kept.clear()
    most = (2 * 2 + 2) * 2**20 if shuffled else limit
    assert most - 2 * 2**20 < buffers.free_nbytes <= most
    batches.close()


@pytest.mark.parametrize("most", [1, 7, 64, 65, 500, 10_000])
def test_windows_are_read_in_equal_parts_that_the_limit_has_room_for(most: int) -> None:
    rows = shuffle(Stretch(range(1_000)), 0, 0, 1, 256)
    for start, stop in ((0, 1_000), (5, 999), (256, 512)):
        spans = list(windows._windows(rows, start, stop, most))
        assert [first for first, _ in spans] == [start, *(last for _, last in spans[:-1])]
        for first, last in pairwise([start, *rows.windows(start, stop).tolist(), stop]):
            parts = [b - a for a, b in spans if first <= a < last]
            assert sum(parts) == last - first
            assert max(parts) == -(-(last - first) // -(-(last - first) // most)) <= most


# ---------------------------------------------------------------------------------------------------------------------
# How much is read at once: arithmetic, of 3 files of 100,000 rows of 1,024 bytes


def request_of(
    reader: EmbeddingReader, batch_size: int, limit: int, threads: int | None = None, piece: int | None = None
) -> BatchRequest:
    """What batches are asked for."""
    options: dict[str, Any] = {"show_progress": False, "dtype": None, "max_piece_size": piece}
    return reader._request(batch_size, 0, None, max_ram_usage_in_bytes=limit, parallel_pieces=threads, **options)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingReader:
    """Files that take no disk."""
    root = tmp_path_factory.mktemp("large")
    for number in range(3):
        np.lib.format.open_memmap(root / f"{number}.npy", "w+", np.float32, (100_000, 256)).flush()
    return EmbeddingReader(root)


SCRATCH = 3 * 2**17
"""Each thread casts by way of so many bytes at most."""


@pytest.mark.parametrize(
    ("batch_size", "limit", "piece", "piece_rows", "ahead_rows", "most_batches"),
    [
        # 8 MB for each thread, and four pieces of each ahead; as far as a quarter of the limit has room for them.
        (1, 2**30, None, 8_192, 16 * 8_192, None),
        (1_000, 2**30, None, 8_192, 16 * 8_192, None),
        (1_000, 2**26, None, 4_096, 16 * 4_096, None),
        (8_192, 2**30, None, 8_192, 16 * 8_192, None),
        # Never less than 256 kB; more than a piece are batches of four equal ones.
        (1_000, 2**20, None, 250, 16 * 250, 3),
        # Of large batches the pieces are equal, as many for each thread: 4, and 8.
        # Up to 32 MB there is a spare one beside that in use and that being filled.
        (20_000, 2**30, None, 5_000, 16 * 5_000, 3),
        (32_768, 2**30, None, 8_192, 16 * 8_192, 3),
        (32_769, 2**30, None, 4_097, 16 * 4_097, 2),
        (40_000, 2**30, None, 5_000, 16 * 5_000, 2),
        (70_000, 2**30, None, 5_834, 16 * 5_834, 2),
        (200_000, 2**30, None, 7_143, 200_000, 2),
        # Pieces that the caller chose are left as they are: four of them fill up to three batches.
        (1_000, 2**30, 100, 100, 1_600, 3),
        (150, 2**30, 100, 100, 1_600, 5),
    ],
)
def test_pieces_suit_batches_threads_and_the_limit(
    large: EmbeddingReader,
    batch_size: int,
    limit: int,
    piece: int | None,
    piece_rows: int,
    ahead_rows: int,
    most_batches: int | None,
) -> None:
    request = request_of(large, batch_size, limit, 4, piece)
    pace = make_pace(large.manifest, request, decodes_groups=False)
    assert (pace.threads, pace.piece_rows, pace.is_large) == (4, piece_rows, most_batches is not None)
    assert (pace.ahead_rows, pace.most_batches) == (ahead_rows, most_batches)
    assert (pace.metadata_rows, pace.metadata_row_nbytes) == (min(65_536, limit // 64), 0)
    assert pace.reading_nbytes == 4 * min(SCRATCH, piece_rows * 1_024)
    # What is held: two batches, the piece that does not end with them, what is read ahead, and a shorter last batch.
    rest = 0 if pace.is_large else piece_rows
    held = -(-(2 * batch_size + ahead_rows + piece_rows) // batch_size) * batch_size
    held = min(held, 300_000, (most_batches or 10**9) * batch_size)
    begun = min(300_000, 2 * batch_size + rest) - min(300_000, 2 * batch_size)
    assert project_batches(large.manifest, request) == (
        min(300_000, 2 * batch_size) * 1_024,
        (begun + 300_000 % batch_size) * 1_024 + pace.reading_nbytes,
        max(0, held - 2 * batch_size - rest) * 1_024,
    )


def test_a_few_rows_of_a_collection_take_no_more_than_they_are(large: EmbeddingReader) -> None:
    request = request_of(large, 1_000, 2**30, 4)._replace(stop=1_500)
    assert project_batches(large.manifest, request) == (1_500 * 1_024, 500 * 1_024 + 4 * SCRATCH, 0)
    request = request._replace(stop=0)
    assert project_batches(large.manifest, request) == (0, 4 * SCRATCH, 0)


@pytest.mark.parametrize(
    ("batch_size", "decodes_groups", "ahead_rows", "most_batches"),
    [(50, False, 640, 6), (50, True, 800, 18), (700, True, 800, 4), (5_000, True, 5_000, 3)],
)
def test_as_many_row_groups_are_read_ahead_as_are_decoded_at_once(
    tmp_path: Path, batch_size: int, decodes_groups: bool, ahead_rows: int, most_batches: int
) -> None:
    """Four threads with a piece of 40 rows each, or one of the largest row group, of 200 rows."""
    written = write_collection(tmp_path, "parquet-list", file_rows=[500, 1_000], columns=[], row_group_rows=200)
    reader = written.open()
    pace = make_pace(reader.manifest, request_of(reader, batch_size, 2**30, 4, 40), decodes_groups=decodes_groups)
    assert (pace.ahead_rows, pace.most_batches) == (ahead_rows, most_batches)


@pytest.mark.parametrize(
    ("name", "step", "ahead_rows", "most_batches"),
    [("parquet-list", 1, 640, 6), ("parquet-list", 2, 800, 18), ("arrow-zstd", 1, 800, 18)],
)
def test_plain_row_groups_are_not_decoded_whole_but_where_rows_of_them_are_picked(
    tmp_path: Path, name: str, step: int, ahead_rows: int, most_batches: int
) -> None:
    """As above. Batches that are compressed are always decoded whole, which is seen when the first one is."""
    written = write_collection(tmp_path, name, file_rows=[500, 1_000], columns=[], row_group_rows=200)
    reader = written.open().take(slice(None, None, step))
    batches = reader(50, max_piece_size=40, parallel_pieces=4, show_progress=False)
    for _ in range(2):
        next(batches)
    reading = batches.gi_frame.f_locals["reading"]
    assert (reading._pace.ahead_rows, reading._most_batches) == (ahead_rows, most_batches)
    batches.close()


def put_npy(bucket: Bucket, number: int, rows: int) -> None:
    with io.BytesIO() as file:
        np.save(file, np.zeros((rows, 256), np.float32))
        bucket.put(f"emb/{number}.npy", file.getvalue())


def test_remote_pieces_end_with_their_files() -> None:
    """A batch and a piece for each of 16 connections are read ahead; each is held as an answer, too."""
    with emptied_bucket() as bucket:
        for number, rows in enumerate((100, 300, 200)):
            put_npy(bucket, number, rows)
        reader = EmbeddingReader("bucket://emb")
        for limit, threads, piece, expected in (
            (2**30, 4, None, (4, 31_250, 4 * 300, 4 * 300)),
            (2**30, None, None, (16, 16_384, 16 * 300, 16 * 300)),
            (2**22, None, None, (16, 256, 16 * 256, 16 * 256)),
            (2**30, 4, 50, (4, 50, 200, 200)),
        ):
            pace = make_pace(reader.manifest, request_of(reader, 10, limit, threads, piece), decodes_groups=False)
            found = pace.threads, pace.piece_rows, pace.ahead_rows, pace.reading_nbytes // 1_024
            assert found == expected
            assert not pace.is_large
            assert pace.most_batches is None
        assert count_threads(reader.manifest, request_of(reader, 10, 2 * 3 * 1_024)) == 3


def test_what_threads_hold_of_remote_row_groups_is_half_of_the_limit_at_most(tmp_path: Path) -> None:
    """Whatever file has the largest one."""
    written = write_collection(
        tmp_path, "parquet-list", file_rows=[40, 5_000, 30], columns=[], dimension=512, row_group_rows=4_000
    )
    with emptied_bucket() as bucket:
        for path in written.files:
            bucket.put(f"emb/{path.name}", path.read_bytes())
        reader = EmbeddingReader("bucket://emb", "parquet")
        files, kind = reader.manifest.vectors, reader.manifest.format.vectors
        assert largest_header(files).file.url.endswith(written.files[1].name)
        one, two = (kind.held_nbytes(largest_header(files), reader.manifest.columns, 1, count) for count in (1, 2))
        each = two - one
        assert each >= 4_000 * 512 * 4
        threads = {limit: count_threads(reader.manifest, request_of(reader, 10, limit)) for limit in (
            1, 2 * each, 6 * each - 1, 6 * each, 2 * 16 * each, 2**50
        )}  # fmt: skip
        assert list(threads.values()) == [1, 1, 2, 3, 16, 16]
        assert count_threads(reader.manifest, request_of(reader, 10, 1, 7)) == 7


@pytest.mark.parametrize(
    ("group_rows", "requests", "expected"),
    [(4_000, 1, (16, 16, 4)), (10_000, 2, (8, 12, 4)), (20_000, 4, (4, 12, 4)), (40_000, 9, (2, 12, 4))],
)
def test_remote_row_groups_that_take_several_requests_are_read_fewer_at_a_time(
    group_rows: int, requests: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as keep 16 connections busy, or 12 processors; of 4 threads each its own."""
    with emptied_bucket() as bucket:
        table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(np.zeros(40_000 * 512, np.float32), 512)})
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=group_rows)
        bucket.put("emb/0.parquet", file.getvalue())
        reader = EmbeddingReader("bucket://emb", "parquet")
        kind = reader.manifest.format.vectors
        assert isinstance(kind, GroupedFormat)
        assert kind.count_requests(largest_header(reader.manifest.vectors)) == requests
        found = []
        for processors, threads in ((2, None), (12, None), (12, 4)):
            monkeypatch.setattr("os.cpu_count", lambda processors=processors: processors)
            request = request_of(reader, 10, 2**32, threads)
            chosen = make_pace(reader.manifest, request, decodes_groups=True)
            found.append(chosen.ahead_rows // max(group_rows, chosen.piece_rows))
            assert chosen.threads == (threads or 16)
        assert tuple(found) == expected
        some = request_of(reader, 10, 2**32)._replace(rows=Stretch(range(0, 40_000, 2)))
        assert make_pace(reader.manifest, some, decodes_groups=True).ahead_rows >= 16 * group_rows


def test_a_row_of_metadata_weighs_what_a_footer_at_hand_tells(tmp_path: Path) -> None:
    """The one that was read last, as others may have been forgotten; three times, as Python's strings."""
    texts = [pa.table({"caption": [f"{row:0{1_000 * number}}" for row in range(20)]}) for number in (1, 2, 3)]
    written = write_collection(tmp_path, "parquet_npy", file_rows=[20] * 3, dimension=2, tables=texts)
    reader = written.open(meta_columns=["caption"])
    assert reader.manifest.metadata is not None
    headers = [reader.manifest.metadata.header(place) for place in range(3)]
    footers = [read_footer(header.file, ["caption"]) for header in headers]
    for kept, expected in (([], 256), ([1], 256), ([0], 3_000), ([2], 9_000), ([0, 1, 2], 9_000)):
        FOOTERS.clear()
        for place in kept:
            FOOTERS.put(headers[place].file, footers[place])
        nbytes = metadata_row_nbytes(reader.manifest)
        assert expected <= nbytes < 1.2 * expected, kept
        pace = make_pace(reader.manifest, request_of(reader, 10, 2**20, 1), decodes_groups=False)
        assert pace.metadata_row_nbytes == nbytes
        assert pace.metadata_rows == max(64, 2**14 // nbytes)
    without = EmbeddingReader(written.folder).manifest
    assert metadata_row_nbytes(without) == 0
    request = request_of(reader, 10, 2**20, 1)
    held = [reading_nbytes(manifest, request, 20, 1) for manifest in (reader.manifest, without)]
    assert held[0] - held[1] == DECODER_NBYTES
    picked = request._replace(rows=reader.take([1, 5, 3]).rows)
    of_picked = 3 * (SCRATCH_NBYTES + 20 * PICKED_ROW_NBYTES)
    assert reading_nbytes(without, picked, 20, 3) == reading_nbytes(without, request, 20, 3) + of_picked
    # 55 rows of 8 bytes and their metadata; all of them are one piece, 64 rows of metadata are decoded at once.
    row_nbytes = 8 + nbytes
    assert project_batches(reader.manifest, request._replace(start=5)) == (
        20 * row_nbytes,
        (35 + 5) * row_nbytes + 64 * nbytes + held[0],
        0,
    )


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


@pytest.mark.parametrize(("dtype", "held", "made"), [(None, 4, 4), ("float64", 4, 8), ("float16", 2, 2)])
@pytest.mark.parametrize(("start", "stop"), [(0, 1_000), (100, 500), (300, 305)])
@pytest.mark.parametrize("piece", [None, 7])
def test_windows_are_projected(
    tmp_path: Path, dtype: str | None, held: int, made: int, start: int, stop: int, piece: int | None
) -> None:
    """One that is picked from, with the numbers of its rows, and two batches, and the next window; vectors are held in
    the smaller dtype."""
    table = pa.table({"n": np.arange(1_000)})
    written = write_collection(tmp_path, "parquet_npy", file_rows=[1_000], dimension=2, tables=[table])
    for names, of_metadata in ([], 0), (["n"], 256):
        reader = written.open(meta_columns=names).shuffle(1, buffer_rows=500)
        request = request_of(reader, 10, 2**32, 3, piece)._replace(
            start=start, stop=stop, dtype=np.dtype(dtype or "f4")
        )
        window = min(reader.rows.window_rows, stop - start) * (2 * held + of_metadata + PICKED_ROW_NBYTES)
        batch = min(10, stop - start) * (2 * made + of_metadata)
        part_rows = piece or 2 * SCRATCH_NBYTES // (reader.manifest.byte_per_item + PICKED_ROW_NBYTES)
        reading = reading_nbytes(reader.manifest, request, part_rows, 3)
        assert windows.project_windows(reader.manifest, request) == (2 * batch + window, reading, window)


@pytest.mark.parametrize("batch_rows", [64, 4])
def test_batches_count_before_they_have_memory(tmp_path: Path, batch_rows: int) -> None:
    """Those that are begun, and the one that the caller will work on; large ones share the memory of a few."""
    reader = write_collection(tmp_path, file_rows=[640]).open()
    reading = _Reading(reader.manifest, request_of(reader, batch_rows, 2**30, 2, 8), FRAMES)
    for _ in range(2):
        begun = len(reading._slots)
        most = reading._most_batches or 1_000
        assert reading._batches_nbytes() == min(begun + 1, most) * batch_rows * 16
        reading._start_jobs(batch_rows)
    assert begun > 1
    assert most == (3 if batch_rows == 64 else 1_000)
    reading.close()


@pytest.mark.parametrize("room", [2, 3, 7, 100])
def test_as_many_batches_are_begun_as_the_limit_has_room_for(tmp_path: Path, room: int) -> None:
    """With the one that the caller will work on; those that are needed in any case, and none too far ahead."""
    reader = write_collection(tmp_path, file_rows=[6_400]).open()
    request = request_of(reader, 64, 2**30, 5, 64)
    held = make_pace(reader.manifest, request, decodes_groups=False).reading_nbytes + cached_nbytes()
    for short, begun in ((0, min(room - 1, 21)), (1, max(1, min(room - 2, 21)))):
        exact = request._replace(limit_nbytes=held + room * 64 * 16 - short)
        reading = _Reading(reader.manifest, exact, FRAMES)
        reading._start_jobs(64)
        assert [*reading._slots] == [*range(begun)]  # a batch, and 20 pieces
        reading.close()


@pytest.mark.parametrize(("more", "metadata_stop", "begun"), [(-1, 50, 5), (0, 100, 5), (79, 100, 5), (80, 100, 6)])
def test_as_many_metadata_are_begun_as_the_limit_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, metadata_stop: int, begun: int
) -> None:
    """Batches of 10 rows of 8 bytes, and 50 rows of metadata at a time, each taken to weigh 256 bytes."""
    monkeypatch.setattr(pace, "_METADATA_ROWS", 50)
    monkeypatch.setattr(pace, "_LEAST_METADATA_ROWS", 1)
    table = pa.table({"n": np.arange(300)})
    written = write_collection(tmp_path, "parquet_npy", file_rows=[300], dimension=2, tables=[table])
    reader = written.open(meta_columns=["n"])
    request = request_of(reader, 10, 1, 2, 10)
    held = make_pace(reader.manifest, request, decodes_groups=False).reading_nbytes + cached_nbytes()
    limit = held + (5 + 1) * 80 + 50 * 256 + 50 * 256 + more
    reading = _Reading(reader.manifest, request._replace(limit_nbytes=limit), FRAMES)
    reading._start_jobs(10)
    assert (reading._metadata_stop, len(reading._slots)) == (metadata_stop, begun)
    reading.close()


@pytest.mark.parametrize("batch_rows", [1, 3_000, 8_192, 8_193])
def test_frames_of_row_numbers_are_made_for_some_batches_at_once(large: EmbeddingReader, batch_rows: int) -> None:
    """As many as have 8,192 rows, or one."""
    request = request_of(large, batch_rows, 2**30, 2)._replace(start=17)
    reading = _Reading(large.manifest, request, FRAMES)
    frames = list(reading._number_rows(20_017))
    assert len(frames) == max(1, 8_192 // batch_rows)
    assert {len(frame) for frame in frames} == {batch_rows}
    assert pd.concat(frames)["i"].tolist() == [*range(20_017, 20_017 + len(frames) * batch_rows)]
    assert sum(map(len, reading._number_rows(299_999))) == 1
    reading.close()


@pytest.mark.parametrize("kind", ["all", "shuffled", "few"])
def test_nothing_is_kept_when_the_loop_is_left_and_progress_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    told: list[Any] = []

    class Told:
        def update(self, n: int) -> None:
            told.append(n)

        def close(self) -> None:
            told.append("closed")

    def tell(*args: Any) -> Told:
        told.append(args)
        return Told()

    monkeypatch.setattr("dask_embedding_reader.batches.read.progress_bar", tell)
    reader = write_collection(tmp_path, file_rows=[3_000]).open()
    if kind != "all":
        reader = reader.shuffle(1) if kind == "shuffled" else reader.take([*range(7, 0, -1)])
    count = len(reader)
    assert sum(len(rows) for rows, _ in reader(3, 1, show_progress=True)) == count - 1
    begun = (True, count - 1, "reading", " embeddings", reader.byte_per_item)
    assert told == [begun, *[3] * ((count - 1) // 3), *([(count - 1) % 3] if (count - 1) % 3 else []), "closed"]
    told.clear()
    batches = reader(3, show_progress=False)
    next(batches)
    reading = batches.gi_frame.f_locals["reading"]
    if kind != "few":
        buffers = reading._source.buffers if kind == "shuffled" else reading._buffers
        array = buffers.take((2**20,), np.dtype(np.uint8))
    batches.close()
    assert told == [(False, count, *begun[2:]), 3, "closed"]
    if kind == "few":
        assert reading._vectors is None
    else:
        stopped = reading._stopped if kind == "shuffled" else reading._pool.closed
        assert stopped.is_set(), "what is read ends too"
        del array
        assert buffers.lent_nbytes == buffers.free_nbytes == 0


@pytest.mark.parametrize("kind", ["all", "shuffled", "every other"])
def test_a_limit_of_what_is_needed_is_enough(tmp_path: Path, kind: str) -> None:
    reader = write_collection(tmp_path, file_rows=[6_400]).open()
    if kind != "all":
        reader = reader.shuffle(1, buffer_rows=640) if kind == "shuffled" else reader.take(slice(None, None, 2))
    request = request_of(reader, 64, 2**30)
    if kind == "shuffled":
        projected = windows.project_windows(reader.manifest, request)
        needed = projected.batches + projected.ahead
    else:
        needed = project_batches(reader.manifest, request).batches
    with pytest.warns(UserWarning, match=rf"take (about )?{needed:,} bytes.*limit is {needed - 1:,} ") as told:
        reader(64, max_ram_usage_in_bytes=needed - 1)
    assert [warning.filename for warning in told] == [__file__]
    reader(64, max_ram_usage_in_bytes=needed)  # warnings are errors


def test_the_next_window_is_read_while_batches_are_picked_from_one(tmp_path: Path) -> None:
    reader = write_collection(tmp_path, file_rows=[1_200]).open().shuffle(1, buffer_rows=192)
    ends = [*reader.rows.windows(0, 1_200).tolist(), 1_200]
    batches = reader(50, show_progress=False)
    for number, _ in enumerate(batches, 1):
        begun = [window.stop for window in batches.gi_frame.f_locals["reading"]._windows]
        assert begun == [end for end in ends if end > 50 * number][:2]
    assert number == 24


def test_a_few_rows_are_read_at_once(tmp_path: Path) -> None:
    """A thousand, of 1 MB or half of the limit, whichever dtype is the larger one; of local files without groups."""
    reader = write_collection(tmp_path / "npy", file_rows=[2_000], dimension=512, dtype=np.float16).open()
    every_other = reader.take(slice(None, None, 2))
    for dtype, rows, limit, few in (
        ("f2", 1_000, 2**30, True),
        ("f2", 1_001, 2**30, False),
        ("f4", 512, 2**30, True),
        ("f4", 513, 2**30, False),
        ("i1", 1_000, 2**30, True),
        ("f2", 10, 2 * 10 * 1_024, True),
        ("f2", 10, 2 * 10 * 1_024 - 1, False),
    ):
        request = request_of(every_other, 10, limit)._replace(start=7, stop=7 + rows, dtype=np.dtype(dtype))
        assert are_few(reader.manifest, request) is few, (dtype, rows, limit)
    grouped = write_collection(tmp_path / "parquet", "parquet-list", file_rows=[20], columns=[]).open()
    assert not are_few(grouped.manifest, request_of(grouped.take([1, 3]), 10, 2**30))


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
