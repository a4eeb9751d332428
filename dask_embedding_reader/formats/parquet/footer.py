"""The footer of a parquet file, read from its bytes (Thrift's compact protocol), trusting none of them.

pyarrow tells of column chunks through bindings that let no C++ exception pass: one wrong byte there ends the process.
So what has to be known before rows are decoded is taken from the bytes here. pyarrow translates the schema, once for
all files that have the same, and sees the row groups that it decodes, where its exceptions do arrive.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.storage.retries import describe

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
    """How many of these are null; None where the writer did not say, or what cannot be."""
    kind: int
    """Their physical type, by its number in ``parquet.thrift``; -1 where the writer did not say."""
    codec: int
    """How its pages are compressed; 0 for not at all, -1 where the writer did not say."""


class Schema(NamedTuple):
    """The columns of a file."""

    names: tuple[str, ...]
    """All columns."""
    paths: tuple[str, ...]
    """The path of each leaf, with dots."""
    arrow: pa.Schema
    """As Arrow types: all columns, or those that were asked for where pyarrow has no type for one of the others."""
    leaves: tuple[range, ...]
    """The leaves of each column of ``arrow``."""
    elements: bytes | None = None
    """How the columns of ``arrow`` are spelled, where these are not all."""
    key_values: bytes = b""
    """The same of what the writer noted of them."""


class Footer(NamedTuple):
    """What the footer of one file says."""

    data: bytes
    """The end of the file, from the footer on."""
    schema: Schema
    """Its columns."""
    writer: str
    """Who wrote it."""
    group_rows: tuple[int, ...]
    """The rows of each row group."""
    chunks: Mapping[int, tuple[Chunk, ...]]
    """For each leaf that was asked for, its chunk in each row group."""
    groups: tuple[int, ...]
    """Where in ``data`` the list of row groups is, where each of these is, and where the last one ends."""

    @property
    def nbytes(self) -> int:
        """Roughly the memory that it takes."""
        return len(self.data) + 80 * len(self.group_rows) + sum(350 * len(chunks) for chunks in self.chunks.values())

    def select(self, groups: Sequence[int]) -> bytes:
        """Spell a footer of some of the row groups, with what pyarrow expects around it.

        pyarrow takes 0.5 us and some 700 bytes for each column chunk in it, wanted or not.
        """
        start, *places = self.groups
        spelled = [self.data[places[group] : places[group + 1]] for group in groups]
        if self.schema.elements is None:
            footer = self.data[:start] + _spell_list(spelled) + self.data[places[-1] : -8]
        else:
            kept = [leaf for leaves in self.schema.leaves for leaf in leaves]
            footer = _spell_footer(
                self.schema.elements, [_keep_chunks(group, kept) for group in spelled], self.schema.key_values
            )
        return _as_file(footer)


class _DamagedError(Exception):
    """What is wrong with a footer."""


class _EncryptedError(Exception):
    """What of it is encrypted."""


def parse_footer(url: str, data: bytes, data_nbytes: int, columns: Collection[str] | None = None) -> Footer:
    """Read a footer.

    Parameters
    ----------
    url
        The file, for messages.
    data
        The end of the file: the footer, its length in four bytes, and ``PAR1``.
    data_nbytes
        How many bytes of the file are before that.
    columns
        The columns whose chunks are wanted; by default all. Others are passed over: what is wrong with them, too.

    Raises
    ------
    FormatError
        If it is damaged.
    """
    try:
        return _parse(data, data_nbytes, columns)
    except _DamagedError as error:
        reason = f"damaged: {error}; write the file again"
    except _EncryptedError as error:
        reason = f"{error} is encrypted, which cannot be read; write the file again without encryption"
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"its parquet footer cannot be read: {describe(error)}; write the file again"
    except Exception:  # noqa: BLE001 - a field is missing, of another kind, or the bytes end before it does
        reason = "its parquet footer cannot be read: what it should say is missing or garbled; write the file again"
    raise FormatError(f"{url}: {reason}")


def _parse(data: bytes, data_nbytes: int, columns: Collection[str] | None) -> Footer:
    def read_groups(pos: int, facts: Mapping[int, Any]) -> tuple[_Groups, int]:
        _, paths, leaves = _tree(facts[2])
        if columns is None:
            return _read_groups(data, pos, paths, range(len(paths)), data_nbytes)
        # Like pyarrow, which also takes the column `a.b` for a part of `a`.
        starts = tuple(f"{name}." for name in columns)
        wanted = [leaf for leaf in chain(*leaves) if f"{paths[leaf]}.".startswith(starts)] if starts else []
        return _read_groups(data, pos, paths, wanted, data_nbytes)

    facts, _ = _read_struct(data, 0, {2: _RAW, 3: {}, 4: read_groups, 5: _RAW, 6: {}}, 0)
    total = facts[3]
    groups = facts[4] if 4 in facts else _Groups((), {}, (len(data),))
    # Some writers leave the rows of the file at 0.
    if min(groups.rows, default=0) < 0 or total not in (0, sum(groups.rows)):
        raise _DamagedError(f"it promises {total:,} rows, its row groups {sum(groups.rows):,}")
    key_values, writer = facts.get(5, b""), facts.get(6, b"")
    try:
        schema = _whole_schema(facts[2], key_values, writer)
    except (pa.ArrowException, OSError):
        if columns is None:
            raise
        for name in columns:  # one after the other, to say which it is
            try:
                _partial_schema(facts[2], key_values, frozenset([name]))
            except (pa.ArrowException, OSError) as error:
                raise _DamagedError(f"pyarrow cannot tell the type of column {name!r}: {describe(error)}") from error
        schema = _partial_schema(facts[2], key_values, frozenset(columns))
    return Footer(data, schema, writer.decode(errors="replace"), groups.rows, groups.chunks, groups.places)


class _Groups(NamedTuple):
    rows: tuple[int, ...]
    chunks: dict[int, tuple[Chunk, ...]]
    places: tuple[int, ...]


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
    """What a page of data, or of the dictionary that these refer to, says of itself."""

    nbytes: int
    """Its size in the file, without this header."""
    values: int
    """The items in it, nulls included."""
    encoding: int
    """How they are encoded; 0 for plainly."""
    plain_nbytes: int
    """Its size when it is no more compressed."""
    is_dictionary: bool = False
    """Whether it is the dictionary."""
    checksum: int | None = None
    """The CRC-32 of what is in the file."""
    rows: int | None = None
    """The vectors that begin in it; pages of the first version do not tell."""
    levels: tuple[int, int] | None = None
    """The bytes of its levels of repetition and definition, which version 2 never compresses; these come first."""
    is_compressed: bool = True
    """Whether the others are, where any are."""


PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY = 0, 2, 3, 8
"""Encodings of items and of levels, by their numbers in ``parquet.thrift``."""


def read_raw_footer(file: bytes) -> RawFooter:
    """Read the footer of a whole file that was written by pyarrow just now."""
    start = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    wanted: _Wanted = {1: {}, 2: _RAW, 4: {1: _RAW, 2: {}, 6: {}}, 5: _RAW, 6: {}, 7: _RAW}
    facts, _ = _read_struct(file, start, wanted, 0)
    groups = [RawGroup(group[1], group[2], group.get(6, group[2])) for group in facts.get(4, [])]
    return RawFooter(start, facts[1], facts[2], facts.get(5, b""), facts[6], facts.get(7, b""), groups)


def page_header(data: bytes | memoryview) -> tuple[PageHeader, int] | None:
    """Read the header of a page, and how long it is; None if it is of another kind, or wrong.

    Nor is one wanted whose levels are encoded in the way of old.
    """
    try:
        facts, nbytes = _read_struct(bytes(data), 0, _PAGE, 0)
        kind, plain_nbytes, stored_nbytes = facts[1], facts[2], facts[3]
        checksum = facts.get(4)
        said = facts[_PAGE_KINDS[kind]]
        if kind == _DATA_PAGE_2:
            page = PageHeader(
                stored_nbytes, said[1], said[4], plain_nbytes, False, checksum, said[3], (said[6], said[5]),
                said.get(7, True),
            )  # fmt: skip
            numbers = *page[:4], said[2], page.rows, *(page.levels or ())
            is_right = said[2] == 0 and said[5] + said[6] <= min(stored_nbytes, plain_nbytes)
        else:
            page = PageHeader(stored_nbytes, said[1], said[2], plain_nbytes, kind == _DICTIONARY_PAGE, checksum)
            numbers = page[:4]
            is_right = page.is_dictionary or (said[3], said[4]) == (RLE, RLE)
    except Exception:  # noqa: BLE001 - whatever may be wrong with it, pyarrow says what
        return None
    if not is_right or not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        return None
    return page, nbytes


_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_2 = 0, 2, 3
_PAGE_KINDS = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_2: 8}
"""The fields of a page's header that tell more, by its kind."""


