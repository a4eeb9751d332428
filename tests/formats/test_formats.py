"""Formats beside npy and parquet: files of the libraries that make them, files for these, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import safetensors.numpy

from dask_embedding_reader import (
    ArgumentError,
    ColumnError,
    EmbeddingReader,
    FileChangedError,
    FormatError,
    write_embeddings,
)
from dask_embedding_reader.cli import main, options
from dask_embedding_reader.formats.registry import all_suffixes, format_names, get_format
from dask_embedding_reader.storage.read import read_blocks_into
from tests.support.collections import as_others_read
from tests.support.stores import emptied_bucket

Array = npt.NDArray[Any]
ROWS: Array = np.arange(12, dtype=np.float32).reshape(4, 3)


def read(path: Path, file_format: str, **options: Any) -> Array:
    return np.asarray(EmbeddingReader(path, file_format, **options).to_dask_array().compute())


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def test_the_command_line_knows_every_format() -> None:
    assert sorted(options.FORMATS.choices) == sorted(format_names())


@pytest.mark.parametrize("file_format", ["fbin", "fvecs", "npz", "safetensors", "parquet_fbin"])
def test_the_command_line_tells_formats_by_the_names_of_files(
    tmp_path: Path, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = pd.DataFrame({"word": list("abcd")}) if file_format.startswith("parquet") else None
    write_embeddings(ROWS, tmp_path / "in", file_format, columns)
    named = ["-m", "word"] if columns is not None else []
    with pytest.raises(SystemExit, match="0"):
        main(["info", str(tmp_path / "in"), "--json", *named])
    assert json.loads(capsys.readouterr().out)["file_format"] == file_format
    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "npz", "--quiet"])
    np.testing.assert_array_equal(read(tmp_path / "out", "npz"), ROWS)


def test_every_raw_format_may_have_metadata_beside_it() -> None:
    assert set(format_names()) == {
        *("parquet", "arrow", "npy", "fbin", "fvecs", "npz", "safetensors"),
        *("parquet_npy", "parquet_fbin", "parquet_fvecs", "parquet_npz", "parquet_safetensors"),
    }
    assert [get_format(name).metadata for name in ("npy", "parquet", "parquet_npz")] == ["none", "same", "beside"]
    assert len(set(all_suffixes())) == len(all_suffixes())


# --------------------------------------------------------------------------------------------------------------------
# Files of others, and for others


def test_npz_of_numpy(tmp_path: Path) -> None:
    np.savez(tmp_path / "stored.npz", embedding=ROWS, names=np.array(["a", "b"]))
    np.savez_compressed(tmp_path / "deflated.npz", embedding=ROWS + 12, other=ROWS)
    # In the order of names.
    np.testing.assert_array_equal(read(tmp_path, "npz"), np.concatenate([ROWS + 12, ROWS]))
    np.testing.assert_array_equal(read(tmp_path / "deflated.npz", "npz", embedding_column="other"), ROWS)


def test_a_member_whose_local_header_has_another_extra_field(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "0.npz", "w") as archive,
        archive.open("embedding.npy", "w", force_zip64=True) as member,
    ):
        np.save(member, ROWS)
    np.testing.assert_array_equal(read(tmp_path, "npz"), ROWS)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "uint8", "int64", "uint16", "bool"])
def test_safetensors_of_its_library(tmp_path: Path, dtype: str) -> None:
    wanted = ROWS.astype(dtype)
    safetensors.numpy.save_file({"bias": np.ones(3), "embedding": wanted}, tmp_path / "0.safetensors", {"a": "b"})
    got = read(tmp_path, "safetensors")
    np.testing.assert_array_equal(got, wanted)
    assert got.dtype == wanted.dtype


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    bits = np.array([[0x3F80, 0xC040, 0x7F80], [0x0001, 0x7FC1, 0x8000]], "<u2")
    facts = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    (tmp_path / "0.safetensors").write_bytes(header(embedding=facts) + bits.tobytes())
    got = read(tmp_path, "safetensors")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what faiss is made with
def test_files_of_faiss_and_for_it(tmp_path: Path) -> None:
    vecs_io: Any = pytest.importorskip("faiss.contrib.vecs_io")
    vecs_io.fvecs_write(str(tmp_path / "0.fvecs"), ROWS)
    vecs_io.ivecs_write(str(tmp_path / "0.ivecs"), ROWS.astype("int32"))
    for name, dtype in (("0.fvecs", "float32"), ("0.ivecs", "int32")):
        np.testing.assert_array_equal(read(tmp_path / name, "auto"), ROWS.astype(dtype), strict=True)
    load = {"float32": vecs_io.fvecs_read, "int32": vecs_io.ivecs_read, "uint8": vecs_io.bvecs_mmap}
    for dtype, theirs in load.items():
        write_embeddings(ROWS.astype(dtype), tmp_path / dtype, "fvecs")
        [path] = (tmp_path / dtype).glob("*.?vecs")
        np.testing.assert_array_equal(theirs(str(path)), ROWS.astype(dtype), strict=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32"])
@pytest.mark.parametrize("file_format", ["fbin", "fvecs", "npz", "safetensors"])
def test_written_files_are_those_of_the_format(tmp_path: Path, file_format: str, dtype: str) -> None:
    wanted = np.random.default_rng(0).integers(-100, 100, (1_000, 7)).astype(dtype)
    if get_format(file_format).vectors.suffix_for(np.dtype(dtype)) is None:
        with pytest.raises(ArgumentError, match=f"{file_format} files hold no vectors of {dtype}; give dtype="):
            write_embeddings(wanted, tmp_path / "out", file_format)
        assert not (tmp_path / "out").exists()
        return
    write_embeddings(wanted, tmp_path / "out", file_format, rows_per_file=400)
    np.testing.assert_array_equal(read(tmp_path / "out", file_format), wanted)
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.name[0] not in "._")
    assert len(files) == 3
    np.testing.assert_array_equal(np.concatenate([as_others_read(path) for path in files]), wanted)


@pytest.mark.parametrize("file_format", ["parquet_fbin", "parquet_fvecs", "parquet_npz", "parquet_safetensors"])
def test_metadata_beside_any_format(tmp_path: Path, file_format: str) -> None:
    write_embeddings(ROWS, tmp_path, file_format, pd.DataFrame({"word": list("abcd")}), rows_per_file=3)
    reader = EmbeddingReader(tmp_path, file_format, meta_columns="word")
    batches = list(reader(3, show_progress=False))
    assert [frame["word"].tolist() for _, frame in batches] == [["a", "b", "c"], ["d"]]
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), ROWS)
    reopened = EmbeddingReader.from_manifest(next(tmp_path.glob(".manifest*")))
    np.testing.assert_array_equal(reopened.to_dask_array().compute(), ROWS)
    assert reopened.to_dask_dataframe()["word"].compute().tolist() == list("abcd")


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def npy_bytes(rows: Array) -> bytes:
    sink = io.BytesIO()
    np.save(sink, rows)
    return sink.getvalue()


FBIN = struct.pack("<II", 4, 3) + ROWS.tobytes()
FVECS = b"".join(struct.pack("<i", 3) + row.tobytes() for row in ROWS)
TENSOR = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}

BAD: dict[str, tuple[str, bytes, str]] = {
    "cropped fbin": (
        "0.fbin",
        struct.pack("<II", 9, 3) + ROWS.tobytes(),
        "promises 9 rows.*4 rows exactly: it was crop",
    ),
    "fbin cut short": (
        "0.fbin",
        FBIN[:-1],
        "promises 4 rows of 3 x float32, 56 bytes in all.*has 55; it was cut short",
    ),
    "fbin of no header": ("0.fbin", FBIN[:7], "7 bytes, less than its header"),
    "fbin of no items": ("0.fbin", struct.pack("<II", 4, 0), "4 vectors of no items"),
    "true neighbours": ("0.ibin", struct.pack("<II", 4, 3) + bytes(4 * 3 * 8), "true neighbours"),
    "fbin of other items": ("0.u8bin", FBIN, r"as one of \.fbin or \.ibin has: rename it$"),
    "fbin with more": ("0.fbin", FBIN + b"x", "has 57: it is none, or something was written behind it"),
    "fvecs cut short": ("0.fvecs", FVECS[:-1], "63 bytes are 3 such rows and 15 bytes more"),
    "fvecs of other dimension": ("0.fvecs", struct.pack("<i", 2**30) + FVECS[4:], "claims 1,073,741,824 items"),
    "fvecs of dimension 0": ("0.fvecs", struct.pack("<i", 0) * 4, "claims 0 items"),
    "fvecs of negative dimension": ("0.fvecs", struct.pack("<i", -3) + FVECS[4:], "claims -3 items"),
    "tiny fvecs": ("0.fvecs", b"abc", "3 bytes, less than the 4"),
    "no zip": ("0.npz", b"x" * 1000, "File is not a zip file"),
    "safetensors of text": ("0.safetensors", b"x" * 1000, "header claims"),
    "safetensors without header": ("0.safetensors", b"abc", "3 bytes, less than the 8"),
    "safetensors that is no JSON": ("0.safetensors", (4).to_bytes(8, "little") + b"{{{{", "header is malformed"),
    "safetensors of a list": ("0.safetensors", (4).to_bytes(8, "little") + b"[1] ", "header is malformed"),
    "tensor beyond the end": ("0.safetensors", header(embedding=TENSOR) + bytes(47), "beyond the end"),
    "tensor behind bytes of none": (
        "0.safetensors",
        header(embedding=TENSOR | {"data_offsets": [8, 56]}) + bytes(56),
        "before its tensor 'embedding' are 8 bytes of no tensor",
    ),
    "bytes behind tensors": (
        "0.safetensors",
        header(embedding=TENSOR) + bytes(49),
        "behind its tensors are 1 bytes more",
    ),
    "another tensor of another size": (
        "0.safetensors",
        header(
            bias={"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, embedding=TENSOR | {"data_offsets": [8, 56]}
        )
        + bytes(56),
        r"'bias' of \(3,\) F32 has 8 bytes",
    ),
    "header of many tensors": (
        "0.safetensors",
        header(embedding=TENSOR, notes=" " * 2**22) + bytes(48),
        "header takes 4,194,[0-9]+ bytes, more than the 4,194,304 .*as one tensor",
    ),
    "tensors over each other": (
        "0.safetensors",
        header(embedding=TENSOR, other=TENSOR | {"data_offsets": [40, 88]}) + bytes(88),
        "'other' lies over another",
    ),
    "tensor of another size": (
        "0.safetensors",
        header(embedding=TENSOR | {"data_offsets": [0, 44]}) + bytes(44),
        r"of \(4, 3\) F32 has 44 bytes",
    ),
    "negative shape": ("0.safetensors", header(embedding=TENSOR | {"shape": [-4, -3]}) + bytes(48), "malformed"),
    "shape of text": ("0.safetensors", header(embedding=TENSOR | {"shape": ["4", 3]}) + bytes(48), "malformed"),
    "float8": ("0.safetensors", header(embedding=TENSOR | {"dtype": "F8_E4M3"}) + bytes(48), "holds F8_E4M3"),
    "three axes": ("0.safetensors", header(embedding=TENSOR | {"shape": [2, 2, 3]}) + bytes(48), r"shape \(2, 2, 3\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_name_what_is_wrong(tmp_path: Path, name: str) -> None:
    file_name, content, message = BAD[name]
    file_format = {"ibin": "fbin", "u8bin": "fbin"}.get(file_name[2:], file_name[2:])
    path = write(tmp_path / file_name, content)
    with pytest.raises(FormatError, match=message) as refused:
        EmbeddingReader(path, file_format)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("dimension", [3, 600])  # copied, or read straight to their places
def test_rows_of_another_dimension_are_found_when_they_are_read(tmp_path: Path, dimension: int) -> None:
    rows = np.arange(4 * dimension, dtype=np.float32).reshape(4, -1)
    odd = bytearray(b"".join(dimension.to_bytes(4, "little") + row.tobytes() for row in rows))
    struct.pack_into("<i", odd, 2 * (4 + 4 * dimension), 5)
    reader = EmbeddingReader(write(tmp_path / "0.fvecs", bytes(odd)), "fvecs")
    np.testing.assert_array_equal(reader.to_dask_array()[:2].compute(), rows[:2])
    for start in (0, 2):
        with pytest.raises(FormatError, match=f"row 2 has 5 items, but the first row {dimension}"):
            reader.to_dask_array(start).compute()


@pytest.mark.parametrize("dimension", [3, 600])
def test_arrays_of_no_rows_are_filled_with_none(tmp_path: Path, dimension: int) -> None:
    rows = np.arange(4 * dimension, dtype=np.float32).reshape(4, -1)
    content = b"".join(dimension.to_bytes(4, "little") + row.tobytes() for row in rows)
    manifest = EmbeddingReader(write(tmp_path / "0.fvecs", content), "fvecs").manifest
    outs = [np.empty((count, dimension), np.float32) for count in (0, 3, 0, 1)]
    manifest.format.vectors.open_rows(manifest.vectors.header(0), manifest.columns, 0, 4)(outs)
    np.testing.assert_array_equal(np.concatenate(outs), rows)


def test_rows_of_several_blocks_are_copied(tmp_path: Path) -> None:
    rows = np.arange(2_000 * 128, dtype=np.float32).reshape(-1, 128)
    content = b"".join((128).to_bytes(4, "little") + row.tobytes() for row in rows)
    path = write(tmp_path / "0.fvecs", content)
    array = EmbeddingReader(path, "fvecs").to_dask_array()
    for start, stop in ((0, 2_000), (3, 1_999)):
        np.testing.assert_array_equal(array[start:stop].compute(), rows[start:stop])


@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_file_that_changes_between_blocks_is_noticed(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "0.fvecs", struct.pack("<i", 1) + b"abcd")
    file = EmbeddingReader(path, "fvecs").manifest.vectors.header(0).file
    first, second = bytearray(4), bytearray(4)
    blocks = read_blocks_into(file, 0, [memoryview(first), memoryview(second)])
    assert bytes(next(blocks)) == struct.pack("<i", 1)
    if how == "replaced":
        write(tmp_path / "1.fvecs", struct.pack("<i", 1) + b"efgh").rename(path)
    else:
        path.write_bytes(struct.pack("<i", 1) + b"efghijkl")
    with pytest.raises(FileChangedError, match="changed since it was opened"):
        next(blocks)


def zipped(path: Path, change: Any = None, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("embedding.npy", "w") as member:
        np.save(member, ROWS)
    if change is not None:
        path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def test_damaged_archives(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "0.npz").read_bytes()
    for stop in range(1, len(whole), 7):
        with pytest.raises(FormatError, match=r"cut\.npz"):
            EmbeddingReader(write(tmp_path / "cut.npz", whole[:stop]), "npz")
    for change, message in (
        (lambda data: data.replace(b"PK\3\4", b"PK\3\5"), "is where it is not"),
        (lambda data: data[:4] + b"x" * 4 + data[8:], None),
    ):
        path = zipped(tmp_path / "changed.npz", change)
        if message is None:
            np.testing.assert_array_equal(read(path, "npz"), ROWS)
        else:
            with pytest.raises(FormatError, match=message):
                EmbeddingReader(path, "npz")
    deflated = zipped(tmp_path / "deflated.npz", method=zipfile.ZIP_DEFLATED)
    reader = EmbeddingReader(deflated, "npz")
    data = bytearray(deflated.read_bytes())
    data[120:140] = bytes(20)
    deflated.write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        EmbeddingReader(deflated, "npz").to_dask_array().compute()
    del reader


MANY: Array = np.arange(2_000, dtype=np.float32).reshape(-1, 4)
"""More than is looked at when a file is opened."""


def deflated(end: int | None = None, flush: int = zlib.Z_FINISH) -> bytes:
    """An archive of an array that is deflated as it is; the stream may end early, or not, and other bytes follow."""
    archived = io.BytesIO()
    with zipfile.ZipFile(archived, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as archive:
        archive.writestr("embedding.npy", npy := npy_bytes(MANY))
    data = archived.getvalue()
    if end is None:
        return data
    packer = zlib.compressobj(0, zlib.DEFLATED, -zlib.MAX_WBITS)
    shorter = packer.compress(npy[:end]) + packer.flush(flush)
    start, stop = data.index(npy) - 5, data.index(npy) + len(npy)  # with the head of the one block
    return data[:start] + shorter + b"x" * (stop - start - len(shorter)) + data[stop:]


@pytest.mark.parametrize("end", [1_000, 5_000, 8_100])
def test_a_deflated_array_that_ends_early_is_no_endless_one(tmp_path: Path, end: int) -> None:
    reader = EmbeddingReader(write(tmp_path / "0.npz", deflated(end)))
    with pytest.raises(FormatError, match=r"0\.npz: .*ends before its last row; write it again"):
        reader.to_dask_array().compute()
    with pytest.raises(FormatError, match="ends before its last row"):
        list(reader(30, max_piece_size=20, show_progress=False))


def test_a_deflated_array_that_goes_on_with_what_is_no_block_is_damaged(tmp_path: Path) -> None:
    reader = EmbeddingReader(write(tmp_path / "0.npz", deflated(5_000, zlib.Z_FULL_FLUSH)))
    with pytest.raises(FormatError, match=r"0\.npz: .*its array is damaged \(.*stored block.*\); write it again"):
        reader.to_dask_array().compute()
    np.testing.assert_array_equal(reader.take([1]).to_dask_array().compute(), MANY[1:2])


def test_the_checksum_of_a_deflated_array_is_compared_at_its_end(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(write(tmp_path / "0.npz", deflated()), "npz"), MANY)
    damaged = deflated().replace(MANY.tobytes(), (MANY * 2).tobytes())
    reader = EmbeddingReader(write(tmp_path / "0.npz", damaged))
    with pytest.raises(FormatError, match=r"0\.npz: .*its CRC is [0-9a-f]{8}, where its directory says [0-9a-f]{8}"):
        reader.to_dask_array().compute()
    for rows in (30, 500):
        with pytest.raises(FormatError, match="its CRC is"):
            list(reader(rows, show_progress=False))
    np.testing.assert_array_equal(reader.take([1]).to_dask_array().compute(), 2 * MANY[1:2])  # far from its end


def test_archives_of_many_arrays_are_not_looked_through(tmp_path: Path) -> None:
    """One array a word, as some save them: to look at each took hours."""
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        for number in range(2_000):
            archive.writestr(f"word {number}.npy", b"")
    with emptied_bucket() as bucket:
        bucket.put("emb/0.npz", (tmp_path / "0.npz").read_bytes())
        with pytest.raises(ColumnError, match=r"no array 'embedding'; its arrays are 'word 0', .*name one with"):
            EmbeddingReader("bucket://emb")
        assert len(bucket.reads) <= 4


def test_a_directory_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "0.npz")
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end] * 80_000
    last = bytearray(data[end:])
    struct.pack_into("<HHI", last, 8, 2**16 - 1, 2**16 - 1, len(entries))
    path.write_bytes(data[:start] + entries + last)
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"0\.npz: .*directory takes 4,[0-9,]* bytes, more than .*as one array$"):
        EmbeddingReader(path)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


@pytest.mark.parametrize("more", [0, 1, 2**20])
def test_an_array_that_ends_beyond_its_archive_is_refused(tmp_path: Path, more: int) -> None:
    path = zipped(tmp_path / "0.npz")
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    (nbytes,) = struct.unpack_from("<I", data, entry + 20)
    missing = len(data) - data.index(b"\x93NUMPY") - nbytes  # the directory, which lies behind the array
    struct.pack_into("<II", data, entry + 20, *[nbytes + missing + more] * 2)
    path.write_bytes(data)
    remedy = "was cut short; write it again" if more else "promises"
    with pytest.raises(FormatError, match=rf"0\.npz: .*{remedy}"):
        EmbeddingReader(path)


def test_other_compression_and_no_such_array(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="compressed by method 12; stored and deflated can be read"):
        EmbeddingReader(zipped(tmp_path / "0.npz", method=zipfile.ZIP_BZIP2), "npz")
    with pytest.raises(
        ColumnError, match="has no array 'text'; its arrays are 'embedding'; name one with embedding_col"
    ):
        EmbeddingReader(zipped(tmp_path / "1.npz"), "npz", "text")
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for number in range(2):
            np.save(tmp_path / f"{number}.npy", np.full((3, 2), number))
            archive.write(tmp_path / f"{number}.npy", f"in/{number}.npy")
    told = f"or open all files in the archive as zip://::{tmp_path}/files.zip$"
    with pytest.raises(ColumnError, match=told):
        EmbeddingReader(tmp_path / "files.zip")
    assert EmbeddingReader(f"zip://::{tmp_path}/files.zip").to_dask_array().sum().compute() == 6
    np.savez(tmp_path / "2.npz", embedding=np.array([{}], object))
    with pytest.raises(FormatError, match="Python objects"):
        EmbeddingReader(tmp_path / "2.npz", "npz")
    write(tmp_path / "3.safetensors", header(a=TENSOR, b=TENSOR | {"data_offsets": [48, 96]}) + bytes(96))
    with pytest.raises(ColumnError, match="has no tensor 'embedding'; its tensors are 'a', 'b'"):
        EmbeddingReader(tmp_path / "3.safetensors", "safetensors")


def test_the_dtype_of_a_file_whose_name_does_not_tell_it(tmp_path: Path) -> None:
    path = write(tmp_path / "base.bin", FBIN)
    with pytest.raises(FormatError, match=r"name does not tell the dtype.*embedding_dtype="):
        EmbeddingReader(path, "fbin")
    np.testing.assert_array_equal(read(path, "fbin", embedding_dtype="float32"), ROWS)
    with pytest.raises(ArgumentError, match="only for files that do not tell their dtype"):
        EmbeddingReader(path, "npz", embedding_dtype="float32")


@pytest.mark.parametrize(
    ("fields", "told"), [(3, r"3 fields \('a', 'b', 'c'\)"), (4, r"4 fields \('a', 'b', 'c', …\)")]
)
def test_items_of_fields_are_told_by_name(tmp_path: Path, fields: int, told: str) -> None:
    np.save(tmp_path / "0.npy", np.zeros((2, 2), [(name, np.float32) for name in "abcd"[:fields]]))
    with pytest.raises(FormatError, match=told):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_reading_holds_is_counted_by_how_vectors_lie(tmp_path: Path, threads: int) -> None:
    """As in memory, column by column, or deflated, of which there is a block before and one after, and an array."""
    rows = np.zeros((300_000, 4), np.float32)
    np.save(tmp_path / "c.npy", rows)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(rows))
    np.savez(tmp_path / "stored.npz", embedding=rows)
    np.savez(tmp_path / "fortran.npz", embedding=np.asfortranarray(rows))
    np.savez_compressed(tmp_path / "deflated.npz", embedding=rows)
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(rows.ravel(), 4)})
    with pa.OSFile(str(tmp_path / "plain.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    held = {}
    for path in tmp_path.iterdir():
        manifest = EmbeddingReader(path).manifest
        for count in (10, 250_000):
            header, columns = manifest.vectors.header(0), manifest.columns
            held[path.name, count] = manifest.format.vectors.held_nbytes(header, columns, count, threads)
    for count in (10, 250_000):
        nbytes = count * 16
        for name in ("c.npy", "stored.npz", "plain.arrow"):
            assert held[name, count] == threads * min(nbytes, 3 * 2**17)
        assert held["fortran.npy", count] == held["fortran.npz", count] == 3 * threads * nbytes
        assert held["deflated.npz", count] == 3 * threads * 2**20
