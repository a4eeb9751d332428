"""What a file format must offer, and the formats there are.

A collection has vectors, and perhaps metadata. A :class:`VectorFormat` reads vectors from files of one kind; metadata
always comes from parquet columns, in the same files or in files beside them. A :class:`Format` combines the two.
A new format is one module here and one line in :func:`get_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dask_embedding_reader._common.memory import new_array
from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.storage.read import StoredFile

Array = npt.NDArray[Any]

DEFAULT_PIECE_NBYTES = 32_000_000
"""The size of a piece in stored bytes, where the caller does not say: large enough that a request to a remote store
and a Dask task are worth their cost; small enough that glibc uses the memory of one chunk again for the next (blocks
of more than 32 MiB it gets from the kernel anew, page by page, which takes longer than reading them)."""


class Columns(NamedTuple):
    """Which columns of a parquet file are wanted."""

    embedding: str | None = None
    """The column of vectors; ``None`` for a file of metadata alone."""
    embedding_dtype: np.dtype[Any] | None = None
    """The dtype of the items of a column of vectors that is binary, which does not tell it itself."""
    meta: tuple[str, ...] = ()
    """The metadata columns, in the order wanted."""


class MetaColumn(NamedTuple):
    """What one file holds for one metadata column."""

    type: pa.DataType
    """Its Arrow type, dictionaries decoded."""
    has_nulls: bool
    """False only where the file proves that no value is null."""


class FileHeader(NamedTuple):
    """What a file says of itself, read from a few bytes of it. Small and picklable: it travels in every task."""

    file: StoredFile
    """The file."""
    rows: int
    """Number of rows."""
    dimension: int
    """Items in a vector; 0 where the file cannot tell (it has no rows, or only metadata)."""
    dtype: np.dtype[Any]
    """Type of an item as stored, byte order included."""
    data_offset: int = 0
    """npy: where the first vector starts, in bytes."""
    fortran_order: bool = False
    """npy: whether the file stores column after column."""
    group_rows: tuple[int, ...] = ()
    """parquet: the rows of each row group, the smallest part of the file that can be decoded alone."""
    first_group: int = 0
    """parquet: the first row group in ``group_rows``; a task knows only those that it reads."""
    first_group_row: int = 0
    """parquet: the row of the file where that row group starts."""
    meta: tuple[MetaColumn, ...] = ()
    """parquet: one for each metadata column that was asked for."""
    checksum: str = ""
    """The SHA-256 of the file, from the manifest beside it; empty where that is not known."""


RowReader = Callable[[Sequence[Array]], None]
"""Fills C-contiguous 2-D arrays, one after the other, with the next rows of a file.

Their dtype may differ from the stored one: the values are cast on the way, in one pass.
"""


class VectorFormat(Protocol):
    """How to read vectors from files of one kind."""

    suffix: str
    """What the names of such files end in."""

    first_nbytes: int
    """How many bytes at the beginning of a file hold its header, mostly; 0 where it is elsewhere."""

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read what the file says of itself; raise ``FormatError`` where that cannot be right.

        ``head`` is what is known of its first bytes already.
        """

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that fills arrays with the rows ``[start, stop)``, each call where the last one ended."""


class Format(NamedTuple):
    """A way to lay out a collection in files."""

    name: str
    vectors: VectorFormat
    metadata: str
    """Where metadata columns are: ``"none"``, in the ``"same"`` files, or in files ``"beside"`` them."""


def read_rows(
    vectors: VectorFormat,
    header: FileHeader,
    columns: Columns,
    start: int,
    stop: int,
    dtype: npt.DTypeLike | None = None,
) -> Array:
    """Read the rows ``[start, stop)`` of a file into a new array; by default it keeps the stored dtype."""
    out = new_array(
        (stop - start, header.dimension), np.dtype(header.dtype.newbyteorder("=") if dtype is None else dtype)
    )
    if stop > start:
        vectors.open_rows(header, columns, start, stop)([out])
    return out


def get_format(name: str) -> Format:
    """Return a format by name.

    Raises
    ------
    ArgumentError
        If there is none of that name.
    """
    from dask_embedding_reader.formats import npy  # noqa: PLC0415 - they need the classes above
    from dask_embedding_reader.formats.parquet import read as parquet  # noqa: PLC0415 - they need the classes above

    formats = {
        "npy": Format("npy", npy.NPY, "none"),
        "parquet": Format("parquet", parquet.PARQUET, "same"),
        "parquet_npy": Format("parquet_npy", npy.NPY, "beside"),
    }
    if name not in formats:
        raise ArgumentError(f"unknown file_format {name!r}; the formats are {', '.join(map(repr, formats))}")
    return formats[name]


def default_piece_rows(byte_per_item: int, nbytes: int = DEFAULT_PIECE_NBYTES) -> int:
    """Return how many rows make a piece of the default size."""
    return max(1, nbytes // max(1, byte_per_item))
