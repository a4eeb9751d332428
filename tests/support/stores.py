"""``bucket://``: an object store in memory that writes down every request it gets, and that can be told to misbehave.

It records listings and HEAD requests too and not the bytes alone, because those are what a remote collection costs
before its first row. Like an object store it lists a whole tree in one request, has
no folders of its own, gives every object an ETag and a time, and reads ahead in large blocks when a file is opened
instead of asked for a range.
"""

from __future__ import annotations

import datetime as dt
import io
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from dask_embedding_reader.storage.local import LocalStore, file_info
from dask_embedding_reader.storage.store import StoredFile


def stored(path: Path, content: bytes) -> StoredFile:
    """Write a local file; return it as it was found."""
    path.write_bytes(content)
    return StoredFile(LocalStore(LocalFileSystem()), str(path), file_info(str(path)).version)


class Request(NamedTuple):
    """One request that the store answered, or refused."""

    #: ``list`` and ``head`` cost a round trip and deliver no content, ``read`` delivers the bytes ``[start, stop)``.
    kind: Literal["list", "head", "read"]
    #: Without protocol.
    path: str
    start: int = 0
    stop: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes delivered."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Stored:
    """One object."""

    content: bytes
    mtime: float
    etag: str


@dataclass
class Bucket:
    """The content of the store and the record of what was asked of it."""

    objects: dict[str, Stored] = field(default_factory=dict, repr=False)
    #: In the order of arrival.
    requests: list[Request] = field(default_factory=list, repr=False)
    #: Called before each read is answered, in the reading thread; may raise or wait.
    before_read: Callable[[Request], None] | None = None
    #: What becomes of the bytes of a read on their way: a connection may break off in the middle of a body.
    on_the_way: Callable[[Request, bytes], bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _versions: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def put(self, path: str, content: bytes) -> str:
        """Store an object, return its URL. Every version has a time and an ETag of its own."""
        version = next(self._versions)
        self.objects[path] = Stored(content, 1.7e9 + version, f'"etag-{version}"')
        return f"bucket://{path}"

    def reset(self) -> None:
        """Empty the store and forget everything."""
        self.objects.clear()
        self.forget()
        self.before_read = self.on_the_way = None

    def forget(self) -> None:
        """Forget the requests so far."""
        self.requests.clear()

    def note(self, request: Request) -> None:
        """Write a request down."""
        with self._lock:
            self.requests.append(request)

    def of_kind(self, kind: Literal["list", "head", "read"], path: str | None = None) -> list[Request]:
        """The requests of one kind, about one object if ``path`` is given."""
        with self._lock:
            return [r for r in self.requests if r.kind == kind and path in (None, r.path)]

    @property
    def reads(self) -> list[Request]:
        """All reads so far."""
        return self.of_kind("read")

    @property
    def nbytes(self) -> int:
        """Bytes delivered so far."""
        return sum(read.nbytes for read in self.reads)

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        """Answer a read as fsspec's ``cat_file`` defines it."""
        size = len(self._get(path).content)
        first, last, _ = slice(start, end).indices(size)
        request = Request("read", path, first, max(first, last))
        self.note(request)
        if self.before_read is not None:
            self.before_read(request)
        content = self._get(path).content[first:last]
        return content if self.on_the_way is None else self.on_the_way(request, content)

    def info(self, path: str) -> dict[str, Any]:
        """What HEAD and listings say about an object."""
        stored = self._get(path)
        when = dt.datetime.fromtimestamp(stored.mtime, tz=dt.timezone.utc)
        return {
            "name": path,
            "type": "file",
            "size": len(stored.content),
            "ETag": stored.etag,
            "LastModified": when,
            "mtime": stored.mtime,
        }

    def _get(self, path: str) -> Stored:
        try:
            return self.objects[path]
        except KeyError:
            raise FileNotFoundError(path) from None


#: The one bucket of this process: whoever uses it calls ``BUCKET.reset()`` first, as the fixtures do.
BUCKET = Bucket()


class _BucketFile(AbstractBufferedFile):  # type: ignore[misc]
    """Reads ahead in large blocks, as the files of object stores do."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return BUCKET.read(self.path, start, end)


class BucketFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The face of ``BUCKET`` to fsspec."""

    protocol = "bucket"

    def _entries(self, path: str, depth: int | None) -> dict[str, dict[str, Any]]:
        """Objects and the folders that their names imply, down to ``depth`` levels below ``path``."""
        entries: dict[str, dict[str, Any]] = {}
        inside = f"{path}/" if path else ""
        for name in sorted(BUCKET.objects):
            if name == path:
                entries[name] = BUCKET.info(name)
            if not name.startswith(inside):
                continue
            parts = name[len(inside) :].split("/")
            for level in range(1, len(parts)):
                folder = inside + "/".join(parts[:level])
                if depth is None or level <= depth:
                    entries[folder] = {"name": folder, "type": "directory", "size": 0}
            if depth is None or len(parts) <= depth:
                entries[name] = BUCKET.info(name)
        return entries

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """One level."""
        path = self._strip_protocol(path)
        BUCKET.note(Request("list", path))
        entries = self._entries(path, 1)
        if not entries and path:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """The whole tree in one request."""
        path = self._strip_protocol(path)
        BUCKET.note(Request("list", path))
        entries = self._entries(path, maxdepth)
        found = {name: e for name, e in sorted(entries.items()) if withdirs or e["type"] == "file"}
        return found if detail else list(found)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """One HEAD."""
        path = self._strip_protocol(path)
        BUCKET.note(Request("head", path))
        if path not in BUCKET.objects and self._entries(path, 1):
            return {"name": path, "type": "directory", "size": 0}
        return BUCKET.info(path)

    def modified(self, path: str) -> dt.datetime:
        """Time of the last change."""
        when: dt.datetime = self.info(path)["LastModified"]
        return when

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """One ranged GET."""
        path = self._strip_protocol(path)
        # Several servers answer suffix ranges wrongly: a reader that asks for one has no business with the cloud.
        assert start is None or start >= 0, f"asked for the last {-start} bytes of {path}"
        return BUCKET.read(path, start, end)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> io.IOBase:
        kwargs.pop("autocommit", None)
        opened: io.IOBase = _BucketFile(self, path, mode, block_size=block_size or "default", **kwargs)
        return opened


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)


