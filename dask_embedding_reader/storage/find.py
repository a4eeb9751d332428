"""Files found: what folders, globs and lists of them hold, listed once, looked up at once.

Local folders are walked by the operating system. Elsewhere the listing is the storage's own where it can list a whole
tree, and folder by folder where it cannot.
"""

from __future__ import annotations

import errno
import importlib.util
import inspect
import math
import os
import re
import stat
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from dask_embedding_reader._common.arguments import Source
from dask_embedding_reader._common.threads import threads_at_once
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import ArgumentError, EmbeddingReaderError, FileChangedError, NoFilesError, ReadError
from dask_embedding_reader.storage.clients.requests import ask_info
from dask_embedding_reader.storage.connections import (
    CACHES,
    FileSystem,
    connected,
    cuts_paths,
    exclusive,
    path_within,
    protocols,
    reconnect,
)
from dask_embedding_reader.storage.read import StoredFile, fingerprint, is_local, local_info, shown_url
from dask_embedding_reader.storage.retries import describe, hide_secrets, shown_cause, with_retries

R = TypeVar("R")

_THREADS = 64
"""Answers are waited for, not computed."""

_GLOB_CHARACTERS = frozenset("*?[")
MANIFEST_NAME = ".manifest.embeddings"
INCOMPLETE_NAME = "_writing/incomplete"
"""What this library keeps in a collection beside the data: what is known of it, a mark while it is being written.

No suffix of data and a dot in front: whatever else reads the folder, or a glob in it, passes over the manifest."""

EARLIER_MANIFEST_NAME = "_manifest.parquet"
"""What it was called before: dask, pandas, polars, duckdb and embedding_reader took it for data."""

MANIFEST_NAMES = (MANIFEST_NAME, EARLIER_MANIFEST_NAME)
"""Where both are, the first one is newer."""

_OWN_FILES = tuple(f"/{name}" for name in (*MANIFEST_NAMES, INCOMPLETE_NAME))

_WRITERS = f"/{os.path.dirname(INCOMPLETE_NAME)}/"
"""In the names of files that a writer keeps while it writes: the mark is the last but one of them to go."""

_SPELLINGS = {
    ".npy": re.compile(r"\.npy$", re.IGNORECASE),
    ".parquet": re.compile(r"\.(parquet|parq|pq)(\.(gzip|gz|snappy|zstd|zst|brotli|br|lz4))?$", re.IGNORECASE),
    **{
        suffix: re.compile(re.escape(suffix) + "$", re.IGNORECASE)
        for suffix in (
            *(".fbin", ".f16bin", ".u8bin", ".i8bin", ".ibin"),
            *(".fvecs", ".ivecs", ".bvecs"),
            *(".npz", ".safetensors"),
            *(".arrow", ".feather", ".ipc"),
        )
    },
}
"""How others spell a suffix. In a folder only files with the suffix itself are data; those that are named are taken as
they are called."""

_COLONS = "\ue000"
"""Stands for ``::`` in a name, while fsspec takes a URL to pieces."""

_ON_OTHERS = frozenset({"fo", "target_protocol"})
"""Options of file systems that stand on another one."""

_VERSION = re.compile(r"\?(?:versionid|generation)=[^/]*$|#\d+$", re.IGNORECASE)
"""At the end of a path: which version of it is wanted, for S3, Azure and Google in turn."""

_EXTRAS = {
    "azure": {"az", "abfs", "abfss"},
    "gcs": {"gs", "gcs"},
    "hdfs": {"hdfs", "webhdfs"},
    "http": {"http", "https"},
}
"""Which protocols each extra of this library installs the client of."""

_LITTER = re.compile(r"(?:^|/)[._]")


class Listing(NamedTuple):
    """What there is of one source."""

    infos: list[dict[str, Any]]
    """Its files, ordered by path, litter left out."""
    own: list[dict[str, Any]]
    """Of the litter, our own files."""
    named: frozenset[str] = frozenset()
    """The files that the source names, by itself or by a glob, rather than a folder that they are in."""


Listings = dict[tuple[FileSystem, str], Listing]
"""Listings by what was listed: who looks for files of several kinds lists once."""


