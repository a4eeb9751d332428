"""Web servers, by fsspec's client and aiohttp, where they are not read directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem

from dask_embedding_reader.storage.ranges import ByteRange, is_as_stored, only, part
from dask_embedding_reader.storage.retries import STALL_SECONDS


async def get(filesystem: AbstractFileSystem, path: str, wanted: ByteRange) -> Mapping[str, Any]:
    """Read a range; return what the answer tells of the file."""
    session = await filesystem.set_session()
    options = {**filesystem.kwargs}
    if "timeout" not in options and "timeout" not in filesystem.client_kwargs:
        options["timeout"] = stall_timeout()
    headers = {**options.pop("headers", {})}
    return await get_web(session, filesystem.encode_url(path), headers, options, wanted)


async def get_web(
    session: Any, url: Any, headers: Mapping[str, str], options: Mapping[str, Any], wanted: ByteRange
) -> Mapping[str, Any]:
    """Read a range of an address, for Google's client too."""
    # Compressed on the way, a file has other bytes at these positions.
    headers = {**headers, "Range": wanted.header, "Accept-Encoding": "identity"}
    async with session.get(url, headers=headers, **options) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(str(url))
        if answer.status in (401, 403):
            raise PermissionError(f"{answer.status} {answer.reason}")
        first, size = part(answer.headers.get("Content-Range"), answer.headers.get("Content-Length"), answer.status)
        if not is_as_stored(answer.headers.get("Content-Encoding")):
            size = None  # of what is sent: aiohttp makes the file of it
        if answer.status != 416:  # the file is shorter than it was, as its size tells
            answer.raise_for_status()
            put, count = only(wanted, first), 0
            # Of a whole file whose length the head does not tell, the end does: a page to log in is no such file.
            is_counted = size is None and "Content-Range" not in answer.headers
            async for block in answer.content.iter_any():
                count += len(block)
                if put(block) and not is_counted:
                    break
            if is_counted and wanted.count == wanted.nbytes:
                size = count
        # Google's answers carry the number of the version too; its etag serves as well.
        return {"size": size, **{key: answer.headers[name] for key, name in _TOLD.items() if name in answer.headers}}


_TOLD = {"mimetype": "Content-Type", "ETag": "ETag", "Last-Modified": "Last-Modified"}
"""What the head of an answer tells of a file, by what ``FileSystem.info`` calls it."""


def stall_timeout() -> Any:
    """Return how long aiohttp waits for a server that says nothing."""
    import aiohttp  # noqa: PLC0415 - who reads local files need not wait for it

    return aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
