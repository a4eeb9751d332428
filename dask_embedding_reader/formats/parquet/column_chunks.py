"""The row groups in a footer, and the column chunks in these."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from dask_embedding_reader.formats.parquet.thrift import (
    BOOLEANS,
    INTEGERS,
    NUMBER,
    SMALL,
    STRUCT,
    DamagedError,
    Wanted,
    decode_integers,
    encode_list_head,
    encode_structs,
    encode_varint,
    match_binaries,
    match_heads,
    match_lists,
    match_maybe,
    read_integer,
    read_list_head,
    read_struct,
    read_varint,
    skip_struct,
)


class EncryptedError(Exception):
    """A column chunk is encrypted."""


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


class RowGroups(NamedTuple):
    """The row groups of a footer: how many rows they have, and where they and their column chunks are in it.

    What is said of a chunk is read when it is asked for: most are never, or in a few row groups only.
    """

    start: int
    """Where their list begins."""
    rows: tuple[int, ...]
    """The rows of each."""
    places: array[int]
    """Where each begins, and each column chunk in it; and where the last one ends."""
    with_nulls: frozenset[int]
    """The leaves that hold nulls somewhere, or may, as the writer does not say."""
    odd: frozenset[int]
    """The leaves of which nothing is known so far, as not all of their chunks are encoded as nearly all are."""

    @property
    def nbytes(self) -> int:
        """Roughly the memory that they take."""
        return 40 * len(self.rows) + self.places.itemsize * len(self.places) + 60 * len(self.with_nulls | self.odd)

    @property
    def stop(self) -> int:
        """Where the last one ends."""
        return self.places[-1]

    @property
    def _step(self) -> int:
        return (len(self.places) - 1) // len(self.rows)

    def select(self, data: bytes, groups: Sequence[int]) -> list[bytes]:
        """Return some row groups of a footer as they are encoded."""
        return [data[self.places[group * self._step] : self.places[(group + 1) * self._step]] for group in groups]

    def read_chunks(self, data: bytes, leaf: int, groups: Sequence[int], data_nbytes: int) -> list[Chunk]:
        """Read what a footer says of the chunks of a leaf in some row groups of a file with so many bytes of data."""
        encoded = [_read_facts(data, self.places[group * self._step + 1 + leaf], group) for group in groups]
        numbers = iter(decode_integers(b"".join(encoded)))
        facts_of_all = zip(*[numbers] * _FACTS, strict=True)
        return [_chunk(facts, group, data_nbytes) for facts, group in zip(facts_of_all, groups, strict=True)]

    def read_plain_nbytes(self, data: bytes, leaf: int, group: int) -> int:
        """Read how large a footer says that a chunk is before it is compressed; 0 where it does not say."""
        column, _ = read_struct(data, self.places[group * self._step + 1 + leaf], {3: {6: {}}}, 0)
        nbytes: int = column.get(3, {}).get(6, 0)
        return max(0, nbytes)

    def read_index_place(self, data: bytes, leaf: int, group: int) -> tuple[int, int]:
        """Read where a footer says that the offset index of a chunk is; two equal places where there is none."""
        column, _ = read_struct(data, self.places[group * self._step + 1 + leaf], {4: {}, 5: {}}, 0)
        start: int = column.get(4, 0)
        return start, start + int(column.get(5, 0))


def read_groups(data: bytes, pos: int, leaves: int) -> tuple[RowGroups, int]:
    """Read the list of row groups of a footer that has so many leaves; return it and the place after it."""
    count, kind, first = read_list_head(data, pos)
    if count and kind != STRUCT:
        raise DamagedError("its footer has a list of the wrong kind")
    start, pos = pos, first
    places, rows = array("I"), []
    with_nulls: set[int] = set()
    odd: set[int] = set()
    place, match_chunk, match_rest = places.append, _patterns().chunk, _patterns().rest
    is_long = [False] * leaves  # what is tried first: the chunks of one column are mostly alike
    begin = b"\x19" + encode_list_head(leaves)
    for index in range(count):
        place(pos)
        if data.startswith(begin, pos):
            pos += len(begin)
        else:  # damaged, or a number that is not encoded as short as can be
            columns, kind, after = read_list_head(data, pos + 1)
            if data[pos] != begin[0] or columns != leaves or (columns and kind != STRUCT):
                raise DamagedError(f"row group {index} has {columns} column chunks where {leaves} were expected")
            pos = after
        may_be_null = []
        for leaf, was_long in enumerate(is_long):
            place(pos)
            match = None if was_long else match_chunk(data, pos)
            if match:
                nulls, pos = match[_FACTS], match.end()
            elif long := _match_long(data, pos):
                is_long[leaf] = True
                _, nulls, pos = long
            elif match := match_chunk(data, pos):  # a group of nulls has no texts
                nulls, pos = match[_FACTS], match.end()
            else:
                odd.add(leaf)
                pos = skip_struct(data, pos, 0)
                continue
            if nulls != b"\0":
                may_be_null.append(leaf)
        if match := match_rest(data, pos):
            rows.append(read_integer(match[1], 0)[0])
            pos = match.end()
        else:
            fields, pos = read_struct(data, pos, {3: {}}, 0, number=1)
            rows.append(fields[3])
        if rows[-1]:  # a group of no rows has no statistics either
            with_nulls.update(may_be_null)
    place(pos)
    return RowGroups(start, tuple(rows), places, frozenset(with_nulls - odd), frozenset(odd)), pos


def keep_chunks(group: bytes, kept: Collection[int]) -> bytes:
    """Encode a row group that was read already, with some of its column chunks."""
    count, _, pos = read_list_head(group, 1)
    chunks = []
    for leaf in range(count):
        start, pos = pos, skip_struct(group, pos, 0)
        if leaf in kept:
            chunks.append(group[start:pos])
    return b"\x19" + encode_structs(chunks) + group[pos:]


# ---------------------------------------------------------------------------------------------------------------------
# Column chunks

_FACTS = 7
"""Of a chunk: type, codec, number of values, size, place of its data pages and of its dictionary, number of nulls; each
is an integer, as it is encoded, -1 for those that are not told."""

_NOT_TOLD = b"\x01"

_CHUNK: Wanted = {1: {}, 3: {1: {}, 4: {}, 5: {}, 7: {}, 9: {}, 11: {}, 12: {3: {}}}, 8: {}}
"""file_path, meta_data, crypto_metadata; of meta_data: type, codec, num_values, total_compressed_size,
data_page_offset, dictionary_page_offset, statistics; of these: null_count."""


def _read_facts(data: bytes, pos: int, index: int) -> bytes:
    if match := _patterns().chunk(data, pos):
        return b"".join(match.groups(_NOT_TOLD))
    if long := _match_long(data, pos):
        return b"".join([*long[0].groups(_NOT_TOLD)[:-1], long[1] or _NOT_TOLD])
    column, pos = read_struct(data, pos, _CHUNK, 0)
    if column.get(1):
        raise DamagedError(f"row group {index} is said to be in another file, {column[1]!r}")
    if 3 not in column or 8 in column:
        raise EncryptedError
    said = column[3]
    statistics = said.get(12, {})
    numbers = said.get(1, -1), said.get(4, -1), said[5], said[7], said[9], said.get(11, -1), statistics.get(3, -1)
    return b"".join(encode_varint((number << 1) ^ (number >> 63)) for number in numbers)


def _match_long(data: bytes, pos: int) -> tuple[re.Match[bytes], bytes | None, int] | None:
    """Match a chunk whose statistics hold long texts.

    Return the match of what is before the first one, how the number of nulls is encoded, and the place after the chunk.
    """
    patterns = _patterns()
    match = before = patterns.to_texts(data, pos)
    nulls = None
    while match:
        nulls = nulls or match["nulls"]
        pos = _skip_text(data, match.end())
        if data[pos] == 0x18:  # the smallest value, behind the largest
            pos = _skip_text(data, pos + 1)
        if rest := patterns.after_texts(data, pos):
            return before, nulls or rest["nulls"], rest.end()
        match = patterns.between_texts(data, pos)
    return None


def _skip_text(data: bytes, pos: int) -> int:
    if (length := data[pos]) < 128:
        return pos + 1 + length
    if (more := data[pos + 1]) < 128:
        return pos + 2 + (length & 127 | more << 7)
    length, pos = read_varint(data, pos)
    return pos + length


def _chunk(facts: tuple[int, ...], index: int, data_nbytes: int) -> Chunk:
    kind, codec, values, nbytes, start, dictionary, nulls = facts
    if 0 < dictionary < start:  # some old writers put 0 for "no dictionary page"
        start = dictionary
    if not 0 <= start <= start + nbytes <= data_nbytes:
        raise DamagedError(
            f"row group {index} is said to be at bytes {start:,} to {start + nbytes:,}, but the data of the file ends "
            f"at {data_nbytes:,}"
        )
    if values < 0:
        raise DamagedError(f"a column of row group {index} is said to hold {values} values")
    known_nulls = nulls if 0 <= nulls <= values else None  # polars 1.19 counts wrongly
    return Chunk(start, start + nbytes, values, known_nulls, kind, codec)


class _Patterns(NamedTuple):
    """What matches column chunks as nearly all writers encode them, each at a place in some bytes."""

    chunk: Any
    """A whole column chunk."""
    rest: Any
    """What follows the chunks of a row group."""
    to_texts: Any
    """A column chunk up to the length of a largest value."""
    between_texts: Any
    """What is between the smallest value and the length of the largest, which are told twice."""
    after_texts: Any
    """The rest of the chunk, after the smallest value."""


@lru_cache(maxsize=1)  # it takes 10 ms
def _patterns() -> _Patterns:
    """Return the patterns.

    A chunk takes 0.8 us so, as long as in pyarrow, and 10 us where it is read field by field, as everything that
    differs is. What matches is all that the bytes can mean: each alternative tells itself by its first byte. Patterns
    know no texts of more than 127 bytes; where the statistics hold such, others match what is around them, in 2 us.
    """
    number, small = b"(%b)" % NUMBER, b"(%b)" % SMALL
    text = match_binaries([8, 4, *(n for n in range(128) if n not in (8, 4))])
    any_integer = match_heads(*INTEGERS) + NUMBER
    # max, min, of which duckdb leaves out empty ones; null_count
    nulls = rb"(?P<nulls>%b)" % NUMBER
    counts = rb"(?:\x18%b(?:\x18%b\x16|\x26)|\x28%b\x16|\x36)" % (text, text, text) + nulls
    distinct = match_maybe(rb"\x16" + NUMBER)
    extremes = match_maybe(rb"[\x18\x28]%b\x18%b" % (text, text))  # max_value, min_value
    # Whether these are exact; nan_count.
    exactness = match_heads(*BOOLEANS) + rb"{0,2}" + match_maybe(any_integer) + rb"\x00"
    page_counts = match_lists(STRUCT, rb"\x15%b\x15%b\x15%b\x00" % (SMALL, SMALL, NUMBER), 4)
    histogram = match_lists(6, NUMBER, 8)
    size_statistics = [
        match_maybe(rb"\x16" + NUMBER),
        match_maybe(rb"[\x19\x29]" + histogram),
        match_maybe(rb"[\x19\x29\x39]" + histogram),
        rb"\x00",
    ]
    head = [
        rb"\x26%b\x1c" % NUMBER,  # file_offset; meta_data
        rb"\x15%b\x19%b" % (small, match_lists(5, SMALL, 6)),  # type; encodings
        rb"\x19%b\x15%b" % (match_lists(8, match_binaries(range(64)), 4), small),  # path_in_schema; codec
        rb"\x16%b\x16%b\x16%b" % (number, NUMBER, number),  # num_values; total_(un)compressed_size
        rb"(?:\x26|\x19[\x00\x0c]\x16)" + number,  # no notes; data_page_offset
        match_maybe(rb"\x26" + number),  # dictionary_page_offset, group 6
    ]
    tail = [
        match_maybe(rb"[\x19\x29\x49]" + page_counts),  # encoding_stats
        match_maybe(rb"[\x16\x26\x36\x56]" + NUMBER) + match_maybe(rb"\x15" + NUMBER),  # bloom_filter_offset, _length
        match_maybe(rb"[\x1c\x2c\x3c\x4c\x5c\x7c]" + b"".join(size_statistics)) + rb"\x00",
        # Where the indices of pages are.
        rb"(?:\x00|%b%b%b%b\x00)" % (any_integer, *3 * [match_maybe(any_integer)]),
    ]
    # total_byte_size, num_rows; file_offset, total_compressed_size, ordinal
    rest = rb"\x16%b\x16%b" % (NUMBER, number) + match_maybe(any_integer) * 3 + rb"\x00"
    begin = rb"(?(6)\x1c|\x3c)"
    parts = (
        [*head, match_maybe(begin + match_maybe(counts) + distinct + extremes + exactness), *tail],
        [rest],
        # The long ones are max_value and min_value, or max and min, with null_count behind them.
        [*head, begin, rb"(?:%b%b[\x18\x28]|\x18)" % (counts, distinct)],
        [rb"[\x16\x26]", nulls, distinct, rb"[\x18\x28]"],
        [match_maybe(rb"[\x16\x26]" + nulls), distinct, extremes, exactness, *tail],
    )
    return _Patterns(*(re.compile(b"".join(each), re.DOTALL).match for each in parts))
