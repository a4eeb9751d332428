"""Batches as tensors: the same rows in the same order for any ranks and workers, however they are started and stopped.

`make test-torch` runs this, in an environment of its own.
"""

from __future__ import annotations

import doctest
import itertools
import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch", reason="make test-torch installs torch")

from torch.utils.data import DataLoader  # noqa: E402
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

from dask_embedding_reader import EmbeddingReader  # noqa: E402
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, ColumnError  # noqa: E402
from dask_embedding_reader.rows.shuffled import Shuffled  # noqa: E402
from dask_embedding_reader.torch import EmbeddingBatches  # noqa: E402
from tests.project import test_pages  # noqa: E402
from tests.support.collections import Collection, assert_same_rows, write_collection  # noqa: E402

module: Any = sys.modules[EmbeddingBatches.__module__]
Unchecked: Any = EmbeddingBatches  # for arguments of wrong types

pytestmark = [
    pytest.mark.torch,
    pytest.mark.timeout(400),  # processes that import torch, for half a minute each on a busy machine
    # Windows of a few rows mix little, which is told; one test expects it.
    pytest.mark.filterwarnings("ignore:batches of .* are mixed from"),
    # Of torchdata, by torch.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    # Threads of other tests: what is forked here does not use them.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

COLUMNS = ("id", "rank", "weight", "seen", "caption", "taken", "tags")
ORDERS: dict[str, Callable[[EmbeddingReader], EmbeddingReader]] = {
    "shuffled": lambda reader: reader.shuffle(3, buffer_rows=128),
    "in one window": lambda reader: reader.shuffle(3),
    "in order": lambda reader: reader,
    "filtered": lambda reader: reader.filter([("id", ">", 2**53)]).take(slice(3, None, 2)),
    "backwards": lambda reader: reader.take(slice(None, None, -1)),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    root = tmp_path_factory.mktemp("pair")
    return write_collection(root, "parquet_npy", file_rows=(70, 0, 120, 1, 200, 5), columns=COLUMNS, row_group_rows=32)


def numbers(batches: Any) -> list[list[int]]:
    """The row numbers of batches."""
    return [columns["i"].tolist() for _, columns in batches]


def loaded(dataset: EmbeddingBatches, workers: int, method: str = "fork", **options: Any) -> Any:
    context = method if workers else None
    return DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context, **options)


def stateful(dataset: EmbeddingBatches, workers: int, **options: Any) -> Any:
    context = "fork" if workers else None
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context, **options)


def alone(reader: EmbeddingReader, batch_size: int = 50, **options: Any) -> EmbeddingBatches:
    return EmbeddingBatches(reader, batch_size, columns="i", **{"rank": 0, "world_size": 1, **options})


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(
    ("workers", "method"), [(0, "fork"), (1, "fork"), (2, "fork"), (2, "spawn"), (2, "forkserver")]
)
def test_batches_are_those_of_the_reader(pair: Collection, workers: int, method: str) -> None:
    reader = pair.open().shuffle(3, epoch=2, buffer_rows=128)
    dataset = EmbeddingBatches(reader, 50, columns=[*COLUMNS, "i"], dtype=None, rank=0, world_size=1)
    expected = list(reader(50, dtype=None, show_progress=False))
    assert len(dataset) == len(expected)
    for (vectors, columns), (rows, frame) in zip(loaded(dataset, workers, method), expected, strict=True):
        assert_same_rows(vectors.numpy(), rows)
        assert {name: type(column) for name, column in columns.items()} == {
            **dict.fromkeys(("id", "weight", "seen", "i"), torch.Tensor),
            **dict.fromkeys(("rank", "caption", "taken", "tags"), list),
        }
        for name in ("id", "seen", "i"):
            assert columns[name].dtype == torch.from_numpy(frame[name].to_numpy(copy=True)).dtype
            assert columns[name].tolist() == frame[name].tolist()
        np.testing.assert_array_equal(columns["weight"].numpy(), frame["weight"])
        assert columns["caption"] == frame["caption"].tolist()
        assert columns["taken"] == frame["taken"].tolist()
        assert columns["rank"] == [None if null else n for n, null in zip(frame["rank"], frame["rank"].isna())]  # noqa: B905
        assert all(isinstance(rank, int) for rank in columns["rank"] if rank is not None)
        assert None in columns["rank"]


