"""``fragile://``: the bucket of ``stores`` with writing, in which any one call can be made to go wrong.

``calls_of(work)`` runs something and counts what it asks of the storage; ``broken_at(number, fault)`` makes one of
these calls go wrong in the ways of ``FAULTS``. ``fragile://`` renames files, as servers do that know folders;
``fragile-store://`` replaces objects at once, as object stores do.
"""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec

from tests.support.stores import BUCKET, BucketFileSystem


class Call(NamedTuple):
    """One call of a method."""

    number: int
    method: str
    path: str
    run: Callable[[], Any]


class ClientError(Exception):
    """What clients raise that derive their exceptions from none of Python's."""


Fault = Callable[[Call], Any]

_fault: Callable[[Call], Any] | None = None
_calls: list[tuple[str, str]] = []
_lock = threading.Lock()
_inside = threading.local()


def _fragile(method: Callable[..., Any]) -> Callable[..., Any]:
    """Count calls from outside, and let the fault have them."""

    @functools.wraps(method)
    def call(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "busy", False):
            return method(self, path, *args, **kwargs)
        with _lock:
            _calls.append((method.__name__, path))
            number = len(_calls)
        _inside.busy = True
        try:
            run = functools.partial(method, self, path, *args, **kwargs)
            return run() if _fault is None else _fault(Call(number, method.__name__, path, run))
        finally:
            _inside.busy = False

    return call


class FragileFileSystem(BucketFileSystem):
    """The bucket, with files that can be written, renamed and removed."""

    protocol: Any = "fragile"

    def pipe_file(self, path: str, value: Any, **kwargs: Any) -> None:
        """Store an object."""
        BUCKET.put(self._strip_protocol(path), bytes(value))

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        if BUCKET.objects.pop(self._strip_protocol(path), None) is None:
            raise FileNotFoundError(path)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy an object."""
        BUCKET.put(self._strip_protocol(path2), BUCKET.read(self._strip_protocol(path1), None, None))

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Rename an object, as long as there is none of the new name."""
        if self.exists(path2):
            raise FileExistsError(path2)
        self.cp_file(path1, path2)
        self.rm_file(path1)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are there as soon as something is in them."""

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove a folder."""
        for name in self.find(path):
            self.rm_file(name)


for _name in ("ls", "find", "glob", "info", "exists", "cat_file", "pipe_file", "rm_file", "cp_file", "mv", "rm"):
    setattr(FragileFileSystem, _name, _fragile(getattr(FragileFileSystem, _name)))


class FragileStore(FragileFileSystem):
    """The same as an object store, which replaces an object at once."""

    protocol = ("fragile-store", "memory")


fsspec.register_implementation("fragile", FragileFileSystem, clobber=True)
fsspec.register_implementation("fragile-store", FragileStore, clobber=True)


def calls_of(work: Callable[[], Any]) -> list[tuple[str, str]]:
    """Run something; return the method and path of each call that it makes."""
    _calls.clear()
    work()
    return list(_calls)


@contextmanager
def broken_at(number: int, fault: Fault, for_good: bool = False) -> Iterator[None]:
    """Let the call of this number, and all later ones if wanted, go wrong within the block."""
    global _fault
    _calls.clear()
    _fault = lambda call: fault(call) if call.number == number or (for_good and call.number > number) else call.run()  # noqa: E731
    try:
        yield
    finally:
        _fault = None


# --------------------------------------------------------------------------------------------------------------------
# Faults


def _raise(error: Callable[[str], BaseException]) -> Fault:
    def fail(call: Call) -> Any:
        raise error(call.path)

    return fail


def _lost_answer(call: Call) -> Any:
    """What was asked for is done, but nobody hears of it."""
    call.run()
    raise ConnectionResetError(errno.ECONNRESET, "reset by peer", call.path)


def _gone(call: Call) -> Any:
    if call.method == "rm_file":
        call.run()
    raise FileNotFoundError(call.path)


def _short(call: Call) -> Any:
    """Half of what was asked for."""
    answer = call.run()
    return answer[: len(answer) // 2] if isinstance(answer, bytes) else answer


def _late(call: Call) -> Any:
    threading.Event().wait(0.02)
    return call.run()


FAULTS: dict[str, Fault] = {
    "error": _raise(lambda path: OSError(errno.EIO, "input/output error", path)),
    "error of a client": _raise(ClientError),
    "refused": _raise(lambda path: PermissionError(errno.EACCES, "permission denied", path)),
    "gone": _gone,
    "lost answer": _lost_answer,
    "short": _short,
    "late": _late,
}


def changing(path: str, content: bytes) -> Fault:
    """Another file appears in the place of one, before a call."""

    def change(call: Call) -> Any:
        BUCKET.put(path, content)
        return call.run()

    return change
