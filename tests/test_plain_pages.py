"""Vectors are taken from parquet files without decoding where they lie there plainly, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader, FormatError, write_embeddings
from dask_embedding_reader.formats.parquet import read as parquet

PLAIN: dict[str, Any] = {"use_dictionary": False, "compression": "none"}


def vectors(rows: int, dimension: int, dtype: str) -> Any:
    numbers = np.random.default_rng(rows).standard_normal((rows, dimension)) * 100
    return numbers.astype(dtype)


def column(array: Any, kind: str, nullable: bool = True) -> tuple[pa.Field, pa.Array]:
    """The rows of an array as one of the types that hold vectors."""
    rows, dimension = array.shape
    items = pa.array(array.reshape(-1))
    element = pa.field("element", items.type, nullable=nullable)
    if kind == "binary":
        made = pa.array([row.tobytes() for row in array], pa.binary(dimension * array.itemsize))
    elif kind == "fixed":
        made = pa.FixedSizeListArray.from_arrays(items, type=pa.list_(element, dimension))
    else:
        offsets = pa.array(np.arange(rows + 1) * dimension, pa.int64() if kind == "large" else pa.int32())
        list_type = pa.large_list(element) if kind == "large" else pa.list_(element)
        made = (pa.LargeListArray if kind == "large" else pa.ListArray).from_arrays(offsets, items, type=list_type)
    return pa.field("embedding", made.type, nullable=nullable), made


def write(path: Path, array: Any, kind: str = "fixed", nullable: bool = True, **options: Any) -> None:
    field, made = column(array, kind, nullable)
    table = pa.Table.from_arrays([pa.array(np.arange(len(array))), made], schema=pa.schema([("n", pa.int64()), field]))
    pq.write_table(table, path, **{**PLAIN, **options})


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> Any:
        raise AssertionError("decoded by pyarrow")

    monkeypatch.setattr(parquet, "iter_tables", decode)


@pytest.mark.parametrize("kind", ["fixed", "list", "large", "binary"])
@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize(("dimension", "dtype"), [(1, "f4"), (3, "f8"), (8, "i4"), (64, "f2"), (300, "u8")])
def test_plain_vectors_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, nullable: bool, dimension: int, dtype: str
) -> None:
    array = abs(vectors(700, dimension, "f8")).astype(dtype)
    # Pages end between batches: whole rows in each, since pyarrow 16 lets rows run on from page to page.
    values = 16 * (1 if kind == "binary" else dimension)
    options = {"row_group_size": 300, "data_page_size": 2_000, "write_batch_size": values}
    write(tmp_path / "a.parquet", array, kind, nullable, **options)
    forbid_decoding(monkeypatch)
    reader = EmbeddingReader(tmp_path, "parquet", embedding_dtype=dtype if kind == "binary" else None)
    for start, stop in [(0, 700), (299, 301), (650, 660), (123, 690)]:
        rows, _ = next(reader(1000, start, stop, dtype=None, show_progress=False))
        assert rows.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(rows, array[start:stop])


@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": True},
        {"compression": "snappy"},
        {"data_page_version": "2.0"},
        {"use_byte_stream_split": True},
    ],
)
def test_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    array = vectors(500, 16, "f4")
    write(tmp_path / "a.parquet", array, **options)
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(1000, show_progress=False))
    np.testing.assert_array_equal(rows, array)
    forbid_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="decoded"):
        next(EmbeddingReader(tmp_path, "parquet")(1000, show_progress=False))


def test_narrow_integers_are_widened_in_files(tmp_path: Path) -> None:
    array = vectors(50, 16, "i1")
    write(tmp_path / "a.parquet", array)
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(1000, dtype=None, show_progress=False))
    np.testing.assert_array_equal(rows, array)


def test_a_dictionary_that_grew_too_large_is_followed_by_plain_pages(tmp_path: Path) -> None:
    """What starts plainly in one row group may be decoded in the next."""
    array = vectors(900, 64, "f4")
    field, made = column(array, "fixed")
    table = pa.Table.from_arrays([made], schema=pa.schema([field]))
    write(tmp_path / "a.parquet", array, row_group_size=100)
    pq.write_table(
        table, tmp_path / "b.parquet", compression="none", dictionary_pagesize_limit=1024, row_group_size=100
    )
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(10_000, show_progress=False))
    np.testing.assert_array_equal(rows, np.concatenate([array, array]))


@pytest.mark.parametrize("bad", ["ragged", "null", "null item"])
@pytest.mark.parametrize("where", [0, 250, 499])
def test_vectors_that_are_none_are_found_and_named(tmp_path: Path, bad: str, where: int) -> None:
    """As many items as there should be, and yet one vector is too short and another too long."""
    values: list[Any] = vectors(500, 8, "f4").tolist()
    other = (where + 7) % 500
    if bad == "ragged":
        values[other].append(values[where].pop())
    elif bad == "null":
        values[where] = None
    else:
        values[where][3] = None
    table = pa.table({"embedding": pa.array(values, pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "a.parquet", data_page_size=512, write_batch_size=8, **PLAIN)
    with pytest.raises(FormatError, match=r"a\.parquet.*row"):
        list(EmbeddingReader(tmp_path, "parquet")(100, show_progress=False))


def test_what_is_written_here_is_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = vectors(1000, 700, "f4")
    write_embeddings(array, tmp_path, "parquet")
    forbid_decoding(monkeypatch)
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(2000, show_progress=False))
    np.testing.assert_array_equal(rows, array)


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_an_error_or_changes_numbers_alone(tmp_path: Path, seed: int) -> None:
    """No byte of a header or of levels may shift vectors: pyarrow sees the same rows, or refuses too."""
    array = vectors(60, 4, "f4")
    path = tmp_path / "a.parquet"
    write(path, array, data_page_size=200, write_batch_size=8)
    data = bytearray(path.read_bytes())
    chance = np.random.default_rng(seed)
    end = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    for _ in range(3):
        data[int(chance.integers(4, end))] ^= 1 << int(chance.integers(8))
    path.write_bytes(data)
    try:
        expected = pq.read_table(path, columns=["embedding"]).column(0).combine_chunks().flatten().to_numpy()
        problem = len(expected) != array.size
    except Exception:
        problem = True
    try:
        rows = next(EmbeddingReader(path, "parquet")(100, show_progress=False))[0]
    except FormatError:
        return
    if not problem:
        np.testing.assert_array_equal(rows.reshape(-1), expected)
    assert rows.shape == array.shape
    assert (rows != array).sum() <= 3  # flipped bits in numbers cannot be told


def test_levels_that_call_a_value_null_are_heeded_though_it_is_there(tmp_path: Path) -> None:
    """A damaged page found this: its numbers were handed out, where pyarrow sees nulls."""
    path = tmp_path / "a.parquet"
    write(path, vectors(50, 4, "f4"), "fixed", nullable=True)
    data = path.read_bytes()
    no_nulls = b"\x90\x03\x03"  # a run of 200 times level 3
    assert data.count(no_nulls) == 1
    path.write_bytes(data.replace(no_nulls, b"\x90\x03\x02"))
    with pytest.raises(FormatError, match=r"null|decoded"):
        list(EmbeddingReader(tmp_path, "parquet")(100, show_progress=False))


@pytest.mark.parametrize("levels", [b"\x15\x08\x15\x06", b"\x15\x06\x15\x08"], ids=["definition", "repetition"])
def test_levels_in_the_encoding_of_old_are_left_to_pyarrow(tmp_path: Path, levels: bytes) -> None:
    """A damaged page found this: levels that are said to be bit-packed were taken for runs."""
    path = tmp_path / "a.parquet"
    write(path, vectors(50, 4, "f4"), "list")
    data = path.read_bytes()
    plain_and_runs = b"\x15\x00" + b"\x15\x06\x15\x06"
    position = data.rindex(plain_and_runs)  # the page of the last column, the vectors
    path.write_bytes(data[: position + 2] + levels + data[position + 6 :])
    with pytest.raises(FormatError, match=r"a\.parquet, rows? .*: (cannot be decoded|column)"):
        list(EmbeddingReader(tmp_path, "parquet")(100, show_progress=False))


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": True}, {"compression": "zstd"}, {"data_page_version": "2.0"}], ids=str
)
def test_a_checksum_of_a_page_is_compared(tmp_path: Path, options: dict[str, Any]) -> None:
    """Some writers put one into each page: a flipped bit in a number is told then, also where pages are plain."""
    array = vectors(500, 64, "f4")
    path = tmp_path / "a.parquet"
    write(path, array, write_page_checksum=True, data_page_size=10_000, write_batch_size=16, **options)
    np.testing.assert_array_equal(next(EmbeddingReader(path, "parquet")(1000, show_progress=False))[0], array)
    data = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(0).column(1)
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"rows .*CRC checksum"):
        list(EmbeddingReader(path, "parquet")(1000, show_progress=False))


def test_levels_that_are_no_levels_are_an_error_of_the_library(tmp_path: Path) -> None:
    """Lengths without an end, in what says where vectors begin."""
    path = tmp_path / "a.parquet"
    write(path, vectors(50, 4, "f4"), "list")
    data = path.read_bytes()
    begins = b"\x33" + b"\xee" * 25  # a run of 25 bytes: every fourth item begins a vector
    assert data.count(begins) == 1
    path.write_bytes(data.replace(begins, b"\xff" * 26))
    with pytest.raises(FormatError, match=r"rows 0 to 50: column 'embedding' cannot be decoded"):
        list(EmbeddingReader(tmp_path, "parquet")(100, show_progress=False))
