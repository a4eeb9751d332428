"""One writer a folder at a time, without a server: claims are files.

A claim is made exclusively where the storage can do that: of several that start together, one has it. It belongs to a
job, not to a process: the workers of a cluster that write parts of one lazy object share it. It ends with the processes
that hold it: one whose processes are dead, or have shown no sign of life for minutes, is passed over, so that a killed
writer can be started again at once.

Whoever was taken for dead and is not (a stopped process, a clock that is wrong) must not put its files among those of
another one. On disks all that a writer does goes through a folder of its own, ``scratch-...``: files are renamed from
there, and what is removed is moved there first. Whoever takes over removes that folder, and with it the power to change
anything. Object stores have no such folders: there, a writer looks at its claim before and after each file, and makes
files of the collection only where there is none of that name.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import psutil

from dask_embedding_reader.errors import DestinationError, EmbeddingReaderError, WriteError
from dask_embedding_reader.storage.put import (
    create_file,
    find_folders,
    find_links,
    get_file,
    has_folder,
    list_files,
    make_folder,
    put_file,
    remove_empty_folder,
    remove_files,
    remove_folder,
)
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import Store, shown_url
from dask_embedding_reader.write.notes import DamagedNoteError, id_of, integer, load, number, text

logger = logging.getLogger("dask_embedding_reader")
T = TypeVar("T")

_CLAIM, _SIGN, _SCRATCH = "writer-", "alive-", "scratch-"
_BEAT_SECONDS = 30.0
_SILENCE_SECONDS = 300.0
"""After so long without a sign of life, a writer on another machine is taken for dead."""

_HANDOVER_SECONDS = 5.0
"""How long a claim outlives the last who holds it, where another process may be about to."""

_ATTEMPTS = 4
"""One that is made in the place of a dead one may meet another one that is: so often."""

_held: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()
"""What this process holds, by job. Other claims that bear its number are of writers that could not take them back when
the storage failed."""

_starting: set[str] = set()
"""The jobs of which this process is just making the claim."""

_holding = threading.Lock()

if hasattr(os, "register_at_fork"):  # a child must not find it held by a thread that it does not have
    os.register_at_fork(before=_holding.acquire, after_in_parent=_holding.release, after_in_child=_holding.release)

_LAST_SECOND = 2**40
"""No clock says more."""


class Claim(NamedTuple):
    """The right of a job to be the only one that writes to a folder. Small and picklable: it travels in every task."""

    store: Store
    """The storage."""
    folder: str
    """The folder of all claims."""
    job: str
    """Whose it is."""
    number: int
    """Its place among those that were made since the first one that is still there."""

    @property
    def path(self) -> str:
        """The file that it is."""
        return f"{self.folder}/{_CLAIM}{self.number:08d}.json"

    @property
    def scratch(self) -> str:
        """The folder that all goes through, on disks."""
        return f"{self.folder}/{_SCRATCH}{self.job}"

    def is_held(self) -> bool:
        """Tell whether no other writer has taken over."""
        content = get_file(self.store, self.path)
        # Who takes over removes the folder first.
        return content is not None and self.job.encode() in content and has_folder(self.store, self.scratch)

    def check(self) -> None:
        """Raise ``DestinationError`` if another writer has taken over."""
        if not self.is_held():
            folder = self.folder.rpartition("/")[0]
            raise DestinationError(
                f"{shown_url(self.store, folder)}: another writer took this one for dead, since its claim was not "
                f"renewed for {_SILENCE_SECONDS / 60:.0f} minutes, and took over; or else somebody removed the claim, "
                f"{shown_url(self.store, self.path)}. What the other writer writes is whole: look whether it is done, "
                "and run this again if it is not, or if there is none"
            )

    def keep(self, work: Callable[[], T]) -> T:
        """Do something that only the holder may: what goes wrong because it is lost says so."""
        self.check()
        try:
            result = work()
        except WriteError:
            lost = False
            with suppress(EmbeddingReaderError):
                lost = not self.is_held()
            if lost:
                self.check()
            raise
        self.check()
        return result

    def put(self, path: str, data: bytes) -> None:
        """Write a small file."""
        self.keep(lambda: put_file(self.store, path, data, self.scratch))

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files."""
        self.keep(lambda: remove_files(self.store, paths, self.scratch))


class Lease:
    """That this process holds a claim, and shows signs of life, until it is given back or nobody has this object.

    Dask has it as the result of a task that all others depend on: it lets go of it when they are done, or have failed.
    Unpickled in another process, it is a lease of that one, of the same claim.
    """

    def __init__(self, claim: Claim, *, is_shared: bool) -> None:
        self.claim = claim
        # Not an event, of which the thread may have the lock when this object goes.
        self._ended: SimpleQueue[bool] = SimpleQueue()
        arguments = (claim, is_shared, self._ended)
        self._thread = threading.Thread(target=_beat, args=arguments, name="embedding-writer-claim", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._ended.put, False).atexit = False

    def give_back(self) -> None:
        """Let others write, whatever processes hold this."""
        with _holding:
            _held.pop(self.claim.job, None)
        self._ended.put(True)
        self._thread.join()

    def __reduce__(self) -> tuple[Any, ...]:
        return _lease_here, (self.claim,)


