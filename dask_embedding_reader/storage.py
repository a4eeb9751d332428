"""Files wherever they are: the only module that speaks fsspec.

It finds files, reads exact byte ranges of them, tries again where that can help, and notices that a file is no longer
the one that was found. Local files are read by the operating system straight into the caller's memory; everything else
goes through ``cat_file(start, end)``, one request for exactly the bytes asked for (``open`` would read ahead).
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias, TypeVar

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import (
    ArgumentError,
    EmbeddingReaderError,
    FileChangedError,
    NoFilesError,
    ReadError,
)

logger = logging.getLogger("dask_embedding_reader")

ATTEMPTS = 5
"""How often a remote read is tried before it fails."""

FIRST_PAUSE_SECONDS = 0.2
"""The pause after the first failed attempt; it doubles each time, with jitter."""

_IOV_MAX = 1024  # what Linux and macOS take in one preadv call
_GLOB_CHARACTERS = frozenset("*?[")
_FINGERPRINT_KEYS = (
    *("ETag", "etag", "CRC", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified"),
    *("modify", "modificationTime", "created"),
)
"""Where file systems tell of a new version; the first one found is taken."""

MANIFEST_NAME = "_manifest.parquet"
INCOMPLETE_NAME = "_writing/incomplete"
"""What this library keeps in a collection beside the data: what is known of it, a mark while it is being written."""

_OWN_FILES = (f"/{MANIFEST_NAME}", f"/{INCOMPLETE_NAME}")

_LITTER = re.compile(r"(?:^|/)[._]")

_SECRET = re.compile("key|secret|token|pass|cred|auth|user|sas|connection_string", re.IGNORECASE)
"""Names of options that may hold secrets."""

_CANNOT_HELP = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

FileSystem: TypeAlias = fsspec.AbstractFileSystem
Source = str | os.PathLike[str]
T = TypeVar("T")


class StoredFile(NamedTuple):
    """A file in a storage, as it was when it was found. Small and picklable: it travels in every task."""

    filesystem: FileSystem
    """Where it is."""
    path: str
    """Its path as the file system spells it, without the protocol."""
    size: int
    """Its length in bytes; -1 where the storage does not tell."""
    fingerprint: str
    """Changes when the content changes: size, and etag or modification time where the storage offers them."""

    @property
    def url(self) -> str:
        """The path with its protocol (none for local files), as errors and logs show it: without secrets."""
        return shown_url(self.filesystem, self.path)

    def __repr__(self) -> str:
        return f"<{self.url}, {self.size} bytes, version {self.fingerprint}>"


def file_url(filesystem: FileSystem, path: str) -> str:
    """Spell a path so that it can be opened again: plain for local files, with the protocol elsewhere."""
    return path if is_local(filesystem) else str(filesystem.unstrip_protocol(path))


def shown_url(filesystem: FileSystem, path: str) -> str:
    """Spell a path for messages."""
    return hide_secrets(file_url(filesystem, path))


def identity(filesystem: FileSystem) -> str:
    """Spell which storage this is, equal in every process: the server or archive, but not who asks, nor how."""

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): public(item) for key, item in value.items() if not _SECRET.search(str(key))}
        return [public(item) for item in value] if isinstance(value, list | tuple) else value

    options = {**dict(enumerate(filesystem.storage_args)), **filesystem.storage_options}
    spelled = json.dumps(public(options), sort_keys=True, default=lambda value: type(value).__name__)
    return f"{type(filesystem).__name__} {spelled}"


def hide_secrets(text: str) -> str:
    """Leave out what may be secret in the URLs of a text: passwords, and queries, which may be signatures."""
    return re.sub(r"(://)[^/@\s]+@|(?<=[\w/])\?[^\s'\")]*=[^\s'\")]*", r"\1", text)


def is_local(filesystem: FileSystem) -> bool:
    """Tell whether the operating system itself can open the paths of this file system."""
    return type(filesystem) is LocalFileSystem


# ---------------------------------------------------------------------------------------------------------------------
# Finding files


def find_files(
    sources: Sequence[Source],
    suffix: str,
    storage_options: Mapping[str, Any] | None = None,
    noticed: list[StoredFile] | None = None,
) -> list[StoredFile]:
    """Find the files with a suffix in folders, globs and lists of these.

    Parameters
    ----------
    sources
        Paths and URLs, each of a file or a folder (searched recursively), or a glob. A path that exists literally wins
        over its reading as a glob.
    suffix
        What the names end in, such as ``".npy"``.
    storage_options
        Passed to fsspec.
    noticed
        If given, the files of this library that are passed over in folders are added to it
        (``MANIFEST_NAME``, ``INCOMPLETE_NAME``).

    Returns
    -------
    list of StoredFile
        Ordered by full path within a source, sources in the order given, nothing twice. Hidden files, names that start
        with an underscore (``_SUCCESS``, ``_temporary/``) and files of zero bytes are passed over.

    Raises
    ------
    NoFilesError
        If a source does not exist, or nothing in it matches.
    """
    found: dict[tuple[FileSystem, str], StoredFile] = {}
    for source in sources:
        filesystem, path = resolve(source, storage_options)
        infos, own = _list_source(filesystem, path, suffix, source)
        if noticed is not None:
            noticed += [_stored_file(filesystem, info) for info in own]
        wanted = [info for info in infos if _has_suffix(filesystem, info["name"], suffix) and info.get("size") != 0]
        if not wanted:
            raise NoFilesError(_nothing_found(source, suffix, [info["name"] for info in infos]))
        for info in wanted:
            if (key := (filesystem, info["name"])) not in found:
                found[key] = _stored_file(filesystem, info)
    return list(found.values())


def resolve(source: Source, storage_options: Mapping[str, Any] | None = None) -> tuple[FileSystem, str]:
    """Return the file system of a path or URL, and the path within it."""
    text = os.fspath(source)
    if "://" not in text and os.path.lexists(text):
        # Taken literally: fsspec would read a `::` in a name as a chain of file systems.
        return fsspec.filesystem("file", **dict(storage_options or {})), os.path.abspath(text)
    try:
        filesystem, path = url_to_fs(text, **dict(storage_options or {}))
    except (ImportError, ValueError) as error:
        raise ArgumentError(f"cannot open {hide_secrets(text)!r}: {describe(error)}") from error
    except FileNotFoundError as error:
        shown = hide_secrets(text)
        raise NoFilesError(f"{shown!r} does not exist ({describe(error)}); check the spelling of the path") from error
    return filesystem, path.rstrip("/") or path


def _list_source(
    filesystem: FileSystem, path: str, suffix: str, source: Source
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """List the files of one source, ordered by path, litter left out; and of the litter, our own files."""
    shown = hide_secrets(os.fspath(source))
    try:
        if _has_suffix(filesystem, path, suffix) and (info := _info(filesystem, path)) and info["type"] != "directory":
            return [{**info, "name": path}], []  # a file that is named is wanted, whatever its name starts with
        if _GLOB_CHARACTERS.isdisjoint(path) or _exists(filesystem, path):
            infos = _find(filesystem, path)
            root = path
        else:
            infos = _glob(filesystem, path)
            root = path[: min(path.index(c) for c in _GLOB_CHARACTERS if c in path)].rpartition("/")[0]
            if _is_litter(path, root):  # the pattern itself names such files: they are wanted
                return sorted(infos, key=_name), []
        if not infos and not _exists(filesystem, path) and _GLOB_CHARACTERS.isdisjoint(path):
            raise FileNotFoundError(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoFilesError(
            f"{shown!r} does not exist (searched {shown_url(filesystem, path)!r}); check the spelling of the path"
        ) from error
    except EmbeddingReaderError:
        raise
    except Exception as error:
        raise ReadError(f"{shown!r} cannot be listed: {describe(error)}") from error
    own = [info for info in infos if info["name"].endswith(_OWN_FILES)]
    return sorted((info for info in infos if not _is_litter(info["name"], root)), key=_name), own


def _has_suffix(filesystem: FileSystem, path: str, suffix: str) -> bool:
    protocol = filesystem.protocol
    if "http" in ((protocol,) if isinstance(protocol, str) else protocol):
        path = path.partition("?")[0]  # signed URLs end in a query
    return path.endswith(suffix)


def _name(info: Mapping[str, Any]) -> str:
    return str(info["name"])


def _is_litter(name: str, root: str) -> bool:
    """Tell hidden files, ``_SUCCESS``, ``_temporary/…`` and their like, wherever they lie below the folder given."""
    return _LITTER.search(name, len(root) if name.startswith(root) else 0) is not None


def _exists(filesystem: FileSystem, path: str) -> bool:
    return bool(filesystem.exists(path))


def _info(filesystem: FileSystem, path: str) -> dict[str, Any] | None:
    try:
        return dict(_with_retries(lambda: filesystem.info(path), f"looking up {shown_url(filesystem, path)}"))
    except FileNotFoundError:
        return None


def _find(filesystem: FileSystem, path: str) -> list[dict[str, Any]]:
    if is_local(filesystem):
        return list(_walk(path))
    # The listing is taken anew: a stale one, kept by fsspec from earlier in the process, would hide changed files.
    filesystem.invalidate_cache(path)
    listing = _with_retries(lambda: filesystem.find(path, detail=True), f"listing {shown_url(filesystem, path)}")
    return [{**info, "name": path} for path, info in listing.items() if info["type"] == "file"]


def _walk(folder: str) -> Iterator[dict[str, Any]]:
    """List the files below a local folder, through symbolic links too (fsspec passes linked folders over)."""
    if not os.path.isdir(folder):
        os.stat(folder)  # says that it does not exist, as listing would
        yield _local_info(folder)
        return
    seen = set()
    for current, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (_local_info(os.path.join(current, name)) for name in names)


def _raise(error: OSError) -> None:
    raise error


def _local_info(path: str) -> dict[str, Any]:
    try:
        status = os.stat(path)
    except OSError:  # a link to nothing or to itself: like a file of zero bytes, which is passed over
        return {"name": path, "type": "file", "size": 0}
    return {"name": path, "type": "file", "size": status.st_size, "mtime": status.st_mtime_ns}


def _glob(filesystem: FileSystem, pattern: str) -> list[dict[str, Any]]:
    """List what a pattern matches; folders that it names are searched as if they had been given themselves."""
    filesystem.invalidate_cache()
    listing = _with_retries(lambda: filesystem.glob(pattern, detail=True), f"listing {hide_secrets(pattern)}")
    matches = [{**info, "name": path} for path, info in listing.items()]
    infos = {info["name"]: info for info in matches if info["type"] != "directory"}
    if "**" not in pattern:
        for folder in (info["name"] for info in matches if info["type"] == "directory"):
            infos.update((info["name"], info) for info in _find(filesystem, folder))
    return list(infos.values())


def _stored_file(filesystem: FileSystem, info: Mapping[str, Any]) -> StoredFile:
    if is_local(filesystem) and type(info.get("mtime")) is float:  # from fsspec: of a link, and less than exact
        info = _local_info(info["name"])
    elif info.get("size") is None:  # an HTTP listing tells names only
        info = {**info, **(_info(filesystem, info["name"]) or {})}
    size = info.get("size")
    return StoredFile(filesystem, info["name"], -1 if size is None else int(size), _fingerprint(info))


def _fingerprint(info: Mapping[str, Any]) -> str:
    for key in _FINGERPRINT_KEYS:
        if (mark := info.get(key)) is not None:
            # Some file systems tell the same time as a number in a listing and as a datetime when asked for one file.
            return f"{info.get('size')}-{mark.timestamp() if isinstance(mark, datetime) else mark}"
    return str(info.get("size"))


def _nothing_found(source: Source, suffix: str, passed_over: Sequence[str]) -> str:
    """Say what was searched, what was there instead, and the likely remedy."""
    where = repr(hide_secrets(os.fspath(source)))
    if not passed_over:
        return f"no {suffix} file found: {where} holds no files; check the path"
    kinds = Counter("empty " + suffix if name.endswith(suffix) else _suffix(name) for name in passed_over)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    message = f"no {suffix} file found in {where}; found instead {len(passed_over)} files: {counts}"
    for other, file_format in ((".parquet", "parquet"), (".npy", "npy")):
        if other != suffix and kinds[other]:
            return f'{message}; did you mean file_format="{file_format}"?'
    return f"{message}; check the path"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1] or "without suffix"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_range(file: StoredFile, start: int, stop: int) -> bytes:
    """Read the bytes ``[start, stop)`` of a file that has just been found: one request, and no other.

    Raises
    ------
    FileChangedError
        If the file has gone, or a local one changed.
    ReadError
        If the storage does not deliver exactly these bytes.
    """
    if is_local(file.filesystem):
        buffer = bytearray(stop - start)
        read_into(file, start, [memoryview(buffer)])
        return bytes(buffer)
    return _read_remote(file, start, stop)


def read_ranges(file: StoredFile, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read several byte ranges ``[start, stop)`` of one file, all at once where the storage can.

    Raises
    ------
    FileChangedError, ReadError
        As :func:`read_into` does.
    """
    if is_local(file.filesystem):
        return [read_range(file, start, stop) for start, stop in ranges]
    starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
    parts = (
        file.filesystem.cat_ranges([file.path] * len(ranges), starts, stops, on_error="return")
        if len(ranges) > 1
        else [b""] * len(ranges)
    )
    # A failed or short range comes back as an exception or as too few bytes, and is read again alone, with retries.
    data = [
        part if isinstance(part, bytes) and len(part) == stop - start else _read_remote(file, start, stop)
        for part, (start, stop) in zip(parts, ranges, strict=True)
    ]
    _check_remote(file)
    return data


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
        If the storage does not deliver exactly these bytes.
    """
    if is_local(file.filesystem):
        _read_local(file, start, [buffer for buffer in buffers if buffer.nbytes])
        return
    data = memoryview(_read_remote(file, start, start + sum(buffer.nbytes for buffer in buffers)))
    _check_remote(file)
    position = 0
    for buffer in buffers:
        buffer[:] = data[position : position + buffer.nbytes]
        position += buffer.nbytes


def local_input(file: StoredFile) -> pa.NativeFile:
    """Open a local file for pyarrow, which reads it without Python's lock."""
    try:
        return pa.OSFile(file.path)
    except FileNotFoundError as error:
        raise FileChangedError(f"{file.path}: the file has gone since it was opened; open the reader again") from error
    except OSError as error:
        raise ReadError(f"{file.path}: cannot be read: {error}") from error


