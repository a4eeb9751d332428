"""What is made of answers: which are taken, which are asked for again, and which are errors, and what these say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dask_embedding_reader.errors import FileChangedError, ReadError, WriteError
from dask_embedding_reader.storage import read as reads
from dask_embedding_reader.storage import retries
from dask_embedding_reader.storage.read import (
    check_local,
    local_input,
    read_blocks_into,
    read_each_into,
    read_into,
    read_range,
    read_ranges,
    reading_often,
    try_read_in_turn,
)
from dask_embedding_reader.storage.store import Answer, ObjectInfo, ShortAnswerError, Span, StoredFile, Version
from dask_embedding_reader.storage.urls import resolve

SAME, OTHER, SILENT = ObjectInfo("", 2_000, {"etag": "a"}), ObjectInfo("", 2_000, {"etag": "b"}), ObjectInfo("")
PAGE = ObjectInfo("", 70, is_page=True)


class RefusedError(OSError):
    """An answer of a server."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status = status


@dataclass
class Saying:
    """A store that gives one answer after the other, and fills memory with the number of its answer."""

    answers: list[Any]
    looked_up: Any = SAME
    is_local: bool = False
    filesystem: Any = field(default_factory=MemoryFileSystem)
    asked: list[tuple[list[tuple[int, int]], bool]] = field(default_factory=list)
    look_ups: int = 0

    def url(self, path: str) -> str:
        return f"saying://{path}"

    def read(self, path: str, ranges: Sequence[Span], *, again: bool = False) -> Sequence[Answer]:
        self.asked.append(([(start, sum(each.nbytes for each in buffers)) for start, buffers in ranges], again))
        number = len(self.asked)
        for _, buffers in ranges:
            for buffer in buffers:
                buffer[:] = bytes([number]) * buffer.nbytes
        answer = self.answers.pop(0)
        if isinstance(answer, Exception) and not isinstance(answer, ShortAnswerError | RefusedError):
            raise answer
        return answer if isinstance(answer, list) else [answer] * len(ranges)

    def look_up(self, path: str, first_nbytes: int = 0) -> ObjectInfo:
        self.look_ups += 1
        if isinstance(self.looked_up, Exception):
            raise self.looked_up
        found: ObjectInfo = self.looked_up
        return found


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.0)


def stored(store: Saying, version: Version = SAME.version) -> StoredFile:
    return StoredFile(store, "a.bin", version)  # type: ignore[arg-type]


def short(info: ObjectInfo | None) -> ShortAnswerError:
    return ShortAnswerError(5, 10, info)


BUSY = RefusedError(503)


