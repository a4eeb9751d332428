"""Where things lie in files of Arrow's IPC format: messages one after the other, each a header and a body of buffers.

The file form ends with a footer that says where the messages are; the stream form is walked through [1]_. Headers are
flatbuffers, of which as much is read here as tells the rows and the place of each buffer: rows can be read exactly, and
what a file claims is held against its size before any of it is decoded.

References
----------
.. [1] https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dask_embedding_reader._common.cache import CountedCache
from dask_embedding_reader.errors import EmbeddingReaderError, FormatError
from dask_embedding_reader.storage.read import read_range, read_ranges
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import StoredFile

MAGIC = b"ARROW1"
_TAIL_NBYTES = 2**16
"""What is read at first of the end of a file: mostly all of its footer."""

_STREAM_NBYTES = 2**13
"""What is read at first of each message of a stream."""

_END_NBYTES = 64
"""Behind the last batch is the mark of the end, of eight bytes, and before the footer perhaps some padding."""

_MARK = b"\xff\xff\xff\xff"
"""Before the length of a message; releases before 0.15 had none."""

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_CODECS = ("lz4", "zstd")

Int64s = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """A record batch: where its buffers are."""

    rows: int
    nodes: Int64s
    """The rows and the nulls of each column and each column within, in the order of the schema."""
    buffers: Int64s
    """The first byte in the file and the length of each of their buffers."""
    codec: str
    """How they are compressed; empty if they are not."""
    views: tuple[int, ...]
    """How many buffers of text each column of views has."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes, with the message that its numbers lie in, and the objects that hold them."""
        return 1_000 + 3 * (self.nodes.nbytes + self.buffers.nbytes)


Dictionaries = dict[int, tuple[Batch, ...]]
"""Dictionaries by their numbers, each in parts."""


class Index(NamedTuple):
    """What a file holds."""

    schema: pa.Schema
    batches: tuple[Batch, ...]
    dictionaries: tuple[Dictionaries, ...]
    """Those of each record batch."""
    dictionary_of: tuple[int | None, ...]
    """The number of the dictionary of each column."""
    starts: Int64s
    """The nodes, the buffers but for those of views, and the columns of views that come before each column."""

    @property
    def batch_rows(self) -> tuple[int, ...]:
        """The rows of each record batch."""
        return tuple(batch.rows for batch in self.batches)

    @property
    def nbytes(self) -> int:
        """Roughly the memory that it takes; parts of dictionaries that several batches know are there once.

        A schema takes four times its bytes in the file, and once those of its metadata, which may be long.
        """
        known = {id(each): each for each in self.dictionaries}.values()
        parts = {id(part): part for each in known for some in each.values() for part in some}.values()
        schema_nbytes: int = self.schema.serialize().size
        return 2_000 + 2 * schema_nbytes + sum(batch.nbytes for batch in (*self.batches, *parts))


INDICES: CountedCache[StoredFile, Index] = CountedCache(32 * 2**20)
"""Those of the files that were read last."""


def read_index(file: StoredFile) -> Index:
    """Read where the record batches of a file are; kept for the next rows of it.

    Raises
    ------
    FormatError
        If that cannot be right.
    """
    if known := INDICES.get(file):
        return known
    if 0 <= file.size < 12:
        fail(file, f"it has {file.size} bytes, fewer than any; write it again")
    if file.size < 0:
        fail(file, "the storage does not tell its size, and its footer is at its end")
    try:
        tail = read_range(file, max(0, file.size - _TAIL_NBYTES), file.size)
        index = _read_file(file, tail) if tail[-6:] == MAGIC else _read_stream(file)
        _ = index.schema.names  # which are found to be no text only when they are looked at
        INDICES.put(file, index)
        return index
    except EmbeddingReaderError:
        raise
    except Exception as error:  # of flatbuffers that are none
        raise FormatError(f"{file.url}: not a readable Arrow file: {describe(error)}; write it again") from error


