"""What is asked of a storage, request by request: nothing too early, nothing too much, nothing twice.

Remote collections are paid by the request and by the byte, so these tests count both on ``bucket://`` (see ``stores``),
which behaves as an object store does. Local files may be read by a shorter way than fsspec's; for them the kernel
counts.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.base import compute, optimize

from dask_embedding_reader import EmbeddingReader
from tests.support.stores import Bucket, Meeting, Request, emptied_bucket, read_twice

FILES, FILE_ROWS, DIMENSION = 4, 1000, 64
ROW_NBYTES = DIMENSION * 4
NPY_HEADER_NBYTES = 128
ROWS: npt.NDArray[np.float32] = (
    np.random.default_rng(0).standard_normal((FILES * FILE_ROWS, DIMENSION)).astype(np.float32)
)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An object store that counts."""
    with emptied_bucket() as store:
        yield store


def npy(rows: npt.NDArray[Any]) -> bytes:
    """An npy file."""
    with io.BytesIO() as f:
        np.save(f, rows)
        return f.getvalue()


def of_file(k: int) -> npt.NDArray[np.float32]:
    """The vectors of one file."""
    return ROWS[k * FILE_ROWS : (k + 1) * FILE_ROWS]


@pytest.fixture
def npy_url(bucket: Bucket) -> str:
    """Four npy files of 1000 rows."""
    for k in range(FILES):
        bucket.put(f"emb/{k}.npy", npy(of_file(k)))
    return "bucket://emb"


def noise(k: int, row_nbytes: int) -> pa.Array:
    """A column that no encoding makes smaller."""
    content = np.random.default_rng(100 + k).bytes(FILE_ROWS * row_nbytes)
    return pa.array([content[row * row_nbytes : (row + 1) * row_nbytes] for row in range(FILE_ROWS)], pa.binary())


@cache
def parquet(k: int, row_group_rows: int, storage: str = "list") -> bytes:
    """One parquet file: big columns that nobody asks for before, between and behind those that are read."""
    values = pa.array(of_file(k).reshape(-1))
    if storage == "list":
        offsets = pa.array(np.arange(FILE_ROWS + 1) * DIMENSION, pa.int32())
        embedding: pa.Array = pa.ListArray.from_arrays(offsets, values)
    else:
        embedding = pa.FixedSizeListArray.from_arrays(values, DIMENSION)
    table = pa.table(
        {
            "before": noise(k, 200),
            "caption": [f"caption {k * FILE_ROWS + row}" for row in range(FILE_ROWS)],
            "between": noise(k, 200),
            "embedding": embedding,
            "after": noise(k, 200),
            "id": pa.array(np.arange(k * FILE_ROWS, (k + 1) * FILE_ROWS)),
            "last": noise(k, 200),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_rows, use_dictionary=False, compression="none")
    return bytes(sink.getvalue())


def put_parquet(bucket: Bucket, row_group_rows: int = FILE_ROWS, storage: str = "list") -> str:
    """Four parquet files of 1000 rows, return the URL of their folder."""
    for k in range(FILES):
        bucket.put(f"emb/{k}.parquet", parquet(k, row_group_rows, storage))
    return "bucket://emb"


def column_ranges(bucket: Bucket, column: str) -> list[tuple[str, int, int]]:
    """Where the chunks of a column lie: (path, start, stop), one a row group."""
    ranges = []
    for path, stored in sorted(bucket.objects.items()):
        metadata = pq.read_metadata(io.BytesIO(stored.content))
        for group in range(metadata.num_row_groups):
            for k in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(k)
                if chunk.path_in_schema.split(".")[0] == column:
                    start = chunk.dictionary_page_offset or chunk.data_page_offset
                    ranges.append((path, start, start + chunk.total_compressed_size))
    return ranges


def bytes_within(reads: list[Request], ranges: list[tuple[str, int, int]]) -> int:
    """How many bytes of the ranges the reads delivered, twice what was delivered twice."""
    return sum(
        max(0, min(read.stop, stop) - max(read.start, start))
        for path, start, stop in ranges
        for read in reads
        if read.path == path
    )


def size_of(ranges: list[tuple[str, int, int]]) -> int:
    """Bytes of all ranges."""
    return sum(stop - start for _, start, stop in ranges)


# --------------------------------------------------------------------------------------------------------------------
# Opening


def test_opening_npy_lists_once_and_reads_headers_only(bucket: Bucket, npy_url: str) -> None:
    reader = EmbeddingReader(npy_url)
    assert reader.count == len(ROWS)
    assert len(bucket.of_kind("list")) == 1
    # The listing has told sizes and times: a HEAD for each file would double the round trips.
    assert [r.path for r in bucket.of_kind("head") if r.path != "emb"] == []
    assert len(bucket.reads) == FILES
    for read in bucket.reads:
        assert read.start == 0
        assert read.nbytes <= 4096


def test_a_folder_tree_is_listed_once(bucket: Bucket) -> None:
    for k in range(20):
        bucket.put(f"emb/{k % 5}/{k}/x.npy", npy(of_file(0)[:3]))
    assert EmbeddingReader("bucket://emb/").count == 60
    assert len(bucket.of_kind("list")) == 1


def test_a_long_header_costs_one_more_request(bucket: Bucket, npy_url: str) -> None:
    # Writers that append later leave room in the header: more than any first guess.
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {of_file(0).shape}}}".encode()
    header = text + b" " * (30_000 - 10 - len(text) - 1) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + of_file(0).tobytes()
    bucket.put("emb/long.npy", content)
    x = EmbeddingReader(npy_url).to_dask_array()
    assert len(bucket.reads) <= FILES + 2
    assert bucket.nbytes <= FILES * 4096 + 30_000 + 4096
    np.testing.assert_array_equal(x[-FILE_ROWS:].compute(), of_file(0))


