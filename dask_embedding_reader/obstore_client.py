"""Byte ranges from S3 and over HTTP by ``obstore``, where it is installed: it needs less of the processor than s3fs.

It takes the part of a client only where it would ask for the same in the same name: what s3fs sends is looked at, not
guessed from its options. Whatever is out of the ordinary is left to fsspec's client, which also has the last word when
obstore meets with a refusal: every error that a user sees is as it would be without obstore.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from importlib import import_module
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fsspec.asyn import sync

from dask_embedding_reader.connections import STALL_SECONDS, FileSystem, class_name

logger = logging.getLogger("dask_embedding_reader")

_BLOCK_NBYTES = 2**19
"""Bodies are copied in blocks of this size, which the processor's cache still holds."""

_NO_LIMIT = timedelta(days=365)
"""Of the time for a whole answer: none, but obstore has to be told something."""

_STORES = "_dask_embedding_reader_stores"

_making = threading.Lock()
_useless = False
"""Whether this is a fork of a process that had obstore, whose threads no fork copies."""


class UnusualAnswer(Exception):  # noqa: N818 - it is no error before fsspec's client says so
    """What obstore made of a request; fsspec's client has to be asked, too. Nothing was read yet."""


class AnswerError(OSError):
    """A server's answer that stands for a failure."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.status = status


class _CannotMap(Exception):  # noqa: N818
    """Something that obstore is not known to do just as fsspec's client does."""


class Place(NamedTuple):
    """A file within a store."""

    store: _Store
    """The bucket or web server."""
    key: str
    """The name of the file there."""
    version: str | None
    """The version that was named in the path, if any."""

    @property
    def is_web(self) -> bool:
        """Whether it is on a web server, not in a bucket."""
        return self.store.name.startswith("http")


class _Store:
    """A bucket or web server, and whether it ever answered: if it did, so far all options were understood."""

    def __init__(self, name: str, store: Any) -> None:
        self.name, self.store = name, store
        self.has_answered = False


def find_place(filesystem: FileSystem, path: str) -> Place | None:
    """Return where obstore finds a file of a connected file system; None where fsspec's client has to read it."""
    find = _FINDERS.get(class_name(filesystem))
    if find is None or _useless:
        return None
    name, key, version, make = find(filesystem, path)
    # Where a key is no path as obstore spells it, it would ask for another one.
    if not key.isprintable() or any(part in ("", ".", "..") for part in key.split("/")):
        return None
    stores: dict[str, _Store | None] = filesystem.__dict__.setdefault(_STORES, {})
    if name not in stores:
        with _making:
            if name not in stores:
                stores[name] = _make(name, make)
    store = stores[name]
    return None if store is None else Place(store, key, version)


def leave_to_fsspec(filesystem: FileSystem, place: Place) -> None:
    """Read no more from a store by obstore, as fsspec's client has got what obstore has not."""
    logger.debug("%s is read by fsspec's client from now on: obstore cannot", place.store.name)
    filesystem.__dict__[_STORES][place.store.name] = None


def get(place: Place, start: int, stop: int, put: Callable[[bytes], object]) -> Mapping[str, Any]:
    """Ask for the bytes ``[start, stop)`` of a file, and put them block by block.

    It waits here rather than in an event loop: to hand over each block there costs more than to receive it, and threads
    of obstore, which then call Python, abort a program that ends at that moment.

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
    options = {"range": (start, stop), **({"version": place.version} if place.version else {})}
    try:
        answer = import_module("obstore").get(place.store.store, place.key, options=options)
    except Exception as error:  # noqa: BLE001 - translated
        raise _translated(error, place) from None
    if place.is_web and answer.attributes.get("Content-Encoding", "identity") != "identity":
        raise UnusualAnswer  # aiohttp knows how to unpack it
    place.store.has_answered = True
    try:
        for block in answer.stream(min_chunk_size=_BLOCK_NBYTES):
            put(block)
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise  # the caller's own
        raise (TimeoutError if _timed_out(error) else ConnectionError)(_first_line(error)) from None
    return _told(answer.meta)


def head(place: Place) -> Mapping[str, Any]:
    """Ask what a file is, in the words of ``FileSystem.info``; whatever is raised is for fsspec's client to explain."""
    return _told(import_module("obstore").head(place.store.store, place.key))


def _told(meta: Mapping[str, Any]) -> dict[str, Any]:
    told = {"size": meta["size"]}
    if meta["e_tag"]:
        told["ETag"] = meta["e_tag"]
    if meta["last_modified"].timestamp():  # else the answer does not tell
        told["LastModified"] = meta["last_modified"]
    return told


