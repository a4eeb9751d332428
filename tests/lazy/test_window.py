"""Which chunks are computed when, what of the limit is left, and which batches are parts of chunks: without threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.local import SynchronousExecutor

from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.lazy import engines, window
from dask_embedding_reader.lazy.iter_batches import iter_batches


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[list[int]]]]:
    """The units that are started for each batch, all at once each time; what is started is computed at once."""
    told: list[list[list[int]]] = [[]]

    def start(self: Any, units: Any, plain: Any = engines.Threads.start) -> Any:
        told[-1].append(list(units))
        return plain(self, units)

    monkeypatch.setattr(engines.Threads, "start", start)
    monkeypatch.setattr(engines, "stoppable_pool", lambda parallel, closed: SynchronousExecutor())
    with dask.config.set(num_workers=2):
        yield told


def lazy(rows: int = 120, chunk: int = 10, dtype: str = "S8") -> Any:
    """Rows of 8 bytes that are no numbers, so that no memory is lent or used again."""
    return da.from_array(np.arange(rows).astype(dtype).reshape(rows, 1), chunks=(chunk, 1))


def computed(array: Any) -> Any:
    """The same, computed from what counts twice."""
    return array.map_blocks(lambda block: block, dtype=array.dtype, meta=np.empty((0, 0), array.dtype))


#: Workers, bytes of the limit, rows of a batch; then what is started for each batch, and what is left meanwhile.
#: Chunks are of 80 bytes, and two batches always count.
STARTED: dict[str, tuple[Any, int, int, int, list[list[list[int]]], list[int]]] = {
    "twice the threads": (
        lazy,
        2,
        10_000,
        10,
        [[[0, 1, 2, 3]], *([[k]] for k in range(4, 12)), [], [], []],
        [9_600] * 9 + [9_680, 9_760, 9_840],
    ),
    "three of a small limit": (
        lazy,
        2,
        400,
        10,
        [[[0, 1, 2]], *([[k]] for k in range(3, 12)), [], []],
        [80] * 10 + [160, 240],
    ),
    "one byte too few for the third": (
        lazy,
        2,
        399,
        10,
        [[[0, 1]], *([[k]] for k in range(2, 12)), []],
        [159] * 11 + [239],
    ),
    "one at a time": (lazy, 2, 240, 10, [[[k]] for k in range(12)], [80] * 12),
    "not even one": (lazy, 2, 100, 10, [[[k]] for k in range(12)], [-60] * 12),
    "batches of several": (
        lazy,
        2,
        480,
        25,
        [[[0], [1], [2]], [[3], [4]], [[5], [6], [7]], [[8], [9]], [[10], [11]]],
        [0, 80, 0, 80, 80],
    ),
    "batches of several, of which two fit": (
        lazy,
        2,
        600,
        25,
        [[[0, 1], [2], [3]], [[4], [5]], [[6], [7], [8]], [[9], [10]], [[11]]],
        [40, 120, 40, 120, 200],
    ),
    "small batches": (
        lazy,
        2,
        400,
        4,
        [
            [[0, 1, 2, 3]],
            # A chunk lasts for two batches and a half.
            *([], [[4]], [], [], [[5]], [], [[6]], [], [], [[7]], [], [[8]], [], [], [[9]], [], [[10]], [], [], [[11]]),
            *[[]] * 9,
        ],
        [16, 16, 16, 16, 96] * 4 + [16, 16, 96, 96, 176, 176, 176, 256, 256, 336],
    ),
    "what goes in and what is made on the way": (
        lambda: computed(lazy()),
        8,
        700,
        10,
        [[[0, 1], [2]], [[3], [4]], *([[k]] for k in range(5, 12)), [], [], []],
        [380] + [300] * 8 + [380, 460, 540],
    ),
    "fewer than hand over": (
        lambda: lazy(40, 1),
        2,
        10_000,
        1,
        [[[0, 1, 2, 3]], *([[k]] for k in range(4, 40)), [], [], []],
        [9_960] * 37 + [9_968, 9_976, 9_984],
    ),
}


def left_of(batches: Any) -> int:
    return int(batches.gi_frame.f_locals["stream"]._budget.left_nbytes)


@pytest.mark.filterwarnings("ignore:.*max_ram_usage_in_bytes")
@pytest.mark.parametrize("name", STARTED)
def test_chunks_are_started_as_far_as_they_fit(name: str, started: list[list[list[int]]]) -> None:
    make, workers, limit, batch_rows, expected, left = STARTED[name]
    array = make()
    with dask.config.set(num_workers=workers):
        batches = iter_batches(array, batch_size=batch_rows, max_ram_usage_in_bytes=limit)
        found = []
        for _ in batches:
            found.append(left_of(batches))
            started.append([])
    assert started[:-1] == expected
    assert found == left


def test_partitions_of_a_frame_are_started_beside_their_rows(
    started: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 15 rows of 256 bytes each, until it is known that they take more."""
    wide = 1000
    monkeypatch.setattr(window, "sizeof", lambda frame: wide * len(frame))  # Dask's own is a guess before pandas 3
    made = pd.DataFrame({"c": np.arange(15)})
    frame = dd.from_map(lambda k: made, range(8), meta=made[:0], divisions=(*range(0, 120, 15), 119))
    with dask.config.set(num_workers=50):
        batches: Any = iter_batches(lazy(), frame, batch_size=10, max_ram_usage_in_bytes=20_000)
        next(batches)
        assert started == [[list(range(13))]]  # eight chunks and five partitions: 160 + 640 + 19,200 bytes
        # Three of these have been computed, of which one is handed out in part.
        stream = batches.gi_frame.f_locals["stream"]
        assert stream._frame_row_nbytes == wide
        assert stream._held_frame_rows == 15
        assert left_of(batches) == 20_000 - 160 - 7 * 80 - 5 * 15 * wide
        next(batches)
        assert stream._held_frame_rows == 15
        assert left_of(batches) == 20_000 - 160 - 6 * 80 - 4 * 15 * wide
        batches.close()


