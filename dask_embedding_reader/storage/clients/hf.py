"""Hugging Face's hub, by huggingface_hub: at which commit a branch is, and reads that tell which content they are of.

All names are public, as of huggingface_hub 0.35 to 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from dask_embedding_reader.storage.ranges import ByteRange, only, part
from dask_embedding_reader.storage.retries import STALL_SECONDS


class Branch(NamedTuple):
    """A branch, tag or commit of a repository."""

    kind: str
    """``dataset``, ``model`` or ``space``."""
    repository: str
    """Its owner and name."""
    revision: str
    """The branch, tag or commit."""


def find_branch(filesystem: AbstractFileSystem, path: str) -> tuple[Branch, str] | None:
    """Return what a path names, and the path within it; None where there are no commits, as in buckets."""
    found = filesystem.resolve_path(path)
    if not hasattr(found, "repo_id"):
        return None
    return Branch(found.repo_type, found.repo_id, found.revision), found.path_in_repo


def commit_of(filesystem: AbstractFileSystem, branch: Branch) -> str:
    """Ask for the commit that a branch is at."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - who reads other storages need not have it

    api: Any = HfApi(endpoint=filesystem.endpoint, token=filesystem.token)
    info = api.repo_info(
        branch.repository,
        repo_type=branch.kind,
        revision=branch.revision,
        timeout=STALL_SECONDS,
        expand=["sha"],  # without the names of all files
    )
    return str(info.sha)


def path_at(branch: Branch, commit: str, path: str) -> str:
    """Return the path of a file or folder as it is in a commit."""
    kind = "" if branch.kind == "model" else f"{branch.kind}s/"
    return f"{kind}{branch.repository}@{commit}/{path}".rstrip("/")


def get(filesystem: AbstractFileSystem, path: str, wanted: ByteRange) -> Mapping[str, Any]:
    """Read a range; return what the answer tells of the file. Its file system would read on, and ask twice more."""
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 - as above
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # noqa: PLC0415

    found = find_branch(filesystem, path)
    if found is None:
        raise AttributeError("buckets have other addresses")  # left to its file system
    branch, name = found
    url = hf_hub_url(
        branch.repository, name, repo_type=branch.kind, revision=branch.revision, endpoint=filesystem.endpoint
    )
    headers = {**build_hf_headers(token=filesystem.token), "Range": wanted.header}
    answer = get_session().get(url, headers=headers, timeout=STALL_SECONDS)
    if answer.status_code == 404:
        raise FileNotFoundError(path)
    hf_raise_for_status(answer)
    first, size = part(answer.headers.get("Content-Range"), len(answer.content), answer.status_code)
    only(wanted, first)(answer.content)
    # The hub tells it where it sends on to the servers that have the bytes, or with them.
    told = (answer.history or [answer])[0].headers
    etag = str(told.get("X-Linked-Etag") or told.get("Etag") or "").removeprefix("W/").strip('"')
    return {"size": size, _KINDS.get(len(etag), ""): etag}


_KINDS = {64: "sha256", 40: "blob_id"}
"""What the hub has for an etag, by its length: of large files their hash, of others that of git."""
