"""Blocks of rows: products of BLAS choose what may be among the best, by a bound of how they round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.threads import is_stopped
from dask_embedding_reader.search.best import LARGEST, Best, keep, nothing, score, set_apart
from dask_embedding_reader.search.queries import Floats, Int64s, Queries

FEW_QUERIES = 2
"""Up to so many are multiplied with row by row."""

_BLOCK_NBYTES = 2**23
"""A block of vectors, and its products with a group of queries: smaller ones are multiplied more slowly."""

_LEAST_BLOCK_ROWS = 64
"""Below that, BLAS is slow however many queries there are."""

_QUERIES_AT_ONCE = 1_024
"""Queries of one product: more make its block of results larger, not the product faster."""

_PAIRS_WAITING = 2**18
"""_Pairs of rows and queries that wait to be scored, at most, before the next block: 8 MB."""


class _Pairs(NamedTuple):
    """Rows that may be among the best of a query, not yet scored."""

    places: Int64s
    """The rows, counted in what is searched; in rising order for each query."""
    asking: Int64s
    """Their queries."""
    low: npt.NDArray[np.float64]
    """A pair whose key is no more than this scores less, rounded to float32 too."""
    high: npt.NDArray[np.float64]
    """The key is no more than this."""

    def where(self, some: npt.NDArray[np.bool_]) -> _Pairs:
        """Return some of the pairs."""
        return _Pairs(self.places[some], self.asking[some], self.low[some], self.high[some])


def search_rows(
    rows: npt.NDArray[Any],
    first_row: int,
    queries: Queries,
    dtype: np.dtype[Any],
    best: Best | None = None,
    count: Callable[[int], object] | None = None,
) -> Best:
    """Return the best of these rows and of those before them, which ``best`` tells."""
    best = nothing(queries) if best is None else best
    if not len(rows):
        return best
    asking = len(queries.exact)
    at_once = min(_QUERIES_AT_ONCE, asking)
    step = max(_LEAST_BLOCK_ROWS, _BLOCK_NBYTES // max(1, max(rows.shape[1], at_once) * dtype.itemsize))
    # Used for every block: memory that is new each time takes longer to be had than to be compared (0.8 ms, 0.2).
    buffer = np.empty(min(step, len(rows)) * at_once, dtype)
    marks = np.empty(buffer.shape, bool)
    # Most of what is near at first is not in the end: waiting, 14,000 pairs are scored instead of 62,000 for the best
    # 10 of 100,000 rows for 1,000 queries.
    waiting: list[_Pairs] = []
    waiting_count, most_waiting = 0, min(4 * queries.k * asking, _PAIRS_WAITING)
    worst = best.keys[:, -1].astype(np.float64)
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            if is_stopped():
                break
            block, squares, ranked, longest = _measure(np.ascontiguousarray(rows[start : start + step], dtype), queries)
            if ranked is not None:
                best = set_apart(first_row + start + np.flatnonzero(~ranked), queries, best)
            for first in range(0, asking, _QUERIES_AT_ONCE):
                some = slice(first, first + _QUERIES_AT_ONCE)
                products = _products(block, squares, ranked, queries, some, buffer)
                found = _candidates(products, queries.select(some), longest, worst[some], marks)
                if found is None:
                    continue
                waiting.append(found._replace(places=found.places + start, asking=found.asking + first))
                waiting_count += len(found.places)
                if waiting_count > most_waiting:
                    pairs = _join(waiting)
                    if len(found.places) <= most_waiting:  # else the bounds cannot tell rows apart
                        pairs = _prune(pairs, worst, queries.k)
                    if len(pairs.places) > most_waiting // 2:  # equal ones, or too many queries
                        _rank(rows, first_row, pairs, queries, best)
                        np.maximum(worst, best.keys[:, -1], out=worst)
                        waiting, waiting_count = [], 0
                    else:
                        waiting, waiting_count = [pairs], len(pairs.places)
            if count is not None:
                count(len(block))
        if waiting_count:
            _rank(rows, first_row, _prune(_join(waiting), worst, queries.k), queries, best)
    return best


def _measure(block: Floats, queries: Queries) -> tuple[Floats, Floats, npt.NDArray[np.bool_] | None, float]:
    """Return the block, in float64 where float32 cannot hold squares, these, which rows can be ranked, the longest."""
    squares = _multiply_each(block, block)
    longest = np.sqrt(squares.max())
    limits = np.finfo(block.dtype)
    # NaN compares as false.
    if squares.min() > limits.tiny and (longest + queries.norms.max(initial=0)) ** 2 < limits.max / 1e3:
        return block, squares, None, float(longest)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(block).all(axis=1))
    reach = np.sqrt(np.max(squares, initial=0, where=finite)) + queries.norms.max(initial=0)
    too_small = finite & (squares <= limits.tiny) & block.any(axis=1)
    if block.dtype != np.float64 and (too_small.any() or not reach**2 < limits.max / 1e3):
        return _measure(block.astype(np.float64), queries)
    ranked = finite & np.isfinite(squares) & ((squares > 0) | (queries.metric != "cosine"))
    return block, squares, ranked, float(np.sqrt(np.max(squares, initial=0, where=ranked)))


def _products(
    block: Floats, squares: Floats, ranked: npt.NDArray[np.bool_] | None, queries: Queries, some: slice, buffer: Floats
) -> Floats:
    """Return about how near each row is to some of the queries, up to a constant of each query."""
    products = _multiply(block, queries.factors[:, some].astype(block.dtype, copy=False), buffer)
    if queries.metric == "cosine":
        products *= (1 / np.sqrt(squares))[:, None]
    elif queries.metric == "l2":
        products -= squares[:, None]
    if ranked is not None:
        products[~ranked] = -np.inf
    return products


def _multiply(block: Floats, factors: Floats, buffer: Floats) -> Floats:
    """Return the matrix product, in the buffer if it is of this type.

    Of one or two queries row by row, in this thread: BLAS would share out each product of 30 us to threads that wait
    for each other. Where other programs keep the processor busy, a pass of 0.7 s then took 18 s.
    """
    if factors.shape[1] > FEW_QUERIES:
        shape = len(block), factors.shape[1]
        out = buffer[: shape[0] * shape[1]].reshape(shape) if buffer.dtype == block.dtype else None
        product: Floats = np.matmul(block, factors, out=out)
        return product
    return np.stack([_multiply_each(block, factor[None]) for factor in factors.T], axis=1)


def _multiply_each(left: Floats, right: Floats) -> Floats:
    """Return the inner products of rows, one by one in this thread: in two thirds of the time of ``einsum``."""
    products: Floats = (left[:, None, :] @ right[:, :, None])[:, 0, 0]
    return products


def _candidates(
    products: Floats, queries: Queries, longest: float, worst: npt.NDArray[np.float64], marks: npt.NDArray[np.bool_]
) -> _Pairs | None:
    """Return which rows may be better than the worst that is kept, for which query; raise that by a first block."""
    error = queries.error_bound(longest, products.dtype) + np.finfo(np.float32).tiny  # below it, scores are equal
    offset = queries.norms**2 if queries.metric == "l2" else np.zeros(len(worst))
    is_near = marks[: products.size].reshape(products.shape)
    found = np.flatnonzero(np.greater(products, _rounded_down(worst - error, offset, products.dtype), out=is_near))
    if len(found) > 2 * queries.k * len(worst) and len(products) > queries.k:
        # The first rows of all. The best k of a block, wherever they round to, are no worse than this.
        best_here = np.partition(products, len(products) - queries.k, axis=0)[len(products) - queries.k]
        np.maximum(worst, _surely_above(best_here - offset, error), out=worst)
        found = np.flatnonzero(np.greater(products, _rounded_down(worst - error, offset, products.dtype), out=is_near))
    if not len(found):
        return None
    places, asking = np.divmod(found, max(1, len(worst)))
    keys = products.ravel()[found].astype(np.float64) - offset[asking]
    return _Pairs(places, asking, _surely_above(keys, error[asking]), keys + error[asking])


def _surely_above(keys: npt.NDArray[Any], error: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what is less than the exact keys, rounded to float32 too: of equal scores, the first row would count."""
    return _held(keys - error - 2 * np.finfo(np.float32).eps * np.abs(keys))