def check_local(file: StoredFile, descriptor: int | None = None) -> None:
    """Compare a local file with what was found; nothing to do for others, which are checked whenever they are read.

    Raises
    ------
    FileChangedError
        If its size or modification time differs, or it has gone.
    """
    if not is_local(file.filesystem):
        return
    try:
        status = os.stat(file.path if descriptor is None else descriptor)
    except FileNotFoundError as error:
        raise FileChangedError(f"{file.path}: the file has gone since it was opened; open the reader again") from error
    _compare(file, {"size": status.st_size, "mtime": status.st_mtime_ns})


def _check_remote(file: StoredFile) -> None:
    """Ask the storage whether the file is still the one that was found.

    Asked after each piece, of which it costs a few percent: else pieces of an old and a new file might be mixed.
    """
    # What the file system remembers of an earlier listing would always agree.
    file.filesystem.invalidate_cache(file.path)
    info = _info(file.filesystem, file.path)
    if info is None:
        raise FileChangedError(f"{file.url}: the file has gone since it was opened; open the reader again")
    _compare(file, info)


def _compare(file: StoredFile, info: Mapping[str, Any]) -> None:
    if (now := _fingerprint(info)) != file.fingerprint:
        raise FileChangedError(
            f"{file.url}: the file changed since it was opened (its size and version were {file.fingerprint}, now "
            f"{now}); open the reader again"
        )