class PageHead(NamedTuple):
    """How much memory a page takes that is decoded."""

    nbytes: int
    """Its size when it is no more compressed."""
    values: int
    """The items in it, nulls included; 0 in a dictionary."""
    encoding: int
    """How they are encoded."""


def iter_page_heads(file: bytes, start: int, stop: int) -> Iterator[PageHead]:
    """Yield what the pages of a column chunk claim, without decoding them; any error means that it is damaged."""
    page: _Wanted = {1: {}, 2: {}, 4: {}}
    while start < stop:
        facts, body = _read_struct(file, start, {1: {}, 2: {}, 3: {}, 5: page, 7: page, 8: page}, 0)
        nbytes, stored = facts[2], facts[3]
        numbers = facts.get(5) or facts.get(8) or facts[7]
        values, encoding = numbers[1], numbers[4] if 8 in facts else numbers[2]
        if min(nbytes, stored, values) < 0 or body + stored > stop:
            raise _DamagedError("a page is larger than its column chunk")
        yield PageHead(nbytes, 0 if 7 in facts else values, encoding)
        start = body + stored


def _read_groups(
    data: bytes, pos: int, paths: Sequence[str], wanted: Sequence[int], data_nbytes: int
) -> tuple[_Groups, int]:
    """Read the list of row groups: of the column chunks those of some leaves, the others are passed over."""
    count, kind, first = _read_list_head(data, pos)
    if count and kind != _STRUCT:
        raise _DamagedError("its footer has a list of the wrong kind")
    places, pos = [pos], first
    rows: list[int] = []
    facts: dict[int, list[bytes]] = {leaf: [] for leaf in wanted}
    patterns = _patterns()
    match_chunk, match_rest = patterns.chunk, patterns.rest
    is_long = [False] * len(paths)  # what is tried first: the chunks of one column are mostly alike
    begin = b"\x19" + _spell_list_head(len(paths))
    for index in range(count):
        places.append(pos)
        if data.startswith(begin, pos):
            pos += len(begin)
        else:  # damaged, or a number that is not spelled as short as can be
            columns, kind, after = _read_list_head(data, pos + 1)
            if data[pos] != begin[0] or columns != len(paths) or (columns and kind != _STRUCT):
                raise _DamagedError(f"row group {index} has {columns} column chunks where {len(paths)} were expected")
            pos = after
        for leaf, was_long in enumerate(is_long):
            match = None if was_long else match_chunk(data, pos)
            if match is None:
                is_long[leaf] = not was_long
            if leaf not in facts:
                pos = match.end() if match else _skip_chunk(data, pos, index)
                continue
            try:
                spelled, pos = (_facts_of(match), match.end()) if match else _read_chunk(data, pos, index)
            except _EncryptedError as error:
                raise _EncryptedError(f"column {paths[leaf]!r}") from error
            facts[leaf].append(spelled)
        if match := match_rest(data, pos):
            rows.append(_read_integer(match[1], 0)[0])
            pos = match.end()
        else:
            fields, pos = _read_struct(data, pos, {3: {}}, 0, number=1)
            rows.append(fields[3])
    places.append(pos)
    numbers = iter(_decode_integers(b"".join(chain.from_iterable(facts.values()))))
    facts_of_all = zip(*[numbers] * _FACTS, strict=True)
    chunks = {leaf: tuple(_chunk(next(facts_of_all), index, data_nbytes) for index in range(count)) for leaf in facts}
    return _Groups(tuple(rows), chunks, tuple(places)), pos


