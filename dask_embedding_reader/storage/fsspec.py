"""Any file system of fsspec: S3, web servers, Google's and Azure's storage, HDFS, FTP, archives, caches."""

from __future__ import annotations

import html
import io
import json
import math
import os
import posixpath
import re
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.utils import glob_translate

from dask_embedding_reader._common.threads import map_at_once
from dask_embedding_reader.storage.clients import any as any_client
from dask_embedding_reader.storage.connections import (
    asking,
    connected,
    cuts_paths,
    protocols,
    remembers_files,
)
from dask_embedding_reader.storage.names import glob_root, is_litter
from dask_embedding_reader.storage.ranges import ByteRange
from dask_embedding_reader.storage.requests import ask_info, request
from dask_embedding_reader.storage.retries import (
    describe,
    http_status,
    is_secret,
    shown_cause,
    with_retries,
)
from dask_embedding_reader.storage.store import (
    Answer,
    ObjectInfo,
    ShortAnswerError,
    Span,
    T,
    Write,
    shown_url,
    told_info,
    vanished,
)

_CONNECTIONS = 16
"""How many pieces are read at once, where several threads may ask."""

_THREADS = 64
"""Answers are waited for, not computed."""

_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"})
"""Storages in which an object is there as a whole or not at all."""

_EXCLUSIVE_OPEN = frozenset({"sftp", "ssh", "smb"})
"""Servers that refuse to make a file that is there already, when asked to."""

_AZURE = frozenset({"az", "abfs", "abfss"})

_LARGEST_PUT_NBYTES = 5 * 2**30
"""S3 takes so much in one request."""

_creating = threading.Lock()
"""Held while a file is made that must be new, where the storage itself does not see to it."""


