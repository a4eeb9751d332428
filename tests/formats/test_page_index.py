"""Few rows of remote row groups: their pages are fetched and no others, where the file has an index of pages."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
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
from dask_embedding_reader.formats.parquet import page_index
from dask_embedding_reader.formats.parquet.footer import parse_footer
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from dask_embedding_reader.formats.parquet.page_index import PageIndex
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import Bucket, emptied_bucket

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
