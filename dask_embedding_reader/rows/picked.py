"""Picked rows: what a filter, a sample or a list of rows comes to, in the form that takes the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.cached_property import cached_property
from dask_embedding_reader.rows.section import Section
from dask_embedding_reader.rows.selection import Int64s, Rows, hash_of
from dask_embedding_reader.rows.stretch import Stretch, plain_range


class Packed(NamedTuple):
    """Some row numbers in the form that takes the fewest bytes: what a task carries."""

    first: int
    """What is added to all of them."""
    form: int
    """One of ``_FORMS``."""
    data: npt.NDArray[Any]
    """What the form needs."""

    def numbers(self) -> Int64s:
        """Return the row numbers."""
        if self.form == _BITS:
            return self.first + np.flatnonzero(np.unpackbits(self.data, bitorder="little"))
        wide = self.data.astype(np.int64)
        if self.form == _STEPS:
            return self.first + np.cumsum(wide)
        if self.form == _OFFSETS:
            return self.first + wide
        starts, counts = wide[::2], wide[1::2]
        return self.first + np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


_RUNS, _STEPS, _BITS, _OFFSETS = _FORMS = range(4)
"""The first row and the rows of each run, one after the other · the distance of each row from the one before · a bit
for each row there might be · the numbers themselves, where they do not ascend."""


def pack(numbers: Int64s) -> Packed:
    """Put row numbers into the form that takes the fewest bytes."""
    if not len(numbers):
        return Packed(0, _OFFSETS, np.empty(0, np.uint8))
    first = int(numbers.min())
    starts = _run_starts(numbers)
    counts = np.diff(starts, append=len(numbers))
    # Decided by arithmetic: to make each form would take three times as long.
    span = int(numbers.max()) - first + 1
    largest = max(int(numbers[starts].max()) - first, int(counts.max()))
    sizes = {_RUNS: 2 * len(starts) * np.min_scalar_type(largest).itemsize}
    steps = np.empty_like(numbers)
    steps[0] = numbers[0] - first
    np.subtract(numbers[1:], numbers[:-1], out=steps[1:])
    if (steps[1:] > 0).all():
        sizes[_STEPS] = len(numbers) * np.min_scalar_type(int(steps.max())).itemsize
        sizes[_BITS] = -(-span // 8)
    else:
        sizes[_OFFSETS] = len(numbers) * np.min_scalar_type(span - 1).itemsize
    form = min(sizes, key=lambda form: sizes[form])
    if form == _BITS:
        bits = np.zeros(span, np.bool_)
        bits[numbers - first] = True
        return Packed(first, form, np.packbits(bits, bitorder="little"))
    if form == _RUNS:
        return Packed(first, form, _narrow(np.stack([numbers[starts] - first, counts], axis=1).reshape(-1)))
    return Packed(first, form, _narrow(steps if form == _STEPS else numbers - first))


def _run_starts(numbers: Int64s) -> Int64s:
    """Return where runs of neighbouring numbers begin."""
    is_start = np.ones(len(numbers), np.bool_)
    np.not_equal(numbers[1:] - numbers[:-1], 1, out=is_start[1:])
    return np.flatnonzero(is_start)


def _narrow(values: Int64s) -> npt.NDArray[Any]:
    return values.astype(np.min_scalar_type(int(values.max())))


_PART_ROWS = 2**16
"""Picked rows are packed so many at a time: each part is made into numbers again whole."""


_MOST_UNPACKED = 8


@dataclass(frozen=True, eq=False, repr=False)
class Picked(Rows):
    """Rows in any order, packed part by part: what a filter, a sample or a list of rows comes to.

    One buffer and four columns, not an object a part: rows of 5.8 G may be picked.
    """

    count: int
    """How many rows."""
    is_ascending: bool
    """Whether each row is greater than the one before."""
    firsts: Int64s
    """Of each part, what is added to all its numbers."""
    forms: npt.NDArray[np.uint8]
    """Of each part, its form, and eight times the bytes of an item of its data."""
    ends: Int64s
    """Where the data of each part end."""
    data: npt.NDArray[np.uint8]
    """What the forms of all parts need."""

    @cached_property
    def token(self) -> str:
        """A hash of all of it."""
        return hash_of("picked", self.count, self.firsts, self.forms, self.ends, self.data)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.firsts.nbytes + self.forms.nbytes + self.ends.nbytes + self.data.nbytes

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _unpacked(self) -> dict[int, Int64s]:
        """The parts that were made into numbers last: neighbours are asked for one after the other."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_unpacked"}

    def _part(self, part: int) -> Int64s:
        """Return the rows of a part."""
        known = self._unpacked.get(part)
        if known is not None:
            return known
        while len(self._unpacked) >= _MOST_UNPACKED:
            # Another thread may do the same.
            self._unpacked.pop(next(iter(self._unpacked.copy()), part), None)
        self._unpacked[part] = numbers = self._unpack(part)
        return numbers

    def _unpack(self, part: int) -> Int64s:
        form, itemsize = int(self.forms[part]) & 7, int(self.forms[part]) >> 3
        data = self.data[int(self.ends[part - 1]) if part else 0 : int(self.ends[part])]
        return Packed(int(self.firsts[part]), form, data.view(f"u{itemsize}")).numbers()

    def at(self, positions: Int64s) -> Int64s:
        """Return the rows at positions."""
        parts = positions // _PART_ROWS
        found = np.empty(len(positions), np.int64)
        order = np.argsort(parts, kind="stable") if (np.diff(parts) < 0).any() else slice(None)
        ordered, within = parts[order], positions[order] % _PART_ROWS
        cuts = np.flatnonzero(np.diff(ordered, prepend=-1, append=-1))
        values = [self._part(int(ordered[a]))[within[a:b]] for a, b in pairwise(cuts)]
        found[order] = np.concatenate([np.empty(0, np.int64), *values])
        return found

    def numbers(self, start: int = 0, stop: int | None = None) -> Int64s:
        """Return the rows at the positions ``[start, stop)``."""
        stop = len(self) if stop is None else stop
        first = start // _PART_ROWS
        parts = [self._part(part) for part in range(first, -(-stop // _PART_ROWS))]
        joined = np.concatenate([np.empty(0, np.int64), *parts])
        return joined[start - first * _PART_ROWS : stop - first * _PART_ROWS]

    def search(self, rows: Int64s) -> Int64s:
        """Return how many of an ascending selection come before each row."""
        parts = np.maximum(np.searchsorted(self.firsts, rows, "right") - 1, 0)
        found = np.empty(len(rows), np.int64)
        for part in np.unique(parts).tolist():
            here = parts == part
            found[here] = part * _PART_ROWS + np.searchsorted(self._part(part), rows[here])
        return found

    def _cut(self, positions: range) -> Rows:
        return Section(self, positions)


def pick(numbers: Int64s) -> Rows:
    """Return the selection of these rows, in this order."""
    return pick_all([numbers])


def pick_all(parts: Iterable[Int64s]) -> Rows:
    """Return the selection of many rows that come in parts, none of which is kept."""
    packed: list[Packed] = []
    rest = np.empty(0, np.int64)
    first = last = count = 0
    step: int | None = None
    ascending = regular = True
    for part in parts:
        if not len(part):
            continue
        numbers = np.asarray(part, np.int64)
        steps = np.diff(numbers, prepend=np.array([last] if count else [], np.int64))
        if not count:
            first = int(numbers[0])
        if step is None and len(steps):
            step = int(steps[0])
        ascending = ascending and bool((steps > 0).all())
        regular = regular and bool((steps == step).all())
        last = int(numbers[-1])
        count += len(numbers)
        rest = np.concatenate([rest, numbers]) if len(rest) else numbers
        while len(rest) >= _PART_ROWS:
            packed.append(pack(rest[:_PART_ROWS]))
            rest = rest[_PART_ROWS:]
    if regular and step != 0:
        return Stretch(plain_range(range(first, first + count * (step or 1), step or 1)))
    if len(rest):
        packed.append(pack(rest))
    return Picked(
        count=count,
        is_ascending=ascending,
        firsts=np.array([part.first for part in packed], np.int64),
        forms=np.array([part.form + 8 * part.data.itemsize for part in packed], np.uint8),
        ends=np.cumsum([part.data.nbytes for part in packed], dtype=np.int64),
        data=np.concatenate([part.data.view(np.uint8) for part in packed]),
    )
