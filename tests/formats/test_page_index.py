"""Few rows of remote row groups: their pages are fetched and no others, where the file has an index of pages."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.budget import cached_nbytes
from dask_embedding_reader.errors import EmbeddingReaderError
from dask_embedding_reader.formats.parquet import page_index
from dask_embedding_reader.formats.parquet.column_chunks import Chunk
from dask_embedding_reader.formats.parquet.footer import parse_footer
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from dask_embedding_reader.formats.parquet.page_index import PageIndex, read_page_index
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import Bucket, emptied_bucket
from tests.support.thrift import I32, I64, LIST, STRUCT, Value, encoded_fields

ROWS, DIMENSION, PAGE_ROWS = 12_000, 128, 128
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIMENSION)).astype(np.float32)
VECTORS[:300] = VECTORS[0]  # what a dictionary holds
URL = "bucket://emb/0.parquet"

KINDS = ["list", "fixed", "binary"]
WRITERS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none", "use_dictionary": False},
    "default": {},
    "zstd-v2": {"compression": "zstd", "data_page_version": "2.0"},
}


@cache
def written(kind: str, writer: str) -> bytes:
    """One row group of 6 MB in pages of 64 KB, with an index."""
    items = pa.array(VECTORS.reshape(-1))
    if kind == "list":
        column: Any = pa.ListArray.from_arrays(pa.array(np.arange(ROWS + 1, dtype=np.int32) * DIMENSION), items)
    elif kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(items, DIMENSION)
    else:
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIMENSION * 4), ROWS, [None, pa.py_buffer(VECTORS.tobytes())]
        )
    table = pa.table({"n": np.arange(ROWS), "embedding": column})
    sink = pa.BufferOutputStream()
    batch = PAGE_ROWS if kind == "binary" else PAGE_ROWS * DIMENSION
    options = {"data_page_size": 1, "write_batch_size": batch, "dictionary_pagesize_limit": 2**15, **WRITERS[writer]}
    pq.write_table(table, sink, write_page_index=True, **options)
    return bytes(sink.getvalue())


def place_of_index(data: bytes) -> tuple[int, int, int, int]:
    """Where the index of the pages of vectors is, and these."""
    footer_nbytes = int.from_bytes(data[-8:-4], "little") + 8
    footer = parse_footer(URL, data[-footer_nbytes:], len(data) - footer_nbytes)
    [chunk] = footer.chunks(1)
    return *footer.index_place(1, 0), chunk.start, chunk.stop


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An object store that counts, to which a request is worth no more than a page."""
    with emptied_bucket() as store:
        yield store


def opened(kind: str) -> EmbeddingReader:
    FOOTERS.clear()
    page_index.INDICES.clear()
    return EmbeddingReader(URL, embedding_dtype="float32" if kind == "binary" else None)


def batches(reader: EmbeddingReader, start: int = 0, stop: int | None = None) -> Any:
    return np.concatenate([part for part, _ in reader(50, start, stop, show_progress=False)])


FAR_APART = [5, 3000, 3001, 6_000, 9_000, 11_999]  # nearer ones are read in one go, as a request takes a while

