"""Row groups of footers: what is said of column chunks is found, however much else is said, and where it lies.

Chunks are made at random of all that ``parquet.thrift`` knows, in the ways of writers, which are read in one go, and in
others.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from dask_embedding_reader.formats.parquet.column_chunks import Chunk, EncryptedError, keep_chunks, read_groups
from dask_embedding_reader.formats.parquet.thrift import DamagedError
from tests.support.thrift import (
    BINARY,
    FALSE,
    I16,
    I32,
    I64,
    LIST,
    STRUCT,
    TRUE,
    Value,
    encoded,
    encoded_fields,
    varint,
)

Fields = dict[int, Value]

DATA_NBYTES = 2**40
NUMBERS = [0, 1, 63, 64, 300, 2**20, 2**39]

# ---------------------------------------------------------------------------------------------------------------------
# What is made at random


def integers(kind: int, numbers: list[int]) -> Value:
    return Value(LIST, [Value(kind, number) for number in numbers], kind)


def some(chance: Random, fields: Fields) -> Fields:
    return {number: field for number, field in fields.items() if chance.random() < 0.5}


def statistics(chance: Random, nulls: int | None, texts: list[int]) -> Fields:
    """Those of which writers tell, with texts of some lengths."""

    def text() -> Value:
        return Value(BINARY, chance.randbytes(chance.choice(texts)))

    if nulls is None:
        return {}
    old = chance.choice([{}, {1: text(), 2: text()}, {1: text()}, {2: text()} if max(texts) < 128 else {}])
    new = chance.choice([{}, {5: text(), 6: text()}])
    exact = chance.choice([{}, {7: Value(TRUE, b"")}, {7: Value(FALSE, b""), 8: Value(TRUE, b"")}])
    distinct = some(chance, {4: Value(I64, chance.choice(NUMBERS))})
    return {**old, 3: Value(I64, nulls), **distinct, **new, **exact, **some(chance, {9: Value(I64, 3)})}


def metadata(chance: Random, said: dict[int, int], texts: list[int], *, is_usual: bool) -> Fields:
    """The place, the size and so on of a column chunk, and what is said beside; ``3`` is the number of nulls."""
    more = 0 if is_usual else 1
    encodings = [Value(I32, chance.randrange(10)) for _ in range(chance.choice([0, 1, 6, 6 + more]))]
    path = [Value(BINARY, chance.randbytes(chance.choice([0, 5, 63]))) for _ in range(chance.choice([1, 4, 4 + more]))]
    fields = {
        1: Value(I32, said[1]),
        2: Value(LIST, encodings, I32),
        3: Value(LIST, path, BINARY),
        4: Value(I32, said[4]),
        5: Value(I64, said[5]),
        6: Value(I64, chance.choice(NUMBERS)),
        7: Value(I64, said[7]),
        **some(chance, {8: Value(LIST, [], chance.choice([0, STRUCT]))}),
        9: Value(I64, said[9]),
    }
    if not is_usual:
        notes = Value(LIST, [Value(STRUCT, {1: Value(BINARY, b"key"), 2: Value(BINARY, b"value")})], STRUCT)
        fields = dict(sorted({**fields, **some(chance, {8: notes, 10: Value(I64, 7)})}.items()))
    if 11 in said:
        fields[11] = Value(I64, said[11])
    nulls = said.get(3)
    if nulls is not None or chance.random() < 0.5:
        fields[12] = Value(STRUCT, statistics(chance, nulls, texts))
    page = Value(STRUCT, {1: Value(I32, 2), 2: Value(I32, 8), 3: Value(I32, chance.choice(NUMBERS[:5]))})
    counts = [chance.choice(NUMBERS) for _ in range(chance.choice([0, 1, 8, 8 + more]))]
    levels = {1: Value(I64, 9), 2: integers(I64, counts), 3: integers(I64, counts)}
    fields |= some(chance, {13: Value(LIST, [page] * chance.choice([0, 1, 4, 4 + more]), STRUCT)})
    fields |= chance.choice([{}, {14: Value(I64, 2**33)}, {14: Value(I64, 2**33), 15: Value(I32, 300)}])
    return fields | some(chance, {16: Value(STRUCT, some(chance, levels))})


def random_chunk(chance: Random, texts: list[int], *, is_usual: bool = True) -> tuple[Fields, Chunk, tuple[int, int]]:
    """A column chunk, what should be found of it, and where its index is."""
    said = {1: chance.randrange(8), 4: chance.randrange(8), 5: chance.choice(NUMBERS), 7: chance.choice(NUMBERS)}
    said[9] = chance.choice([4, 70, 10_000, 2**38])
    if chance.random() < 0.5:
        said[11] = chance.choice([0, said[9] - 1, said[9], 10**6])
    if chance.random() < 0.8:
        said[3] = chance.choice([0, 0, 1, said[5], said[5] + 1, -1 if not is_usual else 0])
    place = {4: Value(I64, chance.choice(NUMBERS)), 5: Value(I32, chance.choice(NUMBERS[:6]))}
    place |= {6: Value(I64, 2**34), 7: Value(I32, 90)}
    place = chance.choice([{}, place, dict(list(place.items())[:2])])
    fields = {2: Value(I64, said[9]), 3: Value(STRUCT, metadata(chance, said, texts, is_usual=is_usual)), **place}
    if not is_usual and chance.random() < 0.5:
        fields = {1: Value(BINARY, b""), **fields}
    start = said[11] if 0 < said.get(11, 0) < said[9] else said[9]
    nulls = said.get(3)
    known = nulls if nulls is not None and 0 <= nulls <= said[5] else None
    index = (place[4].content, place[4].content + place[5].content) if place else (0, 0)
    return fields, Chunk(start, start + said[7], said[5], known, said[1], said[4]), index


def row_group(chance: Random, chunks: list[Fields], rows: int, *, is_usual: bool = True) -> Fields:
    fields = {1: Value(LIST, [Value(STRUCT, chunk) for chunk in chunks], STRUCT)}
    fields |= {2: Value(I64, chance.choice(NUMBERS)), 3: Value(I64, rows)}
    if not is_usual:
        order = Value(STRUCT, {1: Value(I32, 0), 2: Value(TRUE, b""), 3: Value(FALSE, b"")})
        fields |= some(chance, {4: Value(LIST, [order], STRUCT)})
    behind = {5: Value(I64, chance.choice(NUMBERS)), 6: Value(I64, 2**35), 7: Value(I16, 3)}
    return fields | chance.choice([{}, behind, dict(list(behind.items())[1:])])


def places_of(groups: list[Fields], pos: int) -> list[int]:
    """Where each row group begins, and its chunks, and where the last one ends."""
    places = []
    for group in groups:
        places.append(pos)
        place = pos + len(encoded(Value(LIST, [], STRUCT))) + 1
        count = len(group[1].content)
        place += 0 if count < 15 else len(varint(count))
        for chunk in group[1].content:
            places.append(place)
            place += len(encoded(chunk))
        pos += len(encoded_fields(group))
    return [*places, pos]


# ---------------------------------------------------------------------------------------------------------------------
# Row groups

SHORT, LONG = [*range(128), 127, 127], [0, 4, 127, 128, 300, 2**14 - 1, 2**14, 20_000]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("writer", ["short texts", "long texts", "unusual"])
def test_all_that_is_said_of_chunks_is_found(seed: int, writer: str) -> None:
    chance = Random(seed)
    is_usual = writer != "unusual"
    leaves = chance.choice([1, 3, 14, 15, 20])
    groups, expected, rows_of_all = [], [], []
    for _ in range(chance.choice([1, 14, 15, 20])):
        texts = LONG if writer == "long texts" and chance.random() < 0.7 else SHORT
        made = [random_chunk(chance, texts, is_usual=is_usual) for _ in range(leaves)]
        rows = chance.choice([0, 1, 9, 10**6])
        groups.append(row_group(chance, [fields for fields, _, _ in made], rows, is_usual=is_usual))
        expected.append([(chunk, index, fields[3].content[6].content) for fields, chunk, index in made])
        rows_of_all.append(rows)
    before = chance.randbytes(5)
    head = encoded(Value(LIST, [Value(STRUCT, group) for group in groups], STRUCT))
    data = before + head + b"\x99"
    found, end = read_groups(data, len(before), leaves)
    assert (found.start, end, found.stop) == (len(before), len(data) - 1, len(data) - 1)
    assert found.rows == tuple(rows_of_all)
    first = len(before) + (1 if len(groups) < 15 else 2)
    assert found.places.tolist() == places_of(groups, first)
    assert not is_usual or found.odd == frozenset(), "what is usual is not read field by field: that takes long"
    picked = chance.choices(range(len(groups)), k=4)
    for leaf in range(leaves):
        chunks = [of_group[leaf][0] for of_group in expected]
        assert found.read_chunks(data, leaf, range(len(groups)), DATA_NBYTES) == chunks
        assert found.read_chunks(data, leaf, picked, DATA_NBYTES) == [chunks[group] for group in picked]
        if leaf not in found.odd:
            may_hold_nulls = any(rows and fields_nulls(groups, n, leaf) != 0 for n, rows in enumerate(rows_of_all))
            assert (leaf in found.with_nulls) == may_hold_nulls
        for group in picked:
            assert found.read_index_place(data, leaf, group) == expected[group][leaf][1]
            assert found.read_plain_nbytes(data, leaf, group) == expected[group][leaf][2]
    assert not found.with_nulls & found.odd
    assert found.select(data, picked) == [encoded_fields(groups[group]) for group in picked]
    for kept in ([0], list(range(leaves)), chance.sample(range(leaves), leaves // 2)):
        of_kept = [chunk for leaf, chunk in enumerate(groups[0][1].content) if leaf in kept]
        smaller = {**groups[0], 1: Value(LIST, of_kept, STRUCT)}
        assert keep_chunks(encoded_fields(groups[0]), kept) == encoded_fields(smaller)


def fields_nulls(groups: list[Fields], group: int, leaf: int) -> int | None:
    """The number of nulls that a chunk tells."""
    said: Fields = groups[group][1].content[leaf].content[3].content
    if 12 not in said or 3 not in said[12].content:
        return None
    nulls: int = said[12].content[3].content
    return nulls


def plain_chunk(**others: Value) -> Fields:
    """A chunk of no more than there must be."""
    said: Fields = {number: Value(I64, number) for number in (5, 7, 9)}
    return {2: Value(I64, 0), 3: Value(STRUCT, said)}


def groups_of(chunk: Fields) -> bytes:
    group = {1: Value(LIST, [Value(STRUCT, chunk)], STRUCT), 2: Value(I64, 9), 3: Value(I64, 5)}
    return encoded(Value(LIST, [Value(STRUCT, group)], STRUCT))


def read_one(chunk: Fields, data_nbytes: int = 100) -> Chunk:
    data = groups_of(chunk)
    groups, _ = read_groups(data, 0, 1)
    [found] = groups.read_chunks(data, 0, [0], data_nbytes)
    return found


def test_what_is_not_said_of_a_chunk_is_not_known() -> None:
    assert read_one(plain_chunk()) == Chunk(9, 16, 5, None, -1, -1)
    data = groups_of(plain_chunk())
    groups, _ = read_groups(data, 0, 1)
    assert groups.read_plain_nbytes(data, 0, 0) == 0
    assert groups.read_index_place(data, 0, 0) == (0, 0)
    assert groups.odd == {0}
    negative = {2: Value(I64, 0), 3: Value(STRUCT, {6: Value(I64, -5)})}
    data = groups_of(negative)
    assert read_groups(data, 0, 1)[0].read_plain_nbytes(data, 0, 0) == 0
    data = groups_of({2: Value(I64, 0), 4: Value(I64, 7), 5: Value(I32, 3)})
    assert read_groups(data, 0, 1)[0].read_index_place(data, 0, 0) == (7, 10)
    assert read_groups(data, 0, 1)[0].read_plain_nbytes(data, 0, 0) == 0


def test_chunks_elsewhere_or_encrypted_or_damaged_are_told() -> None:
    chunk = plain_chunk()
    with pytest.raises(DamagedError, match=r"row group 0 is said to be in another file, b'x'"):
        read_one({1: Value(BINARY, b"x"), **chunk})
    assert read_one({1: Value(BINARY, b""), **chunk}) == read_one(chunk)
    for encrypted in ({2: chunk[2]}, {**chunk, 8: Value(STRUCT, {})}):
        with pytest.raises(EncryptedError):
            read_one(encrypted)
    said: Any = chunk[3].content
    with pytest.raises(DamagedError, match="a column of row group 0 is said to hold -1 values"):
        read_one({**chunk, 3: Value(STRUCT, {**said, 5: Value(I64, -1)})})
    assert read_one({**chunk, 3: Value(STRUCT, {**said, 5: Value(I64, 0)})}).values == 0
    assert read_one(chunk, 16).stop == 16
    with pytest.raises(DamagedError, match=r"row group 0 is said to be at bytes 9 to 16, but the data .* ends at 15"):
        read_one(chunk, 15)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x15\x02", "list of the wrong kind"),
        (b"\x1c\x19\x2c" + b"\x00" * 9, "row group 0 has 2 column chunks where 1 were expected"),
        (b"\x1c\x19\x15\x02\x16\x02\x16\x02\x00", "row group 0 has 1 column chunks where 1 were expected"),
        (b"\x1c\x29\x1c" + b"\x00" * 9, "row group 0 has 1 column chunks where 1 were expected"),
    ],
    ids=["no structs", "more chunks", "chunks that are none", "another field"],
)
def test_row_groups_that_are_none_are_told(data: bytes, says: str) -> None:
    with pytest.raises(DamagedError, match=says):
        read_groups(data, 0, 1)


def test_numbers_need_not_be_encoded_as_short_as_can_be() -> None:
    chunk = encoded_fields(plain_chunk())
    for count in (b"\x1c", b"\xfc\x01", b"\xfc\x81\x00"):
        data = b"ab\x1c\x19" + count + chunk + b"\x16\x12\x16\x0a\x00"
        groups, end = read_groups(data, 2, 1)
        assert (groups.rows, end, groups.places.tolist()[:2]) == ((5,), len(data), [3, 4 + len(count)])
        assert groups.read_chunks(data, 0, [0], 100) == [read_one(plain_chunk())]


def test_no_row_groups_are_none() -> None:
    groups, end = read_groups(b"\x0c", 0, 3)
    assert (groups.rows, end, groups.stop, groups.with_nulls, groups.odd) == ((), 1, 1, frozenset(), frozenset())
    assert read_groups(b"\x05", 0, 3)[1] == 1
