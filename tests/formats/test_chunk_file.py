"""Column chunks of remote files are fetched block by block, several ahead where few others ask."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import FileChangedError
from dask_embedding_reader._common.threads import threads_at_once
from dask_embedding_reader.formats.parquet import chunk_file
from dask_embedding_reader.formats.parquet.chunk_file import ChunkFile, Extent
from dask_embedding_reader.storage import read as storage_read
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.read import read_each_into
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import emptied_bucket

CONTENT = np.random.default_rng(0).bytes(100_000)
BLOCK = 4_000
CHUNK = Extent(10_000, 90_000, 90_000)
ALONE = 2
"""So many blocks come ahead where no pool of threads says how many requests a pass may have."""


def all_of(start: int, stop: int) -> Extent:
    """A chunk that is wanted whole."""
    return Extent(start, stop, stop)


class _AtOnce:
    """Does at once, in the same thread, what threads would do: then its order is no chance."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is asked for, in order."""
    gc.collect()  # what other tests have read is counted as long as it is there
    asked: list[tuple[int, int]] = []

    def note(file: Any, ranges: Any) -> None:
        asked.extend((start, start + sum(map(len, parts))) for start, parts in ranges)
        read_each_into(file, ranges)

    for module in (chunk_file, storage_read):
        monkeypatch.setattr(module, "read_each_into", note)
    monkeypatch.setattr(chunk_file, "pool_beside", lambda threads: _AtOnce())
    return asked


@pytest.fixture(scope="module")
def file() -> Iterator[StoredFile]:
    with emptied_bucket() as bucket:
        bucket.put("a", CONTENT)
        yield StoredFile(FsspecStore(fsspec.filesystem("bucket")), "a", Version(len(CONTENT)))


