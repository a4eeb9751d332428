"""The threads of BLAS, while a search has threads of its own."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


@cache
def _blas() -> Any:
    """Return what sets the threads of numpy's BLAS: looking for it among all that is loaded takes 4 to 16 ms."""
    return ThreadpoolController().select(user_api="blas")


class _SingleThreaded:
    """Has BLAS multiply in the thread that asks for it: in the whole process, until all who want that have left.

    Its own threads share out each product and wait for each other, and are idle while one thread chooses what is near.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._wanted = 0
        self._limit: tuple[ThreadPoolExecutor, Future[Any]] | None = None

    def __enter__(self) -> None:
        with self._changing:
            self._wanted += 1
            if self._limit is None:
                # Only the thread that set a limit can lift it, and who came first may have left before others.
                control = ThreadPoolExecutor(1, "embedding-search")
                self._limit = control, control.submit(lambda: _blas().limit(limits=1))
            limit = self._limit[1]
        try:
            limit.result()
        except BaseException:  # Ctrl-C: the limit may be set all the same
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._wanted -= 1
            if not self._wanted and self._limit is not None:
                (control, limit), self._limit = self._limit, None
                control.submit(lambda: limit.result().restore_original_limits())
                control.shutdown()


SINGLE_THREADED = _SingleThreaded()
