"""Pieces of a collection that are used where they are read: in threads, each with memory of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import Any, TypeVar

import numpy as np

from dask_embedding_reader._common.progress import Progress
from dask_embedding_reader._common.threads import is_stopped, threads_at_once
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import make_plan
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.storage.store import most_connections

S = TypeVar("S")


def reads_apart(manifest: Manifest) -> bool:
    """Tell whether pieces are read each for itself, at once: from local files without row groups."""
    return not manifest.vectors.has_groups and all(store.is_local for store in manifest.vectors.stores)


def fold_pieces(
    manifest: Manifest,
    start: int,
    stop: int,
    piece_rows: int,
    dtype: np.dtype[Any],
    begin: Callable[[], S],
    fold: Callable[[S, int, Array], S],
    progress: Progress,
) -> list[S]:
    """Read the rows ``[start, stop)`` in threads, which fold each piece into what they have of those before.

    Parameters
    ----------
    manifest
        The collection.
    start, stop
        The rows.
    piece_rows
        How many are read at once at most: into the same memory again and again, so that it stays in the cache.
    dtype
        As which type.
    begin
        Returns what a thread begins with.
    fold
        Given what a thread has so far, the number of the first row, and rows, whose memory is used again; returns what
        it has then. The pieces of a thread ascend.
    progress
        Is told of the rows of each piece.

    Returns
    -------
    list
        What each thread has in the end.
    """
    plan = make_plan(manifest.vectors, start, stop, piece_rows)
    pieces, taking = iter(range(len(plan))), threading.Lock()
    read = manifest.format.vectors

    def work() -> S:
        made, memory = begin(), np.empty((min(piece_rows, stop - start), manifest.dimension), dtype)
        while not is_stopped():
            with taking:
                number = next(pieces, None)
            if number is None:
                break
            piece = plan[number]
            rows, done = memory[: piece.stop - piece.start], 0
            for header, first, last in plan.files.parts(*piece):
                read.open_rows(header, manifest.columns, first, last)([rows[done : (done := done + last - first)]])
            made = fold(made, piece.start, rows)
            with taking:
                progress.update(len(rows))
        return made

    threads = max(1, min(most_connections(manifest.vectors.stores), len(plan)))
    with threads_at_once(threads) as pool:
        started = [pool.submit(work) for _ in range(threads)]
        for future in wait(started, return_when=FIRST_EXCEPTION).done:
            future.result()  # what went wrong in one ends all
        return [future.result() for future in started]
