"""Real servers for the tests: nginx, a small Python HTTP server that can misbehave, and S3 by moto.

Each is a context manager that starts the server on a free port of this machine, waits until it answers and stops it
again. Other clouds are in ``clouds``, HDFS is in ``hadoop``.
"""

from __future__ import annotations

import gzip
import http.server
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

#: Only ever valid on servers of this module.
S3_KEY = "test-access-key"
S3_SECRET = "test-secret-that-nobody-may-see"


def require(available: bool, name: str, how: str = "make servers") -> None:
    """Skip the test where the server is not installed, saying so; where everything has to be there, fail."""
    import pytest  # not needed to start servers, as the benchmarks do

    if not available:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed: `{how}` does it")


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def process(command: Sequence[str | Path], port: int, log: Path, **environment: str) -> Iterator[None]:
    """Run a server until the end of the block; wait first until its port accepts connections."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=log.parent, env={**os.environ, **environment}
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


# --------------------------------------------------------------------------------------------------------------------
# nginx


def _nginx_program() -> str | None:
    # Debian puts it where only root's PATH leads.
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


nginx_available = _nginx_program() is not None


class Logged(NamedTuple):
    """One request as the access log of nginx tells it."""

    method: str
    #: With the query, as the client sent it.
    path: str
    #: The ``Range`` header, empty where there was none.
    range: str
    status: int
    #: Length of the body that was sent.
    nbytes: int


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running nginx."""

    #: Without a slash at the end.
    url: str
    log: Path

    @contextmanager
    def counting(self) -> Iterator[list[Logged]]:
        """The requests that arrive within the block; the list is filled at its end."""
        before = len(self._requests())
        requests: list[Logged] = []
        yield requests
        requests += self._requests()[before:]

    def _requests(self) -> list[Logged]:
        # The one worker logs in order, each request when its answer is sent: once this one is logged, all are.
        mark = f"/mark-{uuid.uuid4().hex}"
        urllib.request.urlopen(f"{self.url}{mark}", timeout=10).close()
        deadline = time.monotonic() + 10
        while mark not in (text := self.log.read_text()):
            assert time.monotonic() < deadline, "nginx does not log"
            time.sleep(0.005)
        lines = (json.loads(line) for line in text.splitlines() if line)
        return [Logged(**line) for line in lines if not line["path"].startswith("/mark-")]


@contextmanager
def nginx_server(location: str) -> Iterator[Nginx]:
    """An nginx with one server, given the directives of its location ``/``."""
    program = _nginx_program()
    assert program is not None, "nginx is not installed"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        work = Path(name)
        # Started by root, nginx would read the files as another user, who may not enter the folders of a test.
        user = "user root;" if os.geteuid() == 0 else ""
        temporary = "".join(
            f"{kind}_temp_path {work}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (work / "nginx.conf").write_text(
            f"""
            daemon off; {user} pid {work}/pid; error_log {work}/error.log; worker_processes 1;
            events {{ worker_connections 512; }}
            http {{
              types {{}} default_type application/octet-stream; charset utf-8;
              sendfile on; tcp_nopush on; keepalive_requests 100000; {temporary}
              log_format request escape=json '{{"method": "$request_method", "path": "$request_uri", '
                '"range": "$http_range$http_x_ms_range", "status": $status, "nbytes": $body_bytes_sent}}';
              access_log {work}/access.log request;
              server {{
                listen 127.0.0.1:{port};
                location /mark- {{ return 204; }}
                location / {{ {location} }}
              }}
            }}
            """
        )
        command = [program, "-p", str(work), "-e", str(work / "error.log"), "-c", str(work / "nginx.conf")]
        with process(command, port, work / "log"):
            yield Nginx(f"http://127.0.0.1:{port}", work / "access.log")


@contextmanager
def nginx(root: Path, *, listing: bool = True, ranges: bool = True, extra: str = "") -> Iterator[Nginx]:
    """Serve a folder, with or without listings (``autoindex``) and ranges."""
    more = f"{'' if ranges else 'max_ranges 0;'} {extra}"
    with nginx_server(f'root "{root}"; autoindex {"on" if listing else "off"}; {more}') as server:
        yield server