def find_files(
    sources: Sequence[Source],
    suffixes: tuple[str, ...],
    storage_options: Mapping[str, Any] | None = None,
    noticed: list[StoredFile] | None = None,
    roots: list[str] | None = None,
    shared: dict[tuple[Any, ...], FileSystem] | None = None,
    first_nbytes: int = 0,
    heads: dict[StoredFile, bytes] | None = None,
    empty: list[Source] | None = None,
    named: bool = True,
    listings: Listings | None = None,
) -> list[StoredFile]:
    """Find the files with one of some suffixes in folders, globs and lists of these.

    Parameters
    ----------
    sources
        Paths and URLs, each of a file or a folder (searched recursively), or a glob. A path that exists literally wins
        over its reading as a glob.
    suffixes
        What the names end in, such as ``(".npy",)``.
    storage_options
        Passed to fsspec.
    noticed
        If given, the files of this library that are passed over in folders are added to it
        (``MANIFEST_NAME``, ``INCOMPLETE_NAME``).
    roots
        If given, the paths of the sources within their file systems are added to it.
    shared
        If given, the file systems by how they are made: those in it are used again, new ones are added to it.
    first_nbytes, heads
        If given, the first bytes of files that had to be asked for one by one, where they came in the same answer, are
        added to ``heads``.
    empty
        If given, the sources without such files are added to it.
    named
        Whether a file that is named, by itself or by a glob, is taken whatever its suffix, unless that is the one of
        another format.
    listings
        If given, what is in it is not listed again, and what is listed is added to it.

    Returns
    -------
    list of StoredFile
        Ordered by full path within a source, sources in the order given, nothing twice. Hidden files, names that start
        with an underscore (``_SUCCESS``, ``_temporary/``) and files of zero bytes are passed over.

    Raises
    ------
    NoFilesError
        If a source does not exist, or nothing in any of them matches.
    """
    listed = _list_sources(sources, suffixes, storage_options, shared, first_nbytes, listings)
    if roots is not None:
        roots += [path for _, path, _ in listed]
    found: dict[tuple[FileSystem, str], dict[str, Any]] = {}
    problems = []
    for source, (filesystem, _, (infos, own, are_named)) in zip(sources, listed, strict=True):
        if noticed is not None:
            noticed += [stored_file(filesystem, _known(filesystem, info)) for info in own]
        paths = [info["name"] for info in infos]
        chosen = set(_choose(filesystem, paths, suffixes, are_named if named else None))
        wanted = [info for info in infos if info["name"] in chosen and info.get("size") != 0]
        if not wanted:
            if any(info["name"].endswith(f"/{INCOMPLETE_NAME}") for info in own):
                raise NoFilesError(_nothing_written(source, suffixes))
            problems.append(_nothing_found(source, suffixes, paths))
            if empty is not None:
                empty.append(source)
        for info in wanted:
            found.setdefault((filesystem, info["name"]), info)
    if not found:
        raise NoFilesError("; ".join([*problems[:3], "…"] if len(problems) > 3 else problems))
    # An HTTP listing tells names only.
    unknown = [key for key, info in found.items() if info.get("size") is None and not is_local(key[0])]
    looked_up = _map_at_once(lambda where: _info(where[0], where[1], first_nbytes) or {}, unknown)
    for where, info in zip(unknown, looked_up, strict=True):
        found[where] = {**found[where], **info, "name": where[1]}
    files = []
    for (filesystem, _), info in found.items():
        if info.get("size") != 0:
            files.append(stored_file(filesystem, info))
            if heads is not None and "head" in info:
                heads[files[-1]] = info["head"]
    if not files:
        raise NoFilesError(_nothing_found(sources[0], suffixes, [path for _, path in found]))
    return files


def find_kinds(
    sources: Sequence[Source],
    kinds: Mapping[str, tuple[str, ...]],
    storage_options: Mapping[str, Any] | None,
    noticed: list[StoredFile],
    shared: dict[tuple[Any, ...], FileSystem],
    first_nbytes: int,
    listings: Listings,
) -> list[str]:
    """Tell of which kinds there are files, each of which has its suffixes; the other arguments as in `find_files`.

    An empty name stands for files that are named, and called as none of the kinds.
    """
    kind_of = {suffix: name for name, suffixes in kinds.items() for suffix in suffixes}
    found: set[str] = set()
    listed = _list_sources(sources, tuple(kind_of), storage_options, shared, first_nbytes, listings)
    for filesystem, _, (infos, own, named) in listed:
        noticed += [stored_file(filesystem, _known(filesystem, info)) for info in own]
        paths = [info["name"] for info in infos if info.get("size") != 0]
        suffixes = {os.path.splitext(_without_query(filesystem, path))[1] for path in paths}
        spelled = {_spelled(filesystem, path) for path in paths if path in named} if named else set()
        kinds_here = {kind_of[suffix] for suffix in suffixes | spelled if suffix in kind_of}
        found |= kinds_here or ({""} if None in spelled else set())
    return sorted(found)


