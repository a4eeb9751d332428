"""S3, by s3fs, where it is not read directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem

from dask_embedding_reader.storage.ranges import ByteRange, only, part

_BLOCK_NBYTES = 2**18


async def get(filesystem: AbstractFileSystem, path: str, wanted: ByteRange) -> Mapping[str, Any]:
    """Read a range; return what the answer tells of the file."""
    bucket, key, version = filesystem.split_path(path)
    # Of s3fs 2024.12 to 2026.9: the call with its options for requests, whose public twin is not asynchronous.
    answer = await filesystem._call_s3(
        "get_object",
        Bucket=bucket,
        Key=key,
        Range=wanted.header,
        **filesystem.req_kw,
        **({"VersionId": version} if version else {}),
    )
    body, count = answer["Body"], 0
    try:
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        first, size = part(answer.get("ContentRange"), answer.get("ContentLength"), status)
        put = only(wanted, first)
        is_counted = size is None and answer.get("ContentRange") is None  # see ``http``: of what stands before S3
        while block := await body.read(_BLOCK_NBYTES):
            count += len(block)
            if put(block) and not is_counted:
                break
    finally:
        body.close()
    if is_counted and wanted.count == wanted.nbytes:
        size = count
    return {
        "size": size,
        "mimetype": answer.get("ContentType"),
        "ETag": answer.get("ETag"),
        "LastModified": answer.get("LastModified"),
    }
