"""Exact nearest neighbours: one pass over all rows, the best of each query kept.

The products of BLAS only choose candidates: how they round depends on the shape of a block, so that equal vectors would
get unequal scores. What may be among the best, by a bound of that rounding, is scored again in float64. So scores and
order depend on the data alone, not on blocks, chunks, threads or machines.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.arguments import check_nbytes, check_positive
from dask_embedding_reader._common.progress import Progress, progress_bar
from dask_embedding_reader._common.threads import threads_at_once
from dask_embedding_reader.batches.pieces import reads_apart, use_pieces
from dask_embedding_reader.batches.read import read_batches
from dask_embedding_reader.batches.request import span_of
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError
from dask_embedding_reader.lazy.iter_batches import active_client, checked_array, iter_batches
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.search.best import Best, finish, merge
from dask_embedding_reader.search.blas import SINGLE_THREADED
from dask_embedding_reader.search.blocks import FEW_QUERIES, block_rows
from dask_embedding_reader.search.queries import Int64s, Metric, Queries, check_queries, prepare
from dask_embedding_reader.search.searcher import Searcher

if TYPE_CHECKING:
    import dask.array as da

_THREADS = os.cpu_count() or 1
"""What is in memory is searched in so many."""

_PIECE_NBYTES = 2**22
"""What a thread reads and searches at once: it is still in the processor's cache then."""


