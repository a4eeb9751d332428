"""Opening again: one read of the manifest instead of one of every file, and never a file that was not named."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
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

from dask_embedding_reader import EmbeddingReader, finding, storage, write_embeddings
from dask_embedding_reader.errors import (
    ArgumentError,
    ColumnError,
    FileChangedError,
    FormatError,
    MismatchError,
    NoFilesError,
)
from dask_embedding_reader.saved_manifest import decode_manifest
from dask_embedding_reader.storage import StoredFile
from tests import servers
from tests.stores import Bucket, emptied_bucket
from tests.support import FORMATS, assert_batches, write_collection

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with emptied_bucket() as made:
        yield made


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


def test_opening_again_costs_one_read(bucket: Bucket, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "npy", file_rows=[3] * 40)
    url = put_folder(bucket, collection.folder, "emb")
    bucket.put("emb/_manifest.parquet", _saved(EmbeddingReader(url), tmp_path))
    bucket.forget()
    EmbeddingReader.from_manifest(f"{url}/_manifest.parquet")
    assert [(r.kind, r.path) for r in bucket.requests] == [("read", "emb/_manifest.parquet")]
    bucket.forget()
    reader = EmbeddingReader(url)  # lists, so that what is new is seen
    assert [(r.kind, r.path) for r in bucket.requests] == [("list", "emb"), ("read", "emb/_manifest.parquet")]
    bucket.forget()
    assert_batches(reader(50, dtype=None, show_progress=False), collection, 50, dtype=None)
    assert not [r for r in bucket.reads if r.nbytes not in (3 * 4 * 4, 0)]


def _saved(reader: EmbeddingReader, folder: Path) -> bytes:
    reader.save_manifest(folder / "m.parquet")
    return (folder / "m.parquet").read_bytes()


def test_ten_thousand_files_are_opened_with_one_request(bucket: Bucket, tmp_path: Path) -> None:
    import io

    sink = io.BytesIO()
    np.save(sink, ROWS[:2])
    for number in range(10_000):
        bucket.put(f"emb/{number:05d}.npy", sink.getvalue())
    bucket.put("emb/_manifest.parquet", _saved(EmbeddingReader("bucket://emb"), tmp_path))
    bucket.forget()
    assert EmbeddingReader.from_manifest("bucket://emb/_manifest.parquet").count == 20_000
    assert len(bucket.requests) == 1
    assert len(bucket.objects["emb/_manifest.parquet"].content) < 500_000


@pytest.mark.parametrize("format_name", ["npy", "parquet-list"])
def test_a_copy_that_keeps_times_is_as_good_as_the_collection(
    tmp_path: Path, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = write_collection(tmp_path / "emb", format_name)
    collection.open().save_manifest()
    (manifest,) = (path for path in collection.folder.iterdir() if path.name.startswith("_"))
    shutil.copytree(collection.folder, tmp_path / "copy")
    for opened in (
        EmbeddingReader.from_manifest(tmp_path / "copy" / manifest.name),
        EmbeddingReader.from_manifest(manifest, tmp_path / "copy"),
    ):
        assert_batches(opened(5, dtype=None, show_progress=False), collection, 5, dtype=None)
    # And no header is read.
    monkeypatch.setattr("dask_embedding_reader.storage._read_local", _only_manifests)
    monkeypatch.setattr("dask_embedding_reader.formats.parquet.local_input", Mock(side_effect=AssertionError))
    assert len(replace(collection, folder=tmp_path / "copy").open()) == len(collection.rows)


def _only_manifests(file: StoredFile, *arguments: Any, read: Callable[..., None] = storage._read_local) -> None:
    assert "/_" in file.path
    read(file, *arguments)


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
    reader = EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet")
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
        EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet").to_dask_array().compute()
    (tmp_path / "_manifest.parquet").unlink()
    assert EmbeddingReader(tmp_path).count == 15


def test_a_file_that_was_added_is_seen_by_a_plain_open_alone(tmp_path: Path) -> None:
    for number in (0, 2):
        np.save(tmp_path / f"{number}.npy", ROWS + number)
    EmbeddingReader(tmp_path).save_manifest()
    np.save(tmp_path / "1.npy", ROWS + 1)
    again = EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet")
    np.testing.assert_array_equal(again.to_dask_array().compute(), np.concatenate([ROWS, ROWS + 2]))
    plain = EmbeddingReader(tmp_path).to_dask_array().compute()
    np.testing.assert_array_equal(plain, np.concatenate([ROWS, ROWS + 1, ROWS + 2]))


def test_other_columns_than_those_saved(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet-list", columns=["id", "caption", "day"])
    collection.open(meta_columns=["id", "caption"]).save_manifest()
    url = collection.folder / "_manifest.parquet"
    reader = EmbeddingReader.from_manifest(url, meta_columns="caption")
    assert reader.to_dask_dataframe().columns.tolist() == ["caption"]
    assert EmbeddingReader.from_manifest(url, meta_columns=[]).to_dask_dataframe().columns.tolist() == []
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
    with pytest.raises(ArgumentError, match=r"must end in \.parquet"):
        reader.save_manifest(tmp_path / "m.json")
    with pytest.raises(NoFilesError, match=r"none\.parquet does not exist"):
        EmbeddingReader.from_manifest(tmp_path / "none.parquet")


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
        ("data_offset", -1),
        ("data_offset", 0),
        ("size", -5),
        ("size", 10**6),
        ("group_rows", [-1, 21]),
        ("group_rows", [3]),
        ("columns", 7),
        ("kind", "other"),
        ("source", -1),
        ("source", 1),
        ("fingerprint", None),
        ("version", 2),
        ("file_format", "pickle"),
        ("columns", None),
        ("embedding_dtype", "O"),
        ("embedding_column", 3),
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
    rewrite(folder / "_manifest.parquet", _set(name, value))
    with pytest.raises(FormatError, match=r"_manifest\.parquet: not a (usable|readable) manifest"):
        EmbeddingReader.from_manifest(folder / "_manifest.parquet")
    # A plain open does without it.
    np.testing.assert_array_equal(EmbeddingReader(folder).to_dask_array().compute(), ROWS)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000, b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_garbage_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    (tmp_path / "_manifest.parquet").write_bytes(content)
    with pytest.raises(FormatError, match="not a readable manifest"):
        EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet")
    assert EmbeddingReader(tmp_path).count == 20


def test_a_lie_about_a_file_shows_when_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    np.save(tmp_path / "1.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()

    def longer(columns: dict[str, Any], facts: dict[str, Any]) -> None:
        columns["rows"][0] += 10
        columns["size"][0] += 10 * 12

    rewrite(tmp_path / "_manifest.parquet", longer)
    with pytest.raises(FileChangedError, match=r"0\.npy"):
        EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet").to_dask_array().compute()
    assert EmbeddingReader(tmp_path).count == 40

    def narrower(columns: dict[str, Any], facts: dict[str, Any]) -> None:
        columns["rows"][0], columns["dimension"][0] = 60, 1

    EmbeddingReader(tmp_path).save_manifest()
    rewrite(tmp_path / "_manifest.parquet", narrower)
    with pytest.raises(MismatchError):
        EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet")


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
    rewrite(tmp_path / "_manifest.parquet", _set(name, value))
    reader = EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet")
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

    rewrite(tmp_path / "_manifest.parquet", change)
    reader = EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet")
    for read in (reader.to_dask_array().compute, reader.to_dask_dataframe().compute, lambda: list(reader(2))):
        with pytest.raises(FormatError, match=r"0\.parquet: holds 5 rows in 2 row groups, where . rows in other"):
            read()


def test_a_flipped_bit_in_a_manifest_changes_nothing_or_is_noticed(tmp_path: Path) -> None:
    for number in range(20):
        np.save(tmp_path / f"{number}.npy", np.full((number + 1, 3), number, np.float32))
    EmbeddingReader(tmp_path).save_manifest()
    saved = (tmp_path / "_manifest.parquet").read_bytes()

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


@pytest.mark.filterwarnings("ignore:pickle-based|pyarrow.PyExtensionType")  # pyarrow 16 warns that it unpickles nothing
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
    rewrite(tmp_path / "_manifest.parquet", lambda columns, facts: facts.update(columns=[spelled]))
    with suppress(FormatError):  # pyarrow 16 has a type for it
        EmbeddingReader.from_manifest(tmp_path / "_manifest.parquet")
    assert not (tmp_path / "exploded").exists()


def test_file_systems_made_alike_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of fsspec up to 2026.7 call the first two of a forked process unequal."""
    write_embeddings(ROWS, tmp_path, "parquet_npy", pd.DataFrame({"id": np.arange(20)}))

    def resolve(source: Any, storage_options: Any = None) -> tuple[Any, str]:
        filesystem = LocalFileSystem(skip_instance_cache=True)
        filesystem._fs_token_ = uuid.uuid4().hex
        return filesystem, os.fspath(source)

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
        content = fsspec.filesystem("s3", **options).cat_file(f"{url}/_manifest.parquet")
        table = pq.read_table(pa.BufferReader(content))
        spelled = f"{table.to_pylist()} {table.schema.metadata}"
        for secret in (servers.S3_KEY, servers.S3_SECRET, server.endpoint, "s3://"):
            assert secret not in spelled
        reader = EmbeddingReader.from_manifest(f"{url}/_manifest.parquet", storage_options=options)
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
        x = EmbeddingReader.from_manifest(f"{url}/_manifest.parquet", storage_options=options).to_dask_array()
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
