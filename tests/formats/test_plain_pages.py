"""Vectors are taken from parquet files without decoding where they lie there plainly, and only there."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader, FormatError, write_embeddings
from dask_embedding_reader.formats.base import Columns
from dask_embedding_reader.formats.parquet import chunk_file, compression, indices, pages, plain_pages
from dask_embedding_reader.formats.parquet import read as parquet
from dask_embedding_reader.formats.parquet.decode import iter_tables
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.parquet.page_headers import page_header
from dask_embedding_reader.formats.parquet.thrift import encode_varint
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.read import read_each_into

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
    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded by pyarrow")

    monkeypatch.setattr(parquet, "iter_tables", decode)


@pytest.mark.parametrize("kind", ["fixed", "list", "large", "binary"])
@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize(("dimension", "dtype"), [(1, "f4"), (3, "f8"), (8, "i4"), (64, "f2"), (300, "u8")])
def test_plain_vectors_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, nullable: bool, dimension: int, dtype: str
) -> None:
    array = abs(vectors(700, dimension, "f8")).astype(dtype)
    # Pages end between batches: whole rows in each, since pyarrow 19 lets rows run on from page to page.
    values = 16 * (1 if kind == "binary" else dimension)
    options = {"row_group_size": 300, "data_page_size": 2_000, "write_batch_size": values}
    write(tmp_path / "a.parquet", array, kind, nullable, **options)
    forbid_decoding(monkeypatch)
    reader = EmbeddingReader(tmp_path, "parquet", embedding_dtype=dtype if kind == "binary" else None)
    for start, stop in [(0, 700), (299, 301), (650, 660), (123, 690)]:
        rows, _ = next(reader(1000, start, stop, dtype=None, show_progress=False))
        assert rows.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(rows, array[start:stop])


def bits(dtype: str, rows: int, dimension: int, distinct: int | None = None) -> Any:
    """Vectors of any bits: NaNs with payloads, infinities, denormal numbers."""
    chance = np.random.default_rng(rows)
    size = np.dtype(dtype).itemsize
    words = chance.integers(0, 2 ** (8 * size) - 1, rows * dimension, np.dtype(f"u{size}"), endpoint=True)
    if distinct is not None:
        words = words[chance.integers(0, distinct, rows * dimension)]
    return words.view(dtype).reshape(rows, dimension)


DICTIONARIES: dict[str, dict[str, Any]] = {
    "no dictionary": {"use_dictionary": False},
    "dictionary": {"use_dictionary": True},
    "dictionary at the beginning": {"use_dictionary": True, "dictionary_pagesize_limit": 300},
}


#: Columns and codecs: what a page was compressed by makes no difference to what is in it.
COMPRESSED = [
    *product(["fixed", "list", "large", "binary"], ["none", "snappy", "zstd"]),
    *(("list", codec) for codec in ("lz4", "gzip", "brotli")),
]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", DICTIONARIES)
@pytest.mark.parametrize(("kind", "codec"), COMPRESSED)
def test_pages_are_read_without_pyarrows_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, version: str, dictionary: str, kind: str
) -> None:
    """All bits as they were written, whatever pages and row groups."""
    options = {"compression": codec, "data_page_version": version, **DICTIONARIES[dictionary]}
    for dimension, dtype, distinct, checksum in [(7, "f4", None, False), (48, "f2", 900, True), (65, "i8", 3, False)]:
        array = bits(dtype, 400, dimension, distinct)
        path = tmp_path / f"{dtype}.parquet"
        sizes = {"row_group_size": 170, "data_page_size": 900, "write_batch_size": 64}
        write(path, array, kind, dimension != 7, write_page_checksum=checksum, **sizes, **options)
        assert pq.read_table(path).num_rows == 400
        with monkeypatch.context() as patch:
            forbid_decoding(patch)
            reader = EmbeddingReader(path, "parquet", embedding_dtype=dtype if kind == "binary" else None)
            for start, stop in [(0, 400), (169, 172), (100, 101), (230, 399)]:
                rows, _ = next(reader(1000, start, stop, dtype=None, show_progress=False))
                assert rows.tobytes() == array[start:stop].tobytes()
            parts = [batch for batch, _ in reader(37, dtype=None, show_progress=False)]
            assert np.concatenate(parts).tobytes() == array.tobytes()


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy"])
@pytest.mark.parametrize(("kind", "dtype"), [("fixed", "f4"), ("list", "f8"), ("list", "f2"), ("large", "i4")])
def test_bytes_that_are_split_into_streams_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, codec: str, kind: str, dtype: str
) -> None:
    array = bits(dtype, 300, 40)
    options: dict[str, Any] = {"compression": codec, "data_page_version": version, "data_page_size": 3_000}
    encoding: dict[str, Any] = {"column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"}}
    write(tmp_path / "a.parquet", array, kind, write_batch_size=64, **options, **encoding)
    assert "BYTE_STREAM_SPLIT" in pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(1).encodings
    forbid_decoding(monkeypatch)
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(1000, dtype=None, show_progress=False))
    assert rows.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2"])
@pytest.mark.parametrize("options", [{}, {"use_dictionary": True, "compression": "snappy"}], ids=str)
def test_narrow_integers_are_narrowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, options: dict[str, Any]
) -> None:
    array = bits(dtype, 500, 30)
    write(tmp_path / "a.parquet", array, "list", data_page_size=1_000, write_batch_size=64, **options)
    forbid_decoding(monkeypatch)
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(1000, dtype=None, show_progress=False))
    assert rows.dtype == array.dtype
    np.testing.assert_array_equal(rows, array)


def test_what_is_encoded_otherwise_is_decoded_by_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = bits("i4", 500, 16)
    write(tmp_path / "a.parquet", array, column_encoding={"embedding.list.element": "DELTA_BINARY_PACKED"})
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(1000, dtype=None, show_progress=False))
    np.testing.assert_array_equal(rows, array)
    forbid_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="decoded"):
        next(EmbeddingReader(tmp_path, "parquet")(1000, show_progress=False))


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "lz4", "gzip", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("change", [-4, 4, 8_000])
def test_a_page_that_lies_about_its_size_gives_nothing_of_other_memory(
    tmp_path: Path, codec: str, version: str, change: int
) -> None:
    """The numbers that pyarrow sees, who looks away in some pages, or an error."""
    array = bits("f4", 500, 16)
    path = tmp_path / "a.parquet"
    write(path, array, "list", compression=codec, data_page_version=version)
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    found = page_header(bytes(data[start : start + 200]))
    assert found is not None
    told, other = (encode_varint(2 * nbytes) for nbytes in (found[0].plain_nbytes, found[0].plain_nbytes + change))
    assert len(told) == len(other)
    place = data.index(b"\x15" + told, start) + 1
    data[place : place + len(told)] = other
    path.write_bytes(data)
    try:
        expected = pq.read_table(path).column("embedding").combine_chunks().flatten().to_numpy()
    except (OSError, pa.ArrowException):
        with pytest.raises(FormatError, match=r"a\.parquet, rows 0 to 500: .* cannot be decoded"):
            next(EmbeddingReader(path, "parquet")(1000, show_progress=False))
        return
    assert expected.tobytes() == array.tobytes()
    assert next(EmbeddingReader(path, "parquet")(1000, show_progress=False))[0].tobytes() == array.tobytes()


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("window_nbytes", [2**10, 2**25])
def test_remote_pages_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, version: str, window_nbytes: int
) -> None:
    """Fetched at once, or window by window."""
    array = bits("f4", 400, 24)
    options = {"data_page_version": version, **DICTIONARIES["dictionary at the beginning"]}
    write(tmp_path / "a.parquet", array, "list", row_group_size=170, data_page_size=900, compression=codec, **options)
    monkeypatch.setattr(parquet, "WINDOW_NBYTES", window_nbytes)
    forbid_decoding(monkeypatch)
    storage = fsspec.filesystem("memory")
    storage.pipe_file(f"/plain-{codec}{version}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    try:
        reader = EmbeddingReader(f"memory://plain-{codec}{version}", "parquet")
        for start, stop in [(0, 400), (169, 172), (230, 399)]:
            rows, _ = next(reader(1000, start, stop, dtype=None, show_progress=False))
            assert rows.tobytes() == array[start:stop].tobytes()
    finally:
        storage.rm(f"/plain-{codec}{version}", recursive=True)


@pytest.mark.parametrize("codec", ["none", "snappy"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_no_byte_of_a_remote_chunk_is_fetched_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, version: str
) -> None:
    """Though windows end within pages, and the header behind a page is looked at before the page is read."""
    array = bits("f4", 400, 24)
    options: dict[str, Any] = {"data_page_size": 900, "write_batch_size": 10, "use_dictionary": False}
    write(tmp_path / "a.parquet", array, "list", compression=codec, data_page_version=version, **options)
    monkeypatch.setattr(parquet, "WINDOW_NBYTES", 2**13)
    fetched: list[tuple[int, int]] = []

    def fetch_and_note(file: Any, ranges: Any) -> None:
        fetched.extend((start, start + sum(map(len, parts))) for start, parts in ranges)
        read_each_into(file, ranges)

    monkeypatch.setattr(chunk_file, "read_each_into", fetch_and_note)
    storage = fsspec.filesystem("memory")
    storage.pipe_file(f"/once-{codec}{version}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    try:
        reader = EmbeddingReader(f"memory://once-{codec}{version}", "parquet")
        batches = [rows for rows, _ in reader(40, max_piece_size=10, dtype=None, show_progress=False)]
    finally:
        storage.rm(f"/once-{codec}{version}", recursive=True)
    assert np.concatenate(batches).tobytes() == array.tobytes()
    assert len(fetched) > 5
    assert all(stop == start for (_, stop), (start, _) in pairwise(sorted(fetched))), "several come at a time"


@pytest.mark.parametrize("is_remote", [False, True])
def test_pyarrow_decodes_the_rest_of_a_row_group_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    array = vectors(400, 64, "f4")
    path = tmp_path / "a.parquet"
    write(path, array, compression="snappy", row_group_size=200, data_page_size=2_000, write_batch_size=512)
    read_page, decode = pages.read_page, iter_tables
    decoded: list[tuple[int, int]] = []

    def read_some(*given: Any, **others: Any) -> Any:
        page, before = given[2], given[4]
        return None if page.values == 512 and before == 1_024 and not decoded else read_page(*given, **others)

    def note(header: Any, names: Any, start: int, stop: int, *given: Any, **others: Any) -> Any:
        decoded.append((start, stop))
        return decode(header, names, start, stop, *given, **others)

    monkeypatch.setattr(plain_pages, "read_page", read_some)
    monkeypatch.setattr(parquet, "iter_tables", note)
    url = str(path)
    if is_remote:
        fsspec.filesystem("memory").pipe_file("/rest/a.parquet", path.read_bytes())
        url = "memory://rest/a.parquet"
    header = EmbeddingReader(url, "parquet").manifest.vectors.header(0)
    rows = np.empty((400, header.dimension), header.dtype)
    PARQUET.open_rows(header, Columns("embedding"), 0, 400)([rows])
    np.testing.assert_array_equal(rows, array)
    assert decoded == [(16, 200)]


def test_pieces_that_find_no_plain_pages_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are filled at the same time: one finds a page that is not plain when others have been looked up."""
    array = vectors(4_000, 64, "f4")
    write(tmp_path / "a.parquet", array, compression="snappy", row_group_size=2_000, data_page_size=4_000)
    read_page = pages.read_page
    monkeypatch.setattr(
        plain_pages,
        "read_page",
        lambda *given, **others: None if given[4] == 46 * 1_024 else read_page(*given, **others),
    )
    assert pq.read_table(tmp_path / "a.parquet").num_rows == len(array)
    decode, decoded = iter_tables, []

    def note(header: Any, names: Any, start: int, *given: Any, **others: Any) -> Any:
        decoded.append(start)
        return decode(header, names, start, *given, **others)

    monkeypatch.setattr(parquet, "iter_tables", note)
    for batch_rows in (40, 1_000, 4_000):
        decoded.clear()
        reader = EmbeddingReader(tmp_path, "parquet")
        parts = [part for part, _ in reader(batch_rows, max_piece_size=100, show_progress=False)]
        np.testing.assert_array_equal(np.concatenate(parts), array)
        # The page begins with row 736 of each row group; two threads may have had further pieces in hand.
        assert {start % 2_000 >= 736 for start in decoded} == {True}
        assert 2 <= len(decoded) <= 8


