"""Connections to storages: such as work in this process and this thread, and never hang.

fsspec's file systems are values that carry connections. Not all of them may be used by several threads, few survive a
fork, and some wait for an answer for ever. Whoever asks a storage for something asks :func:`connected` first.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from http.cookies import SimpleCookie
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urljoin, urlsplit

import fsspec
import fsspec.asyn

from dask_embedding_reader._common.threads import is_stopped, may_stop
from dask_embedding_reader.errors import ReadError
from dask_embedding_reader.storage.clients import any as any_client
from dask_embedding_reader.storage.clients import ftp
from dask_embedding_reader.storage.retries import STALL_SECONDS, EndlessAnswerError

FileSystem: TypeAlias = fsspec.AbstractFileSystem
T = TypeVar("T")

_LOOK_SECONDS = 0.2
"""How often a thread that waits for an answer looks whether it still needs it."""

_END_SECONDS = 0.5
"""How long those are waited for that have been told to end; they look whenever bytes arrive."""

_IDLE_SECONDS = 1.0
"""How long a thread waits for another question before it ends."""

POOL_CONNECTIONS = 64
"""What one process may have open to S3; botocore's own default of 10 would be the limit of every read."""

_ONE_AT_A_TIME = frozenset(
    {"ftp", "sftp", "ssh", "smb", "tar", "libarchive", "git"}
    | {"simplecache", "filecache", "blockcache", "cached", "dir"}
)
"""Protocols whose file systems several threads must not use at once: one connection, one position in a file, or files
of a cache that are there before they are complete."""

_STATEFUL = frozenset({"ftp", "sftp", "ssh"})
"""Protocols whose connection is of no use any more once a request has failed."""

_HDFS = frozenset({"hdfs", "webhdfs", "viewfs"})

_WEB = "fsspec.implementations.http.HTTPFileSystem"

MOST_INTERIM = 20
"""So many answers of a web server may only say that the answer is still to come."""

_OPEN_HEADERS = frozenset({"accept", "accept-encoding", "accept-language", "range", "user-agent"})
"""Headers that tell nothing of who asks. All others are for the server that was asked, and for no other."""

CACHES = frozenset({"simplecache", "filecache", "blockcache", "cached"})
"""Protocols whose file systems keep the bytes of files, some of them for ever."""


@dataclass(slots=True)
class _Link:
    """What this process uses for a file system."""

    pid: int
    other: FileSystem | None
    """The one to ask; None for itself, to which nothing may refer that it keeps alive."""
    lock: AbstractContextManager[Any]
    sites: dict[str, Any]
    """See ``direct``."""


_linking = threading.Lock()

_links: dict[int, tuple[weakref.ref[FileSystem], _Link]] = {}
"""By the identity of file systems: those that are equal may have different connections. They belong to the user's
program, so nothing is put into them."""


def connected(filesystem: FileSystem) -> FileSystem:
    """Return the file system to ask: itself, or one like it with connections of its own."""
    other = _link(filesystem).other
    return filesystem if other is None else other


def exclusive(filesystem: FileSystem) -> AbstractContextManager[Any]:
    """Return a lock to hold while a file system is asked; it does nothing where several threads may ask at once."""
    return _link(filesystem).lock


@contextmanager
def asking(filesystem: FileSystem) -> Iterator[FileSystem]:
    """Give the file system to ask to a block, alone where several cannot ask at once.

    After a failure a new connection is opened, where the old one is of no use. What is not there is
    ``FileNotFoundError``, whatever the client says.
    """
    with exclusive(filesystem):
        try:
            yield connected(filesystem)
        except Exception as error:
            is_told = isinstance(error, FileNotFoundError)
            if not is_told and protocols(filesystem) & _STATEFUL:
                _link(filesystem).other = _prepared(filesystem, anew=True)
            if ftp.is_missing(error.__cause__ if is_told else error):
                raise FileNotFoundError(str(error)) from None
            raise


def sites(filesystem: FileSystem) -> dict[str, Any]:
    """Return where ``direct`` keeps what it knows of the servers of a file system, as long as that lives."""
    return _link(filesystem).sites


