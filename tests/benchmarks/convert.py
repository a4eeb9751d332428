"""Contenders that convert collections, and what the disk does with as many bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import Answer, Job, contends, import_libraries
from .data import CONVERTED_FILES, DIMENSION, Data, evict
from .floors import DISK_AT_ONCE, DISK_READS, DISK_WRITES, OURS
from .works import Work

THREADS = 6
BLOCK_NBYTES = 8 * 2**20

RWF_DONTCACHE = 0x80
"""A flag of Linux 6.14: nothing of what is written stays in memory, where new pages can cost more than the disk."""


def prepare(work: Work, data: Data) -> Path:
    """Bring the disk to rest, with nothing of the source in memory; return an empty place to write to."""
    target = data.root / "converted"
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in data.files(work.data):
        evict(path)
    return target


def wanted(work: Work) -> dict[str, Any]:
    """Return what is written: the source in another format, or in the same one as another dtype."""
    to = work.name.rpartition("-")[2]
    if to in ("npy", "parquet"):
        return {"file_format": to}
    return {"file_format": work.source.file_format, "dtype": to, "scale": 0.05 if to == "int8" else None}


def read_file(path: Path) -> None:
    """Read a file, and do nothing with it."""
    block = bytearray(BLOCK_NBYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def write_file(path: Path, nbytes: int) -> None:
    """Write a file of any bytes, and wait until the disk has it."""
    block = memoryview(os.urandom(BLOCK_NBYTES))
    written = 0
    with path.open("wb", buffering=0) as file:
        while written < nbytes:
            written += write_block(file.fileno(), block[: nbytes - written], written)
        os.fsync(file.fileno())


def write_block(descriptor: int, block: memoryview, position: int) -> int:
    """Write at a position, so that the disk begins at once; return how much was written."""
    with suppress(OSError):
        return os.pwritev(descriptor, [block], position, RWF_DONTCACHE)
    written = os.pwrite(descriptor, block, position)
    os.posix_fadvise(descriptor, position, written, os.POSIX_FADV_DONTNEED)
    return written


def at_once(*tasks: Sequence[Callable[[], None]]) -> Job:
    """Return a job that does all of these, several of each list at once."""

    def job() -> Answer:
        with ExitStack() as pools:
            done = [pools.enter_context(ThreadPoolExecutor(THREADS)).map(lambda task: task(), some) for some in tasks]
            for results in done:
                list(results)
        return {}

    return job


def reads(work: Work, data: Data) -> list[Callable[[], None]]:
    """Tasks that read the source."""
    return [partial(read_file, path) for path in data.files(work.data)]


def writes(work: Work, data: Data, target: Path) -> list[Callable[[], None]]:
    """Tasks that write as many bytes as are written."""
    target.mkdir()
    itemsize = np.dtype(wanted(work).get("dtype", "float32")).itemsize
    return [
        partial(write_file, target / str(number), data.rows * DIMENSION * itemsize) for number in range(CONVERTED_FILES)
    ]


@contends(OURS, "convert-*")
def convert(work: Work, data: Data) -> Job:
    """One call."""
    import_libraries(work)
    package = import_module("dask_embedding_reader")
    import_module("dask_embedding_reader.write.embeddings")
    target = prepare(work, data)

    def job() -> Answer:
        reader = package.EmbeddingReader(str(data.folder(work.data)), work.source.file_format)
        package.write_embeddings(reader, target, **wanted(work))
        return {"rows": reader.count}

    return job


@contends(DISK_READS, "convert-*")
def read(work: Work, data: Data) -> Job:
    """Read the files."""
    prepare(work, data)
    return at_once(reads(work, data))


@contends(DISK_WRITES, "convert-*")
def write(work: Work, data: Data) -> Job:
    """Write as many bytes."""
    return at_once(writes(work, data, prepare(work, data)))


@contends(DISK_AT_ONCE, "convert-*")
def read_and_write(work: Work, data: Data) -> Job:
    """Do both, neither waiting for the other: what a disk shares between them, no conversion has twice."""
    target = prepare(work, data)
    return at_once(reads(work, data), writes(work, data, target))