def test_opening_parquet_lists_once_and_reads_footers_only(bucket: Bucket) -> None:
    url = put_parquet(bucket)
    # Large enough that a footer cannot be mistaken for the file.
    assert all(len(stored.content) > 1_000_000 for stored in bucket.objects.values())
    reader = EmbeddingReader(url, "parquet", meta_columns=["id"])
    assert reader.count == len(ROWS)
    assert len(bucket.of_kind("list")) == 1
    assert [r.path for r in bucket.of_kind("head") if r.path != "emb"] == []
    for path, stored in bucket.objects.items():
        reads = bucket.of_kind("read", path)
        assert len(reads) <= 2
        assert sum(read.nbytes for read in reads) <= 128 * 1024
        # No byte of the vectors, which lie before the last two columns.
        assert all(read.start > len(stored.content) // 2 for read in reads)


def test_opening_pairs_lists_each_folder_once(bucket: Bucket) -> None:
    for k in range(FILES):
        bucket.put(f"emb/{k}.npy", npy(of_file(k)))
        bucket.put(f"meta/{k}.parquet", parquet(k, FILE_ROWS))
    EmbeddingReader("bucket://emb", "parquet_npy", meta_columns=["id"], metadata_folder="bucket://meta")
    assert sorted(r.path for r in bucket.of_kind("list")) == ["emb", "meta"]
    assert all(len(bucket.of_kind("read", path)) <= 2 for path in bucket.objects)
    assert all(len(bucket.of_kind("read", f"emb/{k}.npy")) == 1 for k in range(FILES))


def test_a_list_of_files_is_not_listed_again_and_again(bucket: Bucket, npy_url: str) -> None:
    reader = EmbeddingReader([f"{npy_url}/{k}.npy" for k in range(FILES)])
    assert reader.count == len(ROWS)
    # What each file is has to be asked once; not whether it exists, then whether it is a folder, then its size.
    assert len(bucket.of_kind("head")) + len(bucket.of_kind("list")) <= 2 * FILES
    assert bucket.nbytes <= FILES * 4096


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_hundreds_of_files_are_opened_in_parallel(bucket: Bucket, file_format: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"embedding": pa.array(of_file(0)[:3].tolist(), pa.list_(pa.float32()))}), sink)
    content = npy(of_file(0)[:3]) if file_format == "npy" else bytes(sink.getvalue())
    for k in range(300):
        bucket.put(f"emb/{k:03}.{file_format}", content)
    # Whoever opens one by one never meets seven others here, however many cores there are: this is waiting, not work.
    meeting = Meeting(8)
    bucket.before_read = meeting.arrive
    reader = EmbeddingReader("bucket://emb", file_format, "embedding")  # else the first file is asked for it, alone
    assert reader.nb_files == 300
    assert meeting.peak >= 8


def test_the_order_of_files_does_not_depend_on_which_header_came_first(bucket: Bucket) -> None:
    for k in range(16):
        bucket.put(f"emb/{k:02}.npy", npy(np.full((2, 2), k, np.float32)))
    # Held back until others have arrived, the first header comes late.
    meeting = Meeting(4)
    bucket.before_read = lambda request: meeting.arrive(request) if request.path < "emb/04" else None
    reader = EmbeddingReader("bucket://emb")
    assert reader.to_dask_array().compute()[::2, 0].tolist() == list(range(16))


# --------------------------------------------------------------------------------------------------------------------
# Building


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_building_and_slicing_lazily_asks_for_nothing(bucket: Bucket, npy_url: str, file_format: str) -> None:
    put_parquet(bucket, 100)
    columns = None if file_format == "npy" else ["id", "caption"]
    reader = EmbeddingReader(npy_url, file_format, meta_columns=columns)
    bucket.forget()
    x = reader.to_dask_array(max_piece_size=70)
    frame = reader.to_dask_dataframe(max_piece_size=70)
    assert repr(reader)
    assert repr(x)
    assert repr(frame)
    assert len(reader) == len(x)
    assert [x.dtype, x.shape, x.chunks[0][0], x.nbytes]
    assert [frame.dtypes.to_dict(), frame.divisions, frame.npartitions, frame.columns.tolist()]
    assert [x[10:20], x[::3], x[:, 3], x.T, x[5], x.sum(axis=0), (x @ x[:3].T).astype("f2"), x.blocks[0]]
    assert [frame.loc[10:20], frame.partitions[0], frame.index]
    if columns is not None:
        assert [frame["id"].sum(), frame[["caption"]], frame[frame["id"] > 3]]
    assert reader.locate(5)
    assert x.__dask_graph__().keys()
    reader(batch_size=10, show_progress=False)
    assert reader.count
    assert bucket.requests == []


def test_reading_lists_nothing_again(bucket: Bucket, npy_url: str) -> None:
    reader = EmbeddingReader(npy_url)
    bucket.forget()
    reader.to_dask_array().compute()
    list(reader(batch_size=100, show_progress=False))
    assert bucket.of_kind("list") == []