_FACTS = 7
"""Of a chunk: type, codec, number of values, size, place of its data pages and of its dictionary, number of nulls; each
is an integer, as it is spelled, -1 for those that are not told."""

_NOT_TOLD = b"\x01"


def _facts_of(match: re.Match[bytes]) -> bytes:
    return b"".join(match.groups(_NOT_TOLD))


def _match_long(data: bytes, pos: int) -> tuple[re.Match[bytes], int] | None:
    """Match a chunk whose statistics hold long texts; return it as far as these, and the place after the chunk."""
    patterns = _patterns()
    if match := patterns.to_texts(data, pos):
        pos = _skip_text(data, match.end())
        if data[pos] == 0x18 and (rest := patterns.after_texts(data, _skip_text(data, pos + 1))):  # min_value
            return match, rest.end()
    return None


def _skip_text(data: bytes, pos: int) -> int:
    if (length := data[pos]) < 128:
        return pos + 1 + length
    if (more := data[pos + 1]) < 128:
        return pos + 2 + (length & 127 | more << 7)
    length, pos = read_length(data, pos)
    return pos + length


def _read_chunk(data: bytes, pos: int, index: int) -> tuple[bytes, int]:
    """Read a chunk that is not spelled as nearly all are."""
    if found := _match_long(data, pos):
        return _facts_of(found[0]), found[1]
    column, pos = _read_struct(data, pos, _CHUNK, 0)
    _check_place(column, index)
    if 3 not in column or 8 in column:
        raise _EncryptedError
    facts = column[3]
    nulls = facts[12].get(3, -1) if 12 in facts else -1
    numbers = facts.get(1, -1), facts.get(4, -1), facts[5], facts[7], facts[9], facts.get(11, -1), nulls
    return b"".join(spell_length((number << 1) ^ (number >> 63)) for number in numbers), pos


