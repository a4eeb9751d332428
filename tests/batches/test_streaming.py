"""Batches of any lazy array: the rows that numpy says, each task computed once, little held, nothing left behind."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.base import optimize
from dask.delayed import delayed
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.budget import cached_nbytes
from dask_embedding_reader.errors import MismatchError, ReadError
from dask_embedding_reader.lazy import engines, window
from dask_embedding_reader.lazy.iter_batches import iter_batches
from tests.support.collections import FORMATS, assert_batches, finishes, wait_until, write_collection


class Source:
    """An array of known rows that counts how often each chunk is computed, and how many are alive at once."""

    def __init__(self, rows: int, chunk: int | tuple[int, ...], columns: int = 3, column_chunk: int = -1) -> None:
        self.data = np.random.default_rng(rows).standard_normal((rows, columns))
        self.computed: Counter[tuple[int, ...]] = Counter()
        self.alive = self.most_alive = 0
        self._lock = threading.Lock()
        array = da.from_array(self.data, chunks=(chunk, column_chunk))
        self.array = array.map_blocks(self._load, dtype=float, meta=np.empty((0, 0)))
        self.computed.clear()

    def _load(self, block: Any, block_info: Any = None) -> Any:
        loaded = block.copy()
        with self._lock:
            self.computed[block_info[0]["chunk-location"]] += 1
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(loaded, self._drop)
        return loaded

    def __dask_tokenize__(self) -> int:
        return id(self)

    def _drop(self) -> None:
        self.alive -= 1  # without the lock: may run within it

    @property
    def times(self) -> set[int]:
        return set(self.computed.values())


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    gc.collect()
    threads = set(threading.enumerate())
    yield
    assert wait_until(lambda: set(threading.enumerate()) <= threads), threading.enumerate()


def rows_of(array: da.Array, frame: Any = None, batch_size: int = 7, **options: Any) -> Any:
    """All rows, after checks of what every batch must be."""
    batches = list(iter_batches(array, frame, batch_size=batch_size, **options))
    for number, (rows, meta) in enumerate(batches):
        assert rows.shape == (min(batch_size, len(array) - number * batch_size), *array.shape[1:])
        assert rows.dtype == array.dtype
        assert rows.flags.c_contiguous
        assert rows.flags.writeable
        assert len(meta) == len(rows)
        assert meta.columns[-1] == "i"
        assert isinstance(meta.index, pd.RangeIndex)
        if frame is None:
            assert meta["i"].tolist() == list(range(number * batch_size, number * batch_size + len(rows)))
    return np.concatenate([np.empty((0, *array.shape[1:]), array.dtype), *(rows for rows, _ in batches)])


# ---------------------------------------------------------------------------------------------------------------------
# The rows


Expression = Callable[[Any], Any]

#: Of an array and of numpy rows alike.
STEPS: dict[str, Expression] = {
    "add": lambda x: x + 1,
    "square": lambda x: x * x,
    "centre": lambda x: x - x.mean(axis=0),
    "standardise": lambda x: (x - x.mean(axis=0)) / (x.std(axis=0) + 1),
    "scale rows": lambda x: x / (1 + abs(x).sum(axis=1, keepdims=True)),
    "reverse": lambda x: x + x[::-1],
    "slice": lambda x: x[int(len(x) > 1) :: 2],  # never of nothing, which has no largest
    "gram": lambda x: x @ (x.T @ x) / 100,
    "cumulate": lambda x: x.cumsum(axis=0) / 10,
    "largest": lambda x: x - abs(x).max(),
}


def overlapped(x: Any) -> Any:
    """The sum of each row and its neighbours."""

    def add(block: Any) -> Any:
        padded = np.concatenate([block[:1] * 0, block, block[:1] * 0])
        return padded[:-2] + padded[1:-1] + padded[2:]

    if isinstance(x, np.ndarray):
        return add(x)
    return da.overlap.map_overlap(add, x, depth=(1, 0), boundary=0.0, dtype=float, meta=np.empty((0, 0)))


@given(st.data())
def test_batches_equal_numpy(data: st.DataObject) -> None:
    chunks = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12), label="chunks"))
    source = Source(sum(chunks), chunks, columns=4, column_chunk=data.draw(st.integers(1, 4)))
    lazy, rows = source.array, source.data
    for name in data.draw(st.lists(st.sampled_from([*STEPS, "rechunk", "overlap"]), max_size=4), label="steps"):
        if name == "rechunk":
            lazy = lazy.rechunk((data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))))
        elif name == "overlap":
            lazy, rows = overlapped(lazy), overlapped(rows)
        else:
            lazy, rows = STEPS[name](lazy), STEPS[name](rows)
    batch_size = data.draw(st.integers(1, 30), label="batch_size")
    limit = data.draw(st.sampled_from([1, 500, 2_000, 2**32]), label="limit")
    source.computed.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*max_ram_usage_in_bytes", category=UserWarning)
        actual = finishes(lambda: rows_of(lazy, None, batch_size, max_ram_usage_in_bytes=limit))
    np.testing.assert_allclose(actual, rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "int8", ">f4", "complex64", "bool", "M8[us]", "U3", "O"])
@pytest.mark.parametrize("shape", [(11,), (11, 3), (11, 2, 3), (11, 0)])
def test_any_dtype_and_number_of_axes(dtype: str, shape: tuple[int, ...]) -> None:
    rows = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.testing.assert_array_equal(rows_of(da.from_array(rows, chunks=(4, *[2] * (len(shape) - 1)))), rows)


@pytest.mark.parametrize("chunks", [(0,), (0, 3, 0, 0, 4, 0)])
def test_chunks_without_rows(chunks: tuple[int, ...]) -> None:
    rows = np.arange(2.0 * sum(chunks)).reshape(-1, 2)
    np.testing.assert_array_equal(rows_of(da.from_array(rows, chunks=(chunks, 2))), rows)


def test_writing_to_a_batch_changes_nothing_else() -> None:
    data = np.zeros((10, 2))
    table = pd.DataFrame({"a": range(10)})
    x = da.from_array(data, chunks=(4, 2)).persist(scheduler="synchronous")
    for frame in (table, dd.from_pandas(table, npartitions=3)):
        for rows, meta in iter_batches(x, frame, batch_size=4):
            assert not rows.any()
            rows += 1
            meta.loc[:, "a"] = -1
    assert not data.any()
    assert table["a"].tolist() == list(range(10))


def test_kept_batches_stay_what_they_were() -> None:
    data = np.arange(40.0).reshape(20, 2)
    batches = [rows for rows, _ in iter_batches(da.from_array(data, chunks=(3, 2)), batch_size=4)]
    np.testing.assert_array_equal(np.concatenate(batches), data)


KEPT: dict[str, Callable[[Any], Any]] = {
    "an array": lambda block: block,
    "a part of an array": lambda block: np.concatenate([block, block])[: len(block)],
    "an array that must not be changed": lambda block: block.setflags(write=False) or block,
    "an array in another order": np.asfortranarray,
    "an array of another type": lambda block: block.astype(np.float32),
    "an array in another byte order": lambda block: block.astype(">f8"),
    "one row for all": lambda block: np.broadcast_to(block[:1], block.shape),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("returned", ["a new one", "the kept one", "a view of the kept one"])
def test_what_a_task_makes_or_keeps_is_handed_out_as_an_array_of_its_own(kind: str, returned: str) -> None:
    kept: dict[int, Any] = {}
    data = np.repeat([1.0, 2.0, 3.0], 20)[:, np.newaxis] * [1, 2]

    def load(block: Any, block_info: Any = None) -> Any:
        made = KEPT[kind](block.copy())
        if returned == "a new one":
            return made
        made = kept.setdefault(block_info[0]["chunk-location"][0], made)
        return made if returned == "the kept one" else made[:]

    x = da.from_array(data, chunks=(20, 2)).map_blocks(load, dtype=float, meta=np.empty((0, 0)))
    start = 0
    for rows, _ in iter_batches(x, batch_size=4):
        np.testing.assert_array_equal(rows, data[start : start + 4])
        assert rows.dtype == float
        assert rows.flags.c_contiguous
        rows += 1
        start += 4
    for number, block in kept.items():
        np.testing.assert_array_equal(block, data[20 * number : 20 * number + 20])


def test_kept_batches_keep_few_chunks_alive() -> None:
    source = Source(600, 30)
    batches = [rows for rows, _ in iter_batches(source.array, batch_size=4)]
    assert wait_until(lambda: source.alive <= 2)
    np.testing.assert_array_equal(np.concatenate(batches), source.data)
    source = Source(60, 30)
    first, _ = next(iter_batches(source.array, batch_size=4))
    assert wait_until(lambda: source.alive == 0)
    np.testing.assert_array_equal(first, source.data[:4])


# ---------------------------------------------------------------------------------------------------------------------
# Each task once, and little held


ONCE: dict[str, Expression] = {
    "as it is": lambda x: x,
    "chain": lambda x: abs(x * 2 + 1),
    "used twice": lambda x: x * 2 + x.sum(axis=1, keepdims=True),
    "larger chunks": lambda x: x.rechunk((10, -1)),
    "smaller chunks": lambda x: x.rechunk((1, 1)),
    "overlap": overlapped,
    "product": lambda x: x @ np.ones((3, 2)),
    "sums": lambda x: x.cumsum(axis=0),
    "neighbours": lambda x: x[1:] - x[:-1],
    "one result": lambda x: x.mean(axis=0, keepdims=True),
}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
def test_every_chunk_is_computed_once(name: str, batch_size: int) -> None:
    source = Source(60, 3)
    rows_of(ONCE[name](source.array), None, batch_size)
    assert len(source.computed) == 20
    assert source.times == {1}


TWICE: dict[str, tuple[Expression, int]] = {
    "centred": (lambda x: x - x.mean(axis=0), 2),
    "standardised": (lambda x: (x - x.mean(axis=0)) / x.std(axis=0), 2),
    "nested": (lambda x: (x - x.mean(axis=0)) - ((x - x.mean(axis=0)) / x.std(axis=0)).mean(axis=0), 3),
    "variance by hand": (lambda x: x / ((x - x.mean(axis=0)) ** 2).mean(axis=0), 3),
    "derived": (lambda x: x * np.sqrt(1 / abs(x.mean(axis=0) + x.max(axis=0))), 2),
    "gram": (lambda x: x @ (x.T @ x), 2),
    "singular vectors": (lambda x: da.linalg.svd(x)[0], 2),
}


@pytest.mark.parametrize("rows", [6, 60, 600])
@pytest.mark.parametrize("name", TWICE)
def test_reductions_cost_a_pass_each_level_and_hold_nothing(name: str, rows: int) -> None:
    source = Source(rows, 3)
    expression, times = TWICE[name]
    lazy = expression(source.array)
    source.computed.clear()
    with dask.config.set(num_workers=2):
        rows_of(lazy, None, 7, max_ram_usage_in_bytes=2_000)
    assert len(source.computed) == rows // 3
    assert source.times == {times}
    assert source.most_alive <= 12


@pytest.mark.parametrize("name", ["as it is", "larger chunks", "smaller chunks", "overlap", "sums", "neighbours"])
def test_a_small_limit_holds_few_chunks(name: str) -> None:
    source = Source(3_000, 3)
    with dask.config.set(num_workers=2):
        rows_of(ONCE[name](source.array), None, 7, max_ram_usage_in_bytes=3_000)
    assert source.times == {1}
    assert source.most_alive <= 3_000 // 72


def test_what_is_used_far_apart_is_computed_again_only_where_it_does_not_fit() -> None:
    source = Source(600, 3)
    rows_of(source.array + source.array[::-1])
    assert source.times == {1}
    source.computed.clear()
    source.most_alive = source.alive
    with dask.config.set(num_workers=2):
        rows_of(source.array + source.array[::-1], max_ram_usage_in_bytes=2_000)
    assert source.times <= {1, 2}
    assert source.most_alive <= 50


def test_a_quarter_of_the_limit_is_for_what_is_used_again() -> None:
    source = Source(600, 3)
    lazy = source.array + source.array[::-1]
    source.computed.clear()
    # Of 200 chunks of 72 bytes, with twice that to compute each: 100 chunks ahead.
    rows_of(lazy, max_ram_usage_in_bytes=4 * 100 * 3 * 72)
    again = Counter(source.computed.values())[2]
    assert 90 <= again <= 110  # those whose uses lie further apart


def test_a_small_array_is_computed_once_for_all() -> None:
    computed: list[int] = []

    def invert(block: Any) -> Any:
        computed.append(1)
        return np.linalg.inv(block)

    source = Source(60, 3)
    matrix = da.from_array(np.eye(3) * 2, chunks=3)
    computed.clear()
    weights = matrix.map_blocks(invert, dtype=float, meta=np.empty((0, 0)))
    np.testing.assert_allclose(rows_of(source.array @ weights), source.data / 2)
    assert len(computed) == 1


def test_the_consumer_holds_back_the_producer() -> None:
    source = Source(3_000, 3)
    with dask.config.set(num_workers=2):
        batches = iter_batches(source.array, batch_size=3, max_ram_usage_in_bytes=2_000)
        next(batches)
        assert sum(source.computed.values()) <= 2_000 // 72
        batches.close()  # type: ignore[attr-defined]


def test_nothing_is_computed_before_the_first_batch_is_asked_for() -> None:
    source = Source(60, 3)
    iter_batches(source.array - source.array.mean(axis=0), batch_size=3)
    assert not source.computed


def test_a_chunk_beyond_the_limit_is_computed_alone_with_one_warning() -> None:
    source = Source(60, 10)
    with pytest.warns(UserWarning, match=r"240 for the largest chunk.*limit is 100 ") as caught:
        batches = iter_batches(source.array, batch_size=4, max_ram_usage_in_bytes=100)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    next(batches)
    idle_stream(batches)
    assert sum(source.computed.values()) == 1
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), source.data[4:])


# ---------------------------------------------------------------------------------------------------------------------
# The frame


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_array_and_frame_of_a_reader(name: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, name, row_group_rows=5)
    reader = collection.open()
    x, meta = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=4)
    assert_batches(iter_batches(x, meta, batch_size=6), collection, 6, dtype=None, of_frame=True)
    if name == "npy":
        x, meta = reader.to_dask_array(3, 20, max_piece_size=4), reader.to_dask_dataframe(3, 20, max_piece_size=4)
        batches = iter_batches(x.rechunk((7, -1)), meta, batch_size=6)
        assert_batches(batches, collection, 6, 3, 20, dtype=None, of_frame=True)


def table(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"a": np.arange(rows) * 2, "b": [f"w{k}" for k in range(rows)]})


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.integers(1, 20),
    st.booleans(),
)
def test_frames_of_other_partitions(chunks: list[int], parts: list[int], batch_size: int, lazy: bool) -> None:
    rows = min(sum(chunks), sum(parts))
    source = da.from_array(np.arange(rows), chunks=-1).rechunk((tuple(_cut(chunks, rows)),))
    frame: Any = table(rows)
    if lazy:
        bounds = np.cumsum([0, *_cut(parts, rows)]).tolist()
        pieces = [frame.iloc[a:b] for a, b in itertools.pairwise(bounds)]
        frame = dd.from_map(lambda k: pieces[k], range(len(pieces)), divisions=(*bounds[:-1], rows - 1), meta=frame)
    place = 0
    for batch, meta in iter_batches(source, frame, batch_size=batch_size):
        expected = table(rows).iloc[place : place + len(batch)].reset_index(drop=True)
        expected["i"] = batch
        pd.testing.assert_frame_equal(meta, expected, check_dtype=False)
        place += len(batch)
    assert place == rows


def _cut(sizes: list[int], rows: int) -> list[int]:
    kept = []
    for size in sizes:
        if size < rows:
            kept.append(size)
            rows -= size
        else:
            break
    return [*kept, rows]


def test_row_numbers_come_from_the_index_or_the_column_named_i_else_from_the_position() -> None:
    x = da.arange(6, chunks=3)
    numbered = table(6).set_axis(pd.RangeIndex(100, 106, name="i"))
    for frame, first in [(numbered, 100), (numbered.reset_index(), 100), (numbered.rename_axis("j"), 0)]:
        for given_frame in (frame, dd.from_pandas(frame, npartitions=2)):
            metas = [meta for _, meta in iter_batches(x, given_frame, batch_size=4)]
            assert all(list(meta.columns) == ["a", "b", "i"] for meta in metas)
            assert [i for meta in metas for i in meta["i"]] == list(range(first, first + 6))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[da.Array, dd.DataFrame, pd.DataFrame]:
    """An array, its lazy frame and that in memory, of files of 9, 0, 13 and 18 rows; row k holds k in both."""
    root = tmp_path_factory.mktemp("numbered")
    for number, (start, stop) in enumerate([(0, 9), (9, 9), (9, 22), (22, 40)]):
        np.save(root / f"{number}.npy", np.arange(start, stop, dtype=np.float64)[:, None] * [1, 1, 1])
        pd.DataFrame({"row": range(start, stop)}).to_parquet(root / f"{number}.parquet")
    reader = EmbeddingReader(root, "parquet_npy", meta_columns="row")
    frame = reader.to_dask_dataframe(max_piece_size=5)
    return reader.to_dask_array(max_piece_size=5), frame, frame.compute(scheduler="synchronous")


#: Of the array and of numpy row numbers alike.
PICKS: dict[str, Expression] = {
    "all": lambda x: x,
    "slice": lambda x: x[5:31],
    "slices": lambda x: x[3:][2:20][1:],
    "steps": lambda x: x[2::3],
    "backwards": lambda x: x[::-1],
    "list": lambda x: x[[30, 2, 2, 39, 19, 20, 21]],
    "order within a chunk": lambda x: x[[2, 0, 1]],
    "mask": lambda x: x[np.arange(40) % 3 == 1],
    "joined": lambda x: _concatenate([x[30:], x[:7], x[12:20]]),
    "turned": lambda x: _concatenate([x[-3:], x[:-3]]),
    "larger chunks": lambda x: _rechunk(x[7:33], 11),
    "smaller chunks": lambda x: _rechunk(x[::2], 2),
    "narrow chunks": lambda x: _rechunk(x[7:33], (6, 1)),
}
ROW_BY_ROW: dict[str, Callable[[da.Array], da.Array]] = {
    "as it is": lambda x: x,
    "computed": lambda x: abs(x * 2 + 1).astype("float32"),
    "centred": lambda x: (x - x.mean(axis=0)) / x.std(axis=0),
    "norms": lambda x: (x**2).sum(axis=1),
    "item": lambda x: x[:, 1],
    "product": lambda x: x @ (x.T @ x),
    "scores": lambda x: x @ x[:2].T,
    "turned twice": lambda x: x.T.T,
    "scaled": lambda x: (x.T / da.linalg.norm(x + 1, axis=1)).T,
    "turned and cut": lambda x: (x.T[1:] * 2).T,
    "foreign": lambda x: x - da.arange(len(x), chunks=(x.chunks[0],))[:, None],
    "optimized": lambda x: optimize(x * 2)[0],
}


def _concatenate(parts: list[Any]) -> Any:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else da.concatenate(parts)


def _rechunk(x: Any, chunks: Any) -> Any:
    return x if isinstance(x, np.ndarray) else x.rechunk(chunks)


def frames_of(frame: pd.DataFrame, chunks: tuple[int, ...]) -> dict[str, Any]:
    """The same rows in all kinds of frames that go beside an array of these chunks."""
    bounds = np.cumsum([0, *chunks]).tolist()
    lazy = dd.from_map(lambda k: frame.iloc[bounds[k] : bounds[k + 1]], range(len(chunks)), meta=frame.iloc[:0])
    return {"index": frame, "column": frame.reset_index(), "lazy": lazy, "lazy column": lazy.reset_index()}


def assert_refused(array: da.Array, frame: Any, rows: Any, batch_size: int = 4) -> str:
    """The frame is refused before a row of it comes beside another row of the array, which has these."""

    def consume() -> None:
        place = 0
        for batch, meta in iter_batches(array, frame, batch_size=batch_size):
            assert meta["row"].tolist() == rows[place : place + len(batch)].tolist()
            place += len(batch)

    with pytest.raises(MismatchError) as caught:
        consume()
    return str(caught.value)


@pytest.mark.parametrize("pick", PICKS)
def test_the_rows_that_an_array_is_made_of_are_those_of_the_frame(pick: str, numbered: tuple[Any, Any, Any]) -> None:
    array, frame = PICKS[pick](numbered[0]), numbered[2]
    rows = PICKS[pick](np.arange(40))
    others = [other for other in (np.roll(rows, 1), (rows + 1) % 40, np.sort(rows)) if (other != rows).any()]
    for number, (name, expression) in enumerate(ROW_BY_ROW.items()):
        derived = expression(array)
        frames = frames_of(frame.loc[rows], derived.chunks[0])
        for kind in ("index", "lazy") if number else frames:
            metas = [meta for _, meta in iter_batches(derived, frames[kind], batch_size=4)]
            assert [i for meta in metas for i in meta["i"]] == rows.tolist(), (name, kind)
        for other in others:
            frames = frames_of(frame.loc[other], derived.chunks[0])
            for kind in ("index", "lazy") if number else frames:
                said = assert_refused(derived, frames[kind], rows)
                assert re.search(r"'i' of the frame is \d+ beside row \d+ of the array", said), (name, kind)


UNTOLD: dict[str, Callable[[da.Array], da.Array]] = {
    "from elsewhere": lambda x: da.zeros((26, 3), chunks=4),
    "persisted": lambda x: x[7:33].persist(scheduler="synchronous"),
    "overlapping": lambda x: overlapped(x[7:33]),
    "partly": lambda x: da.concatenate([da.zeros((3, 3)), x[10:20], da.zeros((13, 3))]),
    "picked from elsewhere": lambda x: da.zeros((30, 3), chunks=4)[np.r_[5, 3:28]],
    "picked from products": lambda x: (x[7:33].T @ x[7:33])[np.arange(26) % 3],
}


@pytest.mark.parametrize("name", UNTOLD)
def test_where_the_array_does_not_tell_its_rows_they_count_up_by_one(name: str, numbered: tuple[Any, Any, Any]) -> None:
    array, frame = UNTOLD[name](numbered[0]), numbered[2]
    for kind, given_frame in frames_of(frame.loc[7:32], array.chunks[0]).items():
        metas = [meta for _, meta in iter_batches(array, given_frame, batch_size=4)]
        assert [i for meta in metas for i in meta["i"]] == list(range(7, 33)), kind
    swapped = [*range(7, 31), 32, 31]
    for rows in (np.arange(40)[:0:-1][:26], np.arange(40)[::2].repeat(2)[:26], np.array([*range(25), 26]), swapped):
        for given_frame in frames_of(frame.loc[rows], array.chunks[0]).values():
            with pytest.raises(MismatchError, match=r"counts up by one where the array does not tell"):
                list(iter_batches(array, given_frame, batch_size=4))


OTHERS: dict[str, Callable[[Any], Any]] = {
    "sampled": lambda m: m.sample(frac=1, random_state=0),
    "sorted": lambda m: m.sort_values("key"),
    "of other rows": lambda m: m.loc[10:29],
    "joined": lambda m: m.merge(m[m["row"] != 9], left_index=True, right_index=True, suffixes=("", "2")),
    "shortened": lambda m: m[m["row"] != 9],
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_frame_of_other_rows_is_an_error_before_wrong_pairs_come_out(
    other: str, lazy: bool, numbered: tuple[Any, Any, Any]
) -> None:
    x, frame = numbered[0], numbered[1] if lazy else numbered[2]
    with dask.config.set(scheduler="synchronous"):  # sorting computes
        given_frame = OTHERS[other](frame.assign(key=(frame["row"] * 7) % 40))
        assert "frame" in assert_refused(x[:20] if other == "of other rows" else x, given_frame, np.arange(40), 3)


def test_frames_cut_into_partitions_that_the_files_do_not_have(tmp_path: Path) -> None:
    # Dask calls the partitions that loc and from_delayed leave whole as others, which it then took for cycles.
    for number, start in enumerate((0, 10)):
        np.save(tmp_path / f"{number}.npy", np.arange(start, start + 10)[:, None] * [1.0, 1.0])
        pd.DataFrame({"row": range(start, start + 10)}).to_parquet(tmp_path / f"{number}.parquet")
    reader = EmbeddingReader(tmp_path, "parquet_npy", metadata_folder=tmp_path, meta_columns="row")
    x, lazy = reader.to_dask_array(max_piece_size=3), reader.to_dask_dataframe(max_piece_size=3)
    frame = lazy.compute(scheduler="synchronous")
    parts = [delayed(frame[start : start + 5]) for start in range(0, 20, 5)]
    other = dd.from_delayed(parts, meta=lazy._meta, divisions=(0, 5, 10, 15, 19))
    for array, cut, rows in (
        (x[5:15], lazy.loc[5:14], [*range(5, 15)]),
        (x[2:], other.loc[2:], [*range(2, 20)]),
        (da.concatenate([x[10:], x[:10]]), dd.concat([lazy.loc[10:], lazy.loc[:9]]), [*range(10, 20), *range(10)]),
    ):
        pairs = list(iter_batches(array, cut, batch_size=4))
        assert [row for _, meta in pairs for row in meta["row"]] == rows
        assert [row for batch, _ in pairs for row in batch[:, 0]] == rows


def test_a_frame_that_is_computed_in_other_partitions_than_dask_tells() -> None:
    whole = table(23).rename_axis("i")
    parts = [delayed(whole[start:stop]) for start, stop in ((0, 9), (9, 10), (10, 23))]
    frame = dd.from_delayed(parts, meta=whole[:0], divisions=(0, 9, 10, 22)).repartition(npartitions=5)
    with dask.config.set(scheduler="synchronous"):  # sorting computes
        ordered = frame.sort_values("a")
        assert ordered.npartitions != ordered.optimize().npartitions
        with pytest.raises(MismatchError, match=r"the frame has 5 partitions, the array 4 chunks"):
            iter_batches(da.arange(23, chunks=6), ordered, batch_size=3)


@pytest.mark.parametrize("asked", [3, 5, 40])
def test_a_frame_that_is_cut_into_fewer_partitions_than_asked_for(asked: int, numbered: tuple[Any, Any, Any]) -> None:
    # Dask cuts at most between any two divisions that it knows, and tells the number asked for all the same.
    x, whole = numbered[0], numbered[2]
    cut = dd.from_pandas(whole, npartitions=1).repartition(divisions=(0, 1, 39)).repartition(npartitions=asked)
    assert cut.npartitions > len(cut.divisions) - 1
    array = x.rechunk({0: (1, 39)})  # as many chunks as partitions of three asked for, of other rows
    for batch, meta in iter_batches(array, cut, batch_size=7):
        assert (batch[:, 0] == meta["row"]).all()
    with pytest.raises(MismatchError, match=r"is 0 beside row 0 of the array, where 39 was expected"):
        next(iter_batches(array[::-1], cut, batch_size=7))


def test_a_frame_without_row_numbers_is_paired_by_position(numbered: tuple[Any, Any, Any]) -> None:
    x, lazy, frame = numbered
    backwards = frame[::-1].reset_index(drop=True)
    for given_frame in (lazy.reset_index(drop=True), lazy.rename_axis("j"), frame.rename_axis(None), backwards):
        rows = [row for _, meta in iter_batches(x, given_frame, batch_size=3) for row in meta["row"]]
        assert rows == list(range(39, -1, -1) if given_frame is backwards else range(40))


@pytest.mark.parametrize("kind", ["int32", "uint64", "Int64", "int64[pyarrow]", "float64", "object", "category"])
def test_row_numbers_of_any_type(kind: str) -> None:
    x = da.zeros((6, 2), chunks=4)
    right, wrong = (table(6).assign(i=pd.Series(i, dtype=kind)) for i in ([3, 4, 5, 6, 7, 8], [3, 4, 5, 7, 6, 8]))
    assert [i for _, meta in iter_batches(x, right, batch_size=4) for i in meta["i"]] == list(range(3, 9))
    with pytest.raises(MismatchError, match=r"is 7(\.0)? beside row 3 .* 6 was expected"):
        next(iter_batches(x, wrong, batch_size=4))


@pytest.mark.parametrize(
    "numbers",
    [
        list("abcdef"),
        [0, 1, None, 3, 4, 5],
        pd.array([0, 1, None, 3, 4, 5], "Int64"),
        pd.array([None, 1, 2, 3, 4, 5], "Int64"),
        [-np.inf, 1, 2, 3, 4, 5],
        [0.0, 1, 2.5, 3, 4, 5],
        [True] * 6,
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_what_are_no_row_numbers_is_not_taken_for_them(numbers: Any, lazy: bool) -> None:
    frame: Any = table(6).assign(i=numbers)
    with pytest.raises(MismatchError, match=r"'i' of the frame is .* drop the numbers: .*reset_index\(drop=True\)"):
        list(iter_batches(da.zeros((6, 2), chunks=3), dd.from_pandas(frame, 2) if lazy else frame, batch_size=4))


def test_a_frame_that_lost_rows_is_an_error_before_wrong_pairs_come_out() -> None:
    x = da.arange(40, chunks=4)
    frame = dd.from_pandas(table(40), npartitions=10)
    seen = 0

    def consume() -> None:
        nonlocal seen
        for rows, meta in iter_batches(x, frame[frame.a != 34], batch_size=3):
            assert (meta["a"] == 2 * rows).all()
            seen += len(rows)

    with pytest.raises(MismatchError, match=r"from row 19 on.*\[16, 20\) has 3 rows, not 4"):
        consume()
    assert seen == 15


def test_a_frame_made_of_the_array_costs_at_most_one_more_pass() -> None:
    source = Source(60, 3)
    frame = dd.from_dask_array(source.array, columns=["a", "b", "c"])
    source.computed.clear()
    for rows, meta in iter_batches(source.array * 2, frame, batch_size=7):
        np.testing.assert_array_equal(rows, 2 * meta[["a", "b", "c"]].to_numpy())
    assert source.times <= {1, 2}  # Dask's frames keep a graph of their own


# ---------------------------------------------------------------------------------------------------------------------
# What counts against the limit, as it is when nothing runs


def idle_stream(batches: Any) -> Any:
    """What computes batches, once all that was started is done."""
    stream = batches.gi_frame.f_locals["stream"]
    assert wait_until(lambda: all(future.done() for _, future in stream._started))
    return stream


def counted_nbytes(stream: Any) -> int:
    return int(stream._request.limit_nbytes - stream._budget.left_nbytes - cached_nbytes())


@pytest.mark.parametrize("kept", [1, 2, 60])
def test_chunks_and_batches_count_as_long_as_they_live(kept: int) -> None:
    source = Source(600, 30)
    batches = iter_batches(source.array, batch_size=10, max_ram_usage_in_bytes=50_000)
    held: deque[Any] = deque(maxlen=kept)
    for batch, _ in batches:
        held.append(batch)
        own = sum(rows.nbytes for rows in held if not isinstance(rows.base, window._Part))
        stream = idle_stream(batches)
        assert counted_nbytes(stream) >= 720 * source.alive + own
    assert counted_nbytes(stream) <= 720 * (source.alive + 1) + own + 2 * 240
    del batch


def test_what_all_rows_use_counts_and_what_few_use_as_long_as_they_do() -> None:
    source = Source(600, 30, columns=50)
    lazy = source.array[1:] - source.array[:-1] + source.array.mean(axis=0)
    batches = iter_batches(lazy, batch_size=30)
    held = []
    for _ in batches:
        stream = idle_stream(batches)
        engine = stream._engine
        held.append(engine._held_nbytes)
        parts = stream._batches_nbytes(), stream._units_nbytes(), engine._held_nbytes, engine._buffers.free_nbytes
        assert counted_nbytes(stream) == sum(parts)
    mean = source.data[0].nbytes
    assert min(held) >= mean
    assert max(held) > mean
    assert held[-1] == mean


def test_memory_that_pieces_are_read_into_again_counts_and_is_an_eighth_of_the_limit(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.ones((600, 1_000), np.float32))
    x = EmbeddingReader(tmp_path).to_dask_array(max_piece_size=20)
    batches = iter_batches(x, batch_size=50, max_ram_usage_in_bytes=1_600_000)
    most = 0
    for _ in batches:
        stream = idle_stream(batches)
        free = stream._engine._buffers.free_nbytes
        most = max(most, free)
        assert stream._engine.held_nbytes == free
    assert 80_000 <= most <= 200_000


@pytest.mark.parametrize(("batch_size", "limit"), [(3, 3_000), (300, 16_560)])
def test_no_more_chunks_are_under_way_than_fit(batch_size: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of need, and where one batch needs many: there would be threads for 40."""
    started: list[int] = []

    def start(self: Any, units: Any, plain: Any = engines.Threads.start) -> Any:
        started.append(len(units))
        return plain(self, units)

    monkeypatch.setattr(engines.Threads, "start", start)
    source = Source(1_200, 3)
    with dask.config.set(num_workers=20):
        rows_of(source.array, None, batch_size, max_ram_usage_in_bytes=limit)
    # Later ones depend on how many are done by then.
    assert started[0] == (limit - 2 * batch_size * 24) // (3 * 72)