# --------------------------------------------------------------------------------------------------------------------
# Slices of npy


def header_nbytes(bucket: Bucket, path: str) -> int:
    """Bytes before the vectors."""
    assert len(bucket.objects[path].content) == NPY_HEADER_NBYTES + FILE_ROWS * ROW_NBYTES
    return NPY_HEADER_NBYTES


@pytest.mark.parametrize(
    ("start", "stop", "files"), [(10, 20, [0]), (1995, 1999, [1]), (999, 1001, [0, 1]), (0, 1, [0]), (3990, 4000, [3])]
)
def test_a_slice_reads_its_rows_and_nothing_else(
    bucket: Bucket, npy_url: str, start: int, stop: int, files: list[int]
) -> None:
    x = EmbeddingReader(npy_url).to_dask_array()
    bucket.forget()
    np.testing.assert_array_equal(x[start:stop].compute(), ROWS[start:stop])
    assert bucket.nbytes == (stop - start) * ROW_NBYTES
    assert [read.path for read in sorted(bucket.reads)] == [f"emb/{k}.npy" for k in files]
    first = min(bucket.reads)
    assert first.start == header_nbytes(bucket, first.path) + (start - files[0] * FILE_ROWS) * ROW_NBYTES


@pytest.mark.parametrize(
    "derive", [lambda x: x[1234], lambda x: x[1234:1235], lambda x: x[-2766], lambda x: x[1234, :]]
)
def test_one_row_reads_one_row(bucket: Bucket, npy_url: str, derive: Callable[[Any], Any]) -> None:
    x = derive(EmbeddingReader(npy_url).to_dask_array())
    bucket.forget()
    np.testing.assert_array_equal(x.compute().reshape(-1), ROWS[1234])
    assert bucket.nbytes == ROW_NBYTES


def test_what_follows_a_slice_reads_no_more(bucket: Bucket, npy_url: str) -> None:
    x = EmbeddingReader(npy_url).to_dask_array(max_piece_size=100)
    bucket.forget()
    result = (x[1050:1070] * 2 + 1).sum(axis=1).compute()
    np.testing.assert_allclose(result, (ROWS[1050:1070] * 2 + 1).sum(axis=1), rtol=1e-5)
    assert bucket.nbytes == 20 * ROW_NBYTES


def test_a_slice_of_a_slice_reads_no_other_chunk(bucket: Bucket, npy_url: str) -> None:
    x = EmbeddingReader(npy_url).to_dask_array(max_piece_size=100)
    bucket.forget()
    np.testing.assert_array_equal(x[1000:2000][50:70].compute(), ROWS[1050:1070])
    # Dask merges no slice into a chunk that was asked for as a whole before.
    assert bucket.nbytes <= 100 * ROW_NBYTES


def test_columns_of_few_rows_read_few_rows(bucket: Bucket, npy_url: str) -> None:
    x = EmbeddingReader(npy_url).to_dask_array()
    bucket.forget()
    np.testing.assert_array_equal(x[10:20, 3:5].compute(), ROWS[10:20, 3:5])
    assert bucket.nbytes <= 10 * ROW_NBYTES
    bucket.forget()
    np.testing.assert_array_equal(x[10, 3].compute(), ROWS[10, 3])
    assert bucket.nbytes <= ROW_NBYTES


def test_steps_read_what_they_span_at_most(bucket: Bucket, npy_url: str) -> None:
    x = EmbeddingReader(npy_url).to_dask_array()
    bucket.forget()
    np.testing.assert_array_equal(x[100:200:10].compute(), ROWS[100:200:10])
    assert bucket.nbytes <= 100 * ROW_NBYTES


def test_a_range_given_to_the_array_is_as_good_as_a_slice(bucket: Bucket, npy_url: str) -> None:
    reader = EmbeddingReader(npy_url)
    bucket.forget()
    np.testing.assert_array_equal(reader.to_dask_array(990, 1010).compute(), ROWS[990:1010])
    assert bucket.nbytes == 20 * ROW_NBYTES
    assert len(bucket.reads) == 2


def test_a_cast_reads_no_more(bucket: Bucket, npy_url: str) -> None:
    x = EmbeddingReader(npy_url).to_dask_array(dtype="float64")
    bucket.forget()
    np.testing.assert_array_equal(x[10:20].compute(), ROWS[10:20].astype("f8"))
    assert bucket.nbytes == 10 * ROW_NBYTES


def test_a_slice_of_a_fortran_file_reads_its_rows_only(bucket: Bucket) -> None:
    # Columns lie one after the other: the rows are many short runs, or one longer one; not the file.
    bucket.put("emb/0.npy", npy(np.asfortranarray(of_file(0))))
    x = EmbeddingReader("bucket://emb").to_dask_array()
    bucket.forget()
    np.testing.assert_array_equal(x[10:20].compute(), ROWS[10:20])
    assert read_twice(bucket.reads) == []
    # From the first to the last wanted byte is all but the rest of the first and last column.
    assert bucket.nbytes <= FILE_ROWS * ROW_NBYTES


# --------------------------------------------------------------------------------------------------------------------
# All of npy


