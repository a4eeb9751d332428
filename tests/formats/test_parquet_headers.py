"""What footers tell of columns: dimensions though vectors are ragged, nulls, which columns hold vectors, and damage."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import ColumnError, FormatError, ReadError
from dask_embedding_reader.formats.base import Columns, FileHeader, MetaColumn
from dask_embedding_reader.formats.columns import expand_glob
from dask_embedding_reader.formats.parquet import footers, header, schema
from dask_embedding_reader.formats.parquet.footers import FOOTERS, read_footer
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.parquet.header import find_vectors, read_header
from dask_embedding_reader.formats.parquet.schema import schema_tree
from dask_embedding_reader.formats.parquet.thrift import DEEPEST, RAW, DamagedError, read_struct
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.thrift import BINARY, I32, LIST, STRUCT, Value, encoded

LISTS = pa.list_(pa.float32())


def stored(path: Path, content: bytes) -> StoredFile:
    path.write_bytes(content)
    FOOTERS.clear()
    return StoredFile(LocalStore(LocalFileSystem()), str(path), Version(len(content)))


def written(groups: Sequence[pa.Table], **options: Any) -> bytes:
    """A file with these tables as its row groups."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, groups[0].schema, **options) as writer:
        for group in groups:
            writer.write_table(group)
    return sink.getvalue()


def vectors(*lengths: int | None) -> pa.Table:
    """Of some lengths, or null."""
    return pa.table({"embedding": pa.array([None if n is None else [1.0] * n for n in lengths], LISTS)})


EMBEDDING = Columns("embedding")

# ---------------------------------------------------------------------------------------------------------------------
# Dimensions


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([[4, 4, 4], [6] * 4], "row 0: .* has 4 items where vectors of 6 items"),
        ([[4] * 4, [6] * 3], "row 4: .* has 6 items where vectors of 4 items"),
        ([[4] * 3, [6] * 2, [6] * 2], "row 0: .* has 4 items where vectors of 6 items"),
        ([[None, 6, 6, 6, 6], [4] * 2], "row 0: .* is null where vectors of 4 items"),
        ([[4] * 2, [6, 6, None], [4]], "row 4: .* is null where vectors of 4 items"),
        ([[4] * 2, [6, 6, 5], [4]], "row 2: .* has 6 items where vectors of 4 items"),
        ([[4] * 3, [4, 4, 5, 4]], "row 5: .* has 5 items where vectors of 4 items"),
        ([[5, 4, 4], [3, 3, 3, 4]], "row 0: .* has 5 items where vectors of 4 items"),
        ([[4, 4, 5], [4, 4, 6], [4, 4, 4, 9]], "row 2: .* has 5 items where vectors of 4 items"),
        ([[4, 4, 4], [None], [4, 5, 4]], "row 3: .* is null where vectors of 4 items"),
        ([[0, 0, 0]], "holds vectors of no items"),
        ([[None, None], [None]], "row 0: .* holds a vector that is null; drop"),
        ([[1, 1], [2], [1], [3]], "row 2: .* has 2 items where vectors of 1 item"),
    ],
    ids=str,
)
def test_dimensions_are_those_of_most_rows_as_far_as_counts_tell(
    tmp_path: Path, groups: list[list[int | None]], says: str
) -> None:
    """And the first row that is otherwise is named, in whichever row group it is."""
    content = written([vectors(*lengths) for lengths in groups])
    with pytest.raises(FormatError, match=rf"a\.parquet.*{says}"):
        read_header(stored(tmp_path / "a.parquet", content), EMBEDDING)


@pytest.mark.parametrize("groups", [[[4] * 9], [[4], [], [4, 4]], [[1], [1, 1]], [[], [7, 7]]], ids=str)
def test_vectors_of_one_length_are_none_of_another(tmp_path: Path, groups: list[list[int | None]]) -> None:
    content = written([vectors(*lengths) for lengths in groups])
    found = read_header(stored(tmp_path / "a.parquet", content), EMBEDDING)
    [length] = {length for lengths in groups for length in lengths}
    assert (found.rows, found.dimension, found.dtype) == (sum(map(len, groups)), length, np.dtype("f4"))
    assert found.group_rows == tuple(map(len, groups))
    assert found.meta == ()


