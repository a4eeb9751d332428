"""Requests to web servers, whose answers are received where they belong, in as many threads as ask.

fsspec's clients receive all bytes in the one thread of an event loop, block by block in new memory, from where they are
copied. ``http.client`` has the operating system put them into the caller's own memory, without Python's lock.
"""

from __future__ import annotations

import socket
import ssl
import string
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, parse_headers
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from dask_embedding_reader.storage.connections import MOST_INTERIM, Asked, headers_for
from dask_embedding_reader.storage.retries import EndlessAnswerError

_FRESH_SECONDS = 1.0
"""So soon after an answer no server ends a connection without having said so."""

_IDLE_SECONDS = 15.0
"""How long a connection is kept for the next request: what lies between may have forgotten it then."""

_MOST_IDLE = 64
"""How many connections to one server are kept."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 10
_SHORT_NBYTES = 2**16
"""The body of a redirect is read if it is no longer: its connection can be used again then."""


class Timeouts(NamedTuple):
    """How many seconds are waited; None: for ever."""

    connect: float | None
    """For a connection."""
    read: float | None
    """For the next bytes."""
    total: float | None
    """For a whole answer."""


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int | None


class Connections:
    """Connections to web servers, each for one request at a time, and kept for the next one."""

    def __init__(self, timeouts: Timeouts, tls: ssl.SSLContext | None = None) -> None:
        self.timeouts = timeouts
        self._tls = tls  # how certificates are checked, if not as usual
        self._idle: dict[_Origin, list[tuple[float, HTTPConnection]]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def ask(self, method: str, url: str, headers: Mapping[str, str], asked: Asked) -> Iterator[HTTPResponse]:
        """Send a request, and give the answer to a block, which reads its body.

        Raises
        ------
        OSError
            If there is no connection, or it fails.
        """
        split = urlsplit(url)
        origin = _Origin(split.scheme, split.hostname or "", split.port)
        connection = self._take(origin) or self._connect(origin)
        is_useful = False
        try:
            with asked.wakes(connection.sock):
                target = (split.path or "/") + (f"?{split.query}" if split.query else "")
                connection.request(method, target, headers=dict(headers))
                with closing(connection.getresponse()) as answer:
                    yield answer
                    # All was read, and the server goes on listening.
                    is_useful = answer.isclosed() and connection.sock is not None
        except HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from None
        finally:
            if is_useful:
                self._keep(origin, connection)
            else:
                connection.close()

    @contextmanager
    def ask_and_follow(self, method: str, url: str, headers: Mapping[str, str], asked: Asked) -> Iterator[HTTPResponse]:
        """Send a request as :meth:`ask` does, and again to where the server points, if it does."""
        for _ in range(_MOST_REDIRECTS):
            with self.ask(method, url, headers, asked) as answer:
                location = answer.getheader("Location") if answer.status in _REDIRECTS else None
                if location is None:
                    yield answer
                    return
                answer.read(_SHORT_NBYTES)
            # As browsers do: some servers write names as they are, in UTF-8, of which ``http.client`` makes Latin-1.
            here, url = url, urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1"))
            headers = headers_for(url, here, headers)
        raise ConnectionError(f"the server points elsewhere, more than {_MOST_REDIRECTS} times")

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            kept, self._idle = [*self._idle.values()], {}
        for idle in kept:
            for _, connection in idle:
                connection.close()

    def _take(self, origin: _Origin) -> HTTPConnection | None:
        """Take the connection that was used last, if it still stands."""
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    return None
                since, connection = idle.pop()
            idle_seconds = time.monotonic() - since
            if idle_seconds < _FRESH_SECONDS:
                return connection
            if idle_seconds < _IDLE_SECONDS and _stands(connection.sock):
                connection.sock.settimeout(self.timeouts.read)
                return connection
            connection.close()

    def _keep(self, origin: _Origin, connection: HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            idle.append((time.monotonic(), connection))
            # The one that was used last is used next: those that are not needed grow old at the other end.
            oldest = idle.pop(0)[1] if len(idle) > _MOST_IDLE else None
        if oldest is not None:
            oldest.close()

    def _connect(self, origin: _Origin) -> HTTPConnection:
        timeout = self.timeouts.connect
        if origin.scheme == "https":
            self._tls = self._tls or ssl.create_default_context()
            connection: HTTPConnection = HTTPSConnection(origin.host, origin.port, timeout=timeout, context=self._tls)
        elif origin.scheme == "http":
            connection = HTTPConnection(origin.host, origin.port, timeout=timeout)
        else:
            raise ConnectionError(f"the server points to an address of the kind {origin.scheme!r}")
        connection.response_class = _Answer
        connection.connect()
        connection.sock.settimeout(self.timeouts.read)
        return connection


class _Answer(HTTPResponse):
    """An answer before which a server may say "100 Continue" and the like a few times, but not for ever."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MOST_INTERIM):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == 101:
                return version, status, reason
            parse_headers(self.fp)
        raise EndlessAnswerError


def _stands(connection: socket.socket) -> bool:
    """Tell whether a connection that nobody uses still stands: nothing may have come, not even its end."""
    connection.settimeout(0)
    try:
        socket.socket.recv(connection, 1, socket.MSG_PEEK)  # beneath TLS
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
