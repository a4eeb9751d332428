"""Thrift's compact protocol, written down a second time: what tests encode the parts of parquet files by."""

from __future__ import annotations

from typing import Any, NamedTuple

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
I16, I32, I64 = INTEGERS = (4, 5, 6)
"""Kinds of values."""


def varint(value: int) -> bytes:
    """A number that is not negative, seven bits a byte, the lowest first."""
    groups = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def zigzag(value: int) -> bytes:
    return varint(2 * value if value >= 0 else -2 * value - 1)


class Value(NamedTuple):
    """A value of some kind."""

    kind: int
    content: Any
    """A number, bytes, values, or those of fields by number."""
    items: int = 0
    """Of which kind the items of a list are."""


def encoded(value: Value) -> bytes:
    if value.kind in INTEGERS:
        return zigzag(value.content)
    if value.kind == BINARY:
        return varint(len(value.content)) + bytes(value.content)
    if value.kind in (LIST, SET):
        count = len(value.content)
        head = bytes([count << 4 | value.items]) if count < 15 else bytes([0xF0 | value.items]) + varint(count)
        items = (bytes([item.kind]) if item.kind in (TRUE, FALSE) else encoded(item) for item in value.content)
        return head + b"".join(items)
    if value.kind == STRUCT:
        return encoded_fields(value.content)
    return bytes(value.content)  # a byte, eight of them, or nothing for what the field says


def encoded_fields(fields: dict[int, Value], last: int = 0) -> bytes:
    found = b""
    for number, field in fields.items():
        step = number - last
        found += bytes([step << 4 | field.kind]) if step < 16 else bytes([field.kind]) + zigzag(number)
        found += encoded(field)
        last = number
    return found + b"\0"