def test_of_batches_that_were_kept_and_let_go_of_the_memory_of_two_is_kept() -> None:
    source = Source(600, 30)
    batches = iter_batches(source.array, batch_size=50)  # of several chunks, so that they are copied
    held = [rows for rows, _ in itertools.islice(batches, 6)]
    stream = idle_stream(batches)
    assert stream._buffers.lent_nbytes >= 6 * held[0].nbytes
    nbytes = held[0].nbytes
    held.clear()
    lent, free = stream._buffers.lent_nbytes, stream._buffers.free_nbytes
    assert 0 < free <= 2 * (nbytes + 64)
    assert stream._batches_nbytes() == lent + free > 2 * nbytes


@pytest.mark.parametrize("name", ["sums", "centred"])
def test_few_wide_intermediates_are_held_at_once(name: str) -> None:
    """Of 24 kB each, where what is handed out has a thousandth of that; and what a mean is made of."""
    source = Source(120, 3, columns=1_000)

    def work(block: Any) -> Any:
        time.sleep(0.01)
        return block.sum(axis=1)

    expressions: dict[str, Expression] = {
        "sums": lambda x: x.map_blocks(work, drop_axis=1, dtype=float, meta=np.empty(0)),
        "centred": lambda x: x.sum(axis=1) - x.map_blocks(work, drop_axis=1, dtype=float, meta=np.empty(0)).mean(),
    }
    lazy = expressions[name](source.array)
    with dask.config.set(num_workers=20):
        for _ in iter_batches(lazy, batch_size=3, max_ram_usage_in_bytes=200_000):
            pass
    assert source.most_alive <= 200_000 // 24_000


