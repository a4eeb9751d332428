"""Blocks of rows: products of BLAS choose what may be among the best, by a bound of how they round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.search.best import LARGEST
from dask_embedding_reader.search.queries import Floats, Queries

FEW_QUERIES = 2
"""Up to so many are multiplied with row by row."""

_VECTORS_NBYTES = 2**22
"""The vectors of a block, at most: they are gone through twice, and are in the cache then."""

_PRODUCTS_NBYTES = 2**23
"""The products of a block with a group of queries, at most. 512, 1,024, 2,048, 4,096 and 8,192 rows for 1,000 queries
ran at 0.78, 0.83, 0.87, 0.81 and 0.75 of the product alone: fewer are multiplied more slowly, products of more leave
the cache."""

_LEAST_BLOCK_ROWS = 64
"""Below that, BLAS is slow however many queries there are. Blocks have a multiple of it."""

PAIRS_FOUND = 2**15
"""So many pairs of rows and queries that are near are found at once, at most: some 60 bytes for each of these."""

QUERIES_AT_ONCE = 1_024
"""Queries of one product: more make its block of results larger, not the product faster."""

PAIR = np.dtype([("place", np.int64), ("asking", np.int32), ("low", np.float32), ("high", np.float32)])
"""A row that may be among the best of a query, not yet scored: the row, counted in what is searched; the query; where
its key is no more than ``low`` another one scores less, rounded to float32 too; and its own key is no more than
``high``."""

Pairs = npt.NDArray[np.void]

_INFINITY = np.float32(np.inf)


def block_rows(dimension: int, queries: Queries, dtype: np.dtype[Any]) -> int:
    """Return how many rows a block has."""
    vectors = _VECTORS_NBYTES // (max(1, dimension) * dtype.itemsize)
    products = _PRODUCTS_NBYTES // (max(1, min(QUERIES_AT_ONCE, len(queries.exact))) * dtype.itemsize)
    return max(1, min(vectors, products) // _LEAST_BLOCK_ROWS) * _LEAST_BLOCK_ROWS


def measure(block: Floats, queries: Queries) -> tuple[Floats, Floats, npt.NDArray[np.bool_] | None, float]:
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
        return measure(block.astype(np.float64), queries)
    ranked = finite & np.isfinite(squares) & ((squares > 0) | (queries.metric != "cosine"))
    return block, squares, ranked, float(np.sqrt(np.max(squares, initial=0, where=ranked)))


def multiply(
    block: Floats, squares: Floats, ranked: npt.NDArray[np.bool_] | None, queries: Queries, some: slice, buffer: Floats
) -> Floats:
    """Return about how near each row is to some of the queries, up to a constant of each query."""
    products = _matmul(block, queries.select(some).factors_for(block.dtype), buffer)
    if queries.metric == "cosine":
        products *= (1 / np.sqrt(squares))[:, None]
    elif queries.metric == "l2":
        products -= squares[:, None]
    if ranked is not None:
        products[~ranked] = -np.inf
    return products


def _matmul(block: Floats, factors: Floats, buffer: Floats) -> Floats:
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


def candidates(
    products: Floats, queries: Queries, longest: float, worst: npt.NDArray[np.float64], marks: npt.NDArray[np.bool_]
) -> Iterator[Pairs]:
    """Yield which rows may be better than the worst that is kept, for which query; raise that by a first block."""
    error = queries.error_bound(longest, products.dtype) + np.finfo(np.float32).tiny  # below it, scores are equal
    offset = queries.norms**2 if queries.metric == "l2" else np.zeros(len(worst))
    is_near = marks[: products.size].reshape(products.shape)
    np.greater(products, _rounded_down(worst - error, offset, products.dtype), out=is_near)
    # Counted first: the numbers of all products of a block would take twice the memory that these take.
    count = np.count_nonzero(is_near)
    if count > 2 * queries.k * len(worst) and len(products) > queries.k:
        # The first rows of all. The best k of a block, wherever they round to, are no worse than this: the k-th of the
        # best of groups of rows, which are fewer to order than all rows (1 ms, not 11).
        size = max(1, len(products) // (8 * queries.k))
        groups = len(products) // size
        tops = products[: groups * size].reshape(groups, size, -1).max(axis=1)
        tops.partition(groups - queries.k, axis=0)
        np.maximum(worst, _surely_above(tops[groups - queries.k] - offset, error), out=worst)
        del tops
        np.greater(products, _rounded_down(worst - error, offset, products.dtype), out=is_near)
        count = np.count_nonzero(is_near)
    # Mostly all at once: a call for each 32 rows took an eighth of the time of a search.
    step = len(products) if count <= PAIRS_FOUND else max(1, PAIRS_FOUND // max(1, len(worst)))
    for start in range(0, len(products), step):
        here = slice(start, start + step)
        found = np.flatnonzero(is_near[here])
        if not len(found):
            continue
        places, asking = np.divmod(found, len(worst))
        keys = products[here].ravel()[found].astype(np.float64) - offset[asking]
        pairs = np.empty(len(found), PAIR)
        pairs["place"], pairs["asking"] = places + start, asking
        # Rounded outwards.
        pairs["low"] = np.nextafter(_surely_above(keys, error[asking]).astype(np.float32), -_INFINITY)
        pairs["high"] = np.nextafter(np.maximum(keys + error[asking], -LARGEST).astype(np.float32), _INFINITY)
        yield pairs


def raise_to(keys: npt.NDArray[np.float32], worst: npt.NDArray[np.float64]) -> None:
    """Raise the worst of each query to what its k-th row scores; not above what rounds to it, which may come first."""
    np.maximum(worst, _surely_above(keys.astype(np.float64), np.zeros(len(keys))), out=worst)


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
