"""Column chunks of remote files are fetched window by window, several at once where few others ask."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, pairwise
from random import Random
from typing import Any

import fsspec
import numpy as np
import pytest

from dask_embedding_reader import FileChangedError
from dask_embedding_reader.formats.parquet import chunk_file
from dask_embedding_reader.formats.parquet.chunk_file import MOST_WINDOWS, ChunkFile
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.read import read_each_into
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import emptied_bucket

CONTENT = np.random.default_rng(0).bytes(100_000)
WINDOW = 4_000
CHUNK = (10_000, 90_000)
Ranges = list[tuple[int, int]]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Ranges]:
    """What is asked for, at once and one after the other."""
    gc.collect()  # what other tests have read is counted as long as it is there
    calls: list[Ranges] = []

    def note(file: Any, ranges: Any) -> None:
        calls.append([(start, start + sum(map(len, parts))) for start, parts in ranges])
        read_each_into(file, ranges)

    monkeypatch.setattr(chunk_file, "read_each_into", note)
    return calls


@pytest.fixture
def file() -> Iterator[StoredFile]:
    with emptied_bucket() as bucket:
        bucket.put("a", CONTENT)
        yield StoredFile(FsspecStore(fsspec.filesystem("bucket")), "a", Version(len(CONTENT)))


@pytest.mark.parametrize("others", [0, 1, 2, 15])
def test_so_many_windows_are_fetched_at_once_as_connections_idle(
    file: StoredFile, fetched: list[Ranges], others: int
) -> None:
    chunks = ChunkFile(file, [CHUNK], WINDOW)
    assert not [ranges for ranges in fetched if ranges], "it is fetched when it is read"
    fetched.clear()
    windows = max(1, min(MOST_WINDOWS, file.store.connections // (4 * (others + 1))))
    read = [ChunkFile(file, [CHUNK], WINDOW) for _ in range(others)]
    for each in read:
        each.read_at(CHUNK[0], CHUNK[0] + 1)
    fetched.clear()
    position = CHUNK[0]
    while position < CHUNK[1]:
        assert bytes(chunks.read_at(position, position + 700)) == CONTENT[position : min(position + 700, CHUNK[1])]
        position += 700
    assert {len(ranges) for ranges in fetched[:-1]} == {windows}
    assert max(stop - start for start, stop in chain(*fetched)) == WINDOW
    assert all(stop == start for (_, stop), (start, _) in pairwise(chain(*fetched))), "each byte once, in order"
    assert (fetched[0][0][0], fetched[-1][-1][1]) == CHUNK


def test_who_reads_no_more_is_not_counted(file: StoredFile, fetched: list[Ranges]) -> None:
    for path in ["a", "gone"] * file.store.connections:
        chunks = ChunkFile(file._replace(path=path), [CHUNK], WINDOW)
        with suppress(FileChangedError):
            chunks.read_at(*CHUNK)
    del chunks
    gc.collect()  # errors keep it for a while
    fetched.clear()
    ChunkFile(file, [CHUNK], WINDOW).read_at(CHUNK[0], CHUNK[0] + 1)
    assert len(fetched[-1]) == MOST_WINDOWS


@pytest.mark.parametrize("start", [CHUNK[0], CHUNK[0] + 50])
def test_what_is_larger_than_all_windows_is_fetched_too(file: StoredFile, fetched: list[Ranges], start: int) -> None:
    chunks = ChunkFile(file, [CHUNK], WINDOW)
    assert bytes(chunks.read_at(10_000, 10_100)) == CONTENT[10_000:10_100]
    assert bytes(chunks.read_at(start, 80_000)) == CONTENT[start:80_000]
    assert all(stop == start for (_, stop), (start, _) in pairwise(chain(*fetched)))


def windows_of(file: StoredFile) -> int:
    """How many bytes are fetched at once for whoever reads alone."""
    return min(MOST_WINDOWS, file.store.connections // 4) * WINDOW


@pytest.mark.parametrize(
    ("step", "from_there"),
    [(0, 0), (1, 0), (WINDOW // 4, 0), (WINDOW // 4 + 1, WINDOW // 4 + 1), (2 * WINDOW, 2 * WINDOW)],
)
def test_what_is_passed_over_is_fetched_if_it_is_little(
    file: StoredFile, fetched: list[Ranges], step: int, from_there: int
) -> None:
    """A quarter of a window: then what is held goes on to be one stretch."""
    chunks = ChunkFile(file, [CHUNK], WINDOW)
    chunks.read_at(CHUNK[0], CHUNK[0] + 1)
    behind = CHUNK[0] + windows_of(file)
    fetched.clear()
    start = behind + step
    assert bytes(chunks.read_at(start, start + 10)) == CONTENT[start : start + 10]
    [ranges] = fetched
    assert (ranges[0][0], ranges[-1][1]) == (behind + from_there, start + windows_of(file))
    assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))


@pytest.mark.parametrize("step", [0, 300, WINDOW // 4])
def test_a_little_of_what_was_fetched_is_kept(file: StoredFile, fetched: list[Ranges], step: int) -> None:
    """The quarter of a window before what is read next, as the header behind a page is looked at before the page."""
    chunks = ChunkFile(file, [CHUNK], WINDOW)
    chunks.read_at(CHUNK[0], CHUNK[0] + 1)
    start = CHUNK[0] + windows_of(file) + step
    chunks.read_at(start, start + 10)
    fetched.clear()
    first = start - WINDOW // 4
    assert bytes(chunks.read_at(first, start + 20)) == CONTENT[first : start + 20]
    assert not fetched
    assert bytes(chunks.read_at(first - 1, first)) == CONTENT[first - 1 : first]
    assert fetched[0][0][0] == first - 1


def test_nothing_is_fetched_behind_a_chunk_nor_of_what_is_none(file: StoredFile, fetched: list[Ranges]) -> None:
    chunks = ChunkFile(file, [(50_000, 56_000), (CHUNK[0], 20_000)], WINDOW)
    fetched.clear()
    assert bytes(chunks.read_at(55_000, 60_000)) == CONTENT[55_000:56_000]
    assert fetched.pop()[-1][1] == 56_000
    assert bytes(chunks.read_at(19_999, 20_001)) == CONTENT[19_999:20_000]
    assert bytes(chunks.read_at(10_000, 10_001)) == CONTENT[10_000:10_001]
    fetched.clear()
    for start in (9_999, 20_000, 49_999, 56_000):
        assert bytes(chunks.read_at(start, start + 10)) == b""
    assert not fetched


def test_small_chunks_are_fetched_at_once_and_those_that_touch_together(
    file: StoredFile, fetched: list[Ranges]
) -> None:
    small = [(100, 200), (3_000, 3_000 + WINDOW), (200, 350), (351, 360), (0, 99)]
    chunks = ChunkFile(file, [*small, CHUNK, (7_500, 7_500 + WINDOW + 1)], WINDOW)
    assert fetched == [[(0, 99), (100, 350), (351, 360), (3_000, 3_000 + WINDOW)]]
    fetched.clear()
    for start, stop in small:
        assert bytes(chunks.read_at(start, stop)) == CONTENT[start:stop]
        assert bytes(chunks.read_at(start + 10, stop + 10)) == CONTENT[start + 10 : stop]
    assert not fetched
    chunks.read_at(7_500, 7_501)
    assert fetched


def test_it_is_a_file_that_pyarrow_reads_in_any_order(file: StoredFile) -> None:
    chunks = ChunkFile(file, [CHUNK, (0, 300)], WINDOW)
    assert chunks.readable()
    assert chunks.seekable()
    assert chunks.tell() == 0
    assert (chunks.read(5), chunks.tell()) == (CONTENT[:5], 5)
    assert (chunks.seek(290), chunks.read(20), chunks.tell()) == (290, CONTENT[290:300], 300)
    assert (chunks.seek(20_000), chunks.read(20), chunks.tell()) == (20_000, CONTENT[20_000:20_020], 20_020)
    assert (chunks.seek(-10, io.SEEK_CUR), chunks.read(3)) == (20_010, CONTENT[20_010:20_013])
    assert chunks.seek(-20_000, io.SEEK_END) == len(CONTENT) - 20_000
    assert chunks.read(4) == CONTENT[-20_000:-19_996]


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_are_those_of_the_file(file: StoredFile, seed: int) -> None:
    chance = Random(seed)
    bounds = sorted(chance.sample(range(len(CONTENT)), 8))
    whole = [(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
    chunks = ChunkFile(file, whole, WINDOW)
    held: list[tuple[memoryview, bytes]] = []
    for _ in range(60):
        start, stop = chance.choice(whole)
        first = chance.randrange(start, stop)
        last = first + chance.choice([0, 1, 100, WINDOW // 4, WINDOW, 5 * WINDOW])
        expected = CONTENT[first : min(last, stop)]
        held.append((chunks.read_at(first, last), expected))
        assert all(found == before for found, before in held[-5:]), "what was returned stays as it is"
