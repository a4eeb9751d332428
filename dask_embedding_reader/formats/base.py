"""What a file format must offer.

A collection has vectors, and perhaps metadata. A :class:`FileFormat` reads vectors from files of one kind, and writes
them; metadata always comes from parquet columns, in the same files or in files beside them. A :class:`Format` combines
the two. A new format is one module here and one line in ``registry``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dask_embedding_reader._common.threads import map_at_once
from dask_embedding_reader.storage.store import StoredFile, most_requests

if TYPE_CHECKING:
    from dask_embedding_reader.formats.vectors import Vectors
    from dask_embedding_reader.storage.store import Write

Array = npt.NDArray[Any]
R = TypeVar("R")

DEFAULT_PIECE_NBYTES = 32_000_000
"""The size of a piece in stored bytes, where the caller does not say: large enough that a request to a remote store
and a Dask task are worth their cost; small enough that glibc uses the memory of one chunk again for the next (blocks
of more than 32 MiB it gets from the kernel anew, page by page, which takes longer than reading them)."""


class Columns(NamedTuple):
    """Which columns of a parquet file are wanted."""

    embedding: str | tuple[str, ...] | None = None
    """The column of vectors, or those of their items in order; ``None`` for a file of metadata alone."""
    embedding_dtype: np.dtype[Any] | None = None
    """The dtype of the items of a column of vectors that is binary, which does not tell it itself."""
    meta: tuple[str, ...] = ()
    """The metadata columns, in the order wanted."""
    glob: str = ""
    """Where the columns of items were named by a pattern: that, for other columns that it would name. Not kept."""

    @property
    def column(self) -> str:
        """The column of vectors, where that is one."""
        return self.embedding if isinstance(self.embedding, str) else ""

    @property
    def vectors(self) -> tuple[str, ...]:
        """All columns that vectors are in."""
        return self.embedding if isinstance(self.embedding, tuple) else () if self.embedding is None else (self.column,)


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
    layout: tuple[Any, ...] = ()
    """What only the format of the file understands, such as where its first vector starts, as values that JSON has."""
    group_rows: tuple[int, ...] = ()
    """The rows of each part of the file that can only be decoded whole; none where rows can be read one by one."""
    first_group: int = 0
    """The first of these in ``group_rows``; a task knows only those that it reads."""
    first_group_row: int = 0
    """The row of the file where that part starts."""
    meta: tuple[MetaColumn, ...] = ()
    """One for each metadata column that was asked for."""
    checksum: str = ""
    """The SHA-256 of the file, from the manifest beside it; empty where that is not known."""
    partitions: tuple[tuple[str, str], ...] = ()
    """Columns that the folders of files of the collection tell, as in ``lang=en``, and their types."""


class FilePart(NamedTuple):
    """A row range of one file."""

    header: FileHeader
    """The file."""
    start: int
    """The first row, counted in the file."""
    stop: int
    """The row after the last one."""

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start


RowReader = Callable[[Sequence[Array]], None]
"""Fills C-contiguous 2-D arrays, one after the other, with the next rows of a file.

Their dtype may differ from the stored one: the values are cast on the way, in one pass.
"""


PartReader = Callable[[Sequence[Array]], "Callable[[], None] | None"]
"""The same in two steps: it returns what fills the arrays, in any thread, while the next rows are looked up and read.

Nothing is returned where they have been filled already.
"""


Stretch = tuple[int, Array]
"""The row of a file that a 2-D array begins with, and the array, which is to be filled from there on."""

StretchReader = Callable[[Sequence[Stretch]], None]
"""Fills arrays with stretches of rows of a file, which ascend, also from one call to the next.

