"""A plan as a Dask array and as a Dask DataFrame.

The array is one lazy layer whose tasks are made when Dask asks for them. Each is a call of Dask's own ``getter`` on a
small lazy array, so that Dask moves slices into it: ``x[:10]`` reads ten rows of a piece, not all of it. Building one
``Delayed`` for each of 150,000 pieces instead takes a minute.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.array.chunk import getitem
from dask.array.core import getter
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.layers import ArrayBlockwiseDep

from dask_embedding_reader._common.memory import new_array
from dask_embedding_reader.collection.files import Int64s
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import (
    ReadPlan,
    SelectionPlan,
    make_plan,
    picked_files,
    plan_metadata,
    plan_selected_metadata,
    plan_selection,
    selection_cuts,
)
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
from dask_embedding_reader.rows.picked import Packed, pack
from dask_embedding_reader.rows.selection import Rows

AnyPlan = ReadPlan | SelectionPlan
"""Consecutive rows, or selected ones."""


def make_array(manifest: Manifest, start: int, stop: int, max_rows: int, dtype: np.dtype[Any]) -> da.Array:
    """Return the vectors of the rows ``[start, stop)`` as a lazy array, a chunk for each piece."""
    plan = make_plan(manifest.vectors, start, stop, max_rows)
    reads = plan.whole_segments() if manifest.vectors.has_groups else plan
    return _make_array(manifest, reads, plan, dtype)


def make_selected_array(manifest: Manifest, rows: Rows, max_rows: int, dtype: np.dtype[Any]) -> da.Array:
    """Return the vectors of selected rows as a lazy array."""
    plan = plan_selection(manifest.vectors, rows, max_rows)
    reads = plan
    if manifest.vectors.has_groups and rows.is_ascending:  # each row group is decoded once, and then cut
        cuts = selection_cuts(manifest.vectors, rows, max_rows)
        reads = SelectionPlan(plan.files, rows, cuts[np.isin(cuts, plan.bounds)])
    return _make_array(manifest, reads, plan, dtype)


def _make_array(manifest: Manifest, reads: AnyPlan, plan: AnyPlan, dtype: np.dtype[Any]) -> da.Array:
    """Return an array of which some chunks are read together, and then cut."""
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
    return array if len(reads) == len(plan) else _split(array, dep, reads, plan)


def _split(array: da.Array, dep: _PieceDep, reads: AnyPlan, plan: AnyPlan) -> da.Array:
    """Cut chunks into pieces: parts of a row group are cut from the one task that decodes it.

    What ``rechunk`` would do, in a layer that keeps the name and costs less for many chunks.
    """
    name = f"embeddings-{_token(array.name, plan.token)}"
    bounds = plan.bounds
    chunk_of = np.searchsorted(reads.bounds, bounds[:-1], "right") - 1
    starts = bounds[:-1] - reads.bounds[chunk_of]
    stops = bounds[1:] - reads.bounds[chunk_of]
    cuts = zip(chunk_of.tolist(), starts.tolist(), stops.tolist(), strict=True)
    graph = HighLevelGraph.from_collections(
        name, _CutLayer(name, array.name, list(cuts), dep), dependencies=cast("Any", [array])
    )
    return da.Array(graph, name, (plan.chunks, array.chunks[1]), meta=array)


class _CutLayer(MaterializedLayer):
    """Pieces that are cut from chunks; where few pieces of a chunk are wanted, each is read by itself.

    So ten rows of a row group are read alone, wherever they lie, and a pass over all rows decodes it once.
    """

    def __init__(self, name: str, chunks_name: str, cuts: list[tuple[int, int, int]], dep: _PieceDep) -> None:
        super().__init__(
            {
                # Dask's own function and an index of each axis: a slice of what it gives is moved into it.
                (name, piece, 0): (getitem, (chunks_name, chunk, 0), (slice(start, stop), slice(None)))
                for piece, (chunk, start, stop) in enumerate(cuts)
            }
        )
        self._name, self._cuts, self._dep = name, cuts, dep

    def cull(self, keys: set[Any], all_hlg_keys: Collection[Any]) -> tuple[Layer, Mapping[Any, set[Any]]]:
        """Return what gives some pieces, and which chunks each of them needs."""
        layer, found = super().cull(keys, all_hlg_keys)
        tasks, needs = dict(layer), cast("dict[Any, set[Any]]", dict(found))
        wanted_of = Counter(self._cuts[piece][0] for _, piece, _ in needs)
        # By bisection, as chunks ascend: to count the pieces of all of them takes longer than to read some rows.
        pieces_of = {
            chunk: bisect_left(self._cuts, (chunk + 1,)) - bisect_left(self._cuts, (chunk,)) for chunk in wanted_of
        }
        for key in list(needs):
            chunk, start, stop = self._cuts[key[1]]
            if wanted_of[chunk] <= _FEW_PIECES < pieces_of[chunk]:
                rows = (f"rows-of-{self._name}", chunk)
                tasks[rows] = self._dep[chunk, 0]
                tasks[key] = (getter, rows, (slice(start, stop), slice(None)))
                needs[key] = needs[rows] = set()
        return MaterializedLayer(tasks, annotations=self.annotations), needs


_FEW_PIECES = 2
"""So many pieces of a chunk are read by themselves: a stretch of rows that is shorter than a piece lies in two."""


def make_metadata_frame(manifest: Manifest, start: int, stop: int, max_rows: int) -> dd.DataFrame:
    """Return the metadata of the rows ``[start, stop)`` as a lazy frame, a partition for each chunk of the array."""
    plan = make_plan(manifest.vectors, start, stop, max_rows)
    reads = plan if manifest.metadata is None else plan_metadata(manifest.metadata, plan.bounds)
    return _make_frame(manifest, reads, plan)


def make_selected_frame(manifest: Manifest, rows: Rows, max_rows: int) -> dd.DataFrame:
    """Return the metadata of selected rows as a lazy frame, a partition for each chunk of the array."""
    plan = plan_selection(manifest.vectors, rows, max_rows)
    reads = plan if manifest.metadata is None else plan_selected_metadata(manifest.metadata, plan)
    return _make_frame(manifest, reads, plan)


def _make_frame(manifest: Manifest, reads: AnyPlan, plan: AnyPlan) -> dd.DataFrame:
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


def _divisions(plan: AnyPlan) -> tuple[int | None, ...]:
    """Return the first row of each partition and the last row of the last one, where they ascend."""
    if not len(plan):
        return (None, None)
    if isinstance(plan, ReadPlan):
        return (*plan.bounds[:-1].tolist(), plan.stop - 1)
    if not plan.rows.is_ascending:
        return (None,) * (len(plan) + 1)
    return tuple(plan.rows.at(np.append(plan.bounds[:-1], plan.stop - 1)).tolist())


def _token(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The array


class _PieceDep(ArrayBlockwiseDep):
    """What Dask puts into the task of each chunk: made from the plan when it is asked for."""

    def __init__(self, manifest: Manifest, plan: AnyPlan, dtype: np.dtype[Any]) -> None:
        super().__init__((plan.chunks, (manifest.dimension,)))
        self._vectors = manifest.format.vectors
        self._columns = Columns(manifest.columns.embedding, manifest.columns.embedding_dtype)
        self._plan = plan
        self._dtype = dtype
        self.token = _token(plan.token, repr(self._columns), str(dtype))

    def __getitem__(self, index: tuple[int, ...]) -> LazyPiece | LazySelection:
        files = self._plan.files
        if not len(self._plan):
            return LazyPiece(
                _version(), self._vectors, self._columns, (FilePart(files.header(0), 0, 0),), self._dtype, 0
            )
        if isinstance(self._plan, SelectionPlan):
            picked = _pick(self._plan, index[0])
            return LazySelection(_version(), self._vectors, self._columns, picked, files.dimension, self._dtype)
        start, stop = self._plan[index[0]]
        return LazyPiece(_version(), self._vectors, self._columns, files.parts(start, stop), self._dtype, start)

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
        """Read rows in any order, these alone where they lie apart."""
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


def _pick(plan: SelectionPlan, piece: int) -> PickedRows:
    """Return the rows of a piece, in their smallest form."""
    start, stop = int(plan.bounds[piece]), int(plan.bounds[piece + 1])
    numbers = plan.rows.numbers(start, stop)
    files = picked_files(plan.files, numbers, ascending=plan.rows.is_ascending)
    # What is computed is not sent, unless it takes a list of rows to compute it.
    rows = plan.rows[start:stop] if plan.rows.nbytes < _FEW_NBYTES else pack(numbers)
    return PickedRows(
        rows, stop - start, plan.rows.is_ascending, tuple((file.first_row, file.header) for file in files)
    )


_FEW_NBYTES = 500
"""Of a selection that takes no more, each task holds all."""


@dataclass(frozen=True, slots=True)
class LazySelection:
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

    @property
    def ndim(self) -> int:
        """Two axes, always."""
        return 2

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        del copy  # what is read is always new
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Any) -> Array:
        rows, items = (*index, slice(None))[:2] if isinstance(index, tuple) else (index, slice(None))
        numbers = self.picked.numbers()[rows]
        if numbers.ndim == 0:
            vector: Array = self._read(numbers.reshape(1), ascending=True)[0, items]
            return vector
        ascending = self.picked.is_ascending and isinstance(rows, slice) and (rows.step or 1) > 0
        vectors = self._read(numbers, ascending=ascending)
        # A copy: a view of some items would keep all of them in memory.
        return vectors if isinstance(items, slice) and items == slice(None) else vectors[:, items].copy()

    def _read(self, numbers: Int64s, *, ascending: bool) -> Array:
        out = new_array((len(numbers), self.dimension), self.dtype)

        def read(header: FileHeader, rows: Int64s, places: Int64s | None) -> None:
            read_picked(self.vectors, self.columns, header, rows, [out], places)

        with _as_worker(self.version):
            if files := list(self.picked.split(numbers, ascending=ascending)):
                for_each_file(read, [header for header, _, _ in files], *zip(*files, strict=True))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# The frame


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


class _FramePieces(Sequence["MetaPiece | PickedMetaPiece"]):
    """The pieces of a frame, made from the plan when Dask asks for them."""

    def __init__(self, manifest: Manifest, plan: AnyPlan) -> None:
        self._has_metadata = manifest.metadata is not None
        self._fields = manifest.fields
        self._plan = plan

    def __len__(self) -> int:
        return max(1, len(self._plan))

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= operator.index(position) < len(self):
            raise IndexError(position)
        if not len(self._plan):
            return MetaPiece(_version(), (), self._fields, range(self._plan.stop, self._plan.stop))
        if isinstance(self._plan, SelectionPlan):
            picked = _pick(self._plan, position)
            return PickedMetaPiece(
                _version(), picked if self._has_metadata else picked._replace(files=()), self._fields
            )
        rows = range(*self._plan[position])
        parts = self._plan.files.parts(rows.start, rows.stop) if self._has_metadata else ()
        return MetaPiece(_version(), parts, self._fields, rows)

    def __iter__(self) -> Iterator[MetaPiece | PickedMetaPiece]:
        return (self[position] for position in range(len(self)))

    def __dask_tokenize__(self) -> str:
        return _token(self._plan.token, repr(self._fields))


def read_frame(piece: MetaPiece | PickedMetaPiece, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a piece; the index is the global row number."""
    if isinstance(piece, PickedMetaPiece):
        return _read_picked_frame(piece, columns)
    index = pd.RangeIndex(piece.rows, name=ROW_NUMBER)
    fields = [field for name in columns for field in piece.fields if field.name == name]
    if not piece.parts or not fields:
        return empty_frame(fields).set_axis(index) if fields else pd.DataFrame(index=index)
    with _as_worker(piece.version):
        return make_frame(fields, read_columns(piece.parts, fields), index, piece.parts[0].header.file.url)


def _read_picked_frame(piece: PickedMetaPiece, columns: Sequence[str]) -> pd.DataFrame:
    picked = piece.picked
    numbers = picked.numbers()
    index = pd.Index(numbers, name=ROW_NUMBER)
    fields = [field for name in columns for field in piece.fields if field.name == name]
    if not picked.files or not fields:
        return pd.DataFrame(index=index)
    with _as_worker(piece.version):
        files = picked.split(numbers, ascending=picked.is_ascending)
        return read_picked_frame(fields, files).set_axis(index)


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
    """Write out the address of the Dask worker that runs this task, if one does."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker  # noqa: PLC0415 - it takes time, and may not be used

    try:
        return f"worker {get_worker().address}"
    except ValueError:
        return None
