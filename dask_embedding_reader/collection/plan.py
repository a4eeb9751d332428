"""Which rows of which file form which piece: pure arithmetic, no reading, no Dask.

A plan is kept by *segment*, a stretch of a file that is cut into pieces of one size, so that its own size depends on
the number of files and not on the number of pieces. In files of row groups a segment is a row group, or several small
ones: a piece is then either made of whole row groups or a part of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dask_embedding_reader._common.cached_property import cached_property
from dask_embedding_reader.collection.manifest import FileTable, Int64s


class Piece(NamedTuple):
    """A row range of one file."""

    file: int
    """The position of the file in the collection."""
    start: int
    """The first row, counted in the file."""
    stop: int
    """The row after the last one, counted in the file."""


@dataclass(frozen=True)
class ReadPlan:
    """Consecutive rows of a collection as pieces, in order. A sequence of :class:`Piece`."""

    files: FileTable
    """The files."""
    starts: Int64s
    """The first row of each segment, counted in the collection."""
    stop: int
    """The row after the last one, counted in the collection."""
    file_of: Int64s
    """The file of each segment."""
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
        first = int(self.files.offsets[self.file_of[segment]])
        return Piece(int(self.file_of[segment]), start - first, stop - first)

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
        return ReadPlan(self.files, self.starts, self.stop, self.file_of, np.maximum(self._segment_rows, 1))


def make_plan(files: FileTable, start: int, stop: int, max_rows: int) -> ReadPlan:
    """Cut the rows ``[start, stop)`` of a collection into pieces of at most ``max_rows``.

    Pieces end where files end and, in files of row groups, where row groups end: small groups are read together.
    """
    max_rows = min(max_rows, files.count + 1)  # what no integer of numpy can hold means as much
    cuts = _file_bounds(files)
    if files.has_groups:
        cuts = _merge_groups(_group_bounds(files), cuts, max_rows)
    return _plan_of_segments(files, _clip(cuts, start, stop), max_rows)


def plan_metadata(files: FileTable, bounds: Int64s) -> ReadPlan:
    """Cut the same rows of metadata files into what is decoded at once, for pieces with these bounds.

    Where every piece is made of whole row groups, these are the pieces; else the row groups, each decoded once and
    then cut (the pieces may come from npy files, which know nothing of row groups).
    """
    if len(bounds) < 2:
        return _plan_of_segments(files, bounds, 1)
    groups = _clip(_group_bounds(files), int(bounds[0]), int(bounds[-1]))
    return _plan_of_segments(files, bounds if np.isin(bounds, groups).all() else groups, None)


def _plan_of_segments(files: FileTable, cuts: Int64s, max_rows: int | None) -> ReadPlan:
    starts = cuts[:-1]
    rows = np.diff(cuts)
    # Equal pieces, not full ones and a small rest: every task costs the same.
    pieces = 1 if max_rows is None else -(-rows // max_rows)
    file_of = np.searchsorted(files.offsets, starts, "right") - 1
    return ReadPlan(files, starts, int(cuts[-1]) if len(cuts) else 0, file_of, -(-rows // pieces))


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