def _rounded_down(keys: npt.NDArray[Any], offset: Any, dtype: np.dtype[Any]) -> Floats:
    """Return the products that stand for keys."""
    products: Floats = (_held(keys) + offset).astype(dtype)
    return products


def _held(keys: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return no more than the keys: what float32 cannot hold is equal to what it just can."""
    return np.where(keys > -LARGEST, np.minimum(keys, LARGEST * (1 - 1e-6)), -np.inf)


def _join(waiting: list[_Pairs]) -> _Pairs:
    return _Pairs(*map(np.concatenate, zip(*waiting, strict=True)))


def _prune(waiting: _Pairs, worst: npt.NDArray[np.float64], k: int) -> _Pairs:
    """Return the pairs that may still be among the best; raise the worst of each query to what k of them reach."""
    waiting = waiting.where(waiting.high > worst[waiting.asking])
    counts = np.bincount(waiting.asking, minlength=len(worst))
    full = np.flatnonzero(counts >= k)
    order = np.argsort(-waiting.low)
    # Small integers are sorted by their digits, and the sort is stable: a quarter of the time of ``lexsort`` (2 ms
    # for 40,000 pairs, not 9).
    kind = np.uint16 if len(worst) <= 2**16 else np.int64
    order = order[np.argsort(waiting.asking[order].astype(kind), kind="stable")]
    worst[full] = np.maximum(worst[full], waiting.low[order[(np.cumsum(counts) - counts)[full] + k - 1]])
    return waiting.where(waiting.high > worst[waiting.asking])


def _rank(rows: npt.NDArray[Any], first_row: int, waiting: _Pairs, queries: Queries, best: Best) -> None:
    """Score the pairs, and put those among the best that belong there."""
    if len(waiting.places):
        keys = score(rows, waiting.places, waiting.asking, queries)
        keep(best, first_row + waiting.places, waiting.asking, keys)
