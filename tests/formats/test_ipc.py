"""Where things lie in Arrow files: pyarrow writes them, each number in their headers is changed, and all is told."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats import ipc, ipc_columns
from dask_embedding_reader.formats.ipc import Dictionaries, Index, read_index
from dask_embedding_reader.formats.ipc_columns import (
    claimed_nbytes,
    find_column,
    inflate,
    inflated_nbytes,
    open_columns,
)
from dask_embedding_reader.storage.store import StoredFile
from tests.support.stores import stored

WORDS = ["a", "bb", "ccc", "a", "bb"] * 10


def written(table: pa.Table, rows: int, kind: str, codec: Any = None) -> bytes:
    """A file or a stream, which may be of before 0.15."""
    sink = pa.BufferOutputStream()
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    options = pa.ipc.IpcWriteOptions(compression=codec, use_legacy_format=kind == "old stream")
    with make(sink, table.schema, options=options) as writer:
        writer.write_table(table, rows)
    return bytes(sink.getvalue())


def decoded(file: StoredFile, index: Index) -> list[pa.RecordBatch]:
    """All columns of all batches."""
    found = []
    for number, batch in enumerate(index.batches):
        readers, _ = open_columns(file, index, number, [(column,) for column in range(len(index.schema))])
        arrays = [read(0, batch.rows) for read in readers]
        found.append(pa.RecordBatch.from_arrays(arrays, index.schema.names))
    return found


#: Columns, rows of a batch: of headers of all sizes, of some that are longer than what is read of each at first.
TABLES: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "one": (lambda: {"n": pa.array(range(50))}, 20),
    "no rows": (lambda: {"n": pa.array([], pa.int32())}, 20),
    "words": (lambda: {"n": pa.array(range(50)), "word": pa.array([None, *WORDS[1:]])}, 7),
    "dictionaries": (
        lambda: {
            "a": pa.array(WORDS).dictionary_encode(),
            "n": pa.array(range(50), pa.int8()),
            "b": pa.array(WORDS[::-1]).dictionary_encode(),
        },
        20,
    ),
    "views": (
        lambda: {
            "a": pa.array([f"{word} and twelve letters more" for word in WORDS], pa.string_view()),
            "b": pa.array(WORDS, pa.string_view()),
            "n": pa.array(range(50)),
        },
        20,
    ),
    "many columns": (lambda: {f"column number {n}": pa.array(range(n, n + 30)) for n in range(400)}, 15),
    "many batches": (lambda: {"n": pa.array(range(1_000))}, 1),
}


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("kind", ["file", "stream", "old stream"])
@pytest.mark.parametrize("name", TABLES)
def test_all_batches_are_found(tmp_path: Path, name: str, kind: str, codec: Any) -> None:
    make, rows = TABLES[name]
    table = pa.table(make())
    file = stored(tmp_path / "0.arrow", written(table, rows, kind, codec))
    index = read_index(file)
    assert index.schema == table.schema
    assert index.batch_rows == tuple(batch.num_rows for batch in table.to_batches(rows))
    assert index.nbytes >= sum(batch.nbytes for batch in index.batches)
    if name != "many batches":
        plain = table.cast(table.schema)
        assert [batch.to_pylist() for batch in decoded(file, index)] == [
            batch.to_pylist() for batch in plain.to_batches(rows)
        ]
    if index.batches:
        for column, one in enumerate(table.schema):
            found = find_column(file, index, index.batches[0], (column,))
            assert found.type == one.type
            assert found.codec == (codec or "")
            assert found.nodes[0].tolist() == [index.batch_rows[0], table[column].slice(0, rows).null_count]
            assert found.has_nulls == (found.nodes[0, 1] > 0)
            assert [stop - start for start, stop in found.spans] == found.buffers[:, 1].tolist()
            assert found.nbytes == sum(stop - start for start, stop in found.spans)


def test_dictionaries_of_streams_are_those_of_before_a_batch(tmp_path: Path) -> None:
    """Each batch has those that came before it: new ones, or what adds to them."""
    for deltas in (False, True):
        sink = pa.BufferOutputStream()
        kind = pa.dictionary(pa.int8(), pa.string())
        schema = pa.schema([("d", kind)])
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
        words = [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "dd"]]
        with pa.ipc.new_stream(sink, schema, options=options) as writer:
            for some in words:
                places = pa.array(range(len(some)), pa.int8())
                writer.write_batch(pa.record_batch([pa.DictionaryArray.from_arrays(places, pa.array(some))], schema))
        file = stored(tmp_path / f"{deltas}.arrow", bytes(sink.getvalue()))
        index = read_index(file)
        assert [batch.column(0).to_pylist() for batch in decoded(file, index)] == words
        [dictionary] = index.dictionaries[0]
        assert [len(known[dictionary]) for known in index.dictionaries] == ([1, 2, 3] if deltas else [1, 1, 1])
        assert (
            index.nbytes
            >= sum(batch.nbytes for batch in index.batches) + 3 * index.dictionaries[0][dictionary][0].nbytes
        )


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_what_is_kept_of_files_without_rows_is_counted_too(tmp_path: Path, kind: str) -> None:
    """What counted as nothing was never forgotten, and of other files their schema was not counted."""
    plain = pa.schema([("n", pa.int64())])
    nbytes = {}
    for name, schema in {
        "plain": plain,
        "with metadata": plain.with_metadata({"info": "x" * 20_000}),
        "wide": pa.schema([(f"column number {n}", pa.int64()) for n in range(300)]),
    }.items():
        index = read_index(stored(tmp_path / f"{name}.arrow", written(schema.empty_table(), 1, kind)))
        assert (index.schema, index.batches) == (schema, ())
        assert index.schema.metadata == schema.metadata
        nbytes[name] = index.nbytes
    assert nbytes["plain"] > 2_000
    assert nbytes["with metadata"] > nbytes["plain"] + 20_000
    assert nbytes["wide"] > 40_000


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

TABLE = pa.table({"n": pa.array(range(50), pa.int32()), "word": pa.array([None, *WORDS[1:]])})


def replaced(old: bytes, new: bytes, times: int = 1) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert data.count(old) == times, data.count(old)
        return data.replace(old, new)

    return change


def padded(nbytes: int) -> Callable[[bytes], bytes]:
    """So many bytes before the footer."""

    def change(data: bytes) -> bytes:
        footer = int.from_bytes(data[-10:-6], "little") + 10
        return data[:-footer] + bytes(nbytes) + data[-footer:]

    return change


def blocks_of(data: bytes) -> list[tuple[int, int, int]]:
    """Where the batches lie, by pyarrow's layout: of 50 rows each batch is as long as the one before."""
    footer = int.from_bytes(data[-10:-6], "little") + 10
    found = []
    for place in range(len(data) - footer, len(data) - 34):
        offset, meta, _, body = struct.unpack_from("<qiiq", data, place)
        marked = 0 < offset < len(data) and data[offset : offset + 4] == b"\xff" * 4
        if marked and 0 < meta < 2_000 and 0 < body < len(data):
            found.append((offset, meta, body))
    return found


