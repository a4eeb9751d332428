"""Files of tensors: what their headers say is held against the file, and what is wrong is told."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.numpy

from dask_embedding_reader.errors import ColumnError, FormatError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.safetensors import SAFETENSORS
from dask_embedding_reader.formats.vectors import Casting, Vectors
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.stores import emptied_bucket, stored


def framed(head: bytes, nbytes: int = 0) -> bytes:
    """A file of a header, and so many bytes of data."""
    return struct.pack("<Q", len(head)) + head + bytes(nbytes)


def content(nbytes: int, **tensors: Any) -> bytes:
    return framed(json.dumps(tensors).encode(), nbytes)


def tensor(start: float, stop: int, *shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def sized(header: FileHeader, size: int) -> FileHeader:
    return header._replace(file=header.file._replace(version=header.file.version._replace(size=size)))


def padded(nbytes: int) -> bytes:
    """A header of a tensor of one vector, of so many bytes."""
    text = json.dumps({"embedding": tensor(0, 8, 1, 2)}).encode()
    return text + b" " * (nbytes - len(text))


DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}
DTYPES |= {"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?", "BF16": "f4"}


@pytest.mark.parametrize("nbytes", [104, 504, 505, 2**22])  # all of what is read at first, and more
def test_headers_are_read_once_and_no_further_than_they_reach(nbytes: int) -> None:
    data = framed(padded(nbytes), 8)
    with emptied_bucket() as bucket:
        bucket.put("0.safetensors", data)
        for size in (len(data), -1):
            file = StoredFile(FsspecStore(fsspec.filesystem("bucket")), "0.safetensors", Version(size))
            bucket.forget()
            names, head = SAFETENSORS.find_vectors(file, Columns(), b"")
            assert names == ["embedding"]
            assert head == data[: 8 + nbytes]
            header = SAFETENSORS.read_header(file, Columns("embedding"), head)
            assert (header.rows, header.dimension, header.layout) == (1, 2, (8 + nbytes, False))
            first = 8 if size < 0 else min(512, size)
            assert [(one.start, one.stop) for one in bucket.reads] == [
                (0, first),
                *([(first, 8 + nbytes)] if 8 + nbytes > first else []),
            ]
            bucket.forget()
            assert SAFETENSORS.read_header(file, Columns("embedding"), data[:20]) == header
            assert [(one.start, one.stop) for one in bucket.reads] == [(20, 8 + nbytes)]


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_each_type_have_their_size(tmp_path: Path, name: str) -> None:
    itemsize = 2 if name == "BF16" else np.dtype(DTYPES[name]).itemsize
    nbytes = 6 * itemsize
    file = stored(tmp_path / "0.safetensors", content(nbytes, embedding=tensor(0, nbytes, 2, 3, dtype=name)))
    header = SAFETENSORS.read_header(file, Columns("embedding"))
    assert (header.rows, header.dimension, header.dtype) == (2, 3, np.dtype(DTYPES[name]))
    start = file.size - nbytes
    assert header.layout == (start, name == "BF16")
    assert SAFETENSORS.raw_offset(header) == (None if name == "BF16" else start)
    for size, fits in ((-1, True), (0, False), (file.size - 1, False), (file.size, True), (file.size + 1, True)):
        assert SAFETENSORS.check_header(sized(header, size)) == fits
    for other in (nbytes - 1, nbytes + 1):
        wrong = stored(tmp_path / "1.safetensors", content(other, embedding=tensor(0, other, 2, 3, dtype=name)))
        with pytest.raises(FormatError) as refused:
            SAFETENSORS.read_header(wrong, Columns("embedding"))
        assert str(refused.value) == (
            f"{wrong.url}: not a readable safetensors file: its tensor 'embedding' of (2, 3) {name} has {other} bytes; "
            "write it again"
        )


def test_headers_from_manifests_are_held_against_the_file(tmp_path: Path) -> None:
    file = stored(tmp_path / "0.safetensors", content(24, embedding=tensor(0, 24, 2, 3)))
    header = SAFETENSORS.read_header(file, Columns("embedding"))
    layouts: list[Any] = [(), (8,), (8, False, 0), (7, False), (8.0, False), (8, 0), (True, False), (8, None)]
    wrong = [header._replace(layout=layout) for layout in layouts]
    assert not any(map(SAFETENSORS.check_header, [*wrong, header._replace(group_rows=(2,))]))
    for layout in ((8, False), (8, True)):
        assert SAFETENSORS.check_header(header._replace(layout=layout))


def test_the_tensors_of_vectors_are_found(tmp_path: Path) -> None:
    matrix, line = tensor(0, 24, 2, 3), tensor(0, 24, 6)
    cases: list[tuple[int, dict[str, Any], list[str]]] = [
        (24, {"a": matrix}, ["a"]),
        (24, {"a": line}, []),
        (24, {"embedding": line}, ["embedding"]),
        (48, {"a": matrix, "embedding": tensor(24, 48, 6)}, ["embedding"]),
        (48, {"b": tensor(24, 48, 2, 3), "a": matrix, "__metadata__": {"x": "y"}}, ["b", "a"]),
        (24, {"a": tensor(0, 24, 2, 3, 1), "b": tensor(24, 24, 4, 0)}, []),
        (24, {"a": tensor(0, 24, 2, 3, dtype="F8_E4M3")}, []),
        (0, {"a": tensor(0, 0, 0, 1)}, ["a"]),
    ]
    for nbytes, tensors, names in cases:
        file = stored(tmp_path / "0.safetensors", content(nbytes, **tensors))
        assert SAFETENSORS.find_vectors(file, Columns(), b"")[0] == names


MATRIX = tensor(0, 24, 2, 3)

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it has 0 bytes, less than the 8 of its length; write it again"),
    "seven bytes": (lambda: b"1234567", "it has 7 bytes, less than the 8 of its length; write it again"),
    "a header of no bytes": (lambda: bytes(8), "its header is malformed (Expecting value: line 1 column 1 (char 0))"),
    "one byte short of its header": (
        lambda: framed(b"{}")[:-1],
        "its header claims 2 of the file's 9 bytes; it is none, or cut short: write it again",
    ),
    "one byte beyond its end": (
        lambda: content(23, embedding=MATRIX),
        "its tensor 'embedding' lies over another, or beyond the end of the file; write it again",
    ),
    "a byte too many": (
        lambda: content(25, embedding=MATRIX),
        "behind its tensors are 1 bytes more; write it again",
    ),
    "over another": (
        lambda: content(47, a=MATRIX, embedding=tensor(23, 47, 2, 3)),
        "its tensor 'embedding' lies over another, or beyond the end of the file; write it again",
    ),
    "a gap": (
        lambda: content(49, a=MATRIX, embedding=tensor(25, 49, 2, 3)),
        "before its tensor 'embedding' are 1 bytes of no tensor; write it again",
    ),
    "a gap at the beginning": (
        lambda: content(26, embedding=tensor(2, 26, 2, 3)),
        "before its tensor 'embedding' are 2 bytes of no tensor; write it again",
    ),
    "another type": (
        lambda: content(6, embedding=tensor(0, 6, 2, 3, dtype="F8_E5M2")),
        f"its tensor 'embedding' holds F8_E5M2; {', '.join(DTYPES)} can be read: save it as F16",
    ),
    "one axis": (
        lambda: content(24, embedding=tensor(0, 24, 6)),
        "its tensor 'embedding' has the shape (6,); a collection holds (rows, dimension): reshape it",
    ),
    "no items": (
        lambda: content(0, embedding=tensor(0, 0, 6, 0)),
        "its tensor 'embedding' has the shape (6, 0); a collection holds (rows, dimension): reshape it",
    ),
    "header of more than is read": (
        lambda: framed(padded(2**22 + 1), 8),
        "its header takes 4,194,305 bytes, more than the 4,194,304 that are read; save the vectors as one tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_read_are_told_with_the_remedy(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    file = stored(tmp_path / "0.safetensors", make())
    with pytest.raises(FormatError) as refused:
        SAFETENSORS.read_header(file, Columns("embedding"))
    assert str(refused.value).startswith(f"{file.url}: not a readable safetensors file: {message}")


def test_numbers_that_are_none_are_told(tmp_path: Path) -> None:
    """All that is counted with in a header, wherever it is: also of tensors that nobody asked for."""
    wrong: list[dict[str, Any]] = [
        *(tensor(0, 24, *shape) for shape in ((-2, -3), (2.0, 3), (True, 24), ("2", 3), (2**62, 0), (None, 3))),
        *(tensor(start, stop, 2, 3) for start, stop in ((-1, 23), (0, 2**62), (0.0, 24), (24, 0), (False, 24))),
        {**MATRIX, "data_offsets": [0, 24, 24]},
        {**MATRIX, "data_offsets": 24},
        {"dtype": "F32", "shape": [2, 3]},
    ]
    for facts in wrong:
        for tensors in ({"embedding": facts}, {"embedding": MATRIX, "other": facts}):
            file = stored(tmp_path / "0.safetensors", content(24, **tensors))
            with pytest.raises(
                FormatError, match=r"0\.safetensors: not a readable .*its header is malformed \(.*write"
            ):
                SAFETENSORS.read_header(file, Columns("embedding"))
    largest = stored(tmp_path / "0.safetensors", content(24, a=tensor(24, 24, 2**62 - 1, 0), embedding=MATRIX))
    assert SAFETENSORS.read_header(largest, Columns("embedding")).rows == 2
    for text in (b"[]", b"1", b'{"a": 1}', b'{"a": []}', b"\xff", b"[" * 100_000):
        with pytest.raises(FormatError, match=r"its header is malformed"):
            SAFETENSORS.read_header(stored(tmp_path / "0.safetensors", framed(text)), Columns("embedding"))


def test_a_length_that_cannot_be_is_not_asked_for() -> None:
    for nbytes, message in ((2**62 - 7, "claims 4,611,686,018,427,387,897 of the file's"), (2**62 - 8, "takes 4,611,")):
        with emptied_bucket() as bucket:
            bucket.put("0.safetensors", struct.pack("<Q", nbytes))
            file = StoredFile(FsspecStore(fsspec.filesystem("bucket")), "0.safetensors", Version(-1))
            with pytest.raises(FormatError, match=message):
                SAFETENSORS.read_header(file, Columns("embedding"), struct.pack("<Q", nbytes))
            assert not bucket.reads


def test_which_tensors_there_are_is_told(tmp_path: Path) -> None:
    many = {f"t{n:02}": tensor(24 * n, 24 * n + 24, 2, 3) for n in range(11)}
    for tensors, told in ((many, ", ".join(f"'t{n:02}'" for n in range(10))), ({}, "none")):
        file = stored(tmp_path / "0.safetensors", content(24 * len(tensors), **tensors))
        with pytest.raises(ColumnError) as refused:
            SAFETENSORS.read_header(file, Columns("embedding"))
        assert str(refused.value) == (
            f"{file.url}: has no tensor 'embedding'; its tensors are {told}: name one with embedding_column="
        )


@pytest.mark.parametrize("name", ["x" * length for length in range(1, 9)])
def test_written_tensors_are_aligned_and_have_their_name(tmp_path: Path, name: str) -> None:
    rows = np.arange(6, dtype=np.float64).reshape(2, 3)
    sink = io.BytesIO()
    SAFETENSORS.write(lambda data: sink.write(data) and None, Vectors(rows, Casting(rows.dtype)), None, name)
    data = sink.getvalue()
    [(found, array)] = safetensors.numpy.load(data).items()
    assert found == name
    np.testing.assert_array_equal(array, rows, strict=True)
    assert (len(data) - rows.nbytes) % 8 == 0
    assert len(data) - rows.nbytes - 8 == struct.unpack_from("<Q", data)[0]
    file = stored(tmp_path / "0.safetensors", data)
    header = SAFETENSORS.read_header(file, Columns(found))
    assert header == SAFETENSORS.written_header(file, 2, 3, rows.dtype)
    assert SAFETENSORS.suffix_for(np.dtype(">f8")) == ".safetensors"
