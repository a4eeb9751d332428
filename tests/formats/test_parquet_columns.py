"""Columns of parquet files: how vectors may be stored, shards without rows, and what is said of what is wrong."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import ArgumentError, EmbeddingReaderError, FormatError, NoFilesError
from tests.support.collections import COLUMNS, random_table

VECTORS = np.arange(400, dtype=np.float32).reshape(100, 4)
BYTES = [row.tobytes() for row in VECTORS]
LISTS = pa.list_(pa.float32())


def write(path: Path, embedding: pa.Array, columns: dict[str, Any] | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"embedding": embedding, **(columns or {})}), path, **options)


def kinds() -> dict[str, pa.Array]:
    """Vectors in those of Arrow's ways that this version of pyarrow knows and writes."""
    found = {"binary": pa.array(BYTES), "large_binary": pa.array(BYTES, pa.large_binary())}
    for name in ("list_view", "large_list_view", "binary_view"):
        try:
            if name == "binary_view":
                made = pa.array(BYTES, pa.binary_view())
            else:
                made = pa.array(VECTORS.tolist(), getattr(pa, name)(pa.float32()))
            pq.write_table(pa.table({"x": made}), pa.BufferOutputStream())
            pq.read_table(pa.BufferReader(_one(made)))
            found[name] = made
        except (AttributeError, pa.ArrowException):
            pass
    return found


def _one(column: pa.Array) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": column}), sink)
    return sink.getvalue()


KINDS = kinds()

PLAIN = {"compression": "none", "use_dictionary": False}


@pytest.mark.parametrize("options", [{}, PLAIN, {"store_schema": False}, {"data_page_version": "2.0"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_each_kind_are_read_in_every_way(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    numbers = pa.array(range(100))
    folder = tmp_path / "emb"
    write(folder / "a.parquet", KINDS[kind].slice(0, 70), {"id": numbers[:70]}, row_group_size=30, **options)
    write(folder / "b.parquet", KINDS[kind].slice(70), {"id": numbers[70:]}, **options)
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe_file(f"/kinds/{name}.parquet", (folder / f"{name}.parquet").read_bytes())
    how: dict[str, Any] = {"meta_columns": ["id"], "embedding_dtype": "float32" if "binary" in kind else None}
    opened = EmbeddingReader(folder, "parquet", **how)
    opened.save_manifest()
    [saved] = {path.name for path in folder.iterdir()} - {"a.parquet", "b.parquet"}
    for reader in (
        opened,
        EmbeddingReader(folder, "parquet", **how),
        EmbeddingReader([f"{folder}/b.parquet", f"{folder}/a.parquet"], "parquet", **how),
        EmbeddingReader("memory://kinds", "parquet", **how),
        EmbeddingReader.from_manifest(folder / saved),
    ):
        expected = VECTORS[reader.to_dask_dataframe().compute()["id"].to_numpy()]
        assert (reader.dimension, str(reader.dtype)) == (4, "float32")
        np.testing.assert_array_equal(reader.to_dask_array().compute(), expected)
        np.testing.assert_array_equal(reader.to_dask_array()[28:33].compute(), expected[28:33])
        batches = list(reader(17, start=13, end=88, show_progress=False))
        np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), expected[13:88])
    memory.rm("/kinds", recursive=True)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([*BYTES, None], r"row 100: column 'embedding' holds a vector that is null where vectors of 4 items"),
        ([None, *BYTES], r"row 0: column 'embedding' holds a vector that is null where vectors of 4 items"),
        ([*BYTES, bytes(32)], r"row 100: .* that has 32 bytes where vectors of 16 bytes were expected"),
        ([bytes(8), *BYTES], r"row 0: .* that has 8 bytes where vectors of 16 bytes were expected"),
        ([None] * 3, r"row 0: .* holds a vector that is null"),
        ([b"abc"] * 3, r"holds 3 bytes a row, which is no whole number of float32 items"),
        ([b""] * 3, r"holds 0 bytes a row, which is no whole number of float32 items"),
    ],
    ids=["null last", "null first", "long", "short", "nulls", "odd", "empty"],
)
def test_bytes_that_are_no_vectors_are_named(tmp_path: Path, values: list[bytes | None], says: str) -> None:
    write(tmp_path / "a.parquet", pa.array(values, pa.binary()), row_group_size=30)
    with pytest.raises(FormatError, match=rf"a\.parquet.*{says}"):
        EmbeddingReader(tmp_path, "parquet", embedding_dtype="float32").to_dask_array().compute()


