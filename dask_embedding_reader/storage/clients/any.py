"""What all file systems of fsspec have, but do not promise, as of fsspec 2024.12 to 2026.9."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync


def made_in(filesystem: AbstractFileSystem) -> int:
    """Return the process that a file system was made in; where it does not tell, it was this one."""
    return int(getattr(filesystem, "_pid", os.getpid()))


def keep_paths(filesystem: AbstractFileSystem, strip: Callable[[str], str]) -> None:
    """Have another function take paths from URLs. Where nobody asks it any more, names are cut as the client does."""
    filesystem._strip_protocol = strip


def walks(filesystem: AbstractFileSystem) -> bool:
    """Tell whether a file system finds files by fsspec's own walk through the folders.

    That one passes over folders that fail to be listed. Where this cannot be told, it is asked all the same.
    """
    if filesystem.async_impl:
        find, of_fsspec = getattr(filesystem, "_find", None), getattr(AsyncFileSystem, "_find", None)
    else:
        find, of_fsspec = filesystem.find, AbstractFileSystem.find
    return of_fsspec is not None and getattr(find, "__func__", None) is of_fsspec


async def info(filesystem: AbstractFileSystem, path: str) -> dict[str, Any]:
    """Ask what a file is, in the event loop of the file system. All asynchronous ones have this."""
    return dict(await filesystem._info(path))


def cat_ranges(
    filesystem: AbstractFileSystem, path: str, starts: Sequence[int], stops: Sequence[int], seconds: float
) -> list[bytes | BaseException]:
    """Read ranges of a file at once, and wait for so long: the public twin of this has no such limit."""
    paths = [path] * len(starts)
    cat = filesystem._cat_ranges
    return list(sync(filesystem.loop, cat, paths, starts, stops, on_error="return", timeout=seconds))


def parent(filesystem: AbstractFileSystem, path: str) -> str:
    """Return the folder of a path, as the file system remembers it."""
    return str(filesystem._parent(path))


def takes_mode(filesystem: AbstractFileSystem) -> bool:
    """Tell whether a client can be told to put no file in the place of another."""
    put = getattr(filesystem, "_pipe_file", filesystem.pipe_file)
    return "mode" in inspect.signature(put).parameters