As for :data:`RowReader`, the dtype of an array may be another one; the stored one, byte order included, is the fastest.
"""


def in_order(read: StretchReader, start: int) -> RowReader:
    """Return a function that fills arrays with the rows of a file from one on, each call where the last one ended."""

    def read_next(outs: Sequence[Array]) -> None:
        nonlocal start
        for out in outs:
            read([(start, out)])
            start += len(out)

    return read_next


VectorFinder = Callable[[StoredFile, Columns, bytes], tuple[Sequence[str] | None, bytes]]
"""Given a file, what is wanted of it, and its ``head`` (see :meth:`FileFormat.read_header`), returns the names of the
columns that may be those of vectors, and what is known of the head now. ``DEFAULT_COLUMN`` is the only one where there
is one; None where the file cannot tell, because it has no rows."""

DEFAULT_COLUMN = "embedding"
"""What the column of vectors is called, if nobody says otherwise."""


class FileFormat(Protocol):
    """Files of one kind: how vectors are read from them and written to them."""

    name: str
    """What users call it."""

    suffixes: tuple[str, ...]
    """What the names of such files end in."""

    first_nbytes: int
    """How many bytes at the beginning of a file hold its header, mostly; 0 where it is elsewhere."""

    holds_columns: bool
    """Whether metadata columns lie in the same files."""

    tells_dtype: bool
    """Whether every such file tells the dtype of its items: else who opens it may have to."""

    @property
    def find_vectors(self) -> VectorFinder | None:
        """Find the columns of a file that may be those of vectors; None where vectors have no name."""

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read what the file says of itself; raise ``FormatError`` where that cannot be right.

        ``head`` is what is known already of its first bytes, or of its last ones where ``first_nbytes`` is 0.
        """

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether a header that was saved in a manifest, which anybody may have written, can be right."""

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that fills arrays with the rows ``[start, stop)``, each call where the last one ended."""

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that fills arrays with some of the rows ``[start, stop)``, in ascending order."""

    def raw_offset(self, header: FileHeader) -> int | None:
        """Return the byte from which on the vectors lie as in memory; None where they do not."""

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what reading pieces of so many rows in so many threads holds, beside the arrays that are filled."""

    def drawback(self, header: FileHeader) -> str:
        """Say what makes such a file slow to read, as in "in Fortran order"; nothing where it is not slow."""

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return what the name of a file of this dtype ends in; None where no such file can hold it."""

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of a file: vectors, and their metadata where it ``holds_columns``."""

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        """Return what ``read_header`` says of a file that ``write`` wrote; None where only a look at it tells."""


class BaseFormat(ABC):
    """What a format does that says nothing else: the next rows are a stretch, and rows lie anyhow."""

    @abstractmethod
    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that fills arrays with some of the rows."""

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that fills arrays with the next rows."""
        return in_order(self.open_stretches(header, columns, start, stop), start)

    def raw_offset(self, header: FileHeader) -> int | None:
        """Return nothing: vectors lie in parts, have something between them, or are encoded."""
        del header
        return None

    def drawback(self, header: FileHeader) -> str:
        """Say nothing: rows can be read one by one, or row groups are looked at by who knows how large they are."""
        del header
        return ""

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        """Return nothing: the end of a file tells, which pyarrow or zipfile wrote."""
        del file, rows, dimension, dtype
        return None


@runtime_checkable
class GroupedFormat(FileFormat, Protocol):
    """Files of which parts (``group_rows`` of their headers) may have to be decoded whole, but need not."""

    def open_parts(self, header: FileHeader, columns: Columns, start: int, stop: int) -> PartReader:
        """Return a function that fills arrays with the rows ``[start, stop)``, several parts of them at a time."""

    def count_requests(self, header: FileHeader) -> int:
        """Return how many requests for the largest part of a remote file may be under way at the same time."""


class Format(NamedTuple):
    """A way to lay out a collection in files."""

    name: str
    """What users call it."""
    vectors: FileFormat
    """How vectors are stored."""
    metadata: str
    """Where metadata columns are: ``"none"``, in the ``"same"`` files, or in parquet files ``"beside"`` them."""


def cut_parts(parts: Iterable[FilePart], start: int, stop: int) -> Iterator[FilePart]:
    """Return what holds the rows ``[start, stop)`` of parts of files that follow each other."""
    first = 0
    for part in parts:
        a, b = max(start, first) - first, min(stop, first + part.rows) - first
        if a < b:
            yield FilePart(part.header, part.start + a, part.start + b)
        first += part.rows


def read_parts(vectors: FileFormat, columns: Columns, parts: Sequence[FilePart], out: Array) -> None:
    """Fill an array with the vectors of parts of files, one below the other."""
    ends = np.cumsum([part.rows for part in parts]).tolist()

    def read(part: FilePart, end: int) -> None:
        vectors.open_rows(part.header, columns, part.start, part.stop)([out[end - part.rows : end]])

    for_each_file(read, [part.header for part in parts], parts, ends)


def for_each_file(function: Callable[..., R], headers: Sequence[FileHeader], *columns: Sequence[Any]) -> list[R]:
    """Call a function with a value of each column, file by file; for all at once where they are elsewhere: it waits."""
    return map_at_once(most_requests(header.file.store for header in headers), function, *columns)


def default_piece_rows(byte_per_item: int, nbytes: int = DEFAULT_PIECE_NBYTES) -> int:
    """Return how many rows make a piece of the default size."""
    return max(1, nbytes // max(1, byte_per_item))
