"""The best rows so far: scored in float64, ordered by their scores rounded to float32 and by their numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.search.queries import Int64s, Queries, dots

Int32s = npt.NDArray[np.int32]

_PAIRS_AT_ONCE = 2**15
"""Items of vectors that are scored in float64 at once: 256 kB of each side. 4 MB are new memory each time, and took
twice as long (25 ms for 14,000 pairs of 512 items, not 11)."""

_PLACES_AT_ONCE = 2**15
"""Places of queries that are filled at once: what sorting takes, some 60 bytes each, is held beside what is found."""

LARGEST = np.finfo(np.float32).max
"""Scores beyond it are this one: infinitely far is a place that is not filled."""

_NOBODY = np.iinfo(np.int64).max
"""The row of a place that is not filled: behind all others."""


class Best(NamedTuple):
    """The best rows so far."""

    keys: npt.NDArray[np.float32]
    """Queries x k, the larger the better, in falling order."""
    rows: Int64s
    """Their rows, in rising order where keys are equal."""
    unranked: Int64s
    """The first k rows that cannot be compared: of NaN or infinity, or of length 0 where the metric is the cosine."""
    unranked_count: int
    """How many there are of those."""


def nothing(queries: Queries) -> Best:
    """Return what is found before the first row."""
    shape = len(queries.exact), queries.k
    return Best(np.full(shape, -np.inf, np.float32), np.full(shape, _NOBODY), np.empty(0, np.int64), 0)


def set_apart(rows: Int64s, queries: Queries, best: Best) -> Best:
    """Note rows that cannot be ranked."""
    unranked = np.sort(np.concatenate([best.unranked, rows]))[: queries.k]
    return best._replace(unranked=unranked, unranked_count=best.unranked_count + len(rows))


def score(all_rows: npt.NDArray[Any], places: Int64s, asking: Int32s, queries: Queries) -> npt.NDArray[np.float32]:
    """Return how near rows are to queries, pair by pair, in float64: the larger the nearer."""
    keys = np.empty(len(places), np.float32)
    step = max(1, _PAIRS_AT_ONCE // max(1, all_rows.shape[1]))
    for start in range(0, len(places), step):
        rows = all_rows[places[start : start + step]].astype(np.float64, order="C")  # summed in one order
        wanted = queries.exact[asking[start : start + step]]
        if queries.metric == "l2":
            rows -= wanted
            keys[start : start + step] = -dots(rows, rows)
        elif queries.metric == "ip":
            keys[start : start + step] = dots(rows, wanted)
        else:
            keys[start : start + step] = dots(rows, wanted) / np.sqrt(dots(rows, rows))
    return np.clip(keys, -LARGEST, LARGEST)


def keep(best: Best, rows: Int64s, asking: Int32s, keys: npt.NDArray[np.float32]) -> None:
    """Put those of the rows among the best that belong there."""
    # Small integers are sorted by their digits: a quarter of the time of ``lexsort`` (2 ms for 40,000 pairs, not 9).
    order = np.argsort(asking.astype(np.uint16) if len(best.keys) <= 2**16 else asking, kind="stable")
    counts = np.bincount(asking, minlength=len(best.keys))
    concerned, ends = np.flatnonzero(counts), np.cumsum(counts)
    step = max(1, _PLACES_AT_ONCE // best.keys.shape[1])
    for first in range(0, len(concerned), step):
        some = concerned[first : first + step]
        theirs = order[ends[some[0]] - counts[some[0]] : ends[some[-1]]]
        _keep_for(some, best, rows[theirs], asking[theirs], keys[theirs])


def _keep_for(concerned: Int64s, best: Best, rows: Int64s, asking: Int32s, keys: npt.NDArray[np.float32]) -> None:
    """Do so for some queries."""
    k = best.keys.shape[1]
    all_asking = np.concatenate([np.repeat(concerned, k), asking])
    all_keys = np.concatenate([best.keys[concerned].ravel(), keys])
    all_rows = np.concatenate([best.rows[concerned].ravel(), rows])
    order = np.lexsort((all_rows, -all_keys, all_asking))
    firsts = np.searchsorted(all_asking[order], concerned)
    kept = order[(firsts[:, None] + np.arange(k)).ravel()]
    best.keys[concerned] = all_keys[kept].reshape(-1, k)
    best.rows[concerned] = all_rows[kept].reshape(-1, k)


def merge(left: Best, right: Best) -> Best:
    """Return the best of two parts of the rows, wherever they lie."""
    k = left.keys.shape[1]
    keys, rows = np.empty_like(left.keys), np.empty_like(left.rows)
    step = max(1, _PLACES_AT_ONCE // max(1, k))
    for start in range(0, len(keys), step):
        some = slice(start, start + step)
        both_keys = np.concatenate([left.keys[some], right.keys[some]], axis=1)
        both_rows = np.concatenate([left.rows[some], right.rows[some]], axis=1)
        order = np.lexsort((both_rows, -both_keys))[:, :k]
        keys[some] = np.take_along_axis(both_keys, order, axis=1)
        rows[some] = np.take_along_axis(both_rows, order, axis=1)
    unranked = np.sort(np.concatenate([left.unranked, right.unranked]))[:k]
    return Best(keys, rows, unranked, left.unranked_count + right.unranked_count)


def finish(best: Best, queries: Queries) -> tuple[npt.NDArray[np.float32], Int64s]:
    """Return scores and rows, in the memory of the best; those that cannot be ranked come last."""
    scores, rows = best.keys, best.rows
    if queries.metric == "l2":
        np.negative(scores, out=scores)
    missing = int((rows[:1] == _NOBODY).sum())  # of each query as many
    if missing:
        rows[:, -missing:] = best.unranked[:missing]
        scores[:, -missing:] = np.nan
    scores += np.float32(0)  # no -0
    return scores, rows