def run(loop: asyncio.AbstractEventLoop, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Wait for a coroutine in the event loop of a client; cancel it when nobody waits for what this thread does."""
    if not may_stop():
        result: T = fsspec.asyn.sync(loop, function)
        return result
    future = asyncio.run_coroutine_threadsafe(function(), loop)
    while not wait([future], _LOOK_SECONDS).done:
        if is_stopped():
            future.cancel()
            raise given_up()
    return future.result()


def run_apart(calls: Sequence[Callable[[Asked], T]]) -> list[T | BaseException]:
    """Wait for functions that wait for answers, each in a thread of its own; return what they return or raise.

    When nobody waits for what this thread does, they are told to end. One that waits for a connection or an address
    cannot, and is left to itself until it gives up.
    """
    if len(calls) == 1 and not may_stop():
        try:
            return [calls[0](Asked())]
        except Exception as error:  # noqa: BLE001 - the caller decides
            return [error]
    asked, answers = Asked(), SimpleQueue[tuple[int, Any]]()
    results: dict[int, Any] = {}
    for number, call in enumerate(calls):
        _hand_over(partial(_answer, call, asked, number, answers))
    try:
        while len(results) < len(calls):
            with suppress(Empty):
                results.update([answers.get(timeout=_LOOK_SECONDS)])
            if is_stopped():
                raise given_up()
    finally:
        asked.give_up()
        # One that is about to return to Python while that ends would end the program with an error.
        with suppress(Empty):
            while len(results) < len(calls):
                results.update([answers.get(timeout=_END_SECONDS)])
    return [results[number] for number in range(len(calls))]


def given_up() -> ReadError:
    """Return the error of a thread whose answer nobody waits for: nobody sees it."""
    return ReadError("nobody waits for the answer any more")


class Asked:
    """A question to a storage."""

    __slots__ = ("_sockets", "given_up")

    def __init__(self) -> None:
        self.given_up = False
        """Whether nobody waits for the answer any more."""
        self._sockets: set[socket.socket] = set()

    @contextmanager
    def wakes(self, waiting: socket.socket) -> Iterator[None]:
        """End what waits for a socket in this block when the question is given up."""
        self._sockets.add(waiting)
        try:
            self.check()
            yield
        finally:
            self._sockets.discard(waiting)

    def check(self) -> None:
        """Raise an error if the question has been given up."""
        if self.given_up:
            raise given_up()

    def give_up(self) -> None:
        """Wait no longer."""
        self.given_up = True
        for waiting in list(self._sockets):
            with suppress(OSError):
                socket.socket.shutdown(waiting, socket.SHUT_RDWR)  # beneath TLS


def _answer(call: Callable[[Asked], Any], asked: Asked, number: int, answers: SimpleQueue[tuple[int, Any]]) -> None:
    try:
        answers.put((number, call(asked)))
    except BaseException as error:  # noqa: BLE001 - the caller decides
        answers.put((number, error))


class _Threads:
    """Threads that wait for something to do, and end when nothing comes; to start one costs as much as a request."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.idle = threading.Semaphore(0)


_threads = _Threads()


def _hand_over(task: Callable[[], None]) -> None:
    threads = _threads
    if not threads.idle.acquire(blocking=False):
        # A daemon: no program waits for it when it ends.
        threading.Thread(target=_work, args=(threads,), name="asking-storage", daemon=True).start()
    threads.tasks.put(task)


def _work(threads: _Threads) -> None:
    while True:
        try:
            task = threads.tasks.get(timeout=_IDLE_SECONDS)
        except Empty:
            if threads.idle.acquire(blocking=False):
                return
            continue  # a task is on its way to this thread
        task()
        del task  # while it waits, it must not keep memory alive
        threads.idle.release()


def protocols(filesystem: FileSystem) -> frozenset[str]:
    """Return the names of the protocols that a file system speaks."""

    def names(protocol: str | tuple[str, ...]) -> frozenset[str]:
        return frozenset((protocol,) if isinstance(protocol, str) else protocol)

    # Caches of fsspec 2024.12 tell, when asked, what lies behind them speaks.
    return names(type(filesystem).protocol) & CACHES or names(filesystem.protocol)


def class_name(filesystem: FileSystem) -> str:
    """Return the full name of the class of a file system: told by it, none has to be installed."""
    return f"{type(filesystem).__module__}.{type(filesystem).__qualname__}"


def _link(filesystem: FileSystem) -> _Link:
    link, pid = _found_link(filesystem), os.getpid()
    if link is None or link.pid != pid:
        with _linking:
            link = _found_link(filesystem)
            if link is None or link.pid != pid:
                made_in = link.pid if link is not None else any_client.made_in(filesystem)
                # A file system that came through a fork shares sockets, file positions and a dead thread with its twin.
                other = _prepared(filesystem, anew=made_in != pid)
                link = _Link(pid, other, nullcontext() if may_ask_at_once(filesystem) else threading.RLock(), {})
                _links[id(filesystem)] = weakref.ref(filesystem, partial(_forget, id(filesystem))), link
    return link


def _found_link(filesystem: FileSystem) -> _Link | None:
    found = _links.get(id(filesystem))
    return found[1] if found is not None and found[0]() is filesystem else None


def _forget(number: int, gone: weakref.ref[FileSystem]) -> None:
    if (found := _links.get(number)) is not None and found[0] is gone:
        del _links[number]


def _renewed(filesystem: FileSystem, **changes: Any) -> FileSystem:
    options = {**filesystem.storage_options, **changes, "skip_instance_cache": True}
    return type(filesystem)(*filesystem.storage_args, **options)


def _prepared(filesystem: FileSystem, *, anew: bool) -> FileSystem | None:
    """Return a file system with what reading needs: connections enough, an end to all waiting, no retries beside ours.

    None for the very same, unless it has to be made ``anew``: what others use too is not changed.
    """
    names = protocols(filesystem)
    if "s3" in names and hasattr(filesystem, "config_kwargs"):
        # botocore's retries, and again s3fs's around them, would multiply with ours, unseen. Listing keeps them: a
        # listing of a thousand requests cannot start again for each that fails.
        ours = {"max_pool_connections": POOL_CONNECTIONS, "retries": {"total_max_attempts": 1}}
        own = _renewed(filesystem, config_kwargs={**ours, **filesystem.config_kwargs})
        own.retries = 1
    elif names & {"sftp", "ssh"} and hasattr(filesystem, "ftp"):
        own = _renewed(filesystem)
        own.ftp.get_channel().settimeout(STALL_SECONDS)
    elif names & _HDFS:
        own = _renewed(filesystem)
        any_client.keep_paths(own, path_within)
        if hasattr(own, "session"):
            own.session.request = partial(own.session.request, timeout=STALL_SECONDS)
    elif class_name(filesystem) == _WEB and getattr(filesystem.get_client, "__module__", "") == filesystem.__module__:
        own = _renewed(filesystem)
        own.get_client = careful_client
        own.client_kwargs, own.kwargs = _in_headers(own.client_kwargs), _in_headers(own.kwargs)
    else:
        return _renewed(filesystem) if anew else None
    return own


def _in_headers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of aiohttp with the credentials and cookies among the headers, where one can see to them.

    aiohttp gives those of a session, and earlier releases all cookies, to every server that it is sent on to.
    """
    left, headers = dict(options), dict(options.get("headers") or {})
    names = {str(name).lower() for name in headers}
    if isinstance(auth := left.get("auth"), tuple) and hasattr(auth, "encode") and "authorization" not in names:
        headers["Authorization"] = auth.encode()
        del left["auth"]
    if left.get("cookies") and "cookie" not in names:
        cookies = SimpleCookie(dict(left.pop("cookies")))
        headers["Cookie"] = "; ".join(f"{name}={cookie.coded_value}" for name, cookie in cookies.items())
    return {**left, "headers": headers} if len(left) < len(options) else left


async def careful_client(**options: Any) -> Any:
    """Make a client for web servers as fsspec does, but one whose headers stay with the server that they are for.

    And it does not wait for ever for a server that says "100 Continue" again and again.
    """
    import aiohttp  # noqa: PLC0415 - who reads local files need not wait for it
    from fsspec.implementations.http import get_client  # noqa: PLC0415 - it needs aiohttp

    class Answer(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> aiohttp.ClientResponse:
            protocol, heads = connection.protocol, iter(range(MOST_INTERIM + 1))

            async def read(read: Callable[[], Coroutine[Any, Any, Any]] = protocol.read) -> Any:
                if next(heads, None) is None:
                    raise EndlessAnswerError
                return await read()

            protocol.read = read
            try:
                return await super().start(connection)
            finally:
                del protocol.read

    async def leave_headers(_session: Any, _context: Any, redirect: Any) -> None:
        here, said = str(redirect.url), redirect.response.headers
        there = urljoin(here, said.get("Location") or said.get("URI") or "")  # as aiohttp looks for it
        kept = headers_for(there, here, redirect.headers)
        for name in [name for name in redirect.headers if name not in kept]:
            redirect.headers.popall(name, None)

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(leave_headers)
    traces = [*(options.get("trace_configs") or ()), trace]
    return await get_client(**{"response_class": Answer, **options, "trace_configs": traces})


def headers_for(url: str, asked: str, headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return those headers, meant for the server that was asked, that may go to an address that it points to.

    All of them if that is on the same server, or is the same one asked by TLS.
    """
    there, here = urlsplit(url), urlsplit(asked)
    servers = [(split.scheme, split.port or {"http": 80, "https": 443}.get(split.scheme)) for split in (here, there)]
    if here.hostname == there.hostname and (servers[0] == servers[1] or servers == [("http", 80), ("https", 443)]):
        return headers
    return {name: value for name, value in headers.items() if name.lower() in _OPEN_HEADERS}


def may_ask_at_once(filesystem: FileSystem) -> bool:
    """Tell whether several threads, or tasks of an event loop, may use a file system at once."""
    return protocols(filesystem).isdisjoint(_ONE_AT_A_TIME)


def cuts_paths(filesystem: FileSystem) -> bool:
    """Tell whether a client takes a part of a path for the query or the fragment of a URL, which HDFS does not have."""
    return not protocols(filesystem).isdisjoint(_HDFS)


def remembers_files(filesystem: FileSystem) -> bool:
    """Tell whether a file system may go on giving the bytes that a file had when it was first read."""
    return not protocols(filesystem).isdisjoint(CACHES)


def path_within(url: str) -> str:
    """Return the path of a URL, whatever characters it holds; a path is returned as it is."""
    return re.sub(r"^\w+://[^/]*", "", url) or "/"


def _start_afresh() -> None:
    """Forget locks that a thread of the parent may hold, and fsspec's thread, which no fork copies."""
    global _linking, _threads
    _linking, _threads = threading.Lock(), _Threads()
    fsspec.asyn.reset_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
