"""Reads under way end soon after nobody waits for them, be the server gone, silent or asking for patience.

A client that goes on asking would keep threads, memory, and a program that wants to end, for minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches
from dask_embedding_reader._common import threads as stopping
from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.storage import retries
from dask_embedding_reader.storage.direct.read import SWITCH
from dask_embedding_reader.storage.retries import STALL_SECONDS
from tests.support import servers
from tests.support.collections import finishes, python_calls, wait_until
from tests.support.faults import BUSY, Asked, Proxy, faulty

FILES = 6
ROWS = np.zeros((30, 4), np.float32)


@dataclass
class Place:
    """Files behind a proxy."""

    folder: Path
    proxy: Proxy
    urls: list[str]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    for k in range(FILES):
        np.save(tmp_path / f"{k}.npy", ROWS)
    with servers.http_files(tmp_path) as server, faulty(server.url) as proxy:
        yield Place(tmp_path, proxy, [f"{proxy.url}/{k}.npy" for k in range(FILES)])


@contextmanager
def ctrl_c_after(seconds: float) -> Iterator[None]:
    """Expect that a block ends with the Ctrl-C that comes then."""
    came = threading.Event()

    def interrupt(*_: Any) -> None:
        if not came.is_set():
            came.set()
            raise KeyboardInterrupt

    def send() -> None:
        pause = seconds
        while not came.wait(pause):
            os.kill(os.getpid(), signal.SIGINT)
            pause = 1.0  # and again: the main thread sleeps on if it comes just as that falls asleep

    before = signal.signal(signal.SIGINT, interrupt)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        came.set()
        sender.join()
        signal.signal(signal.SIGINT, before)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("embedding-reader")]


def of_reader(reader: EmbeddingReader) -> Iterator[Any]:
    return reader(10, max_piece_size=10, parallel_pieces=4, show_progress=False)


def of_lazy_array(reader: EmbeddingReader) -> Iterator[Any]:
    return iter_batches(reader.to_dask_array(max_piece_size=10) * 2, batch_size=10, show_progress=False)


WAYS: list[Callable[[EmbeddingReader], Iterator[Any]]] = [of_reader, of_lazy_array]

#: Asks each time for 7 s of patience, so that five attempts take half a minute; a silent server takes 30 s for each.
BAD = [*BUSY, "stalled", "stalled halfway"]
SOON = 5.0


def start(place: Place, fault: str, iterate: Callable[[EmbeddingReader], Iterator[Any]]) -> Iterator[Any]:
    """An iterator that has given one batch, and is reading ahead from a server that has become bad."""
    reader = EmbeddingReader(place.urls)
    place.proxy.every, place.proxy.healthy = fault, "/0.npy"
    batches = iterate(reader)
    next(batches)
    assert wait_until(lambda: bool(place.proxy.failed))
    assert reading_threads()
    return batches


def nothing_is_left() -> bool:
    return wait_until(lambda: not reading_threads(), SOON)


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("iterate", WAYS)
def test_leaving_a_loop_ends_the_reads_under_way(
    place: Place, iterate: Callable[[EmbeddingReader], Iterator[Any]], fault: str
) -> None:
    for _ in start(place, fault, iterate):
        break
    assert nothing_is_left(), reading_threads()
    asked = len(place.proxy.requests)
    assert not wait_until(lambda: len(place.proxy.requests) > asked, 0.3), "it goes on asking"


@pytest.mark.parametrize("direct", ["1", "0"], ids=["directly", "by fsspec"])
@pytest.mark.parametrize("fault", ["stalled", "stalled halfway"])
@pytest.mark.parametrize("iterate", WAYS)
def test_requests_under_way_end_with_the_loop(
    place: Place,
    iterate: Callable[[EmbeddingReader], Iterator[Any]],
    fault: str,
    direct: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those of the event loop of fsspec: a server, and memory, would wait for half a minute."""
    monkeypatch.setenv(SWITCH, direct)
    batches = start(place, fault, iterate)
    assert wait_until(lambda: place.proxy.waiting > 0)
    batches.close()  # type: ignore[attr-defined]
    assert nothing_is_left(), reading_threads()
    assert wait_until(lambda: place.proxy.waiting == 0, SOON), "the server waits for nobody"