WAYS: dict[str, tuple[Callable[[EmbeddingReader], Any], list[int]]] = {
    "slice": (lambda reader: reader.to_dask_array()[7_000:7_010].compute(), [*range(7_000, 7_010)]),
    "row": (lambda reader: reader.to_dask_array()[11_999:].compute(), [11_999]),
    "range of batches": (lambda reader: batches(reader, 6_000, 6_300), [*range(6_000, 6_300)]),
    "batches of a view": (lambda reader: batches(reader.take(FAR_APART)), FAR_APART),
    "array of a view": (lambda reader: reader.take(FAR_APART).to_dask_array().compute(), FAR_APART),
    "backwards": (lambda reader: batches(reader.take(FAR_APART[::-1])), FAR_APART[::-1]),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(("kind", "writer"), list(product(KINDS, WRITERS)))
def test_few_rows_cost_their_pages(bucket: Bucket, kind: str, writer: str, way: str) -> None:
    data = written(kind, writer)
    bucket.put("emb/0.parquet", data)
    reader = opened(kind)
    read, rows = WAYS[way]
    bucket.forget()
    np.testing.assert_array_equal(read(reader), VECTORS[rows])
    first, last, start, stop = place_of_index(data)
    fetched = [asked for asked in bucket.reads if start <= asked.start < stop]
    pages = len({row // PAGE_ROWS for row in rows})
    # A page takes 64 KB; a dictionary, and pages around a limit of one, as much again.
    assert sum(asked.stop - asked.start for asked in fetched) <= (pages + 3) * (stop - start) // (ROWS // PAGE_ROWS)
    assert len(fetched) <= pages + 1
    assert [asked for asked in bucket.reads if asked not in fetched and asked.stop <= last] == [
        asked for asked in bucket.reads if (asked.start, asked.stop) == (first, last)
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_rows_are_those_of_the_file(kind: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=200))
    writer = data.draw(st.sampled_from(list(WRITERS)))
    with emptied_bucket() as bucket:
        bucket.put("emb/0.parquet", written(kind, writer))
        reader = opened(kind).take(rows)
        np.testing.assert_array_equal(batches(reader), VECTORS[rows])
        np.testing.assert_array_equal(reader.to_dask_array().compute(), VECTORS[rows])


Page = tuple[int, int, int]
"""Where a page is, how many bytes it takes, and its first row."""


def spelled(value: int) -> bytes:
    """An integer, in the way of Thrift."""
    value, found = value << 1, bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def pages_of(index: bytes) -> list[Page]:
    """The pages of an index: three integers for each, every one behind a byte, and a zero."""
    numbers: list[int] = []
    position = 3
    while len(numbers) < 3 * index[2]:
        position += 1 if index[position] else 2
        value = shift = 0
        while True:
            byte = index[position]
            value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
            if byte < 128:
                break
        numbers.append(value >> 1)
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def with_pages(data: bytes, change: Callable[[list[Page]], list[Page]]) -> bytes:
    """A file with an index that says something else, and is no longer."""
    first, last, _, _ = place_of_index(data)
    pages = change(pages_of(data[first:last]))
    structs = b"".join(b"\x16%b\x15%b\x16%b\x00" % tuple(map(spelled, page)) for page in pages)
    index = b"\x19\xfc%c%b\x00" % (len(pages), structs)
    assert len(index) <= last - first
    return data[:first] + index.ljust(last - first, b"\0") + data[last:]


def changed(pages: list[Page], number: int, *, place: int = 0, row: int = 0) -> list[Page]:
    """Pages, one of which lies or begins elsewhere."""
    where, nbytes, first = pages[number]
    return [*pages[:number], (where + place, nbytes, first + row), *pages[number + 1 :]]


WRONG: dict[str, Callable[[list[Page], int], list[Page]]] = {
    "a page begins a row later": lambda pages, n: changed(pages, n, row=1),
    "the next page begins a row earlier": lambda pages, n: changed(pages, n + 1, row=-1),
    "a page is left out": lambda pages, n: [*pages[:n], *pages[n + 1 :]],
    "pages have half of their rows": lambda pages, _: [(place, nbytes, row // 2) for place, nbytes, row in pages],
    "a page is where the one before is": lambda pages, n: changed(pages, n, place=pages[n - 1][0] - pages[n][0]),
    "a page is nowhere": lambda pages, n: changed(pages, n, place=1),
    "the first one is in another column": lambda pages, _: changed(pages, 0, place=10 - pages[0][0]),
    "the last one is in another column": lambda pages, _: changed(pages, len(pages) - 1, place=100),
    "none": lambda _, __: [],
}


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("writer", list(WRITERS))
def test_an_index_that_is_wrong_is_not_believed(bucket: Bucket, writer: str, wrong: str) -> None:
    pages = pages_of(written("list", writer)[slice(*place_of_index(written("list", writer))[:2])])
    page = next(n for n, (_, _, row) in enumerate(pages) if row > ROWS // 2)
    data = with_pages(written("list", writer), lambda pages: WRONG[wrong](pages, page))
    first, last, start, stop = place_of_index(data)
    bucket.put("emb/0.parquet", data)
    reader = opened("list")
    bucket.forget()
    row = pages[page][2]
    for rows in (slice(row, row + 3), slice(row - 2, row + 2), slice(ROWS - 3, ROWS)):
        np.testing.assert_array_equal(reader.to_dask_array()[rows].compute(), VECTORS[rows])
    np.testing.assert_array_equal(batches(reader.take(FAR_APART)), VECTORS[FAR_APART])
    for asked in bucket.reads:
        assert start <= asked.start <= asked.stop <= stop or (asked.start, asked.stop) == (first, last)


def test_what_is_kept_takes_no_more_than_is_counted() -> None:
    page_index.INDICES.clear()
    before, pages = cached_nbytes(), range(2**20, 2**20 + 4_000)
    tracemalloc.start()
    index = PageIndex(*(tuple(page + 2**30 * n for page in pages) for n in range(3)))
    took, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took <= 1.2 * index.nbytes
    file = StoredFile(LocalStore(LocalFileSystem()), "0.parquet", Version(1))
    page_index.INDICES.put((file, 0), index)
    assert cached_nbytes() - before == index.nbytes  # it counts in every budget
    page_index.INDICES.clear()
    assert cached_nbytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# The index itself


@st.composite
def indices(draw: st.DrawFn) -> tuple[Chunk, list[Page], int]:
    """Pages that lie one after the other in a chunk, with gaps or without, and the rows of all."""
    start = position = draw(st.integers(4, 50))
    row, pages = 0, []
    for _ in range(draw(st.integers(1, 20))):
        position += draw(st.sampled_from([0, 0, 1, 100]))
        nbytes = draw(st.sampled_from([1, 2, 5_000]))
        pages.append((position, nbytes, row))
        position += nbytes
        row += draw(st.sampled_from([1, 2, 300]))
    return Chunk(start, position + draw(st.sampled_from([0, 1, 50])), 9, None, 4, 0), pages, row


def written_index(path: Path, pages: list[Page]) -> tuple[StoredFile, tuple[int, int]]:
    """A file that holds an index at some place."""
    structs = [Value(STRUCT, {1: Value(I64, p), 2: Value(I32, n), 3: Value(I64, row)}) for p, n, row in pages]
    index = encoded_fields({1: Value(LIST, structs, STRUCT)})
    path.write_bytes(b"before" + index + b"behind")
    file = StoredFile(LocalStore(LocalFileSystem()), str(path), Version(12 + len(index)))
    page_index.INDICES.clear()
    return file, (6, 6 + len(index))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indices")


@given(indices())
def test_an_index_tells_where_rows_are(folder: Path, given_index: tuple[Chunk, list[Page], int]) -> None:
    chunk, pages, rows = given_index
    file, place = written_index(folder / "index", pages)
    index = read_page_index(file, place, chunk, rows)
    assert index is not None
    firsts = [row for _, _, row in pages]
    for row in {0, rows - 1, *firsts, *(first - 1 for first in firsts[1:])}:
        number = sum(first <= row for first in firsts) - 1
        assert index.page_of(row) == number
        start, nbytes, _ = pages[number]
        assert index.bytes_of(row, row + 1) == (start, start + nbytes)
        assert index.bytes_of(0, row + 1) == (pages[0][0], start + nbytes)
        assert index.bytes_of(row, rows) == (start, pages[-1][0] + pages[-1][1])
    (folder / "index").unlink()
    assert read_page_index(file, place, chunk, rows) is index, "it is kept"


WRONG_INDICES: dict[str, tuple[list[Page], bool]] = {
    "right": ([(10, 5, 0), (15, 5, 3), (22, 8, 5)], True),
    "none": ([], False),
    "another first row": ([(10, 5, 1), (15, 5, 3), (22, 8, 5)], False),
    "no rows": ([(10, 5, 0), (15, 5, 3), (22, 8, 3)], False),
    "fewer rows": ([(10, 5, 0), (15, 5, 3), (22, 8, 2)], False),
    "no rows in the last": ([(10, 5, 0), (15, 5, 3), (22, 8, 9)], False),
    "one row in the last": ([(10, 5, 0), (15, 5, 3), (22, 8, 8)], True),
    "no bytes": ([(10, 5, 0), (15, 0, 3), (22, 8, 5)], False),
    "before the chunk": ([(9, 5, 0), (15, 5, 3), (22, 8, 5)], False),
    "behind the chunk": ([(10, 5, 0), (15, 5, 3), (22, 9, 5)], False),
    "in each other": ([(10, 6, 0), (15, 5, 3), (22, 8, 5)], False),
}


@pytest.mark.parametrize("wrong", WRONG_INDICES)
def test_an_index_lies_in_its_chunk_page_by_page(tmp_path: Path, wrong: str) -> None:
    pages, is_right = WRONG_INDICES[wrong]
    file, place = written_index(tmp_path / "index", pages)
    assert (read_page_index(file, place, Chunk(10, 30, 9, None, 4, 0), 9) is not None) == is_right


def test_an_index_that_is_damaged_or_long_is_not_believed(tmp_path: Path) -> None:
    pages = [(4 + 8 * n, 8, n) for n in range(100)]
    chunk = Chunk(4, 4 + 8 * len(pages), 9, None, 4, 0)
    file, (start, stop) = written_index(tmp_path / "index", pages)
    data = (tmp_path / "index").read_bytes()
    (tmp_path / "index").write_bytes(data + bytes(2**16))
    file = file._replace(version=Version(len(data) + 2**16))
    assert read_page_index(file, (start, start + 2**16), chunk, len(pages)) is not None
    page_index.INDICES.clear()
    for place in ((start, start), (start, start - 5), (start, start + 2**16 + 1), (start, stop - 2), (start + 1, stop)):
        assert read_page_index(file, place, chunk, len(pages)) is None
    assert read_page_index(file, (start, start + 1), chunk, len(pages)) is None
    (tmp_path / "index").unlink()
    with pytest.raises(EmbeddingReaderError):
        read_page_index(file, (start, stop), chunk, len(pages))
