"""Threads that end soon after nobody waits for their results any more.

What they are about to do is cancelled as usual. But a thread that is asking a storage may have to ask again, after
pauses that grow: it looks here before it does. So does a program that ends, however it ends: it waits for all threads.

What asks in fsspec's event loop, or directly, is cancelled at once (``storage.connections.run`` and ``run_apart``).
Listings, and clients that are not asynchronous (HDFS, FTP, SFTP), cannot be cancelled while they wait for an answer:
their threads end when it comes, or when the client gives up.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from dask_embedding_reader.errors import ReadError

R = TypeVar("R")

_own = threading.local()
# No WeakSet: it runs Python when an event goes, and Python drops a Ctrl-C that arrives there.
_all: list[weakref.ref[threading.Event]] = []
_adding = threading.Lock()
_asked: weakref.WeakKeyDictionary[threading.Event, set[Hashable]] = weakref.WeakKeyDictionary()


def stoppable_pool(threads: int, stopped: threading.Event) -> ThreadPoolExecutor:
    """Return threads that give up what they do once the event is set."""
    with _adding:
        _all[:] = [*(known for known in _all if known() is not None), weakref.ref(stopped)]
    return ThreadPoolExecutor(
        threads, thread_name_prefix="embedding-reader", initializer=_stop_with, initargs=(stopped, threads)
    )


def pool_beside(threads: int) -> ThreadPoolExecutor:
    """Return threads that give up what they do when this one does; they end when nothing refers to them any more."""
    return stoppable_pool(threads, _event() or threading.Event())


def count_beside() -> int | None:
    """Return how many threads work together with this one, itself included; None where it is of no pool."""
    return getattr(_own, "threads", None)


@contextmanager
def threads_at_once(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads to a block; when it fails or is interrupted, they stop, and when the thread that gives them does."""
    outer = _event()
    stopped = threading.Event() if outer is None else outer
    pool = stoppable_pool(threads, stopped)
    try:
        yield pool
    except BaseException as error:
        if outer is None:
            stopped.set()
        # Somebody who presses ctrl-C does not want to wait for a server that does not answer.
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()


def map_at_once(threads: int, function: Callable[..., R], *columns: Sequence[Any]) -> list[R]:
    """Call a function for each row of columns, many at once, and keep the order."""
    if min(threads, len(columns[0])) <= 1:
        return [function(*row) for row in zip(*columns, strict=True)]
    with threads_at_once(min(threads, len(columns[0]))) as pool:
        return list(pool.map(function, *columns))


def check_process(process: int) -> None:
    """Refuse to wait, in a fork, for threads that the process of this number has: a fork has none of them.

    Raises
    ------
    ReadError
        If this is another process.
    """
    if (own := os.getpid()) != process:
        raise ReadError(
            f"these batches are read by threads of process {process}, which this fork of it (process {own}) has not: "
            "make an iterator in each process, as by calling the reader again, with start= for the rows that are left"
        )


def may_stop() -> bool:
    """Tell whether this thread is one that may be stopped."""
    return _event() is not None


def is_stopped() -> bool:
    """Tell whether nobody waits for what this thread does."""
    stopped = _event()
    return stopped is not None and stopped.is_set()


def is_first_time(what: Hashable) -> bool:
    """Tell whether the threads that are stopped together with this one have not asked that of the same thing before.

    In a thread that may not be stopped it is always the first time.
    """
    stopped = _event()
    if stopped is None:
        return True
    with _adding:
        asked = _asked.setdefault(stopped, set())
        is_new = what not in asked
        asked.add(what)
    return is_new


def pause(seconds: float) -> None:
    """Wait, but not when nobody waits for what this thread does."""
    stopped = _event()
    if stopped is None:
        time.sleep(seconds)
    else:
        stopped.wait(seconds)


def _event() -> threading.Event | None:
    return getattr(_own, "stopped", None)


def _stop_with(stopped: threading.Event, threads: int) -> None:
    _own.stopped, _own.threads = stopped, threads


def _stop_all() -> None:
    for known in _all.copy():
        if (stopped := known()) is not None:
            stopped.set()


if hasattr(threading, "_register_atexit"):
    # Called before the threads of pools are waited for; atexit would be too late.
    threading._register_atexit(_stop_all)