@pytest.mark.parametrize("how", ["a break", "an error"])
def test_a_loop_that_is_left_closes_what_computes(how: str) -> None:
    """So that what is started begins no further task."""
    batches: Any = iter_batches(lazy(), batch_size=10)
    next(batches)
    stream = batches.gi_frame.f_locals["stream"]
    assert stream._started
    assert not stream._engine._closed.is_set()
    if how == "a break":
        batches.close()
    else:
        with pytest.raises(RuntimeError, match="in the body"):
            batches.throw(RuntimeError("in the body"))
    assert stream._engine._closed.is_set()
    assert [*stream._started, *stream._chunks] == []


# ---------------------------------------------------------------------------------------------------------------------
# Parts of chunks


def make_part(array: Any, made: Any) -> Any:
    return array.map_blocks(made, dtype=array.dtype, meta=np.empty((0,) * array.ndim, array.dtype))


numbers = np.arange(60, dtype=np.float64).reshape(30, 2)
X: Any = da.from_array(numbers, chunks=(10, 2))
kept: list[Any] = []


def keep(block: Any) -> Any:
    kept.append(block.copy())
    return kept[-1]


#: The array, rows of a batch, how many batches the loop keeps; and which of them are parts of chunks, else copies.
PARTS: dict[str, tuple[Any, int, int, str]] = {
    "halves": (make_part(X, np.copy), 5, 1, "cppppp"),
    "that do not divide it": (make_part(X, np.copy), 4, 1, "cpcppppp"),
    "whole": (make_part(X, np.copy), 10, 1, "cpp"),
    "of several": (make_part(X, np.copy), 20, 1, "cp"),
    "two are kept": (make_part(X, np.copy), 5, 2, "cppcpp"),
    "three are kept": (make_part(X, np.copy), 5, 3, "cppccp"),
    "all are kept": (make_part(X, np.copy), 5, 9, "cppccc"),
    "of one axis": (make_part(X[:, 0], np.copy), 5, 1, "cppppp"),
    "kept by the task": (make_part(X, keep), 5, 1, "cccccc"),
    "a view": (make_part(X, lambda block: block.copy()[:]), 5, 1, "cccccc"),
    "in another order": (make_part(X, lambda block: np.asfortranarray(block.copy())), 5, 1, "cccccc"),
    "of another dtype": (make_part(X, lambda block: block.astype(np.float32)), 5, 1, "cccccc"),
    "that must not be changed": (
        make_part(X, lambda block: (made := block.copy()).setflags(write=False) or made),
        5,
        1,
        "cccccc",
    ),
    "of no numbers": (make_part(X.astype("S8"), np.copy), 5, 1, "cccccc"),
    "in columns": (make_part(X.rechunk((10, 1)), np.copy), 5, 1, "cccccc"),
    "without items": (make_part(X[:, :0], np.copy), 5, 1, "cccccc"),
}


