"""Exact byte ranges of files, wherever these are.

Every read notices when a file is no longer the one that was found, and when not exactly the bytes came that were asked
for; it is tried again where that can help.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import EmbeddingReaderError, FileChangedError, ReadError
from dask_embedding_reader.storage.connections import remembers_files
from dask_embedding_reader.storage.local import kept_open, open_local, read_open
from dask_embedding_reader.storage.retries import explain, http_status, shown_cause, with_retries
from dask_embedding_reader.storage.scatter import Int64s, read_scattered
from dask_embedding_reader.storage.store import (
    Answer,
    ObjectInfo,
    ShortAnswerError,
    Span,
    StoredFile,
    is_same,
    local_info,
)


def read_range(file: StoredFile, start: int, stop: int) -> bytes:
    """Read the bytes ``[start, stop)`` of a file that has just been found: one request, and no other.

    Raises
    ------
    FileChangedError
        If the file has gone; if it changed, where that shows without another request.
    ReadError
        If the storage does not deliver exactly these bytes, however often it is asked.
    """
    buffer = bytearray(stop - start)
    _read(file, [(start, [memoryview(buffer)])])
    return bytes(buffer)


def read_ranges(file: StoredFile, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read several byte ranges ``[start, stop)`` of one file, all at once where the storage can.

    Raises
    ------
    FileChangedError, ReadError
        As :func:`read_into` does.
    """
    buffers = [bytearray(stop - start) for start, stop in ranges]
    read_joined_into(file, [(start, memoryview(buffer)) for (start, _), buffer in zip(ranges, buffers, strict=True)])
    return [bytes(buffer) for buffer in buffers]


def read_joined_into(file: StoredFile, ranges: Sequence[tuple[int, memoryview]]) -> None:
    """Fill memory with the bytes from some positions on; those that touch are one request."""
    joined: list[tuple[int, list[memoryview]]] = []
    reached = -1
    for start, buffer in ranges:
        if start != reached:
            joined.append((start, []))
        joined[-1][1].append(buffer)
        reached = start + buffer.nbytes
    read_each_into(file, joined)


def read_into(file: StoredFile, start: int, buffers: Sequence[memoryview]) -> None:
    """Read consecutive bytes of a file, from one on, into writable buffers of bytes, filling one after the other.

    Raises
    ------
    FileChangedError
        If the file is not the one that was found any more.
    ReadError
        If the storage does not deliver exactly these bytes, however often it is asked.
    """
    read_each_into(file, [(start, buffers)])


def read_each_into(file: StoredFile, ranges: Sequence[Span]) -> None:
    """Read several byte ranges of one file as :func:`read_into` reads one: the file is compared once.

    Remote ranges are asked for all at once.
    """
    if not _read(file, ranges):
        # The answers did not tell their version: old and new pieces might be mixed.
        _check(file)


def reading_often(file: StoredFile) -> AbstractContextManager[None]:
    """Have this thread open a file once for all that it reads of it within; there is nothing to open elsewhere.

    Still each read tells of the version.
    """
    return kept_open(file.path) if file.store.is_local else nullcontext()


def read_blocks_into(file: StoredFile, start: int, blocks: Iterable[memoryview]) -> Iterator[memoryview]:
    """Fill memory with consecutive bytes of a file, from one on: block by block, each given out as soon as it is full.

    A local file is opened once: to open it for each block takes a third as long as to read 256 KB of it.

    Raises
    ------
    FileChangedError, ReadError
        As :func:`read_into` does.
    """
    with ExitStack() as stack:
        descriptor = None
        if file.store.is_local:
            with suppress(OSError):
                descriptor = open_local(file.path)
                stack.callback(os.close, descriptor)
        for block in blocks:
            # Whatever is wrong, the plain way to read tells.
            if descriptor is None or not _fill_block(file, descriptor, start, block):
                read_into(file, start, [block])
            yield block
            start += block.nbytes


def _fill_block(file: StoredFile, descriptor: int, start: int, block: memoryview) -> bool:
    """Fill memory with bytes of an open file; tell whether that is done, and it is the one that was found."""
    try:
        done = read_open(descriptor, start, [block]) == block.nbytes
        return done and is_same(file.version, local_info(file.path, os.fstat(descriptor))) is True
    except OSError:
        return False


def try_read_in_turn(
    file: StoredFile, start: int, kept: memoryview, kept_nbytes: Int64s, others: memoryview | None, other_nbytes: Int64s
) -> bool:
    """Read runs of bytes of a local file, from ``start`` on: the first, third and so on to one place, the others apart.

    Parameters
    ----------
    file
        The file.
    start
        The first byte.
    kept, others
        Writable memory, each filled without gaps; None where the other runs are passed over.
    kept_nbytes, other_nbytes
        The bytes of each run; of the others there are as many, or one less.

    Returns
    -------
    bool
        Whether that is done: if not, :func:`read_into` may do it, or tells why it cannot be done.
    """
    fit = kept_nbytes.sum() == kept.nbytes and (others is None or other_nbytes.sum() == others.nbytes)
    both = np.zeros((len(kept_nbytes), 2), np.int64)
    both[:, 0], both[: len(other_nbytes), 1] = kept_nbytes, other_nbytes
    if not fit or (both < 0).any():
        raise ValueError("runs of bytes that do not fill the memory exactly")
    if not len(both):
        return True
    if not file.store.is_local:
        return False
    places = np.empty_like(both)
    places[:, 0] = _address(kept) + np.cumsum(both[:, 0]) - both[:, 0]
    if others is None:
        passed = np.empty(int(both[:, 1].max()), np.uint8)
        places[:, 1] = passed.ctypes.data
    else:
        places[:, 1] = _address(others) + np.cumsum(both[:, 1]) - both[:, 1]
    try:
        info = read_scattered(file.path, start, places.reshape(-1), both.reshape(-1))
    except OSError:
        return False
    return info is not None and is_same(file.version, info) is True