def _lease_here(claim: Claim) -> Lease:
    with _holding:
        lease = _held.get(claim.job)
        if lease is None:
            lease = _held[claim.job] = Lease(claim, is_shared=True)
        return lease


def new_job() -> str:
    """Return a name for a writer."""
    return uuid.uuid4().hex


@contextmanager
def claimed(store: Store, folder: str) -> Iterator[Claim]:
    """Be the only writer until the end of the block.

    Raises
    ------
    DestinationError
        If another writer is at work; the message says who.
    WriteError
        If nothing can be written there at all.
    """
    lease = take(store, folder, new_job())
    try:
        yield lease.claim
    finally:
        lease.give_back()


def take(store: Store, folder: str, job: str, *, is_shared: bool = False) -> Lease:
    """Claim a folder for a job, alone or beside other processes that work at the same job.

    Raises what :func:`claimed` does.
    """
    if links := find_links(store, folder):
        raise DestinationError(f"{links[0]}: is a link among the notes of writers, and may lead anywhere; remove it")
    with _holding:
        if (lease := _held.get(job)) is not None:
            return lease
        _starting.add(job)
    try:
        claim, dead = _claim(store, folder, job)
        try:
            make_folder(store, claim.scratch)
        except WriteError:
            with suppress(WriteError):
                remove_files(store, [claim.path])
            raise
        with _holding:
            lease = _held[job] = Lease(claim, is_shared=is_shared)
    except BaseException:
        remove_empty_folder(store, folder)
        raise
    finally:
        _starting.discard(job)
    try:
        claim.keep(lambda: _disarm(claim, dead))
    except BaseException:
        lease.give_back()
        raise
    return lease


def is_of_claims(name: str) -> bool:
    """Tell whether a file in the folder of claims belongs to one."""
    return name.startswith((_CLAIM, _SIGN, _SCRATCH))


# ---------------------------------------------------------------------------------------------------------------------
# Claims that are there


class _Sign(NamedTuple):
    """That a process lived."""

    job: str
    """What it was at; empty of earlier releases."""
    host: str
    """Where."""
    machine: str
    """What tells apart where process numbers mean something else."""
    pid: int
    """Its number."""
    process_started: float
    """When it started: numbers are used again."""
    alive_at: float
    """When it lived."""

    @property
    def is_alive(self) -> bool:
        """Tell whether it still does, as far as can be known."""
        if self.machine != _machine():
            return time.time() - self.alive_at < _SILENCE_SECONDS
        if self.pid == os.getpid():
            with _holding:
                return self.job in _held or self.job in _starting
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started) < 1
            return same and bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


class _Found(NamedTuple):
    """A claim that is there."""

    path: str
    """The file that it is."""
    signs: list[_Sign]
    """Of who made it, and of all who were seen to hold it."""
    others: list[str]
    """The files of these."""

    @property
    def job(self) -> str:
        """Whose it is."""
        return self.signs[0].job

    @property
    def number(self) -> int:
        """Its place; zero of earlier releases."""
        digits = self.path.rpartition(_CLAIM)[2].removesuffix(".json")
        return int(digits) if len(digits) == 8 and digits.isdecimal() and digits.isascii() else 0

    @property
    def last(self) -> _Sign:
        """The last sign of life."""
        return max(self.signs, key=lambda sign: sign.alive_at)

    @property
    def is_alive(self) -> bool:
        """Tell whether somebody holds it."""
        return any(sign.is_alive for sign in self.signs)


def _claim(store: Store, folder: str, job: str) -> tuple[Claim, list[_Found]]:
    """Make a claim, or find that of the job; return it, and the dead ones beside it."""
    claim = Claim(store, folder, job, 1)
    for _ in range(_ATTEMPTS):
        is_new = create_file(store, claim.path, _content(job))
        try:
            found = _find_claims(store, folder)
        except EmbeddingReaderError:
            if is_new:  # of a process that goes on, it would keep others off
                with suppress(WriteError):
                    remove_files(store, [claim.path])
            raise
        own = [other for other in found if other.job == job]
        others = [other for other in found if other.job != job]
        living = [other for other in others if other.is_alive]
        if own and not (is_new and living):
            return claim._replace(number=own[0].number), others
        if is_new:  # another one was there before, in the place of a dead one
            remove_files(store, [claim.path])
        if living:
            raise DestinationError(_occupied(store, folder, living[0]))
        claim = claim._replace(number=1 + max((other.number for other in others), default=0))
    raise DestinationError(
        f"{shown_url(store, folder.rpartition('/')[0])}: several writers start and end here all the time; wait "
        "for them, or write to another folder"
    )