@pytest.mark.parametrize("max_piece_size", [None, 70, 1000, 2500])
def test_computing_everything_reads_each_byte_once(bucket: Bucket, npy_url: str, max_piece_size: int | None) -> None:
    x = EmbeddingReader(npy_url).to_dask_array(max_piece_size=max_piece_size)
    bucket.forget()
    np.testing.assert_array_equal(x.compute(), ROWS)
    assert bucket.nbytes == FILES * FILE_ROWS * ROW_NBYTES
    assert read_twice(bucket.reads) == []
    assert len(bucket.reads) <= max(x.numblocks[0], FILES)


def test_a_reduction_reads_each_byte_once(bucket: Bucket, npy_url: str) -> None:
    x = EmbeddingReader(npy_url).to_dask_array(max_piece_size=250)
    bucket.forget()
    mean, top = compute(x.mean(axis=0), abs(x).max())
    np.testing.assert_allclose(mean, ROWS.mean(axis=0), atol=1e-5)
    assert top == abs(ROWS).max()
    assert bucket.nbytes == ROWS.nbytes


@pytest.mark.parametrize("batch_size", [100, 256, 999, 1000, 5000])
@pytest.mark.parametrize("max_piece_size", [None, 300])
def test_the_batches_read_each_byte_once(
    bucket: Bucket, npy_url: str, batch_size: int, max_piece_size: int | None
) -> None:
    reader = EmbeddingReader(npy_url)
    bucket.forget()
    batches = [rows for rows, _ in reader(batch_size, max_piece_size=max_piece_size, show_progress=False)]
    np.testing.assert_array_equal(np.concatenate(batches), ROWS)
    assert bucket.nbytes == ROWS.nbytes
    assert read_twice(bucket.reads) == []


STORED: dict[str, Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]] = {
    "float32": lambda rows: rows,
    "float16": lambda rows: rows.astype("f2"),
    "big-endian": lambda rows: rows.astype(">f4"),
    "int8": lambda rows: (rows * 10).astype("i1"),
}


@pytest.mark.parametrize("stored", list(STORED))
def test_small_batches_do_not_multiply_the_requests(bucket: Bucket, stored: str) -> None:
    # The reference fetched 193 MB for 2.6 MB of data in batches of 256 rows. A cast is no excuse either.
    for k in range(FILES):
        bucket.put(f"emb/{k}.npy", npy(STORED[stored](of_file(k))))
    reader = EmbeddingReader("bucket://emb")
    for batch_size in (16, 256, 4000):
        bucket.forget()
        batches = [rows for rows, _ in reader(batch_size, show_progress=False)]
        np.testing.assert_array_equal(np.concatenate(batches), STORED[stored](ROWS).astype("f4"))
        assert bucket.nbytes == reader.total_size
        assert len(bucket.reads) <= 2 * FILES
        assert len(bucket.of_kind("head")) <= 2 * FILES


def test_small_batches_of_fortran_files_fetch_each_column_once(bucket: Bucket) -> None:
    for k in range(FILES):
        bucket.put(f"emb/{k}.npy", npy(np.asfortranarray(of_file(k))))
    reader = EmbeddingReader("bucket://emb")
    bucket.forget()
    batches = [rows for rows, _ in reader(16, show_progress=False)]
    np.testing.assert_array_equal(np.concatenate(batches), ROWS)
    assert bucket.nbytes == reader.total_size
    assert len(bucket.reads) <= 2 * FILES * DIMENSION


def test_a_range_of_batches_reads_that_range(bucket: Bucket, npy_url: str) -> None:
    reader = EmbeddingReader(npy_url)
    bucket.forget()
    batches = [rows for rows, _ in reader(100, 1950, 2150, show_progress=False)]
    np.testing.assert_array_equal(np.concatenate(batches), ROWS[1950:2150])
    assert bucket.nbytes == 200 * ROW_NBYTES
    assert {read.path for read in bucket.reads} == {"emb/1.npy", "emb/2.npy"}


def test_an_empty_range_reads_nothing(bucket: Bucket, npy_url: str) -> None:
    reader = EmbeddingReader(npy_url)
    bucket.forget()
    assert list(reader(10, 500, 500, show_progress=False)) == []
    assert reader.to_dask_array(500, 500).compute().shape == (0, DIMENSION)
    assert len(reader.to_dask_dataframe(500, 500).compute()) == 0
    assert bucket.reads == []


@pytest.mark.parametrize("parallel_pieces", [1, 3])
def test_as_many_pieces_are_read_in_parallel_as_asked(bucket: Bucket, npy_url: str, parallel_pieces: int) -> None:
    reader = EmbeddingReader(npy_url)
    # One more is waited for, and must not come.
    meeting = Meeting(parallel_pieces + 1, patience=0.5)
    bucket.before_read = meeting.arrive
    for _ in reader(100, max_piece_size=50, parallel_pieces=parallel_pieces, show_progress=False):
        pass
    assert meeting.peak == parallel_pieces


def test_metadata_that_nobody_asked_for_is_not_read(bucket: Bucket) -> None:
    for k in range(FILES):
        bucket.put(f"emb/{k}.npy", npy(of_file(k)))
        bucket.put(f"meta/{k}.parquet", parquet(k, FILE_ROWS))
    reader = EmbeddingReader("bucket://emb", "parquet_npy", metadata_folder="bucket://meta")
    bucket.forget()
    reader.to_dask_array().compute()
    list(reader(100, show_progress=False))
    frame = reader.to_dask_dataframe().compute()
    assert frame.index.tolist() == list(range(len(ROWS)))
    assert [read for read in bucket.reads if read.path.startswith("meta/")] == []