@contextmanager
def nginx_before(url: str) -> Iterator[Nginx]:
    """Stand before another server, to count what is asked of it."""
    forward = (
        f'proxy_pass {url}; proxy_http_version 1.1; proxy_set_header Host $http_host; proxy_set_header Connection "";'
        "proxy_buffering off; proxy_request_buffering off; client_max_body_size 0;"
    )
    with nginx_server(forward) as server:
        yield server


# --------------------------------------------------------------------------------------------------------------------
# HTTP in Python: no listing, and as unreliable as a test wants it


@dataclass
class HttpServer:
    """A folder served file by file."""

    root: Path
    #: Without a slash at the end.
    url: str = ""
    #: Whether it obeys ``Range``; a server may ignore it and send the whole file.
    ranges: bool = True
    #: Whether it tells an ETag; some servers tell the time of the last change only.
    etags: bool = True
    #: Sends what it sends compressed, whatever the client takes.
    compresses: bool = False
    #: A request that carries no ``Authorization`` is refused.
    password_needed: bool = False
    #: Faults to come: each is used up by one GET. Names are those of ``FAULTS``.
    faults: list[str] = field(default_factory=list)
    #: Method, path with query, and the ``Range`` header of every request.
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def next_fault(self) -> str | None:
        """The fault of this request."""
        with self.lock:
            return self.faults.pop(0) if self.faults else None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: HttpServer

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Tests have better use for stderr."""

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _range(self, size: int) -> tuple[int, int]:
        asked = self.headers.get("Range") if self.served.ranges else None
        if asked is None or not asked.startswith("bytes="):
            return 0, size
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if not first:
            return max(size - int(last), 0), size
        return int(first), min(int(last) + 1, size) if last else size

    def _answer(self, with_body: bool) -> None:
        served = self.served
        served.requests.append((self.command, self.path, self.headers.get("Range")))
        if served.password_needed and not self.headers.get("Authorization"):
            self._refuse(401)
            return
        relative = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        path = served.root / relative
        if not path.is_file():
            self._refuse(404)
            return
        fault = served.next_fault() if with_body else None
        if fault is not None:
            FAULTS[fault](self)
            return
        content = path.read_bytes()
        if served.compresses:
            content = gzip.compress(content)
        start, stop = self._range(len(content))
        partial = (start, stop) != (0, len(content))
        if start >= stop and content:
            self._refuse(416)
            return
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(stop - start))
        if served.compresses:
            self.send_header("Content-Encoding", "gzip")
        if served.etags:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}-{len(content)}"')
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if served.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(content[start:stop])

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)


def _service_unavailable(handler: _Handler) -> None:
    handler._refuse(503)


def _too_many_requests(handler: _Handler) -> None:
    handler._refuse(429)


def _reset(handler: _Handler) -> None:
    handler.close_connection = True
    # Lingering for no time makes close() send a reset.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def _half_a_body(handler: _Handler) -> None:
    """Promises a whole body and hangs up in the middle of it."""
    handler.send_response(206)
    handler.send_header("Content-Length", "1000")
    handler.send_header("Content-Range", "bytes 0-999/1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 10)
    handler.close_connection = True


#: What can go wrong with one request on the way to a healthy server.
FAULTS: dict[str, Callable[[_Handler], None]] = {
    "503": _service_unavailable,
    "429": _too_many_requests,
    "reset": _reset,
    "half a body": _half_a_body,
}


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up, and faults close sockets on purpose."""


