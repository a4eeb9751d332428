"""The npy format: a short header, then the vectors.

The header is parsed by numpy, the vectors are read without it: ``np.load`` reads whole files, and unpickles.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.base import Array, Columns, FileHeader, RowReader, Stretch, StretchReader
from dask_embedding_reader.formats.raw import RawVectors, copy_rows, naming_rows, raw_header_fits, write_rows
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.read import read_range, read_ranges
from dask_embedding_reader.storage.store import StoredFile, Write

_MAGIC = b"\x93NUMPY"
_PREFIX_NBYTES = 12
"""The first bytes tell how long a header is. Of a file of unknown size no more can be asked for: it may be shorter."""

_MAX_HEADER_NBYTES = 2**20
_LONGEST_TEXT = 10_000  # numpy parses no longer ones
_NUMERIC_KINDS = "biufc"
_NOT_OF_NUMPY = {
    "V1": "so np.save writes float8, int4 and others of ml_dtypes (of JAX, and of torch by these), and does not say "
    'which; np.save(path, np.load(path).view(ml_dtypes.float8_e4m3fn).astype("float32")), with the type that it was',
    "V2": "so np.save writes the bfloat16 of ml_dtypes (of JAX, and of torch by it), and does not say so; "
    'np.save(path, np.load(path).view(ml_dtypes.bfloat16).astype("float32")) if it was that',
    "f1": "so np.save writes the float8_e5m2 of ml_dtypes, which np.load cannot read; save it again, as in "
    'np.save(path, array.astype("float32"))',
}
"""What other types of numbers are in the files that numpy writes of them, and the remedy."""

_FIELDS_REMEDY = "save the field that holds the vectors as an array of its own"


class Parsed(NamedTuple):
    """What the header of an array says."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