def test_the_array_of_a_pair_reads_no_metadata_and_the_frame_no_vectors(bucket: Bucket) -> None:
    for k in range(FILES):
        bucket.put(f"emb/{k}.npy", npy(of_file(k)))
        bucket.put(f"meta/{k}.parquet", parquet(k, 100))
    reader = EmbeddingReader("bucket://emb", "parquet_npy", meta_columns=["id"], metadata_folder="bucket://meta")
    bucket.forget()
    reader.to_dask_array().compute()
    assert {read.path.split("/")[0] for read in bucket.reads} == {"emb"}
    bucket.forget()
    assert reader.to_dask_dataframe().compute()["id"].tolist() == list(range(len(ROWS)))
    assert {read.path.split("/")[0] for read in bucket.reads} == {"meta"}


# --------------------------------------------------------------------------------------------------------------------
# parquet


UNASKED = ["before", "between", "after", "last"]
EVERYTHING: dict[str, Callable[[EmbeddingReader, int | None], Any]] = {
    "array": lambda reader, piece: reader.to_dask_array(max_piece_size=piece).compute(),
    "batches": lambda reader, piece: np.concatenate(
        [rows for rows, _ in reader(128, max_piece_size=piece, show_progress=False)]
    ),
}


@pytest.mark.parametrize("storage", ["list", "fixed_size_list"])
@pytest.mark.parametrize("row_group_rows", [100, 300, 1000])
@pytest.mark.parametrize("max_piece_size", [None, 64, 100, 450])
@pytest.mark.parametrize("way", list(EVERYTHING))
def test_vectors_are_fetched_once_and_nothing_beside_them(
    bucket: Bucket, storage: str, row_group_rows: int, max_piece_size: int | None, way: str
) -> None:
    # Also where a row group spans several pieces, and a piece several row groups.
    reader = EmbeddingReader(put_parquet(bucket, row_group_rows, storage), "parquet")
    bucket.forget()
    np.testing.assert_array_equal(EVERYTHING[way](reader, max_piece_size), ROWS)
    wanted = column_ranges(bucket, "embedding")
    assert bytes_within(bucket.reads, wanted) == size_of(wanted)
    for column in [*UNASKED, "caption", "id"]:
        assert bytes_within(bucket.reads, column_ranges(bucket, column)) == 0, column
    # A footer may be needed once more by each reader of a file, not by each piece.
    assert bucket.nbytes - size_of(wanted) <= FILES * 128 * 1024


@pytest.mark.parametrize("row_group_rows", [100, 1000])
@pytest.mark.parametrize("max_piece_size", [None, 64, 450])
def test_the_frame_fetches_its_columns_once_and_nothing_beside_them(
    bucket: Bucket, row_group_rows: int, max_piece_size: int | None
) -> None:
    reader = EmbeddingReader(put_parquet(bucket, row_group_rows), "parquet", meta_columns=["id", "caption"])
    bucket.forget()
    frame = reader.to_dask_dataframe(max_piece_size=max_piece_size).compute()
    assert frame["id"].tolist() == list(range(len(ROWS)))
    assert frame["caption"].iloc[-1] == f"caption {len(ROWS) - 1}"
    for column in ["id", "caption"]:
        wanted = column_ranges(bucket, column)
        assert bytes_within(bucket.reads, wanted) == size_of(wanted), column
    for column in [*UNASKED, "embedding"]:
        assert bytes_within(bucket.reads, column_ranges(bucket, column)) == 0, column


def test_a_projection_of_the_frame_reaches_the_reader(bucket: Bucket) -> None:
    reader = EmbeddingReader(put_parquet(bucket, 100), "parquet", meta_columns=["id", "caption"])
    ids = reader.to_dask_dataframe()["id"]
    bucket.forget()
    assert ids.sum().compute() == sum(range(len(ROWS)))
    wanted = column_ranges(bucket, "id")
    assert bytes_within(bucket.reads, wanted) == size_of(wanted)
    assert bytes_within(bucket.reads, column_ranges(bucket, "caption")) == 0


def test_batches_fetch_vectors_and_metadata_once(bucket: Bucket) -> None:
    reader = EmbeddingReader(put_parquet(bucket, 1000), "parquet", meta_columns=["caption"])
    bucket.forget()
    batches = list(reader(256, max_piece_size=100, show_progress=False))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), ROWS)
    # How long captions are, of which there may be few, the header of a dictionary tells, in one file for all.
    for column, looked_at in (("embedding", 0), ("caption", 128)):
        wanted = column_ranges(bucket, column)
        assert bytes_within(bucket.reads, wanted) == size_of(wanted) + looked_at, column
    for column in [*UNASKED, "id"]:
        assert bytes_within(bucket.reads, column_ranges(bucket, column)) == 0, column


@pytest.mark.parametrize("max_piece_size", [None, 20])
def test_a_slice_reads_its_row_groups_only(bucket: Bucket, max_piece_size: int | None) -> None:
    reader = EmbeddingReader(put_parquet(bucket, 100), "parquet", meta_columns=["id"])
    x = reader.to_dask_array(max_piece_size=max_piece_size)
    vectors, ids = column_ranges(bucket, "embedding"), column_ranges(bucket, "id")
    bucket.forget()
    np.testing.assert_array_equal(x[1210:1220].compute(), ROWS[1210:1220])
    assert {read.path for read in bucket.reads} == {"emb/1.parquet"}
    assert bytes_within(bucket.reads, vectors) == size_of(vectors[12:13])
    assert bytes_within(bucket.reads, ids) == 0


