"""Batches of any lazy array, in order, within a memory limit: every task of its graph is computed once.

Here is what is asked for, and whether it can be had. Then the tasks of the graph are sorted (``schedule``), computed
ahead of the consumer (``window``), in threads or on a cluster (``engines``).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.base import get_scheduler

from dask_embedding_reader._common.arguments import check_nbytes, check_positive
from dask_embedding_reader.batches.request import Batch
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, MismatchError
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.lazy.p2p import rechunked_by_tasks
from dask_embedding_reader.lazy.window import Request, iterate

if TYPE_CHECKING:
    import distributed


def iter_batches(
    array: da.Array,
    frame: dd.DataFrame | pd.DataFrame | None = None,
    *,
    batch_size: int,
    max_ram_usage_in_bytes: int | str = 2**32,
    show_progress: bool = False,
) -> Iterator[Batch]:
    """Iterate over the rows of any Dask array in batches, in order, computed ahead within a memory limit.

    Every chunk is computed once, however many batches it falls into, and let go when its last row is out. What is
    combined from all rows and needed for all of them, such as ``x.mean(axis=0)``, is computed first; the chunks it
    was computed from are computed again for the batches rather than held.

    Runs on the threads of this process, or on the active ``distributed.Client`` where there is one, also within a task
    of its cluster. What is persisted there is used as it is. Leaving the loop early stops the computation.

    Parameters
    ----------
    array : dask.array.Array
        Any array whose first axis is the rows, with known chunks along it.
    frame : dask.dataframe.DataFrame or pandas.DataFrame, optional
        Metadata, row for row beside the array: a frame with as many rows in each partition as the array has in the
        chunk, or with divisions that number the rows. If its index or a column is named ``i``, this is the row number
        in the collection and has to say the same as the array: exactly the rows that a chunk is made of, where the
        graph tells; elsewhere (an array that does not come from a reader, or was persisted) it counts up by one. A
        frame without ``i`` is paired by position.
    batch_size : int
        Rows in each batch; the last one may have fewer.
    max_ram_usage_in_bytes : int or str, default 4 GiB
        The memory that computing may hold, together with the batch that the loop is working on. A chunk that is larger
        by itself is still computed, with a warning.
    show_progress : bool, default False
        Whether to show a progress bar, in a terminal or notebook.

    Returns
    -------
    iterator of (numpy.ndarray, pandas.DataFrame)
        The rows, a writable array in C order with the dtype of ``array``, and their metadata with ``i`` as last
        column: the index of ``frame`` where it is named so, else the position of the row in ``array``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        At the call, if an argument makes no sense; at the first batch, if Dask sorts, shuffles or merges a frame by
        P2P, as it does on a cluster, or rechunks by P2P what ``dask.optimize`` has made or a frame was made of:
        ``persist()`` it first.
    MismatchError
        If the frame does not have the rows of the array, or has them in another order, before a wrong pair is returned.

    Warns
    -----
    UserWarning
        If the largest chunk and two batches are larger than the memory limit: chunks are then computed one at a time.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> x = da.from_array(np.arange(10.0).reshape(5, 2), chunks=(2, 2))
    >>> for rows, meta in iter_batches(x - x.mean(axis=0), batch_size=3):
    ...     print(rows.tolist(), meta["i"].tolist())
    [[-4.0, -4.0], [-2.0, -2.0], [0.0, 0.0]] [0, 1, 2]
    [[2.0, 2.0], [4.0, 4.0]] [3, 4]
    """
    array = rechunked_by_tasks(checked_array(array))
    request = Request(
        array=array,
        frame=checked_frame(frame),
        frame_rows=rows_of_partitions(array, frame),
        inner_nbytes=2 * _largest_inner_chunk(array),
        batch_rows=check_positive("batch_size", batch_size),
        limit_nbytes=check_nbytes("max_ram_usage_in_bytes", max_ram_usage_in_bytes),
        show_progress=bool(show_progress),
        client=active_client(),
    )
    _warn_if_too_large(request)
    return iterate(request)


def _warn_if_too_large(request: Request) -> None:
    """Warn where the limit cannot be kept."""
    projected = request.project()
    if projected.needed > request.limit_nbytes:
        warnings.warn(
            f"computing one chunk takes about {projected.needed:,} bytes: {projected.reading - request.inner_nbytes:,} "
            f"for the largest chunk, {request.inner_nbytes:,} for what it is computed from, {projected.batches:,} for "
            f"two batches of "
            f"{min(request.batch_rows, request.rows):,} rows; the limit is {request.limit_nbytes:,} "
            "(max_ram_usage_in_bytes): chunks are computed one at a time; smaller chunks, a smaller batch_size or "
            "a higher limit is faster",
            stacklevel=3,
        )


def checked_array(array: Any) -> da.Array:
    """Return an array whose chunks can be computed one after the other; raise an error for others."""
    if not isinstance(array, da.Array):
        raise ArgumentTypeError(
            f"array must be a dask.array.Array, not {type(array).__name__}; da.from_array makes one of a numpy array, "
            "reader.to_dask_array() of a reader, whose own batches are reader(batch_size)"
        )
    if array.ndim == 0:
        raise ArgumentError("array has no axes; its first axis must be the rows")
    if np.isnan(array.shape).any():
        raise ArgumentError(
            f"array has unknown chunk sizes (shape {array.shape}), as boolean indexing leaves them; "
            "call array.compute_chunk_sizes() first"
        )
    meta = getattr(array, "_meta", None)
    if isinstance(meta, np.ma.MaskedArray) or (meta is not None and not isinstance(meta, np.ndarray | np.generic)):
        raise ArgumentTypeError(
            f"array has chunks of type {type(meta).__name__}, batches are plain numpy arrays; convert it first, as in "
            "array.map_blocks(np.asarray), or da.ma.filled for masked arrays"
        )
    return array


def checked_frame(frame: Any) -> Any:
    """Return a frame that may go beside an array, or None; raise an error for anything else."""
    if frame is None:
        return None
    if not isinstance(frame, dd.DataFrame | pd.DataFrame):
        raise ArgumentTypeError(f"frame must be a Dask or pandas DataFrame, not {type(frame).__name__}")
    if frame.index.name == ROW_NUMBER and ROW_NUMBER in frame.columns:
        raise ArgumentError(f'frame has both an index and a column named "{ROW_NUMBER}"; rename or drop one of them')
    # Of columns with several levels, what is under this name is as many columns.
    if (several := sum(name == ROW_NUMBER for name in frame.columns.get_level_values(0))) > 1:
        raise ArgumentError(f'frame has {several} columns named "{ROW_NUMBER}"; rename or drop all but one of them')
    return frame


def rows_of_partitions(array: da.Array, frame: Any) -> tuple[int, ...]:
    """Return how many rows each partition of the frame has to have."""
    rows = int(array.shape[0])
    if frame is None:
        return ()
    if isinstance(frame, pd.DataFrame):
        if len(frame) != rows:
            raise MismatchError(
                f"the frame has {len(frame):,} rows, the array {rows:,}: from row {min(len(frame), rows):,} on, one of "
                "them has nothing to go with the other"
            )
        return ()
    # Before it is optimized, Dask tells other partitions of a frame that was sorted or repartitioned (2026.8).
    divisions = frame.optimize().divisions
    npartitions, divided = len(divisions) - 1, _rows_by_divisions(divisions)
    if divided and sum(divided) == rows:
        return divided
    chunks = tuple(map(int, array.chunks[0]))
    if npartitions == len(chunks):
        return chunks
    by_divisions = f" and {sum(divided):,} rows by its divisions" if divided else ""
    raise MismatchError(
        f"the frame has {npartitions:,} partitions{by_divisions}, the array {len(chunks):,} chunks and {rows:,} "
        "rows: which rows belong together cannot be told. Both need equal pieces, as to_dask_array and "
        "to_dask_dataframe with the same arguments give, or a frame with divisions that number its rows"
    )


def _rows_by_divisions(divisions: Sequence[Any]) -> tuple[int, ...]:
    """Return the rows of each partition of a frame whose index numbers them; none if it does not."""
    if not all(isinstance(division, int | np.integer) for division in divisions):
        return ()
    return tuple(int(b) - int(a) for a, b in pairwise([*divisions[:-1], divisions[-1] + 1]))


def _largest_inner_chunk(array: da.Array) -> int:
    """Return the bytes of the largest chunk that the array is computed from, as far as its layers tell."""
    layers = getattr(array.__dask_graph__(), "layers", {})
    sizes = [0]
    for name, layer in layers.items():
        told = getattr(layer, "collection_annotations", None) or {}
        shape, dtype = told.get("chunksize"), told.get("dtype")
        if name != array.name and dtype is not None and shape and not np.isnan(shape).any():
            sizes.append(int(math.prod(shape)) * np.dtype(dtype).itemsize)
    return max(sizes)


def active_client() -> distributed.Client | None:
    """Return the client of the cluster that ``compute`` would use, or None.

    Raises
    ------
    ArgumentError
        If that client is asynchronous and this is its event loop, which would wait for itself.
    """
    if "distributed" not in sys.modules:  # without it there is no client; importing it takes time
        return None
    from distributed import Client  # noqa: PLC0415

    try:
        scheduler = get_scheduler()  # what compute() would use: also heeds dask.config.set(scheduler="threads")
    except RuntimeError as error:  # it says that the client is asynchronous, and no more
        raise ArgumentError(
            "the active client is asynchronous, and its event loop would wait for itself: call this in a thread, as "
            'await asyncio.to_thread(...) does, or within dask.config.set(scheduler="threads")'
        ) from error
    client = getattr(scheduler, "__self__", None)
    return client if isinstance(client, Client) else None
