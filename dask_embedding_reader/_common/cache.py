"""What was read of files last, in so many bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from dask_embedding_reader._common.budget import count_cache


class Sized(Protocol):
    """What tells how much memory it takes."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Sized)


class CountedCache(Generic[K, V]):
    """The values that were used last, which count in every budget.

    Threads share it: each step holds the lock.
    """

    def __init__(self, most_nbytes: int) -> None:
        self._most_nbytes = most_nbytes
        self._nbytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()
        count_cache(lambda: self.nbytes)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return self._nbytes

    def get(self, key: K) -> V | None:
        """Return a value, if it is known."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: K, value: V) -> None:
        """Keep a value in place of those that were used the longest time ago. The last one is kept, large or not."""
        nbytes = value.nbytes
        with self._lock:
            self._forget(key)
            self._kept[key] = value, nbytes
            self._nbytes += nbytes
            while self._nbytes > self._most_nbytes and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def _forget(self, key: K) -> None:
        if known := self._kept.pop(key, None):
            self._nbytes -= known[1]