OLD_DASK = tuple(map(int, version("dask").split(".")[:2])) < (2026, 8)


@pytest.mark.parametrize(
    "max_piece_size",
    [
        100,
        # Row groups that span several partitions are read by a frame of their own that is repartitioned.
        pytest.param(20, marks=pytest.mark.skipif(OLD_DASK, reason="this Dask computes all that is repartitioned")),
    ],
)
def test_a_slice_of_the_frame_reads_its_row_groups_only(bucket: Bucket, max_piece_size: int) -> None:
    reader = EmbeddingReader(put_parquet(bucket, 100), "parquet", meta_columns=["id"])
    frame = reader.to_dask_dataframe(max_piece_size=max_piece_size)
    ids = column_ranges(bucket, "id")
    bucket.forget()
    assert frame.loc[1210:1219, "id"].compute().tolist() == list(range(1210, 1220))
    assert {read.path for read in bucket.reads} == {"emb/1.parquet"}
    assert bytes_within(bucket.reads, column_ranges(bucket, "embedding")) == 0
    assert bytes_within(bucket.reads, ids) == size_of(ids[12:13])


def test_a_range_of_parquet_batches_reads_its_row_groups_only(bucket: Bucket) -> None:
    reader = EmbeddingReader(put_parquet(bucket, 100), "parquet")
    vectors = column_ranges(bucket, "embedding")
    bucket.forget()
    batches = [rows for rows, _ in reader(64, 1150, 1350, show_progress=False)]
    np.testing.assert_array_equal(np.concatenate(batches), ROWS[1150:1350])
    assert bytes_within(bucket.reads, vectors) == size_of(vectors[11:14])


@pytest.mark.parametrize("way", list(EVERYTHING))
def test_a_row_group_of_tens_of_megabytes_is_fetched_once(bucket: Bucket, way: str) -> None:
    # Larger than what a reader may want to hold at once, as real files of one row group are.
    rows = np.random.default_rng(1).standard_normal((140_000, DIMENSION)).astype(np.float32)
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), DIMENSION)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=len(rows), use_dictionary=False, compression="none")
    bucket.put("emb/0.parquet", bytes(sink.getvalue()))
    reader = EmbeddingReader("bucket://emb", "parquet")
    bucket.forget()
    np.testing.assert_array_equal(EVERYTHING[way](reader, 10_000), rows)
    # Windows may overlap by a page at their borders.
    assert rows.nbytes <= bucket.nbytes <= rows.nbytes * 1.1
    assert len(bucket.reads) <= 12


class Decoded:
    """Counts the row groups that pyarrow was asked to decode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []
        for name in ("read_row_group", "read_row_groups", "iter_batches", "read"):
            monkeypatch.setattr(pq.ParquetFile, name, self._wrap(name, getattr(pq.ParquetFile, name)))

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(file: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "read_row_group":
                self.groups.append(args[0] if args else kwargs["i"])
            elif name == "read_row_groups":
                self.groups.extend(args[0] if args else kwargs["row_groups"])
            else:
                self.groups.extend(kwargs.get("row_groups") or range(file.num_row_groups))
            return original(file, *args, **kwargs)

        return counting


@pytest.mark.parametrize("way", [*EVERYTHING, "frame"])
@pytest.mark.parametrize("max_piece_size", [30, 250])
def test_a_row_group_of_many_pieces_is_decoded_once_a_pass(
    bucket: Bucket, way: str, max_piece_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta_columns = ["id"] if way == "frame" else None
    reader = EmbeddingReader(put_parquet(bucket, 500), "parquet", meta_columns=meta_columns)
    decoded = Decoded(monkeypatch)
    if way == "frame":
        assert reader.to_dask_dataframe(max_piece_size=max_piece_size).compute()["id"].sum() == sum(range(len(ROWS)))
    else:
        np.testing.assert_array_equal(EVERYTHING[way](reader, max_piece_size), ROWS)
    assert len(decoded.groups) <= FILES * 2


@pytest.mark.filterwarnings("ignore:Computing mixed collections:UserWarning")  # Dask's word on every array with a frame
def test_array_and_frame_computed_together_read_each_column_once(bucket: Bucket) -> None:
    reader = EmbeddingReader(put_parquet(bucket, 1000), "parquet", meta_columns=["id"])
    x, frame = reader.to_dask_array(max_piece_size=100), reader.to_dask_dataframe(max_piece_size=100)
    bucket.forget()
    rows, table = compute(x, frame)
    np.testing.assert_array_equal(rows, ROWS)
    assert table["id"].tolist() == list(range(len(ROWS)))
    for column in ("embedding", "id"):
        wanted = column_ranges(bucket, column)
        assert bytes_within(bucket.reads, wanted) == size_of(wanted), column


def test_a_column_whose_name_begins_like_another_is_not_mistaken(bucket: Bucket) -> None:
    # pyarrow takes a column name for a path into a nested column, where a dot separates the levels.
    table = {
        "a": [1, 2],
        "a.b": ["x", "y"],
        "embedding": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
        "embedding.list": [5, 6],
        "embedding.list.element": [7, 8],
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    bucket.put("emb/0.parquet", bytes(sink.getvalue()))
    for columns in (["a"], ["a.b"], ["a.b", "a"], ["embedding.list"], ["embedding.list.element", "a"]):
        reader = EmbeddingReader("bucket://emb", "parquet", meta_columns=columns)
        assert reader.to_dask_array().compute().tolist() == [[1.0, 2.0], [3.0, 4.0]]
        frame = reader.to_dask_dataframe().compute()
        assert {name: frame[name].tolist() for name in frame} == {name: table[name] for name in columns}
        ((rows, meta),) = reader(5, show_progress=False)
        assert rows.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert list(meta) == [*columns, "i"]


# --------------------------------------------------------------------------------------------------------------------
# Keys

NAMES_PROGRAM = """
import sys
from pathlib import Path
from tests.formats.test_exact_reads import names
for file_format in ("npy", "parquet"):
    for arguments in ({}, {"max_piece_size": 3}, {"start": 2, "end": 9}):
        print(names(Path(sys.argv[1]), file_format, **arguments))
