"""Whether a collection still is what was written: every byte read back and compared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd

from dask_embedding_reader._common.arguments import Source, check_options, check_sources
from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.saved import decode_manifest
from dask_embedding_reader.errors import FileChangedError, NoFilesError, ReadError
from dask_embedding_reader.formats.base import FileHeader
from dask_embedding_reader.storage.find import MANIFEST_NAME, MANIFEST_NAMES
from dask_embedding_reader.storage.names import is_litter
from dask_embedding_reader.storage.put import get_file, list_files, list_linked
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import Store, StoredFile, Version, shown_url
from dask_embedding_reader.storage.urls import resolve

_BLOCK_NBYTES = 8 * 2**20


def verify_embeddings(
    folder: Source, *, storage_options: Mapping[str, Any] | None = None, show_progress: bool = False
) -> pd.DataFrame:
    """Read a written collection back and compare it with the checksums in its manifest.

    Parameters
    ----------
    folder : str or os.PathLike
        What :func:`write_embeddings` wrote to.
    storage_options : dict, optional
        Passed to fsspec: credentials, endpoints.
    show_progress : bool, default False
        Whether to show a progress bar, in a terminal or notebook.

    Returns
    -------
    pandas.DataFrame
        A row for each file that is missing, damaged or does not belong there, with the columns ``path`` and
        ``problem``; empty if all is well.

    Raises
    ------
    NoFilesError
        If the folder has no manifest.
    FormatError
        If the manifest is damaged.
    ReadError
        If the storage does not deliver.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> from dask_embedding_reader import write_embeddings
    >>> folder = tempfile.mkdtemp()
    >>> write_embeddings(np.ones((6, 2), "float32"), folder, rows_per_file=3)
    >>> len(verify_embeddings(folder))
    0
    >>> os.remove(os.path.join(folder, "00000001.npy"))
    >>> verify_embeddings(folder)["problem"].tolist()
    ['missing']
    """
    store, path = resolve(check_sources("folder", folder)[0], check_options("storage_options", storage_options))
    listing = list_files(store, path, ReadError)
    where = next((f"{path}/{name}" for name in MANIFEST_NAMES if name in listing), None)
    data = get_file(store, where, ReadError) if where else None
    if where is None or data is None:
        raise NoFilesError(
            f"{shown_url(store, path)} does not exist, or has no {MANIFEST_NAME}, so there is nothing to compare "
            "with: it was not written by write_embeddings, or not to its end"
        )
    saved = decode_manifest(data, shown_url(store, where), lambda _, below: (store, f"{path}/{below}"))
    headers = {file.path: file.header for file in saved.files}
    suffixes = tuple({os.path.splitext(name)[1] for name in headers})
    found = (*listing, *list_linked(store, path, listing, ReadError))
    extra = [name for name in found if name.endswith(suffixes) and name not in headers and not is_litter(name)]
    problems = list(_problems(store, headers, listing, show_progress))
    problems += [(f"{path}/{name}", "not in the manifest: it is read with the others") for name in sorted(extra)]
    rows = [(shown_url(store, name), problem) for name, problem in problems]
    return pd.DataFrame(rows, columns=["path", "problem"], dtype=object)


def _problems(
    store: Store, headers: Mapping[str, FileHeader], listing: Mapping[str, int], show_progress: bool
) -> Iterator[tuple[str, str]]:
    total = sum(header.file.size for header in headers.values())
    threads = store.connections
    with progress_bar(show_progress, total, "verifying", "B") as progress, ThreadPoolExecutor(threads) as pool:
        try:
            found = pool.map(lambda name: _problem(headers[name], listing.get(name)), headers)
            for header, problem in zip(headers.values(), found, strict=True):
                progress.update(header.file.size)
                if problem:
                    yield header.file.path, problem
        finally:
            pool.shutdown(cancel_futures=True)


def _problem(header: FileHeader, size: int | None) -> str:
    """Say what is wrong with a file; nothing if all is well."""
    if size is None:
        return "missing"
    if size != header.file.size:
        return f"has {counted(size, 'byte')}, was written with {header.file.size:,}"
    if not header.checksum:
        return "its checksum is not known: it was not written by write_embeddings"
    digest = hashlib.sha256()
    try:
        for block in _blocks(header.file):
            digest.update(block)
    except FileChangedError:
        return "was changed or removed while it was read"
    if digest.hexdigest() != header.checksum:
        return "damaged: its content is not what was written"
    return ""


def _blocks(file: StoredFile) -> Iterator[bytes]:
    # The size alone is compared: of a copy, all else is another.
    copied = file._replace(version=Version(file.size))
    for start in range(0, file.size, _BLOCK_NBYTES):
        yield read_range(copied, start, min(start + _BLOCK_NBYTES, file.size))
