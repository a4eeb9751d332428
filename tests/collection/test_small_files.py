"""Small files share pieces: chunks of the array, partitions of the frame, and what batches read at once."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import combinations_with_replacement, compress, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.base import compute
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, FileChangedError, iter_batches, write_embeddings
from dask_embedding_reader._common.arguments import ALL_ROWS
from dask_embedding_reader.batches.jobs import Pool, jobs_of_plan
from dask_embedding_reader.collection import plan
from dask_embedding_reader.collection.files import FileTable, file_table
from dask_embedding_reader.formats.base import FileHeader, FilePart
from dask_embedding_reader.rows.picked import pick
from dask_embedding_reader.rows.selection import Rows
from dask_embedding_reader.rows.shuffled import shuffle
from dask_embedding_reader.rows.stretch import Stretch
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.collections import (
    WITH_METADATA,
    Collection,
    assert_batches,
    assert_same_frame,
    assert_same_rows,
    write_collection,
)
from tests.support.stores import Bucket, Meeting, emptied_bucket, read_twice

FILE_ROWS = [(0, 1, 4, 3, 9)[number % 5] for number in range(40)]
FORMATS = ["npy", "npy-mixed", "npz-deflated", "arrow", "parquet-list", "parquet_npy"]


@pytest.fixture(params=FORMATS)
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Collection:
    """40 files of few rows."""
    columns = ["id", "caption"] if request.param in WITH_METADATA else None
    return write_collection(tmp_path, request.param, file_rows=FILE_ROWS, columns=columns, row_group_rows=3)


def test_chunks_are_several_files_and_partitions_the_same(collection: Collection) -> None:
    reader = collection.open()
    x, frame = reader.to_dask_array(), reader.to_dask_dataframe()
    assert x.numblocks[0] == frame.npartitions == 16  # of 32 files that have rows
    assert set(np.cumsum(x.chunks[0])) < set(collection.boundaries)
    assert (reader.shape, reader.chunks) == (x.shape, x.chunks)
    assert_same_rows(x.compute(), collection.rows)
    parts = compute(*frame.to_delayed())
    assert tuple(map(len, parts)) == x.chunks[0]
    for part, stop in zip(parts, np.cumsum(x.chunks[0]).tolist(), strict=True):
        assert_same_frame(part, collection.frame(stop - len(part), stop))
    for index in (slice(3, 120), slice(120, 20, -7), [70, 3, 3, -1], 101):
        np.testing.assert_array_equal(x[index].compute(), collection.rows[index])
    assert_same_frame(frame.loc[12:77].compute(), collection.frame(12, 78))


@pytest.mark.parametrize("size", [None, 2, 5])
def test_batches_and_batches_of_lazy_arrays(collection: Collection, size: int | None) -> None:
    reader = collection.open()
    for batch_size, start in ((1, 0), (7, 3), (50, 0), (1000, 33)):
        assert_batches(reader(batch_size, start, max_piece_size=size), collection, batch_size, start)
    x, frame = (each(max_piece_size=size) for each in (reader.to_dask_array, reader.to_dask_dataframe))
    assert_batches(iter_batches(x, frame, batch_size=11), collection, 11, dtype=None, of_frame=True)


def test_views_and_what_is_written(collection: Collection, tmp_path: Path) -> None:
    reader = collection.open()
    rows = np.random.default_rng(0).permutation(len(collection))[:40]
    for view, expected in ((reader.take(slice(5, 120)), np.arange(5, 120)), (reader.take(rows), rows)):
        np.testing.assert_array_equal(view.to_dask_array().compute(), collection.rows[expected])
        assert view.to_dask_dataframe().compute().index.tolist() == expected.tolist()
        np.testing.assert_array_equal(np.concatenate([x for x, _ in view(9)]), collection.rows[expected])
    write_embeddings(reader.to_dask_array(), tmp_path / "out")
    assert_same_rows(EmbeddingReader(tmp_path / "out").to_dask_array().compute(), collection.rows)


def test_names_of_chunks_depend_on_the_files_alone(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet_npy", file_rows=FILE_ROWS, columns=["id"])
    reader = collection.open()
    x, frame = reader.to_dask_array(), reader.to_dask_dataframe()
    assert collection.open().to_dask_array().name == x.name
    assert collection.open().to_dask_dataframe()._name == frame._name
    assert pickle.loads(pickle.dumps(x)).name == x.name
    os.utime(collection.files[29], (1, 1))
    assert collection.open().to_dask_array().name != x.name
    # One chunk a file is still there for who wants it.
    assert reader.to_dask_array(chunks=-1).chunks[0] == tuple(filter(None, FILE_ROWS))
    assert reader.to_dask_dataframe(chunks=-1).npartitions == 32
    # No number means that, however large it is.
    for most in (2**62, 10**30):
        assert reader.to_dask_array(chunks=most).chunks == reader.to_dask_array(chunks=10**6).chunks


def test_few_files_stay_chunks(tmp_path: Path) -> None:
    reader = write_collection(tmp_path, file_rows=[3] * 16).open()
    assert reader.to_dask_array().chunks[0] == (3,) * 16


def test_tasks_of_many_files_are_small(tmp_path: Path) -> None:
    folder = tmp_path / "some-collection-of-embeddings" / "of-long-names"
    folder.mkdir(parents=True)
    for number in range(2_000):
        np.save(folder / f"part-{number:08}-of-00002000.npy", np.ones((1, 2), np.float32))
    x = EmbeddingReader(folder).to_dask_array()
    assert x.numblocks[0] == 32
    assert max(len(pickle.dumps(task)) for task in dict(x.__dask_graph__()).values()) < 64 * 300


@pytest.mark.parametrize("file_format", ["npy", "parquet_npy"])
def test_the_file_that_changed_is_named(file_format: str, tmp_path: Path) -> None:
    columns = ["id"] if file_format == "parquet_npy" else None
    collection = write_collection(tmp_path, file_format, file_rows=[4] * 100, columns=columns)
    reader = collection.open()
    x, frame = reader.to_dask_array(), reader.to_dask_dataframe()
    collection.files[41].write_bytes(collection.files[41].read_bytes()[:-4])
    for read in (lambda: x.compute(), lambda: x[165:166].compute(), lambda: list(reader(7))):
        with pytest.raises(FileChangedError, match=collection.files[41].name):
            read()
    np.testing.assert_array_equal(x[:164].compute(), collection.rows[:164])
    if collection.metadata_folder is not None:
        path = sorted(collection.metadata_folder.iterdir())[43]
        os.utime(path, (1, 1))
        with pytest.raises(FileChangedError, match=path.name):
            frame.compute()


# --------------------------------------------------------------------------------------------------------------------
# Elsewhere


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An object store that counts."""
    with emptied_bucket() as store:
        yield store


