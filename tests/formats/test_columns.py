"""Metadata columns by themselves: their types over all files, what folders tell, and rows decoded in parts."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import FormatError, MismatchError
from dask_embedding_reader.formats.arrow import ARROW
from dask_embedding_reader.formats.base import (
    Columns,
    FileFormat,
    FileHeader,
    FilePart,
    MetaColumn,
    cut_parts,
    default_piece_rows,
)
from dask_embedding_reader.formats.columns import (
    expand_glob,
    first_schema,
    iter_columns,
    may_match,
    open_columns,
    read_columns,
    row_nbytes,
    step_rows,
)
from dask_embedding_reader.formats.metadata import MetaField, empty_frame, make_frame, make_table, merge_columns
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.partitions import (
    TOLD_BY_FOLDERS,
    partition_types,
    partition_values,
    settled,
    shared_partitions,
    told_by_folders,
)
from dask_embedding_reader.formats.picking import read_picked_frame, read_picked_table
from dask_embedding_reader.storage.local import LocalStore, file_info
from dask_embedding_reader.storage.store import StoredFile

COUNT = 1_000
TABLE = pa.table(
    {
        "n": pa.array(range(COUNT)),
        "x": pa.array(np.arange(COUNT) / 8),
        "word": pa.array([f"word {n}" if n % 7 else None for n in range(COUNT)]),
    }
)
KINDS: dict[str, FileFormat] = {"parquet": PARQUET, "arrow": ARROW}


def stored(path: Path, table: pa.Table, rows: int = 300) -> StoredFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, rows)
    return StoredFile(LocalStore(LocalFileSystem()), str(path), file_info(str(path)).version)


def header_of(kind: str, file: StoredFile, *names: str) -> FileHeader:
    return KINDS[kind].read_header(file, Columns(meta=names))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A format that holds columns."""
    name: str = request.param
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_rows_come_in_order_so_many_at_a_time(tmp_path: Path, kind: str) -> None:
    names = ["word", "n"]
    header = header_of(kind, stored(tmp_path / f"0.{kind}", TABLE), *names)
    for start, stop, step in ((0, COUNT, 64), (299, 301, 5), (5, 6, 1), (250, 950, 1_000)):
        batches = list(iter_columns(header, names, start, stop, step))
        assert pa.Table.from_batches(batches).equals(TABLE.select(names).slice(start, stop - start))
        assert max(batch.num_rows for batch in batches) <= step
        read = open_columns(header, names, start, stop, step)
        cuts = np.unique(np.linspace(start, stop, 5).astype(int))
        counts = np.diff(cuts).tolist()
        tables = [read(count) for count in counts]
        assert [table.num_rows for table in tables] == counts
        assert pa.concat_tables(tables).equals(TABLE.select(names).slice(start, stop - start))


def test_rows_of_several_parts_are_one_below_the_other(tmp_path: Path, kind: str) -> None:
    """Of several files in the types that all of these have; of one as they are."""
    files = [stored(tmp_path / f"{number}.{kind}", TABLE) for number in range(2)]
    first, second = (header_of(kind, file, "n", "word") for file in files)
    fields = [MetaField("word", pa.large_string(), True), MetaField("n", pa.int64(), False)]
    wanted = TABLE.select(["word", "n"])
    assert read_columns([FilePart(first, 10, 20)], fields).equals(wanted.slice(10, 10))
    parts = [FilePart(first, 10, 20), FilePart(second, 0, 1), FilePart(first, 990, 1_000)]
    found = read_columns(parts, fields)
    assert found.schema.types == [pa.large_string(), pa.int64()]
    below = pa.concat_tables([wanted.slice(10, 10), wanted.slice(0, 1), wanted.slice(990, 10)])
    assert found.to_pylist() == below.to_pylist()


PICKS: list[list[int]] = [
    [0],
    [999],
    [5, 5, 5],
    [1, 298, 299, 300, 301, 600, 999],
    list(range(290, 310)),
    [*range(0, 999, 7)],
]


