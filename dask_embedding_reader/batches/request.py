"""What batches are asked for, and what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.rows.selection import Int64s, Rows
from dask_embedding_reader.rows.stretch import Stretch

Batch = tuple[Array, pd.DataFrame]
TableBatch = tuple[Array, "pa.Table | None"]


class BatchRequest(NamedTuple):
    """What the caller of a reader asks for, checked."""

    batch_rows: int
    """Rows of each batch but the last."""
    start: int
    """The first row."""
    stop: int
    """The row after the last one."""
    max_piece_rows: int | None
    """The largest piece that is read at once; by default what suits the storage and the limit."""
    threads: int | None
    """Pieces read at the same time; by default what suits the storage."""
    limit_nbytes: int
    """How much memory may be held."""
    dtype: np.dtype[Any]
    """The dtype of the batches."""
    show_progress: bool
    """Whether to show a progress bar, where somebody watches."""
    rows: Rows | None = None
    """Selected rows, of which ``start`` and ``stop`` are positions; None where they are rows of the collection."""

    def numbers(self, start: int, stop: int) -> Int64s:
        """Return the row numbers of the rows ``[start, stop)``."""
        return np.arange(start, stop, dtype=np.int64) if self.rows is None else self.rows.numbers(start, stop)


def span_of(rows: Rows) -> tuple[int, int, Rows | None]:
    """Return what a request calls ``start``, ``stop`` and ``rows``, for all of a selection."""
    if isinstance(rows, Stretch) and rows.is_contiguous:
        return rows.values.start, rows.values.start + len(rows), None
    return 0, len(rows), rows
