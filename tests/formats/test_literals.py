"""Pages that snappy could not shrink are read straight into arrays, past its tags; and pages are read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader, FormatError
from dask_embedding_reader.formats.parquet import pages, plain_pages
from dask_embedding_reader.formats.parquet import read as parquet
from dask_embedding_reader.formats.parquet.page_headers import page_header
from dask_embedding_reader.formats.parquet.values import BLOCK_NBYTES, find_literals

Vectors = npt.NDArray[Any]


def random_vectors(rows: int, dimension: int, dtype: str = "f4") -> Vectors:
    return np.random.default_rng(dimension).standard_normal((rows, dimension)).astype(dtype)


def write(path: Path, array: Vectors, kind: str, lengths: Mapping[int, int] | None = None, **options: Any) -> None:
    """Pages of some blocks each, in which vectors need not end."""
    items = pa.array(array.reshape(-1))
    if kind == "binary":
        column: Any = pa.array([row.tobytes() for row in array], pa.binary(array.shape[1] * array.itemsize))
    elif kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(items, array.shape[1])
    else:
        counts = np.full(len(array), array.shape[1], np.int32)
        for row, length in (lengths or {}).items():
            counts[row] = length
        column = pa.ListArray.from_arrays(pa.array(np.append(np.int32(0), counts.cumsum(dtype=np.int32))), items)
    rows = 1 if kind == "binary" else array.shape[1]
    sizes = {"data_page_size": 3 * BLOCK_NBYTES, "write_batch_size": 64 * rows, "use_dictionary": False}
    pq.write_table(pa.table({"embedding": column}), path, **{**sizes, "compression": "snappy", **options})


def reader_of(path: Path, kind: str, dtype: str = "f4") -> EmbeddingReader:
    return EmbeddingReader(path, "parquet", embedding_dtype=dtype if kind == "binary" else None)


@pytest.fixture
def decompressed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which pages had to be decompressed; none may be left to pyarrow."""

    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded by pyarrow")

    found: list[int] = []
    body = pages._plain_body

    def note(source: Any, place: Any, page: Any, position: int, *others: Any) -> Any:
        if page.is_compressed:  # version 2 leaves pages as they are that would grow
            found.append(position)
        return body(source, place, page, position, *others)

    monkeypatch.setattr(parquet, "iter_tables", decode)
    monkeypatch.setattr(pages, "_plain_body", note)
    return found