def _translated(error: Exception, place: Place) -> Exception:
    """Say what obstore says as fsspec's clients do: without its long text, which shows what was sent."""
    found = re.search(r"status code: (\d{3})([^:\n]*)", str(error))
    status = int(found.group(1)) if found else 0
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
        return AnswerError(status, found.group(2).strip() if found else "")
    if place.store.has_answered:
        if status == 404:
            return FileNotFoundError(place.key)
        if status in (401, 403) and found:
            return PermissionError(f"{status}{found.group(2)}")
        if re.search(r"error sending request|Requested [\d.]+, got ", str(error)):
            return (TimeoutError if _timed_out(error) else ConnectionError)(_first_line(error))
    return UnusualAnswer()


def _timed_out(error: Exception) -> bool:
    return "TimedOut" in str(error) or "kind: Timeout" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rpartition(": ")[2] + (" (timeout)" if _timed_out(error) else "")


# ---------------------------------------------------------------------------------------------------------------------
# Stores


def _make(name: str, make: Callable[[], Any]) -> _Store | None:
    try:
        import_module("obstore.store")
        if set(urllib.request.getproxies()) - {"no"}:
            raise _CannotMap("the environment names a proxy")
        return _Store(name, make())
    except ImportError:
        return None
    except _CannotMap as error:
        logger.debug("%s is read by fsspec's client, not by obstore: %s", name, error)
    except Exception as error:  # noqa: BLE001 - fsspec's client will say what is wrong, if anything is
        logger.debug("%s is read by fsspec's client, not by obstore: %s", name, type(error).__name__)
    return None


def _client_options(total: float | None, connect: float | None, read: float | None, **more: Any) -> dict[str, Any]:
    return {
        "timeout": timedelta(seconds=total) if total else _NO_LIMIT,
        "connect_timeout": timedelta(seconds=connect) if connect else _NO_LIMIT,
        "read_timeout": timedelta(seconds=read) if read else _NO_LIMIT,
        "allow_http": True,  # as the address says
        "allow_invalid_certificates": False,
        "http1_only": True,  # one connection a piece: several share the speed of one in HTTP/2
        **more,
    }


_RETRIES = {"max_retries": 0}
"""obstore's own would multiply with ours, unseen."""


class _Found(NamedTuple):
    """A file, as a file system spells it."""

    name: str
    """Of the store: a URL without secrets."""
    key: str
    version: str | None
    make: Callable[[], Any]
    """Connects to the store."""


# S3


def _find_s3(filesystem: FileSystem, path: str) -> _Found:
    bucket, key, version = filesystem.split_path(path)
    return _Found(f"s3://{bucket}", key, version, lambda: _s3_store(filesystem, bucket))


