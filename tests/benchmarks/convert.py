"""Contenders that convert collections, and what the disk does with as many bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from .contenders import Answer, Job, contends, import_libraries
from .data import DIMENSION, FILES, Data, evict
from .floors import DISK_COPIES, DISK_READS, DISK_WRITES, OURS
from .works import Work

THREADS = 8
BLOCK_NBYTES = 8 * 2**20


def prepare(work: Work, data: Data) -> Path:
    """Bring the disk to rest, with nothing of the source in memory; return an empty place to write to."""
    target = data.root / "converted"
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in data.files(work.data):
        evict(path)
    return target


def several_at_once(task: Callable[[Any], None], items: Iterable[Any]) -> Job:
    """Return a job that does something for each file."""

    def job() -> Answer:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(task, items))
        return {}

    return job


@contends(OURS, "convert-*")
def convert(work: Work, data: Data) -> Job:
    """One call."""
    import_libraries(work)
    package = import_module("dask_embedding_reader")
    import_module("dask_embedding_reader.write")
    target = prepare(work, data)

    def job() -> Answer:
        reader = package.EmbeddingReader(str(data.folder(work.data)), work.source.file_format)
        package.write_embeddings(reader, target, work.name.rpartition("-")[2])
        return {"rows": reader.count}

    return job


@contends(DISK_READS, "convert-*")
def read(work: Work, data: Data) -> Job:
    """Read the files, several at a time."""
    prepare(work, data)

    def read_file(path: Path) -> None:
        block = bytearray(BLOCK_NBYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass

    return several_at_once(read_file, data.files(work.data))


@contends(DISK_WRITES, "convert-*")
def write(work: Work, data: Data) -> Job:
    """Write as many bytes, several files at a time, and wait until the disk has them."""
    target = prepare(work, data)
    target.mkdir()
    block = os.urandom(BLOCK_NBYTES)

    def write_file(number: int) -> None:
        rest = data.rows * DIMENSION * 4
        with (target / str(number)).open("wb", buffering=0) as file:
            while rest:
                rest -= file.write(block[:rest])
            os.fsync(file.fileno())

    return several_at_once(write_file, range(FILES))


@contends(DISK_COPIES, "convert-*")
def copy(work: Work, data: Data) -> Job:
    """Copy the files as they are: a disk shares its speed between what is read and what is written."""
    target = prepare(work, data)
    target.mkdir()

    def copy_file(path: Path) -> None:
        block = memoryview(bytearray(BLOCK_NBYTES))
        with path.open("rb", buffering=0) as source, (target / path.name).open("wb", buffering=0) as file:
            while count := source.readinto(block):
                file.write(block[:count])
            os.fsync(file.fileno())

    return several_at_once(copy_file, data.files(work.data))