def test_picked_rows_are_those_that_pyarrow_takes(tmp_path: Path, kind: str) -> None:
    names = ["x", "word"]
    header = header_of(kind, stored(tmp_path / f"0.{kind}", TABLE), *names)
    for picks in PICKS:
        found = read_picked_table(header, names, np.array(picks))
        assert found.to_pylist() == TABLE.select(names).take(picks).to_pylist()


def test_picked_rows_of_several_files_go_to_their_places(tmp_path: Path, kind: str) -> None:
    fields = [MetaField("n", pa.int64(), False), MetaField("word", pa.large_string(), True)]
    tables = [TABLE, TABLE.set_column(0, "n", pa.array(range(COUNT, 2 * COUNT), pa.int32()))]
    headers = [
        header_of(kind, stored(tmp_path / f"{number}.{kind}", table), "n", "word")
        for number, table in enumerate(tables)
    ]
    rows = [np.array([3, 500, 501]), np.array([0, 999])]
    assert read_picked_frame(fields, []).dtypes.to_dict() == empty_frame(fields).dtypes.to_dict()
    for places, order in (
        ([None, None], [3, 500, 501, 1_000, 1_999]),
        ([np.array([0, 1, 2]), np.array([3, 4])], [3, 500, 501, 1_000, 1_999]),
        ([np.array([4, 0, 2]), np.array([1, 3])], [500, 1_000, 501, 1_999, 3]),
    ):
        if places[0] is None:
            found = read_picked_frame(fields, [(headers[0], rows[0], None)])
            assert found["n"].tolist() == order[:3]
            continue
        found = read_picked_frame(fields, list(zip(headers, rows, places, strict=True)))
        assert found["n"].tolist() == order
        assert found.index.tolist() == [0, 1, 2, 3, 4]
        assert found["word"].isna().tolist() == [n % 7 == 0 if n < COUNT else (n - COUNT) % 7 == 0 for n in order]
        assert found.dtypes.to_dict() == empty_frame(fields).dtypes.to_dict()


def test_numbers_are_decoded_many_rows_at_a_time(tmp_path: Path, kind: str) -> None:
    file = stored(tmp_path / f"a=1/0.{kind}", TABLE)
    header = header_of(kind, file, "n")._replace(partitions=(("a", "int32"),))
    few = step_rows(header, ["word"])
    assert few < 2**15
    assert step_rows(header, ["n", "word"]) == few
    assert step_rows(header, ["n"]) == 2**17
    assert step_rows(header, ["n", "x"]) == max(few, 2**16)
    assert step_rows(header, ["n", "x", "a", "n"]) == max(few, 2**15)
    assert step_rows(header, ["n"] * 1_000) == few
    twice = stored(tmp_path / f"1.{kind}", pa.table([TABLE["n"], TABLE["n"]], ["n", "n"]))
    assert step_rows(header._replace(file=twice), ["n"]) == few


def test_what_a_row_takes_is_about_known(tmp_path: Path, kind: str) -> None:
    header = header_of(kind, stored(tmp_path / f"0.{kind}", TABLE), "n")
    assert 8 <= row_nbytes(header, ["n"]) <= 9
    assert 16 <= row_nbytes(header, ["n", "x"]) <= 18
    assert 8 <= row_nbytes(header, ["word"]) <= 20
    assert row_nbytes(header, []) == 0


def test_row_groups_are_left_out_by_their_statistics(tmp_path: Path) -> None:
    expression = ds.field("n") < 300
    assert may_match(header_of("parquet", stored(tmp_path / "0.parquet", TABLE), "n"), expression) == {0}
    assert may_match(header_of("arrow", stored(tmp_path / "0.arrow", TABLE), "n"), expression) is None


def test_columns_are_those_of_the_first_file_with_rows(tmp_path: Path, kind: str) -> None:
    files = [
        stored(tmp_path / f"{n}.{kind}", TABLE.select(names).slice(0, n)) for n, names in enumerate([["x"], ["n"]])
    ]
    assert first_schema(KINDS[kind], files).names == ["n"]
    assert first_schema(KINDS[kind], files[:1]).names == []
    assert first_schema(KINDS[kind], []) == pa.schema([])


