"""Selected rows for batches: what is read in one go, and how."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dask_embedding_reader.batches.metadata import Form
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import picked_files, selection_cuts
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.metadata import make_table
from dask_embedding_reader.formats.picking import (
    open_picker,
    open_table_picker,
    read_picked,
    read_picked_table,
)
from dask_embedding_reader.rows.selection import Int64s, Rows

Reader = Callable[[Any], Any]
"""Fills arrays with the next rows; or reads the metadata of the next positions."""


class SelectedRead(NamedTuple):
    """What is read in one go."""

    start: int
    """The first position in the selection."""
    stop: int
    """The position after the last one."""
    open: Callable[[], Reader]
    """Returns what reads it. Reads that follow each other and have the same one are read by the same, in order."""


def vector_reads(
    manifest: Manifest, rows: Rows, span: tuple[int, int], piece_rows: int, bounds: range
) -> Iterator[SelectedRead]:
    """Yield how the vectors of the positions in ``span`` are read: file by file, in pieces that end at bounds too."""
    vectors, files, columns = manifest.format.vectors, manifest.vectors, manifest.columns

    def open_rows(start: int, stop: int, *, at_once: bool) -> Reader:
        """Return what reads selected rows of one file, or of one row group."""
        (picked,) = picked_files(files, rows.at(np.array([start, stop - 1])), ascending=True)
        first, last = int(picked.rows[0]), int(picked.rows[-1])
        pick = None if at_once else open_picker(vectors, columns, picked.header, first, last + 1)

        def read(outs: Sequence[Array]) -> None:
            nonlocal start
            count = sum(map(len, outs))
            numbers = rows.numbers(start, start + count) - picked.first_row
            if pick is None:
                read_picked(vectors, columns, picked.header, numbers, outs)
            else:
                pick(numbers, outs, None)
            start += count

        return read

    return _in_order(files, rows, span, piece_rows, bounds, open_rows)


def metadata_reads(
    manifest: Manifest, files: FileTable, rows: Rows, span: tuple[int, int], step_rows: int, form: Form
) -> Iterator[SelectedRead]:
    """Yield how the metadata of the positions in ``span`` are read."""
    fields = manifest.fields
    names = [field.name for field in fields]

    def open_rows(start: int, stop: int, *, at_once: bool) -> Reader:
        (picked,) = picked_files(files, rows.at(np.array([start, stop - 1])), ascending=True)
        header, first, last = picked.header, int(picked.rows[0]), int(picked.rows[-1])
        pick = None if at_once else open_table_picker(header, names, first, last + 1)

        def read(positions: range) -> tuple[Any, int]:
            numbers = rows.numbers(positions.start, positions.stop)
            here = numbers - picked.first_row
            table = read_picked_table(header, names, here) if pick is None else pick(here)
            return form.make(fields, table, numbers, header.file.url)

        return read

    return _in_order(files, rows, span, step_rows, range(0), open_rows)


def read_metadata(manifest: Manifest, files: FileTable, numbers: Int64s, form: Form) -> Any:
    """Read the metadata of rows in any order, all at once."""
    fields = manifest.fields
    names = [field.name for field in fields]
    picked = list(picked_files(files, numbers, ascending=False))
    tables = [read_picked_table(header, names, rows) for header, _, rows, _ in picked]
    if len(tables) > 1:
        tables = [make_table(fields, table, one.header.file.url) for table, one in zip(tables, picked, strict=True)]
    # A frame for all of them: for each it would take as long, however few rows it has.
    places = np.concatenate([one.places for one in picked if one.places is not None])
    made, _ = form.make(fields, pa.concat_tables(tables), numbers[places], picked[0].header.file.url)
    return form.take(made, np.argsort(places))


def _in_order(
    files: FileTable,
    rows: Rows,
    span: tuple[int, int],
    piece_rows: int,
    bounds: range,
    open_rows: Callable[..., Reader],
) -> Iterator[SelectedRead]:
    """Yield reads of rows that ascend. Where a row group has several pieces, one reader decodes it, once."""
    cuts = span[0] + selection_cuts(files, rows[span[0] : span[1]], piece_rows)
    for start, stop in pairwise(cuts.tolist()):
        inner = bounds[bisect_right(bounds, start) : bisect_left(bounds, stop)]
        pieces = sorted({*range(start, stop, piece_rows), *inner, stop})
        whole = partial(open_rows, start, stop, at_once=False)
        for a, b in pairwise(pieces):
            shared = files.has_groups and len(pieces) > 2
            yield SelectedRead(a, b, whole if shared else partial(open_rows, a, b, at_once=True))