def _address(memory: memoryview) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def local_input(file: StoredFile) -> pa.NativeFile | None:
    """Open a local file for pyarrow, which reads it without Python's lock; None of one that is elsewhere."""
    if not file.store.is_local:
        return None
    check_local(file)  # pyarrow would wait for the other end of a pipe
    try:
        return pa.OSFile(os.fsencode(file.path))  # a name need not be UTF-8
    except FileNotFoundError as error:
        raise _gone(file) from error
    except OSError as error:
        raise ReadError(f"{file.path}: cannot be read: {error}") from error


def check_local(file: StoredFile) -> None:
    """Compare a local file with what was found; nothing to do for others, which are checked whenever they are read.

    Raises
    ------
    FileChangedError
        If its version differs, or it has gone.
    ReadError
        If the operating system cannot tell.
    """
    if file.store.is_local:
        _check(file)


def _check(file: StoredFile) -> None:
    """Ask the storage whether the file is still the one that was found."""
    try:
        info = file.store.look_up(file.path)
    except FileNotFoundError as error:
        raise _gone(file) from shown_cause(error)
    except EmbeddingReaderError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(f"{file.url}: looking it up failed: {explain(error)}") from shown_cause(error)
    same = is_same(file.version, info)
    if same is None and info.version == file.version:
        raise _untold(file)
    if not same:
        raise _changed(file, info)


def _read(file: StoredFile, ranges: Sequence[Span]) -> bool:
    """Read byte ranges, all of them at once; those that fail are read again one after the other.

    Returns
    -------
    bool
        Whether the answers proved that the bytes are of the version that was found.
    """
    try:
        answers = file.store.read(file.path, ranges)
    except FileNotFoundError as error:
        raise _gone(file) from shown_cause(error)
    except EmbeddingReaderError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(f"{file.url}: cannot be read: {explain(error)}") from shown_cause(error)
    proved: Answer = None
    proofs = []
    for span, answer in zip(ranges, answers, strict=True):
        if answer is not proved or answer is None:  # of a local file all are the same
            proofs.append(_finish(file, span, answer))
            proved = answer if proofs[-1] else None
    return all(proofs)


def _finish(file: StoredFile, span: Span, answer: Answer) -> bool:
    """Take the answer for a range, or read it again, with pauses; return whether it proves the version of the file."""
    if isinstance(answer, ObjectInfo) and is_same(file.version, answer):  # in nearly all cases
        return True
    start, nbytes = span[0], sum(buffer.nbytes for buffer in span[1])
    if answer is None and not nbytes:
        return True
    where = f"{file.url}, bytes {start:,} to {start + nbytes:,}"
    first = [answer]

    def attempt() -> bool:
        (answer,) = [first.pop()] if first else file.store.read(file.path, [span], again=True)
        info = answer.info if isinstance(answer, ShortAnswerError) else answer
        same = is_same(file.version, info) if isinstance(info, ObjectInfo) else None
        if isinstance(info, ObjectInfo) and same is False:
            # Where a session has ended, or a server is busy, it may be there for a while only.
            raise _is_page(info) if info.is_page else _changed(file, info)
        if isinstance(answer, BaseException):
            raise answer
        return same is True

    try:
        return with_retries(attempt, where)
    except FileNotFoundError as error:
        raise _gone(file) from shown_cause(error)
    except EmbeddingReaderError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        if http_status(error) == 416:  # a range past the end: the file may have become shorter
            _check(file)
        raise ReadError(f"{where}: reading failed: {explain(error)}") from shown_cause(error)


def _changed(file: StoredFile, info: ObjectInfo) -> FileChangedError:
    now = info.version
    how = ""
    if now.lasting == file.version.lasting:
        how = (
            "another one of the same size and time is in its place, or its content, permissions or links were changed: "
        )
    remedy = "open the reader again"
    if remembers_files(file.store.filesystem):
        remedy = f"clear the cache in front of it, which goes on giving the old bytes, and {remedy}"
    return FileChangedError(
        f"{file.url}: the file changed since it was opened ({how}its size and version were {str(file.version)!r}, "
        f"now {str(now)!r}); {remedy}"
    )


def _is_page(info: ObjectInfo) -> ReadError:
    return ReadError(
        f"a web page came ({info.version}) where the file was asked for, as some servers send to who has to log in "
        "again, or wait; open its URL in a browser, and check the credentials in storage_options"
    )


def _untold(file: StoredFile) -> ReadError:
    """Say that nothing tells one version from another: old and new pieces would be mixed, and nobody would notice."""
    return ReadError(
        f"{file.url}: the storage tells neither its size, nor a time or an etag, so that it would not be noticed if it "
        "changed while it is read; copy it to a disk, or to a storage that tells of either"
    )


def _gone(file: StoredFile) -> FileChangedError:
    return FileChangedError(
        f"{file.url}: the file has gone since it was opened; open the reader again, and where a saved manifest lies "
        "elsewhere than its files, say where these are (embeddings_folder=)"
    )
