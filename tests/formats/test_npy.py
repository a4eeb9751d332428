"""Headers of npy files: of each version and length, held against the file; and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.npy import NPY
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import emptied_bucket

ALONE = Columns()


def framed(text: bytes, version: int = 1) -> bytes:
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little") + text


def head(shape: Any, descr: Any = "<f4", fortran: Any = False, version: int = 1, nbytes: int = 0) -> bytes:
    """A header, of so many bytes at least."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    prefix = 10 if version == 1 else 12
    return framed(text + b" " * (nbytes - prefix - len(text) - 1) + b"\n", version)


def stored(path: Path, content: bytes, size: int | None = None) -> StoredFile:
    path.write_bytes(content)
    return StoredFile(LocalStore(LocalFileSystem()), str(path), Version(len(content) if size is None else size))


@pytest.mark.parametrize("nbytes", [80, 511, 512, 513, 2_000, 65_000, 2**20])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_any_length_are_read_once(version: int, nbytes: int) -> None:
    if version == 1 and nbytes == 2**20:
        return
    start = head((2, 3), version=version, nbytes=nbytes)
    content = start + bytes(24)
    with emptied_bucket() as bucket:
        bucket.put("0.npy", content)
        for size in (len(content), -1):
            file = StoredFile(FsspecStore(fsspec.filesystem("bucket")), "0.npy", Version(size))
            bucket.forget()
            header = NPY.read_header(file, ALONE)
            assert (header.rows, header.dimension, header.dtype.str, header.layout) == (2, 3, "<f4", (nbytes, False))
            # How long a file is of which nothing is known, its own first bytes have to tell.
            first = 12 if size < 0 else min(512, len(content))
            assert [(one.start, one.stop) for one in bucket.reads] == [
                (0, first),
                *([(first, nbytes)] if nbytes > first else []),
            ]
            bucket.forget()
            assert NPY.read_header(file, ALONE, content[:20]) == header
            assert [(one.start, one.stop) for one in bucket.reads] == [(20, nbytes)]


def test_what_arrays_are_vectors(tmp_path: Path) -> None:
    for shape, descr, fortran, found in (
        ((2, 3), "<f4", False, (2, 3, "<f4")),
        ((2, 3), ">i2", True, (2, 3, ">i2")),
        ((2, 1), "|b1", False, (2, 1, "|b1")),
        ((1, 2), "<c16", False, (1, 2, "<c16")),
        ((0, 3), "<f4", False, (0, 3, "<f4")),
        ((0, 0), "<f4", False, (0, 0, "<f4")),
        ((0,), "<f4", False, (0, 0, "<f4")),
    ):
        rows, dimension, dtype = found
        content = head(shape, descr, fortran) + bytes(rows * dimension * np.dtype(dtype).itemsize)
        header = NPY.read_header(stored(tmp_path / "0.npy", content), ALONE)
        assert (header.rows, header.dimension, header.dtype.str) == found
        assert header.layout[1] is fortran
        assert NPY.check_header(header)
        assert not header.group_rows


