"""A search in one process: threads that search blocks of rows, and what they have found so far."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.threads import is_stopped
from dask_embedding_reader.search.best import keep, nothing, score, set_apart
from dask_embedding_reader.search.blocks import (
    QUERIES_AT_ONCE,
    block_rows,
    candidates,
    measure,
    multiply,
    raise_to,
)
from dask_embedding_reader.search.queries import Floats, Queries
from dask_embedding_reader.search.waiting import Waiting


class _Scratch(NamedTuple):
    """What a thread computes in: memory that is new each time takes longer to be had than to be compared."""

    products: Floats
    marks: npt.NDArray[np.bool_]
    waiting: Waiting


class Searcher:
    """Searches rows, in any number of threads.

    Parameters
    ----------
    queries
        What is looked for.
    dtype
        Of the products.
    """

    def __init__(self, queries: Queries, dtype: np.dtype[Any]) -> None:
        self.best = nothing(queries)
        """What has been found so far."""
        self._queries, self._dtype = queries, dtype
        self._changing_best = threading.Lock()
        # Keys of rows that are not wanted any more, for each query. Threads raise them without waiting for each other:
        # where one puts back what another has just raised, it is still no more than what k rows reach.
        self._worst = np.full(len(queries.exact), -np.inf)
        self._idle: deque[_Scratch] = deque()

    def search(
        self,
        rows: npt.NDArray[Any],
        first_row: int,
        starts: deque[int],
        count: Callable[[int], object] = lambda _: None,
    ) -> Searcher:
        """Search blocks of rows; return this.

        Blocks begin at ``starts``, from which threads that search the same rows take one at a time.
        """
        queries, worst = self._queries, self._worst
        asking = len(queries.exact)
        step = block_rows(rows.shape[1], queries, self._dtype)
        scratch = self._scratch(min(step, len(rows)) * min(QUERIES_AT_ONCE, asking))
        with np.errstate(all="ignore"):
            while starts and not is_stopped():
                try:
                    start = starts.popleft()
                except IndexError:  # another thread took the last one
                    break
                given = np.ascontiguousarray(rows[start : start + step], self._dtype)
                block, squares, ranked, longest = measure(given, queries)
                if ranked is not None:
                    with self._changing_best:
                        self.best = set_apart(first_row + start + np.flatnonzero(~ranked), queries, self.best)
                for first in range(0, asking, QUERIES_AT_ONCE):
                    some = slice(first, first + QUERIES_AT_ONCE)
                    products = multiply(block, squares, ranked, queries, some, scratch.products)
                    for found in candidates(products, queries.select(some), longest, worst[some], scratch.marks):
                        found["place"] += start
                        found["asking"] += first
                        if scratch.waiting.add(found, worst):
                            self._rank(rows, first_row, scratch.waiting)
                count(len(block))
            scratch.waiting.prune(worst)
            self._rank(rows, first_row, scratch.waiting)
        self._idle.append(scratch)
        return self

    def _scratch(self, products: int) -> _Scratch:
        """Return memory that no thread computes in."""
        with suppress(IndexError):  # none is idle
            scratch = self._idle.pop()
            if len(scratch.products) >= products:
                return scratch
        queries = self._queries
        waiting = Waiting(len(queries.exact), queries.k)
        return _Scratch(np.empty(products, self._dtype), np.empty(products, np.bool_), waiting)

    def _rank(self, rows: npt.NDArray[Any], first_row: int, waiting: Waiting) -> None:
        """Score the pairs, and put those among the best that belong there."""
        places, asking = waiting.pairs["place"], waiting.pairs["asking"]
        if len(places):
            keys = score(rows, places, asking, self._queries)
            with self._changing_best:
                keep(self.best, first_row + places, asking, keys)
                raise_to(self.best.keys[:, -1], self._worst)
        waiting.clear()
