"""What no input may cause: a hang, memory beyond the size of the input and a constant, anything unpickled."""

from __future__ import annotations

import faulthandler
import pickle
import resource
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# Dask imports it in the first computation of a process, which takes longer than any input may.
import distributed  # noqa: F401
import pyarrow as pa

SECONDS = 1.0
"""Of processor time, so that a busy machine is no hang; one that waits for ever ends after ``STUCK_SECONDS``."""

STUCK_SECONDS = 60.0
PYTHON_NBYTES = 16 * 2**20
RESIDENT_NBYTES = 64 * 2**20
"""What one input may add to the memory of the process; pyarrow's allocator takes 32 MB at a time."""

ADDRESS_NBYTES = 8 * 2**30


class Fault(BaseException):
    """What must not happen. No ``Exception``: the library shall not take it for one of its own."""


def _forbidden(*args: Any, **kwargs: Any) -> Any:
    if sys._getframe(1).f_globals["__name__"] == "dask.tokenize":  # reads back what it has just pickled itself
        return _loads(*args, **kwargs)
    raise Fault("something was unpickled")


_loads = pickle.loads


class _ForbiddenUnpickler:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _forbidden()


def _hanging(*args: Any) -> NoReturn:
    raise Fault(f"took more than {SECONDS} s of processor time")


@contextmanager
def guarded() -> Iterator[Callable[[Callable[[], Any], int, bool], Any]]:
    """Hand out a function that runs work on an input of so many bytes; True traces Python's memory, which is slow."""
    kept = pickle.load, pickle.loads, pickle.Unpickler
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_NBYTES, limits[1]))
    pickle.load, pickle.loads, pickle.Unpickler = _forbidden, _forbidden, _ForbiddenUnpickler  # type: ignore[assignment, misc]
    before = signal.signal(signal.SIGPROF, _hanging)
    try:
        yield _run
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        faulthandler.cancel_dump_traceback_later()
        pickle.load, pickle.loads, pickle.Unpickler = kept  # type: ignore[misc]
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _run(work: Callable[[], Any], nbytes: int, traced: bool) -> Any:
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
    if traced:
        tracemalloc.start()
    resident = _most_resident_nbytes()
    signal.setitimer(signal.ITIMER_PROF, SECONDS * (20 if traced else 1))
    try:
        result = work()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if traced:
            _wait_for_threads()  # Python crashes where one of them allocates while tracing stops
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    if traced and peak > PYTHON_NBYTES + 20 * nbytes:
        raise Fault(f"{peak:,} bytes of Python objects for an input of {nbytes:,}")
    grown = _most_resident_nbytes() - resident
    if grown > RESIDENT_NBYTES + 20 * nbytes:
        raise Fault(f"the process grew by {grown:,} bytes for an input of {nbytes:,}")
    return result


def _wait_for_threads() -> None:
    """Wait until the threads of abandoned iterators are gone, and what the system does after their end."""
    for thread in threading.enumerate():
        if thread.name.startswith("embedding-reader"):
            thread.join(SECONDS)
    time.sleep(0.02)


def _most_resident_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def most_reserved_nbytes() -> int:
    """What pyarrow has ever asked for at once, used or not."""
    return pa.default_memory_pool().max_memory() or 0
