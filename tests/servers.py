"""Real servers for the tests: nginx, a small Python HTTP server that can misbehave, and S3 by moto.

Each is a context manager that starts the server on a free port of this machine, waits until it answers and stops it
again. ``nginx_available`` and ``s3_available`` say whether the machine can start them.
"""

from __future__ import annotations

import http.server
import importlib.util
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Only ever valid on servers of this module.
S3_KEY = "test-access-key"
S3_SECRET = "test-secret-that-nobody-may-see"


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def _process(command: Sequence[str], port: int, log: Path, **environment: str) -> Iterator[None]:
    """Run a server until the end of the block; wait first until its port accepts connections."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --------------------------------------------------------------------------------------------------------------------
# nginx


def _nginx_program() -> str | None:
    # Debian puts it where only root's PATH leads.
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


nginx_available = _nginx_program() is not None


@contextmanager
def nginx(root: Path) -> Iterator[str]:
    """Serve a folder with listings (``autoindex``) and ranges; the URL ends without a slash."""
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
            events {{ worker_connections 128; }}
            http {{
              types {{}} default_type application/octet-stream; charset utf-8;
              access_log off; {temporary}
              server {{ listen 127.0.0.1:{port}; root "{root}"; autoindex on; autoindex_exact_size on; }}
            }}
            """
        )
        command = [program, "-p", str(work), "-e", str(work / "error.log"), "-c", str(work / "nginx.conf")]
        with _process(command, port, work / "log"):
            yield f"http://127.0.0.1:{port}"


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
        start, stop = self._range(len(content))
        partial = (start, stop) != (0, len(content))
        if start >= stop and content:
            self._refuse(416)
            return
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(stop - start))
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


class _QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up, and faults close sockets on purpose."""


@contextmanager
def http_files(root: Path, **behaviour: Any) -> Iterator[HttpServer]:
    """Serve single files of a folder; folders answer 404."""
    served = HttpServer(root, **behaviour)
    handler = type("_HandlerOfOneServer", (_Handler,), {"served": served})
    with _QuietServer(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


# --------------------------------------------------------------------------------------------------------------------
# S3

s3_available = all(importlib.util.find_spec(name) is not None for name in ("moto", "flask", "flask_cors"))


@dataclass(frozen=True, slots=True)
class S3Server:
    """An S3 service with one bucket."""

    endpoint: str
    bucket: str = "test-bucket"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What s3fs needs to reach it."""
        return {
            "key": S3_KEY,
            "secret": S3_SECRET,
            "client_kwargs": {"endpoint_url": self.endpoint, "region_name": "us-east-1"},
        }

    def put(self, key: str, content: bytes) -> str:
        """Store an object, return its URL."""
        self._send(f"{self.bucket}/{urllib.parse.quote(key)}", content)
        return f"s3://{self.bucket}/{key}"

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Store all files below a folder, return the URL of the prefix, without a slash at the end."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{self.bucket}/{prefix}"

    def make_bucket(self) -> None:
        """Create the bucket."""
        self._send(self.bucket, b"")

    def _send(self, address: str, content: bytes) -> None:
        request = urllib.request.Request(f"{self.endpoint}/{address}", data=content, method="PUT")
        # A signature is not checked, but without a mention of a key moto takes the sender for a stranger.
        request.add_header("Authorization", f"AWS {S3_KEY}:unchecked")
        # What urllib sends by default makes the server parse the content as a form.
        request.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(request, timeout=30):
            pass


@contextmanager
def s3() -> Iterator[S3Server]:
    """An S3 service in a process of its own, as its many threads and warnings are not the test's."""
    assert s3_available, "moto, flask and flask-cors are not installed"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="moto-") as work:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with _process(command, port, Path(work) / "log", PYTHONWARNINGS="ignore"):
            server = S3Server(f"http://127.0.0.1:{port}")
            server.make_bucket()
            yield server
