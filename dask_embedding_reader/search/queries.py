"""What is looked for, checked and made ready for products."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError
from dask_embedding_reader.reader import EmbeddingReader

Floats = npt.NDArray[np.floating[Any]]
Int64s = npt.NDArray[np.int64]
Metric = Literal["cosine", "ip", "l2"]


class Queries(NamedTuple):
    """What is looked for, made ready for products."""

    metric: Metric
    exact: npt.NDArray[np.float64]
    """The queries, of length 1 where the metric is the cosine."""
    factors: Floats
    """What blocks of this dtype are multiplied by: the queries, twice those for distances; one query a column."""
    norms: npt.NDArray[np.float64]
    """The length of each query."""
    k: int
    """How many rows are wanted of each."""

    def select(self, some: slice) -> Queries:
        """Return some of the queries."""
        return self._replace(exact=self.exact[some], factors=self.factors[:, some], norms=self.norms[some])

    def factors_for(self, dtype: np.dtype[Any]) -> Floats:
        """Return what blocks of a dtype are multiplied by: not rounded to a narrower one, which may not hold it."""
        return self.factors if dtype == self.factors.dtype else _factors(self.exact, self.metric).astype(dtype)

    def error_bound(self, longest: float, dtype: np.dtype[Any]) -> npt.NDArray[np.float64]:
        """Return how far products with vectors of at most a length may be from the exact ones, for each query."""
        # Of each of d products and sums at most half a unit in the last place, and a few more; twice that.
        slack = (self.exact.shape[1] + 16) * float(np.finfo(dtype).eps)
        if self.metric == "cosine":
            return np.full(len(self.norms), slack)
        if self.metric == "ip":
            return np.asarray(self.norms * (slack * longest))
        return np.asarray(2 * slack * (self.norms + longest) ** 2)


def check_queries(queries: Any, dimension: int, dtype: np.dtype[Any], metric: Metric) -> tuple[Floats, bool]:
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
    with np.errstate(over="ignore"):
        fit = np.isfinite(dots(rows, rows)) if metric != "cosine" and dtype == np.float64 else finite
    if not fit.all():
        raise ArgumentError(
            f"query {int(fit.argmin()):,} is longer than 1e154, and its square is infinite; scale queries and vectors, "
            'or use metric="cosine"'
        )
    if metric == "cosine" and not (some := rows.any(axis=1)).all():
        raise ArgumentError(
            f'query {int(some.argmin()):,} is of length 0, which no cosine has; use metric="ip" or metric="l2"'
        )
    return rows, given.ndim == 1


def prepare(queries: Floats, metric: Metric, k: int) -> Queries:
    """Make checked queries ready."""
    exact = queries.astype(np.float64)
    if metric == "cosine":
        # The largest item first: squares of very small or large ones would be 0 or infinite.
        exact /= np.maximum(exact.max(axis=1, keepdims=True), -exact.min(axis=1, keepdims=True))
        exact /= np.sqrt(dots(exact, exact))[:, None]
    with np.errstate(over="ignore"):  # not used then: squares of these are infinite, too
        factors = _factors(exact, metric).astype(queries.dtype)
    return Queries(metric, exact, factors, np.sqrt(dots(exact, exact)).astype(np.float64), k)


def _factors(exact: Floats, metric: Metric) -> Floats:
    return (exact * 2 if metric == "l2" else exact).T


def dots(left: Floats, right: Floats) -> Floats:
    """Return the inner products of rows."""
    products: Floats = np.einsum("ij,ij->i", left, right)
    return products