@pytest.mark.parametrize(
    ("lengths", "dimension"),
    [
        ([8] * 3, 2),
        ([8] + [12] * 2, 3),
        ([4] * 60 + [8] * 39 + [8] * 100, 1),
        ([4] * 40 + [8] * 60 + [4] * 100, 2),
        ([None, 8], 2),
        ([None] * 99 + [16], 4),
    ],
    ids=lambda given: None if isinstance(given, list) else str(given),
)
def test_of_bytes_the_first_hundred_tell_the_dimension(
    tmp_path: Path, lengths: list[int | None], dimension: int
) -> None:
    values = [None if n is None else bytes(n) for n in lengths]
    content = written([pa.table({"embedding": pa.array(values, pa.binary())})])
    columns = Columns("embedding", np.dtype("f4"))
    file = stored(tmp_path / "a.parquet", content)
    assert read_header(file, columns).dimension == dimension


@pytest.mark.parametrize(("count", "is_known"), [(99, True), (100, False)])
def test_bytes_that_are_all_null_tell_none(tmp_path: Path, count: int, is_known: bool) -> None:
    content = written([pa.table({"embedding": pa.array([None] * count + [bytes(8)], pa.binary())})])
    file, columns = stored(tmp_path / "a.parquet", content), Columns("embedding", np.dtype("f4"))
    if is_known:
        assert read_header(file, columns).dimension == 2
    else:
        with pytest.raises(FormatError, match=r"row 0: .* is null"):
            read_header(file, columns)


# ---------------------------------------------------------------------------------------------------------------------
# Columns


def test_metadata_may_hold_nulls_where_nothing_proves_that_it_holds_none(tmp_path: Path) -> None:
    none, some = [1, 2, 3], [1, None, 3]
    pairs = [{"x": 1, "y": 2}, {"x": 1, "y": None}, {"x": 2, "y": 1}]
    columns: dict[str, tuple[pa.Array, bool]] = {
        "none": (pa.array(none), False),
        "some": (pa.array(some), True),
        "text": (pa.array(["a", None, "c"]), True),
        "whole text": (pa.array(["a", "b", "c"]), False),
        "dictionary": (pa.array(["a", "b", "c"]).dictionary_encode(), False),
        "dictionary of some": (pa.array(["a", None, "c"]).dictionary_encode(), True),
        "pair": (pa.array(pairs), True),
        "whole pair": (pa.array([{"x": 1, "y": 2}] * 3), False),
        "list": (pa.array([[1], [2], [3]]), False),
    }
    table = pa.table({name: column for name, (column, _) in columns.items()})
    file = stored(tmp_path / "a.parquet", written([table]))
    found = read_header(file, Columns(None, None, tuple(columns)))
    assert [(name, column.has_nulls) for name, column in zip(columns, found.meta, strict=True)] == [
        (name, has_nulls) for name, (_, has_nulls) in columns.items()
    ]
    assert [column.type for column in found.meta[:5]] == [pa.int64()] * 2 + [pa.string()] * 3
    unknown = stored(tmp_path / "b.parquet", written([table], write_statistics=False))
    assert all(column.has_nulls for column in read_header(unknown, Columns(None, None, tuple(columns))).meta)
    fields = [field.with_nullable(False) for field in table.schema if not columns[field.name][1]]
    whole = table.select([field.name for field in fields]).cast(pa.schema(fields))
    proved = stored(tmp_path / "c.parquet", written([whole], write_statistics=False))
    names = tuple(whole.column_names)
    assert not any(column.has_nulls for column in read_header(proved, Columns(None, None, names)).meta)


@pytest.mark.parametrize(
    ("writer", "is_wrong"),
    [
        ("parquet-cpp-arrow version 4.0.1", True),
        ("parquet-cpp version 1.5.1-SNAPSHOT", True),
        ("parquet-cpp-arrow version 5.0.0", False),
        ("parquet-cpp-arrow version 14.0.0", False),
        ("parquet-mr version 1.12.3", False),
        ("", False),
    ],
)
def test_dictionaries_of_which_writers_hold_nulls_though_they_say_no(writer: str, is_wrong: bool) -> None:
    assert header._counts_nulls_wrongly(writer) == is_wrong


