"""Remote reading wherever a program may be: in a forked or spawned process, in a coroutine, in many threads at once.

fsspec's connections belong to one thread of one process, so each of these has hung or mixed up answers somewhere.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches
from dask_embedding_reader._common.cached_property import cached_property
from dask_embedding_reader.errors import FileChangedError, ReadError
from tests.support import servers

ROWS = np.random.default_rng(0).standard_normal((90, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    for k in range(3):
        np.save(folder / f"{k}.npy", ROWS[k * 30 : (k + 1) * 30])
    return folder


@pytest.fixture(scope="module", params=["http", "s3"])
def open_reader(request: pytest.FixtureRequest, folder: Path) -> Iterator[Callable[[], EmbeddingReader]]:
    """Opens a collection over HTTP and over S3."""
    if request.param == "http":
        with servers.http_files(folder) as server:
            urls = [f"{server.url}/{k}.npy" for k in range(3)]
            yield lambda: EmbeddingReader(urls)
    else:
        servers.require(servers.s3_available, "moto")
        with servers.s3() as s3:
            url = s3.put_folder(folder, "emb")
            yield lambda: EmbeddingReader(url, storage_options=s3.storage_options)


def read(reader: EmbeddingReader) -> bool:
    """Read a collection as an array and as batches, and tell whether it is right."""
    # Dask's own pool of threads does not survive a fork; the threads of batches are our own.
    array = reader.to_dask_array(max_piece_size=7).compute(scheduler="synchronous")
    return np.array_equal(array, ROWS) and read_batches(reader)


def read_batches(reader: EmbeddingReader) -> bool:
    batches = np.concatenate([rows for rows, _ in reader(batch_size=8, max_piece_size=5, show_progress=False)])
    return np.array_equal(batches, ROWS)


def read_and_tell(connection: Any, pickled: bytes) -> None:
    """What a spawned process does."""
    connection.send(read(pickle.loads(pickled)))


def run_forked(work: Callable[[], Any]) -> Any:
    """Do some work in a fork of this process and return its result; fail if it hangs."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python warns of forking beside threads, which is the point
        process = context.Process(target=lambda: there.send(work()))
        process.start()
    try:
        assert here.poll(30), "the forked process hangs"
        return here.recv()
    finally:
        process.kill()
        process.join()


def test_a_forked_process_reads_what_its_parent_has_opened_and_read(open_reader: Callable[[], EmbeddingReader]) -> None:
    reader = open_reader()
    assert read(reader)
    assert run_forked(lambda: read(reader))
    # The parent goes on, and so does a fork of a fork.
    assert read(reader)
    assert run_forked(lambda: run_forked(lambda: read(reader)))


def test_a_forked_process_opens_the_same_collection_anew(open_reader: Callable[[], EmbeddingReader]) -> None:
    x = open_reader().to_dask_array()
    assert run_forked(lambda: open_reader().to_dask_array().name) == x.name
    assert run_forked(lambda: read(open_reader()))


def test_no_thread_that_computes_a_value_holds_up_another_one() -> None:
    """Nor then a fork, in which that thread is no more. Before Python 3.12 ``functools`` has a lock there."""

    class Owner:
        def __init__(self, compute: Callable[[], Any]) -> None:
            self.compute = compute

        @cached_property
        def value(self) -> Any:
            return self.compute()

    started, finished = threading.Event(), threading.Event()

    def first() -> bool:
        started.set()
        return finished.wait(10)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: Owner(first).value)
        assert started.wait(10)
        assert Owner(lambda: finished.set() or "computed").value == "computed"  # type: ignore[func-returns-value]
        assert waiting.result()


def test_a_fork_in_the_middle_of_reading_disturbs_nobody(open_reader: Callable[[], EmbeddingReader]) -> None:
    reader = open_reader()
    stopped = threading.Event()

    def read_on() -> bool:
        right = True
        while not stopped.is_set():
            right &= read_batches(reader)
        return right

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(read_on) for _ in range(2)]
        try:
            # Dask imports modules while it computes, which no fork survives: read without it.
            assert all(run_forked(lambda: read_batches(reader)) for _ in range(3))
        finally:
            stopped.set()
        assert all(future.result(30) for future in busy)


@pytest.mark.parametrize("kind", ["in order", "shuffled", "few", "lazy"])
def test_a_fork_is_told_that_an_iterator_of_its_parent_has_no_threads_there(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    reader = EmbeddingReader(tmp_path)
    rows = {"shuffled": reader.shuffle(buffer_rows=4), "few": reader.take([5, 1, 3])}.get(kind, reader)
    batches = (
        iter_batches(reader.to_dask_array(chunks=3), batch_size=2, show_progress=False)
        if kind == "lazy"
        else rows(2, dtype=None, show_progress=False)
    )
    first = next(batches)

    def go_on() -> tuple[str, bool]:
        with pytest.raises(ReadError) as caught:
            next(batches)
        return str(caught.value), read_batches(reader)

    message, right = run_forked(go_on)
    assert re.match(f"these batches are read by threads of process {os.getpid()}, .*in each process", message)
    assert right
    total = len(first[0]) + sum(len(vectors) for vectors, _ in batches)  # the parent is not disturbed
    assert total == (3 if kind == "few" else len(ROWS))


def test_a_reader_works_in_a_spawned_process(open_reader: Callable[[], EmbeddingReader]) -> None:
    reader = open_reader()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=read_and_tell, args=(there, pickle.dumps(reader)))
    process.start()
    try:
        assert here.poll(100), "the spawned process hangs"
        assert here.recv()
    finally:
        process.kill()
        process.join()


def test_reading_within_a_running_event_loop(open_reader: Callable[[], EmbeddingReader]) -> None:
    # What a Jupyter kernel does with every cell, and what callers do who know better.
    async def in_a_coroutine() -> tuple[bool, bool]:
        directly = read(open_reader())
        return directly, await asyncio.to_thread(lambda: read(open_reader()))

    assert asyncio.run(in_a_coroutine()) == (True, True)


def test_several_readers_and_iterators_at_once(open_reader: Callable[[], EmbeddingReader]) -> None:
    shared = open_reader()
    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(lambda: read(open_reader())) for _ in range(3)]
        results += [pool.submit(read, shared) for _ in range(3)]
        assert all(result.result(60) for result in results)
    iterators = [iter(shared(batch_size=9, start=start, show_progress=False)) for start in (0, 9, 18)]
    for turn in range(3):
        for first, iterator in zip((0, 9, 18), iterators, strict=True):
            start = first + 9 * turn
            np.testing.assert_array_equal(next(iterator)[0], ROWS[start : start + 9])


def test_a_fork_notices_a_replaced_file(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    with servers.http_files(tmp_path) as server:
        reader = EmbeddingReader([f"{server.url}/0.npy"])
        np.save(tmp_path / "0.npy", -ROWS)

        def fails() -> str:
            try:
                reader.to_dask_array().compute(scheduler="synchronous")
            except FileChangedError as error:
                return str(error)
            return ""

        assert "changed since it was opened" in run_forked(fails)