def put_files(bucket: Bucket, suffix: str, count: int) -> np.ndarray[Any, Any]:
    """Files of two rows."""
    rows = np.random.default_rng(0).standard_normal((2 * count, 3), np.float32)
    for number in range(count):
        content = io.BytesIO()
        if suffix == "npy":
            np.save(content, rows[2 * number : 2 * number + 2])
        else:
            vectors = pa.FixedSizeListArray.from_arrays(rows[2 * number : 2 * number + 2].reshape(-1), 3)
            pq.write_table(pa.table({"embedding": vectors, "id": [2 * number, 2 * number + 1]}), content)
        bucket.put(f"emb/{number:03}.{suffix}", content.getvalue())
    return rows


WAYS: dict[str, Callable[[EmbeddingReader], Any]] = {
    "array": lambda reader: reader.to_dask_array().compute(scheduler="synchronous"),
    "selection": lambda reader: reader.take(np.arange(640)).to_dask_array().compute(scheduler="synchronous"),
    "frame": lambda reader: reader.to_dask_dataframe().compute(scheduler="synchronous"),
    "batches": lambda reader: list(reader(100)),
}


@pytest.mark.parametrize("way", WAYS)
def test_files_elsewhere_are_asked_for_at_once_and_each_byte_once(bucket: Bucket, way: str) -> None:
    suffix = "parquet" if way == "frame" else "npy"
    rows = put_files(bucket, suffix, 320)
    reader = EmbeddingReader("bucket://emb", meta_columns=["id"] if way == "frame" else None)
    bucket.forget()
    meeting = Meeting(8)
    bucket.before_read = meeting.arrive
    found = WAYS[way](reader)
    assert meeting.peak >= 8
    assert read_twice(bucket.reads) == []
    if way == "frame":
        assert found["id"].tolist() == list(range(640))
    else:
        np.testing.assert_array_equal(found if way != "batches" else np.concatenate([x for x, _ in found]), rows)
    if suffix == "npy":
        assert bucket.nbytes == rows.nbytes


