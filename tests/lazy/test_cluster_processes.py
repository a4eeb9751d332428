"""A cluster as people run it: a scheduler and workers that were started from the command line, and that go wrong."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
from dask.base import optimize
from dask.utils import key_split
from distributed import Client, get_worker

from dask_embedding_reader import EmbeddingReader, MismatchError, ReadError, iter_batches
from tests.support.collections import (
    Collection,
    assert_batches,
    assert_same_frame,
    assert_same_rows,
    wait_until,
    write_collection,
)

ROOT = Path(__file__).parents[2]
QUIET = {"DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}


@contextmanager
def command(name: str, *arguments: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the cluster, as `dask scheduler` and `dask worker` start it."""
    module = f"distributed.cli.dask_{name}"
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env={**os.environ, **QUIET},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Workers:
    """Starts workers of one scheduler."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder

    @contextmanager
    def start(self, client: Client, *arguments: str) -> Iterator[None]:
        """One worker more."""
        options = [self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder)]
        before = len(client.nthreads())
        with command("worker", *options, *arguments, folder=self.folder) as process:
            client.wait_for_workers(before + 1, timeout=60)
            yield
            process.terminate()
            process.wait(20)
            assert wait_until(lambda: len(client.nthreads()) <= before, 30)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A scheduler and two workers, each a process of its own with a working folder elsewhere."""
    folder = tmp_path_factory.mktemp("cluster")
    address = folder / "scheduler.json"
    arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(address)]
    worker = ["--scheduler-file", str(address), "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder)]
    with (
        command("scheduler", *arguments, folder=folder),
        command("worker", *worker, folder=folder),
        command("worker", *worker, folder=folder),
    ):
        assert wait_until(address.exists, 60)
        with Client(scheduler_file=str(address), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            yield Workers(client.scheduler.address, folder)


@pytest.fixture
def client(workers: Workers) -> Iterator[Client]:
    with Client(workers.address) as made:
        yield made
        gc.collect()
        assert wait_until(lambda: not made.run_on_scheduler(tasks_left)), made.run_on_scheduler(tasks_left)


def tasks_left(dask_scheduler: Any = None) -> list[str]:
    return [str(key) for key in dask_scheduler.tasks]


def write(folder: Path, format_name: str = "parquet_npy") -> Collection:
    columns = None if format_name == "npy" else ["id", "caption"]
    return write_collection(folder, format_name, columns=columns)


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize("name", ["npy", "parquet_npy", "parquet-list"])
def test_array_frame_and_batches_are_the_local_ones(client: Client, tmp_path: Path, name: str) -> None:
    collection = write(tmp_path, name)  # every warning, such as that of a large graph, is an error here
    reader = collection.open()
    x, meta = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=4)
    assert_same_rows(x.compute(), collection.rows)
    assert_same_frame(meta.compute(), collection.frame())
    np.testing.assert_allclose(x.mean(axis=0).compute(), collection.rows.mean(axis=0), rtol=1e-5)
    assert_batches(iter_batches(x, meta, batch_size=6), collection, 6, dtype=None, of_frame=True)


@pytest.mark.parametrize("name", ["npy", "parquet_npy", "parquet-list"])
def test_tasks_are_small_and_named_for_what_they_do(tmp_path: Path, name: str) -> None:
    reader = write(tmp_path, name).open()
    x, meta = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=8)
    (array,) = optimize(x)
    for graph, word in ((dict(array.dask), "embeddings"), (dict(meta.optimize().dask), "metadata")):
        assert max(len(cloudpickle.dumps(task)) for task in graph.values()) < 2_000
        assert word in {key_split(key) for key in graph}  # what the dashboard shows


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def die_once(block: Any, marker: str = "", block_info: Any = None) -> Any:
    """At the sixth chunk, kill the worker that computes it; the next one that tries lives."""
    if block_info[0]["chunk-location"][0] == 5:
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            return block
        os.kill(os.getpid(), signal.SIGKILL)
    return block