def test_rows_of_a_frame_count_until_their_partition_is_handed_out() -> None:
    frame = dd.from_pandas(pd.DataFrame({"text": ["x" * 2_000] * 600}, dtype=object), npartitions=2)
    batches = iter_batches(da.zeros((600, 2), chunks=(300, 2)), frame, batch_size=10)
    for _ in range(29):
        next(batches)
        assert counted_nbytes(idle_stream(batches)) >= 2 * 300 * 2_000  # the second one is there already
    for _ in range(31):
        next(batches)
    assert counted_nbytes(idle_stream(batches)) < 100_000


def test_wide_texts_hold_back_what_is_computed_ahead() -> None:
    """60 partitions of some 20 kB, of which ten are within the limit."""
    computed: list[int] = []

    def note(part: Any) -> Any:
        computed.append(len(part))
        return part

    frame = dd.from_pandas(pd.DataFrame({"text": ["x" * 2_000 for _ in range(600)]}, dtype=object), npartitions=60)
    frame = frame.map_partitions(note, meta=frame._meta)
    computed.clear()
    with dask.config.set(num_workers=20):
        batches = iter_batches(da.zeros((600, 2), chunks=(10, 2)), frame, batch_size=10, max_ram_usage_in_bytes=200_000)
        ahead = []
        for number in range(50):
            next(batches)
            idle_stream(batches)
            ahead.append(len(computed) - number - 1)
        batches.close()  # type: ignore[attr-defined]
    assert max(ahead[20:]) <= 11
    assert min(ahead[20:]) >= 3


