"""The memory limit of a pass: arithmetic before anything is read, one count while it is.

Whoever makes batches says what that takes as a :class:`Projection`, and asks a :class:`Budget` before more is started
than is needed. What is needed is always started: a batch that is larger than the limit is still a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Count = Callable[[], int]
"""Tells how many bytes something holds now."""


class Projection(NamedTuple):
    """What a pass will hold, in bytes."""

    batches: int
    """The batch that is worked on and the one to be filled, with their metadata."""
    reading: int
    """What else nothing is read without: a piece, and what decoding it takes."""
    ahead: int
    """More that is worth having, as far as there is room."""

    @property
    def needed(self) -> int:
        """What is held whatever the limit."""
        return self.batches + self.reading

    def within(self, limit_nbytes: int) -> int:
        """Return what it holds at most under a limit.

        Examples
        --------
        >>> projection = Projection(batches=60, reading=40, ahead=200)
        >>> [projection.within(limit) for limit in (50, 200, 1_000)]
        [100, 200, 300]
        """
        return min(self.needed + self.ahead, max(self.needed, limit_nbytes))


class Budget:
    """One count of all that a pass holds, against its limit.

    Examples
    --------
    >>> batches = [40, 40]
    >>> budget = Budget(100, lambda: sum(batches), lambda: 5)
    >>> budget.left_nbytes
    15
    """

    def __init__(self, limit_nbytes: int, *counts: Count) -> None:
        self._limit_nbytes = limit_nbytes
        self._counts = (*counts, cached_nbytes)

    @property
    def left_nbytes(self) -> int:
        """How much more may be held; less than nothing where what was needed is more than the limit."""
        return self._limit_nbytes - sum(count() for count in self._counts)


_caches: list[Count] = []


def count_cache(count: Count) -> None:
    """Have what a cache of this process keeps count in every budget."""
    _caches.append(count)


def cached_nbytes() -> int:
    """Return what the caches of this process keep."""
    return sum(count() for count in _caches)
