"""What batches of lazy arrays are asked for is checked at the call: what it takes, and which rows belong together."""

from __future__ import annotations

import warnings
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import iter_batches
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, MismatchError
from dask_embedding_reader.lazy.iter_batches import rows_of_partitions

X: Any = da.from_array(np.zeros((30, 3)), chunks=(10, 2))

#: An array, and the bytes of its largest band of chunks, of what this is computed from, and of two batches of 7 rows.
TAKES: dict[str, tuple[Any, int, int, int]] = {
    "from memory": (X, 240, 0, 336),
    "computed": (X * 2, 240, 2 * 160, 336),
    "of one axis": (X[:, 0], 80, 2 * 160, 112),
    "of fewer items": (X.sum(axis=1), 80, 2 * 160, 112),
    "of smaller items": (X.astype("int8"), 30, 2 * 160, 42),
    "in other chunks": (X.rechunk((5, 3)), 120, 2 * 160, 336),
    "of unequal chunks": (da.concatenate([X[:4], X[4:], X[:3]]), 240, 2 * 160, 336),
    "of fewer rows than a batch": (X[:4], 96, 2 * 160, 192),
    "of no rows": (X[:0], 0, 2 * 160, 0),
}


@pytest.mark.parametrize("name", TAKES)
def test_a_limit_that_cannot_be_kept_is_warned_of_with_what_it_takes(name: str) -> None:
    array, chunk, inner, batches = TAKES[name]
    total = chunk + inner + batches
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iter_batches(array, batch_size=7, max_ram_usage_in_bytes=max(1, total))
    with pytest.warns(UserWarning, match="computing one chunk") as caught:
        iter_batches(array, batch_size=7, max_ram_usage_in_bytes=total - 1)
    [one] = caught
    assert str(one.message).startswith(
        f"computing one chunk takes about {total:,} bytes: {chunk:,} for the largest chunk, {inner:,} for what it is "
        f"computed from, {batches:,} for two batches of {min(7, len(array))} rows; the limit is {total - 1:,} ("
    )
    assert one.filename == __file__


def test_by_default_four_gibibytes_are_the_limit_and_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"; the limit is 4,294,967,296 \(max_ram_usage_in_bytes\)"):
        iter_batches(da.zeros(2**31, chunks=-1), batch_size=1)
    assert len(list(iter_batches(X, batch_size=14))) == 3
    assert capfd.readouterr() == ("", "")


def frame_of(divisions: tuple[Any, ...]) -> Any:
    empty = pd.DataFrame({"a": pd.Series(dtype=int)})
    return dd.from_map(lambda k: empty, range(len(divisions) - 1), meta=empty, divisions=divisions)


#: Divisions of a frame beside chunks of 4, 0, 4 and 2 rows, and the rows of its partitions, or what is said of it.
PARTITIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "that number the rows": ((0, 3, 9), (3, 7)),
    "that begin elsewhere": ((5, 8, 14), (3, 7)),
    "one": ((0, 9), (10,)),
    "of one row": ((0, 1, 9), (1, 9)),
    "as many, that number the rows": ((0, 1, 2, 3, 9), (1, 1, 1, 7)),
    "as many, that number too few": ((0, 1, 2, 3, 8), (4, 0, 4, 2)),
    "as many, that tell nothing": ((None,) * 5, (4, 0, 4, 2)),
    "as many, that are no numbers": (("a", "b", "c", "d", "e"), (4, 0, 4, 2)),
    "of numpy's numbers": (tuple(np.array([0, 3, 9])), (3, 7)),
    "that tell nothing": ((None,) * 3, "the frame has 2 partitions, the array 4 chunks and 10 rows: which rows"),
    "that are no numbers": (("a", "c", "j"), "the frame has 2 partitions, the array 4 chunks and 10 rows: which rows"),
    "that are no integers": ((0.0, 3.0, 9.0), "the frame has 2 partitions, the array 4 chunks and 10 rows: which rows"),
    "that number too few": (
        (0, 3, 8),
        "the frame has 2 partitions and 9 rows by its divisions, the array 4 chunks and 10 rows: which rows",
    ),
    "that number too many": (
        (0, 1, 1_002),
        "the frame has 2 partitions and 1,003 rows by its divisions, the array 4 chunks and 10 rows: which rows",
    ),
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_partitions_have_the_rows_of_their_divisions_or_else_of_the_chunks(name: str) -> None:
    divisions, expected = PARTITIONS[name]
    array: Any = da.zeros((10, 3), chunks=((4, 0, 4, 2), 3))
    if isinstance(expected, str):
        with pytest.raises(MismatchError) as told:
            rows_of_partitions(array, frame_of(divisions))
        assert str(told.value).startswith(expected)
    else:
        assert rows_of_partitions(array, frame_of(divisions)) == expected


