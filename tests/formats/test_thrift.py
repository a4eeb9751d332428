"""Thrift's compact protocol: what is wanted of structs is read, everything else passed over, and damage is told.

Structs are made at random here, and encoded by what is written down of the protocol.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from random import Random
from typing import Any

import pytest

from dask_embedding_reader.formats.parquet import thrift
from dask_embedding_reader.formats.parquet.thrift import DEEPEST, FLAG, RAW, DamagedError
from tests.support.thrift import (
    BINARY,
    BYTE,
    DOUBLE,
    FALSE,
    INTEGERS,
    LIST,
    SET,
    STRUCT,
    TRUE,
    Value,
    encoded,
    encoded_fields,
    varint,
    zigzag,
)

# ---------------------------------------------------------------------------------------------------------------------
# What is made at random

NUMBERS = [0, 1, -1, 63, 64, -64, -65, 127, 128, 8191, 8192, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63)]


def random_value(chance: Random, depth: int) -> Value:
    kinds = [TRUE, FALSE, BYTE, *INTEGERS, *INTEGERS, DOUBLE, BINARY, *([LIST, SET, STRUCT] if depth < 4 else [])]
    kind = chance.choice(kinds)
    return random_of(kind, chance, depth)


def random_of(kind: int, chance: Random, depth: int) -> Value:
    if kind in INTEGERS:
        return Value(kind, chance.choice(NUMBERS))
    if kind == BINARY:
        return Value(kind, chance.randbytes(chance.choice([0, 1, 5, 63, 64, 127, 128, 300])))
    if kind == STRUCT:
        return Value(kind, random_fields(chance, depth + 1))
    if kind in (LIST, SET):
        items = chance.choice([TRUE, BYTE, *INTEGERS, DOUBLE, BINARY, *([LIST, STRUCT, STRUCT] if depth < 3 else [])])
        few = items in (LIST, STRUCT) and depth > 1
        count = chance.choice([0, 1, 2] if few else [0, 1, 3, 14, 15, 16])
        return Value(kind, [random_of(items, chance, depth + 1) for _ in range(count)], items)
    return Value(kind, chance.randbytes({BYTE: 1, DOUBLE: 8}.get(kind, 0)))


def random_fields(chance: Random, depth: int = 0) -> dict[int, Value]:
    number, fields = 0, {}
    for _ in range(chance.randrange(7)):
        number += chance.choice([1, 1, 1, 2, 15, 16, 40])
        fields[number] = random_value(chance, depth)
    return fields


Want = tuple[Any, Any]
"""What is wanted of a value, and what should be found."""


def random_want(chance: Random, value: Value) -> Want | None:
    """None of values that cannot be asked for."""
    kind, content = value.kind, value.content
    if kind in (TRUE, FALSE):
        return FLAG, kind == TRUE
    if kind in INTEGERS or kind == BINARY:
        return {}, content
    if kind == STRUCT:
        return random_wants(chance, content)
    if kind in (LIST, SET):
        if not content or value.items != STRUCT or chance.random() < 0.5:
            return RAW, encoded(value)
        numbers = {number for item in content for number in item.content}
        wanted: dict[int, Any] = {number: {} for number in sorted(numbers) if all_alike(content, number)}
        return wanted, [{n: v.content for n, v in item.content.items() if n in wanted} for item in content]
    return None


def all_alike(structs: list[Value], number: int) -> bool:
    fields = [struct.content[number] for struct in structs if number in struct.content]
    return all(field.kind in (*INTEGERS, BINARY) for field in fields)


def random_wants(chance: Random, fields: dict[int, Value]) -> Want:
    wanted: dict[int, Any] = {}
    found = {}
    for number, field in fields.items():
        want = random_want(chance, field)
        if want is not None and chance.random() < 0.6:
            wanted[number], found[number] = want
    behind = max(fields, default=0) + chance.choice([1, 20])
    if chance.random() < 0.3:
        wanted[behind] = {}  # which is not there
    return wanted, found


# ---------------------------------------------------------------------------------------------------------------------
# Structs


@pytest.mark.parametrize("seed", range(8))
def test_what_is_wanted_of_structs_is_read(seed: int) -> None:
    chance = Random(seed)
    for _ in range(60):
        fields = random_fields(chance)
        wanted, found = random_wants(chance, fields)
        data = encoded_fields(fields)
        before, behind = chance.randbytes(chance.randrange(3)), chance.randbytes(2)
        whole = before + data + behind
        assert thrift.read_struct(whole, len(before), wanted, 0) == (found, len(before) + len(data))
        assert thrift.skip_struct(whole, len(before), 0) == len(before) + len(data)
        for cut in range(len(data)) if len(data) < 60 else range(0, len(data), 7):
            with pytest.raises((DamagedError, IndexError)):  # no struct ends before it does
                thrift.read_struct(data[:cut], 0, wanted, 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_struct_is_read_from_behind_one_of_its_fields(seed: int) -> None:
    chance = Random(seed)
    for _ in range(40):
        fields = random_fields(chance)
        for number in (0, 1, 7):
            moved = {number + each: field for each, field in fields.items()}
            wanted, found = random_wants(chance, moved)
            data = encoded_fields(moved, number)
            assert thrift.read_struct(data, 0, wanted, 0, number) == (found, len(data))


def test_lists_may_be_read_by_a_function_that_sees_what_is_before_them() -> None:
    data = encoded_fields({2: Value(4, 7), 3: Value(LIST, [Value(4, 5)], 4), 4: Value(5, 9)})
    seen: list[Any] = []

    def read(pos: int, fields: dict[int, Any]) -> tuple[str, int]:
        seen.append((pos, dict(fields)))
        return "read", pos + 2

    assert thrift.read_struct(data, 0, {2: {}, 3: read, 4: {}}, 0) == ({2: 7, 3: "read", 4: 9}, len(data))
    assert seen == [(3, {2: 7})]


@pytest.mark.parametrize("seed", range(5))
def test_lists_of_structs_are_read(seed: int) -> None:
    chance = Random(seed)
    for count in (0, 1, 14, 15, 16, 200):
        structs = [{1: Value(5, chance.choice(NUMBERS)), 2: random_value(chance, 2)} for _ in range(count)]
        data = encoded(Value(LIST, [Value(STRUCT, struct) for struct in structs], STRUCT))
        found = [{1: struct[1].content} for struct in structs]
        assert thrift.read_list(b"ab" + data + b"c", 2, {1: {}}, 0) == (found, 2 + len(data))
        assert thrift.read_list_head(data, 0) == (count, STRUCT, 1 if count < 15 else 2 if count < 128 else 3)
        assert thrift.encode_structs([encoded_fields(struct) for struct in structs]) == data
        assert data.startswith(thrift.encode_list_head(count))


WRONG_KINDS: dict[str, tuple[Value, Any, str]] = {
    "a boolean": (Value(TRUE, b""), {}, "value of the wrong kind in field 3"),
    "a byte": (Value(BYTE, b"x"), {}, "value of the wrong kind in field 3"),
    "a double": (Value(DOUBLE, bytes(8)), {}, "value of the wrong kind in field 3"),
    "a kind that there is not": (Value(13, b"x"), {}, "value of the wrong kind in field 3"),
    "one that is not wanted": (Value(13, b"x"), None, "value of the unknown kind 13"),
    "another one": (Value(11, b"x"), None, "value of the unknown kind 11"),
    "one in a list": (Value(LIST, [Value(13, b"x")], 13), None, "value of the unknown kind 13"),
    "a list of integers": (Value(LIST, [Value(5, 1)], 5), {1: {}}, "list of the wrong kind"),
}


@pytest.mark.parametrize("wrong", WRONG_KINDS)
def test_values_of_wrong_kinds_are_told(wrong: str) -> None:
    value, wanted, says = WRONG_KINDS[wrong]
    data = encoded_fields({3: value})
    with pytest.raises(DamagedError, match=says):
        thrift.read_struct(data, 0, {3: wanted} if wanted is not None else {}, 0)
    assert thrift.read_struct(encoded_fields({3: Value(LIST, [], 5)}), 0, {3: {1: {}}}, 0)[0] == {3: []}


def test_a_field_that_is_said_twice_is_told() -> None:
    """The number of a field may be there instead of the step from the last one."""
    with pytest.raises(DamagedError, match="says field 2 twice"):
        thrift.read_struct(b"\x25\x08\x05\x04\x0a\x00", 0, {2: {}, 3: {}}, 0)
    assert thrift.read_struct(b"\x25\x08\x05\x06\x0a\x00", 0, {2: {}, 3: {}}, 0) == ({2: 4, 3: 5}, 6)


def nested(levels: str) -> tuple[bytes, dict[int, Any]]:
    """Structs and lists in each other, from the outside, and what is wanted of the innermost.

    ``s`` is a struct in a struct, ``l`` a list of one struct, ``b`` a list of a list of booleans.
    """
    value = Value(STRUCT, {1: Value(4, 5)})
    wanted: dict[int, Any] = {1: {}}
    for level in reversed(levels):
        if level == "l":
            value = Value(LIST, [value], STRUCT)
        elif level == "b":
            value = Value(LIST, [Value(LIST, [Value(LIST, [Value(TRUE, b"")], TRUE)], LIST)], LIST)
        value, wanted = Value(STRUCT, {1: value}), {1: wanted}
    return encoded(value), wanted


@pytest.mark.parametrize(
    ("levels", "deep"),
    [
        ("s" * DEEPEST, DEEPEST),
        ("l" * (DEEPEST // 2), DEEPEST),
        ("s" + "l" * (DEEPEST // 2 - 1), DEEPEST - 1),
        ("s" * (DEEPEST - 3) + "b", DEEPEST),
    ],
    ids=["structs", "lists", "both", "lists of lists"],
)
def test_nesting_has_an_end(levels: str, deep: int) -> None:
    data, wanted = nested(levels)
    ways: list[Callable[[int], Any]] = [
        lambda depth: thrift.skip_struct(data, 0, depth),
        lambda depth: thrift.read_struct(data, 0, {}, depth),
        lambda depth: thrift.read_struct(data, 0, {1: RAW} if levels[0] == "l" else {}, depth),
    ]
    if "b" not in levels:
        ways.append(lambda depth: thrift.read_struct(data, 0, wanted, depth))
    for way in ways:
        assert way(DEEPEST - deep)
        for depth in (DEEPEST - deep + 1, DEEPEST):
            with pytest.raises(DamagedError, match=rf"nested deeper than {DEEPEST} levels"):
                way(depth)


def test_lists_claim_no_more_items_than_there_are_bytes() -> None:
    for count, kind in product((3, 20), (TRUE, BYTE, STRUCT)):
        head = bytes([count << 4 | kind]) if count < 15 else bytes([0xF0 | kind, count])
        assert thrift.read_list_head(head + bytes(count), 0) == (count, kind, len(head))
        assert thrift.read_list_head(b"123" + head + bytes(count), 3) == (count, kind, 3 + len(head))
        with pytest.raises(DamagedError, match=rf"claims a list of {count} items, more than it has bytes"):
            thrift.read_list_head(b"123" + head + bytes(count - 1), 3)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_numbers_are_read_and_written() -> None:
    for value in [*range(300), *(2**bits + more for bits in range(7, 64) for more in (-1, 0, 1))]:
        data = varint(value)
        assert thrift.encode_varint(value) == data
        assert thrift.read_varint(b"\xff" + data + b"\xff", 1) == (value, 1 + len(data))
    for value in NUMBERS:
        data = zigzag(value)
        assert thrift.read_integer(b"\xff" + data + b"\xff", 1) == (value, 1 + len(data))


def test_numbers_have_64_bits_at_most() -> None:
    assert thrift.read_varint(b"\x80" * 9 + b"\x01", 0) == (2**63, 10)
    with pytest.raises(DamagedError, match="more than 64 bits"):
        thrift.read_varint(b"\x80" * 10 + b"\x01", 0)


@pytest.mark.parametrize("count", [0, 1, 199, 200, 201, 5_000])
def test_many_numbers_are_read_at_once(count: int) -> None:
    chance = Random(count)
    for choices in (NUMBERS, range(-64, 64), [2**63 - 1, -(2**63)]):
        numbers = chance.choices(choices, k=count)
        assert thrift.decode_integers(b"".join(map(zigzag, numbers))) == numbers


# ---------------------------------------------------------------------------------------------------------------------
# Patterns


def test_patterns_match_what_they_are_named_for() -> None:
    def matched(pattern: bytes, data: bytes) -> int:
        """So many bytes are; -1 for none."""
        match = re.compile(pattern, re.DOTALL).match(data)
        return -1 if match is None else match.end()

    heads = thrift.match_heads(TRUE, BINARY)
    assert [byte for byte in range(256) if matched(heads, bytes([byte])) == 1] == sorted(
        step << 4 | kind for step in range(1, 16) for kind in (TRUE, BINARY)
    )
    for value in (0, 1, 127, 128, 2**63):
        assert matched(thrift.NUMBER, varint(value) + b"\x01") == len(varint(value))
        assert matched(thrift.SMALL, varint(value)) == (1 if value < 128 else -1)
    assert matched(thrift.NUMBER, b"\x80" * 10 + b"\x01") == -1
    lengths = thrift.match_binaries([0, 3, 10, 92, 127])
    for length in range(128):
        data = bytes([length]) + b"\n" * length
        assert matched(lengths, data) == (length + 1 if length in (0, 3, 10, 92, 127) else -1)
        assert matched(lengths, data[:-1]) == -1
    assert matched(thrift.match_maybe(b"ab"), b"abab") == 2
    assert matched(thrift.match_maybe(b"ab"), b"ba") == 0
    lists = thrift.match_lists(BINARY, lengths, 3)
    for count in range(15):
        data = encoded(Value(LIST, [Value(BINARY, b"abc")] * count, BINARY))
        assert matched(lists, data) == (len(data) if count <= 3 else -1)
        assert matched(lists, bytes([data[0] ^ 1]) + data[1:]) == -1
