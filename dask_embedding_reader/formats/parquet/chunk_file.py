"""Column chunks of remote files, as files for pyarrow, and as memory for those who read pages themselves."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dask_embedding_reader.storage.read import read_each_into
from dask_embedding_reader.storage.store import StoredFile

MOST_WINDOWS = 3
"""So many are fetched at once where one file is read alone: one connection to an object store brings 60 to 90 MB/s.

Where more are read, these ask at the same time, and memory counts.
"""


class _Fetched(NamedTuple):
    """Bytes of a remote column chunk."""

    first: int
    """The position of the first one."""
    data: memoryview

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.first + len(self.data)


class ChunkFile(io.RawIOBase):
    """A remote file of which only some column chunks can be read.

    Chunks that are small are fetched at once and together; a large one is fetched window by window, as it is decoded,
    or some windows at a time.
    """

    def __init__(self, file: StoredFile, chunks: Sequence[tuple[int, int]], window_nbytes: int) -> None:
        self._file = file
        self._window_nbytes = window_nbytes
        self._chunks = sorted(chunks)
        self._position = 0
        small = [(start, stop) for start, stop in self._chunks if stop - start <= window_nbytes]
        fetched = [_Fetched(start, np.empty(stop - start, np.uint8).data) for start, stop in small]
        _fetch_each(file, [(window.first, window.data) for window in fetched])
        self._windows = dict(zip(small, fetched, strict=True))

    def _move(self, window: _Fetched | None, start: int, stop: int, end: int) -> _Fetched:
        """Fetch a window that holds some bytes of a chunk that has an end; what the last window holds is kept.

        So is a little before them: the header behind a page is looked at before the page is read. Its memory is new,
        as there may be views of that of the last one.
        """
        begin, kept = start, memoryview(b"")
        if window is not None and window.first <= start <= window.stop + self._window_nbytes // 4:
            begin = max(window.first, min(start - self._window_nbytes // 4, window.stop))
            kept = window.data[begin - window.first :]
        step = self._window_nbytes
        windows = max(1, min(MOST_WINDOWS, self._file.store.connections // (4 * _count_readers(self))))
        data = np.empty(min(max(stop, start + windows * step), end) - begin, np.uint8).data
        data[: len(kept)] = kept
        missing = range(len(kept), len(data), step)
        read_each_into(self._file, [(begin + place, [data[place : place + step]]) for place in missing])
        return _Fetched(begin, data)

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
        """Return bytes of a chunk, as they have been fetched: no copy of them."""
        chunk = next((c for c in self._chunks if c[0] <= start < c[1]), None)
        if chunk is None:
            return memoryview(b"")  # a damaged page points outside its column chunk: pyarrow says so at the end of it
        stop = min(stop, chunk[1])
        window = self._windows.get(chunk)
        if window is None or not window.first <= start <= stop <= window.stop:
            window = self._windows[chunk] = self._move(window, start, stop, chunk[1])
        return window.data[start - window.first : stop - window.first]


_read_in_windows: weakref.WeakSet[ChunkFile] = weakref.WeakSet()
_counting = threading.Lock()


def _count_readers(file: ChunkFile) -> int:
    """Return how many such files are read window by window at this time, in the whole process, with another one."""
    with _counting:
        _read_in_windows.add(file)
        return len(_read_in_windows)


def _fetch_each(file: StoredFile, ranges: Sequence[tuple[int, memoryview]]) -> None:
    """Fill memory with the bytes from some positions on; those that touch are one request."""
    joined: list[tuple[int, list[memoryview]]] = []
    reached = -1
    for start, data in ranges:
        if start != reached:
            joined.append((start, []))
        joined[-1][1].append(data)
        reached = start + len(data)
    read_each_into(file, joined)
