"""The manifest of a collection saved to a URL, and the collection opened from it: one read, however many files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dask_embedding_reader._common.arguments import Source
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Headers, Manifest, make_manifest
from dask_embedding_reader.collection.saved import (
    METADATA,
    VECTORS,
    SavedFile,
    SavedManifest,
    decode_manifest,
    encode_manifest,
)
from dask_embedding_reader.errors import (
    ArgumentError,
    ColumnError,
    DestinationError,
    FormatError,
    NoFilesError,
    ReadError,
)
from dask_embedding_reader.formats.base import MetaColumn
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.storage.find import EARLIER_MANIFEST_NAME, MANIFEST_NAME, MANIFEST_NAMES
from dask_embedding_reader.storage.names import GLOB_CHARACTERS, glob_root, is_litter
from dask_embedding_reader.storage.put import get_file, put_file, real_path, remove_files
from dask_embedding_reader.storage.store import Store, shown_url
from dask_embedding_reader.storage.urls import resolve


def save_manifest(
    manifest: Manifest,
    store: Store,
    path: str,
    written: Mapping[str, Any] | None = None,
    scratch: str | None = None,
) -> None:
    """Save what is known of a collection.

    ``written`` says how it was written, if by this library; ``scratch`` is a folder for temporary files.

    Raises
    ------
    ArgumentError
        If a file has a name that cannot be written.
    WriteError
        If it cannot be written.
    """
    vectors, metadata = manifest.vectors, manifest.metadata
    beside = metadata if manifest.format.metadata == "beside" else None
    same_folder = beside is None or beside.roots == vectors.roots
    meta = tuple(MetaColumn(field.type, field.has_nulls) for field in manifest.fields)
    files = list(_saved_files(VECTORS, vectors, 0, () if beside else meta))
    if beside is not None:
        files += _saved_files(METADATA, beside, 0 if same_folder else len(vectors.roots), meta)
    saved = SavedManifest(
        manifest.format.name,
        manifest.columns,
        len(vectors.roots),
        0 if beside is None or same_folder else len(beside.roots),
        written,
        files,
    )
    put_file(store, path, encode_manifest(saved), scratch)
    folder, _, name = path.rpartition("/")
    if name == MANIFEST_NAME:
        remove_files(store, [f"{folder}/{EARLIER_MANIFEST_NAME}"])


def _saved_files(kind: str, table: FileTable, first_source: int, meta: tuple[MetaColumn, ...]) -> Iterator[SavedFile]:
    exact = {root: position for position, root in enumerate(table.roots)}
    starts = ((start, exact[root]) for root, start in _starts(table).items())
    folders = sorted(starts, key=lambda item: -len(item[0]))
    for position, path in enumerate(table.paths):
        header = table.header(position)._replace(meta=meta, checksum=table.checksums[position])
        if path in exact:
            yield SavedFile(kind, first_source + exact[path], "", header)
            continue
        folder, source = next(item for item in folders if path.startswith(_inside(item[0])))
        yield SavedFile(kind, first_source + source, path[len(_inside(folder)) :], header)


def _starts(table: FileTable) -> dict[str, str]:
    """Return for each source the folder that paths are told from: names of folders may hold what else is a pattern."""
    if all(map(GLOB_CHARACTERS.isdisjoint, table.roots)):
        return {root: root for root in table.roots}
    folders = set[str]()
    for path in table.paths:
        folder = path.rpartition("/")[0]
        while folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return {
        root: root if GLOB_CHARACTERS.isdisjoint(root) or root.rstrip("/") in folders else glob_root(root)
        for root in table.roots
    }


def _inside(folder: str) -> str:
    return folder if folder.endswith("/") or not folder else f"{folder}/"


def reopen_manifest(
    where: tuple[Store, str],
    sources: Sequence[Source] | None,
    metadata_sources: Sequence[Source] | None,
    meta_columns: Sequence[str] | None,
    storage_options: Mapping[str, Any] | None,
    metadata_storage_options: Mapping[str, Any] | None,
) -> tuple[Manifest, str]:
    """Open a collection from what was saved of it, without a look at its files; return the path of that, too.

    Raises
    ------
    NoFilesError
        If there is no manifest.
    FormatError
        If it cannot be used.
    ArgumentError
        If its files lie in more folders than are named, or the only one was named itself and is not named now.
    ColumnError
        If it does not know a column.
    ReadError
        If the storage does not deliver it.
    """
    store, path, data = _read_manifest(*where)
    url = shown_url(store, path)
    if sources is None:
        roots = [(store, path.rpartition("/")[0])]
    else:
        roots = [resolve(source, storage_options) for source in sources]
    metadata_options = storage_options if metadata_storage_options is None else metadata_storage_options
    metadata_roots = [resolve(source, metadata_options) for source in metadata_sources or ()]

    def locate(source: int, below: str) -> tuple[Store, str] | None:
        if source >= len(all_roots):
            return None  # said below
        root_store, root = all_roots[source]
        return root_store, f"{_inside(root)}{below}" if below else root

    all_roots = roots + metadata_roots
    saved = decode_manifest(data, url, locate)
    if (saved.sources, saved.metadata_sources) != (len(roots), len(metadata_roots)):
        raise ArgumentError(
            f"{url} was saved of a collection in {counted(saved.sources, 'folder')} with metadata in "
            f"{saved.metadata_sources or 'the same'}; name as many, in the same order, as embeddings_folder and "
            f"metadata_folder: {len(roots)} and {len(metadata_roots) or 'none'} are named"
        )
    if sources is None and any(file.header.file.path == roots[0][1] for file in saved.files):
        raise ArgumentError(
            f"{url} was saved of a collection that was named by its file, not by the folder of it; say where the file "
            "is (embeddings_folder=)"
        )
    names = saved.columns.meta if meta_columns is None else tuple(meta_columns)
    if missing := [name for name in names if name not in saved.columns.meta]:
        raise ColumnError(
            f"{url} does not know the metadata column {missing[0]!r}; it knows "
            f"{', '.join(map(repr, saved.columns.meta)) or 'none'}. Open the files themselves for others"
        )
    places = [saved.columns.meta.index(name) for name in names]

    def headers(kind: str, roots: Sequence[tuple[Store, str]]) -> Headers:
        of_kind = [file.header for file in saved.files if file.kind == kind]
        chosen = [
            header._replace(meta=tuple(header.meta[place] for place in places if header.meta)) for header in of_kind
        ]
        return chosen, [root for _, root in roots]

    vectors = headers(VECTORS, roots)
    if not vectors[0]:
        raise FormatError(f"{url}: not a usable manifest: it names no file of vectors; remove it, and save it again")
    metadata = headers(METADATA, metadata_roots or roots)
    layout = get_format(saved.file_format)
    if names and not metadata[0] and layout.metadata != "same":
        raise FormatError(f"{url}: not a usable manifest: it names no file of metadata; remove it, and save it again")
    columns = saved.columns._replace(meta=names)
    return make_manifest(layout, columns, vectors, metadata if metadata[0] else None), path


def _read_manifest(store: Store, path: str) -> tuple[Store, str, bytes]:
    """Read a manifest that is named itself, or by the folder that it is in; return where it is, too."""
    inside = [f"{_inside(path)}{name}" for name in MANIFEST_NAMES]
    is_named = path.endswith((f".{MANIFEST_NAME.rpartition('.')[2]}", EARLIER_MANIFEST_NAME, ".parquet"))
    for place in [path, *inside] if is_named else [*inside, path]:
        if (data := _read_if_there(store, place)) is not None:
            return store, place, data
    raise NoFilesError(
        f"{shown_url(store, path)} does not exist, or is a folder without a manifest ({MANIFEST_NAME}); "
        "EmbeddingReader.save_manifest writes one"
    )


def _read_if_there(store: Store, path: str) -> bytes | None:
    """Read a file; None also where storages complain in their own ways that there is a folder instead, or none."""
    try:
        return get_file(store, path, ReadError)
    except ReadError as error:
        if isinstance(error.__cause__, IsADirectoryError | NotADirectoryError):
            return None
        raise


def check_place(manifest: Manifest, store: Store, path: str) -> None:
    """Refuse to save a manifest under a name that would be read as data when the collection is opened again."""
    kinds = [(manifest.vectors, manifest.format.vectors.suffixes), (manifest.metadata, PARQUET.suffixes)]
    for table, suffixes in kinds:
        if table is None or not path.endswith(suffixes) or not _is_in(store, table):
            continue
        starts = _starts(table)
        root = next((root for root, start in starts.items() if path.startswith(_inside(start))), None)
        if root is not None and not is_litter(path, starts[root]):
            raise ArgumentError(
                f"{shown_url(store, path)} would be read as data of {shown_url(store, root)}; let its name "
                "end in .embeddings, or save it elsewhere"
            )


def check_outside(manifest: Manifest, store: Store, folder: str) -> None:
    """Refuse to write to a folder in which the collection would find files when it is opened again.

    The folders themselves, whose files may be replaced, are not meant. Hidden ones are: their manifests are found.
    """
    real = partial(real_path, store)
    for table in (manifest.vectors, manifest.metadata):
        for root in () if table is None or not _is_in(store, table) else table.roots:
            if real(folder).startswith(_inside(real(glob_root(root) if "**" in root else root))):
                raise DestinationError(
                    f"{shown_url(store, folder)}: lies in {shown_url(store, root)}, which is read: who opens that "
                    "again would find its rows twice; name a folder beside it"
                )


def _is_in(store: Store, table: FileTable) -> bool:
    """Tell whether files are in a storage, by its key: file systems of fsspec equal none of before a fork."""
    return store.key in {other.key for other in table.stores}
