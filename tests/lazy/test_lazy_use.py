"""The lazy array and frame are used like numpy and pandas, which are the oracle here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import iter_batches
from tests.support.collections import Collection, assert_same_frame, write_collection

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return write_collection(tmp_path_factory.mktemp("lazy"), "parquet_npy", columns=["id", "caption"])


@pytest.fixture
def x(collection: Collection) -> da.Array:
    array: da.Array = collection.open().to_dask_array(max_piece_size=3)
    return array


@pytest.fixture
def meta(collection: Collection) -> Any:
    return collection.open().to_dask_dataframe(max_piece_size=3)


MASK = np.arange(40) % 3 == 1

INDICES: dict[str, Any] = {
    "slice": slice(5, 29),
    "step": slice(1, None, 7),
    "from the end": slice(-9, -2),
    "backwards": slice(None, None, -1),
    "backwards in steps": slice(30, 3, -4),
    "empty": slice(9, 9),
    "beyond": slice(35, 1000),
    "row": 17,
    "last row": -1,
    "list": [30, 2, 2, -1, 19],
    "mask": MASK,
    "items": (slice(None), slice(1, 3)),
    "item": (slice(3, 30), -2),
    "list and item": ([5, 25, 7], 2),
    "new axis": (None, slice(2, 20)),
    "ellipsis": (..., 0),
}


@pytest.mark.parametrize("name", INDICES)
def test_indexing_is_that_of_numpy(x: da.Array, collection: Collection, name: str) -> None:
    np.testing.assert_array_equal(x[INDICES[name]].compute(), collection.rows[INDICES[name]])


def memory_of(array: Any) -> int:
    """The bytes that live as long as an array does."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return int(array.nbytes)


@pytest.mark.parametrize(
    "index", [np.s_[:, 0], np.s_[:, 1:3], np.s_[3], np.s_[2:5, 1], np.s_[[1, 7, 9], 0], np.s_[5, 2:]]
)
@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("name", ["npy", "parquet-list"])
def test_a_part_of_a_piece_keeps_no_more_than_itself(tmp_path: Path, name: str, picked: bool, index: Any) -> None:
    """A column of many pieces would else keep all that was read."""
    written = write_collection(tmp_path, name, file_rows=[100], dimension=50, columns=[])
    reader = written.open()
    rows = written.rows
    if picked:
        reader, rows = reader.take(slice(None, None, -3)), rows[::-3]
    kept: list[Any] = []

    def keep(block: Any) -> Any:  # Dask copies what it returns in the end, where that is a view
        kept.append(block)
        return block

    part = reader.to_dask_array(chunks=-1)[index].map_blocks(keep, meta=np.empty((0,) * rows[index].ndim, rows.dtype))
    np.testing.assert_array_equal(part.compute(scheduler="synchronous"), rows[index])
    (block,) = kept
    np.testing.assert_array_equal(block, rows[index])
    assert memory_of(block) <= max(block.nbytes, rows[0].nbytes), "of one row what is not wanted is no matter"


@pytest.mark.parametrize("most", [40, 41, 2**31, 2**63 - 1, 2**63, 10**30])
def test_pieces_may_be_larger_than_any_collection(collection: Collection, most: int) -> None:
    reader = collection.open()
    lengths = tuple(rows for rows in collection.file_rows if rows)
    assert reader.to_dask_array(max_piece_size=most).chunks[0] == lengths
    assert reader.to_dask_dataframe(max_piece_size=most).npartitions == len(lengths)
    for rows in ([1, 5, 30], slice(None, None, 2), slice(None, None, -2), slice(10, 30)):
        view = reader.take(rows)
        np.testing.assert_array_equal(view.to_dask_array(max_piece_size=most).compute(), collection.rows[rows])
        assert len(view.to_dask_dataframe(max_piece_size=most)) == len(view)
        batches = [batch for batch, _ in view(17, max_piece_size=most, show_progress=False)]
        np.testing.assert_array_equal(np.concatenate(batches), collection.rows[rows])
    batches = [rows for rows, _ in reader(17, max_piece_size=most, show_progress=False)]
    np.testing.assert_array_equal(np.concatenate(batches), collection.rows)


def test_a_lazy_mask_selects_rows(x: da.Array, collection: Collection) -> None:
    wanted = collection.rows[collection.rows[:, 0] > 0]
    np.testing.assert_array_equal(x[x[:, 0] > 0].compute(), wanted)


EXPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x.sum(),
    "mean of items": lambda x: x.mean(axis=0),
    "norms": lambda x: (x**2).sum(axis=1) ** 0.5,
    "std": lambda x: x.std(axis=0),
    "largest": lambda x: x.max(axis=1),
    "where largest": lambda x: x.argmax(axis=0),
    "product": lambda x: x @ x[:5].T,
    "gram": lambda x: x.T @ x,
    "comparison": lambda x: (x > 0).sum(axis=0),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_reductions_are_those_of_numpy(x: da.Array, collection: Collection, name: str) -> None:
    expected = EXPRESSIONS[name](collection.rows)
    np.testing.assert_allclose(EXPRESSIONS[name](x).compute(), expected, rtol=1e-4, atol=1e-5)


def test_the_nearest_rows_of_queries(x: da.Array, collection: Collection) -> None:
    queries = collection.rows[[3, 21]]
    scores = x @ queries.T
    expected = collection.rows @ queries.T
    order = np.argsort(-expected, axis=0)[:4]
    np.testing.assert_array_equal(da.argtopk(scores, 4, axis=0).compute(), order)
    np.testing.assert_allclose(da.topk(scores, 4, axis=0).compute(), np.take_along_axis(expected, order, 0), rtol=1e-5)


def test_a_compressed_svd(x: da.Array, collection: Collection) -> None:
    _, values, directions = da.linalg.svd_compressed(x.rechunk((8, -1)), k=3, n_power_iter=4, seed=0)
    _, expected, axes = np.linalg.svd(collection.rows, full_matrices=False)
    np.testing.assert_allclose(values.compute(), expected[:3], rtol=0.02)
    assert abs(float((directions.compute()[0] * axes[0]).sum())) > 0.99


def test_rows_of_a_category(meta: Any, collection: Collection) -> None:
    frame = collection.frame()
    wanted = frame["caption"].iloc[12]
    assert_same_frame(
        meta[meta["caption"] == wanted].compute(), frame[(frame["caption"] == wanted).fillna(value=False)]
    )


@pytest.mark.parametrize(("first", "last"), [(0, 0), (4, 23), (39, 39), (7, 18)])
def test_rows_by_their_number(meta: Any, collection: Collection, first: int, last: int) -> None:
    assert_same_frame(meta.loc[first:last].compute(), collection.frame(first, last + 1))


# ---------------------------------------------------------------------------------------------------------------------
# A computed column beside the others


def test_a_computed_column_is_joined_by_row_number(x: da.Array, meta: Any, collection: Collection) -> None:
    norms = (x**2).sum(axis=1).compute()
    joined = meta.map_partitions(lambda part: part.assign(norm=norms[part.index]))
    assert joined.divisions == meta.divisions
    expected = collection.frame().assign(norm=(collection.rows**2).sum(axis=1))
    pd.testing.assert_frame_equal(joined.compute(), expected)
    pd.testing.assert_frame_equal(joined.loc[5:21].compute(), expected.loc[5:21])


def test_a_computed_column_is_joined_in_batches(x: da.Array, meta: Any, collection: Collection) -> None:
    parts = [part.assign(norm=norms) for norms, part in iter_batches((x**2).sum(axis=1), meta, batch_size=11)]
    expected = (collection.rows**2).sum(axis=1)
    np.testing.assert_allclose(pd.concat(parts)["norm"], expected, rtol=1e-6)
    assert pd.concat(parts)["i"].tolist() == list(range(40))


# ---------------------------------------------------------------------------------------------------------------------
# Query planning, which is chosen when Dask is imported; Dask itself has no `@` there

PLANNING_PROGRAM = """
import sys
import dask

dask.config.set({"array.query-planning": True})
import dask.array as da
import numpy as np
from dask_embedding_reader import EmbeddingReader, iter_batches

assert "expr" in da.Array.__module__
rows = np.load(sys.argv[1] + "/0.npy")
x = EmbeddingReader(sys.argv[1]).to_dask_array(max_piece_size=7)
np.testing.assert_array_equal(x.compute(), rows)
np.testing.assert_array_equal(x[5:40:3].compute(), rows[5:40:3])
np.testing.assert_allclose((x * x).sum(axis=1).compute(), (rows * rows).sum(axis=1))
for lazy, expected in ((x, rows), (x - x.mean(axis=0), rows - rows.mean(axis=0))):
    batches = [batch for batch, _ in iter_batches(lazy, batch_size=30)]
    np.testing.assert_allclose(np.concatenate(batches), expected)
"""


def test_query_planning_gives_the_same_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.random.default_rng(0).standard_normal((100, 4)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", textwrap.dedent(PLANNING_PROGRAM), str(tmp_path)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