"""


def write_local(folder: Path, rows: int = 10) -> Path:
    """Two files of so many rows, in npy and parquet."""
    folder.mkdir(exist_ok=True)
    for k in range(2):
        np.save(folder / f"{k}.npy", of_file(k)[:rows])
        table = {"embedding": pa.array(of_file(k)[:rows].tolist(), pa.list_(pa.float32())), "id": list(range(rows))}
        pq.write_table(pa.table(table), folder / f"{k}.parquet")
    return folder


def names(folder: Path, file_format: str = "npy", **arguments: Any) -> tuple[str, tuple[str, ...]]:
    """Key names of array and frame."""
    reader = EmbeddingReader(folder, file_format, meta_columns=None if file_format == "npy" else ["id"])
    frame = reader.to_dask_dataframe(**arguments).optimize()
    return reader.to_dask_array(**arguments).name, tuple(sorted(map(str, frame.dask)))


def test_keys_are_the_same_in_every_process(tmp_path: Path) -> None:
    folder = write_local(tmp_path / "emb")
    result = subprocess.run(
        [sys.executable, "-c", NAMES_PROGRAM, str(folder)],
        # Another seed than ours: nothing may depend on the order of a set or on hash().
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONWARNINGS": "ignore"},
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    here = [
        names(folder, file_format, **arguments)
        for file_format in ("npy", "parquet")
        for arguments in ({}, {"max_piece_size": 3}, {"start": 2, "end": 9})
    ]
    assert result.stdout.splitlines() == [str(pair) for pair in here]
    assert all(array.startswith("embeddings-") for array, _ in here)


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
@pytest.mark.parametrize("change", ["time", "size", "neither", "another file", "one file less"])
def test_keys_change_with_the_files(tmp_path: Path, file_format: str, change: str) -> None:
    # A cache or a cluster that still holds the old chunk must not take it for the new one.
    folder = write_local(tmp_path / "emb")
    path = folder / f"1.{file_format}"
    array_before, frame_before = names(folder, file_format)
    state = path.stat()
    if change == "time":
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    elif change == "size":
        write_local(folder, 9)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "neither":
        other = folder / "new"
        other.write_bytes(path.read_bytes())
        os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
        other.replace(path)
    elif change == "another file":
        (folder / f"2.{file_format}").write_bytes(path.read_bytes())
    else:
        path.unlink()
    array_after, frame_after = names(folder, file_format)
    assert array_after != array_before
    assert file_format == "npy" or frame_after != frame_before


def test_keys_are_equal_for_equal_arguments_only(tmp_path: Path) -> None:
    folder = write_local(tmp_path / "emb")
    reader = EmbeddingReader(folder)
    variants: list[dict[str, Any]] = [
        {},
        {"start": 1},
        {"end": 5},
        {"max_piece_size": 3},
        {"max_piece_size": 4},
        {"dtype": "float64"},
        {"dtype": "float16"},
    ]
    found = [reader.to_dask_array(**arguments).name for arguments in variants]
    assert len(set(found)) == len(variants)
    assert found == [EmbeddingReader(f"{folder}/").to_dask_array(**arguments).name for arguments in variants]
    assert all(name.startswith("embeddings-") for name in found)
    # Said in another way, the same.
    assert reader.to_dask_array(0, 20, dtype=np.float32).name == found[0]
    assert reader.to_dask_array(0, 10**9).name == found[0]


def test_different_columns_have_different_keys(tmp_path: Path) -> None:
    folder = write_local(tmp_path / "emb")
    for k in range(2):
        table = {
            "embedding": pa.array(of_file(k)[:10].tolist(), pa.list_(pa.float32())),
            "x": [1.0] * 10,
            "y": [2] * 10,
        }
        table["other"] = pa.array((of_file(k)[:10] + 1).tolist(), pa.list_(pa.float32()))
        pq.write_table(pa.table(table), folder / f"{k}.parquet")
    frames = [
        EmbeddingReader(folder, "parquet", meta_columns=columns).to_dask_dataframe() for columns in (["x"], ["y"])
    ]
    keys = [{str(key) for key in frame.optimize().__dask_keys__()} for frame in frames]
    assert not keys[0] & keys[1]
    arrays = [EmbeddingReader(folder, "parquet", column).to_dask_array() for column in ("embedding", "other")]
    assert arrays[0].name != arrays[1].name
    np.testing.assert_array_equal(*compute(arrays[0] + 1, arrays[1]))


# --------------------------------------------------------------------------------------------------------------------
# Graphs


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A file of ten million rows that takes no room on the disk."""
    rows, dimension = 10_000_000, 8
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)})
    path = tmp_path / "emb" / "0.npy"
    path.parent.mkdir()
    path.write_bytes(header.getvalue())
    os.truncate(path, len(header.getvalue()) + rows * dimension * 4)
    return path.parent


