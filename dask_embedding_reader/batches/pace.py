"""How much of a collection is read at once and how far ahead, and what that takes: arithmetic, and nothing is read."""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

import numpy as np

from dask_embedding_reader._common.budget import Projection
from dask_embedding_reader.batches.request import BatchRequest
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.formats import columns
from dask_embedding_reader.formats.base import DEFAULT_PIECE_NBYTES, FileHeader, GroupedFormat, default_piece_rows
from dask_embedding_reader.formats.parquet.decode import DECODER_NBYTES
from dask_embedding_reader.formats.picking import SCRATCH_NBYTES

_LOCAL_PIECE_NBYTES = 8 * 2**20
"""Local pieces: large enough that a read costs nothing beside its bytes, small enough that all threads get some."""

_MIN_PIECE_NBYTES = 2**18

_SPARE_NBYTES = 2**25
"""Of batches of up to so many bytes one more is had: threads that are done need not wait until the caller lets go of
one. 1 GB in batches of 16 MB took 0.068 instead of 0.083 s, in batches of 50 MB the same time."""

MOST_FILES = 64
"""Of small files so many are read by one job, which takes ten times as long as to read a row."""

MOST_REMOTE_FILES = 8
"""The same of metadata elsewhere: as many are asked for at the same time, by each of the threads that read."""

_METADATA_ROWS = 65_536
"""Rows of metadata that are decoded and turned into a frame together, if they are not wide.

In steps of 8,192 an integer and a text cost 0.034 s beside the vectors of 400 MB, and 0.019 in these: what pandas does
for a frame, however few rows it has, keeps those waiting that decode vectors.
"""

_LEAST_METADATA_ROWS = 64

METADATA_ROW_NBYTES = 256
"""What a row of metadata is taken to weigh until the first have been seen."""

PICKED_ROW_NBYTES = 32
"""What the number of a row that was picked takes while it is read: itself, where it is in a file and in memory, and
copies of these while they are sorted and compared. Of vectors of 4 bytes it is the most of what is held."""

_FRAME_TIMES = 3
"""Text weighs so many times as much while it is turned into Python's strings, as in ``batches.metadata``."""


class Pace(NamedTuple):
    """How much is read at once, how far ahead, and what it weighs."""

    threads: int
    """Pieces read at the same time."""
    piece_rows: int
    """Rows of a piece."""
    is_large: bool
    """Whether batches have several pieces, which are cut where batches end."""
    ahead_rows: int
    """So many rows behind the batch that is asked for are worth reading."""
    most_batches: int | None
    """Batches worth having, with the one that is worked on; None for as many as there is room for."""
    metadata_rows: int
    """Rows of metadata that are decoded and turned into a frame together."""
    metadata_row_nbytes: int
    """What one of these weighs, as far as files tell."""
    reading_nbytes: int
    """What reading itself holds beside batches: decoders, the bodies of answers, what rows are picked from."""