@contextmanager
def http_files(root: Path, **behaviour: Any) -> Iterator[HttpServer]:
    """Serve single files of a folder; folders answer 404."""
    served = HttpServer(root, **behaviour)
    handler = type("_HandlerOfOneServer", (_Handler,), {"served": served})
    with QuietServer(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def python_listing(root: Path) -> Iterator[str]:
    """Serve a folder with listings as ``python -m http.server`` does; return the URL, without a slash at the end."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            """Tests have better use for stderr."""

    with QuietServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


# --------------------------------------------------------------------------------------------------------------------
# FTP

FTP_USER, FTP_PASSWORD = "reader", "top-secret"


@dataclass
class FtpServer:
    """A folder behind FTP."""

    #: With the password, and without a slash at the end.
    url: str
    #: Sockets of clients, which a test may cut.
    clients: list[socket.socket] = field(default_factory=list)


@contextmanager
def ftp_files(folder: Path, permissions: str = "elr") -> Iterator[FtpServer]:
    """Serve a folder over FTP; the letters of permissions are those of pyftpdlib."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of asyncore and asynchat, which it is made of
        from pyftpdlib.authorizers import DummyAuthorizer
        from pyftpdlib.handlers import FTPHandler
        from pyftpdlib.servers import ThreadedFTPServer

    logging.getLogger("pyftpdlib").setLevel(logging.ERROR)
    clients: list[socket.socket] = []

    class Handler(FTPHandler):  # type: ignore[misc]
        def on_connect(self) -> None:
            clients.append(self.socket)

    Handler.authorizer = DummyAuthorizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it may be written to
        Handler.authorizer.add_user(FTP_USER, FTP_PASSWORD, str(folder), perm=permissions)

    class Server(ThreadedFTPServer):  # type: ignore[misc]
        poll_timeout = 0.05  # so long its end waits for a client that is silent, instead of a second

    server = Server(("127.0.0.1", 0), Handler)
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            server.serve_forever(timeout=0.05, blocking=False)
        server.close_all()  # here: closing while another thread accepts a client would lose that client's socket

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield FtpServer(f"ftp://{FTP_USER}:{FTP_PASSWORD}@127.0.0.1:{server.address[1]}", clients)
    finally:
        stopped.set()
        thread.join(10)


# --------------------------------------------------------------------------------------------------------------------
# Object stores


class ObjectStore(ABC):
    """A service with one bucket."""

    __slots__ = ()

    @property
    @abstractmethod
    def root(self) -> str:
        """URL of the bucket, without a slash at the end."""

    @property
    @abstractmethod
    def storage_options(self) -> dict[str, Any]:
        """What fsspec needs to reach it."""

    @abstractmethod
    def put(self, key: str, content: bytes) -> str:
        """Store an object, return its URL."""

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Store all files below a folder, return the URL of the prefix, without a slash at the end."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.root}/{prefix}"


def send(method: str, url: str, content: bytes = b"", **headers: str) -> None:
    """One request whose answer is of no interest, as long as it is no error."""
    # What urllib sends by default makes servers parse the content as a form.
    headers = {"Content-Type": "application/octet-stream", **{k.replace("_", "-"): v for k, v in headers.items()}}
    with urllib.request.urlopen(urllib.request.Request(url, content, headers, method=method), timeout=30):
        pass


s3_available = all(importlib.util.find_spec(name) is not None for name in ("moto", "flask", "flask_cors"))


@dataclass(frozen=True, slots=True)
class S3Server(ObjectStore):
    """An S3 service with one bucket. It tells strangers from those who have a key, but checks no signature."""

    endpoint: str
    bucket: str = "test-bucket"

    @property
    def root(self) -> str:
        """URL of the bucket."""
        return f"s3://{self.bucket}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What s3fs needs to reach it."""
        return {"key": S3_KEY, "secret": S3_SECRET, "client_kwargs": self.client_options}

    @property
    def client_options(self) -> dict[str, Any]:
        """Where it is."""
        return {"endpoint_url": self.endpoint, "region_name": "us-east-1"}

    def put(self, key: str, content: bytes) -> str:
        """Store an object."""
        self._send(f"{self.bucket}/{urllib.parse.quote(key)}", content)
        return f"{self.root}/{key}"

    def make_bucket(self, access: str = "private") -> None:
        """Create the bucket, or another one; ``public-read`` needs no credentials."""
        self._send(self.bucket, b"", access)

    def publish(self, key: str) -> None:
        """Let everybody read an object."""
        self._send(f"{self.bucket}/{urllib.parse.quote(key)}?acl", b"", "public-read")

    def _send(self, address: str, content: bytes, access: str = "private") -> None:
        # Without a mention of a key moto takes the sender for a stranger.
        authorization = f"AWS {S3_KEY}:unchecked"
        send("PUT", f"{self.endpoint}/{address}", content, Authorization=authorization, x_amz_acl=access)


@contextmanager
def s3() -> Iterator[S3Server]:
    """An S3 service in a process of its own, as its many threads and warnings are not the test's."""
    assert s3_available, "moto, flask and flask-cors are not installed"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="moto-") as work:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with process(command, port, Path(work) / "log", PYTHONWARNINGS="ignore"):
            server = S3Server(f"http://127.0.0.1:{port}")
            server.make_bucket()
            yield server