@pytest.mark.parametrize("kind", ["list", "fixed", "binary"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(("dimension", "dtype"), [(96, "f4"), (513, "f4"), (100, "f8"), (300, "f2")])
def test_what_snappy_could_not_shrink_is_not_decompressed(
    tmp_path: Path, decompressed: list[int], kind: str, version: str, dimension: int, dtype: str
) -> None:
    array = random_vectors(3_000, dimension, dtype)
    array[:20] = 0  # in the first block, which is always decompressed
    write(tmp_path / "a.parquet", array, kind, data_page_version=version)
    reader = reader_of(tmp_path, kind, dtype)
    for batch_rows, piece_rows in [(3_000, None), (700, 111), (64, 64)]:
        batches = [rows for rows, _ in reader(batch_rows, max_piece_size=piece_rows, dtype=None, show_progress=False)]
        assert np.concatenate(batches).tobytes() == array.tobytes()
    for start, stop in [(0, 1), (2_999, 3_000), (123, 2_345)]:
        rows, _ = next(reader(5_000, start, stop, dtype=None, show_progress=False))
        assert rows.tobytes() == array[start:stop].tobytes()
    assert not decompressed


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_remote_ones_are_not_either(tmp_path: Path, decompressed: list[int], version: str) -> None:
    array = random_vectors(2_000, 513)
    array[:20] = array[1_700:1_800] = 0
    write(tmp_path / "a.parquet", array, "list", data_page_version=version)
    storage = fsspec.filesystem("memory")
    storage.pipe_file(f"/literals{version}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    try:
        reader = EmbeddingReader(f"memory://literals{version}", "parquet")
        assert next(reader(2_000, 0, 1_200, show_progress=False))[0].tobytes() == array[:1_200].tobytes()
        assert not decompressed
        for start, batch_rows in [(0, 70), (123, 1_000)]:
            batches = [rows for rows, _ in reader(batch_rows, start, max_piece_size=64, show_progress=False)]
            assert np.concatenate(batches).tobytes() == array[start:].tobytes()
        assert decompressed
    finally:
        storage.rm(f"/literals{version}", recursive=True)


def test_vectors_that_are_cast_are(tmp_path: Path, decompressed: list[int]) -> None:
    array = random_vectors(2_000, 128)
    write(tmp_path / "a.parquet", array, "list")
    rows, _ = next(reader_of(tmp_path, "list")(2_000, dtype="f8", show_progress=False))
    np.testing.assert_array_equal(rows, array.astype("f8"))
    assert decompressed


@pytest.mark.parametrize("kind", ["list", "binary"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("zeros", [slice(0, 40_000), slice(20_000, 20_700), slice(60_000, 100_000), slice(5, None, 9)])
def test_pages_with_a_block_that_became_smaller_are_decompressed(
    tmp_path: Path, decompressed: list[int], kind: str, version: str, zeros: slice
) -> None:
    """Whichever block it is, by much or by a few bytes."""
    array = random_vectors(1_500, 128)
    array.reshape(-1)[zeros] = 0
    write(tmp_path / "a.parquet", array, kind, data_page_version=version)
    reader = reader_of(tmp_path, kind)
    assert np.concatenate([rows for rows, _ in reader(100, max_piece_size=77)]).tobytes() == array.tobytes()
    rows, _ = next(reader(10_000, 100, 1_400, show_progress=False))
    assert rows.tobytes() == array[100:1_400].tobytes()
    assert decompressed


def first_page(data: bytes) -> tuple[int, int, int]:
    """Where the first page of values begins, its size, and that which it has no more compressed."""
    start = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0).data_page_offset
    found = page_header(data[start : start + 10_000])
    assert found is not None
    return start + found[1], found[0].nbytes, found[0].plain_nbytes


def literal(content: bytes) -> bytes:
    """Snappy's literal of at least 257 bytes."""
    return bytes([61 << 2]) + (len(content) - 1).to_bytes(2, "little") + content


@pytest.mark.parametrize("where", [300, 40_000])
@pytest.mark.parametrize("first_row", [0, 120])
def test_a_block_that_is_no_literal_though_it_is_as_long_as_one(tmp_path: Path, where: int, first_row: int) -> None:
    """A copy of six bytes that three more tags make up for: only tags that are looked at tell it."""
    array = random_vectors(200, 512)  # two pages, of 128 rows
    plain = array.view(np.uint8).reshape(-1)
    place = BLOCK_NBYTES + where
    plain[place : place + 6] = plain[place - 50 : place - 44]
    path = tmp_path / "a.parquet"
    write(path, array, "binary", data_page_size=2**18)
    data = bytearray(path.read_bytes())
    body, nbytes, plain_nbytes = first_page(bytes(data))
    second = find_literals(nbytes, plain_nbytes)
    assert second is not None
    levels_nbytes = plain_nbytes - 128 * 2_048
    whole = pa.Codec("snappy").decompress(bytes(data[body : body + nbytes]), plain_nbytes).to_pybytes()
    place += levels_nbytes
    begin = place // BLOCK_NBYTES * BLOCK_NBYTES
    copy = bytes([5 << 2 | 2]) + (50).to_bytes(2, "little")
    spelled = literal(whole[begin:place]) + copy + literal(whole[place + 6 : begin + BLOCK_NBYTES])
    assert len(spelled) == 3 + BLOCK_NBYTES
    start = body + second + (begin // BLOCK_NBYTES - 1) * (3 + BLOCK_NBYTES)
    data[start : start + len(spelled)] = spelled
    path.write_bytes(data)
    assert pq.read_table(path).column(0).to_pylist() == [row.tobytes() for row in array]
    rows, _ = next(reader_of(path, "binary")(1_000, first_row, 200, show_progress=False))
    assert rows.tobytes() == array[first_row:].tobytes()


@pytest.mark.parametrize("block", [0, 1, 3])
def test_damage_to_a_tag_is_what_pyarrow_makes_of_it(tmp_path: Path, block: int) -> None:
    array = random_vectors(200, 512)
    path = tmp_path / "a.parquet"
    write(path, array, "list", data_page_size=2**18)
    data = bytearray(path.read_bytes())
    body, nbytes, plain_nbytes = first_page(bytes(data))
    second = find_literals(nbytes, plain_nbytes)
    assert second is not None
    data[body + 3 if not block else body + second + (block - 1) * (3 + BLOCK_NBYTES)] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="snappy"):
        pq.read_table(path)
    with pytest.raises(FormatError, match=r"a\.parquet, rows 0 to 200: .* cannot be decoded"):
        next(reader_of(path, "list")(1_000, show_progress=False))


@pytest.mark.parametrize("codec", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("read", ["batches", "pieces", "parts of an array"])
def test_a_page_that_several_pieces_need_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, read: str
) -> None:
    array = random_vectors(4_000, 40).round(1)
    write(tmp_path / "a.parquet", array, "list", compression=codec, data_page_size=2**15)
    count: Counter[int] = Counter()
    read_page = pages.read_page

    def note(source: Any, place: Any, page: Any, body: int, *others: Any, **named: Any) -> Any:
        count[body] += 1
        return read_page(source, place, page, body, *others, **named)

    monkeypatch.setattr(plain_pages, "read_page", note)
    reader = EmbeddingReader(tmp_path, "parquet")
    ways: dict[str, Callable[[], Vectors]] = {
        "batches": lambda: np.concatenate([rows for rows, _ in reader(10, show_progress=False)]),
        "pieces": lambda: np.concatenate([rows for rows, _ in reader(1_000, max_piece_size=70, show_progress=False)]),
        "parts of an array": lambda: reader.to_dask_array(max_piece_size=4_000)[100:3_900].compute(),
    }
    found = ways[read]()
    np.testing.assert_array_equal(found, array[100:3_900] if len(found) < 4_000 else array)
    assert len(count) > 8
    assert set(count.values()) == {1}


def test_pages_of_literals_that_are_no_vectors_are_left_to_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two vectors of other lengths, whose items are as many as they should be: only levels tell."""
    monkeypatch.setattr(parquet, "_DECODE_NBYTES", 4 * 513 * 16)  # as many rows are looked at together
    array = random_vectors(300, 513)
    write(tmp_path / "a.parquet", array, "list", lengths={100: 512, 101: 514})
    batches = reader_of(tmp_path, "list")(60, max_piece_size=60, show_progress=False)
    assert next(batches)[0].tobytes() == array[:60].tobytes()
    with pytest.raises(FormatError, match=r"row 100: .* has 512 items where vectors of 513 items"):
        next(batches)