@dataclass(frozen=True, slots=True)
class FsspecStore:
    """A file system of fsspec. It is asked one after the other where its connection takes no more than one question."""

    filesystem: AbstractFileSystem
    """The file system, as the user's program may have it too: nothing is put into it."""

    @property
    def is_local(self) -> bool:
        """No."""
        return False

    @property
    def request_nbytes(self) -> int:
        """What comes in 15 ms, at the 60 to 90 MB/s of a connection."""
        return 2**20

    @property
    def is_object_store(self) -> bool:
        """Whether files appear under their names at once and as a whole."""
        return not protocols(self.filesystem).isdisjoint(_ATOMIC_PUT)

    @property
    def connections(self) -> int:
        """How many large reads at once suit it, if nobody says."""
        return _CONNECTIONS

    @property
    def key(self) -> str:
        """Which storage this is, equal in every process: the server or archive, but not who asks, nor how."""

        def public(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {str(key): public(item) for key, item in value.items() if not is_secret(str(key))}
            return [public(item) for item in value] if isinstance(value, list | tuple) else value

        options = {**dict(enumerate(self.filesystem.storage_args)), **self.filesystem.storage_options}
        text = json.dumps(public(options), sort_keys=True, default=lambda value: type(value).__name__)
        return f"{type(self.filesystem).__name__} {text}"

    def url(self, path: str) -> str:
        """Return a path with its protocol."""
        filesystem = self.filesystem
        url = str((connected(filesystem) if cuts_paths(filesystem) else filesystem).unstrip_protocol(path))
        if host := filesystem.storage_options.get("host"):  # which some file systems leave out
            port = filesystem.storage_options.get("port")
            url = url.replace(":///", f"://{host}:{port}/" if port else f"://{host}/", 1)
        return url

    def ask(self, attempt: Callable[[AbstractFileSystem], T], what: str) -> T:
        """Ask for something, again where that can help, and alone where several cannot ask at once."""

        def ask() -> T:
            with asking(self.filesystem) as connection:
                return attempt(connection)

        return with_retries(ask, what)

    # Finding

    def list_files(
        self, folder: str, *, may_vanish: Callable[[str], bool], follow_links: bool = True
    ) -> Sequence[ObjectInfo]:
        """List the files below a folder in one go where the storage can; else level by level, folders included."""
        del follow_links  # where there are links, they are said to be neither files nor folders
        self._forget_listings()
        if any_client.walks(self.filesystem):
            entries = _walk_levels(self, folder, may_vanish, self.list_entries)
        else:
            entries = self._ask_entries(lambda connection: connection.find(folder, detail=True), folder)
        return [told_info(entry, entry["name"]) for entry in entries if entry["type"] in ("file", "directory")]

    def list_folder(self, folder: str) -> Sequence[ObjectInfo]:
        """List the files and folders in a folder."""
        with asking(self.filesystem) as connection:
            entries = connection.ls(folder, detail=True)
        return [told_info(entry, entry["name"].rstrip("/")) for entry in entries]

    def glob(self, pattern: str) -> Sequence[ObjectInfo]:
        """List the files and folders that match a pattern."""
        self._forget_listings()
        if any_client.walks(self.filesystem):
            entries = glob_walking(self, pattern, self.list_entries)
        else:
            entries = self._ask_entries(lambda connection: connection.glob(pattern, detail=True), pattern)
        return [told_info(entry, entry["name"]) for entry in entries]

    def _forget_listings(self) -> None:
        """Forget what fsspec keeps from earlier in the process: a stale listing would hide changed files."""
        with asking(self.filesystem) as connection:
            connection.invalidate_cache()

    def _ask_entries(self, find: Callable[[AbstractFileSystem], Any], place: str) -> list[dict[str, Any]]:
        found = self.ask(find, f"listing {shown_url(self, place)}")
        return [{**entry, "name": path} for path, entry in found.items()]

    def list_entries(self, folder: str) -> list[dict[str, Any]]:
        """List a folder, with retries, as fsspec tells it."""
        what = f"listing {shown_url(self, folder)}"
        return self.ask(lambda connection: list(connection.ls(folder, detail=True)), what)

    def exists(self, path: str) -> bool:
        """Tell whether there is a file or folder."""
        with asking(self.filesystem) as connection:
            return bool(connection.exists(path))

    def look_up(self, path: str, first_nbytes: int = 0) -> ObjectInfo:
        """Ask what a file is; web servers tell its first bytes in the same answer."""
        what = f"looking up {shown_url(self, path)}"
        return told_info(with_retries(lambda: ask_info(self.filesystem, path, first_nbytes), what), path)

    # Reading

    def read(self, path: str, ranges: Sequence[Span], *, again: bool = False) -> Sequence[Answer]:
        """Read byte ranges of a file, all at once where the client can; nothing is asked for an empty one."""
        wanted = [ByteRange(start, buffers) for start, buffers in ranges]
        filled = [each for each in wanted if each.nbytes]
        answers = iter(request(self.filesystem, path, filled, again=again) if filled else ())
        return [_answer(each, next(answers)) if each.nbytes else None for each in wanted]

    def read_whole(self, path: str) -> bytes:
        """Return the content of a small file."""
        return bytes(self.ask(lambda connection: connection.cat_file(path), shown_url(self, path)))

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
        """Write a file: by one request to an object store, elsewhere under another name, and then rename it."""
        del durable, cached
        sink = io.BytesIO()
        result = content(sink.write)
        data, what = sink.getvalue(), shown_url(self, path)
        if not self.is_object_store:
            folder, name = posixpath.split(path)
            if scratch is None:
                self.make_folder(folder)
            temporary = f"{scratch or folder}/.{name}.{uuid.uuid4().hex}.tmp"
            with self._removed_on_failure(lambda: [temporary]):
                self.ask(lambda connection: _put_and_rename(connection, path, data, temporary), what)
        elif not is_new:
            self.ask(lambda connection: _upload(connection, path, data), what)
        elif not self.create(path, data):
            raise FileExistsError(path)
        return result

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one of this name; tell whether it was written."""
        self.make_folder(posixpath.dirname(path))
        begun: list[str] = []

        def create(connection: AbstractFileSystem) -> bool:
            if begun:  # by an attempt that failed: what it left would seem to be of another one
                with suppress(FileNotFoundError):
                    _rm_file(connection, path)
                begun.clear()
            return _create(connection, path, data, begun)

        with self._removed_on_failure(lambda: begun):
            return self.ask(create, shown_url(self, path))

    @contextmanager
    def _removed_on_failure(self, paths: Callable[[], Sequence[str]]) -> Iterator[None]:
        """Remove files if the block fails: by the connection that is made then, where the old one is of no use."""
        try:
            yield
        except BaseException:
            for path in paths():
                with suppress(Exception), asking(self.filesystem) as connection:
                    _rm_file(connection, path)
            raise

    def move(self, source: str, target: str) -> None:
        """Rename a file; object stores cannot, but copy within the store."""
        what = shown_url(self, target)
        if self.is_object_store:
            self.ask(lambda connection: connection.cp_file(source, target), what)
            with suppress(FileNotFoundError):
                self.remove(source)
        else:
            self.ask(lambda connection: _rename(connection, source, target), what)

    def remove(self, path: str, trash: str | None = None) -> None:
        """Remove a file."""
        del trash  # of local disks
        self.ask(lambda connection: _rm_file(connection, path), shown_url(self, path))

    def make_folder(self, folder: str) -> None:
        """Make a folder, where there are folders."""
        if not self.is_object_store:
            self.ask(lambda connection: connection.makedirs(folder, exist_ok=True), shown_url(self, folder))

    def remove_folder(self, folder: str) -> None:
        """Remove what is left of a folder whose files are gone, where there are folders."""
        if not self.is_object_store:
            with suppress(Exception), asking(self.filesystem) as connection:
                connection.invalidate_cache()  # it looks for what is to be removed
                connection.rm(folder, recursive=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _answer(wanted: ByteRange, answer: Mapping[str, Any] | BaseException | None) -> Answer:
    if isinstance(answer, BaseException):
        return answer
    info = None if answer is None else told_info(answer)
    return info if wanted.count == wanted.nbytes else ShortAnswerError(wanted.count, wanted.nbytes, info)


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def _walk_levels(
    store: FsspecStore,
    top: str,
    may_vanish: Callable[[str], bool],
    list_entries: Callable[[str], list[dict[str, Any]]],
    leads_on: Callable[[str, int], bool] | None = None,
) -> list[dict[str, Any]]:
    """List the files and folders below a folder, level by level, the folders of a level at once.

    What fsspec does where a storage cannot list a whole tree; but it passes over folders that fail to be listed.
    ``leads_on``, if given, is asked with the name of a folder and the number of its level whether to go into it.
    """
    infos: dict[str, dict[str, Any]] = {}
    level, folders, seen = 0, [top], {top.rstrip("/")}
    while folders:
        listings = map_at_once(_THREADS, partial(_list_folder, store, top, may_vanish, list_entries), folders)
        level += 1
        folders = []
        for entry in (entry for listing in listings for entry in listing):
            name = entry["name"].rstrip("/")
            if entry["type"] != "directory":
                infos[entry["name"]] = entry
            elif name not in seen:
                infos[entry["name"]] = entry
                seen.add(name)
                if leads_on is None or leads_on(name, level):
                    folders.append(entry["name"])
    return list(infos.values())


def _list_folder(
    store: FsspecStore,
    top: str,
    may_vanish: Callable[[str], bool],
    list_entries: Callable[[str], list[dict[str, Any]]],
    folder: str,
) -> list[dict[str, Any]]:
    try:
        entries = list_entries(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder == top:
            raise
        if may_vanish(folder):
            return []
        raise vanished(shown_url(store, folder)) from shown_cause(error)
    behind = store.filesystem.fs if remembers_files(store.filesystem) else store.filesystem
    return _links_below(folder, entries) if "http" in protocols(behind) else entries


def _links_below(folder: str, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the links of a page, which anybody may have written, lead to below its folder, each file once.

    fsspec appends links as they are written: `./a` (Caddy), `a&amp;b` (Apache), and `./`, `?sort=name/` or, where the
    folder itself has a query, any, which lead to the same page for ever.
    """
    links = {}
    for entry in entries:
        name = re.sub("&#?[0-9A-Za-z]+;", lambda found: html.unescape(found[0]), entry["name"])
        cut = len(posixpath.commonprefix([folder, name]))
        name = name[:cut] + re.sub(r"(?:^|(?<=/))(?:\./+)+", "", name[cut:])
        is_below = _page_of(name).rstrip("/") != _page_of(folder).rstrip("/")
        if is_below and ".." not in re.split(r"[/\\]", urllib.parse.unquote(name)):
            links[name] = {**entry, "name": name}
    # Beside a file there may be a link that downloads it.
    return [link for name, link in links.items() if (page := _page_of(name)) == name or page not in links]


def _page_of(url: str) -> str:
    """Return a URL without its query and fragment."""
    return re.split("[?#]", url, maxsplit=1)[0]


def glob_walking(
    store: FsspecStore, pattern: str, list_entries: Callable[[str], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """List what a pattern matches where fsspec would walk, passing over folders that fail to be listed.

    ``list_entries`` lists one folder, as ``ls`` of fsspec does with details.
    """
    root = glob_root(pattern)
    parts = pattern[len(root) :].strip("/").split("/")
    deepest = math.inf if "**" in parts else len(parts)
    prefixes = ["/".join([root, *parts[: n + 1]]).lstrip("/") for n in range(len(parts))]
    matching = [re.compile(glob_translate(prefix)) for prefix in prefixes]
    any_depth = parts.index("**") if "**" in parts else len(parts)

    def matches(name: str, level: int) -> bool:
        return matching[level - 1].match(name.strip("/")) is not None

    def leads_on(name: str, level: int) -> bool:
        return level < deepest and (level > any_depth or matches(name, level))

    start = "/" if not root and pattern.startswith("/") else root
    try:
        entries = _walk_levels(store, start, partial(is_litter, root=start), list_entries, leads_on)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in entries if matches(entry["name"], len(parts))]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _upload(filesystem: AbstractFileSystem, path: str, data: bytes, **more: Any) -> None:
    names, options = protocols(filesystem), {}
    if names & {"s3", "s3a"}:
        # What S3 has of an upload in parts that was broken off is kept, and charged for, until somebody looks for it.
        options = {"chunksize": _LARGEST_PUT_NBYTES}
    elif names & _AZURE:
        options = {"retry_total": 0}  # its retries would multiply with ours: a minute for each
    filesystem.pipe_file(path, data, **options, **more)


def _create(filesystem: AbstractFileSystem, path: str, data: bytes, begun: list[str]) -> bool:
    """Store a file unless there is one of this name; tell whether it was stored.

    Its path is put into ``begun`` where it may be there before all its bytes are.
    """
    names = protocols(filesystem)
    try:
        if names & _EXCLUSIVE_OPEN:
            file = filesystem.open(path, "xb")
            begun.append(path)
            with file:
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
        if not names & _ATOMIC_PUT:
            begun.append(path)
        _upload(filesystem, path, data)
    return True


def _only_new(filesystem: AbstractFileSystem) -> dict[str, Any]:
    """Return the options with which a client stores no file in the place of another; none where it has no such."""
    names = protocols(filesystem)
    if names & _AZURE:
        return {"overwrite": False}
    return {"mode": "create"} if names & _ATOMIC_PUT and any_client.takes_mode(filesystem) else {}


def _put_and_rename(filesystem: AbstractFileSystem, path: str, data: bytes, temporary: str) -> None:
    try:
        filesystem.pipe_file(temporary, data)
        filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
        _rename(filesystem, temporary, path)
    except BaseException:
        with suppress(Exception):
            filesystem.rm_file(temporary)  # the next attempt may not be allowed to replace it
        raise


def _rename(filesystem: AbstractFileSystem, source: str, target: str) -> None:
    if filesystem.exists(target):  # some storages refuse to replace a file
        if not filesystem.exists(source):  # another writer took over: that is its file
            raise FileNotFoundError(source)
        filesystem.rm_file(target)
    filesystem.mv(source, target)


def _rm_file(filesystem: AbstractFileSystem, path: str) -> None:
    try:
        filesystem.rm_file(path)
    except NotImplementedError:  # earlier releases of adlfs know only the general way
        filesystem.rm(path)


if hasattr(os, "register_at_fork"):  # a child must not find it held by a thread that it does not have
    os.register_at_fork(before=_creating.acquire, after_in_parent=_creating.release, after_in_child=_creating.release)