def _skip_chunk(data: bytes, pos: int, index: int) -> int:
    if found := _match_long(data, pos):
        return found[1]
    column, pos = _read_struct(data, pos, {1: {}}, 0)
    _check_place(column, index)
    return pos


def _check_place(column: Mapping[int, Any], index: int) -> None:
    if column.get(1):
        raise _DamagedError(f"row group {index} is said to be in another file, {column[1]!r}")


def _chunk(facts: tuple[int, ...], index: int, data_nbytes: int) -> Chunk:
    kind, codec, values, nbytes, start, dictionary, nulls = facts
    if 0 < dictionary < start:  # some old writers put 0 for "no dictionary page"
        start = dictionary
    if not 0 <= start <= start + nbytes <= data_nbytes:
        raise _DamagedError(
            f"row group {index} is said to be at bytes {start:,} to {start + nbytes:,}, but the data of the file ends "
            f"at {data_nbytes:,}"
        )
    if values < 0:
        raise _DamagedError(f"a column of row group {index} is said to hold {values} values")
    known_nulls = nulls if 0 <= nulls <= values else None  # polars 1.19 counts wrongly
    return Chunk(start, start + nbytes, values, known_nulls, kind, codec)


def _keep_chunks(group: bytes, kept: Collection[int]) -> bytes:
    """Spell a row group that was read already, with some of its column chunks."""
    count, _, pos = _read_list_head(group, 1)
    chunks = []
    for leaf in range(count):
        start, pos = pos, _skip_struct(group, pos, 0)
        if leaf in kept:
            chunks.append(group[start:pos])
    return b"\x19" + _spell_list(chunks) + group[pos:]


# ---------------------------------------------------------------------------------------------------------------------
# The schema


@lru_cache(maxsize=64)  # the files of a collection mostly have one schema
def _whole_schema(elements: bytes, key_values: bytes, writer: bytes) -> Schema:
    """Read the lists of schema elements and of key-value pairs, as the footer spells them."""
    names, paths, leaves = _tree(elements)
    arrow = _read_arrow(_spell_footer(elements, [], key_values, writer))
    if len(arrow.names) != len(leaves):
        raise _DamagedError(f"its schema has {len(leaves)} columns, but {len(arrow.names)} as Arrow types")
    return Schema(names, paths, arrow, leaves)


@lru_cache(maxsize=64)
def _partial_schema(elements: bytes, key_values: bytes, columns: frozenset[str]) -> Schema:
    """Read some columns, where pyarrow has no type for one of the others."""
    names, paths, leaves = _tree(elements)
    count, _, pos = _read_list_head(elements, 0)
    places = [pos]
    for _ in range(count):
        places.append(_skip_struct(elements, places[-1], 0))
    nodes, _ = _read_list(elements, 0, _ELEMENT, 0)
    stops = [1]  # of each column, the element after its last one
    for _ in names:
        stops.append(_end_of_node(nodes, stops[-1]))
    kept = [position for position, name in enumerate(names) if name in columns]
    if not kept:
        return Schema(names, paths, pa.schema([]), ())
    root = b"\x48\x06schema\x15" + spell_length(2 * len(kept)) + b"\0"
    spelled = [root]
    for position in kept:
        spelled += [elements[places[node] : places[node + 1]] for node in range(stops[position], stops[position + 1])]
    elements = _spell_list(spelled)
    key_values = _keep_noted(key_values, len(names), kept)
    arrow = _read_arrow(_spell_footer(elements, [], key_values))
    return Schema(names, paths, arrow, tuple(leaves[position] for position in kept), elements, key_values)


