"""Which row numbers belong beside an array: numpy's own counting is the oracle."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from dask.base import optimize
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.lazy import row_numbers
from dask_embedding_reader.lazy.row_numbers import RowNumbers, count_on, row_base, trace_rows

#: Rows of a chunk, as ranges and as arrays.
STRETCHES: st.SearchStrategy[Any] = st.one_of(
    st.builds(lambda first, rows: range(first, first + rows), st.integers(0, 9), st.integers(0, 4)),
    st.builds(lambda first, rows: range(first, first + 2 * rows, 2), st.integers(0, 9), st.integers(0, 4)),
    st.builds(lambda first, rows: range(first, first - rows, -1), st.integers(9, 12), st.integers(0, 4)),
    st.lists(st.integers(0, 12), max_size=4).map(lambda rows: np.array(rows, np.int64)),
)


def numbers_of(numbers: RowNumbers) -> list[int]:
    return [int(row) for rows in numbers.rows for row in rows]


@given(st.lists(st.tuples(STRETCHES, st.booleans(), st.integers(0, 1)), min_size=1, max_size=6))
def test_chunks_that_do_not_tell_their_rows_count_on_from_those_before(drawn: list[tuple[Any, bool, int]]) -> None:
    chunks = [len(rows) + more for rows, _, more in drawn]
    told = [rows if is_told else None for rows, is_told, _ in drawn]  # some tell too few, which says nothing
    found = count_on(chunks, told)
    expected: list[int] = []
    untold = 0
    for count, rows in zip(chunks, told, strict=True):
        if rows is not None and len(rows) == count:
            expected += [int(row) for row in rows]
        else:
            following = expected[-1] + 1 if expected else 0
            untold += count if untold == len(expected) else 0
            expected += range(following, following + count)
    assert numbers_of(found) == expected
    assert found.untold == untold
    assert list(found.starts) == np.cumsum([0, *map(len, found.rows)])[:-1].tolist()
    for rows, others in zip(found.rows, found.rows[1:], strict=False):
        assert len(rows)
        if isinstance(rows, range) and isinstance(others, range) and rows.step == others.step == 1:
            assert rows[-1] + 1 != others[0], "what counts on is one stretch"


@given(st.lists(STRETCHES.filter(len), min_size=1, max_size=6), st.integers(0, 24), st.integers(0, 8))
def test_a_part_of_the_row_numbers(stretches: list[Any], start: int, rows: int) -> None:
    starts = np.cumsum([0, *map(len, stretches)])[:-1].tolist()
    found = RowNumbers(tuple(starts), tuple(stretches), 7).cut(start, start + rows)
    expected = [int(row) for rows in stretches for row in rows][start : start + rows]
    assert numbers_of(found) == expected
    assert found.untold == 7
    assert all(map(len, found.rows))
    assert list(found.starts) == [start + k for k in np.cumsum([0, *map(len, found.rows)])[:-1]]


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("column", [False, True])
def test_the_first_row_that_differs_is_told(
    block: int, start: int, column: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_numbers, "_BLOCK_ROWS", block)
    numbers = RowNumbers((0, 6, 9), (range(6), range(50, 53), np.array([1_234, 3, 70])), 6)
    base = 1_000
    expected = np.array([*range(1_000, 1_006), 50, 51, 52, 1_234, 3, 70])[start:]

    def frame_of(values: Any) -> pd.DataFrame:
        frame = pd.DataFrame({"a": 0}, index=pd.Index(values, name="i"))
        return frame.reset_index() if column else frame

    numbers.check(frame_of(expected), start, base)
    for place, right in enumerate(expected):
        wrong = expected.copy()
        wrong[place:] += 2
        message = rf"^'i' of the frame is {right + 2} beside row {start + place} of the array, where {right:,} was"
        with pytest.raises(MismatchError, match=message):
            numbers.check(frame_of(wrong), start, base)


def test_what_is_no_number_is_told_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_numbers, "_BLOCK_ROWS", 3)
    numbers = RowNumbers((0,), (range(10),), 0)
    frame = pd.DataFrame({"i": pd.Series([0, 1, 2, "x", 4], dtype=object)})
    with pytest.raises(MismatchError, match=re.escape("is 'x' (object) beside row 2,000 of the array, where an int")):
        row_base(frame[3:], 2_000)
    with pytest.raises(MismatchError, match=re.escape("is 'x' (object) beside row 3 of the array, where an integer")):
        numbers.check(frame, 0, 0)


def test_the_number_that_a_frame_counts_from() -> None:
    for values in ([7, 3], [7.0, np.nan]):
        assert row_base(pd.DataFrame({"i": values}), 5) == 2
        assert row_base(pd.DataFrame({"i": values})) == 7
    assert row_base(pd.DataFrame({"i": []}), 5) == 0
    with pytest.raises(MismatchError, match=r"is nan beside row 5 of the array, where an integer was expected"):
        row_base(pd.DataFrame({"i": [np.nan, 6]}), 5)
    for first in (np.inf, -1e300, np.uint64(2**64 - 1), np.int64(-(2**63))):  # beyond what rows can be counted to
        with pytest.raises(MismatchError, match=r"beside row 5 of the array, where an integer was expected"):
            row_base(pd.DataFrame({"i": [first]}), 5)


# ---------------------------------------------------------------------------------------------------------------------
# What the tasks of an array tell


@pytest.fixture(scope="module")
def x(tmp_path_factory: pytest.TempPathFactory) -> da.Array:
    """30 rows, each of its number three times, in chunks of five."""
    folder = tmp_path_factory.mktemp("rows")
    for number, (start, stop) in enumerate([(0, 10), (10, 30)]):
        np.save(folder / f"{number}.npy", np.arange(start, stop, dtype=np.float64)[:, None] * [1, 1, 1])
    array: da.Array = EmbeddingReader(folder, "npy").to_dask_array(max_piece_size=6)
    return array


ROWS = np.arange(30)

#: What is told of a whole array: these rows.
TOLD: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "all": (lambda x: x, ROWS),
    "none": (lambda x: x[:0], ROWS[:0]),
    "none of a list": (lambda x: x[[]], ROWS[:0]),
    "none turned": (lambda x: x[:0].T.T, ROWS[:0]),
    "some": (lambda x: x[3:17], ROWS[3:17]),
    "some and none": (lambda x: da.concatenate([x[3:5], x[:0], x[9:9], x[1:3]]).rechunk(4), [3, 4, 1, 2]),
    "some among none": (lambda x: x[7:8].map_blocks(np.negative) + x[7:8].sum(axis=1)[:, None], [7]),
    "backwards": (lambda x: x[::-1], ROWS[::-1]),
    "in steps": (lambda x: x[1::4], ROWS[1::4]),
    "a list": (lambda x: x[[5, 5, 29, 0, 7]], [5, 5, 29, 0, 7]),
    "a list of one chunk": (lambda x: x[[3, 1, 2]], [3, 1, 2]),
    "a mask": (lambda x: x[ROWS % 3 == 0], ROWS[::3]),
    "one column": (lambda x: x[:, 2], ROWS),
    "some columns": (lambda x: x[4:9, ::2], ROWS[4:9]),
    "another axis": (lambda x: x[:, None, :], ROWS),
    "the axes of pictures": (lambda x: x[2:].reshape(-1, 3, 1), ROWS[2:]),
    "with itself": (lambda x: x + x, ROWS),
    "with a number": (lambda x: 3 - x, ROWS),
    "with itself picked": (lambda x: x[[*range(30)]] + x, ROWS),
    "with itself, picked": (lambda x: x + x[[*range(30)]], ROWS),
    "with itself picked in another way": (lambda x: x[ROWS >= 0] * x[::-1][::-1], ROWS),
    "with a row of others": (lambda x: x + np.arange(3), ROWS),
    "with rows from elsewhere": (lambda x: x * da.arange(30, chunks=x.chunks[0])[:, None], ROWS),
    "with one row": (lambda x: x - x[4:5], ROWS),
    "with the mean": (lambda x: x - x.mean(axis=0), ROWS),
    "with the mean of all": (lambda x: x - x.mean(), ROWS),
    "with the mean of some": (lambda x: x[5:] - x[:5].mean(axis=0), ROWS[5:]),
    "sums of rows": (lambda x: x.sum(axis=1), ROWS),
    "sums of rows with their axis": (lambda x: x.sum(axis=1, keepdims=True), ROWS),
    "a product": (lambda x: x @ np.ones((3, 4)), ROWS),
    "a product with itself": (lambda x: x @ (x.T @ x), ROWS),
    "scores": (lambda x: x[8:] @ x[:2].T, ROWS[8:]),
    "turned twice": (lambda x: x.T.T, ROWS),
    "turned, cut and turned": (lambda x: x.T[:, 4:21:3].T, ROWS[4:21:3]),
    "turned, some items": (lambda x: x.T[1:].T, ROWS),
    "turned and scaled": (lambda x: (x.T / (1 + x.sum(axis=1))).T, ROWS),
    "turned and scaled by others": (lambda x: (x.T / da.arange(1, 31, chunks=x.chunks[0])).T, ROWS),
    "turned, by a function of items": (lambda x: np.sin(x.T * 2).T, ROWS),
    "turned and joined": (lambda x: da.concatenate([x.T, x.T]).T, ROWS),
    "turned and summed": (lambda x: (x.T - x.T.sum(axis=0)).T, ROWS),
    "sums so far": (lambda x: x[9:].cumsum(axis=0), ROWS[9:]),
    "joined": (lambda x: da.concatenate([x[20:], x[:7]]), [*ROWS[20:], *ROWS[:7]]),
    "joined columns": (lambda x: da.concatenate([x, x * 2], axis=1), ROWS),
    "stacked": (lambda x: da.stack([x, x], axis=1), ROWS),
    "other chunks": (lambda x: x.rechunk((7, 2)), ROWS),
    "other chunks of some": (lambda x: x[2:][::-1].rechunk((5, 1)), ROWS[2:][::-1]),
    "optimized": (lambda x: optimize((x * 2)[3:])[0], ROWS[3:]),
    "by a function": (lambda x: x.map_blocks(np.square), ROWS),
    "by a function with a keyword": (lambda x: x.map_blocks(lambda b, by: b * by, by=3, dtype=float), ROWS),
    "by a function of two": (lambda x: da.map_blocks(np.add, x, x[::-1][::-1]), ROWS),
    "chosen": (lambda x: da.where(x > 3, x, 0), ROWS),
    "shuffled": (lambda x: da.take(x, ROWS[::-1] // 2, axis=0), ROWS[::-1] // 2),
    "shuffled columns": (lambda x: x[:, [2, 0, 2]], ROWS),
}

#: What is told of some of the rows, or of none: these are the numbers, and so many are counted from nowhere.
UNTOLD: dict[str, tuple[Callable[[Any], Any], Any, int]] = {
    "from elsewhere": (lambda x: da.zeros((5, 2), chunks=2), range(5), 5),
    "elsewhere first": (lambda x: da.concatenate([da.zeros((4, 3)), x[9:12]]), [*range(4), 9, 10, 11], 4),
    "elsewhere last": (lambda x: da.concatenate([x[9:12], da.zeros((4, 3))]), range(9, 16), 0),
    "elsewhere between": (
        lambda x: da.concatenate([x[20:22], da.zeros((3, 3), chunks=2), x[5:7]]),
        [20, 21, 22, 23, 24, 5, 6],
        0,
    ),
    "with others of the same": (lambda x: x + x[::-1], range(30), 30),
    "with others that are picked": (lambda x: x + x[[*range(1, 30), 0]], range(30), 30),
    "picked, with others": (lambda x: x[[*range(1, 30), 0]] + x, range(30), 30),
    "chosen of others": (lambda x: da.where(x > 3, x, x[::-1]), range(30), 30),
    "turned": (lambda x: x.T, range(3), 3),
    "turned with others": (lambda x: (x.T + x[::-1].T).T, range(30), 30),
    "turned and multiplied": (lambda x: (np.eye(3) @ x.T).T, range(30), 30),
    "turned and picked": (lambda x: x.T[:, [4, 2, 0]].T, range(3), 3),
    "the mean": (lambda x: x.mean(axis=0, keepdims=True), range(1), 1),
    "the sums of columns": (lambda x: x.sum(axis=0), range(3), 3),
    "means picked": (lambda x: x.mean(axis=0)[[2, 0]], range(2), 2),
    "a gram": (lambda x: x.T @ x, range(3), 3),
    "repeated": (lambda x: da.repeat(x, 2, axis=0), range(60), 60),
    "a part of one chunk by a function": (
        lambda x: x[:5].map_blocks(lambda b: b[:3], chunks=((3,), (3,)), dtype=float),
        range(3),
        3,
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_row_by_row_is_told(name: str, x: da.Array) -> None:
    make, expected = TOLD[name]
    array = make(x)
    assert array.shape[0] == len(expected)
    found = trace_rows(array)
    assert numbers_of(found) == list(expected)
    assert found.untold == 0


@pytest.mark.parametrize("name", UNTOLD)
def test_what_is_not_row_by_row_is_not_told(name: str, x: da.Array) -> None:
    make, expected, untold = UNTOLD[name]
    array = make(x)
    assert array.shape[0] == len(expected)
    found = trace_rows(array)
    assert numbers_of(found) == list(expected)
    assert found.untold == untold
