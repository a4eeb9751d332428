"""Writing to storages: whole files or nothing.

A file appears under its name when all its bytes are there. Object stores do that by themselves; elsewhere the bytes go
to a temporary file, which is then renamed.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import posixpath
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from dask_embedding_reader.errors import ColumnError, ReadError, WriteError
from dask_embedding_reader.storage.connections import FileSystem, connected, exclusive, protocols
from dask_embedding_reader.storage.read import is_local, open_local, shown_url
from dask_embedding_reader.storage.retries import describe, http_status, shown_cause, with_retries

_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"})
"""Storages in which an object is there as a whole or not at all."""

_EXCLUSIVE_OPEN = frozenset({"sftp", "ssh", "smb"})
"""Servers that refuse to make a file that is there already, when asked to."""

_AZURE = frozenset({"az", "abfs", "abfss"})

_LARGEST_PUT_NBYTES = 5 * 2**30
"""S3 takes so much in one request."""

_FLUSH_NBYTES = 8 * 2**20
"""After so many bytes the disk begins to write a file: else it would idle until the file is complete."""

_CACHED_SHARE = 16
"""Of the memory of the machine, what is written may fill one of so many parts."""

_UNDER_WAY_NBYTES = 64 * 2**20
"""Of what was written before so many bytes, the disk has had the time to take it."""

_THREADS = 16

_creating = threading.Lock()
"""Held while a file is made that must be new, where the storage itself does not see to it."""

Buffer = bytes | memoryview
Write = Callable[[Buffer], object]
Content = Callable[[Write], Any]
"""Writes all that a file holds, with the function that it is given."""
ErrorKind = type[ReadError] | type[WriteError]
T = TypeVar("T")


class WritableFile(io.RawIOBase):
    """What pyarrow and zipfile take for a file that is written from its beginning to its end."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def writable(self) -> bool:
        """Tell that it is."""
        return True

    def write(self, data: Any) -> int:
        """Write some bytes, all of them."""
        self._write(data)
        return len(data)


def put_file(filesystem: FileSystem, path: str, data: bytes, scratch: str | None = None) -> None:
    """Write a small file, replacing one that is there; readers see the old one or the whole new one.

    Parameters
    ----------
    filesystem
        Where to.
    path
        The path within it. Its folder is made.
    data
        The content.
    scratch
        A folder on the same storage for the temporary file, which must be there; by default that of ``path``.

    Raises
    ------
    WriteError
        If the storage does not take it. Nothing is left of it then.
    """
    _put(filesystem, path, lambda write: write(data), scratch, durable=False, cached=True)


def stream_file(
    filesystem: FileSystem, path: str, content: Callable[[Write], T], scratch: str | None, *, of_nbytes: int | None
) -> T:
    """Write a file as :func:`put_file` does, while its content is made; return what that returns.

    On a local disk it is never in memory as a whole, and survives a loss of power once this returns. It is one of files
    of so many bytes in all (None: nobody knows): if these are few, the system keeps them for who reads them next.

    Raises
    ------
    FileExistsError
        If there is a file of this name. Only object stores raise it: they have no temporary files, without which a
        writer that was taken for dead can no more put anything into its place.
    """
    return _put(filesystem, path, content, scratch, durable=True, cached=_are_cached(of_nbytes), is_new=True)


def create_file(filesystem: FileSystem, path: str, data: bytes) -> bool:
    """Write a small file unless there is one of this name; tell whether it was written.

    Of several that try, one succeeds: disks, S3, Google's and Azure's storage, SFTP and SMB see to it themselves.
    Elsewhere two may succeed that try in the same moment, and the content tells who was last.
    """
    with _explained(filesystem, path):
        if is_local(filesystem):
            return _create_local(path, data)
        return bool(_retry(filesystem, path, lambda connection: _create(connection, path, data)))


def make_folder(filesystem: FileSystem, folder: str) -> None:
    """Make a folder for temporary files, where such are needed."""
    with _explained(filesystem, folder):
        if is_local(filesystem):
            os.makedirs(folder, exist_ok=True)
        elif not protocols(filesystem) & _ATOMIC_PUT:
            _retry(filesystem, folder, lambda connection: connection.makedirs(folder, exist_ok=True))


