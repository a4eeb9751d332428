"""Rows at equal distances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dask_embedding_reader.rows.selection import Int64s, Rows, hash_of


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
        return hash_of("range", self.values)

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
        return Stretch(plain_range(picked_range(self.values, positions)))

    def search(self, rows: Int64s) -> Int64s:
        """Return how many come before each row."""
        return np.clip(-((self.values.start - rows) // abs(self.values.step)), 0, len(self))


def plain_range(rows: range) -> range:
    """Return a range in the one way to write it."""
    if len(rows) < 2:
        return range(rows.start, rows.start + 1) if len(rows) else range(0)
    return range(rows[0], rows[-1] + (1 if rows.step > 0 else -1), rows.step)


def picked_range(values: range, positions: range) -> range:
    """Return what lies at some positions of a range."""
    if not positions:
        return range(0)
    first, step = values[positions[0]], values.step * positions.step
    return range(first, first + len(positions) * step, step)