def _list_sources(
    sources: Sequence[Source],
    suffixes: tuple[str, ...],
    storage_options: Mapping[str, Any] | None,
    shared: dict[tuple[Any, ...], FileSystem] | None,
    first_nbytes: int,
    listings: Listings | None,
) -> list[tuple[FileSystem, str, Listing]]:
    """List what is in each source, as far as that is not known; return where it is, too."""
    resolved = _share((resolve(source, storage_options) for source in sources), {} if shared is None else shared)

    def list_source(source: Source, where: tuple[FileSystem, str]) -> Listing:
        listing = None if listings is None else listings.get(where)
        if listing is None:
            listing = _list_source(*where, suffixes, source, first_nbytes)
            if listings is not None:
                listings[where] = listing
        return listing

    remote = not all(is_local(filesystem) for filesystem, _ in resolved)
    listed = _map_at_once(list_source, sources, resolved) if remote else list(map(list_source, sources, resolved))
    return [(*where, listing) for where, listing in zip(resolved, listed, strict=True)]


def _map_at_once(function: Callable[..., R], *columns: Sequence[Any]) -> list[R]:
    """Call a function for each row of columns, many at once, and keep the order."""
    if len(columns[0]) <= 1:
        return [function(*row) for row in zip(*columns, strict=True)]
    with threads_at_once(min(_THREADS, len(columns[0]))) as pool:
        return list(pool.map(function, *columns))


def resolve(source: Source, storage_options: Mapping[str, Any] | None = None) -> tuple[FileSystem, str]:
    """Return the file system of a path or URL, and the path within it."""
    text = os.fspath(source)
    try:
        if "://" not in text and os.path.lexists(text):
            # Taken literally: fsspec would read a `::` in a name as a chain of file systems.
            return fsspec.filesystem("file", **dict(storage_options or {})), _with_slashes(os.path.abspath(text))
        filesystem, path = url_to_fs(_marked(text), **dict(storage_options or {}))
        path = path.replace(_COLONS, "::")
    except (ImportError, ValueError, LookupError, TypeError) as error:
        remedy = _install(text) if isinstance(error, ImportError) else ""
        raise ArgumentError(
            f"cannot open {hide_secrets(text)!r}: {describe(error)}; {remedy or 'check the URL and storage_options'}"
        ) from shown_cause(error)
    except FileNotFoundError as error:
        shown = hide_secrets(text)
        raise NoFilesError(
            f"{shown!r} does not exist ({describe(error)}); check the spelling of the path"
        ) from shown_cause(error)
    except Exception as error:  # noqa: BLE001 - such as of a client that looks for credentials
        message = f"{hide_secrets(text)!r} cannot be opened: {describe(error)}"
        if text.startswith("hdfs:") and importlib.util.find_spec("hdfs_native") is None:
            message += f"; {_install(text)}"  # pyarrow, which fsspec turns to instead, needs a Java machine
        raise ReadError(message) from shown_cause(error)
    if cuts_paths(filesystem):
        path = path_within(text)
    elif (inner := re.search(r"::(?:web)?hdfs://[^/]*(.*)", text)) and not {"#", "?", ";"}.isdisjoint(inner[1]):
        raise ArgumentError(
            f"cannot open {hide_secrets(text)!r}: within a chain, clients of HDFS cut names at '#', '?' and ';'; open "
            "the URL without what stands before it"
        )
    # A web server may know a folder by one of the two spellings only.
    return filesystem, path if "http" in protocols(filesystem) else path.rstrip("/") or path


