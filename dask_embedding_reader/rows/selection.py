"""Ordered selections of rows: a *position* counts in the selection, a *row* in the collection."""

from __future__ import annotations

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

_STEP_ROWS = 2**20
"""Where all rows are looked at, so many are at a time."""


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
        shown = list(self) if len(self) <= 6 else [*self[:3], "…", *self[-2:]]
        return f"<{len(self):,} rows: {', '.join(f'{row:,}' if isinstance(row, int) else row for row in shown)}>"


def hash_of(*parts: object) -> str:
    """Return a hash of what makes a selection, equal in every process."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else f"{part}\0".encode())
    return digest.hexdigest()