# ---------------------------------------------------------------------------------------------------------------------
# Leaving, and what goes wrong


def by_break(batches: Iterator[Any]) -> None:
    for _ in batches:
        break


def by_exception(batches: Iterator[Any]) -> None:
    with suppress(RuntimeError):
        for _ in batches:
            raise RuntimeError("in the body")


def by_garbage_collection(batches: Iterator[Any]) -> None:
    next(batches)
    cycle: list[Any] = [batches]
    cycle.append(cycle)


@pytest.mark.parametrize("leave", [by_break, by_exception, by_garbage_collection])
@pytest.mark.parametrize("name", ["standardised", "overlap"])
def test_leaving_early_stops_the_computation(name: str, leave: Callable[[Iterator[Any]], None]) -> None:
    source = Source(3_000, 3)
    lazy = overlapped(source.array) if name == "overlap" else TWICE[name][0](source.array)
    source.computed.clear()
    with dask.config.set(num_workers=2):
        finishes(lambda: leave(iter_batches(lazy, batch_size=2)))
    gc.collect()
    assert wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("embedding-reader")])
    assert sum(source.computed.values()) < 1_500
    assert wait_until(lambda: source.alive == 0)


def test_a_finished_loop_holds_nothing_while_its_iterator_is_held() -> None:
    source = Source(60, 3)
    batches = iter_batches(overlapped(source.array), batch_size=7)
    for _ in batches:
        pass
    assert wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("embedding-reader")])
    assert next(batches, None) is None


