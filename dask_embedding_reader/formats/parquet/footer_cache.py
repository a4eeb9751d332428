"""Footers that were read, kept for the next rows of the same file, in so many bytes and no more."""

from __future__ import annotations

import threading
from collections import OrderedDict

from dask_embedding_reader.formats.parquet.footer import Footer
from dask_embedding_reader.storage.store import StoredFile


class FooterCache:
    """The footers that were used last.

    Threads share it: each step holds the lock.
    """

    def __init__(self, most_nbytes: int) -> None:
        self._most_nbytes = most_nbytes
        self._nbytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[StoredFile, Footer] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return self._nbytes

    def get(self, file: StoredFile) -> Footer | None:
        """Return the footer of a file, if it is known."""
        with self._lock:
            if file in self._kept:
                self._kept.move_to_end(file)
            return self._kept.get(file)

    def put(self, file: StoredFile, footer: Footer) -> None:
        """Keep a footer in place of those that were used the longest time ago. The last one is kept, large or not."""
        with self._lock:
            self._forget(file)
            self._kept[file] = footer
            self._nbytes += footer.nbytes
            while self._nbytes > self._most_nbytes and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def _forget(self, file: StoredFile) -> None:
        if known := self._kept.pop(file, None):
            self._nbytes -= known.nbytes
