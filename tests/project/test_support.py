"""The builders write what they say: plain numpy and pyarrow read their files back as the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import servers
from tests.support.collections import (
    COLUMNS,
    FORMATS,
    WITH_METADATA,
    Collection,
    as_others_read,
    as_table,
    expected_column,
    write_collection,
)


def _vectors(path: Path, collection: Collection) -> list[list[object]]:
    """The rows of a file as Python lists, by numpy's or pyarrow's own reading."""
    if path.suffix != ".parquet":
        stored = np.load(path) if path.suffix == ".npy" else as_others_read(path)
        return stored.astype(collection.rows.dtype).tolist()  # type: ignore[no-any-return]
    column = pq.read_table(path)["embedding"]
    if pa.types.is_fixed_size_binary(column.type):
        return [np.frombuffer(cell, collection.rows.dtype).tolist() for cell in column.to_pylist()]
    cells = column.combine_chunks()
    cells = cells.storage if isinstance(cells, pa.ExtensionArray) else cells
    return [list(cell) for cell in cells.to_pylist()]


@pytest.mark.parametrize("format_name", FORMATS)
def test_files_hold_what_the_oracle_says(format_name: str, tmp_path: Path) -> None:
    for dtype in FORMATS[format_name].dtypes:
        collection = write_collection(tmp_path / dtype, format_name, dtype=dtype, columns=["id"], row_group_rows=5)
        stored = [row for path in collection.files for row in _vectors(path, collection)]
        assert stored == collection.rows.tolist()
        assert collection.rows.dtype == np.dtype(dtype)
        assert list(collection.files) == sorted(collection.files, key=str)


@pytest.mark.parametrize("format_name", WITH_METADATA)
def test_metadata_files_hold_what_the_oracle_says(format_name: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, format_name, row_group_rows=5)
    folder = collection.metadata_folder or collection.folder
    # Numbered names are not zero-padded, so the order of their numbers is the one to read them in.
    paths = sorted(
        [*folder.glob("*.parquet"), *folder.glob("*.arrow")],
        key=lambda path: int("".join(filter(str.isdigit, path.stem))),
    )
    stored = pa.concat_tables([as_table(path).select(collection.columns) for path in paths])
    assert stored.schema.types == collection.table.schema.types
    np.testing.assert_array_equal(stored["score"].to_numpy(), collection.table["score"].to_numpy())
    # The rest as Python objects; not the scores, where NaN is unequal to itself.
    assert stored.drop_columns(["score"]).to_pylist() == collection.table.drop_columns(["score"]).to_pylist()


def test_oracle_dtypes_are_those_of_the_specification(tmp_path: Path) -> None:
    frame = write_collection(tmp_path, "parquet-list").metadata
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
        "id": "int64",
        "rank": "Int32",
        "big": "Int64",
        "small": "uint8",
        "score": "float64",
        "weight": "float32",
        "seen": "bool",
        "liked": "boolean",
        "caption": "string",
        "text": "string",
        "kind": "string",
        "taken": "datetime64[ms]",
        "posted": "datetime64[us, UTC]",
        "lasted": "timedelta64[ns]",
        "day": "date32[day][pyarrow]",
        "price": "decimal128(9, 2)[pyarrow]",
        "tags": "list<item: string>[pyarrow]",
        "blob": "binary[pyarrow]",
    }
    assert list(frame.columns) == list(COLUMNS)
    assert frame["caption"].dtype == pd.StringDtype("pyarrow")
    assert frame["big"].dropna().mod(2).eq(1).all(), "odd beyond 2**53: nothing went through float64"
    with_nulls = {name for name in frame.columns if frame[name].isna().any()}
    assert with_nulls == {"rank", "big", "score", "weight", "liked", "caption", "kind", "posted", "day", "tags"}


def test_expected_column_keeps_values_that_float64_cannot() -> None:
    column = pa.chunked_array([pa.array([2**53 + 1, None], pa.int64())])
    assert expected_column(column).tolist() == [2**53 + 1, pd.NA]
    assert expected_column(column.slice(0, 1), nullable=True).dtype == pd.Int64Dtype()
    assert expected_column(column.slice(0, 1)).dtype == np.dtype("int64")


def test_what_lacks_a_server_is_skipped_and_fails_where_all_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    servers.require(True, "nginx")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nginx is not installed: `make servers` does it"):
        servers.require(False, "nginx")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="nginx is not installed"):
        servers.require(False, "nginx")