@pytest.mark.parametrize(
    ("answers", "looked_up", "result", "look_ups"),
    [
        ([SAME], None, 1, 0),
        ([SILENT], SAME, 1, 1),
        ([None], SAME, 1, 1),
        ([None], OTHER, "the file changed since it was opened", 1),
        ([None], SILENT, "the file changed since it was opened", 1),  # nobody can tell any more
        ([None], FileNotFoundError("a.bin"), "a.bin: the file has gone since it was opened; open the reader", 1),
        ([None], ReadError("as it is"), "as it is", 1),
        ([None], KeyError("odd"), "saying://a.bin: looking it up failed: KeyError: 'odd'", 1),
        ([OTHER], None, "the file changed since it was opened", 0),
        ([BUSY, SAME], None, 2, 0),
        ([BUSY, BUSY, short(None), BUSY, SAME], None, 5, 0),
        ([BUSY, None], SAME, 2, 1),
        ([BUSY, OTHER], None, "the file changed since it was opened", 0),
        ([BUSY] * 5, None, "saying://a.bin, bytes 1,000 to 1,010: failed after 5 attempts: RefusedError: answered", 0),
        ([short(SAME), SAME], None, 2, 0),
        ([short(None), SAME], None, 2, 0),
        ([PAGE, short(PAGE), SAME], None, 3, 0),
        ([PAGE] * 5, None, r"failed after 5 attempts: a web page came \(70\) where the file was asked for", 0),
        ([short(SILENT), SAME], None, 2, 0),
        ([short(OTHER)], None, "the file changed since it was opened", 0),
        ([short(SAME)] * 5, None, "failed after 5 attempts: 5 bytes came where 10 were asked for", 0),
        ([RefusedError(404)], None, "a.bin, bytes 1,000 to 1,010: reading failed: RefusedError: answered 404", 0),
        ([RefusedError(416)], OTHER, "the file changed since it was opened", 1),
        ([RefusedError(416)], SAME, "a.bin, bytes 1,000 to 1,010: reading failed: RefusedError: answered 416", 1),
        ([RefusedError(416)], FileNotFoundError("a.bin"), "a.bin: the file has gone since it was opened", 1),
        ([FileNotFoundError("a.bin")], None, "saying://a.bin: the file has gone since it was opened; open the", 0),
        ([BUSY, FileNotFoundError("a.bin")], None, "saying://a.bin: the file has gone since it was opened", 0),
        ([ReadError("as it is")], None, "^as it is$", 0),
        ([KeyError("odd")], None, "saying://a.bin: cannot be read: KeyError: 'odd'", 0),
        ([BUSY, KeyError("odd")], None, "a.bin, bytes 1,000 to 1,010: reading failed: KeyError: 'odd'", 0),
    ],
    ids=repr,
)
def test_an_answer_is_taken_asked_for_again_or_an_error(
    answers: list[Any], looked_up: Any, result: int | str, look_ups: int
) -> None:
    store = Saying([*answers], looked_up)
    buffers = [bytearray(4), bytearray(6)]
    file = stored(store)
    if isinstance(result, int):
        read_into(file, 1_000, [memoryview(buffer) for buffer in buffers])
        assert b"".join(buffers) == bytes([result] * 10)
    else:
        with pytest.raises(ReadError, match=result) as caught:
            read_into(file, 1_000, [memoryview(buffer) for buffer in buffers])
        is_change = "changed since" in result or "gone since" in result
        assert isinstance(caught.value, FileChangedError) is is_change
    assert not store.answers
    assert store.asked == [([(1_000, 10)], number > 0) for number in range(len(answers))]
    assert store.look_ups == look_ups


def test_only_what_has_failed_is_asked_for_again() -> None:
    store = Saying([[SAME, BUSY, SAME, None, short(None)], BUSY, SAME, SAME], SAME)
    spans = [(0, 10), (20, 21), (30, 35), (40, 40), (50, 59)]
    buffers = [bytearray(stop - start) for start, stop in spans]
    read_each_into(stored(store), [(start, [memoryview(b)]) for (start, _), b in zip(spans, buffers, strict=True)])
    assert [bytes(b) for b in buffers] == [b"\1" * 10, b"\3", b"\1" * 5, b"", b"\4" * 9]
    ranges = [(start, stop - start) for start, stop in spans]
    assert store.asked == [(ranges, False), ([(20, 1)], True), ([(20, 1)], True), ([(50, 9)], True)]
    assert store.look_ups == 0


@pytest.mark.parametrize(
    ("answers", "look_ups"),
    [([SAME, SAME], 0), ([SAME, None], 1), ([None, SAME], 1), ([None, None], 1), ([SILENT] * 2, 1)],
)
def test_the_file_is_looked_up_once_unless_each_answer_tells_its_version(answers: list[Answer], look_ups: int) -> None:
    store = Saying([answers])
    assert read_ranges(stored(store), [(0, 3), (5, 7)]) == [b"\1" * 3, b"\1" * 2]
    assert store.look_ups == look_ups
    one = Saying([answers[:1]])
    assert read_range(stored(one), 0, 3) == b"\1" * 3
    assert one.look_ups == 0, "it has just been found"


def test_one_answer_for_many_ranges_may_still_be_of_another_version() -> None:
    with pytest.raises(FileChangedError):
        read_ranges(stored(Saying([[SAME, SAME, OTHER]])), [(0, 3), (5, 7), (10, 12)])


