"""Local disks: whatever paths the operating system itself opens."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from fsspec import AbstractFileSystem

from dask_embedding_reader.storage.fsspec import FsspecStore, glob_walking
from dask_embedding_reader.storage.names import glob_root, is_litter
from dask_embedding_reader.storage.ranges import drop_bytes
from dask_embedding_reader.storage.store import (
    Answer,
    Buffer,
    ObjectInfo,
    ShortAnswerError,
    Span,
    T,
    Write,
    local_info,
    vanished,
)

_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK"))
IOV_MAX = 1024  # buffers that Linux and macOS fill in one preadv call
_CALL_NBYTES = 2**30  # bytes in one call: macOS refuses 2 GiB
_COPY_NBYTES = 2**24  # where there is no preadv, each byte passes through new memory
_ATTEMPTS = 4  # to make a file in a folder that others remove when it is empty

_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What the system says of a link to nothing or to itself."""

_FLUSH_NBYTES = 8 * 2**20
"""After so many bytes the disk begins to write a file: else it would idle until the file is complete."""

_UNDER_WAY_NBYTES = 64 * 2**20
"""Of what was written before so many bytes, the disk has had the time to take it."""


@dataclass(frozen=True, slots=True)
class LocalStore:
    """The disks of this machine, and those that are mounted."""

    filesystem: AbstractFileSystem
    """The file system of fsspec that users know it by."""

    @property
    def is_local(self) -> bool:
        """Yes."""
        return True

    @property
    def request_nbytes(self) -> int:
        """Nothing: a read costs its bytes, and what a call to the operating system takes."""
        return 0

    @property
    def is_object_store(self) -> bool:
        """No: files are renamed."""
        return False

    @property
    def connections(self) -> int:
        """As many as there are processors, but one reads while another computes."""
        return max(2, _processors())

    @property
    def key(self) -> str:
        """The same as of any file system of fsspec."""
        return FsspecStore(self.filesystem).key

    def url(self, path: str) -> str:
        """Return the path, which needs no protocol."""
        return path

    # Finding

    def list_files(
        self, folder: str, *, may_vanish: Callable[[str], bool], follow_links: bool = True
    ) -> Sequence[ObjectInfo]:
        """List the files below a folder, through links too, which fsspec passes over, and the folders."""
        return list(_walk(folder, may_vanish, follow_links))

    def list_folder(self, folder: str) -> Sequence[ObjectInfo]:
        """List the files and folders in a folder."""
        with os.scandir(folder) as entries:
            return [ObjectInfo(with_slashes(entry.path), is_folder=_is_folder(entry)) for entry in entries]

    def glob(self, pattern: str) -> Sequence[ObjectInfo]:
        """List the files and folders that match a pattern."""
        entries = glob_walking(FsspecStore(self.filesystem), pattern, _entries)
        infos = []
        for path, kind in ((each["name"], each["type"]) for each in entries):
            try:
                infos.append(ObjectInfo(path, is_folder=True) if kind == "directory" else file_info(path))
            except FileNotFoundError as error:
                if not is_litter(path, glob_root(pattern)):
                    raise vanished(path) from error
        return infos

    def exists(self, path: str) -> bool:
        """Tell whether there is a file or folder."""
        return os.path.exists(path)

    def look_up(self, path: str, first_nbytes: int = 0) -> ObjectInfo:
        """Ask what a file is; its first bytes cost a call of their own."""
        del first_nbytes
        mode = os.lstat(path).st_mode
        return ObjectInfo(path, is_folder=True) if stat.S_ISDIR(mode) or os.path.isdir(path) else file_info(path)

    # Reading

    def read(self, path: str, ranges: Sequence[Span], *, again: bool = False) -> Sequence[Answer]:
        """Read byte ranges of a file, which is opened once, one after the other."""
        del again
        counts: dict[int, int] = {}
        descriptor, is_kept = _open(path)
        try:
            for number, (start, buffers) in enumerate(ranges):
                # One call is enough, mostly: where ranges are many and short, all else takes longer than it.
                one = len(buffers) == 1 and buffers[0].nbytes <= _CALL_NBYTES
                if not one or _scatter(descriptor, buffers, start) < buffers[0].nbytes:
                    counts[number] = read_open(descriptor, start, [buffer for buffer in buffers if buffer.nbytes])
            info = local_info(path, os.fstat(descriptor))
        finally:
            if not is_kept:
                os.close(descriptor)
        answers: list[Answer] = [info] * len(ranges)
        for number, count in counts.items():
            if count < (nbytes := sum(buffer.nbytes for buffer in ranges[number][1])):
                answers[number] = ShortAnswerError(count, nbytes, info)
        return answers

    def read_whole(self, path: str) -> bytes:
        """Return the content of a small file."""
        with open(open_local(path), "rb") as file:
            return file.read()

    # Writing

    def put(
        self,
        path: str,
        content: Callable[[Write], T],
        *,
        scratch: str | None = None,
        durable: bool = False,
        cached: bool = True,
        is_new: bool = False,
    ) -> T:
        """Write a file under another name, and rename it: it is never in memory as a whole."""
        del is_new  # without its temporary file, another writer can no more put anything into this place
        folder, name = os.path.split(path)
        if scratch is None:
            os.makedirs(folder, exist_ok=True)
        temporary = f"{scratch or folder}/.{name}.{uuid.uuid4().hex}.tmp"
        try:
            result = _write(temporary, content, durable=durable, cached=cached)
            # Not before: where the folder of temporary files has gone, nothing shall appear.
            os.makedirs(folder, exist_ok=True)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.remove(temporary)
            raise
        return result

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one of this name; tell whether it was written."""
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        for attempt in range(_ATTEMPTS):
            os.makedirs(folder, exist_ok=True)
            try:
                _write_new(temporary, data)
                return _link(temporary, path, data)
            except FileNotFoundError:  # another writer, which ends, has just removed the empty folder
                if attempt == _ATTEMPTS - 1:
                    raise
            finally:
                with suppress(OSError):
                    os.remove(temporary)
        raise AssertionError("unreachable")

    def move(self, source: str, target: str) -> None:
        """Rename a file, replacing one that is there."""
        os.replace(source, target)

    def remove(self, path: str, trash: str | None = None) -> None:
        """Remove a file; by way of another folder, if one is given: once that has gone, nothing is removed."""
        if trash is not None:
            gone = f"{trash}/{uuid.uuid4().hex}"
            os.replace(path, gone)
            path = gone
        os.remove(path)

    def make_folder(self, folder: str) -> None:
        """Make a folder, and those that it is in."""
        os.makedirs(folder, exist_ok=True)

    def remove_folder(self, folder: str) -> None:
        """Remove what is left of a folder whose files are gone."""
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _processors() -> int:
    # The system takes 60 us to tell: as long as reading ten rows.
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def with_slashes(path: str) -> str:
    """Return a local path as fsspec has it, on Windows too."""
    return path.replace(os.sep, "/")


def _entries(folder: str) -> list[dict[str, Any]]:
    """List a folder as fsspec does, which passes over links to folders, and files that vanish meanwhile (in 2026.9)."""
    with os.scandir(folder) as entries:
        return [
            {"name": with_slashes(entry.path), "type": "directory" if _is_folder(entry) else "file"}
            for entry in entries
            if not (entry.is_symlink() and _leads_back(entry.path))
        ]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell folders and links to them; of a link that leads to itself ``entry.is_dir()`` is an error.

    What a link leads to may be for others only. It passes for a folder: who goes into it gets the error. Taken for a
    file it would match no pattern, and all that is in it would be missing in silence.
    """
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return stat.S_ISDIR(os.stat(entry.path).st_mode)
    except OSError as error:
        return error.errno not in _NOWHERE


