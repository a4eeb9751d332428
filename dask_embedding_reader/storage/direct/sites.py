"""Byte ranges from S3 and web servers without fsspec's clients, whose event loop costs more than the bytes.

A file is read in this way only where the same is asked for in the same name as its client would: what s3fs sends is
looked at, not guessed from its options. Whatever is out of the ordinary is left to fsspec's client, which also has the
last word when a server refuses: every error that a user sees is as it would be without this module.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import ssl
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from importlib import import_module
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from fsspec.asyn import sync

from dask_embedding_reader.storage.connections import (
    STALL_SECONDS,
    Asked,
    FileSystem,
    careful_client,
    class_name,
    connected,
    sites,
)
from dask_embedding_reader.storage.direct.http import Connections, Timeouts
from dask_embedding_reader.storage.ranges import Wanted, part
from dask_embedding_reader.storage.retries import EndlessAnswerError, status_may_pass

logger = logging.getLogger("dask_embedding_reader")

_making = threading.Lock()


class UnusualAnswer(Exception):  # noqa: N818 - it is no error before fsspec's client says so
    """An answer that fsspec's client has to explain, or may make use of. Nothing was read yet."""


class AnswerError(OSError):
    """A server's answer that stands for a failure which may pass."""

    def __init__(self, answer: HTTPResponse) -> None:
        super().__init__(f"{answer.status} {answer.reason}")
        self.status = answer.status
        self.headers = dict(answer.headers)


class _CannotMap(Exception):  # noqa: N818
    """Something that is not known to be done here just as fsspec's client does it."""


@dataclass(slots=True)
class _Site:
    """A bucket or web server, and how it is asked."""

    address: str
    """What the addresses of all its files start with."""
    headers: Callable[[str, str], Mapping[str, str]]
    """Returns the headers of a request for a range of an address."""
    connections: Connections
    is_web: bool
    """Whether it is a web server, which may point elsewhere, and not a bucket."""
    has_answered: bool = False
    """Whether it ever did. If so, all options were understood."""


class Place(NamedTuple):
    """A file at a site."""

    site: _Site
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
    found = None if find is None else find(live, path)
    if found is None:
        return None
    known: dict[str, _Site | None] = sites(filesystem)
    if found.name not in known:
        with _making:
            if found.name not in known:
                known[found.name] = _make(live, found)
    site = known[found.name]
    return None if site is None else Place(site, site.address + found.rest)


def leave_to_fsspec(filesystem: FileSystem, place: Place) -> None:
    """Ask a site for nothing more, as fsspec's client has got what did not come here."""
    known = sites(filesystem)
    for name in [name for name, site in known.items() if site is place.site]:
        logger.debug("%s is read by fsspec's client from now on: its answers are unusual", name)
        known[name] = None


