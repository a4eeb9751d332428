"""One request for exactly the bytes asked for, which also tells of which version of the file they are.

fsspec's ``cat_file`` returns bytes alone; whether they belong to the file that was planned takes a second request. The
clients of S3, HTTP, GCS and Azure hand out the head of the answer too, so each has one function here. All others are
read through ``cat_file``. S3 and web servers are mostly asked without their clients (``direct``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, TypeAlias

from fsspec.asyn import sync

from dask_embedding_reader.storage.connections import (
    STALL_SECONDS,
    FileSystem,
    class_name,
    connected,
    exclusive,
    protocols,
    reconnect,
    run,
    run_apart,
)
from dask_embedding_reader.storage.direct import read as direct
from dask_embedding_reader.storage.ranges import Wanted, only, part
from dask_embedding_reader.storage.retries import EndlessAnswerError

Told: TypeAlias = Mapping[str, Any]
"""What an answer says of the whole file, in the words of ``FileSystem.info``: ``size``, and etag or time."""

_BLOCK_NBYTES = 2**18
_SLOWEST_NBYTES = 100_000
"""Bytes a second below which a client of unknown kind counts as stalled."""


def request(
    filesystem: FileSystem, path: str, ranges: Sequence[Wanted], *, again: bool = False
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
    filesystem: FileSystem, live: FileSystem, path: str, ranges: Sequence[Wanted]
) -> list[Told | BaseException | None]:
    get = _CLIENTS.get(class_name(live))
    if get is None:
        return _request_plainly(filesystem, live, path, ranges)
    for wanted in ranges:
        wanted.take_memory()  # here, in many threads, not in the one in which all bytes arrive
    return _request_at_once(live, [partial(get, live, path, wanted) for wanted in ranges])


def _request_at_once(
    live: FileSystem, requests: Sequence[Callable[[], Awaitable[Told | None]]]
) -> list[Told | BaseException | None]:
    async def request_all() -> list[Told | BaseException | None]:
        return await asyncio.gather(*(request() for request in requests), return_exceptions=True)

    return run(live.loop, request_all)


def ask_info(filesystem: FileSystem, path: str, first_nbytes: int = 0) -> dict[str, Any]:
    """Ask a storage about a file, past everything that the file system remembers.

    Some tell its first bytes too if they are wanted, in the same answer: ``head``.
    """
    with exclusive(filesystem):
        live = connected(filesystem)
        live.invalidate_cache(path)
        live.invalidate_cache(live._parent(path))  # some remember the listing of the folder alone
        if (place := direct.find_place(filesystem, path)) is not None and place.is_web:
            # Many are asked for where a listing tells only names, and aiohttp takes several times the processor time.
            (told,) = run_apart([partial(direct.look, place, first_nbytes)])
            if isinstance(told, direct.AnswerError | EndlessAnswerError):
                raise told
            if not isinstance(told, BaseException):
                if first_nbytes and told["size"] and "head" not in told:
                    direct.leave_to_fsspec(filesystem, place)
                return {"name": path, "type": "file", **told}
        try:
            # A client of these may be stopped while it waits.
            return dict(run(live.loop, partial(live._info, path)) if class_name(live) in _CLIENTS else live.info(path))
        except FileNotFoundError:
            raise
        except Exception:
            reconnect(filesystem)
            raise


def _request_plainly(
    filesystem: FileSystem, live: FileSystem, path: str, ranges: Sequence[Wanted]
) -> list[Told | BaseException | None]:
    results: list[Any]
    if live.async_impl and "dir" not in protocols(live):  # which says so whatever it stands on
        starts, stops = [wanted.start for wanted in ranges], [wanted.stop for wanted in ranges]
        nbytes = sum(stops) - sum(starts)
        try:
            results = sync(
                live.loop,
                live._cat_ranges,
                [path] * len(ranges),
                starts,
                stops,
                on_error="return",
                timeout=STALL_SECONDS + nbytes / _SLOWEST_NBYTES,
            )
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


def _cat_file(filesystem: FileSystem, path: str, wanted: Wanted) -> Any:
    with exclusive(filesystem):
        try:
            return connected(filesystem).cat_file(path, start=wanted.start, end=wanted.stop)
        except Exception as error:  # noqa: BLE001 - the caller decides
            reconnect(filesystem)
            return error


# ---------------------------------------------------------------------------------------------------------------------
# Each client


async def _get_s3(filesystem: FileSystem, path: str, wanted: Wanted) -> Told:
    bucket, key, version = filesystem.split_path(path)
    answer = await filesystem._call_s3(
        "get_object",
        Bucket=bucket,
        Key=key,
        Range=wanted.header,
        **filesystem.req_kw,
        **({"VersionId": version} if version else {}),
    )
    first, size = part(answer.get("ContentRange"), answer.get("ContentLength"))
    body = answer["Body"]
    put = only(wanted, first)
    try:
        while block := await body.read(_BLOCK_NBYTES):
            if put(block):
                break
    finally:
        body.close()
    return {"size": size, "ETag": answer.get("ETag"), "LastModified": answer.get("LastModified")}


async def _get_http(filesystem: FileSystem, path: str, wanted: Wanted) -> Told:
    session = await filesystem.set_session()
    options = {**filesystem.kwargs}
    if "timeout" not in options and "timeout" not in filesystem.client_kwargs:
        options["timeout"] = _stall_timeout()
    headers = {**options.pop("headers", {})}
    return await _get_web(session, filesystem.encode_url(path), headers, options, wanted)


async def _get_gcs(filesystem: FileSystem, path: str, wanted: Wanted) -> Told:
    await filesystem._set_session()
    options = {"params": filesystem._get_params({}), "timeout": filesystem.requests_timeout or _stall_timeout()}
    url = filesystem._format_path(filesystem.url(path), ())
    return await _get_web(filesystem.session, url, filesystem._get_headers(None), options, wanted)


async def _get_gcs_any_bucket(filesystem: FileSystem, path: str, wanted: Wanted) -> Told | None:
    # Newer releases read buckets of one kind ("zonal") by another protocol.
    if await filesystem._is_zonal_bucket(filesystem.split_path(path)[0]):
        wanted.put(await filesystem._cat_file(path, start=wanted.start, end=wanted.stop))
        return None
    return await _get_gcs(filesystem, path, wanted)


async def _get_azure(filesystem: FileSystem, path: str, wanted: Wanted) -> Told:
    container, blob, version = filesystem.split_path(filesystem._strip_protocol(path))
    # Its retries would multiply with ours.
    options = {"read_timeout": int(STALL_SECONDS), **filesystem._timeout_kwargs, "retry_total": 0}
    async with filesystem.service_client.get_blob_client(container=container, blob=blob) as client:
        # It would fetch what is over 32 MB in parts of 4 MB, and adlfs does not let its users choose. What it has is
        # that of all clients of this service, the user's too.
        client._config = copy(client._config)
        client._config.max_single_get_size = 2**40
        try:
            stream = await client.download_blob(
                offset=wanted.start,
                length=wanted.stop - wanted.start,
                version_id=version,
                max_concurrency=1,
                **options,
            )
            only(wanted, wanted.start)(await stream.readall())
        except Exception as error:
            if getattr(error, "status_code", None) == 404:
                raise FileNotFoundError(path) from error
            raise
    _, size = part(stream.properties.content_range, None)
    return {"size": size, "etag": stream.properties.etag, "last_modified": stream.properties.last_modified}


_CLIENTS: dict[str, Callable[[FileSystem, str, Wanted], Awaitable[Told | None]]] = {
    # By name: none of these needs to be installed. Exactly these classes: another one may read in another way.
    "s3fs.core.S3FileSystem": _get_s3,
    "fsspec.implementations.http.HTTPFileSystem": _get_http,
    "gcsfs.core.GCSFileSystem": _get_gcs,
    "gcsfs.extended_gcsfs.ExtendedGcsFileSystem": _get_gcs_any_bucket,
    "adlfs.spec.AzureBlobFileSystem": _get_azure,
}


async def _get_web(
    session: Any, url: Any, headers: Mapping[str, str], options: Mapping[str, Any], wanted: Wanted
) -> Told:
    # Compressed on the way, a file has other bytes at these positions.
    headers = {**headers, "Range": wanted.header, "Accept-Encoding": "identity"}
    async with session.get(url, headers=headers, **options) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(str(url))
        if answer.status in (401, 403):
            raise PermissionError(f"{answer.status} {answer.reason}")
        first, size = part(answer.headers.get("Content-Range"), answer.headers.get("Content-Length"))
        if answer.status != 416:  # the file is shorter than it was, as its size tells
            answer.raise_for_status()
            put = only(wanted, first)
            async for block in answer.content.iter_any():
                if put(block):
                    break
        # Google's answers carry the number of the version too; its etag serves as well.
        return {
            "size": size,
            **{key: answer.headers[key] for key in ("ETag", "Last-Modified") if key in answer.headers},
        }


def _stall_timeout() -> Any:
    import aiohttp  # noqa: PLC0415 - who reads local files need not wait for it

    return aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
