"""Which columns are meant by a name, and what is said where none is: in full, as it is what people have to act on."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dask_embedding_reader.errors import ColumnError
from dask_embedding_reader.formats.column_names import (
    MOST_COMPARED,
    few,
    fields_of,
    find_field,
    name_vectors,
    no_column,
    no_column_of_vectors,
    number_columns,
)

INT, LISTS = pa.int8(), pa.list_(pa.float32())


def struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct(list(fields.items()))


def test_columns_are_found_before_fields_of_structs_and_only_one_of_a_name() -> None:
    schema = pa.schema(
        [
            ("a.b", INT),
            ("a", struct(b=INT, c=INT, **{"d.e": INT})),
            ("n", struct(m=struct(x=INT, y=LISTS), **{"m.z": INT})),
            ("twice", INT),
            ("twice", INT),
            ("p", struct(**{"q.r": INT, "q": struct(r=INT, s=INT)})),
            ("ab", INT),
            ("list", pa.list_(struct(x=INT))),
        ]
    )
    found = {
        "a.b": (0,),
        "a": (1,),
        "a.c": (1, 1),
        "a.d.e": (1, 2),
        "n.m.x": (2, 0, 0),
        "n.m.y": (2, 0, 1),
        "n.m.z": (2, 1),
        "n.m": (2, 0),
        "p.q.s": (5, 1, 1),
        "ab": (6,),
        "list": (7,),
    }
    for name, path in found.items():
        assert find_field(schema, name) == path
        assert [field.name for field in fields_of(schema, path)][-1] in name
        assert len(fields_of(schema, path)) == len(path)
    assert fields_of(schema, (2, 0, 1))[-1] == pa.field("y", LISTS)
    for name in ("twice", "p.q.r", "b", "a.", "a.b.c", "ab.c", "", "a.x", "list.x", "n.m.x.w", "c"):
        assert find_field(schema, name) is None


def test_patterns_name_numbered_columns_in_their_order() -> None:
    cases = [
        ("e*", ["e2", "x", "e0", "e1"], ("e0", "e1", "e2")),
        ("e*", ["e2", "e1"], ("e1", "e2")),
        ("e*", ["e1"], ("e1",)),
        ("e*", ["e0"], ("e0",)),
        ("*", [str(n) for n in range(12)], tuple(str(n) for n in range(12))),
        ("e_*_x", ["e_01_x", "e_00_x", "e_1", "_01_x", "e_02_x "], ("e_00_x", "e_01_x")),
        ("a.c*", ["abc0", "a.c0"], ("a.c0",)),
        ("e\n*", ["e\n0", "e\n1"], ("e\n0", "e\n1")),
    ]
    for glob, names, found in cases:
        assert number_columns("url", glob, names) == found


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "b"], "names none of its columns: 'a', 'b'"),
        ([], "names none of its columns: "),
        (
            [f"c{n}" for n in range(13)],
            f"names none of its columns: {', '.join(repr(f'c{n}') for n in range(10))} and 3 more",
        ),
        (["e0", "e1", "e", "ex"], "also names 'e', 'ex', which is no number; list the names (embedding_column=[...])"),
        (["e0", "e-1"], "also names 'e-1', which is no number; list the names (embedding_column=[...])"),
        (["e0", "e٣"], "also names 'e٣', which is no number; list the names (embedding_column=[...])"),
        (["e0\n"], "also names 'e0\\n', which is no number; list the names (embedding_column=[...])"),
        (["e2", "e3"], "names 2 columns, but 'e2' where number 1 was expected"),
        (["e0", "e2"], "names 2 columns, but 'e2' where number 1 was expected"),
        (["e1", "e3", "e2", "e5"], "names 4 columns, but 'e5' where number 4 was expected"),
        (["e1", "e01"], "names 2 columns, but 'e01' where number 2 was expected"),
        ([f"e{n}" for n in range(1_100) if n != 1_050], "names 1,099 columns, but 'e1051' where number 1,050 was exp"),
    ],
)
def test_patterns_that_name_other_columns_are_refused(names: list[str], told: str) -> None:
    with pytest.raises(ColumnError) as refused:
        number_columns("s3://a/0.parquet", "e*", names)
    assert str(refused.value).startswith(f"s3://a/0.parquet: embedding_column='e*' {told}")
    if "expected" in told:
        assert str(refused.value).endswith("; if that is how it should be, list the names (embedding_column=[...])")


def test_a_few_of_many_names_are_written_out() -> None:
    ten, eleven = ([f"n{k}" for k in range(count)] for count in (10, 11))
    shown = ", ".join(map(repr, ten))
    assert few([]) == ""
    assert few(["a"]) == few(["a"], 1) == "'a'"
    assert few(["a"], 3) == "'a' and 2 more"
    assert few(ten) == few(ten, 4) == shown
    assert few(eleven) == few(eleven, 2) == few(ten, 11) == f"{shown} and 1 more"
    assert few(eleven, 5_000) == f"{shown} and 4,990 more"
    assert few(["x" * 60, "y" * 61]) == f"'{'x' * 60}', '{'y' * 59}…'"


def test_what_is_not_there_is_told_with_what_is() -> None:
    told = [
        (["a", "b"], "c", "has no column 'c'; its columns are 'a', 'b'"),
        (["x", "y", "colour", "z"], "color", "has no column 'color'; its columns are 'colour', "),
        (["a", "b", "a"], "a", "has 2 columns named 'a'; its columns are 'a', "),
        ([], "c", "has no column 'c'; its columns are none"),
        (["same"] * 30, "other", "has no column 'other'; its columns are 'same'"),
        (
            [f"n{k}" for k in range(MOST_COMPARED)] + ["likely"],
            "likelyy",
            "has no column 'likelyy'; its columns are 'n",
        ),
        (
            [f"n{k}" for k in range(MOST_COMPARED - 1)] + ["likely"],
            "likelyy",
            "has no column 'likelyy'; its columns are 'likely', ",
        ),
    ]
    for names, name, message in told:
        error = no_column("url", names, name)
        assert isinstance(error, ColumnError)
        assert str(error).startswith(f"url: {message}")
    assert str(no_column("url", [f"n{k}" for k in range(25)], "c")).endswith(" and 15 more")


NAME = "name the column of vectors (embedding_column=...)"


def test_what_may_be_the_column_of_vectors_is_told() -> None:
    binary = '; where it is bytes, their dtype, too (embedding_dtype="float32")'
    numbered = {f"e{n}": pa.float32() for n in range(8)}
    seven = {f"i{n}": pa.int64() for n in range(7)}
    cases: list[tuple[dict[str, pa.DataType], list[str], str]] = [
        ({}, [], NAME),
        ({"a": LISTS}, ["a", "b"], f"{NAME}, such as 'a', 'b'"),
        ({"n": pa.int8(), "text": pa.string()}, [], NAME),
        ({"s": struct(x=INT, v=LISTS, w=LISTS)}, [], f"{NAME}, a field of a struct as 's.v'"),
        ({"r": LISTS, "s": struct(v=pa.list_(INT))}, [], NAME),
        ({"s": struct(v=pa.large_list(pa.float64()))}, [], f"{NAME}, a field of a struct as 's.v'"),
        ({"s": struct(v=pa.list_(pa.float16(), 3))}, [], f"{NAME}, a field of a struct as 's.v'"),
        ({"b": pa.binary()}, [], NAME + binary),
        ({"b": pa.large_binary()}, [], NAME + binary),
        ({"b": pa.binary(8)}, [], NAME + binary),
        ({"n": INT, "b": pa.binary(8)}, [], NAME + binary),
        (numbered, [], f"{NAME}; where each item has its own: embedding_column='e*'"),
        ({**seven, **numbered}, [], f"{NAME}; where each item has its own: embedding_column='e*'"),
        ({**numbered, **seven}, [], f"{NAME}; where each item has its own: embedding_column='e*'"),
        (seven, [], NAME),
        ({**seven, "i": pa.int64(), "i7x": pa.int64(), "i²": pa.int64(), "i8": pa.string()}, [], NAME),
        ({**seven, "i77": pa.int8()}, [], f"{NAME}; where each item has its own: embedding_column='i*'"),
        ({str(n): pa.int8() for n in range(8)}, [], f"{NAME}; where each item has its own: embedding_column='*'"),
        (
            {"b": pa.binary(), "s": struct(v=LISTS), **numbered},
            [],
            f"{NAME}, a field of a struct as 's.v'{binary}; where each item has its own: embedding_column='e*'",
        ),
    ]
    for fields, likely, message in cases:
        assert name_vectors(pa.schema(list(fields.items())), likely) == message


def test_a_column_of_vectors_that_is_not_there_is_told_with_types() -> None:
    schema = pa.schema([("n", pa.int64()), ("t" * 61, pa.string()), ("s", struct(**{f"f{k}": INT for k in range(20)}))])
    kind = str(schema.field("s").type)[:60]
    assert str(no_column_of_vectors("url", schema, schema.names, "v", [])) == (
        "url: has no column 'v'; none of its columns holds lists of numbers, equally many in each row: 'n' is int64, "
        f"{'t' * 60!r} is string, 's' is {kind}; {NAME}"
    )
    nothing = pa.schema([])
    assert str(no_column_of_vectors("url", nothing, [], "v", [])) == (
        "url: has no column 'v'; none of its columns holds lists of numbers, equally many in each row: there are none; "
        f"{NAME}"
    )
    for count, more in ((10, ""), (11, " and 1 more"), (1_510, " and 1,500 more")):
        wide = pa.schema([(f"c{k}x", INT) for k in range(count)])
        told = ", ".join(f"'c{k}x' is int8" for k in range(10))
        assert str(no_column_of_vectors("url", wide, wide.names, "v", [])).endswith(f": {told}{more}; {NAME}")
    error = no_column_of_vectors("url", schema, ["n", "v", "v"], "v", ["a"])
    assert str(error) == f"url: has 2 columns named 'v'; {NAME}, such as 'a'; its columns are 'v', 'n'"
