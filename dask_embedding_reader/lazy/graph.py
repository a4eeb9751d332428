"""A plan as a Dask array and as a Dask DataFrame.

The array is one lazy layer whose tasks are made when Dask asks for them. Each is a call of Dask's own ``getter`` on a
small lazy array, so that Dask moves slices into it: ``x[:10]`` reads ten rows of a piece, not all of it. Building one
``Delayed`` for each of 150,000 pieces instead takes a minute.
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.array.chunk import getitem
from dask.array.core import getter
from dask.base import is_dask_collection
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.layers import ArrayBlockwiseDep

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
from dask_embedding_reader.formats.base import Columns, FilePart
from dask_embedding_reader.formats.metadata import ROW_NUMBER, empty_frame
from dask_embedding_reader.lazy.pieces import (
    LazyPiece,
    LazySelection,
    MetaPiece,
    PickedMetaPiece,
    PickedRows,
    package_version,
    read_frame,
)
from dask_embedding_reader.rows.picked import pack
from dask_embedding_reader.rows.selection import Rows

AnyPlan = ReadPlan | SelectionPlan
"""Consecutive rows, or selected ones."""


def computed(value: Any) -> Any:
    """Return what a Dask collection holds, and anything else as it is."""
    return value.compute() if is_dask_collection(value) else value


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
                package_version(), self._vectors, self._columns, (FilePart(files.header(0), 0, 0),), self._dtype, 0
            )
        if isinstance(self._plan, SelectionPlan):
            picked = _pick(self._plan, index[0])
            return LazySelection(package_version(), self._vectors, self._columns, picked, files.dimension, self._dtype)
        start, stop = self._plan[index[0]]
        return LazyPiece(package_version(), self._vectors, self._columns, files.parts(start, stop), self._dtype, start)

    def __dask_tokenize__(self) -> str:
        return self.token


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


# ---------------------------------------------------------------------------------------------------------------------
# The frame


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
            return MetaPiece(package_version(), (), self._fields, range(self._plan.stop, self._plan.stop))
        if isinstance(self._plan, SelectionPlan):
            picked = _pick(self._plan, position)
            return PickedMetaPiece(
                package_version(), picked if self._has_metadata else picked._replace(files=()), self._fields
            )
        rows = range(*self._plan[position])
        parts = self._plan.files.parts(rows.start, rows.stop) if self._has_metadata else ()
        return MetaPiece(package_version(), parts, self._fields, rows)

    def __iter__(self) -> Iterator[MetaPiece | PickedMetaPiece]:
        return (self[position] for position in range(len(self)))

    def __dask_tokenize__(self) -> str:
        return _token(self._plan.token, repr(self._fields))