def nearest(
    source: EmbeddingReader | da.Array | npt.NDArray[Any],
    queries: npt.ArrayLike,
    k: int = 10,
    *,
    metric: Metric = "cosine",
    max_ram_usage_in_bytes: int | str = 2**32,
    show_progress: bool = False,
) -> tuple[npt.NDArray[np.float32], Int64s]:
    """Find the rows that are nearest to each query: exactly, in one pass over all of them.

    Parameters
    ----------
    source : EmbeddingReader, dask.array.Array or numpy.ndarray
        The vectors, of shape ``(rows, dimension)``: a collection or a view of one, or any array.
    queries : array_like
        One vector of shape ``(dimension,)``, or several of shape ``(queries, dimension)``. They are compared in
        float32; in float64 where float32 cannot hold the values of ``source``.
    k : int, default 10
        How many rows to find for each query; all rows where there are fewer.
    metric : {"cosine", "ip", "l2"}, default "cosine"
        The cosine of the angle, the inner product (both: the larger the nearer), or the squared Euclidean distance
        (the smaller the nearer).
    max_ram_usage_in_bytes : int or str, default 4 GiB
        The memory that reading may hold, as in ``reader(batch_size)``; see below for the rest. On a cluster, that of
        its workers counts.
    show_progress : bool, default False
        Whether to show a progress bar, in a terminal or notebook; not on a cluster, whose dashboard does.

    Returns
    -------
    scores : numpy.ndarray of float32
        Of shape ``(queries, k)``, or ``(k,)`` for a single vector; the best first.
    rows : numpy.ndarray of int64
        Of the same shape: the rows of ``source`` that have these scores, counted in it, as ``source.take(rows)`` takes
        them. Of rows with equal scores, as all are beyond the largest float32 (3.4e38), the first ones come first.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument makes no sense: another dimension, a query of NaN, or of length 0 where the metric is the cosine.
    ReadError, FileChangedError, FormatError
        If a file cannot be read.

    Warns
    -----
    UserWarning
        If rows hold NaN or infinity, or values beyond 1e154, whose squares are infinite, or are of length 0 where the
        metric is the cosine: they come after all others, with the score NaN.

    Notes
    -----
    With an active ``distributed.Client``, each chunk is searched by a task, and a tree of tasks joins what they found.
    Elsewhere as many threads search as there are processors: local files as they read them, anything else block by
    block. BLAS has one thread for each of these meanwhile, also where others use it in this process. Products are made
    in blocks that stay in the processor's cache; what can be among the best, by the bound of [1]_ for the rounding of
    products, is scored again in float64.

    Beside what reading holds, memory grows by 12 bytes for each item of the queries and for each place of the result,
    and in each thread by up to 20 MB for two blocks, of vectors and of products, and what may be near; by up to 35 MB
    where ``k`` times the queries is more than 10,000.

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
    given, is_one = check_queries(queries, int(dimension), dtype, metric)
    asked = prepare(given, metric, min(wanted, int(rows)))
    row_nbytes = int(dimension) * np.dtype(vectors.dtype).itemsize
    with progress_bar(bool(show_progress), int(rows), "searching", " embeddings", row_nbytes) as progress:
        best = _search(vectors, asked, dtype, limit_nbytes, progress)
    if best.unranked_count:
        zero = " or are of length 0," if metric == "cosine" else ""
        warnings.warn(
            f"{best.unranked_count:,} of {rows:,} rows hold NaN or infinity, also as a square,{zero} such as row "
            f"{best.unranked[0]:,}: they come after all others, with the score NaN",
            stacklevel=2,
        )
    scores, found = finish(best, asked)
    return (scores[0], found[0]) if is_one else (scores, found)


def _check_source(source: Any) -> Any:
    """Return what is searched, if it holds vectors of numbers."""
    if isinstance(source, EmbeddingReader):
        shape, dtype = (source.count, source.dimension), source.dtype
    elif isinstance(source, np.ndarray):
        shape, dtype = source.shape, source.dtype
    elif isinstance(source, str | os.PathLike):
        raise ArgumentTypeError(
            "source must be an EmbeddingReader, a Dask array or a numpy array, not a path; "
            f"EmbeddingReader({os.fspath(source)!r}) opens what it names"
        )
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


def _search(source: Any, queries: Queries, dtype: np.dtype[Any], limit_nbytes: int, progress: Progress) -> Best:
    """Search all rows, where they are computed."""
    in_memory = isinstance(source, np.ndarray)
    if not in_memory and active_client() is not None:
        return _search_chunks(source.to_dask_array() if isinstance(source, EmbeddingReader) else source, queries, dtype)
    with _blas_of(queries):
        if isinstance(source, EmbeddingReader) and reads_apart(source.manifest):
            first, stop, selected = span_of(source.rows)
            if selected is None:
                return _search_pieces(source, first, stop, queries, dtype, progress)
        step = block_rows(int(source.shape[1]), queries, dtype)
        batches = iter([source]) if in_memory else _batches(source, dtype, step * _THREADS, limit_nbytes)
        return _search_batches(batches, step, queries, dtype, progress)


def _search_batches(
    batches: Iterator[npt.NDArray[Any]], step: int, queries: Queries, dtype: np.dtype[Any], progress: Progress
) -> Best:
    """Search each batch in threads, which take a block of so many rows after the other."""
    counting, searcher, row = threading.Lock(), Searcher(queries, dtype), 0

    def count(rows: int) -> None:
        with counting:
            progress.update(rows)

    with threads_at_once(_THREADS) as pool:
        for rows in batches:
            starts = deque(range(0, len(rows), step))
            if len(starts) == 1:
                searcher.search(rows, row, starts, count)
            else:
                threads = [pool.submit(searcher.search, rows, row, starts, count) for _ in range(_THREADS)]
                for thread in threads:
                    thread.result()
            row += len(rows)
    return searcher.best


def _blas_of(queries: Queries) -> AbstractContextManager[None]:
    """Return a block in which threads of ours multiply; few queries are multiplied without BLAS."""
    return nullcontext() if len(queries.exact) <= FEW_QUERIES else SINGLE_THREADED


def _search_pieces(
    reader: EmbeddingReader, start: int, stop: int, queries: Queries, dtype: np.dtype[Any], progress: Progress
) -> Best:
    """Search in the threads that read, which takes less than to hand over what was read."""
    wanted = _read_as(reader.dtype, dtype)
    piece_rows = max(1, _PIECE_NBYTES // max(1, reader.dimension * wanted.itemsize))
    step, searcher = block_rows(reader.dimension, queries, dtype), Searcher(queries, dtype)

    def search(first: int, rows: npt.NDArray[Any]) -> None:
        searcher.search(rows, first - start, deque(range(0, len(rows), step)))

    use_pieces(reader.manifest, start, stop, piece_rows, wanted, search, progress)
    return searcher.best


def _batches(source: Any, dtype: np.dtype[Any], rows: int, limit_nbytes: int) -> Iterator[npt.NDArray[Any]]:
    """Yield so many rows at once, or fewer where memory is short."""
    if isinstance(source, EmbeddingReader):
        read_as = _read_as(source.dtype, dtype)
        rows = max(1, min(rows, limit_nbytes // 8 // max(1, source.dimension * read_as.itemsize)))
        request = source._request(
            rows,
            0,
            None,
            max_piece_size=None,
            parallel_pieces=None,
            show_progress=False,
            max_ram_usage_in_bytes=limit_nbytes,
            dtype=read_as,
        )
        batches = read_batches(source.manifest, request)  # without a word of the order: it decides nothing here
    else:
        rows = max(1, min(rows, limit_nbytes // 8 // max(1, source.shape[1] * source.dtype.itemsize)))
        batches = iter_batches(source, batch_size=rows, max_ram_usage_in_bytes=limit_nbytes)
    return (vectors for vectors, _ in batches)


def _read_as(stored: np.dtype[Any], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype to read: half floats are widened best by who reads them, narrow integers in our blocks."""
    return dtype if stored.kind == "f" else stored


def _search_chunks(array: da.Array, queries: Queries, dtype: np.dtype[Any]) -> Best:
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
    best: Best = joined.compute().item()
    return best


def _box(value: Any) -> npt.NDArray[Any]:
    boxed = np.empty((), object)
    boxed[()] = value
    return boxed


def _search_chunk(
    rows: npt.NDArray[Any], start: npt.NDArray[Any], queries: Queries, dtype_of_products: np.dtype[Any]
) -> npt.NDArray[Any]:
    searcher = Searcher(queries, dtype_of_products)
    starts = deque(range(0, len(rows), block_rows(rows.shape[1], queries, dtype_of_products)))
    return _box(searcher.search(rows, int(start.item()), starts).best).reshape(1, 1)


def _join(found: npt.NDArray[Any], axis: Any, keepdims: bool) -> npt.NDArray[Any]:  # noqa: ARG001 - Dask passes it
    joined = _box(reduce(merge, found.ravel().tolist()))
    return joined.reshape((1,) * found.ndim) if keepdims else joined
