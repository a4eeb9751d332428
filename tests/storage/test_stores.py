"""What every storage has to do. A further one is checked by a function here that makes a place in it, and a line below.

A place is an empty folder, and a way to put files there as others would, past the store.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import pickle
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dask_embedding_reader.errors import FileChangedError, ReadError, WriteError
from dask_embedding_reader.storage import local as local_disks
from dask_embedding_reader.storage import put, retries
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.read import read_range, read_ranges
from dask_embedding_reader.storage.store import (
    Answer,
    ObjectInfo,
    ShortAnswerError,
    Span,
    Store,
    StoredFile,
    Version,
    Write,
    is_same,
    most_requests,
)
from dask_embedding_reader.storage.urls import resolve
from tests.support import servers
from tests.support.hub import REPOSITORY, hub

DATA = bytes(range(256)) * 40


@dataclass
class Place:
    """An empty folder in a storage."""

    url: str
    #: Puts a file there, or replaces one, given its path below the folder and its content.
    put: Callable[[str, bytes], object]
    options: dict[str, Any] = field(default_factory=dict)
    is_writable: bool = True

    def __post_init__(self) -> None:
        self.store, self.folder = resolve(self.url, self.options)

    def at(self, name: str) -> str:
        return f"{self.folder.rstrip('/')}/{name}"

    def names(self) -> dict[str, int]:
        """All files with their sizes."""
        infos: Sequence[ObjectInfo] = []
        with suppress(FileNotFoundError):
            infos = self.store.list_files(self.folder, may_vanish=lambda _: False)
        return {info.path.removeprefix(self.at("")): info.size for info in infos if not info.is_folder}

    def found(self, name: str) -> StoredFile:
        """A file as it is now."""
        return StoredFile(self.store, self.at(name), self.store.look_up(self.at(name)).version)


# ---------------------------------------------------------------------------------------------------------------------
# The storages


def in_folder(folder: Path) -> Callable[[str, bytes], None]:
    """Write files below a folder, each time a second later: some servers tell no more of a time."""
    seconds = itertools.count(10**9)

    def put(name: str, content: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        second = next(seconds)
        os.utime(path, (second, second))

    return put


def local(request: pytest.FixtureRequest) -> Place:
    folder: Path = request.getfixturevalue("tmp_path")
    return Place(str(folder), in_folder(folder))


def memory(request: pytest.FixtureRequest) -> Place:
    folder = f"/{uuid.uuid4().hex}"
    filesystem = fsspec.filesystem("memory")
    request.addfinalizer(lambda: filesystem.exists(folder) and filesystem.rm(folder, recursive=True))
    return Place(f"memory:/{folder}", lambda name, content: filesystem.pipe_file(f"{folder}/{name}", content))


def cloud(request: pytest.FixtureRequest) -> Place:
    server: servers.ObjectStore = request.getfixturevalue(request.param)
    prefix = uuid.uuid4().hex
    url = f"{server.root}/{prefix}"
    return Place(url, lambda name, content: server.put(f"{prefix}/{name}", content), server.storage_options)


def http(request: pytest.FixtureRequest) -> Place:
    servers.require(servers.nginx_available, "nginx")
    folder: Path = request.getfixturevalue("tmp_path")
    server = servers.nginx(folder)
    url = server.__enter__().url
    request.addfinalizer(lambda: server.__exit__(None, None, None))
    return Place(f"{url}/", in_folder(folder), is_writable=False)


def ftp(request: pytest.FixtureRequest) -> Place:
    folder: Path = request.getfixturevalue("tmp_path")
    (folder / "emb").mkdir()
    server = servers.ftp_files(folder, "elradfmw")
    url = server.__enter__().url.replace(f"{servers.FTP_USER}:{servers.FTP_PASSWORD}@", "")
    request.addfinalizer(lambda: server.__exit__(None, None, None))
    options = {"username": servers.FTP_USER, "password": servers.FTP_PASSWORD}
    return Place(f"{url}/emb", in_folder(folder / "emb"), options)


def hf(request: pytest.FixtureRequest) -> Place:
    server = hub()
    served = server.__enter__()
    request.addfinalizer(lambda: server.__exit__(None, None, None))
    served.commit({})
    url = f"hf://datasets/{REPOSITORY}/emb"
    return Place(
        url, lambda name, content: served.commit({f"emb/{name}": content}), served.storage_options(), is_writable=False
    )


STORES: dict[str, Callable[[pytest.FixtureRequest], Place]] = {
    "local": local,
    "memory": memory,
    "s3": cloud,
    "gcs": cloud,
    "azure": cloud,
    "http": http,
    "hf": hf,
    "ftp": ftp,
}


@pytest.fixture(params=list(STORES))
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    return STORES[request.param](request)


@pytest.fixture
def writable(place: Place) -> Place:
    if not place.is_writable:
        pytest.skip("this storage is only read")
    return place


# ---------------------------------------------------------------------------------------------------------------------
# Facts


def test_as_many_small_reads_are_waited_for_as_the_store_that_takes_most_answers_at_once() -> None:
    local, remote = (resolve(url)[0] for url in ("/", "memory://"))
    assert [most_requests(stores) for stores in ([], [local], [remote], [local, remote])] == [1, 1, 16, 16]


HERE = "host 1 10"


@pytest.mark.parametrize(
    ("version", "info", "same"),
    [
        (Version(5, "etag", "a"), ObjectInfo("", 5, {"etag": "a"}), True),
        (Version(5, "etag", "a"), ObjectInfo("", 5, {"etag": "b"}), False),
        (Version(5, "etag", "a"), ObjectInfo("", 6, {"etag": "a"}), True),  # of an answer that is wrong about its size
        (Version(5, "etag", "a"), ObjectInfo("", 5, {"mtime": "1"}), None),
        (Version(5, "etag", "a"), ObjectInfo("", 6, {"mtime": "1"}), False),
        (Version(5, "etag", "a"), ObjectInfo("", -1, {}), None),
        (Version(5, "mtime", "1"), ObjectInfo("", 5, {"mtime": "1", "etag": "b"}), True),
        (Version(5, "mtime", "1"), ObjectInfo("", 5, {"mtime": "2"}), False),
        (Version(5, "mtime", "1"), ObjectInfo("", -1, {"mtime": "1"}), True),
        (Version(5, "mtime", "1"), ObjectInfo("", -1, {"mtime": "2"}), False),
        (Version(5), ObjectInfo("", 5), True),
        (Version(5), ObjectInfo("", 6), False),
        (Version(5), ObjectInfo("", -1), None),
        (Version(0), ObjectInfo("", 0), True),
        (Version(1), ObjectInfo("", 0), False),
        (Version(-1), ObjectInfo("", -1), None),
        (Version(-1), ObjectInfo("", 0), False),
        (Version(-1, "updated", "1"), ObjectInfo("", 5, {"updated": "1"}), True),
        (Version(-1, "updated", "1"), ObjectInfo("", 5, {"updated": "2"}), False),
        (Version(5, "mtime", "1", HERE), ObjectInfo("", 5, {"mtime": "1"}, here=HERE), True),
        (Version(5, "mtime", "1", HERE), ObjectInfo("", 5, {"mtime": "1"}, here="host 1 11"), False),
        (Version(5, "mtime", "1", HERE), ObjectInfo("", 5, {"mtime": "1"}, here="host 2 10"), False),
        (Version(5, "mtime", "1", HERE), ObjectInfo("", 5, {"mtime": "1"}, here="other 2 11"), True),
        (Version(5, "mtime", "1", HERE), ObjectInfo("", 5, {"mtime": "1"}), True),
        (Version(5, "mtime", "1"), ObjectInfo("", 5, {"mtime": "1"}, here=HERE), True),
        # One time for both, as of mounted buckets, whose numbers do not last.
        (Version(5, "mtime", "10", HERE), ObjectInfo("", 5, {"mtime": "10"}, here="host 2 10"), True),
    ],
)
def test_what_a_storage_says_now_is_compared_with_what_was_found(
    version: Version, info: ObjectInfo, same: bool | None
) -> None:
    assert is_same(version, info) is same


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (Version(5, "etag", "a b"), "5 etag a b"),
        (Version(0, "mtime", "1"), "0 mtime 1"),
        (Version(-1, "etag", "a"), "None etag a"),
        (Version(7), "7"),
        (Version(-1), "None"),
        (Version(10**18, "etag", "a"), f"{10**18} etag a"),
    ],
)
def test_a_version_is_read_as_it_was_written(version: Version, text: str) -> None:
    assert str(version) == text
    assert Version.parse(text) == version
    assert version.everywhere == text
    assert version._replace(here=HERE).lasting == version
    assert version._replace(here=HERE).everywhere == f"{text} inode 1 ctime 10"
    assert str(version._replace(here=HERE)) == f"{text} on host inode 1 ctime 10"


def test_a_store_is_a_value(place: Place) -> None:
    sent = pickle.loads(pickle.dumps(place.store))
    assert (sent, hash(sent), sent.key) == (place.store, hash(place.store), place.store.key)
    assert place.store.connections >= 1
    assert place.store.request_nbytes >= 0
    assert place.store.is_local == (place.store.filesystem.protocol == ("file", "local"))


def test_an_address_leads_to_the_same_file(place: Place) -> None:
    place.put("a b+c.bin", DATA)
    store, path = resolve(place.store.url(place.at("a b+c.bin")), place.options)
    assert (store.key, path) == (place.store.key, place.at("a b+c.bin"))


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def test_files_are_listed_with_their_sizes_however_deep(place: Place) -> None:
    sizes = {"0.bin": 1, "a/1.bin": 2, "a/b/2.bin": 3}
    for name, size in sizes.items():
        place.put(name, DATA[:size])
    names = place.names()
    assert names.keys() == sizes.keys()
    assert all(size in (-1, sizes[name]) for name, size in names.items())
    # Not what was listed before.
    place.put("a/b/3.bin", DATA[:4])
    assert place.names().keys() == {*sizes, "a/b/3.bin"}


def test_nothing_is_listed_where_there_is_nothing(place: Place) -> None:
    place.folder = place.at("nothing")
    with suppress(FileNotFoundError):  # so huggingface_hub says it before 1.0
        assert place.names() == {}


def test_one_folder_is_listed_with_its_folders(place: Place) -> None:
    place.put("0.bin", DATA)
    place.put("a/1.bin", DATA)
    infos = place.store.list_folder(place.folder)
    assert {(info.path.rstrip("/").rpartition("/")[2], info.is_folder) for info in infos} == {
        ("0.bin", False),
        ("a", True),
    }


def test_a_pattern_finds_files_and_folders(place: Place) -> None:
    for name in ("x0.bin", "x1.bin", "y.bin", "xa/2.bin"):
        place.put(name, DATA)
    infos = place.store.glob(place.at("x*"))
    found = {(info.path.rstrip("/").rpartition("/")[2], info.is_folder) for info in infos}
    assert found == {("x0.bin", False), ("x1.bin", False), ("xa", True)}


def test_a_file_is_looked_up(place: Place) -> None:
    place.put("0.bin", DATA)
    info = place.store.look_up(place.at("0.bin"), 4)
    assert (info.path, info.size, info.is_folder) == (place.at("0.bin"), len(DATA), False)
    assert info.head in (b"", DATA[:4])
    assert info.marks, "nothing tells of versions"
    assert place.store.exists(place.at("0.bin"))


def test_what_is_not_there_is_said_not_to_be(place: Place) -> None:
    place.put("0.bin", DATA)
    with pytest.raises(FileNotFoundError):
        place.store.look_up(place.at("1.bin"))
    assert not place.store.exists(place.at("1.bin"))


# ---------------------------------------------------------------------------------------------------------------------
# Reading

RANGES = [(0, 4), (4, 5), (7, 7), (255, 1025), (len(DATA) - 3, len(DATA)), (0, len(DATA))]


def test_exactly_the_bytes_asked_for_come(place: Place) -> None:
    place.put("0.bin", DATA)
    file = place.found("0.bin")
    assert read_ranges(file, RANGES) == [DATA[start:stop] for start, stop in RANGES]
    assert read_range(file, 3, 9) == DATA[3:9]


def test_bytes_come_into_the_memory_of_who_asks(place: Place) -> None:
    place.put("0.bin", DATA)
    buffers = [bytearray(3), bytearray(0), bytearray(50)]
    (answer,) = place.store.read(place.at("0.bin"), [(10, [memoryview(buffer) for buffer in buffers])])
    assert not isinstance(answer, BaseException)
    assert b"".join(buffers) == DATA[10:63]
    if answer is not None:  # what it tells is of the version that was looked up
        assert is_same(place.found("0.bin").version, answer) in (True, None)


def test_nothing_comes_from_beyond_the_end(place: Place) -> None:
    place.put("0.bin", DATA)
    file = place.found("0.bin")
    for start, stop in ((len(DATA) - 2, len(DATA) + 2), (len(DATA) + 10, len(DATA) + 20)):
        with pytest.raises((ReadError, FileChangedError), match=r"0\.bin"):
            read_range(file, start, stop)


def test_what_comes_tells_its_version_though_nothing_was_asked_before(place: Place) -> None:
    place.put("0.bin", DATA)
    place.found("0.bin")  # what has been asked by now, and a client of its own that has not
    fresh, _ = resolve(place.url, {**place.options, "skip_instance_cache": True})
    answers = []
    for store in (place.store, fresh):
        [answer] = store.read(place.at("0.bin"), [(0, [memoryview(bytearray(10))])])
        assert answer is None or isinstance(answer, ObjectInfo)
        answers.append(answer)
    assert answers[0] == answers[1]


def test_nothing_is_asked_for_no_bytes(place: Place) -> None:
    if not place.store.is_local:  # there it costs nothing to look whether the file is the same
        gone = StoredFile(place.store, place.at("gone.bin"), Version(10, "etag", "x"))
        assert read_ranges(gone, [(3, 3), (7, 7)]) == [b"", b""]


def test_a_whole_small_file_is_read(place: Place) -> None:
    place.put("0.bin", DATA)
    assert place.store.read_whole(place.at("0.bin")) == DATA
    with pytest.raises(FileNotFoundError):
        place.store.read_whole(place.at("1.bin"))


@pytest.mark.parametrize("content", [DATA[::-1], DATA[:-1], DATA + b"."], ids=["same size", "shorter", "longer"])
def test_a_file_that_was_replaced_is_noticed(place: Place, content: bytes) -> None:
    place.put("0.bin", DATA)
    file = place.found("0.bin")
    place.put("0.bin", content)
    assert not is_same(file.version, place.store.look_up(file.path))
    with pytest.raises(FileChangedError, match=r"0\.bin"):
        read_ranges(file, [(0, 10), (100, 110)])


def test_a_file_that_has_gone_is_noticed(place: Place) -> None:
    place.put("0.bin", DATA)
    file = place.found("0.bin")
    gone = StoredFile(file.store, place.at("1.bin"), file.version)
    with pytest.raises(FileChangedError, match=r"1\.bin: the file has gone"):
        read_ranges(gone, [(0, 10)])


class FailingStore:
    """A store whose first answers are given, and all others those of another one."""

    def __init__(self, store: Store, *answers: Callable[[Span], Answer]) -> None:
        self.store, self.answers = store, [*answers]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read(self, path: str, ranges: Sequence[Span], *, again: bool = False) -> Sequence[Answer]:
        """Fail, or read."""
        if self.answers:
            answer = self.answers.pop(0)
            return [answer(span) for span in ranges]
        return self.store.read(path, ranges, again=again)


def fill(span: Span, nbytes: int) -> None:
    """Fill some of the memory with wrong bytes."""
    span[1][0][:nbytes] = b"\xff" * nbytes


def half(span: Span) -> Answer:
    """An answer that ends too early, in the middle of wrong bytes."""
    fill(span, 50)
    return ShortAnswerError(50, 100, None)


def test_what_fails_and_may_pass_is_read_again(place: Place) -> None:
    place.put("0.bin", DATA)
    found = place.found("0.bin")
    store = FailingStore(place.store, lambda _: ConnectionResetError("reset"), half, lambda _: TimeoutError())
    assert read_ranges(StoredFile(store, *found[1:]), [(0, 100)]) == [DATA[:100]]
    assert store.answers == []


def test_what_cannot_pass_is_not_read_again(place: Place) -> None:
    place.put("0.bin", DATA)
    found = place.found("0.bin")
    store = FailingStore(place.store, lambda _: PermissionError("not yours"))
    said = r"0\.bin, bytes 0 to 100: reading failed: PermissionError: not yours; check the permissions, and"
    with pytest.raises(ReadError, match=said):
        read_ranges(StoredFile(store, *found[1:]), [(0, 100)])


def test_bytes_of_another_version_are_not_taken(place: Place) -> None:
    place.put("0.bin", DATA)
    found = place.found("0.bin")
    other = ObjectInfo("", found.size, {found.version.kind: "of another"})

    def answer(span: Span) -> Answer:
        fill(span, 100)
        return other

    with pytest.raises(FileChangedError, match=r"0\.bin"):
        read_ranges(StoredFile(FailingStore(place.store, answer), *found[1:]), [(0, 100)])


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_a_file_is_put_as_a_whole_and_replaced(writable: Place) -> None:
    store, path = writable.store, writable.at("a/0.bin")

    def content(write: Write) -> str:
        write(DATA[:10])
        write(memoryview(DATA)[10:30])
        return "done"

    assert store.put(path, content, durable=True) == "done"
    assert store.read_whole(path) == DATA[:30]
    store.put(path, lambda write: write(DATA), cached=False)
    assert store.read_whole(path) == DATA
    assert writable.names() == {"a/0.bin": len(DATA)}


def test_of_a_file_that_could_not_be_made_nothing_is_left(writable: Place) -> None:
    store, path = writable.store, writable.at("0.bin")
    store.put(path, lambda write: write(DATA))

    def content(write: Write) -> None:
        write(DATA[:10])
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        store.put(path, content)
    assert store.read_whole(path) == DATA
    assert writable.names() == {"0.bin": len(DATA)}


def test_of_a_file_that_cannot_get_its_name_nothing_is_left(writable: Place) -> None:
    store = writable.store
    store.put(writable.at("a.bin/inner.bin"), lambda write: write(DATA))
    if store.is_object_store:  # folders are but parts of names
        return
    with pytest.raises(OSError):  # noqa: PT011 - each server has its own words for it
        store.put(writable.at("a.bin"), lambda write: write(DATA))
    assert writable.names() == {"a.bin/inner.bin": len(DATA)}


def test_a_temporary_file_lies_in_the_folder_for_it(writable: Place) -> None:
    store, scratch = writable.store, writable.at("scratch")
    store.make_folder(scratch)
    store.put(writable.at("0.bin"), lambda write: write(DATA), scratch=scratch)
    assert store.read_whole(writable.at("0.bin")) == DATA
    store.remove_folder(scratch)
    assert not store.exists(scratch)
    assert writable.names() == {"0.bin": len(DATA)}


def test_an_object_store_puts_nothing_in_the_place_of_another_file_if_told_so(writable: Place) -> None:
    store, path = writable.store, writable.at("0.bin")
    store.put(path, lambda write: write(DATA), is_new=True)
    if store.is_object_store:
        with pytest.raises(FileExistsError):
            store.put(path, lambda write: write(b"other"), is_new=True)
        assert store.read_whole(path) == DATA


def test_only_the_first_creates_a_file(writable: Place) -> None:
    store, path = writable.store, writable.at("notes/note.json")
    assert [store.create(path, content) for content in (b"first", b"second")] == [True, False]
    assert store.read_whole(path) == b"first"
    assert writable.names() == {"notes/note.json": 5}


@pytest.mark.parametrize("has_links", [True, False])
def test_a_disk_that_gets_full_keeps_nothing_of_a_file_that_has_to_be_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[:5])
            raise OSError(errno.ENOSPC, "full")

    def no_links(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no links")

    def opened(path: str, mode: str) -> Any:
        return Full(path, mode) if path.endswith(".tmp") is has_links else open(path, mode)

    store, path = resolve(tmp_path / "notes" / "note.json")
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patches:
        patches.setattr(local_disks, "open", opened, raising=False)
        with pytest.raises(OSError, match="full"):
            store.create(path, b"first, and more")
    assert list((tmp_path / "notes").iterdir()) == []
    assert [store.create(path, content) for content in (b"first", b"second")] == [True, False]
    assert [name.name for name in (tmp_path / "notes").iterdir()] == ["note.json"]
    assert store.read_whole(path) == b"first"


@pytest.mark.parametrize("times", [1, 4])
def test_a_folder_that_others_remove_while_it_is_empty_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    removals = iter(range(times))
    write_new = local_disks._write_new

    def write(path: str, data: bytes) -> None:
        if next(removals, None) is not None:
            (tmp_path / "notes").rmdir()
        write_new(path, data)

    store, path = resolve(tmp_path / "notes" / "note.json")
    monkeypatch.setattr(local_disks, "_write_new", write)
    if times == 1:
        assert store.create(path, DATA)
        assert store.read_whole(path) == DATA
    else:
        told = "note.json: cannot be written: .*; something removed the folder or its disk meanwhile: see to it"
        with pytest.raises(WriteError, match=told):
            put.create_file(store, path, DATA)


class LosingClient(LocalFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """A server with folders, whose connection is lost in the middle of files, and of no use from then on."""

    cachable = False
    auto_mkdir = True
    left = 0

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self.protocol, self.is_lost = protocol, False

    def _check(self) -> None:
        if self.is_lost:
            raise ConnectionResetError("lost before")

    def _lose(self, path: str, data: bytes) -> None:
        if LosingClient.left:
            LosingClient.left -= 1
            self.is_lost = True
            Path(path).write_bytes(data[:5])
            raise ConnectionResetError("lost")

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self._check()
        self._lose(path, value)
        Path(path).write_bytes(value)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        self._check()
        client = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                client._lose(path, data)
                return super().write(data) or 0

        return File(path, mode)

    def rm_file(self, path: str) -> None:
        self._check()
        super().rm_file(path)


@pytest.mark.parametrize("times", [1, retries.ATTEMPTS])
@pytest.mark.parametrize("protocol", ["ftp", "sftp"])
@pytest.mark.parametrize("how", ["put", "create"])
def test_what_a_lost_connection_left_of_a_file_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, protocol: str, times: int
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(LosingClient, "left", times)
    client = LosingClient(protocol)
    store, path = FsspecStore(client), f"{tmp_path}/0.bin"

    def write() -> bool:
        if how == "create":
            return store.create(path, DATA)
        store.put(path, lambda write: write(DATA))
        return True

    if times == 1:
        assert write()
        assert store.read_whole(path) == DATA
        assert not store.create(path, b"second")
    else:
        with pytest.raises(ReadError, match="failed after 5 attempts"):
            write()
    assert LosingClient.left == 0
    assert [name.name for name in tmp_path.iterdir()] == (["0.bin"] if times == 1 else [])


def test_a_file_is_moved_and_replaces_another(writable: Place) -> None:
    store = writable.store
    for content in (b"first", b"second"):
        store.put(writable.at("from.bin"), lambda write, content=content: write(content))  # type: ignore[misc]
        store.move(writable.at("from.bin"), writable.at("to.bin"))
        assert store.read_whole(writable.at("to.bin")) == content
        assert writable.names() == {"to.bin": len(content)}


def test_a_file_is_removed(writable: Place) -> None:
    store, path = writable.store, writable.at("0.bin")
    store.put(path, lambda write: write(DATA))
    store.remove(path)
    assert not store.exists(path)
    assert writable.names() == {}
    with suppress(FileNotFoundError):  # some do not say that it was not there
        store.remove(path)


class EarlierClient(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """Removes single files by the general way alone, as adlfs did."""

    cachable = False

    def rm_file(self, path: str) -> None:
        raise NotImplementedError

    def rm(self, path: str, *_: Any, **__: Any) -> None:
        super().rm_file(path)


def test_a_client_is_asked_in_the_way_that_it_knows_to_remove_a_file() -> None:
    store, path = FsspecStore(EarlierClient()), f"/{uuid.uuid4().hex}"
    store.put(path, lambda write: write(DATA))
    store.remove(path)
    assert not store.exists(path)


# ---------------------------------------------------------------------------------------------------------------------
# What writers do with any of them (``put``)


def test_folders_are_looked_for_and_removed_where_there_are_folders(writable: Place) -> None:
    store, top = writable.store, writable.at("top")
    assert put.list_files(store, top) == {}
    for name in ("a-1", "a-2", "b-1"):
        put.make_folder(store, f"{top}/{name}")
    put.put_file(store, f"{top}/a-1/0.bin", b"0")
    put.put_file(store, f"{top}/a-3", b"a file")
    found = {path.removeprefix(f"{top}/") for path in put.find_folders(store, top, "a-")}
    assert found == (set() if store.is_object_store else {"a-1", "a-2"})
    assert put.find_folders(store, f"{top}/none", "a-") == []
    assert put.has_folder(store, f"{top}/a-2")
    assert put.has_folder(store, f"{top}/c") is not store.is_local
    assert put.is_local_file(store, f"{top}/a-3") is store.is_local
    assert not put.is_local_file(store, f"{top}/a-1")
    assert not put.is_local_file(store, f"{top}/c")
    for name in ("a-1", "a-2"):
        put.remove_empty_folder(store, f"{top}/{name}")
    assert put.list_files(store, top) == {"a-1/0.bin": 1, "a-3": 6}
    assert put.has_folder(store, f"{top}/a-1")
    assert put.has_folder(store, f"{top}/a-2") is not store.is_local
    put.remove_folder(store, f"{top}/a-1")
    assert put.list_files(store, top) == {"a-3": 6}
    put.remove_folder(store, f"{top}/a-1")  # there is none any more
    assert put.get_file(store, f"{top}/a-3") == b"a file"
    put.remove_files(store, [f"{top}/a-3", f"{top}/a-3", f"{top}/c"])
    assert put.get_file(store, f"{top}/a-3") is None


def test_what_is_removed_by_way_of_a_folder_stays_once_that_has_gone(writable: Place) -> None:
    store, path, trash = writable.store, writable.at("a/0.bin"), writable.at("trash")
    put.put_file(store, path, b"0")
    if store.is_local:
        with pytest.raises(FileNotFoundError):
            store.remove(path, trash)
        put.remove_files(store, [path], trash)
        put.remove_folder(store, writable.at("a"), trash)
        assert put.get_file(store, path) == b"0"
    put.make_folder(store, trash)
    put.put_file(store, writable.at("a/b/1.bin"), b"1")
    put.remove_files(store, [path], trash)
    assert put.list_files(store, writable.at("a")) == {"b/1.bin": 1}
    put.remove_folder(store, writable.at("a"), trash)
    assert writable.names() == {}
    assert not put.has_folder(store, writable.at("a")) or not store.is_local


def test_links_are_found_wherever_they_are(tmp_path: Path) -> None:
    store, top = resolve(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert put.find_links(store, top) == []
    (tmp_path / "a" / "b" / "file").symlink_to(tmp_path / "gone")
    (tmp_path / "a" / "folder").symlink_to(tmp_path / "a", target_is_directory=True)
    assert set(put.find_links(store, top)) == {f"{top}/a/b/file", f"{top}/a/folder"}
    assert put.find_links(store, f"{top}/a/folder")[0] == f"{top}/a/folder"
    assert put.real_path(store, f"{top}/a/folder/b") == os.path.realpath(tmp_path / "a" / "b")


def test_what_is_below_a_link_is_neither_listed_nor_removed_with_a_folder(tmp_path: Path) -> None:
    store, top = resolve(tmp_path / "top")
    for name in ("top/own", "outside/other"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    (tmp_path / "top" / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    assert put.list_files(store, top).keys() == {"own"}
    put.remove_folder(store, top)
    assert not (tmp_path / "top").exists()
    assert (tmp_path / "outside" / "other").read_text() == "1"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "full"), "make room, or name a folder on another storage; what is finished is kept"),
        (OSError(errno.EDQUOT, "full"), "make room, or name a folder on another storage; what is finished is kept"),
        (
            OSError(errno.EFBIG, "large"),
            "the file system, or the limit .* allows no file so large: choose fewer rows_per",
        ),
        (IsADirectoryError("a"), "there is a folder of this name: name a file in it, or another one; what is finished"),
        (FileNotFoundError("no bucket"), "make the bucket first, or check the spelling; what is finished is kept"),
        (PermissionError("no"), "get the permission to write there, or name another folder; what is finished is kept"),
        (OSError(errno.EROFS, "ro"), "get the permission to write there, or name another folder; what is finished is"),
        (NotImplementedError("no"), "this kind of storage cannot be written to in this way; name a folder on another"),
        (ValueError("no"), "this kind of storage cannot be written to in this way; name a folder on another one"),
        (TypeError("no"), "this kind of storage cannot be written to in this way; name a folder on another one"),
        (ConnectionError("away"), "check the storage and the connection; what is finished is kept, and running the"),
        (type("NoCredentialsError", (Exception,), {})("none"), "give credentials in storage_options or in the"),
    ],
    ids=repr,
)
def test_what_keeps_a_file_from_being_written_has_its_remedy(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingClient(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
        cachable = False

        def pipe_file(self, *_: Any, **__: Any) -> None:
            raise error

        def cat_file(self, *_: Any, **__: Any) -> bytes:
            raise error

    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    store = FsspecStore(FailingClient())
    with pytest.raises(WriteError, match=f"memory:///0.bin: cannot be written: .*; {remedy}"):
        put.put_file(store, "/0.bin", b"0")
    if isinstance(error, FileNotFoundError):
        assert put.get_file(store, "/0.bin") is None
        return
    asked = retries.credentials_remedy(error) or "check the storage, the connection and your permissions"
    for kind, told in ((WriteError, remedy), (ReadError, re.escape(asked))):
        with pytest.raises(kind, match=f"memory:///0.bin: cannot be read: .*; {told}"):
            put.get_file(store, "/0.bin", kind)


class RefusingClient(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """Answers to who stores a file only if it is new with one status after the other, as servers of S3 do."""

    protocol = ("s3",)
    cachable = False

    def __init__(self, *statuses: int) -> None:
        super().__init__()
        self.statuses = [*statuses]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode == "create" and self.statuses:
            error: Any = OSError("refused")
            error.status = self.statuses.pop(0)
            raise error
        super().pipe_file(path, value)


@pytest.mark.parametrize(
    ("statuses", "is_stored"),
    [
        ([412], False),  # there is one
        ([409, 409], True),  # another one was being stored, in vain
        ([409, 412], False),
        ([400], True),  # the server does not know of it
        ([501], True),
        ([503, 503], True),
        ([403], None),
        ([404], None),
        ([503] * 5, None),
    ],
)
def test_what_a_server_says_to_a_file_that_has_to_be_new(
    statuses: list[int], is_stored: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    client, path = RefusingClient(*statuses), f"/{uuid.uuid4().hex}"
    store = FsspecStore(client)
    if is_stored is None:
        with pytest.raises(OSError if len(statuses) == 1 else ReadError):
            store.create(path, DATA)
    else:
        assert store.create(path, DATA) is is_stored
    assert client.statuses == []
    assert client.exists(path) is bool(is_stored)
    client.store.pop(path, None)