def test_patterns_name_columns_of_either_format(tmp_path: Path, kind: str) -> None:
    table = pa.table({"e1": [1.0], "e0": [1.0], "e*x": [1.0]})
    file = stored(tmp_path / f"0.{kind}", table)
    assert expand_glob(KINDS[kind], file, "e*x") == ()
    with_rows = stored(tmp_path / f"1.{kind}", table.select(["e1", "e0"]))
    assert expand_glob(KINDS[kind], with_rows, "e*") == ("e0", "e1")
    assert expand_glob(KINDS[kind], stored(tmp_path / f"2.{kind}", table.slice(0, 0)), "e*") is None


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_folders_tell_columns_as_pyarrow_reads_them(tmp_path: Path) -> None:
    folders = {
        "a=1": {"a": "1"},
        "a=-5/b=x%20y": {"a": "-5", "b": "x y"},
        "a=__HIVE_DEFAULT_PARTITION__/b=": {"a": None, "b": ""},
        "c=%FF": {"c": "%FF"},
        "d=e=f": {"d": "e=f"},
        "=x/plain": {},
    }
    for folder, told in folders.items():
        assert partition_values(f"{folder}/z=0.parquet") == told
        assert partition_values(f"{folder}/0.parquet") == told
    assert partition_values("0.parquet") == {}
    for values, kind in (
        (["1", "-2", "2147483647", "-2147483648"], "int32"),
        (["1", None], "int32"),
        ([None], "string"),
        (["2147483648"], "string"),
        (["-2147483649"], "string"),
        (["1", "x"], "string"),
        (["1", "x", None], "string"),
        (["1.0"], "string"),
        ([""], "string"),
        (["--1"], "string"),
        (["00000000001"], "string"),
    ):
        paths = [f"a={'__HIVE_DEFAULT_PARTITION__' if value is None else value}/0.parquet" for value in values]
        assert partition_types(paths) == {"a": kind}
        assert shared_partitions(paths) == {"a": pa.int32() if kind == "int32" else pa.string()}
    assert partition_types(["a=1/0", "b=x/0"]) == {"a": "int32", "b": "string"}
    assert shared_partitions(["a=1/b=2/0", "b=x/0"]) == {"b": pa.string()}
    assert shared_partitions(["a=1/0", "0"]) == shared_partitions([]) == {}


def test_what_folders_tell_is_settled_when_all_files_are_known() -> None:
    known = MetaColumn(pa.int8(), False)
    paths = ["a=1/b=x/0", "a=__HIVE_DEFAULT_PARTITION__/b=y/1", "a=2/b=z/2"]
    files: list[list[MetaColumn]] = [[TOLD_BY_FOLDERS, known, TOLD_BY_FOLDERS], [known, known, TOLD_BY_FOLDERS], []]
    found = settled(["a", "n", "b"], [("a", "int32"), ("b", "string")], paths, files)
    assert found == [
        [MetaColumn(pa.int32(), False), known, MetaColumn(pa.string(), False)],
        [known, known, MetaColumn(pa.string(), False)],
        [],
    ]
    [null] = settled(["a"], [("a", "int32")], paths[1:2], [[TOLD_BY_FOLDERS]])
    assert null == [MetaColumn(pa.int32(), True)]
    assert settled(["n"], [], ["0"], [[known]]) == [[known]]


