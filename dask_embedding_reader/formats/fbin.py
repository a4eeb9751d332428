"""The files of vectors of DiskANN, cuVS and big-ann-benchmarks: ``fbin``, and its siblings of other dtypes.

Two little-endian ``uint32``, the rows and the dimension, and then the vectors, row after row [1]_. What an item is, the
suffix tells.

References
----------
.. [1] https://github.com/harsha-simhadri/big-ann-benchmarks/blob/main/benchmark/dataset_io.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.raw import RawVectors, dtype_by_name, raw_header_fits, suffix_of_dtype, write_rows
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import StoredFile, Write

_HEADER_NBYTES = 8

_DTYPES: dict[str, np.dtype[Any]] = {
    ".fbin": np.dtype("<f4"),
    ".f16bin": np.dtype("<f2"),
    ".u8bin": np.dtype("u1"),
    ".i8bin": np.dtype("i1"),
    ".ibin": np.dtype("<i4"),
}


class _Fbin(RawVectors):
    name = "fbin"
    suffixes: tuple[str, ...] = tuple(_DTYPES)
    first_nbytes = _HEADER_NBYTES
    holds_columns = False
    tells_dtype = False
    find_vectors = None

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read the rows and the dimension; the size of the file has to agree."""
        dtype = dtype_by_name(file, _DTYPES, columns)
        if 0 <= file.size < _HEADER_NBYTES:
            raise FormatError(
                f"{file.url}: not an fbin file: it has {file.size} bytes, less than its header of 8; write it again"
            )
        rows, dimension = np.frombuffer(head[:_HEADER_NBYTES] or read_range(file, 0, _HEADER_NBYTES), "<u4").tolist()
        needed = _HEADER_NBYTES + rows * dimension * dtype.itemsize
        if rows and not dimension:
            raise FormatError(f"{file.url}: its header claims {rows:,} vectors of no items; write it again")
        if file.size not in (-1, needed):
            raise FormatError(f"{file.url}: {_explain(file, rows, dimension, dtype, needed)}")
        return FileHeader(file, rows, dimension, dtype, (_HEADER_NBYTES,))

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether the file is as long as its vectors."""
        return header.layout == (_HEADER_NBYTES,) and raw_header_fits(header)

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return the suffix that tells the dtype, if there is one."""
        return suffix_of_dtype(_DTYPES, dtype)

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of a file."""
        del table, embedding_column  # such a file has no columns
        write(np.array(vectors.array.shape, "<u4").tobytes())
        write_rows(write, vectors)

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        return FileHeader(file, rows, dimension, dtype, (_HEADER_NBYTES,))


FBIN = _Fbin()


def _explain(file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any], needed: int) -> str:
    """Say why a file is not as long as its header promises."""
    promised = (
        f"its header promises {rows:,} rows of {dimension:,} x {dtype}, {needed:,} bytes in all, but the file has"
    )
    if file.size == _HEADER_NBYTES + rows * dimension * 8:
        return (
            f"{promised} {file.size:,}: that is the size of a file of true neighbours, which holds numbers of rows and "
            "then distances, and no vectors; leave it out, or move it"
        )
    items_nbytes = file.size - _HEADER_NBYTES
    named = [suffix for suffix, other in _DTYPES.items() if items_nbytes == rows * dimension * other.itemsize]
    if named:
        return f"{promised} {file.size:,}, as one of {' or '.join(named)} has: rename it"
    if file.size > needed:
        return f"{promised} {file.size:,}: it is none, or something was written behind it; write the file again"
    whole, rest = divmod(items_nbytes, dimension * dtype.itemsize)
    cropped = f", {whole:,} rows exactly: it was cropped, correct its header or" if not rest else "; it was cut short:"
    return f"{promised} {file.size:,}{cropped} write the file again"
