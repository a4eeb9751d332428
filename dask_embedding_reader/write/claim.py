"""One writer a folder at a time, without a server: claims are files.

A writer puts its claim down and then looks for others. Whoever comes second sees the first one's, takes its own back
and says so. A claim ends with its process: one whose process is dead, or that has shown no sign of life for minutes, is
passed over, so that a killed writer can be started again at once.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from dask_embedding_reader.connections import FileSystem
from dask_embedding_reader.errors import DestinationError
from dask_embedding_reader.retries import describe
from dask_embedding_reader.storage import shown_url
from dask_embedding_reader.writing import get_file, list_files, put_file, remove_empty_folder, remove_files

logger = logging.getLogger("dask_embedding_reader")

_PREFIX = "writer-"
_BEAT_SECONDS = 30.0
_SILENCE_SECONDS = 300.0
"""After so long without a sign of life, a writer on another machine is taken for dead."""

_held: set[str] = set()
"""Names of the claims that this process holds. Others that bear its number are of writers that could not take them back
when the storage failed."""

_ATTEMPTS = 4
"""Two that start in the same moment both step back: so often."""


@contextmanager
def claimed(filesystem: FileSystem, folder: str) -> Iterator[Callable[[], None]]:
    """Be the only writer until the end of the block; yields a check that this is still so.

    Raises
    ------
    DestinationError
        If another writer is at work; the message says who.
    WriteError
        If nothing can be written there at all.
    """
    name = f"{_PREFIX}{uuid.uuid4().hex}.json"
    path = f"{folder}/{name}"
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(filesystem, path, ended), name="embedding-writer-claim", daemon=True)

    def check() -> None:
        if get_file(filesystem, path) is None:
            raise DestinationError(
                f"{shown_url(filesystem, folder)}: another writer took this one for dead and took over; nothing is "
                "damaged: look whether it is done, and run this again if not"
            )

    _held.add(name)
    try:
        _claim(filesystem, folder, path)
        thread.start()
        yield check
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        _held.remove(name)
        with suppress(Exception):
            remove_files(filesystem, [path])
            remove_empty_folder(filesystem, folder)


def is_claim(name: str) -> bool:
    """Tell whether a file in the folder of claims is one."""
    return name.startswith(_PREFIX)


def check_unclaimed(filesystem: FileSystem, folder: str) -> None:
    """Raise ``DestinationError`` where a writer is at work."""
    if others := _others(filesystem, folder, ""):
        raise DestinationError(_occupied(filesystem, folder, others[0]))


def _claim(filesystem: FileSystem, folder: str, path: str) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        put_file(filesystem, path, _content())
        others = _others(filesystem, folder, path)
        if not others:
            return
        remove_files(filesystem, [path])
        if attempt == _ATTEMPTS or any(other["waited"] for other in others):
            raise DestinationError(_occupied(filesystem, folder, others[0]))
        time.sleep(random.uniform(0.05, 0.4) * attempt)  # noqa: S311 - who stepped back at the same time must not return so


def _content() -> bytes:
    process = psutil.Process()
    claim = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": process.pid,
        "process_started": process.create_time(),
        "alive_at": time.time(),
    }
    return json.dumps(claim).encode()


def _machine() -> str:
    """Return what tells apart where process numbers mean something else: boots, and containers."""
    told = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has these
        told.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            told.append(file.read().strip())
    return " ".join(told)


def _others(filesystem: FileSystem, folder: str, own: str) -> list[dict[str, Any]]:
    """Return the living claims of others; the dead ones are removed."""
    living = []
    for name in list_files(filesystem, folder):
        path = f"{folder}/{name}"
        if not is_claim(name) or path == own:
            continue
        content = get_file(filesystem, path)
        if content is None:  # taken back since the listing
            continue
        try:
            claim = json.loads(content)
        except ValueError as error:
            raise DestinationError(
                f"{shown_url(filesystem, path)}: this claim of a writer cannot be read ({describe(error)}); run this "
                "again, and if that does not help, remove it once no other writer is at work"
            ) from error
        if _is_alive(claim, name):
            age = time.time() - claim["alive_at"]
            living.append({**claim, "path": path, "waited": age > 1.0})
        else:
            logger.warning("%s: a writer left its claim when it died (process %s)", path, claim["pid"])
            remove_files(filesystem, [path])
    return living


def _is_alive(claim: dict[str, Any], name: str) -> bool:
    if claim["machine"] != _machine():
        return bool(time.time() - claim["alive_at"] < _SILENCE_SECONDS)
    if claim["pid"] == os.getpid():
        return name in _held
    try:
        process = psutil.Process(claim["pid"])
        same = bool(abs(process.create_time() - claim["process_started"]) < 1)
        return same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _occupied(filesystem: FileSystem, folder: str, other: dict[str, Any]) -> str:
    seconds = max(0.0, time.time() - other["alive_at"])
    return (
        f"{shown_url(filesystem, folder.rpartition('/')[0])}: process {other['pid']} on {other['host']} is writing to "
        f"this folder (last sign of life {seconds:.0f} s ago); wait for it, or write to another folder. If it is "
        f"surely dead, remove {shown_url(filesystem, other['path'])}"
    )


def _beat(filesystem: FileSystem, path: str, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        try:
            if get_file(filesystem, path) is None:
                return  # another writer took over: its claim must not meet this one
            put_file(filesystem, path, _content())
        except Exception as error:  # noqa: BLE001 - one missed beat does no harm
            logger.warning("%s: cannot be renewed: %s", path, describe(error))
