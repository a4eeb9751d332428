"""Batches on a cluster: the same rows, each task once, nothing left on the workers."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from dask.base import optimize
from distributed import Client, Event, LocalCluster, secede, worker_client

from dask_embedding_reader import EmbeddingReader, write_embeddings
from dask_embedding_reader.errors import ArgumentError, MismatchError
from dask_embedding_reader.lazy._dask import P2P_RECHUNK
from dask_embedding_reader.lazy.engines import Cluster
from dask_embedding_reader.lazy.iter_batches import iter_batches
from tests.support.collections import assert_batches, finishes, wait_until, write_collection


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
SLOW = [pytest.mark.slow, pytest.mark.timeout(1_800)]


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

    with pytest.raises(ZeroDivisionError, match="on a worker") as error:
        consume()
    assert seen == 8
    # Also while somebody has the error, and with it all that its traceback refers to, as notebooks do.
    assert wait_until(lambda: not client.run_on_scheduler(tasks_left))
    del error


def test_threads_can_be_asked_for_beside_a_client(client: Client, tmp_path: Path) -> None:
    computed: list[int] = []

    def note(block: Any) -> Any:
        computed.append(1)  # only this process sees it
        return block

    x = da.zeros((20, 2), chunks=(2, 2)).map_blocks(note, dtype=float, meta=np.empty((0, 0)))
    with dask.config.set(scheduler="threads"):
        assert sum(len(rows) for rows, _ in iter_batches(x, batch_size=3)) == 20
    assert len(computed) == 10


def test_workers_forget_what_no_later_chunk_uses(client: Client) -> None:
    x = da.from_array(np.arange(40.0).reshape(20, 2), chunks=(2, 2)) + 0
    batches: Any = iter_batches(x[1:] - x[:-1], batch_size=2)
    most = 0
    for number, _ in enumerate(batches):
        engine = batches.gi_frame.f_locals["stream"]._engine
        most = max(most, len(engine._lent))
        assert all(engine.schedule.loans[loan][-1] > number for loan in engine._lent)
        assert min(engine._results, default=99) > number
    assert most
    assert not engine._lent


def test_an_array_that_workers_would_rechunk_by_p2p(client: Client) -> None:
    """They look for such tasks by their keys, which are other ones here."""
    rows = np.arange(240.0).reshape(60, 4)
    by_columns = da.from_array(rows, chunks=(60, 1)).rechunk((1, 4), method="p2p")
    array = (by_columns * 2).rechunk((20, 1), method="p2p").rechunk((7, 4), method="p2p") + 1
    assert any(type(layer).__name__ == P2P_RECHUNK for layer in array.dask.layers.values())
    batches = [batch for batch, _ in iter_batches(array, batch_size=11)]
    np.testing.assert_array_equal(np.concatenate(batches), rows * 2 + 1)
    backwards = [batch for batch, _ in iter_batches(array[::-1], batch_size=11)]
    np.testing.assert_array_equal(np.concatenate(backwards), rows[::-1] * 2 + 1)
    # Of these Dask does not tell any longer which tasks rechunk.
    for told in (optimize(array)[0], da.Array(dict(array.dask), array.name, array.chunks, array.dtype)):
        with pytest.raises(
            ArgumentError, match=r"rechunked by P2P.*Call persist\(\).*\"array.rechunk.method\": \"tasks\""
        ):
            next(iter_batches(told, batch_size=11))
    persisted = [batch for batch, _ in iter_batches(array.persist(), batch_size=11)]
    np.testing.assert_array_equal(np.concatenate(persisted), rows * 2 + 1)


@pytest.mark.parametrize("change", ["sort_values", "shuffle"])
def test_a_frame_that_workers_sort_by_p2p_is_to_be_persisted_first(client: Client, change: str) -> None:
    rows = dd.from_pandas(pd.DataFrame({"a": np.arange(40)[::-1], "b": np.arange(40)}), npartitions=4)
    frame = getattr(rows, change)("a")
    counts = tuple(frame.map_partitions(len).compute())
    array = da.zeros((40, 2), chunks=(counts, 2))
    with pytest.raises(ArgumentError, match=r"by P2P.*Call persist\(\) on it first.*\"dataframe.shuffle.method\""):
        next(iter_batches(array, frame, batch_size=7))
    with pytest.raises(ArgumentError, match="by P2P"):
        next(iter_batches(frame.to_dask_array(lengths=counts), batch_size=7))
    persisted = frame.persist()
    values = persisted.to_dask_array(lengths=counts)
    for batch, meta in iter_batches(values, persisted, batch_size=7):
        np.testing.assert_array_equal(batch, meta[["a", "b"]])
        assert (meta["a"] + meta["b"] == 39).all()


def test_what_the_threads_of_a_cluster_are_good_for(client: Client) -> None:
    engine = Cluster({}, [], [], client)
    assert (engine.parallel, engine.ahead) == (2, 8)
    assert engine.held_nbytes == 0, "what the workers hold is not held here"
    engine.close()


# ---------------------------------------------------------------------------------------------------------------------
# Beside what else the client does


def by_break(batches: Iterator[Any]) -> None:
    for _ in batches:
        break


def by_exception(batches: Iterator[Any]) -> None:
    with suppress(ZeroDivisionError):
        for _ in batches:
            raise ZeroDivisionError("in the loop")


def by_garbage(batches: Iterator[Any]) -> None:
    next(batches)


def after_the_first(batches: Iterator[Any]) -> None:
    for number, _ in enumerate(batches):
        if number == 7:
            break


# Of each: what units lend to later ones, what all of them use, and neither.
USES: dict[str, Callable[[Any], Any]] = {
    "own": lambda x: x + 1,
    "lent": lambda x: x[1:] - x[:-1],
    "global": lambda x: x - x.mean(axis=0),
}


@pytest.fixture(scope="module")
def busy_client() -> Iterator[Client]:
    """One worker in this process, with a thread for work that goes on and one for batches."""
    with Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as made:
        yield made


@pytest.mark.parametrize("leave", [by_break, by_exception, by_garbage, after_the_first])
@pytest.mark.parametrize("uses", USES)
def test_leaving_early_leaves_the_rest_of_the_client_alone(
    busy_client: Client, uses: str, leave: Callable[[Iterator[Any]], None], tmp_path: Path
) -> None:
    client = busy_client
    collection = write_collection(tmp_path, "parquet-list", file_rows=[20] * 3, columns=["id"], row_group_rows=10)
    reader = collection.open()
    # Chunks and partitions are cut from row groups, which several of them use.
    x, frame = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=4)
    expression, divided = USES[uses], None if uses == "lent" else frame
    persisted, running, goes_on = client.persist(x), Event(), Event()

    def wait() -> str:
        running.set()
        goes_on.wait()
        return "done"

    def leave_three_times() -> None:
        for _ in range(3):
            leave(iter_batches(expression(x), divided, batch_size=2))
            leave(iter_batches(expression(persisted), divided, batch_size=2))

    other = client.submit(wait, pure=False)
    finishes(running.wait)
    finishes(leave_three_times)
    goes_on.set()
    assert other.result(timeout=60) == "done"
    np.testing.assert_array_equal(persisted.compute(), collection.rows)
    np.testing.assert_allclose(expression(x).compute(), expression(collection.rows), rtol=1e-5, atol=1e-5)


def test_a_computation_of_the_same_array_is_one_of_its_own(client: Client) -> None:
    def complaints(dask_scheduler: Any = None) -> int:
        return sum("run_spec" in message for _, message in dask_scheduler.get_logs())

    def compute() -> None:
        x = da.arange(40, chunks=4)[:, None] + 1
        batches = iter_batches(x[1:] - x[:-1], batch_size=3)
        next(batches)
        persisted = client.persist(x)
        assert sum(rows.sum() for rows, _ in batches) == 36
        np.testing.assert_array_equal(persisted.compute()[:, 0], np.arange(1, 41))

    before = client.run_on_scheduler(complaints)
    finishes(compute)
    assert client.run_on_scheduler(complaints) == before


# ---------------------------------------------------------------------------------------------------------------------
# Persisted


ROWS = np.arange(64, dtype=float).reshape(32, 2)


def lazy(chunks: tuple[int, int] = (4, 2)) -> da.Array:
    x: da.Array = da.from_array(ROWS, chunks=chunks) + 0
    return x


def scattered(client: Client) -> da.Array:
    parts = [da.from_delayed(part, (16, 2), float) for part in client.scatter([ROWS[:16], ROWS[16:]])]
    x: da.Array = da.concatenate(parts)
    return x


PERSISTED: dict[str, tuple[Callable[[Client], da.Array], npt.NDArray[Any]]] = {
    "as it is": (lambda _: lazy().persist(), ROWS),
    "in columns": (lambda _: lazy((4, 1)).persist(), ROWS),
    "computed from": (lambda _: lazy().persist() * 2, ROWS * 2),
    "the mean": (lambda _: lazy() - lazy().mean(axis=0).persist(), ROWS - ROWS.mean(axis=0)),
    "its mean": (lambda _: (x := lazy().persist()) - x.mean(axis=0), ROWS - ROWS.mean(axis=0)),
    "neighbours": (lambda _: (x := lazy().persist())[1:] - x[:-1], ROWS[1:] - ROWS[:-1]),
    "a half": (lambda _: da.concatenate([lazy().persist()[:16], lazy()[16:]]), ROWS),
    "two together": (lambda c: da.add(*c.persist([lazy(), lazy() * 2])), ROWS * 3),
    "scattered": (scattered, ROWS),
    "an argument": (lambda c: da.map_blocks(lambda b, f: b * f, lazy(), c.scatter(3), dtype=float), ROWS * 3),
}


def frame_of(rows: int, divisions: tuple[int, ...]) -> dd.DataFrame:
    whole = dd.from_pandas(pd.DataFrame({"twice": np.arange(rows) * 2}), npartitions=1)
    divided: dd.DataFrame = whole.repartition(divisions=[0, *np.cumsum(divisions)[:-1].tolist(), rows - 1])
    return divided


FRAMES: dict[str, Callable[[dd.DataFrame], Any]] = {
    "lazy": lambda frame: frame,
    "persisted": lambda frame: frame.persist(),
    "computed from": lambda frame: frame.persist().assign(other=1),
}


# Arrays and frames are persisted apart: each array is computed beside one of the frames, and each frame beside several.
@pytest.mark.parametrize(("name", "frame"), list(zip(PERSISTED, itertools.cycle(FRAMES), strict=False)))
def test_what_is_persisted_is_used_as_it_is(client: Client, name: str, frame: str, tmp_path: Path) -> None:
    make, expected = PERSISTED[name]
    x = make(client)
    meta = FRAMES[frame](frame_of(len(expected), x.chunks[0]))

    def batches() -> None:
        rows, frames = zip(*iter_batches(x, meta, batch_size=3), strict=True)
        np.testing.assert_allclose(np.concatenate(rows), expected)
        np.testing.assert_array_equal(pd.concat(frames)["twice"], np.arange(len(expected)) * 2)
        for batch in rows:
            batch[:] = -1  # a batch is the caller's, what is persisted is not

    def written(folder: Path, compute: bool) -> None:
        later = write_embeddings(x, folder, "parquet", meta, rows_per_file=5, compute=compute)
        if later is not None:
            later.compute()
        reader = EmbeddingReader(folder, "parquet", meta_columns=["twice"])
        np.testing.assert_allclose(reader.to_dask_array().compute(), expected)
        np.testing.assert_array_equal(reader.to_dask_dataframe().compute()["twice"], np.arange(len(expected)) * 2)

    for _ in range(2):
        finishes(batches)
    finishes(lambda: written(tmp_path / "now", True))
    finishes(lambda: written(tmp_path / "later", False))


def test_an_array_that_dask_has_optimized_has_only_keys_of_what_is_persisted(client: Client, tmp_path: Path) -> None:
    x = lazy().persist()
    for optimized, expected in zip(optimize(x, x * 2), (ROWS, ROWS * 2), strict=True):
        got = np.concatenate([rows for rows, _ in iter_batches(optimized, batch_size=3)])
        np.testing.assert_array_equal(got, expected)


def test_a_lazy_write_keeps_what_is_persisted(client: Client, tmp_path: Path) -> None:
    x = lazy().persist()
    meta = frame_of(len(ROWS), x.chunks[0]).persist()
    later = write_embeddings(x, tmp_path / "out", "parquet", meta, compute=False)
    assert later is not None
    del x, meta
    gc.collect()
    finishes(later.compute)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path / "out", "parquet").to_dask_array().compute(), ROWS)


def test_without_a_client_what_is_persisted_cannot_be_asked_for(client: Client, tmp_path: Path) -> None:
    x = lazy().persist()
    with dask.config.set(scheduler="threads"):
        for array in (x, x * 2):
            with pytest.raises(
                ArgumentError, match=r"8 chunks or partitions are held by a cluster.*no distributed\.Client"
            ):
                next(iter_batches(array, batch_size=3))
            with pytest.raises(
                ArgumentError, match=r"8 chunks or partitions are held by a cluster.*no distributed\.Client"
            ):
                write_embeddings(array, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Within tasks


def in_batches(block: Any) -> Any:
    return np.concatenate([rows for rows, _ in iter_batches(da.from_array(block, chunks=(5, 2)) + 1, batch_size=3)])


def left_early(block: Any) -> Any:
    by_break(iter_batches(da.from_array(block, chunks=(1, 2)) + 1, batch_size=1))
    return block + 1


def with_a_client(block: Any) -> Any:
    with worker_client():
        return in_batches(block)


def seceded(block: Any) -> Any:
    secede()
    return in_batches(block)


def nested(block: Any) -> Any:
    return da.from_array(block, chunks=(5, 2)).map_blocks(in_batches, dtype=float, meta=np.empty((0, 0))).compute()


@pytest.mark.parametrize("work", [in_batches, left_early, with_a_client, seceded, nested])
def test_tasks_that_fill_the_workers_go_through_batches(client: Client, work: Callable[[Any], Any]) -> None:
    blocks = da.from_array(np.ones((80, 2)), chunks=(10, 2)).map_blocks(work, dtype=float, meta=np.empty((0, 0)))
    np.testing.assert_array_equal(finishes(blocks.compute), np.full((80, 2), 2.0))


def test_tasks_that_fill_the_workers_write(client: Client, tmp_path: Path) -> None:
    def write(block: Any, block_info: Any = None) -> Any:
        folder = tmp_path / str(block_info[0]["chunk-location"][0])
        write_embeddings(da.from_array(block, chunks=(5, 2)) + 1, folder)
        write_embeddings(iter_batches(da.from_array(block, chunks=(5, 2)) + 1, batch_size=3), folder / "again")
        return block

    finishes(
        da.from_array(np.ones((80, 2)), chunks=(10, 2)).map_blocks(write, dtype=float, meta=np.empty((0, 0))).compute
    )
    assert [EmbeddingReader(tmp_path / str(number)).count for number in range(8)] == [20] * 8