def test_a_server_that_is_gone_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 60.0)
    np.save(tmp_path / "0.npy", np.zeros((1000, 4), np.float32))
    with servers.http_files(tmp_path) as server:
        batches = of_reader(EmbeddingReader([f"{server.url}/0.npy"]))
        next(batches)
    with ctrl_c_after(0.5):
        list(batches)  # finds nobody, and waits a minute before it tries again
    assert nothing_is_left(), reading_threads()


@pytest.mark.parametrize("iterate", WAYS)
def test_ctrl_c_ends_the_reads_under_way(
    place: Place, iterate: Callable[[EmbeddingReader], Iterator[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = start(place, "stalled", iterate)
    with ctrl_c_after(0.3):
        list(batches)
    assert nothing_is_left(), reading_threads()


def test_ctrl_c_ends_opening(place: Place) -> None:
    place.proxy.every = "stalled"
    with ctrl_c_after(0.3):
        EmbeddingReader(place.urls)
    assert nothing_is_left(), reading_threads()


def test_one_file_that_cannot_be_opened_ends_the_opening_of_all(place: Place) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(ROWS.ravel(), ROWS.shape[1])
    for k in range(FILES):
        pq.write_table(pa.table({"embedding": vectors}), place.folder / f"{k}.parquet")
    urls = [f"{place.proxy.url}/{k}.parquet" for k in range(FILES)]
    (place.folder / "0.parquet").write_bytes(b"x" * 500)
    # Their sizes are told; their footers are not, and of the damaged one not before others had to wait.
    place.proxy.healthy, place.proxy.faults = "/0.parquet", ["busy"] * 100

    def wait_for_others(asked: Asked) -> None:
        if asked.range and asked.path.endswith("/0.parquet"):
            wait_until(lambda: bool(place.proxy.failed))

    place.proxy.before = wait_for_others
    with pytest.raises(FormatError, match=r"0\.parquet"):
        # Where the column is named, no footer is read before the others to find it.
        finishes(lambda: EmbeddingReader(urls, file_format="parquet", embedding_column="embedding"), SOON)
    assert nothing_is_left(), reading_threads()
    assert place.proxy.failed


PROGRAM = """
import sys
from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.storage import retries
from tests.support.faults import faulty

retries.FIRST_PAUSE_SECONDS = 1e9
with faulty(sys.argv[1]) as proxy:
    batches = EmbeddingReader([f"{proxy.url}/{k}.npy" for k in range(6)])(10, max_piece_size=10, parallel_pieces=4)
    proxy.every, proxy.healthy = "503", "/0.npy"
    next(batches)
    while not proxy.failed:
        pass
    LAST
"""


@pytest.mark.parametrize(("last", "code"), [("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2)])
def test_a_program_ends_although_its_reads_would_go_on(place: Place, last: str, code: int) -> None:
    program = [sys.executable, "-c", PROGRAM.replace("LAST", last), place.proxy.upstream]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert done.returncode in (code, 130 if code < 0 else code), done.stderr


SILENCED = """
import sys, urllib.error, urllib.request
from dask_embedding_reader import EmbeddingReader

reader = EmbeddingReader([f"{sys.argv[1]}/{k}.npy" for k in range(6)])
try:
    urllib.request.urlopen(f"{sys.argv[1]}/from-now-on")
except urllib.error.HTTPError:
    pass
batches = reader(10, max_piece_size=10, parallel_pieces=4)
next(batches)
sys.exit(3)
"""


@pytest.mark.parametrize("fault", ["stalled", "stalled halfway"])
def test_a_program_ends_although_its_server_keeps_silent(place: Place, fault: str) -> None:
    def fall_silent(asked: Asked) -> None:
        if asked.path == "/from-now-on":
            place.proxy.every, place.proxy.healthy = fault, "/0.npy"

    place.proxy.before = fall_silent
    program = [sys.executable, "-c", SILENCED, place.proxy.url]
    # Sooner than the silence is given up.
    done = subprocess.run(program, capture_output=True, text=True, timeout=STALL_SECONDS - 2)
    assert (done.returncode, done.stderr) == (3, ""), done.stderr


def test_no_python_runs_when_an_event_dies() -> None:
    """Python drops a Ctrl-C that arrives in the callback of a weak reference."""
    events = [threading.Event()]
    stoppable_pool(1, events[0]).shutdown()
    assert python_calls(events.clear) == []


def test_events_that_have_died_are_forgotten() -> None:
    for _ in range(3):
        stoppable_pool(1, threading.Event()).shutdown()
    assert sum(known() is None for known in stopping._all) <= 1
