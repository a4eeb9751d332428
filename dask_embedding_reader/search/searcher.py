"""What one thread does in a search: a block after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.threads import is_stopped
from dask_embedding_reader.search.best import keep, nothing, score, set_apart
from dask_embedding_reader.search.blocks import (
    QUERIES_AT_ONCE,
    Pairs,
    block_rows,
    candidates,
    join,
    measure,
    multiply,
    prune,
    raise_to,
)
from dask_embedding_reader.search.queries import Queries

_PAIRS_WAITING = 2**18
"""Pairs of rows and queries that wait to be scored, at most, before the next block: 8 MB."""


def no_worst(queries: Queries) -> npt.NDArray[np.float64]:
    """Return what is not wanted of each query, before the first row."""
    return np.full(len(queries.exact), -np.inf)


class Searcher:
    """Searches rows, in one thread.

    Parameters
    ----------
    queries
        What is looked for.
    dtype
        Of the products.
    worst
        Keys of rows that are not wanted any more, for each query. Threads that search together share it, and raise it
        without waiting for each other: where one puts back what another has just raised, it is still no more than what
        k rows reach.
    """

    def __init__(self, queries: Queries, dtype: np.dtype[Any], worst: npt.NDArray[np.float64] | None = None) -> None:
        self.best = nothing(queries)
        """What has been found so far."""
        self._queries, self._dtype = queries, dtype
        self._worst = no_worst(queries) if worst is None else worst
        # Used for every block: memory that is new each time takes longer to be had than to be compared (0.8 ms, 0.2).
        self._products, self._marks = np.empty(0, dtype), np.empty(0, bool)

    def search(
        self,
        rows: npt.NDArray[Any],
        first_row: int,
        starts: deque[int],
        count: Callable[[int], object] = lambda _: None,
    ) -> Searcher:
        """Search blocks of rows that come later than those before; return this.

        Blocks begin at ``starts``, from which threads that search the same rows take one at a time.
        """
        queries, worst = self._queries, self._worst
        asking = len(queries.exact)
        step = block_rows(rows.shape[1], queries, self._dtype)
        self._reserve(min(step, len(rows)) * min(QUERIES_AT_ONCE, asking))
        # Most of what is near at first is not in the end: waiting, 14,000 pairs are scored instead of 62,000 for the
        # best 10 of 100,000 rows for 1,000 queries.
        waiting: list[Pairs] = []
        waiting_count, most_waiting = 0, min(4 * queries.k * asking, _PAIRS_WAITING)
        with np.errstate(all="ignore"):
            while starts and not is_stopped():
                try:
                    start = starts.popleft()
                except IndexError:  # another thread took the last one
                    break
                given = np.ascontiguousarray(rows[start : start + step], self._dtype)
                block, squares, ranked, longest = measure(given, queries)
                if ranked is not None:
                    self.best = set_apart(first_row + start + np.flatnonzero(~ranked), queries, self.best)
                for first in range(0, asking, QUERIES_AT_ONCE):
                    some = slice(first, first + QUERIES_AT_ONCE)
                    products = multiply(block, squares, ranked, queries, some, self._products)
                    found = candidates(products, queries.select(some), longest, worst[some], self._marks)
                    if found is None:
                        continue
                    waiting.append(found._replace(places=found.places + start, asking=found.asking + first))
                    waiting_count += len(found.places)
                    if waiting_count > most_waiting:
                        pairs = join(waiting)
                        if len(found.places) <= most_waiting:  # else the bounds cannot tell rows apart
                            pairs = prune(pairs, worst, queries.k)
                        if len(pairs.places) > most_waiting // 2:  # equal ones, or too many queries
                            self._rank(rows, first_row, pairs)
                            waiting, waiting_count = [], 0
                        else:
                            waiting, waiting_count = [pairs], len(pairs.places)
                count(len(block))
            if waiting_count:
                self._rank(rows, first_row, prune(join(waiting), worst, queries.k))
        return self

    def _reserve(self, products: int) -> None:
        if len(self._products) < products:
            self._products, self._marks = np.empty(products, self._dtype), np.empty(products, bool)

    def _rank(self, rows: npt.NDArray[Any], first_row: int, waiting: Pairs) -> None:
        """Score the pairs, and put those among the best that belong there."""
        if len(waiting.places):
            keys = score(rows, waiting.places, waiting.asking, self._queries)
            keep(self.best, first_row + waiting.places, waiting.asking, keys)
            raise_to(self.best.keys[:, -1], self._worst)