def _end_of_node(nodes: Sequence[Mapping[int, Any]], node: int) -> int:
    """Return the node after one of a tree that is spelled node by node, and after all that is below it."""
    left = 1
    while left:
        left += nodes[node].get(5, 0) - 1
        node += 1
    return node


def _keep_noted(key_values: bytes, count: int, kept: Sequence[int]) -> bytes:
    """Of what the writer noted keep the Arrow types of some columns: pyarrow finds these by position."""
    noted = _read_list(key_values, 0, {1: {}, 2: {}}, 0)[0] if key_values else []
    given = next((pair[2] for pair in noted if pair[1] == b"ARROW:schema"), None)
    if given is None:
        return b""
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(given)))
    if len(schema) != count:
        return b""
    value = base64.b64encode(pa.schema([schema.field(position) for position in kept]).serialize())
    pair = b"\x18\x0cARROW:schema\x18" + spell_length(len(value)) + value + b"\0"
    return _spell_list([pair])


def _read_arrow(footer: bytes) -> pa.Schema:
    return arrow_schema(_as_file(footer))


def _spell_footer(elements: bytes, groups: Sequence[bytes], key_values: bytes, writer: bytes = b"") -> bytes:
    """Spell a footer: version 2, schema, 0 rows, row groups, and what the writer noted."""
    footer = b"\x15\x04\x19" + elements + b"\x16\x00\x19" + _spell_list(groups)
    footer += b"\x19" + key_values if key_values else b""
    if writer:
        footer += (b"\x18" if key_values else b"\x28") + spell_length(len(writer)) + writer
    return footer + b"\0"


def _as_file(footer: bytes) -> bytes:
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


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


@lru_cache(maxsize=64)
def _tree(elements: bytes) -> tuple[tuple[str, ...], tuple[str, ...], tuple[range, ...]]:
    """Return the columns of a tree that is spelled node by node, each leaf's path, and the leaves of each column."""
    nodes, _ = _read_list(elements, 0, _ELEMENT, 0)
    rest = iter(nodes)
    paths: list[str] = []

    def read_node(prefix: str, depth: int) -> str:
        node = next(rest)
        name: str = node[4].decode()
        if depth > _DEEPEST:
            raise _DamagedError(f"its schema is nested deeper than {_DEEPEST} levels")
        if 1 in node:
            paths.append(prefix + name)
        for _ in range(node.get(5, 0)):
            read_node(f"{prefix}{name}.", depth + 1)
        return name

    names, leaves = [], []
    for _ in range(next(rest).get(5, 0)):
        first = len(paths)
        names.append(read_node("", 1))
        leaves.append(range(first, len(paths)))
    if next(rest, None) is not None:
        raise _DamagedError("its schema has nodes that belong to no column")
    return tuple(names), tuple(paths), tuple(leaves)


# ---------------------------------------------------------------------------------------------------------------------
# Thrift's compact protocol

_Wanted = Mapping[int, Any]
"""The fields of a struct that are wanted, by number, each with what is wanted of it if it is a struct or a list of
such, or with what reads it; everything else is passed over."""

_RAW: _Wanted = {-1: None}
"""Stands for a list that is wanted as it is spelled."""

_FLAG: _Wanted = {-2: None}
"""Stands for a boolean."""

