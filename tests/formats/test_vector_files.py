"""Rows of vectors as each format reads them: any of them, wherever their file is, are those that were put there."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import ArgumentError, CastError, FileChangedError, FormatError
from dask_embedding_reader.formats.arrow import ARROW
from dask_embedding_reader.formats.base import Columns, FileFormat, FileHeader, Stretch
from dask_embedding_reader.formats.fbin import FBIN
from dask_embedding_reader.formats.fvecs import FVECS
from dask_embedding_reader.formats.npy import NPY
from dask_embedding_reader.formats.npz import NPZ
from dask_embedding_reader.formats.safetensors import SAFETENSORS
from dask_embedding_reader.formats.vectors import Casting, Vectors
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.local import LocalStore, file_info
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.collections import vectors_as
from tests.support.stores import Bucket, Request, emptied_bucket

Array = npt.NDArray[Any]

COUNT = 3_001
"""Rows of some files: of several blocks of each kind, and a rest."""


def rows_of(dtype: str, dimension: int, count: int = COUNT) -> Array:
    return np.random.default_rng(0).integers(0, 100, (count, dimension)).astype(dtype)


def npy(rows: Array) -> bytes:
    np.save(sink := io.BytesIO(), rows)
    return sink.getvalue()


def npz(rows: Array, method: int) -> bytes:
    with zipfile.ZipFile(sink := io.BytesIO(), "w", method, compresslevel=1) as made:
        made.writestr("embedding.npy", npy(rows))
    return sink.getvalue()


def fvecs(rows: Array) -> bytes:
    row_type = [("dimension", "<i4"), ("items", rows.dtype, rows.shape[1:])]
    whole = np.empty(len(rows), row_type)
    whole["dimension"], whole["items"] = rows.shape[1], rows
    return whole.tobytes()


def safetensors(rows: Array, dtype: str) -> bytes:
    facts = {"dtype": dtype, "shape": rows.shape, "data_offsets": [0, rows.nbytes]}
    header = json.dumps({"embedding": facts}).encode()
    return len(header).to_bytes(8, "little") + header + rows.tobytes()


def arrow(columns: dict[str, pa.Array], batch_rows: int, codec: Any = None) -> bytes:
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, batch_rows)
    return bytes(sink.getvalue())


class Kind(NamedTuple):
    """Vectors in a file."""

    format: FileFormat
    name: str
    rows: Array
    make: Callable[[Array], bytes]
    columns: Columns = Columns("embedding")
    is_raw: bool = False
    """Whether they lie there as in memory."""


F4, LONG = rows_of("<f4", 100), rows_of("<f4", 600, 701)
BF16 = rows_of("<f4", 100)
ITEMS = tuple(f"e{number}" for number in range(9))

KINDS: dict[str, Kind] = {
    "npy": Kind(NPY, "0.npy", F4, npy, is_raw=True),
    "npy of other bytes": Kind(NPY, "0.npy", F4.astype(">f4"), npy, is_raw=True),
    "npy in columns": Kind(NPY, "0.npy", F4, lambda rows: npy(np.asfortranarray(rows))),
    "npz": Kind(NPZ, "0.npz", F4, lambda rows: npz(rows, zipfile.ZIP_STORED), is_raw=True),
    "npz in columns": Kind(NPZ, "0.npz", F4, lambda rows: npz(np.asfortranarray(rows), zipfile.ZIP_STORED)),
    "npz deflated": Kind(NPZ, "0.npz", F4, lambda rows: npz(rows, zipfile.ZIP_DEFLATED)),
    "fbin": Kind(FBIN, "0.fbin", F4, lambda rows: np.array(rows.shape, "<u4").tobytes() + rows.tobytes(), is_raw=True),
    "fvecs": Kind(FVECS, "0.fvecs", F4, fvecs),
    "fvecs of long rows": Kind(FVECS, "0.fvecs", LONG, fvecs),
    "bvecs": Kind(FVECS, "0.bvecs", rows_of("u1", 100), fvecs),
    "safetensors": Kind(SAFETENSORS, "0.safetensors", F4, lambda rows: safetensors(rows, "F32"), is_raw=True),
    "safetensors of halves": Kind(
        SAFETENSORS, "0.safetensors", BF16, lambda rows: safetensors((rows.view("<u4") >> 16).astype("<u2"), "BF16")
    ),
    "arrow": Kind(ARROW, "0.arrow", F4, lambda rows: arrow({"embedding": vectors_as(rows, "fixed_size_list")}, 1_700)),
    "arrow beside others": Kind(
        ARROW,
        "0.arrow",
        F4,
        lambda rows: arrow({"n": pa.array(range(len(rows))), "embedding": vectors_as(rows, "fixed_size_list")}, 1_700),
        Columns("embedding", meta=("n",)),
    ),
    "arrow in lists": Kind(
        ARROW, "0.arrow", F4, lambda rows: arrow({"embedding": vectors_as(rows, "large_list")}, 1_700)
    ),
    "arrow compressed": Kind(
        ARROW, "0.arrow", F4, lambda rows: arrow({"embedding": vectors_as(rows, "fixed_size_list")}, 2_900, "zstd")
    ),
    "arrow of bytes": Kind(
        ARROW,
        "0.arrow",
        F4,
        lambda rows: arrow({"embedding": pa.array([row.tobytes() for row in rows], pa.binary())}, 2_900),
        Columns("embedding", np.dtype("<f4")),
    ),
    "arrow of items": Kind(
        ARROW,
        "0.arrow",
        rows_of("<f4", 9),
        lambda rows: arrow({name: pa.array(rows[:, place]) for place, name in enumerate(ITEMS)}, 1_700),
        Columns(ITEMS),
    ),
}


@contextmanager
def opened(kind: Kind, folder: Path, *, remote: bool) -> Iterator[tuple[StoredFile, Bucket]]:
    content = kind.make(kind.rows)
    with emptied_bucket() as bucket:
        if remote:
            bucket.put(kind.name, content)
            yield StoredFile(FsspecStore(fsspec.filesystem("bucket")), kind.name, Version(len(content))), bucket
        else:
            path = folder / kind.name
            path.write_bytes(content)
            yield StoredFile(LocalStore(LocalFileSystem()), str(path), file_info(str(path)).version), bucket


def arrays(header: FileHeader, dtype: npt.DTypeLike, *counts: int) -> list[Array]:
    return [np.full((count, header.dimension), 111, dtype) for count in counts]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_any_rows_are_those_of_the_file(tmp_path: Path, name: str, remote: bool) -> None:
    kind = KINDS[name]
    wanted, count = kind.rows, len(kind.rows)
    with opened(kind, tmp_path, remote=remote) as (file, bucket):
        header = kind.format.read_header(file, kind.columns)
        assert (header.rows, header.dimension, header.dtype) == (*wanted.shape, wanted.dtype)
        assert kind.format.check_header(header)
        for dtype in (header.dtype, header.dtype.newbyteorder(), np.float64):
            start = 5
            outs = arrays(header, dtype, 1, 0, 7, count // 2, count - start - 8 - count // 2)
            read = kind.format.open_rows(header, kind.columns, start, count)
            bucket.forget()
            read(outs[:2])
            read(outs[2:4])
            read(outs[4:])
            assert not kind.is_raw or len(bucket.reads) == 3 * remote, "of what goes to several arrays one request"
            np.testing.assert_array_equal(np.concatenate(outs), wanted[start:])

            stretches: list[Stretch] = []
            for row, rows in ((0, 3), (3, 1), (9, 0), (9, count // 2), (count - 9, 9)):
                stretches += [(row, out) for out in arrays(header, dtype, rows)]
            read_some = kind.format.open_stretches(header, kind.columns, 0, count)
            read_some(stretches[:2])
            read_some([])
            read_some(stretches[2:])
            for row, out in stretches:
                np.testing.assert_array_equal(out, wanted[row : row + len(out)])
        offset = kind.format.raw_offset(header)
        assert (offset is not None) == kind.is_raw
        if offset is not None:
            found = np.frombuffer(kind.make(wanted), header.dtype, wanted.size, offset)
            np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)
        assert not remote or bucket.reads


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_are_not_delivered_are_named(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    count = len(kind.rows)
    with opened(kind, tmp_path, remote=True) as (file, bucket):
        header = kind.format.read_header(file, kind.columns)
        kind.format.open_rows(header, kind.columns, 0, count)(arrays(header, header.dtype, count))
        for dtype in (header.dtype, np.float64):
            read = kind.format.open_rows(header, kind.columns, 2, count)
            read_some = kind.format.open_stretches(header, kind.columns, 0, count)
            [content] = bucket.objects.values()
            bucket.objects.clear()
            with pytest.raises(FileChangedError, match=r"^rows 2 to 5: "):
                read(arrays(header, dtype, 3))
            with pytest.raises(FileChangedError, match=r"^rows 2 to 5: "):
                read_some([(2, arrays(header, dtype, 3)[0])])
            bucket.objects[kind.name] = content


@pytest.mark.parametrize("name", ["arrow in lists", "arrow compressed", "arrow of bytes", "arrow of items"])
def test_of_rows_of_two_record_batches_those_are_named_that_are_not_delivered(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    with opened(kind, tmp_path, remote=True) as (file, bucket):
        header = ARROW.read_header(file, kind.columns)
        second = header.group_rows[0]
        bucket.forget()
        ARROW.open_rows(header, kind.columns, second, header.rows)(arrays(header, "f4", 7))
        start = min(one.start for one in bucket.reads)

        def lose(request: Request) -> None:
            if request.start >= start:
                raise FileNotFoundError

        bucket.before_read = lose
        read = ARROW.open_rows(header, kind.columns, second - 5, header.rows)
        with pytest.raises(FileChangedError, match=rf"^rows {second:,} to {second + 6:,}: "):
            read(arrays(header, "f4", 11))
        with pytest.raises(FileChangedError, match=rf"^rows {second:,} to {second + 2:,}: "):
            ARROW.open_stretches(header, kind.columns, 0, header.rows)([(second - 1, arrays(header, "f4", 3)[0])])


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.rows.dtype != "u1"])
def test_the_first_value_that_does_not_fit_is_told_with_its_row(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    if name in ("fbin", "safetensors", "safetensors of halves"):
        return
    rows = kind.rows.astype(np.dtype("i4").newbyteorder(kind.rows.dtype.byteorder))
    bad = len(rows) - 20
    rows[bad, 7] = rows[bad + 2, 1] = 300
    kind = kind._replace(rows=rows, name=kind.name.replace("fvecs", "ivecs"))
    if kind.columns.embedding_dtype is not None:
        kind = kind._replace(columns=Columns("embedding", rows.dtype))
    with opened(kind, tmp_path, remote=False) as (file, _):
        header = kind.format.read_header(file, kind.columns)
        start = bad - 5
        for counts in ([len(rows) - start], [7, len(rows) - start - 7]):
            read = kind.format.open_rows(header, kind.columns, start, len(rows))
            with pytest.raises(CastError) as told:
                read(arrays(header, "i1", *counts))
            first, _, rest = str(told.value).partition(" values ")
            assert rest == (
                f"cannot be read as int8, which holds -128 to 127; the first is 300 in row {bad:,}; read with a wider "
                "dtype, or with dtype=None as they are stored"
            )
            assert first.startswith(f"{file.url}, rows {start:,} to ")
            assert first.partition(": ")[2].partition(" of ")[0] in ("1", "2")


def test_what_formats_say_of_themselves() -> None:
    of_names = [".fbin .f16bin .u8bin .i8bin .ibin", ".fvecs .ivecs .bvecs", ".arrow .feather .ipc"]
    said: list[tuple[FileFormat, tuple[str, str, int, bool, bool, bool]]] = [
        (NPY, ("npy", ".npy", 512, False, True, False)),
        (FBIN, ("fbin", of_names[0], 8, False, False, False)),
        (FVECS, ("fvecs", of_names[1], 4, False, False, False)),
        (NPZ, ("npz", ".npz", 0, False, True, True)),
        (SAFETENSORS, ("safetensors", ".safetensors", 512, False, True, True)),
        (ARROW, ("arrow", of_names[2], 0, True, False, True)),
    ]
    for kind, (name, suffixes, first_nbytes, holds_columns, tells_dtype, has_names) in said:
        assert (kind.name, " ".join(kind.suffixes), kind.first_nbytes) == (name, suffixes, first_nbytes)
        assert (kind.holds_columns, kind.tells_dtype) == (holds_columns, tells_dtype)
        assert (kind.find_vectors is not None) == has_names


@pytest.mark.parametrize("bad", [0, 5, 1_500, COUNT - 1])
@pytest.mark.parametrize("name", ["fvecs", "fvecs of long rows", "bvecs"])
def test_the_first_row_of_another_dimension_is_told(tmp_path: Path, name: str, bad: int) -> None:
    kind = KINDS[name]
    bad = min(bad, len(kind.rows) - 1)
    with opened(kind, tmp_path, remote=False) as (file, _):
        header = FVECS.read_header(file, kind.columns)
        row_nbytes = 4 + header.dimension * header.dtype.itemsize
        with open(file.path, "r+b") as harmed:
            for row in (bad, len(kind.rows) - 1):
                harmed.seek(row * row_nbytes)
                harmed.write((5_000).to_bytes(4, "little"))
        header = header._replace(file=file._replace(version=file_info(file.path).version))
        for dtype in (header.dtype, np.float64):
            for start in {0, bad}:
                read = FVECS.open_rows(header, kind.columns, start, header.rows)
                with pytest.raises(FormatError) as told:
                    read(arrays(header, dtype, header.rows - start))
                message = f"row {bad:,} has 5,000 items, but the first row {header.dimension}; write it again"
                assert str(told.value) == f"{file.url}: not a readable fvecs file: {message}"
            if bad:
                FVECS.open_rows(header, kind.columns, 0, bad)(arrays(header, dtype, bad))


@pytest.mark.parametrize("name", ["fbin", "fvecs", "bvecs"])
def test_files_that_tell_little_are_held_against_their_size(tmp_path: Path, name: str) -> None:
    """When they are opened, and when a manifest tells of them, which anybody can write."""
    kind = KINDS[name]
    with opened(kind, tmp_path, remote=False) as (file, _):
        header = kind.format.read_header(file, kind.columns)
        content = Path(file.path).read_bytes()

    def sized(size: int) -> FileHeader:
        return header._replace(file=file._replace(version=file.version._replace(size=size)))

    untold = name == "fbin"
    for size, fits in ((file.size, True), (file.size - 1, False), (file.size + 1, False), (0, False), (-1, untold)):
        assert kind.format.check_header(sized(size)) == fits
        if fits:
            assert kind.format.read_header(sized(size).file, kind.columns, content[:8]) == sized(size)
        elif size:
            with pytest.raises(FormatError):
                kind.format.read_header(sized(size).file, kind.columns, content[:8])
    for layout in ((8, 0), (7,), (9,), (True,), ("8",)):
        assert not kind.format.check_header(header._replace(layout=layout))
    assert kind.format.check_header(header._replace(layout=(8,))) == (name == "fbin")
    assert not kind.format.check_header(header._replace(group_rows=(header.rows,)))


def test_files_of_fbin_of_another_size_are_told_why() -> None:
    promised = "its header promises 4 rows of 3 x float32, 56 bytes in all, but the file has"
    content = np.array([4, 3], "<u4").tobytes()
    file = StoredFile(LocalStore(LocalFileSystem()), "/0.fbin", Version(0))
    for size, told in (
        (0, "not an fbin file: it has 0 bytes, less than its header of 8; write it again"),
        (7, "not an fbin file: it has 7 bytes, less than its header of 8; write it again"),
        (8, f"{promised} 8, 0 rows exactly: it was cropped, correct its header or write the file again"),
        (8 + 12, f"{promised} 20, as one of .u8bin or .i8bin has: rename it"),
        (8 + 24, f"{promised} 32, as one of .f16bin has: rename it"),
        (8 + 36, f"{promised} 44, 3 rows exactly: it was cropped, correct its header or write the file again"),
        (8 + 37, f"{promised} 45; it was cut short: write the file again"),
        (8 + 49, f"{promised} 57: it is none, or something was written behind it; write the file again"),
        (
            8 + 96,
            f"{promised} 104: that is the size of a file of true neighbours, which holds numbers of rows and then",
        ),
    ):
        with pytest.raises(FormatError) as refused:
            FBIN.read_header(file._replace(version=Version(size)), Columns(), content)
        assert str(refused.value).startswith(f"/0.fbin: {told}")
    with pytest.raises(FormatError, match="its header claims 4 vectors of no items; write it again"):
        FBIN.read_header(file._replace(version=Version(8)), Columns(), np.array([4, 0], "<u4").tobytes())
    assert FBIN.read_header(file._replace(version=Version(8)), Columns(), np.array([0, 0], "<u4").tobytes()).rows == 0


def test_the_dtype_is_that_of_the_name_or_the_one_that_is_given() -> None:
    content = np.array([4, 3], "<u4").tobytes()

    def dtype_of(name: str, size: int, given: str | None) -> np.dtype[Any]:
        file = StoredFile(LocalStore(LocalFileSystem()), f"/{name}", Version(size))
        return FBIN.read_header(file, Columns(embedding_dtype=np.dtype(given) if given else None), content).dtype

    assert dtype_of("0.fbin", 56, None) == dtype_of("0.fbin", 56, "<f4") == dtype_of("base.10M.fbin", 56, None) == "<f4"
    assert dtype_of("0.bin", 32, "<i2") == "<i2"
    with pytest.raises(ArgumentError) as refused:
        dtype_of("0.fbin", 56, "<i4")
    assert str(refused.value) == (
        "/0.fbin: its name says that its items are float32, and embedding_dtype= that they are int32; leave that "
        "out, or rename the file"
    )
    with pytest.raises(FormatError) as untold:
        dtype_of("0.bin", 56, None)
    assert str(untold.value) == (
        "/0.bin: its name does not tell the dtype of its items, as one of .fbin, .f16bin, .u8bin, .i8bin, .ibin would; "
        "name it with embedding_dtype=, or rename the file"
    )


def test_a_file_of_rows_of_a_dimension_each_has_a_size(tmp_path: Path) -> None:
    with opened(KINDS["fvecs"], tmp_path, remote=False) as (file, _):
        untold = file._replace(version=file.version._replace(size=-1))
        with pytest.raises(
            FormatError, match="the storage does not tell its size, and nothing else tells how many rows"
        ):
            FVECS.read_header(untold, Columns())


# ---------------------------------------------------------------------------------------------------------------------
# Written


INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
EVERY = ("f2", "f4", "f8", "g", *INTEGERS, "?", "c8", "c16")

WRITTEN: dict[str, tuple[FileFormat, dict[str, str]]] = {
    "npy": (NPY, dict.fromkeys(EVERY, ".npy")),
    "npz": (NPZ, dict.fromkeys(EVERY, ".npz")),
    "fbin": (FBIN, {"f2": ".f16bin", "f4": ".fbin", "i1": ".i8bin", "i4": ".ibin", "u1": ".u8bin"}),
    "fvecs": (FVECS, {"f4": ".fvecs", "i4": ".ivecs", "u1": ".bvecs"}),
    "safetensors": (SAFETENSORS, dict.fromkeys(("f2", "f4", "f8", *INTEGERS, "?"), ".safetensors")),
    "arrow": (ARROW, dict.fromkeys(("f2", "f4", "f8", *INTEGERS), ".arrow")),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_of_every_dtype_is_read(tmp_path: Path, name: str) -> None:
    """In blocks that are no larger than they have to be, whatever of rows is in them."""
    kind, suffixes = WRITTEN[name]
    assert {one: kind.suffix_for(np.dtype(one)) for one in EVERY} == dict.fromkeys(EVERY) | suffixes
    for dtype, suffix in suffixes.items():
        for shape in ((0, 3), (1, 1), (3, 5), *([(2_001, 200), (3, 400_000)] if dtype == "f4" else [])):
            rows = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
            blocks: list[bytes] = []

            def write(data: Any, blocks: list[bytes] = blocks) -> None:
                blocks.append(bytes(data))

            kind.write(write, Vectors(rows, Casting(rows.dtype)), None, "v")
            path = tmp_path / f"{dtype}{shape[0]}{suffix}"
            path.write_bytes(b"".join(blocks))
            if not rows.size and kind is FVECS:
                assert blocks == []
                continue
            file = StoredFile(LocalStore(LocalFileSystem()), str(path), file_info(str(path)).version)
            header = kind.read_header(file, Columns("v"))
            said = kind.written_header(file, shape[0], shape[1], rows.dtype)
            assert said is None or said == header
            assert (said is None) == (kind in (NPZ, ARROW))
            assert header.rows == len(rows)
            if len(rows):
                out = np.empty(shape, dtype)
                kind.open_rows(header, Columns("v"), 0, len(rows))([out])
                np.testing.assert_array_equal(out, rows)
            if kind not in (NPZ, ARROW) and len(rows):
                assert max(map(len, blocks)) <= max(2**20, (rows.nbytes // len(rows)) + 4)
                assert len(blocks) <= 2 + rows.nbytes // 2**19