def has_folder(filesystem: FileSystem, folder: str) -> bool:
    """Tell whether a folder is there that :func:`make_folder` made; of local ones alone."""
    return not is_local(filesystem) or os.path.isdir(folder)


def _put(
    filesystem: FileSystem,
    path: str,
    content: Callable[[Write], T],
    scratch: str | None,
    *,
    durable: bool,
    cached: bool,
    is_new: bool = False,
) -> T:
    folder, name = posixpath.split(path)
    temporary = f"{scratch or folder}/.{name}.{uuid.uuid4().hex}.tmp"
    with _explained(filesystem, path):
        if is_local(filesystem):
            if scratch is None:
                os.makedirs(folder, exist_ok=True)
            return _put_local(path, content, temporary, durable=durable, cached=cached)
        sink = io.BytesIO()
        result, is_there = content(sink.write), False
        data = sink.getvalue()
        if not protocols(filesystem) & _ATOMIC_PUT:
            if scratch is None:
                make_folder(filesystem, folder)
            _retry(filesystem, path, lambda connection: _put_and_rename(connection, path, data, temporary))
        elif is_new:
            is_there = not _retry(filesystem, path, lambda connection: _create(connection, path, data))
        else:
            _retry(filesystem, path, lambda connection: _upload(connection, path, data))
    if is_there:
        raise FileExistsError(path)
    return result


def _put_local(path: str, content: Callable[[Write], T], temporary: str, *, durable: bool, cached: bool) -> T:
    try:
        with open(temporary, "xb", buffering=0) as file:
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
        # Not before: where the folder of temporary files has gone, nothing shall appear.
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    return result


def _create_local(path: str, data: bytes) -> bool:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        try:
            os.link(temporary, path)  # it is there as a whole, or another one was there before
        except FileExistsError:
            return False
        except OSError:  # a disk without links
            with suppress(FileExistsError), open(path, "xb") as file:
                file.write(data)
                return True
            return False
        return True
    finally:
        with suppress(OSError):
            os.remove(temporary)


def _are_cached(nbytes: int | None) -> bool:
    """Tell whether the operating system should keep as much as was written in its memory.

    Of more than that only the end would be there when somebody reads it from the beginning, in the place of what others
    read; and memory that the system has not used yet can cost more than the disk.
    """
    if not hasattr(os, "sysconf"):
        return True
    return nbytes is not None and nbytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _CACHED_SHARE


