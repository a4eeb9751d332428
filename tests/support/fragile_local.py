"""Local files of which any one call of the operating system can be made to go wrong, as ``fragile`` does for storages.

``local_calls(folder)`` lets all calls of ``os`` that look at files below a folder, or at what was opened there, pass
through here, where they are counted and a fault may have them.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fragile import Call, Fault
from tests.support.scattered import watch_scattered

_METHODS = ("open", "preadv", "stat", "scandir")


class Calls:
    """What is asked of the operating system about one folder."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[tuple[str, str]] = []
        self._folder = str(folder)
        self._fault: Fault | None = None
        self._opened: dict[int, str] = {}
        self._lock = threading.Lock()

    def of(self, work: Callable[[], Any]) -> list[tuple[str, str]]:
        """Run something; return the function and path of each call that it makes."""
        self.seen.clear()
        work()
        return list(self.seen)

    @contextmanager
    def broken_at(self, number: int, fault: Fault, for_good: bool = False) -> Iterator[None]:
        """Let the call of this number, and all later ones if wanted, go wrong within the block."""
        self.seen.clear()
        self._fault = lambda call: (
            fault(call) if call.number == number or (for_good and call.number > number) else call.run()
        )
        try:
            yield
        finally:
            self._fault = None

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of ``os`` that passes through here where it is about the folder."""

        @functools.wraps(function)
        def call(target: Any = ".", *args: Any, **kwargs: Any) -> Any:
            path = self._opened.get(target, "") if isinstance(target, int) else os.fsdecode(target)
            if not path.startswith(self._folder):
                return function(target, *args, **kwargs)
            with self._lock:
                self.seen.append((function.__name__, path))
                number = len(self.seen)
            run = functools.partial(function, target, *args, **kwargs)
            answer = run() if self._fault is None else self._fault(Call(number, function.__name__, path, run))
            if function.__name__ == "open":
                self._opened[answer] = path
            return answer

        return call


@contextmanager
def local_calls(folder: Path) -> Iterator[Calls]:
    """Count the calls about files below a folder within the block, and let faults have them."""
    calls = Calls(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in _METHODS:
            patch.setattr(os, name, calls.watched(getattr(os, name)))
        watch_scattered(patch)
        yield calls


# --------------------------------------------------------------------------------------------------------------------
# Faults


def _raise(number: int) -> Fault:
    def fail(call: Call) -> Any:
        raise OSError(number, os.strerror(number), call.path)

    return fail


def _short(call: Call) -> Any:
    """Half of what was asked for, as the operating system may at any time."""
    if call.method != "preadv":
        return call.run()
    descriptor, buffers, start = call.run.args  # type: ignore[attr-defined] # a partial
    half = buffers[0][: max(1, buffers[0].nbytes // 2)]
    return call.run.func(descriptor, [half], start)  # type: ignore[attr-defined]


def _cut(call: Call) -> Any:
    """Nothing more comes: the file ends."""
    return 0 if call.method == "preadv" else call.run()


FAULTS: dict[str, Fault] = {
    "error": _raise(errno.EIO),
    "refused": _raise(errno.EACCES),
    "stale": _raise(errno.ESTALE),
    "gone": _raise(errno.ENOENT),
    "short": _short,
    "cut": _cut,
}


def replacing(path: Path, content: bytes) -> Fault:
    """Another file appears in the place of one, before a call."""

    def change(call: Call) -> Any:
        other = path.with_name("other.tmp")
        other.write_bytes(content)
        other.replace(path)
        return call.run()

    return change