def test_headers_from_manifests_are_held_against_the_file(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.npy", head((2, 3)) + bytes(24))
    header = NPY.read_header(file, ALONE)

    def sized(size: int) -> FileHeader:
        return header._replace(file=file._replace(version=Version(size)))

    start = header.layout[0]
    assert [NPY.check_header(sized(size)) for size in (-1, file.size, file.size - 1, file.size + 1, 0)] == [
        *(True, True, False, False, False)
    ]
    layouts: list[Any] = [(), (start,), (start, False, 0), (start, 0), (start, None), (float(start), False), (0, False)]
    assert not any(NPY.check_header(header._replace(layout=layout)) for layout in layouts)
    assert not NPY.check_header(header._replace(group_rows=(2,)))
    assert NPY.check_header(header._replace(layout=(1, True), file=file._replace(version=Version(25))))
    untold = sized(-1)
    for layout in ((0, False), (-1, False), (True, False)):
        assert not NPY.check_header(untold._replace(layout=layout))


ARRAYS = (
    "but a collection holds 2-D arrays (rows, dimension); np.save(path, array.reshape(-1, dimension)) makes rows of it"
)
NO_ITEMS = "its rows have no items: write the file again, with vectors"
OF_MANY = (
    "; of many files of one vector each, paths = sorted(glob.glob('*.npy')), and then np.save('all/0.npy', "
    "np.stack([np.load(path) for path in paths])) make one file"
)
FIELDS = "save the field that holds the vectors as an array of its own"

REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (
        b"",
        "it starts with b'' where b'\\x93NUMPY' was expected; what can be read are npy files, and parquet",
    ),
    "parquet": (b"PAR1" + bytes(20), 'it is a parquet file; open it with file_format="parquet"'),
    "text": (
        b"a,b,c,d,e",
        "it starts with b'a,b,c,' where b'\\x93NUMPY' was expected; what can be read are npy files,",
    ),
    "eleven bytes": (head((2, 3))[:11], "its npy version is (1, 0), or it is cut short; (1, 0) to (3, 0) can be read"),
    "eight bytes": (head((2, 3))[:8], "its npy version is (1, 0), or it is cut short; (1, 0) to (3, 0) can be read"),
    "seven bytes": (head((2, 3))[:7], "its npy version is (1,), or it is cut short; (1, 0) to (3, 0) can be read"),
    **{
        f"version {major}.{minor}": (
            b"\x93NUMPY" + bytes([major, minor]) + head((2, 3))[8:],
            f"its npy version is ({major}, {minor}), or it is cut short; (1, 0) to (3, 0) can be read",
        )
        for major, minor in ((0, 0), (1, 1), (2, 1), (3, 1), (4, 0))
    },
    "a header of two bytes more": (
        head((2, 3), nbytes=80)[:78],
        "its header claims 80 bytes of the file's 78",
    ),
    "a header of more than is read": (
        head((2, 3), version=2, nbytes=2**20 + 1) + bytes(24),
        "its header claims 1,048,577 bytes of the file's 1,048,601",
    ),
    "objects": (head((2, 3), "|O"), "it holds Python objects, which would have to be unpickled; save an array of numb"),
    "a negative shape": (head((-2, -3)), "its header claims the shape (-2, -3)"),
    "a shape of truth": (head((True, 3)), "its header claims the shape (True, 3)"),
    "too many rows": (head((2**63, 0)), f"its header claims the shape ({2**63}, 0)"),
    "rows without items": (
        head((2**63 - 1, 0)),
        f"its array has the shape ({2**63 - 1}, 0), {ARRAYS.partition(';')[0]}; {NO_ITEMS}",
    ),
    "one axis": (head((6,)), f"its array has the shape (6,), {ARRAYS}{OF_MANY}"),
    "no axis": (head(()), f"its array has the shape (), {ARRAYS}"),
    "three axes": (head((0, 2, 3)), f"its array has the shape (0, 2, 3), {ARRAYS}"),
    "three axes of one": (head((2, 3, 1)), f"its array has the shape (2, 3, 1), {ARRAYS}"),
    "one field": (head((2, 3), [("a", "<f4")]), f"its items have 1 field ('a'), not numbers; {FIELDS}"),
    "three fields": (
        head((2, 3), [(name, "<f4") for name in "abc"]),
        f"its items have 3 fields ('a', 'b', 'c'), not numbers; {FIELDS}",
    ),
    "four fields": (
        head((2, 3), [(name, "<f4") for name in "abcd"]),
        f"its items have 4 fields ('a', 'b', 'c', …), not numbers; {FIELDS}",
    ),
    "long fields": (
        head((2, 3), [("x" * 300, "<f4")]),
        f"its items have 1 field ('{'x' * 199}), not numbers; {FIELDS}",
    ),
    "text items": (
        head((2, 3), "<U3"),
        "its items are <U3, not numbers; save them as one of numpy's own numeric types",
    ),
    "times": (head((2, 3), "<M8[s]"), "its items are datetime64[s], not numbers; save them as one of numpy's own num"),
    "bytes of no type": (head((2, 3), "|V3"), "its items are |V3, not numbers; save them as one of numpy's own num"),
    "a byte of no type": (head((2, 3), "|V1"), "its items are |V1, 1 byte of no type: so np.save writes float8, in"),
    "two bytes of no type": (head((2, 3), "|V2"), "its items are |V2, 2 bytes of no type: so np.save writes the bfloa"),
    "float8": (head((2, 3), "<f1"), "its items are <f1: so np.save writes the float8_e5m2 of ml_dtypes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_read_are_told_with_the_remedy(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    file = stored(tmp_path / "0.npy", content)
    with pytest.raises(FormatError) as refused:
        NPY.read_header(file, ALONE)
    told = str(refused.value)
    assert told.startswith(f"{file.url}: not an npy file of embeddings: {message}")
    if message.endswith(("read", "it", "own", "file", '"')):
        assert told.endswith(message)


def test_what_numpy_says_of_a_header_is_told_in_a_line(tmp_path: Path) -> None:
    for text, told in (
        (b"{", "("),
        (b"{'descr': '<f4'}", "(Header does not contain the correct keys: ["),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'x': 1}", "(Header does not contain the correct"),
        (
            b"{'descr': 'nope', 'fortran_order': False, 'shape': (2, 3)}",
            "(descr is not a valid dtype descriptor: 'nope')",
        ),
        (b"{'descr': '<f4', 'fortran_order': 1, 'shape': (2, 3)}", "(fortran_order is not a valid bool: 1)"),
        (b"'" + b"x" * 300 + b"'", "(Header is not a dictionary: '"),
    ):
        file = stored(tmp_path / "0.npy", framed(text + b"\n" * 20))
        with pytest.raises(FormatError) as refused:
            NPY.read_header(file, ALONE)
        start = f"{file.url}: not a readable npy file: its header is malformed "
        message = str(refused.value)
        assert message.startswith(start + told)
        assert "\n" not in message
        assert len(message) <= len(start) + 203
        assert message.endswith("…)") == (len(text) > 300)


def test_long_headers_are_told_to_be_those_of_many_fields(tmp_path: Path) -> None:
    text = head((2, 3), version=2)[12:].strip()
    for more, is_read in ((10_000 - len(text) - 1, True), (10_000 - len(text), False)):
        longer = text[:-1] + b" " * more + b"}"
        file = stored(tmp_path / "0.npy", framed(longer, 2) + bytes(24))
        if is_read:
            assert NPY.read_header(file, ALONE).rows == 2
            continue
        with pytest.raises(FormatError) as refused:
            NPY.read_header(file, ALONE)
        assert str(refused.value) == (
            f"{file.url}: not an npy file of embeddings: its header has 10,001 bytes: it describes items of many "
            f"fields, not numbers; {FIELDS}"
        )


def test_names_of_fields_are_text_in_files_of_version_3(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"its header is malformed .*utf-8"):
        NPY.read_header(stored(tmp_path / "0.npy", framed(b"{'\xff': 1}", 3)), ALONE)
    with pytest.raises(FormatError, match=r"its header is malformed .*correct keys"):
        NPY.read_header(stored(tmp_path / "0.npy", framed(b"{'\xff': 1}", 2)), ALONE)


def test_files_of_another_length_are_told_with_both(tmp_path: Path) -> None:
    start = head((2, 3), nbytes=128)
    for nbytes, found in (
        (23, "is cut short"),
        (0, "is cut short"),
        (25, "has bytes after its array, which would be lost"),
    ):
        file = stored(tmp_path / "0.npy", start + bytes(nbytes))
        with pytest.raises(FormatError) as refused:
            NPY.read_header(file, ALONE)
        assert str(refused.value) == (
            f"{file.url}: {found}: its header promises 2 rows of 3 x float32, 152 bytes in all, but the file has "
            f"{128 + nbytes:,}; write the file again"
        )
    file = stored(tmp_path / "0.npy", start)
    untold = file._replace(version=file.version._replace(size=-1))
    assert NPY.read_header(untold, ALONE, start).rows == 2


def test_how_columns_lie_is_told(tmp_path: Path) -> None:
    headers = [
        NPY.read_header(stored(tmp_path / "0.npy", head((2, 3), "<f8", order) + bytes(48)), ALONE)
        for order in (False, True)
    ]
    rows, columns = headers
    assert [NPY.raw_offset(header) for header in headers] == [rows.layout[0], None]
    assert NPY.drawback(rows) == ""
    assert NPY.drawback(columns).startswith("in Fortran order: ")
    assert NPY.held_nbytes(columns, ALONE, 2, 3) == 3 * 3 * 48
    assert NPY.held_nbytes(rows, ALONE, 2, 3) == 3 * 48
    assert NPY.held_nbytes(rows, ALONE, 10**9, 3) == 3 * 3 * 2**17