def ragged(lengths: Any, path: Path, **options: Any) -> list[list[float]]:
    """A file of vectors of these lengths, which count up."""
    items = np.arange(lengths.sum(), dtype=np.float32)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(items))
    pq.write_table(pa.table({"embedding": column}), path, use_dictionary=False, **options)
    rows: list[list[float]] = column.to_pylist()
    return rows


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "lz4", "gzip", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_rows_are_counted_where_others_are_longer(tmp_path: Path, codec: str, version: str) -> None:
    """Two rows of half the length and one of twice: as many items as there should be, and all between are shifted."""
    lengths = np.full(2_000, 8)
    lengths[[30, 31, 1_500]] = 4, 4, 16
    options = {"compression": codec, "data_page_version": version, "data_page_size": 900, "write_batch_size": 64}
    rows = ragged(lengths, tmp_path / "a.parquet", **options)
    reader = EmbeddingReader(tmp_path, "parquet")
    for start, stop in [(0, 30), (32, 60), (100, 110), (1_000, 1_400), (1_490, 1_500), (1_501, 1_510), (1_990, 2_000)]:
        found, _ = next(reader(1_000, start, stop, show_progress=False))
        assert found.tolist() == rows[start:stop]
        taken = [start, *range(start + 2, stop)]
        assert next(reader.take(taken)(1_000, show_progress=False))[0].tolist() == [rows[row] for row in taken]
    for row, items in [(30, 4), (1_500, 16)]:
        with pytest.raises(FormatError, match=f"row {row:,}: .* holds a vector that has {items} items"):
            list(reader(1_000, row, row + 1, show_progress=False))
        with pytest.raises(FormatError, match=f"row {row:,}: .* holds a vector that has {items} items"):
            list(reader(100, row - 20, show_progress=False))


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "lz4", "gzip", "brotli"])
def test_a_vector_that_runs_on_behind_its_page_is_no_shorter_one(tmp_path: Path, codec: str) -> None:
    """Its first items fill the page, as if it had no others."""
    lengths = np.full(400, 8)
    lengths[[7, 100, 101]] = 16, 4, 4
    options = {"compression": codec, "data_page_size": 1, "write_batch_size": 64}
    rows = ragged(lengths, tmp_path / "a.parquet", **options)
    reader = EmbeddingReader(tmp_path, "parquet")
    assert next(reader(10, 0, 7, show_progress=False))[0].tolist() == rows[:7]
    for start in (0, 7):
        with pytest.raises(FormatError, match=r"row 7: .* holds a vector that has 16 items"):
            next(reader(10, start, 8, show_progress=False))