def test_no_other_column_is_read(pair: Collection, tmp_path: Path) -> None:
    dataset = alone(pair.open())
    assert dataset._reader.manifest.metadata is None
    vectors, columns = next(iter(EmbeddingBatches(pair.open(), 7, rank=0, world_size=1)))
    assert (tuple(vectors.shape), columns) == ((7, 4), {})
    for names, found in (("id", ["id"]), ("*", list(COLUMNS))):
        [(_, got)] = EmbeddingBatches(pair.open(), 400, columns=names, rank=0, world_size=1)
        assert list(got) == found


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, "float16"),
        ("float32", "float32"),
        (np.float64, "float64"),
        ("torch.float16", "float16"),
        ("torch.float64", "float64"),
    ],
)
def test_dtypes_are_numpys_or_torchs(tmp_path: Path, dtype: Any, expected: str) -> None:
    rows = np.arange(40, dtype=np.float16).reshape(10, 4)
    np.save(tmp_path / "0.npy", rows)
    wanted = getattr(torch, dtype[6:]) if isinstance(dtype, str) and dtype.startswith("torch.") else dtype
    [(vectors, _)] = EmbeddingBatches(EmbeddingReader(tmp_path), 10, dtype=wanted, rank=0, world_size=1)
    assert vectors.dtype == getattr(torch, expected)
    assert vectors.tolist() == rows.tolist()


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_tensors_are_in_the_memory_of_the_batch_and_stay(
    pair: Collection, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, addresses = module.read_batches, []

    def noted(*arguments: Any) -> Iterator[Any]:
        for vectors, frame in read(*arguments):
            addresses.append(vectors.__array_interface__["data"][0])
            yield vectors, frame

    monkeypatch.setattr(module, "read_batches", noted)
    reader = ORDERS[order](pair.open())
    kept = list(alone(reader))
    assert [vectors.data_ptr() for vectors, _ in kept] == addresses
    assert_same_rows(torch.cat([vectors for vectors, _ in kept]).numpy(), pair.rows[np.asarray(reader.rows)])
    kept[0][0].zero_()  # its memory is the caller's


def test_the_memory_of_a_rank_is_shared_by_its_workers(pair: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def noted(_: Any, request: Any) -> Iterator[Any]:
        limits.append(request.limit_nbytes)
        return iter(())

    monkeypatch.setattr(module, "read_batches", noted)
    for workers in (1, 4):
        with as_worker(0, workers, 7, monkeypatch):
            list(alone(pair.open(), max_ram_usage_in_bytes=10**9))
    assert limits == [10**9, 10**9 // 4]


def test_what_is_left_of_chance_is_told_once(pair: Collection) -> None:
    reader = pair.open().shuffle(1, buffer_rows=128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EmbeddingBatches(reader, 32, rank=1, world_size=2)
        with pytest.raises(UserWarning, match=r"batches of 128 rows \(of all shards\) are mixed from 64 blocks"):
            EmbeddingBatches(reader, 64, rank=1, world_size=2)
        with pytest.warns(UserWarning, match="128 rows"):
            dataset = EmbeddingBatches(reader, 64, rank=1, world_size=2)
        list(dataset)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks, workers, resuming


class as_worker:  # noqa: N801 - a context manager
    """In this process, be one of several workers."""

    def __init__(self, worker: int, workers: int, pass_number: int, patch: pytest.MonkeyPatch) -> None:
        self.info = SimpleNamespace(id=worker, num_workers=workers, seed=pass_number + worker) if workers else None
        self.patch = patch

    def __enter__(self) -> None:
        self.patch.setattr(module, "get_worker_info", lambda: self.info)

    def __exit__(self, *_: object) -> None:
        self.patch.setattr(module, "get_worker_info", lambda: None)


def batches_of(dataset: EmbeddingBatches, workers: int, patch: pytest.MonkeyPatch) -> list[list[int]]:
    """Batches in the order in which a DataLoader takes them from its workers: of each in turn."""
    parts = []
    for worker in range(max(1, workers)):
        with as_worker(worker, workers, 5, patch):
            dataset._seen = 0  # each is a process of its own
            parts.append(numbers(dataset))
    return [batch for batches in itertools.zip_longest(*parts) for batch in batches if batch is not None]


STEPS = st.tuples(st.sampled_from([1, 2, 4, 3, 64]), st.integers(1, 40), st.integers(0, 3), st.integers(0, 6))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(ORDERS)), st.lists(STEPS, min_size=1, max_size=3))
def test_global_batches_are_the_same_on_any_ranks_and_workers_changed_at_any_step(
    pair: Collection, monkeypatch: pytest.MonkeyPatch, order: str, phases: list[tuple[int, int, int, int]]
) -> None:
    """Each phase has other ranks, workers and batches, and all but the last end in the middle."""
    reader = ORDERS[order](pair.open())
    rows: Any = reader.rows
    epoch = np.asarray(replace(rows, epoch=7) if isinstance(rows, Shuffled) else rows)
    done = 0
    state: Any = None
    for number, (ranks, batch, workers, steps) in enumerate(phases):
        datasets = [alone(reader, batch, rank=rank, world_size=ranks) for rank in range(ranks)]
        for dataset in datasets:
            dataset.set_epoch(7)
            if state is not None:
                dataset.load_state_dict(state)
        taken = [batches_of(dataset, workers, monkeypatch) for dataset in datasets]
        assert len(set(map(len, taken))) == 1
        assert len({tuple(map(len, batches)) for batches in taken}) == 1
        some = steps if number < len(phases) - 1 else len(taken[0])
        for of_ranks in list(zip(*taken, strict=True))[:some]:
            rows = [row for batch in of_ranks for row in batch]
            assert sorted(rows) == sorted(epoch[done : done + len(rows)].tolist())
            done += len(rows)
        for dataset in datasets:
            dataset.set_epoch(7, start=done)
        state, *others = [dataset.state_dict() for dataset in datasets]
        assert others == [state] * (ranks - 1)
        assert state["rows"] == done
    ranks = phases[-1][0]
    assert len(epoch) - done < (1 if ranks == 1 else 64 + ranks)
    if [phase[0] for phase in phases] == [1]:
        assert done == len(epoch)


@pytest.mark.parametrize("order", ["shuffled", "in order"])
def test_states_say_where_a_pass_is(pair: Collection, order: str) -> None:
    reader = ORDERS[order](pair.open())
    dataset = alone(reader)
    dataset.set_epoch(4)
    every = numbers(dataset)
    assert [row for batch in every for row in batch] != list(range(396)) or order == "in order"
    dataset.set_epoch(4)
    states = [dataset.state_dict()]
    for _ in dataset:
        states.append(dataset.state_dict())
        assert dataset.state_dict() == states[-1]  # to take it changes nothing
    assert [(state["epoch"], state["rows"]) for state in states] == [(4, min(396, 50 * k)) for k in range(9)]
    for step, state in enumerate(states):
        again = alone(reader)
        again.load_state_dict(json.loads(json.dumps(state)))
        assert again.state_dict() == state
        again.set_epoch(4)  # as at the head of a loop over epochs
        assert again.state_dict() == state
        assert numbers(again) == every[step:]
        assert numbers(again) == every, "the next pass begins with the first row"
        again.load_state_dict(state)
        again.set_epoch(5)
        assert (again.state_dict()["epoch"], again.state_dict()["rows"]) == (5, 0)
    dataset.set_epoch(4, start=150)
    assert numbers(dataset) == every[3:]


def test_a_state_fits_other_columns_dtypes_and_batches(pair: Collection) -> None:
    reader = pair.open().shuffle(1)
    dataset = alone(reader)
    batches = iter(dataset)
    first = numbers(itertools.islice(batches, 3))
    other = EmbeddingBatches(
        pair.open(meta_columns=["id"]).shuffle(1), 40, columns=["id", "i"], dtype=None, rank=0, world_size=1
    )
    other.load_state_dict(dataset.state_dict())
    rest = numbers(other)
    assert [row for batch in first + rest for row in batch] == list(reader.rows)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("order", ["shuffled", "in order"])
def test_torchdata_resumes_at_any_step(pair: Collection, order: str, workers: int) -> None:
    reader = ORDERS[order](pair.open())

    def dataset(epoch: int) -> EmbeddingBatches:
        made = alone(reader)
        made.set_epoch(epoch)
        return made

    every, following = numbers(dataset(2)), numbers(dataset(3))
    for step in range(9) if workers == 0 else (0, 3, 8):
        loader = stateful(dataset(2), workers)
        batches = iter(loader)
        assert numbers(itertools.islice(batches, step)) == every[:step]
        state = loader.state_dict()
        assert json.dumps(loader.state_dict()) == json.dumps(state)  # twice in a row
        again = stateful(dataset(2), workers)
        again.load_state_dict(state)
        assert numbers(again) == every[step:]
        again.dataset.set_epoch(3)
        assert numbers(again) == following
    assert numbers(loader) == every  # from the start: the end had been reached
    ended = stateful(dataset(2), workers)
    numbers(ended)
    resumed = stateful(dataset(3), workers)
    resumed.load_state_dict(ended.state_dict())
    assert numbers(resumed) == following, "the state of an ended epoch, then the next one"


def test_a_state_of_one_worker_fits_other_ranks_and_one_of_several_says_that_it_does_not(pair: Collection) -> None:
    reader = pair.open().shuffle(3, buffer_rows=128)
    epoch = np.asarray(reader.rows)
    for workers in (0, 1, 2):
        loader = stateful(alone(reader, 25, rank=1, world_size=2), workers)
        next(iter(loader))
        state = loader.state_dict()
        again = stateful(alone(reader, 10), workers)
        again.load_state_dict(state)
        if workers < 2:
            assert [row for batch in numbers(again) for row in batch] == epoch[50:].tolist()
        else:
            with pytest.raises(ArgumentError, match="state is of one of 2 workers, with steps of 50 rows"):
                list(again)


# New processes import all that they need, for seconds each.
@pytest.mark.parametrize(("method", "persistent"), [("fork", False), ("fork", True), ("spawn", True)])
def test_workers_learn_of_epochs_and_begin_anew(pair: Collection, method: str, persistent: bool) -> None:
    reader = pair.open().shuffle(3, buffer_rows=128)
    dataset, oracle = alone(reader, 99), alone(reader, 99)
    loader = loaded(dataset, 2, method, persistent_workers=persistent)
    every = []
    for epoch in range(2):
        oracle.set_epoch(epoch)
        every.append(numbers(oracle))
    assert every[0] != every[1]
    dataset.set_epoch(1, start=198)
    assert numbers(loader) == every[1][2:]
    assert numbers(loader) == every[1], "the next pass begins with the first row"
    dataset.set_epoch(0)
    assert numbers(loader) == every[0]
    with pytest.raises(ArgumentError, match=r"go on with set_epoch\(epoch, start=steps \* 99\)"):
        dataset.state_dict()
    dataset.set_epoch(1)
    assert dataset.state_dict()["rows"] == 0


RANK = """
    import json, sys
    import torch.distributed as dist
    from torch.utils.data import DataLoader
    from dask_embedding_reader import EmbeddingReader
    from dask_embedding_reader.torch import EmbeddingBatches
    from torchdata.stateful_dataloader import StatefulDataLoader

    folder, metadata, meeting, rank, out = sys.argv[1:]
    if __name__ == "__main__":
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
        reader = EmbeddingReader(folder, "parquet_npy", meta_columns=["id"], metadata_folder=metadata)
        dataset = EmbeddingBatches(reader.shuffle(3, buffer_rows=2048), 32, columns=["id", "i"])
        dataset.set_epoch(5)
        steps = []
        for vectors, columns in StatefulDataLoader(dataset, batch_size=None, num_workers=2):
            dist.all_reduce(vectors.sum())  # hangs if a rank has fewer batches
            steps.append(columns["i"].tolist())
        open(out, "w").write(json.dumps(steps))
        dist.destroy_process_group()
"""


def test_two_ranks_of_two_workers(pair: Collection, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    outs = [tmp_path / "0", tmp_path / "1"]
    program = [sys.executable, "-W", "ignore", tmp_path / "rank.py", pair.folder, pair.metadata_folder]
    commands = [[*program, tmp_path / "meeting", rank, out] for rank, out in enumerate(outs)]
    started = [subprocess.Popen([*map(str, command)]) for command in commands]
    assert [process.wait(250) for process in started] == [0, 0]
    steps = zip(*(json.loads(out.read_text()) for out in outs), strict=True)
    one = alone(pair.open().shuffle(3, buffer_rows=2048), 64)
    one.set_epoch(5)
    every = numbers(one)
    # One rank has the rest too: fewer than 64 rows.
    assert [sorted(first + second) for first, second in steps] == [sorted(batch) for batch in every[:6]]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda r: Unchecked([1], 5), ArgumentTypeError, "reader must be an EmbeddingReader, not list"),
        (lambda r: Unchecked(r, 0), ArgumentError, "batch_size must be at least 1"),
        (lambda r: Unchecked(r.shuffle().shard(2, 0), 5), ArgumentError, "is a shard already .shard 0 of 2"),
        (lambda r: Unchecked(r, 5, rank=1), ArgumentError, "rank=1 and world_size=None go together"),
        (lambda r: Unchecked(r, 5, rank=2, world_size=2), ArgumentError, "rank=2 is none: of world_size=2"),
        (lambda r: Unchecked(r, 5, columns="captoin"), ColumnError, "'captoin'; those .* are 'caption'"),
        (lambda r: Unchecked(r, 5, columns=[3]), ArgumentTypeError, "columns must be a column name"),
        (lambda r: Unchecked(r, 5, columns=["i", "i"]), ArgumentError, "names a column twice"),
        (lambda r: Unchecked(r, 5, dtype="text"), ArgumentTypeError, "no dtype that numpy knows"),
        (lambda r: Unchecked(r, 5, dtype="longdouble"), ArgumentError, "has no equal in torch"),
        (lambda r: Unchecked(r, 5, parallel_pieces=0), ArgumentError, "parallel_pieces"),
        (lambda r: Unchecked(r, 5, max_ram_usage_in_bytes=0), ArgumentError, "max_ram_usage_in_bytes"),
        (lambda r: Unchecked(r, 5).set_epoch("first"), ArgumentTypeError, "epoch must be a whole number"),
        (lambda r: Unchecked(r, 5).set_epoch(1, start=397), ArgumentError, "start=397 is out of range"),
        (lambda r: Unchecked(r, 5).set_epoch(1, start=-1), ArgumentError, "start=-1 is out of range"),
        (lambda r: Unchecked(r, 5).load_state_dict({"rows": 1}), ArgumentTypeError, "with token, epoch, rows"),
        (lambda r: Unchecked(r, 5).load_state_dict(3), ArgumentTypeError, "not 3"),
    ],
)
def test_bad_input_is_refused_at_the_call(
    pair: Collection, make: Callable[[EmbeddingReader], object], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        make(pair.open())


def test_states_of_other_data_are_refused(pair: Collection, tmp_path: Path) -> None:
    reader = pair.open()
    state = alone(reader.shuffle(1)).state_dict()
    other = write_collection(tmp_path, "npy", file_rows=(396,)).open()
    others: Sequence[EmbeddingReader] = [
        reader,
        reader.shuffle(2),
        reader.shuffle(1, buffer_rows=64),
        reader.take(slice(1, None)).shuffle(1),
        other.shuffle(1),
    ]
    for view in others:
        with pytest.raises(ArgumentError, match=r"of other data or another order \(token .*: load it with the same"):
            alone(view).load_state_dict(state)
    alone(pair.open().shuffle(1, epoch=5)).load_state_dict(state)
    with pytest.raises(ArgumentError, match="rows of the state=397 is out of range"):
        alone(reader.shuffle(1)).load_state_dict(state | {"rows": 397})


def test_ranks_that_nobody_told_of_are_noticed(pair: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun does
    with pytest.raises(ArgumentError, match=r"WORLD_SIZE=4 .* is not initialised: call init_process_group first"):
        EmbeddingBatches(pair.open(), 5)
    assert len(EmbeddingBatches(pair.open(), 5, rank=3, world_size=4)) == -(-384 // 4 // 5)


def test_its_examples_run() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", ["pytorch", "jax"])
def test_pages_that_need_an_environment_of_their_own_run(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [page] = [page for page in test_pages.PAGES if page.stem == name]
    test_pages.test_a_page_prints_what_it_says(page, monkeypatch, tmp_path)
