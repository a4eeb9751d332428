"""Reading over HTTP and S3, from an nginx on this machine, whose files are in the page cache: clients are measured.

What S3 adds to HTTP is a listing, which is written beforehand here, and the client. Where a connection is limited,
nginx sends blocks of 1 MB with pauses between them: in larger ones, most of a piece would come before the first pause;
in smaller ones, it is too late after so many of them, as all connections share its one process.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.servers import nginx_available, nginx_server

from .contenders import Job, consume, contends, options
from .data import Data
from .floors import CAT_FILE, ONE_CONNECTION, OURS, REFERENCE
from .works import LIMITED_SHARE, Work

IN_FLIGHT = 16
_SERVER = "BENCHMARK_SERVER"
"""Environment variable with the address of the server."""


def is_remote(work: Work) -> bool:
    """Whether the work needs the server."""
    return work.name.startswith(("remote-", "rows-remote-"))


def why_not(work: Work) -> str | None:
    """Why the work cannot be done here, if so."""
    return "nginx is not installed" if is_remote(work) and not nginx_available else None


@contextmanager
def served(work: Work, data: Data) -> Iterator[None]:
    """Serve the files of a remote work under ``/files/`` and as an S3 bucket, and tell child processes where."""
    if not is_remote(work):
        yield
        return
    is_limited = work.name.endswith("-limited") or work.name.startswith("rows-")
    limit = "limit_rate 60m; sendfile_max_chunk 1m;" if is_limited else ""
    folder = data.folder(work.data)
    with TemporaryDirectory(prefix="bucket-") as name:
        (Path(name) / "bucket").write_text(listing(data.files(work.data)))
        locations = f"""
            {limit}
            location /files/ {{ alias "{folder}/"; autoindex on; }}
            location /bucket/emb/ {{ alias "{folder}/"; }}
            location = /bucket/emb {{ return 404; }}
            location = /bucket {{ root "{name}"; default_type application/xml; max_ranges 0; }}
        """
        with nginx_server(locations) as server, at_a_distance(work, server.url) as url:
            environment = {
                _SERVER: url,
                "AWS_ENDPOINT_URL": url,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "benchmark",
                "AWS_SECRET_ACCESS_KEY": "benchmark",
            }
            before = dict(os.environ)
            os.environ.update(environment)
            try:
                yield
            finally:
                os.environ.clear()
                os.environ.update(before)


LATENCY_SECONDS = 0.03


@contextmanager
def at_a_distance(work: Work, url: str) -> Iterator[str]:
    """The address of a server; where rows are shuffled, behind a relay that takes its time."""
    if not work.name.startswith("rows-"):
        yield url
        return
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with relayed((host, int(port)), LATENCY_SECONDS) as there:
        yield f"http://127.0.0.1:{there}"


@contextmanager
def relayed(server: tuple[str, int], seconds: float) -> Iterator[int]:
    """The port of a relay that passes on what clients send some time later, and answers at once, unseen.

    A proxy that reads requests and bodies takes more of two cores than the clients that are measured.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)

    def accept() -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                there = socket.create_connection(server)
                for end in (client, there):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pass_on_late, args=(client, there, seconds), daemon=True).start()
                threading.Thread(target=_pass_on, args=(there, client), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _pass_on_late(source: socket.socket, target: socket.socket, seconds: float) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            time.sleep(seconds)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    read, written = os.pipe()
    try:
        with suppress(OSError):
            while count := os.splice(source.fileno(), written, 2**20):
                while count:
                    count -= os.splice(read, target.fileno(), count)
            target.shutdown(socket.SHUT_WR)
    finally:
        os.close(read)
        os.close(written)


def listing(paths: list[Path]) -> str:
    """What S3 answers when it is asked for names; the ETags are those of nginx."""
    entries = []
    for path in paths:
        state = path.stat()
        etag = f"&quot;{int(state.st_mtime):x}-{state.st_size:x}&quot;"
        entries.append(
            f"<Contents><Key>emb/{path.name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{etag}</ETag><Size>{state.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><Prefix>emb/</Prefix><KeyCount>{len(entries)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>"
    )


def address(work: Work) -> str:
    """What is opened."""
    return "s3://bucket/emb" if "-s3" in work.name else f"{os.environ[_SERVER]}/files/"


def whole_pass(module: str, work: Work, parallel_pieces: int, share: int = 1) -> Job:
    """Every batch, or those of the first of so many shares of the rows."""
    reader = import_module(module).EmbeddingReader(address(work), file_format=work.source.file_format)
    end = reader.count // share
    # Imports what the first request would import, and connects.
    next(iter(reader(1, end=1, **options(work))))
    arguments: dict[str, Any] = {**options(work), "parallel_pieces": parallel_pieces, "end": end}
    return lambda: consume(reader(work.batch_size, **arguments))


@contends(OURS, "remote-*")
def our_remote_pass(work: Work, data: Data) -> Job:
    """Every batch."""
    return whole_pass("dask_embedding_reader", work, IN_FLIGHT)


@contends(REFERENCE, "remote-s3", "remote-http")
def reference_remote_pass(work: Work, data: Data) -> Job:
    """Every batch."""
    return whole_pass("embedding_reader", work, IN_FLIGHT)


@contends(ONE_CONNECTION, "remote-*-limited")
def one_connection(work: Work, data: Data) -> Job:
    """A share of the rows, one piece after the other."""
    job = whole_pass("dask_embedding_reader", work, 1, LIMITED_SHARE)
    return lambda: {"rows_of_share": job()["rows"]}


@contends(CAT_FILE, "remote-s3", "remote-http")
def cat_file_pass(work: Work, data: Data) -> Job:
    """The client alone: the vectors of every file as one range, dropped on arrival."""
    filesystem, path = import_module("fsspec.core").url_to_fs(address(work))
    infos = filesystem.find(path, detail=True)
    sizes = {name: info["size"] or filesystem.size(name) for name, info in infos.items() if name.endswith(".npy")}
    filesystem.cat_file(next(iter(sizes)), start=0, end=1)

    def read(name: str) -> int:
        return len(filesystem.cat_file(name, start=128, end=sizes[name]))

    def job() -> dict[str, float]:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return {"nbytes": sum(pool.map(read, sizes))}

    return job
