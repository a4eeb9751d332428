"""Files as people have them: which format and which column are taken, and what is said of the rest."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import (
    ArgumentError,
    ColumnError,
    EmbeddingReader,
    FormatError,
    NoFilesError,
    write_embeddings,
)
from dask_embedding_reader.cli import main
from dask_embedding_reader.formats.registry import FileFormatName, format_names
from tests.stores import Bucket, emptied_bucket

ROWS: npt.NDArray[Any] = np.arange(12, dtype=np.float32).reshape(4, 3)
WORDS = pd.DataFrame({"word": list("abcd"), "n": range(4)})


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An object store that counts."""
    with emptied_bucket() as store:
        yield store


def put(path: Path, **columns: Any) -> Path:
    """Write a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def lists(rows: npt.NDArray[Any] = ROWS) -> pa.Array:
    return pa.array(rows.tolist(), pa.list_(pa.float32()))


def taken(reader: EmbeddingReader) -> tuple[str, str | None]:
    """Return the format and the column of vectors."""
    return reader.manifest.format.name, reader.manifest.columns.embedding


def same(reader: EmbeddingReader, rows: npt.NDArray[Any] = ROWS) -> None:
    np.testing.assert_array_equal(reader.to_dask_array().compute(), rows)


def test_the_type_of_file_format_names_all_formats() -> None:
    assert get_args(FileFormatName) == ("auto", *format_names())


# --------------------------------------------------------------------------------------------------------------------
# The format


@pytest.mark.parametrize("file_format", format_names())
def test_what_is_written_opens_by_itself(tmp_path: Path, file_format: str) -> None:
    columns = WORDS if file_format.startswith("parquet") else None
    write_embeddings(ROWS, tmp_path, file_format, columns, rows_per_file=3)
    reader = EmbeddingReader(tmp_path, meta_columns="*")
    assert reader.manifest.format.name == file_format  # as the manifest says
    same(reader)
    assert reader.columns.keys() == ({"word", "n"} if columns is not None else set())
    (tmp_path / ".manifest.embeddings").unlink()
    same(EmbeddingReader(tmp_path))
    assert EmbeddingReader(tmp_path, meta_columns="*").manifest.format.name == file_format
    assert EmbeddingReader(tmp_path).manifest.format.name == (
        file_format.removeprefix("parquet_") if file_format != "parquet" else file_format
    )


def test_npy_comes_before_all_others_as_for_embedding_reader(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    np.savez(tmp_path / "1.npz", ROWS)
    put(tmp_path / "0.parquet", word=list("abcd"), vector=lists())
    for name in ("x.fbin", "README.md", "_SUCCESS"):
        (tmp_path / name).write_bytes(b"x")
    reader = EmbeddingReader(tmp_path)
    assert taken(reader)[0] == "npy"
    assert "4 x 3 float32 in 1 npy file," in repr(reader)


def test_parquet_beside_one_other_kind_is_its_metadata(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", l14_img=ROWS)
    put(tmp_path / "0.parquet", word=list("abcd"))
    assert taken(EmbeddingReader(tmp_path)) == ("npz", "l14_img")
    reader = EmbeddingReader(tmp_path, meta_columns=["word"])
    assert taken(reader) == ("parquet_npz", "l14_img")
    assert reader.to_dask_dataframe().compute()["word"].tolist() == list("abcd")


def test_several_kinds_are_all_named(tmp_path: Path) -> None:
    for name in ("a.fbin", "b.fvecs", "c.parquet"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        ArgumentError, match=r'several kinds: fbin, fvecs and parquet; say .*file_format="fbin".*\*\.fbin'
    ):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize("where", ["emb", "emb/x", "emb/x*"])
def test_files_without_a_suffix_are_known_by_their_first_bytes(tmp_path: Path, where: str) -> None:
    put(tmp_path / "emb" / "x", vector=lists())
    if where == "emb":  # in a folder only files with a suffix are data
        with pytest.raises(NoFilesError, match=r"no \.npy, \.parquet or other readable file found"):
            EmbeddingReader(tmp_path / where)
    else:
        assert taken(EmbeddingReader(tmp_path / where)) == ("parquet", "vector")
        (tmp_path / "emb" / "x").write_bytes(b"what is this?")
        with pytest.raises(FormatError, match=r"x: neither its name nor its first bytes, b'what', tell .*file_format="):
            EmbeddingReader(tmp_path / where)


def test_a_folder_of_metadata_elsewhere_says_that_it_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb" / "0.npy", ROWS)
    put(tmp_path / "meta" / "0.parquet", word=list("abcd"))
    reader = EmbeddingReader(tmp_path / "emb", metadata_folder=tmp_path / "meta")
    assert taken(reader)[0] == "parquet_npy"
    assert reader.columns == {"word": pa.string()}
    with pytest.warns(UserWarning, match=r'passed over: npy files .*file_format="parquet_npy", .*metadata_folder='):
        same(EmbeddingReader(tmp_path / "emb", meta_columns=["word"]))
    # A manifest that tells of metadata elsewhere says nothing about where.
    EmbeddingReader(tmp_path / "emb", metadata_folder=tmp_path / "meta", meta_columns="*").save_manifest()
    assert taken(EmbeddingReader(tmp_path / "emb"))[0] == "npy"


# --------------------------------------------------------------------------------------------------------------------
# The column of vectors


@pytest.mark.parametrize("name", ["emb", "openai", "text-embedding-3-large-1536-embedding", "values", "vector"])
def test_the_only_column_of_vectors_is_taken_and_told(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"title": list("abcd"), "tags": [["x"], [], ["y", "z"], []], "tokens": [[1], [1, 2], [], [3]]}
    put(tmp_path / "0.parquet", **others, **{name: lists()})
    put(tmp_path / "1.parquet", **{name: lists(ROWS + 12)}, **others)
    reader = EmbeddingReader(tmp_path)
    assert taken(reader) == ("parquet", name)
    same(reader, np.concatenate([ROWS, ROWS + 12]))
    assert f"in 2 parquet files (column {name!r})" in repr(reader)
    assert name in reader._repr_html_()
    assert list(reader.columns) == ["title", "tags", "tokens"]
    with pytest.raises(SystemExit, match="0"):
        main(["info", str(tmp_path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["embedding_column"], facts["columns"]) == (name, ["title", "tags", "tokens"])
    reader.save_manifest()
    put(tmp_path / "2.parquet", **{name: lists()}, another=lists())
    assert taken(EmbeddingReader(tmp_path)) == ("parquet", name)  # the manifest remembers


def test_a_column_called_embedding_is_it_whatever_else_there_is(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", vector=lists(), embedding=lists(ROWS + 1))
    assert "column" not in repr(EmbeddingReader(tmp_path))
    same(EmbeddingReader(tmp_path), ROWS + 1)


def test_several_columns_of_vectors_are_all_named(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", title=lists(), body=lists(), n=range(4))
    with pytest.raises(
        ColumnError, match=r"no column 'embedding'; .*embedding_column=\.\.\.\), such as 'title', 'body'"
    ):
        EmbeddingReader(tmp_path)


def test_files_of_no_rows_say_nothing_of_the_column(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", x=pa.array([], pa.null()))
    put(tmp_path / "1.parquet", vector=lists())
    assert taken(EmbeddingReader(tmp_path)) == ("parquet", "vector")


def test_the_only_column_of_bytes_is_taken_where_their_dtype_is_given(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", n=range(4), data=pa.array([row.tobytes() for row in ROWS]))
    reader = EmbeddingReader(tmp_path, embedding_dtype="float32")
    assert taken(reader) == ("parquet", "data")
    same(reader)
    reader.save_manifest()
    same(EmbeddingReader(tmp_path))  # the manifest knows both


def test_arrays_of_an_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", names=np.array(list("abcd")), n=np.arange(4), vectors=ROWS)
    assert taken(EmbeddingReader(tmp_path)) == ("npz", "vectors")
    same(EmbeddingReader(tmp_path))
    np.savez(tmp_path / "0.npz", ROWS)
    assert taken(EmbeddingReader(tmp_path)) == ("npz", "arr_0")
    np.savez(tmp_path / "0.npz", b32_img=ROWS, b32_txt=ROWS)
    with pytest.raises(ColumnError, match="no array 'embedding'; its arrays are 'b32_img', 'b32_txt'; name one with"):
        EmbeddingReader(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# All columns


def test_all_columns_are_read_where_a_star_asks_for_them(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, "parquet", WORDS)
    for names in ("*", ["*"]):
        frame = EmbeddingReader(tmp_path, meta_columns=names).to_dask_dataframe().compute()
        assert frame.to_dict("list") == {"word": list("abcd"), "n": [0, 1, 2, 3]}
    assert EmbeddingReader(tmp_path).columns == {"word": pa.large_string(), "n": pa.int64()}


def test_no_column_is_called_for_where_files_have_none(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    reader = EmbeddingReader(tmp_path, meta_columns="*")
    assert reader.columns == {}
    same(reader)


def test_types_that_files_do_not_share_are_told_as_they_are_read(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", embedding=lists(), n=pa.array(range(4), pa.int32()))
    put(tmp_path / "1.parquet", embedding=lists(), n=pa.array(range(4), pa.int64()))
    assert EmbeddingReader(tmp_path).columns == {"n": pa.int32()}  # of the first file
    assert EmbeddingReader(tmp_path, meta_columns=["n"]).columns == {"n": pa.int64()}


# --------------------------------------------------------------------------------------------------------------------
# What it costs


def npy_bytes(rows: npt.NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, rows)
    return sink.getvalue()


def parquet_bytes(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def npz_bytes(**arrays: Any) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("suffix", "content", "file_format", "column"),
    [
        ("npy", lambda: npy_bytes(ROWS), "npy", "embedding"),
        ("parquet", lambda: parquet_bytes(vector=lists()), "parquet", "vector"),
        ("npz", lambda: npz_bytes(vector=ROWS), "npz", "vector"),
    ],
)
def test_choosing_asks_for_nothing_that_is_not_asked_for_anyway(
    bucket: Bucket, suffix: str, content: Callable[[], bytes], file_format: Any, column: str
) -> None:
    for k in range(5):
        bucket.put(f"emb/{k}.{suffix}", content())
    asked = []
    for options in ({"file_format": file_format, "embedding_column": column}, {}):
        # Other names: footers of the first time are known.
        bucket.requests.clear()
        for k in range(5):
            bucket.put(f"emb/{k}.{suffix}", content())
        assert EmbeddingReader("bucket://emb", **options).count == 20
        asked.append(sorted((request.kind, request.path) for request in bucket.requests))
    assert asked[0] == asked[1]
    assert len(bucket.of_kind("list")) == 1


def test_a_manifest_that_says_which_format_it_is_is_read_once(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("emb/0.npy", npy_bytes(ROWS))
    bucket.put("emb/0.parquet", parquet_bytes(n=range(4)))
    EmbeddingReader("bucket://emb", meta_columns="*").save_manifest(tmp_path / "m.embeddings")
    bucket.put("emb/.manifest.embeddings", (tmp_path / "m.embeddings").read_bytes())
    bucket.requests.clear()
    reader = EmbeddingReader("bucket://emb")
    assert taken(reader)[0] == "parquet_npy"
    assert [request.path for request in bucket.reads] == ["emb/.manifest.embeddings"]
    assert len(bucket.of_kind("list")) == 1