def test_files_without_rows_have_columns_of_no_type(tmp_path: Path) -> None:
    file = stored(tmp_path / "a.parquet", written([vectors()]))
    found = read_header(file, Columns("nothing", None, ("a", "b")))
    assert (found.rows, found.dimension) == (0, 0)
    assert found.meta == (MetaColumn(pa.null(), True),) * 2
    assert find_vectors(file, EMBEDDING) is None
    assert expand_glob(PARQUET, file, "e*") is None
    assert not footers.has_rows(file)


def test_columns_of_vectors_are_found(tmp_path: Path) -> None:
    row = [1.0, 2.0]
    columns = {
        "text": pa.array(["a", "b", "c"]),
        "number": pa.array([1, 2, 3]),
        "ragged": pa.array([row, [1.0], [1.0]], LISTS),
        "vector": pa.array([row] * 3, LISTS),
        "fixed": pa.array([row] * 3, pa.list_(pa.float64(), 2)),
        "words": pa.array([["a", "b"]] * 3),
        "bytes": pa.array([bytes(8)] * 3),
        "wide bytes": pa.array([bytes(8)] * 3, pa.binary(8)),
        "missing": pa.array([row, None, row], LISTS),
        "integers": pa.array([[1, 2]] * 3, pa.large_list(pa.int8())),
    }
    file = stored(tmp_path / "a.parquet", written([pa.table(columns)]))
    assert find_vectors(file, Columns()) == ["vector", "fixed", "integers"]
    assert find_vectors(file, Columns(None, np.dtype("f4"))) == ["bytes", "wide bytes"]
    named = stored(tmp_path / "b.parquet", written([pa.table({**columns, "embedding": columns["text"]})]))
    assert find_vectors(named, Columns()) == ["embedding"]
    # In each row group of the same length, though not everywhere; and of several row groups.
    for groups, found in (([(2, 2), (3,), (3, 3)], []), ([(2, 2), (), (2,)], ["x"])):
        tables = [vectors(*lengths).rename_columns(["x"]) for lengths in groups]
        assert find_vectors(stored(tmp_path / "c.parquet", written(tables)), EMBEDDING) == found