def _flush(descriptor: int, start: int, stop: int) -> None:
    """Have the system begin to write what it holds of a file, without waiting for it, and let go of what is written.

    ``fsync`` then has less to do. What is new to the disk is only begun; it takes another call to let go of it.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is but an advice
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def _upload(filesystem: FileSystem, path: str, data: bytes, **more: Any) -> None:
    names, options = protocols(filesystem), {}
    if names & {"s3", "s3a"}:
        # What S3 has of an upload in parts that was broken off is kept, and charged for, until somebody looks for it.
        options = {"chunksize": _LARGEST_PUT_NBYTES}
    elif names & _AZURE:
        options = {"retry_total": 0}  # its retries would multiply with ours: a minute for each
    filesystem.pipe_file(path, data, **options, **more)


def _create(filesystem: FileSystem, path: str, data: bytes) -> bool:
    """Store a file unless there is one of this name; tell whether it was stored."""
    names = protocols(filesystem)
    try:
        if names & _EXCLUSIVE_OPEN:
            with filesystem.open(path, "xb") as file:
                file.write(data)
            return True
        if (only_new := _only_new(filesystem)) and "memory" not in names:
            _upload(filesystem, path, data, **only_new)
            return True
    except FileExistsError:
        return False
    except Exception as error:
        status = http_status(error)
        if status == 412:
            return False
        if status == 409:  # another one is just being stored
            raise OSError(f"{path}: {describe(error)}") from None
        # Some servers that speak the language of S3 do not know of it, nor do earlier clients.
        if status not in (400, 501) and type(error).__name__ != "ParamValidationError":
            raise
    with _creating:
        filesystem.invalidate_cache()
        if filesystem.exists(path):
            return False
        _upload(filesystem, path, data)
    return True


def _only_new(filesystem: FileSystem) -> dict[str, Any]:
    """Return the options with which a client stores no file in the place of another; none where it has no such."""
    names = protocols(filesystem)
    if names & _AZURE:
        return {"overwrite": False}
    put = getattr(filesystem, "_pipe_file", filesystem.pipe_file)
    if names & _ATOMIC_PUT and "mode" in inspect.signature(put).parameters:  # clients from 2024 on
        return {"mode": "create"}
    return {"IfNoneMatch": "*"} if names & {"s3", "s3a"} else {}


def _put_and_rename(filesystem: FileSystem, path: str, data: bytes, temporary: str) -> None:
    try:
        filesystem.pipe_file(temporary, data)
        filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
        _rename(filesystem, temporary, path)
    except BaseException:
        with suppress(Exception):
            filesystem.rm_file(temporary)
        raise


def _rename(filesystem: FileSystem, source: str, target: str) -> None:
    if filesystem.exists(target):  # some storages refuse to replace a file
        if not filesystem.exists(source):  # another writer took over: that is its file
            raise FileNotFoundError(source)
        filesystem.rm_file(target)
    filesystem.mv(source, target)


def move_file(filesystem: FileSystem, source: str, target: str) -> None:
    """Rename a file, replacing one that is there."""
    with _explained(filesystem, target):
        if is_local(filesystem):
            os.replace(source, target)
        elif protocols(filesystem) & _ATOMIC_PUT:  # these cannot rename, but copy within the store
            _retry(filesystem, target, lambda connection: connection.cp_file(source, target))
            _remove(filesystem, source)
        else:
            _retry(filesystem, target, lambda connection: _rename(connection, source, target))


def is_object_store(filesystem: FileSystem) -> bool:
    """Tell whether files appear under their names at once, without having had another one before."""
    return not is_local(filesystem) and not protocols(filesystem).isdisjoint(_ATOMIC_PUT)


def remove_files(filesystem: FileSystem, paths: Sequence[str], trash: str | None = None) -> None:
    """Remove files; one that has gone already is fine.

    With a folder ``trash`` on the same local disk, nothing is removed once that folder has gone.
    """
    in_threads(lambda path: _remove(filesystem, path, trash), paths)


def _remove(filesystem: FileSystem, path: str, trash: str | None = None) -> None:
    with suppress(FileNotFoundError), _explained(filesystem, path, action="removed"):
        if is_local(filesystem):
            if trash is not None:
                gone = f"{trash}/{uuid.uuid4().hex}"
                os.replace(path, gone)
                path = gone
            os.remove(path)
        else:
            _retry(filesystem, path, lambda connection: _rm_file(connection, path))


def _rm_file(connection: FileSystem, path: str) -> None:
    try:
        connection.rm_file(path)
    except NotImplementedError:  # earlier releases of adlfs know only the general way
        connection.rm(path)


def remove_folder(filesystem: FileSystem, folder: str, trash: str | None = None) -> None:
    """Remove a folder and all that is in it, where there is one; at once, with a folder ``trash`` on the same disk."""
    if trash is not None and is_local(filesystem):
        gone = f"{trash}/{uuid.uuid4().hex}"
        with suppress(FileNotFoundError), _explained(filesystem, folder, action="removed"):
            os.replace(folder, gone)
        folder = gone
    remove_files(filesystem, [f"{folder}/{name}" for name in list_files(filesystem, folder)])
    if is_local(filesystem):
        shutil.rmtree(folder, ignore_errors=True)  # what is left are folders
    elif not protocols(filesystem) & _ATOMIC_PUT:
        with suppress(Exception):
            filesystem.rm(folder, recursive=True)


def remove_empty_folder(filesystem: FileSystem, folder: str) -> None:
    """Remove a folder that nothing is in; object stores have none of their own."""
    if is_local(filesystem):
        with suppress(OSError):
            os.rmdir(folder)


def find_folders(filesystem: FileSystem, folder: str, prefix: str) -> list[str]:
    """Return the folders in a local folder whose names begin so."""
    if not is_local(filesystem):
        return []
    with _explained(filesystem, folder, "listed"), os.scandir(folder) as entries:
        return [f"{folder}/{entry.name}" for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]


def list_files(filesystem: FileSystem, folder: str, kind: ErrorKind = WriteError) -> dict[str, int]:
    """Return the paths of all files below a folder, relative to it, with their sizes; none if there is no folder.

    Raises what :func:`list_infos` does.
    """
    return {name: int(info.get("size") or 0) for name, info in list_infos(filesystem, folder, kind).items()}


def list_infos(filesystem: FileSystem, folder: str, kind: ErrorKind = WriteError) -> dict[str, dict[str, Any]]:
    """Return the same with all that the storage tells of each file.

    Raises
    ------
    WriteError
        If the storage fails; or what is given as ``kind`` by who only reads.
    """
    with _explained(filesystem, folder, "listed", kind):
        if is_local(filesystem):
            return dict(_walk(folder))
        try:
            found = _retry(filesystem, folder, lambda connection: _find(connection, folder))
        except FileNotFoundError:
            return {}
    prefix = f"{folder}/"
    return {
        path[len(prefix) :]: {**info, "name": path}
        for path, info in found.items()
        if info["type"] == "file" and path.startswith(prefix)
    }


def _find(filesystem: FileSystem, folder: str) -> dict[str, dict[str, Any]]:
    filesystem.invalidate_cache()  # what fsspec remembers does not know what others wrote
    return dict(filesystem.find(folder, detail=True))


def _walk(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error  # what is there would seem not to be

    for current, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = os.path.join(current, name)
            with suppress(FileNotFoundError):  # somebody else's temporary file
                size = os.stat(path, follow_symlinks=False).st_size
                below = os.path.relpath(path, folder).replace(os.sep, "/")
                yield below, {"name": path.replace(os.sep, "/"), "type": "file", "size": size}


def get_file(filesystem: FileSystem, path: str, kind: ErrorKind = WriteError) -> bytes | None:
    """Return the content of a small file; None if it is not there. Raises what :func:`list_infos` does."""
    with _explained(filesystem, path, "read", kind):
        try:
            if is_local(filesystem):
                with open(open_local(path), "rb") as file:
                    return file.read()
            return bytes(_retry(filesystem, path, lambda connection: connection.cat_file(path)))
        except FileNotFoundError:
            return None


def find_links(filesystem: FileSystem, folder: str) -> list[str]:
    """Return what is a symbolic link in a local folder, itself included: it may lead anywhere."""
    if not is_local(filesystem):
        return []
    found = [folder] if os.path.islink(folder) else []
    for current, folders, names in os.walk(folder):
        found += [path for name in (*folders, *names) if os.path.islink(path := f"{current}/{name}")]
    return found


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Do something for many items at once; return the results in order."""
    if not items:
        return []
    with ThreadPoolExecutor(min(len(items), _THREADS), thread_name_prefix="embedding-writer") as pool:
        return list(pool.map(work, items))


