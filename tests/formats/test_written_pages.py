"""Vectors are put into parquet files as they lie in memory; readers find in them what pyarrow would have written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader, write_embeddings
from dask_embedding_reader.formats.parquet import encode as encoding
from dask_embedding_reader.formats.parquet import read as parquet
from dask_embedding_reader.formats.parquet import write as pages
from dask_embedding_reader.formats.parquet.footer import read_raw_footer
from dask_embedding_reader.formats.parquet.page_headers import PLAIN, RLE, PageHeader, page_header
from dask_embedding_reader.formats.parquet.thrift import encode_varint
from tests.support.pages import encode_head
from tests.support.thrift import BINARY, I16, I32, I64, LIST, STRUCT, Value, encoded, encoded_fields, varint, zigzag

DTYPES = ["f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]
ROWS = 1_000


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row groups of several pages, the last of them shorter."""
    monkeypatch.setattr(encoding, "_GROUP_NBYTES", 20_000)
    monkeypatch.setattr(pages, "_PAGE_NBYTES", 3_000)


def vectors(dtype: str, dimension: int) -> Any:
    numbers = np.random.default_rng(dimension).integers(-(2**62), 2**62, (ROWS, dimension))
    return numbers.astype(dtype) if dtype[0] != "f" else (numbers / 2**58).astype(dtype)


def metadata() -> pd.DataFrame:
    words = [None if k % 7 == 0 else f"word {k}" for k in range(ROWS)]
    return pd.DataFrame({"id": np.arange(ROWS), "word": pd.Series(words, dtype="str"), "x": np.arange(ROWS) / 3})


def as_pyarrow_writes(path: Path, array: Any, frame: pd.DataFrame | None) -> None:
    """The same columns, all encoded by pyarrow."""
    items = pa.array(array.reshape(-1))
    kind = pa.list_(pa.field("element", items.type, nullable=False), array.shape[1])
    others = [] if frame is None else [pa.array(frame[name], from_pandas=name == "word") for name in frame.columns]
    fields = [pa.field("embedding", kind, nullable=False)]
    fields += [
        pa.field(name, column.type)
        for name, column in zip([] if frame is None else list(frame.columns), others, strict=True)
    ]
    table = pa.Table.from_arrays(
        [pa.FixedSizeListArray.from_arrays(items, type=kind), *others], schema=pa.schema(fields)
    )
    pq.write_table(table, path)


def both(tmp_path: Path, array: Any, frame: pd.DataFrame | None) -> tuple[Path, Path]:
    """A file of ours, and what pyarrow makes of the same."""
    write_embeddings(array, tmp_path / "ours", "parquet", frame)
    as_pyarrow_writes(tmp_path / "theirs.parquet", array, frame)
    return tmp_path / "ours" / "00000000.parquet", tmp_path / "theirs.parquet"


def read_with_duckdb(path: Path) -> Any:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.sql(f"select * from read_parquet('{path}')").fetchall()


def read_with_polars(path: Path) -> Any:
    return pytest.importorskip("polars").read_parquet(path).rows()


READERS: dict[str, Callable[[Path], Any]] = {
    "pyarrow": lambda path: pq.read_table(path).to_pylist(),
    "duckdb": read_with_duckdb,
    "polars": read_with_polars,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("has_metadata", [False, True])
@pytest.mark.parametrize(("dtype", "dimension"), [*((dtype, 3) for dtype in DTYPES), ("f4", 1), ("f4", 1_000)])
def test_other_readers_find_what_pyarrow_would_have_written(
    tmp_path: Path, reader: str, has_metadata: bool, dtype: str, dimension: int
) -> None:
    ours, theirs = both(tmp_path, vectors(dtype, dimension), metadata() if has_metadata else None)
    assert READERS[reader](ours) == READERS[reader](theirs)


@pytest.mark.parametrize("reader", ["duckdb", "polars"])
def test_they_find_some_rows_and_columns(tmp_path: Path, reader: str) -> None:
    """Which row groups and pages hold them, the statistics and the page index tell."""
    ours, theirs = both(tmp_path, vectors("f4", 8), metadata())
    if reader == "duckdb":
        duckdb = pytest.importorskip("duckdb")
        query = "select embedding, word from read_parquet('{}') where id between 611 and 640 order by id"
        found, expected = (duckdb.sql(query.format(path)).fetchall() for path in (ours, theirs))
    else:
        polars = pytest.importorskip("polars")
        wanted = polars.col("id").is_between(611, 640)
        found, expected = (polars.scan_parquet(path).filter(wanted).collect().rows() for path in (ours, theirs))
    assert len(found) == 30
    assert found == expected


@pytest.mark.parametrize(("dtype", "dimension"), [*((dtype, 3) for dtype in DTYPES), ("f4", 1), ("f4", 1_000)])
def test_our_reader_finds_them_with_and_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, dimension: int
) -> None:
    array, frame = vectors(dtype, dimension), metadata()
    write_embeddings(array, tmp_path, "parquet", frame)
    memory = fsspec.filesystem("memory")  # where pyarrow decodes all pages
    memory.put(str(tmp_path / "00000000.parquet"), f"{tmp_path}/0.parquet")
    for source in (str(tmp_path), f"memory://{tmp_path}/0.parquet"):
        reader = EmbeddingReader(source, "parquet", meta_columns=list(frame.columns))
        for start, stop in [(0, ROWS), (3, 5), (599, 777)]:
            rows, meta = next(reader(ROWS, start, stop, dtype=None, show_progress=False))
            np.testing.assert_array_equal(rows, array[start:stop])
            assert meta["id"].tolist() == list(range(start, stop))
            assert meta["word"].isna().tolist() == frame["word"][start:stop].isna().tolist()
    memory.rm(str(tmp_path), recursive=True)
    if dtype not in ("i1", "u1", "i2", "u2"):  # which are stored as wider ones
        monkeypatch.delattr(parquet, "iter_tables")
        next(EmbeddingReader(tmp_path, "parquet")(ROWS, show_progress=False))


