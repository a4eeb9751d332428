"""What tasks hold: pieces of an array or a frame, which a worker reads. Small and picklable."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dask_embedding_reader._common.memory import new_array
from dask_embedding_reader.collection.files import Int64s
from dask_embedding_reader.errors import EmbeddingReaderError, MismatchError, ReadError
from dask_embedding_reader.formats.base import (
    Array,
    Columns,
    FileFormat,
    FileHeader,
    FilePart,
    cut_parts,
    for_each_file,
    read_parts,
)
from dask_embedding_reader.formats.columns import read_columns
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField, empty_frame, make_frame
from dask_embedding_reader.formats.picking import read_picked, read_picked_frame, split_by_file
from dask_embedding_reader.rows.picked import Packed
from dask_embedding_reader.rows.selection import Rows


class _LazyRows(ABC):
    """Vectors as an array that is read when it is indexed."""

    __slots__ = ()

    @property
    def ndim(self) -> int:
        """Two axes, always."""
        return 2

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        del copy  # what is read is always new
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Any) -> Array:
        """Read some of them."""
        rows, items = (*index, slice(None))[:2] if isinstance(index, tuple) else (index, slice(None))
        wanted = self._numbers()[rows]
        if wanted.ndim == 0:
            vector: Array = self._take(wanted.reshape(1))[0, items]
            return vector
        vectors = self._take(wanted)
        # A copy: a view of some items would keep all of them in memory.
        return vectors if isinstance(items, slice) and items == slice(None) else vectors[:, items].copy()

    @abstractmethod
    def _numbers(self) -> Int64s:
        """Return the numbers that rows are told by."""

    @abstractmethod
    def _take(self, wanted: Int64s) -> Array:
        """Read rows in any order, these alone where they lie apart."""


@dataclass(frozen=True, slots=True)
class LazyPiece(_LazyRows):
    """The vectors of a piece as an array that is read when it is indexed. Small and picklable: each task holds one."""

    version: str
    """The version of this package that made it. First, so that every version finds it."""
    vectors: FileFormat
    """How to read them."""
    columns: Columns
    """Where they are in the files."""
    parts: tuple[FilePart, ...]
    """The files, one or several small ones, and which rows of them."""
    dtype: np.dtype[Any]
    """The dtype wanted."""
    first_row: int
    """The first row, counted in the collection."""

    @property
    def rows(self) -> range:
        """The row numbers in the collection."""
        return range(self.first_row, self.first_row + self.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and items of a vector."""
        return sum(part.rows for part in self.parts), self.parts[0].header.dimension

    def _numbers(self) -> Int64s:
        return np.arange(self.shape[0])

    def _take(self, wanted: Int64s) -> Array:
        if len(wanted) and (np.diff(wanted) == 1).all():
            return self._read(int(wanted[0]), int(wanted[-1]) + 1)
        out = new_array((len(wanted), self.parts[0].header.dimension), self.dtype)
        starts = np.cumsum([0, *(part.rows for part in self.parts[:-1])])

        def read(number: int, rows: Int64s, places: Int64s | None) -> None:
            part = self.parts[number]
            read_picked(self.vectors, self.columns, part.header, rows + part.start, [out], places)

        with _as_worker(self.version):
            if picked := list(split_by_file(starts, wanted, ascending=False)):
                headers = [self.parts[number].header for number, _, _ in picked]
                for_each_file(read, headers, *zip(*picked, strict=True))
        return out

    def _read(self, start: int, stop: int) -> Array:
        parts = tuple(cut_parts(self.parts, start, stop)) or self.parts[:1]
        out = new_array((sum(part.rows for part in parts), parts[0].header.dimension), self.dtype)
        with _as_worker(self.version):
            read_parts(self.vectors, self.columns, parts, out)
        return out


class PickedRows(NamedTuple):
    """Selected rows of some files. Small and picklable: a task holds it."""

    rows: Packed | Rows
    """Their numbers in the collection, in order."""
    length: int
    """How many there are."""
    is_ascending: bool
    """Whether each is greater than the one before."""
    files: tuple[tuple[int, FileHeader], ...]
    """The files that hold them, and the first row of each, counted in the collection."""

    def numbers(self) -> Int64s:
        """Return the row numbers."""
        return self.rows.numbers()

    def split(self, numbers: Int64s, *, ascending: bool) -> Iterator[tuple[FileHeader, Int64s, Int64s | None]]:
        """Sort some of the numbers by file."""
        offsets = np.array([first for first, _ in self.files], np.int64)
        for file, rows, places in split_by_file(offsets, numbers, ascending=ascending):
            yield self.files[file][1], rows, places