def find_sibling(source: Source, name: re.Pattern[str], storage_options: Mapping[str, Any] | None = None) -> str | None:
    """Return a folder beside a folder, if there is one whose name matches; spelled as the source is, without secrets.

    Meant for messages: whatever goes wrong, there is none.
    """
    text = os.fspath(source).rstrip("/")
    parent, _, own = text.rpartition("/")
    if not _GLOB_CHARACTERS.isdisjoint(text) or "?" in text:
        return None
    try:
        filesystem, path = resolve(parent or (os.sep if text.startswith("/") else "."), storage_options)
        with exclusive(filesystem):
            entries = connected(filesystem).ls(path, detail=True)
    except Exception:  # noqa: BLE001 - such as no permission to list it
        return None
    folders = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
    likely = sorted(folder for folder in folders if name.search(folder) and folder != own)
    return hide_secrets(f"{parent}/{likely[0]}" if parent or text.startswith("/") else likely[0]) if likely else None


def _marked(url: str) -> str:
    """Mark each ``::`` that is a part of a name: fsspec would take it for a link of a chain of file systems.

    In a chain, archives and caches come first; what comes after another file system is its path.
    """
    links = url.split("::")
    for number, link in enumerate(links[:-1]):
        protocol, is_url, _ = link.partition("://")
        if not is_url and not re.fullmatch("[a-z]+", link):
            break
        try:
            classes = get_filesystem_class(protocol).__mro__
        except ValueError:  # no protocol, but the beginning of a local path
            if "://" in url:
                return url
            break
        if all(_ON_OTHERS.isdisjoint(inspect.signature(kind.__init__).parameters) for kind in classes):
            break
        if protocol not in CACHES and "://" not in "".join(links[number + 1 :]):
            return url  # of an archive in a local file
    else:
        return url
    if any(link.partition("://")[0] not in CACHES for link in links[:number]):
        raise ValueError("'::' in the name of an archive cannot be told from a chain of file systems; rename it")
    return "::".join([*links[:number], _COLONS.join(links[number:])])


def _install(url: str) -> str:
    """Say which extras of this library install what a URL needs; nothing where none does."""
    needed = set(re.findall(r"(?:^|::)(\w+)(?=::|:/)", url))
    extras = [extra for extra, installed in _EXTRAS.items() if needed & installed]
    return f'pip install "dask-embedding-reader[{",".join(extras)}]"' if extras else ""


def _with_slashes(path: str) -> str:
    """Spell a local path as fsspec does, on Windows too."""
    return path.replace(os.sep, "/")


def _known(filesystem: FileSystem, info: dict[str, Any]) -> dict[str, Any]:
    """Look a file up whose size a listing does not tell."""
    return info if info.get("size") is not None else {**info, **(_info(filesystem, info["name"]) or {})}


def _share(
    resolved: Iterable[tuple[FileSystem, str]], shared: dict[tuple[Any, ...], FileSystem]
) -> list[tuple[FileSystem, str]]:
    """Use one file system for all that are made alike: fsspec makes one for each URL of some kinds, such as FTP.

    In a forked process, releases of fsspec up to 2026.7 make one, then another one that they call unequal.
    """
    return [
        (shared.setdefault((type(fs), repr(fs.storage_args), repr(fs.storage_options)), fs), path)
        for fs, path in resolved
    ]


def _list_source(
    filesystem: FileSystem, path: str, suffixes: tuple[str, ...], source: Source, first_nbytes: int
) -> Listing:
    """List the files of one source."""
    shown = hide_secrets(os.fspath(source))
    named: frozenset[str] = frozenset()
    pinned = _VERSION.search(path) if getattr(filesystem, "version_aware", False) else None
    try:
        info = None
        if pinned or _has_suffix(filesystem, path, suffixes):
            info = _info(filesystem, path, first_nbytes)
        elif _may_be_web_file(filesystem, path):
            with suppress(Exception):  # listing it will tell
                info = _info(filesystem, path, max(first_nbytes, 16))
        if info and info["type"] != "directory" and not _is_page(info):
            # A file that is named is wanted, whatever its name starts with.
            return Listing([{**info, "name": path}], [], frozenset([path]))
        if pinned:
            raise NoFilesError(
                f"there is no {_any_of(suffixes)} file {shown!r} of the version that is asked for; check both. "
                "Versions can be told of files, not of folders"
            )
        if _GLOB_CHARACTERS.isdisjoint(path) or _exists(filesystem, path):
            infos = _find(filesystem, path)
            root = path
            if not infos and not _exists(filesystem, path):
                raise FileNotFoundError(path)
            if not infos and (info := _info(filesystem, path)) and info["type"] == "file" and not _is_page(info):
                infos = [{**info, "name": path}] if info.get("size") else []
            if [info["name"] for info in infos] == [path]:
                return Listing(infos, [], frozenset([path]))
        else:
            infos, named = _glob(filesystem, path)
            root = _glob_root(path)
            if is_litter(path, root):  # the pattern itself names such files: they are wanted
                return Listing(sorted(infos, key=_name), [], named)
    except EmbeddingReaderError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoFilesError(
            f"{shown!r} does not exist (searched {shown_url(filesystem, path)!r}); check the spelling of the path"
        ) from shown_cause(error)
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(f"{shown!r} cannot be listed: {describe(error)}") from shown_cause(error)
    own = [info for info in infos if info["name"].endswith(_OWN_FILES)]
    return Listing(sorted((info for info in infos if not is_litter(info["name"], root)), key=_name), own, named)