CONSUMERS: dict[str, Callable[[da.Array], Any]] = {
    "compute": lambda x: x.compute(),
    "batches": lambda x: np.concatenate([rows for rows, _ in iter_batches(x, batch_size=7)]),
    "few batches at a time": lambda x: np.concatenate(
        [rows for rows, _ in iter_batches(x, batch_size=7, max_ram_usage_in_bytes=1_500)]
    ),
}


@pytest.mark.parametrize(
    "name", ["batches", *(pytest.param(name, marks=pytest.mark.slow) for name in ("compute", "few batches at a time"))]
)
def test_a_killed_worker_costs_a_recomputation_and_not_the_result(
    client: Client, workers: Workers, tmp_path: Path, name: str
) -> None:
    collection = write(tmp_path, "npy")
    x = collection.open().to_dask_array(max_piece_size=3)
    marker = tmp_path / "died"
    fragile = x.map_blocks(die_once, marker=str(marker), dtype=x.dtype, meta=np.empty((0, 0), x.dtype))
    with workers.start(client), workers.start(client):  # two more, so that those of the other tests may be spared
        np.testing.assert_array_equal(CONSUMERS[name](fragile), collection.rows)
        assert marker.exists()


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs a path that each process sees differently")
@pytest.mark.parametrize("consumer", [lambda r: r.to_dask_array().compute(), lambda r: r.to_dask_dataframe().compute()])
def test_a_worker_that_cannot_reach_the_storage_is_named_with_the_file(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, consumer: Callable[[EmbeddingReader], Any]
) -> None:
    collection = write(tmp_path, "parquet-list")
    monkeypatch.chdir(tmp_path)
    reader = EmbeddingReader("/proc/self/cwd/embeddings", "parquet", meta_columns=collection.columns)
    with pytest.raises(ReadError, match=r"cwd/embeddings/.*\.parquet.*on worker tcp://127.*by the same path"):
        consumer(reader)
    assert_same_rows(reader.to_dask_array().compute(scheduler="threads"), collection.rows)


def test_a_worker_of_another_version_is_told_from_this_one(client: Client, workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("import dask_embedding_reader\ndask_embedding_reader.__version__ = '0.0.9'\n")
    reader = write(tmp_path, "parquet-list").open()
    known = set(client.nthreads())
    with workers.start(client, "--no-nanny", "--preload", str(tmp_path / "old.py")):
        (old,) = set(client.nthreads()) - known
        for lazy in (reader.to_dask_array(), reader.to_dask_dataframe()):
            future = client.compute(lazy, workers=[old])
            error = future.exception()
            assert isinstance(error, MismatchError)
            assert f"worker {old} has 0.0.9; install the same version" in str(error)
            future.cancel()


def test_workers_that_come_while_iterating_are_used(client: Client, workers: Workers, tmp_path: Path) -> None:
    def note(block: Any) -> Any:
        (tmp_path / get_worker().address.rpartition(":")[2]).touch()
        return block

    x = da.ones((200, 3), chunks=(1, 3)).map_blocks(note, dtype=float, meta=np.empty((0, 0)))
    batches = iter_batches(x, batch_size=1, max_ram_usage_in_bytes=1_000)
    next(batches)
    known = set(client.nthreads())
    with workers.start(client, "--no-nanny"):
        (added,) = set(client.nthreads()) - known
        assert sum(len(rows) for rows, _ in batches) == 199
        assert (tmp_path / added.rpartition(":")[2]).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Threads

THREADS_PROGRAM = """
import os, sys
from dask_embedding_reader import EmbeddingReader
import pyarrow as pa

def threads():
    return len(os.listdir("/proc/self/task"))

reader = EmbeddingReader(sys.argv[1], "parquet", meta_columns=["id", "caption"])
x, meta = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=4)
x[:1].compute(scheduler="synchronous"), meta.partitions[0].compute(scheduler="synchronous")
before = threads()
x.compute(scheduler="synchronous"), meta.compute(scheduler="synchronous")
print(threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the threads of a process")
def test_a_task_reads_and_decodes_in_its_own_thread(tmp_path: Path) -> None:
    collection = write(tmp_path, "parquet-list")
    command = [sys.executable, "-c", THREADS_PROGRAM, str(collection.folder)]
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) == 0