_ELEMENT: _Wanted = {1: {}, 4: {}, 5: {}}
_STATISTICS: _Wanted = {3: {}}
_CHUNK_FACTS: _Wanted = {1: {}, 4: {}, 5: {}, 7: {}, 9: {}, 11: {}, 12: _STATISTICS}
_CHUNK: _Wanted = {1: {}, 3: _CHUNK_FACTS, 8: {}}
_PAGE: _Wanted = {
    1: {},
    2: {},
    3: {},
    4: {},
    5: {1: {}, 2: {}, 3: {}, 4: {}},
    7: {1: {}, 2: {}},
    8: {1: {}, 2: {}, 3: {}, 4: {}, 5: {}, 6: {}, 7: _FLAG},
}
"""The numbers are those of ``parquet.thrift``, where the fields are called:

* of the file: schema (2), num_rows, row_groups, key_value_metadata, created_by;
* of a row group: columns (1), total_byte_size, num_rows;
* of a column chunk: file_path, meta_data, crypto_metadata; of meta_data: type, codec, num_values,
  total_compressed_size, data_page_offset, dictionary_page_offset, statistics; of these: null_count;
* of a page: type, uncompressed_page_size, compressed_page_size, crc, data_page_header, dictionary_page_header,
  data_page_header_v2; of the first: num_values, encoding and those of the levels; of the second: num_values, encoding;
  of the last: num_values, num_nulls, num_rows, encoding, the bytes of levels of definition and of repetition,
  is_compressed;
* of a schema element: type, name, num_children.
"""

_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


def _heads(*kinds: int) -> bytes:
    """Return a pattern of the first byte of fields of some kinds."""
    return b"[%b]" % b"".join(re.escape(bytes([16 * step + kind])) for step in range(1, 16) for kind in kinds)


def _maybe(pattern: bytes) -> bytes:
    return b"(?:%b|)" % pattern  # three times as fast as `(?:...)?`


def _binaries(lengths: Iterable[int]) -> bytes:
    return b"(?:%b)" % b"|".join(re.escape(bytes([length])) + b".{%d}" % length for length in lengths)


def _lists(kind: int, item: bytes, most: int) -> bytes:
    return b"(?:%b)" % b"|".join(re.escape(bytes([16 * count + kind])) + item * count for count in range(most + 1))


_NUMBER = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_SMALL = rb"[\x00-\x7f]"

_SIMPLE_FIELDS = re.compile(
    rb"(?:%b|%b%b|%b%b)*" % (_heads(*_BOOLEANS), _heads(*_INTEGERS), _NUMBER, _heads(_BINARY), _binaries(range(64))),
    re.DOTALL,
)
"""Fields that are booleans, integers and short texts: what a footer mostly consists of, passed over in one go."""


class _Patterns(NamedTuple):
    """What matches column chunks as nearly all writers spell them, each at a place in some bytes."""

    chunk: Any
    """A whole column chunk."""
    rest: Any
    """What follows the chunks of a row group."""
    to_texts: Any
    """A column chunk up to the length of the largest value."""
    after_texts: Any
    """The rest of it, after the smallest value."""