def _read_local(file: StoredFile, start: int, buffers: list[memoryview]) -> None:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise FileChangedError(f"{file.path}: the file has gone since it was opened; open the reader again") from error
    except OSError as error:
        raise ReadError(f"{file.path}: cannot be read: {error}") from error
    try:
        while buffers:
            count = _scatter(descriptor, buffers[:_IOV_MAX], start)
            if count == 0:
                raise FileChangedError(
                    f"{file.path}: ends at byte {start:,}, but {sum(b.nbytes for b in buffers):,} more were expected; "
                    "the file was cut short while it was read: open the reader again"
                )
            start += count
            buffers = _drop_bytes(buffers, count)
        check_local(file, descriptor)
    except FileChangedError:
        raise
    except OSError as error:
        raise ReadError(f"{file.path}: reading from byte {start:,} on failed: {error}") from error
    finally:
        os.close(descriptor)


def _scatter(descriptor: int, buffers: Sequence[memoryview], start: int) -> int:
    """Fill buffers from a file position in one system call; return how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, start)
    data = os.pread(descriptor, buffers[0].nbytes, start)
    buffers[0][: len(data)] = data
    return len(data)


def _drop_bytes(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Leave out the first ``count`` bytes of a list of buffers."""
    for position, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[position + 1 :]]
        count -= buffer.nbytes
    return []


