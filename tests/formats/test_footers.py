"""Footers put together field by field: what is said of row groups and columns, and what cannot be."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.parquet.footer import Footer, RawGroup, parse_footer, read_raw_footer
from dask_embedding_reader.formats.parquet.schema import as_file, encode_footer
from tests.support.thrift import BINARY, I32, I64, LIST, STRUCT, Value, encoded, encoded_fields

DATA_NBYTES = 1_000

Fields = dict[int, Value]


def element(name: str, **others: int) -> Value:
    """A node of the schema."""
    numbers = {"type": 1, "repetition": 3, "children": 5, "converted": 6}
    fields = {numbers[fact]: Value(I32, value) for fact, value in others.items()} | {4: Value(BINARY, name.encode())}
    return Value(STRUCT, dict(sorted(fields.items())))


SCHEMA = [
    element("schema", children=2),
    element("n", type=2, repetition=1),
    element("v", repetition=1, children=1, converted=3),
    element("list", repetition=2, children=1),
    element("element", type=4, repetition=1),
]


def chunk(start: int, nbytes: int, values: int, *, nulls: int | None = None, plain: int = 7, **more: Value) -> Value:
    said: Fields = {1: Value(I32, 2), 4: Value(I32, 0), 5: Value(I64, values), 6: Value(I64, plain)}
    said |= {7: Value(I64, nbytes), 9: Value(I64, start)}
    if nulls is not None:
        said[12] = Value(STRUCT, {3: Value(I64, nulls)})
    fields = {2: Value(I64, start), 3: Value(STRUCT, said)}
    return Value(STRUCT, fields | {int(number[1:]): value for number, value in more.items()})


def group(rows: int, *chunks: Value) -> Value:
    return Value(STRUCT, {1: Value(LIST, list(chunks), STRUCT), 2: Value(I64, 99), 3: Value(I64, rows)})


def parsed(groups: list[Value] | None, total: int, **more: Value) -> Footer:
    fields = {1: Value(I32, 2), 2: Value(LIST, SCHEMA, STRUCT), 3: Value(I64, total)}
    if groups is not None:
        fields[4] = Value(LIST, groups, STRUCT)
    data = encoded_fields({**fields, 6: Value(BINARY, b"a writer"), **{int(k[1:]): v for k, v in more.items()}})
    data += len(data).to_bytes(4, "little") + b"PAR1"
    return parse_footer("a.parquet", data, DATA_NBYTES)


GROUPS = [
    group(3, chunk(4, 50, 3, nulls=0, plain=60), chunk(54, 100, 12, nulls=1)),
    group(2, chunk(200, 50, 2, nulls=0, plain=50), chunk(254, 100, 8)),
    group(0, chunk(400, 0, 0), chunk(400, 0, 0)),
]


def test_footers_tell_what_is_in_them() -> None:
    footer = parsed(GROUPS, 5)
    assert footer.group_rows == (3, 2, 0)
    assert footer.writer == "a writer"
    assert (footer.schema.names, footer.schema.paths) == (("n", "v"), ("n", "v.list.element"))
    assert footer.schema.arrow.types == [pa.int64(), pa.list_(pa.float32())]
    assert [found[:3] for found in footer.chunks(0)] == [(4, 54, 3), (200, 250, 2), (400, 400, 0)]
    assert [found[:3] for found in footer.chunks(1, [1, 0])] == [(254, 354, 8), (54, 154, 12)]
    assert (footer.may_hold_nulls(0), footer.may_hold_nulls(1)) == (False, True)
    assert (footer.plain_nbytes([0], 0), footer.plain_nbytes([0, 1], 1), footer.plain_nbytes([], 0)) == (60, 57, 0)
    assert parsed(None, 0).group_rows == parsed([], 0).group_rows == ()
    assert parsed(GROUPS, 0).group_rows == (3, 2, 0), "some writers leave the rows of the file at 0"


def test_chunks_that_are_read_field_by_field_tell_of_nulls_too() -> None:
    """Of groups without rows nothing is known, nor matters."""
    unusual = {"_1": Value(BINARY, b"")}

    def odd(rows: int, nulls: int | None) -> Value:
        said = chunk(4, 50, rows, nulls=nulls)
        return group(rows, Value(STRUCT, {1: unusual["_1"], **said.content}), chunk(4, 9, rows, nulls=0))

    for nulls, may_hold in (([0, 0], False), ([0, 2], True), ([None, 0], True)):
        footer = parsed([odd(3, nulls[0]), odd(2, nulls[1]), odd(0, None)], 5)
        assert 0 in footer.groups.odd
        assert footer.may_hold_nulls(0) == may_hold
        assert not footer.may_hold_nulls(1)


WRONG: dict[str, tuple[list[Value], int, str]] = {
    "another number of rows": (GROUPS, 6, "damaged: it promises 6 rows, its row groups 5; write the file again"),
    "rows below 0": ([group(6, *[chunk(4, 9, 6)] * 2), group(-1, *[chunk(4, 9, -1)] * 2)], 5, "it promises 5 rows"),
    "fewer columns": ([group(3, chunk(4, 9, 3))], 3, "row group 0 has 1 column chunks where 2 were expected"),
    "no rows": ([Value(STRUCT, {1: GROUPS[0].content[1], 2: Value(I64, 9)})], 3, "is missing or garbled; write"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_footers_that_cannot_be_are_told(wrong: str) -> None:
    groups, total, says = WRONG[wrong]
    with pytest.raises(FormatError, match=rf"^a\.parquet: .*{says}"):
        parsed(groups, total)


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (chunk(4, 50, 4), "row group 1 is said to have 3 rows, but 4 values of column 'n'"),
        (chunk(4, 997, 3), "row group 1 is said to be at bytes 4 to 1,001, but the data of the file ends at 1,000"),
        (
            Value(STRUCT, {2: Value(I64, 4)}),
            "column 'n' is encrypted, which cannot be read; write the file again",
        ),
        (chunk(4, 5, 3, _8=Value(STRUCT, {})), "column 'n' is encrypted"),
        (
            Value(STRUCT, {1: Value(BINARY, b"x"), **chunk(4, 5, 3).content}),
            "row group 1 is said to be in another file",
        ),
    ],
)
def test_chunks_that_cannot_be_are_told_where_they_are_wanted(first: Value, says: str) -> None:
    footer = parsed([GROUPS[0], group(3, first, chunk(54, 100, 12, nulls=0))], 6)
    assert len(footer.chunks(1)) == 2
    assert len(footer.chunks(0, [0])) == 1
    with pytest.raises(FormatError, match=rf"^a\.parquet: .*{says}"):
        footer.chunks(0)


def test_an_index_of_pages_lies_in_the_file() -> None:
    for start, nbytes, found in (
        (0, 9, (0, 9)),
        (500, 500, (500, 1_000)),
        (500, 501, (0, 0)),
        (-1, 9, (0, 0)),
        (9, -1, (0, 0)),
        (7, 0, (7, 7)),
    ):
        first = chunk(4, 50, 3, _4=Value(I64, start), _5=Value(I32, nbytes))
        footer = parsed([group(3, first, chunk(54, 100, 12))], 3)
        assert footer.index_place(0, 0) == found
        assert footer.index_place(1, 0) == (0, 0)


def test_writers_may_have_any_name() -> None:
    assert parsed(GROUPS, 5, _6=Value(BINARY, b"caf\xe9")).writer == "caf\ufffd"


@pytest.mark.parametrize("metadata", [None, {"a": "b"}])
@pytest.mark.parametrize("rows", [0, 5, 12])
def test_footers_that_pyarrow_wrote_are_read_part_by_part(rows: int, metadata: dict[str, str] | None) -> None:
    table = pa.table({"n": np.arange(rows), "t": ["x"] * rows}).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=5, version="2.6")
    data = sink.getvalue()
    told = pq.read_metadata(io.BytesIO(data))
    raw = read_raw_footer(data)
    assert raw.start == len(data) - 8 - told.serialized_size
    assert raw.version == 2
    assert raw.created_by.decode() == told.created_by
    assert [each.nbytes for each in raw.groups] == [told.row_group(n).total_byte_size for n in range(len(raw.groups))]
    for n, each in enumerate(raw.groups):
        assert each.compressed_nbytes == sum(told.row_group(n).column(k).total_compressed_size for k in range(2))
        count, columns = each.split_columns()
        assert count == 2
        assert each.columns.endswith(columns)
        assert len(columns) == len(each.columns) - 1
    assert len(raw.groups) == told.num_row_groups
    # All parts, joined again, are the footer.
    footer = data[raw.start : -8]
    for part in (raw.schema, raw.key_values, raw.column_orders):
        assert part in footer
        assert part[0] & 15 in (STRUCT, 12)
    assert b"ARROW:schema" in raw.key_values


def test_groups_may_not_tell_what_they_take_compressed() -> None:
    for more, compressed in (({}, 99), ({6: Value(I64, 50)}, 50)):
        fields = {**GROUPS[0].content, **more}
        data = encoded_fields(
            {
                1: Value(I32, 1),
                2: Value(LIST, SCHEMA, STRUCT),
                3: Value(I64, 3),
                4: Value(LIST, [Value(STRUCT, fields)], STRUCT),
                6: Value(BINARY, b"w"),
            }
        )
        raw = read_raw_footer(b"PAR1" + data + len(data).to_bytes(4, "little") + b"PAR1")
        columns = encoded(GROUPS[0].content[1])
        assert raw.groups == [RawGroup(columns, 99, compressed)]
        assert (raw.start, raw.version, raw.created_by, raw.key_values, raw.column_orders) == (4, 1, b"w", b"", b"")
        assert raw.schema == encoded(Value(LIST, SCHEMA, STRUCT))


def test_footers_may_be_long() -> None:
    name = bytes(2**24)
    data = encoded_fields({1: Value(I32, 1), 2: Value(LIST, SCHEMA, STRUCT), 6: Value(BINARY, name)})
    raw = read_raw_footer(b"PAR1" + data + len(data).to_bytes(4, "little") + b"PAR1")
    assert (raw.start, raw.created_by == name) == (4, True)


@pytest.mark.parametrize("writer", [b"", b"w" * 5, b"w" * 200])
@pytest.mark.parametrize("has_notes", [False, True])
def test_footers_of_no_rows_are_encoded_for_pyarrow(writer: bytes, has_notes: bool) -> None:
    elements = encoded(Value(LIST, SCHEMA, STRUCT))
    pair = Value(STRUCT, {1: Value(BINARY, b"key"), 2: Value(BINARY, b"value")})
    notes = encoded(Value(LIST, [pair], STRUCT)) if has_notes else b""
    footer = encode_footer(elements, [], notes, writer)
    fields: dict[int, Any] = {1: Value(I32, 2), 2: Value(LIST, SCHEMA, STRUCT), 3: Value(I64, 0)}
    fields[4] = Value(LIST, [], STRUCT)
    fields |= {5: Value(LIST, [pair], STRUCT)} if has_notes else {}
    fields |= {6: Value(BINARY, writer)} if writer else {}
    assert footer == encoded_fields(fields)
    told = pq.read_metadata(io.BytesIO(as_file(footer)))
    assert (told.num_rows, told.num_row_groups, told.format_version) == (0, 0, "2.6")
    assert as_file(footer) == b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
