"""Exact byte ranges of files, wherever these are.

Every read notices when a file is no longer the one that was found, and when not exactly the bytes came that were asked
for; it is tried again where that can help. Local files are read by the operating system, others by one request a range
(``open`` would read ahead), straight into the caller's memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import EmbeddingReaderError, FileChangedError, ReadError
from dask_embedding_reader.storage.clients.requests import Told, ask_info, request
from dask_embedding_reader.storage.connections import FileSystem, connected, cuts_paths, remembers_files
from dask_embedding_reader.storage.ranges import Wanted, drop_bytes
from dask_embedding_reader.storage.retries import (
    describe,
    hide_secrets,
    http_status,
    is_secret,
    shown_cause,
    with_retries,
)

_IOV_MAX = 1024  # buffers that Linux and macOS fill in one preadv call
_CALL_NBYTES = 2**30  # bytes in one call: macOS refuses 2 GiB
_COPY_NBYTES = 2**24  # where there is no preadv, each byte passes through new memory

_MARKS = (
    *("ETag", "etag", "CRC", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified"),
    *("modify", "modificationTime", "modification_time", "created"),
)
"""Where file systems tell of a new version; the first one found is taken."""

_LOCAL = re.compile(
    r"(?P<lasting>\d+ mtime (?P<mtime>-?\d+)) on (?P<host>.*) inode (?P<inode>\d+) ctime (?P<ctime>-?\d+)"
)
"""The version of a local file."""

_HOST = socket.gethostname()

_KINDS = {key: key.replace("-", "").replace("_", "").lower() for key in _MARKS}
"""The same mark under several names."""


class StoredFile(NamedTuple):
    """A file in a storage, as it was when it was found. Small and picklable: it travels in every task."""

    filesystem: FileSystem
    """Where it is."""
    path: str
    """Its path as the file system spells it, without the protocol."""
    size: int
    """Its length in bytes; -1 where the storage does not tell."""
    fingerprint: str
    """Changes when the content changes: size, and etag or modification time where the storage offers them; of a local
    file, also its inode and the time when anything of it was changed, which hold on one machine."""

    @property
    def url(self) -> str:
        """The path with its protocol (none for local files), as errors and logs show it: without secrets."""
        return shown_url(self.filesystem, self.path)

    def __repr__(self) -> str:
        return f"<{self.url}, {self.size} bytes, version {self.fingerprint}>"


def file_url(filesystem: FileSystem, path: str) -> str:
    """Spell a path so that it can be opened again: plain for local files, with the protocol elsewhere."""
    if is_local(filesystem):
        return path
    url = str((connected(filesystem) if cuts_paths(filesystem) else filesystem).unstrip_protocol(path))
    if host := filesystem.storage_options.get("host"):  # which some file systems leave out
        port = filesystem.storage_options.get("port")
        url = url.replace(":///", f"://{host}:{port}/" if port else f"://{host}/", 1)
    return url


def shown_url(filesystem: FileSystem, path: str) -> str:
    """Spell a path for messages."""
    return hide_secrets(file_url(filesystem, path))


def identity(filesystem: FileSystem) -> str:
    """Spell which storage this is, equal in every process: the server or archive, but not who asks, nor how."""

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): public(item) for key, item in value.items() if not is_secret(str(key))}
        return [public(item) for item in value] if isinstance(value, list | tuple) else value

    options = {**dict(enumerate(filesystem.storage_args)), **filesystem.storage_options}
    spelled = json.dumps(public(options), sort_keys=True, default=lambda value: type(value).__name__)
    return f"{type(filesystem).__name__} {spelled}"


def is_local(filesystem: FileSystem) -> bool:
    """Tell whether the operating system itself can open the paths of this file system."""
    return type(filesystem) is LocalFileSystem


# ---------------------------------------------------------------------------------------------------------------------
# Versions


def fingerprint(info: Mapping[str, Any]) -> str:
    """Spell the version of a file: its size, and the kind and value of the best mark that the storage offers."""
    marks = _marks(info)
    return " ".join([str(info.get("size")), *next(iter(marks.items()), ()), *info.get(_HERE, ())])


_HERE = "here"


def local_info(status: os.stat_result) -> dict[str, Any]:
    """Return what the operating system says of a local file, in the words of ``FileSystem.info``."""
    # Whoever writes a file can give it any modification time, such as that of a copy, but not these two.
    here = ("on", _HOST, "inode", str(status.st_ino), "ctime", str(status.st_ctime_ns))
    return {"size": status.st_size, "mtime": status.st_mtime_ns, _HERE: here}


def _local_version(status: os.stat_result) -> str:
    """Return the fingerprint of what the operating system says of a local file, in a tenth of the time."""
    return f"{status.st_size} mtime {status.st_mtime_ns} on {_HOST} inode {status.st_ino} ctime {status.st_ctime_ns}"


def lasting(version: str) -> str:
    """Return what of the version of a file a copy has too that keeps times, in another folder or on another machine."""
    found = _LOCAL.fullmatch(version)
    return version if found is None else found["lasting"]


def everywhere(version: str) -> str:
    """Return the version of a file as every machine that shares it spells it."""
    return _LOCAL.sub(r"\g<lasting> inode \g<inode> ctime \g<ctime>", version)


def _is_another_here(was: str, now: str) -> bool:
    """Tell whether a local file of the same size and modification time is not the same any more.

    A saved manifest does not say, nor does another machine, which may have a copy, or see other numbers.
    """
    before, after = _LOCAL.fullmatch(was), _LOCAL.fullmatch(now)
    if before is None or after is None or before["host"] != after["host"]:
        return False
    if before["ctime"] != after["ctime"]:
        return True
    # Mounts of buckets, sshfs and FAT have one time for both, and make up numbers of inodes that do not last.
    return before["inode"] != after["inode"] and after["ctime"] != after["mtime"]


def _marks(info: Mapping[str, Any]) -> dict[str, str]:
    """Return what marks the version of a file, by kind, the best one first.

    One storage may spell the same mark in several ways: in a listing, when asked for one file, and in the head of an
    answer.
    """
    marks: dict[str, str] = {}
    for key, kind in _KINDS.items():
        value = info.get(key)
        if value is None:
            continue
        if kind == "etag":
            value = str(value).removeprefix("W/").strip('"')
        elif kind == "lastmodified" and isinstance(value, str):
            value = _parse_date(value)
        if isinstance(value, datetime):
            # An answer tells whole seconds, a listing perhaps parts of them.
            value = int(value.timestamp()) if kind == "lastmodified" else value.timestamp()
        if value != "":
            marks.setdefault(kind, str(value))
    return marks


def _parse_date(text: str) -> datetime | str:
    try:
        date = parsedate_to_datetime(text)
        date.timestamp()
    except (ValueError, OverflowError, OSError):  # no date, or one that the system cannot count to
        return text
    return date


def _is_same(file: StoredFile, info: Mapping[str, Any]) -> bool | None:
    """Tell whether what a storage says now is the version that was found; None where it does not say enough."""
    size, kind, value = [*lasting(file.fingerprint).split(" ", 2), "", ""][:3]
    marks, now = _marks(info), info.get("size")
    if kind == "etag" and kind in marks:  # says it all: the size that a faulty answer tells may be its own
        return marks[kind] == value
    if now is not None and str(now) != size:
        return False
    if kind:
        return marks[kind] == value if kind in marks else None
    return None if now is None else True


def _changed(file: StoredFile, info: Mapping[str, Any]) -> FileChangedError:
    now = fingerprint(info)
    how = ""
    if lasting(now) == lasting(file.fingerprint):
        how = (
            "another one of the same size and time is in its place, or its content, permissions or links were changed: "
        )
    remedy = "open the reader again"
    if remembers_files(file.filesystem):
        remedy = f"clear the cache in front of it, which goes on giving the old bytes, and {remedy}"
    return FileChangedError(
        f"{file.url}: the file changed since it was opened ({how}its size and version were {file.fingerprint!r}, now "
        f"{now!r}); {remedy}"
    )


def _gone(file: StoredFile) -> FileChangedError:
    return FileChangedError(f"{file.url}: the file has gone since it was opened; open the reader again")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_range(file: StoredFile, start: int, stop: int) -> bytes:
    """Read the bytes ``[start, stop)`` of a file that has just been found: one request, and no other.

    Raises
    ------
    FileChangedError
        If the file has gone; if it changed, where that shows without another request.
    ReadError
        If the storage does not deliver exactly these bytes, however often it is asked.
    """
    buffer = bytearray(stop - start)
    if is_local(file.filesystem):
        read_into(file, start, [memoryview(buffer)])
    else:
        _read_remote(file, [(start, [memoryview(buffer)])])
    return bytes(buffer)


def read_ranges(file: StoredFile, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read several byte ranges ``[start, stop)`` of one file, all at once where the storage can.

    Raises
    ------
    FileChangedError, ReadError
        As :func:`read_into` does.
    """
    buffers = [bytearray(stop - start) for start, stop in ranges]
    joined: list[tuple[int, list[memoryview]]] = []
    reached = -1
    for (start, stop), buffer in zip(ranges, buffers, strict=True):
        if start != reached:  # ranges that touch are one request
            joined.append((start, []))
        joined[-1][1].append(memoryview(buffer))
        reached = stop
    if is_local(file.filesystem):
        for start, views in joined:
            read_into(file, start, views)
    else:
        _check_after(file, _read_remote(file, joined))
    return [bytes(buffer) for buffer in buffers]


