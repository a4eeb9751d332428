"""The memory of batches and chunks, used again.

New memory costs more than reading into it, on some machines ten times as much. So large batches are read into the
memory that the caller has let go of: as soon as a loop moves on to the next batch, its last one is filled again. Chunks
that are computed for batches (``iter_batches``) are read into the memory of earlier ones.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_WAIT_SECONDS = 0.1
"""How long a thread waits for memory before it looks whether all has ended meanwhile."""


_ALIGNMENT = 64
"""Large arrays begin at a multiple of this. Some processors (AMD's since Zen 3) copy at a third of their speed to what
lies 1 to 31 bytes further within its page than where it comes from: the system's memory begins 16 bytes within a page,
and the vectors of an fbin file 8 bytes within its first one. Read so, it was 1.9 GB/s instead of 6."""

_LARGE_NBYTES = 2**20


def _new_memory(nbytes: int) -> Array:
    memory = np.empty(nbytes + _ALIGNMENT - 1, np.uint8)
    first = -memory.__array_interface__["data"][0] % _ALIGNMENT
    return memory[first : first + nbytes]


class Buffers:
    """Memory that is used again once all arrays in it are gone."""

    def __init__(self, kept_nbytes: int) -> None:
        self._kept_nbytes = kept_nbytes
        self._free: list[Array] = []
        self._free_nbytes = 0
        self._lent: dict[weakref.ref[_Lease], Array] = {}
        self._lent_nbytes = 0
        # The last reference to an array may go anywhere, while somebody presses Ctrl-C too: Python drops what is
        # raised in a finalizer. So what ends is put in a queue, by C, in which no Ctrl-C can arrive.
        self._ended: SimpleQueue[weakref.ref[_Lease] | None] = SimpleQueue()
        # Re-entrant: an iterator that is collected as garbage closes this, perhaps from the midst of it. It is taken as
        # it is, not by way of the condition: that is Python, and a Ctrl-C that arrives there leaves it taken for ever.
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._is_watched = False

    @property
    def free_nbytes(self) -> int:
        """Bytes kept for arrays to come."""
        with self.lock:
            self._collect()
            return self._free_nbytes

    @property
    def lent_nbytes(self) -> int:
        """Bytes of arrays that are alive."""
        with self.lock:
            self._collect()
            return self._lent_nbytes

    def has_free(self, nbytes: int) -> bool:
        """Tell whether memory of about this size is there: a small array must not keep a large buffer alive."""
        with self.lock:
            self._collect()
            return self._find(nbytes) is not None

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array of undefined content."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self.lock:
            self._collect()
            place = self._find(nbytes)
            buffer = _new_memory(nbytes) if place is None else self._free.pop(place)
            self._free_nbytes -= 0 if place is None else buffer.nbytes
            lease = _Lease(buffer, shape, dtype)
            if self._kept_nbytes >= 0:
                self._lent[weakref.ref(lease, self._ended.put)] = buffer
                self._lent_nbytes += buffer.nbytes
        return np.asarray(lease)

    def wait_while(self, lacking: Callable[[], bool], seconds: float) -> None:
        """Wait until anything has changed if something is lacking, but not for ever."""
        with self.lock:
            if not lacking():
                return
            if self._is_watched:
                self._changed.wait(seconds)
                return
            self._is_watched = True
        # Of those who wait, one watches what ends, and tells the others.
        ended = None
        try:
            with suppress(Empty):
                ended = self._ended.get(timeout=seconds)
        finally:
            with self.lock:
                self._is_watched = False
                self._keep(ended)
                self._changed.notify_all()

    def wake(self) -> None:
        """Have those who wait look again: there are none where nobody watches, who tells the others."""
        with self.lock:
            if self._is_watched:
                self._ended.put(None)

    def close(self) -> None:
        """Let go of all memory, and keep none from now on."""
        with self.lock:
            self._kept_nbytes = -1
            self._free.clear()
            self._lent.clear()
            self._free_nbytes = self._lent_nbytes = 0
            self.wake()

    def _find(self, nbytes: int) -> int | None:
        fitting = (place for place, free in enumerate(self._free) if nbytes <= free.nbytes <= nbytes + nbytes // 8)
        return next(fitting, None)

    def _collect(self) -> None:
        """Keep the memory of all that has ended meanwhile."""
        if self._is_watched:
            # Who watches may have taken from the queue what has ended, and not come to keep it.
            ended: list[weakref.ref[_Lease] | None] = [lease for lease in list(self._lent) if lease() is None]
        else:
            ended = []
            with suppress(Empty):
                while not self._ended.empty():
                    ended.append(self._ended.get_nowait())
        for lease in ended:
            self._keep(lease)

    def _keep(self, ended: weakref.ref[_Lease] | None) -> None:
        """Keep memory for the next array, rather than what has not been used for long."""
        buffer = None if ended is None else self._lent.pop(ended, None)
        if buffer is None:  # woken, or closed meanwhile
            return
        self._lent_nbytes -= buffer.nbytes
        self._free.append(buffer)
        self._free_nbytes += buffer.nbytes
        while self._free_nbytes > self._kept_nbytes:
            self._free_nbytes -= self._free.pop(0).nbytes


class _Lease:
    """Lends memory to an array. numpy keeps it alive as long as the array or any view of it lives."""

    __slots__ = ("__array_interface__", "__weakref__", "_buffer")

    def __init__(self, buffer: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._buffer = buffer
        self.__array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (buffer.__array_interface__["data"][0], False),
            "version": 3,
        }


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
    nbytes = math.prod(shape) * dtype.itemsize
    if buffers is not None and nbytes:
        return buffers.take(shape, dtype)
    return np.empty(shape, dtype) if nbytes < _LARGE_NBYTES else np.asarray(_Lease(_new_memory(nbytes), shape, dtype))


class Slot:
    """A batch to be filled, which may have to wait for its memory."""

    def __init__(self, buffers: Buffers, shape: tuple[int, int], dtype: np.dtype[Any], most_nbytes: int | None) -> None:
        self._buffers, self._shape, self._dtype = buffers, shape, dtype
        self._most_nbytes = most_nbytes  # beyond it no new memory is made, as long as the batch is not asked for
        self._array: Array | None = None

    def make(self) -> Array:
        """Return the batch, in new memory if there is no other."""
        with self._buffers.lock:
            if self._array is None:
                self._array = self._buffers.take(self._shape, self._dtype)
                if self._most_nbytes is not None:
                    self._buffers.wake()
            return self._array

    def hand_over(self) -> Array:
        """Return the batch, and keep nothing of it."""
        array = self.make()
        self._array = None
        return array

    def wait(self) -> Array | None:
        """Return the batch; None if there is no memory for it even after a while."""
        if self._most_nbytes is None:
            return self.make()
        self._buffers.wait_while(self.lacks_memory, _WAIT_SECONDS)
        with self._buffers.lock:
            return None if self.lacks_memory() else self.make()

    def lacks_memory(self) -> bool:
        """Tell whether the caller holds on to more batches than expected."""
        with self._buffers.lock:
            if self._array is not None or self._most_nbytes is None or self._buffers.has_free(self.nbytes):
                return False
            return self._buffers.lent_nbytes + self.nbytes > self._most_nbytes

    @property
    def nbytes(self) -> int:
        """The size of the batch."""
        return math.prod(self._shape) * self._dtype.itemsize
