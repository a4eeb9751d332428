"""Rows in any order, window by window, and rows that ascend, file by file: what is read in one go, in what memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.budget import cached_nbytes
from dask_embedding_reader._common.memory import has_own_memory
from dask_embedding_reader.batches import few, pace, selected, windows
from dask_embedding_reader.batches.metadata import FRAMES, TABLES
from dask_embedding_reader.batches.pace import metadata_row_nbytes
from dask_embedding_reader.batches.pieces import use_pieces
from dask_embedding_reader.batches.request import BatchRequest
from dask_embedding_reader.batches.windows import WindowReading, project_windows
from dask_embedding_reader.collection.plan import selection_cuts
from dask_embedding_reader.rows.picked import pick
from tests.collection.test_small_files import in_groups, table_of
from tests.support.collections import write_collection


@given(st.lists(st.integers(0, 2**40), max_size=50) | st.lists(st.integers(0, 5), max_size=50))
def test_rows_are_sorted_and_each_is_found_again(numbers: list[int]) -> None:
    ascending, ranks = windows._sort(np.array(numbers, np.int64))
    assert ascending.tolist() == sorted(numbers)
    assert ascending[ranks].tolist() == numbers
    assert sorted(ranks.tolist()) == [*range(len(numbers))]


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(sum), st.integers(0, 4), st.integers(1, 9), st.data()
)
def test_a_window_is_read_in_parts_of_one_file_or_row_group(
    file_rows: list[int], group_rows: int, part_rows: int, data: st.DataObject
) -> None:
    files = table_of(file_rows, in_groups(file_rows, group_rows))
    numbers = np.array(sorted(data.draw(st.lists(st.integers(0, files.count - 1), min_size=1))), np.int64)
    parts = list(windows._parts(files, numbers, part_rows))
    lengths = [len(picked.rows) for _, picked in parts]
    assert min(lengths) > 0
    assert [place for place, _ in parts] == np.cumsum([0, *lengths])[:-1].tolist()
    assert np.concatenate([picked.rows + picked.first_row for _, picked in parts]).tolist() == numbers.tolist()
    # Row groups of a file, or so many rows of it at a time.
    of_file = np.searchsorted(files.offsets, numbers, "right")
    if group_rows:
        groups = np.concatenate([[0], np.cumsum([rows for one in in_groups(file_rows, group_rows) for rows in one])])
        unit = np.searchsorted(groups, numbers, "right")
    else:
        unit = (np.arange(len(numbers)) - np.searchsorted(of_file, of_file)) // part_rows
    expected = np.flatnonzero((np.diff(of_file) != 0) | (np.diff(unit) != 0)) + 1
    assert [place for place, _ in parts][1:] == expected.tolist()


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(sum),
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(0, 9),
    st.data(),
)
def test_rows_that_ascend_are_read_by_file_or_row_group_in_pieces_that_end_where_batches_do(
    file_rows: list[int], group_rows: int, piece_rows: int, batch_rows: int, data: st.DataObject
) -> None:
    """What decodes a row group is shared by its pieces: it is opened for all of them."""
    files = table_of(file_rows, in_groups(file_rows, group_rows))
    rows = pick(np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=files.count, max_size=files.count))))
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    bounds = range(start, stop, batch_rows) if batch_rows else range(0)
    opened: list[tuple[int, int, bool]] = []

    def open_rows(first: int, last: int, *, at_once: bool) -> Any:
        opened.append((first, last, at_once))
        return len(opened)

    reads = list(selected._in_order(files, rows, (start, stop), piece_rows, bounds, open_rows))
    assert [(read.start, read.stop) for read in reads] == [
        *pairwise([start, *(read.stop for read in reads)]),
    ]
    assert not reads or reads[-1].stop == stop
    cuts = (start + selection_cuts(files, rows[start:stop], piece_rows)).tolist()
    expected = []
    for first, last in pairwise(cuts):
        ends = [
            end for end in range(first + 1, last + 1) if end == last or end in bounds or (end - first) % piece_rows == 0
        ]
        for a, b in pairwise([first, *ends]):
            shared = group_rows > 0 and len(ends) > 1
            expected.append(((a, b), (first, last, False) if shared else (a, b, True)))
    for read, (span, what) in zip(reads, expected, strict=True):
        read.open()
        assert ((read.start, read.stop), opened[-1]) == (span, what)
    for before, read in pairwise(reads):
        before.open(), read.open()
        assert (before.open is read.open) is (opened[-2] == opened[-1])


@pytest.mark.parametrize("numbers", [[0], [3], [6, 1, 1, 5], [5, 6, 4], [0, 1, 2, 3, 4, 5, 6]])
def test_metadata_of_files_that_hold_them_as_other_types_come_as_one(tmp_path: Path, numbers: list[int]) -> None:
    """Whether rows of one file are wanted or of several, in any order and more than once."""
    texts = pa.array([f"{row}" for row in range(7)])
    parts = [
        pa.table({"n": pa.array([0, 1, 2, 3], pa.int16()), "text": texts[:4].cast(pa.large_string())}),
        pa.table({"n": pa.array([4, 5, 6], pa.int64()), "text": texts[4:]}),
    ]
    written = write_collection(tmp_path, "parquet_npy", file_rows=[4, 3], dimension=2, tables=parts)
    manifest = written.open(meta_columns=["n", "text"]).manifest
    assert manifest.metadata is not None
    frame = selected.read_metadata(manifest, manifest.metadata, np.array(numbers), FRAMES)
    assert frame.to_dict("list") == {"n": numbers, "text": [f"{row}" for row in numbers], "i": numbers}
    assert frame["n"].dtype == np.int64
    assert [*frame.index] == [*range(len(numbers))]
    table = selected.read_metadata(manifest, manifest.metadata, np.array(numbers), TABLES)
    assert table.to_pydict() == {"n": numbers, "text": [f"{row}" for row in numbers]}
    assert table.schema.field("n").type == pa.int64()


@pytest.mark.parametrize("metadata_rows", [1, 3, 8, 100])
@pytest.mark.parametrize("batch_rows", [1, 5, 100])
def test_picked_metadata_of_a_row_group_are_decoded_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata_rows: int, batch_rows: int
) -> None:
    """By one reader, from the first row that is picked to the last one."""
    monkeypatch.setattr(few, "_MOST_ROWS", 0)
    monkeypatch.setattr(pace, "_METADATA_ROWS", metadata_rows)
    monkeypatch.setattr(pace, "_LEAST_METADATA_ROWS", 1)
    table = pa.table({"n": np.arange(60)})
    written = write_collection(tmp_path, "parquet_npy", file_rows=[60], dimension=2, tables=[table], row_group_rows=30)
    for cut in (slice(2, 58, 3), slice(29, 31), slice(1, 60, 28), slice(5, 6)):
        view = written.open(meta_columns=["n"]).take([*range(60)[cut], 59])
        batches = view(batch_rows, show_progress=False)
        found = [row for _, frame in batches for row in frame["n"]]
        assert found == [*range(60)[cut], 59]


# ---------------------------------------------------------------------------------------------------------------------
# In how much memory


def request_of(reader: EmbeddingReader, batch_size: int, limit: int, **options: Any) -> BatchRequest:
    """What batches are asked for, within a limit beside what is kept anyway."""
    given_ = {"max_piece_size": None, "parallel_pieces": 2, "show_progress": False, "dtype": None, **options}
    return reader._request(batch_size, 0, None, max_ram_usage_in_bytes=limit + cached_nbytes(), **given_)


@pytest.fixture
def shuffled(tmp_path: Path) -> EmbeddingReader:
    """1,000 rows of 8 bytes and a number, in windows of 192."""
    table = pa.table({"n": np.arange(1_000)})
    written = write_collection(tmp_path, "parquet_npy", file_rows=[1_000], dimension=2, tables=[table])
    reader: EmbeddingReader = written.open(meta_columns=["n"]).shuffle(1, buffer_rows=192)
    return reader


@pytest.mark.parametrize("dtype", [None, np.float64, np.float16])
def test_the_next_window_is_read_where_both_fit_else_a_quarter_of_the_limit(
    shuffled: EmbeddingReader, dtype: Any
) -> None:
    manifest = shuffled.manifest
    assert shuffled.rows.window_rows == 192
    projected = project_windows(manifest, request_of(shuffled, 10, 2**30, dtype=dtype))
    made = 2 * np.dtype(dtype or np.float32).itemsize
    held = min(made, 8)
    for limit, ahead, most in (
        (projected.needed + projected.ahead, True, 192),
        (projected.needed + projected.ahead - 1, False, 192),
        (4 * 191 * (held + metadata_row_nbytes(manifest)), False, 191),
        (4 * 191 * (held + metadata_row_nbytes(manifest)) - 1, False, 190),
        (1, False, 1),
    ):
        request = request_of(shuffled, 10, limit, dtype=dtype)
        if not ahead and most < 192:  # of the whole limit, whatever is kept
            request = request._replace(limit_nbytes=limit)
        reading = WindowReading(manifest, request, FRAMES)
        spans = [*reading._spans]
        reading.close()
        assert reading._ahead is ahead
        assert max(stop - start for start, stop in spans) == max(-(-192 // -(-192 // most)), -(-40 // -(-40 // most)))
        assert sum(stop - start for start, stop in spans) == 1_000
        assert reading._source.dtype == np.dtype(np.float16 if dtype is np.float16 else np.float32)


@pytest.mark.parametrize("batch_rows", [10, 50])
def test_memory_of_two_windows_and_two_batches_is_kept(shuffled: EmbeddingReader, batch_rows: int) -> None:
    reading = WindowReading(shuffled.manifest, request_of(shuffled, batch_rows, 2**30, dtype=np.float64), FRAMES)
    buffers = reading._source.buffers
    most = 2 * 192 * 8 + 2 * batch_rows * 16
    for nbytes, kept in ((most, most), (most + 1, 0)):
        array = buffers.take((nbytes,), np.dtype(np.uint8))
        del array
        assert buffers.free_nbytes == kept
    reading.close()


@pytest.mark.parametrize(("rows", "own"), [(2**17, False), (2**17 - 1, True)])
def test_large_batches_are_made_in_memory_that_is_used_again(tmp_path: Path, rows: int, own: bool) -> None:
    np.save(tmp_path / "0.npy", np.zeros((2**17, 2), np.float32))
    batch, _ = next(EmbeddingReader(tmp_path).shuffle(1)(rows, show_progress=False))
    assert has_own_memory(batch)
    assert batch.flags.owndata is own


def test_a_window_that_is_done_is_let_go_of_before_the_next_is_read(shuffled: EmbeddingReader) -> None:
    """Batches with rows of two windows have those of both, with their metadata; none is kept behind."""
    rows = np.asarray(shuffled.rows)
    for form in (FRAMES, TABLES):
        reading = WindowReading(shuffled.manifest, request_of(shuffled, 70, 2**30), form)
        for start in range(0, 1_000, 70):
            stop = min(start + 70, 1_000)
            reading.finish(stop)
            _, frame = reading.take(start, stop)
            assert frame["n"].to_numpy().tolist() == rows[start:stop].tolist()
            begun = [first for first in range(0, 1_000, 192) if min(first + 192, 1_000) > stop][:2]
            assert [window.start for window in reading._windows] == begun
        reading.close()
        assert not reading._windows
        assert reading._source.buffers.free_nbytes == 0


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that are used where they are read


class Counted:
    """Progress that counts."""

    rows = 0

    def update(self, n: int) -> None:
        """Add rows."""
        self.rows += n


@pytest.mark.parametrize("piece_rows", [1, 7, 30, 1_000])
@pytest.mark.parametrize(("start", "stop"), [(0, 90), (5, 71), (30, 30), (10, 11)])
def test_pieces_are_used_once_each_in_memory_of_their_thread(
    tmp_path: Path, piece_rows: int, start: int, stop: int
) -> None:
    written = write_collection(tmp_path, "npy", file_rows=[30, 0, 60], dimension=3, dtype=np.float16)
    used: list[tuple[int, npt.NDArray[Any]]] = []
    progress: Any = Counted()
    use_pieces(
        written.open().manifest,
        start,
        stop,
        piece_rows,
        np.dtype(np.float64),
        lambda first, rows: used.append((first, rows.copy())),
        progress,
    )
    used.sort(key=lambda one: one[0])
    ends = [start, *(first + len(rows) for first, rows in used)]
    assert [first for first, _ in used] == ends[:-1]
    assert ends[-1] == stop
    assert max((len(rows) for _, rows in used), default=0) <= piece_rows
    for first, rows in used:
        np.testing.assert_array_equal(rows, written.rows[first : first + len(rows)].astype(np.float64))
    assert progress.rows == stop - start


def test_what_goes_wrong_in_one_piece_ends_all(tmp_path: Path) -> None:
    written = write_collection(tmp_path, "npy", file_rows=[1_000], dimension=3)
    used: list[int] = []

    def use(first: int, rows: npt.NDArray[Any]) -> None:
        used.append(first)
        raise ValueError("no more")

    progress: Any = Counted()
    with pytest.raises(ValueError, match="no more"):
        use_pieces(written.open().manifest, 0, 1_000, 1, np.dtype(np.float32), use, progress)
    assert len(used) <= written.open().manifest.vectors.connections
    assert progress.rows == 0