def test_bytes_need_a_declared_dtype(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.array(BYTES))
    with pytest.raises(ArgumentError, match=r"a\.parquet: column 'embedding' is binary .*; give embedding_dtype="):
        EmbeddingReader(tmp_path, "parquet")
    assert EmbeddingReader(tmp_path, "parquet", embedding_dtype="<i2").dimension == 8


# ---------------------------------------------------------------------------------------------------------------------
# Shards without rows


EMPTY: dict[str, pd.DataFrame | pa.Table] = {
    "of null types": pd.DataFrame({"embedding": list(VECTORS), "lab": "x"}).iloc[:0],
    "of other types": pa.table({"embedding": pa.array([], pa.string()), "lab": pa.array([], pa.list_(pa.int8()))}),
    "without columns": pd.DataFrame(),
    "without one of them": pa.table({"lab": pa.array([], pa.string())}),
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("place", ["0", "1", "2"])
def test_shards_without_rows_are_passed_over(tmp_path: Path, kind: str, place: str) -> None:
    labels = [f"l{n}" for n in range(100)]
    numbers = pa.array(range(100))
    for name, rows in {"0": slice(0, 40), "1": slice(40, 100)}.items():
        write(
            tmp_path / f"{name}.parquet",
            pa.array(VECTORS[rows].tolist(), LISTS),
            {"lab": labels[rows], "n": numbers[rows.start : rows.stop]},
        )
    empty = EMPTY[kind]
    name = f"{tmp_path}/{place}-empty.parquet"
    if isinstance(empty, pd.DataFrame):
        empty.to_parquet(name, index=False)
    else:
        pq.write_table(empty, name)
    readers = [EmbeddingReader(tmp_path, "parquet", meta_columns=["lab", "n"])]
    readers[0].save_manifest()
    readers.append(EmbeddingReader(tmp_path, "parquet", meta_columns=["lab", "n"]))
    for reader in readers:
        np.testing.assert_array_equal(reader.to_dask_array().compute(), VECTORS)
        frame = reader.to_dask_dataframe().compute()
        assert frame["lab"].tolist() == labels
        assert frame["n"].dtype == np.int64
        assert pd.concat([each for _, each in reader(30, show_progress=False)])["lab"].tolist() == labels


@pytest.mark.parametrize("kind", EMPTY)
def test_nothing_but_shards_without_rows_is_nothing(tmp_path: Path, kind: str) -> None:
    empty = EMPTY[kind]
    table = pa.Table.from_pandas(empty) if isinstance(empty, pd.DataFrame) else empty
    pq.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(NoFilesError, match="without rows"):
        EmbeddingReader(tmp_path, "parquet", meta_columns=["lab"])


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def said_of(root: Path, embedding_column: str = "embedding", **options: Any) -> str:
    """What is said when a collection is read, eagerly and lazily."""
    texts = set()
    for read in (
        lambda reader: list(reader(10, show_progress=False)),
        lambda reader: (reader.to_dask_array().compute(), reader.to_dask_dataframe().compute()),
    ):
        with pytest.raises(EmbeddingReaderError) as info:
            read(EmbeddingReader(root, "parquet", embedding_column, **options))
        texts.add(str(info.value).replace(str(root), ""))
    assert len(texts) == 1
    return texts.pop()


ROW = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("group_rows", [1, 7, 1000])
@pytest.mark.parametrize("at", [0, 13, 49])
@pytest.mark.parametrize(
    ("odd", "says"), [(None, "is null"), ([1.0], "has 1 item"), ([1.0, None, 3.0, 4.0], "has a null item")]
)
def test_the_row_of_an_odd_vector_is_named_with_the_dimension_of_others(
    tmp_path: Path, odd: Any, says: str, at: int, group_rows: int
) -> None:
    write(tmp_path / "0.parquet", pa.array([ROW] * at + [odd] + [ROW] * (49 - at), LISTS), row_group_size=group_rows)
    said = said_of(tmp_path)
    assert said.startswith(
        f"/0.parquet, row {at}: column 'embedding' holds a vector that {says} where vectors of 4 items were expected"
    )


@pytest.mark.parametrize("bad", [0, 701, 999])
def test_the_row_and_the_column_of_bad_text_are_named(tmp_path: Path, bad: int) -> None:
    text = [b"s"] * 1000
    text[bad] = b"\xff"
    column = pa.Array.from_buffers(pa.string(), 1000, pa.array(text, pa.binary()).buffers())
    others = {"n": pa.array(range(1000)), "caption": column, "z": pa.array(["z"] * 1000)}
    write(tmp_path / "0.parquet", pa.array([ROW] * 1000, LISTS), others, row_group_size=300, write_statistics=False)
    said = said_of(tmp_path, meta_columns=["z", "caption", "n"])
    assert said.startswith(f"/0.parquet, row {bad}: column 'caption' is string, which this value is not")
    reader = EmbeddingReader(tmp_path, "parquet", meta_columns=["caption"])
    with pytest.raises(FormatError, match=rf", row {bad}: column 'caption'"):
        reader.to_dask_dataframe(max(0, bad - 50), bad + 1).compute()
    # Rows that are not asked for are not looked at.
    assert len(reader.to_dask_dataframe(bad - 1, bad).compute() if bad else [0]) == 1


@pytest.mark.parametrize("harmed", ["a", "b"])
def test_the_rows_and_the_column_that_cannot_be_decoded_are_named(tmp_path: Path, harmed: str) -> None:
    columns = {name: pa.array([f"{name}{n}" for n in range(1000)]) for name in ("a", "b")}
    path = tmp_path / "0.parquet"
    write(path, pa.array([ROW] * 1000, LISTS), columns, row_group_size=300, use_dictionary=False, compression="zstd")
    group = pq.read_metadata(path).row_group(2)
    chunk = group.column(["a", "b"].index(harmed) + 1)
    data = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    said = said_of(tmp_path, meta_columns=["b", "a"])
    assert re.match(rf"/0\.parquet, rows 600 to 900: column '{harmed}' cannot be decoded: ", said)
    with pytest.raises(FormatError, match=rf"rows 600 to 900: column '{harmed}' cannot be decoded"):
        EmbeddingReader(tmp_path, "parquet", meta_columns=["b", "a"]).to_dask_dataframe(650, 750).compute()


def test_columns_of_vectors_are_named_first(tmp_path: Path) -> None:
    columns = {
        "_id": [1, 2],
        "text": ["x", "y"],
        "ragged": [[1.0], [2.0, 3.0]],
        "vector": [[1.0, 2.0], [3.0, 4.0]],
        "tags": [["a"], ["b"]],
    }
    write(tmp_path / "0.parquet", pa.array(["no", "no"]), columns)
    said = said_of(tmp_path, "emb")
    assert re.match(
        r"/0\.parquet: has no column 'emb'; name the column of vectors \(embedding_column=\.\.\.\), such as 'vector'; "
        "its columns are 'embedding'",
        said,
    )
    assert all(f"'{name}'" in said for name in columns)
    assert "is string, not a list of numbers; name the column of vectors" in said_of(tmp_path)


def test_of_many_columns_a_few_are_named(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", pa.array([1]), {f"{'long' * 90}_{n}": [[1.0]] for n in range(300)})
    for said in (said_of(tmp_path), said_of(tmp_path, "nope"), said_of(tmp_path, meta_columns=["nope"])):
        assert len(said) < 1500
    assert said_of(tmp_path, "nope").endswith(" and 291 more")


@pytest.mark.parametrize("columns", [[], ["id"], ["secret"]], ids=str)
@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_encrypted_files_are_said_to_be_so(tmp_path: Path, plaintext_footer: bool, columns: list[str]) -> None:
    """And read, as far as they are not: a column that is encrypted hides no other."""
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            encryption.KmsClient.__init__(self)

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return base64.b64decode(wrapped_key)

    keys = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["secret"]}, plaintext_footer=plaintext_footer
    )
    factory = encryption.CryptoFactory(Keys)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), keys)
    table = pa.table({"secret": range(100), "embedding": pa.array(VECTORS.tolist(), LISTS), "id": range(100)})
    with pq.ParquetWriter(tmp_path / "0.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table, row_group_size=40)
    if plaintext_footer and columns != ["secret"]:
        reader = EmbeddingReader(tmp_path, "parquet", meta_columns=columns)
        np.testing.assert_array_equal(reader.to_dask_array().compute(), VECTORS)
        assert list(reader.to_dask_dataframe().compute().columns) == columns
    else:
        said = said_of(tmp_path, meta_columns=columns)
        assert "/0.parquet: " in said
        assert "encrypted" in said
        assert "without encryption" in said
        assert "cut short" not in said


@pytest.mark.parametrize("row_group_rows", [3, 9])
@pytest.mark.parametrize("name", [name for name in COLUMNS if name not in ("tags", "blob")])
def test_any_value_of_a_frame_may_be_replaced(tmp_path: Path, name: str, row_group_rows: int) -> None:
    """Also where its memory came from pyarrow, which lets nobody write to it."""
    columns = {name: random_table(np.random.default_rng(1), 9, [name])[name]}
    write(tmp_path / "0.parquet", pa.array(VECTORS[:9].tolist(), LISTS), columns, row_group_size=row_group_rows)
    reader = EmbeddingReader(tmp_path, "parquet", meta_columns=[name])
    frames = [frame for _, frame in reader(4, show_progress=False)]
    lazy = reader.to_dask_dataframe()
    frames += [part.compute(scheduler="synchronous") for part in (lazy, lazy.partitions[0])]
    frames += [reader.take([1, 4, 2]).to_dask_dataframe().compute(scheduler="synchronous")]
    for frame in frames:
        column: Any = frame.columns.get_loc(name)
        kind = frame.dtypes[name]
        value: Any = frame.iloc[-1, column]
        frame.iloc[0, column] = value
        assert frame.dtypes[name] == kind
        assert pd.isna(value) or frame.iloc[0, column] == value


def test_a_time_zone_that_is_not_known_here_is_told(tmp_path: Path) -> None:
    times = pa.array([1, 2, 3], pa.timestamp("us", "Nowhere/City"))
    write(tmp_path / "0.parquet", pa.array(VECTORS[:3].tolist(), LISTS), {"when": times})
    with pytest.raises(FormatError, match=r"0\.parquet: column 'when' is timestamp.*no pandas type here: .*tzdata"):
        EmbeddingReader(tmp_path, "parquet", meta_columns="when")


def test_parts_of_files_of_other_types_are_read_in_one_piece(tmp_path: Path) -> None:
    """Their columns are decoded as they are stored, and then joined as what holds the values of all."""
    columns = [
        {"n": pa.array([1, 2, 3], pa.int8()), "word": pa.array(["a", None, "c"])},
        {"n": pa.array([2**40, 5, 6], pa.int64()), "word": pa.array(["d", "e", "f"]).dictionary_encode()},
        {"n": pa.array([7, 8, 9], pa.int16()), "word": pa.array(["g", "h", "i"], pa.large_string())},
    ]
    for number, some in enumerate(columns):
        write(tmp_path / f"{number}.parquet", pa.array(VECTORS[:3].tolist(), LISTS), some)
    reader = EmbeddingReader(tmp_path, "parquet", meta_columns=["n", "word"])
    frame = reader.to_dask_dataframe(chunks=100).compute(scheduler="synchronous")
    assert frame["n"].tolist() == [1, 2, 3, 2**40, 5, 6, 7, 8, 9]
    assert [None if pd.isna(word) else word for word in frame["word"]] == ["a", None, *"cdefghi"]
    assert frame["n"].dtype == np.int64
    [(_, batch)] = reader(100, show_progress=False)
    assert batch["n"].tolist() == frame["n"].tolist()
