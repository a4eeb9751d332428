"""Column chunks of pages put together here: the vectors that are wanted come from their pages, and no others do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import ReadError
from dask_embedding_reader.formats.parquet.page_headers import PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY, PageHeader
from dask_embedding_reader.formats.parquet.page_index import PageIndex
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.plain_pages import Page, PlainChunk
from dask_embedding_reader.formats.raw import take_rows
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.pages import dictionary_of, encode_dictionary, encode_head, encode_page

Array = npt.NDArray[Any]
Change = Callable[[PageHeader, bytes], tuple[PageHeader, bytes]]

FIRST = 11
"""Where the column chunk begins in its file."""


class Made(NamedTuple):
    """A column chunk in a file."""

    file: StoredFile
    place: Place
    vectors: Array
    bounds: list[int]
    """The values before each page, and those of all."""
    starts: list[int]
    """Where each page is, and where the last one ends."""
    content: bytes

    def chunk(self, *, is_fetched: bool = False, index: PageIndex | None = None) -> PlainChunk:
        content = memoryview(self.content)
        fetch = (lambda start, stop: content[start:stop]) if is_fetched else None
        return PlainChunk(self.file, self.place, fetch, index)

    def page_index(self) -> PageIndex:
        rows = [bound // self.place.row_values for bound in self.bounds]
        return PageIndex(tuple(self.starts[:-1]), tuple(self.starts[1:]), tuple(rows))

    def pages_of(self, skip: int, rows: int) -> list[int]:
        """The values before each page that holds some of the rows."""
        first, last = skip * self.place.row_values, (skip + rows) * self.place.row_values
        bounds = zip(self.bounds, self.bounds[1:], strict=False)
        return [start for start, stop in bounds if start < last and first < stop]


def make(
    folder: Path,
    rows_of_pages: list[float],
    *,
    dimension: int = 6,
    kind: str = "list",
    dtype: str = "f4",
    codec: int = 0,
    version: int = 1,
    referring: int = 0,
    encoding: int = PLAIN,
    changes: dict[int, Change] | None = None,
) -> Made:
    """Pages of so many rows each, of which the first ones refer to a dictionary; some of them changed."""
    item = np.dtype(dtype)
    is_list = kind != "binary"
    row_values = dimension if is_list else 1
    counts = [round(rows * row_values) for rows in rows_of_pages]
    rows = sum(counts) // row_values
    assert rows * row_values == sum(counts)
    vectors = np.random.default_rng(rows).integers(0, 100, (rows, dimension)).astype(item)
    place = Place(FIRST, 0, sum(counts), codec, item, item, dimension, is_list, kind == "fixed", 2, True)
    content, starts, bounds = bytes(FIRST), [], [0]
    dictionary = dictionary_of(vectors, place) if referring else None
    if dictionary is not None:
        page, body = encode_dictionary(dictionary, place)
        content += encode_head(page) + body
    values = vectors.reshape(sum(counts), -1)
    for number, count in enumerate(counts):
        way = RLE_DICTIONARY if number < referring else encoding
        some = values[bounds[-1] : bounds[-1] + count]
        made = encode_page(some, place, bounds[-1], version=version, encoding=way, dictionary=dictionary)
        page, body = changes[number](*made) if changes and number in changes else made
        starts.append(len(content))
        content += encode_head(page) + body
        bounds.append(bounds[-1] + count)
    starts.append(len(content))
    path = folder / "chunk"
    path.write_bytes(content + bytes(20))
    file = StoredFile(LocalStore(LocalFileSystem()), str(path), Version(len(content) + 20))
    return Made(file, place._replace(stop=len(content)), vectors, bounds, starts, content)


def fill(made: Made, chunk: PlainChunk, skip: int, rows: int, dtype: Any = None) -> tuple[int, list[int]]:
    """Read rows; return how many came, which must be right, and the values before each page that they came from."""
    expected = made.vectors[skip : skip + rows]
    half = rows // 2
    outs = [np.empty((n, made.place.dimension), dtype or made.vectors.dtype) for n in (half, rows - half) if n]
    rest = deque(outs)
    pages: list[Page] = []

    def noted(found: Any) -> Any:
        for page in found:
            pages.append(page)
            yield page

    done = chunk.fill(noted(chunk.iter_pages(skip, rows)), skip, rows, 1_000 + skip, rest)
    np.testing.assert_array_equal(np.concatenate(outs)[:done], expected[:done])
    assert sum(map(len, rest)) == rows - done, "what did not come is left"
    return done, [page.before for page in pages]


def stretches(chance: Random, rows: int) -> list[tuple[int, int]]:
    """Rows, in ascending order, some of them together and some apart."""
    found, row = [], 0
    while row < rows:
        row += chance.choice([0, 0, 1, 3, 9])
        count = min(chance.choice([1, 2, 5, 14]), rows - row)
        if count > 0:
            found.append((row, count))
        row += max(0, count)
    return found


def random_pages(chance: Random, row_values: int) -> list[float]:
    """Some rows each; where a vector may be in two pages, any parts of some."""
    counts = [chance.randint(1, 9 * row_values) for _ in range(chance.randint(1, 8))]
    counts.append(row_values + -sum(counts) % row_values)
    return [count / row_values for count in counts]


KINDS = ["list", "fixed", "binary"]


@pytest.mark.parametrize("is_fetched", [False, True])
@pytest.mark.parametrize("codec", [0, 1, 6, 7])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_from_the_pages_that_hold_them(
    tmp_path: Path, kind: str, version: int, codec: int, is_fetched: bool
) -> None:
    chance = Random(codec)
    for dimension, dtype in ((6, "f4"), (1, "f8"), (40, "i4")):
        runs_on = kind != "binary" and version == 1
        rows_of_pages = random_pages(chance, dimension if runs_on else 1)
        referring = chance.choice([0, 1, 3, len(rows_of_pages)])
        how: dict[str, Any] = {"dimension": dimension, "dtype": dtype, "kind": kind, "version": version, "codec": codec}
        made = make(tmp_path, rows_of_pages, referring=referring, **how)
        for cast in (None, "f8"):
            chunk = made.chunk(is_fetched=is_fetched)
            for skip, rows in stretches(chance, len(made.vectors)):
                done, pages = fill(made, chunk, skip, rows, cast)
                assert done == rows
                assert pages == made.pages_of(skip, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("referring", [0, 2])
def test_with_an_index_pages_that_are_not_wanted_are_not_looked_at(tmp_path: Path, kind: str, referring: int) -> None:
    """Of remote files; but for the dictionary, and the page behind it."""
    made = make(tmp_path, [5, 3, 1, 8, 2, 2, 9], kind=kind, referring=referring)
    chance = Random(referring)
    for _ in range(6):
        looked_at: list[int] = []
        chunk = made.chunk(is_fetched=True, index=made.page_index())
        find = chunk._source.header

        def note(position: int, looked_at: list[int] = looked_at, find: Any = find) -> Any:
            looked_at.append(position)
            return find(position)

        chunk._source.header = note  # type: ignore[method-assign]
        wanted: set[int] = set()
        for skip, rows in stretches(chance, len(made.vectors)):
            assert fill(made, chunk, skip, rows) == (rows, made.pages_of(skip, rows))
            wanted.update(made.starts[made.bounds.index(before)] for before in made.pages_of(skip, rows))
        if referring:
            assert set(looked_at) == wanted | {FIRST, made.starts[0]}
        else:
            assert sorted(looked_at) == sorted(wanted), "each once"


@pytest.mark.parametrize("row", [0, 4, 5, 9, 29])
def test_with_an_index_one_row_takes_one_header(tmp_path: Path, row: int) -> None:
    made = make(tmp_path, [5, 3, 1, 8, 2, 2, 9])
    content, heads = memoryview(made.content), []

    def fetch(start: int, stop: int) -> memoryview:
        heads.append(start)
        return content[start:stop]

    chunk = PlainChunk(made.file, made.place, fetch, made.page_index())
    [page] = chunk.iter_pages(row, 1)
    assert heads == [made.starts[made.bounds.index(page.before)]]


def test_pages_with_more_values_than_their_chunk_are_not_believed(tmp_path: Path) -> None:
    """pyarrow says what is wrong with it."""
    for kind in KINDS:
        made = make(tmp_path, [5, 4, 4], kind=kind)
        fewer = made._replace(place=made.place._replace(values=made.place.values - made.place.row_values))
        assert fill(fewer, fewer.chunk(), 0, 12)[0] == 9
        assert fill(fewer, fewer.chunk(), 10, 1)[0] == 0


def test_an_index_that_tells_of_other_rows_is_not_believed(tmp_path: Path) -> None:
    made = make(tmp_path, [5, 3, 4, 8])
    for wrong in ((0, 6, 8, 12, 20), (0, 5, 7, 12, 20), (0, 5, 8, 13, 20), (0, 5, 8, 12, 21)):
        index = made.page_index()._replace(rows=wrong)
        complete = True
        for row in range(20):
            done, _ = fill(made, made.chunk(index=index), row, 1)
            complete &= done == 1
        assert not complete


# ---------------------------------------------------------------------------------------------------------------------
# Pages that are not plain, or are none


def with_other_levels(page: PageHeader, body: bytes) -> tuple[PageHeader, bytes]:
    """One vector is an item longer, and the next one shorter: bits of two levels are changed."""
    place = (4 if page.levels is None else 0) + 2
    return page, body[:place] + bytes([body[place] ^ 0b11]) + body[place + 1 :]


CHANGES: dict[str, Change] = {
    "other levels": with_other_levels,
    "another encoding": lambda page, body: (page._replace(encoding=5), body),
    "more values": lambda page, body: (page._replace(values=page.values + 1), body),
    "no values": lambda page, body: (page._replace(values=0), body),
    "longer than the chunk": lambda page, body: (page._replace(nbytes=page.nbytes + 10**6), body),
    "a dictionary": lambda page, body: (page._replace(is_dictionary=True, levels=None), body),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("kind", ["list", "fixed"])
@pytest.mark.parametrize("version", [1, 2])
def test_what_comes_is_right_though_a_page_is_not_plain(tmp_path: Path, changed: str, kind: str, version: int) -> None:
    """All rows before that page come, and none that are in it, in one go or one by one."""
    for bad in range(1 if changed == "a dictionary" else 0, 4):
        made = make(tmp_path, [5, 4, 4, 7], dimension=8, kind=kind, version=version, changes={bad: CHANGES[changed]})
        first = made.bounds[bad] // 8
        chunk = made.chunk()
        assert fill(made, chunk, 0, 20)[0] == first
        for size in (1, 3):
            chunk = made.chunk()
            for skip in range(0, first, size):
                rows = min(size, first - skip)
                done, _ = fill(made, chunk, skip, rows)
                # Whether a vector runs on behind its page is told by the next one alone.
                assert done == rows or (skip + rows == first and done == 0)
            assert fill(made, chunk, first, 1)[0] == 0


@pytest.mark.parametrize("is_counted", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 2, 4, 5])
def test_what_is_behind_is_proved_by_levels_up_to_the_end(tmp_path: Path, bad: int, is_counted: bool) -> None:
    """Where these are nearer than the beginning, and the chunk has as many values as it should."""
    made = make(tmp_path, [5, 4, 4, 3, 4, 5], dimension=8, changes={bad: with_other_levels})
    made = made._replace(place=made.place._replace(is_counted=is_counted))
    for skip in (14, 15):  # in the fourth page
        done, _ = fill(made, made.chunk(), skip, 1)
        assert done == int(is_counted or bad > 3)
    done, _ = fill(made, made.chunk(), 24, 1)
    assert done == int(is_counted and bad < 5)
    for skip in (6, 8):  # in the second page
        assert fill(made, made.chunk(), skip, 1)[0] == int(bad > 1)
    # Neither what is before nor what is behind is right.
    both = make(tmp_path, [5, 4, 4, 3, 4, 5], dimension=8, changes={0: with_other_levels, bad: with_other_levels})
    assert fill(both, both.chunk(), 15, 1)[0] == int(bad < 3)
    # Fetched pages are at hand in ascending order alone.
    made = make(tmp_path, [5, 4, 4, 3, 4, 5], dimension=8, changes={bad: with_other_levels})
    assert fill(made, made.chunk(is_fetched=True), 15, 1)[0] == int(bad > 3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("codec", [0, 1, 2, 6, 7])
def test_a_vector_may_run_on_behind_its_page(tmp_path: Path, codec: int, version: int) -> None:
    """Of the last row of a page the levels of the next one are looked at: its first one begins a vector."""
    how: dict[str, Any] = {"dimension": 8, "codec": codec, "version": version}
    made = make(tmp_path, [4, 4], **how)
    for skip in range(4):
        assert fill(made, made.chunk(), skip, 4 - skip)[0] == 4 - skip

    def run_on(page: PageHeader, body: bytes) -> tuple[PageHeader, bytes]:
        _, changed = encode_page(made.vectors[4:].reshape(-1), made.place, 1, version=version)
        return page._replace(nbytes=len(changed)), changed

    if version == 1 and not codec:
        longer = make(tmp_path, [4, 4], changes={1: run_on}, **how)
        assert fill(longer, longer.chunk(), 0, 3)[0] == 3
        assert fill(longer, longer.chunk(), 0, 4)[0] in (0, 3)
        assert fill(longer, longer.chunk(), 3, 1)[0] == 0
    gone = make(tmp_path, [4, 4], changes={1: lambda page, body: (page._replace(encoding=5), body)}, **how)
    assert fill(gone, gone.chunk(), 0, 3)[0] == 3


def test_dictionaries_come_first_and_are_plain(tmp_path: Path) -> None:
    made = make(tmp_path, [5, 4, 4], referring=2)
    assert fill(made, made.chunk(), 0, 13)[0] == 13
    content = bytearray(made.content)
    head = encode_head(encode_dictionary(dictionary_of(made.vectors, made.place), made.place)[0])
    assert content[FIRST:].startswith(head)
    for encoding in (PLAIN, PLAIN_DICTIONARY, 3):
        page, body = encode_dictionary(dictionary_of(made.vectors, made.place), made.place, encoding)
        other = bytes(content[:FIRST]) + encode_head(page) + body + bytes(content[made.starts[0] :])
        Path(made.file.path).write_bytes(other + bytes(20))
        assert fill(made, made.chunk(), 0, 13)[0] == (0 if encoding == 3 else 13)


@pytest.mark.parametrize("codec", [0, 1, 2, 4, 6, 7])
@pytest.mark.parametrize("dimension", [8, 5_000])
def test_levels_of_any_length_are_looked_at_without_the_values(tmp_path: Path, codec: int, dimension: int) -> None:
    """Behind them are far more bytes, of which a few are read."""
    rows = (40_000 if codec in (0, 7) else 15_000) // dimension
    made = make(tmp_path, [rows] * 4, dimension=dimension, codec=codec)
    read: list[int] = []
    chunk = made.chunk()
    find = chunk._source.read

    def note(start: int, stop: int) -> memoryview:
        read.append(stop - start)
        return find(start, stop)

    chunk._source.read = note  # type: ignore[method-assign]
    assert fill(made, chunk, 2 * rows + 1, 1)[0] == 1
    if codec != 6:  # which decompresses 128 KB at a time
        assert max(read) <= 2**14


def test_levels_may_be_many(tmp_path: Path) -> None:
    """80 KB of them, before which nothing tells how many there are."""
    made = make(tmp_path, [80_000, 80_000], dimension=8, codec=1, dtype="f2")
    assert fill(made, made.chunk(), 80_001, 1)[0] == 1


def test_rows_are_taken_out_of_arrays() -> None:
    arrays = [np.arange(start, start + 3) for start in (0, 3, 6)]
    for first in range(10):
        for rows in range(10 - first):
            rest = deque(arrays)
            before = take_rows(rest, first)
            taken = take_rows(rest, rows)
            assert np.concatenate([*before, [], *taken]).tolist() == list(range(first + rows))
            assert sum(map(len, taken)) == rows
            assert all(map(len, taken))
            assert np.concatenate([[], *rest]).tolist() == list(range(first + rows, 9))


def test_the_rows_that_could_not_be_read_are_named(tmp_path: Path) -> None:
    made = make(tmp_path, [5, 4, 4, 7], dimension=8)
    content = memoryview(made.content)

    def fetch(start: int, stop: int) -> memoryview:
        if start >= made.starts[2]:
            raise ReadError("gone")
        return content[start:stop]

    for skip, rows, done in ((0, 20, 9), (6, 10, 3), (10, 1, 0)):
        chunk = PlainChunk(made.file, made.place._replace(is_fixed=True), fetch)
        outs = deque([np.empty((rows, 8), "f4")])
        with pytest.raises(ReadError, match=rf"^rows {1_000 + skip + done:,} to {1_000 + skip + rows:,}: gone$"):
            chunk.fill(chunk.iter_pages(skip, rows), skip, rows, 1_000 + skip, outs)
        assert sum(map(len, outs)) == rows - done
