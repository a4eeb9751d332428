"""Byte ranges of files that are asked for: directly, by a client that tells the version, or by any other client.

fsspec's ``cat_file`` returns bytes alone; whether they belong to the file that was planned takes a second request. The
clients of S3, web servers, Google and Azure hand out the head of the answer too (``clients``). S3 and web servers are
mostly asked without them (``direct``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from dask_embedding_reader._common.threads import is_stopped
from dask_embedding_reader.storage.clients import any as any_client
from dask_embedding_reader.storage.clients import azure, gcs, hf, http, s3
from dask_embedding_reader.storage.connections import (
    Asked,
    FileSystem,
    asking,
    class_name,
    connected,
    exclusive,
    given_up,
    may_ask_at_once,
    remembers_files,
    run,
    run_apart,
)
from dask_embedding_reader.storage.direct import read as direct
from dask_embedding_reader.storage.ranges import ByteRange
from dask_embedding_reader.storage.retries import STALL_SECONDS, EndlessAnswerError

Told: TypeAlias = Mapping[str, Any]
"""What an answer says of the whole file, in the words of ``FileSystem.info``: ``size``, and etag or time."""

_SLOWEST_NBYTES = 100_000
"""Bytes a second below which a client of unknown kind counts as stalled."""

_CLIENTS: dict[str, Callable[[FileSystem, str, ByteRange], Awaitable[Told | None]]] = {
    # By name: none of these needs to be installed. Exactly these classes: another one may read in another way.
    "s3fs.core.S3FileSystem": s3.get,
    "fsspec.implementations.http.HTTPFileSystem": http.get,
    "gcsfs.core.GCSFileSystem": gcs.get,
    "gcsfs.extended_gcsfs.ExtendedGcsFileSystem": gcs.get_of_any_bucket,
    "adlfs.spec.AzureBlobFileSystem": azure.get,
}

_HUB = "huggingface_hub.hf_file_system.HfFileSystem"
"""Its client is not asynchronous."""


def request(
    filesystem: FileSystem, path: str, ranges: Sequence[ByteRange], *, again: bool = False
) -> list[Told | BaseException | None]:
    """Ask for byte ranges of a file, all at once where the client can; nothing is tried twice.

    ``again`` says that it has failed before: fsspec's own clients tell more of what goes wrong.

    Returns
    -------
    list
        For each range what the answer told of the file, None where it told nothing, or the exception.
    """
    live = connected(filesystem)
    place = None if again else direct.find_place(filesystem, path)
    if place is None:
        return _request_of_fsspec(filesystem, live, path, ranges)
    answers: list[Told | BaseException | None] = [*run_apart([partial(direct.get, place, wanted) for wanted in ranges])]
    unusual = [k for k, answer in enumerate(answers) if isinstance(answer, direct.UnusualAnswer)]
    if unusual:
        others = _request_of_fsspec(filesystem, live, path, [ranges[k] for k in unusual])
        if not all(isinstance(answer, BaseException) for answer in others):
            direct.leave_to_fsspec(filesystem, place)
        for k, answer in zip(unusual, others, strict=True):
            answers[k] = answer
    return answers


def _request_of_fsspec(
    filesystem: FileSystem, live: FileSystem, path: str, ranges: Sequence[ByteRange]
) -> list[Told | BaseException | None]:
    if class_name(live) == _HUB:
        return _request_of_hub(filesystem, live, path, ranges)
    get = _CLIENTS.get(class_name(live))
    if get is None:
        return _request_plainly(filesystem, live, path, ranges)
    for wanted in ranges:
        wanted.take_memory()  # here, in many threads, not in the one in which all bytes arrive

    async def request_all() -> list[Told | BaseException | None]:
        return await asyncio.gather(*(get(live, path, wanted) for wanted in ranges), return_exceptions=True)

    answers = run(live.loop, request_all)
    # Another release of the client lacks something that it never promised. Nothing has been read yet.
    if any(isinstance(answer, AttributeError) for answer in answers):
        return _request_plainly(filesystem, live, path, ranges)
    return answers


def _request_of_hub(
    filesystem: FileSystem, live: FileSystem, path: str, ranges: Sequence[ByteRange]
) -> list[Told | BaseException | None]:
    answers: list[Told | BaseException] = run_apart([partial(_ask_hub, live, path, wanted) for wanted in ranges])
    if any(isinstance(answer, AttributeError | ImportError) for answer in answers):  # as above
        return _request_plainly(filesystem, live, path, ranges)
    return [*answers]


def _ask_hub(live: FileSystem, path: str, wanted: ByteRange, asked: Asked) -> Told:
    del asked  # its client cannot be woken up
    return hf.get(live, path, wanted)


def ask_info(filesystem: FileSystem, path: str, first_nbytes: int = 0) -> dict[str, Any]:
    """Ask a storage about a file, past everything that the file system remembers.

    Some tell its first bytes too if they are wanted, in the same answer: ``head``.
    """
    with asking(filesystem) as live:
        live.invalidate_cache(path)
        live.invalidate_cache(any_client.parent(live, path))  # some remember the listing of the folder alone
        if (place := direct.find_place(filesystem, path)) is not None and place.is_web:
            # Many are asked for where a listing tells only names, and aiohttp takes several times the processor time.
            (told,) = run_apart([partial(direct.look, place, first_nbytes)])
            if isinstance(told, direct.AnswerError | EndlessAnswerError):
                raise told
            if not isinstance(told, BaseException):
                if first_nbytes and told["size"] and "head" not in told:
                    direct.leave_to_fsspec(filesystem, place)
                return {"name": path, "type": "file", **told}
        if class_name(live) in _CLIENTS:  # which may be stopped while they wait
            return run(live.loop, partial(any_client.info, live, path))
        # Some caches of fsspec look a file up in the listing of its folder, which a web server may not have.
        return dict((live.fs if remembers_files(live) else live).info(path))


def _request_plainly(
    filesystem: FileSystem, live: FileSystem, path: str, ranges: Sequence[ByteRange]
) -> list[Told | BaseException | None]:
    results: list[Any]
    if live.async_impl and may_ask_at_once(live):  # caches and "dir" say the former of what they stand on
        starts, stops = [wanted.start for wanted in ranges], [wanted.stop for wanted in ranges]
        nbytes = sum(stops) - sum(starts)
        try:
            seconds = STALL_SECONDS + nbytes / _SLOWEST_NBYTES
            results = any_client.cat_ranges(live, path, starts, stops, seconds)
        except Exception as error:  # noqa: BLE001 - the caller decides
            results = [error] * len(ranges)
    else:
        results = [_cat_file(filesystem, path, wanted) for wanted in ranges]
    told: list[Told | BaseException | None] = []
    for result, wanted in zip(results, ranges, strict=True):
        try:
            if isinstance(result, BaseException):
                raise result
            wanted.put(result)
            told.append(None)
        except Exception as error:  # noqa: BLE001 - the caller decides
            told.append(error)
    return told


def _cat_file(filesystem: FileSystem, path: str, wanted: ByteRange) -> Any:
    try:
        with exclusive(filesystem):  # it may have taken a while to get it
            if is_stopped():
                return given_up()
            with asking(filesystem) as live:
                return live.cat_file(path, start=wanted.start, end=wanted.stop)
    except Exception as error:  # noqa: BLE001 - the caller decides
        return error
