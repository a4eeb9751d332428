"""The parquet format: a column of vectors, and columns of metadata beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dask_embedding_reader.formats.base import BaseFormat, Columns, FileHeader, PartReader, StretchReader
from dask_embedding_reader.formats.parquet import read
from dask_embedding_reader.formats.parquet.decode import WINDOW_NBYTES, decoder_nbytes, fetched_nbytes
from dask_embedding_reader.formats.parquet.encode import group_rows, write_parquet
from dask_embedding_reader.formats.parquet.header import find_vectors, read_header
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.store import StoredFile, Write


class _Parquet(BaseFormat):
    name = "parquet"
    suffixes: tuple[str, ...] = (".parquet",)
    first_nbytes = 0  # its footer is at the end
    holds_columns = True
    tells_dtype = False

    def find_vectors(self, file: StoredFile, columns: Columns, head: bytes) -> tuple[Sequence[str] | None, bytes]:
        """Find the columns of numbers in lists of one length."""
        return find_vectors(file, columns), head

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read the footer of a parquet file: rows, row groups, and what the wanted columns hold."""
        del head
        return read_header(file, columns)

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether its rows are those of its row groups."""
        return header.layout == () and sum(header.group_rows) == header.rows

    def open_parts(self, header: FileHeader, columns: Columns, start: int, stop: int) -> PartReader:
        """Return a function that looks up where the next vectors are, and returns what fills arrays with them."""
        return read.open_parts(header, columns, start, stop)

    def count_requests(self, header: FileHeader) -> int:
        """Return how many blocks of the vectors of a row group are fetched on their own."""
        nbytes = max(header.group_rows, default=0) * header.dimension * header.dtype.itemsize
        return max(1, nbytes // WINDOW_NBYTES)

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that fills arrays with some vectors; of those between, plain ones are not even read."""
        return read.open_stretches(header, columns, start, stop)

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what pages, dictionaries and pyarrow's allocator take, and what is fetched from elsewhere."""
        del rows
        nbytes = max(header.group_rows, default=0) * header.dtype.itemsize
        decoders = decoder_nbytes(columns, nbytes)
        if not header.file.store.request_nbytes:
            return decoders
        if isinstance(columns.embedding, tuple):
            return decoders + threads * len(columns.embedding) * fetched_nbytes(nbytes)
        return decoders + threads * fetched_nbytes(nbytes * header.dimension)

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return the suffix: parquet has real numbers of up to 64 bits."""
        return ".parquet" if dtype.kind in "iuf" and dtype.itemsize <= 8 else None

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of a parquet file."""
        write_parquet(write, table, vectors, embedding_column)

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        return FileHeader(file, rows, dimension, dtype, group_rows=group_rows(rows, dimension * dtype.itemsize))


PARQUET = _Parquet()