@lru_cache(maxsize=1)  # it takes 10 ms
def _patterns() -> _Patterns:
    """Return the patterns.

    A chunk takes 0.8 us so, as long as in pyarrow, and 10 us where it is read field by field, as everything that
    differs is. What matches is all that the bytes can mean: each alternative tells itself by its first byte. Patterns
    know no texts of more than 127 bytes; where the statistics hold such, two others match what is before and behind,
    in 2 us.
    """
    number, small = b"(%b)" % _NUMBER, b"(%b)" % _SMALL
    text, any_integer = _binaries([8, 4, *(n for n in range(128) if n not in (8, 4))]), _heads(*_INTEGERS) + _NUMBER
    counts = [
        _maybe(rb"(?:\x18%b\x18%b\x16|\x36)%b" % (text, text, number)),  # max, min; null_count
        _maybe(rb"\x16" + _NUMBER),  # distinct_count
    ]
    exactness = [
        _heads(*_BOOLEANS) + rb"{0,2}",  # whether max_value and min_value are exact
        _maybe(any_integer) + rb"\x00",  # nan_count
    ]
    statistics = [*counts, _maybe(rb"[\x18\x28]%b\x18%b" % (text, text)), *exactness]  # max_value, min_value
    page_counts = _lists(_STRUCT, rb"\x15%b\x15%b\x15%b\x00" % (_SMALL, _SMALL, _NUMBER), 4)
    histogram = _lists(6, _NUMBER, 8)
    size_statistics = [
        _maybe(rb"\x16" + _NUMBER),
        _maybe(rb"[\x19\x29]" + histogram),
        _maybe(rb"[\x19\x29\x39]" + histogram),
        rb"\x00",
    ]
    head = [
        rb"\x26%b\x1c" % _NUMBER,  # file_offset; meta_data
        rb"\x15%b\x19%b" % (small, _lists(5, _SMALL, 6)),  # type; encodings
        rb"\x19%b\x15%b" % (_lists(8, _binaries(range(64)), 4), small),  # path_in_schema; codec
        rb"\x16%b\x16%b\x16%b" % (number, _NUMBER, number),  # num_values; total_(un)compressed_size
        rb"(?:\x26|\x19[\x00\x0c]\x16)" + number,  # no notes; data_page_offset
        _maybe(rb"\x26" + number),  # dictionary_page_offset, group 6
    ]
    tail = [
        _maybe(rb"[\x19\x29\x49]" + page_counts),  # encoding_stats
        _maybe(rb"[\x16\x26\x36\x56]" + _NUMBER) + _maybe(rb"\x15" + _NUMBER),  # bloom_filter_offset, _length
        _maybe(rb"[\x1c\x2c\x3c\x4c\x5c\x7c]" + b"".join(size_statistics)) + rb"\x00",
        # Where the indices of pages are.
        rb"(?:\x00|%b%b%b%b\x00)" % (any_integer, *3 * [_maybe(any_integer)]),
    ]
    # total_byte_size, num_rows; file_offset, total_compressed_size, ordinal
    rest = rb"\x16%b\x16%b" % (_NUMBER, number) + _maybe(any_integer) * 3 + rb"\x00"
    begin = rb"(?(6)\x1c|\x3c)"
    chunk = [*head, _maybe(begin + b"".join(statistics)), *tail]
    parts = chunk, [rest], [*head, begin, *counts, rb"[\x18\x28]"], [*exactness, *tail]
    return _Patterns(*(re.compile(b"".join(each), re.DOTALL).match for each in parts))


def _read_struct(data: bytes, pos: int, wanted: _Wanted, depth: int, number: int = 0) -> tuple[dict[int, Any], int]:
    """Read a struct from behind field ``number``; return what is wanted of it by number, and the place after it."""
    if depth > _DEEPEST:
        raise _DamagedError(f"its footer is nested deeper than {_DEEPEST} levels")
    fields: dict[int, Any] = {}
    last = next(reversed(wanted), 0)
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
        elif kind in _BOOLEANS and wanted[number] is _FLAG:
            fields[number] = kind == _BOOLEANS[0]
        elif kind == _BINARY:
            length, pos = read_length(data, pos)
            fields[number] = data[pos : pos + length]
            pos += length
        elif kind == _STRUCT:
            fields[number], pos = _read_struct(data, pos, wanted[number], depth + 1)
        elif kind in _LISTS and callable(wanted[number]):
            fields[number], pos = wanted[number](pos, fields)
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


_FEW_NBYTES = 2_000


def _decode_integers(spelled: bytes) -> list[int]:
    """Return the numbers that some bytes spell, one after the other, each in at most 64 bits."""
    if len(spelled) < _FEW_NBYTES:  # numpy takes 100 us for any
        numbers, pos = [], 0
        while pos < len(spelled):
            number, pos = _read_integer(spelled, pos)
            numbers.append(number)
        return numbers
    data = np.frombuffer(spelled, np.uint8)
    lengths = np.diff(np.flatnonzero(data < 128), prepend=-1)
    firsts = np.cumsum(lengths) - lengths
    values = np.zeros(len(lengths), np.uint64)
    for place in range(int(lengths.max())):
        longer = np.flatnonzero(lengths > place)
        values[longer] |= (data[firsts[longer] + place] & np.uint8(127)).astype(np.uint64) << np.uint64(7 * place)
    decoded: list[int] = ((values >> np.uint64(1)).view(np.int64) ^ -(values & np.uint64(1)).view(np.int64)).tolist()
    return decoded


def _spell_list(structs: Sequence[bytes]) -> bytes:
    return _spell_list_head(len(structs)) + b"".join(structs)


def _spell_list_head(count: int) -> bytes:
    return bytes([16 * count + _STRUCT]) if count < 15 else bytes([0xF0 + _STRUCT]) + spell_length(count)


def spell_length(value: int) -> bytes:
    """Spell a number that is not negative."""
    spelled = bytearray()
    while value > 127:
        spelled.append(value & 127 | 128)
        value >>= 7
    return bytes([*spelled, value])