@pytest.fixture
def read_nbytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of local files are asked for, each time."""
    found: list[int] = []
    read = LocalStore.read

    def note(store: LocalStore, path: str, ranges: Any, **named: Any) -> Any:
        found.extend(buffer.nbytes for _, buffers in ranges for buffer in buffers)
        return read(store, path, ranges, **named)

    monkeypatch.setattr(LocalStore, "read", note)
    return found


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "lz4", "gzip", "brotli"])
@pytest.mark.parametrize(("kind", "version"), [("list", "1.0"), ("list", "2.0"), ("fixed", "1.0"), ("binary", "1.0")])
def test_of_few_rows_their_pages_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_nbytes: list[int],
    codec: str,
    kind: str,
    version: str,
) -> None:
    """And of others the levels, where only these tell that no vector is longer: of those before, or of those behind."""
    array = bits("f4", 4_000, 256)
    options: dict[str, Any] = {"compression": codec, "data_page_version": version, "data_page_size": 2**18}
    options["write_batch_size"] = 64 if kind == "binary" else 1_024
    write(tmp_path / "a.parquet", array, kind, **options)
    forbid_decoding(monkeypatch)
    reader = EmbeddingReader(tmp_path, "parquet", embedding_dtype="f4" if kind == "binary" else None)
    must_read_levels = (kind, version) == ("list", "1.0")
    for start, share in [(0, 0), (1_500, 0.375), (2_600, 0.35), (3_990, 0)]:
        read_nbytes.clear()
        rows, _ = next(reader(10, start, start + 10, dtype=None, show_progress=False))
        assert rows.tobytes() == array[start : start + 10].tobytes()
        # zstd decompresses blocks of 128 KB; of others 4 KB are enough, and 512 bytes for headers.
        levels_share = share * (0.6 if codec == "zstd" else 0.04) if must_read_levels else 0
        assert sum(read_nbytes) < 2 * (2**18 + 20_000) + 20 * 2**13 + levels_share * array.nbytes


@pytest.mark.parametrize("codec", [1, 2, 4, 6, 7])
def test_the_first_bytes_of_a_page_are_what_all_begins_with(codec: int) -> None:
    chance = np.random.default_rng(codec)
    for size in (1, 100, 5_000, 300_000):
        # Runs, copies from near and far, and bytes that no codec shrinks.
        parts = [bytes([7]) * (size // 3), b"abcde" * (size // 20), chance.bytes(size // 3)]
        plain = b"".join(parts) + parts[2][: size // 4] + b"."
        stored = pa.Codec(compression.CODECS[codec]).compress(plain, asbytes=True)
        for most in (4, 1_000, 2 * size + 10):
            for cut in (len(stored), len(stored) // 2, 5):
                found = bytes(compression.decompress_prefix(codec, memoryview(stored)[:cut], most))
                assert plain.startswith(found) or found[: len(plain)] == plain
                assert len(found) <= most + 2**17 + len(plain)
                if cut == len(stored):
                    assert len(found) >= min(most, len(plain))
        for place in chance.integers(0, len(stored), 20):
            damaged = bytearray(stored)
            damaged[place] ^= int(chance.integers(1, 256))
            assert len(compression.decompress_prefix(codec, memoryview(damaged), 1_000)) <= size + 2_000


@pytest.mark.parametrize("writer", ["polars", "duckdb"])
@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "brotli", "lz4", "uncompressed"])
def test_pages_of_other_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, codec: str) -> None:
    array = vectors(5_000, 40, "f4")
    path = tmp_path / "a.parquet"
    if writer == "polars":
        pl = pytest.importorskip("polars")
        pl.DataFrame({"embedding": array.tolist()}, schema={"embedding": pl.List(pl.Float32)}).write_parquet(
            path, compression=codec
        )
    else:
        duckdb = pytest.importorskip("duckdb")
        connection = duckdb.connect()
        connection.register("t", pa.table({"embedding": pa.array(list(array), pa.list_(pa.float32()))}))
        connection.sql(f"copy t to '{path}' (format parquet, compression {codec})")
    assert pq.read_table(path).num_rows == 5_000
    forbid_decoding(monkeypatch)
    rows, _ = next(EmbeddingReader(path, "parquet")(10_000, show_progress=False))
    np.testing.assert_array_equal(rows, array)


@pytest.mark.parametrize("codec", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("difference", [-1, 1, 100, -100])
def test_what_is_decompressed_must_have_the_size_that_was_told(codec: int, difference: int) -> None:
    """pyarrow's codecs leave it at that where less comes than was asked for."""
    plain = np.random.default_rng(codec).bytes(50_000) + bytes(10_000)
    stored = pa.Codec(compression.CODECS[codec]).compress(plain, asbytes=True)
    assert bytes(compression.decompress(codec, memoryview(stored), len(plain))) == plain
    with pytest.raises((OSError, ValueError, pa.ArrowException)):
        compression.decompress(codec, memoryview(stored), len(plain) + difference)


