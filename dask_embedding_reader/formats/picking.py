"""Picked rows of files: near ones are read at once, each is put where it belongs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from dask_embedding_reader.formats.arrow_types import takeable
from dask_embedding_reader.formats.base import (
    Array,
    Columns,
    FileFormat,
    FileHeader,
    Stretch,
    StretchReader,
    for_each_file,
)
from dask_embedding_reader.formats.casting import CheckedCast
from dask_embedding_reader.formats.columns import iter_columns, step_rows
from dask_embedding_reader.formats.metadata import MetaField, empty_frame, make_frame, make_table
from dask_embedding_reader.formats.raw import try_read_runs

Int64s = npt.NDArray[np.int64]

_GAP_NBYTES = 2**15
"""Rows are read together where less lies between them: to read on costs what another call costs (32 to 64 KB, with
what Python does for it)."""

_RUN_NBYTES = 2**10
"""Runs of neighbours of so many bytes, on average, are read straight to their places, passing over what lies between
them: that takes 150 ns for each, and picking from memory 230 ns for 1 kB."""

_LONG_NBYTES = 2**18
"""So many neighbours are read alone, straight to their place: to copy them would cost more than a call."""

SCRATCH_NBYTES = 2**22
"""As much is read at once from which rows are picked: it stays near the processor, and its memory is used again."""

_REMOTE_REQUESTS = 64
"""Ranges of a file that are asked for at once."""

_FEW_ROWS = 16
"""To look how so many rows lie takes as long as a call for each."""

_SHORT_ROWS = 16
"""To copy so many rows twice costs as much as a call for them."""


class Picked(NamedTuple):
    """Rows of one file."""

    file: int
    """Its position among the files."""
    rows: Int64s
    """Which rows, counted in the file: none is less than the one before."""
    places: Int64s | None
    """Where each of them goes; None where they go one after the other."""


Picker = Callable[[Int64s, Sequence[Array], "Int64s | None"], None]
"""Puts rows of a file, none less than the one before, into arrays that are filled one after the other, or at places
counted through all of them. Rows ascend from one call to the next."""


def split_by_file(offsets: Int64s, numbers: Int64s, *, ascending: bool) -> Iterator[Picked]:
    """Sort row numbers of a collection by file, whose first rows are known."""
    places = None
    if not ascending:
        places = np.argsort(numbers, kind="stable")
        numbers = numbers[places]
    files = np.searchsorted(offsets, numbers, "right") - 1
    cuts = (np.flatnonzero(files[1:] != files[:-1]) + 1).tolist()
    for start, stop in pairwise([0, *cuts, len(numbers)] if len(numbers) else []):
        file = int(files[start])
        here = slice(start, stop)
        if places is not None or stop - start < len(numbers):
            places_here: Int64s | None = np.arange(start, stop) if places is None else places[here]
        else:
            places_here = None
        yield Picked(file, numbers[here] - offsets[file], places_here)


def read_picked(
    vectors: FileFormat,
    columns: Columns,
    header: FileHeader,
    rows: Int64s,
    outs: Sequence[Array],
    places: Int64s | None = None,
) -> None:
    """Read rows of a file, none less than the one before, to their places: of row groups those that hold some."""
    for start, stop in by_group(header, rows):
        here = places if stop - start == len(rows) else np.arange(start, stop) if places is None else places[start:stop]
        pick = open_picker(vectors, columns, header, int(rows[start]), int(rows[stop - 1]) + 1)
        pick(rows[start:stop], outs, here)


def by_group(header: FileHeader, rows: Int64s) -> Iterator[tuple[int, int]]:
    """Cut rows of a file where its row groups end."""
    if not header.group_rows:
        return iter([(0, len(rows))])
    bounds = header.first_group_row + np.cumsum((0, *header.group_rows))
    return pairwise(np.unique([0, *np.searchsorted(rows, bounds).tolist(), len(rows)]).tolist())


def open_picker(vectors: FileFormat, columns: Columns, header: FileHeader, start: int, stop: int) -> Picker:
    """Return a function that puts some of the rows ``[start, stop)`` of a file where they belong."""
    read = vectors.open_stretches(header, columns, start, stop)
    request_nbytes = header.file.store.request_nbytes
    local = not request_nbytes
    row_nbytes = max(1, header.dimension * header.dtype.itemsize)
    # Half of what a request is worth: to read on takes one connection as long, but the memory and the link of all.
    gap_rows = max(_GAP_NBYTES, request_nbytes // 2) // row_nbytes
    long_rows = max(2, _LONG_NBYTES // row_nbytes) if local else 0
    most_rows = max(1, max(SCRATCH_NBYTES, 8 * request_nbytes) // row_nbytes)
    most_reads = 2**20 if local else _REMOTE_REQUESTS

    def pick(rows: Int64s, outs: Sequence[Array], places: Int64s | None) -> None:
        if not len(rows):
            return
        target = _Target(outs)
        if not target.holds(header.dtype):
            target.cast = CheckedCast(header.file.url, int(rows[0]))
        elif local and len(rows) <= _FEW_ROWS and not header.group_rows:
            each = zip(rows.tolist(), range(len(rows)) if places is None else places.tolist(), strict=True)
            read([(row, target.view(place, 1)) for row, place in each])
            return
        # Only where neighbours end is looked at: of most of all rows there are few such places.
        steps = rows[1:] - rows[:-1]
        jumps = steps[steps != 1]
        gaps = jumps[jumps <= gap_rows]
        runs = len(jumps) + 1
        # What has to be decoded cannot go back to give a row twice.
        repeats = bool(header.group_rows) and bool((gaps == 0).any())
        if local and not repeats and 4 * len(gaps) <= runs and _stay_together(steps, places):
            _pick_runs(read, header, rows, target, places, most_rows)
        elif local and 2 * (len(rows) - runs + int(gaps.sum())) >= int(rows[-1] - rows[0]):
            offset = vectors.raw_offset(header)
            straight = places is None and runs * _RUN_NBYTES <= len(rows) * row_nbytes and bool((gaps > 0).all())
            if offset is None or not straight or not target.try_fill(header, offset, rows):
                _pick_dense(read, header, rows, target, places, most_rows)
        else:
            _pick_near(read, header, rows, target, places, (gap_rows, long_rows, most_rows, most_reads))
        if target.cast is not None:
            target.cast.report()

    return pick


def _stay_together(steps: Int64s, places: Int64s | None) -> bool:
    """Tell whether neighbours in a file, which are a step of one apart, mostly are neighbours where they go, too.

    Else a call for each takes longer than to read them together and to copy them: fifty times as long where all rows
    of a block go to different places.
    """
    if places is None:
        return True
    apart = (steps == 1) & (places[1:] - places[:-1] != 1)
    return int(np.count_nonzero(apart)) * _SHORT_ROWS <= len(places)


def _pick_runs(
    read: StretchReader, header: FileHeader, rows: Int64s, target: _Target, places: Int64s | None, most_rows: int
) -> None:
    """Read runs of neighbours of which few are near each other one by one: to see which would take longer."""
    if target.holds(header.dtype):
        apart = rows[1:] - rows[:-1] != 1
        if places is not None:
            apart |= places[1:] - places[:-1] != 1
        cuts = np.flatnonzero(apart) + 1
        starts, stops = [0, *cuts.tolist()], [*cuts.tolist(), len(rows)]
        where = starts if places is None else places[starts].tolist()
        runs = zip(rows[starts].tolist(), where, starts, stops, strict=True)
        read([stretch for row, place, start, stop in runs for stretch in target.stretches(row, place, stop - start)])
        return
    scratch = _scratch(min(most_rows, len(rows)), header)
    for start in range(0, len(rows), most_rows):
        some = rows[start : start + most_rows]
        cuts = np.flatnonzero(some[1:] - some[:-1] != 1) + 1
        bounds = pairwise([0, *cuts.tolist(), len(some)])
        read([(int(some[first]), scratch[first:last]) for first, last in bounds])
        target.put(start, places, scratch, np.arange(len(some)), some)


def _pick_dense(
    read: StretchReader, header: FileHeader, rows: Int64s, target: _Target, places: Int64s | None, most_rows: int
) -> None:
    """Read on from the first to the last row, most of which is wanted, or near what is, and pick from memory."""
    scratch = _scratch(min(most_rows, int(rows[-1] - rows[0]) + 1), header)
    start = 0
    while start < len(rows):
        first = int(rows[start])
        stop = int(rows.searchsorted(first + most_rows))
        here = scratch[: int(rows[stop - 1]) + 1 - first]
        read([(first, here)])
        target.put(start, places, here, rows[start:stop] - first, rows[start:stop])
        start = stop


def _pick_near(
    read: StretchReader,
    header: FileHeader,
    rows: Int64s,
    target: _Target,
    places: Int64s | None,
    limits: tuple[int, int, int, int],
) -> None:
    """Read rows that are near each other at once, and many neighbours straight to their places."""
    gap_rows, long_rows, most_rows, most_reads = limits
    group_of, starts = _group(rows, gap_rows, long_rows, most_rows)
    stops = np.append(starts[1:], len(rows))
    firsts, spans = rows[starts], rows[stops - 1] + 1 - rows[starts]
    # Not by their number: a row that is wanted twice makes up for one that is left out.
    run_of = np.cumsum(np.diff(rows, prepend=rows[0]) != 1)
    straight = (run_of[starts] == run_of[stops - 1]) & target.are_straight(starts, stops, places, header.dtype)
    scratch = _scratch(min(most_rows, int(spans[~straight].sum())), header)
    shifts = np.zeros(len(starts), np.int64)
    first_places = (starts if places is None else places[starts]).tolist()
    reads: list[Stretch] = []
    done, used = 0, 0

    def finish(group: int) -> None:
        """Read what has been noted, up to a group, and pick rows of what was not read into its place."""
        read(reads)
        begin, end = int(starts[done]), int(stops[group - 1])
        if used:
            members = begin + np.flatnonzero(~straight[group_of[begin:end]])
            target.put(
                0,
                members if places is None else places[members],
                scratch[:used],
                rows[members] + shifts[group_of[members]],
                rows[members],
            )
        reads.clear()

    for group, (first, span, is_straight) in enumerate(
        zip(firsts.tolist(), spans.tolist(), straight.tolist(), strict=True)
    ):
        if (used + span > most_rows and not is_straight) or len(reads) >= most_reads:
            finish(group)
            done, used = group, 0
        if is_straight:
            reads.append((first, target.view(first_places[group], span)))
        else:
            reads.append((first, scratch[used : used + span]))
            shifts[group] = used - first
            used += span
    finish(len(starts))


def _group(rows: Int64s, gap_rows: int, long_rows: int, most_rows: int) -> tuple[Int64s, Int64s]:
    """Return which group each row is read with, and where each group begins."""
    # Neighbours have a distance of one, and no gap.
    steps = np.diff(rows, prepend=rows[0])
    apart = steps > gap_rows + 1
    if long_rows:
        runs = np.append(0, np.flatnonzero(steps > 1))
        is_long = np.diff(runs, append=len(rows)) >= long_rows
        apart[runs[is_long]] = apart[runs[1:][is_long[:-1]]] = True
        apart[0] = False
    group_of: Int64s = np.cumsum(apart)
    firsts = rows[np.append(0, np.flatnonzero(apart))]
    reads = (rows - firsts[group_of]) // most_rows
    if reads.any():
        np.logical_or(apart, np.diff(reads, prepend=0) != 0, out=apart)
        group_of = np.cumsum(apart)
    starts: Int64s = np.append(0, np.flatnonzero(apart))
    return group_of, starts


class _Target:
    """Arrays that are filled with rows of a file as if they were one."""

    cast: CheckedCast | None = None
    """How values get into them, where they have another dtype than the file."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._arrays = arrays
        self._bounds = np.cumsum([0, *map(len, arrays)])

    def holds(self, dtype: np.dtype[Any]) -> bool:
        """Tell whether rows of a dtype can be read into these arrays as they are."""
        return all(array.dtype == dtype for array in self._arrays)

    def are_straight(self, starts: Int64s, stops: Int64s, places: Int64s | None, dtype: np.dtype[Any]) -> Any:
        """Tell of which groups the rows go one after the other to one array, which holds them as they are stored."""
        if not self.holds(dtype):
            return np.zeros(len(starts), np.bool_)
        firsts, lasts = (starts, stops - 1) if places is None else (places[starts], places[stops - 1])
        same = np.searchsorted(self._bounds, firsts, "right") == np.searchsorted(self._bounds, lasts, "right")
        if places is None:
            return same
        breaks = np.cumsum(np.diff(places, prepend=places[0] - 1) != 1)
        return same & (breaks[starts] == breaks[stops - 1])

    def view(self, place: int, rows: int) -> Array:
        """Return the memory of rows that go to one array."""
        if len(self._arrays) == 1:
            return self._arrays[0][place : place + rows]
        array = int(np.searchsorted(self._bounds, place, "right")) - 1
        first = place - int(self._bounds[array])
        return self._arrays[array][first : first + rows]

    def stretches(self, row: int, place: int, rows: int) -> list[Stretch]:
        """Return how rows of a file from one on are read to a place, if each array has the dtype of the file."""
        if len(self._arrays) == 1:
            return [(row, self._arrays[0][place : place + rows])]
        found, done = [], 0
        while done < rows:
            found.append((row + done, self.view(place + done, rows - done)))
            done += len(found[-1][1])
        return found

    def try_fill(self, header: FileHeader, offset: int, rows: Int64s) -> bool:
        """Fill the arrays with rows that ascend and lie as in memory from a byte on; tell whether that could be."""
        done = 0
        while self.cast is None and done < len(rows):
            out = self.view(done, len(rows) - done)
            if not try_read_runs(header, offset, rows[done : done + len(out)], out):
                break
            done += len(out)
        return done == len(rows)

    def put(self, start: int, places: Int64s | None, values: Array, within: Int64s, rows: Int64s) -> None:
        """Put some of what was read to places, of which the first ones are passed over, or in order from there on.

        ``within`` tells where they are among what was read, and ``rows`` in the file.
        """
        if places is None:
            self._put_in_order(start, values, within, rows)
            return
        places = places[start : start + len(rows)]
        cuts = np.flatnonzero(places[1:] - places[:-1] != 1) + 1
        if len(cuts) * _SHORT_ROWS <= len(rows):
            for first, last in pairwise([0, *cuts.tolist(), len(rows)]):
                self._put_in_order(int(places[first]), values, within[first:last], rows[first:last])
            return
        array_of = np.searchsorted(self._bounds, places, "right") - 1
        for number in np.unique(array_of).tolist():
            here = array_of == number
            out, picked = self._arrays[number], values[within[here]]
            if self.cast is not None:
                stored, picked = picked, np.empty(picked.shape, out.dtype)
                self.cast.into(picked, stored, rows[here])
            out[places[here] - self._bounds[number]] = picked

    def _put_in_order(self, place: int, values: Array, within: Int64s, rows: Int64s) -> None:
        """Put rows one after the other, from a place on."""
        done = 0
        while done < len(rows):
            out = self.view(place + done, len(rows) - done)
            here = slice(done, done + len(out))
            if self.cast is None:
                np.take(values, within[here], axis=0, out=out, mode="clip")  # without it numpy makes a copy first
            else:
                self.cast.into(out, values[within[here]], rows[here])
            done += len(out)


