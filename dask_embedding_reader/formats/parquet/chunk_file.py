"""Column chunks of remote files, as files for pyarrow, and as memory for those who read pages themselves."""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dask_embedding_reader._common.memory import Buffers
from dask_embedding_reader._common.threads import count_beside, pool_beside
from dask_embedding_reader.storage.read import read_each_into, read_joined_into
from dask_embedding_reader.storage.store import StoredFile


class Extent(NamedTuple):
    """Where a column chunk, or some pages of it, are in a file."""

    start: int
    """The first byte."""
    stop: int
    """The byte after the last one."""
    likely_stop: int
    """The byte that what is wanted ends before, as far as that can be told: behind it, nothing is fetched ahead."""


class _Block(NamedTuple):
    """Bytes that are there, or on their way."""

    first: int
    """The position of the first one."""
    data: memoryview
    arrival: Future[None]

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.first + len(self.data)


@dataclass(slots=True)
class _Large:
    """A column chunk that is fetched block by block."""

    extent: Extent
    next: int = 0
    """Where the block begins that is fetched next."""
    blocks: deque[_Block] = field(default_factory=deque)

    @property
    def is_read(self) -> bool:
        """Whether some of it has been fetched, and more is to be."""
        return bool(self.blocks) and self.next < self.extent.likely_stop


class ChunkFile(io.RawIOBase):
    """A remote file of which only some column chunks can be read.

    Chunks that are small are fetched at once and together. Of a large one several blocks are on their way while those
    before are decoded: one connection to an object store brings 60 to 90 MB/s, and all that read in this way share
    those that a pass may have. Blocks come into the memory of earlier ones, which costs a quarter of new memory.
    """

    def __init__(self, file: StoredFile, extents: Sequence[Extent], block_nbytes: int) -> None:
        self._file = file
        self._block_nbytes = block_nbytes
        self._position = 0
        extents = sorted(extents)
        self._small = [
            (extent.start, np.empty(extent.stop - extent.start, np.uint8).data)
            for extent in extents
            if extent.stop - extent.start <= block_nbytes
        ]
        read_joined_into(file, self._small)
        self._large = [_Large(extent) for extent in extents if extent.stop - extent.start > block_nbytes]
        if self._large:
            self._at_once = min(count_beside() or _ALONE, file.store.connections)
            self._pool = pool_beside(file.store.connections)
            self.buffers = _shared_buffers(self._at_once * block_nbytes)

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read in any order."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Choose the byte to be read next."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the byte to be read next."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        data = self.read_at(self._position, self._position + size)
        self._position += len(data)
        return bytes(data)

    def read_at(self, start: int, stop: int) -> memoryview:
        """Return bytes of a chunk, as they have been fetched: mostly no copy of them."""
        for first, data in self._small:
            if first <= start < first + len(data):
                return data[start - first : stop - first]
        for large in self._large:
            if large.extent.start <= start < large.extent.stop:
                return self._read_large(large, start, min(stop, large.extent.stop))
        return memoryview(b"")  # a damaged page points outside its column chunk: pyarrow says so at the end of it

    def _read_large(self, large: _Large, start: int, stop: int) -> memoryview:
        # What is a little before the last bytes is kept: the header behind a page is looked at before the page is read.
        kept = self._block_nbytes // 4
        blocks = large.blocks
        if not blocks or not blocks[0].first <= start <= large.next + kept:
            blocks.clear()
            large.next = start
        while blocks and blocks[0].stop <= start - kept:
            blocks.popleft()
        while large.next < stop or (large.next < large.extent.likely_stop and len(blocks) <= self._count_ahead(large)):
            blocks.append(self._fetch(large.next, min(large.next + self._block_nbytes, large.extent.stop)))
            large.next = blocks[-1].stop
        try:
            parts = [part for block in blocks if len(part := _part(block, start, stop))]
        except BaseException:
            blocks.clear()  # who tries again asks again
            raise
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _fetch(self, start: int, stop: int) -> _Block:
        """Have bytes come."""
        data = self.buffers.take((stop - start,), np.dtype(np.uint8)).data
        return _Block(start, data, self._pool.submit(read_each_into, self._file, [(start, [data])]))

    def _count_ahead(self, large: _Large) -> int:
        """Return how many blocks of a chunk may be on their way."""
        chunks = sum(each.is_read or each is large for each in self._large)
        return max(1, self._at_once // (_count_readers(self) * chunks))


_ALONE = 2
"""So many blocks are on their way at once for those who are of no pool of threads that says how many may be."""

_readers: weakref.WeakSet[ChunkFile] = weakref.WeakSet()
_counting = threading.Lock()


def _part(block: _Block, start: int, stop: int) -> memoryview:
    """Return what a block has of some bytes, once it has come."""
    part = block.data[max(0, start - block.first) : max(0, stop - block.first)]
    if len(part):
        block.arrival.result()
    return part


def _count_readers(file: ChunkFile) -> int:
    """Return how many such files are read block by block at this time, in the whole process, with another one."""
    with _counting:
        _readers.add(file)
        return len(_readers)


def _shared_buffers(kept_nbytes: int) -> Buffers:
    """Return the memory of those that are read at this time, which they share."""
    with _counting:
        return next((file.buffers for file in _readers), None) or Buffers(kept_nbytes)


def _start_afresh() -> None:
    """Forget a lock that a thread of the parent may hold, and what was read there."""
    global _counting  # noqa: PLW0603 - nobody else is there yet
    _counting = threading.Lock()
    _readers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
