"""What metadata are handed out as, and what they are taken to weigh."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dask_embedding_reader.batches.metadata import FRAMES, TABLES
from dask_embedding_reader.formats.metadata import MetaField

NUMBERS = MetaField("n", pa.int32(), has_nulls=False)
TEXTS = MetaField("text", pa.large_string(), has_nulls=True)


def table_of(rows: int) -> pa.Table:
    """A number and a text a row, of other texts some that are null."""
    texts = [None if row % 7 == 5 else f"{row % 10}" for row in range(rows)]
    return pa.table({"n": pa.array(range(rows), pa.int32()), "text": pa.array(texts, pa.large_string())})


@pytest.mark.parametrize("rows", [1, 2, 100, 128, 255])
def test_of_a_few_rows_all_texts_are_weighed(rows: int) -> None:
    """As Python's strings, and as references to these; what Arrow holds, twice."""
    table = table_of(rows)
    expected = 2 * table.nbytes + sum(8 + sys.getsizeof(text) for text in table["text"].to_pylist())
    frame, nbytes = FRAMES.make([NUMBERS, TEXTS], table, range(rows), "")
    assert nbytes == expected
    assert frame["text"].tolist() == table["text"].to_pylist()
    assert FRAMES.make([NUMBERS], table, range(rows), "")[1] == 2 * table.nbytes
    made, nbytes = TABLES.make([NUMBERS, TEXTS], table, range(rows), "")
    assert made.equals(table)
    assert nbytes == 2 * table.nbytes


@pytest.mark.parametrize("rows", [256, 257, 1_000, 5_000])
def test_of_many_rows_some_texts_are_weighed_for_all(rows: int) -> None:
    """One of so many that they are 128 at least, and fewer than twice as many."""
    step = rows // 128
    texts = ["x" * (1_000 if row % step == 0 else 1) for row in range(rows)]
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    expected = 2 * table.nbytes + 8 * rows + step * -(-rows // step) * sys.getsizeof("x" * 1_000)
    assert FRAMES.make([TEXTS], table, range(rows), "")[1] == expected


@pytest.mark.parametrize("rows", [range(5, 8), np.array([9, 2, 4])])
def test_frames_of_a_batch_are_joined_from_slices_into_one_of_its_own(rows: Any) -> None:
    numbers = np.asarray(rows).tolist()
    frame, _ = FRAMES.make([NUMBERS, TEXTS], table_of(3), rows, "")
    for parts, places in (([frame[1:]], [1, 2]), ([frame[2:], frame[:2]], [2, 0, 1]), ([frame], [0, 1, 2])):
        batch = FRAMES.join(parts)
        assert isinstance(batch.index, pd.RangeIndex)
        assert batch.index.equals(pd.RangeIndex(len(places)))
        assert batch["i"].tolist() == [numbers[place] for place in places]
        assert batch["n"].tolist() == places
        assert np.shares_memory(batch["n"], frame["n"]) is (len(parts) == 1), "nothing is copied but to be joined"
        batch["more"] = batch.pop("n")
        assert [*frame.columns] == ["n", "text", "i"], "of what it was made of"
    taken = FRAMES.take(frame, np.array([2, 0]))
    assert (taken["n"].tolist(), taken.index.tolist()) == ([2, 0], [0, 1])
    table = TABLES.join([table_of(3)[1:], table_of(3)])
    assert TABLES.take(table, np.array([4, 0]))["n"].to_pylist() == [2, 1]


def test_where_there_are_no_metadata_frames_have_row_numbers_of_their_own() -> None:
    numbers = np.array([5, 3, 9])
    frame, other = FRAMES.of_none(numbers), FRAMES.of_none(numbers[1:])
    assert frame.to_dict("list") == {"i": [5, 3, 9]}
    assert other.to_dict("list") == {"i": [3, 9]}
    frame.loc[1, "i"] = 7
    frame.columns.name = "ours"
    assert numbers.tolist() == [5, 3, 9]
    assert other.columns.name is None
    assert TABLES.of_none(numbers) is None


def test_of_many_columns_pandas_does_not_warn() -> None:
    names = [f"m{k}" for k in range(150)]
    table = pa.table({name: pa.array([k, k + 1], pa.int32()) for k, name in enumerate(names)})
    frame, _ = FRAMES.make([MetaField(name, pa.int32(), has_nulls=False) for name in names], table, range(5, 7), "")
    assert frame.columns.tolist() == [*names, "i"]
    assert frame["i"].tolist() == [5, 6]
    assert frame["m149"].tolist() == [149, 150]