def fail(file: StoredFile, what: str) -> NoReturn:
    """Say that a file is none, or damaged."""
    raise FormatError(f"{file.url}: not a readable Arrow file: {what}")


def _read_file(file: StoredFile, tail: bytes) -> Index:
    nbytes = int.from_bytes(tail[-10:-6], "little") + 10
    if nbytes > file.size - 8:
        fail(file, f"its footer claims {nbytes:,} of the file's {file.size:,} bytes; write it again")
    if nbytes > len(tail):
        tail = read_range(file, file.size - nbytes, file.size - len(tail)) + tail
    footer = _root(tail[-nbytes:-10])
    # As a file of a footer alone.
    schema = pa.ipc.open_file(pa.py_buffer(MAGIC + b"\0\0" + tail[-nbytes:])).schema
    start = file.size - len(tail)
    places = [
        [
            (int(offset), int(offset) + int(meta), int(offset) + int(meta) + int(body))
            for offset, meta, _, body in footer.structs(slot, "<i8,<i4,<i4,<i8").tolist()
        ]
        for slot in (3, 2)
    ]
    reached = 8
    for first, head_end, end in sorted(places[0] + places[1]):
        if not (reached <= first < head_end <= end <= file.size - nbytes):
            fail(file, "its footer names batches that lie over each other or beyond the end; write it again")
        reached = end
    if reached > 8 and file.size - nbytes - reached > _END_NBYTES:
        fail(
            file,
            f"between its batches and its footer are {file.size - nbytes - reached:,} bytes that nobody reads: are "
            "these two files in one? write them as two",
        )
    ranges = [(first, head_end) for first, head_end, _ in places[0] + places[1]]
    known = {span: tail[span[0] - start : span[1] - start] for span in ranges if span[0] >= start}
    unknown = [span for span in ranges if span not in known]
    known |= dict(zip(unknown, read_ranges(file, unknown), strict=True))
    batches = [_message(file, known[first, middle], middle, end) for first, middle, end in places[0]]
    parts = [_message(file, known[first, middle], middle, end) for first, middle, end in places[1]]
    if any(kind != _BATCH for kind, _, _ in batches) or any(kind != _DICTIONARY for kind, _, _ in parts):
        fail(file, "its footer names batches that are none; write it again")
    dictionaries: Dictionaries = {}
    for _, _, (number, batch, is_delta) in parts:
        if number in dictionaries and not is_delta:
            fail(file, "its footer names a dictionary twice; write it again")
        dictionaries[number] = (*dictionaries.get(number, ()), batch)
    return _index(file, schema, footer.table(1), [(batch, dictionaries) for _, _, batch in batches])


def _read_stream(file: StoredFile) -> Index:
    """Walk through the messages of a stream, which has no footer."""
    head = read_range(file, 0, min(file.size, _TAIL_NBYTES))
    if head[:4] == MAGIC[:4]:
        fail(file, f"it ends with {head[-6:]!r}, not with {MAGIC!r}: it was cut short; write it again")
    if head[:4] == b"FEA1":
        fail(file, "it is of the first version of Feather; write_feather(read_table(path), path) of pyarrow renews it")
    schema, fields = None, None
    batches: list[tuple[Batch, Dictionaries]] = []
    dictionaries: Dictionaries = {}
    position = 0
    while True:
        near = head[position:] if len(head) - position >= 8 else b""
        if not near and position < file.size:
            near = read_range(file, position, min(file.size, position + _STREAM_NBYTES))
        prefix = 8 if near[:4] == _MARK else 4
        if len(near) < prefix:
            fail(file, "it ends without the mark of its end: it was cut short, or never finished; write it again")
        nbytes = int.from_bytes(near[prefix - 4 : prefix], "little")
        if not nbytes:
            if file.size > position + prefix:
                fail(
                    file,
                    f"behind its end are {file.size - position - prefix:,} bytes that nobody reads: are these two "
                    "streams in one? write them as two",
                )
            break
        if position + prefix + nbytes > file.size or (position == 0 and prefix == 4 and nbytes > 2**20):
            fail(
                file,
                f"at byte {position:,} is no message of a stream, nor has it a footer: it is none, or cut short; write "
                "it again",
            )
        if len(near) < prefix + nbytes:
            near += read_range(file, position + len(near), position + prefix + nbytes)
        end_of_head = position + prefix + nbytes
        kind, body_nbytes, batch = _message(file, near[: prefix + nbytes], end_of_head, file.size)
        if schema is None:
            if kind != _SCHEMA:
                fail(file, "its first message is no schema")
            schema = pa.ipc.read_schema(pa.py_buffer(near[: prefix + nbytes]))
            fields = _root(near[prefix : prefix + nbytes]).table(2)
        elif kind == _BATCH:
            batches.append((batch, dictionaries))
        elif kind == _DICTIONARY:
            number, part, is_delta = batch
            dictionaries = {**dictionaries, number: (*dictionaries.get(number, ()), part) if is_delta else (part,)}
        else:
            fail(file, f"at byte {position:,} is a message of kind {kind}")
        position = end_of_head + body_nbytes
    if schema is None or fields is None:
        fail(file, "it has no schema")
    return _index(file, schema, fields, batches)