@dataclass(frozen=True, slots=True)
class LazySelection(_LazyRows):
    """The vectors of selected rows as an array that is read when it is indexed."""

    version: str
    """The version of this package that made it. First, so that every version finds it."""
    vectors: FileFormat
    """How to read them."""
    columns: Columns
    """Where they are in the files."""
    picked: PickedRows
    """Which rows."""
    dimension: int
    """Items of a vector."""
    dtype: np.dtype[Any]
    """The dtype wanted."""

    @property
    def rows(self) -> Int64s:
        """The row numbers in the collection."""
        return self.picked.numbers()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and items of a vector."""
        return self.picked.length, self.dimension

    def _numbers(self) -> Int64s:
        return self.picked.numbers()

    def _take(self, wanted: Int64s) -> Array:
        out = new_array((len(wanted), self.dimension), self.dtype)
        ascending = bool((wanted[1:] >= wanted[:-1]).all())

        def read(header: FileHeader, rows: Int64s, places: Int64s | None) -> None:
            read_picked(self.vectors, self.columns, header, rows, [out], places)

        with _as_worker(self.version):
            if files := list(self.picked.split(wanted, ascending=ascending)):
                for_each_file(read, [header for header, _, _ in files], *zip(*files, strict=True))
        return out


class MetaPiece(NamedTuple):
    """The metadata of a piece, before it is read. Small and picklable: each task holds one."""

    version: str
    """The version of this package that made it. First, so that every version finds it."""
    parts: tuple[FilePart, ...]
    """The parquet files, one or several small ones, and which rows of them; none where no metadata was asked for."""
    fields: tuple[MetaField, ...]
    """All columns of the frame."""
    rows: range
    """The row numbers in the collection."""


class PickedMetaPiece(NamedTuple):
    """The metadata of selected rows, before they are read."""

    version: str
    """The version of this package that made it. First, so that every version finds it."""
    picked: PickedRows
    """Which rows; of no files where no metadata was asked for."""
    fields: tuple[MetaField, ...]
    """All columns of the frame."""


def read_frame(piece: MetaPiece | PickedMetaPiece, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a piece; the index is the global row number."""
    fields = [field for name in columns for field in piece.fields if field.name == name]
    if isinstance(piece, PickedMetaPiece):
        return _read_picked_frame(piece, fields)
    index = pd.RangeIndex(piece.rows, name=ROW_NUMBER)
    if not piece.parts or not fields:
        return empty_frame(fields).set_axis(index) if fields else pd.DataFrame(index=index)
    with _as_worker(piece.version):
        return make_frame(fields, read_columns(piece.parts, fields), index, piece.parts[0].header.file.url)


def _read_picked_frame(piece: PickedMetaPiece, fields: Sequence[MetaField]) -> pd.DataFrame:
    picked = piece.picked
    numbers = picked.numbers()
    index = pd.Index(numbers, name=ROW_NUMBER)
    if not picked.files or not fields:
        return pd.DataFrame(index=index)
    with _as_worker(piece.version):
        files = picked.split(numbers, ascending=picked.is_ascending)
        return read_picked_frame(fields, files).set_axis(index)


# ---------------------------------------------------------------------------------------------------------------------
# On a worker


def package_version() -> str:
    """Return the version of this package."""
    # By name: the package itself stands above this module, which it imports.
    return str(sys.modules[__name__.partition(".")[0]].__version__)


@contextmanager
def _as_worker(version: str) -> Iterator[None]:
    """Check that a task was made by this very version, and name the worker in errors that only it may meet."""
    if version != package_version():
        raise MismatchError(
            f"this task was made by dask-embedding-reader {version}, but {_worker() or 'this process'} has "
            f"{package_version()}; install the same version everywhere"
        )
    try:
        yield
    except EmbeddingReaderError as error:
        worker = _worker()
        if worker is None:
            raise
        hint = ", which has to reach the file by the same path" if isinstance(error, ReadError) else ""
        raise type(error)(f"{error} (on {worker}{hint})") from error


def _worker() -> str | None:
    """Write out the address of the Dask worker that runs this task, if one does."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker  # noqa: PLC0415 - it takes time, and may not be used

    try:
        return f"worker {get_worker().address}"
    except ValueError:
        return None
