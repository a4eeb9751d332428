"""Numbers of a few bits each, by which pages refer to a dictionary: runs of one number, or of packed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.parquet.thrift import read_varint

_MOST_BITS = 25
"""Each number lies in four bytes then."""

_SHORT_RUN = 128
"""Runs that are shorter than this on average, as those of sparse vectors are, pyarrow decodes faster: to find one takes
0.4 us here, as long as 50 numbers take it."""

_FEW_RUNS = 1_000
"""So many may be short: it does not matter then."""


class _Runs(NamedTuple):
    """Runs, each with how many numbers are wanted of it."""

    lengths: Array
    """These."""
    places: Array
    """Where each begins, after its head."""
    groups: Array
    """The groups of eight packed numbers; 0 where it is one number, again and again."""


def read_indices(data: Array, count: int) -> Array | None:
    """Return so many numbers of a few bits each, which are encoded in runs as levels are; None if these are wrong.

    Or if most of them are short.
    """
    if not len(data) or not 0 <= data[0] <= _MOST_BITS:
        return None
    width = int(data[0])
    runs = _find_runs(data[1:].tobytes(), width, count)
    if runs is None:
        return None
    # What is looked at as four bytes may begin at the last one.
    padded = np.concatenate([data[1:], np.zeros(8, np.uint8)])
    is_packed = runs.groups > 0
    if is_packed.all():
        return _unpack(padded, runs, width)[:count]
    numbers = _words(padded)[runs.places] & np.uint32((1 << 8 * _count_bytes(width)) - 1)
    indices = np.repeat(numbers, runs.lengths)
    if is_packed.any():
        packed = _Runs(*(column[is_packed] for column in runs))
        indices[np.repeat(is_packed, runs.lengths)] = _unpack(padded, packed, width)[: packed.lengths.sum()]
    return indices


def _find_runs(encoded: bytes, width: int, count: int) -> _Runs | None:
    """Find the runs of so many numbers; None if they are wrong, or most of them are short."""
    lengths, places, groups = list[int](), list[int](), list[int]()
    position = filled = 0
    while filled < count:
        try:
            head, position = encoded[position], position + 1
            if head > 127:
                head, position = read_varint(encoded, position - 1)
        except Exception:  # noqa: BLE001 - they may be damaged in any way
            return None
        number, left = head >> 1, count - filled
        places.append(position)
        if head & 1:
            if number > -(-left // 8) and [number] != groups[-1:]:  # the last one may be as long as the others
                return None
            groups.append(number)
            position += number * width
            number *= 8
        else:
            groups.append(0)
            position += _count_bytes(width)
        if not number or position > len(encoded) or len(lengths) > _FEW_RUNS + filled // _SHORT_RUN:
            return None
        lengths.append(min(number, left))
        filled += number
    return _Runs(np.array(lengths), np.array(places), np.array(groups))


def _count_bytes(width: int) -> int:
    """Return in how many bytes a number of so many bits is written that stands for a run."""
    return (width + 7) // 8


def _words(data: Array) -> Array:
    """Return the four bytes from each one on, as numbers."""
    return np.ndarray((len(data) - 3,), "<u4", data, 0, (1,))


def _unpack(data: Array, runs: _Runs, width: int) -> Array:
    """Return the numbers of packed runs; a group of them takes as many bytes as a number has bits."""
    groups, places = runs.groups, runs.places
    numbers = np.empty((groups.sum(), 8), np.uint32)
    steps = np.diff(places)
    even = len(groups) - 1 if (groups[:-1] == groups[0]).all() and (steps == steps[:1]).all() else 0
    if even:  # in dense vectors all but the last one follow each other at the same distance: a third of the time
        shape, strides = (even, int(groups[0])), (int(steps[0]), width)
        part = numbers[: even * shape[1]].reshape(*shape, 8)
        _put(part, width, lambda byte: np.ndarray(shape, "<u4", data, int(places[0]) + byte, strides))
    groups, places, words = groups[even:], places[even:], _words(data)
    begins = np.repeat(places - (np.cumsum(groups) - groups) * width, groups)
    begins += np.arange(len(begins)) * width
    _put(numbers[len(numbers) - len(begins) :], width, lambda byte: words[begins + byte])
    return numbers.reshape(-1)


def _put(numbers: Array, width: int, words: Callable[[int], Array]) -> None:
    """Cut the eight numbers of each group from its words, which begin at one of its bytes."""
    mask = np.uint32((1 << width) - 1)
    for place in range(8):
        byte, bit = divmod(place * width, 8)
        numbers[..., place] = (words(byte) >> np.uint32(bit)) & mask