def _has_suffix(filesystem: FileSystem, path: str, suffixes: tuple[str, ...]) -> bool:
    return _without_query(filesystem, path).endswith(suffixes)


def _without_query(filesystem: FileSystem, path: str) -> str:
    """Return the name of a file without what signed URLs end in, or those of one version."""
    if "http" in protocols(filesystem):
        return path.partition("?")[0]
    return _VERSION.sub("", path) if getattr(filesystem, "version_aware", False) else path


def _may_be_web_file(filesystem: FileSystem, path: str) -> bool:
    """Tell by its name whether a URL may be one of a file: to list it as a folder would be to read all of it."""
    return "http" in protocols(filesystem) and re.search(r"://.*/[^/]*[.?][^/]*$", path) is not None


def _is_page(info: Mapping[str, Any]) -> bool:
    """Tell whether what a web server knows by a name is a page of links rather than data."""
    return info.get("head", b"").lstrip()[:1] == b"<" or str(info.get("mimetype")).startswith("text/html")


def _choose(
    filesystem: FileSystem, paths: Sequence[str], suffixes: tuple[str, ...], named: Set[str] | None
) -> list[str]:
    """Return the paths that are wanted: those with a suffix, and of those that are named which are spelled otherwise.

    A glob may name more than the data: files without any suffix of a format are meant if there are no others.
    """
    chosen = [path for path in paths if _has_suffix(filesystem, path, suffixes)]
    if named:
        kinds = {path: _spelled(filesystem, path) for path in paths if path in named}
        chosen += [path for path, kind in kinds.items() if kind in suffixes]
        if not chosen:
            chosen = [path for path, kind in kinds.items() if kind is None]
    return chosen


def _spelled(filesystem: FileSystem, path: str) -> str | None:
    """Return the suffix that the name of a file ends in, however it is spelled."""
    path = _without_query(filesystem, path)
    return next((suffix for suffix, pattern in _SPELLINGS.items() if pattern.search(path)), None)


def _name(info: Mapping[str, Any]) -> str:
    return str(info["name"])


def is_litter(name: str, root: str) -> bool:
    """Tell hidden files, ``_SUCCESS``, ``_temporary/…`` and their like, wherever they lie below the folder given."""
    return _LITTER.search(name, len(root.rstrip("/")) if name.startswith(root) else 0) is not None


def _exists(filesystem: FileSystem, path: str) -> bool:
    with exclusive(filesystem):
        return bool(connected(filesystem).exists(path))


def _info(filesystem: FileSystem, path: str, first_nbytes: int = 0) -> dict[str, Any] | None:
    try:
        return with_retries(
            lambda: ask_info(filesystem, path, first_nbytes), f"looking up {shown_url(filesystem, path)}"
        )
    except FileNotFoundError:
        return None
    except (EmbeddingReaderError, NotADirectoryError):
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(f"{shown_url(filesystem, path)}: cannot be looked up: {describe(error)}") from shown_cause(
            error
        )


def _find(filesystem: FileSystem, path: str, root: str | None = None) -> list[dict[str, Any]]:
    """List the files below a folder; anew where a writer may have come to its end behind our back.

    What it wrote after its folder had been looked at would be missing, and its mark would be gone already.
    """
    found, is_written_to = _find_once(filesystem, path, root)
    while is_written_to and not any(info["name"].endswith(f"/{INCOMPLETE_NAME}") for info in found):
        before = found
        found, is_written_to = _find_once(filesystem, path, root)
        if found == before:
            break
    return found


