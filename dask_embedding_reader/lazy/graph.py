"""A plan as a Dask array and as a Dask DataFrame: with ``streaming.schedule``, the only one to touch Dask's internals.

The array is one lazy layer whose tasks are made when Dask asks for them. Each is a call of Dask's own ``getter`` on a
small lazy array, so that Dask moves slices into it: ``x[:10]`` reads ten rows of a piece, not all of it. Building one
``Delayed`` for each of 150,000 pieces instead takes a minute.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.array.core import getter
from dask.highlevelgraph import HighLevelGraph
from dask.layers import ArrayBlockwiseDep

from dask_embedding_reader.collection.manifest import Int64s, Manifest
from dask_embedding_reader.collection.plan import ReadPlan, make_plan, plan_metadata
from dask_embedding_reader.errors import EmbeddingReaderError, MismatchError, ReadError
from dask_embedding_reader.formats.base import Array, Columns, FileFormat, FileHeader, read_rows
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField, empty_frame, make_frame
from dask_embedding_reader.formats.parquet.read import open_table

_WORTH_SKIPPING_NBYTES = 2**16
"""Rows wanted from one piece are read apart where more than this lies between them: about what a request costs."""


def make_array(manifest: Manifest, start: int, stop: int, max_rows: int, dtype: np.dtype[Any]) -> da.Array:
    """Return the vectors of the rows ``[start, stop)`` as a lazy array, a chunk for each piece."""
    plan = make_plan(manifest.vectors, start, stop, max_rows)
    reads = plan.whole_segments() if manifest.vectors.has_groups else plan
    dep = _PieceDep(manifest, reads, dtype)
    array: da.Array = da.blockwise(
        getter,
        "ij",
        dep,
        "ij",
        (slice(None), slice(None)),
        None,
        align_arrays=False,  # else Dask takes the dep for an array of no axes
        dtype=dtype,
        meta=np.empty((0, 0), dtype),
        name=f"embeddings-{dep.token}",
        _data_producer=True,
    )
    return array if len(reads) == len(plan) else _split(array, reads, plan)


def _split(array: da.Array, reads: ReadPlan, plan: ReadPlan) -> da.Array:
    """Cut chunks into pieces: parts of a row group are cut from the one task that decodes it.

    What ``rechunk`` would do, in a layer that keeps the name and costs less for many chunks.
    """
    name = f"embeddings-{_token(array.name, plan.token)}"
    bounds = plan.bounds
    chunk_of = np.searchsorted(reads.bounds, bounds[:-1], "right") - 1
    starts = bounds[:-1] - reads.bounds[chunk_of]
    stops = bounds[1:] - reads.bounds[chunk_of]
    layer: dict[Any, Any] = {
        (name, piece, 0): (operator.getitem, (array.name, chunk, 0), slice(start, stop))
        for piece, (chunk, start, stop) in enumerate(
            zip(chunk_of.tolist(), starts.tolist(), stops.tolist(), strict=True)
        )
    }
    graph = HighLevelGraph.from_collections(name, layer, dependencies=cast("Any", [array]))
    return da.Array(graph, name, (plan.chunks, array.chunks[1]), meta=array)


def make_metadata_frame(manifest: Manifest, start: int, stop: int, max_rows: int) -> dd.DataFrame:
    """Return the metadata of the rows ``[start, stop)`` as a lazy frame, a partition for each chunk of the array."""
    plan = make_plan(manifest.vectors, start, stop, max_rows)
    reads = plan if manifest.metadata is None else plan_metadata(manifest.metadata, plan.bounds)
    meta = empty_frame(manifest.fields).set_axis(pd.Index([], dtype=np.int64, name=ROW_NUMBER))
    # Our columns have the dtypes they should have; Dask would convert strings to what they are already.
    with dask.config.set({"dataframe.convert-string": False}):
        frame: dd.DataFrame = dd.from_map(
            read_frame,
            _FramePieces(manifest, reads),
            meta=meta,
            divisions=_divisions(reads),
            label="metadata",
        )
    if not np.array_equal(reads.bounds, plan.bounds):
        frame = frame.repartition(divisions=_divisions(plan))
    return frame


def _divisions(plan: ReadPlan) -> tuple[int | None, ...]:
    """Return the first row of each partition and the last row of the last one."""
    if not len(plan):
        return (None, None)
    return (*plan.bounds[:-1].tolist(), plan.stop - 1)


def _token(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The array


class _PieceDep(ArrayBlockwiseDep):
    """What Dask puts into the task of each chunk: made from the plan when it is asked for."""

    def __init__(self, manifest: Manifest, plan: ReadPlan, dtype: np.dtype[Any]) -> None:
        super().__init__((plan.chunks, (manifest.dimension,)))
        self._vectors = manifest.format.vectors
        self._columns = Columns(manifest.columns.embedding, manifest.columns.embedding_dtype)
        self._plan = plan
        self._dtype = dtype
        self.token = _token(plan.token, repr(self._columns), str(dtype))

    def __getitem__(self, index: tuple[int, ...]) -> LazyPiece:
        if not len(self._plan):
            return LazyPiece(_version(), self._vectors, self._columns, self._plan.files.header(0), 0, 0, self._dtype, 0)
        piece = self._plan[index[0]]
        header = self._plan.files.header(*piece)
        first_row = int(self._plan.files.offsets[piece.file]) + piece.start
        return LazyPiece(
            _version(), self._vectors, self._columns, header, piece.start, piece.stop, self._dtype, first_row
        )

    def __dask_tokenize__(self) -> str:
        return self.token


@dataclass(frozen=True, slots=True)
class LazyPiece:
    """The vectors of a piece as an array that is read when it is indexed. Small and picklable: each task holds one."""

    version: str
    """The version of this package that made it. First, so that every version finds it."""
    vectors: FileFormat
    """How to read them."""
    columns: Columns
    """Where they are in the file."""
    header: FileHeader
    """The file."""
    start: int
    """The first row, counted in the file."""
    stop: int
    """The row after the last one."""
    dtype: np.dtype[Any]
    """The dtype wanted."""
    first_row: int
    """The first row, counted in the collection."""

    @property
    def rows(self) -> range:
        """The row numbers in the collection."""
        return range(self.first_row, self.first_row + self.stop - self.start)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and items of a vector."""
        return self.stop - self.start, self.header.dimension

    @property
    def ndim(self) -> int:
        """Two axes, always."""
        return 2

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        del copy  # what is read is always new
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Any) -> Array:
        rows, items = (*index, slice(None))[:2] if isinstance(index, tuple) else (index, slice(None))
        wanted = np.arange(self.shape[0])[rows]
        if wanted.ndim == 0:
            vector: Array = self._read(int(wanted), int(wanted) + 1)[0, items]
            return vector
        vectors = self._take(wanted)
        if isinstance(items, slice) and items == slice(None):
            return vectors
        # A copy: a view of some items would keep the whole piece in memory.
        return vectors[:, items].copy()

    def _take(self, wanted: Int64s) -> Array:
        """Read rows in any order, in as few reads as are worth it."""
        if len(wanted) and (np.diff(wanted) == 1).all():
            return self._read(int(wanted[0]), int(wanted[-1]) + 1)
        rows, positions = np.unique(wanted, return_inverse=True)
        row_nbytes = self.header.dimension * self.header.dtype.itemsize
        gap = len(self.header.group_rows) * self.header.rows or max(1, _WORTH_SKIPPING_NBYTES // row_nbytes)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > gap) + 1)
        parts = [self._read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs if len(run)]
        return np.concatenate([np.empty((0, self.header.dimension), self.dtype), *parts])[positions]

    def _read(self, start: int, stop: int) -> Array:
        with _as_worker(self.version):
            return read_rows(self.vectors, self.header, self.columns, self.start + start, self.start + stop, self.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The frame


class MetaPiece(NamedTuple):
    """The metadata of a piece, before it is read. Small and picklable: each task holds one."""

    version: str
    """The version of this package that made it. First, so that every version finds it."""
    header: FileHeader | None
    """The parquet file; None where no metadata was asked for."""
    fields: tuple[MetaField, ...]
    """All columns of the frame."""
    start: int
    """The first row, counted in the file."""
    stop: int
    """The row after the last one."""
    first_row: int
    """The first row, counted in the collection."""


class _FramePieces(Sequence[MetaPiece]):
    """The pieces of a frame, made from the plan when Dask asks for them."""

    def __init__(self, manifest: Manifest, plan: ReadPlan) -> None:
        self._has_metadata = manifest.metadata is not None
        self._fields = manifest.fields
        self._plan = plan

    def __len__(self) -> int:
        return max(1, len(self._plan))

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= operator.index(position) < len(self):
            raise IndexError(position)
        if not len(self._plan):
            return MetaPiece(_version(), None, self._fields, 0, 0, self._plan.stop)
        piece = self._plan[position]
        files = self._plan.files
        header = files.header(*piece) if self._has_metadata else None
        first_row = int(files.offsets[piece.file]) + piece.start
        return MetaPiece(_version(), header, self._fields, piece.start, piece.stop, first_row)

    def __iter__(self) -> Iterator[MetaPiece]:
        return (self[position] for position in range(len(self)))

    def __dask_tokenize__(self) -> str:
        return _token(self._plan.token, repr(self._fields))


def read_frame(piece: MetaPiece, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a piece; the index is the global row number."""
    index = pd.RangeIndex(piece.first_row, piece.first_row + piece.stop - piece.start, name=ROW_NUMBER)
    fields = [field for name in columns for field in piece.fields if field.name == name]
    if piece.header is None or not fields:
        return empty_frame(fields).set_axis(index) if fields else pd.DataFrame(index=index)
    with _as_worker(piece.version):
        read = open_table(piece.header, [field.name for field in fields], piece.start, piece.stop)
        return make_frame(fields, read(len(index)), index, piece.header.file.url)


# ---------------------------------------------------------------------------------------------------------------------
# On a worker


def _version() -> str:
    # By name: the package itself stands above this module, which it imports.
    return str(sys.modules[__name__.partition(".")[0]].__version__)


@contextmanager
def _as_worker(version: str) -> Iterator[None]:
    """Check that a task was made by this very version, and name the worker in errors that only it may meet."""
    if version != _version():
        raise MismatchError(
            f"this task was made by dask-embedding-reader {version}, but {_worker() or 'this process'} has "
            f"{_version()}; install the same version everywhere"
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
    """Spell the address of the Dask worker that runs this task, if one does."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker  # noqa: PLC0415 - it takes time, and may not be used

    try:
        return f"worker {get_worker().address}"
    except ValueError:
        return None