@pytest.mark.parametrize("share", [False, True])
def test_an_error_of_a_task_comes_out_where_it_happened(share: bool) -> None:
    def fail(block: Any, block_info: Any = None) -> Any:
        if block_info[0]["chunk-location"][0] == 10:
            raise ReadError("no such luck")
        return block

    x = Source(60, 3).array.map_blocks(fail, dtype=float, meta=np.empty((0, 0)))
    seen = 0

    def consume() -> None:
        nonlocal seen
        for rows, _ in iter_batches(overlapped(x) if share else x, batch_size=3):
            seen += len(rows)

    with pytest.raises(ReadError, match="no such luck"):
        finishes(consume)
    assert seen == (27 if share else 30)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (np.zeros((2, 3)), "shape"),
        (np.zeros((3, 3)), "float64.*int64"),
        (np.ma.zeros((3, 3), dtype=np.int64), "masked"),
    ],
)
def test_chunks_that_are_not_what_the_array_tells_are_an_error(made: Any, message: str) -> None:
    x = Source(9, 3).array.map_blocks(lambda _: made, dtype=np.int64, meta=np.empty((0, 0), np.int64))
    with pytest.raises(MismatchError, match=rf"rows \[0, 3\).*{message}"):
        next(iter_batches(x, batch_size=3))


def test_arrays_of_delayed_chunks() -> None:
    computed: list[int] = []

    @delayed(pure=False)  # type: ignore[untyped-decorator]
    def load(number: int) -> Any:
        computed.append(number)
        return np.full((3, 2), float(number))

    x = da.concatenate([da.from_delayed(load(k), (3, 2), float) for k in range(10)])
    rows = np.repeat(np.arange(10.0), 3)[:, None] * np.ones(2)
    np.testing.assert_array_equal(rows_of(x), rows)
    assert sorted(computed) == list(range(10))
    np.testing.assert_allclose(rows_of(x - x.mean(axis=0)), rows - rows.mean(axis=0))
    assert set(Counter(computed).values()) <= {2, 3}
