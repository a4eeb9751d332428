"""Columns of vectors: which types are such, what decoded ones hold, and what is said of those that hold none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import ArgumentError, ColumnError, FormatError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.vector_columns import (
    as_vectors,
    binary_dimension,
    is_ml_vector,
    item_type,
    join_items,
    lengths_of,
    type_of_columns,
    type_of_items,
)
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version

F4, I8 = pa.float32(), pa.int8()
BINARY = Columns("v", np.dtype("<i2"))
ROW = 1_000
"""The row of the file that columns here begin with."""


def header(dimension: int, dtype: str = "f4") -> FileHeader:
    return FileHeader(StoredFile(LocalStore(LocalFileSystem()), "/a.arrow", Version(1)), 9, dimension, np.dtype(dtype))


def ml_vector(**others: Any) -> pa.DataType:
    fields: dict[str, Any] = {"type": pa.int8(), "size": pa.int32()}
    fields |= {"indices": pa.list_(pa.int32()), "values": pa.list_(pa.float64())}
    return pa.struct(list((fields | others).items()))


PLAIN = Columns("v")


def asked(kind: pa.DataType, columns: Columns = PLAIN) -> tuple[np.dtype[Any], int | None]:
    return type_of_items("url", pa.field("v", kind), columns, lambda: "the remedy")


def test_types_of_vectors_tell_their_items_and_some_their_dimension() -> None:
    for kind, dtype, dimension in (
        (pa.list_(F4), "f4", None),
        (pa.large_list(pa.float64()), "f8", None),
        (pa.list_(pa.uint8(), 5), "u1", 5),
        (pa.list_(pa.list_(F4)), "f4", None),
        (pa.list_(pa.list_(F4, 3)), "f4", None),
        (pa.list_(pa.list_(F4, 3), 1), "f4", None),
        (pa.list_view(pa.int16()), "i2", None),
        (pa.large_list_view(pa.float16()), "f2", None),
        (pa.fixed_shape_tensor(I8, [7]), "i1", 7),
        (pa.fixed_shape_tensor(F4, [1, 6, 1]), "f4", 6),
        (pa.fixed_shape_tensor(F4, [1, 1]), "f4", 1),
    ):
        assert asked(kind) == (np.dtype(dtype), dimension)
        assert item_type(kind) == pa.from_numpy_dtype(np.dtype(dtype))
    for kind, dimension in (
        (pa.binary(), None),
        (pa.large_binary(), None),
        (pa.binary_view(), None),
        (pa.binary(6), 3),
    ):
        assert asked(kind, BINARY) == (np.dtype("<i2"), dimension)
        assert item_type(kind) is None


OTHERS: dict[str, tuple[pa.DataType, str]] = {
    "tensors": (
        pa.fixed_shape_tensor(F4, [2, 3]),
        "holds tensors of shape (2, 3); only those of one axis or row are vectors: reshape them, and write the fi",
    ),
    "tensors of tensors": (pa.fixed_shape_tensor(F4, [1, 2, 3]), "holds tensors of shape (1, 2, 3); only"),
    "numbers": (F4, "is float, not a list of numbers; the remedy"),
    "lists of text": (
        pa.list_(pa.string()),
        "is list<item: string>; its items must be integers or floating-point numbers; the remedy",
    ),
    "lists of equal length of text": (
        pa.list_(pa.string(), 2),
        "is fixed_size_list<item: string>[2]; its items must be integers or floating-point numbers; the remedy",
    ),
    "lists of lists of lists": (pa.list_(pa.list_(pa.list_(F4))), "is list<item: list<item: list<item: float>>>; its"),
    "lists of booleans": (pa.list_(pa.bool_()), "is list<item: bool>; its items must be integers or floating-point"),
    "structs of vectors": (
        pa.struct([("a", I8), ("v", pa.list_(F4)), ("w", pa.list_(F4))]),
        "is struct<a: int8, v: list<item: float>, w: list<item: float>>, not a list of numbers; name its field: embe",
    ),
    "structs": (pa.struct([("n", I8)]), "is struct<n: int8>, not a list of numbers; the remedy"),
    "text": (pa.string(), "is string, not a list of numbers; parse it and write the files again: frame['v'].map(json"),
    "large text": (pa.large_string(), "is large_string, not a list of numbers; parse it and write the files again"),
    "views of text": (pa.string_view(), "is string_view, not a list of numbers; parse it and write the files again"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_holds_no_vectors_is_told_with_its_type(name: str) -> None:
    kind, message = OTHERS[name]
    with pytest.raises(FormatError) as refused:
        asked(kind)
    assert str(refused.value).startswith(f"url: column 'v' {message}")
    if name.startswith("tensors"):
        return
    if name == "structs of vectors":
        assert str(refused.value).endswith("; name its field: embedding_column='v.v'")
    with pytest.raises(
        ArgumentError, match=r"url: column 'v' is .*, which is not binary: embedding_dtype says nothing"
    ):
        asked(kind, BINARY)


def test_of_text_the_column_that_is_likely_meant_is_told_too() -> None:
    with pytest.raises(FormatError, match=r"is string, not a list of numbers; name it, such as 'w', or parse it"):
        type_of_items("url", pa.field("v", pa.string()), Columns("v"), lambda: "name it, such as 'w'")


def test_the_dtype_is_given_where_it_is_not_told_and_nowhere_else() -> None:
    for kind, message in (
        (pa.binary(), "is binary and does not tell its dtype; give embedding_dtype=..."),
        (pa.binary(8), "is binary of 8 bytes and does not tell its dtype; give embedding_dtype=..."),
    ):
        with pytest.raises(ArgumentError) as refused:
            asked(kind)
        assert str(refused.value) == f"url: column 'v' {message}"
    with pytest.raises(ArgumentError) as refused:
        asked(pa.list_(F4), BINARY)
    assert str(refused.value) == (
        "url: column 'v' is list<item: float>, which tells its own dtype; leave embedding_dtype out"
    )
    assert [binary_dimension("it", width, np.dtype("i2")) for width in (2, 4, 200)] == [1, 2, 100]
    for width in (0, 1, 3):
        with pytest.raises(FormatError, match=r"^it, which is no whole number of int16 items$"):
            binary_dimension("it", width, np.dtype("i2"))
    with pytest.raises(FormatError, match=r"^url: column 'v' is binary of 5 bytes, which is no whole number of int16"):
        asked(pa.binary(5), BINARY)


def test_columns_of_items_have_one_type_of_numbers() -> None:
    def told(*kinds: pa.DataType, names: tuple[str, ...] = ("e0", "e1", "n"), glob: str = "") -> Any:
        fields = [pa.field(f"e{number}", kind) for number, kind in enumerate(kinds)]
        return type_of_columns("url", Columns(tuple(field.name for field in fields), glob=glob), fields, names)

    assert told(F4, F4) == (np.dtype("f4"), 2)
    assert told(I8, I8, I8, names=("e2", "e1", "e0"), glob="e*") == (np.dtype("i1"), 3)
    with pytest.raises(FormatError) as refused:
        told(F4, pa.string())
    assert str(refused.value) == (
        "url: column 'e1' is string, not a number; where it is the column of vectors itself, name it alone"
    )
    with pytest.raises(FormatError) as refused:
        told(F4, I8)
    assert str(refused.value) == (
        "url: column 'e1' is int8, but 'e0' is float; items of vectors have one type: cast the columns, and write the "
        "file again"
    )
    with pytest.raises(ColumnError) as refused_column:
        told(F4, F4, names=("e0", "e1", "e3", "e2"), glob="e*")
    assert str(refused_column.value) == (
        "url: 'e*' names the columns 'e2', 'e3', too, which the first file lacks; open the files separately, or list "
        "the names (embedding_column=[...])"
    )
    assert told(F4, F4, names=("e0", "e1", "e2")) == (np.dtype("f4"), 2), "listed by name"


def test_vectors_of_spark_are_told_from_other_structs() -> None:
    must = pa.field("element", pa.float64(), nullable=False)
    for kind in (ml_vector(), ml_vector(values=pa.list_(must)), ml_vector(indices=pa.large_list(pa.int32()))):
        assert is_ml_vector(kind)
    fields = list(ml_vector())
    for kind in (
        *(ml_vector(**{name: pa.int16()}) for name in ("type", "size", "indices", "values")),
        ml_vector(indices=pa.list_(pa.int64())),
        ml_vector(values=pa.list_(F4)),
        *(pa.struct(fields[:3]), pa.struct([*fields, fields[0]]), pa.struct(fields[::-1]), pa.list_(pa.float64())),
    ):
        assert not is_ml_vector(kind)


VECTORS: list[Any] = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
LONGER: list[Any] = [*VECTORS[:2], [7, 8, 9, 10], VECTORS[3]]


def dense(vectors: list[Any], code: int | None = 1) -> list[Any]:
    return [one if one is None else {"type": code, "size": None, "indices": None, "values": one} for one in vectors]


def packed(vectors: list[Any]) -> list[Any]:
    return [one if one is None else np.array(one, "f4").tobytes() for one in vectors]


def wrapped(vectors: list[Any]) -> list[Any]:
    return [one if one is None else [one] for one in vectors]


def plain(vectors: list[Any]) -> list[Any]:
    return vectors


KINDS: dict[str, tuple[pa.DataType, Any, str]] = {
    "lists": (pa.list_(F4), plain, "f4"),
    "large lists": (pa.large_list(F4), plain, "f4"),
    "views": (pa.list_view(F4), plain, "f4"),
    "large views": (pa.large_list_view(F4), plain, "f4"),
    "fixed lists": (pa.list_(F4, 3), plain, "f4"),
    "lists of one list": (pa.list_(pa.list_(F4)), wrapped, "f4"),
    "fixed lists of one list": (pa.list_(pa.list_(F4), 1), wrapped, "f4"),
    "lists of one fixed list": (pa.list_(pa.list_(F4, 3)), wrapped, "f4"),
    "bytes": (pa.binary(), packed, "f4"),
    "large bytes": (pa.large_binary(), packed, "f4"),
    "views of bytes": (pa.binary_view(), packed, "f4"),
    "fixed bytes": (pa.binary(12), packed, "f4"),
    "of Spark": (ml_vector(), dense, "f8"),
}


def column(name: str, vectors: list[Any]) -> pa.Array:
    kind, stored, _ = KINDS[name]
    return pa.array(stored(vectors), kind)


@pytest.mark.parametrize("name", KINDS)
def test_decoded_vectors_are_arrays(name: str) -> None:
    array, dtype = column(name, VECTORS), KINDS[name][2]
    for start in range(5):
        for stop in range(start, 5):
            found = as_vectors(header(3, dtype), Columns("v"), ROW, array[start:stop])
            np.testing.assert_array_equal(found, np.array(VECTORS, dtype)[start:stop].reshape(-1, 3), strict=True)
    if name == "fixed lists":
        tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(F4, [3]), array)
        np.testing.assert_array_equal(as_vectors(header(3), Columns("v"), ROW, tensors[1:]), VECTORS[1:])


def refused(name: str, vectors: list[Any], start: int = 0) -> str:
    kind, _, dtype = KINDS[name]
    array = pa.array(vectors, kind)[start:]
    with pytest.raises(FormatError) as told:
        as_vectors(header(3, dtype), Columns("v"), ROW, array)
    return str(told.value)


EXPECTED = "where vectors of 3 items were expected; drop or repair it"


@pytest.mark.parametrize("name", KINDS)
def test_the_first_row_without_a_vector_is_told(name: str) -> None:
    stored = KINDS[name][1]
    for start, row in ((0, "1,002"), (2, "1,000")):
        vectors = [*VECTORS[:2], None, VECTORS[3], None]
        assert refused(name, stored(vectors), start) == (
            f"/a.arrow, row {row}: column 'v' holds a vector that is null {EXPECTED}"
        )


@pytest.mark.parametrize("name", [name for name in KINDS if "fixed" not in name])
def test_the_first_row_of_another_length_is_told(name: str) -> None:
    stored = KINDS[name][1]
    for start, row in ((0, "1,002"), (2, "1,000")):
        message = refused(name, stored(LONGER), start)
        unit = "16 bytes where vectors of 12 bytes" if "bytes" in name else "4 items where vectors of 3 items"
        assert message == (
            f"/a.arrow, row {row}: column 'v' holds a vector that has {unit} were expected; drop or repair it"
        )


def test_the_first_item_that_is_null_is_told_with_its_row() -> None:
    hole: list[Any] = [*VECTORS[:2], [7, 8, None], [None, 11, 12]]
    for name in KINDS:
        if "bytes" not in name:
            for start, row in ((0, "1,002"), (2, "1,000"), (3, "1,000")):
                assert refused(name, KINDS[name][1](hole), start) == (
                    f"/a.arrow, row {row}: column 'v' holds a vector that has a null item {EXPECTED}"
                )


def test_lists_of_other_than_one_list_are_told() -> None:
    for lists, what in (([], "0 lists"), (VECTORS[:2], "2 lists")):
        assert refused("lists of one list", [*wrapped(VECTORS[:2]), lists, []], 1) == (
            f"/a.arrow, row 1,001: column 'v' holds a vector that is {what} where vectors of one list were expected; "
            "drop or repair it, or give each list a row: frame.explode"
        )
    assert refused("lists of one list", [*wrapped(VECTORS[:2]), [None]], 1) == (
        f"/a.arrow, row 1,001: column 'v' holds a vector that is null {EXPECTED}"
    )


def test_sparse_vectors_of_spark_are_told() -> None:
    rows = [*dense(VECTORS[:2]), *dense(VECTORS[2:3], 0), *dense(VECTORS[3:], None)]
    for start, row in ((0, "1,002"), (2, "1,000"), (3, "1,000")):
        assert refused("of Spark", rows, start) == (
            f"/a.arrow, row {row}: column 'v' holds a vector that is sparse; make dense ones with "
            "pyspark.ml.functions.vector_to_array, and write the files again"
        )


def test_lengths_are_those_of_each_row() -> None:
    vectors: list[Any] = [[1], [], [2, 3], [4, 5, 6]]
    for name in KINDS:
        if "fixed" not in name and "one list" not in name and name not in ("bytes", "views of bytes"):
            itemsize = 4 if "bytes" in name else 1
            for start in range(4):
                found = lengths_of(pa.array(KINDS[name][1](vectors), KINDS[name][0])[start:])
                assert found.tolist() == [len(one) * itemsize for one in vectors[start:]]
    assert lengths_of(column("fixed lists", VECTORS)[1:]).tolist() == [3, 3, 3]
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(F4, [3]), column("fixed lists", VECTORS))
    assert lengths_of(tensors).tolist() == [3] * 4


def test_items_in_columns_of_their_own_are_joined() -> None:
    columns = Columns(("e0", "e1", "e2"))
    arrays = [pa.array([row[place] for row in VECTORS], F4) for place in range(3)]
    batch = pa.RecordBatch.from_arrays(arrays, list(columns.vectors))
    np.testing.assert_array_equal(
        join_items(header(3), columns, ROW, batch[1:]), np.array(VECTORS, "f4")[1:], strict=True
    )
    arrays[1] = pa.array([1, None, 3, None], F4)
    for start, row in ((0, "1,001"), (2, "1,001"), (3, "1,000")):
        with pytest.raises(FormatError) as told:
            join_items(header(3), columns, ROW, pa.RecordBatch.from_arrays(arrays, list(columns.vectors))[start:])
        assert str(told.value) == (
            f"/a.arrow, row {row}: column 'e1' is null where an item of a vector was expected; drop or repair the row"
        )