def test_rows_have_the_values_of_their_folders(tmp_path: Path, kind: str) -> None:
    file = stored(tmp_path / f"a=5/b=x/n=7/c=__HIVE_DEFAULT_PARTITION__/0.{kind}", TABLE)
    types = (("a", "int32"), ("b", "string"), ("n", "int32"), ("c", "int32"), ("d", "string"))
    header = header_of(kind, file, "n")._replace(partitions=types)
    told = told_by_folders(header, ["a", "b", "n", "c", "d"], ["n", "x"])
    assert {name: (value.as_py(), value.type) for name, value in told.items()} == {
        "a": (5, pa.int32()),
        "b": ("x", pa.string()),
        "c": (None, pa.int32()),
    }
    assert list(told_by_folders(header, ["b"], [])) == ["b"]
    for names in (["a"], ["c", "a", "b"], ["n"], ["b", "n", "word", "a"]):
        for start, stop, step in ((0, COUNT, 256), (290, 310, 7), (999, 1_000, 5)):
            batches = list(iter_columns(header, names, start, stop, step))
            assert max(batch.num_rows for batch in batches) <= step
            found = pa.Table.from_batches(batches)
            assert found.column_names == names
            told_here: dict[str, list[Any]] = {"a": [5] * COUNT, "b": ["x"] * COUNT, "c": [None] * COUNT}
            for name in names:
                every = told_here.get(name) or TABLE[name].to_pylist()
                assert found[name].to_pylist() == every[start:stop]


# ---------------------------------------------------------------------------------------------------------------------
# Types


def test_columns_have_a_dtype_for_all_files() -> None:
    for kind, has_nulls, dtype in (
        (pa.int8(), False, "int8"),
        (pa.int8(), True, "Int8"),
        (pa.uint64(), True, "UInt64"),
        (pa.bool_(), False, "bool"),
        (pa.bool_(), True, "boolean"),
        (pa.float32(), True, "float32"),
        (pa.float16(), False, "float16"),
        (pa.timestamp("ms"), True, "datetime64[ms]"),
        (pa.timestamp("us", "UTC"), False, "datetime64[us, UTC]"),
        (pa.duration("s"), True, "timedelta64[s]"),
        (pa.list_(pa.int8()), False, "list<item: int8>[pyarrow]"),
        (pa.date32(), False, "date32[day][pyarrow]"),
        (pa.null(), True, "null[pyarrow]"),
    ):
        field = MetaField("a", kind, has_nulls)
        assert str(field.dtype) == dtype
        assert field.is_masked == dtype.startswith(("Int", "UInt", "boolean"))
    assert MetaField("a", pa.large_string(), False).dtype == pd.StringDtype("pyarrow")


def test_types_of_files_are_merged_and_who_differs_is_told() -> None:
    i1, i2, text = MetaColumn(pa.int8(), False), MetaColumn(pa.int16(), True), MetaColumn(pa.string(), False)
    nothing = MetaColumn(pa.null(), True)
    merged = merge_columns(["a", "b"], ["u0", "u1", "u2"], [(i1, text), (i2, text), (i1, nothing)])
    assert merged == [MetaField("a", pa.int16(), True), MetaField("b", pa.large_string(), True)]
    assert merge_columns(["a"], ["u0", "u1"], [(i1,), (i1,)]) == [MetaField("a", pa.int8(), False)]
    assert merge_columns(["a"], ["u0"], [(nothing,)]) == [MetaField("a", pa.null(), True)]
    for files, message in (
        (
            [(i1,), (i1,), (text,)],
            "u2: column 'a' is string, but in u0 it is int8; one column must have one type in all",
        ),
        ([(nothing,), (i1,), (text,)], "u2: column 'a' is string, but in u1 it is int8; one column must have one type"),
        ([(i1,), (i2,), (text,)], "u2: column 'a' is string, but in u1 it is int16; one column must have one type in"),
        ([(i2,), (i1,), (text,)], "u2: column 'a' is string, but in u0 it is int16; one column must have one type in"),
    ):
        with pytest.raises(MismatchError) as refused:
            merge_columns(["a"], ["u0", "u1", "u2"], files)
        assert str(refused.value).startswith(message)
    unknown = MetaColumn(pa.timestamp("s", "Nowhere/Land"), False)
    with pytest.raises(
        FormatError, match=r"^u1: column 'a' is timestamp\[s, tz=Nowhere/Land\], for which there is no pan"
    ):
        merge_columns(["a"], ["u0", "u1"], [(nothing,), (unknown,)])