def _leads_back(link: str) -> bool:
    """Tell whether a link leads to a folder that it is in, however that was reached: there is no end to it."""
    if not os.path.isdir(link):
        return False
    there, above = os.stat(link), os.path.dirname(link)
    while not os.path.samestat(there, os.stat(above)):
        if above == (above := os.path.dirname(above)):
            return False
    return True


def _walk(folder: str, may_vanish: Callable[[str], bool], follow_links: bool) -> Iterator[ObjectInfo]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error  # what is there would seem not to be
        if not may_vanish(with_slashes(error.filename)):
            raise vanished(error.filename) from error

    if not stat.S_ISDIR(os.stat(folder).st_mode):  # or says that it does not exist, as listing would
        yield file_info(folder)
        return
    seen = set()
    for current, folders, names in os.walk(folder, followlinks=follow_links, onerror=refuse):
        if follow_links:
            try:
                status = os.stat(current)
            except FileNotFoundError as error:  # gone since it was listed
                refuse(error)
                continue
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
        place = with_slashes(current).rstrip("/")
        for name in folders:
            yield ObjectInfo(f"{place}/{name}", is_folder=True)
        for name in names:
            path = with_slashes(f"{place}/{name}")
            if follow_links:
                try:
                    yield file_info(path)
                except FileNotFoundError as error:
                    refuse(error)
            else:
                with suppress(FileNotFoundError):  # somebody else's temporary file
                    yield local_info(path, _status(path))


def _status(path: str) -> os.stat_result:
    """Return what is told of a file, of a link what it leads to, which is read and has been written; else of itself."""
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)


