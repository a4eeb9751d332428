"""Batches on a cluster: the same rows, each task once, nothing left on the workers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.streaming import iter_batches
from tests.support import assert_batches, wait_until, write_collection


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", processes=True) as made:
        yield made


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as made:
        yield made
        gc.collect()
        assert wait_until(lambda: not made.run_on_scheduler(tasks_left)), made.run_on_scheduler(tasks_left)


def tasks_left(dask_scheduler: Any = None) -> list[str]:
    return [str(key) for key in dask_scheduler.tasks]


def counted(folder: Path, rows: int = 60) -> tuple[Any, da.Array]:
    """Rows, and an array of chunks of three that leaves a file for each time that a chunk is computed."""
    data = np.random.default_rng(0).standard_normal((rows, 3))

    def load(block: Any, block_info: Any = None) -> Any:
        number = block_info[0]["chunk-location"][0]
        (folder / f"{number}-{time.monotonic_ns()}").touch()
        return block

    x = da.from_array(data, chunks=(3, 3)).map_blocks(load, dtype=float, meta=np.empty((0, 0)))
    for path in folder.iterdir():
        path.unlink()
    return data, x


EXPRESSIONS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "as it is": (lambda x: x, 1),
    "standardised": (lambda x: (x - x.mean(axis=0)) / x.std(axis=0), 2),
    "neighbours": (lambda x: x[1:] - x[:-1], 1),
    "smaller chunks": (lambda x: x.rechunk((1, 2)) if isinstance(x, da.Array) else x, 1),
    "far apart": (lambda x: x + x[::-1], 2),
    "one result": (lambda x: x.mean(axis=0, keepdims=True), 1),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_rows_of_numpy_with_few_computations(client: Client, tmp_path: Path, name: str) -> None:
    data, x = counted(tmp_path)
    expression, times = EXPRESSIONS[name]
    rows = [rows for rows, _ in iter_batches(expression(x), batch_size=7)]
    np.testing.assert_allclose(np.concatenate(rows), expression(data))
    assert 20 <= len(list(tmp_path.iterdir())) <= 20 * times


@pytest.mark.parametrize("name", ["npy", "parquet_npy"])
def test_array_and_frame_of_a_reader(client: Client, name: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, name, columns=["id", "caption"] if name != "npy" else None)
    reader = collection.open()
    x, meta = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=4)
    assert_batches(iter_batches(x, meta, batch_size=6), collection, 6, dtype=None, of_frame=True)


def test_a_frame_of_other_rows_is_an_error_before_wrong_pairs_come_out(client: Client, tmp_path: Path) -> None:
    for k in range(4):
        np.save(tmp_path / f"{k}.npy", np.arange(5.0 * k, 5 * k + 5)[:, None] * [1, 1])
        pd.DataFrame({"row": range(5 * k, 5 * k + 5)}).to_parquet(tmp_path / f"{k}.parquet")
    reader = EmbeddingReader(tmp_path, "parquet_npy", meta_columns="row")
    x, meta = reader.to_dask_array(), reader.to_dask_dataframe()
    for array in (x * 2, x - x.mean(axis=0)):
        metas = [frame for _, frame in iter_batches(array[5:15], meta.loc[5:14], batch_size=4)]
        assert [row for frame in metas for row in frame["row"]] == list(range(5, 15))
        with pytest.raises(MismatchError, match="'i' of the frame is"):
            next(iter_batches(array, meta.sample(frac=1, random_state=0).compute(), batch_size=4))
    with pytest.raises(MismatchError, match="'i' of the frame is"):
        next(iter_batches(x, meta.sample(frac=1, random_state=0), batch_size=4))
    with pytest.raises(MismatchError, match="is 5 beside row 0 of the array, where 0 was expected"):
        next(iter_batches(x[:10], meta.loc[5:14], batch_size=4))


# The mean of all chunks comes first: two minutes where others work too.
SLOW = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", ["as it is", pytest.param("standardised", marks=SLOW), "neighbours"])
def test_leaving_early_cancels_what_is_in_flight(client: Client, tmp_path: Path, name: str) -> None:
    _, x = counted(tmp_path, 3_000)
    for _ in iter_batches(EXPRESSIONS[name][0](x), batch_size=2):
        break
    assert wait_until(lambda: not client.run_on_scheduler(tasks_left))
    assert len(list(tmp_path.iterdir())) < (2_000 if name == "standardised" else 500)


def test_an_error_of_a_task_comes_out(client: Client) -> None:
    def fail(block: Any, block_info: Any = None) -> Any:
        if block_info[0]["chunk-location"][0] == 4:
            raise ZeroDivisionError("on a worker")
        return block

    x = da.zeros((20, 2), chunks=(2, 2)).map_blocks(fail, dtype=float, meta=np.empty((0, 0)))
    seen = 0

    def consume() -> None:
        nonlocal seen
        for rows, _ in iter_batches(x, batch_size=2):
            seen += len(rows)

    with pytest.raises(ZeroDivisionError, match="on a worker"):
        consume()
    assert seen == 8


def test_threads_can_be_asked_for_beside_a_client(client: Client, tmp_path: Path) -> None:
    computed: list[int] = []

    def note(block: Any) -> Any:
        computed.append(1)  # only this process sees it
        return block

    x = da.zeros((20, 2), chunks=(2, 2)).map_blocks(note, dtype=float, meta=np.empty((0, 0)))
    with dask.config.set(scheduler="threads"):
        assert sum(len(rows) for rows, _ in iter_batches(x, batch_size=3)) == 20
    assert len(computed) == 10
