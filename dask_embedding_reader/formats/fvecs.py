"""The files of vectors of the TEXMEX corpora and faiss: ``fvecs``, ``ivecs`` and ``bvecs``.

Each row is its dimension, a little-endian ``int32``, and its items: of 4, 4 and 1 bytes [1]_.

References
----------
.. [1] http://corpus-texmex.irisa.fr
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.base import (
    Array,
    BaseFormat,
    Columns,
    FileHeader,
    Stretch,
    StretchReader,
)
from dask_embedding_reader.formats.raw import (
    as_bytes,
    dtype_by_name,
    naming_rows,
    open_block_stretches,
    raw_held_nbytes,
    read_blocks,
    suffix_of_dtype,
)
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.read import read_range, try_read_in_turn
from dask_embedding_reader.storage.store import StoredFile, Write

_PREFIX_NBYTES = 4

_LONG_NBYTES = 2**11
"""Items of so many bytes are read straight to their places, for 150 ns a row; to copy shorter ones takes less."""

_BLOCK_NBYTES = 2**20
"""What is written at once."""

_DTYPES: dict[str, np.dtype[Any]] = {".fvecs": np.dtype("<f4"), ".ivecs": np.dtype("<i4"), ".bvecs": np.dtype("u1")}


class _Fvecs(BaseFormat):
    name = "fvecs"
    suffixes: tuple[str, ...] = tuple(_DTYPES)
    first_nbytes = _PREFIX_NBYTES
    holds_columns = False
    tells_dtype = False
    find_vectors = None

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read the dimension of the first row; the size of the file tells how many there are."""
        dtype = dtype_by_name(file, _DTYPES, columns)
        if file.size < 0:
            _fail(file, "the storage does not tell its size, and nothing else tells how many rows it has")
        if file.size < _PREFIX_NBYTES:
            _fail(file, f"it has {file.size} bytes, less than the 4 of a dimension; write it again")
        [dimension] = np.frombuffer(head[:_PREFIX_NBYTES] or read_range(file, 0, _PREFIX_NBYTES), "<i4").tolist()
        row_nbytes = _PREFIX_NBYTES + dimension * dtype.itemsize
        if dimension < 1 or row_nbytes > file.size:
            _fail(
                file,
                f"its first row claims {dimension:,} items of {dtype} in a file of {file.size:,} bytes; write it again",
            )
        rows, rest = divmod(file.size, row_nbytes)
        if rest:
            _fail(
                file,
                f"its first row has {dimension:,} items of {dtype}, and its {file.size:,} bytes are {rows:,} such rows "
                f"and {rest:,} bytes more: it was cut short, or its rows differ; write it again",
            )
        return FileHeader(file, rows, dimension, dtype)

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether the file is as long as its rows."""
        row_nbytes = _row_type(header).itemsize
        return header.layout == () and not header.group_rows and header.file.size == header.rows * row_nbytes

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that reads stretches of rows, and checks that each row has the same dimension."""
        del columns, start, stop
        row_type, file, items_nbytes = _row_type(header), header.file, header.dimension * header.dtype.itemsize

        def check(dimensions: Array, row: int) -> None:
            if len(odd := np.flatnonzero(dimensions != header.dimension)):
                _fail(
                    file,
                    f"row {row + int(odd[0]):,} has {dimensions[odd[0]]:,} items, but the first row "
                    f"{header.dimension:,}; write it again",
                )

        def items(blocks: Iterator[Array], row: int) -> Iterator[Array]:
            for block in blocks:
                check(block["dimension"], row)
                yield block["items"]
                row += len(block)

        read_cast = open_block_stretches(file, 0, row_type, items)

        def read(stretches: Sequence[Stretch]) -> None:
            for row, out in stretches:
                if out.dtype != header.dtype:
                    read_cast([(row, out)])
                    continue
                start, dimensions = row * row_type.itemsize, np.empty(len(out), "<i4")
                if items_nbytes < _LONG_NBYTES or not try_read_in_turn(
                    file,
                    start,
                    as_bytes(dimensions),
                    np.full(len(out), _PREFIX_NBYTES),
                    as_bytes(out),
                    np.full(len(out), items_nbytes),
                ):
                    # All dimensions are checked at once: with those of each block apart, as where rows are cast, 400 MB
                    # of rows of 128 and 256 floats took 0.35 to 0.49 s/GB instead of 0.30 to 0.34.
                    done = 0
                    with naming_rows(row, row + len(out)):
                        for block in read_blocks(file, start, row_type, len(out)):
                            here = slice(done, done := done + len(block))
                            out[here], dimensions[here] = block["items"], block["dimension"]
                check(dimensions, row)

        return read

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what answers hold, or blocks from which items are taken."""
        del columns
        return raw_held_nbytes(header, rows, threads)

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return the suffix that tells the dtype, if there is one."""
        return suffix_of_dtype(_DTYPES, dtype)

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of a file."""
        del table, embedding_column  # such a file has no columns
        row_type = _type_of_rows(vectors.dimension, vectors.dtype)
        step = max(1, _BLOCK_NBYTES // row_type.itemsize)
        for start in range(0, len(vectors.array), step):
            stored = vectors.stored(start, start + step)
            block = np.empty(len(stored), row_type)
            block["dimension"], block["items"] = vectors.dimension, stored
            write(block.view(np.uint8).data)

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        return FileHeader(file, rows, dimension, dtype)


FVECS = _Fvecs()


def _row_type(header: FileHeader) -> np.dtype[Any]:
    return _type_of_rows(header.dimension, header.dtype)


def _type_of_rows(dimension: int, dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype([("dimension", "<i4"), ("items", dtype, (dimension,))])


def _fail(file: StoredFile, what: str) -> NoReturn:
    raise FormatError(f"{file.url}: not a readable fvecs file: {what}")