def _find_claims(store: Store, folder: str) -> list[_Found]:
    names = sorted(name for name in list_files(store, folder) if name.startswith((_CLAIM, _SIGN)))
    signs: dict[str, _Sign] = {}
    for name in names:
        content = get_file(store, f"{folder}/{name}")
        if content is not None:  # else taken back since the listing
            signs[name] = _read_sign(store, f"{folder}/{name}", content)
    found = []
    for name, sign in signs.items():
        if name.startswith(_CLAIM):
            more = [other for other in signs if sign.job and other.startswith(f"{_SIGN}{sign.job}")]
            found.append(
                _Found(
                    f"{folder}/{name}",
                    [sign, *(signs[other] for other in more)],
                    [f"{folder}/{other}" for other in more],
                )
            )
    return found


def _read_sign(store: Store, path: str, content: bytes) -> _Sign:
    try:
        note = load(content)
        sign = _Sign(
            id_of(note, "job"),
            text(note, "host"),
            text(note, "machine"),
            integer(note, "pid", 1),
            number(note, "process_started"),
            number(note, "alive_at"),
        )
        if sign.pid >= 2**31 or not 0 <= sign.alive_at < _LAST_SECOND:
            raise DamagedNoteError("it tells of no process or no time")
    except DamagedNoteError as error:
        raise DestinationError(
            f"{shown_url(store, path)}: this claim of a writer cannot be read: {error}; run this again, and if "
            "that does not help, remove it once no other writer is at work"
        ) from error
    return sign


def _occupied(store: Store, folder: str, other: _Found) -> str:
    seconds = max(0.0, time.time() - other.last.alive_at)
    return (
        f"{shown_url(store, folder.rpartition('/')[0])}: process {other.last.pid} on {other.last.host} is writing "
        f"to this folder (last sign of life {seconds:.0f} s ago); wait for it, or write to another folder. If it is "
        f"surely dead, remove {shown_url(store, other.path)}"
    )


def _disarm(claim: Claim, dead: Sequence[_Found]) -> None:
    """Take from writers that are taken for dead what they could still do harm with."""
    store, folder = claim.store, claim.folder
    scratches = {f"{folder}/{_SCRATCH}{other.job}" for other in dead if other.job}
    scratches |= set(find_folders(store, folder, _SCRATCH)) - {claim.scratch}
    for scratch in sorted(scratches):
        remove_folder(store, scratch, claim.scratch)
    for other in dead:
        logger.warning(
            "%s: a writer left its claim when it died (process %d); this one takes its place",
            shown_url(store, other.path),
            other.last.pid,
        )
        remove_files(store, [other.path, *other.others], claim.scratch)


# ---------------------------------------------------------------------------------------------------------------------
# Signs of life


def _content(job: str = "") -> bytes:
    process = psutil.Process()
    sign = _Sign(job, socket.gethostname(), _machine(), process.pid, process.create_time(), time.time())
    return json.dumps(sign._asdict()).encode()


def _machine() -> str:
    """Return what tells apart where process numbers mean something else: boots, and containers."""
    told = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has these
        told.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            told.append(file.read().strip())
    return " ".join(told)


def _beat(claim: Claim, is_shared: bool, ended: SimpleQueue[bool]) -> None:
    """Show signs of life until the end is told: True if the job is done, False if it is only this process that ends."""
    sign = f"{claim.folder}/{_SIGN}{claim.job}-{uuid.uuid4().hex}.json"
    pause = 0.0 if is_shared else _BEAT_SECONDS
    signs: list[str] = []
    is_done: bool | None = None
    while is_done is None:
        try:
            is_done = ended.get(timeout=pause)
        except Empty:
            pause = _BEAT_SECONDS
            try:
                if not claim.is_held():
                    is_done = False  # another writer took over
                    continue
                signs = [sign]
                put_file(claim.store, sign, _content(claim.job), claim.scratch)
            except Exception as error:  # noqa: BLE001 - one missed beat does no harm
                logger.warning("%s: cannot be renewed: %s", claim.path, describe(error))
    with suppress(Exception):
        _end(claim, signs, is_done=is_done, is_shared=is_shared)


def _end(claim: Claim, signs: list[str], *, is_done: bool, is_shared: bool) -> None:
    store, folder = claim.store, claim.folder
    if is_shared and not is_done and claim.is_held():
        time.sleep(_HANDOVER_SECONDS)
        remove_files(store, signs, claim.scratch)
        # What is left are signs of other processes, and of this one if it has got hold of the claim again.
        own = [found for found in _find_claims(store, folder) if found.job == claim.job]
        if any(sign.is_alive for found in own for sign in found.signs[1:]):
            return
    elif is_shared and is_done:
        signs = [path for found in _find_claims(store, folder) if found.job == claim.job for path in found.others]
    if claim.is_held():
        try:
            remove_files(store, [*signs, claim.path], claim.scratch)
        except WriteError:  # a full disk may have no room for another name
            if claim.is_held():
                remove_files(store, [*signs, claim.path])
    else:
        remove_files(store, signs)
    if not store.is_object_store:  # these have no temporary files
        remove_folder(store, claim.scratch)  # also one made after another writer had taken over
    remove_empty_folder(store, folder)