def _find_once(filesystem: FileSystem, path: str, root: str | None) -> tuple[list[dict[str, Any]], bool]:
    """List the files below a folder, and tell whether a writer was seen."""
    if is_local(filesystem):
        return _walk(path)
    with exclusive(filesystem):
        # The listing is taken anew: a stale one, kept by fsspec from earlier in the process, would hide changed files.
        connected(filesystem).invalidate_cache(path)
    if _walks(filesystem):
        entries = _walk_levels(filesystem, path, root=root)
    else:
        with exclusive(filesystem):
            listing = with_retries(
                lambda: connected(filesystem).find(path, detail=True), f"listing {shown_url(filesystem, path)}"
            )
        entries = [{**info, "name": path} for path, info in listing.items()]
    # Folders have an entry where they are walked through, else the files in them tell.
    is_written_to = any(_WRITERS in f"{entry['name']}/" for entry in entries)
    return [entry for entry in entries if entry["type"] == "file"], is_written_to


def _walks(filesystem: FileSystem) -> bool:
    """Tell whether a file system finds files by fsspec's own walk through the folders."""
    find = filesystem._find if filesystem.async_impl else filesystem.find
    return getattr(find, "__func__", None) in (AbstractFileSystem.find, AsyncFileSystem._find)


def _walk_levels(
    filesystem: FileSystem, top: str, leads_on: Callable[[str, int], bool] | None = None, root: str | None = None
) -> list[dict[str, Any]]:
    """List the files and folders below a folder, level by level, the folders of a level at once.

    What fsspec does where a storage cannot list a whole tree; but it passes over folders that fail to be listed.
    ``leads_on``, if given, is asked with the name of a folder and the number of its level whether to go into it;
    ``root`` is the folder that was given, if ``top`` was found in it.
    """
    infos: dict[str, dict[str, Any]] = {}
    level, folders, seen = 0, [top], {top.rstrip("/")}
    while folders:
        listings = _map_at_once(partial(_list_folder, filesystem, top if root is None else root), folders)
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


def _list_folder(filesystem: FileSystem, root: str, folder: str) -> list[dict[str, Any]]:
    def attempt() -> list[dict[str, Any]]:
        with exclusive(filesystem):
            try:
                entries = list(connected(filesystem).ls(folder, detail=True))
            except (FileNotFoundError, NotADirectoryError) as error:
                # Whether there is a folder of the name that was given is looked up later.
                if folder == root or is_litter(folder, root):
                    return []
                raise _vanished(shown_url(filesystem, folder)) from shown_cause(error)
            except Exception:
                reconnect(filesystem)
                raise
        return [entry for entry in entries if not _leads_out(filesystem, entry["name"])]

    return with_retries(attempt, f"listing {shown_url(filesystem, folder)}")


def _vanished(url: str) -> FileChangedError:
    """Say so: what was in the folder would be missing from the collection, in silence."""
    return FileChangedError(
        f"{url}: this folder was listed, but then it could not be found: it was removed or renamed in the meantime, or "
        "the client of this storage does not find it by its name; open again, or rename the folder"
    )


def _leads_out(filesystem: FileSystem, name: str) -> bool:
    """Tell whether a page of links, which anybody may have written, names what is not below its folder."""
    return "http" in protocols(filesystem) and ".." in re.split(r"[/\\]", urllib.parse.unquote(name))


