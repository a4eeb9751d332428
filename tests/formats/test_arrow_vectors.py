"""Vectors in record batches: which lie evenly, how many items they have, what is held, and what is said of odd ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import ColumnError, FormatError
from dask_embedding_reader.formats import arrow, arrow_tables
from dask_embedding_reader.formats.arrow import ARROW
from dask_embedding_reader.formats.arrow_tables import (
    arrow_has_rows,
    arrow_row_nbytes,
    arrow_schema,
    decoder_nbytes,
    iter_arrow_tables,
)
from dask_embedding_reader.formats.base import Array, Columns, FileHeader, MetaColumn
from dask_embedding_reader.formats.columns import expand_glob
from dask_embedding_reader.formats.vectors import Casting, Vectors
from dask_embedding_reader.storage.local import LocalStore, file_info
from dask_embedding_reader.storage.store import StoredFile
from tests.support.collections import vectors_as

ROWS = np.random.default_rng(0).integers(0, 99, (50, 4)).astype(np.float32)
EMBEDDING = Columns("embedding")


def stored(path: Path, batches: list[pa.RecordBatch], *, stream: bool = False, codec: Any = None) -> StoredFile:
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(path, batches[0].schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return StoredFile(LocalStore(LocalFileSystem()), str(path), file_info(str(path)).version)


def batches_of(counts: list[int], storage: str = "fixed_size_list", **columns: pa.Array) -> list[pa.RecordBatch]:
    """Rows in batches of so many each."""
    table = pa.table({"embedding": vectors_as(ROWS, storage), **columns})
    cuts = np.cumsum([0, *counts]).tolist()
    return [
        pa.RecordBatch.from_arrays(
            [column.combine_chunks() for column in table.slice(a, b - a).columns], table.schema.names
        )
        for a, b in pairwise(cuts)
    ]


WORDS = pa.array(["x" * (row % 9 * 30) for row in range(50)])
NUMBERS = pa.array(range(50))

#: Batches, options, and whether vectors lie in these so that a row is found without looking.
WAYS: dict[str, tuple[list[pa.RecordBatch], dict[str, Any], Columns, bool]] = {
    "equal": (batches_of([25, 25]), {}, EMBEDDING, True),
    "one": (batches_of([50]), {}, EMBEDDING, True),
    "a shorter last one": (batches_of([20, 20, 10]), {}, EMBEDDING, True),
    "a last one of one row": (batches_of([49, 1]), {}, EMBEDDING, True),
    "a longer last one": (batches_of([20, 30]), {}, EMBEDDING, False),
    "a shorter one between": (batches_of([20, 10, 20]), {}, EMBEDDING, False),
    "an empty one between": (batches_of([25, 0, 25]), {}, EMBEDDING, False),
    "an empty one at the end": (batches_of([25, 25, 0]), {}, EMBEDDING, False),
    "a stream": (batches_of([20, 20, 10]), {"stream": True}, EMBEDDING, True),
    "compressed": (batches_of([25, 25]), {"codec": "zstd"}, EMBEDDING, False),
    "beside numbers": (batches_of([20, 20, 10], n=NUMBERS), {}, EMBEDDING, True),
    "beside text": (batches_of([20, 20, 10], word=WORDS), {}, EMBEDDING, False),
    "with metadata": (batches_of([25, 25], n=NUMBERS), {}, Columns("embedding", meta=("n",)), False),
    "lists": (batches_of([25, 25], "list"), {}, EMBEDDING, False),
    "large lists": (batches_of([20, 30], "large_list"), {}, EMBEDDING, False),
    "bytes": (batches_of([20, 20, 10], "binary"), {}, Columns("embedding", np.dtype("f4")), True),
    "tensors": (batches_of([20, 20, 10], "tensor"), {}, EMBEDDING, True),
}


@pytest.mark.parametrize("name", WAYS)
def test_batches_that_follow_each_other_evenly_are_no_parts(tmp_path: Path, name: str) -> None:
    batches, options, columns, is_even = WAYS[name]
    header = ARROW.read_header(stored(tmp_path / "0.arrow", batches, **options), columns)
    assert (header.rows, header.dimension, header.dtype) == (50, 4, np.dtype("f4"))
    assert ARROW.check_header(header)
    counts = tuple(batch.num_rows for batch in batches)
    if is_even:
        assert header.group_rows == ()
        first, stride, rows = header.layout[1:]
        assert rows == counts[0]
        content = Path(header.file.path).read_bytes()
        for row in range(50):
            place = first + row // rows * stride + row % rows * 16
            assert content[place : place + 16] == ROWS[row].tobytes()
    else:
        assert (header.layout, header.group_rows) == (("arrow",), counts)
    for start, stop in ((0, 50), (19, 21), (24, 26), (49, 50)):
        out = np.empty((stop - start, 4), np.float32)
        ARROW.open_rows(header, columns, start, stop)([out])
        np.testing.assert_array_equal(out, ROWS[start:stop])


def test_what_reading_holds_is_counted_by_how_vectors_lie(tmp_path: Path) -> None:
    def header_of(name: str) -> FileHeader:
        batches, options, columns, _ = WAYS[name]
        return ARROW.read_header(stored(tmp_path / "0.arrow", batches, **options), columns)

    for threads in (1, 3):
        assert ARROW.held_nbytes(header_of("equal"), EMBEDDING, 10, threads) == threads * 160
        for name in ("compressed", "lists"):
            assert ARROW.held_nbytes(header_of(name), EMBEDDING, 10, threads) == threads * 3 * 2**20
        header = header_of("with metadata")
        columns = Columns("embedding", meta=("n",))
        assert ARROW.held_nbytes(header, columns, 10, threads) == threads * 3 * 2**20 + decoder_nbytes(header, ["n"])
        items = Columns(("n", "n"))
        assert ARROW.held_nbytes(header, items, 10, threads) == threads * (decoder_nbytes(header, ["n", "n"]) + 2**20)
    assert ARROW.drawback(header) == ""


def test_columns_take_what_their_largest_batch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [10, 30, 10]
    plain = ARROW.read_header(
        stored(tmp_path / "0.arrow", batches_of(counts, n=NUMBERS, word=WORDS)), Columns(meta=("n",))
    )
    packed = ARROW.read_header(
        stored(tmp_path / "1.arrow", batches_of(counts, n=NUMBERS, word=WORDS), codec="zstd"), Columns(meta=("n",))
    )
    words = sum(len(word.as_py()) for word in WORDS[10:40]) + 31 * 4
    for header in (plain, packed):
        assert arrow_row_nbytes(header, ["n"]) == 8
        assert arrow_row_nbytes(header, ["n", "n"]) == 16
        assert words // 30 <= arrow_row_nbytes(header, ["word"]) <= words // 30 + 3
        assert arrow_row_nbytes(header, ["none"]) == arrow_row_nbytes(header, []) == 0
        assert decoder_nbytes(header, ["n"]) == 240
    monkeypatch.setattr(arrow_tables, "WINDOW_NBYTES", 100)
    assert decoder_nbytes(plain, ["n"]) == decoder_nbytes(plain, ["word"]) == 200
    assert decoder_nbytes(packed, ["n"]) == 240, "the whole batch is inflated"
    nothing = ARROW.read_header(stored(tmp_path / "3.arrow", batches_of([0, 0])), EMBEDDING)
    assert (arrow_row_nbytes(nothing, ["embedding"]), nothing.rows) == (0, 0)


def test_files_without_rows_hold_columns_of_no_type(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.arrow", batches_of([0], n=NUMBERS))
    assert not arrow_has_rows(file)
    assert arrow_schema(file).names == ["embedding", "n"]
    assert ARROW.find_vectors(file, Columns(), b"")[0] is None
    assert expand_glob(ARROW, file, "e*") is None
    header = ARROW.read_header(file, Columns("whatever", meta=("n", "m")))
    assert (header.rows, header.dimension, header.meta) == (0, 0, (MetaColumn(pa.null(), True),) * 2)
    assert arrow_has_rows(stored(tmp_path / "1.arrow", batches_of([0, 1, 0])))


def test_columns_of_vectors_are_found(tmp_path: Path) -> None:
    lists = [[float(row)] * 3 for row in range(6)]
    ragged = [*lists[:4], [1.0], [1.0] * 5]
    odd = [*lists[:5], [1.0]]
    numbers, f4 = list(range(6)), pa.list_(pa.float32())
    cases: list[tuple[dict[str, pa.Array], Columns, list[str]]] = [
        ({"a": pa.array(lists, f4), "n": pa.array(numbers)}, Columns(), ["a"]),
        ({"a": pa.array(lists, f4), "embedding": pa.array(numbers)}, Columns(), ["embedding"]),
        ({"a": pa.array(odd, f4), "b": pa.array(lists, f4)}, Columns(), ["b"]),
        ({"a": pa.array(ragged, f4)}, Columns(), ["a"]),  # their counts do not tell
        ({"a": pa.array([["x"]] * 6), "b": pa.array(lists, pa.list_(pa.float32(), 3))}, Columns(), ["b"]),
        ({"a": pa.array(lists, f4), "b": pa.array([b"1234"] * 6)}, Columns(embedding_dtype=np.dtype("f4")), ["b"]),
        ({"a": pa.array([b"1234"] * 6, pa.binary(4))}, Columns(embedding_dtype=np.dtype("f4")), ["a"]),
        ({"a": pa.array([b"1234"] * 6, pa.binary(4))}, Columns(), []),
    ]
    for columns, wanted, names in cases:
        batch = pa.record_batch(columns)
        found, head = ARROW.find_vectors(stored(tmp_path / "0.arrow", [batch]), wanted, b"head")
        assert (found, head) == (names, b"head")
    both = [pa.record_batch({"a": pa.array([[1.0, 2.0]] * count, f4)}) for count in (3, 0, 4)]
    assert ARROW.find_vectors(stored(tmp_path / "0.arrow", both), Columns(), b"")[0] == ["a"]
    two = pa.RecordBatch.from_arrays([pa.array(lists, f4)] * 2, ["a", "a"])
    assert ARROW.find_vectors(stored(tmp_path / "0.arrow", [two]), Columns(), b"")[0] == []
    # Of batches of another length each it cannot be one.
    other = [pa.record_batch({"a": pa.array([[1.0] * count] * 2, f4)}) for count in (3, 4)]
    assert ARROW.find_vectors(stored(tmp_path / "0.arrow", other), Columns(), b"")[0] == []


F4 = pa.list_(pa.float32())

DIMENSIONS: dict[str, tuple[Callable[[], list[pa.Array]], str]] = {
    "most of the first batch": (
        lambda: [pa.array([[1.0], [1.0, 2.0], [1.0, 2.0]], F4), pa.array([[1.0]] * 9, F4)],
        "row 0: column 'embedding' holds a vector that has 1 item where vectors of 2 items were expected",
    ),
    "null first": (
        lambda: [pa.array([None, [1.0, 2.0], [1.0, 2.0], [3.0]], F4)],
        "row 0: column 'embedding' holds a vector that is null where vectors of 2 items were expected",
    ),
    "after an empty batch": (
        lambda: [pa.array([], F4), pa.array([[1.0, 2.0]], F4), pa.array([[1.0, 2.0], [3.0]], F4)],
        "row 2: column 'embedding' holds a vector that has 1 item where vectors of 2 items were expected",
    ),
    "whose counts agree": (
        lambda: [pa.array([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]], F4)],
        "row 1: column 'embedding' holds a vector that has 1 item where vectors of 2 items were expected",
    ),
    "in a later batch whose counts do not": (
        lambda: [pa.array([[1.0, 2.0]] * 3, F4), pa.array([[1.0, 2.0], [1.0]], F4)],
        "row 4: column 'embedding' holds a vector that has 1 item where vectors of 2 items were expected",
    ),
    "null in a later batch": (
        lambda: [pa.array([[1.0, 2.0]] * 3, F4), pa.array([[1.0, 2.0], [1.0, 2.0], None], F4)],
        "row 5: column 'embedding' holds a vector that is null where vectors of 2 items were expected",
    ),
    "a null item": (
        lambda: [pa.array([[1.0, 2.0]] * 3, F4), pa.array([[1.0, 2.0], [1.0, None]], F4)],
        "row 4: column 'embedding' holds a vector that has a null item where vectors of 2 items were expected",
    ),
    "all null": (lambda: [pa.array([None, None], F4)], "column 'embedding' holds vectors of no items"),
    "no items": (lambda: [pa.array([[], []], F4)], "column 'embedding' holds vectors of no items"),
}


def read_all(file: StoredFile) -> Array:
    header = ARROW.read_header(file, EMBEDDING)
    out = np.empty((header.rows, header.dimension), np.float32)
    ARROW.open_rows(header, EMBEDDING, 0, header.rows)([out])
    return out


@pytest.mark.parametrize("name", DIMENSIONS)
def test_the_first_vector_unlike_most_of_the_first_batch_is_told(tmp_path: Path, name: str) -> None:
    make, told = DIMENSIONS[name]
    file = stored(tmp_path / "0.arrow", [pa.record_batch({"embedding": array}) for array in make()])
    with pytest.raises(FormatError) as refused:
        read_all(file)
    assert str(refused.value).startswith(f"{file.url}{', ' if told.startswith('row') else ': '}{told}")


def test_of_bytes_most_of_the_first_batch_tell_the_dimension(tmp_path: Path) -> None:
    columns = Columns("embedding", np.dtype("<f4"))
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        batch = pa.record_batch({"embedding": pa.array([b"1" * 8] * 3, kind)})
        assert ARROW.read_header(stored(tmp_path / "0.arrow", [batch]), columns).dimension == 2
        odd = pa.record_batch({"embedding": pa.array([None, b"1" * 7, b"1" * 7, b"1" * 8], kind)})
        with pytest.raises(
            FormatError, match=r"column 'embedding' holds 7 bytes a row, which is no whole number of flo"
        ):
            ARROW.read_header(stored(tmp_path / "0.arrow", [odd]), columns)


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("kind", [pa.list_view(pa.float32()), pa.large_list_view(pa.float32())], ids=str)
def test_views_of_lists_share_items_and_leave_some_out(tmp_path: Path, kind: pa.DataType, codec: str | None) -> None:
    """As pyarrow writes slices of them: each record batch has the items of all rows, in any order."""
    order = np.random.default_rng(1).permutation(50)
    dtype, make = (
        (np.int32, pa.ListViewArray) if kind == pa.list_view(pa.float32()) else (np.int64, pa.LargeListViewArray)
    )
    places, sizes = np.argsort(order).astype(dtype) * 4, np.full(50, 4, dtype)
    whole = make.from_arrays(pa.array(places), pa.array(sizes), pa.array(ROWS[order].reshape(-1)))
    same = make.from_arrays(pa.array(places[:1].repeat(5)), pa.array(sizes[:5]), whole.values)
    for arrays in ([whole[:2], whole[2:33], whole[33:]], [same, whole], [whole[7:10]]):
        file = stored(tmp_path / "0.arrow", [pa.record_batch({"embedding": each}) for each in arrays], codec=codec)
        header = ARROW.read_header(file, EMBEDDING)
        assert (header.rows, header.dimension) == (sum(map(len, arrays)), 4)
        np.testing.assert_array_equal(read_all(file), pa.chunked_array(arrays).to_pylist())
    sizes[20] = 3
    odd = make.from_arrays(pa.array(places), pa.array(sizes), whole.values)
    file = stored(tmp_path / "0.arrow", [pa.record_batch({"embedding": odd})], codec=codec)
    with pytest.raises(
        FormatError, match="row 20: column 'embedding' holds a vector that has 3 items where vectors of 4 "
    ):
        read_all(file)


@pytest.mark.parametrize(("size", "told"), [(-4, "at places that are negative"), (2**30, "values has only 200")])
def test_damaged_lengths_of_views_are_not_taken_for_the_dimension(tmp_path: Path, size: int, told: str) -> None:
    views = pa.array(ROWS.tolist(), pa.list_view(pa.float32()))
    file = stored(tmp_path / "0.arrow", [pa.record_batch({"embedding": views})])
    content = Path(file.path).read_bytes()
    lengths = np.full(50, 4, np.int32).tobytes()
    assert content.count(lengths) == 1
    Path(file.path).write_bytes(content.replace(lengths, np.full(50, size, np.int32).tobytes()))
    with pytest.raises(FormatError, match=told):
        ARROW.read_header(file._replace(version=file_info(file.path).version), EMBEDDING)


def test_metadata_may_hold_nulls_where_rows_or_values_of_their_dictionary_do(tmp_path: Path) -> None:
    places, fewer = pa.array([0, 1, 1, 0], pa.int8()), pa.array([0, None, 1, 0], pa.int8())
    words, holes = pa.array(["a", "b"]), pa.array(["a", None])
    columns = {
        "whole": pa.DictionaryArray.from_arrays(places, words),
        "of values": pa.DictionaryArray.from_arrays(places, holes),
        "of rows": pa.DictionaryArray.from_arrays(fewer, words),
        "plain": pa.array([1, 2, 3, 4]),
        "some": pa.array([1, None, 3, 4]),
        "none": pa.nulls(4),
    }
    has_nulls = [False, True, True, False, True, True]
    # The first dictionary of a file is number 0.
    for names in (list(columns), list(columns)[1:], list(columns)[2:]):
        batch = pa.record_batch({name: columns[name] for name in names})
        header = ARROW.read_header(stored(tmp_path / "0.arrow", [batch]), Columns(meta=tuple(names)))
        assert [column.has_nulls for column in header.meta] == has_nulls[-len(names) :]
        kinds = [pa.string() if name in ("whole", "of values", "of rows") else columns[name].type for name in names]
        assert [column.type for column in header.meta] == kinds
        for name in names:
            [decoded] = iter_arrow_tables(header, [name], 0, 4, 10)
            assert decoded[name].to_pylist() == columns[name].to_pylist()


def test_batches_are_those_that_were_promised(tmp_path: Path) -> None:
    header = ARROW.read_header(stored(tmp_path / "0.arrow", batches_of([20, 30], "list")), EMBEDDING)
    part = header._replace(group_rows=(30,), first_group=1, first_group_row=20)
    out = np.empty((30, 4), np.float32)
    ARROW.open_rows(part, EMBEDDING, 20, 50)([out])
    np.testing.assert_array_equal(out, ROWS[20:])
    for wrong in (
        header._replace(group_rows=(30, 20)),
        header._replace(group_rows=(30,)),
        header._replace(group_rows=(20,), first_group=1),
        header._replace(rows=49, group_rows=(49,)),
    ):
        with pytest.raises(FormatError) as refused:
            ARROW.open_rows(wrong, EMBEDDING, 0, 1)
        assert str(refused.value) == (
            f"{header.file.url}: holds 50 rows in 2 record batches, where {wrong.rows} rows in other ones were promised"
            "; save the manifest again if there is one, else open the collection again"
        )


def test_what_cannot_be_decoded_is_told_with_its_rows(tmp_path: Path) -> None:
    names = pa.array([f"name {row}" for row in range(50)])
    file = stored(tmp_path / "0.arrow", batches_of([20, 30], word=names))
    content = Path(file.path).read_bytes()
    at = content.index(b"name 25")
    Path(file.path).write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    file = file._replace(version=file_info(file.path).version)
    header = ARROW.read_header(file, Columns(meta=("word",)))
    assert sum(batch.num_rows for batch in iter_arrow_tables(header, ["word"], 0, 20, 7)) == 20
    with pytest.raises(FormatError) as refused:
        list(iter_arrow_tables(header, ["word"], 3, 29, 100))
    assert str(refused.value).startswith(f"{file.url}, rows 20 to 29: column 'word' cannot be decoded: ")
    assert str(refused.value).endswith("; write the file again")


# ---------------------------------------------------------------------------------------------------------------------
# Written


@pytest.mark.parametrize("rows_of_a_batch", [7, 50, 1_000])
def test_written_batches_have_equal_rows_and_their_metadata(
    monkeypatch: pytest.MonkeyPatch, rows_of_a_batch: int
) -> None:
    monkeypatch.setattr(arrow, "_BATCH_NBYTES", 16 * rows_of_a_batch + 3)
    words = pa.chunked_array([["a", None] * 5, [], ["c"] * 40])
    sink = io.BytesIO()
    vectors = Vectors(ROWS.astype(">f8"), Casting(np.dtype("f4")))
    ARROW.write(lambda data: sink.write(data) and None, vectors, pa.table({"word": words, "n": NUMBERS}), "vec")
    with pa.ipc.open_file(sink.getvalue()) as written:
        counts = [written.get_batch(number).num_rows for number in range(written.num_record_batches)]
        table = written.read_all()
    assert counts == [min(rows_of_a_batch, 50 - start) for start in range(0, 50, rows_of_a_batch)]
    assert table["word"].to_pylist() == words.to_pylist()
    assert table["n"].to_pylist() == NUMBERS.to_pylist()
    assert table.schema.field("vec") == pa.field(
        "vec", pa.list_(pa.field("item", pa.float32(), nullable=False), 4), nullable=False
    )
    np.testing.assert_array_equal(np.array(table["vec"].to_pylist(), np.float32), ROWS)


def test_metadata_that_cannot_be_stored_is_told() -> None:
    table = pa.table({"a": pa.array(["x"] * 50).dictionary_encode()})
    nested = pa.table({"a": pa.StructArray.from_arrays([table["a"].chunk(0)], ["d"])})

    def write(data: Any) -> None:
        raise pa.ArrowInvalid("no room")

    with pytest.raises(ColumnError, match=r"the metadata columns cannot be stored: .*no room.*; convert them"):
        ARROW.write(write, Vectors(ROWS, Casting(ROWS.dtype)), nested, "v")