def _index(file: StoredFile, schema: pa.Schema, fields: _Table, batches: Sequence[tuple[Batch, Dictionaries]]) -> Index:
    encodings = [field.optional_table(4) for field in fields.tables(1)]
    numbers = tuple(None if encoding is None else encoding.number(0, "<q") for encoding in encodings)
    if len(numbers) != len(schema):
        fail(file, "its schema is damaged; write it again")
    starts = np.cumsum([(0, 0, 0), *(parts_of(field.type) for field in schema)], axis=0)
    return Index(schema, tuple(batch for batch, _ in batches), tuple(known for _, known in batches), numbers, starts)


def _message(file: StoredFile, data: bytes, body: int, end: int) -> tuple[int, int, Any]:
    """Return what kind of message this is, the length of its body, and what it holds.

    That is a batch; of a dictionary its number, a batch, and whether it adds to what there is. The body begins at a
    byte of the file, and ends before another one.
    """
    prefix = 8 if data[:4] == _MARK else 4
    message = _root(data[prefix:])
    kind, body_nbytes = message.number(1, "<B"), message.number(3, "<q")
    if not 0 <= body_nbytes <= end - body:
        fail(
            file,
            f"a message claims {body_nbytes:,} bytes, beyond the end of the file: it was cut short; write it again",
        )
    if kind == _BATCH:
        return kind, body_nbytes, _batch(file, message.table(2), body, body_nbytes)
    if kind == _DICTIONARY:
        dictionary = message.table(2)
        part = _batch(file, dictionary.table(1), body, body_nbytes)
        return kind, body_nbytes, (dictionary.number(0, "<q"), part, dictionary.number(2, "<B") == 1)
    return kind, body_nbytes, None


def _batch(file: StoredFile, table: _Table, body: int, body_nbytes: int) -> Batch:
    rows = table.number(0, "<q")
    nodes = table.structs(1, "<i8,<i8").view(np.int64).reshape(-1, 2)
    buffers = table.structs(2, "<i8,<i8").view(np.int64).reshape(-1, 2).copy()
    compression = table.optional_table(3)
    codec = ""
    if compression is not None:
        number = compression.number(0, "<b")
        if not 0 <= number < len(_CODECS) or compression.number(1, "<b"):
            fail(file, f"it is compressed in a way that is not known ({number})")
        codec = _CODECS[number]
    if rows < 0 or (nodes < 0).any() or (buffers < 0).any() or (buffers > body_nbytes).any():
        fail(file, "a record batch claims negative numbers, or bytes beyond its body; write it again")
    if len(buffers) and int(buffers.sum(axis=1).max()) > body_nbytes:
        fail(file, "a record batch claims bytes beyond its body; write it again")
    buffers[:, 0] += body
    views = tuple(table.structs(4, "<i8").tolist())
    if any(count < 0 for count in views):
        fail(file, "a record batch claims a negative number of buffers; write it again")
    return Batch(rows, nodes, buffers, codec, views)