def test_columns_of_the_same_name_are_none(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays(
        [pa.array([bytes(4)]), pa.array([bytes(4)]), pa.array([bytes(4)]), *[pa.array([[1.0]], LISTS)] * 2],
        names=["a", "a", "b", "v", "v"],
    )
    file = stored(tmp_path / "a.parquet", written([twice]))
    assert find_vectors(file, Columns(None, np.dtype("f4"))) == ["b"]
    assert find_vectors(file, Columns()) == []
    for name in ("a", "v", "c"):
        with pytest.raises(ColumnError, match=f"'{name}'"):
            read_header(file, Columns(None, None, (name,)))
    assert expand_glob(PARQUET, file, "b") == ()


def test_patterns_name_columns_of_numbers(tmp_path: Path) -> None:
    table = pa.table({f"e{number}": [1.0] for number in (2, 0, 1)} | {"x": [1]})
    file = stored(tmp_path / "a.parquet", written([table]))
    assert expand_glob(PARQUET, file, "e*") == ("e0", "e1", "e2")
    assert expand_glob(PARQUET, file, "e0") == ()
    with pytest.raises(ColumnError, match="names none of its columns"):
        expand_glob(PARQUET, file, "f*")


@pytest.mark.parametrize("name", ["s.vector", "s.other", "s.inner.vector", "vector"])
def test_vectors_may_be_fields_of_structs(tmp_path: Path, name: str) -> None:
    """Of fields beside each other, in any order, the one that is asked for."""
    made = {"vector": [1.0, 2.0], "text": "a", "other": [3.0, 4.0, 5.0], "inner": {"n": 1, "vector": [6.0] * 4}}
    inner = pa.struct({"n": pa.int64(), "vector": LISTS})
    kind = pa.struct({"vector": LISTS, "text": pa.string(), "other": LISTS, "inner": inner})
    table = pa.table({"n": [1, 2], "s": pa.array([made] * 2, kind), "vector": pa.array([[7.0] * 5] * 2, LISTS)})
    file = stored(tmp_path / "a.parquet", written([table]))
    expected = {"s.vector": 2, "s.other": 3, "s.inner.vector": 4, "vector": 5}
    assert read_header(file, Columns(name)).dimension == expected[name]
    footer = read_footer(file, (name,))
    field, leaves = header.vector_field(file, footer, name)
    assert (field.name, field.type) == (name, LISTS)
    assert [footer.schema.paths[leaf].rpartition(".list")[0] for leaf in leaves] == [name]


# ---------------------------------------------------------------------------------------------------------------------
# Ends of files


WHOLE = written([vectors(*[4] * 5)])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a parquet file: it has only 0 bytes"),
        (b"P", "not a parquet file: it has only 1 byte$"),
        (b"PAR1" + b"PAR1" + b"abc", "not a parquet file: it has only 11 bytes"),
        (b"PAR1" + bytes(4) + b"PARE", "encrypted parquet"),
        (b"PAR1" + bytes(8), r"it ends with b'\\x00\\x00\\x00\\x00' where b'PAR1' was expected"),
        (WHOLE[:-1], "where b'PAR1' was expected; was it cut short"),
        (b"PAR1" + struct.pack("<I", 5) + b"PAR1", "damaged: its footer claims 13 bytes of the file's 12"),
        (b"PAR1" + struct.pack("<I", 4) + b"PAR1", "its parquet footer cannot be read"),
        (b"PAR1" + struct.pack("<I", 2**31) + b"PAR1", "claims 2,147,483,656 bytes of the file's 12"),
    ],
)
def test_what_is_no_parquet_file_is_told(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(FormatError, match=rf"a\.parquet: .*{says}"):
        read_footer(stored(tmp_path / "a.parquet", content), ())


def test_a_file_of_unknown_size_is_told(tmp_path: Path) -> None:
    file = stored(tmp_path / "a.parquet", WHOLE)._replace(version=Version(-1))
    with pytest.raises(ReadError, match="the storage does not tell its size"):
        read_footer(file, ())


@pytest.mark.parametrize("more", [-1, 0, 1, 5_000])
def test_a_long_footer_is_read_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    nbytes = int.from_bytes(WHOLE[-8:-4], "little") + 8
    first = nbytes - more if more < nbytes else nbytes // 2
    monkeypatch.setattr(footers, "_FOOTER_READ_NBYTES", first)
    asked: list[tuple[int, int]] = []
    read = read_range

    def note(file: StoredFile, start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return read(file, start, stop)

    monkeypatch.setattr(footers, "read_range", note)
    file = stored(tmp_path / "a.parquet", WHOLE)
    footer = read_footer(file, ())
    size = len(WHOLE)
    parts = [(size - first, size), (size - nbytes, size - first)]
    assert asked == parts[: 1 + (first < nbytes)]
    assert (footer.data, footer.data_nbytes) == (WHOLE[-nbytes:], size - nbytes)
    asked.clear()
    assert read_footer(file, ("embedding",)) is footer
    assert not asked


def promised(file: StoredFile, **changes: Any) -> FileHeader:
    return read_header(file, EMBEDDING)._replace(**changes)


def test_row_groups_are_those_that_were_promised(tmp_path: Path) -> None:
    file = stored(tmp_path / "a.parquet", written([vectors(*[4] * n) for n in (5, 3, 2)]))
    for changes in ({}, {"group_rows": (3, 2), "first_group": 1}, {"group_rows": (3,), "first_group": 1}):
        assert footers.promised_footer(promised(file, **changes), ("embedding",)).group_rows == (5, 3, 2)
    wrong: list[dict[str, Any]] = [
        {"rows": 11},
        {"group_rows": (5, 2, 3)},
        {"group_rows": (5, 3, 2, 1)},
        {"group_rows": (5, 3), "first_group": 1},
    ]
    for changes in wrong:
        with pytest.raises(FormatError, match=r"holds 10 rows in 3 row groups, where 1. rows in other row groups were"):
            footers.promised_footer(promised(file, **changes), ("embedding",))


def test_of_a_row_text_is_counted_as_long_as_it_is(tmp_path: Path) -> None:
    """As its dictionary tells, where that is what the footer tells the size of."""
    rows = 1_000
    columns = {
        "number": pa.array(np.random.default_rng(0).permutation(rows)),
        "text": pa.array([f"{n:0100}" for n in range(rows)]),
        "same": pa.array(["x" * 600] * rows),
        "few": pa.array([("x" * 5_000, "y" * 4_000)[n % 2] for n in range(rows)]),
        "short": pa.array(["ab"] * rows),
    }
    table = pa.table(columns)
    groups = [table.slice(0, 100), table.slice(100)]
    file = stored(tmp_path / "a.parquet", written(groups, use_dictionary=["same", "few", "short"]))
    assert footers.row_nbytes(file, ("text",)) == 0, "its footer is not at hand"
    read_footer(file, ())
    assert 8 <= footers.row_nbytes(file, ("number",)) <= 10
    assert 104 <= footers.row_nbytes(file, ("text",)) <= 106
    assert footers.row_nbytes(file, ("few",)) == 4_504
    assert footers.row_nbytes(file, ("same",)) <= 5, "what is small together is not looked at"
    assert footers.row_nbytes(file, ("short",)) <= 3
    both = footers.row_nbytes(file, ("text", "number"))
    assert both == footers.row_nbytes(file, ("text",)) + footers.row_nbytes(file, ("number",))
    assert footers.row_nbytes(file, ("few", "text")) == 4_504
    empty = stored(tmp_path / "b.parquet", written([table.slice(0, 0)]))
    read_footer(empty, ())
    assert footers.row_nbytes(empty, ("text",)) == 0


def test_row_groups_that_may_match_are_told(tmp_path: Path) -> None:
    tables = [pa.table({"n": [n, n + 1]}) for n in (0, 10, 20)]
    file = stored(tmp_path / "a.parquet", written(tables))
    field = pc.field("n")
    assert footers.may_match(file, field > 10) == {1, 2}
    assert footers.may_match(file, field > 50) == set()
    assert footers.may_match(file, field < "a") is None


def test_columns_are_where_pyarrow_says(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2], "a.b": [3, 4], "ab": [5, 6], "s": pa.array([{"a": 1, "b": [2]}] * 2)})
    content = written([table, table])
    file = stored(tmp_path / "a.parquet", content)
    footer, told = read_footer(file, ()), pq.read_metadata(io.BytesIO(content))
    places = []
    for group in range(2):
        chunks = [told.row_group(group).column(leaf) for leaf in range(5)]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        places.append([(s, s + chunk.total_compressed_size) for s, chunk in zip(starts, chunks, strict=True)])
    for names, leaves in ((("a",), [0, 1]), (("ab",), [2]), (("s", "ab"), [2, 3, 4]), (("a.b",), [1]), (("s.a",), [3])):
        assert footers.leaves_of(footer, names) == leaves
        for groups in ([0, 1], [1], []):
            expected = [places[group][leaf] for group in groups for leaf in leaves]
            assert footers.chunk_ranges(footer, groups, names) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Schemas

