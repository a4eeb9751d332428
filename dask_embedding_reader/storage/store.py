"""What a storage is: the interface that local disks and every fsspec file system have, and what is said of its files.

A further storage is one class with these methods, which passes ``tests/storage/test_stores.py``.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import fsspec

from dask_embedding_reader.errors import FileChangedError, ReadError
from dask_embedding_reader.storage.retries import hide_secrets

T = TypeVar("T")

Buffer = bytes | memoryview
Write = Callable[[Buffer], object]
Content = Callable[[Write], Any]
"""Writes all that a file holds, with the function that it is given."""

_HOST = socket.gethostname()


# ---------------------------------------------------------------------------------------------------------------------
# Versions


class Version(NamedTuple):
    """Which version of a file this is: another one when the content is another."""

    size: int
    """Its length in bytes; -1 where the storage does not tell."""
    kind: str = ""
    """What marks the version: ``etag``, ``mtime`` and the like; nothing where the storage offers no mark."""
    mark: str = ""
    """The etag or time."""
    here: str = ""
    """What only the file itself has, and no copy of it, if it is local and not saved: the machine, the number of the
    file on its disk, and when anything of it was changed, its permissions too, in nanoseconds."""

    @property
    def lasting(self) -> Version:
        """What a copy has too that keeps times, in another folder or on another machine: what is saved."""
        return self._replace(here="") if self.here else self

    @property
    def everywhere(self) -> str:
        """The version as every machine that shares the file tells it."""
        text = str(self.lasting)
        return "{} inode {} ctime {}".format(text, *self.here.rsplit(" ", 2)[1:]) if self.here else text

    def __str__(self) -> str:
        words = ["None" if self.size < 0 else str(self.size), *filter(None, (self.kind, self.mark))]
        if self.here:
            words.append("on {} inode {} ctime {}".format(*self.here.rsplit(" ", 2)))
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read what ``str`` wrote of a lasting version."""
        size, kind, mark = [*text.split(" ", 2), "", ""][:3]
        return cls(int(size) if re.fullmatch("[0-9]{1,19}", size) else -1, kind, mark)


class ObjectInfo(NamedTuple):
    """What a storage says of a file or folder now."""

    path: str
    """Where it is; empty where an answer is about the file that was asked for."""
    size: int = -1
    """Bytes; -1 where it does not tell."""
    marks: Mapping[str, str] = MappingProxyType({})
    """Whatever marks the version, by kind, the best one first."""
    is_folder: bool = False
    """Whether it is a folder."""
    here: str = ""
    """As in a version."""
    is_page: bool = False
    """Whether it is a page of a web server, for people."""
    head: bytes = b""
    """Its first bytes, where they were asked for and came in the same answer."""
    leads_nowhere: bool = False
    """Whether it is a link to what is not there."""

    @property
    def version(self) -> Version:
        """The version, by the best of the marks."""
        return Version(self.size, *next(iter(self.marks.items()), ("", "")), self.here)


def is_same(version: Version, info: ObjectInfo) -> bool | None:
    """Tell whether what a storage says now is of a version; None where it does not say enough.

    Whatever a listing, a look-up and the head of an answer tell differs: the same kind of mark is compared.
    """
    if version.kind == "etag" and "etag" in info.marks:
        # It says it all: the size that a faulty answer tells may be its own.
        return info.marks["etag"] == version.mark
    was_told = version.size >= 0 or not version.kind  # some tell the size in some answers only
    if was_told and info.size >= 0 and info.size != version.size:
        return False
    if version.kind:
        if version.kind not in info.marks:
            return None
        return info.marks[version.kind] == version.mark and not _is_another_here(version, info)
    return None if info.size < 0 else True


def _is_another_here(version: Version, info: ObjectInfo) -> bool:
    """Tell whether a local file of the same size and modification time is not the same any more.

    A saved manifest does not say, nor does another machine, which may have a copy, or see other numbers.
    """
    if version.here == info.here or not version.here or not info.here:
        return False
    before, after = version.here.rsplit(" ", 2), info.here.rsplit(" ", 2)
    if before[0] != after[0]:
        return False
    # Mounts of buckets, sshfs and FAT have one time for both, and make up numbers of inodes that do not last.
    return before[2] != after[2] or after[2] != info.marks["mtime"]


_MARKS = (
    "ETag etag sha256 blob_id CRC mtime LastModified Last-Modified last_modified updated modified "
    "modify modificationTime modification_time created"
)
"""Where file systems and answers tell of a version, the best one first."""

_KINDS = {key: key.replace("-", "").replace("_", "").lower() for key in _MARKS.split()}
"""The same mark under several names."""


def local_info(path: str, status: os.stat_result) -> ObjectInfo:
    """Return what the operating system says of a local file."""
    # Whoever writes a file can give it any modification time, such as that of a copy, but not what is only here.
    # One text for the three: the fewer objects 10,000 files have, the later Python looks for garbage among all.
    here = f"{_HOST} {status.st_ino} {status.st_ctime_ns}"
    return ObjectInfo(path, status.st_size, {"mtime": str(status.st_mtime_ns)}, here=here)


def told_info(told: Mapping[str, Any], path: str = "") -> ObjectInfo:
    """Return what a client says of a file, in the words of ``FileSystem.info``."""
    size = told.get("size")
    return ObjectInfo(
        path,
        -1 if size is None else int(size),
        _marks(told),
        is_folder=told.get("type") == "directory",
        is_page=str(told.get("mimetype")).startswith("text/html"),
        head=told.get("head", b""),
    )