def _walk(folder: str) -> tuple[list[dict[str, Any]], bool]:
    """List files, through links too (fsspec passes linked folders over), and tell whether a writer was seen."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error
        if not is_litter(error.filename, folder):
            raise _vanished(error.filename) from error

    if not stat.S_ISDIR(os.stat(folder).st_mode):  # or says that it does not exist, as listing would
        return [_local_info(folder)], False
    found, is_written_to = [], False
    seen = set()
    for current, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        try:
            status = os.stat(current)
        except FileNotFoundError as error:  # gone since it was listed
            refuse(error)
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        is_written_to |= os.path.dirname(INCOMPLETE_NAME) in folders
        found += [_local_info(_with_slashes(os.path.join(current, name))) for name in names]
    return found, is_written_to


def _local_info(path: str) -> dict[str, Any]:
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise  # its rows would be missing, in silence
        # A link to nothing or to itself: like a file of zero bytes, which is passed over.
        return {"name": path, "type": "file", "size": 0}
    return {"name": path, "type": "file", **local_info(status)}


def _glob(filesystem: FileSystem, pattern: str) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """List what a pattern matches, and tell which files it names: those that it does not merely find in folders.

    Folders that it matches are searched as if they had been given themselves.
    """
    with exclusive(filesystem):
        connected(filesystem).invalidate_cache()
    if _walks(filesystem):
        matches = _glob_walking(filesystem, pattern)
    else:
        with exclusive(filesystem):
            listing = with_retries(
                lambda: connected(filesystem).glob(pattern, detail=True), f"listing {hide_secrets(pattern)}"
            )
        matches = [{**info, "name": path} for path, info in listing.items()]
    infos = {info["name"]: info for info in matches if info["type"] != "directory"}
    named = frozenset(infos) if pattern.rpartition("/")[2].strip("*") else frozenset[str]()
    if "**" not in pattern:
        for folder in (info["name"] for info in matches if info["type"] == "directory"):
            infos.update((info["name"], info) for info in _find(filesystem, folder, _glob_root(pattern)))
    return list(infos.values()), named


def _glob_walking(filesystem: FileSystem, pattern: str) -> list[dict[str, Any]]:
    """List what a pattern matches where fsspec would walk, passing over folders that fail to be listed."""
    root = _glob_root(pattern)
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
    return [entry for entry in _walk_levels(filesystem, start, leads_on) if matches(entry["name"], len(parts))]


def _glob_root(pattern: str) -> str:
    """Return the folder that a pattern starts in."""
    return pattern[: min(pattern.index(c) for c in _GLOB_CHARACTERS if c in pattern)].rpartition("/")[0]


def stored_file(filesystem: FileSystem, info: Mapping[str, Any]) -> StoredFile:
    """Return a file as it was when a listing told of it."""
    if is_local(filesystem) and type(info.get("mtime")) is not int:  # from fsspec: of a link, and less than exact
        try:
            info = _local_info(info["name"])
        except OSError as error:
            raise ReadError(f"{info['name']}: cannot be looked up: {describe(error)}") from error
    size = info.get("size")
    return StoredFile(filesystem, info["name"], -1 if size is None else int(size), fingerprint(info))


def _nothing_written(source: Source, suffixes: tuple[str, ...]) -> str:
    where = repr(hide_secrets(os.fspath(source)))
    return (
        f"no {_any_of(suffixes)} file found: {where} is being written, or its writing was interrupted or failed before "
        "a file was complete; wait, or run the writing again to finish it"
    )


def _nothing_found(source: Source, suffixes: tuple[str, ...], passed_over: Sequence[str]) -> str:
    """Say what was searched, what was there instead, and the likely remedy."""
    where = repr(hide_secrets(os.fspath(source)))
    if not passed_over:
        return f"no {_any_of(suffixes)} file found: {where} holds no files; check the path"
    kinds = Counter("empty " + _suffix(name) if name.endswith(suffixes) else _suffix(name) for name in passed_over)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    message = (
        f"no {_any_of(suffixes)} file found in {where}; found instead {counted(len(passed_over), 'file')}: {counts}"
    )
    for other, file_format in _LIKELY.items():
        if other not in suffixes and kinds[other]:
            return f'{message}; did you mean file_format="{file_format}"?'
    spellings = [pattern for suffix, pattern in _SPELLINGS.items() if suffix in suffixes]
    if not spellings:
        return f"{message}; check the path"
    if alike := [name for name in passed_over if not name.endswith(suffixes) and spellings[0].search(name)]:
        return f"{message}; to read files that are called otherwise, name them, as in '*{_suffix(alike[0])}'"
    return (
        f'{message}; what can be read are .npy files (file_format="npy", or "parquet_npy" with metadata in .parquet '
        'files), .parquet files (file_format="parquet"), and those of "arrow", "npz", "fbin", "fvecs" and "safetensors"'
    )


_MOST_SUFFIXES = 5
"""No format has more; more are those of all formats."""


_LIKELY = {
    ".parquet": "parquet",
    ".npy": "npy",
    ".fbin": "fbin",
    ".fvecs": "fvecs",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""The format of files of a suffix."""


def _any_of(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffixes) if len(suffixes) <= _MOST_SUFFIXES else ".npy, .parquet or other readable"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1] or "without suffix"
