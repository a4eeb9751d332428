"""Some of the positions of another selection: a slice, or what it is dealt to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dask_embedding_reader._common.cached_property import cached_property
from dask_embedding_reader.rows.selection import Int64s, Rows, hash_of
from dask_embedding_reader.rows.stretch import Stretch, picked_range, plain_range


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
        return hash_of("section", self.of.token, plain_range(self.positions))

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
        found: Int64s = np.unique(-((self.positions.start - bounds) // step))
        return found

    def _cut(self, positions: range) -> Rows:
        return Section(self.of, picked_range(self.positions, positions))


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
        return hash_of("dealt", self.of.token, self.stretch_rows, self.full, self.last_rows, self.stretches)

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
        return found

    def _cut(self, positions: range) -> Rows:
        return Section(self, positions)


def deal(of: Rows, stretch_rows: int, hands: int, index: int, *, round_of: int = 1) -> Rows:
    """Return what one of several hands gets of a selection that is dealt to them in stretches.

    The last stretches, of which ``round_of`` make a round, are shorter: they share equally what is left. ``hands`` is a
    multiple of ``round_of``, so that none gets two of these.
    """
    if hands == 1:
        return of
    full = len(of) // (stretch_rows * round_of) * round_of
    last_rows = (len(of) - full * stretch_rows) // round_of
    return Dealt(of, stretch_rows, full, last_rows, range(index, full + (round_of if last_rows else 0), hands))