def _marks(told: Mapping[str, Any]) -> dict[str, str]:
    """Return what marks the version of a file, by kind.

    One storage may tell the same mark in several ways: in a listing, when asked for one file, and in the head of an
    answer.
    """
    marks: dict[str, str] = {}
    in_lfs = told.get("lfs")  # of a large file on Hugging Face's hub
    told = {**told, **in_lfs} if isinstance(in_lfs, Mapping) else told
    for key, kind in _KINDS.items():
        value = told.get(key)
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


# ---------------------------------------------------------------------------------------------------------------------
# Storages


class Store(Protocol):
    """A storage. Small, comparable and picklable: it travels in every task.

    Whatever is not there is a ``FileNotFoundError``; what cannot be done is another exception, which the caller
    explains. Paths have no protocol, and slashes between folders.
    """

    @property
    def is_local(self) -> bool:
        """Whether the operating system itself opens the paths: pyarrow can, too, and asking takes no time."""

    @property
    def request_nbytes(self) -> int:
        """How many bytes come while a request is on its way: to ask for fewer takes as long. 0 where nothing waits."""

    @property
    def is_object_store(self) -> bool:
        """Whether files appear under their names at once and as a whole, without having had another one before."""

    @property
    def connections(self) -> int:
        """How many large reads at once suit it, if nobody says."""

    @property
    def key(self) -> str:
        """Which storage this is, equal in every process: the server or archive, but not who asks, nor how."""

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The file system of fsspec that users know it by."""

    def url(self, path: str) -> str:
        """Return a path so that it can be opened again: plain for local files, with the protocol elsewhere."""

    # Finding

    def list_files(
        self, folder: str, *, may_vanish: Callable[[str], bool], follow_links: bool = True
    ) -> Sequence[ObjectInfo]:
        """List the files below a folder, and the folders where it can tell; anew, whatever was listed before.

        Nothing, or ``FileNotFoundError``, where there is no such folder. A folder that is gone after it was listed is
        an error, unless ``may_vanish`` says of its path that it may be.
        """

    def list_folder(self, folder: str) -> Sequence[ObjectInfo]:
        """List the files and folders in a folder."""

    def glob(self, pattern: str) -> Sequence[ObjectInfo]:
        """List the files and folders that match a pattern."""

    def exists(self, path: str) -> bool:
        """Tell whether there is a file or folder."""

    def look_up(self, path: str, first_nbytes: int = 0) -> ObjectInfo:
        """Ask what a file is, past everything that is remembered; and for its first bytes, if that costs nothing."""

    # Reading

    def read(self, path: str, ranges: Sequence[Span], *, again: bool = False) -> Sequence[Answer]:
        """Read byte ranges of a file, all at once where it can.

        Nothing is tried twice: who asks compares what the answers tell, and asks ``again``. What is raised is final;
        what is returned of a range may pass.
        """

    def read_whole(self, path: str) -> bytes:
        """Return the content of a small file."""

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
        """Write a file, and return what ``content`` returns; readers see what was there before, or the whole new one.

        ``scratch`` is a folder for the temporary file. ``durable`` survives a loss of power, ``cached`` stays in the
        memory of the system, where there is such. ``is_new`` lets an object store raise ``FileExistsError``.
        """

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one of this name; tell whether it was written."""

    def move(self, source: str, target: str) -> None:
        """Rename a file, replacing one that is there."""

    def remove(self, path: str, trash: str | None = None) -> None:
        """Remove a file; with a folder ``trash`` on the same local disk, not once that folder has gone."""

    def make_folder(self, folder: str) -> None:
        """Make a folder for temporary files, where such are needed."""

    def remove_folder(self, folder: str) -> None:
        """Remove what is left of a folder whose files are gone, where there are folders."""


Span = tuple[int, Sequence[memoryview]]
"""Where bytes start in a file, and writable, contiguous memory for so many; parts of it may be empty."""

Answer = ObjectInfo | BaseException | None
"""What an answer with all the bytes tells of the whole file (None: nothing), or what went wrong."""


class ShortAnswerError(ReadError):
    """Fewer bytes came than were asked for, perhaps because the file is another one now."""

    def __init__(self, count: int, nbytes: int, info: ObjectInfo | None) -> None:
        super().__init__(f"{count:,} bytes came where {nbytes:,} were asked for")
        self.info = info
        """What the answer tells of the whole file."""


def shown_url(store: Store, path: str) -> str:
    """Return a path for messages."""
    return hide_secrets(store.url(path))


def most_requests(stores: Iterable[Store]) -> int:
    """Return how many small reads are best waited for at once: of those that wait for nothing, one."""
    return max((store.connections for store in stores if store.request_nbytes), default=1)


def vanished(url: str) -> FileChangedError:
    """Say so of a file or folder: its rows would be missing from the collection, in silence."""
    return FileChangedError(
        f"{url}: this was listed, but then it could not be found: it was removed or renamed in the meantime, or the "
        "client of this storage does not find it by its name; open again, or rename it"
    )


class StoredFile(NamedTuple):
    """A file in a storage, as it was when it was found. Small and picklable: it travels in every task."""

    store: Store
    """Where it is."""
    path: str
    """Its path as the storage writes it, without the protocol."""
    version: Version
    """As which version it was found."""

    @property
    def size(self) -> int:
        """Its length in bytes; -1 where the storage does not tell."""
        return self.version.size

    @property
    def url(self) -> str:
        """The path with its protocol (none for local files), as errors and logs show it: without secrets."""
        return shown_url(self.store, self.path)

    def __repr__(self) -> str:
        return f"<{self.url}, {self.size} bytes, version {self.version}>"
