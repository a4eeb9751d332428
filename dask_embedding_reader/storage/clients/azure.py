"""Azure's storage, by adlfs."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from fsspec import AbstractFileSystem

from dask_embedding_reader.storage.ranges import ByteRange, only, part
from dask_embedding_reader.storage.retries import STALL_SECONDS


async def get(filesystem: AbstractFileSystem, path: str, wanted: ByteRange) -> Mapping[str, Any]:
    """Read a range; return what the answer tells of the file."""
    # Of adlfs 2024.12 to 2026.8: the path without a protocol, and its options for waiting.
    container, blob, version = filesystem.split_path(filesystem._strip_protocol(path))
    # Its retries would multiply with ours.
    options = {"read_timeout": int(STALL_SECONDS), **filesystem._timeout_kwargs, "retry_total": 0}
    async with filesystem.service_client.get_blob_client(container=container, blob=blob) as client:
        # It would fetch what is over 32 MB in parts of 4 MB, and adlfs does not let its users choose. What it has is
        # that of all clients of this service, the user's too. (Of azure-storage-blob 12.19 to 12.31.)
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
