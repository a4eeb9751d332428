"""The npz format: a zip archive of npy files, as ``numpy.savez`` and ``numpy.savez_compressed`` write it.

A stored member is read like an npy file: its data begin after its local header, whose extra field is not the one of the
archive's directory [1]_. A deflated one is inflated from its beginning, block by block.

References
----------
.. [1] https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7 and 4.5.3
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import ColumnError, FormatError
from dask_embedding_reader.formats.base import (
    DEFAULT_COLUMN,
    Array,
    BaseFormat,
    Columns,
    FileHeader,
    RowReader,
    Stretch,
    StretchReader,
)
from dask_embedding_reader.formats.npy import NPY, Parsed, parse_npy, rows_and_dimension
from dask_embedding_reader.formats.raw import copy_blocks, naming_rows
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.find import elsewhere_remedy
from dask_embedding_reader.storage.put import WritableFile
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import StoredFile, Write

_TAIL_NBYTES = 2**16
"""What is read at first of the end of an archive, where its directory is."""

_LOCAL = struct.Struct("<4s22xHH")
"""Of a local header: its signature, the lengths of the name and of the extra field."""

_HEAD_NBYTES = 1024
"""What is read at first of a member: its local header and that of its array."""

_BLOCK_NBYTES = 2**20
"""What is inflated at once."""

_MOST_DIRECTORY_NBYTES = 2**22
"""The largest directory that is read, of some 60,000 arrays; as Python's objects it takes 60 MB."""

_MOST_LOOKED_AT = 100
"""Of more arrays it has to be told which one holds the vectors: to look at one is to read it."""


class _Member(NamedTuple):
    data_offset: int
    nbytes: int
    stored_nbytes: int
    is_deflated: bool
    crc: int
    parsed: Parsed
    header_nbytes: int


