"""Exact nearest neighbours: one pass over all rows, the best of each query kept.

The products of BLAS only choose candidates: how they round depends on the shape of a block, so that equal vectors would
get unequal scores. What may be among the best, by a bound of that rounding, is scored again in float64. So scores and
order depend on the data alone, not on blocks, chunks, threads or machines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.arguments import check_nbytes, check_positive
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError
from dask_embedding_reader.lazy.iter_batches import active_client, checked_array, iter_batches
from dask_embedding_reader.reader import EmbeddingReader

if TYPE_CHECKING:
    import dask.array as da

Floats = npt.NDArray[np.floating[Any]]
Int64s = npt.NDArray[np.int64]
Metric = Literal["cosine", "ip", "l2"]

_BLOCK_NBYTES = 2**22
"""A block of vectors, and its products with a group of queries: small enough to stay in the processor's cache."""

_FEW_QUERIES = 2
"""Up to so many are multiplied with row by row."""

_LEAST_BLOCK_ROWS = 64
"""Below that, BLAS is slow however many queries there are."""

_QUERIES_AT_ONCE = 1_024
"""Queries of one product: more make its block of results larger, not the product faster."""

_BATCH_NBYTES = 2**23
"""What is read at once."""

_PAIRS_AT_ONCE = 2**19
"""Items of vectors that are scored in float64 at once: 4 MB of each side."""

_PAIRS_WAITING = 2**18
"""Pairs of rows and queries that wait to be scored, at most, before the next block: 8 MB."""

_LARGEST = np.finfo(np.float32).max
"""Scores beyond it are this one: infinitely far is a place that is not filled."""

_NOBODY = np.iinfo(np.int64).max
"""The row of a place that is not filled: behind all others."""


class _Queries(NamedTuple):
    """What is looked for, made ready for products."""

    metric: Metric
    exact: npt.NDArray[np.float64]
    """The queries, of length 1 where the metric is the cosine."""
    factors: Floats
    """What blocks are multiplied by: the queries, twice those for distances; one query a column."""
    norms: npt.NDArray[np.float64]
    """The length of each query."""
    k: int
    """How many rows are wanted of each."""

    def select(self, some: slice) -> _Queries:
        """Return some of the queries."""
        return self._replace(exact=self.exact[some], factors=self.factors[:, some], norms=self.norms[some])

    def error_bound(self, longest: float, dtype: np.dtype[Any]) -> npt.NDArray[np.float64]:
        """Return how far products with vectors of at most a length may be from the exact ones, for each query."""
        # Of each of d products and sums at most half a unit in the last place, and a few more; twice that.
        slack = (self.exact.shape[1] + 16) * float(np.finfo(dtype).eps)
        if self.metric == "cosine":
            return np.full(len(self.norms), slack)
        if self.metric == "ip":
            return np.asarray(self.norms * (slack * longest))
        return np.asarray(2 * slack * (self.norms + longest) ** 2)


class _Best(NamedTuple):
    """The best rows so far."""

    keys: npt.NDArray[np.float32]
    """Queries x k, the larger the better, in falling order."""
    rows: Int64s
    """Their rows, in rising order where keys are equal."""
    unranked: Int64s
    """The first k rows that cannot be compared: of NaN or infinity, or of length 0 where the metric is the cosine."""
    unranked_count: int
    """How many there are of those."""


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