Node = tuple[str, int, list[Any]]
"""A name, how often it is there, and what is below it."""


def random_node(chance: Random, name: str, depth: int) -> Node:
    below = (
        []
        if depth > 3 or chance.random() < 0.4
        else [random_node(chance, chance.choice("abc") + str(n), depth + 1) for n in range(chance.randint(1, 3))]
    )
    return name, chance.randrange(3), below


def nodes_of(node: Node) -> list[Value]:
    """Encoded node by node."""
    name, repetition, below = node
    fields = {} if below else {1: Value(I32, 2)}
    fields |= {3: Value(I32, repetition), 4: Value(BINARY, name.encode())}
    if below:
        fields[5] = Value(I32, len(below))
    return [Value(STRUCT, fields), *(each for child in below for each in nodes_of(child))]


def leaves_of(node: Node, prefix: str = "", is_flat: bool = True) -> list[tuple[str, bool]]:
    """The path of each leaf, and whether it has one value a row."""
    name, repetition, below = node
    is_flat = is_flat and repetition != 2
    if not below:
        return [(prefix + name, is_flat)]
    return [leaf for child in below for leaf in leaves_of(child, f"{prefix}{name}.", is_flat)]


def encoded_schema(columns: list[Node], more: int = 0) -> bytes:
    root = Value(STRUCT, {4: Value(BINARY, b"schema"), 5: Value(I32, len(columns) - more)})
    return encoded(Value(LIST, [root, *(each for column in columns for each in nodes_of(column))], STRUCT))