def test_frames_of_zstd_that_do_not_tell_their_size(tmp_path: Path) -> None:
    """Some writers compress as a stream."""
    plain = np.random.default_rng(0).bytes(50_000) + bytes(10_000)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(plain)
    stored = memoryview(sink.getvalue().to_pybytes())
    assert compression._zstd_nbytes(stored) is None
    assert bytes(compression.decompress(6, stored, len(plain))) == plain
    for nbytes in (len(plain) - 1, len(plain) + 1):
        with pytest.raises(ValueError, match="another size"):
            compression.decompress(6, stored, nbytes)


@pytest.mark.parametrize("width", [0, 1, 25])
def test_runs_of_indices_without_an_end_take_no_memory(width: int) -> None:
    """A few bytes may claim any number of indices."""
    groups = b"\xff" * 8 + b"\x7f"  # 2**62 groups of eight
    data = np.frombuffer(bytes([width]) + groups + bytes(100), np.uint8)
    assert indices.read_indices(data, 1_000) is None
    assert indices.read_indices(data[:1], 1_000) is None


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.98])
@pytest.mark.parametrize("dtype", ["i1", "f4"])
def test_sparse_vectors(tmp_path: Path, share: float, dtype: str) -> None:
    """Runs of zeros, and some other numbers between them."""
    chance = np.random.default_rng(0)
    array = (chance.integers(-100, 100, (2_000, 300)) * (chance.random((2_000, 300)) < share)).astype(dtype)
    array[500:600] = 0
    write(tmp_path / "a.parquet", array, use_dictionary=True, data_page_size=40_000)
    reader = EmbeddingReader(tmp_path, "parquet")
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in reader(300, dtype=None)]), array)
    np.testing.assert_array_equal(
        next(reader.take([1_999, 3, 550, 1_100])(4, dtype=None))[0], array[[1_999, 3, 550, 1_100]]
    )
    np.testing.assert_array_equal(reader.to_dask_array()[490:510].compute(), array[490:510])


