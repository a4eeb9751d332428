"""What the metadata of batches are handed out as: frames for people, Arrow columns for writing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_embedding_reader.formats.arrow_types import takeable_chunks
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField, make_frame, make_table
from dask_embedding_reader.rows.selection import Int64s

_WEIGHED_ROWS = 128
"""Of so many of the rows that are decoded together, Python's strings are weighed."""


class Form(NamedTuple):
    """What metadata are handed out as."""

    make: Callable[[Sequence[MetaField], pa.Table, range | Int64s, str], tuple[Any, int]]
    """Given decoded columns, the rows and the file, returns what is handed out of them, and what it weighs."""
    join: Callable[[list[Any]], Any]
    """Puts what was made below each other: into a frame of its own, whose memory the caller may write to."""
    take: Callable[[Any, Int64s], Any]
    """Puts rows into another order."""
    of_none: Callable[[Int64s], Any]
    """Returns what is handed out where there is no metadata."""


def _nbytes(table: pa.Table) -> int:
    try:
        return int(table.nbytes)
    except pa.ArrowTypeError:  # pyarrow 19 cannot tell it of rows of views: of all that they are rows of
        return int(table.get_total_buffer_size())


def _make_frame(
    fields: Sequence[MetaField], table: pa.Table, rows: range | Int64s, url: str
) -> tuple[pd.DataFrame, int]:
    numbers = np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, range) else rows
    frame = make_frame(fields, table, pd.RangeIndex(len(rows)), url, text_as_objects=True, numbers=numbers)
    step = max(1, len(rows) // _WEIGHED_ROWS)
    texts = [frame[name].to_numpy()[::step] for name, dtype in frame.dtypes.items() if dtype == np.dtype(object)]
    nbytes = 2 * _nbytes(table) + sum(8 * len(rows) + step * sum(map(sys.getsizeof, text)) for text in texts)
    return frame, nbytes


def _join_frames(parts: list[pd.DataFrame]) -> pd.DataFrame:
    if len(parts) > 1:
        return pd.concat(parts, ignore_index=True)
    batch = parts[0].copy(deep=False)  # a frame of its own, over the same columns
    batch.index = pd.RangeIndex(len(batch))
    return batch


def _take_frame(frame: pd.DataFrame, order: Int64s) -> pd.DataFrame:
    return frame.take(order).reset_index(drop=True)


def _make_table(fields: Sequence[MetaField], table: pa.Table, _: range | Int64s, url: str) -> tuple[pa.Table, int]:
    return make_table(fields, table, url), 2 * _nbytes(table)


def _take_table(table: pa.Table, order: Int64s) -> pa.Table:
    columns = list(map(takeable_chunks, table.columns))
    return pa.Table.from_arrays(columns, schema=table.schema).take(pa.array(order))


_ONLY_ROW_NUMBER = pd.Index([ROW_NUMBER])


def numbered(numbers: Array) -> pd.DataFrame:
    """Return the frame of a batch without metadata."""
    # From two axes: ten times faster than from a dictionary, which counts in small batches. A view of the names, since
    # they may be given a name themselves.
    return pd.DataFrame(numbers.reshape(-1, 1), columns=_ONLY_ROW_NUMBER.view(), copy=False)


FRAMES = Form(_make_frame, _join_frames, _take_frame, lambda numbers: numbered(numbers.copy()))
TABLES = Form(_make_table, pa.concat_tables, _take_table, lambda _: None)