class _Npz(BaseFormat):
    name = "npz"
    suffixes: tuple[str, ...] = (".npz",)
    first_nbytes = 0  # the directory is at the end
    holds_columns = False
    tells_dtype = True

    def find_vectors(self, file: StoredFile, columns: Columns, head: bytes) -> tuple[Sequence[str] | None, bytes]:
        """Find the arrays of numbers of two axes; where there is one array, it is that."""
        del columns
        head = head or _read_tail(file)
        archive = _open(file, head)
        names = _array_names(archive)
        if DEFAULT_COLUMN in names:
            return [DEFAULT_COLUMN], head
        if 1 < len(names) <= _MOST_LOOKED_AT:
            names = [name for name in names if _is_vectors(file, archive, name)]
        return names, head

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read where the wanted array lies, its shape and dtype."""
        archive = _open(file, head or _read_tail(file))
        member = _member(file, archive, columns.column)
        rows, dimension = rows_and_dimension(file, member.parsed)
        dtype = member.parsed.dtype
        promised = member.header_nbytes + rows * dimension * dtype.itemsize
        if promised != member.nbytes:
            _fail(
                file,
                f"its array {columns.embedding!r} promises {rows:,} rows of {dimension} x {dtype}, {promised:,} bytes "
                f"in all, but has {member.nbytes:,}; write it again",
            )
        if not member.is_deflated:
            return FileHeader(
                file, rows, dimension, dtype, (member.data_offset + member.header_nbytes, member.parsed.fortran_order)
            )
        if member.parsed.fortran_order and rows > 1 and dimension > 1:
            _fail(file, "its array is deflated and in Fortran order: no row can be read alone; save it in C order")
        layout = (member.data_offset, member.header_nbytes, member.stored_nbytes, member.crc)
        return FileHeader(file, rows, dimension, dtype, layout, group_rows=(rows,) if rows else ())

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether the array lies within the file."""
        numbers = header.layout[:1] if len(header.layout) == 2 else header.layout
        if not 2 <= len(header.layout) <= 4 or any(type(number) is not int or number < 0 for number in numbers):
            return False
        if len(header.layout) == 2:
            end = header.layout[0] + header.rows * header.dimension * header.dtype.itemsize
            fits = type(header.layout[1]) is bool and header.group_rows in ((), (header.rows,))
        else:
            end = header.layout[0] + header.layout[2]
            fits = header.group_rows == ((header.rows,) if header.rows else ())
        return fits and not 0 <= header.file.size < end

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that reads the next rows."""
        if len(header.layout) == 2:
            return NPY.open_rows(header, columns, start, stop)
        return super().open_rows(header, columns, start, stop)

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that reads stretches of rows; what is deflated is inflated once, all before them, too."""
        if len(header.layout) == 2:
            return NPY.open_stretches(header, columns, start, stop)
        data_offset, header_nbytes, compressed_nbytes, *crc = header.layout  # earlier manifests have no CRC
        row_nbytes = header.dimension * header.dtype.itemsize
        whole = (header_nbytes + header.rows * row_nbytes, crc[0]) if crc else None
        inflating = _Inflating(header.file, data_offset, compressed_nbytes, whole)
        position = 0

        def inflate(rows: int) -> Iterator[Array]:
            step = max(1, _BLOCK_NBYTES // row_nbytes)
            for first in range(0, rows, step):
                data = inflating.read(min(step, rows - first) * row_nbytes)
                yield np.frombuffer(data, header.dtype).reshape(-1, header.dimension)

        def read(stretches: Sequence[Stretch]) -> None:
            nonlocal position
            for row, out in stretches:
                with naming_rows(row, row + len(out)):
                    begin = header_nbytes + row * row_nbytes
                    inflating.skip(begin - position)
                    copy_blocks(inflate(len(out)), [out], header.file, row)
                    position = begin + len(out) * row_nbytes

        return read

    def raw_offset(self, header: FileHeader) -> int | None:
        """Return where a stored array begins, if its rows are stored."""
        return NPY.raw_offset(header) if len(header.layout) == 2 else None

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what is held as in npy files, or a block before and after it is inflated, and as an array."""
        return (
            NPY.held_nbytes(header, columns, rows, threads) if len(header.layout) == 2 else 3 * threads * _BLOCK_NBYTES
        )

    def drawback(self, header: FileHeader) -> str:
        """Say whether an array is deflated, or in Fortran order."""
        if len(header.layout) > 2:
            return "deflated: whoever reads a row has to inflate all before it"
        return NPY.drawback(header)

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return the suffix: every dtype can be stored."""
        return ".npz" if NPY.suffix_for(dtype) else None

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of an archive of one stored array."""
        del table  # such a file has no columns
        info = zipfile.ZipInfo(f"{embedding_column}.npy")  # of 1980: equal data give equal bytes
        with (
            zipfile.ZipFile(WritableFile(write), "w", zipfile.ZIP_STORED) as archive,
            archive.open(info, "w", force_zip64=True) as member,
        ):
            NPY.write(member.write, vectors, None, "")


NPZ = _Npz()


class _Tail(io.RawIOBase):
    """An archive as a file whose end has been read."""

    def __init__(self, file: StoredFile, data: bytes) -> None:
        self._file, self._position = file, 0
        self._start = file.size - len(data)
        self._data = data

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if origin + offset < 0:
            raise OSError("before the beginning")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._file.size if size is None or size < 0 else min(self._file.size, self._position + size)
        if stop - self._position > _MOST_DIRECTORY_NBYTES:
            _fail(
                self._file,
                f"its directory takes {stop - self._position:,} bytes, more than the {_MOST_DIRECTORY_NBYTES:,} that "
                "are read; save the vectors as one array",
            )
        start, self._position = self._position, max(self._position, stop)
        if start >= stop:
            return b""
        if start >= self._start:
            return self._data[start - self._start : stop - self._start]
        return read_range(self._file, start, stop)


class _Inflating:
    """The bytes of a deflated member, from its beginning on.

    A damaged one is mostly inflated to other numbers without a complaint: who comes to its end compares its CRC.
    """

    def __init__(self, file: StoredFile, start: int, nbytes: int, whole: tuple[int, int] | None = None) -> None:
        self._file, self._position, self._stop = file, start, start + nbytes
        self._whole, self._done, self._crc = whole, 0, 0
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._rest = b""

    def read(self, nbytes: int) -> bytes:
        """Return the next bytes, of which as many must be there."""
        parts: list[bytes] = []
        while nbytes:
            if not self._rest and self._position < self._stop:
                stop = min(self._stop, self._position + _BLOCK_NBYTES)
                self._rest = read_range(self._file, self._position, stop)
                self._position = stop
            try:
                part = self._inflate.decompress(self._rest, nbytes)
            except zlib.error as error:
                raise FormatError(
                    f"{self._file.url}: not a readable npz file: its array is damaged ({error}); write it again"
                ) from error
            # Behind the end of a stream there may be more: it is never consumed.
            is_over = self._inflate.eof or (not self._inflate.unconsumed_tail and self._position >= self._stop)
            if not part and is_over:
                _fail(self._file, "its array ends before its last row; write it again")
            self._rest = self._inflate.unconsumed_tail
            parts.append(part)
            nbytes -= len(part)
            self._done += len(part)
            self._crc = zlib.crc32(part, self._crc)
        if self._whole is not None and self._done == self._whole[0] and self._crc != self._whole[1]:
            _fail(
                self._file,
                f"its array is damaged: its CRC is {self._crc:08x}, where its directory says {self._whole[1]:08x}; "
                "write it again",
            )
        return b"".join(parts)

    def skip(self, nbytes: int) -> None:
        """Pass over the next bytes."""
        while nbytes:
            nbytes -= len(self.read(min(nbytes, _BLOCK_NBYTES)))


def _read_tail(file: StoredFile) -> bytes:
    """Read the end of an archive, where its directory is."""
    if file.size < 0:
        _fail(file, "the storage does not tell its size, and the directory of an archive is at its end")
    return read_range(file, max(0, file.size - _TAIL_NBYTES), file.size)


def _open(file: StoredFile, tail: bytes) -> zipfile.ZipFile:
    """Read the directory of an archive whose end has been read."""
    try:
        return zipfile.ZipFile(_Tail(file, tail))
    except FormatError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise FormatError(
            f"{file.url}: not a readable npz file: {error}; it is none, or cut short: write it again"
        ) from error


def _array_names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _is_vectors(file: StoredFile, archive: zipfile.ZipFile, name: str) -> bool:
    """Tell whether an array has two axes and can be read."""
    try:
        return len(_member(file, archive, name).parsed.shape) == 2
    except (FormatError, ColumnError):  # such as one of objects
        return False


def _member(file: StoredFile, archive: zipfile.ZipFile, name: str) -> _Member:
    """Find an array, and read its header."""
    names = _array_names(archive)
    if not names:
        members = archive.namelist()
        if any(member.endswith("/data.pkl") for member in members):  # torch writes archives, too
            _fail(file, elsewhere_remedy(".pt"))
        _fail(file, f"it holds no array, but {', '.join(map(repr, members[:3])) or 'nothing'}; write it again")
    if names.count(name) != 1:
        shown = ", ".join(map(repr, names[:10]))
        raise ColumnError(
            f"{file.url}: has {'several arrays' if name in names else 'no array'} {name!r}; its arrays are {shown}; "
            f"name one with embedding_column=, or open all files in the archive as zip://::{file.url}"
        )
    info = archive.getinfo(f"{name}.npy")
    if info.flag_bits & 1:
        _fail(file, f"its array {name!r} is encrypted; write it again with np.savez")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        _fail(
            file,
            f"its array {name!r} is compressed by method {info.compress_type}; stored and deflated can be read: write "
            "it again with np.savez or np.savez_compressed",
        )
    if not 0 <= info.header_offset < file.size:
        _fail(file, f"its directory says that the array {name!r} is beyond its end: it was cut short; write it again")
    head = read_range(file, info.header_offset, min(file.size, info.header_offset + _HEAD_NBYTES))
    if len(head) < 30 or head[:4] != b"PK\3\4":
        _fail(file, f"its directory says that the array {name!r} is where it is not; write it again")
    _, name_nbytes, extra_nbytes = _LOCAL.unpack(head[: _LOCAL.size])
    data_offset = info.header_offset + _LOCAL.size + name_nbytes + extra_nbytes
    if data_offset + info.compress_size > file.size:
        _fail(file, f"its array {name!r} ends beyond the end of the file: it was cut short; write it again")
    is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if not is_deflated and info.compress_size != info.file_size:
        _fail(
            file,
            f"its array {name!r} is stored, with two sizes: {info.compress_size:,} and {info.file_size:,} bytes; write "
            "it again",
        )

    def read(start: int, stop: int) -> bytes:
        if is_deflated:
            return _Inflating(file, data_offset, info.compress_size).read(stop)[start:]
        return read_range(file, data_offset + start, data_offset + stop)

    parsed, header_nbytes = parse_npy(file, info.file_size, read)
    return _Member(data_offset, info.file_size, info.compress_size, is_deflated, info.CRC, parsed, header_nbytes)


def _fail(file: StoredFile, what: str) -> NoReturn:
    raise FormatError(f"{file.url}: not a readable npz file: {what}")
