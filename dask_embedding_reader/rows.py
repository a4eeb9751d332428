"""Which rows of a collection, in which order: pure arithmetic, no files, no Dask.

:class:`Rows` is an ordered selection of row numbers. A *position* counts in the selection, a *row* in the collection.
"""

from __future__ import annotations

import hashlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.cached_property import cached_property

Int64s = npt.NDArray[np.int64]
UInt32s = npt.NDArray[np.uint32]

LANES = 64
"""The stretches that an epoch is dealt from, one row of each in turn: every number of ranks that divides it gets whole
stretches. A constant: another one would be another order."""

_STEP_ROWS = 2**20
"""Where all rows are looked at, so many are at a time."""

_STEP_POSITIONS = 2**14
"""So many are permuted at a time: their numbers stay in the processor's cache from one operation to the next."""


class Runs(NamedTuple):
    """Stretches of neighbouring rows that also follow each other in a selection, as long as they can be."""

    positions: Int64s
    """Where each one begins in the selection."""
    first_rows: Int64s
    """The row that it begins with."""
    counts: Int64s
    """How many rows it has."""


class Rows(ABC):
    """An ordered selection of the rows of a collection: a sequence of row numbers, of which few are ever in memory."""

    is_ascending: bool
    """Whether each row is greater than the one before."""

    window_rows: int = 0
    """How many rows are best read in one go; 0 where it does not matter."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def token(self) -> str:
        """A hash of what makes the selection, equal in every process."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are held."""

    @abstractmethod
    def at(self, positions: Int64s) -> Int64s:
        """Return the rows at positions, which lie in ``[0, len)``."""

    @abstractmethod
    def _cut(self, positions: range) -> Rows:
        """Return the selection of what lies at some positions, not at all."""

    def numbers(self, start: int = 0, stop: int | None = None) -> Int64s:
        """Return the rows at the positions ``[start, stop)``."""
        return self.at(np.arange(start, len(self) if stop is None else stop, dtype=np.int64))

    def runs(self, start: int = 0, stop: int | None = None) -> Runs:
        """Return the positions ``[start, stop)`` as stretches of neighbouring rows."""
        numbers = self.numbers(start, stop)
        cuts = _run_starts(numbers)
        return Runs(start + cuts, numbers[cuts], np.diff(cuts, append=len(numbers)))

    def windows(self, start: int, stop: int) -> Int64s:
        """Return which of the positions between ``start`` and ``stop`` end what is best read in one go.

        A shuffled selection mixes the rows of one window, and of no others: read apart, each would be read in bits.
        """
        del start, stop
        return np.empty(0, np.int64)

    def search(self, rows: Int64s) -> Int64s:
        """Return how many of an ascending selection come before each row."""
        low, high = np.zeros(len(rows), np.int64), np.full(len(rows), len(self), np.int64)
        while (open_ := low < high).any():
            middle = (low + high) // 2
            before = np.zeros(len(rows), np.bool_)
            before[open_] = self.at(middle[open_]) < rows[open_]
            low, high = np.where(before, middle + 1, low), np.where(open_ & ~before, middle, high)
        return low

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | Rows:
        everything = range(len(self))
        if isinstance(index, slice):
            positions = everything[index]
            return self if positions == everything else self._cut(positions)
        return int(self.at(np.array([everything[operator.index(index)]], np.int64))[0])

    def parts(self) -> Iterator[Int64s]:
        """Yield the rows, a part at a time: there may be billions."""
        for start in range(0, len(self), _STEP_ROWS):
            yield self.numbers(start, min(start + _STEP_ROWS, len(self)))

    def __iter__(self) -> Iterator[int]:
        for part in self.parts():
            yield from part.tolist()

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        del copy  # what is made is always new
        return self.numbers().astype(np.int64 if dtype is None else dtype, copy=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        if len(self) != len(other):
            return False
        if self.token == other.token:
            return True
        return all(map(np.array_equal, self.parts(), other.parts()))

    def __hash__(self) -> int:
        return hash((len(self), self[0], self[-1]) if len(self) else ())

    def __repr__(self) -> str:
        shown = list(self[:6]) if len(self) <= 6 else [*self[:3], "…", *self[-2:]]
        return f"<{len(self):,} rows: {', '.join(f'{row:,}' if isinstance(row, int) else row for row in shown)}>"


def _run_starts(numbers: Int64s) -> Int64s:
    """Return where runs of neighbouring numbers begin."""
    is_start = np.ones(len(numbers), np.bool_)
    np.not_equal(numbers[1:] - numbers[:-1], 1, out=is_start[1:])
    return np.flatnonzero(is_start)


def _hash(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else f"{part}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class Stretch(Rows):
    """Rows at equal distances: all rows, a slice of them, or every tenth."""

    values: range
    """The rows."""

    @property
    def is_ascending(self) -> bool:  # type: ignore[override]  # a value of the class elsewhere
        """Whether each row is greater than the one before."""
        return self.values.step > 0 or len(self) < 2

    @property
    def is_contiguous(self) -> bool:
        """Whether the rows are neighbours."""
        return self.values.step == 1 or len(self) < 2

    @property
    def token(self) -> str:
        """A hash of the range."""
        return _hash("range", self.values)

    @property
    def nbytes(self) -> int:
        """Three numbers."""
        return 24

    def __len__(self) -> int:
        return len(self.values)

    def at(self, positions: Int64s) -> Int64s:
        """Return the rows at positions."""
        return self.values.start + positions * self.values.step

    def _cut(self, positions: range) -> Rows:
        return Stretch(_plain(_picked(self.values, positions)))

    def runs(self, start: int = 0, stop: int | None = None) -> Runs:
        """Return the positions ``[start, stop)`` as stretches of neighbouring rows: one, or each alone."""
        stop = len(self) if stop is None else stop
        if self.values.step != 1 or start >= stop:
            return super().runs(start, stop)
        return Runs(*(np.array([value], np.int64) for value in (start, self.values.start + start, stop - start)))

    def search(self, rows: Int64s) -> Int64s:
        """Return how many come before each row."""
        return np.clip(-((self.values.start - rows) // abs(self.values.step)), 0, len(self))


def _plain(rows: range) -> range:
    """Return a range in the one way to spell it."""
    if len(rows) < 2:
        return range(rows.start, rows.start + 1) if len(rows) else range(0)
    return range(rows[0], rows[-1] + (1 if rows.step > 0 else -1), rows.step)


def _picked(values: range, positions: range) -> range:
    """Return what lies at some positions of a range."""
    if not positions:
        return range(0)
    first, step = values[positions[0]], values.step * positions.step
    return range(first, first + len(positions) * step, step)


# ---------------------------------------------------------------------------------------------------------------------
# Picked rows


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
        return _hash("picked", self.count, self.firsts, self.forms, self.ends, self.data)

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
        numbers = Packed(int(self.firsts[part]), form, data.view(f"u{itemsize}")).numbers()
        return numbers[: self.count - part * _PART_ROWS]

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
        return Stretch(_plain(range(first, first + count * (step or 1), step or 1)))
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


@dataclass(frozen=True, eq=False, repr=False)
class Section(Rows):
    """Some positions of another selection: a slice, or what one of several ranks reads."""

    of: Rows
    """The other selection."""
    positions: range
    """Which positions of it."""

    @property
    def is_ascending(self) -> bool:  # type: ignore[override]  # a value of the class elsewhere
        """Whether each row is greater than the one before."""
        return len(self) < 2 or (self.of.is_ascending and self.positions.step > 0)

    @property
    def window_rows(self) -> int:  # type: ignore[override]  # a value of the class elsewhere
        """How many rows are best read in one go; 0 where it does not matter."""
        return -(-self.of.window_rows // abs(self.positions.step))

    @cached_property
    def token(self) -> str:
        """A hash of the other selection and the positions."""
        return _hash("section", self.of.token, _plain(self.positions))

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.of.nbytes + 24

    def __len__(self) -> int:
        return len(self.positions)

    def at(self, positions: Int64s) -> Int64s:
        """Return the rows at positions."""
        return self.of.at(self.positions.start + positions * self.positions.step)

    def numbers(self, start: int = 0, stop: int | None = None) -> Int64s:
        """Return the rows at the positions ``[start, stop)``."""
        if self.positions.step != 1:
            return super().numbers(start, stop)
        first = self.positions.start
        return self.of.numbers(first + start, first + (len(self) if stop is None else stop))

    def search(self, rows: Int64s) -> Int64s:
        """Return how many of an ascending selection come before each row."""
        if not self.of.is_ascending or self.positions.step < 0:  # one row, or none
            return super().search(rows)
        return Stretch(self.positions).search(self.of.search(rows))

    def windows(self, start: int, stop: int) -> Int64s:
        """Return which of the positions between ``start`` and ``stop`` end what is best read in one go."""
        step = self.positions.step
        if step < 0 or start >= stop:
            return np.empty(0, np.int64)
        bounds = self.of.windows(self.positions[start], self.positions[stop - 1] + 1)
        found = np.unique(-((self.positions.start - bounds) // step))
        return found[(found > start) & (found < stop)]

    def _cut(self, positions: range) -> Rows:
        return Section(self.of, _picked(self.positions, positions))


@dataclass(frozen=True, eq=False, repr=False)
class Dealt(Rows):
    """Every so many-th stretch of another selection: what one of several hands gets that it is dealt to in turn."""

    of: Rows
    """The other selection."""
    stretch_rows: int
    """Rows of a stretch."""
    full: int
    """How many stretches have so many rows: what is left after them is shared by the last ones."""
    last_rows: int
    """Rows of each of these."""
    stretches: range
    """Which stretches."""

    @property
    def is_ascending(self) -> bool:  # type: ignore[override]  # a value of the class elsewhere
        """Whether each row is greater than the one before."""
        return self.of.is_ascending

    @property
    def window_rows(self) -> int:  # type: ignore[override]  # a value of the class elsewhere
        """How many rows are best read in one go; 0 where it does not matter."""
        return -(-self.of.window_rows // self.stretches.step)

    @cached_property
    def token(self) -> str:
        """A hash of the other selection and the stretches."""
        return _hash("dealt", self.of.token, self.stretch_rows, self.full, self.last_rows, self.stretches)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.of.nbytes + 48

    def __len__(self) -> int:
        some = len(range(self.stretches.start, min(self.stretches.stop, self.full), self.stretches.step))
        return some * self.stretch_rows + (len(self.stretches) - some) * self.last_rows

    def _of(self, positions: Int64s) -> Int64s:
        """Return which positions of the other selection these are."""
        number = positions // self.stretch_rows
        stretch = self.stretches.start + number * self.stretches.step
        full, last = np.minimum(stretch, self.full), np.maximum(stretch - self.full, 0)
        found: Int64s = full * self.stretch_rows + last * self.last_rows + positions - number * self.stretch_rows
        return found

    def at(self, positions: Int64s) -> Int64s:
        """Return the rows at positions."""
        return self.of.at(self._of(positions))

    def windows(self, start: int, stop: int) -> Int64s:
        """Return which of the positions between ``start`` and ``stop`` end what is best read in one go."""
        if start >= stop:
            return np.empty(0, np.int64)
        first, last = self._of(np.array([start, stop - 1], np.int64)).tolist()
        # There are windows only where a round is one stretch.
        bounds = self.of.windows(first, last + 1)
        stretch, row = bounds // self.stretch_rows, bounds % self.stretch_rows
        before = np.maximum(-((self.stretches.start - stretch) // self.stretches.step), 0)
        here = (stretch >= self.stretches.start) & ((stretch - self.stretches.start) % self.stretches.step == 0)
        found: Int64s = np.unique(before * self.stretch_rows + np.where(here, row, 0))
        return found[(found > start) & (found < stop)]

    def _cut(self, positions: range) -> Rows:
        return Section(self, positions)


def deal(of: Rows, stretch_rows: int, hands: int, index: int, *, round_of: int = 1) -> Rows:
    """Return what one of several hands gets of a selection that is dealt to them in stretches.

    The last stretches, of which ``round_of`` make a round, are shorter: they share equally what is left.
    """
    if hands == 1:
        return of
    full = len(of) // (stretch_rows * round_of) * round_of
    last_rows = (len(of) - full * stretch_rows) // round_of
    return Dealt(of, stretch_rows, full, last_rows, range(index, full + (round_of if last_rows else 0), hands))


# ---------------------------------------------------------------------------------------------------------------------
# Shuffled rows


def _apart(
    values: Int64s, mask: npt.NDArray[np.bool_], yes: Callable[[Int64s], Int64s], no: Callable[[Int64s], Int64s]
) -> Int64s:
    """Map values by one function or another."""
    if not len(values):
        return values
    if mask.all() or not mask.any():
        return (yes if mask[0] else no)(values)
    found = np.empty_like(values)
    found[mask], found[~mask] = yes(values[mask]), no(values[~mask])
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Shuffled(Rows):
    """Another selection in an order that only seed and epoch tell, nothing of which is held.

    The selection is cut into blocks, and these are permuted: neighbours are read at once, from anywhere. What results
    is cut into lanes, of equally many blocks. Of each lane the rows of a few blocks, its window, are permuted; then the
    next ones. An epoch takes one row of each lane in turn. So a batch has rows of all lanes, and of all blocks of their
    windows; and rank r of W, which reads every W-th row, reads some of the lanes, and no block that another one reads.

    Blocks that do not fill a round of lanes come last, and are dealt in the same way, cut into as many parts.
    """

    of: Rows
    """The other selection."""
    seed: int
    """Orders of two seeds have nothing to do with each other."""
    epoch: int
    """Nor have those of two epochs."""
    block_rows: int
    """Rows of a block."""
    lane_rows: int
    """Rows of a lane: whole blocks."""
    lane_window_rows: int
    """Rows of a window of one lane: whole blocks."""

    is_ascending = False

    @property
    def window_rows(self) -> int:  # type: ignore[override]  # a value of the class elsewhere
        """How many rows are best read in one go: the windows of all lanes."""
        return LANES * self.lane_window_rows

    @property
    def token(self) -> str:
        """A hash of the other selection and of what makes the order."""
        return _hash("shuffled", self.of.token, self.seed, self.epoch, self.block_rows, self.lane_window_rows)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.of.nbytes + 40

    def __len__(self) -> int:
        return len(self.of)

    @property
    def blocks_mixed(self) -> int:
        """How many blocks the rows of a batch may come from."""
        return self.window_rows // self.block_rows

    def at(self, positions: Int64s) -> Int64s:
        """Return the rows at positions."""
        found = np.empty(len(positions), np.int64)
        for start in range(0, len(positions), _STEP_POSITIONS):
            here = slice(start, start + _STEP_POSITIONS)
            found[here] = self._places(positions[here])
        return self.of.at(found)

    def _places(self, positions: Int64s) -> Int64s:
        """Return the positions in the other selection."""
        regular = LANES * self.lane_rows
        short = (len(self) - regular) // LANES
        dealt = regular + LANES * short

        def irregular(tail: Int64s) -> Int64s:
            return _apart(tail, tail < dealt, lambda some: self._in_lanes(some, regular, short, short), last)

        def last(tail: Int64s) -> Int64s:
            return dealt + _permute(tail - dealt, len(self) - dealt, _keys(f"tail {self.seed} {self.epoch}"))

        def in_lanes(some: Int64s) -> Int64s:
            return self._in_lanes(some, 0, self.lane_rows, self.lane_window_rows)

        places = _apart(positions, positions < regular, in_lanes, irregular)
        blocks = len(self) // self.block_rows
        return _apart(places, places < blocks * self.block_rows, self._in_blocks, lambda rest: rest)

    def _in_lanes(self, positions: Int64s, start: int, lane_rows: int, window_rows: int) -> Int64s:
        """Return where rows of lanes are among all blocks in their order; the lanes begin at ``start``."""
        row = (positions - start) // LANES
        lane = positions - start - row * LANES
        window = row // window_rows
        first = window * window_rows
        number = window * LANES + lane + start  # of no other window of a lane
        tweaks = _mix(_mix((number >> 32).astype(np.uint32)) ^ number.astype(np.uint32))
        keys = _keys(f"rows {self.seed} {self.epoch}")
        last = lane_rows // window_rows * window_rows
        full = first < last  # from there on, windows have fewer rows
        inner = np.empty_like(row)
        for size, here in ((window_rows, full), (lane_rows - last, ~full)):
            if here.all():
                inner = _permute(row - first, size, keys, tweaks)
            elif here.any():
                inner[here] = _permute((row - first)[here], size, keys, tweaks[here])
        return start + lane * lane_rows + first + inner

    def _in_blocks(self, places: Int64s) -> Int64s:
        """Return which positions of the other selection lie at places among all full blocks in their order."""
        slots = places // self.block_rows
        blocks = len(self) // self.block_rows
        moved = _permute(slots, blocks, _keys(f"blocks {self.seed} {self.epoch}"))
        return places + (moved - slots) * self.block_rows

    def windows(self, start: int, stop: int) -> Int64s:
        """Return which of the positions between ``start`` and ``stop`` end what is best read in one go."""
        step = self.window_rows
        bounds = np.arange(start // step + 1, -(-min(stop, LANES * self.lane_rows) // step) + 1) * step
        bounds = np.minimum(bounds, LANES * self.lane_rows)
        return bounds[(bounds > start) & (bounds < stop)]

    def _cut(self, positions: range) -> Rows:
        return Section(self, positions)


def shuffle(of: Rows, seed: int, epoch: int, block_rows: int, buffer_rows: int) -> Shuffled:
    """Shuffle a selection.

    Parameters
    ----------
    of
        The selection.
    seed, epoch
        What tells the order.
    block_rows
        Rows that are neighbours and are read at once.
    buffer_rows
        Rows that are mixed: a window of all lanes.
    """
    # Where all rows are in one window, they are read in one go, however they are ordered.
    block = 1 if len(of) <= buffer_rows else max(1, min(block_rows, buffer_rows // LANES))
    lane = len(of) // (LANES * block) * block
    window = max(1, buffer_rows // (LANES * block)) * block
    return Shuffled(of, seed, epoch, block, lane, min(window, max(lane, 1)))


def shard(of: Rows, num_shards: int, index: int) -> Rows:
    """Return one of several shards of a selection.

    Of a shuffled one every ``num_shards``-th row: all shards together read it in its order, however many there are. All
    have equally many rows, for which the last ones, fewer than ``LANES``, are left out (fewer than ``num_shards``,
    where that does not divide ``LANES``). Of another selection a stretch, without loss.
    """
    count = len(of)
    if isinstance(of, Shuffled):
        return of._cut(range(index, count - left_out(count, num_shards), num_shards)) if num_shards > 1 else of
    return of[index * count // num_shards : (index + 1) * count // num_shards]


def left_out(count: int, num_shards: int) -> int:
    """Return how many rows of an epoch are left out, so that all shards have equally many and end at the same one."""
    return count % (1 if num_shards == 1 else LANES if LANES % num_shards == 0 else num_shards)


def sample(of: Rows, count: int, seed: int) -> Rows:
    """Return as many rows of a selection, drawn at random, in their order: more of the same seed include them."""
    chosen = _permute(np.arange(count, dtype=np.int64), len(of), _keys(f"sample {seed}"))
    chosen.sort()
    return pick(of.at(chosen))


# ---------------------------------------------------------------------------------------------------------------------
# Permutations that are computed, not stored

_ROUNDS = 8
"""With six, rows of a few dozen stay neighbours by a fifth too often."""


def _keys(text: str) -> UInt32s:
    """Return a key for each round."""
    digest = hashlib.blake2b(text.encode(), digest_size=4 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


def _mix(values: UInt32s) -> UInt32s:
    """Hash numbers (the finaliser of MurmurHash3), in their own memory."""
    values ^= values >> np.uint32(16)
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    return values


def _permute(values: Int64s, size: int, keys: UInt32s, tweaks: UInt32s | None = None) -> Int64s:
    """Map each of the numbers below ``size`` to another one: a permutation that the keys choose.

    A Feistel network on pairs of numbers that are each about the square root of ``size``: what lands outside goes
    round again until it lands inside. Numbers with different tweaks are permuted by different permutations.

    numpy's own generators may change with its versions (NEP 19), and would hold all of the permutation.
    """
    if size < 2 or not len(values):
        return values.copy()
    high = max(2, math.isqrt(size))
    low = -(-size // high)
    found = _encrypt(values, high, low, keys, tweaks)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        again = None if tweaks is None else tweaks[outside]
        found[outside] = _encrypt(found[outside], high, low, keys, again)
        outside = outside[found[outside] >= size]
    return found


def _encrypt(values: Int64s, high: int, low: int, keys: UInt32s, tweaks: UInt32s | None) -> Int64s:
    # Halves of 32 bits: twice as many in each instruction as of 64.
    quotients = values // low
    left, right = quotients.astype(np.uint32), (values - quotients * low).astype(np.uint32)
    for turn in range(0, _ROUNDS, 2):
        _rotate(left, right, high, keys[turn], tweaks)
        _rotate(right, left, low, keys[turn + 1], tweaks)
    return left.astype(np.int64) * low + right


def _rotate(values: UInt32s, by: UInt32s, size: int, key: np.uint32, tweaks: UInt32s | None) -> None:
    """Move numbers below ``size`` on by a hash of others, round and round."""
    hashed = by ^ key
    if tweaks is not None:
        hashed ^= tweaks
    _mix(hashed)
    # Scaled to a number below `size`, without a division.
    if size <= 2**16:
        hashed >>= np.uint32(16)
        hashed *= np.uint32(size)
        hashed >>= np.uint32(16)
    else:
        hashed = (hashed.astype(np.uint64) * np.uint64(size) >> np.uint64(32)).astype(np.uint32)
    hashed += values
    # What is not too large becomes so, since there is nothing below 0.
    np.minimum(hashed, hashed - np.uint32(size), out=values)
