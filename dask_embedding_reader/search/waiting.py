"""Pairs of rows and queries that wait to be scored, in memory that is used again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.search.blocks import PAIR, PAIRS_FOUND, Pairs
from dask_embedding_reader.search.queries import Floats

_MOST_PAIRS = 2**18
"""So many wait, at most: 5 MB, and as much again while they are sorted."""


class Waiting:
    """Pairs that wait to be scored.

    Most of what is near at first is not in the end: waiting, 14,000 pairs are scored instead of 62,000 for the best 10
    of 100,000 rows for 1,000 queries.
    """

    def __init__(self, queries: int, k: int) -> None:
        self._queries, self._k = queries, k
        self._most = min(4 * k * queries, _MOST_PAIRS)
        self._count = 0
        self._memory: Pairs = np.empty(self._most + PAIRS_FOUND, PAIR)

    @property
    def pairs(self) -> Pairs:
        """What waits."""
        return self._memory[: self._count]

    def add(self, pairs: Pairs, worst: Floats) -> bool:
        """Have pairs wait; tell whether too many do, of which nothing tells that they are not among the best."""
        first, self._count = self._count, self._count + len(pairs)
        self._memory[first : self._count] = pairs
        if self._count <= self._most:
            return False
        self.prune(worst)
        return self._count > self._most // 2  # equal ones, or too many queries

    def prune(self, worst: Floats) -> None:
        """Leave the pairs that may still be among the best; raise the worst of each query to what k of them reach."""
        self._leave(worst)
        # Queries and bounds as one number, in the order of both: to sort it takes no places and no copies.
        asking = self.pairs["asking"]
        both = asking.astype(np.int64) << 32
        both += _flipped(self.pairs["low"].view(np.int32))
        both.sort()
        ends = np.cumsum(np.bincount(asking, minlength=self._queries))
        full = np.flatnonzero(np.diff(ends, prepend=0) >= self._k)
        kth = _flipped(both[ends[full] - self._k].astype(np.int32)).view(np.float32)
        worst[full] = np.maximum(worst[full], kth)
        self._leave(worst)

    def clear(self) -> None:
        """Let none wait any more."""
        self._count = 0

    def _leave(self, worst: Floats) -> None:
        """Leave the pairs that may still be among the best."""
        some = self.pairs[self.pairs["high"] > worst[self.pairs["asking"]]]
        self._memory[: len(some)] = some
        self._count = len(some)


def _flipped(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the bits of float32 as integers in the same order, and back: those of negative ones run the other way."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)
