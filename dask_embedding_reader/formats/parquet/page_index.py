"""The offset index of a column chunk: where its pages are, and which rows begin in each.

Spark and arrow-rs write it, pyarrow where ``write_page_index=True`` asks for it, as Hugging Face does; many files have
none. With it few rows of a remote row group cost their pages; without it all headers before them have to be seen.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain
from typing import NamedTuple

import numpy as np

from dask_embedding_reader._common.cache import CountedCache
from dask_embedding_reader.errors import EmbeddingReaderError
from dask_embedding_reader.formats.parquet.column_chunks import Chunk
from dask_embedding_reader.formats.parquet.thrift import Wanted, read_struct
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import StoredFile

_MOST_NBYTES = 2**16
"""Holds the places of 5,000 pages. A longer one is not looked at."""

_INDEX: Wanted = {1: {1: {}, 2: {}, 3: {}}}
"""page_locations; of each: offset, compressed_page_size (with its header), first_row_index."""


class PageIndex(NamedTuple):
    """The pages of values of a column chunk. That they are as told is seen when they are read."""

    starts: tuple[int, ...]
    """The first byte of each, its header included."""
    stops: tuple[int, ...]
    """The byte after each."""
    rows: tuple[int, ...]
    """The first row of each, and the rows of all."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes: three numbers and their places a page."""
        return 120 * len(self.rows)

    def page_of(self, row: int) -> int:
        """Return which page a row is in."""
        return bisect_right(self.rows, row) - 1

    def bytes_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return where the pages are that hold the rows ``[start, stop)``."""
        return self.starts[self.page_of(start)], self.stops[self.page_of(stop - 1)]


INDICES: CountedCache[tuple[StoredFile, int], PageIndex] = CountedCache(8 * 2**20)
"""Those that were used last."""


def read_page_index(file: StoredFile, place: tuple[int, int], chunk: Chunk, rows: int) -> PageIndex | None:
    """Read the index at a place of a file, of a chunk with so many rows; None where there is none, or it is wrong."""
    start, stop = place
    if not 0 < stop - start <= _MOST_NBYTES:
        return None
    if known := INDICES.get((file, start)):
        return known
    try:
        found, _ = read_struct(read_range(file, start, stop), 0, _INDEX, 0)
        pages = [(page[1], page[1] + page[2], page[3]) for page in found[1]]
    except EmbeddingReaderError:
        raise
    except Exception:  # noqa: BLE001 - it may be damaged in any way: it need not be there
        return None
    starts, stops, firsts = zip(*pages, strict=True) if pages else ((), (), ())
    index = PageIndex(starts, stops, (*firsts, rows))
    if not pages or not _is_right(index, chunk):
        return None
    INDICES.put((file, start), index)
    return index


def _is_right(index: PageIndex, chunk: Chunk) -> bool:
    """Tell whether pages with some rows each lie in a chunk one after the other."""
    edges = np.array([chunk.start, *chain(*zip(index.starts, index.stops, strict=True)), chunk.stop])
    steps, rows = np.diff(edges), np.diff(index.rows)
    return index.rows[0] == 0 and bool((rows > 0).all() and (steps >= 0).all() and (steps[1::2] > 0).all())