def nearest(
    source: EmbeddingReader | da.Array | npt.NDArray[Any],
    queries: npt.ArrayLike,
    k: int = 10,
    *,
    metric: Metric = "cosine",
    max_ram_usage_in_bytes: int | str = 2**32,
) -> tuple[npt.NDArray[np.float32], Int64s]:
    """Find the rows that are nearest to each query: exactly, in one pass over all of them.

    Parameters
    ----------
    source : EmbeddingReader, dask.array.Array or numpy.ndarray
        The vectors, of shape ``(rows, dimension)``: a collection or a view of one, or any array.
    queries : array-like
        One vector of shape ``(dimension,)``, or several of shape ``(queries, dimension)``. They are compared in
        float32; in float64 where float32 cannot hold the values of ``source``.
    k : int, default 10
        How many rows to find for each query; all rows where there are fewer.
    metric : {"cosine", "ip", "l2"}, default "cosine"
        The cosine of the angle, the inner product (both: the larger the nearer), or the squared Euclidean distance
        (the smaller the nearer).
    max_ram_usage_in_bytes : int or str, default 4 GiB
        The memory that reading may hold, as in ``reader(batch_size)``. On a cluster, that of its workers counts.

    Returns
    -------
    scores : numpy.ndarray of float32
        Of shape ``(queries, k)``, or ``(k,)`` for a single vector; the best first.
    rows : numpy.ndarray of int64
        Of the same shape: the rows of ``source`` that have these scores, counted in it, as ``source.take(rows)`` takes
        them. Of rows with equal scores the first ones come first.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument makes no sense: another dimension, a query of NaN, or of length 0 where the metric is the cosine.
    ReadError, FileChangedError, FormatError
        If a file cannot be read.

    Warns
    -----
    UserWarning
        If rows hold NaN or infinity, or are of length 0 where the metric is the cosine: they come after all others,
        with the score NaN.

    Notes
    -----
    With an active ``distributed.Client``, each chunk is searched by a task, and a tree of tasks joins what they found.
    Elsewhere batches are searched as they are read. Products are made by BLAS in blocks that stay in the processor's
    cache; what can be among the best, by the bound of [1]_ for the rounding of products, is scored again in float64.

    References
    ----------
    .. [1] N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.array([[1, 0], [0, 1], [2, 2], [-1, 0]], "float16")
    >>> scores, rows = nearest(vectors, [1, 0.1], k=2)
    >>> rows.tolist()
    [0, 2]
    >>> scores, rows = nearest(vectors, [[0, 1], [-1, -1]], k=1, metric="l2")
    >>> scores.tolist(), rows.tolist()
    ([[0.0], [1.0]], [[1], [3]])
    """
    vectors = _check_source(source)
    wanted = check_positive("k", k)
    if metric not in get_args(Metric):
        raise ArgumentError(f"metric={metric!r} is none of {', '.join(map(repr, get_args(Metric)))}")
    limit_nbytes = check_nbytes("max_ram_usage_in_bytes", max_ram_usage_in_bytes)
    rows, dimension = (vectors.count, vectors.dimension) if isinstance(vectors, EmbeddingReader) else vectors.shape
    dtype = np.dtype(np.float32 if np.can_cast(vectors.dtype, np.float32) else np.float64)
    given, is_one = _check_queries(queries, int(dimension), dtype, metric)
    asked = _prepare(given, metric, min(wanted, int(rows)))
    best = _search(vectors, asked, dtype, limit_nbytes)
    if best.unranked_count:
        zero = " or are of length 0" if metric == "cosine" else ""
        warnings.warn(
            f"{best.unranked_count:,} of {rows:,} rows hold NaN or infinity{zero}, such as row "
            f"{best.unranked[0]:,}: they come after all others, with the score NaN",
            stacklevel=2,
        )
    scores, found = _finish(best, asked)
    return (scores[0], found[0]) if is_one else (scores, found)


def _check_source(source: Any) -> Any:
    """Return what is searched, if it holds vectors of numbers."""
    if isinstance(source, EmbeddingReader):
        shape, dtype = (source.count, source.dimension), source.dtype
    elif isinstance(source, np.ndarray):
        shape, dtype = source.shape, source.dtype
    else:
        try:
            shape, dtype = checked_array(source).shape, source.dtype
        except ArgumentTypeError as error:
            raise ArgumentTypeError(
                f"source must be an EmbeddingReader, a Dask array or a numpy array: {error}"
            ) from error
    if len(shape) != 2:
        raise ArgumentError(f"source has the shape {shape}, but vectors have two axes: (rows, dimension)")
    if np.dtype(dtype).kind not in "biuf":
        raise ArgumentError(f"source holds {dtype}, which cannot be compared; real numbers are needed")
    return source