def test_a_run_of_more_values_than_memory_is_left_to_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal values a page of a few bytes holds millions."""
    array = np.zeros((3_000, 500), np.float32)
    write(tmp_path / "a.parquet", array, use_dictionary=True)
    rows, _ = next(EmbeddingReader(tmp_path, "parquet")(10_000, show_progress=False))
    np.testing.assert_array_equal(rows, array)
    read = indices.read_indices

    def read_few(data: Any, count: int) -> Any:
        assert 4 * count <= pages._MOST_PAGE_NBYTES
        return read(data, count)

    monkeypatch.setattr(pages, "read_indices", read_few)
    next(EmbeddingReader(tmp_path, "parquet")(10_000, show_progress=False))


@pytest.mark.parametrize("lengths", [[32, 8, 8], [24, 16, 8], [8, 8, 32]])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_vectors_of_other_lengths_before_those_that_are_wanted_shift_nothing(
    tmp_path: Path, lengths: list[int], version: str, codec: str
) -> None:
    """As many items as there should be: one vector in an early page is longer, others in a late page are shorter."""
    array = vectors(500, 16, "f4")
    values = [*array[:3].tolist(), [1.0] * lengths[0], *array[4:300].tolist()]
    values += [[2.0] * lengths[1], *array[300:350].tolist(), [3.0] * lengths[2]]
    values += array[: 500 - len(values)].tolist()
    table = pa.table({"embedding": pa.array(values, pa.list_(pa.float32()))})
    options: dict[str, Any] = {"use_dictionary": False, "data_page_size": 512, "write_batch_size": 16}
    pq.write_table(table, tmp_path / "a.parquet", compression=codec, data_page_version=version, **options)
    assert table.num_rows == 500
    with pytest.raises(FormatError, match=r"a\.parquet, row"):
        next(EmbeddingReader(tmp_path, "parquet")(500, show_progress=False))
    try:
        rows, _ = next(EmbeddingReader(tmp_path, "parquet")(10, 200, 210, show_progress=False))
    except FormatError:
        return
    np.testing.assert_array_equal(rows, np.array(values[200:210], np.float32))


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


@pytest.mark.parametrize("kind", ["fixed", "binary"])
def test_a_dictionary_is_read_where_pages_refer_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_nbytes: list[int], kind: str
) -> None:
    array = bits("f4", 4_000, 256)
    options: dict[str, Any] = {"use_dictionary": True, "compression": "snappy", "data_page_size": 2**18}
    write(tmp_path / "a.parquet", array, kind, write_batch_size=64, **options)
    forbid_decoding(monkeypatch)
    reader = EmbeddingReader(tmp_path, "parquet", embedding_dtype="f4" if kind == "binary" else None)
    for start, is_referred_to in [(0, True), (3_990, False)]:
        read_nbytes.clear()
        rows, _ = next(reader(10, start, start + 10, dtype=None, show_progress=False))
        assert rows.tobytes() == array[start : start + 10].tobytes()
        assert (max(read_nbytes) >= 2**20) is is_referred_to  # as large as dictionaries become


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
