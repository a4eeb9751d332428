"""Levels are believed only where they say exactly that all vectors are whole: here against levels read one by one.

``formats.parquet.levels`` looks at their runs, and never at each of them.
"""

from __future__ import annotations

from itertools import groupby, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dask_embedding_reader.formats.parquet import levels as told_levels
from dask_embedding_reader.formats.parquet.page_headers import PLAIN, PageHeader
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.thrift import encode_varint

# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def spelled(levels: list[int], lengths: list[int]) -> bytes:
    """Levels of one bit in runs: of one level where they are alike, else eight in each byte, as the last may be."""
    found, position = b"", 0
    for length in [*lengths, len(levels)]:
        run = levels[position : position + length]
        if not run:
            break
        if len(set(run)) == 1:
            found += encode_varint(len(run) << 1) + bytes([run[0]])
        else:
            run = levels[position : position + -(-len(run) // 8) * 8]
            groups = -(-len(run) // 8)
            padded = np.array(run + [0] * (8 * groups - len(run)), np.uint8)
            found += encode_varint(groups << 1 | 1) + np.packbits(padded, bitorder="little").tobytes()
        position += len(run)
    return found


def told(spell: bytes, count: int) -> list[int] | None:
    """The levels that are spelled, one by one; None where there are fewer, or bytes behind the last of them."""
    levels: list[int] = []
    position = 0
    while len(levels) < count:
        head = shift = 0
        while True:
            if position >= len(spell):
                return None
            byte = spell[position]
            position += 1
            head |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if head & 1:
            packed = spell[position : position + (head >> 1)]
            if len(packed) < head >> 1 or not packed:
                return None
            position += len(packed)
            levels += np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").tolist()
        else:
            if position >= len(spell) or not head:
                return None
            levels += [spell[position]] * min(head >> 1, count)
            position += 1
    return levels[:count] if position == len(spell) else None


def begins(count: int, phase: int, dimension: int) -> list[int]:
    """What levels of repetition have to be: 0 where a vector begins."""
    return [int((phase + number) % dimension != 0) for number in range(count)]


@st.composite
def damaged(draw: st.DrawFn, spell: bytes) -> bytes:
    """Bytes as they are, or with some of them changed, left out, put in or behind."""
    kind = draw(st.sampled_from(["none", "none", "change", "cut", "longer", "insert"]))
    place = draw(st.integers(0, max(0, len(spell) - 1)))
    if kind == "change" and spell:
        byte = draw(st.one_of(st.integers(0, 3), st.integers(0, 255)))
        return spell[:place] + bytes([byte]) + spell[place + 1 :]
    if kind == "cut":
        return spell[: len(spell) - draw(st.integers(1, 2))]
    if kind == "longer":
        return spell + draw(st.sampled_from([b"\0", b"\x02\x01", b"\x03\xff", spell]))
    if kind == "insert":
        return spell[:place] + draw(st.binary(min_size=1, max_size=2)) + spell[place:]
    return spell


# ---------------------------------------------------------------------------------------------------------------------
# Levels


@settings(max_examples=200)
@given(st.data())
def test_levels_of_repetition(data: st.DataObject) -> None:
    dimension = data.draw(st.one_of(st.integers(1, 9), st.sampled_from([33, 40, 64])), label="dimension")
    phase = data.draw(st.integers(0, dimension - 1), label="phase")
    count = data.draw(st.integers(1, 4 * dimension + 20), label="count")
    levels = begins(count, phase, dimension)
    if data.draw(st.booleans(), label="flip"):
        place = data.draw(st.integers(0, count - 1))
        levels[place] ^= 1
    if data.draw(st.booleans(), label="runs of one level each"):
        lengths = [len(list(same)) for _, same in groupby(levels)]
    else:
        lengths = data.draw(st.lists(st.integers(1, 70), max_size=6), label="lengths")
    spell = data.draw(damaged(spelled(levels, lengths)), label="spelled")
    expected = told(spell, count) == begins(count, phase, dimension)
    assert told_levels._is_regular(spell, count, phase, dimension) == expected


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_all_runs_of_few_levels_of_repetition(dimension: int) -> None:
    """Whatever is in runs of one level each: also what is no level, and more of them than values."""
    for phase, count in product(range(dimension), range(1, 6)):
        for levels in product(range(3), repeat=count):
            expected = list(levels) == begins(count, phase, dimension)
            runs = [(level, len(list(same))) for level, same in groupby(levels)]
            for most in (1, 2, count):
                parts = [(level, min(most, n - done)) for level, n in runs for done in range(0, n, most)]
                spells = [encode_varint(n << 1) + bytes([level]) for level, n in parts]
                longer = [*spells[:-1], encode_varint(parts[-1][1] + 9 << 1) + bytes([parts[-1][0]])]
                for some in (spells, longer):
                    assert told_levels._is_regular(b"".join(some), count, phase, dimension) == expected
                for place, nothing in product(range(len(spells)), (b"\0\0", b"\1")):
                    spell = b"".join([*spells[:place], nothing, *spells[place:]])
                    assert not told_levels._is_regular(spell, count, phase, dimension), "a run of no levels"


@pytest.mark.parametrize("dimension", [1, 3, 32, 33, 40])
def test_each_packed_level_of_repetition_counts_and_none_behind_them(dimension: int) -> None:
    for phase, count in product({0, dimension - 1}, (dimension, 2 * dimension + 3)):
        right = begins(count, phase, dimension)
        for place, behind in product([None, *range(count)], (0, 1)):
            levels = [int(level ^ (number == place)) for number, level in enumerate(right)]
            padded = np.array(levels + [behind] * (-count % 8), np.uint8)
            spell = encode_varint(len(padded) >> 2 | 1) + np.packbits(padded, bitorder="little").tobytes()
            assert told_levels._is_regular(spell, count, phase, dimension) == (place is None)
            assert not told_levels._is_regular(spell[:-1], count, phase, dimension)


@given(st.data())
def test_levels_of_definition(data: st.DataObject) -> None:
    """One run that is as long as the page, and nothing else."""
    most = data.draw(st.integers(0, 4))
    count = data.draw(st.integers(1, 300))
    head = data.draw(st.sampled_from([count, count - 1, count + 1, 2 * count]))
    level = data.draw(st.sampled_from([most, most, max(0, most - 1), most + 1]))
    spell = data.draw(damaged(encode_varint(head << 1) + bytes([level])))
    expected = spell == encode_varint(count << 1) + bytes([most]) if most else not spell
    assert told_levels._is_defined(spell, count, most) == expected


def test_a_run_of_another_length_or_level_defines_nothing() -> None:
    for count, most in product((1, 7, 64, 300), (1, 2, 3)):
        right = encode_varint(count << 1) + bytes([most])
        assert told_levels._is_defined(right, count, most)
        heads = [count - 1 << 1, count + 1 << 1, count << 2, count << 1 | 1]
        wrong = [encode_varint(head) + bytes([most]) for head in heads]
        wrong += [right[:-1] + bytes([level]) for level in (most - 1, most + 1)]
        wrong += [b"", right[:-1], right + b"\0", right + right, b"\0" + right]
        assert not any(told_levels._is_defined(spell, count, most) for spell in wrong)


@pytest.mark.parametrize("is_list", [False, True])
def test_nothing_stands_where_levels_of_definition_need_not_be(is_list: bool) -> None:
    """Be it as short as what says how long they are: values would begin behind it."""
    levels = spelled(begins(12, 0, 3), []) if is_list else b""
    body = len(levels).to_bytes(4, "little") + levels if is_list else b""
    page, place = PageHeader(48, 12, PLAIN, 48), place_of(3, 0, is_list)
    for more in range(7):
        data = body + bytes(more)
        assert told_levels.are_levels(memoryview(data), page, place, 0, len(data)) == (more == 0)


def place_of(dimension: int, definition: int, is_list: bool) -> Place:
    item = np.dtype("<f4")
    return Place(0, 10**6, 10**6, 0, item, item, dimension, is_list, False, definition, True)


@settings(max_examples=200)
@given(st.data())
def test_levels_of_a_page(data: st.DataObject) -> None:
    """Both of them, before each of which a page of version 1 says how long it is, and one of version 2 in its head."""
    dimension = data.draw(st.integers(1, 5), label="dimension")
    definition = data.draw(st.integers(0, 3), label="definition")
    is_list = data.draw(st.booleans(), label="is_list")
    version = data.draw(st.sampled_from([1, 2]), label="version")
    count = dimension * data.draw(st.integers(1, 20), label="rows")
    before = data.draw(st.integers(0, 30), label="before")
    right = [b"", b""]
    if is_list:
        right[0] = spelled(begins(count, before % dimension, dimension), [])
    if definition:
        right[1] = encode_varint(count << 1) + bytes([definition])
    parts = list(right)
    changed = data.draw(st.sampled_from([None, 0, 1]), label="changed")
    if changed is not None:
        parts[changed] = data.draw(damaged(right[changed]), label="spelled")
    if version == 1:
        # Of what there is none of, nothing says how long it is.
        has = [is_list or bool(parts[0]), bool(definition) or bool(parts[1])]
        lengths = [len(part) for part in parts]
        if data.draw(st.booleans(), label="lie"):
            which, change = data.draw(st.sampled_from([(0, -1), (0, 1), (1, -1), (1, 1), (1, 300)]))
            lengths[which] = max(0, lengths[which] + change)
        body = with_lengths(parts, lengths, has)
        expected = body == with_lengths(right, [len(part) for part in right], [is_list, bool(definition)])
        levels = None
    else:
        body, levels = b"".join(parts), (len(parts[0]), len(parts[1]))
        expected = parts == right
    # Other bytes may say the same.
    assume(not is_list or parts[0] == right[0] or told(parts[0], count) != told(right[0], count))
    page = PageHeader(4 * count, count, PLAIN, 4 * count, levels=levels)
    place = place_of(dimension, definition, is_list)
    assert told_levels.are_levels(memoryview(body), page, place, before, len(body)) == expected
    assert not told_levels.are_levels(memoryview(body), page, place, before, len(body) + 1), "some of it is missing"


def with_lengths(parts: list[bytes], lengths: list[int], has: list[bool]) -> bytes:
    both = zip(parts, lengths, has, strict=True)
    return b"".join(length.to_bytes(4, "little") + part for part, length, there in both if there)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of levels alone


def test_the_first_level_is_told() -> None:
    for level in (0, 1):
        for count in (1, 8, 63, 64, 10_000):
            assert told_levels.first_level(encode_varint(count << 1) + bytes([level])) == level
            groups = encode_varint(-(-count // 8) << 1 | 1)
            assert told_levels.first_level(groups + bytes([0xFE | level]) * -(-count // 8)) == level
            assert told_levels.first_level(groups + bytes([level]) * -(-count // 8)) == level
    assert told_levels.first_level(b"") is None
    assert told_levels.first_level(b"\x02") is None
    assert told_levels.first_level(b"\xff" * 12) is None


@pytest.mark.parametrize("rest", [b"", b"values"])
def test_levels_are_counted_by_what_says_how_long_they_are(rest: bytes) -> None:
    first, second = b"\x05\0\0\0" + b"12345", b"\x00\x01\0\0" + bytes(256)

    def count(data: bytes, is_list: bool, definition: int) -> int:
        return told_levels.count_level_nbytes(np.frombuffer(data + rest, np.uint8), place_of(4, definition, is_list))

    assert count(first + second, True, 1) == count(first + second, True, 3) == 9 + 260
    assert count(first + second, True, 0) == 9
    assert count(second + first, False, 1) == 260
    assert count(first, False, 0) == 0
    # What is not there is claimed all the same.
    assert count(first[:4], True, 0) == 9