@pytest.mark.parametrize("name", PARTS)
def test_batches_are_parts_of_chunks_that_nobody_else_has(name: str) -> None:
    array, batch_rows, most, expected = PARTS[name]
    held: deque[Any] = deque(maxlen=most)
    found, place = "", 0
    values = array.compute(scheduler="synchronous")
    kept.clear()
    for rows, _ in iter_batches(array, batch_size=batch_rows):
        held.append(rows)
        np.testing.assert_array_equal(rows, values[place : place + batch_rows])
        place += batch_rows
        found += "p" if isinstance(rows.base, window._Part) else "c"
        del rows
    kept.clear()
    assert found == expected


# ---------------------------------------------------------------------------------------------------------------------
# What is not what the array or the frame tells


def block_of(shape: tuple[int, ...]) -> Any:
    """The third chunk is of another shape."""
    return lambda block, block_info: (
        np.zeros(shape) if block_info[0]["chunk-location"] == (2, 0) else np.zeros(block.shape)
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9, 2), r"rows \[20, 30\) was computed with the shape \(9, 2\), the array tells \(10, 2\)"),
        ((11, 2), r"rows \[20, 30\) was computed with the shape \(11, 2\), the array tells \(10, 2\)"),
        ((10, 3), r"rows \[20, 30\) was computed with the shape \(10, 3\), the array tells \(10, 2\)"),
        ((10,), r"rows \[20, 30\) was computed with the shape \(10,\), the array tells \(10, 2\)"),
    ],
)
def test_a_chunk_of_another_shape_is_told_with_its_rows(shape: tuple[int, ...], message: str) -> None:
    array = X.map_blocks(block_of(shape), dtype=float, meta=np.empty((0, 0)))
    batches = iter_batches(array, batch_size=10)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(MismatchError, match=message):
        next(batches)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (pd.DataFrame({"a": range(9)}), r"differ from row 29 on.*rows \[20, 30\) has 9 rows, not 10"),
        (pd.DataFrame({"a": range(11)}), r"differ from row 30 on.*rows \[20, 30\) has 11 rows, not 10"),
        (pd.Series(range(10)), r"no pandas DataFrame, but Series"),
    ],
)
def test_a_partition_of_other_rows_is_told_with_them(made: Any, message: str) -> None:
    right = pd.DataFrame({"a": range(10)})
    frame = dd.from_map(lambda k: made if k == 2 else right, range(3), meta=right[:0])
    batches = iter_batches(X, frame, batch_size=10)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(MismatchError, match=message):
        next(batches)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.array([300]), "int8"),
        (np.array([-129]), "int8"),
        (np.array([2**63], "uint64"), "int64"),
        (np.array(["long"]), "U2"),
        (np.array([b"long"]), "S2"),
    ],
)
def test_values_that_the_told_dtype_cannot_hold_are_not_wrapped_or_cut(values: Any, told: str) -> None:
    blocks = [da.from_array(values.astype(told)), da.from_array(values).map_blocks(lambda block: block, dtype=told)]
    batches = iter_batches(da.concatenate(blocks), batch_size=1)
    next(batches)
    with pytest.raises(MismatchError, match=rf"rows \[1, 2\) was computed as .*, the array tells .*{told[1:]}, which"):
        next(batches)


def test_a_wider_dtype_than_told_is_taken_if_its_values_fit() -> None:
    array = da.arange(6, chunks=4).map_blocks(lambda block: block - 3, dtype="int8")
    [(rows, _)] = iter_batches(array, batch_size=6)
    assert rows.dtype == np.int8
    assert rows.tolist() == [-3, -2, -1, 0, 1, 2]
