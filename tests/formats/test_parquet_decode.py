"""Columns as pyarrow decodes them: the rows that are asked for, in steps, and which of them cannot be decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import FormatError, ReadError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.parquet.decode import iter_tables
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from dask_embedding_reader.formats.parquet.header import read_header
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import Bucket, Request, emptied_bucket

GROUPS = [40, 0, 25, 60]
ROWS = sum(GROUPS)

STRUCT = pa.struct([("x", pa.int64()), ("y", pa.struct([("z", pa.string())]))])
TABLE = pa.table(
    {
        "n": np.arange(ROWS),
        "text": [f"text {n}" for n in range(ROWS)],
        "s": pa.array([None if n % 5 == 0 else {"x": n, "y": {"z": str(n)}} for n in range(ROWS)], STRUCT),
        "n.x": np.arange(ROWS) * 2,
    }
)


def content(table: pa.Table = TABLE, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, use_dictionary=False, **options) as writer:
        row = 0
        for rows in GROUPS:
            writer.write_table(table.slice(row, rows))
            row += rows
    return sink.getvalue()


def header_of(path: Path, data: bytes) -> FileHeader:
    path.write_bytes(data)
    FOOTERS.clear()
    return read_header(StoredFile(LocalStore(LocalFileSystem()), str(path), Version(len(data))), Columns())


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with emptied_bucket() as store:
        yield store


@pytest.mark.parametrize("seed", range(5))
def test_the_rows_that_are_asked_for_come_in_steps(tmp_path: Path, seed: int) -> None:
    chance = Random(seed)
    header = header_of(tmp_path / "0.parquet", content())
    for _ in range(8):
        start, stop = sorted(chance.sample(range(ROWS + 1), 2))
        step = chance.choice([1, 7, 25, 1_000])
        names = chance.sample(["n", "text", "s", "n.x"], chance.randint(1, 4))
        batches = list(iter_tables(header, names, start, stop, step))
        assert pa.Table.from_batches(batches).equals(TABLE.select(names).slice(start, stop - start))
        assert max(batch.num_rows for batch in batches) <= step


def test_of_a_part_of_the_row_groups_rows_are_those_of_the_file(tmp_path: Path) -> None:
    """A header may tell of some row groups alone."""
    header = header_of(tmp_path / "0.parquet", content())
    part = header._replace(group_rows=(25, 60), first_group=2, first_group_row=40)
    for start, stop in ((40, 125), (64, 66), (65, 125), (50, 60)):
        found = pa.Table.from_batches(list(iter_tables(part, ["n"], start, stop, 10)))
        assert found.column("n").to_pylist() == list(range(start, stop))


def test_fields_of_structs_are_null_where_the_struct_is(tmp_path: Path) -> None:
    header = header_of(tmp_path / "0.parquet", content())
    found = pa.Table.from_batches(list(iter_tables(header, ["s.y.z", "n", "s.x"], 30, 50)))
    assert found.column_names == ["s.y.z", "n", "s.x"]
    assert found.column("s.y.z").to_pylist() == [None if n % 5 == 0 else str(n) for n in range(30, 50)]
    assert found.column("s.x").to_pylist() == [None if n % 5 == 0 else n for n in range(30, 50)]


@pytest.mark.parametrize("bad", [[0], [ROWS - 1], [41, 42, 90], [64], [65], [7, 33, 34, 39]])
def test_the_first_text_that_is_none_is_named(tmp_path: Path, bad: list[int]) -> None:
    text = [b"\xff" if n in bad else b"s" for n in range(ROWS)]
    column = pa.Array.from_buffers(pa.string(), ROWS, pa.array(text, pa.binary()).buffers())
    table = TABLE.set_column(1, "text", column)
    header = header_of(tmp_path / "0.parquet", content(table, write_statistics=False))
    for start, step in ((0, 1_000), (bad[0] // 2, 7), (bad[0], 1)):
        says = rf"0\.parquet, row {bad[0]}: column 'text' is string, which this value is not: .*leave the column out"
        with pytest.raises(FormatError, match=says):
            list(iter_tables(header, ["n", "text"], start, ROWS, step))
        if start < bad[0]:
            assert sum(batch.num_rows for batch in iter_tables(header, ["text"], start, bad[0], step)) == bad[0] - start


@pytest.mark.parametrize("step", [1_000, 7])
@pytest.mark.parametrize("names", [["n"], ["text"], ["n", "text"], ["text", "n"]])
def test_the_rows_and_the_column_that_cannot_be_decoded_are_named(tmp_path: Path, names: list[str], step: int) -> None:
    """The rest of the row group, or what a step should have brought."""
    data = bytearray(content(compression="zstd", data_page_size=1, write_batch_size=10))
    told = pq.read_metadata(io.BytesIO(data))
    chunk = told.row_group(3).column(1)
    start = chunk.data_page_offset
    middle = start + 2 * chunk.total_compressed_size // 3
    data[middle : start + chunk.total_compressed_size] = bytes(start + chunk.total_compressed_size - middle)
    header = header_of(tmp_path / "0.parquet", bytes(data))
    if names == ["n"]:
        assert sum(batch.num_rows for batch in iter_tables(header, names, 0, ROWS, step)) == ROWS
        return
    with pytest.raises(FormatError) as info:
        list(iter_tables(header, names, 3, ROWS, step))
    said = str(info.value)
    assert "column 'text' cannot be decoded: " in said
    if step > 60:
        assert f"{tmp_path}/0.parquet, rows 65 to 125: " in said
    else:
        [first] = [row for row in range(65, 125, 7) if f"rows {row} to {min(row + 7, 125)}: " in said]
        assert 65 < first < 125


@pytest.mark.parametrize(("rows", "start", "named"), [(0, 0, 0), (0, 30, 30), (2, 30, 40), (2, 50, 50), (3, 30, 65)])
def test_rows_that_are_not_delivered_are_named(bucket: Bucket, rows: int, start: int, named: int) -> None:
    """From the first one on that had not come."""
    data = content(compression="none")
    bucket.put("emb/0.parquet", data)
    file = (
        EmbeddingReader("bucket://emb/0.parquet", meta_columns=["n"], embedding_column=["n"])
        .manifest.vectors.header(0)
        .file
    )
    header = read_header(file, Columns())
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(rows).column(0)
    place = chunk.data_page_offset

    def refuse(request: Request) -> None:
        if request.kind == "read" and request.start <= place < request.stop:
            raise PermissionError("not for you")

    bucket.before_read = refuse
    with pytest.raises(ReadError, match=rf"^rows {named} to {ROWS}: .*not for you"):
        list(iter_tables(header, ["n"], start, ROWS, window_nbytes=100))


def test_files_that_changed_are_called_so(tmp_path: Path) -> None:
    header = header_of(tmp_path / "0.parquet", content())
    batches = iter_tables(header, ["n"], 0, ROWS, 10)
    next(batches)
    (tmp_path / "0.parquet").unlink()
    (tmp_path / "0.parquet").write_bytes(bytes(100))
    with pytest.raises(ReadError, match="changed"):
        list(batches)
