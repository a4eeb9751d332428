"""What headers of pages say is found, whatever else they say; and those that say what cannot be are left to pyarrow."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from dask_embedding_reader.formats.parquet.page_headers import PageHead, PageHeader, iter_page_heads, page_header
from dask_embedding_reader.formats.parquet.thrift import DamagedError
from tests.support.thrift import BINARY, FALSE, I32, I64, STRUCT, TRUE, Value, encoded_fields

DATA, INDEX, DICTIONARY, DATA_2 = range(4)
FIELDS = {DATA: 5, DICTIONARY: 7, DATA_2: 8}
RLE, BIT_PACKED = 3, 4
MOST = 2**31 - 1

Facts = dict[int, int]


def integers(facts: Facts) -> dict[int, Value]:
    return {number: Value(I32, fact) for number, fact in facts.items()}


def head_of(
    kind: int, plain: int, stored: int, facts: Facts, checksum: int | None = None, is_compressed: bool | None = None
) -> dict[int, Value]:
    """A header; with statistics, which are passed over."""
    said = integers(facts)
    statistics = Value(STRUCT, {3: Value(I64, 5), 5: Value(BINARY, b"z" * 200), 6: Value(BINARY, b"a")})
    if is_compressed is not None:
        said[7] = Value(TRUE if is_compressed else FALSE, b"")
    if kind != DICTIONARY:
        said[5 if kind == DATA else 8] = statistics
    fields = integers({1: kind, 2: plain, 3: stored})
    if checksum is not None:
        fields[4] = Value(I32, checksum)
    return fields | {FIELDS.get(kind, 6): Value(STRUCT, said)}


CHECKSUMS = [None, 0, 5, -7]


@pytest.mark.parametrize("seed", range(5))
def test_headers_of_pages_are_read(seed: int) -> None:
    chance = Random(seed)
    for _ in range(50):
        plain, stored, values = (chance.choice([0, 1, 100, MOST]) for _ in range(3))
        encoding, checksum = chance.randrange(10), chance.choice(CHECKSUMS)
        is_dictionary = chance.random() < 0.5
        facts = {1: values, 2: encoding} | ({} if is_dictionary else {3: RLE, 4: RLE})
        head = encoded_fields(head_of(DICTIONARY if is_dictionary else DATA, plain, stored, facts, checksum))
        expected = PageHeader(stored, values, encoding, plain, is_dictionary, checksum)
        for data in (head, memoryview(head + b"body")):
            assert page_header(data) == (expected, len(head))
        assert (expected.rows, expected.levels, expected.is_compressed) == (None, None, True)


@pytest.mark.parametrize("seed", range(5))
def test_headers_of_pages_of_version_2_are_read(seed: int) -> None:
    chance = Random(seed)
    for _ in range(50):
        definition, repetition, more = (chance.choice([0, 1, 70]) for _ in range(3))
        levels = definition + repetition
        plain, stored = chance.sample([levels, levels + more], 2)
        values, rows = chance.choice([0, 7, MOST]), chance.choice([0, 3, MOST])
        encoding, checksum, is_compressed = chance.randrange(10), chance.choice(CHECKSUMS), chance.choice([None, 0, 1])
        facts = {1: values, 2: 0, 3: rows, 4: encoding, 5: definition, 6: repetition}
        compressed = None if is_compressed is None else bool(is_compressed)
        head = encoded_fields(head_of(DATA_2, plain, stored, facts, checksum, compressed))
        expected = PageHeader(
            stored, values, encoding, plain, False, checksum, rows, (repetition, definition), compressed is not False
        )
        assert page_header(head + b"body") == (expected, len(head))
        for number, wrong in ((2, 1), (2, -1), (5, definition + more + 1), (6, repetition + more + 1)):
            changed = encoded_fields(head_of(DATA_2, plain, stored, {**facts, number: wrong}, checksum, compressed))
            assert page_header(changed) is None


RIGHT: dict[int, Facts] = {
    DATA: {1: 9, 2: 0, 3: RLE, 4: RLE},
    DICTIONARY: {1: 9, 2: 0},
    DATA_2: {1: 9, 2: 0, 3: 3, 4: 0, 5: 4, 6: 5},
}


@pytest.mark.parametrize("kind", RIGHT)
def test_numbers_that_cannot_be_are_told(kind: int) -> None:
    facts = RIGHT[kind]
    assert page_header(encoded_fields(head_of(kind, 50, 60, facts))) is not None
    for wrong in (-1, MOST + 1):
        for plain, stored in ((wrong, 60), (50, wrong)):
            assert page_header(encoded_fields(head_of(kind, plain, stored, facts))) is None
        for number in facts:
            if (kind, number) not in ((DATA, 3), (DATA, 4), (DATA_2, 2)):
                assert page_header(encoded_fields(head_of(kind, 50, 60, {**facts, number: wrong}))) is None
    for number in facts:
        without = {each: fact for each, fact in facts.items() if each != number}
        assert page_header(encoded_fields(head_of(kind, 50, 60, without))) is None, "something is not said"
        text: Any = head_of(kind, 50, 60, facts)
        text[FIELDS[kind]].content[number] = Value(BINARY, b"x")
        assert page_header(encoded_fields(text)) is None, "no number"
    for number in (1, 2, 3, FIELDS[kind]):
        fields = head_of(kind, 50, 60, facts)
        del fields[number]
        assert page_header(encoded_fields(fields)) is None


def test_levels_that_are_encoded_in_another_way_and_pages_of_other_kinds_are_not_wanted() -> None:
    for levels in ((RLE, BIT_PACKED), (BIT_PACKED, RLE), (BIT_PACKED, BIT_PACKED)):
        facts = {1: 9, 2: 0, 3: levels[0], 4: levels[1]}
        assert page_header(encoded_fields(head_of(DATA, 50, 60, facts))) is None
    assert page_header(encoded_fields(head_of(INDEX, 50, 60, {}))) is None
    assert page_header(encoded_fields(head_of(4, 50, 60, RIGHT[DATA]))) is None
    head = encoded_fields(head_of(DATA, 50, 60, RIGHT[DATA]))
    assert [page_header(head[:nbytes]) for nbytes in range(len(head))] == [None] * len(head)


# ---------------------------------------------------------------------------------------------------------------------
# All pages of a column chunk


@pytest.mark.parametrize("seed", range(5))
def test_all_pages_of_a_column_chunk_are_told(seed: int) -> None:
    chance = Random(seed)
    for _ in range(20):
        file, expected = b"before", []
        for _ in range(chance.choice([1, 2, 9])):
            kind, nbytes, stored = chance.choice([*RIGHT]), chance.choice([0, 5, 2**30]), chance.choice([0, 5, 300])
            facts = {**RIGHT[kind], 1: chance.choice([0, 1, 2**30])}
            encoding = chance.randrange(10)
            facts[4 if kind == DATA_2 else 2] = encoding
            file += encoded_fields(head_of(kind, nbytes, stored, facts)) + bytes(stored)
            expected.append(PageHead(nbytes, 0 if kind == DICTIONARY else facts[1], encoding))
        assert list(iter_page_heads(file + b"\0\0", 6, len(file))) == expected
        assert list(iter_page_heads(file, 6, 6)) == []


@pytest.mark.parametrize("kind", RIGHT)
def test_pages_are_no_larger_than_their_column_chunk(kind: int) -> None:
    head = encoded_fields(head_of(kind, 50, 60, RIGHT[kind]))
    file = head + bytes(100)
    assert len(list(iter_page_heads(file, 0, len(head) + 60))) == 1
    for stop in (len(head) + 59, len(head), 1):
        with pytest.raises(DamagedError, match="a page is larger than its column chunk"):
            list(iter_page_heads(file, 0, stop))
    for plain, stored, values in ((-1, 60, 9), (50, -1, 9), (50, 60, -1)):
        head = encoded_fields(head_of(kind, plain, stored, {**RIGHT[kind], 1: values}))
        with pytest.raises(DamagedError, match="a page is larger than its column chunk"):
            list(iter_page_heads(head + bytes(100), 0, len(head) + 60))
    head = encoded_fields(head_of(kind, 0, 0, {**RIGHT[kind], 1: 0}))
    assert len(list(iter_page_heads(head, 0, len(head)))) == 1
