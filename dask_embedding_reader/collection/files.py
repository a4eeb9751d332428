"""The files of a collection, as columns.

Columns, not a list of objects: a collection may have a million files.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.cached_property import cached_property
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.formats.base import FileHeader, FilePart
from dask_embedding_reader.formats.partitions import partition_types
from dask_embedding_reader.storage.store import Store, StoredFile, Version

Int64s = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class FileTable:
    """The files of a collection, in order, as columns of equal length."""

    stores: tuple[Store, ...]
    """The storages that hold them; most collections have one."""
    store_of: npt.NDArray[np.int16]
    """Which of these each file is in."""
    paths: tuple[str, ...]
    """As the storage writes them."""
    sizes: Int64s
    """Bytes; -1 where the storage does not tell."""
    versions: tuple[Version, ...]
    """Others when the file is another one."""
    offsets: Int64s
    """The first row of each file in the collection, and after the last one the number of rows: one more than files."""
    dimension: int
    """Items in a vector; 0 for files of metadata alone."""
    dtypes: tuple[np.dtype[Any], ...]
    """The dtypes as stored, byte order included."""
    dtype_of: npt.NDArray[np.int16]
    """Which of these each file has."""
    layouts: tuple[tuple[Any, ...], ...]
    """What only the format of the files understands."""
    group_rows: Int64s
    """The rows of every row group (what can only be decoded whole), file after file."""
    first_group: Int64s
    """Where each file's row groups start in ``group_rows``, and where the last one's end."""
    checksums: tuple[str, ...]
    """SHA-256 of each file, where a manifest beside the data tells it; else empty."""
    roots: tuple[str, ...]
    """The folders and files that were named when the collection was opened."""

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"<FileTable of {counted(len(self), 'file')}, {counted(self.count, 'row')}>"

    def __sizeof__(self) -> int:
        """Return the bytes that are held. What is text is alike in all files: of a hundred it is counted."""
        some = range(min(100, len(self)))
        texts = sum(sum(map(sys.getsizeof, (self.paths[k], self.versions[k], *self.versions[k]))) for k in some)
        arrays = sum(column.nbytes for column in vars(self).values() if isinstance(column, np.ndarray))
        return object.__sizeof__(self) + arrays + texts * len(self) // max(1, len(some))

    @property
    def rows(self) -> Int64s:
        """Rows of each file."""
        return np.diff(self.offsets)

    @property
    def count(self) -> int:
        """Rows of all files."""
        return int(self.offsets[-1])

    @property
    def is_local(self) -> bool:
        """Whether all files are read at no cost beside their bytes: elsewhere every read is a request, and waits."""
        return not any(store.request_nbytes for store in self.stores)

    @property
    def connections(self) -> int:
        """How many pieces are read at once, if nobody says."""
        return max(store.connections for store in self.stores)

    @property
    def has_groups(self) -> bool:
        """Whether files consist of row groups, which can only be decoded whole."""
        return len(self.group_rows) > 0

    def url(self, position: int) -> str:
        """Write out the path of a file so that it can be opened again."""
        return self.stores[int(self.store_of[position])].url(self.paths[position])

    def header(self, position: int, start: int = 0, stop: int | None = None) -> FileHeader:
        """Return what is known of one file as a small value; of its row groups those in ``[start, stop)``.

        All of them where ``stop`` is not given, those without rows, too: a manifest tells what the file has.
        """
        file = StoredFile(
            self.stores[self.store_of[position]],
            self.paths[position],
            self.versions[position],
        )
        rows = int(self.offsets[position + 1] - self.offsets[position])
        groups, first, first_row = self._groups(position, start, stop)
        return FileHeader(
            file,
            rows,
            self.dimension,
            self.dtypes[self.dtype_of[position]],
            self.layouts[position],
            groups,
            first,
            first_row,
            partitions=self.partitions,
        )

    def parts(self, start: int, stop: int) -> tuple[FilePart, ...]:
        """Return what holds the rows ``[start, stop)`` of the collection: parts of files, one after the other."""
        first, last = int(self.offsets.searchsorted(start, "right")) - 1, int(self.offsets.searchsorted(stop))
        bounds = self.offsets[first : last + 1].tolist()
        return tuple(
            FilePart(self.header(file, a - low, b - low), a - low, b - low)
            for file, (low, high) in enumerate(pairwise(bounds), first)
            if (a := max(start, low)) < (b := min(stop, high))
        )

    @cached_property
    def partitions(self) -> tuple[tuple[str, str], ...]:
        """The columns that the folders of some files tell, and their types."""
        return tuple(partition_types(self.paths).items())

    def _groups(self, position: int, start: int, stop: int | None) -> tuple[tuple[int, ...], int, int]:
        """Return the row groups of a file in ``[start, stop)``: their rows, the first one, and the row it starts at."""
        low, high = int(self.first_group[position]), int(self.first_group[position + 1])
        if stop is None:
            return tuple(self.group_rows[low:high].tolist()), 0, 0
        if low == high:
            return (), 0, 0
        bounds = self._group_bounds[low : high + 1] - self._group_bounds[low]
        first = max(0, int(bounds.searchsorted(start, "right")) - 1)
        last = int(bounds.searchsorted(stop, "left"))
        return tuple(self.group_rows[low + first : low + last].tolist()), first, int(bounds[first])

    @cached_property
    def _group_bounds(self) -> Int64s:
        """Where row groups start, counted over all files, and after the last one the end."""
        return np.concatenate([[0], np.cumsum(self.group_rows)]).astype(np.int64)

    @cached_property
    def token(self) -> str:
        """A hash of paths, versions and rows: equal in every process, another one when a file changes."""
        digest = hashlib.blake2b(digest_size=16)
        versions = (version.everywhere for version in self.versions)
        for text in (*(store.key for store in self.stores), *self.paths, *versions, *map(str, self.dtypes)):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        for column in (self.store_of, self.offsets, self.dtype_of):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def __dask_tokenize__(self) -> object:
        return "FileTable", self.token


def file_table(headers: Sequence[FileHeader], roots: Sequence[str]) -> FileTable:
    """Turn headers into columns."""
    stores, store_of = _numbered(header.file.store for header in headers)
    dtypes, dtype_of = _numbered(header.dtype for header in headers)
    layouts: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # most files have the same: one value for all of them
    return FileTable(
        stores=stores,
        store_of=store_of,
        paths=tuple(header.file.path for header in headers),
        sizes=np.array([header.file.size for header in headers], np.int64),
        versions=tuple(header.file.version for header in headers),
        offsets=np.cumsum([0, *(header.rows for header in headers)], dtype=np.int64),
        dimension=next((header.dimension for header in headers if header.rows), 0),
        dtypes=dtypes,
        dtype_of=dtype_of,
        layouts=tuple(layouts.setdefault(header.layout, header.layout) for header in headers),
        group_rows=np.array([rows for header in headers for rows in header.group_rows], np.int64),
        first_group=np.cumsum([0, *(len(header.group_rows) for header in headers)], dtype=np.int64),
        checksums=tuple(header.checksum for header in headers),
        roots=tuple(roots),
    )


def _numbered(values: Iterable[T]) -> tuple[tuple[T, ...], npt.NDArray[np.int16]]:
    """Return distinct values, and which one each is. Mostly one follows itself: to hash a file system takes 1 us."""
    numbers: dict[T, int] = {}
    found, last = [], object()
    for value in values:
        if value is not last:
            number = numbers.setdefault(value, len(numbers))
            last = value
        found.append(number)
    return tuple(numbers), np.array(found, np.int16)
