"""The footer of a parquet file, read from its bytes (Thrift's compact protocol), trusting none of them.

pyarrow tells of column chunks through bindings that let no C++ exception pass: one wrong byte there ends the process.
So what has to be known before rows are decoded is taken from the bytes here. pyarrow translates the schema, once for
all files that have the same, and sees whole footers only when it decodes rows, where its exceptions do arrive.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.retries import describe

INT96_UNIT = "us"
"""What old timestamps of 96 bits (Spark's) are read as: in nanoseconds those before 1677 and after 2262 wrap."""

_DEEPEST = 64
"""Levels of nesting; Thrift's own readers stop there too."""


class Chunk(NamedTuple):
    """One column of one row group."""

    start: int
    """Its first byte in the file."""
    stop: int
    """The byte after its last one."""
    values: int
    """The items in it, nulls and empty lists included."""
    nulls: int | None
    """How many of these are null; None where the writer did not say."""
    kind: int | None
    """Their physical type, by its number in ``parquet.thrift``."""
    codec: int | None
    """How its pages are compressed; 0 for not at all."""


class Schema(NamedTuple):
    """The columns of a file."""

    arrow: pa.Schema
    """As Arrow types."""
    paths: tuple[str, ...]
    """The path of each leaf, with dots."""
    leaves: tuple[range, ...]
    """The leaves of each column of ``arrow``."""


class Footer(NamedTuple):
    """What the footer of one file says."""

    data: bytes
    """The end of the file, from the footer on."""
    schema: Schema
    """Its columns."""
    group_rows: tuple[int, ...]
    """The rows of each row group."""
    chunks: tuple[tuple[Chunk, ...], ...]
    """For each row group its column chunks, one for each leaf."""


class _DamagedError(Exception):
    """What is wrong with a footer."""


def parse_footer(url: str, data: bytes, data_nbytes: int) -> Footer:
    """Read a footer.

    Parameters
    ----------
    url
        The file, for messages.
    data
        The end of the file: the footer, its length in four bytes, and ``PAR1``.
    data_nbytes
        How many bytes of the file are before that.

    Raises
    ------
    FormatError
        If it is damaged.
    """
    try:
        facts, _ = _read_struct(data, 0, _FILE, 0)
        schema = _schema(facts[2], facts.get(5, b""), facts.get(6, b""))
        groups = facts.get(4, [])
        group_rows = tuple(group[3] for group in groups)
        chunks = tuple(_chunks(group, index, len(schema.paths), data_nbytes) for index, group in enumerate(groups))
        # Some writers leave the rows of the file at 0.
        if min(group_rows, default=0) < 0 or facts[3] not in (0, sum(group_rows)):
            raise _DamagedError(f"it promises {facts[3]:,} rows, its row groups {sum(group_rows):,}")
    except _DamagedError as error:
        raise FormatError(f"{url}: damaged: {error}; write the file again") from None
    except Exception as error:
        raise FormatError(f"{url}: its parquet footer cannot be read: {describe(error)}") from error
    return Footer(data, schema, group_rows, chunks)


class RawGroup(NamedTuple):
    """A row group as it is spelled."""

    columns: bytes
    """The list of its column chunks."""
    nbytes: int
    """Their size before compression."""
    compressed_nbytes: int
    """Their size."""

    def split_columns(self) -> tuple[int, bytes]:
        """Return how many column chunks there are, and how they are spelled, one after the other."""
        count, _, position = _read_list_head(self.columns, 0)
        return count, self.columns[position:]


class RawFooter(NamedTuple):
    """A footer whose parts are left as they are spelled."""

    start: int
    """Its first byte in the file."""
    version: int
    """The version of the format."""
    schema: bytes
    """The list of schema elements."""
    key_values: bytes
    """The list of notes, empty if there is none."""
    created_by: bytes
    """Who wrote it."""
    column_orders: bytes
    """The list of these, empty if there is none."""
    groups: list[RawGroup]
    """The row groups."""


class PageHeader(NamedTuple):
    """What a data page without compression says of itself."""

    nbytes: int
    """Its size, without this header."""
    values: int
    """The items in it, nulls included."""
    encoding: int
    """How they are encoded; 0 for plainly."""


PLAIN, RLE = 0, 3
"""Encodings of items and of levels, by their numbers in ``parquet.thrift``."""


def read_raw_footer(file: bytes) -> RawFooter:
    """Read the footer of a whole file that was written by pyarrow just now."""
    start = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    wanted: _Wanted = {1: {}, 2: _RAW, 4: {1: _RAW, 2: {}, 6: {}}, 5: _RAW, 6: {}, 7: _RAW}
    facts, _ = _read_struct(file, start, wanted, 0)
    groups = [RawGroup(group[1], group[2], group.get(6, group[2])) for group in facts.get(4, [])]
    return RawFooter(start, facts[1], facts[2], facts.get(5, b""), facts[6], facts.get(7, b""), groups)


def page_header(data: bytes) -> tuple[PageHeader, int] | None:
    """Read the header of a page, and how long it is; None if this is no data page of the first version.

    Nor is one with a checksum, which pyarrow compares, or with levels that are encoded in the way of old.
    """
    try:
        facts, nbytes = _read_struct(data, 0, {1: {}, 2: {}, 3: {}, 4: {}, 5: {1: {}, 2: {}, 3: {}, 4: {}}}, 0)
        kind, plain_nbytes, stored_nbytes, values, encoding = facts[1], facts[2], facts[3], facts[5][1], facts[5][2]
        levels = facts[5][3], facts[5][4]
    except Exception:  # noqa: BLE001 - whatever may be wrong with it, pyarrow says what
        return None
    numbers = kind, plain_nbytes, stored_nbytes, values, encoding
    if (
        not all(isinstance(number, int) and number >= 0 for number in numbers)
        or kind
        or plain_nbytes != stored_nbytes
        or 4 in facts
        or levels != (RLE, RLE)
    ):
        return None
    return PageHeader(stored_nbytes, values, encoding), nbytes


def _chunks(group: Mapping[int, Any], index: int, leaves: int, data_nbytes: int) -> tuple[Chunk, ...]:
    columns = group[1]
    if len(columns) != leaves:
        raise _DamagedError(f"row group {index} has {len(columns)} column chunks where {leaves} were expected")
    return tuple([_chunk(column, index, data_nbytes) for column in columns])


def _chunk(column: Mapping[int, Any], index: int, data_nbytes: int) -> Chunk:
    if column.get(1):
        raise _DamagedError(f"row group {index} is said to be in another file, {column[1]!r}")
    if 3 not in column:
        raise _DamagedError(f"the columns of row group {index} are encrypted, which cannot be read")
    facts = column[3]
    values, nbytes, start = facts[5], facts[7], facts[9]
    if 0 < facts.get(11, 0) < start:  # some old writers put 0 for "no dictionary page"
        start = facts[11]
    if not 0 <= start <= start + nbytes <= data_nbytes:
        raise _DamagedError(
            f"row group {index} is said to be at bytes {start:,} to {start + nbytes:,}, but the data of the file ends "
            f"at {data_nbytes:,}"
        )
    nulls = facts[12].get(3) if 12 in facts else None
    if not (values >= 0 and 0 <= (nulls or 0) <= values):
        raise _DamagedError(f"a column of row group {index} is said to hold {nulls} nulls in {values} values")
    return Chunk(start, start + nbytes, values, nulls, facts.get(1), facts.get(4))


# ---------------------------------------------------------------------------------------------------------------------
# The schema


@lru_cache(maxsize=128)  # the files of a collection mostly have one schema
def _schema(elements: bytes, key_values: bytes, created_by: bytes) -> Schema:
    """Read the lists of schema elements and of key-value pairs, as the footer spells them."""
    nodes, _ = _read_list(elements, 0, _ELEMENT, 0)
    paths, leaves = _walk(nodes)
    # A footer of no rows: version 2, schema, 0 rows, no row groups, and what the writer noted.
    footer = b"\x15\x04\x19" + elements + b"\x16\x00\x19\x0c"
    footer += b"\x19" + key_values if key_values else b""
    if created_by:
        footer += (b"\x18" if key_values else b"\x28") + spell_length(len(created_by)) + created_by
    footer += b"\0"
    tail = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    arrow = arrow_schema(tail)
    if len(arrow.names) != len(leaves):
        raise _DamagedError(f"its schema has {len(leaves)} columns, but {len(arrow.names)} as Arrow types")
    return Schema(arrow, paths, leaves)


def arrow_schema(file: bytes) -> pa.Schema:
    """Return the columns of a file, given its content or its footer alone, as they are when it is read.

    But parquet has no seconds: pyarrow stores milliseconds, notes in the footer what it was given, and does not heed
    that.
    """
    opened = pq.ParquetFile(pa.BufferReader(file), coerce_int96_timestamp_unit=INT96_UNIT)
    schema = opened.schema_arrow
    noted = (opened.metadata.metadata or {}).get(b"ARROW:schema")
    if noted is None or not any(_in_seconds(field.type) for field in schema):
        return schema
    given = {field.name: field.type for field in pa.ipc.read_schema(pa.py_buffer(base64.b64decode(noted)))}
    restored = [
        kind if (kind := _in_seconds(field.type)) and given.get(field.name) == kind else field.type for field in schema
    ]
    return pa.schema([field.with_type(kind) for field, kind in zip(schema, restored, strict=True)])


def _in_seconds(kind: pa.DataType) -> pa.DataType | None:
    """Return what milliseconds may have been before they were stored; None for other types."""
    if pa.types.is_timestamp(kind) and kind.unit == "ms":
        return pa.timestamp("s", kind.tz)
    return pa.time32("s") if kind == pa.time32("ms") else None


def _walk(nodes: Sequence[Mapping[int, Any]]) -> tuple[tuple[str, ...], tuple[range, ...]]:
    """Return the path of each leaf of a tree that is spelled node by node, and the leaves of each child of the root."""
    rest = iter(nodes)
    paths: list[str] = []

    def read_node(prefix: str, depth: int) -> None:
        node = next(rest)
        name = prefix + node[4].decode()
        if depth > _DEEPEST:
            raise _DamagedError(f"its schema is nested deeper than {_DEEPEST} levels")
        if 1 in node:
            paths.append(name)
        for _ in range(node.get(5, 0)):
            read_node(f"{name}.", depth + 1)

    leaves = []
    for _ in range(next(rest).get(5, 0)):
        first = len(paths)
        read_node("", 1)
        leaves.append(range(first, len(paths)))
    if next(rest, None) is not None:
        raise _DamagedError("its schema has nodes that belong to no column")
    return tuple(paths), tuple(leaves)


# ---------------------------------------------------------------------------------------------------------------------
# Thrift's compact protocol

_Wanted = Mapping[int, Any]
"""The fields of a struct that are wanted, by number, each with what is wanted of it if it is a struct or a list of
such; everything else is passed over."""

_RAW: _Wanted = {-1: None}
"""Stands for a list that is wanted as it is spelled."""

_ELEMENT: _Wanted = {1: {}, 4: {}, 5: {}}
_STATISTICS: _Wanted = {3: {}}
_CHUNK_FACTS: _Wanted = {1: {}, 4: {}, 5: {}, 7: {}, 9: {}, 11: {}, 12: _STATISTICS}
_CHUNK: _Wanted = {1: {}, 3: _CHUNK_FACTS}
_GROUP: _Wanted = {1: _CHUNK, 3: {}}
_FILE: _Wanted = {2: _RAW, 3: {}, 4: _GROUP, 5: _RAW, 6: {}}
"""The numbers are those of ``parquet.thrift``, where the fields are called:

* schema, num_rows, row_groups, key_value_metadata, created_by;
* of a row group: columns, num_rows;
* of a column chunk: file_path, meta_data; of this: type, codec, num_values, total_compressed_size, data_page_offset,
  dictionary_page_offset, statistics; of these: null_count;
* of a schema element: type, name, num_children.
"""

_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12

_SIMPLE_FIELDS = re.compile(
    rb"(?:[%b]|[%b][\x80-\xff]*[\x00-\x7f])*"
    % tuple(
        b"".join(re.escape(bytes([16 * step + k])) for step in range(1, 16) for k in ks) for ks in ((1, 2), (4, 5, 6))
    )
)
"""Fields that are booleans and integers: what a footer mostly consists of, passed over in one go."""


def _read_struct(data: bytes, pos: int, wanted: _Wanted, depth: int) -> tuple[dict[int, Any], int]:
    """Read a struct; return what is wanted of it by number of the field, and the place after it."""
    if depth > _DEEPEST:
        raise _DamagedError(f"its footer is nested deeper than {_DEEPEST} levels")
    fields: dict[int, Any] = {}
    number, last = 0, next(reversed(wanted), 0)
    value: Any
    while number < last and (kind := data[pos] & 15):
        step = data[pos] >> 4
        pos += 1
        if step:
            number += step
        else:
            number, pos = _read_integer(data, pos)
        if number in fields:
            raise _DamagedError(f"its footer says field {number} twice")
        if number not in wanted:
            if kind == _BINARY and data[pos] < 128:
                pos += data[pos] + 1
            elif kind not in _BOOLEANS:
                pos = _skip_value(data, pos, kind, depth)
        elif 4 <= kind <= 6:
            value = data[pos]
            if value < 128:  # most are: no function is called for these
                fields[number] = (value >> 1) ^ -(value & 1)
                pos += 1
            else:
                fields[number], pos = _read_integer(data, pos)
        elif kind == _BINARY:
            length, pos = read_length(data, pos)
            fields[number] = data[pos : pos + length]
            pos += length
        elif kind == _STRUCT:
            fields[number], pos = _read_struct(data, pos, wanted[number], depth + 1)
        elif kind in _LISTS and wanted[number] is _RAW:
            start, pos = pos, _skip_list(data, pos, depth + 1)
            fields[number] = data[start:pos]
        elif kind in _LISTS:
            fields[number], pos = _read_list(data, pos, wanted[number], depth + 1)
        else:
            raise _DamagedError(f"its footer has a value of the wrong kind in field {number}")
    return fields, _skip_struct(data, pos, depth)


def _read_list(data: bytes, pos: int, wanted: _Wanted, depth: int) -> tuple[list[dict[int, Any]], int]:
    """Read a list of structs; return what is wanted of each, and the place after it."""
    count, kind, pos = _read_list_head(data, pos)
    if count and kind != _STRUCT:
        raise _DamagedError("its footer has a list of the wrong kind")
    structs = []
    for _ in range(count):
        struct, pos = _read_struct(data, pos, wanted, depth + 1)
        structs.append(struct)
    return structs, pos


def _read_list_head(data: bytes, pos: int) -> tuple[int, int, int]:
    count, kind = data[pos] >> 4, data[pos] & 15
    pos += 1
    if count == 15:
        count, pos = read_length(data, pos)
    if count > len(data) - pos:  # each item takes a byte
        raise _DamagedError(f"its footer claims a list of {count:,} items, more than it has bytes")
    return count, kind, pos


def _skip_struct(data: bytes, pos: int, depth: int) -> int:
    """Return the place after a struct, given any place between two of its fields."""
    if depth > _DEEPEST:
        raise _DamagedError(f"its footer is nested deeper than {_DEEPEST} levels")
    while True:
        pos = _SIMPLE_FIELDS.match(data, pos).end()  # type: ignore[union-attr] # it matches nothing, too
        head = data[pos]
        kind = head & 15
        pos += 1
        if not kind:
            return pos
        if head < 16:
            _, pos = _read_integer(data, pos)
        if kind == _BINARY and data[pos] < 128:
            pos += data[pos] + 1
        elif kind not in _BOOLEANS:
            pos = _skip_value(data, pos, kind, depth)


def _skip_list(data: bytes, pos: int, depth: int) -> int:
    if depth > _DEEPEST:
        raise _DamagedError(f"its footer is nested deeper than {_DEEPEST} levels")
    count, kind, pos = _read_list_head(data, pos)
    if kind in _BOOLEANS or (kind in _INTEGERS and data[pos : pos + count].isascii()):
        return pos + count
    for _ in range(count):
        pos = _skip_struct(data, pos, depth + 1) if kind == _STRUCT else _skip_value(data, pos, kind, depth)
    return pos


def _skip_value(data: bytes, pos: int, kind: int, depth: int) -> int:
    """Return the place after a value that is no boolean: lists spell these in another way than structs."""
    if kind in _LISTS:
        return _skip_list(data, pos, depth + 1)
    if kind == _BINARY:
        length, pos = read_length(data, pos)
        return pos + length
    if kind == _STRUCT:
        return _skip_struct(data, pos, depth + 1)
    if kind in _INTEGERS:
        return read_length(data, pos)[1]
    if kind == _BYTE:
        return pos + 1
    if kind == _DOUBLE:
        return pos + 8
    raise _DamagedError(f"its footer has a value of the unknown kind {kind}")


def _read_integer(data: bytes, pos: int) -> tuple[int, int]:
    value, pos = read_length(data, pos)
    return (value >> 1) ^ -(value & 1), pos


def read_length(data: bytes, pos: int) -> tuple[int, int]:
    """Read a number that is not negative, seven bits a byte; return it and the place after it."""
    value, shift = 0, 0
    while (byte := data[pos]) > 127:
        value |= (byte & 127) << shift
        shift += 7
        pos += 1
        if shift > 63:
            raise _DamagedError("its footer has a number of more than 64 bits")
    return value | byte << shift, pos + 1


def spell_length(value: int) -> bytes:
    """Spell a number that is not negative."""
    spelled = bytearray()
    while value > 127:
        spelled.append(value & 127 | 128)
        value >>= 7
    return bytes([*spelled, value])
