"""npy files with parquet metadata beside them: which metadata file belongs to which file of vectors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Sequence

from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.storage import StoredFile

Key = Callable[[str], Hashable]


def pair_files(vectors: Sequence[StoredFile], metadata: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the metadata file of each file of vectors.

    One rule holds for the whole collection, the first of these that pairs every file: the path below the common
    folder, without the suffix (``a/0.npy`` and ``a/0.parquet``); the shard number, the last number in the name
    (``emb_0002.npy`` and ``metadata_2.parquet``); the position in the order of paths.

    Raises
    ------
    MismatchError
        If no rule pairs every file.
    """
    for key_of in (_relative_names, _shard_numbers):
        left, right = key_of(vectors), key_of(metadata)
        partners = dict(zip(right, metadata, strict=True))
        if len(set(left)) == len(left) and len(partners) == len(metadata) and set(left) == set(partners):
            return [partners[key] for key in left]
    if len(vectors) == len(metadata):
        return list(metadata)
    raise MismatchError(_unpaired(vectors, metadata))


def _relative_names(files: Sequence[StoredFile]) -> list[Hashable]:
    folder = _common_folder(files)
    return [os.path.splitext(file.path)[0][len(folder) :] for file in files]


def _common_folder(files: Sequence[StoredFile]) -> str:
    folders = [os.path.dirname(file.path) + "/" for file in files]
    common = os.path.commonprefix([min(folders), max(folders)])  # noqa: RUF071 - cut at a slash below
    return common[: common.rfind("/") + 1]


def _shard_numbers(files: Sequence[StoredFile]) -> list[Hashable]:
    """The last number in each name; a name without one stands for itself, so that it pairs with nothing else."""
    names = [os.path.splitext(os.path.basename(file.path))[0] for file in files]
    numbers = [re.findall(r"[0-9]+", name) for name in names]
    return [int(found[-1]) if found else name for name, found in zip(names, numbers, strict=True)]


def _unpaired(vectors: Sequence[StoredFile], metadata: Sequence[StoredFile]) -> str:
    left, right = _shard_numbers(vectors), _shard_numbers(metadata)
    known_left, known_right = set(left), set(right)
    lonely = [file.url for file, key in zip(vectors, left, strict=True) if key not in known_right]
    spare = [file.url for file, key in zip(metadata, right, strict=True) if key not in known_left]
    details = "".join(
        f"; {what}: {', '.join(urls[:3])}{' …' if len(urls) > 3 else ''}"
        for what, urls in (("without metadata", lonely), ("without vectors", spare))
        if urls
    )
    return (
        f"{len(vectors)} npy files ({vectors[0].url} is the first) cannot be paired with {len(metadata)} parquet files "
        f"({metadata[0].url} is the first), neither by name, nor by shard number, nor by position{details}; each npy "
        "file needs one parquet file with as many rows"
    )