@pytest.mark.parametrize(
    ("ranges", "asked"),
    [
        ([], []),
        ([(0, 3)], [(0, 3)]),
        ([(0, 3), (3, 5)], [(0, 5)]),
        ([(0, 3), (4, 5), (5, 6), (6, 9)], [(0, 3), (4, 5)]),
        ([(3, 5), (0, 3)], [(3, 2), (0, 3)]),
        ([(0, 3), (0, 3)], [(0, 3), (0, 3)]),
        ([(1, 1), (1, 2)], [(1, 1)]),
    ],
)
def test_ranges_that_touch_are_one(ranges: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    store = Saying([SAME])
    assert [len(data) for data in read_ranges(stored(store), ranges)] == [stop - start for start, stop in ranges]
    assert store.asked == [(asked, False)]


OF_CACHE = "clear the cache in front of it, which goes on giving the old bytes, and open the reader again"
LOCAL = "2000 mtime a on host inode 1 ctime"
IN_PLACE = "another one of the same size and time is in its place, or its content, permissions or links were changed: "


@pytest.mark.parametrize(
    ("now", "protocol", "said"),
    [
        (OTHER, "memory", "(its size and version were '2000 etag a', now '2000 etag b'); open the reader again"),
        (OTHER, "filecache", f"(its size and version were '2000 etag a', now '2000 etag b'); {OF_CACHE}"),
        (
            SAME._replace(here="host 1 3"),
            "memory",
            f"({IN_PLACE}its size and version were '{LOCAL} 2', now '{LOCAL} 3'); open the reader again",
        ),
    ],
)
def test_what_has_changed_is_told(now: ObjectInfo, protocol: str, said: str) -> None:
    version = SAME.version if now is OTHER else SAME.version._replace(kind="mtime", here="host 1 2")
    if now is not OTHER:
        now = now._replace(marks={"mtime": "a"})
    store = Saying([now])
    store.filesystem = type("Client", (), {"protocol": protocol})()
    with pytest.raises(
        FileChangedError, match=f"^{re.escape(f'saying://a.bin: the file changed since it was opened {said}')}$"
    ):
        read_range(stored(store, version), 0, 3)


@pytest.mark.parametrize("protocol", ["memory", "filecache"])
def test_what_never_told_its_version_has_not_changed(protocol: str) -> None:
    store = Saying([SILENT], SILENT)
    store.filesystem = type("Client", (), {"protocol": protocol})()
    said = "saying://a.bin: the storage tells neither its size, nor a time or an etag, so that it would not be noticed"
    remedy = "copy it to a disk, or to a storage that tells of either"  # a cache tells what the storage behind it does
    with pytest.raises(ReadError, match=f"^{said} .*; {remedy}$") as caught:
        read_into(stored(store, Version(-1)), 0, [block(3)])
    assert not isinstance(caught.value, FileChangedError)


# ---------------------------------------------------------------------------------------------------------------------
# Local files


@pytest.fixture
def found(tmp_path: Path) -> StoredFile:
    """A file of a hundred bytes as it was found."""
    (tmp_path / "a").write_bytes(bytes(range(100)))
    store, path = resolve(tmp_path / "a")
    return StoredFile(store, path, store.look_up(path).version)


def block(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def test_blocks_are_given_out_one_by_one(found: StoredFile) -> None:
    blocks = [block(nbytes) for nbytes in (10, 0, 3, 50)]
    start = 7
    for wanted, given in zip(blocks, read_blocks_into(found, start, blocks), strict=True):
        assert given is wanted
        assert bytes(given) == bytes(range(start, start + len(given)))
        start += len(given)
    store = Saying([SAME, SAME])
    assert [bytes(given) for given in read_blocks_into(stored(store), 5, [block(2), block(3)])] == [b"\1\1", b"\2\2\2"]
    assert store.asked == [([(5, 2)], False), ([(7, 3)], False)]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda path: path.write_bytes(bytes(99)), "the file changed since it was opened"),
        (lambda path: path.write_bytes(bytes(101)), "the file changed since it was opened"),
        (Path.unlink, "the file has gone since it was opened"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: IsADirectoryError"),
    ],
    ids=["shorter", "longer", "gone", "a folder"],
)
def test_no_way_to_read_a_local_file_takes_another_one(
    found: StoredFile, change: Callable[[Path], object], error: str
) -> None:
    change(Path(found.path))
    ways: dict[str, Callable[[], object]] = {
        "range": lambda: read_range(found, 0, 3),
        "into": lambda: read_into(found, 0, [block(3)]),
        "blocks": lambda: list(read_blocks_into(found, 0, [block(3)])),
    }
    for read in ways.values():
        with pytest.raises(ReadError, match=f"{re.escape(found.path)}: {error}"):
            read()
        with reading_often(found), pytest.raises(ReadError, match=error):
            read()
    assert not try_read_in_turn(found, 0, block(3), np.array([3]), None, np.array([], int))
    for look in (check_local, local_input):
        with pytest.raises(FileChangedError, match=error if "since" in error else "changed"):
            look(found)


