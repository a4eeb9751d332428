"""Vectors that lie in the pages of a parquet file as they do in memory, taken as they are.

Decoding costs pyarrow ten times what copying costs, since it looks at two levels of nesting for every item. Where pages
are neither compressed nor encoded nor have checksums, and each vector has all its items, there is nothing to decode.
Whatever is not provably so is left to pyarrow, with its errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dask_embedding_reader.formats.parquet.footer import PLAIN, page_header, read_length
from dask_embedding_reader.storage.read import StoredFile, read_range

_HEAD_NBYTES = 2**13
"""Holds the header of nearly every page, and its levels where vectors are not very short."""

_MOST_LEVELS_NBYTES = 2**22


class Place(NamedTuple):
    """Where vectors are, and what tells a vector from the next."""

    start: int
    """The first byte of the column chunk."""
    stop: int
    """The byte after its last one."""
    is_list: bool
    """Whether items are counted one by one, with levels of repetition; else a vector is one value."""
    definition: int
    """The level of definition of what is not null; 0 where nothing can be."""


class _Page(NamedTuple):
    rows: int
    start: int
    """The first byte of its vectors in the file."""
    stop: int
    """The byte after the last one, and after the page."""


def iter_pages(
    file: StoredFile, place: Place, dimension: int, row_nbytes: int, skip: int, rows: int
) -> Iterator[tuple[int, int]]:
    """Yield where in a local file ``rows`` vectors of a column chunk lie after the first ``skip``, as far as plainly.

    Each time the position of the first byte, and how many vectors lie there one after the other. Nothing is left open
    between two.
    """
    position = place.start
    while rows and (page := _next_page(file, place, position, dimension, row_nbytes)):
        passed = min(skip, page.rows)
        count = min(page.rows - passed, rows)
        if count:
            yield page.start + passed * row_nbytes, count
        skip, rows, position = skip - passed, rows - count, page.stop


def _next_page(file: StoredFile, place: Place, position: int, dimension: int, row_nbytes: int) -> _Page | None:
    """Look at the page at a position of a file; None if there is none, or its vectors are not plain."""
    head = read_range(file, position, min(position + _HEAD_NBYTES, place.stop))
    found = page_header(head)
    if found is None:
        return None
    (nbytes, values, encoding), body = found
    stop = position + body + nbytes
    rows, odd = divmod(values, dimension) if place.is_list else (values, 0)
    if encoding != PLAIN or odd or rows <= 0 or stop > place.stop:
        return None
    levels = nbytes - rows * row_nbytes
    if not 0 <= levels <= _MOST_LEVELS_NBYTES:
        return None  # there are nulls, or something else than vectors
    if body + levels > len(head):
        head = read_range(file, position, position + body + levels)
    spelled = head[body : body + levels]
    repetition = b""
    if place.is_list:
        nbytes = 4 + int.from_bytes(spelled[:4], "little")
        repetition, spelled = spelled[4:nbytes], spelled[nbytes:]
    if not _is_defined(spelled, values, place.definition):
        return None
    if place.is_list and not _is_regular(repetition, rows, dimension):
        return None
    return _Page(rows, stop - rows * row_nbytes, stop)


def _is_defined(levels: bytes, values: int, most: int) -> bool:
    """Tell whether levels of definition, with their length before them, are one run that says that nothing is null."""
    if not most:
        return not levels
    try:
        head, position = read_length(levels, 4)
    except Exception:  # noqa: BLE001 - levels may be damaged in any way
        return False
    length = int.from_bytes(levels[:4], "little")
    return head == values << 1 and levels[position:] == bytes([most]) and len(levels) == 4 + length


@lru_cache(maxsize=64)  # pages of as many rows mostly have the same levels
def _is_regular(levels: bytes, rows: int, dimension: int) -> bool:
    """Tell whether levels of repetition are those of vectors of one dimension: 0 where one begins, else 1.

    They are spelled in runs: of one level, or of eight levels in each byte.
    """
    # Where the vectors begin, as far as has been read, must be at every multiple of the dimension.
    count, total, position = 0, rows * dimension, 0
    try:
        while count < total:
            head, position = read_length(levels, position)
            if head & 1:
                size = head >> 1
                bits = np.unpackbits(np.frombuffer(levels[position : position + size], np.uint8), bitorder="little")
                if len(bits) != 8 * size:
                    return False
                bits = bits[: total - count]
                zeros = np.flatnonzero(bits == 0) + count
                position += size
                length = len(bits)
            else:
                length = min(head >> 1, total - count)
                zeros = np.arange(count, count + length) if levels[position] == 0 else np.empty(0, np.int64)
                if levels[position] > 1:
                    return False
                position += 1
            expected = np.arange(-(-count // dimension), -(-(count + length) // dimension)) * dimension
            if length <= 0 or not np.array_equal(zeros, expected):
                return False
            count += length
    except Exception:  # noqa: BLE001 - as above
        return False
    return position == len(levels)