def block_changed(number: int, **changes: int) -> Callable[[bytes], bytes]:
    """Of a batch what the footer says of it."""

    def change(data: bytes) -> bytes:
        offset, meta, body = blocks_of(data)[number]
        old = struct.pack("<qiiq", offset, meta, 0, body)
        at = data.rindex(struct.pack("<qi", offset, meta))
        new = (
            struct.pack("<qi", offset + changes.get("offset", 0), meta + changes.get("meta", 0))
            + data[at + 12 : at + 16]
            + struct.pack("<q", body + changes.get("body", 0))
        )
        return data[:at] + new + data[at + len(old) :]

    return change


def block_at(place: int) -> Callable[[bytes], bytes]:
    """The first batch begins at a byte, as the footer says."""

    def change(data: bytes) -> bytes:
        return block_changed(0, offset=place - blocks_of(data)[0][0])(data)

    return change


def node(rows: int, nulls: int) -> bytes:
    return struct.pack("<qq", rows, nulls)


#: What is written, how it is changed, and what is told of it.
REFUSED: dict[str, tuple[str, Any, Callable[[bytes], bytes], str]] = {
    "eleven bytes": ("file", None, lambda data: data[:11], r"it has 11 bytes, fewer than any"),
    "twelve bytes": ("file", None, lambda data: data[:12], r"it ends with .*it was cut short"),
    "a footer of the whole file": (
        "file",
        None,
        lambda data: data[:-10] + struct.pack("<i", len(data) - 17) + data[-6:],
        r"its footer claims \d+|its footer claims \d,\d+ of the file's",
    ),
    "57 bytes before the footer": ("file", None, padded(57), r"its footer are 65 bytes that nobody reads"),
    "an offset too low": ("file", None, block_changed(1, offset=-8), r"lie over each other"),
    "a batch that is too long": ("file", None, block_changed(0, body=8), r"lie over each other"),
    "the last batch too long": ("file", None, block_changed(2, body=1_000_000), r"lie over each other or beyond"),
    "a negative body": ("file", None, block_changed(0, body=-100_000), r"lie over each other"),
    "a negative header": ("file", None, block_changed(0, meta=-100_000), r"lie over each other"),
    "the first offset before all": ("file", None, block_changed(0, offset=-10_000), r"lie over each other"),
    "a batch within the mark": ("file", None, block_at(7), r"lie over each other"),
    "a batch where the schema is": ("file", None, block_at(8), r"its footer names batches that are none"),
    "a body of which the message has less": ("file", None, block_changed(0, body=-8), r"a message claims [\d,]+ bytes"),
    "a stream without its end": ("stream", None, lambda data: data[:-8], r"ends without the mark of its end"),
    "a stream with a part of its end": ("stream", None, lambda data: data[:-1], r"ends without the mark of its end"),
    "a stream of a schema without its end": (
        "stream",
        None,
        lambda data: data[: 8 + int.from_bytes(data[4:8], "little")],
        r"ends without the mark of its end",
    ),
    "a byte behind a stream": ("stream", None, lambda data: data + b"\0", r"behind its end are 1 bytes"),
    "behind an old stream": ("old stream", None, lambda data: data + b"\0" * 9, r"behind its end are 9 bytes"),
    "a stream that begins with no schema": (
        "stream",
        None,
        lambda data: data[8 + int.from_bytes(data[4:8], "little") :],
        r"its first message is no schema",
    ),
    "a stream of two schemas": (
        "stream",
        None,
        lambda data: data[: 8 + int.from_bytes(data[4:8], "little")] + data,
        r"at byte [\d,]+ is a message of kind 1",
    ),
    "a stream of its end alone": ("stream", None, lambda data: data[-8:] * 1 + b"", r"fewer than any"),
    "two ends": ("stream", None, lambda data: data[-8:] * 2, r"behind its end are 8 bytes"),
    "text": ("stream", None, lambda data: b"nothing of the kind", r"at byte 0 is no message of a stream"),
    "a long first message without a mark": (
        "stream",
        None,
        lambda data: struct.pack("<i", 2**20 + 1) + bytes(2**21),
        r"at byte 0 is no message of a stream",
    ),
    "a message beyond the end": (
        "stream",
        None,
        lambda data: data[:-8] + b"\xff" * 4 + struct.pack("<i", 9) + bytes(8),
        r"at byte [\d,]+ is no message of a stream",
    ),
    "negative rows of a column": ("file", None, replaced(node(20, 1), node(-1, 1)), r"claims negative numbers"),
    "negative nulls of a column": ("file", None, replaced(node(20, 1), node(20, -1)), r"claims negative numbers"),
    "other rows of a column": (
        "file",
        None,
        replaced(node(20, 1), node(21, 1)),
        r"a record batch of 20 rows has a column of 21",
    ),
    "a buffer that is too long": (
        "file",
        None,
        lambda data: data.replace(struct.pack("<qq", 0, 0) + struct.pack("<qq", 0, 80), node(0, 0) + node(0, 2**40)),
        r"bytes beyond its body",
    ),
    "a buffer at a negative place": (
        "file",
        None,
        lambda data: data.replace(struct.pack("<qq", 0, 0) + struct.pack("<qq", 0, 80), node(0, 0) + node(-8, 80)),
        r"claims negative numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_is_told_with_its_file(tmp_path: Path, name: str) -> None:
    kind, codec, change, told = REFUSED[name]
    data = written(TABLE, 20, kind, codec)
    file = stored(tmp_path / "0.arrow", data)
    decoded(file, read_index(file))  # as it was it can be read
    file = stored(tmp_path / "1.arrow", change(data))
    with pytest.raises(FormatError, match=rf"1\.arrow: not a readable Arrow file: .*(?:{told}).*"):
        decoded(file, read_index(file))


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_any_byte_may_be_another(tmp_path: Path, kind: str) -> None:
    """Where things lie is found, or it is told that the file cannot be read: no other error comes through."""
    data = written(pa.table({"a": pa.array(["x"]).dictionary_encode(), "b": [1]}), 1, kind)
    told = []
    for place in range(0, len(data), 5):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        ipc.INDICES.clear()
        file = stored(tmp_path / "0.arrow", bytes(changed))
        try:
            read_index(file)
        except FormatError as error:
            told.append(str(error))
    assert len(told) > len(data) / 40
    assert {message.startswith(f"{tmp_path / '0.arrow'}: not a readable Arrow file: ") for message in told} == {True}


def test_a_column_of_views_in_less_than_no_buffers_is_told(tmp_path: Path) -> None:
    words = [[f"{row} is a word of more than twelve letters"] for row in range(77)]
    views = pa.concat_arrays([pa.array(some, pa.string_view()) for some in [words[0] * 9, *words[1:]]])
    data = written(pa.table({"a": views}), 85, "file")
    assert read_index(stored(tmp_path / "0.arrow", data)).batches[0].views == (77,)
    buffers = struct.pack("<iq", 1, 77)  # of one column
    assert data.count(buffers) == 1
    for count, told in ((-1, "claims a negative number of buffers"), (78, "fewer buffers than its columns need")):
        file = stored(tmp_path / "1.arrow", data.replace(buffers, struct.pack("<iq", 1, count)))
        with pytest.raises(FormatError, match=rf"1\.arrow: .*a record batch .*{told}"):
            decoded(file, read_index(file))


@pytest.mark.parametrize("nbytes", [0, 8, 56])
def test_some_padding_before_the_footer_is_none(tmp_path: Path, nbytes: int) -> None:
    file = stored(tmp_path / "0.arrow", padded(nbytes)(written(TABLE, 20, "file")))
    assert read_index(file).batch_rows == (20, 20, 10)


# ---------------------------------------------------------------------------------------------------------------------
# What is compressed


def test_bytes_are_inflated_as_they_claim(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.arrow", b"")
    plain = np.random.default_rng(0).integers(0, 9, 5_000).astype(np.uint8).tobytes()
    for codec in ("zstd", "lz4"):
        packed = pa.Codec("lz4" if codec == "lz4" else codec).compress(plain, asbytes=True)
        for claim, told in ((5_000, None), (4_999, "but are 5,000"), (5_001, "but are 5,000"), (-2, "claim to be -2")):
            data = struct.pack("<q", claim) + packed
            if told is None:
                assert bytes(inflate(file, data, codec)) == plain
            else:
                with pytest.raises(FormatError, match=f"compressed bytes claim to be {claim:,}.*|{told}"):
                    inflate(file, data, codec)
        with pytest.raises(FormatError, match=r"compressed bytes are damaged|but are \d"):
            inflate(file, struct.pack("<q", 5_000) + packed[:-20], codec)
        assert bytes(inflate(file, struct.pack("<q", -1) + plain, codec)) == plain
    assert bytes(inflate(file, plain, "")) == plain
    assert bytes(inflate(file, b"", "zstd")) == b""


@pytest.mark.parametrize("little_nbytes", [1_000, 2**25])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_more_is_inflated_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, little_nbytes: int
) -> None:
    """What it claims is not reserved before it has come; and no more is inflated than a block beyond that."""
    monkeypatch.setattr(ipc_columns, "_LITTLE_NBYTES", little_nbytes)
    monkeypatch.setattr(ipc_columns, "_BLOCK_NBYTES", 700)
    file = stored(tmp_path / "0.arrow", b"")
    for nbytes in (999, 1_000, 1_001, 1_400, 5_000):
        plain = np.random.default_rng(0).integers(0, 9, nbytes).astype(np.uint8).tobytes()
        packed = pa.Codec(codec).compress(plain, asbytes=True)
        assert bytes(inflate(file, struct.pack("<q", nbytes) + packed, codec)) == plain
        for claim in (nbytes - 1, nbytes + 1, nbytes + 800):
            data = struct.pack("<q", claim) + packed
            with pytest.raises(
                FormatError, match=f"{len(data):,} compressed bytes claim to be {claim:,}, but are [0-9]"
            ):
                inflate(file, data, codec)


def test_buffers_claim_no_more_than_rows_need_and_codecs_can_make(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.arrow", b"")
    little, ratio, most = 2**25, 2**17, 2**31
    for length, needed, largest in (
        (1_000, 0, little),
        (1_000, little // 2, little),
        (1_000, little // 2 + 1, little + 2),
        (1_000, 2**40, 1_000 * ratio),
        (100, 2**40, 100 * ratio),
        (20_000, 2**40, most),
    ):
        for claim in (0, -1, largest):
            data = struct.pack("<q", claim).ljust(length, b"x")
            assert claimed_nbytes(file, data, "zstd", needed) == claim
        for claim in (largest + 1, -2, 2**62):
            data = struct.pack("<q", claim).ljust(length, b"x")
            with pytest.raises(FormatError) as refused:
                claimed_nbytes(file, data, "zstd", needed)
            assert f": {length:,} compressed bytes claim to be {claim:,}, where {largest:,} are the most" in str(
                refused.value
            )
    assert claimed_nbytes(file, b"12345678", "", 0) == claimed_nbytes(file, b"", "zstd", 0) == -1


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
def test_what_columns_take_when_they_are_inflated_is_known_before(tmp_path: Path, codec: Any) -> None:
    words = pa.array([None, "x" * 5_000, *["y"] * 50])
    noise = pa.array(np.random.default_rng(0).integers(0, 2**62, 52))
    file = stored(tmp_path / "0.arrow", written(pa.table({"word": words, "noise": noise}), 52, "file", codec))
    index = read_index(file)
    [batch] = index.batches
    for place, least in ((0, 5_050 + 53 * 4 + 7), (1, 52 * 8)):
        found = inflated_nbytes(file, find_column(file, index, batch, (place,)))
        assert least <= found <= least + 4 * 64
    readers, rows = open_columns(file, index, 0, [(0,), (1,)])
    assert len(readers) == 2
    nbytes = sum(find_column(file, index, batch, (place,)).nbytes for place in (0, 1))
    assert rows == (1 if codec else ipc_columns.WINDOW_NBYTES * 52 // nbytes)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_buffers_that_are_as_they_were_take_what_they_have(tmp_path: Path, codec: str) -> None:
    file = stored(tmp_path / "0.arrow", data := written(pa.table({"n": pa.array(range(50))}), 50, "file", codec))
    index = read_index(file)
    column = find_column(file, index, index.batches[0], (0,))
    start, stop = column.spans[1]
    file = stored(tmp_path / "1.arrow", data[:start] + struct.pack("<q", -1) + data[start + 8 :])
    assert inflated_nbytes(file, column) == column.nbytes
    file = stored(tmp_path / "2.arrow", data[:start] + struct.pack("<q", 2**62) + data[start + 8 :])
    assert inflated_nbytes(file, column) - column.buffers[0, 1] == 2**17 * (stop - start)


def test_codecs_that_are_not_known_are_told(tmp_path: Path) -> None:
    data = written(pa.table({"n": pa.array(range(50))}), 50, "file", "zstd")
    index = read_index(stored(tmp_path / "0.arrow", data))
    codes = [place for place in range(len(data)) if data[place] == 1]
    told = []
    for place in codes:
        for number in (2, 0xFF):
            ipc.INDICES.clear()
            file = stored(tmp_path / "1.arrow", data[:place] + bytes([number]) + data[place + 1 :])
            try:
                read_index(file)
            except FormatError as error:
                told.append(str(error))
    assert index.batches[0].codec == "zstd"
    for number in (2, -1):
        assert f"{file.url}: not a readable Arrow file: it is compressed in a way that is not known ({number})" in told


def test_a_dictionary_that_is_missing_is_told(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.arrow", written(pa.table({"kind": pa.array(WORDS).dictionary_encode()}), 50, "file"))
    index = read_index(file)
    missing: list[Dictionaries] = [{}, {7: ()}]
    for dictionaries in missing:
        [read], _ = open_columns(file, index._replace(dictionaries=(dictionaries,)), 0, [(0,)])
        with pytest.raises(FormatError, match=r"0\.arrow: .*the dictionary of column 'kind' is missing"):
            read(0, 5)


@pytest.mark.parametrize("codec", [None, "lz4"])
@pytest.mark.parametrize("window_nbytes", [1, 2**23])
def test_fields_of_structs_are_found_behind_whatever_comes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_nbytes: int, codec: Any
) -> None:
    monkeypatch.setattr(ipc_columns, "WINDOW_NBYTES", window_nbytes)
    long = [f"{row} is a word of more than twelve letters" if row % 3 else None for row in range(50)]
    views = pa.concat_arrays([pa.array(long[:20], pa.string_view()), pa.array(long[20:], pa.string_view())])
    null = pa.array([row % 7 == 2 for row in range(50)])
    inner = pa.StructArray.from_arrays(
        [pa.array(range(50)), views, pa.nulls(50), pa.array([[row] * (row % 3) for row in range(50)])],
        ["n", "view", "null", "list"],
        mask=null,
    )
    union = pa.UnionArray.from_sparse(pa.array([0] * 50, pa.int8()), [pa.array(range(50))])
    fields = {
        "view": views,
        "fixed": pa.array([[row, row] for row in range(50)], pa.list_(pa.int8(), 2)),
        "inner": inner,
        "word": pa.array(long),
        "map": pa.nulls(50, pa.map_("str", "i1")),
    }
    outer = pa.StructArray.from_arrays(
        list(fields.values()), list(fields), mask=pa.array([row % 5 == 1 for row in range(50)])
    )
    columns = {"first": union, "outer": outer, "views": views, "last": outer}
    file = stored(tmp_path / "0.arrow", written(pa.table(columns), 30, "file", codec))
    index = read_index(file)
    paths = [(1, 0), (1, 2), (1, 2, 0), (1, 2, 1), (1, 2, 3), (1, 3), (1, 4), (2,), (3, 2, 1), (3, 2, 3), (3, 3)]
    for number, start, count in ((0, 0, 30), (1, 30, 20)):
        for path in paths:
            wanted: pa.Array = list(columns.values())[path[0]].slice(start, count)
            for step in path[1:]:
                wanted = wanted.flatten()[step]
            [read], _ = open_columns(file, index, number, [path])
            for low, high in ((0, count), (3, 4), (9, 17), (count - 1, count)):
                found = read(low, high)
                assert found.to_pylist() == wanted.slice(low, high - low).to_pylist()
            column = find_column(file, index, index.batches[number], path)
            assert column.depth == len(path) - 1
            assert column.has_nulls


# ---------------------------------------------------------------------------------------------------------------------
# Numbers within columns

LONG = [f"{row} is a word of more than twelve letters" for row in range(20)]

COLUMNS: dict[str, pa.Array] = {
    "text": pa.array(LONG),
    "large": pa.array(LONG, pa.large_string()),
    "view": pa.array(LONG, pa.string_view()),
    "list": pa.array([[row, row] for row in range(20)], pa.list_(pa.int32())),
    "large list": pa.array([[row, row] for row in range(20)], pa.large_list(pa.int32())),
    "map": pa.array([[("a", row)] for row in range(20)], pa.map_(pa.string(), pa.int32())),
    "list view": pa.array([[row, row] for row in range(20)], pa.list_view(pa.int32())),
    "large list view": pa.array([[row, row] for row in range(20)], pa.large_list_view(pa.int32())),
    "kind": pa.array([f"k{row % 3}" for row in range(20)]).dictionary_encode(),
}

#: Of a column of 20 rows: in which of its buffers which bytes are replaced by which number, and what is told.
WITHIN: list[tuple[str, int, int, str, int, str]] = [
    *(
        case
        for name, kind in (("text", "<i"), ("large", "<q"), ("list", "<i"), ("large list", "<q"), ("map", "<i"))
        for size in [struct.calcsize(kind)]
        for case in (
            (name, 1, 0, kind, -1, r"offsets that are too few, or descend"),
            (name, 1, 20 * size, kind, -1, r"offsets that are too few, or descend"),
            (name, 1, 10 * size, kind, -1, r""),
            (name, 1, 10 * size, kind, 2**30, r""),
        )
    ),
    ("text", 1, 80, "<i", 2**20, r"a column of text has offsets beyond its end"),
    ("large", 1, 160, "<q", 2**20, r"a column of text has offsets beyond its end"),
    ("list", 1, 80, "<i", 41, r"a column of 41 values has only 40"),
    ("large list", 1, 160, "<q", 41, r"a column of 41 values has only 40"),
    ("map", 1, 80, "<i", 21, r"a column of 21 values has only 20"),
    ("view", 1, 12, "<i", -1, r"text at places that are negative"),
    ("view", 1, 16 * 19 + 12, "<i", -1, r"text at places that are negative"),
    ("view", 1, 16 * 19 + 12, "<i", 2**20, r""),
    ("view", 1, 8, "<i", 1, r""),
    ("view", 1, 8, "<i", -1, r""),
    ("view", 1, 0, "<i", -1, r""),
    ("list view", 1, 0, "<i", -1, r"items at places that are negative"),
    ("list view", 2, 0, "<i", -1, r"items at places that are negative"),
    ("list view", 2, 76, "<i", 3, r"a column of 41 values has only 40"),
    ("list view", 1, 76, "<i", 39, r"a column of 41 values has only 40"),
    ("large list view", 1, 0, "<q", -1, r"items at places that are negative"),
    ("large list view", 2, 0, "<q", -1, r"items at places that are negative"),
    ("large list view", 2, 152, "<q", 3, r"a column of 41 values has only 40"),
    ("kind", 1, 0, "<i", 3, r"column 'kind' has values that its dictionary lacks"),
    ("kind", 1, 76, "<i", -1, r"column 'kind' has values that its dictionary lacks"),
]


@pytest.mark.parametrize("window_nbytes", [1, 2**23])
@pytest.mark.parametrize("case", WITHIN, ids=lambda case: "-".join(map(str, case[:3] + case[4:5])))
def test_a_number_within_a_column_that_cannot_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Any, window_nbytes: int
) -> None:
    monkeypatch.setattr(ipc_columns, "WINDOW_NBYTES", window_nbytes)
    name, buffer, place, kind, number, told = case
    data = written(pa.table({name: COLUMNS[name]}), 20, "file")
    index = read_index(file := stored(tmp_path / "0.arrow", data))
    assert [batch.column(0).to_pylist() for batch in decoded(file, index)] == [COLUMNS[name].to_pylist()]
    start, stop = find_column(file, index, index.batches[0], (0,)).spans[buffer]
    assert place + struct.calcsize(kind) <= stop - start
    changed = bytearray(data)
    changed[start + place : start + place + struct.calcsize(kind)] = struct.pack(kind, number)
    file = stored(tmp_path / "1.arrow", bytes(changed))
    with pytest.raises((FormatError, pa.ArrowException), match=told or None) as caught:
        decoded(file, read_index(file))
    assert not told or "1.arrow" in str(caught.value)


TEXT_NBYTES = sum(map(len, LONG))

#: Of a column of 20 rows: which of its buffers need how many bytes, and what is told where there is one less.
NEEDED: list[tuple[str, int, int, str]] = [
    *((name, 1, 84, "offsets that are too few, or descend") for name in ("text", "list", "map")),
    *((name, 1, 168, "offsets that are too few, or descend") for name in ("large", "large list")),
    *((name, 2, TEXT_NBYTES, "a column of text has offsets beyond its end") for name in ("text", "large")),
    ("view", 1, 320, "a buffer that is too short for its rows"),
    *(("list view", buffer, 80, "a buffer that is too short for its rows") for buffer in (1, 2)),
    *(("large list view", buffer, 160, "a buffer that is too short for its rows") for buffer in (1, 2)),
    *((name, 2, 160, "") for name in ("list", "large list")),
    ("kind", 1, 80, ""),
]


@pytest.mark.parametrize("window_nbytes", [1, 2**23])
def test_buffers_that_are_a_byte_short_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_nbytes: int
) -> None:
    monkeypatch.setattr(ipc_columns, "WINDOW_NBYTES", window_nbytes)
    for name, buffer, needed, told in NEEDED:
        file = stored(tmp_path / "0.arrow", written(pa.table({name: COLUMNS[name]}), 20, "file"))
        index = read_index(file)
        [batch] = index.batches
        for nbytes in (needed, needed - 1):
            buffers = batch.buffers.copy()
            # Of lists it is the buffer of their items, behind that of which are null.
            buffers[buffer + (buffer == 2 and name in ("list", "large list")), 1] = nbytes
            changed = index._replace(batches=(batch._replace(buffers=buffers),))
            if nbytes == needed:
                assert decoded(file, changed)[0].column(0).to_pylist() == COLUMNS[name].to_pylist()
                continue
            with pytest.raises((FormatError, pa.ArrowException), match=told or None) as refused:
                decoded(file, changed)
            assert not told or "0.arrow: not a readable Arrow file: " in str(refused.value)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_rows_of_large_compressed_buffers_may_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Those that were read last are held; for others it is begun anew."""
    monkeypatch.setattr(ipc_columns, "_HELD_NBYTES", 1)
    monkeypatch.setattr(ipc_columns, "_BLOCK_NBYTES", 70)
    columns = {"n": pa.array(range(1_000)), "text": pa.array([f"{row:03}" for row in range(1_000)])}
    file = stored(tmp_path / "0.arrow", written(pa.table(columns), 1_000, "file", codec))
    index = read_index(file)
    for place, column in enumerate(columns.values()):
        [read], _ = open_columns(file, index, 0, [(place,)])
        for low, high in (
            (100, 300),
            (150, 200),
            (96, 300),
            (40, 120),
            (0, 8),
            (500, 508),
            (500, 1_000),
            (2, 3),
            (2, 3),
        ):
            assert read(low, high).equals(column.slice(low, high - low))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_vectors_that_were_not_worth_compressing_lie_as_they_are(tmp_path: Path, codec: str) -> None:
    """Others than pyarrow leave buffers so, among those that are compressed, and say it by a length of -1."""
    rows = np.random.default_rng(0).integers(0, 2**32, (50, 64), np.uint32).view(np.float32)
    rows[~np.isfinite(rows)] = 1
    items = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 64)
    data = written(pa.table({"embedding": items}), 50, "file", codec)
    index = read_index(file := stored(tmp_path / "0.arrow", data))
    start, stop = find_column(file, index, index.batches[0], (0,)).spans[-1]
    assert 0 <= stop - start - 8 - rows.nbytes <= 64, "what is random does not get smaller"
    plain = struct.pack("<q", -1) + rows.tobytes()
    stored(tmp_path / "0.arrow", data[:start] + plain.ljust(stop - start, b"\0") + data[stop:])
    reader = EmbeddingReader(tmp_path / "0.arrow")
    np.testing.assert_array_equal(reader.to_dask_array(max_piece_size=7).compute(scheduler="synchronous"), rows)
    np.testing.assert_array_equal(reader.take([3, 49]).to_dask_array().compute(scheduler="synchronous"), rows[[3, 49]])
