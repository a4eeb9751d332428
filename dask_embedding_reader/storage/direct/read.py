"""Byte ranges from S3 and web servers without fsspec's clients, whose event loop costs more than the bytes.

A file is read in this way only where the same is asked for in the same name as its client would. Whatever is out of the
ordinary is left to fsspec's client, which also has the last word when a server refuses: every error that a user sees is
as it would be without this package.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from http.client import HTTPResponse
from typing import Any, NamedTuple

from dask_embedding_reader.storage.connections import Asked, FileSystem, class_name, connected, sites
from dask_embedding_reader.storage.direct.s3 import find_s3
from dask_embedding_reader.storage.direct.site import Address, NotDirectError, Site
from dask_embedding_reader.storage.direct.web import find_web
from dask_embedding_reader.storage.ranges import ByteRange, is_as_stored, part
from dask_embedding_reader.storage.retries import EndlessAnswerError, status_may_pass

logger = logging.getLogger("dask_embedding_reader")

SWITCH = "DASK_EMBEDDING_READER_DIRECT"
"""The environment variable that turns all of this off if it is 0. It is looked at when a site is read first."""

_making = threading.Lock()


class UnusualAnswer(Exception):  # noqa: N818 - it is no error before fsspec's client says so
    """An answer that fsspec's client has to explain, or may make use of. Nothing was read yet."""


class AnswerError(OSError):
    """A server's answer that stands for a failure which may pass."""

    def __init__(self, answer: HTTPResponse) -> None:
        super().__init__(f"{answer.status} {answer.reason}")
        self.status = answer.status
        self.headers = dict(answer.headers)


class Place(NamedTuple):
    """A file at a site."""

    site: Site
    """Where it is."""
    url: str
    """Its address."""

    @property
    def is_web(self) -> bool:
        """Whether it is on a web server, not in a bucket."""
        return self.site.is_web


def find_place(filesystem: FileSystem, path: str) -> Place | None:
    """Return where to ask for a file; None where fsspec's client has to read it."""
    live = connected(filesystem)
    find = _FINDERS.get(class_name(live))
    if find is None:
        return None
    found = find(live, path)
    known: dict[str, Site | None] = sites(filesystem)
    if found.site not in known:
        with _making:
            if found.site not in known:
                known[found.site] = _make(live, found)
    site = known[found.site]
    return None if site is None else Place(site, site.address + found.rest)


def leave_to_fsspec(filesystem: FileSystem, place: Place) -> None:
    """Ask a site for nothing more, as fsspec's client has got what did not come here."""
    known = sites(filesystem)
    for name in [name for name, site in known.items() if site is place.site]:
        _say(name, "its answers are unusual")
        known[name] = None


def get(place: Place, wanted: ByteRange, asked: Asked) -> Mapping[str, Any]:
    """Put a range of a file where it belongs; return what the answer tells of the file, as ``FileSystem.info`` does.

    Raises
    ------
    UnusualAnswer
        If it takes fsspec's client to tell what is wrong.
    OSError
        If the file is not there, must not be read, or the connection or the server fails.
    """
    site = place.site
    total = site.connections.timeouts.total
    deadline = None if total is None else time.monotonic() + total
    ask = site.connections.ask_and_follow if site.is_web else site.connections.ask
    try:
        with ask("GET", place.url, site.headers(place.url, wanted.header), asked) as answer:
            _check(answer, site)
            content_range = answer.getheader("Content-Range")
            if content_range is None:  # the whole file, probably
                raise UnusualAnswer
            site.has_answered = True
            first, size = part(content_range, None)
            if first != wanted.start:
                raise wanted.misplaced(first)

            def read_into(buffer: memoryview) -> int:
                asked.check()
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"the answer did not come in {total} s")
                return answer.readinto(buffer)

            wanted.fill(read_into)
            if answer.read(1):
                raise wanted.too_many()
            if answer.length:
                raise ConnectionError(f"the answer ended {answer.length:,} bytes early")
            return _told(answer, size)
    except OSError as error:
        # A server that is busy would be asked once more at once by fsspec's client; one without an end would keep it.
        if site.has_answered or isinstance(error, AnswerError | EndlessAnswerError):
            raise
        raise UnusualAnswer from None


