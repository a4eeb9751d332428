"""Properties over random collections, with numpy and pandas as the oracle.

``HYPOTHESIS_PROFILE=thorough`` runs many more examples than the default; in CI the examples are always the same.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from dask.base import compute
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader.batches import few, pace, windows
from tests.support.collections import (
    COLUMNS,
    FORMATS,
    Collection,
    as_batch,
    assert_batches,
    assert_same_frame,
    assert_same_rows,
    write_collection,
)


class Recipe(NamedTuple):
    """Arguments of ``write_collection``; small and printable, so that a failing example says what it was."""

    format_name: str
    file_rows: list[int]
    dimension: int
    dtype: str
    columns: list[str]
    row_group_rows: int | None
    seed: int

    @property
    def total(self) -> int:
        return sum(self.file_rows)


@st.composite
def recipes(draw: st.DrawFn, columns: int = 2) -> Recipe:
    """Any format, dtype and division into files and row groups; at least one row."""
    format_name = draw(st.sampled_from(sorted(FORMATS)))
    return Recipe(
        format_name,
        draw(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from(FORMATS[format_name].dtypes)),
        draw(st.lists(st.sampled_from(sorted(COLUMNS)), max_size=columns, unique=True)),
        draw(st.none() | st.integers(1, 6)),
        draw(st.integers(0, 9)),
    )


@contextmanager
def written(recipe: Recipe) -> Iterator[Collection]:
    """The collection, in a folder of its own: hypothesis runs many examples in one test, and tmp_path is one folder."""
    with tempfile.TemporaryDirectory() as root:
        yield write_collection(
            Path(root),
            recipe.format_name,
            file_rows=recipe.file_rows,
            dimension=recipe.dimension,
            dtype=recipe.dtype,
            columns=recipe.columns,
            row_group_rows=recipe.row_group_rows,
            seed=recipe.seed,
        )


class Range(NamedTuple):
    start: int
    end: int | None


@st.composite
def ranges(draw: st.DrawFn, count: int) -> Range:
    """Any valid range, empty ones and ends beyond the collection included."""
    start = draw(st.integers(0, count))
    return Range(start, draw(st.none() | st.integers(start, count + 3)))


piece_sizes = st.none() | st.integers(1, 15)
cast_dtypes = st.sampled_from([None, "float16", "float32", "float64"])


def expected_rows(collection: Collection, part: Range, dtype: str | None) -> Any:
    """The rows of the range, cast as numpy casts. What float16 cannot hold is infinite on both sides."""
    with np.errstate(over="ignore"):
        rows = collection.rows[part.start : part.end]
        return rows if dtype is None else rows.astype(dtype)


@given(st.data())
def test_array_equals_numpy(data: st.DataObject) -> None:
    recipe = data.draw(recipes(columns=0))
    part = data.draw(ranges(recipe.total))
    dtype = data.draw(cast_dtypes) if recipe.dtype.startswith("float") else None
    with written(recipe) as collection:
        x = collection.open().to_dask_array(*part, max_piece_size=data.draw(piece_sizes), dtype=dtype)
        expected = expected_rows(collection, part, dtype)
        assert x.shape == expected.shape
        assert_same_rows(x.compute(scheduler="synchronous"), expected)


@given(st.data())
def test_any_index_equals_numpy(data: st.DataObject) -> None:
    recipe = data.draw(recipes(columns=0))
    size = data.draw(piece_sizes)
    rows = st.integers(-recipe.total, recipe.total - 1)
    index = data.draw(
        st.one_of(rows, st.slices(recipe.total), st.lists(rows, min_size=1, max_size=20)),
        label="row index",
    )
    columns = data.draw(st.slices(recipe.dimension), label="column index")
    with written(recipe) as collection:
        x = collection.open().to_dask_array(max_piece_size=size)
        expected = collection.rows[index][..., columns]
        for lazy in (x[index][..., columns], x[index, columns]):
            actual = lazy.compute(scheduler="synchronous")
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected, strict=False)
            assert actual.shape == expected.shape


@given(st.data())
def test_frame_equals_pandas_partition_by_partition(data: st.DataObject) -> None:
    recipe = data.draw(recipes(columns=4))
    part, size = data.draw(ranges(recipe.total)), data.draw(piece_sizes)
    with written(recipe) as collection:
        reader = collection.open()
        frame = reader.to_dask_dataframe(*part, max_piece_size=size)
        pieces = compute(*frame.to_delayed(), scheduler="synchronous")
        assert tuple(map(len, pieces)) == reader.to_dask_array(*part, max_piece_size=size).chunks[0]
        # Nothing divides no rows.
        assert frame.known_divisions or sum(map(len, pieces)) == 0
        place = part.start
        for piece in pieces:
            assert_same_frame(piece, collection.frame(place, place + len(piece)))
            place += len(piece)
        assert place == min(part.end if part.end is not None else recipe.total, recipe.total)
        assert_same_frame(pd.concat(pieces), collection.frame(*part))


@given(st.data())
def test_batches_equal_numpy_and_pandas(data: st.DataObject) -> None:
    recipe = data.draw(recipes())
    part = data.draw(ranges(recipe.total))
    batch_size = data.draw(st.integers(1, recipe.total + 3), label="batch_size")
    dtype = data.draw(st.sampled_from(["float32", "float64", None]), label="dtype")
    options = {
        "max_piece_size": data.draw(piece_sizes, label="max_piece_size"),
        "parallel_pieces": data.draw(st.none() | st.integers(1, 4), label="parallel_pieces"),
        "max_ram_usage_in_bytes": data.draw(
            st.sampled_from([1, 2**6, 2**8, 2**12, 2**32]), label="max_ram_usage_in_bytes"
        ),
    }
    with written(recipe) as collection, warnings.catch_warnings():
        # A limit below one batch cannot be kept, and a warning may say so.
        warnings.filterwarnings("ignore", message=".*max_ram_usage_in_bytes", category=UserWarning)
        assert_batches(
            collection.open()(batch_size, *part, **options, dtype=dtype), collection, batch_size, *part, dtype
        )


@given(st.data())
def test_batches_of_some_rows_equal_numpy_and_pandas(data: st.DataObject) -> None:
    recipe = data.draw(recipes())
    order = data.draw(st.sampled_from(["ascending", "any", "shuffled"]), label="order")
    numbers = np.array(data.draw(st.lists(st.integers(0, recipe.total - 1), max_size=40), label="rows"), np.int64)
    if order == "ascending":
        numbers = np.unique(numbers)
    batch_size = data.draw(st.integers(1, recipe.total + 3), label="batch_size")
    dtype = data.draw(st.sampled_from(["float32", "float64", None]), label="dtype")
    options = {
        "max_piece_size": data.draw(piece_sizes, label="max_piece_size"),
        "parallel_pieces": data.draw(st.none() | st.integers(1, 4), label="parallel_pieces"),
        "max_ram_usage_in_bytes": data.draw(st.sampled_from([1, 2**8, 2**12, 2**32]), label="max_ram_usage_in_bytes"),
    }
    with written(recipe) as collection, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", category=UserWarning)
        # So few rows would be read at once.
        patch.setattr(few, "_MOST_ROWS", data.draw(st.sampled_from([0, 10, 1_000]), label="few"))
        patch.setattr(windows, "_LARGE_NBYTES", data.draw(st.sampled_from([1, 2**20]), label="large"))
        patch.setattr(pace, "_METADATA_ROWS", data.draw(st.sampled_from([1, 3, 65_536]), label="metadata_rows"))
        patch.setattr(pace, "_LEAST_METADATA_ROWS", 1)
        view = collection.open().take(numbers)
        if order == "shuffled":
            view = view.shuffle(1, buffer_rows=data.draw(st.integers(1, 40), label="buffer_rows"))
            assert sorted(view.rows) == sorted(numbers.tolist())
            numbers = np.asarray(view.rows)
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(numbers))] * 2), label="range"))
        batches = view(batch_size, start, end, **options, dtype=dtype)
        for first in range(start, end, batch_size):
            here = numbers[first : min(first + batch_size, end)]
            rows, frame = next(batches)
            assert_same_rows(rows, collection.rows[here].astype(dtype or collection.rows.dtype))
            expected = collection.metadata.iloc[here].assign(i=here).reset_index(drop=True)
            assert_same_frame(frame, as_batch(expected))
            rows[:] = 0  # nothing of later batches
        assert next(batches, None) is None


@given(st.data())
def test_batches_of_ranges_end_to_end_are_the_whole(data: st.DataObject) -> None:
    # Resuming where a run stopped, or sharing the rows among workers, loses none and doubles none.
    recipe = data.draw(recipes(columns=1))
    inner = data.draw(st.lists(st.integers(0, recipe.total), max_size=4), label="cuts")
    cuts = [0, *sorted(inner), recipe.total]
    batch_size = data.draw(st.integers(1, 9), label="batch_size")
    with written(recipe) as collection:
        reader = collection.open()
        batches = [
            batch for start, end in itertools.pairwise(cuts) for batch in reader(batch_size, start, end, dtype=None)
        ]
        assert_same_rows(np.concatenate([rows for rows, _ in batches]), collection.rows)
        metadata = pd.concat([metadata for _, metadata in batches], ignore_index=True)
        assert_same_frame(metadata, collection.batch_frame(0, recipe.total))


@given(st.data())
def test_every_row_is_located_where_it_was_written(data: st.DataObject) -> None:
    recipe = data.draw(recipes(columns=0))
    with written(recipe) as collection:
        reader = collection.open()
        for row in range(recipe.total):
            path, place = reader.locate(row)
            expected_path, expected_place = collection.locate(row)
            assert Path(path.removeprefix("file://")).samefile(expected_path)
            assert place == expected_place
        assert reader.nb_files == sum(1 for rows in recipe.file_rows if rows)
        assert reader.max_file_size == max(recipe.file_rows) * recipe.dimension * np.dtype(recipe.dtype).itemsize