def test_frames_hold_what_was_decoded() -> None:
    fields = [
        MetaField("a", pa.int16(), True),
        MetaField("b", pa.large_string(), True),
        MetaField("c", pa.float64(), True),
        MetaField("d", pa.timestamp("s"), True),
    ]
    table = pa.table(
        {
            "d": pa.array([dt.datetime(2020, 1, 2), None], pa.timestamp("ms")),
            "b": pa.array(["x", None]).dictionary_encode(),
            "a": pa.array([1, None], pa.int8()),
            "c": pa.array([1.5, None], pa.float32()),
            "other": [1, 2],
        }
    )
    index = pd.RangeIndex(5, 7)
    frame = make_frame(fields, table, index, "url")
    assert frame.dtypes.to_dict() == empty_frame(fields).dtypes.to_dict()
    assert frame.index.equals(index)
    assert [frame[name].isna().tolist() for name in "abcd"] == [[False, True]] * 4
    assert [frame[name].iloc[0] for name in "abcd"] == [1, "x", 1.5, pd.Timestamp("2020-01-02")]
    objects = make_frame(fields, table, index, "url", text_as_objects=True)
    assert objects["b"].tolist() == ["x", None]
    assert objects["b"].dtype == object
    made = make_table(fields, table, "url")
    assert made.schema == pa.schema([(field.name, field.type) for field in fields])
    assert made.to_pylist() == table.select(["a", "b", "c", "d"]).to_pylist()


@pytest.mark.parametrize(
    ("field", "values", "told"),
    [
        (
            MetaField("a", pa.int8(), False),
            pa.array([1, None], pa.int8()),
            "holds nulls, but its statistics promise that there is none; write the file again, or leave the column out",
        ),
        (
            MetaField("a", pa.int8(), False),
            pa.array(["x"]),
            "is string, which does not hold the promised int8; save the m",
        ),
        (
            MetaField("a", pa.int8(), False),
            pa.array([1], pa.int16()),
            "is int16, which does not hold the promised int8; s",
        ),
        (
            MetaField("a", pa.int64(), False),
            pa.array([2**63], pa.uint64()),
            "is uint64, which does not hold the promised",
        ),
        (
            MetaField("a", pa.timestamp("s"), True),
            pa.array([dt.datetime(2020, 1, 1, 0, 0, 0, 1_000)], pa.timestamp("ms")),
            "is timestamp[ms], which does not hold the promised timestamp[s] (",
        ),
        (
            MetaField("a", pa.timestamp("ms"), True),
            pa.array([dt.datetime(2020, 1, 1)], pa.timestamp("us")),
            "is timestamp[us], which does not hold the promised timestamp[ms]; save the manifest again",
        ),
    ],
    ids=str,
)
def test_columns_that_are_not_what_was_promised_are_told(field: MetaField, values: pa.Array, told: str) -> None:
    for make in (
        lambda table: make_frame([field], table, pd.RangeIndex(1), "url"),
        lambda t: make_table([field], t, "url"),
    ):
        with pytest.raises(FormatError) as refused:
            make(pa.table({"a": values}))
        assert str(refused.value).startswith(f"url: column 'a' {told}")


def test_nulls_that_a_dtype_has_a_value_for_need_not_be_promised() -> None:
    for kind in (pa.float32(), pa.large_string(), pa.timestamp("s")):
        frame = make_frame([MetaField("a", kind, False)], pa.table({"a": pa.nulls(1, kind)}), pd.RangeIndex(1), "url")
        assert frame["a"].isna().tolist() == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Parts of files


def test_parts_are_cut_where_rows_begin_and_end() -> None:
    header: Any = "header"
    parts = [FilePart(header, 2, 5), FilePart(header, 0, 4), FilePart(header, 9, 10)]
    rows = [row for part in parts for row in range(part.start, part.stop)]
    for start in range(10):
        for stop in range(start, 10):
            found = list(cut_parts(parts, start, stop))
            assert [row for part in found for row in range(part.start, part.stop)] == rows[start:stop]
            assert all(part.rows > 0 for part in found)
            assert len(found) <= 3
    assert [default_piece_rows(*sizes) for sizes in ((4, 10), (10, 10), (11, 10), (0, 10), (1, 0))] == [2, 1, 1, 10, 1]
    assert default_piece_rows(1_000) == 32_000