def make_pace(manifest: Manifest, request: BatchRequest, *, decodes_groups: bool) -> Pace:
    """Choose what suits the files, their storage and the memory limit.

    Where row groups must be decoded whole, as many are read ahead as are read at once.
    """
    vectors, limit = manifest.vectors, request.limit_nbytes
    local = vectors.is_local
    threads = count_threads(manifest, request)
    rows = request.max_piece_rows
    if rows is None:
        most = min(_LOCAL_PIECE_NBYTES if local else DEFAULT_PIECE_NBYTES, limit // (4 * threads))
        rows = default_piece_rows(read_row_nbytes(manifest, request), max(_MIN_PIECE_NBYTES, most))
    is_large = local and request.batch_rows > rows
    if is_large and request.max_piece_rows is None:
        # Pieces of one size, as many for each thread: the next batch has no memory before this one is done, and whoever
        # has read its last piece would wait for the others (batches of 2.4 pieces kept 85 % of two threads busy).
        rows = -(-request.batch_rows // (threads * -(-request.batch_rows // (threads * rows))))
    lanes = count_lanes(manifest, request, threads)
    parallel_rows = lanes * max(rows, int(vectors.group_rows.max()) if decodes_groups else 0)
    # Remote pieces end with their files. A batch and a piece for each connection keep all busy: more takes memory.
    ahead = lanes * (4 * rows if local else min(rows, int(vectors.rows.max())))
    row_nbytes = metadata_row_nbytes(manifest)
    spare = int(request.batch_rows * manifest.dimension * request.dtype.itemsize <= _SPARE_NBYTES)
    return Pace(
        threads,
        rows,
        is_large,
        ahead_rows=max(request.batch_rows, ahead, parallel_rows if vectors.has_groups else 0),
        # Those being filled, the one that the caller works on, and a spare one unless they are large.
        most_batches=-(-parallel_rows // request.batch_rows) + 1 + spare if is_large else None,
        # Text that a dictionary holds once may be much wider than files tell.
        metadata_rows=max(_LEAST_METADATA_ROWS, min(_METADATA_ROWS, limit // (64 * max(1, row_nbytes)))),
        metadata_row_nbytes=row_nbytes,
        reading_nbytes=reading_nbytes(manifest, request, rows, threads),
    )


def count_threads(manifest: Manifest, request: BatchRequest) -> int:
    """Return how many threads read: as many as suit the storage, unless what these hold elsewhere is half the limit."""
    most = request.threads or manifest.vectors.connections
    if request.threads or manifest.vectors.is_local:
        return most
    held = partial(manifest.format.vectors.held_nbytes, largest_header(manifest.vectors), manifest.columns, 1)
    return max(1, min(most, request.limit_nbytes // (2 * max(1, held(2) - held(1)))))


def count_lanes(manifest: Manifest, request: BatchRequest, threads: int) -> int:
    """Return how many pieces, or row groups, are read at the same time: one in each thread.

    But where each of them keeps several connections busy, only as many as keep all of them so, or as there are
    processors: of more, all but the first would only wait in memory. 600 MB of vectors in row groups of 200 MB took 0.5
    GB instead of 1.0 and, as new memory is slow, 0.6 s instead of 0.9 to 1.2.
    """
    vectors, files = manifest.format.vectors, manifest.vectors
    if files.is_local or request.rows is not None or not isinstance(vectors, GroupedFormat):
        return threads
    requests = vectors.count_requests(largest_header(files))
    return min(threads, max(os.cpu_count() or 1, -(-threads // requests)))


def project_batches(manifest: Manifest, request: BatchRequest) -> Projection:
    """Return what reading the batches of rows that ascend holds."""
    pace = make_pace(manifest, request, decodes_groups=manifest.vectors.has_groups)
    rows = request.stop - request.start
    batch_rows = max(1, min(request.batch_rows, rows))
    row_nbytes = manifest.dimension * request.dtype.itemsize + pace.metadata_row_nbytes
    batches = min(rows, 2 * batch_rows) * row_nbytes
    piece_rows = 0 if pace.is_large else pace.piece_rows
    held = 2 * batch_rows + -(-(pace.ahead_rows + pace.piece_rows) // batch_rows) * batch_rows
    if pace.most_batches is not None:
        held = min(held, pace.most_batches * batch_rows)
    # The last batch is shorter, and made in memory of its own.
    reading = (min(rows, 2 * batch_rows + piece_rows) + rows % batch_rows) * row_nbytes - batches
    reading += pace.metadata_rows * pace.metadata_row_nbytes + pace.reading_nbytes
    return Projection(batches, reading, max(0, min(rows, held) - 2 * batch_rows - piece_rows) * row_nbytes)


def read_row_nbytes(manifest: Manifest, request: BatchRequest) -> int:
    """Return what a row takes while it is read: its vector, and its number if it was picked."""
    return manifest.byte_per_item + (0 if request.rows is None else PICKED_ROW_NBYTES)


def metadata_row_nbytes(manifest: Manifest) -> int:
    """Return what a row of metadata weighs: as far as a footer tells that is at hand, the one that was read last."""
    files = manifest.metadata
    if files is None:
        return 0
    names = [field.name for field in manifest.fields]
    told = next(filter(None, (columns.row_nbytes(files.header(place), names) for place in (len(files) - 1, 0))), 0)
    return max(METADATA_ROW_NBYTES, _FRAME_TIMES * told)


def reading_nbytes(manifest: Manifest, request: BatchRequest, rows: int, threads: int) -> int:
    """Return what reading pieces of so many rows holds beside batches: decoders, answers, what rows are picked from."""
    header = largest_header(manifest.vectors)
    nbytes = manifest.format.vectors.held_nbytes(header, manifest.columns, min(rows, header.rows), threads)
    nbytes += DECODER_NBYTES if manifest.metadata is not None else 0
    if request.rows is None:
        return nbytes
    return nbytes + threads * (SCRATCH_NBYTES + min(rows, header.rows) * PICKED_ROW_NBYTES)


def largest_header(files: FileTable) -> FileHeader:
    """Return the header of the file that has the largest row group, or the most rows."""
    if files.has_groups:
        return files.header(int(np.searchsorted(files.first_group, int(files.group_rows.argmax()), "right")) - 1)
    return files.header(int(files.rows.argmax()))
