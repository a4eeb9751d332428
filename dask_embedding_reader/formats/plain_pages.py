"""Vectors that lie in the pages of a parquet file as they do in memory, taken as they are.

Decoding costs pyarrow ten times what copying costs, since it looks at two levels of nesting for every item. Where pages
are neither compressed nor encoded, and each vector has all its items, there is nothing to decode. Whatever is not
provably so is left to pyarrow, with its errors.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.formats.parquet_footer import page_header, read_length
from dask_embedding_reader.storage import StoredFile, check_local

_HEAD_NBYTES = 2**13
"""Holds the header of nearly every page, and its levels where vectors are not very short."""

_MOST_LEVELS_NBYTES = 2**22
_PLAIN = 0


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


def iter_plain(
    file: StoredFile, place: Place, dimension: int, dtype: np.dtype[np.generic], skip: int, rows: int, step: int
) -> Iterator[npt.NDArray[np.generic]]:
    """Yield ``rows`` vectors of a column chunk of a local file after the first ``skip``, as far as they are plain.

    Each array lies in the memory of the one before, and has ``step`` rows at most.
    """
    row_nbytes = dimension * dtype.itemsize
    scratch = np.empty((min(step, rows), dimension), dtype)
    with open(file.path, "rb", buffering=0) as opened:
        position = place.start
        while rows and (page := _next_page(opened, place, position, dimension, row_nbytes)):
            passed = min(skip, page.rows)
            skip -= passed
            for first in range(passed, min(page.rows, passed + rows), step):
                block = scratch[: min(step, page.rows - first, rows)]
                if not _read_into(opened, page.start + first * row_nbytes, block):
                    return
                check_local(file)
                yield block
                rows -= len(block)
            position = page.stop


def _read_into(opened: io.FileIO, position: int, block: npt.NDArray[np.generic]) -> bool:
    """Fill an array from a file; tell whether there was enough."""
    opened.seek(position)
    rest = block.reshape(-1).view(np.uint8).data
    while rest.nbytes:
        count = opened.readinto(rest)
        if not count:
            return False
        rest = rest[count:]
    return True


def _read(opened: io.FileIO, position: int, nbytes: int) -> bytes:
    opened.seek(position)
    return opened.read(nbytes) or b""


def _next_page(opened: io.FileIO, place: Place, position: int, dimension: int, row_nbytes: int) -> _Page | None:
    """Look at the page at a position of a file; None if there is none, or its vectors are not plain."""
    head = _read(opened, position, min(_HEAD_NBYTES, place.stop - position))
    found = page_header(head)
    if found is None:
        return None
    (nbytes, values, encoding), body = found
    stop = position + body + nbytes
    rows, odd = divmod(values, dimension) if place.is_list else (values, 0)
    if encoding != _PLAIN or odd or rows <= 0 or stop > place.stop:
        return None
    levels = nbytes - rows * row_nbytes
    if not 0 <= levels <= _MOST_LEVELS_NBYTES:
        return None  # there are nulls, or something else than vectors
    if body + levels > len(head):
        head = _read(opened, position, body + levels)
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
    except IndexError:
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
    except (IndexError, ValueError):
        return False
    return position == len(levels)
