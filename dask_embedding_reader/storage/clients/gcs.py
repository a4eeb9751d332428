"""Google's storage, by gcsfs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem

from dask_embedding_reader.storage.clients.http import get_web, stall_timeout
from dask_embedding_reader.storage.ranges import ByteRange


async def get(filesystem: AbstractFileSystem, path: str, wanted: ByteRange) -> Mapping[str, Any]:
    """Read a range; return what the answer tells of the file."""
    # Of gcsfs 2024.12 to 2026.10: its session, and the parameters, address and headers of its own requests.
    await filesystem._set_session()
    options = {"params": filesystem._get_params({}), "timeout": filesystem.requests_timeout or stall_timeout()}
    url = filesystem._format_path(filesystem.url(path), ())
    return await get_web(filesystem.session, url, filesystem._get_headers(None), options, wanted)


async def get_of_any_bucket(filesystem: AbstractFileSystem, path: str, wanted: ByteRange) -> Mapping[str, Any] | None:
    """Read a range as :func:`get` does; nothing is told of what comes from a bucket of another kind."""
    # Of gcsfs 2025.10 to 2026.10, which read buckets of one kind ("zonal") by another protocol.
    if await filesystem._is_zonal_bucket(filesystem.split_path(path)[0]):
        wanted.put(await filesystem._cat_file(path, start=wanted.start, end=wanted.stop))
        return None
    return await get(filesystem, path, wanted)
