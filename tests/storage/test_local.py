"""Local files: opened once for several reads, and closed whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import FileChangedError
from dask_embedding_reader.storage.local import LocalStore, file_info
from dask_embedding_reader.storage.read import read_range, reading_often
from dask_embedding_reader.storage.store import StoredFile


class Opened:
    """Counts how often each file is opened, and which descriptors are closed again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        self.descriptors: set[int] = set()
        open_, close = os.open, os.close

        def counted(path: str, *args: Any, **options: Any) -> int:
            descriptor = open_(path, *args, **options)
            self.paths.append(path)
            self.descriptors.add(descriptor)
            return descriptor

        def closed(descriptor: int) -> None:
            self.descriptors.discard(descriptor)
            close(descriptor)

        monkeypatch.setattr(os, "open", counted)
        monkeypatch.setattr(os, "close", closed)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """What is opened by the test."""
    return Opened(monkeypatch)


def stored(path: Path, content: bytes) -> StoredFile:
    """A file as it was found."""
    path.write_bytes(content)
    return StoredFile(LocalStore(LocalFileSystem()), str(path), file_info(str(path)).version)


def test_a_file_is_opened_once_for_all_that_is_read_within(tmp_path: Path, opened: Opened) -> None:
    file, other = stored(tmp_path / "a", b"abcdef"), stored(tmp_path / "b", b"ghi")
    with reading_often(file):
        assert read_range(file, 0, 2) == b"ab"
        assert read_range(other, 0, 2) == b"gh"  # and closed at once
        assert len(opened.descriptors) == 1
        with ThreadPoolExecutor(1) as pool:  # a thread of its own opens it itself
            assert pool.submit(read_range, file, 4, 6).result() == b"ef"
        with reading_often(other):
            assert read_range(other, 1, 2) + read_range(other, 2, 3) == b"hi"
        with reading_often(file):
            assert read_range(file, 3, 4) == b"d"
        assert read_range(file, 2, 4) == b"cd"
    assert opened.paths == [file.path, other.path, file.path, other.path]
    assert not opened.descriptors
    assert read_range(file, 0, 6) == b"abcdef"
    assert opened.paths[4:] == [file.path]


def test_nothing_is_opened_where_nothing_is_read(tmp_path: Path, opened: Opened) -> None:
    with reading_often(stored(tmp_path / "a", b"a")):
        assert opened.paths == []


def test_it_is_closed_where_reading_fails(tmp_path: Path, opened: Opened) -> None:
    file = stored(tmp_path / "a", b"abc")

    def fail() -> None:
        with reading_often(file):
            read_range(file, 0, 3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert opened.paths == [file.path]
    assert not opened.descriptors


@pytest.mark.parametrize(
    ("change", "within"),
    [
        (lambda path: path.write_bytes(b"xyz1"), True),  # what is open shows it
        (lambda path: os.replace(path.with_name("new"), path), False),  # what is open is what was found
        (Path.unlink, False),
    ],
    ids=["written", "replaced", "removed"],
)
def test_a_change_is_noticed_at_once_or_when_it_is_opened_again(
    tmp_path: Path, change: Callable[[Path], object], within: bool
) -> None:
    path = tmp_path / "a"
    file = stored(path, b"abc")
    path.with_name("new").write_bytes(b"xyz1")
    with reading_often(file):
        assert read_range(file, 0, 1) == b"a"
        change(path)
        if within:
            with pytest.raises(FileChangedError):
                read_range(file, 0, 3)
        else:
            with suppress(FileChangedError):  # that its link is gone changes it, if the clock has gone on since
                assert read_range(file, 0, 3) == b"abc"
    with pytest.raises(FileChangedError):
        read_range(file, 0, 3)


def test_pages_of_a_piece_are_read_from_one_opened_file(tmp_path: Path, opened: Opened) -> None:
    vectors = np.random.default_rng(0).standard_normal((5_000, 64), np.float32)
    frame = pd.DataFrame({"embedding": list(vectors)})
    frame.to_parquet(tmp_path / "a.parquet", data_page_size=10_000)  # more than a hundred pages
    reader = EmbeddingReader(tmp_path, file_format="parquet")
    opened.paths.clear()
    (batch, _), *rest = reader(batch_size=5_000, show_progress=False)
    assert not rest
    np.testing.assert_array_equal(batch, vectors)
    assert len(opened.paths) <= 6  # to find the pages, and to read them
    opened.paths.clear()
    np.testing.assert_array_equal(next(reader.take(range(0, 5_000, 100))(50, show_progress=False))[0], vectors[::100])
    assert len(opened.paths) <= 2
