"""Writing to storages: whole files or nothing, and errors that say what to do.

A file appears under its name when all its bytes are there. Object stores do that by themselves; elsewhere the bytes go
to a temporary file, which is then renamed.
"""

from __future__ import annotations

import errno
import io
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from dask_embedding_reader.errors import ColumnError, ReadError, WriteError
from dask_embedding_reader.storage.retries import credentials_remedy, describe, shown_cause
from dask_embedding_reader.storage.store import ObjectInfo, Store, T, Write, shown_url

_CACHED_SHARE = 16
"""Of the memory of the machine, what is written may fill one of so many parts."""

_THREADS = 16

_REMOTE_WRITERS = 16

ErrorKind = type[ReadError] | type[WriteError]


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


def put_file(store: Store, path: str, data: bytes, scratch: str | None = None) -> None:
    """Write a small file, replacing one that is there; readers see the old one or the whole new one.

    Its folder is made. ``scratch`` is a folder on the same storage for the temporary file, which must be there.

    Raises
    ------
    WriteError
        If the storage does not take it. Nothing is left of it then.
    """
    with _explained(store, path):
        store.put(path, lambda write: write(data), scratch=scratch)


def stream_file(
    store: Store, path: str, content: Callable[[Write], T], scratch: str | None, *, of_nbytes: int | None
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
    passes = (FileExistsError,) if store.is_object_store else ()
    with _explained(store, path, passes=passes):
        return store.put(path, content, scratch=scratch, durable=True, cached=_are_cached(of_nbytes), is_new=True)


def create_file(store: Store, path: str, data: bytes) -> bool:
    """Write a small file unless there is one of this name; tell whether it was written.

    Of several that try, one succeeds: disks, S3, Google's and Azure's storage, SFTP and SMB see to it themselves.
    Elsewhere two may succeed that try in the same moment, and the content tells who was last.
    """
    with _explained(store, path):
        return store.create(path, data)


def make_folder(store: Store, folder: str) -> None:
    """Make a folder for temporary files, where such are needed."""
    with _explained(store, folder):
        store.make_folder(folder)


def is_local_file(store: Store, path: str) -> bool:
    """Tell whether a path is that of a local file; elsewhere there may be a folder of the same name."""
    return store.is_local and os.path.exists(path) and not os.path.isdir(path)


def real_path(store: Store, path: str) -> str:
    """Return where a path leads, through links."""
    return os.path.realpath(path) if store.is_local else path


def put_nbytes(store: Store, nbytes: int) -> int:
    """Return what it takes to put a file of so many bytes: what is sent is held as a whole."""
    return 0 if store.is_local else nbytes


def most_writers(store: Store) -> int:
    """Return how many files are best put at once."""
    # One that waits for the disk leaves its core to another one.
    return 2 * (os.cpu_count() or 1) if store.is_local else _REMOTE_WRITERS


def has_folder(store: Store, folder: str) -> bool:
    """Tell whether a folder is there that :func:`make_folder` made; of local ones alone."""
    return not store.is_local or os.path.isdir(folder)


def _are_cached(nbytes: int | None) -> bool:
    """Tell whether the operating system should keep as much as was written in its memory.

    Of more than that only the end would be there when somebody reads it from the beginning, in the place of what others
    read; and memory that the system has not used yet can cost more than the disk.
    """
    if not hasattr(os, "sysconf"):
        return True
    return nbytes is not None and nbytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _CACHED_SHARE


def move_file(store: Store, source: str, target: str) -> None:
    """Rename a file, replacing one that is there."""
    with _explained(store, target):
        store.move(source, target)


def remove_files(store: Store, paths: Sequence[str], trash: str | None = None) -> None:
    """Remove files; one that has gone already is fine.

    With a folder ``trash`` on the same local disk, nothing is removed once that folder has gone.
    """

    def remove(path: str) -> None:
        with suppress(FileNotFoundError), _explained(store, path, action="removed"):
            store.remove(path, trash)

    in_threads(remove, paths)


def remove_folder(store: Store, folder: str, trash: str | None = None) -> None:
    """Remove a folder and all that is in it, where there is one; at once, with a folder ``trash`` on the same disk."""
    if trash is not None and store.is_local:
        gone = f"{trash}/{uuid.uuid4().hex}"
        with suppress(FileNotFoundError), _explained(store, folder, action="removed"):
            os.replace(folder, gone)
        folder = gone
    remove_files(store, [f"{folder}/{name}" for name in list_files(store, folder)])
    store.remove_folder(folder)  # what is left are folders


def remove_empty_folder(store: Store, folder: str) -> None:
    """Remove a folder that nothing is in; object stores have none of their own."""
    if store.is_local:
        with suppress(OSError):
            os.rmdir(folder)


def find_folders(store: Store, folder: str, prefix: str) -> list[str]:
    """Return the folders in a folder whose names begin so; object stores have none."""
    if store.is_object_store:
        return []
    with _explained(store, folder, "listed"):
        try:
            # Of servers that is asked anew which fsspec may remember.
            infos = store.list_folder(folder) if store.is_local else store.list_files(folder, may_vanish=lambda _: True)
        except FileNotFoundError:
            return []
    start = f"{folder}/{prefix}"
    below = [(info.path[len(folder) + 1 :].partition("/"), info) for info in infos if info.path.startswith(start)]
    return sorted({f"{folder}/{name}" for (name, slash, _), info in below if slash or info.is_folder})


def list_files(store: Store, folder: str, kind: ErrorKind = WriteError) -> dict[str, int]:
    """Return the paths of all files below a folder, relative to it, with their sizes; none if there is no folder.

    Raises what :func:`list_infos` does.
    """
    return {name: max(info.size, 0) for name, info in list_infos(store, folder, kind).items()}


def list_linked(store: Store, folder: str, listing: Mapping[str, int], kind: ErrorKind = WriteError) -> list[str]:
    """Return the paths of files below links to folders in a local folder: readers find them there, too.

    ``listing`` is what :func:`list_files` has just returned of it.
    """
    if not store.is_local:
        return []
    return sorted(list_infos(store, folder, kind, follow_links=True).keys() - listing.keys())


def list_infos(
    store: Store, folder: str, kind: ErrorKind = WriteError, *, follow_links: bool = False
) -> dict[str, ObjectInfo]:
    """Return the same with all that the storage tells of each file.

    What is below a link to a folder is not ours, and is told only where ``follow_links`` says so.

    Raises
    ------
    WriteError
        If the storage fails; or what is given as ``kind`` by who only reads.
    """
    with _explained(store, folder, "listed", kind):
        try:
            # What others remove meanwhile is gone.
            infos = store.list_files(folder, may_vanish=lambda _: True, follow_links=follow_links)
        except FileNotFoundError:
            return {}
    prefix = f"{folder}/"
    return {info.path[len(prefix) :]: info for info in infos if not info.is_folder and info.path.startswith(prefix)}


def get_file(store: Store, path: str, kind: ErrorKind = WriteError) -> bytes | None:
    """Return the content of a small file; None if it is not there. Raises what :func:`list_infos` does."""
    with _explained(store, path, "read", kind):
        try:
            return store.read_whole(path)
        except FileNotFoundError:
            return None


def find_links(store: Store, folder: str) -> list[str]:
    """Return what is a symbolic link in a local folder, itself included: it may lead anywhere."""
    if not store.is_local:
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


@contextmanager
def _explained(
    store: Store,
    path: str,
    action: str = "written",
    kind: ErrorKind = WriteError,
    passes: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn whatever a storage raises into an error that names the file, the cause and the remedy."""
    try:
        yield
    except (ColumnError, WriteError):
        raise
    except Exception as error:
        if isinstance(error, passes) or (isinstance(error, FileNotFoundError) and action != "written"):
            raise
        what = f"{shown_url(store, path)}: cannot be {action}: {describe(error)}"
        remedy = credentials_remedy(error) or "check the storage, the connection and your permissions"
        if kind is WriteError:
            remedy = _remedy(store, error)
        raise kind(f"{what}; {remedy}") from shown_cause(error)


def _remedy(store: Store, error: Exception) -> str:
    kept = "what is finished is kept, and running the same again goes on from there"
    if isinstance(error, ReadError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what it failed with each time
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"make room, or name a folder on another storage; {kept}"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return (
            "the file system, or the limit of this process (ulimit -f), allows no file so large: choose fewer "
            "rows_per_file, or name a folder on another disk"
        )
    if isinstance(error, IsADirectoryError):
        return f"there is a folder of this name: name a file in it, or another one; {kept}"
    if isinstance(error, FileNotFoundError) and store.is_local:
        return f"something removed the folder or its disk meanwhile: see to it that nothing does; {kept}"
    if isinstance(error, FileNotFoundError):
        return f"make the bucket first, or check the spelling; {kept}"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return f"get the permission to write there, or name another folder; {kept}"
    if remedy := credentials_remedy(error):
        return f"{remedy}; {kept}"
    if isinstance(error, NotImplementedError | ValueError | TypeError):
        return "this kind of storage cannot be written to in this way; name a folder on another one"
    return f"check the storage and the connection; {kept}"