def get(place: Place, wanted: Wanted, asked: Asked) -> Mapping[str, Any]:
    """Ask for a range of a file, and put it where it belongs.

    Returns
    -------
    Mapping
        What the answer tells of the whole file, in the words of ``FileSystem.info``.

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
    wanted = Wanted(0, [memoryview(buffer)])
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
        if answer.status != 200 or length is None:
            raise UnusualAnswer
        answer.read()
        return _told(answer, int(length))


def _check(answer: HTTPResponse, site: _Site) -> None:
    """Refuse an answer that stands for an error, or holds a file in other bytes than the stored ones."""
    status = answer.status
    if status_may_pass(status):
        raise AnswerError(answer)
    if site.has_answered and status == 404:
        raise FileNotFoundError(status, answer.reason)
    if site.has_answered and status in (401, 403):
        raise PermissionError(f"{status} {answer.reason}")
    if status >= 300 or answer.getheader("Content-Encoding", "identity") != "identity":
        raise UnusualAnswer


def _told(answer: HTTPResponse, size: int | None) -> dict[str, Any]:
    told = {"mimetype": answer.getheader("Content-Type"), "ETag": answer.getheader("ETag")}
    told["Last-Modified"] = answer.getheader("Last-Modified")
    return {"size": size, **{name: value for name, value in told.items() if value}}


# ---------------------------------------------------------------------------------------------------------------------
# Sites


class _Found(NamedTuple):
    """A file, as a file system spells it."""

    name: str
    """Of its site: a URL without secrets."""
    rest: str
    """Of its address, after that of the site."""
    make: Callable[[], _Site]
    """Makes the site."""


def _make(filesystem: FileSystem, found: _Found) -> _Site | None:
    try:
        site = found.make()
    except _CannotMap as error:
        logger.debug("%s is read by fsspec's client: %s", found.name, error)
    except Exception as error:  # noqa: BLE001 - fsspec's client will say what is wrong, if anything is
        logger.debug("%s is read by fsspec's client: %s", found.name, type(error).__name__)
    else:
        weakref.finalize(filesystem, site.connections.close)
        return site
    return None


# S3


def _find_s3(filesystem: FileSystem, path: str) -> _Found:
    bucket, key, version = filesystem.split_path(path)
    rest = "/" + quote(key, safe="/~") + (f"?versionId={quote(version, safe='')}" if version else "")
    return _Found(f"s3://{bucket}", rest, lambda: _s3_site(filesystem, bucket))


_S3_NOT_KEPT = frozenset(
    {"range", "authorization", "x-amz-date", "x-amz-security-token", "accept-encoding", "host", "content-length"}
    | {"amz-sdk-invocation-id", "amz-sdk-request"}
)
"""Headers that differ from request to request."""


def _s3_site(filesystem: FileSystem, bucket: str) -> _Site:
    """Make a site that asks as this client does: at the same address, signing in the same way with the same key."""
    key = f"probe-{uuid.uuid4().hex}"
    client, sent = sync(filesystem.loop, _catch_request, filesystem, bucket, key)
    if sent is None:
        raise _CannotMap("it sends nothing")
    if not sent.url.endswith(f"/{key}"):
        raise _CannotMap("its addresses are unusual")
    headers = {name.lower(): _text(value) for name, value in sent.headers.items()}
    sign = _s3_signing(filesystem, client, sent.url, headers) if "authorization" in headers else None
    kept = {name: value for name, value in headers.items() if name not in _S3_NOT_KEPT}

    def make_headers(url: str, byte_range: str) -> Mapping[str, str]:
        asking = {**kept, "range": byte_range}
        return {**(asking if sign is None else sign(url, asking)), "accept-encoding": "identity"}

    settings = client.meta.config
    timeouts = Timeouts(settings.connect_timeout, settings.read_timeout, None)
    connections = Connections(timeouts, _s3_tls(client, sent.url))
    return _Site(sent.url.removesuffix(f"/{key}"), make_headers, connections, is_web=False)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


async def _catch_request(filesystem: FileSystem, bucket: str, key: str) -> tuple[Any, Any]:
    """Let a client make a request, and return both when it is about to send it. It is never sent."""
    await filesystem.set_session()
    client = await filesystem.get_s3(bucket)
    caught: list[Any] = []

    def catch(request: Any, **_: Any) -> None:
        if key in request.url:
            caught.append(request)
            raise _CannotMap("a request that is not to be sent")

    client.meta.events.register_first("before-send.s3.GetObject", catch)
    try:
        with suppress(Exception):  # what was caught tells whether all is well
            await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0", **filesystem.req_kw)
    finally:
        client.meta.events.unregister("before-send.s3.GetObject", catch)
    return client, caught[0] if caught else None


def _s3_tls(client: Any, url: str) -> ssl.SSLContext | None:
    """Return how a client checks certificates; refuse where it connects in a way that has to be arranged for."""
    session = client._endpoint.http_session
    if session._proxy_config.proxy_url_for(url) is not None:
        raise _CannotMap("it uses a proxy")
    if client.meta.config.client_cert is not None:
        raise _CannotMap("it shows a certificate")
    if not url.startswith("https:"):
        return None
    if not session._verify:
        raise _CannotMap("it does not check certificates")
    path = import_module("botocore.httpsession").get_cert_path(session._verify)
    return ssl.create_default_context(cafile=path)


def _s3_signing(
    filesystem: FileSystem, client: Any, url: str, headers: Mapping[str, str]
) -> Callable[[str, dict[str, str]], Mapping[str, str]]:
    """Return what signs requests as a client has signed this one, always with the keys of the day.

    botocore itself takes ten times as long to sign as the rest of a request takes.
    """
    pattern = r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/([^/,]+)/s3/aws4_request, SignedHeaders=([^,]+), Signature="
    found = re.match(pattern, headers["authorization"])
    if found is None:
        raise _CannotMap("it signs in another way")
    region, names = found.groups()
    credentials = client._request_signer._credentials
    keys = sync(filesystem.loop, credentials.get_frozen_credentials)
    expire = isinstance(credentials, import_module("botocore.credentials").RefreshableCredentials)

    def sign(url: str, headers: dict[str, str]) -> Mapping[str, str]:
        now = sync(filesystem.loop, credentials.get_frozen_credentials) if expire else keys
        signed = {**headers, "x-amz-date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())}
        if now.token:
            signed["x-amz-security-token"] = now.token
        return {**signed, "authorization": _s3_authorization(now, region, url, signed)}

    # It must come to the same.
    signed = {name: headers[name] for name in names.split(";") if name in headers}
    if _s3_authorization(keys, region, url, signed) != headers["authorization"]:
        raise _CannotMap("it signs with keys of its own, or in another way")
    return sign


def _s3_authorization(keys: Any, region: str, url: str, headers: Mapping[str, str]) -> str:
    """Sign a request for an object by version 4 of Amazon's signatures."""
    address = urlsplit(url)
    signed = {name: value for name, value in headers.items() if name != "user-agent"} | {"host": address.netloc}
    names = ";".join(sorted(signed))
    lines = [f"{name}:{' '.join(signed[name].split())}" for name in sorted(signed)]
    request = "\n".join(["GET", address.path, address.query, *lines, "", names, headers["x-amz-content-sha256"]])
    day = headers["x-amz-date"][:8]
    scope = f"{day}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{headers['x-amz-date']}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{keys.secret_key}".encode()
    for part_of_scope in (day, region, "s3", "aws4_request", text):
        key = hmac.digest(key, part_of_scope.encode(), "sha256")
    return f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature={key.hex()}"


