"""URLs and paths: which storage is meant, and the path within it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader._common.arguments import Source
from dask_embedding_reader.errors import ArgumentError, EmbeddingReaderError, NoFilesError, ReadError
from dask_embedding_reader.storage.clients import hf
from dask_embedding_reader.storage.connections import CACHES, asking, cuts_paths, path_within, protocols
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.local import LocalStore, with_slashes
from dask_embedding_reader.storage.retries import describe, explain, hide_secrets, shown_cause, with_retries
from dask_embedding_reader.storage.store import Store, shown_url

_COLONS = "\ue000"
"""Stands for ``::`` in a name, while fsspec takes a URL to pieces."""

_SCHEME = re.compile(r"(?:^|(?<=::))[A-Za-z][A-Za-z0-9+.-]*://")
"""The beginning of a URL, or of a link of a chain, which may be written in capitals."""

_ONE_SLASH = re.compile(r"(?:\w+::)*([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
"""What ``pathlib.Path`` makes of the beginning of a URL."""

_ON_OTHERS = frozenset({"fo", "target_protocol"})
"""Options of file systems that stand on another one."""

_EXTRAS = {
    "azure": {"az", "abfs", "abfss"},
    "gcs": {"gs", "gcs"},
    "hdfs": {"hdfs", "webhdfs"},
    "hf": {"hf"},
    "http": {"http", "https"},
}
"""Which protocols each extra of this library installs the client of."""


def make_store(filesystem: AbstractFileSystem) -> Store:
    """Return the storage that a file system of fsspec stands for."""
    return LocalStore(filesystem) if type(filesystem) is LocalFileSystem else FsspecStore(filesystem)


def shown_from_here(store: Store, path: str) -> str:
    """Return a path for messages, of local ones below the working directory as people write them."""
    if isinstance(store, LocalStore) and not (relative := os.path.relpath(path)).startswith(".."):
        return relative
    return shown_url(store, path)


def resolve(source: Source, storage_options: Mapping[str, Any] | None = None) -> tuple[Store, str]:
    """Return the storage of a path or URL, and the path within it."""
    text = _SCHEME.sub(lambda found: found[0].lower(), os.fspath(source))
    _check_slashes(text)
    try:
        if "://" not in text and os.path.lexists(text):
            # Taken literally: fsspec would read a `::` in a name as a chain of file systems.
            local = LocalStore(fsspec.filesystem("file", **dict(storage_options or {})))
            return local, with_slashes(os.path.abspath(text))
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
        message = f"{hide_secrets(text)!r} cannot be opened: {explain(error, asks_first=True)}"
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
    return make_store(filesystem), path if "http" in protocols(filesystem) else path.rstrip("/") or path


def _check_slashes(text: str) -> None:
    """Refuse a URL that lost a slash, unless it is there: fsspec would write to a local folder named ``s3:``."""
    found = _ONE_SLASH.match(text)
    if found and found[1].lower() in {*fsspec.available_protocols()} - {"file", "local"} and not os.path.lexists(text):
        meant = hide_secrets(f"{text[: found.end()]}/{text[found.end() :]}")
        given = meant.replace("://", ":/")
        raise ArgumentError(
            f"cannot open {given!r}: URLs have two slashes, of which pathlib.Path keeps one; write {meant!r} as a "
            f"string, or {f'./{given}'!r} if a local folder is meant"
        )


def pin(store: Store, path: str, commits: dict[Any, str]) -> str:
    """Return the path as it is now, where a storage keeps all that was ever in it: at a commit, on Hugging Face's hub.

    A branch may move while its files are listed and read. ``commits`` are those that are known.

    Raises
    ------
    NoFilesError
        If there is no such repository or branch, or it is not for the eyes of who asks.
    ReadError
        If the hub does not tell.
    """
    filesystem = store.filesystem
    if "hf" not in protocols(filesystem):
        return path

    def ask() -> str:
        with asking(filesystem) as live:
            found = hf.find_branch(live, path)
            if found is None:
                return path
            branch, inner = found
            known = filesystem, branch
            if known not in commits:
                commits[known] = hf.commit_of(live, branch)
            return hf.path_at(branch, commits[known], inner)

    what = f"looking up {shown_url(store, path)}"
    try:
        return with_retries(ask, what)
    except FileNotFoundError as error:
        raise NoFilesError(f"{what}: {describe(error)}; check the spelling, and the token") from shown_cause(error)
    except EmbeddingReaderError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(f"{what}: {describe(error)}") from shown_cause(error)


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
