"""Files as people have them: which format and which column are taken, and what is said of the rest."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from dask.utils import parse_bytes

from dask_embedding_reader import (
    ArgumentError,
    ArgumentTypeError,
    ColumnError,
    EmbeddingReader,
    FormatError,
    MismatchError,
    NoFilesError,
    iter_batches,
    nearest,
    write_embeddings,
)
from dask_embedding_reader._common.arguments import check_nbytes
from dask_embedding_reader.cli import main
from dask_embedding_reader.formats.registry import KINDS, FileFormatName, format_names, get_file_format
from dask_embedding_reader.formats.vector_columns import is_ml_vector
from dask_embedding_reader.storage.find import MANIFEST_NAME
from tests.support import servers
from tests.support.collections import skipping_what_pyarrow_lacks
from tests.support.stores import Bucket, emptied_bucket

ROWS: npt.NDArray[Any] = np.arange(12, dtype=np.float32).reshape(4, 3)
WORDS = pd.DataFrame({"word": list("abcd"), "n": range(4)})


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An object store that counts."""
    with emptied_bucket() as store:
        yield store


def put(path: Path, **columns: Any) -> Path:
    """Write a parquet file."""
    return put_table(path, pa.table(columns))


def put_table(path: Path, table: pa.Table, group_rows: int = 2**20, *, codec: str = "snappy", **options: Any) -> Path:
    """Write a parquet file, or an Arrow file, in which snappy is not known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".arrow":
        compression = pa.ipc.IpcWriteOptions(compression=None if codec in ("none", "snappy") else codec)
        with pa.ipc.new_file(path, table.schema, options=compression) as writer:
            writer.write_table(table, group_rows)
    else:
        pq.write_table(table, path, group_rows, compression=codec, **options)
    return path


def lists(rows: npt.NDArray[Any] = ROWS) -> pa.Array:
    return pa.array(rows.tolist(), pa.list_(pa.float32()))


def taken(reader: EmbeddingReader) -> tuple[str, str | tuple[str, ...] | None]:
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


def test_first_bytes_tell_streams_and_tensors_too(tmp_path: Path) -> None:
    table = pa.table({"vector": lists()})
    with pa.ipc.new_stream(tmp_path / "stream", table.schema) as writer:
        writer.write_table(table)
    assert taken(EmbeddingReader(tmp_path / "stream")) == ("arrow", "vector")
    safetensors.numpy.save_file({"vector": ROWS}, tmp_path / "tensors")
    assert taken(EmbeddingReader(tmp_path / "tensors")) == ("safetensors", "vector")
    for name in ("stream", "tensors"):
        same(EmbeddingReader(tmp_path / name))


def test_a_suffix_within_the_name_tells_the_kind_and_the_dtype(tmp_path: Path) -> None:
    """As of the cropped files of big-ann-benchmarks."""
    path = tmp_path / "base.1B.u8bin.crop_nb_4"
    path.write_bytes(np.array(ROWS.shape, "<u4").tobytes() + ROWS.astype("u1").tobytes())
    reader = EmbeddingReader(path)
    assert (taken(reader)[0], reader.dtype.name) == ("fbin", "uint8")
    same(reader)


def test_a_dtype_that_is_not_the_one_of_the_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.u8bin").write_bytes(np.array(ROWS.shape, "<u4").tobytes() + ROWS.astype("u1").tobytes())
    same(EmbeddingReader(tmp_path, embedding_dtype="uint8"))
    for file_format in ("auto", "fbin"):
        with pytest.raises(ArgumentError, match=r"0\.u8bin: its name says that its items are uint8, .* they are int8"):
            EmbeddingReader(tmp_path, file_format, embedding_dtype="int8")


PICKLED = r"pickled Python, which is not loaded .* where you trust it"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("v.pt", PICKLED + r": safetensors\.torch\.save_file\("),
        ("v.PTH", PICKLED + r": safetensors\.torch\.save_file\("),
        ("v.pkl", PICKLED + r", load it, and save it by np\.save"),
        ("v.h5", r"da\.from_array\(h5py\.File\(path\)"),
        ("v.hdf5", r"da\.from_array\(h5py\.File\(path\)"),
        ("v.zarr/c/0/0", r"da\.from_zarr\(path\)"),
        ("v.zarr/0.0", r"da\.from_zarr\(path\)"),
        ("v.lance", r"lance\.dataset\(path\)\.to_batches\(\)"),
        ("v.faiss", r"faiss\.read_index\(path\)\.reconstruct_n\(\)"),
        ("v.index", r"faiss\.read_index\(path\)\.reconstruct_n\(\)"),
        ("v.tar", r"\"tar://::\" before its path"),
        ("v.csv", r"pandas\.read_csv\(path\)\.to_parquet"),
        ("v.jsonl.gz", r"pandas\.read_json\(path, lines=True\)\.to_parquet"),
    ],
)
def test_files_that_are_read_by_other_means_are_told_these(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(NoFilesError, match=f"found instead 1 file: 1 .*{remedy}"):
        EmbeddingReader(tmp_path)
    with pytest.raises(FormatError, match=f"{name}: .*{remedy}"):
        EmbeddingReader(tmp_path / name)


def test_a_file_in_a_folder_of_zarr_that_is_no_chunk_is_read(tmp_path: Path) -> None:
    (tmp_path / "v.zarr").mkdir()
    np.save(tmp_path / "v.npy", np.ones((2, 3)))
    path = (tmp_path / "v.npy").rename(tmp_path / "v.zarr" / "part-a")
    assert EmbeddingReader(path).count == 2


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_files_that_are_compressed_as_a_whole_are_to_be_unpacked(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    np.save(tmp_path / "0.npy", np.ones((2, 3)))
    path = tmp_path / f"0.npy.{suffix}"
    path.write_bytes(pack((tmp_path / "0.npy").read_bytes()))
    with pytest.raises(FormatError, match=f"^{path}: it is compressed as a whole, .* unpack it"):
        EmbeddingReader(path)
    path.write_bytes((tmp_path / "0.npy").read_bytes())
    assert EmbeddingReader(path).count == 2


def test_an_archive_of_torch_is_told_from_one_of_arrays(tmp_path: Path) -> None:
    """As ``torch.save`` lays it out; it may be called anything."""
    path = tmp_path / "vectors.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vectors/data.pkl", b"\x80\x02}q\0.")
        archive.writestr("vectors/data/0", ROWS.tobytes())
    for file_format in ("auto", "npz"):
        with pytest.raises(FormatError, match=rf"vectors\.bin: .*{PICKLED}: safetensors"):
            EmbeddingReader(path, file_format)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README", b"x")
    with pytest.raises(FormatError, match=r"vectors\.bin: .*holds no array, but 'README'"):
        EmbeddingReader(path)
    safetensors.numpy.save_file({}, tmp_path / "0.safetensors")
    with pytest.raises(ColumnError, match=r"0\.safetensors: has no tensor 'embedding'; its tensors are none"):
        EmbeddingReader(tmp_path / "0.safetensors")


def test_a_folder_of_metadata_elsewhere_says_that_it_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb" / "0.npy", ROWS)
    put(tmp_path / "meta" / "0.parquet", word=list("abcd"))
    reader = EmbeddingReader(tmp_path / "emb", metadata_folder=tmp_path / "meta")
    assert taken(reader)[0] == "parquet_npy"
    assert reader.columns == {"word": pa.string()}
    likely = re.escape(repr(f"{tmp_path}/meta"))
    warning = f'passed over: npy files .*file_format="parquet_npy", .*metadata_folder={likely}'
    with pytest.warns(UserWarning, match=warning):
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
    written = pa.Schema.from_pandas(WORDS)  # its texts are large ones in pandas 3
    assert EmbeddingReader(tmp_path).columns == {field.name: field.type for field in written}


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "npy"])
def test_files_of_no_rows_do_not_tell_which_columns_there_are(tmp_path: Path, suffix: str) -> None:
    def put_rows(number: int, rows: npt.NDArray[Any], **columns: Any) -> None:
        if suffix == "npy":
            np.save(tmp_path / f"{number}.npy", rows)
            put(tmp_path / f"{number}.parquet", **columns)
        else:
            put(tmp_path / f"{number}.{suffix}", embedding=lists(rows), **columns)

    put_rows(0, ROWS[:0], n=pa.array([], pa.int64()))
    put_rows(1, ROWS, n=range(4), word=list("abcd"))
    reader = EmbeddingReader(tmp_path, meta_columns="*")
    assert reader.to_dask_dataframe().compute().to_dict("list") == {"n": [0, 1, 2, 3], "word": list("abcd")}
    assert list(reader.columns) == ["n", "word"]


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


def test_what_a_web_server_tells_of_a_file_is_taken_for_its_first_bytes(tmp_path: Path) -> None:
    """Of files that begin with their header nothing more is read; of others, which end with it, that is read."""
    servers.require(servers.nginx_available, "nginx")
    for kind in KINDS:
        write_embeddings(ROWS, tmp_path / kind, kind)
        (tmp_path / kind / MANIFEST_NAME).unlink()
    with servers.nginx(tmp_path) as server:
        for kind in KINDS:
            file = f"/{kind}/00000000.{kind}"
            for source in (file, f"/{kind}/"):
                with server.counting() as requests:
                    reader = EmbeddingReader(f"{server.url}{source}")
                assert taken(reader) == (kind, "embedding")
                same(reader)
                if get_file_format(kind).first_nbytes:
                    assert [(one.method, one.path) for one in requests if one.path == file] == [("GET", file)]


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


# --------------------------------------------------------------------------------------------------------------------
# Layouts of real data sets


def test_lists_of_one_list_and_tensors_of_one_row_are_vectors(tmp_path: Path) -> None:
    nested = pa.array([[row] for row in ROWS.tolist()], pa.list_(pa.list_(pa.float32())))
    fixed = pa.array([[row] for row in ROWS.tolist()], pa.list_(pa.list_(pa.float32(), 3), 1))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.reshape(-1)), 3)
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (1, 3)), flat)
    for name, column in {"nested": nested, "fixed": fixed, "tensors": tensors}.items():
        same(EmbeddingReader(put(tmp_path / f"{name}.parquet", v=column)))
        table = pa.table({"v": column})
        for codec in (None, "zstd"):
            with pa.ipc.new_file(
                tmp_path / f"{name}.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)
            ) as writer:
                writer.write_table(table)
            same(EmbeddingReader(tmp_path / f"{name}.arrow"))
    two = pa.array([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]], pa.list_(pa.list_(pa.float32())))
    with pytest.raises(FormatError, match=r"row 1: column 'v' holds a vector that is 2 lists where .* one list"):
        EmbeddingReader(put(tmp_path / "two.parquet", v=two), embedding_column="v").to_dask_array().compute()


def test_text_is_to_be_parsed(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", embedding=[json.dumps(row) for row in ROWS.tolist()])
    with pytest.raises(FormatError, match=r"is string, not a list of numbers; parse it .*json\.loads.*b64decode"):
        EmbeddingReader(tmp_path)


def test_lists_of_several_lists_and_tensors_of_several_rows_say_what_to_do(tmp_path: Path) -> None:
    nested = put(tmp_path / "0.parquet", e=pa.array([[[1.0, 2.0], [3.0, 4.0]]] * 4))
    with pytest.raises(FormatError, match=r"row 0: column 'e' .* 2 lists .*give each list a row: frame\.explode"):
        EmbeddingReader(nested)
    frame = pd.read_parquet(nested).explode("e")
    frame.to_parquet(nested)
    assert EmbeddingReader(nested).to_dask_array().compute().tolist() == [[1, 2], [3, 4]] * 4
    flat = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.reshape(-1)[:8]), 4)
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (2, 2)), flat)
    with pytest.raises(FormatError, match=r"tensors of shape \(2, 2\); .* reshape them, and write the file again"):
        EmbeddingReader(put(tmp_path / "1.parquet", embedding=tensors))


@pytest.mark.parametrize("text", [" ".join, lambda items: f"[{' '.join(items)}]", lambda items: "\n".join(items)])
def test_the_remedy_for_numbers_between_blanks_works(tmp_path: Path, text: Callable[[list[str]], str]) -> None:
    path = put(tmp_path / "0.parquet", embedding=[text(list(map(str, row))) for row in ROWS])
    with pytest.raises(FormatError) as told:
        EmbeddingReader(path)
    remedy = str(told.value).partition("for JSON, ")[2].partition(" for numbers between blanks")[0]
    frame = pd.read_parquet(path)
    frame["embedding"] = eval(remedy, {"frame": frame, "np": np})
    frame.to_parquet(path)
    same(EmbeddingReader(path))


NO_VECTORS = "has no column 'embedding'; none of its columns holds lists of numbers, equally many in each row: "


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"e": ["[1.0, 2.0]"], "n": [1]}, "'e' is string, 'n' is int64; name the column of vectors"),
        ({"e": [[1.0], [1.0, 2.0]]}, "'e' is list<"),
        ({f"c{n}": [n] for n in range(12)}, "'c9' is int64 and 2 more; name"),
        ({"e": [b"x" * 8]}, r"name the column .*where it is bytes, their dtype, too \(embedding_dtype=\"float32\"\)"),
        ({"e": [{"dense": [1.0], "n": 1}]}, r"name the column .*, a field of a struct as 'e\.dense'"),
    ],
)
def test_where_no_column_holds_vectors_it_is_said_what_they_hold(
    tmp_path: Path, suffix: str, columns: dict[str, Any], message: str
) -> None:
    put(tmp_path / "0.parquet", **columns)
    if suffix == "arrow":
        table = pq.read_table(tmp_path / "0.parquet")
        (tmp_path / "0.parquet").unlink()
        with pa.ipc.new_file(tmp_path / "0.arrow", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ColumnError, match=f"{NO_VECTORS}.*{message}"):
        EmbeddingReader(tmp_path)


def test_a_metadata_column_that_is_missing_in_arrow_files_is_not_said_to_hold_vectors(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, "arrow", WORDS)
    with pytest.raises(ColumnError, match=r"has no column 'wrod'; its columns are 'word', 'embedding', 'n'\W*$"):
        EmbeddingReader(tmp_path, meta_columns="wrod")


def test_files_of_one_vector_each_are_to_be_gathered(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS[0])
    with pytest.raises(FormatError, match=r"of many files of one vector each, .*np\.stack"):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_metadata_as_text_is_to_be_made_parquet(tmp_path: Path, suffix: str) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / f"0.{suffix}").write_text("x")
    remedy = rf"make parquet of them: pandas\.read_.*\.to_parquet\(path\.replace\(\"\.{suffix}"
    with pytest.raises(NoFilesError, match=rf"1 \.{suffix}; {remedy}"):
        EmbeddingReader(tmp_path, metadata_folder=tmp_path / "meta")
    (tmp_path / "meta" / f"0.{suffix}").rename(tmp_path / f"0.{suffix}.gz")
    with pytest.raises(NoFilesError, match=rf"no \.parquet file beside its npy files; .*{remedy}\.gz"):
        EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["n"])


@pytest.mark.parametrize("file_rows", [[4, 4, 4], [1, 7, 4]])
def test_one_file_of_metadata_is_that_of_all_files_of_vectors(tmp_path: Path, file_rows: list[int]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = np.arange(36, dtype=np.float32).reshape(12, 3)
    for number, part in enumerate(np.split(rows, np.cumsum(file_rows)[:-1])):
        np.save(folder / f"{number}.npy", part)
    pq.write_table(pa.table({"n": range(12)}), folder / "metadata.parquet", row_group_size=5)
    reader = EmbeddingReader(folder, meta_columns="*")
    same(reader, rows)
    assert reader.to_dask_dataframe().map_partitions(len).compute().tolist() == file_rows
    assert reader.to_dask_dataframe().compute()["n"].tolist() == list(range(12))
    assert reader.to_dask_dataframe(3, 9, max_piece_size=2).compute()["n"].tolist() == list(range(3, 9))
    for batch, frame in reader(5, show_progress=False):
        assert (batch[:, 0] / 3).tolist() == frame["n"].tolist() == frame["i"].tolist()
    assert list(reader.filter([("n", ">", 5)]).take([0, 4]).to_dask_dataframe().compute()["n"]) == [6, 10]
    assert sorted(reader.shuffle(1).to_dask_dataframe().compute()["n"]) == list(range(12))
    reader.save_manifest()
    assert EmbeddingReader.from_manifest(folder).to_dask_dataframe().compute()["n"].tolist() == list(range(12))
    write_embeddings(reader, tmp_path / "out", "parquet_npy", rows_per_file=5)
    assert EmbeddingReader(tmp_path / "out", meta_columns="n").to_dask_dataframe().compute()["n"].tolist() == list(
        range(12)
    )
    np.save(folder / "9.npy", rows)
    (folder / ".manifest.embeddings").unlink()
    with pytest.raises(MismatchError, match=r"only file of metadata, and has 12 rows, but the 4 files of .* have 24"):
        EmbeddingReader(folder, meta_columns="*", embedding_column="embedding")


def test_one_metadata_for_several_folders_is_said_to_belong_to_each(tmp_path: Path) -> None:
    """As in the folder that clip-retrieval writes, named whole."""
    for number in range(2):
        for folder in ("img_emb", "text_emb"):
            (tmp_path / folder).mkdir(exist_ok=True)
            np.save(tmp_path / folder / f"{folder}_{number}.npy", ROWS)
        put(tmp_path / "metadata" / f"metadata_{number}.parquet", n=range(4))
    with pytest.raises(MismatchError, match=r"are from 2 folders: open each by itself, as in '.*/img_emb'"):
        EmbeddingReader(tmp_path, metadata_folder=tmp_path / "metadata")


def test_folders_that_look_like_collections_of_their_own_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("img_emb", "text_emb"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / f"{folder}_0.npy", ROWS)
    with pytest.warns(UserWarning, match=r"img_emb \(4 rows\), text_emb \(4 rows\); name .* as in '.*/img_emb'"):
        assert EmbeddingReader(tmp_path).count == 8
    same(EmbeddingReader(tmp_path / "img_emb"))
    with pytest.raises(SystemExit, match="0"), pytest.warns(UserWarning, match="joins"):
        main(["info", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["folders"] == {
        "img_emb": {"files": 1, "rows": 4},
        "text_emb": {"files": 1, "rows": 4},
    }


def test_folders_of_a_store_are_named_with_its_protocol(bucket: Bucket) -> None:
    for folder in ("train", "test"):
        bucket.put(f"emb/{folder}/0.npy", npy_bytes(ROWS))
    with pytest.warns(UserWarning, match=r"'bucket://emb' joins .* as in 'bucket://emb/test'"):
        EmbeddingReader("bucket://emb")


def test_files_that_are_called_as_splits_are_named_by_a_glob(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"train-0000{number}-of-00002.parquet", emb=lists())
    put(tmp_path / "test-00000-of-00001.parquet", emb=lists())
    with pytest.warns(UserWarning, match=r"test \(4 rows\), train \(8 rows\); name one .* as in '.*/test-\*\.parquet'"):
        assert EmbeddingReader(tmp_path).count == 12
    assert EmbeddingReader(f"{tmp_path}/t*.parquet").count == 12  # which was chosen
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert EmbeddingReader(tmp_path).count == 8
    put(tmp_path / "part-0.parquet", emb=lists())
    assert EmbeddingReader(tmp_path).count == 12


@pytest.mark.parametrize("folders", [("00", "01"), ("lang=en", "lang=de"), ("a", "b"), ("emb_0", "emb_1")])
def test_folders_of_one_collection_are_joined(tmp_path: Path, folders: tuple[str, str]) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "0.npy", ROWS)
    assert EmbeddingReader(tmp_path).count == 8


def test_files_that_do_not_belong_are_left_out_by_a_glob(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"train-0000{number}-of-00002.parquet", emb=lists())
    put(tmp_path / "neighbors.parquet", neighbors=[[1], [2]])
    with pytest.raises(ColumnError, match=r"neighbors\.parquet: .* by a glob, such as '.*/train-\*\.parquet'"):
        EmbeddingReader(tmp_path, embedding_column="emb")
    put(tmp_path / "neighbors.parquet", emb=[[1.0], [2.0]])
    with pytest.raises(MismatchError, match=r"as separate collections, such as '.*/train-\*\.parquet', or write"):
        EmbeddingReader(tmp_path)
    assert EmbeddingReader(f"{tmp_path}/train-*.parquet").count == 8


@pytest.mark.parametrize("other", [{"neighbors": [[1, 2], [3, 4]]}, {"text": ["a", "b"]}])
@pytest.mark.parametrize("name", ["a.parquet", "z.parquet"])
@pytest.mark.parametrize(("base", "glob"), [("base-", "base-*"), ("", "[0-9]*")])
def test_files_of_other_columns_are_told_apart_whichever_comes_first(
    tmp_path: Path, base: str, glob: str, name: str, other: Any
) -> None:
    put(tmp_path / name, **other)
    for number in range(2):
        put(tmp_path / f"{base}{number}.parquet", emb=lists())
    with pytest.raises(ColumnError, match=r"several collections, name those of one by a glob, such as ") as told:
        EmbeddingReader(tmp_path)
    globs = re.findall("'([^']*)'", str(told.value).partition("such as ")[2].rpartition("such as ")[2])
    assert sorted(globs) == sorted([f"{tmp_path}/{name}", f"{tmp_path}/{glob}.parquet"])
    assert EmbeddingReader(f"{tmp_path}/{glob}.parquet").count == 8


# --------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("text", ["1B", "128MiB", "1.5 GB", "100kB", ".5kib", "2 TiB"])
def test_sizes_are_read_as_dask_reads_them(text: str) -> None:
    assert check_nbytes("limit", text) == parse_bytes(text)


def test_chunks_are_pieces_in_rows_or_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((100, 4), np.float32))
    np.save(tmp_path / "1.npy", np.zeros((20, 4), np.float32))
    reader = EmbeddingReader(tmp_path)
    wanted: dict[Any, tuple[int, ...]] = {50: (50, 50, 20), "800B": (50, 50, 20), -1: (100, 20), "auto": (100, 20)}
    for given, rows in wanted.items():
        assert reader.to_dask_array(chunks=given).chunks[0] == rows
        assert reader.to_dask_dataframe(chunks=given).npartitions == len(rows)
        if given == -1:
            continue
        assert reader.to_dask_array(max_piece_size=given).chunks[0] == rows
        batches = reader(7, max_piece_size=given, max_ram_usage_in_bytes="64MiB", show_progress=False)
        assert sum(len(vectors) for vectors, _ in batches) == 120
    assert reader.to_dask_array(chunks="800B").name == reader.to_dask_array(max_piece_size=50).name
    with pytest.raises(ArgumentError, match="chunks= and max_piece_size= are the same"):
        reader.to_dask_array(chunks=5, max_piece_size=5)
    for wrong in ("much", "12", "-1MB", 0, -2):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="chunks"):
            reader.to_dask_array(chunks=wrong)
    with pytest.raises(ArgumentTypeError, match=r"max_ram_usage_in_bytes must be .* not '4 gigabytes'"):
        reader(7, max_ram_usage_in_bytes="4 gigabytes")


TAKERS: dict[str, Callable[[EmbeddingReader, Path, Any], Any]] = {
    "batches": lambda reader, _, limit: list(reader(7, max_ram_usage_in_bytes=limit)),
    "lazy batches": lambda reader, _, limit: list(
        iter_batches(reader.to_dask_array(), batch_size=7, max_ram_usage_in_bytes=limit)
    ),
    "search": lambda reader, _, limit: nearest(reader, np.ones((1, 4)), max_ram_usage_in_bytes=limit),
    "writing": lambda reader, out, limit: write_embeddings(reader, out, max_ram_usage_in_bytes=limit),
    "writing of an array": lambda reader, out, limit: write_embeddings(
        reader.to_dask_array(), out, max_ram_usage_in_bytes=limit
    ),
}


@pytest.mark.parametrize("taker", list(TAKERS))
def test_all_that_has_a_limit_takes_it_as_text(tmp_path: Path, taker: str) -> None:
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb" / "0.npy", np.ones((30, 4), np.float32))
    reader = EmbeddingReader(tmp_path / "emb")
    TAKERS[taker](reader, tmp_path / "out", "64MiB")
    with pytest.raises(ArgumentTypeError, match=r"max_ram_usage_in_bytes must be .* not '4 gigabytes'"):
        TAKERS[taker](reader, tmp_path / "other", "4 gigabytes")


# --------------------------------------------------------------------------------------------------------------------
# One column for each item


def in_columns(rows: npt.NDArray[Any], names: str = "emb_{}", **others: Any) -> dict[str, Any]:
    """Return vectors as one column for each of their items, in the order of text, with others between."""
    named = {names.format(k): rows[:, k] for k in range(rows.shape[1])} | others
    return dict(sorted(named.items()))


def many(rows: int = 300, dimension: int = 12) -> npt.NDArray[Any]:
    return np.random.default_rng(7).standard_normal((rows, dimension)).astype(np.float32)


COLUMNAR: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("parquet", {"data_page_size": 64}),
    "parquet 2": ("parquet", {"data_page_size": 64, "data_page_version": "2.0"}),
    "arrow": ("arrow", {}),
    "arrow zstd": ("arrow", {"codec": "zstd"}),
}


@pytest.mark.parametrize("kind", COLUMNAR)
@pytest.mark.parametrize("given", ["emb_*", [f"emb_{k}" for k in range(12)]])
def test_one_column_for_each_item_is_read(tmp_path: Path, given: Any, kind: str) -> None:
    suffix, options = COLUMNAR[kind]
    rows, source = many(), tmp_path / "in"
    source.mkdir()
    for number, part in enumerate(np.split(rows, [200])):
        table = pa.table(in_columns(part, embed=part[:, 0], n=np.arange(len(part)) + 200 * number))
        put_table(source / f"{number}.{suffix}", table, 70, **options)
    put(source / f"2.{suffix}", x=pa.array([], pa.null()))
    reader = EmbeddingReader(source, embedding_column=given, meta_columns="*")
    assert (reader.dimension, reader.dtype.name, list(reader.columns)) == (12, "float32", ["embed", "n"])
    assert "(column 'emb_0, ..., emb_11')" in repr(reader)
    same(reader, rows)
    np.testing.assert_array_equal(reader.to_dask_array(5, 290, max_piece_size=33)[7:250].compute(), rows[12:255])
    np.testing.assert_array_equal(reader.to_dask_array(dtype="float64").compute(), rows.astype(np.float64))
    assert reader.to_dask_dataframe().compute()["n"].tolist() == list(range(300))
    for vectors, frame in reader(41, max_piece_size=17, show_progress=False):
        np.testing.assert_array_equal(vectors, rows[frame["n"]])
        np.testing.assert_array_equal(vectors[:, 0], frame["embed"])
    for chosen in (reader.take([3, 210, 77, 3]), reader.filter([("n", ">", 190)]), reader.shuffle(1)):
        np.testing.assert_array_equal(chosen.to_dask_array().compute(), rows[chosen.to_dask_dataframe().compute()["n"]])
    other = EmbeddingReader(source, embedding_column=[f"emb_{k}" for k in range(11, -1, -1)])
    same(other, rows[:, ::-1])
    assert other.token != reader.token
    write_embeddings(reader, tmp_path / "out", suffix)
    same(EmbeddingReader(tmp_path / "out"), rows)
    reader.save_manifest()
    for again in (EmbeddingReader.from_manifest(source), EmbeddingReader(source, embedding_column=given)):
        same(again, rows)
    assert EmbeddingReader(source, meta_columns="*").token == reader.token
    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(source), str(tmp_path / "npy"), "--to", "npy", "--embedding-column", "emb_*"])
    same(EmbeddingReader(tmp_path / "npy"), rows)


@pytest.mark.parametrize("kind", COLUMNAR)
def test_one_column_for_each_item_of_a_remote_file(tmp_path: Path, bucket: Bucket, kind: str) -> None:
    rows, (suffix, options) = many(), COLUMNAR[kind]
    path = put_table(tmp_path / f"0.{suffix}", pa.table(in_columns(rows)), 100, **options)
    bucket.put(f"emb/0.{suffix}", path.read_bytes())
    same(EmbeddingReader("bucket://emb", embedding_column="emb_*"), rows)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint32", "int64"])
def test_columns_of_items_keep_their_dtype(tmp_path: Path, dtype: str, suffix: str) -> None:
    put(tmp_path / f"0.{suffix}", **in_columns(ROWS.astype(dtype)))
    reader = EmbeddingReader(tmp_path, embedding_column="emb_*")
    assert reader.dtype == dtype
    same(reader, ROWS.astype(dtype))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (in_columns(ROWS), ["emb_0", "emb_3"], "has no column 'emb_3'"),
        (in_columns(ROWS), "e_*", r"embedding_column='e_\*' names none of its columns: 'emb_0'"),
        (in_columns(ROWS, emb_norm=range(4)), "emb_*", "also names 'emb_norm', which is no number; list the names"),
        (in_columns(ROWS) | {"emb_4": range(4)}, "emb_*", "names 4 columns, but 'emb_4' where number 3 was expected"),
        (in_columns(ROWS) | {"emb_02": range(4)}, "emb_*", "but 'emb_0?2' where number 3 was expected"),
        (
            in_columns(ROWS) | {"emb_1": np.arange(4.0)},
            "emb_*",
            "column 'emb_1' is double, but 'emb_0' is f",
        ),
        (in_columns(ROWS) | {"emb_1": list("abcd")}, "emb_*", "column 'emb_1' is string, not a number"),
        ({"v": lists()}, ["v"], "column 'v' is list<.*name it alone"),
        (in_columns(ROWS, "e{}") | {"e1": pa.array([1, 2, None, 4], pa.float32())}, "e*", "row 2: column 'e1' is null"),
    ],
)
def test_columns_that_are_no_items_are_named(
    tmp_path: Path, columns: Any, given: Any, message: str, suffix: str
) -> None:
    put(tmp_path / f"0.{suffix}", **columns)
    with pytest.raises((ColumnError, FormatError), match=rf"0\.{suffix}.*{message}"):
        EmbeddingReader(tmp_path, embedding_column=given).to_dask_array().compute()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_files_of_other_columns_of_items_are_named(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / f"0.{suffix}", **in_columns(ROWS))
    put(tmp_path / f"1.{suffix}", **in_columns(ROWS[:, :2]))
    with pytest.raises(ColumnError, match=rf"1\.{suffix}: has no column 'emb_2'"):
        EmbeddingReader(tmp_path, embedding_column="emb_*")
    put(tmp_path / f"1.{suffix}", **in_columns(many(4, 4)))
    with pytest.raises(ColumnError, match=rf"1\.{suffix}: 'emb_\*' names the columns 'emb_3', too"):
        EmbeddingReader(tmp_path, embedding_column="emb_*")
    assert EmbeddingReader(tmp_path, embedding_column=["emb_0", "emb_1", "emb_2"]).count == 8


def test_one_column_for_each_item_is_suggested_and_asked_for_of_columns_alone(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", **in_columns(many(4)))
    with pytest.raises(ColumnError, match=r"where each item has its own: embedding_column='emb_\*'"):
        EmbeddingReader(tmp_path)
    np.save(tmp_path / "0.npy", ROWS)
    with pytest.raises(ArgumentError, match="read from parquet and arrow files, not from npy files"):
        EmbeddingReader(tmp_path, embedding_column=["a", "b"])
    (tmp_path / "0.npy").unlink()
    for given in ("emb_*", ["emb_0", "emb_1"]):
        with pytest.raises(ArgumentError, match="embedding_dtype is only for binary columns; columns of items tell"):
            EmbeddingReader(tmp_path, embedding_column=given, embedding_dtype="float32")
    for wrong in ([], ["a", "a"]):
        with pytest.raises(ArgumentError, match="embedding_column="):
            EmbeddingReader(tmp_path, embedding_column=wrong)
    with pytest.raises(ArgumentTypeError, match="embedding_column must be"):
        EmbeddingReader(tmp_path, embedding_column=3)  # type: ignore[arg-type]


def test_a_column_that_is_called_like_a_pattern_is_itself(tmp_path: Path) -> None:
    put(tmp_path / "0.parquet", **{"v*": lists()}, v0=range(4))
    same(EmbeddingReader(tmp_path, embedding_column="v*"))


# --------------------------------------------------------------------------------------------------------------------
# Fields of structs


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 12)])
def test_a_field_of_a_struct_is_read(tmp_path: Path, kind: pa.DataType, suffix: str) -> None:
    rows, source = many(), tmp_path / "in"
    dense = pa.array(rows.tolist(), kind)
    inner = pa.StructArray.from_arrays([dense, pa.array(range(300))], ["dense", "n"])
    outer = pa.StructArray.from_arrays([pa.array(range(300)), inner], ["a", "b.c"])
    put(source / f"0.{suffix}", embedding=inner, x=outer, word=[str(n) for n in range(300)])
    required = pa.schema([pa.field("embedding", inner.type), pa.field("x", outer.type, nullable=False)])
    plain = pa.table({"embedding": inner, "x": outer}, required)
    for codec in ("none", "zstd"):
        path = put_table(tmp_path / f"{codec}.{suffix}", plain, 110, codec=codec, use_dictionary=False)
        for column in ("embedding.dense", "x.b.c.dense"):
            same(EmbeddingReader(path, embedding_column=column), rows)
    for column in ("embedding.dense", "x.b.c.dense"):
        reader = EmbeddingReader(source, embedding_column=column, meta_columns=["word"])
        same(reader, rows)
        for vectors, frame in reader(41, show_progress=False):
            np.testing.assert_array_equal(vectors, rows[frame["word"].astype(int)])
        same(reader.take([200, 3]), rows[[200, 3]])
        write_embeddings(reader, tmp_path / "out", suffix, overwrite=True)
        same(EmbeddingReader(tmp_path / "out"), rows)
    reader.save_manifest()
    assert taken(EmbeddingReader(source)) == (suffix, "x.b.c.dense")
    same(EmbeddingReader(source), rows)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_with_a_dot_in_its_name_comes_before_a_field(tmp_path: Path, suffix: str) -> None:
    inner = pa.StructArray.from_arrays([lists()], ["b"])
    put(tmp_path / f"0.{suffix}", a=inner, **{"a.b": lists(ROWS + 1)})
    same(EmbeddingReader(tmp_path, embedding_column="a.b"), ROWS + 1)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_vectors_within_structs_that_are_null_are_named(tmp_path: Path, suffix: str) -> None:
    nulls = pa.array([False, False, True, False])
    nothing = pa.StructArray.from_arrays([lists()], ["dense"], mask=pa.array([True] * 4))
    inner = pa.StructArray.from_arrays([lists()], ["dense"], mask=nulls)
    with skipping_what_pyarrow_lacks():
        put(tmp_path / "all" / f"0.{suffix}", e=nothing)
        put(tmp_path / f"0.{suffix}", embedding=inner)
    with pytest.raises(FormatError, match=r"column 'e\.dense' holds a vector that is null|vectors of no items"):
        EmbeddingReader(tmp_path / "all", embedding_column="e.dense").to_dask_array().compute()
    with pytest.raises(FormatError, match=r"row 2: column 'embedding\.dense' holds a vector that is null"):
        EmbeddingReader(tmp_path, embedding_column="embedding.dense").to_dask_array().compute()
    with pytest.raises(FormatError, match=r"is struct<.*name its field: embedding_column='embedding\.dense'"):
        EmbeddingReader(tmp_path)
    with pytest.raises(ColumnError, match=r"has no column 'embedding\.other'"):
        EmbeddingReader(tmp_path, embedding_column="embedding.other")


def ml_vectors(rows: list[dict[str, Any] | None]) -> pa.Array:
    """Return vectors as Spark ML stores them."""
    indices, values = (pa.list_(pa.field("element", item, nullable=False)) for item in (pa.int32(), pa.float64()))
    kind = pa.struct(
        [pa.field("type", pa.int8(), nullable=False), ("size", pa.int32()), ("indices", indices), ("values", values)]
    )
    return pa.array(rows, kind)


def test_dense_vectors_of_spark_are_read_and_sparse_ones_refused(tmp_path: Path) -> None:
    rows = many().astype(np.float64)
    dense: list[dict[str, Any] | None] = [{"type": 1, "values": row} for row in rows.tolist()]
    put(tmp_path / "dense" / "0.parquet", features=ml_vectors(dense), n=range(300))
    reader = EmbeddingReader(tmp_path / "dense", meta_columns="*")
    assert (taken(reader), list(reader.columns)) == (("parquet", "features"), ["n"])
    same(reader, rows)
    same(reader.take([200, 3]), rows[[200, 3]])
    for vectors, frame in reader(41, show_progress=False):
        np.testing.assert_array_equal(vectors, rows[frame["n"]])
    sparse = {"type": 0, "size": 12, "indices": list(range(12)), "values": [1.0] * 12}
    for name, odd, message in (
        ("sparse", sparse, "row 250: column 'features' holds a vector that is sparse; .*vector_to_array"),
        ("null", None, "row 250: column 'features' holds a vector that is null"),
        ("long", {"type": 1, "values": [1.0] * 13}, "row 250: column 'features' holds a vector that has 13 items"),
    ):
        put(tmp_path / name / "0.parquet", features=ml_vectors([*dense[:250], odd, *dense[250:]]))
        with pytest.raises(FormatError, match=message):
            EmbeddingReader(tmp_path / name, embedding_column="features").to_dask_array().compute()


_ML_FIELDS: dict[str, pa.DataType] = {
    "type": pa.int8(),
    "size": pa.int32(),
    "indices": pa.list_(pa.int32()),
    "values": pa.list_(pa.float64()),
}


@pytest.mark.parametrize(
    "other",
    [
        {"type": pa.int16()}, {"size": pa.int64()}, {"indices": pa.int32()}, {"indices": pa.list_(pa.int64())},
        {"values": pa.float64()}, {"values": pa.list_(pa.float32())}, {"more": pa.int8()},
    ],
)  # fmt: skip
def test_structs_that_are_nearly_what_spark_makes_are_none(other: dict[str, pa.DataType]) -> None:
    assert is_ml_vector(pa.struct(list(_ML_FIELDS.items())))
    assert is_ml_vector(ml_vectors([]).type)
    assert not is_ml_vector(pa.struct(list((_ML_FIELDS | other).items())))
    assert not is_ml_vector(pa.struct(list(_ML_FIELDS.items())[::-1]))
    assert not is_ml_vector(pa.list_(pa.float64()))


# --------------------------------------------------------------------------------------------------------------------
# Folders that tell a column


HIVE = "__HIVE_DEFAULT_PARTITION__"


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "values",
    [
        ["de", "en"], ["01", "10"], ["00", "0a"], ["3000000000", "1"], ["-5", "7"], ["+5", "7"], ["1.5", "2"],
        ["a%20b%2Fc", "ü"], [HIVE, "1"], [HIVE, "x"], ["1=2", ""],
    ],
)  # fmt: skip
def test_what_folders_tell_is_a_column_as_pyarrow_reads_it(tmp_path: Path, values: list[str], file_format: str) -> None:
    source = tmp_path / "in"
    rows = many(20, 3)
    for number, (value, part) in enumerate(zip(values, np.split(rows, [12]), strict=True)):
        path = put(source / f"key={value}" / f"{number}.parquet", embedding=lists(part), n=part[:, 0])
        if file_format == "arrow":
            table = pq.ParquetFile(path).read()
            path.unlink()
            with pa.ipc.new_file(path.with_suffix(".arrow"), table.schema) as writer:
                writer.write_table(table)
    oracle = ds.dataset(source, partitioning="hive", format=file_format).to_table()
    wanted = dict(zip(oracle["n"].to_pylist(), oracle["key"].to_pylist(), strict=True))
    reader = EmbeddingReader(source, meta_columns="*")
    kind = pa.int32() if oracle.schema.field("key").type == pa.int32() else pa.large_string()
    assert reader.columns == {"n": pa.float32(), "key": kind}

    def check(opened: EmbeddingReader) -> None:
        frame = opened.to_dask_dataframe().compute()
        found = [None if pd.isna(value) else value for value in frame["key"]]
        assert found == [wanted[n] for n in frame["n"]]
        np.testing.assert_array_equal(opened.to_dask_array().compute()[:, 0], frame["n"])

    check(reader)
    check(reader.take([15, 3, 0]))
    for vectors, frame in reader(7, show_progress=False):
        assert [None if pd.isna(value) else value for value in frame["key"]] == [wanted[n] for n in vectors[:, 0]]
    one = next(value for value in wanted.values() if value is not None)
    expected = sum(value == one for value in wanted.values())
    assert reader.filter([("key", "==", one)]).count == EmbeddingReader(source).filter([("key", "==", one)]).count
    assert reader.filter([("key", "==", one)]).count == expected
    assert reader.filter(lambda frame: frame["key"] == one, columns=["key"]).count == expected
    assert EmbeddingReader(source).filter([("key", "in", [one]), ("n", ">", 0.0)]).count == sum(
        value == one and n > 0 for n, value in wanted.items()
    )
    write_embeddings(reader, tmp_path / "out", "parquet", rows_per_file=9)
    check(EmbeddingReader(tmp_path / "out", meta_columns="*"))
    reader.save_manifest()
    check(EmbeddingReader.from_manifest(source))
    assert EmbeddingReader(source, meta_columns=["n", "key"]).token == reader.token
    only = EmbeddingReader(source, meta_columns=["key"]).to_dask_dataframe().compute()
    assert list(only.columns) == ["key"]


def test_columns_of_files_come_before_those_of_folders(tmp_path: Path) -> None:
    put(tmp_path / "n=9" / "0.parquet", embedding=lists(), n=range(4))
    put(tmp_path / "m=1" / "n=8" / "1.parquet", embedding=lists(), word=list("abcd"))
    reader = EmbeddingReader(tmp_path, meta_columns=["n"])
    assert reader.to_dask_dataframe().compute()["n"].tolist() == [8] * 4 + [0, 1, 2, 3]
    with pytest.raises(ColumnError, match=r"0\.parquet: has no column 'm'"):
        EmbeddingReader(tmp_path, meta_columns=["m"])


def test_folders_of_metadata_beside_vectors_tell_columns(tmp_path: Path) -> None:
    for lang in ("de", "en"):
        put(tmp_path / f"lang={lang}" / "0.parquet", word=list("abcd"))
        np.save(tmp_path / f"lang={lang}" / "0.npy", ROWS)
    reader = EmbeddingReader(tmp_path, meta_columns="*")
    assert taken(reader)[0] == "parquet_npy"
    assert reader.to_dask_dataframe().compute()["lang"].tolist() == ["de"] * 4 + ["en"] * 4
    assert reader.filter([("lang", "==", "en")]).take([0]).rows.numbers(0, 1).tolist() == [4]
