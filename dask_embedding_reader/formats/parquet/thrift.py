"""Thrift's compact protocol, in which parquet encodes its footers and headers of pages: no byte of it is trusted.

What is wanted of a struct is said by the numbers of its fields; everything else is passed over.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

DEEPEST = 64
"""Levels of nesting; Thrift's own readers stop there too."""


class DamagedError(Exception):
    """What is wrong with some bytes."""


Wanted = Mapping[int, Any]
"""The fields of a struct that are wanted, by number, each with what is wanted of it if it is a struct or a list of
such, or with what reads it; everything else is passed over."""

RAW: Wanted = {-1: None}
"""Stands for a list that is wanted as it is encoded."""

FLAG: Wanted = {-2: None}
"""Stands for a boolean."""

BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


def match_heads(*kinds: int) -> bytes:
    """Return a pattern of the first byte of fields of some kinds."""
    return b"[%b]" % b"".join(re.escape(bytes([16 * step + kind])) for step in range(1, 16) for kind in kinds)


def match_maybe(pattern: bytes) -> bytes:
    """Return a pattern of something that may be missing."""
    return b"(?:%b|)" % pattern  # three times as fast as `(?:...)?`


def match_binaries(lengths: Iterable[int]) -> bytes:
    """Return a pattern of values of type binary of some lengths below 128."""
    return b"(?:%b)" % b"|".join(re.escape(bytes([length])) + b".{%d}" % length for length in lengths)


def match_lists(kind: int, item: bytes, most: int) -> bytes:
    """Return a pattern of lists of at most so many items, below 15."""
    return b"(?:%b)" % b"|".join(re.escape(bytes([16 * count + kind])) + item * count for count in range(most + 1))


SMALL = rb"[\x00-\x7f]"
NUMBER = rb"[\x80-\xff]{0,9}" + (b"+" if sys.version_info >= (3, 11) else b"") + SMALL  # an eighth faster than without
"""Patterns of integers, and of those that take one byte."""

_SIMPLE_FIELDS = re.compile(
    rb"(?:%b|%b%b|%b%b)*"
    % (match_heads(*BOOLEANS), match_heads(*INTEGERS), NUMBER, match_heads(BINARY), match_binaries(range(64))),
    re.DOTALL,
)
"""Fields that are booleans, integers and short texts: what a footer mostly consists of, passed over in one go."""


def read_struct(data: bytes, pos: int, wanted: Wanted, depth: int, number: int = 0) -> tuple[dict[int, Any], int]:
    """Read a struct from behind field ``number``; return what is wanted of it by number, and the place after it."""
    fields: dict[int, Any] = {}
    last = next(reversed(wanted), 0)
    value: Any
    while number < last and (kind := data[pos] & 15):
        step = data[pos] >> 4
        pos += 1
        if step:
            number += step
        else:
            number, pos = read_integer(data, pos)
        if number in fields:
            raise DamagedError(f"its footer says field {number} twice")
        if number not in wanted:
            if kind == BINARY and data[pos] < 128:
                pos += data[pos] + 1
            elif kind not in BOOLEANS:
                pos = _skip_value(data, pos, kind, depth)
        elif 4 <= kind <= 6:
            value = data[pos]
            if value < 128:  # most are: no function is called for these
                fields[number] = (value >> 1) ^ -(value & 1)
                pos += 1
            else:
                fields[number], pos = read_integer(data, pos)
        elif kind in BOOLEANS and wanted[number] is FLAG:
            fields[number] = kind == BOOLEANS[0]
        elif kind == BINARY:
            length, pos = read_varint(data, pos)
            fields[number] = data[pos : pos + length]
            pos += length
        elif kind == STRUCT:
            fields[number], pos = read_struct(data, pos, wanted[number], depth + 1)
        elif kind in LISTS and callable(wanted[number]):
            fields[number], pos = wanted[number](pos, fields)
        elif kind in LISTS and wanted[number] is RAW:
            start, pos = pos, _skip_list(data, pos, depth + 1)
            fields[number] = data[start:pos]
        elif kind in LISTS:
            fields[number], pos = read_list(data, pos, wanted[number], depth + 1)
        else:
            raise DamagedError(f"its footer has a value of the wrong kind in field {number}")
    return fields, skip_struct(data, pos, depth)


def read_list(data: bytes, pos: int, wanted: Wanted, depth: int) -> tuple[list[dict[int, Any]], int]:
    """Read a list of structs; return what is wanted of each, and the place after it."""
    count, kind, pos = read_list_head(data, pos)
    if count and kind != STRUCT:
        raise DamagedError("its footer has a list of the wrong kind")
    structs = []
    for _ in range(count):
        struct, pos = read_struct(data, pos, wanted, depth + 1)
        structs.append(struct)
    return structs, pos