@pytest.mark.parametrize("seed", range(10))
def test_trees_of_columns_are_read(seed: int) -> None:
    chance = Random(seed)
    for count in (0, 1, 5):
        columns = [random_node(chance, f"column {n}", 0) for n in range(count)]
        found = [leaves_of(column) for column in columns]
        names, paths, leaves, flat = schema_tree(encoded_schema(columns))
        assert names == tuple(column[0] for column in columns)
        assert paths == tuple(path for of_column in found for path, _ in of_column)
        assert [[paths[leaf] for leaf in of_column] for of_column in leaves] == [[p for p, _ in each] for each in found]
        every = [is_flat for of_column in found for _, is_flat in of_column]
        assert flat == {leaf for leaf, is_flat in enumerate(every) if is_flat}


def test_trees_that_are_none_are_told() -> None:
    leaf: Node = ("leaf", 0, [])
    with pytest.raises(DamagedError, match="nodes that belong to no column"):
        schema_tree(encoded_schema([leaf, leaf], 1))
    with pytest.raises(StopIteration):
        schema_tree(encoded_schema([leaf], -1))
    for depth in (DEEPEST, DEEPEST + 1):
        node = leaf
        for _ in range(depth - 1):
            node = ("node", 1, [node])
        if depth == DEEPEST:
            assert schema_tree(encoded_schema([node]))[1] == ("node." * (depth - 1) + "leaf",)
        else:
            with pytest.raises(DamagedError, match=rf"nested deeper than {DEEPEST} levels"):
                schema_tree(encoded_schema([node]))


@pytest.mark.parametrize("store_schema", [True, False])
def test_some_columns_are_typed_as_they_are_among_all(tmp_path: Path, store_schema: bool) -> None:
    """By what the writer noted of them, too."""
    kinds = {
        "a": pa.int64(),
        "s": pa.struct({"x": pa.int32(), "y": pa.list_(pa.string())}),
        "kind": pa.dictionary(pa.int32(), pa.string()),
        "big": pa.large_string(),
        "v": pa.list_(pa.float32(), 2),
        "zone": pa.timestamp("us", "Europe/Berlin"),
        **{f"c{n}": pa.int8() for n in range(20)},
    }
    table = pa.schema(list(kinds.items())).empty_table()
    file = stored(tmp_path / "a.parquet", written([table], store_schema=store_schema))
    whole = read_footer(file, ()).schema
    facts, _ = read_struct(read_footer(file, ()).data, 0, {2: RAW, 5: RAW, 6: {}}, 0)
    for names in (["a"], ["v", "s"], ["kind", "big"], ["zone", "c19", "a"], [], ["nothing"], list(kinds)):
        part = schema.partial_schema(facts[2], facts.get(5, b""), frozenset(names))
        assert (part.names, part.paths, part.flat) == (whole.names, whole.paths, whole.flat)
        kept = [name for name in kinds if name in names]
        assert part.arrow.names == kept
        assert part.asked == frozenset(names)
        for name in kept:
            assert part.arrow.field(name).type == whole.arrow.field(name).type
            assert part.leaves[kept.index(name)] == whole.leaves[list(kinds).index(name)]
