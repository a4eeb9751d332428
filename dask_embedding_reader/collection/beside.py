"""What lies beside the data of a collection: its manifest, and a mark while it is being written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.saved import METADATA, MOST_FILE_NBYTES, SavedManifest, decode_manifest
from dask_embedding_reader.errors import FileChangedError, FormatError, ReadError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.storage.find import EARLIER_MANIFEST_NAME, INCOMPLETE_NAME, MANIFEST_NAME
from dask_embedding_reader.storage.names import meant_path
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import Store, StoredFile, shown_url

logger = logging.getLogger("dask_embedding_reader")


def check_finished(noticed: Sequence[StoredFile]) -> None:
    """Refuse a collection that is not whole yet: what there is of it would pass for all of it.

    Raises
    ------
    ReadError
        If the mark is there.
    """
    for file in noticed:
        if file.path.endswith(f"/{INCOMPLETE_NAME}"):
            folder = shown_url(file.store, file.path.removesuffix(f"/{INCOMPLETE_NAME}"))
            raise ReadError(
                f"{folder}: this collection is being written, or its writing was interrupted; wait, or run the writing "
                f"again to finish it. What is there already can be read by naming the files, as in {folder}/*.*"
            )


def read_saved(noticed: Sequence[StoredFile]) -> list[tuple[StoredFile, SavedManifest]]:
    """Read the manifests beside the data, as far as they can be used."""
    found = []
    for manifest in _manifests(noticed):
        try:
            found.append((manifest, _read(manifest)))
        except FormatError as error:
            logger.warning("%s; it is not used", error)
    return found


def saved_headers(
    manifests: Sequence[tuple[StoredFile, SavedManifest]],
    files: Sequence[StoredFile],
    suffixes: tuple[str, ...],
    columns: Columns,
) -> dict[StoredFile, FileHeader]:
    """Return the headers of those files that have not changed since a manifest beside them was saved.

    Raises
    ------
    FileChangedError
        If files that a manifest names have gone: the rows after them would have other numbers.
    """
    if not manifests:
        return {}
    known: dict[StoredFile, FileHeader] = {}
    listed = {(file.store, path) for file in files for path in (file.path, meant_path(file.path))}
    for manifest, saved in manifests:
        # Names as they are in the folder: saved there, and served by a web server since, they are not written as URLs.
        folder = meant_path(manifest.path.rpartition("/")[0])
        headers = [(file.header, f"{folder}/{file.path}") for file in saved.files if file.path.endswith(suffixes)]
        gone = [
            h.file.url for h, name in headers if listed.isdisjoint([(h.file.store, h.file.path), (h.file.store, name)])
        ]
        if gone:
            raise FileChangedError(
                f"{len(gone):,} of the {counted(len(headers), 'file')} that {manifest.url} names have gone: "
                f"{', '.join(gone[:5])}{', …' if len(gone) > 5 else ''}; "
                "restore them, or remove the manifest to read what is left"
            )
        known |= _usable(saved, columns)
    saved_as = {file: file._replace(version=file.version.lasting) for file in files}
    return {file: known[name]._replace(file=file) for file, name in saved_as.items() if name in known}


def _manifests(noticed: Sequence[StoredFile]) -> Iterator[StoredFile]:
    """Yield the manifests; where there is one of either name in a folder, the newer one."""
    paths = {file.path for file in noticed}
    for file in noticed:
        folder, _, name = file.path.rpartition("/")
        if name == MANIFEST_NAME or (name == EARLIER_MANIFEST_NAME and f"{folder}/{MANIFEST_NAME}" not in paths):
            yield file


def _read(manifest: StoredFile) -> SavedManifest:
    folder = manifest.path.rpartition("/")[0]

    def locate(source: int, path: str) -> tuple[Store, str] | None:
        # Others than the first source are folders elsewhere.
        return None if source or not path else (manifest.store, f"{folder}/{path}")

    if manifest.size > MOST_FILE_NBYTES:
        raise FormatError(f"{manifest.url}: has {manifest.size:,} bytes, more than any manifest; remove it")
    return decode_manifest(read_range(manifest, 0, manifest.size), manifest.url, locate)


def _usable(saved: SavedManifest, columns: Columns) -> dict[StoredFile, FileHeader]:
    """Return the headers that say all that is wanted of a file, and no more of its columns than that."""
    if columns.embedding is not None and columns[:2] != saved.columns[:2]:
        return {}
    if not set(columns.meta) <= set(saved.columns.meta):
        return {}
    places = [saved.columns.meta.index(name) for name in columns.meta]
    return {
        file.header.file: file.header._replace(meta=tuple(file.header.meta[place] for place in places))
        for file in saved.files
        if not columns.meta or len(file.header.meta) == len(saved.columns.meta)
        if columns.embedding is not None or not columns.meta or file.kind == METADATA
    }
