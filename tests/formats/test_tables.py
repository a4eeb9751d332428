"""Metadata as Arrow columns, and files of them: what is kept, what is refused, and how many rows lie together."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import ArgumentError, ColumnError, MismatchError
from dask_embedding_reader.formats.base import Columns, MetaColumn
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField
from dask_embedding_reader.formats.parquet import encode, tables
from dask_embedding_reader.formats.parquet.encode import group_rows, metadata_header, write_parquet
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.vectors import Vectors, plan_casting
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version


def made(frame: pd.DataFrame) -> pa.Table:
    found = tables.make_table(frame, "embedding", 1_000)
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_frames_become_columns_with_nulls_where_pandas_has_them() -> None:
    frame = pd.DataFrame(
        {
            "whole": np.array([1, 2, 3], "i4"),
            "nan": [1.0, np.nan, 3.0],
            "masked": pd.array([1, None, 3], "Int64"),
            "masked whole": pd.array([1, 2, 3], "Int64"),
            "masked float": pd.array([1.0, 2.0, 3.0], "Float64"),
            "masked flag": pd.array([True, False, True], "boolean"),
            "text": ["a", None, "c"],
            "kind": pd.Categorical(["x", None, "y"]),
            "big": np.array([1, 2, 3], ">i8"),
        }
    )
    table = made(frame)
    assert table.to_pydict() | {"nan": None} == {
        "whole": [1, 2, 3],
        "nan": None,
        "masked": [1, None, 3],
        "masked whole": [1, 2, 3],
        "masked float": [1.0, 2.0, 3.0],
        "masked flag": [True, False, True],
        "text": ["a", None, "c"],
        "kind": ["x", None, "y"],
        "big": [1, 2, 3],
    }
    assert table.column("nan").null_count == 0
    assert np.isnan(table.column("nan")[1].as_py())
    marked = [field.name for field in table.schema if tables.is_masked(field)]
    assert marked == ["masked whole", "masked flag"]  # of floats NaN tells
    # Nulls may be in what is masked, or has some.
    described = tables.described(table)
    assert [field.name for field in described if field.nullable] == [
        "masked",
        "masked whole",
        "masked flag",
        "text",
        "kind",
    ]
    assert not any(field.metadata for field in described)
    assert tables.meta_columns(described)[:2] == (MetaColumn(pa.int32(), False), MetaColumn(pa.float64(), False))
    assert tables.described(None) == pa.schema([])


def test_what_has_no_columns_is_no_table() -> None:
    assert tables.make_table(None, "embedding", 0) is None
    assert tables.make_table(pd.DataFrame(index=range(3)), "embedding", 0) is None
    rows = pd.DataFrame({ROW_NUMBER: [1, 2]})
    assert tables.make_table(rows, "embedding", 0) is None
    assert tables.mark_table(None, [], "embedding") is None
    assert tables.join_tables([None, None]) is None


def test_row_numbers_of_readers_are_left_out_and_no_other_index() -> None:
    frame = pd.DataFrame({ROW_NUMBER: [7, 8], "n": [1, 2]})
    assert made(frame).column_names == ["n"]
    assert made(frame.set_index(ROW_NUMBER)).column_names == ["n"]
    assert made(pd.DataFrame({"n": [1, 2]}, index=[5, 6])).column_names == ["n"]
    for named in (frame.set_index("n"), frame.set_index([ROW_NUMBER, "n"])):
        with pytest.raises(ColumnError, match=r"the index .*'n'.* would not be stored: .*reset_index"):
            tables.make_table(named.assign(x=1), "embedding", 0)


NAMES: dict[str, tuple[list[Any], str]] = {
    "no text": ([3], "column 3 has no string for a name"),
    "half a character": (["a\ud800"], "holds half a character"),
    "twice": (["a", "b", "a"], "more than one column 'a'"),
    "that of vectors": (["embedding"], "'embedding' has the name of the column of vectors"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be_are_refused(name: str) -> None:
    names, says = NAMES[name]
    frame = pd.DataFrame([[1] * len(names)], columns=pd.Index(names, dtype=object))
    with pytest.raises(ColumnError, match=says):
        tables.make_table(frame, "embedding", 0)
    if name not in ("no text", "half a character"):
        table = pa.Table.from_arrays([pa.array([1])] * len(names), names=names)
        fields = [MetaField(each, pa.int64(), False) for each in names]
        with pytest.raises(ColumnError, match=says):
            tables.mark_table(table, fields, "embedding")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["a", 1], r"'x' \((object|str)\) cannot be stored, in rows 1,000 to 1,002: "),
        (pd.period_range("2020", periods=2, freq="D"), "only pandas knows this type"),
        (pd.interval_range(0, 2), "only pandas knows this type"),
        (np.array([1 + 2j, 3]), "cannot be stored"),
    ],
    ids=["mixed", "periods", "intervals", "complex"],
)
def test_values_that_cannot_be_stored_are_refused_with_their_rows(values: Any, says: str) -> None:
    with pytest.raises(ColumnError, match=rf"metadata column .*{says}"):
        made(pd.DataFrame({"x": values}))


def test_columns_of_readers_are_marked_as_those_of_frames_are() -> None:
    chunks = pa.chunked_array([[1, 2], [3]])
    table = pa.table({"masked": chunks, "plain": chunks, "some": pa.chunked_array([[1, None], [3]])})
    fields = [
        MetaField("masked", pa.int64(), True),
        MetaField("plain", pa.int64(), False),
        MetaField("some", pa.int64(), True),
    ]
    marked = tables.mark_table(table, fields, "embedding")
    assert marked is not None
    assert marked.to_pydict() == table.to_pydict()
    assert [tables.is_masked(field) for field in marked.schema] == [True, False, False]
    assert all(column.num_chunks == 1 for column in marked.columns)


def test_tables_are_joined_where_their_types_fit() -> None:
    first, second = pa.table({"a": pa.nulls(2)}), pa.table({"a": [1, 2]})
    joined = tables.join_tables([first, second])
    assert joined is not None
    assert joined.to_pydict() == {"a": [None, None, 1, 2]}
    with pytest.raises(MismatchError, match=r"different types in different rows: .*; give it one dtype"):
        tables.join_tables([second, pa.table({"a": ["x"]})])


def test_masked_arrays_are_no_vectors() -> None:
    array = np.ma.masked_array([1.0, 2.0], [False, True])
    with pytest.raises(ArgumentError, match="the array has masked values"):
        tables.plain_array(array, "the array")
    plain = tables.plain_array(np.ma.masked_array([1.0, 2.0]), "the array")
    assert type(plain) is np.ndarray
    assert plain.tolist() == [1.0, 2.0]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def written(table: pa.Table | None, vectors: Vectors | None = None) -> bytes:
    sink = io.BytesIO()
    write_parquet(sink.write, table, vectors, "embedding")
    return sink.getvalue()


def test_row_groups_have_so_many_rows() -> None:
    assert group_rows(0, None) == ()
    assert group_rows(100_000, None) == (100_000,)
    assert group_rows(250_001, None) == (100_000, 100_000, 50_001)
    for row_nbytes in (4, 3_000, 10**6, 10**8, 10**9):
        [most, last] = group_rows(max(1, 50_000_000 // row_nbytes) + 1, row_nbytes)
        assert most * row_nbytes <= max(50_000_000, row_nbytes)
        assert last == 1
    file = StoredFile(LocalStore(LocalFileSystem()), "a", Version(1))
    header = metadata_header(file, 100_001)
    assert (header.rows, header.dimension, header.group_rows, header.file) == (100_001, 0, (100_000, 1), file)


def test_files_of_metadata_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_METADATA_GROUP_ROWS", 30)
    frame = pd.DataFrame({"n": range(70), "a.b": ["x"] * 70, "a": pd.array([1] * 70, "Int64"), "ab": 1.5})
    data = written(made(frame))
    file = pq.ParquetFile(io.BytesIO(data))
    assert [file.metadata.row_group(n).num_rows for n in range(3)] == [30, 30, 10]
    assert file.schema_arrow.metadata is None
    group = file.metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(4)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert all("RLE_DICTIONARY" in column.encodings for column in columns.values())
    assert all(column.has_offset_index for column in columns.values())
    # A masked column without a null comes back masked as nothing proves that it has none.
    assert {name for name, column in columns.items() if column.is_stats_set} == {"n", "a.b", "ab"}
    only = pq.ParquetFile(io.BytesIO(written(made(frame[["a"]]))))
    assert not only.metadata.row_group(0).column(0).is_stats_set


@pytest.mark.parametrize(
    ("dtype", "is_stored"),
    [("f2", 1), ("f8", 1), ("i1", 1), ("u8", 1), ("f16", 0), ("c8", 0), ("?", 0), ("O", 0), ("M8[s]", 0), ("S4", 0)],
)
def test_dtypes_that_parquet_holds(dtype: str, is_stored: int) -> None:
    assert PARQUET.suffix_for(np.dtype(dtype)) == (".parquet" if is_stored else None)


@pytest.mark.parametrize("dtype", ["f4", "i1", "f8"])
@pytest.mark.parametrize(("rows", "dimension"), [(1, 1), (50, 3), (700, 100)])
def test_headers_of_files_that_were_written_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, rows: int, dimension: int
) -> None:
    monkeypatch.setattr(encode, "_GROUP_NBYTES", 20_000)
    array = np.ones((rows, dimension), dtype)
    data = written(None, Vectors(array, plan_casting(array.dtype, None, None)))
    path = tmp_path / "0.parquet"
    path.write_bytes(data)
    FOOTERS.clear()
    file = StoredFile(LocalStore(LocalFileSystem()), str(path), Version(len(data)))
    header = PARQUET.read_header(file, Columns("embedding"))
    assert PARQUET.written_header(file, rows, dimension, np.dtype(dtype)) == header
    assert PARQUET.check_header(header)
    assert not PARQUET.check_header(header._replace(rows=rows + 1))
    assert not PARQUET.check_header(header._replace(layout=(1,)))
    assert PARQUET.raw_offset(header) is None
    assert PARQUET.drawback(header) == ""
    assert PARQUET.find_vectors(file, Columns(), b"head") == (["embedding"], b"head")