@pytest.mark.parametrize("has_metadata", [False, True])
def test_footers_say_what_pyarrow_would_have_said(tmp_path: Path, has_metadata: bool) -> None:
    path, theirs = both(tmp_path, vectors("f4", 8), metadata() if has_metadata else None)
    ours, expected = pq.ParquetFile(path), pq.ParquetFile(theirs)
    assert ours.schema_arrow.equals(expected.schema_arrow, check_metadata=True)
    assert ours.schema.equals(expected.schema)
    assert ours.metadata.num_rows == ROWS
    assert ours.metadata.num_row_groups > 1
    first_row = 0
    for number, said in enumerate(read_raw_footer(path.read_bytes()).groups):
        group = ours.metadata.row_group(number)
        columns = [group.column(k).to_dict() for k in range(group.num_columns)]
        assert columns[0]["num_values"] == group.num_rows * 8
        assert columns[0]["file_offset"] == 0  # as is written today: readers go by the places of pages
        assert columns[0]["compression"] == "UNCOMPRESSED"
        assert set(columns[0]["encodings"]) == {"PLAIN", "RLE"}
        assert group.total_byte_size == sum(column["total_uncompressed_size"] for column in columns)
        assert said.compressed_nbytes == sum(column["total_compressed_size"] for column in columns)
        assert not has_metadata or columns[1]["statistics"]["min"] == first_row
        first_row += group.num_rows
    assert first_row == ROWS