@pytest.mark.parametrize("others", [0, 1, 2, 15])
def test_so_many_blocks_come_ahead_as_connections_idle(
    file: StoredFile, fetched: list[tuple[int, int]], others: int
) -> None:
    chunks = ChunkFile(file, [CHUNK], BLOCK)
    assert not fetched, "it is fetched when it is read"
    read = [ChunkFile(file, [CHUNK], BLOCK) for _ in range(others)]
    for each in read:
        each.read_at(CHUNK.start, CHUNK.start + 1)
    fetched.clear()
    ahead = max(1, ALONE // (others + 1))
    for position in range(CHUNK.start, CHUNK.stop, 700):
        assert bytes(chunks.read_at(position, position + 700)) == CONTENT[position : min(position + 700, CHUNK.stop)]
        # What has just been read is kept until a quarter of the next block has been read, which takes its place.
        assert position + (ahead - 1) * BLOCK < fetched[-1][1] <= position + 700 + (ahead + 1) * BLOCK or (
            fetched[-1][1] == CHUNK.stop
        )
    assert max(stop - start for start, stop in fetched) == BLOCK
    assert all(stop == start for (_, stop), (start, _) in pairwise(fetched)), "each byte once, in order"
    assert (fetched[0][0], fetched[-1][1]) == (CHUNK.start, CHUNK.stop)


@pytest.mark.parametrize("threads", [1, 7, 99])
def test_of_a_pool_of_threads_each_may_ask_once(file: StoredFile, fetched: list[tuple[int, int]], threads: int) -> None:
    with threads_at_once(threads) as pool:
        pool.submit(lambda: ChunkFile(file, [CHUNK], BLOCK).read_at(CHUNK.start, CHUNK.start + 1)).result()
    assert len(fetched) == 1 + min(threads, file.store.connections)


def test_several_chunks_share_what_may_be_asked(file: StoredFile, fetched: list[tuple[int, int]]) -> None:
    extents = [all_of(start, start + 40_000) for start in (10_000, 50_000)]
    chunks = ChunkFile(file, extents, BLOCK)
    chunks.read_at(10_000, 10_001)
    assert len(fetched) == 1 + ALONE, "the other is not read yet"
    fetched.clear()
    chunks.read_at(50_000, 50_001)
    assert len(fetched) == 1 + ALONE // 2
    chunks.read_at(49_000, 50_000)
    fetched.clear()
    chunks.read_at(57_500, 57_501)
    assert fetched[-1][1] == 54_000 + (1 + ALONE) * BLOCK, "the other has all it needs"


def test_small_chunks_are_fetched_at_once_and_those_that_touch_together(
    file: StoredFile, fetched: list[tuple[int, int]]
) -> None:
    small = [(100, 200), (3_000, 3_000 + BLOCK), (200, 350), (351, 360), (0, 99)]
    chunks = ChunkFile(file, [all_of(*each) for each in [*small, CHUNK[:2], (7_500, 7_500 + BLOCK + 1)]], BLOCK)
    assert fetched == [(0, 99), (100, 350), (351, 360), (3_000, 3_000 + BLOCK)]
    fetched.clear()
    for start, stop in small:
        assert bytes(chunks.read_at(start, stop)) == CONTENT[start:stop]
        assert bytes(chunks.read_at(start + 10, stop + 10)) == CONTENT[start + 10 : stop]
    assert not fetched
    chunks.read_at(7_500, 7_501)
    assert fetched == [(7_500, 7_500 + BLOCK), (7_500 + BLOCK, 7_500 + BLOCK + 1)]


@pytest.mark.parametrize(
    ("step", "from_there"),
    [(0, 0), (1, 0), (BLOCK // 4, 0), (BLOCK // 4 + 1, BLOCK // 4 + 1), (2 * BLOCK, 2 * BLOCK)],
)
def test_what_is_passed_over_is_fetched_if_it_is_little(
    file: StoredFile, fetched: list[tuple[int, int]], step: int, from_there: int
) -> None:
    """A quarter of a block: then what is held goes on to be one stretch."""
    chunks = ChunkFile(file, [CHUNK], BLOCK)
    chunks.read_at(CHUNK.start, CHUNK.start + 1)
    behind = fetched[-1][1]
    fetched.clear()
    start = behind + step
    assert bytes(chunks.read_at(start, start + 10)) == CONTENT[start : start + 10]
    assert fetched[0] == (behind + from_there, behind + from_there + BLOCK)
    assert all(stop == start for (_, stop), (start, _) in pairwise(fetched))


@pytest.mark.parametrize("step", [0, 300, BLOCK // 4])
def test_a_little_of_what_was_fetched_is_kept(file: StoredFile, fetched: list[tuple[int, int]], step: int) -> None:
    """What was read last, until a quarter of the next block is read: a header is looked at before the page before."""
    chunks = ChunkFile(file, [CHUNK], BLOCK)
    chunks.read_at(CHUNK.start, CHUNK.start + 1)
    start = CHUNK.start + 3 * BLOCK + step
    chunks.read_at(start, start + 10)
    fetched.clear()
    first = start - step - (1 if step < BLOCK // 4 else 0)
    assert bytes(chunks.read_at(first, start + 20)) == CONTENT[first : start + 20]
    assert not fetched
    first -= BLOCK
    assert bytes(chunks.read_at(first, first + 1)) == CONTENT[first : first + 1]
    assert fetched[0] == (first, first + BLOCK)


def test_nothing_is_fetched_behind_a_chunk_nor_of_what_is_none(
    file: StoredFile, fetched: list[tuple[int, int]]
) -> None:
    chunks = ChunkFile(file, [all_of(50_000, 56_000), all_of(CHUNK.start, 20_000)], BLOCK)
    assert bytes(chunks.read_at(55_000, 60_000)) == CONTENT[55_000:56_000]
    assert fetched == [(55_000, 56_000)]
    assert bytes(chunks.read_at(19_999, 20_001)) == CONTENT[19_999:20_000]
    assert bytes(chunks.read_at(10_000, 10_001)) == CONTENT[10_000:10_001]
    fetched.clear()
    for start in (9_999, 20_000, 49_999, 56_000):
        assert bytes(chunks.read_at(start, start + 10)) == b""
    assert not fetched


def test_it_is_a_file_that_pyarrow_reads_in_any_order(file: StoredFile) -> None:
    chunks = ChunkFile(file, [CHUNK, all_of(0, 300)], BLOCK)
    assert chunks.readable()
    assert chunks.seekable()
    assert chunks.tell() == 0
    assert (chunks.read(5), chunks.tell()) == (CONTENT[:5], 5)
    assert (chunks.seek(290), chunks.read(20), chunks.tell()) == (290, CONTENT[290:300], 300)
    assert (chunks.seek(20_000), chunks.read(20), chunks.tell()) == (20_000, CONTENT[20_000:20_020], 20_020)
    assert (chunks.seek(-10, io.SEEK_CUR), chunks.read(3)) == (20_010, CONTENT[20_010:20_013])
    assert chunks.seek(-20_000, io.SEEK_END) == len(CONTENT) - 20_000
    assert chunks.read(4) == CONTENT[-20_000:-19_996]


def test_behind_what_is_likely_wanted_only_what_is_asked_for_is_fetched(
    file: StoredFile, fetched: list[tuple[int, int]]
) -> None:
    chunks = ChunkFile(file, [CHUNK._replace(likely_stop=CHUNK.start + BLOCK + 1)], BLOCK)
    chunks.read_at(CHUNK.start, CHUNK.start + 1)
    assert len(fetched) == 2
    for block in range(2, 20):
        start = CHUNK.start + block * BLOCK
        assert bytes(chunks.read_at(start, start + 10)) == CONTENT[start : start + 10]
        assert fetched[-1] == (start, start + BLOCK)


@pytest.mark.parametrize("start", [CHUNK.start, CHUNK.start + 50])
def test_what_is_larger_than_all_blocks_is_fetched_too(
    file: StoredFile, fetched: list[tuple[int, int]], start: int
) -> None:
    chunks = ChunkFile(file, [CHUNK], BLOCK)
    assert bytes(chunks.read_at(start, start + 100)) == CONTENT[start : start + 100]
    assert bytes(chunks.read_at(start + 50, 80_000)) == CONTENT[start + 50 : 80_000]
    assert fetched[0][0] == start
    assert all(stop == start for (_, stop), (start, _) in pairwise(fetched))


def test_blocks_come_into_the_memory_of_earlier_ones(file: StoredFile, fetched: list[tuple[int, int]]) -> None:
    chunks = ChunkFile(file, [CHUNK], BLOCK)
    first = chunks.read_at(CHUNK.start, CHUNK.start + 100)
    places = set()
    for position in range(CHUNK.start, CHUNK.stop, BLOCK):
        places.add(np.frombuffer(chunks.read_at(position, position + BLOCK), np.uint8).ctypes.data)
    assert bytes(first) == CONTENT[CHUNK.start : CHUNK.start + 100], "what is looked at is not overwritten"
    assert len(places) <= ALONE + 3
    # And of others that are read at the same time.
    other = ChunkFile(file, [CHUNK], BLOCK)
    assert np.frombuffer(other.read_at(CHUNK.start, CHUNK.start + 1), np.uint8).ctypes.data in places


def test_who_reads_no_more_is_not_counted(file: StoredFile, fetched: list[tuple[int, int]]) -> None:
    for path in ["a", "gone"] * file.store.connections:
        chunks = ChunkFile(file._replace(path=path), [CHUNK], BLOCK)
        with suppress(FileChangedError):
            chunks.read_at(CHUNK.start, CHUNK.stop)
    del chunks
    gc.collect()  # errors keep it for a while
    fetched.clear()
    ChunkFile(file, [CHUNK], BLOCK).read_at(CHUNK.start, CHUNK.start + 1)
    assert len(fetched) == 1 + ALONE


def test_what_fails_is_asked_for_again(file: StoredFile, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = ChunkFile(file, [CHUNK], BLOCK)
    assert bytes(chunks.read_at(CHUNK.start, CHUNK.start + 9)) == CONTENT[CHUNK.start : CHUNK.start + 9]
    other = ChunkFile(file._replace(version=Version(len(CONTENT) + 1)), [CHUNK], BLOCK)
    for _ in range(2):
        with pytest.raises(FileChangedError, match="size and version"):
            other.read_at(CHUNK.start, CHUNK.start + 9)


reads = st.lists(st.tuples(st.integers(0, 25_000), st.integers(1, 12_000), st.booleans()), min_size=1, max_size=30)


@given(reads, st.integers(1, 10_000), st.integers(10_001, 90_000))
def test_any_bytes_are_those_of_the_file(
    file: StoredFile, steps: list[tuple[int, int, bool]], block: int, likely: int
) -> None:
    chunks = ChunkFile(file, [CHUNK._replace(likely_stop=likely), all_of(92_000, 95_000)], block)
    position = CHUNK.start
    seen = []
    for step, nbytes, is_back in steps:
        position = min(max(CHUNK.start, position - step if is_back else position + step), CHUNK.stop - 1)
        wanted = slice(position, min(position + nbytes, CHUNK.stop))
        seen.append((wanted, chunks.read_at(position, position + nbytes)))
        position = wanted.stop
    for wanted, found in seen:  # also those that were followed by others
        assert bytes(found) == CONTENT[wanted]
