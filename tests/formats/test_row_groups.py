"""Row groups are read in their places: whatever of them is plain, and however many rows they hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, FormatError
from dask_embedding_reader.batches import pace
from dask_embedding_reader.formats.parquet import decode as parquet_decode
from dask_embedding_reader.formats.parquet import pages, plain_pages
from dask_embedding_reader.formats.parquet import read as parquet

ROWS, DIMENSION, GROUP = 240, 8, 60
VECTORS = np.arange(ROWS * DIMENSION, dtype=np.float32).reshape(ROWS, DIMENSION)


def write(path: Path, *, kind: str = "list", compression: str = "none", group_rows: int = GROUP) -> None:
    """Row groups, by default four, of six pages each."""
    items = pa.array(VECTORS.reshape(-1))
    if kind == "list":
        column: Any = pa.ListArray.from_arrays(pa.array(np.arange(ROWS + 1, dtype=np.int32) * DIMENSION), items)
    else:
        column = pa.FixedSizeListArray.from_arrays(items, DIMENSION)
    table = pa.table({"embedding": column, "n": np.arange(ROWS)})
    options = {"data_page_size": 1, "write_batch_size": 10 * DIMENSION, "use_dictionary": False}
    pq.write_table(table, path, row_group_size=group_rows, compression=compression, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    for kind in ("list", "fixed"):
        for compression in ("none", "snappy"):
            write(folder / f"{kind}-{compression}.parquet", kind=kind, compression=compression)
    return folder


def batches(reader: EmbeddingReader, rows: range) -> Any:
    found = reader(35, rows.start, rows.stop, max_piece_size=25, show_progress=False)
    return np.concatenate([part for part, _ in found])


def batches_of_every_third(reader: EmbeddingReader, rows: range) -> Any:
    return batches(reader.take(rows[::3]), range(len(rows[::3])))


WAYS: dict[str, tuple[Callable[[EmbeddingReader, range], Any], int]] = {
    "batches": (batches, 1),
    "array": (lambda reader, rows: reader.to_dask_array(max_piece_size=25)[rows.start : rows.stop].compute(), 1),
    "every third": (batches_of_every_third, 3),
}


@settings(max_examples=25)
@given(st.data())
def test_where_a_page_is_not_plain_the_rows_are_the_same(files: Path, data: st.DataObject) -> None:
    """Some pages are given up when they are looked up, others only when they are read."""
    name = data.draw(st.sampled_from(sorted(path.name for path in files.glob("*.parquet"))), label="file")
    way = data.draw(st.sampled_from(sorted(WAYS)), label="way")
    some = st.sets(st.integers(0, 5), max_size=2)
    unread = data.draw(st.lists(some, min_size=4, max_size=4), label="not plain when read")
    start = data.draw(st.integers(0, ROWS - 1), label="start")
    rows = range(start, data.draw(st.integers(start + 1, ROWS), label="stop"))
    read_page = pages.read_page
    reader = EmbeddingReader(files / name)
    footer = pq.read_metadata(files / name)
    begins = [footer.row_group(group).column(0).data_page_offset for group in range(4)]

    def read_some(source: Any, place: Any, page: Any, body: int, before: int, *others: Any, **named: Any) -> Any:
        given_up = unread[begins.index(place.start)]
        if before // (10 * DIMENSION) in given_up:
            return None
        return read_page(source, place, page, body, before, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_pages, "read_page", read_some)
        read, step = WAYS[way]
        np.testing.assert_array_equal(read(reader, rows), VECTORS[rows.start : rows.stop : step])


@pytest.mark.parametrize("promised", [(50, 30, 40), (30, 50, 40), (40, 30, 50), (40, 50, 30), (1, 58, 61)])
def test_row_groups_with_other_rows_than_promised_shift_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promised: tuple[int, ...]
) -> None:
    """As many rows in all, but not where the footer says: an error, where a row would be taken for another."""
    path = tmp_path / "0.parquet"
    write(path, compression="zstd", group_rows=40)
    np.save(tmp_path / "0.npy", VECTORS)
    rows = iter([*promised, 40, 40, 40])
    # The rows of a group, 2 * 40 in one byte, after which its place in the file is told.
    changed, count = re.subn(rb"\x16\x50(?=\x26)", lambda _: b"\x16" + bytes([2 * next(rows)]), path.read_bytes())
    assert count == 6, "pyarrow writes footers in another way"
    path.write_bytes(changed)
    with pytest.raises(FormatError, match=r"0\.parquet.*a row group ends after row \d+ where the footer promises"):
        EmbeddingReader(path)
    decode = parquet_decode._iter_group
    monkeypatch.setattr(parquet_decode, "_iter_group", lambda file, group, names, _: decode(file, group, names, 7))
    reader = EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["n"])
    refused: list[str] = []
    for start in range(0, ROWS, 10):
        try:
            frame = reader.to_dask_dataframe(start, start + 10).compute(scheduler="synchronous")
        except FormatError as error:
            refused.append(str(error))
        else:
            np.testing.assert_array_equal(frame["n"], frame.index)
    assert refused
    assert all("values of column 'n'" in message for message in refused)


@pytest.mark.parametrize("are_more", [False, True])
def test_pages_with_other_rows_than_their_row_group_shift_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_more: bool
) -> None:
    path = tmp_path / "0.parquet"
    write(path, compression="zstd")
    monkeypatch.setattr(parquet, "can_be_plain", lambda _: False)
    decode = parquet_decode._iter_group

    def give(file: Any, group: int, names: Any, _: int) -> Any:
        given = list(decode(file, group, names, 7))
        return iter([*given, given[-1]] if are_more else given[:-1])

    reader = EmbeddingReader(path, meta_columns=["n"])
    monkeypatch.setattr(parquet_decode, "_iter_group", give)
    spanning = reader.to_dask_dataframe(50, 62)  # what is too much would be the first rows of the next one
    for read in (lambda: list(reader(240, show_progress=False)), reader.to_dask_dataframe().compute, spanning.compute):
        with pytest.raises(FormatError, match=r"0\.parquet: a row group ends after row \d+ where the footer promises"):
            read()


@pytest.mark.parametrize("way", ["index", "step", "view", "pieces", "frame of a view", "batches of a view"])
def test_rows_that_are_picked_decode_each_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Not once for each run of neighbours."""
    path = tmp_path / "0.parquet"
    write(path, compression="zstd")
    monkeypatch.setattr(parquet, "can_be_plain", lambda _: False)
    reader = EmbeddingReader(path, meta_columns=["n"])
    picked = [3, 4, 20, 58, 130, 131, 150, 179]  # of two of four
    decode, decoded = parquet_decode._iter_group, []

    def note(file: Any, group: int, *others: Any) -> Any:
        decoded.append(file.metadata.row_group(group).num_rows)
        return decode(file, group, *others)

    monkeypatch.setattr(parquet_decode, "_iter_group", note)
    if way == "index":
        found = reader.to_dask_array(chunks=-1)[picked].compute(scheduler="synchronous")
    elif way == "step":
        picked = [*range(3, ROWS, 9)]
        found = reader.to_dask_array(chunks=-1)[3::9].compute(scheduler="synchronous")
    elif way == "view":
        found = reader.take(picked).to_dask_array().compute(scheduler="synchronous")
    elif way == "pieces":  # several of each row group
        found = reader.take(picked).to_dask_array(max_piece_size=2).compute(scheduler="synchronous")
    elif way == "batches of a view":  # each of one piece, and decoded beside its metadata
        monkeypatch.setattr(pace, "_METADATA_ROWS", 2)
        monkeypatch.setattr(pace, "_LEAST_METADATA_ROWS", 2)
        batches = list(reader.take(picked)(2, max_piece_size=2, show_progress=False))
        found = np.concatenate([rows for rows, _ in batches])
        assert [n for _, frame in batches for n in frame["n"]] == picked
    else:
        frame = reader.take(picked).to_dask_dataframe().compute(scheduler="synchronous")
        found = VECTORS[frame["n"]]
    np.testing.assert_array_equal(found, VECTORS[picked])
    assert len(decoded) <= (2 if way in ("view", "pieces", "frame of a view") else 4)


@pytest.mark.parametrize(
    ("rows", "pages_read"),
    [
        (slice(25, 27), {2}),
        (slice(19, 21), {1, 2}),  # of two pieces
        (slice(59, 61), {0, 5}),  # of two row groups
        (slice(38, 42), {3, 4}),
        (slice(0, 240), {*range(6)}),
    ],
)
@pytest.mark.parametrize("kind", ["list", "fixed"])
def test_a_slice_reads_the_pages_that_hold_it_once(
    files: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rows: slice, pages_read: set[int]
) -> None:
    """Also where a row group is cut into several pieces."""
    x = EmbeddingReader(files / f"{kind}-none.parquet").to_dask_array(max_piece_size=20)
    assert len(x.chunks[0]) == 12
    read_page, read = pages.read_page, []

    def note(source: Any, place: Any, page: Any, body: int, before: int, *others: Any, **options: Any) -> Any:
        read.append((place.start, before))
        return read_page(source, place, page, body, before, *others, **options)

    monkeypatch.setattr(plain_pages, "read_page", note)
    np.testing.assert_array_equal(x[rows].compute(scheduler="synchronous"), VECTORS[rows])
    assert len(set(read)) == len(read)
    assert {before // (10 * DIMENSION) for _, before in read} == pages_read
