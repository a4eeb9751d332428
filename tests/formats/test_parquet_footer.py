"""Footers of parquet files: read as pyarrow reads them, of the columns that are wanted, in bounded memory."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.cache import CountedCache
from dask_embedding_reader.errors import ColumnError, FormatError
from dask_embedding_reader.formats.parquet import column_chunks, footers
from dask_embedding_reader.formats.parquet import header as parquet
from dask_embedding_reader.formats.parquet.footer import Footer, parse_footer
from dask_embedding_reader.formats.parquet.thrift import DamagedError
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.fuzz import mutate
from tests.fuzz.seeds import parquet_seeds

ROWS = 60
VECTORS = np.arange(4 * ROWS, dtype=np.float32).reshape(ROWS, 4)


def table(**columns: Any) -> pa.Table:
    """Vectors behind a column and before others."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.reshape(-1)), 4)
    return pa.table({"first": pa.array(range(ROWS)), "embedding": vectors, **columns})


WIDE = {
    "short": pa.array([f"text {n}" if n % 3 else None for n in range(ROWS)]),
    "long": pa.array([f"{n} " * 200 for n in range(ROWS)]),
    "flag": pa.array([n % 2 == 0 for n in range(ROWS)]),
    "tags": pa.array([["a", None] if n % 5 else None for n in range(ROWS)]),
    "pair": pa.array([{"x": n, "y": [1.5] * (n % 3)} for n in range(ROWS)]),
    "day": pa.array(range(ROWS), pa.date32()),
    "kind": pa.array(["a", "b", None] * (ROWS // 3)).dictionary_encode(),
    "none": pa.nulls(ROWS),
    **{f"c{n}": pa.array(np.arange(ROWS) * 2.5) for n in range(20)},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "as pyarrow does": {},
    "of old": {"version": "1.0", "store_schema": False, "compression": "gzip"},
    "no statistics": {"write_statistics": False, "use_dictionary": False, "compression": "none"},
    "page index": {"write_page_index": True, "data_page_version": "2.0", "compression": "zstd"},
    "sorted": {"sorting_columns": [pq.SortingColumn(0)]},
    "few columns": {"columns": 1},
}


def written(options: dict[str, Any]) -> bytes:
    options = dict(options)
    made = table(**dict(list(WIDE.items())[: options.pop("columns", None)]))
    sink = io.BytesIO()
    pq.write_table(made, sink, row_group_size=3, **options)
    return sink.getvalue()


def parse(data: bytes, columns: list[str] | None = None) -> Footer:
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return parse_footer("a.parquet", data[start:], start, columns)


def as_pyarrow(data: bytes, leaf: int) -> list[tuple[int, int, int, int | None]]:
    """Of each row group where a column begins and ends, how many values it has, and how many nulls."""
    found = []
    metadata = pq.read_metadata(io.BytesIO(data))
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(leaf)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        nulls = chunk.statistics.null_count if chunk.is_stats_set and chunk.statistics.has_null_count else None
        found.append((start, start + chunk.total_compressed_size, chunk.num_values, nulls))
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_footers_say_what_pyarrow_reads_in_them(options: dict[str, Any]) -> None:
    data = written(options)
    footer = parse(data)
    metadata = pq.read_metadata(io.BytesIO(data))
    assert footer.group_rows == (3,) * (ROWS // 3)
    assert footer.schema.arrow.names == metadata.schema.to_arrow_schema().names
    assert footer.schema.paths == tuple(metadata.schema.column(n).path for n in range(metadata.num_columns))
    for leaf in range(metadata.num_columns):
        chunks = footer.chunks(leaf)
        for found, expected in zip(chunks, as_pyarrow(data, leaf), strict=True):
            assert found[:3] == expected[:3]
            # pyarrow tells nothing of statistics whose order it does not know.
            assert expected[3] is None or found.nulls == expected[3]
        assert footer.may_hold_nulls(leaf) == any(chunk.nulls != 0 for chunk in chunks)
        assert footer.chunks(leaf, [7, 2]) == [chunks[7], chunks[2]]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_are_read_in_one_go_as_they_are_field_by_field(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_said() -> list[Any]:
        footer = parse(data)
        leaves = range(len(footer.schema.paths))
        return [
            footer.group_rows,
            footer.select([3, 4]),
            [(footer.chunks(n), footer.may_hold_nulls(n)) for n in leaves],
        ]

    data = written(options)
    quick = all_said()
    monkeypatch.setattr(column_chunks, "_patterns", lambda: column_chunks._Patterns(*5 * [lambda *_: None]))
    assert all_said() == quick


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_pyarrow_writes_is_not_read_field_by_field(options: dict[str, Any]) -> None:
    """That takes 20 times as long."""
    assert parse(written(options)).groups.odd == frozenset()


@pytest.mark.parametrize("writer", ["duckdb", "polars"])
@pytest.mark.parametrize("longest", [0, 50, 200])
def test_nor_is_what_others_write(tmp_path: Path, writer: str, longest: int) -> None:
    """Among them texts that are empty, of which duckdb does not tell the smallest."""
    texts = [None if n % 7 == 0 else "x" * (n * longest // ROWS) for n in range(ROWS)]
    made = pa.table({"n": range(ROWS), "text": texts, "lists": pa.array(VECTORS.tolist(), pa.list_(pa.float32()))})
    path = tmp_path / "0.parquet"
    if writer == "duckdb":
        duckdb.from_arrow(made).write_parquet(str(path))
    else:
        pl.from_arrow(made).write_parquet(path, row_group_size=20)  # type: ignore[union-attr]
    data = path.read_bytes()
    footer = parse(data)
    assert footer.groups.odd == frozenset()
    assert [footer.may_hold_nulls(leaf) for leaf in range(2)] == [False, True]
    for leaf in range(2):
        assert [chunk[:4] for chunk in footer.chunks(leaf)] == as_pyarrow(data, leaf)
    # duckdb 1.2 says of lists that all items are null, which pyarrow does not believe.
    assert [chunk[:3] for chunk in footer.chunks(2)] == [chunk[:3] for chunk in as_pyarrow(data, 2)]


@pytest.mark.parametrize("nulls", [0, 1])
def test_long_texts_may_be_told_as_writers_of_old_do(tmp_path: Path, nulls: int) -> None:
    """In other fields, before the number of nulls instead of behind it."""
    texts = [f"{n} " * 200 for n in range(9)] + [None] * nulls
    pq.write_table(pa.table({"text": texts}), tmp_path / "0.parquet", row_group_size=5)
    before = parse((tmp_path / "0.parquet").read_bytes())
    text = rb"((?s:..)(?:\d )+)"
    new = re.compile(rb"\x36([\x00\x02])\x28" + text + rb"\x18" + text + rb"(?:\x11\x11)?\x00")
    edited(tmp_path / "0.parquet", lambda footer: new.sub(b"\x18\\2\x18\\3\x16\\1\0", footer))
    after = parse((tmp_path / "0.parquet").read_bytes())
    assert after.groups.odd == frozenset()
    assert after.chunks(0) == before.chunks(0)
    assert after.may_hold_nulls(0) == before.may_hold_nulls(0) == bool(nulls)


@pytest.mark.parametrize("groups", [[0], [2, 3, 7], [19], list(range(20))])
def test_pyarrow_reads_row_groups_by_a_footer_of_these_alone(groups: list[int]) -> None:
    data = written({})
    part = pq.read_metadata(io.BytesIO(parse(data, ["embedding"]).select(groups)))
    assert [part.row_group(n).num_rows for n in range(part.num_row_groups)] == [3] * len(groups)
    rows = np.concatenate([np.arange(3 * group, 3 * group + 3) for group in groups])
    found = pq.ParquetFile(io.BytesIO(data), metadata=part).read_row_groups(list(range(len(groups))))
    assert found.equals(pq.read_table(io.BytesIO(data)).take(rows))


def test_garbled_footers_are_called_so() -> None:
    """What Python says of the bytes tells a user nothing."""
    said = set()
    for seed in range(300):
        try:
            parse(mutate.parquet_footer(Random(seed), parquet_seeds()))
        except FormatError as error:
            said.add(str(error))
    assert len(said) > 20
    assert [text for text in said if re.search("a.parquet: .*; write", text) is None] == []
    assert [text for text in said if re.search("(Key|Index|Type|Value)Error|not supported|takes no", text)] == []


# ---------------------------------------------------------------------------------------------------------------------
# Columns that nobody asked for


def edited(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Rewrite the footer of a file."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = edit(data[start:-8])
    assert footer != data[start:-8]
    path.write_bytes(data[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1")


def untype(footer: bytes) -> bytes:
    """Make the first column one of integers that are said to be text, which pyarrow refuses."""
    node = b"\x15\x04\x25\x02\x18\x05first"
    return footer.replace(node + b"\x00", node + b"\x25\x00\x00")


def say_nulls(name: bytes, found: int, said: int) -> Callable[[bytes], bytes]:
    """Let the statistics of a column whose largest value is its name tell of another number of nulls."""
    largest = b"\x28" + bytes([len(name)]) + name
    return lambda footer: footer.replace(b"\x36" + bytes([2 * found]) + largest, b"\x36" + bytes([2 * said]) + largest)


def read(root: Path, *names: str) -> dict[str, list[Any]]:
    """The vectors, read in two ways, and metadata."""
    reader = EmbeddingReader(root, "parquet", meta_columns=list(names))
    np.testing.assert_array_equal(reader.to_dask_array().compute(), VECTORS)
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in reader(7, show_progress=False)]), VECTORS)
    frame = reader.to_dask_dataframe().compute()
    return {name: frame[name].tolist() for name in names}


@pytest.mark.parametrize("store_schema", [True, False])
@pytest.mark.parametrize("name", ["short", "kind", "pair", "c3"])
def test_a_column_that_pyarrow_cannot_type_hides_no_other(tmp_path: Path, name: str, store_schema: bool) -> None:
    pq.write_table(table(**WIDE), tmp_path / "0.parquet", row_group_size=25, store_schema=store_schema)
    expected = read(tmp_path, name)
    edited(tmp_path / "0.parquet", untype)
    with pytest.raises(OSError, match="UTF8"):
        pq.read_metadata(tmp_path / "0.parquet")
    assert str(read(tmp_path, name)) == str(expected)
    with pytest.raises(FormatError, match=r"0\.parquet.*cannot tell the type of column 'first'"):
        EmbeddingReader(tmp_path, "parquet", meta_columns=["first"])
    with pytest.raises(ColumnError, match="has no column 'frist'; its columns are 'first'"):
        EmbeddingReader(tmp_path, "parquet", meta_columns=["frist"])


@pytest.mark.parametrize("said", [0, 9, ROWS + 1])
def test_null_counts_may_be_wrong(tmp_path: Path, said: int) -> None:
    """Whoever did not ask for the column is not bothered; who did gets the nulls that there are."""
    text = pa.array([None, "a", None, "zzzzzzzz"] * (ROWS // 4))
    pq.write_table(table(tag=text), tmp_path / "0.parquet")
    edited(tmp_path / "0.parquet", say_nulls(b"zzzzzzzz", ROWS // 2, said))
    assert read(tmp_path) == {}
    found = read(tmp_path, "tag")["tag"]
    assert found[1::2] == text.to_pylist()[1::2]
    assert pd.isna(found[::2]).all()


def test_nulls_in_dictionaries_of_old_writers_are_expected(tmp_path: Path) -> None:
    """Arrow before 5 says of every dictionary that it holds no nulls: integers could not be told from others' later."""
    numbers = pa.array([1, None, 3] * (ROWS // 3)).dictionary_encode()
    pq.write_table(table(n=numbers), tmp_path / "0.parquet", write_statistics=["first"])
    before = "parquet-cpp-arrow version "
    writer = pq.read_metadata(tmp_path / "0.parquet").created_by
    old = f"{before}4.0.1".ljust(len(writer))
    edited(tmp_path / "0.parquet", lambda footer: footer.replace(writer.encode(), old.encode()))
    reader = EmbeddingReader(tmp_path, "parquet", meta_columns=["n"])
    assert reader.manifest.fields[0].has_nulls
    column = parse((tmp_path / "0.parquet").read_bytes())
    assert column.writer == old
    assert parquet._counts_nulls_wrongly(old)
    assert not parquet._counts_nulls_wrongly(writer)
    assert not parquet._counts_nulls_wrongly("parquet-mr version 1.12.3 (build x)")


def test_a_wrong_null_count_of_vectors_is_looked_into(tmp_path: Path) -> None:
    """Where the footer tells of null vectors, their rows are looked for; there may be none."""
    binary = pa.array([row.tobytes() for row in VECTORS[:-1]] + [b"zzzzzzzzzzzzzzzz"], pa.binary(16))
    pq.write_table(pa.table({"embedding": binary}), tmp_path / "0.parquet")
    reader = EmbeddingReader(tmp_path, "parquet", embedding_dtype="float32")
    np.testing.assert_array_equal(reader.to_dask_array().compute()[:-1], VECTORS[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def test_footers_are_kept_in_so_many_bytes() -> None:
    footer = parse(written({}), ["embedding"])
    files = [StoredFile(LocalStore(LocalFileSystem()), f"{n}", Version(1)) for n in range(9)]
    cache: CountedCache[StoredFile, Footer] = CountedCache(3 * footer.nbytes)
    for file in files:
        cache.put(file, footer)
        cache.get(files[0])  # used again and again
        assert cache.nbytes <= 3 * footer.nbytes
    assert [cache.get(file) is not None for file in files] == [True, *[False] * 6, True, True]
    cache.put(files[1], footer._replace(data=footer.data * 9))  # the last one is kept, large or not
    assert [file for file in files if cache.get(file)] == [files[1]]
    cache.put(files[1], footer)
    assert cache.nbytes == footer.nbytes
    cache.clear()
    assert cache.nbytes == 0


def test_what_is_kept_takes_no_more_than_is_counted() -> None:
    """Of footers of 8,000 column chunks."""
    made = pa.table({f"c{n}": pa.array(range(400)) for n in range(20)})
    sink = io.BytesIO()
    pq.write_table(made, sink, row_group_size=1)
    data = sink.getvalue()
    parse(data)
    tracemalloc.start()
    kept = [parse(bytes(data)) for _ in range(3)]
    took, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took <= 1.2 * sum(footer.nbytes for footer in kept)


def test_a_second_look_at_a_footer_reads_the_file_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(**WIDE), tmp_path / "0.parquet")
    EmbeddingReader(tmp_path, "parquet")
    monkeypatch.delattr(footers, "_fetch_footer")
    assert EmbeddingReader(tmp_path, "parquet", meta_columns=["c3"]).manifest.fields[0].name == "c3"


def test_kept_footers_count_as_memory_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read ahead while footers hold the limit."""
    from dask_embedding_reader._common import budget

    pq.write_table(table(), tmp_path / "0.parquet", row_group_size=5)
    limit = 2**30
    ahead = []
    for held in (0, limit):
        monkeypatch.setattr(budget, "cached_nbytes", lambda held=held: held)
        reader = EmbeddingReader(tmp_path, "parquet")
        taken = reader(5, max_piece_size=5, max_ram_usage_in_bytes=limit, show_progress=False)
        next(taken)
        reading = taken.gi_frame.f_locals["reading"]  # type: ignore[attr-defined]
        ahead.append(len(reading._slots))
        assert len(list(taken)) == ROWS // 5 - 1
    assert ahead[0] > ahead[1]


DAMAGED = """
import pathlib, sys
from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import EmbeddingReaderError

path, read = pathlib.Path(sys.argv[1]), 0
whole = path.read_bytes()
start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
for place in range(start, len(whole) - 8):
    for value in {36, whole[place] ^ (place % 3 == 0)}:
        data = bytearray(whole)
        data[place] = value
        path.write_bytes(data)
        try:
            reader = EmbeddingReader(path.parent, "parquet_npy", meta_columns=["id", "caption"])
            next(reader(10, show_progress=False))
            read += 1
        except EmbeddingReaderError:
            pass
print(read)
"""


def test_no_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    """The repetition of a column, for one: pyarrow's bindings let no exception pass that its column chunks throw."""
    np.save(tmp_path / "0.npy", VECTORS[:10])
    captions = [f"caption {i}" for i in range(10)]
    pq.write_table(pa.table({"id": np.arange(10), "caption": captions}), tmp_path / "0.parquet", store_schema=False)
    program = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(DAMAGED), str(tmp_path / "0.parquet")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50  # what is never looked at may be anything


def test_column_chunks_are_never_asked_of_pyarrow() -> None:
    package = Path(column_chunks.__file__).parents[2]
    assert not [path for path in package.rglob("*.py") if re.search(r"\.row_group\(", path.read_text())]


@pytest.mark.parametrize(("nbytes", "start", "dictionary"), [(0, 100, -1), (0, 0, -1), (96, 4, -1), (96, 50, 4)])
def test_column_chunks_lie_within_the_data_of_their_file(nbytes: int, start: int, dictionary: int) -> None:
    chunk = column_chunks._chunk((4, 0, 0, nbytes, start, dictionary, 0), 0, 100)
    assert (chunk.start, chunk.stop) == (min(start, dictionary if dictionary > 0 else start), chunk.start + nbytes)
    for facts in ((4, 0, 0, nbytes + 1, 100 - nbytes, -1, 0), (4, 0, 0, -1, 4, -1, 0), (4, 0, 0, 1, -1, -1, 0)):
        with pytest.raises(DamagedError, match=r"row group 7 is said to be at bytes"):
            column_chunks._chunk(facts, 7, 100)
