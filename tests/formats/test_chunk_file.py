"""Column chunks of remote files are fetched window by window, several at once where few others ask."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, pairwise
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


def test_what_is_larger_than_all_windows_is_fetched_too(file: StoredFile, fetched: list[Ranges]) -> None:
    chunks = ChunkFile(file, [CHUNK], WINDOW)
    assert bytes(chunks.read_at(10_000, 10_100)) == CONTENT[10_000:10_100]
    assert bytes(chunks.read_at(10_050, 80_000)) == CONTENT[10_050:80_000]
    assert all(stop == start for (_, stop), (start, _) in pairwise(chain(*fetched)))
