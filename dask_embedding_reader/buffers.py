"""The memory of batches and chunks, used again.

New memory costs more than reading into it, on some machines ten times as much. So large batches are read into the
memory that the caller has let go of: as soon as a loop moves on to the next batch, its last one is filled again. Chunks
that are computed for batches (``iter_batches``) are read into the memory of earlier ones.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_WAIT_SECONDS = 0.1
"""How long a thread waits for memory before it looks whether all has ended meanwhile."""


class Buffers:
    """Memory that is used again once all arrays in it are gone."""

    def __init__(self, kept_nbytes: int) -> None:
        self._kept_nbytes = kept_nbytes
        self._free: list[Array] = []
        self.free_nbytes = 0
        self.lent_nbytes = 0
        # Re-entrant: a batch may be collected as garbage anywhere, in the midst of this class too.
        self.changed = threading.Condition(threading.RLock())

    def has_free(self, nbytes: int) -> bool:
        """Tell whether memory of about this size is there: a small array must not keep a large buffer alive."""
        return self._find(nbytes) is not None

    def _find(self, nbytes: int) -> int | None:
        fitting = (place for place, free in enumerate(self._free) if nbytes <= free.nbytes <= nbytes + nbytes // 8)
        return next(fitting, None)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array of undefined content."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self.changed:
            place = self._find(nbytes)
            buffer = None if place is None else self._free.pop(place)
            self.free_nbytes -= 0 if buffer is None else buffer.nbytes
            self.lent_nbytes += nbytes if buffer is None else buffer.nbytes
        return np.asarray(_Lease(self, np.empty(nbytes, np.uint8) if buffer is None else buffer, shape, dtype))

    def give_back(self, buffer: Array) -> None:
        """Keep memory for the next array, rather than what has not been used for long."""
        with self.changed:
            self.lent_nbytes -= buffer.nbytes
            self._free.append(buffer)
            self.free_nbytes += buffer.nbytes
            while self._free and self.free_nbytes > self._kept_nbytes:
                self.free_nbytes -= self._free.pop(0).nbytes
            self.changed.notify_all()

    def close(self) -> None:
        """Let go of all memory, and keep none from now on."""
        with self.changed:
            self._kept_nbytes = -1
            self._free.clear()
            self.free_nbytes = 0
            self.changed.notify_all()


class _Lease:
    """Lends memory to an array. numpy keeps it alive as long as the array or any view of it lives.

    A Ctrl-C that arrives while ``__del__`` runs is dropped by Python, and the memory is then not used again; a second
    one ends the program. A weak reference whose callback is ``SimpleQueue.put`` would run no Python code there.
    """

    __slots__ = ("__array_interface__", "_buffer", "_buffers")

    def __init__(self, buffers: Buffers, buffer: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._buffers, self._buffer = buffers, buffer
        self.__array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (buffer.ctypes.data, False),
            "version": 3,
        }

    def __del__(self) -> None:
        self._buffers.give_back(self._buffer)


def has_own_memory(array: Array) -> bool:
    """Tell whether an array is no part of another: its memory is its own, or all of what it was lent."""
    return array.flags.owndata or isinstance(array.base, _Lease)


_thread = threading.local()


@contextmanager
def used_again(buffers: Buffers) -> Iterator[None]:
    """Have new arrays of this thread lie in the memory of earlier ones."""
    _thread.buffers = buffers
    try:
        yield
    finally:
        _thread.buffers = None


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an array of undefined content, in memory that is used again where the thread has some."""
    buffers: Buffers | None = getattr(_thread, "buffers", None)
    return np.empty(shape, dtype) if buffers is None or not math.prod(shape) else buffers.take(shape, dtype)


class Slot:
    """A batch to be filled, which may have to wait for its memory."""

    def __init__(self, buffers: Buffers, shape: tuple[int, int], dtype: np.dtype[Any], most_nbytes: int | None) -> None:
        self._buffers, self._shape, self._dtype = buffers, shape, dtype
        self._most_nbytes = most_nbytes  # beyond it no new memory is made, as long as the batch is not asked for
        self._array: Array | None = None

    def make(self) -> Array:
        """Return the batch, in new memory if there is no other."""
        with self._buffers.changed:
            if self._array is None:
                self._array = self._buffers.take(self._shape, self._dtype)
                self._buffers.changed.notify_all()
            return self._array

    def wait(self) -> Array | None:
        """Return the batch; None if there is no memory for it even after a while."""
        with self._buffers.changed:
            if self._must_wait():
                self._buffers.changed.wait(_WAIT_SECONDS)
            return None if self._must_wait() else self.make()

    def _must_wait(self) -> bool:
        if self._array is not None or self._most_nbytes is None or self._buffers.has_free(self.nbytes):
            return False
        return self._buffers.lent_nbytes + self.nbytes > self._most_nbytes

    @property
    def nbytes(self) -> int:
        """The size of the batch."""
        return math.prod(self._shape) * self._dtype.itemsize

    @property
    def lacks_memory(self) -> bool:
        """Whether the caller holds on to more batches than expected."""
        with self._buffers.changed:
            return self._must_wait()