def _check_queries(queries: Any, dimension: int, dtype: np.dtype[Any], metric: Metric) -> tuple[Floats, bool]:
    """Return the queries as rows, and whether a single vector was given."""
    if isinstance(queries, EmbeddingReader):
        raise ArgumentTypeError("queries must be an array, not a reader; queries.to_dask_array() makes one of it")
    given = np.asarray(queries)
    if given.dtype.kind not in "biuf":
        raise ArgumentTypeError(f"queries hold {given.dtype}, which cannot be compared; real numbers are needed")
    if given.ndim not in (1, 2) or given.shape[-1] != dimension:
        raise ArgumentError(
            f"queries have the shape {given.shape}, but the vectors have {dimension:,} items: expected ({dimension},) "
            f"or (queries, {dimension})"
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(np.atleast_2d(given), dtype)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ArgumentError(f"query {int(finite.argmin()):,} holds NaN, infinity, or what {dtype} cannot hold")
    if metric == "cosine" and not (some := rows.any(axis=1)).all():
        raise ArgumentError(
            f'query {int(some.argmin()):,} is of length 0, which no cosine has; use metric="ip" or "l2"'
        )
    return rows, given.ndim == 1


def _prepare(queries: Floats, metric: Metric, k: int) -> _Queries:
    exact = queries.astype(np.float64)
    if metric == "cosine":
        # The largest item first: squares of very small or large ones would be 0 or infinite.
        exact /= np.abs(exact).max(axis=1, keepdims=True)
        exact /= np.sqrt(_dots(exact, exact))[:, None]
    factors = (exact * 2 if metric == "l2" else exact).astype(queries.dtype)
    return _Queries(metric, exact, factors.T, np.sqrt(_dots(exact, exact)).astype(np.float64), k)


def _search(source: Any, queries: _Queries, dtype: np.dtype[Any], limit_nbytes: int) -> _Best:
    """Search all rows, where they are computed."""
    if isinstance(source, np.ndarray):
        return _search_rows(source, 0, queries, dtype)
    if active_client() is not None:
        return _search_chunks(source.to_dask_array() if isinstance(source, EmbeddingReader) else source, queries, dtype)
    best, row = _nothing(queries), 0
    for rows in _batches(source, dtype, limit_nbytes):
        best = _search_rows(rows, row, queries, dtype, best)
        row += len(rows)
    return best


def _batches(source: Any, dtype: np.dtype[Any], limit_nbytes: int) -> Iterator[npt.NDArray[Any]]:
    if isinstance(source, EmbeddingReader):
        batch_rows = max(1, _BATCH_NBYTES // max(1, source.dimension * dtype.itemsize))
        batches = source(
            batch_rows, show_progress=False, max_ram_usage_in_bytes=limit_nbytes, dtype=_read_as(source.dtype, dtype)
        )
    else:
        batch_rows = max(1, _BATCH_NBYTES // max(1, source.shape[1] * source.dtype.itemsize))
        batches = iter_batches(source, batch_size=batch_rows, max_ram_usage_in_bytes=limit_nbytes)
    return (rows for rows, _ in batches)


def _read_as(stored: np.dtype[Any], dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the dtype to read: half floats are widened best by who reads them, narrow integers in our blocks."""
    return dtype if stored.kind == "f" else None


def _search_chunks(array: da.Array, queries: _Queries, dtype: np.dtype[Any]) -> _Best:
    """Search each chunk by a task of its own, and join what they found in a tree of tasks."""
    import dask.array as da  # noqa: PLC0415 - only here
    from dask.delayed import delayed  # noqa: PLC0415

    array = array.rechunk({1: -1})
    sizes = np.array(array.chunks[0], np.int64)
    starts = da.from_array(np.cumsum(sizes) - sizes, chunks=1).reshape(-1, 1)
    found = da.map_blocks(
        _search_chunk,
        array,
        starts,
        queries=delayed(queries, traverse=False),
        dtype_of_products=dtype,
        dtype=object,
        chunks=((1,) * len(sizes), (1,)),
        meta=np.empty((0, 0), object),
    )
    joined = da.reduction(
        found, chunk=_join, combine=_join, aggregate=_join, axis=(0, 1), split_every=16, dtype=object, meta=_box(None)
    )
    best: _Best = joined.compute().item()
    return best


def _box(value: Any) -> npt.NDArray[Any]:
    boxed = np.empty((), object)
    boxed[()] = value
    return boxed


def _search_chunk(
    rows: npt.NDArray[Any], start: npt.NDArray[Any], queries: _Queries, dtype_of_products: np.dtype[Any]
) -> npt.NDArray[Any]:
    return _box(_search_rows(rows, int(start.item()), queries, dtype_of_products)).reshape(1, 1)


def _join(found: npt.NDArray[Any], axis: Any, keepdims: bool) -> npt.NDArray[Any]:  # noqa: ARG001 - Dask passes it
    joined = _box(reduce(_merge, found.ravel().tolist()))
    return joined.reshape((1,) * found.ndim) if keepdims else joined


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of rows


def _nothing(queries: _Queries) -> _Best:
    shape = len(queries.exact), queries.k
    return _Best(np.full(shape, -np.inf, np.float32), np.full(shape, _NOBODY), np.empty(0, np.int64), 0)


def _search_rows(
    rows: npt.NDArray[Any], first_row: int, queries: _Queries, dtype: np.dtype[Any], best: _Best | None = None
) -> _Best:
    """Return the best of these rows and of those before them, which ``best`` tells."""
    best = _nothing(queries) if best is None else best
    if not len(rows):
        return best
    count = len(queries.exact)
    at_once = min(_QUERIES_AT_ONCE, count)
    step = max(_LEAST_BLOCK_ROWS, _BLOCK_NBYTES // max(1, max(rows.shape[1], at_once) * dtype.itemsize))
    # Used for every block: memory that is new each time takes longer to be had than to be compared (0.8 ms, 0.2).
    buffer = np.empty(min(step, len(rows)) * at_once, dtype)
    marks = np.empty(buffer.shape, bool)
    # Most of what is near at first is not in the end: waiting, 14,000 pairs are scored instead of 62,000 for the best
    # 10 of 100,000 rows for 1,000 queries.
    waiting, most_waiting = _no_pairs(), min(4 * queries.k * count, _PAIRS_WAITING)
    worst = best.keys[:, -1].astype(np.float64)
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            block, squares, ranked, longest = _measure(np.ascontiguousarray(rows[start : start + step], dtype), queries)
            if ranked is not None:
                best = _set_apart(first_row + start + np.flatnonzero(~ranked), queries, best)
            for first in range(0, count, _QUERIES_AT_ONCE):
                some = slice(first, first + _QUERIES_AT_ONCE)
                products = _products(block, squares, ranked, queries, some, buffer)
                found = _candidates(products, queries.select(some), longest, worst[some], marks)
                waiting = _append(waiting, found._replace(places=found.places + start, asking=found.asking + first))
                if len(waiting.places) > most_waiting:
                    if len(found.places) <= most_waiting:  # else the bounds cannot tell rows apart
                        waiting = _prune(waiting, worst, queries.k)
                    if len(waiting.places) > most_waiting // 2:  # equal ones, or too many queries
                        _rank(rows, first_row, waiting, queries, best)
                        waiting = _no_pairs()
                        np.maximum(worst, best.keys[:, -1], out=worst)
        _rank(rows, first_row, _prune(waiting, worst, queries.k), queries, best)
    return best


def _measure(block: Floats, queries: _Queries) -> tuple[Floats, Floats, npt.NDArray[np.bool_] | None, float]:
    """Return the block, in float64 where float32 cannot hold squares, these, which rows can be ranked, the longest."""
    squares = _dots(block, block)
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


def _set_apart(rows: Int64s, queries: _Queries, best: _Best) -> _Best:
    """Note rows that cannot be ranked."""
    unranked = np.concatenate([best.unranked, rows])[: queries.k]
    return best._replace(unranked=unranked, unranked_count=best.unranked_count + len(rows))


def _products(
    block: Floats, squares: Floats, ranked: npt.NDArray[np.bool_] | None, queries: _Queries, some: slice, buffer: Floats
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
    if factors.shape[1] > _FEW_QUERIES:
        shape = len(block), factors.shape[1]
        out = buffer[: shape[0] * shape[1]].reshape(shape) if buffer.dtype == block.dtype else None
        product: Floats = np.matmul(block, factors, out=out)
        return product
    return np.concatenate([(block[:, None, :] @ factor[:, None])[:, 0] for factor in factors.T], axis=1)


def _candidates(
    products: Floats, queries: _Queries, longest: float, worst: npt.NDArray[np.float64], marks: npt.NDArray[np.bool_]
) -> _Pairs:
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
    return np.where(keys > -_LARGEST, np.minimum(keys, _LARGEST * (1 - 1e-6)), -np.inf)


def _no_pairs() -> _Pairs:
    return _Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))


def _append(waiting: _Pairs, found: _Pairs) -> _Pairs:
    return _Pairs(
        np.concatenate([waiting.places, found.places]),
        np.concatenate([waiting.asking, found.asking]),
        np.concatenate([waiting.low, found.low]),
        np.concatenate([waiting.high, found.high]),
    )


def _prune(waiting: _Pairs, worst: npt.NDArray[np.float64], k: int) -> _Pairs:
    """Return the pairs that may still be among the best; raise the worst of each query to what k of them reach."""
    waiting = waiting.where(waiting.high > worst[waiting.asking])
    counts = np.bincount(waiting.asking, minlength=len(worst))
    full = np.flatnonzero(counts >= k)
    order = np.lexsort((-waiting.low, waiting.asking))
    worst[full] = np.maximum(worst[full], waiting.low[order[(np.cumsum(counts) - counts)[full] + k - 1]])
    return waiting.where(waiting.high > worst[waiting.asking])


def _rank(rows: npt.NDArray[Any], first_row: int, waiting: _Pairs, queries: _Queries, best: _Best) -> None:
    """Score the pairs, and put those among the best that belong there."""
    if len(waiting.places):
        keys = _score(rows, waiting.places, waiting.asking, queries)
        _keep(best, first_row + waiting.places, waiting.asking, keys)


def _score(all_rows: npt.NDArray[Any], places: Int64s, asking: Int64s, queries: _Queries) -> npt.NDArray[np.float32]:
    """Return how near rows are to queries, pair by pair, in float64: the larger the nearer."""
    keys = np.empty(len(places), np.float32)
    step = max(1, _PAIRS_AT_ONCE // max(1, all_rows.shape[1]))
    for start in range(0, len(places), step):
        rows = all_rows[places[start : start + step]].astype(np.float64, order="C")  # summed in one order
        wanted = queries.exact[asking[start : start + step]]
        if queries.metric == "l2":
            rows -= wanted
            keys[start : start + step] = -_dots(rows, rows)
        elif queries.metric == "ip":
            keys[start : start + step] = _dots(rows, wanted)
        else:
            keys[start : start + step] = _dots(rows, wanted) / np.sqrt(_dots(rows, rows))
    return np.clip(keys, -_LARGEST, _LARGEST)


def _keep(best: _Best, rows: Int64s, asking: Int64s, keys: npt.NDArray[np.float32]) -> None:
    """Put those of the rows among the best that belong there."""
    better = keys > best.keys[asking, -1]  # equal ones come later in the collection
    rows, asking, keys = rows[better], asking[better], keys[better]
    concerned = np.unique(asking)
    k = best.keys.shape[1]
    all_asking = np.concatenate([np.repeat(concerned, k), asking])
    all_keys = np.concatenate([best.keys[concerned].ravel(), keys])
    all_rows = np.concatenate([best.rows[concerned].ravel(), rows])
    order = np.lexsort((all_rows, -all_keys, all_asking))
    firsts = np.searchsorted(all_asking[order], concerned)
    kept = order[(firsts[:, None] + np.arange(k)).ravel()]
    best.keys[concerned] = all_keys[kept].reshape(-1, k)
    best.rows[concerned] = all_rows[kept].reshape(-1, k)


def _merge(left: _Best, right: _Best) -> _Best:
    """Return the best of two parts of the rows, wherever they lie."""
    k = left.keys.shape[1]
    keys = np.concatenate([left.keys, right.keys], axis=1)
    rows = np.concatenate([left.rows, right.rows], axis=1)
    order = np.lexsort((rows, -keys))[:, :k]
    unranked = np.sort(np.concatenate([left.unranked, right.unranked]))[:k]
    return _Best(
        np.take_along_axis(keys, order, axis=1),
        np.take_along_axis(rows, order, axis=1),
        unranked,
        left.unranked_count + right.unranked_count,
    )


def _finish(best: _Best, queries: _Queries) -> tuple[npt.NDArray[np.float32], Int64s]:
    """Return scores and rows; those that cannot be ranked come last."""
    scores, rows = (-best.keys if queries.metric == "l2" else best.keys), best.rows
    missing = int((rows[:1] == _NOBODY).sum())  # of each query as many
    if missing:
        rows[:, -missing:] = best.unranked[:missing]
        scores[:, -missing:] = np.nan
    return scores + np.float32(0), rows  # no -0


def _dots(left: Floats, right: Floats) -> Floats:
    """Return the inner products of rows."""
    products: Floats = np.einsum("ij,ij->i", left, right)
    return products
