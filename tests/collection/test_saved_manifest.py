"""Opening again: one read of the manifest instead of one of every file, and never a file that was not named."""

from __future__ import annotations

import base64
import glob
import importlib.util
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.collection.saved import decode_manifest
from dask_embedding_reader.errors import (
    ArgumentError,
    ColumnError,
    FileChangedError,
    FormatError,
    MismatchError,
    NoFilesError,
)
from dask_embedding_reader.storage import find as finding
from dask_embedding_reader.storage.local import LocalStore
from tests.support import servers
from tests.support.collections import FORMATS, assert_batches, write_collection
from tests.support.stores import Bucket, emptied_bucket

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with emptied_bucket() as made:
        yield made


def npy_content(rows: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, rows)
    return sink.getvalue()


def put_folder(bucket: Bucket, folder: Path, prefix: str) -> str:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        bucket.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"bucket://{prefix}"


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_reader_is_saved_and_opened_again(tmp_path: Path, format_name: str) -> None:
    collection = write_collection(tmp_path, format_name)
    reader = collection.open()
    reader.save_manifest(tmp_path / "elsewhere.parquet")
    again = EmbeddingReader.from_manifest(tmp_path / "elsewhere.parquet", collection.folder, collection.metadata_folder)
    assert repr(again) == repr(reader)
    once_more = EmbeddingReader.from_manifest(
        tmp_path / "elsewhere.parquet", collection.folder, collection.metadata_folder
    )
    assert again.manifest.token == once_more.manifest.token  # so that keys of Dask are the same
    assert again.locate(-1) == reader.locate(-1)
    assert_batches(again(5, dtype=None, show_progress=False), collection, 5, dtype=None)
    assert_batches(pickle.loads(pickle.dumps(again))(5, dtype=None, show_progress=False), collection, 5, dtype=None)
    reader.save_manifest()  # beside the data, where a plain open finds it
    assert_batches(collection.open()(5, dtype=None, show_progress=False), collection, 5, dtype=None)


@pytest.mark.parametrize("file_format", ["parquet", "arrow", "parquet_npy"])
def test_row_groups_without_rows_are_saved(tmp_path: Path, file_format: str) -> None:
    table = pa.table({"x": range(4)})
    if file_format == "parquet_npy":
        np.save(tmp_path / "0.npy", ROWS[:4])
    else:
        table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(ROWS[:4].ravel(), 3))
    parts = [table[:0], table[:2], table[2:2], table[2:], table[:0]]
    if file_format == "arrow":
        with pa.ipc.new_file(tmp_path / "0.arrow", table.schema) as arrow:
            for part in parts:
                arrow.write_batch(pa.record_batch([column.combine_chunks() for column in part.columns], table.schema))
    else:
        with pq.ParquetWriter(tmp_path / "0.parquet", table.schema) as parquet:
            for part in parts:
                parquet.write_table(part)
    reader = EmbeddingReader(tmp_path, file_format, meta_columns="x")
    reader.save_manifest()
    for again in (EmbeddingReader.from_manifest(tmp_path), EmbeddingReader(tmp_path, file_format, meta_columns="x")):
        ((vectors, frame),) = again(4, show_progress=False)
        assert vectors.tolist() == ROWS[:4].tolist()
        assert frame["x"].tolist() == again.to_dask_dataframe().compute()["x"].tolist() == [0, 1, 2, 3]
        assert list(again.filter([("x", ">", 1)]).rows) == [2, 3]


def test_the_folder_of_a_manifest_in_the_current_folder_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    monkeypatch.chdir(tmp_path)
    reader = EmbeddingReader.from_manifest(".manifest.embeddings")
    assert reader.embeddings_folder == "."
    assert len(EmbeddingReader(reader.embeddings_folder)) == len(ROWS)


def test_opening_again_costs_one_read(bucket: Bucket, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "npy", file_rows=[3] * 40)
    url = put_folder(bucket, collection.folder, "emb")
    bucket.put("emb/.manifest.embeddings", _saved(EmbeddingReader(url), tmp_path))
    bucket.forget()
    EmbeddingReader.from_manifest(f"{url}/.manifest.embeddings")
    assert [(r.kind, r.path) for r in bucket.requests] == [("read", "emb/.manifest.embeddings")]
    bucket.forget()
    reader = EmbeddingReader(url)  # lists, so that what is new is seen
    assert [(r.kind, r.path) for r in bucket.requests] == [("list", "emb"), ("read", "emb/.manifest.embeddings")]
    bucket.forget()
    assert_batches(reader(50, dtype=None, show_progress=False), collection, 50, dtype=None)
    assert not [r for r in bucket.reads if r.nbytes not in (3 * 4 * 4, 0)]


def _saved(reader: EmbeddingReader, folder: Path) -> bytes:
    reader.save_manifest(folder / "m.parquet")
    return (folder / "m.parquet").read_bytes()