@contextmanager
def emptied_bucket() -> Iterator[Bucket]:
    """The bucket, empty before and after."""
    BUCKET.reset()
    try:
        yield BUCKET
    finally:
        BUCKET.reset()


def read_twice(reads: Iterable[Request]) -> list[tuple[str, int, int]]:
    """The (path, start, stop) that more than one of the reads delivered; what a frugal reader leaves empty."""
    twice: list[tuple[str, int, int]] = []
    last_path, reached = "", 0
    for read in sorted(reads, key=lambda r: (r.path, r.start, r.stop)):
        if read.path != last_path:
            last_path, reached = read.path, 0
        if read.start < min(reached, read.stop):
            twice.append((read.path, read.start, min(reached, read.stop)))
        reached = max(reached, read.stop)
    return twice


class Meeting:
    """Holds callers until so many are inside at once: proves concurrency without a clock.

    Use ``arrive`` as ``before_read``. When too few come, the first one gives up after ``patience`` seconds and lets all
    others pass, so that a reader that works one by one fails a test instead of stopping it.
    """

    def __init__(self, parties: int, patience: float = 10.0) -> None:
        self.parties = parties
        self.patience = patience
        #: Most callers that were inside together.
        self.peak = 0
        self._inside = 0
        self._lock = threading.Lock()
        self._over = threading.Event()

    def arrive(self, request: Request) -> None:
        """Wait for the others."""
        with self._lock:
            self._inside += 1
            self.peak = max(self.peak, self._inside)
            if self._inside >= self.parties:
                self._over.set()
        self._over.wait(self.patience)
        self._over.set()
        with self._lock:
            self._inside -= 1
