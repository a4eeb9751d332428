"""Which rows of which file form which piece: pure arithmetic, no reading, no Dask.

A plan is kept by *segment*, a stretch of a file that is cut into pieces of one size, so that its own size depends on
the number of files and not on the number of pieces. In files of row groups a segment is a row group, or several small
ones: a piece is then either made of whole row groups or a part of one. Several small files are one segment, and one
piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dask_embedding_reader._common.arguments import ALL_ROWS
from dask_embedding_reader._common.cached_property import cached_property
from dask_embedding_reader.collection.files import FileTable, Int64s
from dask_embedding_reader.formats.base import FileHeader
from dask_embedding_reader.formats.picking import split_by_file
from dask_embedding_reader.rows.selection import Rows
from dask_embedding_reader.rows.shuffled import epoch_of
from dask_embedding_reader.rows.stretch import Stretch


class Piece(NamedTuple):
    """A row range of one file, or of several small ones."""

    start: int
    """The first row, counted in the collection."""
    stop: int
    """The row after the last one."""


@dataclass(frozen=True)
class ReadPlan:
    """Consecutive rows of a collection as pieces, in order. A sequence of :class:`Piece`."""

    files: FileTable
    """The files."""
    starts: Int64s
    """The first row of each segment, counted in the collection."""
    stop: int
    """The row after the last one, counted in the collection."""
    piece_rows: Int64s
    """Rows of a piece, for each segment; its last piece may have fewer."""

    @cached_property
    def first_piece(self) -> Int64s:
        """The first piece of each segment, and after the last one the number of pieces."""
        return np.concatenate([[0], np.cumsum(-(-self._segment_rows // self.piece_rows))]).astype(np.int64)

    @property
    def _segment_rows(self) -> Int64s:
        return np.diff(np.append(self.starts, self.stop))

    def __len__(self) -> int:
        return int(self.first_piece[-1])

    def __getitem__(self, position: int) -> Piece:
        if not 0 <= position < len(self):
            raise IndexError(f"piece {position} of a plan of {len(self)}")
        segment = int(np.searchsorted(self.first_piece, position, "right")) - 1
        rows = int(self.piece_rows[segment])
        start = int(self.starts[segment]) + (position - int(self.first_piece[segment])) * rows
        stop = min(start + rows, int(self.starts[segment + 1]) if segment + 1 < len(self.starts) else self.stop)
        return Piece(start, stop)

    @cached_property
    def bounds(self) -> Int64s:
        """The first row of each piece, counted in the collection, and after the last one the end."""
        counts = np.diff(self.first_piece)
        within = np.arange(len(self)) - np.repeat(self.first_piece[:-1], counts)
        return np.append(np.repeat(self.starts, counts) + within * np.repeat(self.piece_rows, counts), self.stop)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Rows of each piece, as Dask wants them: no piece at all is one chunk of no rows."""
        return tuple(np.diff(self.bounds).tolist()) or (0,)

    @cached_property
    def token(self) -> str:
        """A hash of the files and the row ranges, equal in every process."""
        digest = hashlib.blake2b(self.files.token.encode(), digest_size=16)
        for column in (self.starts, self.piece_rows, np.array([self.stop])):
            digest.update(np.ascontiguousarray(column, np.int64).tobytes())
        return digest.hexdigest()

    def whole_segments(self) -> ReadPlan:
        """Return the plan that reads each segment as one piece."""
        return ReadPlan(self.files, self.starts, self.stop, self._segment_rows)


_FEWEST_PIECES = 16
"""Small files are read together as long as so many pieces are left: few files stay the chunks that they were, and all
processors have something to do."""

_MOST_FILES = 64
"""A piece has no more files than this: their headers, of some 150 bytes, travel in its task. Of 5,000 files of four
rows 79 pieces are left, for which Dask takes a tenth of a second."""


