"""The headers of many files, read at once where that helps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.threads import threads_at_once
from dask_embedding_reader.formats.base import Columns, FileFormat, FileHeader
from dask_embedding_reader.storage.store import StoredFile

_LOCAL_THREADS = 8
_REMOTE_THREADS = 64
"""Headers are waited for, not computed: remote ones above all."""

_MUCH_WAITING = 3
"""Local headers come from memory, mostly: then threads, which take turns, only cost time. From a disk that lets us wait
for so many times as long as we compute, many are read at once."""

_BLOCK_FILES = 64
"""Files that a thread takes at a time: handing over each one alone costs more than reading a local header."""


def read_headers(
    vectors: FileFormat,
    files: Sequence[StoredFile],
    columns: Columns,
    show_progress: bool,
    known: Mapping[StoredFile, FileHeader],
    heads: Mapping[StoredFile, bytes] = MappingProxyType({}),
) -> list[FileHeader]:
    """Read the headers of many files at once, in order; those that are known already are taken as they are."""
    if known:
        unknown = [file for file in files if file not in known]
        read = iter(read_headers(vectors, unknown, columns, show_progress, {}, heads) if unknown else ())
        return [known.get(file) or next(read) for file in files]
    local = not any(file.store.request_nbytes for file in files)
    per_block = _BLOCK_FILES if local else 1
    blocks = [files[first : first + per_block] for first in range(0, len(files), per_block)]

    def read_block(block: Sequence[StoredFile]) -> list[FileHeader]:
        return [vectors.read_header(file, columns, heads.get(file, b"") if heads else b"") for file in block]

    headers: list[FileHeader] = []
    rest = deque(blocks)
    with progress_bar(show_progress, len(files), "opening", " files") as progress:
        waits = not local
        while rest and not waits:
            began, worked = time.perf_counter(), time.thread_time()
            block = read_block(rest.popleft())
            waits = time.perf_counter() - began > _MUCH_WAITING * (time.thread_time() - worked)
            headers += block
            progress.update(len(block))
        if rest:
            with threads_at_once(min(len(rest), _LOCAL_THREADS if local else _REMOTE_THREADS)) as pool:
                for block in pool.map(read_block, rest):
                    headers += block
                    progress.update(len(block))
    return headers