def _read_remote(file: StoredFile, start: int, stop: int) -> bytes:
    if stop == start:
        return b""
    where = f"{file.url}, bytes {start:,} to {stop:,}"

    def attempt() -> bytes:
        data = file.filesystem.cat_file(file.path, start=start, end=stop)
        if len(data) == file.size:  # a web server that knows no ranges sends the whole file
            data = data[start:stop]
        if len(data) != stop - start:
            raise ReadError(f"{where}: {len(data):,} bytes came where {stop - start:,} were asked for")
        return bytes(data)

    try:
        return _with_retries(attempt, where)
    except FileNotFoundError as error:
        raise FileChangedError(f"{file.url}: the file has gone since it was opened; open the reader again") from error
    except EmbeddingReaderError:
        raise
    except Exception as error:
        raise ReadError(f"{where}: reading failed after {ATTEMPTS} attempts: {describe(error)}") from error


def _with_retries(attempt: Callable[[], T], what: str) -> T:
    """Call, and call again with growing pauses when it fails in a way that may pass."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except _CANNOT_HELP:
            raise
        except Exception as error:
            if number == ATTEMPTS or not _may_pass(error):
                raise
            pause = FIRST_PAUSE_SECONDS * 2 ** (number - 1) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
            logger.warning(
                "%s: attempt %d of %d failed (%s); again in %.1f s", what, number, ATTEMPTS, describe(error), pause
            )
            time.sleep(pause)
    raise AssertionError("unreachable")


def _may_pass(error: BaseException) -> bool:
    """Tell whether trying again may help: not for what is a plain refusal or a fault of the program."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status in (408, 429) or status >= 500
    return not isinstance(error, TypeError | ValueError | AttributeError | KeyError | NotImplementedError)


def describe(error: BaseException) -> str:
    """One line about an exception: its type, and its text where it has one."""
    text = hide_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
