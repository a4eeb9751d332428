"""A server that fails on purpose: a proxy in front of a healthy one, over HTTP or S3.

``faulty(url)`` starts it; ``proxy.url`` is its address. What goes wrong is told request by request (``proxy.faults``),
or left to chance (``proxy.share`` of all requests, by each of ``FAULTS`` in turn). ``proxy.requests`` is its access
log. Besides, it may answer late (``proxy.latency``), know no ranges, or keep quiet about versions.
``proxy.behave()`` makes it healthy again.
"""

from __future__ import annotations

import http.client
import http.server
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """One line of the access log."""

    method: str
    path: str
    #: The ``Range`` header.
    range: str | None
    #: What was done to it; None where it was answered as it should be.
    fault: str | None
    #: Bytes of the body.
    nbytes: int = 0


class Answer(NamedTuple):
    """What the healthy server answers."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Proxy:
    """How the server behaves; all of it may be changed while it runs."""

    upstream: str
    url: str = ""
    #: Faults to come, each used up by one request for a range of a file.
    faults: list[str] = field(default_factory=list)
    #: What happens to every request.
    every: str | None = None
    #: The end of paths that never go wrong.
    healthy: str | None = None
    #: How many of all requests go wrong.
    share: float = 0.0
    #: Seconds before each answer.
    latency: float = 0.0
    #: Whether it obeys ``Range``.
    ranges: bool = True
    #: Header fields that it leaves out of answers, such as ``etag``.
    silent_about: frozenset[str] = frozenset()
    #: Called with the path of each upload and its first bytes when half of it is here: True cuts it off there.
    halfway: Callable[[str], bool] | None = None
    #: Called with each request before it is answered.
    before: Callable[[Asked], object] | None = None
    #: How many clients wait at the moment for what never comes.
    waiting: int = 0
    requests: list[Asked] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))
    turn: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    def behave(self) -> None:
        """Answer as the healthy server does, and forget what was asked."""
        self.every = self.healthy = None
        self.faults, self.share, self.latency = [], 0.0, 0.0
        self.ranges, self.silent_about, self.before, self.halfway = True, frozenset(), None, None
        self.random.seed(0)
        self.requests.clear()

    def choose(self, method: str, path: str, ranged: bool) -> str | None:
        """The fault of one request."""
        if self.healthy is not None and path.endswith(self.healthy):
            return None
        with self.lock:
            if self.every is not None:
                return self.every
            if ranged and self.faults:
                return self.faults.pop(0)
            if self.random.random() < self.share:
                # Of an answer without a body nothing is missing, and how long a listing is nobody knows.
                usable = [k for k in FAULTS if ranged or k not in OF_A_RANGE] if method == "GET" else list(STATUSES)
                self.turn += 1
                return usable[self.turn % len(usable)]
        return None

    @property
    def reads(self) -> list[Asked]:
        """The requests for ranges of files."""
        return [asked for asked in self.requests if asked.range is not None]

    @property
    def failed(self) -> list[Asked]:
        """The requests that went wrong."""
        return [asked for asked in self.requests if asked.fault is not None]


#: Smaller bodies are questions, not files.
_UPLOAD_NBYTES = 2_000


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Tests have better use for stderr."""

    def _handle(self) -> None:
        proxy = self.proxy
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length // 2)
        if proxy.halfway is not None and length > _UPLOAD_NBYTES and proxy.halfway(f"{self.path} {body[:400]!r}"):
            proxy.requests.append(Asked(self.command, self.path, None, "cut", len(body)))
            self.hang_up(reset=True)
            return
        body += self.rfile.read(length - len(body))
        asked_range = self.headers.get("Range")
        fault = proxy.choose(self.command, self.path, asked_range is not None)
        asked = Asked(self.command, self.path, asked_range, fault)
        if proxy.before is not None:
            proxy.before(asked)
        if proxy.latency:
            time.sleep(proxy.latency)
        answer = _forward(proxy, self.command, self.path, self.headers, body)
        proxy.requests.append(asked._replace(nbytes=len(answer.body)))
        with suppress(ConnectionError):  # the client has had enough
            (_ALL[fault] if fault else _Handler.send)(self, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 - http.server calls them so

    def send_head(self, answer: Answer, **changed: str) -> None:
        """Send the head of an answer."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, changed.get(name.lower().replace("-", "_"), value))
        self.end_headers()
        self.wfile.flush()

    def send(self, answer: Answer) -> None:
        """Send a whole answer."""
        self.send_head(answer)
        self.wfile.write(answer.body)

    def hang_up(self, reset: bool = False) -> None:
        """Close the connection, with a reset if wanted."""
        self.close_connection = True
        if reset:  # lingering for no time makes close() send one
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def stall(self) -> None:
        """Send nothing any more until the client gives up."""
        self.close_connection = True
        self.connection.settimeout(0.05)
        with self.proxy.lock:
            self.proxy.waiting += 1
        try:
            while not self.proxy.stopped.is_set():
                with suppress(TimeoutError):
                    if not self.connection.recv(1):
                        return
        finally:
            with self.proxy.lock:
                self.proxy.waiting -= 1


def _forward(proxy: Proxy, method: str, path: str, headers: Message, body: bytes) -> Answer:
    address = urllib.parse.urlsplit(proxy.upstream)
    dropped = {"connection", "accept-encoding"} | (set() if proxy.ranges else {"range"})
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.request(method, path, body or None, {k: v for k, v in headers.items() if k.lower() not in dropped})
        response = connection.getresponse()
        content = response.read()
        hidden = {"connection", "transfer-encoding", "content-length", *proxy.silent_about}
        kept = [(k, v) for k, v in response.getheaders() if k.lower() not in hidden]
        length = response.headers.get("Content-Length") if method == "HEAD" else str(len(content))
        return Answer(response.status, [*kept, ("Content-Length", length or "0")], content)
    finally:
        connection.close()


# --------------------------------------------------------------------------------------------------------------------
# Faults


def _status(status: int, *headers: tuple[str, str]) -> Callable[[_Handler, Answer], None]:
    def refuse(handler: _Handler, answer: Answer) -> None:
        handler.send(Answer(status, [*headers, ("Content-Length", "0")], b""))

    return refuse


def _reset(handler: _Handler, answer: Answer) -> None:
    handler.hang_up(reset=True)


def _reset_halfway(handler: _Handler, answer: Answer) -> None:
    handler.send_head(answer)
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.hang_up(reset=True)


def _truncated(handler: _Handler, answer: Answer) -> None:
    """Promises a whole body, and hangs up in the middle of it."""
    handler.send_head(answer)
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.hang_up()


def _shorter(handler: _Handler, answer: Answer) -> None:
    """A whole answer that holds fewer bytes than were asked for."""
    body = answer.body[: len(answer.body) // 2]
    handler.send_head(answer, content_length=str(len(body)))
    handler.wfile.write(body)


def _longer(handler: _Handler, answer: Answer) -> None:
    """A whole answer that holds more bytes than were asked for."""
    body = answer.body + bytes(8)
    handler.send_head(answer, content_length=str(len(body)))
    handler.wfile.write(body)


def _other_range(handler: _Handler, answer: Answer) -> None:
    """As many bytes as were asked for, from another place of the file."""
    headers = dict(answer.headers)
    place = next((value for name, value in headers.items() if name.lower() == "content-range"), "bytes 0-0/1")
    first, _, rest = place.removeprefix("bytes ").partition("-")
    last, _, size = rest.partition("/")
    handler.send_head(answer, content_range=f"bytes {int(first) + 8}-{int(last) + 8}/{size}")
    handler.wfile.write(bytes(len(answer.body)))


def _stalled(handler: _Handler, answer: Answer) -> None:
    handler.stall()


def _stalled_halfway(handler: _Handler, answer: Answer) -> None:
    handler.send_head(answer)
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.wfile.flush()
    handler.stall()


STATUSES: dict[str, Callable[[_Handler, Answer], None]] = {
    "429": _status(429, ("Retry-After", "0")),
    "500": _status(500),
    "502": _status(502),
    "503": _status(503),
    "504": _status(504),
    "reset": _reset,
}

#: What can go wrong with one request on the way to a healthy server, and right with the next.
FAULTS: dict[str, Callable[[_Handler, Answer], None]] = {
    **STATUSES,
    "reset halfway": _reset_halfway,
    "truncated": _truncated,
    "shorter": _shorter,
    "longer": _longer,
    "other range": _other_range,
    "stalled": _stalled,
    "stalled halfway": _stalled_halfway,
}

#: What will not change, however often it is asked for.
REFUSALS: dict[str, Callable[[_Handler, Answer], None]] = {
    "401": _status(401),
    "403": _status(403),
    "404": _status(404),
}

#: A server that wants to be left alone for a while.
BUSY = {"busy": _status(429, ("Retry-After", "7"))}

_PAGE = b"<html>" + b"log in " * 10_000


def _page(handler: _Handler, answer: Answer) -> None:
    """A page for people, as from who stands before a server and wants to know who asks."""
    handler.send(Answer(200, [("Content-Type", "text/html"), ("Content-Length", str(len(_PAGE)))], _PAGE))


def _page_of_any_length(handler: _Handler, answer: Answer) -> None:
    handler.send_head(Answer(200, [("Content-Type", "text/html"), ("Transfer-Encoding", "chunked")], b""))
    handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(_PAGE), _PAGE))


def _part_of_no_place(handler: _Handler, answer: Answer) -> None:
    headers = [(name, value) for name, value in answer.headers if name.lower() != "content-range"]
    handler.send(answer._replace(headers=headers))


#: What does not tell which bytes of the file it brings.
PLACELESS = {"no content-range": _part_of_no_place}

#: What comes in the place of a file.
PAGES = {"page": _page, "page of any length": _page_of_any_length}

#: What only shows where somebody knows what should come.
OF_A_RANGE = frozenset({"shorter", "longer", "other range"})

_ALL = FAULTS | REFUSALS | BUSY | PAGES | PLACELESS


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def shutdown_request(self, request: Any) -> None:
        """Close at once: saying goodbye first would make a reset an orderly end."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up, and faults close sockets on purpose."""


@contextmanager
def faulty(upstream: str, **behaviour: Any) -> Iterator[Proxy]:
    """Start a proxy; its URL ends as that of the healthy server, without a slash."""
    proxy = Proxy(upstream, **behaviour)
    handler = type("_HandlerOfOneProxy", (_Handler,), {"proxy": proxy})
    with _Server(("127.0.0.1", 0), handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.stopped.set()
            server.shutdown()
            thread.join()