def test_a_slice_reads_no_more_than_its_rows(bucket: Bucket) -> None:
    rows = put_files(bucket, "npy", 320)
    x = EmbeddingReader("bucket://emb").to_dask_array()
    assert x.numblocks[0] < 32
    bucket.forget()
    np.testing.assert_array_equal(x[101:106].compute(), rows[101:106])
    assert sorted(read.path for read in bucket.reads) == ["emb/050.npy", "emb/051.npy", "emb/052.npy"]
    assert bucket.nbytes == rows[101:106].nbytes


# --------------------------------------------------------------------------------------------------------------------
# The plan


def table_of(file_rows: Sequence[int], groups: Sequence[Sequence[int]]) -> FileTable:
    """Files of which nothing but their rows counts."""
    store = LocalStore(LocalFileSystem())
    files = [StoredFile(store, f"/{number}", Version(1)) for number in range(len(file_rows))]
    return file_table(
        [
            FileHeader(file, rows, 2, np.dtype("f4"), group_rows=tuple(parts))
            for file, rows, parts in zip(files, file_rows, groups, strict=True)
        ],
        ["/"],
    )


def in_groups(file_rows: Sequence[int], group_rows: int) -> list[list[int]]:
    """Row groups of so many rows, and of one row each for what is left of a file; none of 0."""
    return [[group_rows] * (rows // group_rows) + [1] * (rows % group_rows) if group_rows else [] for rows in file_rows]


@given(
    st.lists(st.integers(0, 30) | st.integers(0, 3), min_size=1, max_size=200).filter(sum),
    st.integers(1, 100) | st.just(ALL_ROWS),
    st.booleans(),
    st.data(),
)
def test_pieces_have_all_rows_in_order_and_end_where_they_should(
    file_rows: list[int], max_rows: int, has_groups: bool, data: st.DataObject
) -> None:
    groups = in_groups(file_rows, 2 * has_groups)
    files = table_of(file_rows, groups)
    start = data.draw(st.integers(0, files.count), label="start")
    stop = data.draw(st.integers(start, files.count), label="stop")
    made = plan.make_plan(files, start, stop, max_rows)
    pieces = [made[place] for place in range(len(made))]
    assert [*(piece.start for piece in pieces), stop] == made.bounds.tolist()
    most_rows = min(max_rows, max(max(file_rows), -(-files.count // 16)))
    for piece in pieces:
        assert 0 < piece.stop - piece.start <= (most_rows if not has_groups else max(2, most_rows))
        parts = files.parts(*piece)
        assert sum(part.rows for part in parts) == piece.stop - piece.start
        assert len(parts) <= 64
        if len(parts) > 1:  # files as they are, but where the range begins or ends
            assert max_rows < ALL_ROWS
            assert {piece.start, piece.stop} <= {start, stop, *files.offsets.tolist()}
    filled = sum(1 for rows in file_rows if rows)
    if (start, stop) == (0, files.count):
        # No two neighbours are left apart in vain: then half as many files as there are would do.
        assert len(pieces) >= min(filled, 8)
        if max_rows == ALL_ROWS:
            assert len(pieces) == filled
    assert made.token == plan.make_plan(files, start, stop, max_rows).token
    # Metadata in row groups of their own are decoded whole, if a piece has some of one.
    metadata = table_of(file_rows, in_groups(file_rows, 3))
    ends = [start, *(end for end in np.cumsum(metadata.group_rows).tolist() if start < end < stop), stop]
    whole = sorted({*ends})
    bounds = made.bounds.tolist()
    assert plan.plan_metadata(metadata, made.bounds).bounds.tolist() == (bounds if {*bounds} <= {*whole} else whole)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(sum),
    st.integers(1, 30),
    st.booleans(),
    st.integers(0, 40),
    st.data(),
)
def test_a_piece_of_batches_is_read_from_its_own_rows_or_with_those_of_its_row_group(
    file_rows: list[int], max_rows: int, has_groups: bool, batch_rows: int, data: st.DataObject
) -> None:
    """It ends where a batch does, if it shall, and never before it must."""
    files = table_of(file_rows, in_groups(file_rows, 2 * has_groups))
    start = data.draw(st.integers(0, files.count), label="start")
    stop = data.draw(st.integers(start, files.count), label="stop")
    bounds = range(start, stop, batch_rows) if batch_rows else range(0)
    made = plan.make_plan(files, start, stop, max_rows)
    opened: list[Sequence[FilePart]] = []

    def open_reader(parts: Sequence[FilePart]) -> Callable[[int], int]:
        opened.append(parts)
        return lambda number: number

    pool = Pool(threads=1)
    try:
        jobs = list(jobs_of_plan(made, open_reader, pool, bounds))
        lanes = {id(job.lane): job.lane for job in jobs}
        for number, lane in enumerate(lanes.values()):
            assert lane.submit(lambda number=number: number).result(60) == number  # type: ignore[misc]
    finally:
        pool.close()
    segments = made.whole_segments().bounds.tolist()
    ends = [start, *(job.stop for job in jobs)]
    spans = [(job.start, job.stop) for job in jobs]
    assert spans == list(pairwise(ends))
    assert {*bounds, *segments} <= set(ends)
    for a, b in spans:
        most = int(made.piece_rows[np.searchsorted(made.starts, a, "right") - 1])
        assert b - a == most or (b - a < most and b in {*bounds, *segments})
    assert opened == [files.parts(a, b) for a, b in (pairwise(segments) if has_groups else spans)]


def test_a_piece_beyond_the_last_one_is_none() -> None:
    made = plan.make_plan(table_of([7, 0, 30], [[], [], []]), 2, 35, 5)
    assert [made[number] for number in range(len(made))] == [(a, b) for a, b in pairwise(made.bounds.tolist())]
    for beyond in (len(made), -1):
        with pytest.raises(IndexError, match=f"piece {beyond} of a plan of {len(made)}"):
            made[beyond]


def test_rows_are_counted_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are ordered, in steps; of a shuffled selection and its shards those that it is made of."""
    monkeypatch.setattr(plan, "_COUNTED_ROWS", 7)
    offsets = np.array([0, 10, 10, 25, 40])
    rng = np.random.default_rng(0)
    for numbers in (rng.permutation(40), rng.integers(0, 40, 23), np.arange(3, 30), np.array([12, 5])):
        for part in (slice(None), slice(2, None), slice(None, 3, -1), slice(1, 9, 3), slice(1, 2), slice(0, 0)):
            chosen = pick(numbers)[part]
            expected = np.histogram(numbers[part], [0, 10, 25, 40])[0]
            for rows in (chosen, shuffle(chosen, 0, 0, 2, 8), shuffle(chosen, 0, 0, 2, 8)[1:-1]):
                if rows is chosen or len(rows) > 1:
                    found = plan.count_by_file(offsets, rows)
                    assert found.tolist() == [expected[0], 0, expected[1], expected[2]]


@pytest.mark.parametrize("group_rows", [0, 2])
def test_picked_rows_are_sorted_by_file_and_know_the_row_groups_that_they_are_in(group_rows: int) -> None:
    file_rows = [5, 0, 1, 4]
    files = table_of(file_rows, in_groups(file_rows, group_rows))
    for count in range(1, 5):
        for numbers in combinations_with_replacement(range(10), count):
            picked = np.array(numbers[::-1])
            for ascending in (True, False):
                rows = np.sort(picked) if ascending else picked
                found = list(plan.picked_files(files, rows, ascending=ascending))
                seen = np.full(count, -1)
                done = 0
                for one in found:
                    file = int(np.searchsorted(files.offsets, one.first_row, "right")) - 1
                    assert one.header == files.header(file, int(one.rows[0]), int(one.rows[-1]) + 1)
                    assert np.all(np.diff(one.rows) >= 0)
                    places = np.arange(done, done + len(one.rows)) if one.places is None else one.places
                    seen[places] = one.rows + one.first_row
                    done += len(one.rows)
                assert seen.tolist() == rows.tolist()
                starts = [one.first_row for one in found]
                assert starts == sorted({*starts})


def test_of_a_million_tiny_files_few_pieces_are_left() -> None:
    bounds = np.arange(1_000_001) * 4
    assert len(plan._join_small(bounds, 16_000, 64)) == 1_000_000 // 64 + 1


# ---------------------------------------------------------------------------------------------------------------------
# Where pieces are cut

FEW_CUTS = [np.cumsum([0, *sizes]) for count in range(5) for sizes in product((1, 2, 4), repeat=count)]
"""All there are of few, small parts: what is just as large as a limit is among them."""


def test_row_groups_of_a_file_are_read_together_as_long_as_they_fit() -> None:
    for groups, max_rows in product(FEW_CUTS, range(1, 8)):
        for keeps in product((False, True), repeat=max(0, len(groups) - 2)):
            ends = {0, int(groups[-1]), *compress(groups[1:-1].tolist(), keeps)}
            merged = plan._merge_groups(groups, np.array(sorted(ends)), max_rows).tolist()
            assert merged == joined(groups.tolist(), ends, max_rows, len(groups))


def joined(cuts: list[int], kept: Container[int], max_rows: int, most: int) -> list[int]:
    """Cuts, of neighbours that fit together only the outer ones, and those that are to be kept."""
    found = cuts[:1]
    while found[-1] != cuts[-1]:
        following = [cut for cut in cuts if cut > found[-1]][:most]
        chosen = following.pop(0)
        while following and chosen not in kept and following[0] - found[-1] <= max_rows:
            chosen = following.pop(0)
        found.append(chosen)
    return found


def test_what_is_too_large_is_cut_into_as_few_pieces_as_can_be_of_the_same_size() -> None:
    for cuts, max_rows in product(FEW_CUTS, range(1, 15)):
        wanted = [0]
        for start, stop in pairwise((cuts * 3).tolist()):
            step = -(-(stop - start) // -(-(stop - start) // max_rows))
            wanted += [*range(start + step, stop, step), stop]
        assert plan._cut_evenly(cuts * 3, max_rows).tolist() == wanted


def test_no_rows_are_cut_into_no_pieces() -> None:
    files = table_of([4], [[]])
    made = plan.plan_selection(files, shuffle(Stretch(range(0)), 0, 0, 2, 128), 3)
    assert (made.bounds.tolist(), made.chunks, len(made)) == ([0], (0,), 0)
    with np.errstate(all="raise"):
        assert plan._cut_evenly(np.array([0, 0, 4, 4]), 3).tolist() == [0, 2, 4]


def test_neighbours_are_joined_as_long_as_they_fit_and_are_not_too_many() -> None:
    for cuts, max_rows, most in product(FEW_CUTS, range(1, 10), range(1, 4)):
        assert list(plan._join_small(cuts, max_rows, most)) == joined(cuts.tolist(), (), max_rows, most)


@pytest.mark.parametrize("group_rows", [0, 2, 3])
def test_small_files_and_small_row_groups_are_pieces_together(monkeypatch: pytest.MonkeyPatch, group_rows: int) -> None:
    monkeypatch.setattr(plan, "_FEWEST_PIECES", 3)
    for count, limit in product((1, 2, 3), (1, 2, 3, 4, 6, 7, ALL_ROWS)):
        for file_rows in filter(any, product((0, 1, 2, 7), repeat=count)):
            files = table_of(file_rows, in_groups(file_rows, group_rows))
            ends = sorted({*files.offsets.tolist()})
            # Row groups of a file, and files whatever their row groups are.
            cuts = joined(sorted({0, *np.cumsum(files.group_rows).tolist()}), ends, limit, 99) if group_rows else ends
            small = 0 if limit == ALL_ROWS else min(limit, -(-files.count // 3))
            kept = {*joined(ends, (), small, 2)}
            cuts = [cut for cut in cuts if cut in kept or cut not in ends]
            for start, stop in ((0, files.count), (1, files.count), (0, files.count - 1), (1, 1)):
                segments = [start, *(cut for cut in cuts if start < cut < stop), stop] if start < stop else [start]
                wanted = [start]
                for a, b in pairwise(segments):
                    step = -(-(b - a) // -(-(b - a) // limit))
                    wanted += [*range(a + step, b, step), b]
                made = plan.make_plan(files, start, stop, limit, most_files=2)
                assert made.bounds.tolist() == wanted
                assert len(made) == len(wanted) - 1
                assert made.starts.tolist() == segments[:-1]
                assert [made[place] for place in range(len(made))] == list(pairwise(wanted))


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(sum),
    st.booleans(),
    st.sampled_from(["stretch", "ascending", "any", "shuffled"]),
    st.integers(1, 30),
    st.data(),
)
def test_selected_rows_are_cut_where_files_row_groups_and_windows_end(
    file_rows: list[int], has_groups: bool, order: str, max_rows: int, data: st.DataObject
) -> None:
    files = table_of(file_rows, in_groups(file_rows, 2 * has_groups))
    drawn = data.draw(st.lists(st.integers(0, files.count - 1), max_size=100))
    rows: Rows = pick(np.array(drawn if order == "any" else sorted({*drawn}), np.int64))
    if order in ("stretch", "shuffled"):
        rows = Stretch(range(files.count))[data.draw(st.slices(files.count))]
        rows = rows if order == "stretch" else shuffle(rows, 0, 0, 2, 128)
    made = plan.plan_selection(files, rows, max_rows)
    bounds = made.bounds.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(rows)) == (0, made.stop)
    assert made.chunks == tuple(b - a for a, b in pairwise(bounds)) or made.chunks == (0,) == (made.stop,)
    assert len(made) == len(bounds) - 1
    assert all(0 < count <= max_rows for count in made.chunks) or not made.stop
    assert made.token == plan.plan_selection(files, rows, max_rows).token
    assert not made.stop or made.token != plan.SelectionPlan(files, rows, made.bounds[[0, *range(len(bounds))]]).token
    if rows.is_ascending:
        few = plan._join_small(plan.selection_cuts(files, rows, max_rows), max_rows, 64).tolist()
        ends = [0, *np.cumsum(files.group_rows).tolist()] if has_groups else files.offsets
        assert {*few} <= {*np.searchsorted(np.asarray(rows), ends).tolist()}
    else:
        few = [0, *rows.windows(0, len(rows)).tolist(), len(rows)]
    for a, b in pairwise(few):
        sizes = np.diff([bound for bound in bounds if a <= bound <= b]).tolist()
        assert len(sizes) == -(-(b - a) // max_rows)
        assert not sizes or max(sizes) == -(-(b - a) // len(sizes))
    # Metadata in row groups of their own are decoded whole, if a piece has some of one.
    metadata = table_of(file_rows, in_groups(file_rows, 3))
    groups = sorted({*np.searchsorted(np.asarray(rows), [0, *np.cumsum(metadata.group_rows)]).tolist()})
    as_they_are = not rows.is_ascending or {*bounds} <= {*groups}
    assert plan.plan_selected_metadata(metadata, made).bounds.tolist() == (bounds if as_they_are else groups)


@pytest.mark.parametrize("step", [1, 2, 2**40])
def test_picked_rows_of_a_piece_take_few_bytes_where_they_travel_in_its_task(step: int) -> None:
    """Not those of row groups, which are looked up, nor those that a range tells; 256 of a part of many rows may."""
    numbers = np.flatnonzero(np.arange(60_000) % 7 < 3) * step
    some = pick(numbers)
    total = int(numbers[-1]) + 1
    plain, grouped = table_of([total], [[]]), table_of([total], [[total]])
    most = 2_500 * len(some) // some.nbytes
    assert 256 < most < 20_000
    for files, rows, expected in (
        (plain, some, most),
        (plain, some[:512], 256),
        (plain, some[:513], 256),
        (plain, Stretch(range(20_000)), 20_000),
        (grouped, some, 20_000),
    ):
        count = -(-len(rows) // expected)
        assert max(plan.plan_selection(files, rows, 20_000).chunks) == -(-len(rows) // count)


def test_cuts_of_a_range_are_those_within_it_and_its_ends() -> None:
    for cuts, start, stop in product(FEW_CUTS[::3], range(9), range(9)):
        inside = [cut for cut in cuts.tolist() if start < cut < stop]
        assert plan._clip(cuts, start, stop).tolist() == ([start, *inside, stop] if start < stop else [start])


@pytest.mark.parametrize("max_rows", [None, 1, 2, 3, 4, 12])
def test_a_plan_is_a_sequence_of_pieces_of_equal_rows(max_rows: int | None) -> None:
    files: Any = None  # it is only handed on
    for cuts, first in product(FEW_CUTS, (0, 5)):
        made = plan._plan_of_segments(files, cuts + first, max_rows)
        segments = np.diff(cuts).tolist()
        assert made.whole_segments().chunks == tuple(segments or [0])
        wanted = []
        for rows in segments:
            size = -(-rows // (1 if max_rows is None else -(-rows // max_rows)))
            wanted += [min(size, rows - done) for done in range(0, rows, size)]
        assert made.chunks == tuple(wanted or [0])
        assert len(made) == len(wanted)
        ends = [first, *(first + np.cumsum(wanted)).tolist()]
        assert made.bounds.tolist() == ends
        assert [made[k] for k in range(len(made))] == list(pairwise(ends))
        for beyond in (-1, len(wanted)):
            with pytest.raises(IndexError, match=f"piece {beyond} of a plan of {len(wanted)}"):
                made[beyond]
