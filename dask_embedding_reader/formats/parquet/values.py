"""The values of a page, wherever they are: in memory, in the file as in memory, or there between tags of snappy.

Snappy compresses blocks of 64 KB, and floating-point numbers mostly not at all: a block is then one literal, a tag of
three bytes and the bytes themselves. These are read straight into arrays, which takes two thirds of the time of reading
a page, decompressing it and copying its values (0.09 instead of 0.13 s for 200 MB).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.raw import as_bytes, copy_rows, naming_rows, raw_reader
from dask_embedding_reader.storage.read import read_into
from dask_embedding_reader.storage.store import StoredFile

Array = npt.NDArray[Any]


class Values(Protocol):
    """The values of a page, counted in bytes from its first one on."""

    @property
    def nbytes(self) -> int:
        """How many bytes."""

    def fill(self, start: int, outs: Sequence[Array], row: int) -> bool:
        """Fill arrays with the vectors from a byte on, which begin with a row of the file; tell whether that could be.

        Where not, anything may be in the arrays.
        """

    def copy(self, start: int, stop: int) -> bytes | None:
        """Return some of them; None where that cannot be."""

    def kept(self) -> Values:
        """Return what lasts when the next page is read."""


class InMemory:
    """Values that have been read."""

    def __init__(self, file: StoredFile, place: Place, values: Array, *, is_lent: bool = False) -> None:
        """Memory that is lent holds the next page soon."""
        self._file, self._place, self._values, self._is_lent = file, place, values, is_lent
        self.nbytes = values.nbytes

    def fill(self, start: int, outs: Sequence[Array], row: int) -> bool:
        """Copy vectors."""
        place = self._place
        stop = start + sum(map(len, outs)) * place.row_nbytes
        vectors = self._values[start:stop].view(place.dtype).reshape(-1, place.dimension)
        copy_rows(vectors, outs, self._file, row)
        return True

    def copy(self, start: int, stop: int) -> bytes:
        """Return some of them."""
        return self._values[start:stop].tobytes()

    def kept(self) -> Values:
        """Return what lasts."""
        return InMemory(self._file, self._place, self._values.copy()) if self._is_lent else self


class InFile:
    """Values that lie in the file as in memory."""

    def __init__(self, file: StoredFile, place: Place, position: int, nbytes: int) -> None:
        self._file, self._place, self._position, self.nbytes = file, place, position, nbytes

    def fill(self, start: int, outs: Sequence[Array], row: int) -> bool:
        """Read vectors."""
        raw_reader(self._file, self._position + start, self._place.dtype, self._place.row_nbytes, row)(outs)
        return True

    def copy(self, start: int, stop: int) -> bytes:
        """Read some of them."""
        part = bytearray(stop - start)
        read_into(self._file, self._position + start, [memoryview(part)])
        return bytes(part)

    def kept(self) -> Values:
        """Return the same: nothing has been read."""
        return self


BLOCK_NBYTES = 2**16
"""What snappy compresses at a time."""

_MOST_BLOCK_NBYTES = 32 + BLOCK_NBYTES + BLOCK_NBYTES // 6
"""What that may become, as its authors say."""


def find_literals(stored_nbytes: int, plain_nbytes: int) -> int | None:
    """Return where in a page that snappy compressed its second block begins, if this and all that follow are literals.

    None if they cannot be.
    """
    blocks = -(-plain_nbytes // BLOCK_NBYTES)
    if blocks < 2:
        return None
    last = plain_nbytes - (blocks - 1) * BLOCK_NBYTES
    step = len(_tag(BLOCK_NBYTES)) + BLOCK_NBYTES
    first = stored_nbytes - (blocks - 2) * step - len(_tag(last)) - last
    return first if 0 < first <= _MOST_BLOCK_NBYTES else None


def _tag(nbytes: int) -> bytes:
    """Spell what stands before so many literal bytes of a block."""
    if nbytes <= 60:
        return bytes([(nbytes - 1) << 2])
    return bytes([60 << 2, nbytes - 1]) if nbytes <= 256 else bytes([61 << 2]) + (nbytes - 1).to_bytes(2, "little")


Spans = list[tuple[int, list[memoryview]]]
"""Where bytes are, and memory for them."""


def read_spans_of(data: memoryview, spans: Spans) -> None:
    """Copy bytes that are in memory, as ``read_each_into`` reads those of files."""
    for position, buffers in spans:
        rest = data[position:]
        for buffer in buffers:
            buffer[:], rest = rest[: buffer.nbytes], rest[buffer.nbytes :]


class Literals:
    """Values that snappy compressed, of which the first block has been decompressed, and the others may be literals.

    Whether they are is seen when they are read: else all of the page is decompressed.
    """

    def __init__(
        self,
        file: StoredFile,
        place: Place,
        first: Array,
        second: int,
        levels_nbytes: int,
        nbytes: int,
        read: Callable[[Spans], None],
        decompress: Callable[[], Values | None],
    ) -> None:
        """The first block begins with levels; the second one is at a position of what spans are read from."""
        self._file, self._place, self._first, self._second = file, place, first, second
        self._levels_nbytes, self.nbytes, self._read_spans, self._decompress = levels_nbytes, nbytes, read, decompress

    def fill(self, start: int, outs: Sequence[Array], row: int) -> bool:
        """Read vectors."""
        with naming_rows(row, row + sum(map(len, outs))):
            if all(out.dtype == self._place.dtype for out in outs) and self._read(start, map(as_bytes, outs)):
                return True
            values = self._decompress()
        return values is not None and values.fill(start, outs, row)

    def copy(self, start: int, stop: int) -> bytes | None:
        """Read some of them."""
        part = bytearray(stop - start)
        if self._read(start, [memoryview(part)]):
            return bytes(part)
        values = self._decompress()
        return None if values is None else values.copy(start, stop)

    def kept(self) -> Values:
        """Return the same: the first block has memory of its own."""
        return self

    def _read(self, start: int, buffers: Iterable[memoryview]) -> bool:
        """Fill buffers with the bytes from one on; tell whether all blocks up to the last of these are literals."""
        start += self._levels_nbytes
        rest = deque(buffers)
        stop = start + sum(buffer.nbytes for buffer in rest)
        position = start
        if position < BLOCK_NBYTES:
            taken = self._first.data[position : min(stop, BLOCK_NBYTES)]
            position += len(taken)
            for buffer in _take(rest, len(taken)):
                buffer[:] = taken[: buffer.nbytes]
                taken = taken[buffer.nbytes :]
        if position == stop:
            return True
        end = self._levels_nbytes + self.nbytes
        blocks = range(1, -(-stop // BLOCK_NBYTES))
        expected = [_tag(min(BLOCK_NBYTES, end - block * BLOCK_NBYTES)) for block in blocks]
        found = memoryview(bytearray(sum(map(len, expected))))
        spans: Spans = []
        stored, seen, reached = self._second, 0, -1
        for block, tag in zip(blocks, expected, strict=True):
            begin, finish = block * BLOCK_NBYTES, min((block + 1) * BLOCK_NBYTES, stop)
            if stored != reached:
                spans.append((stored, []))
            spans[-1][1].append(found[seen : seen + len(tag)])
            seen += len(tag)
            stored += len(tag)
            if finish > start:
                skipped = max(0, start - begin)
                if skipped:
                    spans.append((stored + skipped, []))
                parts = _take(rest, finish - begin - skipped)
                spans[-1][1].extend(parts)
                reached = stored + finish - begin
            stored += BLOCK_NBYTES
        self._read_spans(spans)
        return bytes(found) == b"".join(expected)


def _take(rest: deque[memoryview], nbytes: int) -> list[memoryview]:
    """Take the first so many bytes of buffers that are to be filled."""
    taken = []
    while nbytes:
        buffer = rest.popleft()
        taken.append(buffer[:nbytes])
        if nbytes < buffer.nbytes:
            rest.appendleft(buffer[nbytes:])
        nbytes -= taken[-1].nbytes
    return taken