def test_a_frame_in_memory_has_as_many_rows() -> None:
    array: Any = da.zeros((1_010, 3))
    assert rows_of_partitions(array, None) == ()
    assert rows_of_partitions(array, pd.DataFrame({"a": range(1_010)})) == ()
    for rows, first in ((1_009, "1,009"), (1_011, "1,010"), (0, "0")):
        with pytest.raises(MismatchError) as told:
            rows_of_partitions(array, pd.DataFrame({"a": range(rows)}))
        assert str(told.value).startswith(f"the frame has {rows:,} rows, the array 1,010: from row {first} on, ")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"batch_size": "3"}, ArgumentTypeError, "batch_size"),
        ({"batch_size": 3, "max_ram_usage_in_bytes": 0}, ArgumentError, "max_ram_usage_in_bytes"),
    ],
)
def test_arguments_are_checked_at_the_call(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        iter_batches(X, **options)


def with_meta(meta: Any) -> Any:
    array = X.copy()
    array._meta = meta
    return array


@pytest.mark.parametrize(
    ("array", "frame", "error", "message"),
    [
        (
            np.zeros((3, 2)),
            None,
            ArgumentTypeError,
            (
                "array must be a dask.array.Array, not ndarray; da.from_array makes one of a numpy array, "
                "reader.to_dask_array() of a reader, whose own batches are reader(batch_size)"
            ),
        ),
        (X.sum(), None, ArgumentError, "array has no axes; its first axis must be the rows"),
        (X[X[:, 0] > 0], None, ArgumentError, "array has unknown chunk sizes (shape (nan, 3)), as"),
        (X[:, X[0] > 0], None, ArgumentError, "array has unknown chunk sizes (shape (30, nan)), as"),
        (da.ma.masked_equal(X, 0), None, ArgumentTypeError, "array has chunks of type MaskedArray, batches"),
        (with_meta(pd.Series([1.0])), None, ArgumentTypeError, "array has chunks of type Series, batches"),
        (X, [1], ArgumentTypeError, "frame must be a Dask or pandas DataFrame, not list"),
        (X, pd.Series(range(30)), ArgumentTypeError, "frame must be a Dask or pandas DataFrame, not Series"),
        (
            X,
            pd.DataFrame({"i": range(30)}, index=pd.RangeIndex(30, name="i")),
            ArgumentError,
            'frame has both an index and a column named "i"; rename or drop one of them',
        ),
        (
            X,
            pd.DataFrame(np.zeros((30, 3)), columns=["i", "a", "i"]),
            ArgumentError,
            'frame has 2 columns named "i"; rename or drop all but one of them',
        ),
    ],
)
def test_what_cannot_be_had_in_batches_is_told(array: Any, frame: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as told:
        iter_batches(array, frame, batch_size=3)
    assert str(told.value).startswith(message)


@pytest.mark.parametrize("meta", [np.empty((0, 0)), np.float64(1)])
@pytest.mark.parametrize("frame", [None, pd.DataFrame({"i": range(30)}), pd.DataFrame(index=range(30))])
def test_what_can_be_had_in_batches_is(meta: Any, frame: Any) -> None:
    assert [len(rows) for rows, _ in iter_batches(with_meta(meta), frame, batch_size=14)] == [14, 14, 2]
