"""Levels of repetition and definition: whether they say that all vectors are whole, and nothing is null.

They are encoded in runs of one level, or of eight levels in each byte; no level is looked at by itself.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.parquet.page_headers import PageHeader
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.thrift import read_varint

MOST_LEVELS_NBYTES = 2**22


def count_level_nbytes(data: Array, place: Place) -> int:
    """Return how many bytes at the beginning of a page of version 1 are levels."""
    nbytes = 0
    for _ in range(int(place.is_list) + int(place.definition > 0)):
        nbytes += 4 + int.from_bytes(data[nbytes : nbytes + 4].tobytes(), "little")
    return nbytes


def first_level(levels: bytes) -> int | None:
    """Return the first level of some; None if there is none."""
    try:
        head, position = read_varint(levels[:10], 0)
        return levels[position] & 1 if head & 1 else levels[position]
    except Exception:  # noqa: BLE001 - levels may be damaged in any way
        return None


def are_levels(data: Array | memoryview, page: PageHeader, place: Place, before: int, nbytes: int) -> bool:
    """Tell whether levels say of the values of a page that they are vectors after so many values, and not null."""
    if len(data) != nbytes or nbytes > MOST_LEVELS_NBYTES:
        return False
    encoded = bytes(data)
    if page.levels is not None:
        repetition, definition = encoded[: page.levels[0]], encoded[page.levels[0] :]
    else:
        repetition = b""
        if place.is_list:
            nbytes = 4 + int.from_bytes(encoded[:4], "little")
            repetition, encoded = encoded[4:nbytes], encoded[nbytes:]
            if len(repetition) != nbytes - 4:
                return False
        definition = encoded[4:]
        if place.definition and len(definition) != int.from_bytes(encoded[:4], "little"):
            return False
        if not place.definition and encoded:
            return False
    if not _is_defined(definition, page.values, place.definition):
        return False
    if not place.is_list:
        return not repetition
    return _is_regular(repetition, page.values, before % place.dimension, place.dimension)


def _is_defined(levels: bytes, values: int, most: int) -> bool:
    """Tell whether levels of definition are one run that says that nothing is null."""
    if not most:
        return not levels
    try:
        head, position = read_varint(levels, 0)
    except Exception:  # noqa: BLE001 - levels may be damaged in any way
        return False
    return head == values << 1 and levels[position:] == bytes([most])


@lru_cache(maxsize=64)  # pages of as many rows mostly have the same levels
def _is_regular(levels: bytes, total: int, phase: int, dimension: int) -> bool:
    """Tell whether levels of repetition are those of vectors of one dimension: 0 where one begins, else 1.

    So many values of the first vector are in the page before. Levels are encoded in runs: of one level, or of eight
    levels in each byte.
    """
    count, position = 0, 0
    begin = -phase % dimension  # where the next vector must begin
    try:
        while count < total:
            head, position = read_varint(levels, position)
            if head & 1:
                size = head >> 1
                packed = levels[position : position + size]
                length = min(8 * size, total - count)
                if len(packed) != size or not length:
                    return False
                if size <= 64 and dimension > 32:  # five times as fast for so few
                    bits_expected = (1 << length) - 1
                    for start in range(begin - count, length, dimension):
                        bits_expected ^= 1 << start
                        begin += dimension
                    if int.from_bytes(packed, "little") & ((1 << length) - 1) != bits_expected:
                        return False
                    position, count = position + size, count + length
                    continue
                bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=length, bitorder="little")
                zeros = np.flatnonzero(bits == 0)
                expected = np.arange(begin - count, length, dimension)
                if not np.array_equal(zeros, expected):
                    return False
                begin += len(expected) * dimension
                position += size
            else:
                length, level = min(head >> 1, total - count), levels[position]
                if level > 1 or not length:
                    return False
                if level == 1 and begin < count + length:
                    return False
                if level == 0:  # vectors of one item, or the beginning of one
                    if begin != count or (length > 1 and dimension > 1):
                        return False
                    begin += length if dimension == 1 else dimension
                position += 1
            count += length
    except Exception:  # noqa: BLE001 - as above
        return False
    return position == len(levels)
