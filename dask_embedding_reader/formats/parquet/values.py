"""The values of a page, wherever they are: in memory, in the file as in memory, or there between tags of snappy.

Snappy compresses blocks of 64 KB, and floating-point numbers mostly not at all: a block is then one literal, a tag of
three bytes and the bytes themselves. These are read straight into arrays, which takes two thirds of the time of reading
a page, decompressing it and copying its values (0.09 instead of 0.13 s for 200 MB).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.raw import as_bytes, copy_rows, naming_rows, raw_reader
from dask_embedding_reader.storage.read import read_each_into, read_into
from dask_embedding_reader.storage.store import Span, StoredFile


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

_FULL_TAG = b"\xf4\xff\xff"
"""What stands before a block that is a literal."""

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
    step = len(_FULL_TAG) + BLOCK_NBYTES
    first = stored_nbytes - (blocks - 2) * step - len(_tag(last)) - last
    return first if 0 < first <= _MOST_BLOCK_NBYTES else None


def _tag(nbytes: int) -> bytes:
    """Encode what stands before so many literal bytes of a block."""
    if nbytes <= 60:
        return bytes([(nbytes - 1) << 2])
    return bytes([60 << 2, nbytes - 1]) if nbytes <= 256 else bytes([61 << 2]) + (nbytes - 1).to_bytes(2, "little")


class Literals:
    """Values that snappy compressed: the first block may be anything, the others should be literals.

    Whether they are, and the levels in the first block those of vectors, is seen when they are read: else all of the
    page is decompressed.
    """

    def __init__(
        self,
        file: StoredFile,
        place: Place,
        body: int,
        stored: memoryview | None,
        second: int,
        levels_nbytes: int,
        nbytes: int,
        open_first: Callable[[memoryview], Array | None],
        decompress: Callable[[], Values | None],
    ) -> None:
        """The page begins at ``body``, and has been fetched if it is remote; its second block is ``second`` bytes on.

        The first one, which begins with levels, is what ``open_first`` makes of the bytes before.
        """
        self._file, self._place, self._body, self._stored, self._second = file, place, body, stored, second
        self._levels_nbytes, self.nbytes = levels_nbytes, nbytes
        self._open_first, self._decompress = open_first, decompress
        self._first: Array | None = None  # of a page that several pieces need it is opened once

    def fill(self, start: int, outs: Sequence[Array], row: int) -> bool:
        """Read vectors."""
        with naming_rows(row, row + sum(map(len, outs))):
            if all(out.dtype == self._place.dtype for out in outs) and self._read(start, [*map(as_bytes, outs)]):
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
        """Return the same: it shares no memory."""
        return self

    def _read(self, start: int, outs: Sequence[memoryview]) -> bool:
        """Fill memory with the bytes from one on; tell whether all blocks up to the last of these are literals."""
        rest = _Cutter(outs)
        start += self._levels_nbytes
        stop = start + rest.nbytes
        blocks = (stop - 1) // BLOCK_NBYTES  # without the first one
        last = min(BLOCK_NBYTES, self._levels_nbytes + self.nbytes - blocks * BLOCK_NBYTES)
        expected = _FULL_TAG * (blocks - 1) + _tag(last) if blocks else b""
        second, first = self._second, self._first
        looked_at = memoryview(bytearray(second + len(expected)))  # what is before the second block, and tags
        spans: list[tuple[int, list[memoryview]]] = [] if first is not None else [(0, [looked_at[:second]])]
        reached = second if spans else 0
        of_first = rest.cut(max(0, min(stop, BLOCK_NBYTES) - start))
        for block in range(1, blocks + 1):
            position = second + (block - 1) * (len(_FULL_TAG) + BLOCK_NBYTES)
            tag = looked_at[second + (block - 1) * len(_FULL_TAG) :][: len(_FULL_TAG)]
            passed = max(0, start - block * BLOCK_NBYTES)
            parts = rest.cut(max(0, min(BLOCK_NBYTES, stop - block * BLOCK_NBYTES) - passed))
            if passed:
                spans += [(position, [tag]), (position + len(tag) + passed, parts)][: 1 + bool(parts)]
            elif position == reached:  # what lies together is read with one call of the system
                spans[-1][1].extend([tag, *parts])
            else:
                spans.append((position, [tag, *parts]))
            reached = position + len(tag) + BLOCK_NBYTES if parts else 0
        self._read_spans(spans)
        if looked_at[second:] != expected:
            return False
        if first is None:
            first = self._first = self._open_first(looked_at[:second])
        if first is None:
            return False
        for part in of_first:
            part[:] = first.data[start : start + part.nbytes]
            start += part.nbytes
        return True

    def _read_spans(self, spans: Sequence[Span]) -> None:
        """Read what begins at positions of the page."""
        if self._stored is None:
            read_each_into(self._file, [(self._body + position, buffers) for position, buffers in spans])
            return
        for position, buffers in spans:
            rest = self._stored[position:]
            for buffer in buffers:
                buffer[:], rest = rest[: buffer.nbytes], rest[buffer.nbytes :]


class _Cutter:
    """Cuts buffers, one after the other."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._rest = deque(buffers)
        self._used = 0  # bytes of the first one
        self.nbytes = sum(buffer.nbytes for buffer in self._rest)

    def cut(self, nbytes: int) -> list[memoryview]:
        """Return the next so many bytes."""
        parts = []
        while nbytes:
            buffer, used = self._rest[0], self._used
            part = buffer[used : used + nbytes]
            self._used += part.nbytes
            if self._used == buffer.nbytes:
                self._rest.popleft()
                self._used = 0
            nbytes -= part.nbytes
            parts.append(part)
        return parts
