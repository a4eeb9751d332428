"""What the tasks of an array hold is indexed as numpy arrays are, and a frame is cut where its array is."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import EmbeddingReader, MismatchError
from dask_embedding_reader.lazy._dask import convert_legacy_graph
from dask_embedding_reader.lazy.pieces import LazyPiece, LazySelection
from dask_embedding_reader.lazy.row_numbers import trace_rows
from tests.support.collections import write_collection

ROWS = np.arange(75, dtype=np.int32).reshape(25, 3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingReader:
    """Files of 4, 0, 1, 13 and 7 rows."""
    folder = tmp_path_factory.mktemp("pieces")
    for number, (start, stop) in enumerate([(0, 4), (4, 4), (4, 5), (5, 18), (18, 25)]):
        np.save(folder / f"{number}.npy", ROWS[start:stop])
        pd.DataFrame({"row": range(start, stop), "id": range(stop, start, -1)}).to_parquet(folder / f"{number}.parquet")
    return EmbeddingReader(folder, "parquet_npy", metadata_folder=folder, meta_columns=["row", "id"])


def pieces_of(array: Any) -> list[Any]:
    """What the tasks hold, in the order of their rows."""

    def held(one: Any) -> Iterator[Any]:
        if isinstance(one, LazyPiece | LazySelection):
            yield one
        for part in [*getattr(one, "args", ()), getattr(one, "value", None)]:
            if part is not None:
                yield from held(part)

    tasks = convert_legacy_graph(dict(array.__dask_graph__()))
    found = {piece.rows[0]: piece for task in tasks.values() for piece in held(task)}
    return [found[first] for first in (dict.fromkeys(found))]


PICKED: dict[str, Any] = {
    "rows": None,
    "some": [1, 2, 5, 6, 7, 17, 18, 24],
    "in any order": [24, 3, 3, 18, 0, 17, 5, 4],
    "backwards": slice(None, None, -2),
    "in steps": slice(2, 23, 3),
}

INDICES: list[Any] = [
    np.s_[:],
    np.s_[1:3],
    np.s_[2:2],
    np.s_[-2:],
    np.s_[1:100],
    np.s_[::-1],
    np.s_[::2],
    np.s_[5:0:-2],
    np.s_[0],
    np.s_[-1],
    np.int64(2),
    [0, 1, 2],
    [2, 1, 0],
    [1, 1, 2],
    [3],
    np.array([], int),
    np.array([1, 3]),
    np.s_[:, 0],
    np.s_[1:3, 1:],
    np.s_[2, 1],
    np.s_[-1, ::-1],
    np.s_[[3, 0], -1],
    np.s_[::-2, [2, 0]],
    np.s_[1:3, :],
    (np.s_[1:3],),
]


@pytest.mark.parametrize("dtype", ["int32", "float64"])
@pytest.mark.parametrize("picked", PICKED)
def test_a_piece_is_indexed_as_an_array(reader: EmbeddingReader, picked: str, dtype: str) -> None:
    view, rows = reader, np.arange(25)
    if PICKED[picked] is not None:
        view, rows = reader.take(PICKED[picked]), rows[PICKED[picked]]
    pieces = pieces_of(view.to_dask_array(dtype=dtype, chunks=8))
    assert [row for piece in pieces for row in piece.rows] == rows.tolist()
    for piece in pieces:
        expected = ROWS[list(piece.rows)].astype(dtype)
        assert piece.shape == expected.shape
        assert piece.ndim == 2
        assert np.asarray(piece, "float32").dtype == "float32"
        np.testing.assert_array_equal(np.asarray(piece), expected)
        for again in (piece, pickle.loads(pickle.dumps(piece))):
            for index in INDICES:
                try:
                    wanted = expected[index]
                except IndexError:
                    with pytest.raises(IndexError):
                        again[index]
                else:
                    found = again[index]
                    np.testing.assert_array_equal(found, wanted, str(index))
                    assert found.dtype == dtype
        with pytest.raises(IndexError):
            piece[len(expected)]


@pytest.mark.parametrize("picked", PICKED)
def test_an_array_tells_its_rows_and_a_frame_has_the_same_partitions(reader: EmbeddingReader, picked: str) -> None:
    view, rows = reader, np.arange(25)
    if PICKED[picked] is not None:
        view, rows = reader.take(PICKED[picked]), rows[PICKED[picked]]
    x, frame = view.to_dask_array(max_piece_size=3), view.to_dask_dataframe(max_piece_size=3)
    told = trace_rows(x)
    assert [int(row) for some in told.rows for row in some] == rows.tolist()
    assert told.untold == 0
    bounds = np.cumsum([0, *x.chunks[0]])
    assert max(x.chunks[0]) == (2 if picked == "some" else 3)
    for number in range(frame.npartitions):
        part = frame.get_partition(number).compute(scheduler="synchronous")
        expected = rows[bounds[number] : bounds[number + 1]]
        assert part.index.tolist() == expected.tolist()
        assert part["row"].tolist() == expected.tolist()
        np.testing.assert_array_equal(x.blocks[number].compute(scheduler="synchronous"), ROWS[expected])
    assert frame.npartitions == x.numblocks[0]
    is_ascending = (np.diff(rows) > 0).all()
    assert frame.divisions == ((*rows[bounds[:-1]], rows[-1]) if is_ascending else (None,) * len(bounds))
    for columns in (["id", "row"], ["id"], []):
        found = frame[columns].compute(scheduler="synchronous")
        assert list(found.columns) == columns
        assert found.index.tolist() == rows.tolist()
        assert found.index.name == "i"


def test_nothing_is_one_empty_piece(reader: EmbeddingReader, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    pd.DataFrame({"row": range(25), "id": range(25)}).to_parquet(tmp_path / "0.parquet")
    one = EmbeddingReader(tmp_path, "parquet_npy", metadata_folder=tmp_path, meta_columns=["row", "id"])
    options: Any
    for view, options in (
        (reader, {"start": 7, "end": 7}),
        (reader.take([]), {}),
        (one, {"start": 7, "end": 7}),
        (one.take([]), {}),
    ):
        x, frame = view.to_dask_array(**options), view.to_dask_dataframe(**options)
        assert x.compute(scheduler="synchronous").shape == (0, 3)
        assert frame.divisions == (None, None)
        found = frame.compute(scheduler="synchronous")
        assert list(found.columns) == ["row", "id"]
        assert len(found) == 0


@pytest.mark.parametrize("picked", [None, [3, 1]])
def test_a_task_of_another_version_of_this_package_is_an_error(reader: EmbeddingReader, picked: Any) -> None:
    view = reader if picked is None else reader.take(picked)
    (piece, *_) = pieces_of(view.to_dask_array())
    kind = type(piece)
    fields = {name: getattr(piece, name) for name in kind.__dataclass_fields__}
    message = (
        r"^this task was made by dask-embedding-reader 0\.0\.0, but this process has \d.*; install the same version"
    )
    for index in (slice(None), [1, 0], 1):
        with pytest.raises(MismatchError, match=message):
            kind(**fields | {"version": "0.0.0"})[index]


@pytest.mark.parametrize("wanted", [slice(0, 3), slice(4, 6), slice(3, 9), slice(0, 10), slice(9, 10), slice(2, 3)])
def test_rows_of_a_row_group_are_cut_from_the_chunk_that_decodes_it(tmp_path: Path, wanted: slice) -> None:
    """Few pieces are read alone, which the tasks tell; and whatever is asked for comes out."""
    collection = write_collection(tmp_path, "parquet-list", file_rows=[12, 9], row_group_rows=6, columns=["id"])
    x = collection.open().to_dask_array(max_piece_size=2)
    assert x.chunks[0] == (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1)
    part = x.blocks[wanted]
    rows = collection.rows[2 * wanted.start : 2 * wanted.stop]
    np.testing.assert_array_equal(part.compute(scheduler="synchronous"), rows)
    of_group = [(0, 3), (3, 6), (6, 9), (9, 11)]
    sizes = [min(stop, wanted.stop) - max(start, wanted.start) for start, stop in of_group]
    expected = {
        number: "alone" if count <= 2 < stop - start else "cut"
        for number, (count, (start, stop)) in enumerate(zip(sizes, of_group, strict=True))
        if count > 0
    }
    culled = part.__dask_graph__().cull({key for (key,) in part.__dask_keys__()})
    names = [key[0] for key in dict(culled) if isinstance(key, tuple)]
    assert sum(name.startswith("rows-of-") for name in names) == list(expected.values()).count("alone")
    whole = [key for key in dict(culled) if key[0].startswith("embeddings-") and key not in part.__dask_keys__()]
    assert len(whole) >= list(expected.values()).count("cut")
