"""Tasks of one name are the same task: whatever is computed together comes out as if it were computed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.base import compute

from dask_embedding_reader import EmbeddingReader

ROWS = 40


class Question(NamedTuple):
    """Rows that somebody asks a collection for."""

    collection: str
    column: str
    start: int
    stop: int
    #: Picked of all, in this order.
    picked: tuple[int, ...] | None
    piece: int
    dtype: str | None
    columns: tuple[str, ...]

    @property
    def rows(self) -> list[int]:
        return list(self.picked or range(self.start, self.stop))


#: What may be asked for, by what it is.
CHOICES: dict[str, list[Any]] = {
    "collection": ["a.parquet", "b.parquet", "a.npy", "b.npy"],
    "column": ["embedding", "other"],
    "start": [0, 3],
    "stop": [37, ROWS],
    "picked": [None, (1, 4, 5, 23), (1, 4, 6, 23), (23, 4, 1, 5)],
    "piece": [3, 4, ROWS],
    "dtype": [None, "float64"],
    "columns": [("id",), ("rank",), ("rank", "id"), ("id", "rank")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two collections of each kind, in files of the same sizes; of parquet in several row groups."""
    root = tmp_path_factory.mktemp("names")
    for number, name in enumerate("ab"):
        for suffix in ("parquet", "npy"):
            (root / f"{name}.{suffix}").mkdir()
        for part in range(2):
            rows = range(part * ROWS // 2, (part + 1) * ROWS // 2)
            table = pa.table(
                {
                    **{c: pa.array(list(vectors(name, c)[rows.start : rows.stop])) for c in CHOICES["column"]},
                    "id": [100 * number + row for row in rows],
                    "rank": [100 * number - row for row in rows],
                }
            )
            pq.write_table(table, root / f"{name}.parquet" / f"{part}.parquet", row_group_size=10)
            np.save(root / f"{name}.npy" / f"{part}.npy", vectors(name, "embedding")[rows.start : rows.stop])
    return root


def vectors(name: str, column: str) -> Any:
    first = 1000 * "ab".index(name) + 500 * CHOICES["column"].index(column)
    return np.arange(first, first + 3 * ROWS, dtype=np.float32).reshape(ROWS, 3)


def ask(folder: Path, question: Question) -> list[Any]:
    """The lazy array, and the lazy frame where there is one."""
    is_parquet = question.collection.endswith("parquet")
    reader = EmbeddingReader(
        folder / question.collection,
        embedding_column=question.column if is_parquet else None,
        meta_columns=list(question.columns) if is_parquet else None,
    )
    options: dict[str, Any] = {"max_piece_size": question.piece}
    if question.picked is not None:
        reader = reader.take(list(question.picked))
    else:
        options |= {"start": question.start, "end": question.stop}
    found = [reader.to_dask_array(dtype=question.dtype, **options)]
    return [*found, reader.to_dask_dataframe(**options)] if is_parquet else found


def answers(question: Question) -> list[Any]:
    """What has to come out."""
    name, _, kind = question.collection.partition(".")
    column = question.column if kind == "parquet" else "embedding"
    rows = vectors(name, column)[question.rows].astype(question.dtype or "float32")
    if kind == "npy":
        return [rows]
    first = 100 * "ab".index(name)
    values = {"id": [first + row for row in question.rows], "rank": [first - row for row in question.rows]}
    frame = pd.DataFrame(values, index=pd.Index(question.rows, name="i"))
    return [rows, frame[list(question.columns)]]


BASES = {
    "rows": Question("a.parquet", "embedding", 0, ROWS, None, 4, None, ("id",)),
    "picked": Question("a.parquet", "embedding", 0, ROWS, (1, 4, 5, 23), 3, None, ("rank", "id")),
    "npy": Question("a.npy", "embedding", 3, 37, None, 3, None, ("id",)),
}


@pytest.mark.parametrize("name", BASES)
def test_what_is_computed_together_is_what_is_computed_alone(folder: Path, name: str) -> None:
    """All that differ from one question in one thing, and from it in none."""
    base = BASES[name]
    others = {base._replace(**{name: value}) for name, some in CHOICES.items() for value in some}
    pairs = [pair for each in others for pair in zip(ask(folder, each), answers(each), strict=True)]
    for kind in (np.ndarray, pd.DataFrame):  # Dask warns where arrays and frames are computed together
        lazy, expected = zip(*(pair for pair in pairs if isinstance(pair[1], kind)), strict=True)
        for found, answer in zip(compute(*lazy, scheduler="synchronous"), expected, strict=True):
            if isinstance(answer, pd.DataFrame):
                pd.testing.assert_frame_equal(found, answer)
            else:
                assert found.dtype == answer.dtype
                np.testing.assert_array_equal(found, answer)


@pytest.mark.parametrize("name", BASES)
def test_few_rows_that_are_computed_together_are_those_computed_alone(folder: Path, name: str) -> None:
    """Such as are read by themselves, in tasks that are made when others are left out."""
    base = BASES[name]
    others = {base._replace(**{name: value}) for name, some in CHOICES.items() for value in some}
    few = compute(*(ask(folder, each)[0][:2] for each in others), scheduler="synchronous")
    for found, each in zip(few, others, strict=True):
        np.testing.assert_array_equal(found, answers(each)[0][:2])


@pytest.mark.parametrize("name", BASES)
def test_what_is_cut_or_cast_in_another_way_has_another_name(folder: Path, name: str) -> None:
    """Not all that shares a name is computed together; a cluster may have it from an hour ago."""
    base = BASES[name]
    known: dict[str, Any] = {}
    for other in [base._replace(**{name: value}) for name, some in CHOICES.items() for value in some]:
        array, expected = ask(folder, other)[0], answers(other)[0]
        found = array.chunks, array.dtype, expected.tolist()
        assert known.setdefault(array.name, found) == found


@pytest.mark.parametrize("name", BASES)
def test_the_same_question_has_the_same_names(folder: Path, name: str) -> None:
    """So that a scheduler which has the rows need not read them again."""
    first, second = ([set(each.__dask_graph__()) for each in ask(folder, BASES[name])] for _ in range(2))
    assert first == second
