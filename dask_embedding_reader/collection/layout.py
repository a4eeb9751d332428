"""How a collection is laid out, where who opens it does not say: its format, and the column of vectors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.saved import SavedManifest
from dask_embedding_reader.errors import ArgumentError, FormatError
from dask_embedding_reader.formats.arrow_types import can_be_framed
from dask_embedding_reader.formats.base import DEFAULT_COLUMN, Columns, FileFormat, Format
from dask_embedding_reader.formats.columns import expand_glob, first_schema
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.partitions import shared_partitions
from dask_embedding_reader.formats.registry import BESIDE, KINDS, get_file_format, get_format
from dask_embedding_reader.storage.find import elsewhere_remedy, text_remedy
from dask_embedding_reader.storage.names import suffixes_of
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import StoredFile

_FIRST_BYTES = {
    b"\x93NUMPY": "npy",
    b"PAR1": "parquet",
    b"PK\3\4": "npz",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # a stream
}
"""What files begin with whose names do not tell what they are."""

_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_PACKED_BYTES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""What the names of files end in, and what they begin with, that are compressed as a whole."""

_MOST_FIRST_BYTES = 9
"""What is looked at of them: eight bytes, and the brace behind the length that a safetensors file begins with."""


def choose_layout(
    kinds: Collection[str],
    saved: Sequence[SavedManifest],
    where: str,
    *,
    wants_metadata: bool,
    has_metadata_folder: bool,
) -> Format:
    """Choose the format of a collection; raise ``ArgumentError`` where there are files of several kinds.

    It is what a manifest beside the data says; else npy, where there are npy files; else the one kind that is there.
    Parquet files beside those of another kind hold their metadata, which is read if anybody wants it.
    """
    saved_formats = {manifest.file_format for manifest in saved}
    told = saved_formats.pop() if len(saved_formats) == 1 else ""
    kind = told.removeprefix(BESIDE)
    if kind not in kinds:
        told, kind = "", _choose_kind(kinds, where)
    if get_file_format(kind).holds_columns:
        return get_format(kind)
    is_beside = wants_metadata or told.startswith(BESIDE)
    return get_format(BESIDE + kind if has_metadata_folder or (is_beside and PARQUET.name in kinds) else kind)


def _choose_kind(kinds: Collection[str], where: str) -> str:
    if "npy" in kinds:
        return "npy"
    vectors = [kind for kind in kinds if not get_file_format(kind).holds_columns]
    found = vectors if len(vectors) == 1 and set(kinds) <= {*vectors, PARQUET.name} else list(kinds)
    if len(found) > 1:
        names = " and ".join([", ".join(found[:-1]), found[-1]])
        raise ArgumentError(
            f"{where} holds files of several kinds: {names}; say which are the collection, as in "
            f'file_format="{found[0]}", or name the files, as in {where}/*{get_file_format(found[0]).suffixes[0]}'
        )
    return found[0]


def tell_kind(file: StoredFile, head: bytes) -> str:
    """Tell the kind of a file whose name does not end in its suffix, by its first bytes, some of which may be known.

    Raises
    ------
    FormatError
        If they do not tell it.
    """
    if remedy := elsewhere_remedy(file.path) or text_remedy([file.path]):
        raise FormatError(f"{file.url}: {remedy}")
    nbytes = min(_MOST_FIRST_BYTES, file.size) if file.size >= 0 else _MOST_FIRST_BYTES
    # Such a name alone does not tell: some call files so whose pages are compressed.
    if file.path.endswith(_PACKED_SUFFIXES):
        head = head[:nbytes] or read_range(file, 0, nbytes)
        if head.startswith(_PACKED_BYTES):
            raise FormatError(f"{file.url}: it is compressed as a whole, so that no row can be read alone; unpack it")
    for suffix in suffixes_of(file.path):  # such as `base.1B.u8bin.crop_nb_10000000` of big-ann-benchmarks
        for kind in KINDS:
            if suffix in get_file_format(kind).suffixes:
                return kind
    first = head[:nbytes] or read_range(file, 0, nbytes)
    for start, kind in _FIRST_BYTES.items():
        if first.startswith(start):
            return kind
    if first[8:] == b"{":
        return "safetensors"
    raise FormatError(
        f"{file.url}: neither its name nor its first bytes, {first[:4]!r}, tell what kind of file it is; say so, as in "
        'file_format="npy"'
    )


_MOST_WITHOUT_VECTORS = 10
"""So many files are looked at where none has a column of vectors: the first ones may be others, which do not belong."""


def choose_column(
    vectors: FileFormat,
    files: Sequence[StoredFile],
    heads: dict[StoredFile, bytes],
    saved: Sequence[SavedManifest],
    columns: Columns,
) -> Columns:
    """Choose the column of vectors, unless it is named.

    It is the one that a manifest names, else `embedding`, else the only one there is. Where that does not tell, it is
    `embedding`, and an error says so when the first file is opened. What is read of that file is added to ``heads``.
    """
    told = {
        manifest.columns[:2]
        for manifest in saved
        if get_format(manifest.file_format).vectors is vectors
        and columns.embedding in (None, manifest.columns.embedding)
        and columns.embedding_dtype in (None, manifest.columns.embedding_dtype)
    }
    if len(told) == 1:
        name, dtype = told.pop()
        return columns._replace(embedding=name or DEFAULT_COLUMN, embedding_dtype=dtype)
    if columns.embedding is not None:
        return _expand(vectors, files, columns)
    if vectors.find_vectors is not None:
        looked_at = 0
        for file in files:
            names, heads[file] = vectors.find_vectors(file, columns, heads.get(file, b""))
            looked_at += names is not None
            if names or looked_at >= _MOST_WITHOUT_VECTORS:
                return columns._replace(embedding=names[0] if names and len(names) == 1 else DEFAULT_COLUMN)
    return columns._replace(embedding=DEFAULT_COLUMN)


