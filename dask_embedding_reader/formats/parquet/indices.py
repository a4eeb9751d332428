"""Numbers of a few bits each, by which pages refer to a dictionary: runs of one number, or of packed ones."""

from __future__ import annotations

import numpy as np

from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.parquet.thrift import read_varint


def read_indices(data: Array, count: int) -> Array | None:
    """Return so many numbers of a few bits each, which are encoded in runs as levels are; None if these are wrong."""
    if not len(data) or not 0 <= data[0] <= _MOST_BITS:
        return None
    width, encoded = int(data[0]), data[1:]
    # What is looked at as four bytes may begin at the last one.
    padded = np.concatenate([encoded, np.zeros(8, np.uint8)])
    indices = np.empty(count, np.uint32)
    filled, position = 0, 0
    while filled < count:
        try:
            head, after = read_varint(encoded[position : position + 10].tobytes(), 0)
        except Exception:  # noqa: BLE001 - as above
            return None
        position += after
        if head & 1:
            groups = head >> 1
            if not 0 < groups <= -(-(count - filled) // 8):
                return None
            # Runs of the same length follow each other; all of them are unpacked at once.
            step = groups * width + after
            head_bytes = padded[position - after : position]
            runs = 1
            most = min((len(encoded) - position + after) // step, -(-(count - filled) // (8 * groups)))
            if most > 1:
                heads = np.ndarray((most, after), np.uint8, padded, position - after, (step, 1))
                same = (heads == head_bytes).all(axis=1)
                runs = most if same.all() else int(np.argmin(same))
            if position + (runs - 1) * step + groups * width > len(encoded):
                return None
            unpacked = _unpack(padded, position, runs, step, groups, width)
            length = min(len(unpacked), count - filled)
            indices[filled : filled + length] = unpacked[:length]
            position += (runs - 1) * step + groups * width
        else:
            length, size = min(head >> 1, count - filled), (width + 7) // 8
            if not length or position + size > len(encoded):
                return None
            indices[filled : filled + length] = int.from_bytes(encoded[position : position + size].tobytes(), "little")
            position += size
        filled += length
    return indices


_MOST_BITS = 25
"""Each number lies in four bytes then."""


def _unpack(data: Array, position: int, runs: int, step: int, groups: int, width: int) -> Array:
    """Return the numbers of runs, each of some groups of eight; a group takes as many bytes as a number has bits."""
    numbers = np.empty((runs, groups, 8), np.uint32)
    mask = np.uint32((1 << width) - 1)
    for place in range(8):
        byte, bit = divmod(place * width, 8)
        words = np.ndarray((runs, groups), "<u4", data, position + byte, (step, width))
        numbers[:, :, place] = (words >> np.uint32(bit)) & mask
    return numbers.reshape(-1)