# ---------------------------------------------------------------------------------------------------------------------
# Flatbuffers


class _Table(NamedTuple):
    """A table of a flatbuffer: fields by their numbers, each of which may be missing."""

    data: bytes
    position: int

    def _field(self, slot: int) -> int | None:
        """Return where a field is."""
        table = self.position - self._at(self.position, "<i")
        if 4 + 2 * slot + 2 > self._at(table, "<H"):
            return None
        offset = self._at(table + 4 + 2 * slot, "<H")
        return self.position + offset if offset else None

    def _at(self, position: int, kind: str) -> int:
        if position < 0:
            raise ValueError("an offset leads out of it")
        return int(struct.unpack_from(kind, self.data, position)[0])

    def number(self, slot: int, kind: str) -> int:
        """Return a number; 0 where it is missing."""
        field = self._field(slot)
        return 0 if field is None else self._at(field, kind)

    def optional_table(self, slot: int) -> _Table | None:
        """Return a table within; None where it is missing."""
        field = self._field(slot)
        return None if field is None else _Table(self.data, field + self._at(field, "<I"))

    def table(self, slot: int) -> _Table:
        """Return a table within."""
        table = self.optional_table(slot)
        if table is None:
            raise ValueError("a part of it is missing")
        return table

    def structs(self, slot: int, kind: str) -> npt.NDArray[Any]:
        """Return an array of structs."""
        field = self._field(slot)
        dtype = np.dtype(kind)
        if field is None:
            return np.empty(0, dtype)
        start = field + self._at(field, "<I")
        return np.frombuffer(self.data, dtype, self._at(start, "<I"), start + 4)

    def tables(self, slot: int) -> list[_Table]:
        """Return an array of tables."""
        field = self._field(slot)
        if field is None:
            return []
        start = field + self._at(field, "<I") + 4
        places = np.frombuffer(self.data, "<u4", self._at(start - 4, "<I"), start).tolist()
        return [_Table(self.data, start + 4 * number + place) for number, place in enumerate(places)]


def _root(data: bytes) -> _Table:
    return _Table(data, int(struct.unpack_from("<I", data)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# What a column of a type consists of


def _stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the type as which a column lies in a batch."""
    if isinstance(kind, pa.BaseExtensionType):
        return _stored_type(kind.storage_type)
    return kind.index_type if pa.types.is_dictionary(kind) else kind


def is_view(kind: pa.DataType) -> bool:
    """Tell whether a type is that of views of text or bytes, which may lie in several buffers."""
    return str(kind) in ("string_view", "binary_view")


def children_of(kind: pa.DataType) -> list[pa.DataType]:
    """Return the types that a column of a type has within."""
    kind = _stored_type(kind)
    if str(kind).startswith("run_end_encoded<"):
        return [kind.run_end_type, kind.value_type]
    return [kind.field(position).type for position in range(kind.num_fields)]


def parts_of(kind: pa.DataType) -> tuple[int, int, int]:
    """Return how many nodes, buffers and columns of views a column of a type has, those within included."""
    kind = _stored_type(kind)
    buffers = 0 if pa.types.is_null(kind) else _own_buffers(kind)
    counts = [(1, buffers, int(is_view(kind))), *map(parts_of, children_of(kind))]
    nodes, plain, views = (sum(numbers) for numbers in zip(*counts, strict=True))
    return nodes, plain, views


def _own_buffers(kind: pa.DataType) -> int:
    if is_view(kind):
        return 2
    if pa.types.is_union(kind):
        return 1 if kind.mode == "sparse" else 2
    if str(kind).startswith("run_end_encoded<"):
        return 0
    return int(kind.num_buffers)