def _expand(vectors: FileFormat, files: Sequence[StoredFile], columns: Columns) -> Columns:
    """Put the names of the columns of items in the place of a pattern for them, unless one column is called so."""
    if isinstance(columns.embedding, tuple):
        if not vectors.holds_columns:
            raise ArgumentError(
                f"embedding_column names {counted(len(columns.embedding), 'column')}, one for each item of the "
                f"vectors: these are read from parquet and arrow files, not from {vectors.name} files; convert them"
            )
        if columns.embedding_dtype is not None:
            raise ArgumentError("embedding_dtype is only for binary columns; columns of items tell their own dtype")
    elif vectors.holds_columns and columns.column.count("*") == 1:
        for file in files:
            names = expand_glob(vectors, file, columns.column)
            if names is not None:
                return (
                    columns
                    if not names
                    else _expand(vectors, files, columns._replace(embedding=names, glob=columns.column))
                )
    return columns


ALL_COLUMNS = ("*",)
"""As ``meta_columns``: all there are."""


def choose_metadata(layout: Format, files: Sequence[StoredFile], columns: Columns) -> Columns:
    """Put the names of all metadata columns in the place of ``ALL_COLUMNS``."""
    if columns.meta != ALL_COLUMNS:
        return columns
    return columns._replace(meta=tuple(metadata_types(layout, files, columns.vectors)))


def metadata_types(layout: Format, files: Sequence[StoredFile], vectors: Sequence[str]) -> dict[str, pa.DataType]:
    """Return the metadata columns of the first of some files that has rows, but for types that no frame holds."""
    in_same_file = layout.metadata == "same"
    schema = first_schema(layout.vectors if in_same_file else PARQUET, files)
    others = {*(vectors if in_same_file else ()), ROW_NUMBER}
    names = Counter(schema.names)
    stored = {
        field.name: field.type
        for field in schema
        if names[field.name] == 1 and field.name not in others and can_be_framed(field.type)
    }
    told = shared_partitions([file.path for file in files])
    return stored | {name: kind for name, kind in told.items() if name not in names and name not in others}


# ---------------------------------------------------------------------------------------------------------------------
# What is joined


class Folder(NamedTuple):
    """What the folder that was named has in one of its own."""

    files: int
    """Files that have rows."""
    rows: int
    """Their rows."""


_SPLITS = frozenset(
    {"train", "test", "val", "valid", "validation", "dev", "query", "queries", "neighbors"}
    | {"base", "learn", "groundtruth", "gt"}  # as in the collections for approximate search
)
_KINDS = re.compile(
    "emb|img|image|text|txt|caption|title|body|quer|question|answer|passage|doc|audio|video|clip|vec", re.IGNORECASE
)


def folders_within(root: str, paths: Sequence[str], rows: Sequence[int]) -> dict[str, Folder]:
    """Return the folders that files lie in below the one that was named, those in that itself under an empty name."""
    inside = root if root.endswith("/") else f"{root}/"
    files, counts = Counter[str](), Counter[str]()
    for path, count in zip(paths, rows, strict=True):
        if count and path.startswith(inside):
            name = path[len(inside) :].rpartition("/")[0].partition("/")[0]
            files[name] += 1
            counts[name] += count
    return {name: Folder(files[name], counts[name]) for name in files}


class Split(NamedTuple):
    """Files that are called as one split is."""

    first: int
    """The position of the first one."""
    rows: int
    """Their rows."""


def joined_splits(root: str, paths: Sequence[str], rows: Sequence[int]) -> dict[str, Split]:
    """Return what files of a folder are called, if all are called as splits are: ``train-00000-of-00002``.

    There are none where that is one, or where the folder is none, but a glob or a file: these were chosen.
    """
    inside = root if root.endswith("/") else f"{root}/"
    found: dict[str, Split] = {}
    for position, (path, count) in enumerate(zip(paths, rows, strict=True)):
        if count and path.startswith(inside):
            words = re.findall("[a-z]+", path.rpartition("/")[2].lower())
            name = next((word for word in words if word in _SPLITS), "")
            if not name:
                return {}
            before = found.get(name, Split(position, 0))
            found[name] = before._replace(rows=before.rows + count)
    return found if len(found) > 1 else {}


def joined_folders(folders: Mapping[str, Folder]) -> dict[str, Folder]:
    """Return the folders whose files are joined, if they look like collections of their own: none in most cases.

    That is where they are called as splits are, or where all have equally many rows, and names that tell what the rows
    are, other than by numbers.
    """
    named = {name: folder for name, folder in folders.items() if name and "=" not in name}
    words = {re.sub("[0-9]+", "", name) for name in named}
    if len(named) < 2 or len(named) < len(folders) or len(words) < len(named):
        return {}
    are_splits = all(name.lower() in _SPLITS for name in named)
    are_alike = len({folder.rows for folder in named.values()}) == 1 and all(map(_KINDS.search, named))
    return named if are_splits or are_alike else {}