_thread = threading.local()


def _scratch(rows: int, header: FileHeader) -> Array:
    """Return memory for rows as they are stored: of small sizes the same to each call of a thread."""
    nbytes = rows * header.dimension * header.dtype.itemsize
    if nbytes > SCRATCH_NBYTES:
        return np.empty((rows, header.dimension), header.dtype)
    buffer: Array | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.nbytes < nbytes:
        _thread.buffer = buffer = np.empty(nbytes, np.uint8)
    return buffer[:nbytes].view(header.dtype).reshape(rows, header.dimension)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


TablePicker = Callable[[Int64s], pa.Table]
"""Decodes rows of a file, none less than the one before, also from one call to the next."""


def read_picked_table(header: FileHeader, names: Sequence[str], rows: Int64s) -> pa.Table:
    """Decode some columns of some rows of a file, none less than the one before; of the row groups that hold some."""
    parts = [
        open_table_picker(header, names, int(rows[start]), int(rows[stop - 1]) + 1)(rows[start:stop])
        for start, stop in by_group(header, rows)
    ]
    return pa.concat_tables(parts)


def read_picked_frame(
    fields: Sequence[MetaField], files: Iterable[tuple[FileHeader, Int64s, Int64s | None]]
) -> pd.DataFrame:
    """Read metadata of rows of several files; of each file the rows, and the places where they go."""
    names = [field.name for field in fields]
    picked = list(files)
    if not picked:
        return empty_frame(fields)

    def read(header: FileHeader, rows: Int64s, _: Int64s | None) -> pa.Table:
        table = read_picked_table(header, names, rows)
        return table if len(picked) == 1 else make_table(fields, table, header.file.url)

    table = pa.concat_tables(for_each_file(read, [header for header, _, _ in picked], *zip(*picked, strict=True)))
    # A frame for all of them: for each it would take as long, however few rows it has.
    frame = make_frame(fields, table, pd.RangeIndex(len(table)), picked[0][0].file.url)
    places = np.concatenate([np.arange(len(rows)) if places is None else places for _, rows, places in picked])
    if (np.diff(places) != 1).any():
        frame = frame.take(np.argsort(places)).reset_index(drop=True)
    return frame


def open_table_picker(header: FileHeader, names: Sequence[str], start: int, stop: int) -> TablePicker:
    """Return a function that decodes some of the rows ``[start, stop)`` of a file."""
    decoded = iter_columns(header, names, start, stop, step_rows(header, names))
    batch: pa.RecordBatch | None = None

    def pick(rows: Int64s) -> pa.Table:
        nonlocal start, batch
        taken, done = [], 0
        while done < len(rows):
            if batch is None:
                batch = _takeable(next(decoded))
            found = int(np.searchsorted(rows, start + batch.num_rows))
            if found > done:
                taken.append(_take(batch, rows[done:found] - start))
                done = found
            if done < len(rows):
                start += batch.num_rows
                batch = None
        return pa.Table.from_batches(taken)

    return pick


def _takeable(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([takeable(column) for column in batch.columns], batch.schema.names)


def _take(batch: pa.RecordBatch, rows: Int64s) -> pa.RecordBatch:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and (np.diff(rows) == 1).all():
        return batch.slice(first, len(rows))
    return batch.take(pa.array(rows))
