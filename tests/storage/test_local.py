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
from dask_embedding_reader.storage import local
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.read import read_range, reading_often
from tests.support.stores import stored


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


STORE = LocalStore(LocalFileSystem())


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_the_disk_begins_to_write_a_file_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, cached: bool
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(local, "_FLUSH_NBYTES", 10)
    monkeypatch.setattr(local, "_UNDER_WAY_NBYTES", 25)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *arguments: calls.append(arguments))
    data = np.arange(170, dtype=np.uint8)

    def content(write: Callable[[Any], object]) -> str:
        start = 0
        for nbytes in (4, 5, 1, 9, 1, 0, 100, 10, 9, 1):
            write(data[start : start + nbytes].data)
            start += nbytes
        write(data[140:].view(np.uint16).data)
        return "done"

    assert STORE.put(str(tmp_path / "a"), content, durable=durable, cached=cached) == "done"
    assert (tmp_path / "a").read_bytes() == data.tobytes()
    starts = [0, 10, 20, 120, 130, 140] if cached else [0, 0, 0, 95, 105, 115]
    stops = [10, 20, 120, 130, 140, 170]
    begun = [(start, stop - start, os.POSIX_FADV_DONTNEED) for start, stop in zip(starts, stops, strict=True)]
    assert calls == begun + ["fsync"] * durable + [(0, 170, os.POSIX_FADV_DONTNEED)] * (not cached)


def test_what_the_system_refuses_to_be_advised_of_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    STORE.put(str(tmp_path / "a"), lambda write: write(b"abc"), cached=False)
    monkeypatch.delattr(os, "posix_fadvise")
    STORE.put(str(tmp_path / "b"), lambda write: write(b"abc"), cached=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"abc"] * 2


@pytest.mark.parametrize("scratch", [None, "scratch"])
@pytest.mark.parametrize("failing", ["content", "replace"])
def test_nothing_is_left_of_a_local_file_that_could_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: str | None, failing: str
) -> None:
    (tmp_path / "scratch").mkdir()
    written = list[str]()

    def content(write: Callable[[Any], object]) -> None:
        write(b"abc")
        written.extend(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp"))
        if failing == "content":
            raise KeyboardInterrupt

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    if failing == "replace":
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        STORE.put(str(tmp_path / "in" / "a"), content, scratch=scratch and str(tmp_path / scratch))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert [path.rpartition("/")[0] for path in written] == [scratch or "in"]
    assert (tmp_path / "in").exists() is (scratch is None or failing == "replace"), "not before there is a file for it"
    gone = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        STORE.put(str(tmp_path / "out" / "a"), lambda write: write(b"abc"), scratch=gone)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_once_on_disks_without_links_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "in" / "a"
    assert [STORE.create(str(path), data) for data in (b"first", b"second")] == [True, False]
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path / "in") == ["a"]


def test_links_are_followed_to_files_and_folders_unless_they_are_to_be_told(tmp_path: Path) -> None:
    for name in ("top/a", "top/in/b", "outside/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * (1 + len(name)))
    to_files = {"to-a": "a", "to-c": "../outside/c", "dangling": "nothing", "round": "round", "through": "a/b"}
    for link, there in {**to_files, "to-out": "../outside", "up": ".", "in/up": ".."}.items():
        (tmp_path / "top" / link).symlink_to(there)
    (tmp_path / "to-top").symlink_to("top")

    def listed(folder: str, follow_links: bool) -> dict[str, int | str]:
        infos = STORE.list_files(f"{tmp_path}/{folder}", may_vanish=lambda _: False, follow_links=follow_links)
        found = {info.path: "folder" if info.is_folder else info.size for info in infos}
        assert len(found) == len(infos)
        return {path.removeprefix(f"{tmp_path}/{folder}/"): what for path, what in found.items()}

    plain: dict[str, int | str] = {"a": 6, "in": "folder", "in/b": 9}
    folders = dict.fromkeys(["to-out", "up", "in/up"], "folder")
    followed = {"to-a": 6, "to-c": 10, "to-out/c": 10, "dangling": 0, "round": 0, "through": 0}
    for folder in ("top", "to-top"):
        assert listed(folder, True) == plain | folders | followed
        nowhere = {link: len(to_files[link]) for link in ("dangling", "round", "through")}
        assert listed(folder, False) == plain | folders | {"to-a": 6, "to-c": 10} | nowhere
    [only] = STORE.list_files(f"{tmp_path}/top/to-c", may_vanish=lambda _: False)
    assert (only.path, only.size, only.is_folder) == (f"{tmp_path}/top/to-c", 10, False)
    for name, what in {**plain, **folders, **followed, "to-out/c": 10}.items():
        info = STORE.look_up(f"{tmp_path}/top/{name}")
        assert (info.is_folder, info.size) == ((True, -1) if what == "folder" else (False, what)), name
        assert STORE.exists(f"{tmp_path}/top/{name}") is (what != 0)
    for missing in ("top/none", "top/a/none"):
        with pytest.raises(OSError, match="none"):
            STORE.look_up(f"{tmp_path}/{missing}")
    entries = {info.path.rpartition("/")[2]: info.is_folder for info in STORE.list_folder(f"{tmp_path}/top")}
    assert {name for name, is_folder in entries.items() if is_folder} == {"in", "to-out", "up"}
    assert entries.keys() == {"a", "in", "to-out", "up", "to-a", "to-c", "dangling", "round", "through"}
    found = {info.path.rpartition("/")[2]: info.is_folder for info in STORE.glob(f"{tmp_path}/top/*")}
    assert found == {name: is_folder for name, is_folder in entries.items() if name != "up"}


def test_as_many_pieces_are_read_at_once_as_there_are_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    local._processors.cache_clear()
    try:
        for processors, connections in ((6, 6), (2, 2), (1, 2), (None, 2)):
            monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
            local._processors.cache_clear()
            assert STORE.connections == connections
    finally:
        local._processors.cache_clear()
    assert (STORE.request_nbytes, STORE.is_object_store, STORE.url("/a")) == (0, False, "/a")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, opened: Opened, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    said = "not a regular file, but a pipe or a device" if kind == "pipe" else "a folder, not a file"
    with pytest.raises(OSError, match=said) as caught:
        local.open_local(str(path))
    assert isinstance(caught.value, IsADirectoryError) is (kind == "folder")
    assert caught.value.filename == str(path)
    assert not opened.descriptors