def read_into(file: StoredFile, start: int, buffers: Sequence[memoryview]) -> None:
    """Read consecutive bytes of a file, from ``start`` on, into buffers, filling one after the other.

    Parameters
    ----------
    file
        The file.
    start
        The first byte.
    buffers
        Writable, contiguous views of bytes; empty ones are allowed.

    Raises
    ------
    FileChangedError
        If the file is not the one that was found any more.
    ReadError
        If the storage does not deliver exactly these bytes, however often it is asked.
    """
    read_each_into(file, [(start, buffers)])


def read_each_into(file: StoredFile, ranges: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
    """Read several byte ranges of one file as :func:`read_into` reads one: the file is opened, and compared, once.

    Remote ranges are asked for all at once.
    """
    if is_local(file.filesystem):
        _read_local(file, ranges)
    else:
        _check_after(file, _read_remote(file, ranges))


def open_local(path: str) -> int:
    """Open a local file; what is none is an error, such as a pipe, whose other end one might wait for for ever."""
    flags = ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK")
    descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", path)
    raise OSError(errno.EINVAL, "not a regular file, but a pipe or a device", path)


def local_input(file: StoredFile) -> pa.NativeFile:
    """Open a local file for pyarrow, which reads it without Python's lock."""
    check_local(file)  # pyarrow would wait for the other end of a pipe
    try:
        return pa.OSFile(os.fsencode(file.path))  # a name need not be UTF-8
    except FileNotFoundError as error:
        raise _gone(file) from error
    except OSError as error:
        raise ReadError(f"{file.path}: cannot be read: {error}") from error


def check_local(file: StoredFile, descriptor: int | None = None) -> None:
    """Compare a local file with what was found; nothing to do for others, which are checked whenever they are read.

    Raises
    ------
    FileChangedError
        If its version differs, or it has gone.
    ReadError
        If the operating system cannot tell.
    """
    if not is_local(file.filesystem):
        return
    try:
        status = os.stat(file.path if descriptor is None else descriptor)
    except FileNotFoundError as error:
        raise _gone(file) from error
    except OSError as error:
        raise ReadError(f"{file.path}: cannot be looked up: {error}") from error
    if _local_version(status) == file.fingerprint:
        return
    found = local_info(status)
    now = fingerprint(found)
    if now != file.fingerprint and (not _is_same(file, found) or _is_another_here(file.fingerprint, now)):
        raise _changed(file, found)


# ---------------------------------------------------------------------------------------------------------------------
# Remote files


def _read_remote(file: StoredFile, ranges: Sequence[tuple[int, Sequence[memoryview]]]) -> bool:
    """Fill the buffers of each range, all ranges at once; those that fail are read again one after the other.

    Returns
    -------
    bool
        Whether the answers proved that the bytes are of the version that was found.
    """
    ranges = [(start, buffers) for start, buffers in ranges if any(buffer.nbytes for buffer in buffers)]
    if not ranges:
        return True
    wanted = [Wanted(start, buffers) for start, buffers in ranges]
    answers = request(file.filesystem, file.path, wanted)
    firsts = zip(wanted, answers, strict=True)
    proofs = [_finish(file, *span, first) for span, first in zip(ranges, firsts, strict=True)]
    return all(proofs)


def _check_after(file: StoredFile, proved: bool) -> None:
    """Look a file up after a read whose answers did not tell its version: else old and new pieces might be mixed."""
    if not proved:
        _check_remote(file)


def _finish(
    file: StoredFile,
    start: int,
    buffers: Sequence[memoryview],
    first: tuple[Wanted, Told | BaseException | None],
) -> bool:
    """Take the answer for a range, or read it again, with pauses; return whether it proves the version of the file."""
    stop = start + sum(buffer.nbytes for buffer in buffers)
    where = f"{file.url}, bytes {start:,} to {stop:,}"
    outcomes = [first]

    def attempt() -> bool:
        if outcomes:
            wanted, answer = outcomes.pop()
        else:
            wanted = Wanted(start, buffers)
            (answer,) = request(file.filesystem, file.path, [wanted], again=True)
        if isinstance(answer, BaseException):
            raise answer
        same = None if answer is None else _is_same(file, answer)
        if answer is not None and same is False:
            raise _changed(file, answer)
        if wanted.count != stop - start:
            raise ReadError(f"{wanted.count:,} bytes came where {stop - start:,} were asked for")
        return same is True

    try:
        return with_retries(attempt, where)
    except FileNotFoundError as error:
        raise _gone(file) from shown_cause(error)
    except EmbeddingReaderError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        if http_status(error) == 416:  # a range past the end: the file may have become shorter
            _check_remote(file)
        raise ReadError(f"{where}: reading failed: {describe(error)}") from shown_cause(error)


def _check_remote(file: StoredFile) -> None:
    """Ask the storage whether the file is still the one that was found."""
    try:
        info = with_retries(lambda: ask_info(file.filesystem, file.path), f"looking up {file.url}")
    except FileNotFoundError as error:
        raise _gone(file) from shown_cause(error)
    except EmbeddingReaderError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(f"{file.url}: looking it up failed: {describe(error)}") from shown_cause(error)
    if not _is_same(file, info):
        raise _changed(file, info)


# ---------------------------------------------------------------------------------------------------------------------
# Local files


def _read_local(file: StoredFile, ranges: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
    try:
        descriptor = open_local(file.path)
    except FileNotFoundError as error:
        raise _gone(file) from error
    except OSError as error:
        raise ReadError(f"{file.path}: cannot be read: {error}") from error
    start = 0
    try:
        for start, given in ranges:
            # One call is enough, mostly: where ranges are many and short, all else takes longer than it.
            one = len(given) == 1 and given[0].nbytes <= _CALL_NBYTES
            if not one or _scatter(descriptor, given, start) < given[0].nbytes:
                _fill(file, descriptor, start, [buffer for buffer in given if buffer.nbytes])
        check_local(file, descriptor)
    except ReadError:
        raise
    except OSError as error:
        raise ReadError(f"{file.path}: reading from byte {start:,} on failed: {error}") from error
    finally:
        os.close(descriptor)


def _fill(file: StoredFile, descriptor: int, start: int, buffers: list[memoryview]) -> None:
    """Fill buffers with the bytes of an open file from a position on."""
    while buffers:
        count = _scatter(descriptor, _for_one_call(buffers), start)
        if count == 0:
            raise FileChangedError(
                f"{file.path}: ends at byte {start:,}, but {sum(b.nbytes for b in buffers):,} more were expected; "
                "the file was cut short while it was read: open the reader again"
            )
        start += count
        buffers = drop_bytes(buffers, count)


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
    for buffer in buffers[:_IOV_MAX]:
        taken.append(buffer[:room])
        room -= taken[-1].nbytes
        if room == 0:
            break
    return taken