def test_ten_thousand_files_are_opened_with_one_request(bucket: Bucket, tmp_path: Path) -> None:
    for number in range(10_000):
        bucket.put(f"emb/{number:05d}.npy", npy_content(ROWS[:2]))
    bucket.put("emb/.manifest.embeddings", _saved(EmbeddingReader("bucket://emb"), tmp_path))
    bucket.forget()
    assert EmbeddingReader.from_manifest("bucket://emb/.manifest.embeddings").count == 20_000
    assert len(bucket.requests) == 1
    assert len(bucket.objects["emb/.manifest.embeddings"].content) < 500_000


@pytest.mark.parametrize("format_name", ["npy", "parquet-list"])
def test_a_copy_that_keeps_times_is_as_good_as_the_collection(
    tmp_path: Path, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = write_collection(tmp_path / "emb", format_name)
    collection.open().save_manifest()
    (manifest,) = (path for path in collection.folder.iterdir() if path.name.startswith("."))
    shutil.copytree(collection.folder, tmp_path / "copy")
    for opened in (
        EmbeddingReader.from_manifest(tmp_path / "copy" / manifest.name),
        EmbeddingReader.from_manifest(manifest, tmp_path / "copy"),
    ):
        assert_batches(opened(5, dtype=None, show_progress=False), collection, 5, dtype=None)
    # And no header is read.
    monkeypatch.setattr(LocalStore, "read", _only_manifests)
    monkeypatch.setattr("dask_embedding_reader.formats.parquet.decode.local_input", Mock(side_effect=AssertionError))
    assert len(replace(collection, folder=tmp_path / "copy").open()) == len(collection.rows)


def _only_manifests(store: LocalStore, path: str, ranges: Any, read: Callable[..., Any] = LocalStore.read) -> Any:
    assert "/.manifest" in path
    return read(store, path, ranges)


@pytest.mark.parametrize("format_name", ["npy", "parquet-list", "parquet_npy-one-folder"])
def test_what_changed_is_read_anew_by_a_plain_open(tmp_path: Path, format_name: str) -> None:
    collection = write_collection(tmp_path / "a", format_name, seed=1)
    collection.open().save_manifest()
    other = write_collection(tmp_path / "b", format_name, seed=2, file_rows=(9, 0, 12, 2, 20, 5))
    for path in other.folder.iterdir():
        if path.name[:4] in ("0000", "0003", "0005"):  # two changed, one new
            shutil.copy(path, collection.folder / path.name)
    reader = collection.open()
    assert reader.count == 9 + 12 + 2 + 20 + 5
    got, meta = next(reader(100, dtype=None, show_progress=False))
    np.testing.assert_array_equal(got[:9], other.rows[:9])
    np.testing.assert_array_equal(got[9:21], collection.rows[7:19])
    np.testing.assert_array_equal(got[-5:], other.rows[-5:])
    if collection.columns:
        assert meta["id"].tolist()[-5:] == other.metadata["id"].tolist()[-5:]
        assert meta["id"].tolist()[9:21] == collection.metadata["id"].tolist()[7:19]


def test_what_changed_is_named_when_it_is_read(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    np.save(tmp_path / "1.npy", ROWS + 1)
    os.utime(tmp_path / "1.npy", ns=(1, 1))
    reader = EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")
    x = reader.to_dask_array()
    np.testing.assert_array_equal(x[:20].compute(), ROWS)
    with pytest.raises(FileChangedError, match=r"1\.npy: the file changed since"):
        x[20:40].compute()


def test_a_file_of_the_same_size_and_time_that_comes_later_is_noticed_beside_a_manifest_too(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, rows_per_file=10)
    reader = EmbeddingReader(tmp_path)
    path = tmp_path / "00000001.npy"
    other = tmp_path / "other"
    shutil.copy2(path, other)
    other.replace(path)
    with pytest.raises(FileChangedError, match=r"00000001\.npy.*of the same size and time"):
        next(reader(20, show_progress=False))
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    (tmp_path / "00000002.npy").unlink()
    with pytest.raises(FileChangedError, match=r"1 of the 4 files .* have gone: .*00000002\.npy; restore them"):
        EmbeddingReader(tmp_path)
    with pytest.raises(FileChangedError, match=r"00000002\.npy: the file has gone"):
        EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings").to_dask_array().compute()
    (tmp_path / ".manifest.embeddings").unlink()
    assert EmbeddingReader(tmp_path).count == 15


def test_a_file_that_was_added_is_seen_by_a_plain_open_alone(tmp_path: Path) -> None:
    for number in (0, 2):
        np.save(tmp_path / f"{number}.npy", ROWS + number)
    EmbeddingReader(tmp_path).save_manifest()
    np.save(tmp_path / "1.npy", ROWS + 1)
    again = EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")
    np.testing.assert_array_equal(again.to_dask_array().compute(), np.concatenate([ROWS, ROWS + 2]))
    plain = EmbeddingReader(tmp_path).to_dask_array().compute()
    np.testing.assert_array_equal(plain, np.concatenate([ROWS, ROWS + 1, ROWS + 2]))


def test_other_columns_than_those_saved(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet-list", columns=["id", "caption", "day"])
    collection.open(meta_columns=["id", "caption"]).save_manifest()
    url = collection.folder / ".manifest.embeddings"
    reader = EmbeddingReader.from_manifest(url, meta_columns="caption")
    assert reader.to_dask_dataframe().columns.tolist() == ["caption"]
    assert EmbeddingReader.from_manifest(url, meta_columns=[]).to_dask_dataframe().columns.tolist() == []
    for everything in ("*", ["*"]):
        assert EmbeddingReader.from_manifest(url, meta_columns=everything) == EmbeddingReader.from_manifest(url)
    with pytest.raises(ColumnError, match=r"does not know the metadata column 'day'; it knows 'id', 'caption'"):
        EmbeddingReader.from_manifest(url, meta_columns=["day"])
    # A plain open reads what the manifest does not know.
    assert_batches(collection.open()(9, dtype=None, show_progress=False), collection, 9, dtype=None)
    with pytest.raises(ColumnError):
        collection.open(meta_columns=["none such"])


def test_several_folders_files_and_patterns(tmp_path: Path) -> None:
    for name in ("a", "b/deep"):
        (tmp_path / name).mkdir(parents=True)
        np.save(tmp_path / name / "0.npy", ROWS)
    np.save(tmp_path / "single.npy", ROWS)
    saved = tmp_path / "m.parquet"

    sources = [str(tmp_path / "b"), str(tmp_path / "single.npy"), str(tmp_path / "a")]
    reader = EmbeddingReader(sources)
    with pytest.raises(ArgumentError, match=r"is not one folder; say where"):
        reader.save_manifest()
    reader.save_manifest(saved)
    assert EmbeddingReader.from_manifest(saved, sources).manifest.vectors.paths == reader.manifest.vectors.paths
    with pytest.raises(ArgumentError, match=r"saved of a collection in 3 folders .* 1 and none are named"):
        EmbeddingReader.from_manifest(saved)
    pattern = EmbeddingReader(f"{tmp_path}/*/0.npy")
    pattern.save_manifest(saved)
    assert EmbeddingReader.from_manifest(saved, tmp_path).manifest.vectors.paths == pattern.manifest.vectors.paths
    for refused in (tmp_path / "a/m.npy", tmp_path / "b/deep/m.npy"):
        with pytest.raises(
            ArgumentError, match=r"m\.npy would be read as data of .*; let its name end in \.embeddings"
        ):
            reader.save_manifest(refused)
    for taken in ("m.json", "a/m.parquet", "a/.m.npy", "b/m.embeddings", "m.npy"):
        reader.save_manifest(tmp_path / taken)
        assert EmbeddingReader.from_manifest(tmp_path / taken, sources).count == reader.count
    for nothing in ("none.parquet", "none", "a"):
        with pytest.raises(NoFilesError, match=rf"{nothing} does not exist, or is a folder without a manifest"):
            EmbeddingReader.from_manifest(tmp_path / nothing)


# --------------------------------------------------------------------------------------------------------------------
# Where it lies, and how it is called


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_folder_is_opened_by_the_manifest_in_it(tmp_path: Path, place: str) -> None:
    root = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}"
    fs, path = fsspec.core.url_to_fs(root)
    fs.pipe_file(f"{path}/0.npy", npy_content(ROWS))
    reader = EmbeddingReader(root)
    reader.save_manifest()
    for url in (root, f"{root}/", f"{root}/.manifest.embeddings"):
        again = EmbeddingReader.from_manifest(url)
        np.testing.assert_array_equal(again.to_dask_array().compute(), ROWS)
        assert str(again.embeddings_folder).rstrip("/") == root


def test_a_manifest_of_an_earlier_release_is_read_and_replaced(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    earlier = tmp_path / "_manifest.parquet"
    (tmp_path / ".manifest.embeddings").rename(earlier)
    _as_earlier(earlier)
    assert EmbeddingReader.from_manifest(tmp_path).count == EmbeddingReader.from_manifest(earlier).count == 20
    assert len(verify_embeddings(tmp_path)) == 0
    (tmp_path / "00000003.npy").rename(tmp_path / "kept")
    with pytest.raises(FileChangedError, match=r"1 of the 4 files that .*_manifest\.parquet names have gone"):
        EmbeddingReader(tmp_path)
    write_embeddings(ROWS, tmp_path, rows_per_file=5)  # goes on from it: what is missing is written again
    assert {path.name for path in tmp_path.glob("*manifest*")} == {".manifest.embeddings"}
    assert (tmp_path / "00000003.npy").read_bytes() == (tmp_path / "kept").read_bytes()
    # One that came back, as from a backup, says nothing beside the newer one.
    earlier.write_bytes(b"garbage")
    assert EmbeddingReader(tmp_path).count == 20
    assert len(verify_embeddings(tmp_path)) == 0
    EmbeddingReader(tmp_path).save_manifest()
    assert not earlier.exists()
    write_embeddings(ROWS + 1, tmp_path, rows_per_file=20, overwrite=True)
    assert EmbeddingReader.from_manifest(tmp_path).count == 20


def _as_earlier(path: Path) -> None:
    """Store paths as text, as earlier releases did."""
    table = pq.read_table(path)
    names = table.schema.get_field_index("path")
    pq.write_table(table.set_column(names, "path", table["path"].cast(pa.string())), path, compression="zstd")


@pytest.mark.filterwarnings("ignore:.*inplace keyword:Warning")  # of dask, by pandas
@pytest.mark.parametrize("earlier", ["", "_manifest.parquet"])
def test_nothing_else_takes_the_manifest_for_data(tmp_path: Path, earlier: str) -> None:
    import dask.dataframe as dd
    import duckdb
    import polars as pl
    import pyarrow.dataset as ds

    folder = tmp_path / "emb"
    folder.mkdir()
    for number in range(2):
        pq.write_table(pa.table({"embedding": [[1.0, 2.0]] * 5, "id": range(5)}), folder / f"{number}.parquet")
    if earlier:
        (folder / earlier).write_bytes(b"of an earlier release")
    EmbeddingReader(folder, "parquet").save_manifest()
    written = tmp_path / "written"
    write_embeddings(ROWS[:10], written, "parquet", pd.DataFrame({"id": range(10)}), rows_per_file=5)
    beside = tmp_path / "beside"
    write_embeddings(ROWS[:10], beside, "parquet_npy", pd.DataFrame({"id": range(10)}), rows_per_file=5)
    for root in map(str, (folder, written, beside)):
        every = f"{root}/*.parquet"
        below = f"{root}/**/*.parquet"
        counts = {
            "dask": len(dd.read_parquet(every, columns=["id"]).compute()),
            "pandas": sum(len(pd.read_parquet(path)) for path in glob.glob(every)),
            "deep glob": sum(len(pd.read_parquet(path)) for path in glob.glob(below, recursive=True)),
            "polars": pl.scan_parquet(every).select(pl.len()).collect().item(),
            "polars below": pl.scan_parquet(below).select(pl.len()).collect().item(),
        }
        for pattern in (every, below):
            counts[f"duckdb {pattern}"] = (
                duckdb.connect().execute(f"select count(id) from read_parquet('{pattern}')").fetchall()[0][0]
            )
        if root != str(beside):  # there are npy files, too
            counts["dask folder"] = len(dd.read_parquet(root, columns=["id"]).compute())
            counts["pandas folder"] = len(pd.read_parquet(root))
            counts["pyarrow folder"] = ds.dataset(root, format="parquet").count_rows()
            counts["glob of all"] = sum(len(pd.read_parquet(path)) for path in glob.glob(f"{root}/*"))
        assert set(counts.values()) == {10}, counts
        if importlib.util.find_spec("embedding_reader"):
            from embedding_reader import EmbeddingReader as Reference

            kind = "parquet_npy" if root == str(beside) else "parquet"
            there = Reference(root, file_format=kind, meta_columns=["id"], metadata_folder=root)
            assert there.count == 10


@pytest.mark.parametrize("name", [b"\xff.npy", b"d\xe9j\xe0/\xfe\xff.npy", "\u00e9\U0001f600.npy".encode()])
def test_names_that_are_no_utf8_are_saved(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as opened:
        opened.write(npy_content(ROWS))
    reader = EmbeddingReader(tmp_path)
    reader.save_manifest()
    for again in (EmbeddingReader(tmp_path), EmbeddingReader.from_manifest(tmp_path)):
        assert again.manifest.vectors.paths == reader.manifest.vectors.paths
        np.testing.assert_array_equal(again.to_dask_array().compute(), ROWS)
    os.remove(path)
    with open(os.path.join(os.fsencode(tmp_path), b"other.npy"), "wb") as opened:
        opened.write(npy_content(ROWS))
    with pytest.raises(FileChangedError, match="have gone"):
        EmbeddingReader(tmp_path)


def test_names_that_no_storage_should_have_are_saved() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/odd-names/\ud800.npy", npy_content(ROWS))
    try:
        EmbeddingReader("memory://odd-names").save_manifest()
        np.testing.assert_array_equal(
            EmbeddingReader.from_manifest("memory://odd-names").to_dask_array().compute(), ROWS
        )
    finally:
        fs.rm("/odd-names", recursive=True)


# --------------------------------------------------------------------------------------------------------------------
# A manifest that somebody else made


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the columns and the facts of a saved manifest."""
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"dask_embedding_reader"])
    columns = table.to_pydict()
    change(columns, facts)
    pq.write_table(
        pa.table(columns, schema=table.schema).replace_schema_metadata({b"dask_embedding_reader": json.dumps(facts)}),
        path,
    )


def _set(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(columns: dict[str, Any], facts: dict[str, Any]) -> None:
        if name in columns:
            columns[name][0] = value
        else:
            facts[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("path", path)
            for path in (
                "../secret.npy",
                "/etc/passwd",
                "a/../../secret.npy",
                "..",
                "a//b.npy",
                "%2e%2e/secret.npy",
                "%252e%252e/secret.npy",
                "..\\secret.npy",
                "./x.npy",
                "a\0b.npy",
                "file:///etc/passwd",
            )
        ),
        ("rows", -1),
        ("rows", 2**62),
        ("dimension", -3),
        ("dimension", 4),
        ("dtype", "O"),
        ("dtype", "f4,O"),
        ("dtype", "nonsense"),
        ("layout", "[-1, false]"),
        ("layout", "[0, false]"),
        ("layout", "[true, false]"),
        ("layout", '["128", false]'),
        ("layout", "[128, 0]"),
        ("layout", "[128]"),
        ("layout", "[]"),
        ("layout", "[[128], false]"),
        ("layout", "128"),
        ("layout", "x"),
        ("size", -5),
        ("size", 10**6),
        ("group_rows", [-1, 21]),
        ("group_rows", [3]),
        ("columns", 7),
        ("kind", "other"),
        ("source", -1),
        ("source", 1),
        ("fingerprint", None),
        ("version", 3),
        ("file_format", "pickle"),
        ("columns", None),
        ("embedding_dtype", "O"),
        ("embedding_column", 3),
        ("embedding_column", []),
        ("embedding_column", ["a", "a"]),
        ("embedding_column", ["a", 1]),
        ("written", "yes"),
        ("sources", "x"),
    ],
)
def test_a_hostile_manifest_opens_nothing(tmp_path: Path, name: str, value: Any) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    np.save(tmp_path / "secret.npy", ROWS + 1)
    np.save(folder / "0.npy", ROWS)
    EmbeddingReader(folder).save_manifest()
    rewrite(folder / ".manifest.embeddings", _set(name, value))
    with pytest.raises(FormatError, match=r"\.manifest\.embeddings: not a (usable|readable) manifest"):
        EmbeddingReader.from_manifest(folder / ".manifest.embeddings")
    # A plain open does without it.
    np.testing.assert_array_equal(EmbeddingReader(folder).to_dask_array().compute(), ROWS)


N_CLAIMED = 150_000


def _claiming(path: Path, column: str) -> None:
    """Let a manifest of some kB claim gigabytes in one of its columns."""
    table = pq.read_table(path)
    arrays = {name: pa.array([table[name][0].as_py()] * N_CLAIMED, table.schema.field(name).type) for name in SCHEMA}
    kind = table.schema.field(column).type
    long: Any = "x" * 20_000
    if pa.types.is_list(kind):
        lists = pa.LargeListArray.from_arrays([0, 40_000_000], pa.array(np.zeros(40_000_000, np.int64)))
        arrays = {name: array.slice(0, 1) for name, array in arrays.items()} | {column: lists}
    elif pa.types.is_binary(kind) or pa.types.is_string(kind):
        long = long.encode() if pa.types.is_binary(kind) else long
        arrays[column] = pa.DictionaryArray.from_arrays(np.zeros(N_CLAIMED, np.int32), pa.array([long], kind))
    else:
        arrays = {name: pa.concat_arrays([array] * 20) for name, array in arrays.items()}
    metadata = {b"dask_embedding_reader": table.schema.metadata[b"dask_embedding_reader"]}
    pq.write_table(pa.table(arrays).replace_schema_metadata(metadata), path, compression="zstd", store_schema=False)


SCHEMA = (
    *("kind", "source", "path", "size", "fingerprint", "checksum", "rows", "dimension", "dtype", "layout"),
    *("group_rows", "columns"),
)


@pytest.mark.parametrize("column", SCHEMA)
def test_a_manifest_that_claims_gigabytes_is_refused_before_it_is_decoded(
    tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    path = tmp_path / ".manifest.embeddings"
    _claiming(path, column)
    assert path.stat().st_size < 300_000
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(FormatError, match=r"\.manifest\.embeddings: not a usable manifest: it claims to"):
        EmbeddingReader.from_manifest(path)
    assert EmbeddingReader(tmp_path).count == 20


def test_a_manifest_that_is_a_hole_in_the_disk_is_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    with open(tmp_path / ".manifest.embeddings", "wb") as opened:
        opened.truncate(2**34)
    tracemalloc.start()
    assert EmbeddingReader(tmp_path).count == 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def test_a_manifest_whose_texts_are_used_again_and_again_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    path = tmp_path / ".manifest.embeddings"
    table = pq.read_table(path)
    columns: dict[str, Any] = {name: [table[name][0].as_py()] * 30_000 for name in SCHEMA}
    columns["fingerprint"] = ["x" * 20_000] * 30_000
    columns["checksum"] = [os.urandom(4).hex() for _ in range(30_000)]  # makes it large enough for so many files
    pq.write_table(pa.table(columns, schema=table.schema), path, compression="zstd")
    with pytest.raises(FormatError, match=r"it claims to hold 6\d\d,\d{3},\d{3} bytes of text, but has"):
        EmbeddingReader.from_manifest(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("more columns", "the columns kind, source, .*, bomb, not those of a manifest"),
        ("another order", "the columns columns, group_rows.*, kind, not those of a manifest"),
        ("encoding", r"pages in an encoding \(7\) that manifests are not written in"),
        ("type", "a column of another type than those of manifests"),
    ],
)
def test_a_manifest_of_another_shape_is_refused_before_it_is_decoded(
    tmp_path: Path, change: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    path = tmp_path / ".manifest.embeddings"
    table, options = pq.read_table(path), {}
    if change == "more columns":
        table = table.append_column("bomb", pa.array(["x"]))
    elif change == "another order":
        table = table.select(reversed(SCHEMA))
    elif change == "type":
        table = table.set_column(2, "path", pa.array([b"0.npy"], pa.binary(5)))
    else:  # each text says how much of the one before it begins with
        options = {"use_dictionary": False, "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table, path, **options)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(FormatError, match=rf"not a usable manifest: it has {told}; remove it, and save it again"):
        EmbeddingReader.from_manifest(path)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_a_manifest_of_the_version_before_is_read(tmp_path: Path, order: Any, file_format: str) -> None:
    if file_format == "npy":
        np.save(tmp_path / "0.npy", np.asarray(ROWS, order=order))
    else:
        pq.write_table(pa.table({"embedding": list(ROWS)}), tmp_path / "0.parquet")
    EmbeddingReader(tmp_path, file_format).save_manifest()
    saved = tmp_path / ".manifest.embeddings"
    table = pq.read_table(saved)
    facts = json.loads(table.schema.metadata[b"dask_embedding_reader"])
    offset, fortran_order = [*json.loads(table["layout"][0].as_py()), 0, False][:2]
    place = table.schema.get_field_index("layout")
    old = table.set_column(place, "data_offset", pa.array([offset]))
    old = old.add_column(place + 1, "fortran_order", pa.array([fortran_order]))
    pq.write_table(old.replace_schema_metadata({b"dask_embedding_reader": json.dumps(facts | {"version": 1})}), saved)
    np.testing.assert_array_equal(EmbeddingReader.from_manifest(saved).to_dask_array().compute(), ROWS)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000, b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_garbage_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    (tmp_path / ".manifest.embeddings").write_bytes(content)
    with pytest.raises(FormatError, match=r"not a (usable|readable) manifest"):
        EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")
    assert EmbeddingReader(tmp_path).count == 20


def test_a_lie_about_a_file_shows_when_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    np.save(tmp_path / "1.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()

    def longer(columns: dict[str, Any], facts: dict[str, Any]) -> None:
        columns["rows"][0] += 10
        size, _, mark = columns["fingerprint"][0].partition(" ")
        columns["size"][0] = int(size) + 10 * 12
        columns["fingerprint"][0] = f"{columns['size'][0]} {mark}"

    rewrite(tmp_path / ".manifest.embeddings", longer)
    with pytest.raises(FileChangedError, match=r"0\.npy"):
        EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings").to_dask_array().compute()
    assert EmbeddingReader(tmp_path).count == 40

    EmbeddingReader(tmp_path).save_manifest()
    rewrite(tmp_path / ".manifest.embeddings", lambda columns, facts: columns["size"].__setitem__(0, 9))
    with pytest.raises(FormatError, match=r"tells two sizes of '0\.npy': 9 and 368"):
        EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")
    assert EmbeddingReader(tmp_path).count == 40

    def narrower(columns: dict[str, Any], facts: dict[str, Any]) -> None:
        columns["rows"][0], columns["dimension"][0] = 60, 1

    EmbeddingReader(tmp_path).save_manifest()
    rewrite(tmp_path / ".manifest.embeddings", narrower)
    with pytest.raises(MismatchError):
        EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (pa.list_(pa.int64()), "dtype", "<i1"),  # would have been cast, 1,000 to -24
        (pa.list_(pa.int32()), "dtype", "<u4"),  # would have been taken as they lie
        (pa.list_(pa.float32(), 2), "dtype", "<f8"),
        (pa.list_(pa.float32(), 2), "dimension", 3),
        (pa.binary(8), "dimension", 3),
        (pa.binary(8), "dimension", 0),
    ],
    ids=str,
)
def test_a_lie_about_vectors_in_parquet_shows_when_they_are_read(
    tmp_path: Path, kind: pa.DataType, name: str, value: Any
) -> None:
    rows: Any = [b"ab" * 4] * 5 if pa.types.is_fixed_size_binary(kind) else [[1_000, 2]] * 5
    pq.write_table(pa.table({"embedding": pa.array(rows, kind)}), tmp_path / "0.parquet")
    dtype = "float32" if pa.types.is_fixed_size_binary(kind) else None
    EmbeddingReader(tmp_path, "parquet", embedding_dtype=dtype).save_manifest()
    rewrite(tmp_path / ".manifest.embeddings", _set(name, value))
    reader = EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")
    lie = r"0\.parquet: column 'embedding' is .*, which does not hold the promised vectors of . \w+; save the manifest"
    with pytest.raises(FormatError, match=lie):
        reader.to_dask_array().compute()
    with pytest.raises(FormatError, match=lie):
        list(reader(batch_size=2, show_progress=False))


@pytest.mark.parametrize("group_rows", [[2, 3], [3], [3, 2, 2]], ids=str)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_lie_about_row_groups_shows_when_they_are_read(
    tmp_path: Path, group_rows: list[int], compression: str
) -> None:
    table = pa.table({"embedding": pa.array(ROWS[:5].tolist(), pa.list_(pa.float32(), 3)), "id": range(5)})
    encoding = {"use_dictionary": False, "compression": compression}
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=3, **encoding)
    EmbeddingReader(tmp_path, "parquet", meta_columns=["id"]).save_manifest()

    def change(columns: dict[str, Any], facts: dict[str, Any]) -> None:
        columns["group_rows"][0], columns["rows"][0] = group_rows, sum(group_rows)

    rewrite(tmp_path / ".manifest.embeddings", change)
    reader = EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")
    for read in (reader.to_dask_array().compute, reader.to_dask_dataframe().compute, lambda: list(reader(2))):
        with pytest.raises(FormatError, match=r"0\.parquet: holds 5 rows in 2 row groups, where . rows in other"):
            read()


def test_a_flipped_bit_in_a_manifest_changes_nothing_or_is_noticed(tmp_path: Path) -> None:
    for number in range(20):
        np.save(tmp_path / f"{number}.npy", np.full((number + 1, 3), number, np.float32))
    EmbeddingReader(tmp_path).save_manifest()
    saved = (tmp_path / ".manifest.embeddings").read_bytes()

    def decode(data: bytes) -> Any:
        return decode_manifest(data, "m", lambda source, path: (fsspec.filesystem("file"), path)).files

    files = decode(saved)
    noticed = 0
    for position in range(4, len(saved) - 8 - int.from_bytes(saved[-8:-4], "little"), 3):
        damaged = bytearray(saved)
        damaged[position] ^= 1 << position % 8
        try:
            assert decode(bytes(damaged)) == files
        except FormatError:
            noticed += 1
    assert noticed > 200


@pytest.mark.filterwarnings("ignore:pickle-based|pyarrow.PyExtensionType")  # pyarrow 19 warns that it unpickles nothing
def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb()),
    }
    schema = pa.schema([pa.field("x", pa.int64(), metadata=extension)])
    spelled = base64.b64encode(schema.serialize()).decode()
    rewrite(tmp_path / ".manifest.embeddings", lambda columns, facts: facts.update(columns=[spelled]))
    with suppress(FormatError):  # pyarrow 19 has a type for it
        EmbeddingReader.from_manifest(tmp_path / ".manifest.embeddings")
    assert not (tmp_path / "exploded").exists()


def test_file_systems_made_alike_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of fsspec up to 2026.7 call the first two of a forked process unequal."""
    write_embeddings(ROWS, tmp_path, "parquet_npy", pd.DataFrame({"id": np.arange(20)}))

    def resolve(source: Any, storage_options: Any = None) -> tuple[LocalStore, str]:
        filesystem = LocalFileSystem(skip_instance_cache=True)
        filesystem._fs_token_ = uuid.uuid4().hex
        return LocalStore(filesystem), os.fspath(source)

    monkeypatch.setattr(finding, "resolve", resolve)
    reader = EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["id"])
    np.testing.assert_array_equal(reader.to_dask_dataframe()["id"].compute(), np.arange(20))


# --------------------------------------------------------------------------------------------------------------------
# On servers


def test_no_secret_is_saved(tmp_path: Path) -> None:
    servers.require(servers.s3_available, "moto")
    with servers.s3() as server:
        url = f"s3://{server.bucket}/emb"
        frame = pd.DataFrame({"id": np.arange(20)})
        options = server.storage_options
        write_embeddings(ROWS, url, "parquet_npy", frame, rows_per_file=6, storage_options=options)
        content = fsspec.filesystem("s3", **options).cat_file(f"{url}/.manifest.embeddings")
        table = pq.read_table(pa.BufferReader(content))
        spelled = f"{table.to_pylist()} {table.schema.metadata}"
        for secret in (servers.S3_KEY, servers.S3_SECRET, server.endpoint, "s3://"):
            assert secret not in spelled
        reader = EmbeddingReader.from_manifest(f"{url}/.manifest.embeddings", storage_options=options)
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
        assert reader.to_dask_dataframe()["id"].compute().tolist() == list(range(20))
        # The manifest may lie on another storage than the files.
        reader.save_manifest(tmp_path / "m.parquet")
        local = EmbeddingReader.from_manifest(tmp_path / "m.parquet", url, storage_options=options)
        np.testing.assert_array_equal(local.to_dask_array().compute(), ROWS)


def test_objects_that_were_replaced_deleted_or_added_since(tmp_path: Path) -> None:
    servers.require(servers.s3_available, "moto")
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", ROWS + number)
    with servers.s3() as server:
        url, options = server.put_folder(tmp_path, "emb"), server.storage_options
        EmbeddingReader(url, storage_options=options).save_manifest()
        server.put("emb/1.npy", (tmp_path / "2.npy").read_bytes())  # of the same size: its etag tells
        server.put("emb/4.npy", (tmp_path / "0.npy").read_bytes())
        rows = np.concatenate([ROWS, ROWS + 2, ROWS + 2, ROWS + 3, ROWS])
        np.testing.assert_array_equal(EmbeddingReader(url, storage_options=options).to_dask_array().compute(), rows)
        fsspec.filesystem("s3", **options).rm_file(f"{url}/2.npy")
        x = EmbeddingReader.from_manifest(f"{url}/.manifest.embeddings", storage_options=options).to_dask_array()
        assert len(x) == 4 * len(ROWS)
        np.testing.assert_array_equal(x[:20].compute(), ROWS)
        with pytest.raises(FileChangedError, match=r"/1\.npy: the file changed since"):
            x[20:40].compute()
        with pytest.raises(FileChangedError, match=r"/2\.npy: the file has gone since"):
            x[40:60].compute()
        with pytest.raises(FileChangedError, match=r"1 of the 4 files .* have gone: .*/2\.npy; restore them"):
            EmbeddingReader(url, storage_options=options)


def test_files_on_a_web_server_that_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number in range(3):
        np.save(tmp_path / "files" / f"{number}.npy", ROWS)
    with servers.http_files(tmp_path / "files") as server:
        urls = [f"{server.url}/{number}.npy?signature=secret{number}" for number in range(3)]
        EmbeddingReader(urls).save_manifest(tmp_path / "m.parquet")
        assert b"secret" not in (tmp_path / "m.parquet").read_bytes()
        server.requests.clear()
        reader = EmbeddingReader.from_manifest(tmp_path / "m.parquet", urls)
        assert server.requests == []
        np.testing.assert_array_equal(reader.to_dask_array().compute(), np.concatenate([ROWS] * 3))
        np.save(tmp_path / "files" / "1.npy", ROWS + 1)
        os.utime(tmp_path / "files" / "1.npy", (1, 1))
        with pytest.raises(FileChangedError, match=r"/1\.npy"):
            EmbeddingReader.from_manifest(tmp_path / "m.parquet", urls).to_dask_array().compute()


def test_a_manifest_that_is_of_no_use_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "0.npy", np.ones((3, 2), np.float32))
    (tmp_path / ".manifest.embeddings").write_bytes(b"damaged")
    with caplog.at_level("WARNING", "dask_embedding_reader"):
        assert EmbeddingReader(tmp_path).count == 3
    [record] = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}/.manifest.embeddings")
    assert record.getMessage().endswith("; it is not used")


@pytest.mark.parametrize("name", ["which?", "a*b", "a[1]b", "50% #1"])
def test_folders_whose_names_look_like_patterns_are_opened_with_what_was_saved_of_them(
    tmp_path: Path, name: str
) -> None:
    write_embeddings(np.ones((6, 2), "float32"), tmp_path / name / "written", "npy", rows_per_file=3)
    write_embeddings(np.ones((6, 2), "float32"), tmp_path / "other" / name, "npy", rows_per_file=3)
    for folder in (tmp_path / name / "written", tmp_path / "other" / name):
        assert len(verify_embeddings(folder)) == 0
        assert EmbeddingReader(folder).to_dask_array().sum().compute() == 12
        EmbeddingReader(folder).save_manifest()
        assert EmbeddingReader.from_manifest(folder).to_dask_array().sum().compute() == 12


_COUNT_THREADS = """
import os, sys
from dask_embedding_reader.collection.saved import decode_manifest
with open(sys.argv[1], "rb") as file:
    data = file.read()
before = len(os.listdir("/proc/self/task"))
assert len(decode_manifest(data, sys.argv[1], lambda source, path: None).columns.meta) == 1
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the threads of a process")
def test_a_manifest_is_decoded_in_no_thread_of_arrow(tmp_path: Path) -> None:
    # One that lets go of the bytes while Python ends takes the process with it.
    pq.write_table(pa.table({"embedding": list(ROWS), "id": range(len(ROWS))}), tmp_path / "0.parquet")
    EmbeddingReader(tmp_path, "parquet", meta_columns="*").save_manifest()
    command = [sys.executable, "-c", _COUNT_THREADS, str(tmp_path / ".manifest.embeddings")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "0\n"


def test_a_manifest_that_lies_elsewhere_than_its_files_needs_to_be_told_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "0.npy", ROWS)
    EmbeddingReader(tmp_path / "data").save_manifest(tmp_path / "saved.embeddings")
    with pytest.raises(FileChangedError, match=r"/0\.npy: the file has gone .* where these are \(embeddings_f"):
        EmbeddingReader.from_manifest(tmp_path / "saved.embeddings").to_dask_array().compute()
    reader = EmbeddingReader.from_manifest(tmp_path / "saved.embeddings", tmp_path / "data")
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)


def test_a_manifest_of_a_file_that_was_named_itself_needs_to_be_told_where_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path / "0.npy").save_manifest(tmp_path / "saved.embeddings")
    with pytest.raises(ArgumentError, match=r"saved\.embeddings was saved .* by its file.* \(embeddings_folder=\)"):
        EmbeddingReader.from_manifest(tmp_path / "saved.embeddings")
    reader = EmbeddingReader.from_manifest(tmp_path / "saved.embeddings", tmp_path / "0.npy")
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)


def test_a_manifest_that_was_saved_before_the_folder_came_to_a_web_server_hinders_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    for name in ("a b", "a%20b", "ä#1"):
        np.save(folder / f"{name}.npy", ROWS)
    EmbeddingReader(folder).save_manifest()
    with servers.python_listing(tmp_path) as url:
        assert EmbeddingReader(f"{url}/a%20b/").count == 3 * len(ROWS)
        (folder / "a b.npy").unlink()
        with pytest.raises(FileChangedError, match=r"1 of the 3 files .* have gone: .*/a b\.npy; restore them"):
            EmbeddingReader(f"{url}/a%20b/")
