"""Byte ranges that are asked for, and what the answers say that they brought."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Sequence

import numpy as np

from dask_embedding_reader.errors import ReadError

_BLOCK_NBYTES = 2**22
"""As much is received at once: whoever waits for it looks around in between."""


class ByteRange:
    """A byte range ``[start, stop)`` of a file, and the memory for it."""

    __slots__ = ("_rest", "buffers", "count", "start", "stop")

    def __init__(self, start: int, buffers: Sequence[memoryview]) -> None:
        self.start = start
        self.stop = start + sum(buffer.nbytes for buffer in buffers)
        self.count = 0
        """Bytes that came."""
        self.buffers = [buffer for buffer in buffers if buffer.nbytes]
        """Writable, contiguous memory for them."""
        self._rest = self.buffers

    @property
    def nbytes(self) -> int:
        """How many bytes are asked for."""
        return self.stop - self.start

    @property
    def header(self) -> str:
        """The range as a request writes it."""
        return f"bytes={self.start}-{self.stop - 1}"

    def fill(self, read_into: Callable[[memoryview], int]) -> None:
        """Have a function put the bytes where they belong, until it says that there are no more."""
        for buffer in self.buffers:
            rest = buffer
            while rest.nbytes:
                count = read_into(rest[:_BLOCK_NBYTES])
                if count == 0:
                    return
                self.count += count
                rest = rest[count:]

    def put(self, block: bytes) -> None:
        """Take the next bytes.

        Raises
        ------
        ReadError
            If more come than were asked for.
        """
        self.count += len(block)
        if self.start + self.count > self.stop:
            raise self.too_many()
        view = memoryview(block)
        while view.nbytes:
            taken = min(view.nbytes, self._rest[0].nbytes)
            self._rest[0][:taken] = view[:taken]
            view, self._rest = view[taken:], drop_bytes(self._rest, taken)

    def too_many(self) -> ReadError:
        """Return the error for an answer that is too long."""
        return ReadError(f"more than the {self.stop - self.start:,} bytes came that were asked for")

    def misplaced(self, first: int) -> ReadError:
        """Return the error for an answer that starts elsewhere."""
        return ReadError(f"the bytes from {first:,} on came where those from {self.start:,} on were asked for")

    def take_memory(self) -> None:
        """Have the system provide the memory, which costs as much as reading."""
        for buffer in self.buffers:
            np.frombuffer(buffer, np.uint8)[:: mmap.PAGESIZE] = 0


def drop_bytes(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Leave out the first ``count`` bytes of a list of buffers."""
    for position, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[position + 1 :]]
        count -= buffer.nbytes
    return []


def part(
    content_range: str | None, content_length: str | int | None, status: int | None = None
) -> tuple[int, int | None]:
    """Return at which byte of the file a body starts, and how long the file is, where the answer says so."""
    if content_range is None and status == 206:
        # In several parts, each under a head of its own, or of a proxy that leaves it out.
        raise ReadError("an answer came that does not tell which bytes of the file it brings (no Content-Range)")
    if content_range is None:  # a server that knows no ranges sends the whole file
        return 0, None if content_length is None else int(content_length)
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", content_range.strip())
    if found is None:
        raise ReadError(f"an answer came with the malformed Content-Range {content_range!r}")
    first, size = found.groups()
    return int(first or 0), None if size == "*" else int(size)


def is_as_stored(encoding: str | None) -> bool:
    """Tell, from its ``Content-Encoding``, whether a body is the file: some servers compress whatever they are asked.

    Positions and lengths that the answer tells then are those of other bytes.
    """
    return encoding in (None, "", "identity")


def only(wanted: ByteRange, first: int) -> Callable[[bytes], bool]:
    """Return what takes a body that starts at byte ``first``, keeps what is wanted, and tells when it has had enough.

    A body of exactly the range is read to its end, so that one that is too long is noticed.
    """
    if first > wanted.start:
        raise wanted.misplaced(first)
    position, exact = first, first == wanted.start and wanted.start > 0

    def put(block: bytes) -> bool:
        nonlocal position
        skip = max(0, wanted.start - position)
        stop = len(block) if exact else max(0, wanted.stop - position)
        if skip < len(block) and stop > skip:
            wanted.put(block if skip == 0 and stop >= len(block) else block[skip:stop])
        position += len(block)
        return not exact and position >= wanted.stop

    return put