def make_plan(files: FileTable, start: int, stop: int, max_rows: int, most_files: int = _MOST_FILES) -> ReadPlan:
    """Cut the rows ``[start, stop)`` of a collection into pieces of at most ``max_rows``.

    Pieces end where files end and, in files of row groups, where row groups end: small groups are read together, and
    so are small files, unless pieces may have all rows of a file (``ALL_ROWS``).
    """
    bounds = cuts = _file_bounds(files)
    joined_rows = 0 if max_rows >= ALL_ROWS else min(max_rows, -(-files.count // _FEWEST_PIECES))
    if files.has_groups:
        cuts = _merge_groups(_group_bounds(files), cuts, max_rows)
    cuts = np.setdiff1d(
        cuts, np.setdiff1d(bounds, _join_small(bounds, joined_rows, most_files), assume_unique=True), assume_unique=True
    )
    return _plan_of_segments(files, _clip(cuts, start, stop), max_rows)


def plan_metadata(files: FileTable, bounds: Int64s) -> ReadPlan:
    """Cut the same rows of metadata files into what is decoded at once, for pieces with these bounds.

    Where every piece is made of whole row groups, these are the pieces; else the row groups, each decoded once and
    then cut (the pieces may come from npy files, which know nothing of row groups).
    """
    groups = _clip(_group_bounds(files), int(bounds[0]), int(bounds[-1]))
    return _plan_of_segments(files, bounds if np.isin(bounds, groups).all() else groups, None)


# ---------------------------------------------------------------------------------------------------------------------
# Selections


_TASK_NBYTES = 2_500
"""Picked rows of one piece take so many bytes at most, nearly: they travel in its task."""


@dataclass(frozen=True)
class SelectionPlan:
    """Selected rows of a collection as pieces, in order; a piece may have rows of several files."""

    files: FileTable
    """The files."""
    rows: Rows
    """The rows."""
    bounds: Int64s
    """The position of each piece in the selection, and after the last one the number of rows."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def stop(self) -> int:
        """The number of rows."""
        return int(self.bounds[-1])

    @property
    def chunks(self) -> tuple[int, ...]:
        """Rows of each piece, as Dask wants them: no piece at all is one chunk of no rows."""
        return tuple(np.diff(self.bounds).tolist()) or (0,)

    @cached_property
    def token(self) -> str:
        """A hash of the files, the rows and the pieces, equal in every process."""
        digest = hashlib.blake2b(f"{self.files.token} {self.rows.token}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.bounds, np.int64).tobytes())
        return digest.hexdigest()


class PickedFile(NamedTuple):
    """Rows of one file that are read together."""

    header: FileHeader
    """What is known of the file."""
    first_row: int
    """Its first row, counted in the collection."""
    rows: Int64s
    """Which rows, counted in the file: none is less than the one before."""
    places: Int64s | None
    """Where each of them goes; None where they go one after the other."""


def picked_files(files: FileTable, numbers: Int64s, *, ascending: bool) -> Iterator[PickedFile]:
    """Sort row numbers of a collection by file."""
    for file, rows, places in split_by_file(files.offsets, numbers, ascending=ascending):
        header = files.header(file, int(rows[0]), int(rows[-1]) + 1)
        yield PickedFile(header, int(files.offsets[file]), rows, places)


def count_by_file(offsets: Int64s, rows: Rows) -> Int64s:
    """Return how many of the selected rows each file has; of an epoch and its shards, where its rows come from."""
    epoch = epoch_of(rows)
    if epoch is not None and not rows.is_ascending:
        rows = epoch.of
    if rows.is_ascending:
        return np.diff(rows.search(offsets))
    found = np.zeros(len(offsets) - 1, np.int64)
    for start in range(0, len(rows), _COUNTED_ROWS):
        numbers = rows.numbers(start, min(start + _COUNTED_ROWS, len(rows)))
        found += np.bincount(np.searchsorted(offsets, numbers, "right") - 1, minlength=len(found))
    return found


_COUNTED_ROWS = 2**20


def plan_selection(files: FileTable, rows: Rows, max_rows: int) -> SelectionPlan:
    """Cut selected rows of a collection into pieces of at most ``max_rows``.

    Of rows that ascend pieces end where files end, or row groups, unless these have few of them; a piece of a
    shuffled selection has rows of anywhere.
    """
    if not rows.is_ascending:
        cuts = np.concatenate([[0], rows.windows(0, len(rows)), [len(rows)]])
        return SelectionPlan(files, rows, _cut_evenly(cuts, max_rows))
    if not files.has_groups and not isinstance(rows, Stretch):
        max_rows = min(max_rows, max(256, _TASK_NBYTES * len(rows) // rows.nbytes))
    cuts = selection_cuts(files, rows, max_rows)
    return SelectionPlan(files, rows, _cut_evenly(_join_small(cuts, max_rows, _MOST_FILES), max_rows))


def selection_cuts(files: FileTable, rows: Rows, max_rows: int) -> Int64s:
    """Return the positions where an ascending selection goes on to another file, or to another row group."""
    cuts = _file_bounds(files)
    if files.has_groups:
        cuts = _merge_groups(_group_bounds(files), cuts, max_rows)
    return np.unique(rows.search(cuts))


def plan_selected_metadata(files: FileTable, plan: SelectionPlan) -> SelectionPlan:
    """Cut the same rows of metadata files into what is decoded at once, for the pieces of a plan.

    Where rows ascend, each row group is decoded once and then cut, unless no piece parts one.
    """
    if not plan.rows.is_ascending:
        return SelectionPlan(files, plan.rows, plan.bounds)
    groups = np.unique(plan.rows.search(_group_bounds(files)))
    return SelectionPlan(files, plan.rows, plan.bounds if np.isin(plan.bounds, groups).all() else groups)


def _cut_evenly(cuts: Int64s, max_rows: int) -> Int64s:
    """Cut what lies between two cuts into equal pieces."""
    rows = np.diff(cuts)
    pieces = -(-rows // max_rows)
    sizes = -(-rows // np.maximum(pieces, 1))
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    bounds: Int64s = np.append(np.repeat(cuts[:-1], pieces) + within * np.repeat(sizes, pieces), cuts[-1])
    return np.unique(bounds)


def _join_small(cuts: Int64s, max_rows: int, most_files: int) -> Int64s:
    """Leave out cuts between neighbours that fit into one piece, if there are not too many of them."""
    if len(cuts) < 3 or (cuts[2:] - cuts[:-2]).min() > max_rows:
        return cuts
    last, kept = len(cuts) - 1, [0]
    while kept[-1] < last:
        place = kept[-1]
        fitting = int(cuts.searchsorted(cuts[place] + max_rows, "right")) - 1
        kept.append(min(max(fitting, place + 1), place + most_files, last))
    return cuts[kept]


def _plan_of_segments(files: FileTable, cuts: Int64s, max_rows: int | None) -> ReadPlan:
    starts = cuts[:-1]
    rows = np.diff(cuts)
    # Equal pieces, not full ones and a small rest: every task costs the same.
    pieces = 1 if max_rows is None else -(-rows // max_rows)
    return ReadPlan(files, starts, int(cuts[-1]), -(-rows // pieces))


def _file_bounds(files: FileTable) -> Int64s:
    return np.unique(files.offsets)  # files of no rows give equal ones


def _group_bounds(files: FileTable) -> Int64s:
    return np.unique(np.concatenate([[0], np.cumsum(files.group_rows)])).astype(np.int64)


def _clip(cuts: Int64s, start: int, stop: int) -> Int64s:
    """Return the cuts of the range ``[start, stop)``, its ends included."""
    if start >= stop:
        return np.array([start], np.int64)
    inside = cuts[(cuts > start) & (cuts < stop)]
    return np.concatenate([[start], inside, [stop]]).astype(np.int64)


def _merge_groups(groups: Int64s, files: Int64s, max_rows: int) -> Int64s:
    """Leave out the bounds between neighbouring row groups of a file that fit into one piece."""
    ends_of_files: Sequence[int] = np.isin(groups, files).tolist()
    kept, last = [0], 0
    for position, bound in enumerate(groups.tolist()[1:-1], start=1):
        following = int(groups[position + 1])
        if ends_of_files[position] or following - last > max_rows:
            kept.append(bound)
            last = bound
    return np.array([*kept, groups[-1]] if len(groups) > 1 else kept, np.int64)