def test_a_hundred_thousand_chunks_are_one_lazy_layer(sparse: Path) -> None:
    x = EmbeddingReader(sparse).to_dask_array(max_piece_size=100)
    assert x.numblocks == (100_000, 1)
    assert len(x.dask.layers) == 1
    (layer,) = x.dask.layers.values()
    # A dictionary of tasks of that size takes seconds to build, to optimise and to send.
    assert not layer.is_materialized()
    assert len(cloudpickle.dumps(x.dask)) < 2_000_000


def test_ten_rows_of_a_hundred_thousand_chunks_are_a_few_tasks(sparse: Path) -> None:
    rows = np.arange(80, dtype=np.float32).reshape(10, 8)
    with open(sparse / "0.npy", "r+b") as file:
        file.seek(-(10_000_000 - 5_000_050) * rows[0].nbytes, os.SEEK_END)
        file.write(rows.tobytes())
    x = EmbeddingReader(sparse).to_dask_array(max_piece_size=100)
    (part,) = optimize(x[5_000_050:5_000_060])
    assert len(dict(part.dask)) <= 2
    np.testing.assert_array_equal(part.compute(scheduler="synchronous"), rows)


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_a_task_carries_its_piece_and_not_the_collection(bucket: Bucket, npy_url: str, file_format: str) -> None:
    # 500 files make a manifest of far more bytes than one task may have.
    sink = pa.BufferOutputStream()
    table = pa.table({"embedding": pa.array(of_file(0)[:4].tolist(), pa.list_(pa.float32())), "id": [1, 2, 3, 4]})
    pq.write_table(table, sink)
    content = npy(of_file(0)[:4]) if file_format == "npy" else bytes(sink.getvalue())
    for k in range(500):
        bucket.put(f"many/{k:03}-with-a-name-of-some-length.{file_format}", content)
    meta_columns = None if file_format == "npy" else ["id"]
    reader = EmbeddingReader("bucket://many", file_format, meta_columns=meta_columns)
    (x,) = optimize(reader.to_dask_array())
    tasks = dict(x.dask)
    # A chunk is one task: not a task to open, one to read and one to slice.
    assert len(tasks) <= 500 * (1 if file_format == "npy" else 2) + 2
    # Small files share a chunk, whose task names each of them.
    files = max(x.chunks[0]) // 4
    assert max(len(cloudpickle.dumps(task)) for task in tasks.values()) < 1_024 + 128 * files
    if file_format == "parquet":
        tasks = dict(reader.to_dask_dataframe().optimize().dask)
        assert len(tasks) <= 500 * 2 + 2
        assert max(len(cloudpickle.dumps(task)) for task in tasks.values()) < 8192


def test_the_whole_graph_of_many_files_is_small(bucket: Bucket) -> None:
    content = npy(of_file(0)[:4])
    for k in range(500):
        bucket.put(f"many/{k:03}.npy", content)
    x = EmbeddingReader("bucket://many").to_dask_array()
    # What goes to a scheduler: it must not hold the collection once for each chunk.
    assert len(cloudpickle.dumps(x.dask)) < 500 * 400


# --------------------------------------------------------------------------------------------------------------------
# Local files, counted by the kernel

RCHAR_PROGRAM = """
import sys
import numpy as np
from dask_embedding_reader import EmbeddingReader

def rchar():
    with open("/proc/self/io") as f:
        return int(f.readline().split()[1])

def work(folder, rows):
    marks = [rchar()]
    reader = EmbeddingReader(folder)
    marks.append(rchar())
    x = reader.to_dask_array(max_piece_size=20_000)
    repr(x)
    marks.append(rchar())
    x[rows : rows + 10].compute()
    marks.append(rchar())
    float(x.sum().compute())
    marks.append(rchar())
    for _ in reader(1000, show_progress=False):
        pass
    marks.append(rchar())
    return np.diff(marks).tolist()

work(sys.argv[1], 1)  # imports are read too
print(*work(sys.argv[2], 30_000))
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes of a process")
def test_local_files_are_read_as_sparingly(tmp_path: Path) -> None:
    for name, rows in (("warm", 100), ("emb", 50_000)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.ones((rows, DIMENSION), np.float32))
    total = 50_000 * ROW_NBYTES
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RCHAR_PROGRAM), str(tmp_path / "warm"), str(tmp_path / "emb")],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=True,
        capture_output=True,
        text=True,
    )
    opening, building, slicing, summing, batches = map(int, result.stdout.split())
    # The counter itself and the tables of the system that libraries look up are in these numbers.
    assert opening < 100_000
    assert building < 100_000
    assert slicing < 100_000
    assert summing < total * 1.05 + 100_000
    assert batches < total * 1.05 + 100_000
