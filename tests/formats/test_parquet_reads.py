"""Rows of parquet files asked of the format itself: what is decoded, what is fetched, and what was promised."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import FormatError, ReadError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.parquet import decode, page_index, pages, plain_pages
from dask_embedding_reader.formats.parquet import read as parquet
from dask_embedding_reader.formats.parquet.chunk_file import ChunkFile
from dask_embedding_reader.formats.parquet.decode import iter_tables
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.parquet.header import read_header
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import Bucket, Request, emptied_bucket

GROUP, PAGE, GROUPS, DIMENSION = 60, 10, 4, 8
ROWS = GROUP * GROUPS
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIMENSION)).astype(np.float32)
COLUMNS = Columns("embedding")


@cache
def content(kind: str = "list", compression: str = "none", group_rows: int = GROUP) -> bytes:
    """Row groups of some pages each."""
    items = pa.array(VECTORS.reshape(-1))
    column: Any = pa.FixedSizeListArray.from_arrays(items, DIMENSION)
    if kind == "list":
        column = pa.ListArray.from_arrays(pa.array(np.arange(ROWS + 1, dtype=np.int32) * DIMENSION), items)
    table = pa.table({"n": np.arange(ROWS), "embedding": column, **{f"x{n}": VECTORS[:, n] for n in range(DIMENSION)}})
    options: dict[str, Any] = {"data_page_size": 1, "write_batch_size": PAGE * DIMENSION, "use_dictionary": False}
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group_rows, compression=compression, write_page_index=True, **options)
    return sink.getvalue()


def local_header(path: Path, data: bytes, columns: Columns = COLUMNS) -> FileHeader:
    path.write_bytes(data)
    FOOTERS.clear()
    return read_header(StoredFile(LocalStore(LocalFileSystem()), str(path), Version(len(data))), columns)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with emptied_bucket() as store:
        yield store


def remote_header(bucket: Bucket, data: bytes, columns: Columns = COLUMNS) -> FileHeader:
    bucket.put("emb/0.parquet", data)
    FOOTERS.clear()
    page_index.INDICES.clear()
    file = EmbeddingReader("bucket://emb/0.parquet").manifest.vectors.header(0).file
    return read_header(file, columns)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Which rows pyarrow is asked to decode."""
    found: list[tuple[int, int]] = []

    def note(header: Any, names: Any, start: int, stop: int, *others: Any, **named: Any) -> Any:
        found.append((start, stop))
        return iter_tables(header, names, start, stop, *others, **named)

    monkeypatch.setattr(parquet, "iter_tables", note)
    return found


def leave_pages(monkeypatch: pytest.MonkeyPatch, header: FileHeader, left: set[int]) -> None:
    """Have some pages of the file be none that are plain, once they are read."""
    told = pq.read_metadata(io.BytesIO(content("list")))
    starts = [told.row_group(group).column(1).data_page_offset for group in range(GROUPS)]
    read_page = pages.read_page

    def read(source: Any, place: Any, page: Any, body: int, before: int, *others: Any, **named: Any) -> Any:
        number = starts.index(place.start) * GROUP // PAGE + before // (PAGE * DIMENSION)
        return None if number in left else read_page(source, place, page, body, before, *others, **named)

    monkeypatch.setattr(plain_pages, "read_page", read)


def read(rows: Any, stretches: list[tuple[int, int]]) -> Any:
    """Some stretches at once."""
    outs = [np.empty((stop - start, DIMENSION), np.float32) for start, stop in stretches]
    rows([(start, out) for (start, _), out in zip(stretches, outs, strict=True)])
    return np.concatenate(outs)


def expected(stretches: list[tuple[int, int]]) -> Any:
    return np.concatenate([VECTORS[start:stop] for start, stop in stretches])


