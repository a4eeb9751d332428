"""The manifest of what has been written: from what the writer knows, or as any reader would see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Manifest, make_manifest, read_manifest
from dask_embedding_reader.errors import EmbeddingReaderError, WriteError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.parquet.encode import metadata_header
from dask_embedding_reader.formats.parquet.tables import meta_columns
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.storage.names import is_litter
from dask_embedding_reader.storage.store import ObjectInfo, StoredFile
from dask_embedding_reader.write.folder import WRITING, Folder
from dask_embedding_reader.write.notes import Commit
from dask_embedding_reader.write.parts import Record, Settings, part_names


class Written(NamedTuple):
    """What the writer knows that has just written a collection; who completes what another one wrote does not."""

    records: Mapping[int, Record]
    """What is in its parts."""
    infos: Mapping[str, ObjectInfo]
    """What the storage told of the files in the folder then."""


def known_manifest(folder: Folder, settings: Settings, commit: Commit, written: Written) -> Manifest | None:
    """Make the manifest without a look at the files; None where there is something else, or a part was not written now.

    Each header says what reading it would.
    """
    layout, dtype = get_format(settings.file_format), np.dtype(settings.dtype)
    suffixes = tuple({name[name.rfind(".") :] for name in commit.files})
    data = {name for name in written.infos if name.endswith(suffixes) and not is_litter(name)}
    if data - set(commit.remove) != set(commit.files) or not all(record.columns for record in written.records.values()):
        return None
    vectors: list[FileHeader] = []
    metadata: list[FileHeader] = []
    for number, record in sorted(written.records.items()):
        files = {
            name: (StoredFile(folder.store, folder.at(name), written.infos[name].version), checksum)
            for name, (_, checksum) in record.files.items()
        }
        *names_of_metadata, name = part_names(settings, number)
        file, checksum = files[name]
        header = layout.vectors.written_header(file, record.rows, settings.dimension, dtype)
        if header is None:
            return None
        columns = meta_columns(record.schema)
        vectors.append(header._replace(checksum=checksum, meta=columns if layout.metadata == "same" else ()))
        for name in names_of_metadata:
            file, checksum = files[name]
            metadata.append(metadata_header(file, record.rows)._replace(checksum=checksum, meta=columns))
    root = [folder.path]
    return make_manifest(
        layout,
        Columns(settings.embedding_column, None, commit.columns),
        (vectors, root),
        (metadata, root) if metadata else None,
    )


def open_written(folder: Folder, settings: Settings, commit: Commit) -> Manifest:
    """Open the collection as any reader would, and add what only the writer knows."""
    columns = Columns(settings.embedding_column, None, commit.columns)
    layout = get_format(settings.file_format)
    try:
        manifest = read_manifest(layout, [folder.url], columns, None, folder.storage_options, unfinished=True)
    except EmbeddingReaderError as error:
        raise WriteError(
            f"{folder.shown}: what was written cannot be read back: {error}. Once it can be read, run this again; if "
            f"something else changed it, remove {folder.shown}/{WRITING} and pass overwrite=True to begin anew"
        ) from error
    if manifest.count != commit.rows:
        raise WriteError(
            f"{folder.shown}: {counted(commit.rows, 'row')} written, but {manifest.count:,} are found there: something "
            "else wrote to this folder; remove what does not belong there, and run this again"
        )
    checksums = {name: checksum for name, (_, checksum) in commit.files.items()}

    def known(table: FileTable) -> FileTable:
        found = tuple(checksums.get(path.rpartition("/")[2], "") for path in table.paths)
        return dataclasses.replace(table, checksums=found)

    vectors = known(manifest.vectors)
    metadata = manifest.metadata and (vectors if manifest.metadata is manifest.vectors else known(manifest.metadata))
    return dataclasses.replace(manifest, vectors=vectors, metadata=metadata)