def test_the_page_index_tells_where_pages_are(tmp_path: Path) -> None:
    array = vectors("f4", 8)
    write_embeddings(array, tmp_path, "parquet", metadata())
    path = tmp_path / "00000000.parquet"
    data, file = path.read_bytes(), pq.ParquetFile(path)
    row = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        assert all(group.column(k).has_offset_index for k in range(group.num_columns))
        position = group.column(0).data_page_offset
        stop = position + group.column(0).total_compressed_size
        index = b""
        for first in range(0, group.num_rows, 3_000 // 32):
            found = page_header(data[position : position + 100])
            assert found is not None
            (nbytes, values, *_), head = found
            rows = values // 8
            end = position + head + nbytes
            assert data[end - 32 * rows : end] == array[row : row + rows].tobytes()
            # A PageLocation of Thrift: three numbers, each after the kind of its field.
            numbers = [encode_varint(2 * number) for number in (position, head + nbytes, first)]
            index += b"".join(b"%c%s" % pair for pair in zip(b"\x16\x15\x16", numbers, strict=True)) + b"\0"
            position, row = position + head + nbytes, row + rows
        assert position == stop
        assert index in data[stop:]
    assert row == ROWS


def encoded_head(kind: int, nbytes: tuple[int, int], number: int, said: list[int]) -> bytes:
    """The header of a page: its size before compression and now, and the first fields of what there is of its kind."""
    integers = {place: (pages._I32, pages._integer(each)) for place, each in enumerate((kind, *nbytes), 1)}
    facts = pages._struct({place: (pages._I32, pages._integer(each)) for place, each in enumerate(said, 1)})
    return pages._struct({**integers, number: (pages._STRUCT, facts)})


@pytest.mark.parametrize(
    ("nbytes", "values", "nulls", "levels", "is_wanted"),
    [
        ((200, 100), 9, 0, (40, 60), True),
        ((100, 200), 9, 0, (40, 60), True),
        ((200, 100), 9, 0, (40, 61), False),  # more levels than bytes
        ((99, 200), 9, 0, (40, 60), False),
        ((200, 100), 9, 1, (4, 6), False),  # a null
        ((200, 100), 2**31 - 1, 0, (4, 6), True),
        ((200, 100), 2**31, 0, (4, 6), False),
    ],
)
def test_headers_of_pages_of_version_2_that_are_wrong_are_left_to_pyarrow(
    nbytes: tuple[int, int], values: int, nulls: int, levels: tuple[int, int], is_wanted: bool
) -> None:
    head = encoded_head(3, nbytes, 8, [values, nulls, 3, PLAIN, *levels])
    found = page_header(head)
    assert (found is not None) == is_wanted
    if found is not None:
        page, length = found
        assert (page.values, page.rows, page.levels, length) == (values, 3, levels[::-1], len(head))


@pytest.mark.parametrize(("levels", "is_wanted"), [((RLE, RLE), True), ((4, RLE), False), ((RLE, 4), False)])
def test_headers_of_pages_whose_levels_are_encoded_as_of_old_are_left_to_pyarrow(
    levels: tuple[int, int], is_wanted: bool
) -> None:
    assert (page_header(encoded_head(0, (200, 100), 5, [9, PLAIN, *levels])) is not None) == is_wanted


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_embeddings(vectors("f4", 8), tmp_path / name, "parquet", metadata())
    first, second = ((tmp_path / name / "00000000.parquet").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(("dtype", "dimension"), [("f4", 8), ("f2", 1), ("i1", 40), ("u8", 3), ("f8", 300)])
def test_files_of_vectors_are_encoded_field_by_field(tmp_path: Path, dtype: str, dimension: int) -> None:
    """Every byte of them, but for what pyarrow says of the schema."""
    array = vectors(dtype, dimension)
    write_embeddings(array, tmp_path, "parquet")
    data = (tmp_path / "00000000.parquet").read_bytes()
    kind, stored = {"f2": (7, "f2"), "f4": (4, "f4"), "f8": (5, "f8"), "u8": (2, "u8")}.get(dtype, (1, f"{dtype[0]}4"))
    row_nbytes = dimension * np.dtype(stored).itemsize
    group_rows = max(1, 20_000 // array[0].nbytes)
    step = max(1, 3_000 // row_nbytes)
    content, chunks = b"PAR1", []
    for start in range(0, ROWS, group_rows):
        group = array[start : start + group_rows]
        begin, pages_of_group = len(content), []
        for first in range(0, len(group), step):
            page = group[first : first + step]
            count = page.size
            runs = varint(2 * len(page)) + b"\0"
            if dimension > 1:
                runs = (b"\x02\0" + varint(2 * (dimension - 1)) + b"\1") * len(page)
            both = (runs, varint(2 * count) + b"\1")
            body = b"".join(len(levels).to_bytes(4, "little") + levels for levels in both)
            body += page.astype(stored).tobytes()
            head = encode_head(PageHeader(len(body), count, PLAIN, len(body)))
            pages_of_group.append((len(content), len(head) + len(body), first))
            content += head + body
        chunks.append((begin, len(content) - begin, len(group), pages_of_group))
    groups = []
    for number, (begin, nbytes, rows, pages_of_group) in enumerate(chunks):
        places = [
            Value(STRUCT, {1: Value(I64, place), 2: Value(I32, size), 3: Value(I64, row)})
            for place, size, row in pages_of_group
        ]
        index = encoded_fields({1: Value(LIST, places, STRUCT)})
        said = {
            1: Value(I32, kind),
            2: Value(LIST, [Value(I32, PLAIN), Value(I32, RLE)], I32),
            3: Value(LIST, [Value(BINARY, part) for part in (b"embedding", b"list", b"element")], BINARY),
            4: Value(I32, 0),
            5: Value(I64, rows * dimension),
            6: Value(I64, nbytes),
            7: Value(I64, nbytes),
            9: Value(I64, begin),
        }
        column = {2: Value(I64, 0), 3: Value(STRUCT, said), 4: Value(I64, len(content)), 5: Value(I32, len(index))}
        group = {1: Value(LIST, [Value(STRUCT, column)], STRUCT), 2: Value(I64, nbytes), 3: Value(I64, rows)}
        group |= {5: Value(I64, begin), 6: Value(I64, nbytes), 7: Value(I16, number)}
        groups.append(Value(STRUCT, group))
        content += index
    raw = read_raw_footer(data)
    assert data[: raw.start] == content
    footer = b"\x15" + zigzag(2) + b"\x19" + raw.schema + b"\x16" + zigzag(ROWS)
    footer += b"\x19" + encoded(Value(LIST, groups, STRUCT)) + b"\x19" + raw.key_values
    footer += b"\x18" + varint(len(raw.created_by)) + raw.created_by + b"\x19" + raw.column_orders + b"\0"
    assert data[raw.start :] == footer + len(footer).to_bytes(4, "little") + b"PAR1"