def read_list_head(data: bytes, pos: int) -> tuple[int, int, int]:
    """Return how many items a list has, their kind, and where the first one is."""
    count, kind = data[pos] >> 4, data[pos] & 15
    pos += 1
    if count == 15:
        count, pos = read_varint(data, pos)
    if count > len(data) - pos:  # each item takes a byte
        raise DamagedError(f"its footer claims a list of {count:,} items, more than it has bytes")
    return count, kind, pos


def skip_struct(data: bytes, pos: int, depth: int) -> int:
    """Return the place after a struct, given any place between two of its fields."""
    if depth > DEEPEST:
        raise DamagedError(f"its footer is nested deeper than {DEEPEST} levels")
    while True:
        pos = _SIMPLE_FIELDS.match(data, pos).end()  # type: ignore[union-attr] # it matches nothing, too
        head = data[pos]
        kind = head & 15
        pos += 1
        if not kind:
            return pos
        if head < 16:
            _, pos = read_integer(data, pos)
        if kind == BINARY and data[pos] < 128:
            pos += data[pos] + 1
        elif kind not in BOOLEANS:
            pos = _skip_value(data, pos, kind, depth)


def _skip_list(data: bytes, pos: int, depth: int) -> int:
    if depth > DEEPEST:
        raise DamagedError(f"its footer is nested deeper than {DEEPEST} levels")
    count, kind, pos = read_list_head(data, pos)
    if kind in BOOLEANS or (kind in INTEGERS and data[pos : pos + count].isascii()):
        return pos + count
    for _ in range(count):
        pos = skip_struct(data, pos, depth + 1) if kind == STRUCT else _skip_value(data, pos, kind, depth)
    return pos


def _skip_value(data: bytes, pos: int, kind: int, depth: int) -> int:
    """Return the place after a value that is no boolean: lists encode these in another way than structs."""
    if kind in LISTS:
        return _skip_list(data, pos, depth + 1)
    if kind == BINARY:
        length, pos = read_varint(data, pos)
        return pos + length
    if kind == STRUCT:
        return skip_struct(data, pos, depth + 1)
    if kind in INTEGERS:
        return read_varint(data, pos)[1]
    if kind == BYTE:
        return pos + 1
    if kind == DOUBLE:
        return pos + 8
    raise DamagedError(f"its footer has a value of the unknown kind {kind}")


def read_integer(data: bytes, pos: int) -> tuple[int, int]:
    """Read an integer; return it and the place after it."""
    value, pos = read_varint(data, pos)
    return (value >> 1) ^ -(value & 1), pos


def read_varint(data: bytes, pos: int) -> tuple[int, int]:
    """Read a number that is not negative, seven bits a byte; return it and the place after it."""
    value, shift = 0, 0
    while (byte := data[pos]) > 127:
        value |= (byte & 127) << shift
        shift += 7
        pos += 1
        if shift > 63:
            raise DamagedError("its footer has a number of more than 64 bits")
    return value | byte << shift, pos + 1


_FEW_NBYTES = 2_000


def decode_integers(encoded: bytes) -> list[int]:
    """Return the numbers that some bytes encode, one after the other, each in at most 64 bits."""
    if len(encoded) < _FEW_NBYTES:  # numpy takes 100 us for any
        numbers, pos = [], 0
        while pos < len(encoded):
            number, pos = read_integer(encoded, pos)
            numbers.append(number)
        return numbers
    data = np.frombuffer(encoded, np.uint8)
    lengths = np.diff(np.flatnonzero(data < 128), prepend=-1)
    firsts = np.cumsum(lengths) - lengths
    values = np.zeros(len(lengths), np.uint64)
    for place in range(int(lengths.max())):
        longer = np.flatnonzero(lengths > place)
        values[longer] |= (data[firsts[longer] + place] & np.uint8(127)).astype(np.uint64) << np.uint64(7 * place)
    decoded: list[int] = ((values >> np.uint64(1)).view(np.int64) ^ -(values & np.uint64(1)).view(np.int64)).tolist()
    return decoded


def encode_structs(structs: Sequence[bytes]) -> bytes:
    """Encode a list of structs that are encoded already."""
    return encode_list_head(len(structs)) + b"".join(structs)


def encode_list_head(count: int, kind: int = STRUCT) -> bytes:
    """Encode the beginning of a list."""
    return bytes([16 * count + kind]) if count < 15 else bytes([0xF0 + kind]) + encode_varint(count)


def encode_varint(value: int) -> bytes:
    """Encode a number that is not negative."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