def test_what_pyarrow_cannot_open_is_told(found: StoredFile, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = local_input(found)
    assert opened is not None
    assert opened.read() == bytes(range(100))
    for error, said in ((FileNotFoundError("x"), "has gone since"), (OSError("no"), "a: cannot be read: no")):

        def fail(_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(pa, "OSFile", fail)
        with pytest.raises(ReadError, match=said) as caught:
            local_input(found)
        assert isinstance(caught.value, FileChangedError) is isinstance(error, FileNotFoundError)
    remote = stored(Saying([]))
    assert local_input(remote) is None
    check_local(remote)
    with reading_often(remote):
        assert remote.store.look_ups == 0  # type: ignore[attr-defined]


def test_runs_that_do_not_fill_the_memory_are_refused_and_others_left(found: StoredFile) -> None:
    def ints(*numbers: int) -> Any:
        return np.array(numbers, np.int64)

    assert try_read_in_turn(found, 0, block(0), ints(), None, ints())
    for store in (found, stored(Saying([]))):
        for kept, others, is_left in (
            ((ints(3, 4), ints(2)), 2, False),
            ((ints(3, 4), ints(2)), None, False),
            ((ints(3, 3), ints(2)), 2, True),
            ((ints(3, 4), ints(2)), 3, True),
            ((ints(8, -1), ints(2)), 2, True),
            ((ints(3, 4), ints(-2)), None, True),
        ):
            memory = None if others is None else block(others)
            if is_left:
                with pytest.raises(ValueError, match="runs of bytes that do not fill the memory exactly"):
                    try_read_in_turn(store, 5, block(7), *kept[:1], memory, *kept[1:])
                continue
            room = block(7)
            done = try_read_in_turn(store, 5, room, *kept[:1], memory, *kept[1:])
            assert done is store.store.is_local
            if done:
                assert bytes(room) == bytes([5, 6, 7, 10, 11, 12, 13])
                assert memory is None or bytes(memory) == bytes([8, 9])


def test_a_block_that_did_not_come_whole_is_read_in_the_plain_way(
    found: StoredFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: int, __: int, buffers: list[memoryview]) -> int:
        return buffers[0].nbytes - 1

    def fail(*_: object) -> int:
        raise OSError

    for broken in (half, fail):
        monkeypatch.setattr(reads, "read_open", broken)
        assert [bytes(each) for each in read_blocks_into(found, 5, [block(2), block(2)])] == [b"\5\6", b"\7\x08"]


def test_errors_of_this_library_stay_as_they_are() -> None:
    """Errors of this library are not wrapped a second time."""
    for error in (ReadError("as it is"), WriteError("as it is")):
        with pytest.raises(type(error), match=r"^as it is$"):
            read_range(stored(Saying([error])), 0, 3)
