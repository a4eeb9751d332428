"""Numbers of a few bits each, in runs, are what they are one by one; or nothing, where a run is not whole."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from dask_embedding_reader.formats.parquet.indices import read_indices
from dask_embedding_reader.formats.parquet.thrift import encode_varint

MOST_BITS = 25


def packed(numbers: list[int], width: int) -> bytes:
    """A run of numbers in groups of eight, from the lowest bit on."""
    groups = -(-len(numbers) // 8)
    bits = sum(number << place * width for place, number in enumerate(numbers))
    return encode_varint(groups << 1 | 1) + bits.to_bytes(groups * width, "little")


def repeated(number: int, count: int, width: int) -> bytes:
    """A run of one number."""
    return encode_varint(count << 1) + number.to_bytes((width + 7) // 8, "little")


def one_by_one(data: bytes, count: int) -> list[int] | None:
    """The numbers; None where a run has none, or more groups than are missing, or ends too early."""
    width, position = data[0], 1
    found: list[int] = []
    last = 0
    while len(found) < count:
        head = shift = 0
        while True:
            if position >= len(data) or shift > 63:
                return None
            byte = data[position]
            head, shift, position = head | (byte & 127) << shift, shift + 7, position + 1
            if byte < 128:
                break
        size = (head >> 1) * width if head & 1 else (width + 7) // 8
        if not head >> 1 or position + size > len(data):
            return None
        value = int.from_bytes(data[position : position + size], "little")
        if head & 1:
            if head >> 1 > -(-(count - len(found)) // 8) and head != last:  # a last run may be as long as the others
                return None
            found += [value >> place * width & (1 << width) - 1 for place in range(8 * (head >> 1))]
        else:
            found += [value] * min(head >> 1, count)
        position, last = position + size, head
    return found[:count]


def random_runs(chance: Random, width: int) -> tuple[list[int], list[bytes]]:
    """Numbers, and the runs that they are in; runs of the same length often follow each other."""
    numbers: list[int] = []
    runs = []
    for _ in range(chance.randrange(1, 5)):
        if chance.random() < 0.4:
            number, length = chance.getrandbits(width) if width else 0, chance.choice([1, 5, 8, 100, 1_000])
            runs.append(repeated(number, length, width))
            numbers += [number] * length
            continue
        groups = chance.choice([1, 2, 7, 63, 64])
        for _ in range(chance.choice([1, 2, 3, 9])):
            part = [chance.getrandbits(width) if width else 0 for _ in range(8 * groups)]
            runs.append(packed(part, width))
            numbers += part
    return numbers, runs


@pytest.mark.parametrize("width", [*range(MOST_BITS + 1)])
def test_numbers_of_all_widths(width: int) -> None:
    chance = Random(width)
    for _ in range(12):
        numbers, runs = random_runs(chance, width)
        data = bytes([width]) + b"".join(runs)
        for count in {len(numbers), max(1, len(numbers) - chance.randrange(8)), chance.randint(1, len(numbers)), 1}:
            found = read_indices(np.frombuffer(data, np.uint8), count)
            expected = one_by_one(data, count)
            assert (found is None) == (expected is None)
            if found is not None:
                assert found.dtype == np.uint32
                assert found.tolist() == expected == numbers[:count]
        assert read_indices(np.frombuffer(data + b"more", np.uint8), len(numbers)) is not None
        assert read_indices(np.frombuffer(data, np.uint8), len(numbers) + 1) is None
        for nbytes in {*range(1, min(len(data), 12)), *chance.choices(range(len(data)), k=10), len(data) - 1}:
            assert read_indices(np.frombuffer(data[:nbytes], np.uint8), len(numbers)) is None


@pytest.mark.parametrize("seed", range(10))
def test_what_is_damaged_is_nothing_or_other_numbers(seed: int) -> None:
    chance = Random(seed)
    for _ in range(60):
        width = chance.choice([0, 1, 3, 8, 9, 25])
        numbers, runs = random_runs(chance, width)
        changed = list(runs)
        place = chance.randrange(len(runs))
        change = chance.choice(["head", "none", "cut", "swap"])
        if change == "head":
            head = chance.choice([0, 1, 2, 3, 15, 16, 17, 127])
            changed[place] = bytes([head]) + runs[place][1:]
        elif change == "none":
            changed.insert(place, chance.choice([b"\0\0", b"\1", b"\x81\x80\x00", b"\xff" * 9 + b"\x01", b"\xff" * 11]))
        elif change == "cut":
            changed[place] = runs[place][:-1]
        else:
            changed = [*runs[place:], *runs[:place]]
        data = bytes([width]) + b"".join(changed)
        found = read_indices(np.frombuffer(data, np.uint8), len(numbers))
        assert (None if found is None else found.tolist()) == one_by_one(data, len(numbers))


def test_widths_that_there_are_not() -> None:
    for width in (MOST_BITS + 1, 32, 255):
        assert read_indices(np.frombuffer(bytes([width]) + b"\x02" + bytes(100), np.uint8), 1) is None
    assert read_indices(np.empty(0, np.uint8), 1) is None


@pytest.mark.parametrize("length", [8, 136])
def test_many_short_runs_are_left_to_pyarrow(length: int) -> None:
    """Those of sparse vectors: a run of zeros, and some packed numbers."""
    for count, is_left in ((900, False), (2_000, length < 128)):
        numbers = list[int]()
        data = bytes([3])
        for run in range(count):
            part = [run % 5] * length if run % 2 else [k % 8 for k in range(length)]
            data += repeated(part[0], length, 3) if run % 2 else packed(part, 3)
            numbers += part
        found = read_indices(np.frombuffer(data, np.uint8), len(numbers))
        assert (None if found is None else found.tolist()) == (None if is_left else numbers)