_S3_HEADERS = frozenset(
    {"user-agent", "range", "host", "accept-encoding", "content-length", "authorization", "amz-sdk-invocation-id"}
    | {"amz-sdk-request", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token", "x-amz-checksum-mode"}
    | {"x-amz-request-payer"}
)
"""What obstore sends as well, or what makes no difference to what is answered."""

_S3_VARIABLES = ("AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_", "AWS_PROXY_")
"""Beginnings of environment variables which obstore obeys and s3fs does not."""


def _s3_store(filesystem: FileSystem, bucket: str) -> Any:
    """Make a store that asks as this client does: at the same address, signing in the same way with the same key."""
    if variables := [name for name in os.environ if name.startswith(_S3_VARIABLES)]:
        raise _CannotMap(f"of {variables[0]}")
    key = f"probe-{uuid.uuid4().hex}"
    client, sent = sync(filesystem.loop, _catch_request, filesystem, bucket, key)
    if sent is None:
        raise _CannotMap("its client sends nothing")
    headers = {name.lower(): value for name, value in sent.headers.items()}
    if unknown := headers.keys() - _S3_HEADERS:
        raise _CannotMap(f"its client sends {', '.join(sorted(unknown))}")
    if not sent.url.endswith(f"/{key}"):
        raise _CannotMap("its addresses are unusual")
    _check_connections(client, sent.url)
    # With the bucket in it, whether as a part of the path or of the host's name.
    address = sent.url.removesuffix(f"/{key}")
    # What is not said here, obstore takes from the environment.
    config: dict[str, Any] = {
        "endpoint": address,
        "virtual_hosted_style_request": True,
        "skip_signature": "authorization" not in headers,
        "request_payer": _text(headers.get("x-amz-request-payer", "")) == "requester",
        "s3_express": False,
        "unsigned_payload": False,
    }
    if "AWS_ENDPOINT_URL_S3" in os.environ:
        config["aws_endpoint_url_s3"] = address
    provider = None
    if "authorization" in headers:
        config["region"], provider = _s3_signing(filesystem, client, _text(headers["authorization"]))
    settings = client.meta.config
    return import_module("obstore.store").S3Store(
        bucket,
        config=config,
        client_options=_client_options(None, settings.connect_timeout, settings.read_timeout),
        retry_config=_RETRIES,
        credential_provider=provider,
    )


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


def _check_connections(client: Any, url: str) -> None:
    """Refuse where a client connects in a way that has to be arranged for."""
    session = client._endpoint.http_session
    if url.startswith("https:") and session._verify is not True:
        raise _CannotMap("certificates are checked by a list of one's own, or not at all")
    if session._proxy_config.proxy_url_for(url) is not None:
        raise _CannotMap("a proxy is used")
    if client.meta.config.client_cert is not None:
        raise _CannotMap("the client shows a certificate")


def _s3_signing(filesystem: FileSystem, client: Any, authorization: str) -> tuple[str, Callable[[], dict[str, Any]]]:
    """Return the region that requests are signed for, and what gives the keys whenever they may have changed."""
    found = re.match(r"AWS4-HMAC-SHA256 Credential=([^,]+)/\d{8}/([^/,]+)/s3/aws4_request,", authorization)
    if found is None:
        raise _CannotMap("requests are signed in another way")
    used, region = found.groups()
    credentials = client._request_signer._credentials

    def provide() -> dict[str, Any]:
        keys = sync(filesystem.loop, credentials.get_frozen_credentials)
        expiry = getattr(credentials, "_expiry_time", None)
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            # botocore renews them in time, when asked.
            "expires_at": expiry and datetime.fromtimestamp(expiry.timestamp(), timezone.utc),
        }

    if provide()["access_key_id"] != used:
        raise _CannotMap("requests are signed with keys of their own")
    return region, provide


# HTTP


def _find_http(filesystem: FileSystem, path: str) -> _Found:
    url = filesystem.encode_url(path)
    address = urlsplit(str(url))
    plain = not (address.query or address.fragment or url.user or url.password)
    # Only names that every client spells in the same way.
    key = address.path[1:] if plain and re.fullmatch(r"/[\w.~/=@+,:-]*", address.path, re.ASCII) else ""
    name = f"{address.scheme}://{address.netloc.rpartition('@')[2]}"
    return _Found(name, key, None, lambda: _http_store(filesystem, name))


def _http_store(filesystem: FileSystem, address: str) -> Any:
    from fsspec.implementations.http import get_client  # noqa: PLC0415 - it needs aiohttp

    options = {**filesystem.client_kwargs, **filesystem.kwargs}
    if unknown := options.keys() - {"headers", "timeout"}:
        raise _CannotMap(f"of {', '.join(sorted(unknown))}")
    if filesystem.get_client is not get_client:
        raise _CannotMap("of get_client")
    headers = {**filesystem.client_kwargs.get("headers", {}), **filesystem.kwargs.get("headers", {})}
    limits: tuple[float | None, ...] = (None, STALL_SECONDS, STALL_SECONDS)
    if "timeout" in options:
        timeout = options["timeout"]
        limits = (timeout.total, timeout.sock_connect, timeout.sock_read)
        if timeout.connect is not None:
            raise _CannotMap("of a timeout of another kind")
    # Compressed on the way, a file has other bytes at these positions.
    headers = {str(name): str(value) for name, value in headers.items()} | {"Accept-Encoding": "identity"}
    return import_module("obstore.store").HTTPStore(
        address, client_options=_client_options(*limits, default_headers=headers), retry_config=_RETRIES
    )


_FINDERS: dict[str, Callable[[FileSystem, str], _Found]] = {
    # By name: none of these needs to be installed. Exactly these classes: another one may read in another way.
    "s3fs.core.S3FileSystem": _find_s3,
    "fsspec.implementations.http.HTTPFileSystem": _find_http,
}


def _start_afresh() -> None:
    """Leave obstore alone in a fork, and forget a lock that a thread of the parent may hold."""
    global _making, _useless  # noqa: PLW0603 - nobody else is there yet
    _making = threading.Lock()
    _useless = _useless or "obstore" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