def random_stretches(chance: Random, start: int, stop: int) -> list[tuple[int, int]]:
    bounds = sorted(chance.sample(range(start, stop + 1), min(8, stop - start + 1) // 2 * 2))
    return list(zip(bounds[::2], bounds[1::2], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What is decoded


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_rows_are_decoded_from_the_first_page_on_that_is_not_plain(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, decoded: list[Any], seed: int, is_remote: bool
) -> None:
    """Up to the end of its row group; up to the end of all, where nothing else came from the row group."""
    chance = Random(seed)
    header = remote_header(bucket, content()) if is_remote else local_header(tmp_path / "0.parquet", content())
    for _ in range(6):
        start, stop = sorted(chance.sample(range(ROWS + 1), 2))
        left = set(chance.sample(range(ROWS // PAGE), chance.choice([0, 1, 2, 5])))
        decoded.clear()
        with monkeypatch.context() as patch:
            leave_pages(patch, header, left)
            rows = PARQUET.open_stretches(header, COLUMNS, start, stop)
            stretches = random_stretches(chance, start, stop)
            found: list[Any] = []
            calls = [stretches[:1], stretches[1:3], stretches[3:]]
            found.extend(read(rows, some) for some in calls if some)
        np.testing.assert_array_equal(np.concatenate(found), expected(stretches))
        wanted = [row for first, last in stretches for row in range(first, last)]
        odd = [row for row in wanted if row // PAGE in left]
        assert bool(decoded) == bool(odd)
        if odd:
            assert decoded[0][0] == odd[0]
            begins = [first for first, _ in decoded]
            assert begins == sorted(begins)
            assert len({first // GROUP for first in begins}) == len(begins), "each row group once"
            for first, last in decoded:
                group_start = first // GROUP * GROUP
                [begin] = [max(a, group_start) for a, b in stretches if a <= first < b]
                assert last == (stop if first == begin else min(stop, group_start + GROUP))


@pytest.mark.parametrize(("nbytes", "step"), [(1, 1), (7 * DIMENSION * 4, 7)])
def test_what_is_decoded_goes_on_from_call_to_call(
    tmp_path: Path, decoded: list[Any], monkeypatch: pytest.MonkeyPatch, nbytes: int, step: int
) -> None:
    """In steps of a row, where one takes more than a step should."""
    header = local_header(tmp_path / "0.parquet", content(compression="zstd"))
    monkeypatch.setattr(parquet, "can_be_plain", lambda _: False)
    monkeypatch.setattr(parquet, "_DECODE_NBYTES", nbytes)
    steps: list[int] = []
    copy = parquet.as_vectors  # type: ignore[attr-defined]

    def note(header: Any, columns: Any, start: int, column: Any) -> Any:
        steps.append(len(column))
        return copy(header, columns, start, column)

    monkeypatch.setattr(parquet, "as_vectors", note)
    rows = PARQUET.open_rows(header, COLUMNS, 5, 230)
    sizes, row, found = [3, 1, 50, 7, 14, 60, 90], 5, []
    for size in sizes:
        out = np.empty((size, DIMENSION), np.float32)
        rows([out[: size // 2], out[size // 2 :]])
        found.append(out)
        row += size
    np.testing.assert_array_equal(np.concatenate(found), VECTORS[5:230])
    assert decoded == [(5, 230)]
    assert max(steps) == step


def test_rows_that_are_passed_over_are_decoded_with_the_others_of_their_row_groups(
    tmp_path: Path, decoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not those of row groups of which nothing is wanted, where the next ones are asked for later."""
    monkeypatch.setattr(parquet, "can_be_plain", lambda _: False)
    header = local_header(tmp_path / "0.parquet", content())
    rows = PARQUET.open_stretches(header, COLUMNS, 0, ROWS)
    for stretches in ([(3, 5), (20, 30)], [(40, 61)], [(200, 240)]):
        np.testing.assert_array_equal(read(rows, stretches), expected(stretches))
    assert decoded == [(3, 240)]


@pytest.mark.parametrize("size", [1, 7, 30, 100])
def test_parts_are_looked_up_first_and_filled_in_any_order(tmp_path: Path, decoded: list[Any], size: int) -> None:
    for kind, compression in (("list", "none"), ("fixed", "snappy"), ("list", "zstd")):
        header = local_header(tmp_path / "0.parquet", content(kind, compression))
        find = PARQUET.open_parts(header, COLUMNS, 13, 233)
        out = np.empty((220, DIMENSION), np.float32)
        fills = []
        for start in range(0, 220, size):
            part = out[start : start + size]
            fill = find([part[: size // 2], part[size // 2 :]])
            assert fill is not None
            fills.append(fill)
        for fill in fills[::-1]:
            fill()
        np.testing.assert_array_equal(out, VECTORS[13:233])
    assert not decoded


def test_parts_that_cannot_be_looked_up_are_read_at_once(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, decoded: list[Any]
) -> None:
    """Remote ones, and those behind a page that was not plain when it was read."""

    def read_parts(header: FileHeader) -> list[bool]:
        find = PARQUET.open_parts(header, COLUMNS, 0, ROWS)
        out = np.empty((ROWS, DIMENSION), np.float32)
        told = []
        for start in range(0, ROWS, 20):
            fill = find([out[start : start + 20]])
            told.append(fill is not None)
            if fill is not None:
                fill()
        np.testing.assert_array_equal(out, VECTORS)
        return told

    assert not any(read_parts(remote_header(bucket, content())))
    assert not decoded
    header = local_header(tmp_path / "0.parquet", content())
    assert all(read_parts(header))
    with monkeypatch.context() as patch:
        leave_pages(patch, header, {7})  # of the second row group
        told = read_parts(header)
    assert told == [*[True] * 4, *[False] * 2, *[True] * 6]
    assert decoded == [(70, 80), (80, 120)]
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "can_be_plain", lambda _: False)
        assert not any(read_parts(header))


# ---------------------------------------------------------------------------------------------------------------------
# What is fetched


def chunk_of(data: bytes, group: int) -> tuple[int, int]:
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(group).column(1)
    return chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size


def fetched(bucket: Bucket, data: bytes) -> list[tuple[int, int]]:
    """Of chunks of vectors."""
    chunks = [chunk_of(data, group) for group in range(pq.read_metadata(io.BytesIO(data)).num_row_groups)]
    reads = [(asked.start, asked.stop) for asked in bucket.reads]
    return sorted(each for each in reads if any(start <= each[0] < stop for start, stop in chunks))


def test_of_remote_files_the_wanted_row_groups_are_fetched_once(bucket: Bucket) -> None:
    """All of them at once, where they are small, whatever is asked first."""
    data = content()
    header = remote_header(bucket, data)
    bucket.forget()
    rows = PARQUET.open_rows(header, COLUMNS, 70, 190)
    out = np.empty((20, DIMENSION), np.float32)
    assert not bucket.reads
    for row in range(70, 190, 20):
        rows([out])
        np.testing.assert_array_equal(out, VECTORS[row : row + 20])
        assert fetched(bucket, data) == [chunk_of(data, group) for group in (1, 2, 3)]


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> Callable[[FileHeader, int], FileHeader]:
    """A request is worth so many bytes."""

    def worth(header: FileHeader, nbytes: int) -> FileHeader:
        monkeypatch.setattr(type(header.file.store), "request_nbytes", nbytes, raising=False)
        return header

    return worth


@pytest.mark.parametrize(("more", "by_pages"), [(-8, True), (8, False)])
def test_pages_are_looked_for_where_so_little_is_wanted_that_two_requests_are_worth_it(
    bucket: Bucket, small_requests: Callable[[FileHeader, int], FileHeader], more: int, by_pages: bool
) -> None:
    data = content(group_rows=ROWS)
    start, stop = chunk_of(data, 0)
    for wanted, stretches in ((24, [(30, 54)]), (60, [(180, 240)]), (24, [(30, 40), (100, 114)])):
        header = small_requests(remote_header(bucket, data), round((1 - wanted / ROWS) * (stop - start) / 2) + more)
        bucket.forget()
        rows = PARQUET.open_stretches(header, COLUMNS, stretches[0][0], stretches[-1][1])
        np.testing.assert_array_equal(read(rows, stretches), expected(stretches))
        of_chunk = fetched(bucket, data)
        if by_pages:
            assert sum(last - first for first, last in of_chunk) < (stop - start) // 3
        else:
            assert of_chunk == [(start, stop)]


@pytest.mark.parametrize(
    ("stretches", "pages_fetched"),
    [([(0, 60), (150, 180)], 9), ([(0, 60), (149, 180)], 18), ([(20, 50), (60, 80), (90, 110)], 9), ([(20, 40)], 2)],
)
def test_pages_between_are_passed_over_where_half_of_the_rows_or_less_are_wanted(
    bucket: Bucket,
    small_requests: Callable[[FileHeader, int], FileHeader],
    stretches: list[tuple[int, int]],
    pages_fetched: int,
) -> None:
    data = content(group_rows=ROWS)
    start, stop = chunk_of(data, 0)
    header = small_requests(remote_header(bucket, data), 10)
    bucket.forget()
    rows = PARQUET.open_stretches(header, COLUMNS, stretches[0][0], stretches[-1][1])
    np.testing.assert_array_equal(read(rows, stretches), expected(stretches))
    nbytes = sum(last - first for first, last in fetched(bucket, data))
    assert round(nbytes / ((stop - start) / (ROWS // PAGE))) == pages_fetched


def test_pages_of_stretches_are_fetched_together_in_bounded_memory(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, small_requests: Callable[[FileHeader, int], FileHeader]
) -> None:
    """Each page once; those that touch with one request."""
    data = content(group_rows=ROWS)
    start, stop = chunk_of(data, 0)
    page = (stop - start) // (ROWS // PAGE)
    stretches = [(5, 6), (7, 8), (25, 35), (60, 61), (119, 121), (200, 205), (238, 240)]
    for window, rounds in ((2**20, 1), (page, 3), (1, 7)):
        monkeypatch.setattr(parquet, "WINDOW_NBYTES", window)
        header = small_requests(remote_header(bucket, data), 10)
        bucket.forget()
        made: list[Any] = []

        def note(file: Any, ranges: Any, *others: Any, made: list[Any] = made) -> Any:
            made.append(list(ranges))
            return ChunkFile(file, ranges, *others)

        with monkeypatch.context() as patch:
            patch.setattr(parquet, "ChunkFile", note)
            rows = PARQUET.open_stretches(header, COLUMNS, 0, ROWS)
            np.testing.assert_array_equal(read(rows, stretches), expected(stretches))
        assert len(made) == rounds
        if rounds == 1:
            of_chunk = fetched(bucket, data)
            assert all(before[1] < after[0] for before, after in pairwise(of_chunk))
            assert len(of_chunk) == 6
            assert sum(b - a for a, b in of_chunk) == pytest.approx(8 * page, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What was promised


def test_vectors_are_of_the_type_that_was_promised(tmp_path: Path) -> None:
    header = local_header(tmp_path / "0.parquet", content("fixed"))
    out = np.empty((1, DIMENSION), np.float32)
    wrong: list[dict[str, Any]] = [{"dtype": np.dtype("f8")}, {"dimension": 9}]
    for changes in wrong:
        promised = header._replace(**changes)
        what = f"{promised.dimension} {promised.dtype}"
        with pytest.raises(
            FormatError, match=rf"0\.parquet: column 'embedding' is .*\[8\], .* promised vectors of {what}"
        ):
            PARQUET.open_rows(promised, COLUMNS, 0, 1)([out])
    lists = local_header(tmp_path / "1.parquet", content("list"))
    with pytest.raises(FormatError, match=r"1\.parquet, row 0: .* 8 items where vectors of 9 items"):
        PARQUET.open_rows(lists._replace(dimension=9), COLUMNS, 0, 1)([np.empty((1, 9), np.float32)])


def test_columns_of_items_are_of_the_type_that_was_promised(tmp_path: Path) -> None:
    columns = Columns(tuple(f"x{n}" for n in range(DIMENSION)))
    header = local_header(tmp_path / "0.parquet", content(), columns)
    assert (header.dimension, header.dtype) == (DIMENSION, np.dtype("f4"))
    out = np.empty((50, DIMENSION), np.float32)
    PARQUET.open_rows(header, columns, 30, 80)([out])
    np.testing.assert_array_equal(out, VECTORS[30:80])
    wrong: list[dict[str, Any]] = [{"dtype": np.dtype("f8")}, {"dimension": 9}]
    for changes in wrong:
        promised = header._replace(**changes)
        what = f"holds vectors of 8 float32 in columns, where {promised.dimension} {promised.dtype} were promised"
        with pytest.raises(FormatError, match=what):
            PARQUET.open_rows(promised, columns, 0, 50)([out])


@pytest.mark.parametrize("is_nullable", [False, True])
@pytest.mark.parametrize("item_is_nullable", [False, True])
@pytest.mark.parametrize("struct", ["", "whole", "nullable"])
@pytest.mark.parametrize("kind", ["list", "fixed", "binary"])
def test_vectors_are_plain_whatever_may_be_null(
    tmp_path: Path, decoded: list[Any], kind: str, struct: str, item_is_nullable: bool, is_nullable: bool
) -> None:
    """As long as nothing is."""
    element = pa.field("element", pa.float32(), nullable=item_is_nullable)
    kinds = {"list": pa.list_(element), "fixed": pa.list_(element, DIMENSION), "binary": pa.binary(4 * DIMENSION)}
    values = [row.tobytes() for row in VECTORS] if kind == "binary" else VECTORS.tolist()
    field = pa.field("embedding", kinds[kind], nullable=is_nullable)
    column = pa.array(values, field.type)
    if struct:
        whole = pa.StructArray.from_arrays([column], fields=[field])
        field = pa.field("s", whole.type, nullable=struct == "nullable")
        column = whole
    table = pa.Table.from_arrays([column], schema=pa.schema([field]))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    name = "s.embedding" if struct else "embedding"
    columns = Columns(name, np.dtype("f4") if kind == "binary" else None)
    header = local_header(tmp_path / "0.parquet", sink.getvalue(), columns)
    out = np.empty((ROWS, DIMENSION), np.float32)
    PARQUET.open_rows(header, columns, 0, ROWS)([out])
    np.testing.assert_array_equal(out, VECTORS)
    assert not decoded


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_what_decoding_holds_is_counted(tmp_path: Path, bucket: Bucket) -> None:
    local = local_header(tmp_path / "0.parquet", content())._replace(group_rows=(10**6, 3 * 10**6), dimension=100)
    remote = remote_header(bucket, content())._replace(group_rows=(10**6, 3 * 10**6), dimension=100)
    one = decode.DECODER_NBYTES
    many = Columns(("a", "b", "c"))
    window = 9 * decode.WINDOW_NBYTES // 4
    assert PARQUET.held_nbytes(local, COLUMNS, 7, 4) == one
    assert PARQUET.held_nbytes(local, many, 7, 4) == one + 3 * decode._COLUMN_NBYTES
    assert PARQUET.held_nbytes(remote, COLUMNS, 7, 4) == one + 4 * window
    assert PARQUET.held_nbytes(remote, many, 7, 4) == one + 3 * decode._COLUMN_NBYTES + 4 * 3 * 12 * 10**6
    small: dict[str, Any] = {"group_rows": (20, 10), "dimension": 5}
    assert PARQUET.held_nbytes(local._replace(**small), many, 7, 4) == one + 3 * 3 * 80
    assert PARQUET.held_nbytes(remote._replace(**small), many, 7, 2) == one + 3 * 3 * 80 + 2 * 3 * 80
    assert PARQUET.held_nbytes(remote._replace(**small), COLUMNS, 7, 2) == one + 2 * 400
    assert PARQUET.held_nbytes(remote._replace(group_rows=()), COLUMNS, 0, 2) == one


# ---------------------------------------------------------------------------------------------------------------------
# What is said where bytes do not come


def test_the_rows_whose_bytes_do_not_come_are_named(
    tmp_path: Path, bucket: Bucket, small_requests: Callable[[FileHeader, int], FileHeader]
) -> None:
    data = content(group_rows=ROWS)
    start, stop = chunk_of(data, 0)

    def refuse(request: Request) -> None:
        if request.kind == "read" and start <= request.start < stop:
            raise PermissionError("not for you")

    for worth, stretches, named in (
        (10**6, [(30, 40), (41, 50)], "30 to 50"),
        (10, [(30, 40), (100, 101), (200, 203)], "30 to 203"),
    ):
        header = small_requests(remote_header(bucket, data), worth)
        bucket.before_read = refuse
        with pytest.raises(ReadError, match=rf"^rows {named}: .*not for you"):
            read(PARQUET.open_stretches(header, COLUMNS, 30, 220), stretches)
        bucket.before_read = None
    local = local_header(tmp_path / "0.parquet", content())
    find = PARQUET.open_parts(local, COLUMNS, 50, 220)
    (tmp_path / "0.parquet").unlink()
    with pytest.raises(ReadError, match=r"^rows 50 to 60: "):
        find([np.empty((30, DIMENSION), np.float32)])
    rows = PARQUET.open_stretches(local, COLUMNS, 50, 220)
    with pytest.raises(ReadError, match=r"^rows 50 to 60: "):
        read(rows, [(50, 70)])
