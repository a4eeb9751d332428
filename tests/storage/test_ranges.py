"""Bodies of answers are cut to what was asked for, and refused where they are something else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader.errors import ReadError
from dask_embedding_reader.storage.ranges import ByteRange, drop_bytes, only, part

FILE = bytes(range(256))


def asked(data: st.DataObject, start: int, stop: int) -> tuple[ByteRange, bytearray]:
    """A range, whose bytes go to memory in several places."""
    memory = bytearray(stop - start)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(memory)), max_size=3)))
    views = [memoryview(memory)[a:b] for a, b in pairwise([0, *cuts, len(memory)])]
    return ByteRange(start, views), memory


def receive(put: Callable[[bytes], bool], body: list[bytes]) -> bool:
    """Tell whether what comes later is not wanted any more."""
    return any(map(put, body))


@pytest.mark.parametrize("block_nbytes", [1, 2, 3, 8])
@pytest.mark.parametrize("place_nbytes", [1, 3, 8])
def test_of_any_body_the_bytes_that_were_asked_for_or_an_error(block_nbytes: int, place_nbytes: int) -> None:
    """All ranges of a file of eight bytes, and all bodies."""
    file = FILE[1:9]
    for start, stop in combinations(range(9), 2):
        for first, last in combinations_with_replacement(range(9), 2):
            memory = bytearray(stop - start)
            cuts = range(0, len(memory), place_nbytes)
            wanted = ByteRange(start, [memoryview(memory)[cut : cut + place_nbytes] for cut in cuts])
            assert (wanted.header, wanted.nbytes) == (f"bytes={start}-{stop - 1}", stop - start)
            if first > start:
                with pytest.raises(ReadError, match=f"the bytes from {first} on came where those from {start} on"):
                    only(wanted, first)
                continue
            put = only(wanted, first)
            body = [file[cut : min(cut + block_nbytes, last)] for cut in range(first, last, block_nbytes)]
            is_exact = first == start > 0  # a server that heeds ranges: what is too long is a fault of it
            if is_exact and last > stop:
                with pytest.raises(ReadError, match=f"more than the {stop - start} bytes came"):
                    receive(put, body)
                continue
            # What comes behind is not waited for.
            assert receive(put, body) == (not is_exact and last >= stop)
            came = max(0, min(last, stop) - start)
            assert wanted.count == came
            assert memory == file[start : start + came].ljust(stop - start, b"\0")


@given(st.data())
def test_ranges_are_filled_from_a_connection_whatever_comes_at_once(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 200))
    stop = data.draw(st.integers(start, 256))
    ends = data.draw(st.integers(start, 256))
    wanted, memory = asked(data, start, stop)
    position = start

    def read_into(buffer: memoryview) -> int:
        nonlocal position
        assert buffer.nbytes, "to ask for nothing would seem to be the end"
        most = min(buffer.nbytes, ends - position)
        count = data.draw(st.integers(min(1, most), most))
        buffer[:count] = FILE[position : position + count]
        position += count
        return count

    wanted.fill(read_into)
    assert wanted.count == min(ends, stop) - start
    assert memory[: wanted.count] == FILE[start : start + wanted.count]


@given(st.data())
def test_dropping_bytes_leaves_the_rest(data: st.DataObject) -> None:
    memory = bytearray(FILE[: data.draw(st.integers(0, 40))])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(memory)), max_size=5)))
    buffers = [memoryview(memory)[a:b] for a, b in pairwise([0, *cuts, len(memory)])]
    count = data.draw(st.integers(0, len(memory)))
    left = drop_bytes(buffers, count)
    assert b"".join(left) == bytes(memory[count:])


@pytest.mark.parametrize(
    ("content_range", "length", "found"),
    [
        ("bytes 5-9/100", 5, (5, 100)),
        ("bytes 5-9/*", 5, (5, None)),
        ("bytes */100", 0, (0, 100)),
        (" bytes 0-0/1 ", "1", (0, 1)),
        (None, "12", (0, 12)),
        (None, None, (0, None)),
    ],
)
def test_heads_of_answers(content_range: str | None, length: int | str | None, found: tuple[int, int | None]) -> None:
    assert part(content_range, length) == found


@pytest.mark.parametrize("content_range", ["", "bytes 5-/100", "5-9/100", "bytes 5-9", "bytes a-b/c", "lines 5-9/100"])
def test_heads_that_say_nothing_are_refused(content_range: str) -> None:
    with pytest.raises(ReadError, match="malformed Content-Range"):
        part(content_range, 5)