def _retry(filesystem: FileSystem, path: str, attempt: Callable[[FileSystem], Any]) -> Any:
    """Ask a storage, again where that can help; one after the other where it cannot be asked several things at once."""

    def ask() -> Any:
        with exclusive(filesystem):
            return attempt(connected(filesystem))

    return with_retries(ask, shown_url(filesystem, path))


@contextmanager
def _explained(
    filesystem: FileSystem, path: str, action: str = "written", kind: ErrorKind = WriteError
) -> Iterator[None]:
    """Turn whatever a storage raises into an error that names the file, the cause and the remedy."""
    try:
        yield
    except (ColumnError, WriteError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and action != "written":
            raise
        what = f"{shown_url(filesystem, path)}: cannot be {action}: {describe(error)}"
        remedy = _remedy(error) if kind is WriteError else "check the storage, the connection and your permissions"
        raise kind(f"{what}; {remedy}") from shown_cause(error)


def _remedy(error: Exception) -> str:
    kept = "what is finished is kept, and running the same again goes on from there"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"make room, or name a folder on another storage; {kept}"
    if isinstance(error, FileNotFoundError):
        return f"make the bucket first, or check the spelling; {kept}"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return f"get the permission to write there, or name another folder; {kept}"
    if isinstance(error, NotImplementedError | ValueError | TypeError):
        return "this kind of storage cannot be written to in this way; name a folder on another one"
    return f"check the storage and the connection; {kept}"


if hasattr(os, "register_at_fork"):  # a child must not find it held by a thread that it does not have
    os.register_at_fork(before=_creating.acquire, after_in_parent=_creating.release, after_in_child=_creating.release)