# HTTP


def _find_http(filesystem: FileSystem, path: str) -> _Found | None:
    url = filesystem.encode_url(path)
    if url.user is not None or url.password is not None:
        return None
    address = str(url.origin())
    return _Found(address, url.raw_path_qs, lambda: _http_site(filesystem, address))


def _http_site(filesystem: FileSystem, address: str) -> _Site:
    options = {**filesystem.client_kwargs, **filesystem.kwargs}
    if unknown := options.keys() - {"headers", "timeout"}:
        raise _CannotMap(f"of {', '.join(sorted(unknown))}")
    if filesystem.get_client is not careful_client:
        raise _CannotMap("of get_client")
    given = {**filesystem.client_kwargs.get("headers", {}), **filesystem.kwargs.get("headers", {})}
    headers = {"user-agent": "dask-embedding-reader", "accept": "*/*"}
    headers |= {str(name).lower(): str(value) for name, value in given.items()}
    # Compressed on the way, a file has other bytes at these positions.
    headers |= {"accept-encoding": "identity"}
    timeouts = Timeouts(STALL_SECONDS, STALL_SECONDS, None)
    if "timeout" in options:
        timeout = options["timeout"]
        if timeout.connect is not None:
            raise _CannotMap("of a timeout of another kind")
        timeouts = Timeouts(timeout.sock_connect or timeout.total, timeout.sock_read or timeout.total, timeout.total)

    def make_headers(url: str, byte_range: str) -> Mapping[str, str]:
        del url
        return {**headers, "range": byte_range} if byte_range else headers

    return _Site(address, make_headers, Connections(timeouts), is_web=True)


_FINDERS: dict[str, Callable[[FileSystem, str], _Found | None]] = {
    # By name: none of these needs to be installed. Exactly these classes: another one may read in another way.
    "s3fs.core.S3FileSystem": _find_s3,
    "fsspec.implementations.http.HTTPFileSystem": _find_http,
}


def _start_afresh() -> None:
    """Forget a lock that a thread of the parent may hold; sites belong to file systems, which are made anew."""
    global _making  # noqa: PLW0603 - nobody else is there yet
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
