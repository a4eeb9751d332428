"""Archives of arrays: what zipfile and numpy write of every kind is found and read, and what is wrong is told."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest

from dask_embedding_reader.errors import ColumnError, FormatError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.npz import NPZ
from dask_embedding_reader.formats.vectors import Casting, Vectors
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import emptied_bucket, stored

Array = npt.NDArray[Any]
ROWS: Array = np.arange(12, dtype=np.float32).reshape(4, 3)
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def npy(rows: Array) -> bytes:
    sink = io.BytesIO()
    np.save(sink, rows)
    return sink.getvalue()


def in_columns(rows: Array) -> bytes:
    """As numpy writes none of a single row or column, but others may."""
    np.lib.format.write_array_header_1_0(
        sink := io.BytesIO(), {"descr": rows.dtype.str, "fortran_order": True, "shape": rows.shape}
    )
    return sink.getvalue() + rows.tobytes("F")


def archive(members: Mapping[str, bytes], method: int = STORED, **options: Any) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method, **options) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return sink.getvalue()


def header_of(file: StoredFile, name: str = "embedding") -> FileHeader:
    return NPZ.read_header(file, Columns(name))


def rows_of(header: FileHeader, start: int, stop: int, *counts: int) -> Array:
    """Rows as they are stored, read into arrays of so many each."""
    outs = [np.empty((count, header.dimension), header.dtype) for count in counts or [stop - start]]
    read = NPZ.open_rows(header, Columns("embedding"), start, stop)
    for out in outs:
        read([out])
    return np.concatenate(outs)


def test_arrays_of_all_kinds_are_those_that_numpy_loads(tmp_path: Path) -> None:
    shapes = [(0, 3), (1, 1), (1, 3), (4, 1), (2, 2), (5, 7)]
    for number, (dtype, shape, content, method) in enumerate(
        product(["<f4", ">f8", "u1"], shapes, [npy, in_columns], [STORED, DEFLATED])
    ):
        rows = np.arange(shape[0] * shape[1]).astype(dtype).reshape(shape)
        file = stored(
            tmp_path / f"{number}.npz", archive({"other.npy": npy(ROWS), "embedding.npy": content(rows)}, method)
        )
        if method == DEFLATED and content is in_columns and min(shape) > 1:
            with pytest.raises(FormatError, match="deflated and in Fortran order: no row can be read alone; save it"):
                header_of(file)
            continue
        header = header_of(file)
        assert (header.rows, header.dimension, header.dtype.str) == (*shape, rows.dtype.str)
        assert NPZ.check_header(header)
        assert header.group_rows == ((shape[0],) if method == DEFLATED and shape[0] else ())
        with np.load(file.path) as loaded:
            for start, stop in ((0, shape[0]), (1, shape[0]), (shape[0] // 2, shape[0] - 1)):
                if start < stop:
                    np.testing.assert_array_equal(rows_of(header, start, stop), loaded["embedding"][start:stop])


LARGE: dict[str, Array] = {
    "many rows of no whole block": np.random.default_rng(0).integers(0, 9, (70_001, 11)).astype(np.float32),
    "rows of a block": np.random.default_rng(0).integers(0, 9, (4, 2**18)).astype(np.float32),
    "rows of more than a block": np.random.default_rng(0).integers(0, 9, (3, 2**18 + 5)).astype(np.float32),
}


@pytest.mark.parametrize("level", [0, 1])  # more is read of what is deflated, or less than it becomes
@pytest.mark.parametrize("name", LARGE)
def test_deflated_arrays_of_several_blocks(tmp_path: Path, name: str, level: int) -> None:
    rows = LARGE[name]
    header = header_of(stored(tmp_path / "0.npz", archive({"embedding.npy": npy(rows)}, DEFLATED, compresslevel=level)))
    count = len(rows)
    np.testing.assert_array_equal(rows_of(header, 0, count), rows)
    tracemalloc.start()
    found = rows_of(header, 1, count)
    held_nbytes = tracemalloc.get_traced_memory()[1] - found.nbytes
    tracemalloc.stop()
    np.testing.assert_array_equal(found, rows[1:])
    np.testing.assert_array_equal(rows_of(header, 1, count, 1, count - 2), rows[1:])
    assert held_nbytes < 5 * 2**20, "a few blocks, whatever the array has"
    read = NPZ.open_stretches(header, Columns("embedding"), 0, count)
    stretches = [(first, np.empty((1, rows.shape[1]))) for first in (0, count // 2, count - 1)]
    read(stretches[:2])
    read(stretches[2:])
    for first, out in stretches:
        np.testing.assert_array_equal(out, rows[first : first + 1])
    saved_before = header._replace(layout=header.layout[:3])  # by releases that kept no CRC
    assert NPZ.check_header(saved_before)
    np.testing.assert_array_equal(rows_of(saved_before, 1, count), rows[1:])


def test_deflated_bytes_are_fetched_block_by_block_and_once() -> None:
    rows = np.random.default_rng(0).integers(0, 2**32, (40_000, 20), np.uint32)
    content = archive({"embedding.npy": npy(rows)}, DEFLATED)
    with emptied_bucket() as bucket:
        bucket.put("0.npz", content)
        file = StoredFile(FsspecStore(fsspec.filesystem("bucket")), "0.npz", Version(len(content)))
        header = header_of(file)
        # The end; the local header; what tells the shape.
        assert [(one.start, one.stop) for one in bucket.reads] == [
            (len(content) - 2**16, len(content)),
            (0, 1024),
            (header.layout[0], header.layout[0] + 2**20),
        ]
        bucket.forget()
        np.testing.assert_array_equal(rows_of(header, 0, 40_000), rows)
        start, stop = header.layout[0], header.layout[0] + header.layout[2]
        cuts = [*range(start, stop, 2**20), stop]
        assert [(one.start, one.stop) for one in bucket.reads] == list(pairwise(cuts))


def test_damage_of_deflated_rows_is_told_with_them(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.npz", archive({"embedding.npy": npy(ROWS)}, DEFLATED))
    header = header_of(file)
    data_offset, header_nbytes, nbytes, crc = header.layout
    wrong = header._replace(layout=(data_offset, header_nbytes, nbytes, crc ^ 1))
    np.testing.assert_array_equal(rows_of(wrong, 0, 3), ROWS[:3])
    for start in (0, 3):
        with pytest.raises(FormatError) as refused:
            rows_of(wrong, start, 4)
        assert str(refused.value) == (
            f"{file.url}: not a readable npz file: its array is damaged: its CRC is {crc:08x}, "
            f"where its directory says {crc ^ 1:08x}; write it again"
        )
    shorter = header._replace(layout=(data_offset, header_nbytes, nbytes - 5, crc))
    with pytest.raises(FormatError, match=r"0\.npz: .*its array ends before its last row; write it again"):
        rows_of(shorter, 0, 4)


def test_headers_from_manifests_are_held_against_the_file(tmp_path: Path) -> None:
    plain = header_of(stored(tmp_path / "0.npz", archive({"embedding.npy": npy(ROWS)})))
    packed = header_of(stored(tmp_path / "1.npz", archive({"embedding.npy": npy(ROWS)}, DEFLATED)))
    start, end = plain.layout[0], packed.layout[0] + packed.layout[2]

    def sized(header: FileHeader, size: int) -> FileHeader:
        return header._replace(file=header.file._replace(version=header.file.version._replace(size=size)))

    right = [
        *(sized(plain, size) for size in (-1, start + 48, start + 49)),
        *(sized(packed, size) for size in (-1, end, end + 1)),
        plain._replace(layout=(0, True), group_rows=(4,)),
        packed._replace(layout=packed.layout[:3]),
        packed._replace(layout=(0, *packed.layout[1:])),
        packed._replace(rows=0, group_rows=()),
    ]
    assert [NPZ.check_header(header) for header in right] == [True] * len(right)
    wrong = [
        *(sized(plain, size) for size in (0, start + 47)),
        *(sized(packed, size) for size in (0, end - 1)),
        *(plain._replace(layout=layout) for layout in ((), (128,), (-1, False), (1.0, False), (128, 0), (True, True))),
        *(plain._replace(group_rows=rows) for rows in ((3,), (2, 2))),
        *(packed._replace(layout=layout) for layout in ((*packed.layout, 0), (*packed.layout[:3], -1))),
        *(packed._replace(layout=(*packed.layout[:at], 1.0, *packed.layout[at + 1 :])) for at in range(4)),
        *(packed._replace(group_rows=rows) for rows in ((), (3,), (2, 2))),
        packed._replace(rows=0, group_rows=(0,)),
    ]
    assert [NPZ.check_header(header) for header in wrong] == [False] * len(wrong)


def test_what_a_file_is_read_like_is_told(tmp_path: Path) -> None:
    plain = header_of(stored(tmp_path / "0.npz", archive({"embedding.npy": npy(ROWS)})))
    columns = header_of(stored(tmp_path / "1.npz", archive({"embedding.npy": npy(np.asfortranarray(ROWS))})))
    packed = header_of(stored(tmp_path / "2.npz", archive({"embedding.npy": npy(ROWS)}, DEFLATED)))
    assert [NPZ.raw_offset(header) for header in (plain, columns, packed)] == [plain.layout[0], None, None]
    assert [NPZ.drawback(header).partition(":")[0] for header in (plain, columns, packed)] == [
        "",
        "in Fortran order",
        "deflated",
    ]
    assert [NPZ.suffix_for(np.dtype(kind)) for kind in ("f4", "?", "S3")] == [".npz", ".npz", None]


@pytest.mark.parametrize("name", ["embedding", "vec"])
def test_written_archives_hold_one_stored_array_of_the_name(name: str) -> None:
    sink = io.BytesIO()
    NPZ.write(lambda data: sink.write(data) and None, Vectors(ROWS, Casting(ROWS.dtype)), None, name)
    with zipfile.ZipFile(sink) as made:
        [info] = made.infolist()
        assert (info.filename, info.compress_type, info.date_time) == (f"{name}.npy", STORED, (1980, 1, 1, 0, 0, 0))
        assert made.testzip() is None
        np.testing.assert_array_equal(np.load(io.BytesIO(made.read(info))), ROWS)
        # So that the array may be of more than 4 GB, which is not known before it has been written.
        assert struct.unpack_from("<H", sink.getvalue(), 28) == (20,)


# ---------------------------------------------------------------------------------------------------------------------
# Which array


def find(file: StoredFile) -> Any:
    found, head = NPZ.find_vectors(file, Columns(), b"")
    again, same = NPZ.find_vectors(file, Columns(), head)
    assert (again, same) == (found, head), "what is known of the end is not read again"
    return found


def test_the_array_of_vectors_is_found(tmp_path: Path) -> None:
    line, text, objects = npy(np.arange(3)), npy(np.array([["a"]])), npy(np.arange(8.0).reshape(2, 2, 2))
    cases: list[tuple[dict[str, bytes], list[str]]] = [
        ({"a.npy": npy(ROWS)}, ["a"]),
        ({"a.npy": line}, ["a"]),
        ({"readme.txt": b"x", "a.npy": line}, ["a"]),
        ({"a.npy": npy(ROWS), "embedding.npy": line, "b.npy": npy(ROWS)}, ["embedding"]),
        ({"a.npy": line, "b.npy": npy(ROWS)}, ["b"]),
        ({"a.npy": npy(ROWS), "b.npy": npy(ROWS), "c.npy": objects, "d.npy": b"none"}, ["a", "b"]),
        ({"a.npy": line, "b.npy": text}, ["b"]),  # which is refused by what it holds
        ({"readme.txt": b"x"}, []),
        ({**{f"{n}.npy": line for n in range(99)}, "v.npy": npy(ROWS)}, ["v"]),
        ({**{f"{n}.npy": line for n in range(100)}, "v.npy": npy(ROWS)}, [*map(str, range(100)), "v"]),
    ]
    for members, names in cases:
        assert find(stored(tmp_path / "0.npz", archive(members))) == names


def test_arrays_are_found_in_a_directory_that_is_longer_than_what_is_read_at_first(tmp_path: Path) -> None:
    members = {f"{'x' * 200} {number}.npy": b"" for number in range(400)}
    for comment in (b"", b"of the archive"):
        content = archive({"first.npy": npy(ROWS), **members, "embedding.npy": npy(ROWS * 2)})
        with zipfile.ZipFile(grown := io.BytesIO(content), "a") as made:
            made.comment = comment
        file = stored(tmp_path / "0.npz", grown.getvalue())
        for name, rows in (("first", ROWS), ("embedding", ROWS * 2)):
            np.testing.assert_array_equal(rows_of(header_of(file, name), 0, 4), rows)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def changed(content: bytes, mark: bytes, offset: int, kind: str, *values: int) -> bytes:
    """With other numbers at some bytes from the last place of a mark on."""
    data = bytearray(content)
    struct.pack_into(kind, data, data.rindex(mark) + offset, *values)
    return bytes(data)


def twice() -> bytes:
    content = archive({"embedding.npy": npy(ROWS), "embeddinh.npy": npy(ROWS)})
    return content.replace(b"embeddinh", b"embedding")


ENTRY, LOCAL = b"PK\1\2", b"PK\3\4"


def with_local_header(nbytes: int) -> bytes:
    """An archive whose array begins, as its directory says, in the comment at its end, so many bytes before that."""
    with zipfile.ZipFile(sink := io.BytesIO(PLAIN), "a") as made:
        made.comment = LOCAL + bytes(nbytes - 4)
    return changed(sink.getvalue(), ENTRY, 42, "<I", len(PLAIN))


PLAIN = archive({"embedding.npy": npy(ROWS)})
NO_FILE = "it is none, or cut short: write it again"

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", f"File is not a zip file; {NO_FILE}"),
    "no arrays": (
        lambda: archive({f"{n}.txt": b"" for n in range(4)}),
        "it holds no array, but '0.txt', '1.txt', '2.txt'; write it again",
    ),
    "nothing": (lambda: archive({}), "it holds no array, but nothing; write it again"),
    "of torch": (lambda: archive({"a/data.pkl": b"", "a/data/0": b""}), "torch"),
    "encrypted": (
        lambda: changed(PLAIN, ENTRY, 8, "<H", 1),
        "its array 'embedding' is encrypted; write it again with np.savez",
    ),
    "another compression": (
        lambda: archive({"embedding.npy": npy(ROWS)}, zipfile.ZIP_LZMA),
        (
            "its array 'embedding' is compressed by method 14; stored and deflated can be read: write it again with "
            "np.savez or np.savez_compressed"
        ),
    ),
    "at its end": (
        lambda: changed(PLAIN, ENTRY, 42, "<I", len(PLAIN)),
        "its directory says that the array 'embedding' is beyond its end: it was cut short; write it again",
    ),
    "just before its end": (
        lambda: changed(PLAIN, ENTRY, 42, "<I", len(PLAIN) - 1),
        "its directory says that the array 'embedding' is where it is not; write it again",
    ),
    "a local header cut short": (
        lambda: with_local_header(29),
        "its directory says that the array 'embedding' is where it is not; write it again",
    ),
    "a local header at the end": (
        lambda: with_local_header(30),
        "its array 'embedding' ends beyond the end of the file: it was cut short; write it again",
    ),
    "elsewhere": (
        lambda: changed(PLAIN, ENTRY, 42, "<I", 1),
        "its directory says that the array 'embedding' is where it is not; write it again",
    ),
    "one byte more than there are": (
        lambda: changed(PLAIN, ENTRY, 20, "<II", *[len(PLAIN) - PLAIN.index(b"\x93NUMPY") + 1] * 2),
        "its array 'embedding' ends beyond the end of the file: it was cut short; write it again",
    ),
    "two sizes": (
        lambda: changed(PLAIN, ENTRY, 24, "<I", 177),
        "its array 'embedding' is stored, with two sizes: 176 and 177 bytes; write it again",
    ),
    "fewer bytes than promised": (
        lambda: archive({"embedding.npy": npy(ROWS)[:-1]}),
        "its array 'embedding' promises 4 rows of 3 x float32, 176 bytes in all, but has 175; write it again",
    ),
    "more bytes than promised": (
        lambda: archive({"embedding.npy": npy(ROWS) + b"x"}),
        "its array 'embedding' promises 4 rows of 3 x float32, 176 bytes in all, but has 177; write it again",
    ),
    "fewer deflated bytes than promised": (
        lambda: archive({"embedding.npy": npy(ROWS)[:-1]}, DEFLATED),
        "its array 'embedding' promises 4 rows of 3 x float32, 176 bytes in all, but has 175; write it again",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_archives_that_cannot_be_read_are_told_with_the_remedy(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    file = stored(tmp_path / "0.npz", make())
    with pytest.raises(FormatError) as refused:
        header_of(file)
    told = str(refused.value)
    if name == "of torch":
        assert message in told
    else:
        assert told == f"{file.url}: not a readable npz file: {message}"


def test_which_arrays_there_are_is_told(tmp_path: Path) -> None:
    line = npy(np.arange(3))
    cases: list[tuple[bytes, str]] = [
        (
            archive({f"{n}.npy": line for n in range(11)}),
            "no array 'embedding'; its arrays are '0', '1', .*, '9'; name",
        ),
        (archive({"a.npy": line, "b.txt": b""}), "no array 'embedding'; its arrays are 'a'; name one with embedding_c"),
        (twice(), "several arrays 'embedding'; its arrays are 'embedding', 'embedding'; name one with embedding_col"),
    ]
    for content, message in cases:
        file = stored(tmp_path / "0.npz", content)
        with pytest.raises(ColumnError, match=message) as refused:
            header_of(file)
        assert str(refused.value).startswith(f"{file.url}: has ")


def test_a_storage_that_does_not_tell_sizes_has_no_archives(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.npz", PLAIN)
    untold = file._replace(version=Version(-1))
    for read in (lambda: header_of(untold), lambda: find(untold)):
        with pytest.raises(FormatError, match="the storage does not tell its size, and the directory of an archive is"):
            read()