def look(place: Place, first_nbytes: int, asked: Asked) -> Mapping[str, Any]:
    """Ask what a file is, in the words of ``FileSystem.info``, and for its first bytes if they are wanted: ``head``.

    Whatever is raised, but for ``AnswerError`` and ``EndlessAnswerError``, is for fsspec's client to explain.
    """
    if not first_nbytes:
        return _ask_head(place, asked)
    buffer = bytearray(first_nbytes)
    wanted = ByteRange(0, [memoryview(buffer)])
    try:
        told = get(place, wanted, asked)
    except UnusualAnswer:  # of an empty file there are no first bytes
        return _ask_head(place, asked)
    if told["size"] is None or wanted.count != min(first_nbytes, told["size"]):
        raise UnusualAnswer
    return {**told, "head": bytes(buffer[: wanted.count])}


def _ask_head(place: Place, asked: Asked) -> Mapping[str, Any]:
    headers = place.site.headers(place.url, "")
    with place.site.connections.ask_and_follow("HEAD", place.url, headers, asked) as answer:
        length = answer.getheader("Content-Length")
        if answer.status != 200 or not is_as_stored(answer.getheader("Content-Encoding")):
            raise UnusualAnswer
        answer.read()
        told = _told(answer, int(length or 0))
    # Some tell no length when they are asked by HEAD, or that of the answer, which is empty. The rows would be missing.
    return told if told["size"] else get(place, ByteRange(0, [memoryview(bytearray(1))]), asked)


def _check(answer: HTTPResponse, site: Site) -> None:
    """Refuse an answer that stands for an error, or holds a file in other bytes than the stored ones."""
    status = answer.status
    if status_may_pass(status):
        raise AnswerError(answer)
    if site.has_answered and status == 404:
        raise FileNotFoundError(status, answer.reason)
    if site.has_answered and status in (401, 403):
        raise PermissionError(f"{status} {answer.reason}")
    if status >= 300 or not is_as_stored(answer.getheader("Content-Encoding")):
        raise UnusualAnswer


def _told(answer: HTTPResponse, size: int | None) -> dict[str, Any]:
    told = {"mimetype": answer.getheader("Content-Type"), "ETag": answer.getheader("ETag")}
    told["Last-Modified"] = answer.getheader("Last-Modified")
    return {"size": size, **{name: value for name, value in told.items() if value}}


# ---------------------------------------------------------------------------------------------------------------------
# Sites


def _make(filesystem: FileSystem, address: Address) -> Site | None:
    """Make a site; where that cannot be done, say once that it is read in the slower way, and why."""
    try:
        if os.environ.get(SWITCH, "1").strip() == "0":
            raise NotDirectError(f"{SWITCH}=0")
        site = address.make()
    except NotDirectError as error:
        _say(address.site, str(error))
    except Exception as error:  # noqa: BLE001 - fsspec's client will say what is wrong, if anything is
        _say(address.site, type(error).__name__)
    else:
        weakref.finalize(filesystem, site.connections.close)
        return site
    return None


def _say(site: str, reason: str) -> None:
    logger.info("%s is read by fsspec's client, which takes more processor time: %s", site, reason)


_FINDERS: dict[str, Callable[[FileSystem, str], Address]] = {
    # By name: none of these needs to be installed. Exactly these classes: another one may read in another way.
    "s3fs.core.S3FileSystem": find_s3,
    "fsspec.implementations.http.HTTPFileSystem": find_web,
}


def _start_afresh() -> None:
    """Forget a lock that a thread of the parent may hold; sites belong to file systems, which are made anew."""
    global _making  # noqa: PLW0603 - nobody else is there yet
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