class _Npy(RawVectors):
    name = "npy"
    suffixes: tuple[str, ...] = (".npy",)
    first_nbytes = 512  # numpy writes 128; a longer header costs a second read
    holds_columns = False
    tells_dtype = True
    find_vectors = None

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read the shape, dtype and order of an npy file."""
        del columns  # an npy file has none
        parsed, data_offset = parse_npy(file, file.size, partial(read_range, file), head)
        rows, dimension = rows_and_dimension(file, parsed)
        needed = data_offset + rows * dimension * parsed.dtype.itemsize
        if file.size >= 0 and file.size != needed:
            found = "is cut short" if file.size < needed else "has bytes after its array, which would be lost"
            raise FormatError(
                f"{file.url}: {found}: its header promises {counted(rows, 'row')} of {dimension} x "
                f"{parsed.dtype}, {needed:,} "
                f"bytes in all, but the file has {file.size:,}; write the file again"
            )
        return FileHeader(file, rows, dimension, parsed.dtype, (data_offset, parsed.fortran_order))

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether the file is as long as its vectors."""
        return len(header.layout) == 2 and isinstance(header.layout[1], bool) and raw_header_fits(header)

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that reads the next rows straight into arrays."""
        if not header.layout[1]:
            return super().open_rows(header, columns, start, stop)

        def read(outs: Sequence[Array]) -> None:
            nonlocal start
            rows = sum(map(len, outs))
            with naming_rows(start, start + rows):
                copy_rows(_read_fortran(header, start, rows), outs, header.file, start)
            start += rows

        return read

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that reads stretches of rows straight into arrays."""
        if not header.layout[1]:
            return super().open_stretches(header, columns, start, stop)

        def read(stretches: Sequence[Stretch]) -> None:
            for row, out in stretches:
                self.open_rows(header, columns, row, row + len(out))([out])

        return read

    def raw_offset(self, header: FileHeader) -> int | None:
        """Return the first number of the layout, if rows are stored."""
        return None if header.layout[1] else super().raw_offset(header)

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what answers hold, or what is cast; of columns that are stored one after the other, three copies."""
        if header.layout[1]:
            return 3 * threads * rows * header.dimension * header.dtype.itemsize
        return super().held_nbytes(header, columns, rows, threads)

    def drawback(self, header: FileHeader) -> str:
        """Say whether columns are stored, whose rows are scattered."""
        return (
            "in Fortran order: their rows lie scattered, and reading a few of them is slow" if header.layout[1] else ""
        )

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return the suffix: every dtype can be stored."""
        return ".npy" if dtype.kind in _NUMERIC_KINDS else None

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of an npy file."""
        del table, embedding_column  # an npy file has no columns
        head = io.BytesIO()
        facts = {"descr": vectors.dtype.str, "fortran_order": False, "shape": vectors.array.shape}
        np.lib.format.write_array_header_1_0(head, facts)
        write(head.getvalue())
        write_rows(write, vectors)

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        return FileHeader(file, rows, dimension, dtype, (file.size - rows * dimension * dtype.itemsize, False))


NPY = _Npy()


def parse_npy(file: StoredFile, size: int, read: Callable[[int, int], bytes], head: bytes = b"") -> tuple[Parsed, int]:
    """Parse the header of an array, which may lie within another file; return it with the position of its data.

    ``size`` are its bytes with the header, -1 where that is not known; ``read`` reads some of these, and ``head`` is
    what is known of the first ones.
    """
    if not head:
        head = read(0, min(NPY.first_nbytes, size) if size >= 0 else _PREFIX_NBYTES)
    if head[:4] == b"PAR1":
        _fail(file, 'it is a parquet file; open it with file_format="parquet"')
    if head[:6] != _MAGIC:
        _fail(
            file,
            f"it starts with {head[:6]!r} where {_MAGIC!r} was expected; what can be read are npy files, and parquet "
            'files with file_format="parquet"',
        )
    if len(head) < _PREFIX_NBYTES or tuple(head[6:8]) not in ((1, 0), (2, 0), (3, 0)):
        _fail(file, f"its npy version is {tuple(head[6:8])}, or it is cut short; (1, 0) to (3, 0) can be read")
    width = 2 if head[6] == 1 else 4
    data_offset = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    if data_offset > _MAX_HEADER_NBYTES or 0 <= size < data_offset:
        _fail(file, f"its header claims {data_offset:,} bytes of the file's {size:,}")
    if data_offset > len(head):
        head += read(len(head), data_offset)
    try:
        return _parse_header(head[:data_offset]), data_offset
    except _TooLongError as error:
        _fail(file, f"its header has {error} bytes: it describes items of many fields, not numbers; {_FIELDS_REMEDY}")
    except Exception as error:
        if re.search(rb"'descr': '.?f1'", head):
            _fail(file, f"its items are <f1: {_NOT_OF_NUMPY['f1']}")
        what = " ".join(str(error).split())
        what = what if len(what) <= 200 else f"{what[:200]}…"  # numpy repeats the header
        raise FormatError(f"{file.url}: not a readable npy file: its header is malformed ({what})") from error


class _TooLongError(Exception):
    """How many bytes a header has of which a hundred would do for an array of numbers."""


@lru_cache(maxsize=256)  # the shards of a collection mostly have equal headers, and numpy takes 40 us to parse one
def _parse_header(head: bytes) -> Parsed:
    stripped = head.rstrip(b" \n")  # numpy refuses long headers, and padding is what makes them long
    width, read = (2, np.lib.format.read_array_header_1_0) if head[6] == 1 else (4, np.lib.format.read_array_header_2_0)
    text = stripped[8 + width :] + b"\n"
    if len(text) > _LONGEST_TEXT:
        raise _TooLongError(f"{len(text):,}")
    if head[6] == 3:
        text.decode()  # what only numpy's private reader of this version demands
    return Parsed(*read(io.BytesIO(len(text).to_bytes(width, "little") + text)))


def rows_and_dimension(file: StoredFile, parsed: Parsed) -> tuple[int, int]:
    """Return what an array holds as vectors, if it does."""
    shape, dtype = parsed.shape, parsed.dtype
    if dtype.hasobject:
        _fail(file, "it holds Python objects, which would have to be unpickled; save an array of numbers instead")
    if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**63 for n in shape):
        _fail(file, f"its header claims the shape {shape}")
    if shape == (0,) or (len(shape) == 2 and shape[0] == 0):
        return 0, shape[1] if len(shape) == 2 else 0
    if dtype.names:
        names = ", ".join(map(repr, dtype.names[:3])) + (", …" if len(dtype.names) > 3 else "")
        _fail(
            file, f"its items have {counted(len(dtype.names), 'field')} ({names[:200]}), not numbers; {_FIELDS_REMEDY}"
        )
    if (kind := f"{dtype.kind}{dtype.itemsize}") in _NOT_OF_NUMPY:
        _fail(file, f"its items are {dtype.str}, {counted(dtype.itemsize, 'byte')} of no type: {_NOT_OF_NUMPY[kind]}")
    if dtype.kind not in _NUMERIC_KINDS:
        _fail(file, f"its items are {dtype}, not numbers; save them as one of numpy's own numeric types")
    if len(shape) != 2 or shape[1] == 0:
        remedy = "np.save(path, array.reshape(-1, dimension)) makes rows of it"
        if len(shape) == 2:
            remedy = "its rows have no items: write the file again, with vectors"
        elif len(shape) == 1:
            remedy += (
                "; of many files of one vector each, paths = sorted(glob.glob('*.npy')), and then "
                "np.save('all/0.npy', np.stack([np.load(path) for path in paths])) make one file"
            )
        _fail(file, f"its array has the shape {shape}, but a collection holds 2-D arrays (rows, dimension); {remedy}")
    return shape[0], shape[1]


def _fail(file: StoredFile, what: str) -> NoReturn:
    raise FormatError(f"{file.url}: not an npy file of embeddings: {what}")


def _read_fortran(header: FileHeader, start: int, rows: int) -> Array:
    """Read rows of a file that stores column after column: a range of each column."""
    itemsize = header.dtype.itemsize
    firsts = [header.layout[0] + (column * header.rows + start) * itemsize for column in range(header.dimension)]
    parts = read_ranges(header.file, [(first, first + rows * itemsize) for first in firsts])
    return np.frombuffer(b"".join(parts), header.dtype).reshape(header.dimension, -1).T