def file_info(path: str) -> ObjectInfo:
    """Look up a file that was just listed; ``FileNotFoundError`` if it is gone since."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno not in _NOWHERE or not stat.S_ISLNK(os.lstat(path).st_mode):
            raise  # its rows would be missing, in silence
        # A link to nothing or to itself: like a file of zero bytes, which is passed over.
        return ObjectInfo(path, 0, leads_nowhere=True)
    return local_info(path, status)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_local(path: str) -> int:
    """Open a local file; what is none is an error, such as a pipe, whose other end one might wait for for ever."""
    descriptor = os.open(path, _OPEN_FLAGS)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", path)
    raise OSError(errno.EINVAL, "not a regular file, but a pipe or a device", path)


class _Kept(threading.local):
    """The file that a thread keeps open, and its descriptor: -1 until it is read."""

    path = ""
    descriptor = -1


_kept = _Kept()


@contextmanager
def kept_open(path: str) -> Iterator[None]:
    """Have this thread open a file once, however often it reads it.

    To open and to close it takes longer than to read some hundred bytes, and each of these calls gives up the GIL.
    """
    if path == _kept.path:
        yield
        return
    before = _kept.path, _kept.descriptor
    _kept.path, _kept.descriptor = path, -1
    try:
        yield
    finally:
        descriptor = _kept.descriptor
        _kept.path, _kept.descriptor = before
        if descriptor >= 0:
            os.close(descriptor)


def _open(path: str) -> tuple[int, bool]:
    """Open a file, unless this thread keeps it open; tell whether it does."""
    if path != _kept.path:
        return open_local(path), False
    if _kept.descriptor < 0:
        _kept.descriptor = open_local(path)
    return _kept.descriptor, True


def read_open(descriptor: int, start: int, buffers: list[memoryview]) -> int:
    """Fill buffers with the bytes of an open file from a position on; return how many came."""
    position, stop = start, start + sum(buffer.nbytes for buffer in buffers)
    while position < stop:
        fit_all = len(buffers) <= IOV_MAX and stop - position <= _CALL_NBYTES
        count = _scatter(descriptor, buffers if fit_all else _for_one_call(buffers), position)
        if count == 0:
            break
        position += count
        if position < stop:
            buffers = drop_bytes(buffers, count)
    return position - start


def _scatter(descriptor: int, buffers: Sequence[memoryview], start: int) -> int:
    """Fill buffers from a file position in one system call; return how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, start)
    # Windows has neither preadv nor pread; nobody else moves the position of this descriptor.
    os.lseek(descriptor, start, os.SEEK_SET)
    data = os.read(descriptor, min(buffers[0].nbytes, _COPY_NBYTES))
    buffers[0][: len(data)] = data
    return len(data)


def _for_one_call(buffers: Sequence[memoryview]) -> list[memoryview]:
    """Return of a list of buffers as much as the operating system fills at once."""
    taken, room = [], _CALL_NBYTES
    for buffer in buffers[:IOV_MAX]:
        taken.append(buffer[:room])
        room -= taken[-1].nbytes
        if room == 0:
            break
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write(path: str, content: Callable[[Write], T], *, durable: bool, cached: bool) -> T:
    with open(path, "xb", buffering=0) as file:
        flushed = written = 0

        def write(buffer: Buffer) -> None:
            nonlocal flushed, written
            rest = memoryview(buffer).cast("B")
            written += rest.nbytes
            while rest.nbytes:
                rest = rest[file.write(rest) :]
            if written - flushed >= _FLUSH_NBYTES:
                start = flushed if cached else max(0, flushed - _UNDER_WAY_NBYTES)
                _flush(file.fileno(), start, written)
                flushed = written

        result = content(write)
        if durable:
            os.fsync(file.fileno())
        if not cached:
            _flush(file.fileno(), 0, written)
    return result


def _link(temporary: str, path: str, data: bytes) -> bool:
    """Give a file its name unless there is one of that name; tell whether it was given."""
    try:
        try:
            os.link(temporary, path)  # it is there as a whole, or another one was there before
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:  # a disk without links
            _write_new(path, data)
    except FileExistsError:
        return False
    return True


def _write_new(path: str, data: bytes) -> None:
    """Write a small file of a new name; where all of it cannot be written, as on a full disk, nothing is left."""
    file = open(path, "xb")  # noqa: SIM115 - one that was there before is not ours to remove
    try:
        with file:
            file.write(data)
    except BaseException:
        with suppress(OSError):
            os.remove(path)
        raise


def _flush(descriptor: int, start: int, stop: int) -> None:
    """Have the system begin to write what it holds of a file, without waiting for it, and let go of what is written.

    ``fsync`` then has less to do. What is new to the disk is only begun; it takes another call to let go of it.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is but an advice
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
