"""Pieces of a collection that are used where they are read: in threads, each with memory of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import Any

import numpy as np

from dask_embedding_reader._common.progress import Progress
from dask_embedding_reader._common.threads import is_stopped, threads_at_once
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import make_plan
from dask_embedding_reader.formats.base import Array, read_parts


def reads_apart(manifest: Manifest) -> bool:
    """Tell whether pieces are read each for itself, at once: from local files without row groups."""
    return not manifest.vectors.has_groups and manifest.vectors.is_local


def use_pieces(
    manifest: Manifest,
    start: int,
    stop: int,
    piece_rows: int,
    dtype: np.dtype[Any],
    use: Callable[[int, Array], object],
    progress: Progress,
) -> None:
    """Read the rows ``[start, stop)`` in threads, which use each piece before they read the next one.

    Pieces are read as ``dtype``, so many rows at most, into the same memory again and again, so that it stays in the
    cache. ``use`` is given the number of the first row, and rows, whose memory is used again. The pieces of a thread
    ascend.
    """
    plan = make_plan(manifest.vectors, start, stop, piece_rows)
    pieces, taking = iter(range(len(plan))), threading.Lock()

    def work() -> None:
        memory = np.empty((min(piece_rows, stop - start), manifest.dimension), dtype)
        while not is_stopped():
            with taking:
                number = next(pieces, None)
            if number is None:
                break
            piece = plan[number]
            rows = memory[: piece.stop - piece.start]
            read_parts(manifest.format.vectors, manifest.columns, plan.files.parts(*piece), rows)
            use(piece.start, rows)
            with taking:
                progress.update(len(rows))

    threads = max(1, min(manifest.vectors.connections, len(plan)))
    with threads_at_once(threads) as pool:
        started = [pool.submit(work) for _ in range(threads)]
        for future in wait(started, return_when=FIRST_EXCEPTION).done:
            future.result()  # what went wrong in one ends all
