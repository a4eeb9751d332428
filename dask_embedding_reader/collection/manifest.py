"""What a collection is: its files and what each holds."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dask_embedding_reader._common.arguments import Source
from dask_embedding_reader._common.notices import warn
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.beside import check_finished, read_saved, saved_headers
from dask_embedding_reader.collection.files import FileTable, file_table
from dask_embedding_reader.collection.headers import read_headers
from dask_embedding_reader.collection.layout import (
    choose_column,
    choose_layout,
    choose_metadata,
    folders_within,
    joined_folders,
    joined_splits,
    tell_kind,
)
from dask_embedding_reader.collection.pairing import describe_unpaired, pair_files
from dask_embedding_reader.collection.saved import SavedManifest
from dask_embedding_reader.errors import ArgumentError, ColumnError, FileChangedError, MismatchError, NoFilesError
from dask_embedding_reader.formats.base import Columns, FileFormat, FileHeader, Format
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField, merge_columns
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.partitions import settled
from dask_embedding_reader.formats.registry import KINDS, all_suffixes, get_file_format
from dask_embedding_reader.storage.find import MANIFEST_NAMES, Finder, Listing, find_sibling, text_remedy
from dask_embedding_reader.storage.names import numbered_alike
from dask_embedding_reader.storage.retries import hide_secrets
from dask_embedding_reader.storage.store import StoredFile, shown_url


@dataclass(frozen=True)
class Manifest:
    """What a collection is."""

    format: Format
    """How its files are laid out."""
    columns: Columns
    """Which columns were asked for."""
    vectors: FileTable
    """The files that hold vectors."""
    metadata: FileTable | None
    """The files that hold metadata, one for each file of ``vectors``, with the same rows (in the parquet format, the
    very same files), or one with the rows of all; None where no metadata was asked for."""
    fields: tuple[MetaField, ...]
    """The metadata columns."""
    dtype: np.dtype[Any]
    """The stored dtype of the vectors, in native byte order."""
    metadata_files: FileTable | None = None
    """As ``metadata``, but whether metadata was asked for or not; None where the format has none."""
    passes_over: bool = False
    """Whether there are parquet files beside those of vectors, which may hold metadata that nobody asked for."""

    def __sizeof__(self) -> int:
        """Return the bytes that are held."""
        tables = {id(table): table for table in (self.vectors, self.metadata, self.metadata_files)}
        return object.__sizeof__(self) + sum(map(sys.getsizeof, tables.values()))

    @property
    def count(self) -> int:
        """Rows."""
        return self.vectors.count

    @property
    def dimension(self) -> int:
        """Items in a vector."""
        return self.vectors.dimension

    @property
    def vectors_name(self) -> str | None:
        """The column, array or tensor that holds the vectors; None where files hold nothing else."""
        if self.format.vectors.find_vectors is None or not self.columns.vectors:
            return None
        first, *others = self.columns.vectors
        return f"{first}, ..., {others[-1]}" if others else first

    @property
    def byte_per_item(self) -> int:
        """Stored bytes of one vector."""
        return self.dimension * self.dtype.itemsize

    def with_columns(self, names: Sequence[str]) -> Manifest:
        """Return the same with some of its metadata columns: no other one is read."""
        fields = {field.name: field for field in self.fields}
        return replace(
            self,
            columns=self.columns._replace(meta=tuple(names)),
            fields=tuple(fields[name] for name in names),
            metadata=self.metadata if names else None,
        )

    @property
    def token(self) -> str:
        """A hash that changes when a file changes or another column is asked for."""
        parts = [self.vectors.token, self.metadata.token if self.metadata else "", repr(self.columns)]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def __dask_tokenize__(self) -> object:
        return "Manifest", self.format.name, self.token


def read_manifest(
    file_format: Format | None,
    sources: Sequence[Source],
    columns: Columns,
    metadata_sources: Sequence[Source] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    metadata_storage_options: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    *,
    unfinished: bool = False,
) -> Manifest:
    """Find the files of a collection and read their headers, as far as no manifest beside them holds these.

    What there is says which format and which column of vectors these are, if nobody else does (None for either); see
    :mod:`~dask_embedding_reader.collection.layout`, also for all metadata columns (``ALL_COLUMNS``). Those that the
    format does not have are left out, and so are folders of metadata. A collection that is being written is refused,
    unless ``unfinished``.

    Raises
    ------
    NoFilesError
        If nothing is found, or nothing but empty files.
    FormatError
        If a file is not what its name says.
    MismatchError
        If files do not belong together.
    ColumnError
        If a column is missing.
    ReadError
        If the collection is being written, or its writing was interrupted.
    FileChangedError
        If files have gone that the manifest beside the others names.
    ArgumentError
        If the format cannot be told, or files of this format tell the dtype that is given.
    """
    if file_format is not None:
        _check_dtype(file_format, columns)
    if ROW_NUMBER in columns.meta:
        raise ColumnError(
            f"the metadata column {ROW_NUMBER!r} cannot be read: that name stands for the global row number; "
            "rename the column in the files, or leave it out of meta_columns"
        )

    def read(finder: Finder) -> Manifest:
        return _read_manifest(
            file_format,
            sources,
            columns,
            metadata_sources,
            storage_options,
            metadata_storage_options,
            show_progress,
            finder,
            unfinished=unfinished,
        )

    try:
        return read(Finder())
    except FileChangedError:
        # A writer that comes to its end while its folder is listed, page by page: its manifest names more files than
        # the listing. What is missing, or changes, the second time is not coming.
        return read(Finder())


def _check_dtype(file_format: Format, columns: Columns) -> None:
    if columns.embedding_dtype is not None and file_format.vectors.tells_dtype:
        raise ArgumentError(
            "embedding_dtype is only for files that do not tell their dtype, such as parquet with a binary column; "
            f"{file_format.name} files do"
        )


def _read_manifest(
    file_format: Format | None,
    sources: Sequence[Source],
    columns: Columns,
    metadata_sources: Sequence[Source] | None,
    storage_options: Mapping[str, Any] | None,
    metadata_storage_options: Mapping[str, Any] | None,
    show_progress: bool,
    finder: Finder,
    *,
    unfinished: bool,
) -> Manifest:
    saved, passes_over = None, False
    if file_format is None:
        file_format, kinds, saved = _choose_layout(
            sources, columns, metadata_sources, storage_options, finder, unfinished=unfinished
        )
        passes_over = file_format.metadata == "none" and PARQUET.name in kinds
        _check_dtype(file_format, columns)
    if file_format.metadata == "none":
        columns = columns._replace(meta=())
    vectors = file_format.vectors
    found = finder.find(sources, vectors.suffixes, storage_options, first_nbytes=vectors.first_nbytes)
    if own := next((file for file in found.files if file.path.rpartition("/")[2] in MANIFEST_NAMES), None):
        raise ArgumentError(
            f"{own.url} is a manifest, which names files and holds no vectors; open its folder, or the manifest "
            "by EmbeddingReader.from_manifest"
        )
    if not unfinished:
        check_finished(found.own)
    partners, empty = None, found.empty
    if file_format.metadata == "beside":
        # Before any header is read: if files are replaced between two listings, an old one's is not there any more.
        if metadata_sources is None:
            partners = _find_metadata(vectors, sources, storage_options, finder)
            empty = [source for source in empty if source in partners.empty]
        else:
            options = storage_options if metadata_storage_options is None else metadata_storage_options
            partners = finder.find(metadata_sources, PARQUET.suffixes, options)
            empty = [*empty, *partners.empty]
        if not unfinished:
            check_finished(partners.own)
    for source in empty:
        _warn_of_empty(source)
    heads = dict(found.heads) if vectors.first_nbytes else {}  # they are the first bytes
    if saved is None:
        saved = read_saved(found.own)
    is_chosen = columns.embedding is None
    columns = choose_column(vectors, found.files, heads, [manifest for _, manifest in saved], columns)
    columns = choose_metadata(file_format, found.files if partners is None else partners.files, columns)
    own_columns = columns if file_format.metadata == "same" else columns._replace(meta=())
    known = saved_headers(saved, found.files, vectors.suffixes, own_columns)
    try:
        headers = read_headers(vectors, found.files, own_columns, show_progress, known, heads)
    except ColumnError as error:
        lacking = next((file for file in found.files if str(error).startswith(file.url)), found.files[0])
        other = next((file for file in found.files if _named_alike(file, lacking)), None)
        if other is None:
            raise
        globs = [_named_alike(other, lacking), _named_alike(lacking, other)]
        remedy = f"If it does not belong to the others, name these by a glob, such as {globs[0]!r}"
        if is_chosen:  # by the first file, which may be the one that does not belong
            shown = " or ".join(repr(glob) for glob in globs if glob)
            remedy = f"If these are files of several collections, name those of one by a glob, such as {shown}"
        raise ColumnError(f"{error}. {remedy}") from error
    metadata = None
    if partners is not None:
        paired = pair_files(found.files, partners.files, (found.roots, partners.roots))
        known = saved_headers(saved, paired, PARQUET.suffixes, Columns(meta=columns.meta))
        metadata = read_headers(PARQUET, paired, Columns(meta=columns.meta), show_progress, known), partners.roots
    columns = columns._replace(glob="")  # as if they had been listed
    manifest = make_manifest(file_format, columns, (headers, found.roots), metadata)
    manifest = replace(manifest, passes_over=passes_over)
    _warn_of_joined(manifest.vectors)
    return manifest


def _warn_of_joined(files: FileTable) -> None:
    """Name the folders or files that are joined, where they look like collections of their own."""
    rows = files.rows.tolist()
    for root in files.roots:
        folders = joined_folders(folders_within(root, files.paths, rows))
        splits = {} if folders else joined_splits(root, files.paths, rows)
        if not folders and not splits:
            continue
        position = next(k for k, path in enumerate(files.paths) if path.startswith(root))
        url = shown_url(files.stores[files.store_of[position]], root)
        if folders:
            what, one = "folders", f"{url}/{next(iter(folders))}"
        else:
            what, one = "splits", numbered_alike(files.header(next(iter(splits.values())).first).file.url)
        counts = {name: folder.rows for name, folder in (folders or splits).items()}
        shown = ", ".join(f"{name} ({counted(count, 'row')})" for name, count in counts.items())
        warn(
            f"{url!r} joins the files of {what} that look like collections of their own: {shown}; name one of them, as "
            f"in {one!r}, or a list of those to be joined. For the same rows of several of them open a reader of each",
        )


def _choose_layout(
    sources: Sequence[Source],
    columns: Columns,
    metadata_sources: Sequence[Source] | None,
    storage_options: Mapping[str, Any] | None,
    finder: Finder,
    *,
    unfinished: bool,
) -> tuple[Format, list[str], list[tuple[StoredFile, SavedManifest]] | None]:
    """List the files, and choose the format by what there is.

    Return the kinds of files that there are, too, and the manifests beside them, if these were read.
    """
    formats = [get_file_format(name) for name in KINDS]
    first_nbytes = max(each.first_nbytes for each in formats)
    suffixes_of = {each.name: each.suffixes for each in formats}
    kinds, own = finder.find_kinds(sources, suffixes_of, storage_options, first_nbytes=first_nbytes)
    if not unfinished:
        check_finished(own)
    if not kinds:
        finder.find(sources, all_suffixes(), storage_options)  # says that there is none
    if kinds == [""]:
        found = finder.find(sources, all_suffixes(), storage_options)
        kinds = [tell_kind(found.files[0], found.heads.get(found.files[0], b""))]
    # Where metadata is elsewhere, that is listed before any manifest is read.
    saved = read_saved(own) if metadata_sources is None else None
    layout = choose_layout(
        [kind for kind in kinds if kind],
        [manifest for _, manifest in saved or ()],
        hide_secrets(os.fspath(sources[0])),
        wants_metadata=bool(columns.meta),
        has_metadata_folder=metadata_sources is not None,
    )
    return layout, kinds, saved


def _find_metadata(
    vectors: FileFormat, sources: Sequence[Source], storage_options: Mapping[str, Any] | None, finder: Finder
) -> Listing:
    """Find the metadata of npy files where nobody says where it is: in the same folders."""
    try:
        return finder.find(sources, PARQUET.suffixes, storage_options, named=False)
    except NoFilesError as error:
        likely = likely_metadata_folder(sources[0], storage_options)
        remedy = f"is it metadata_folder={likely!r}?" if likely else "say where it is: metadata_folder=..."
        if text := text_remedy(finder.names(sources[0], storage_options)):
            remedy = f"what there is as text is not read: {text}"
        raise NoFilesError(
            f"no metadata found: {hide_secrets(os.fspath(sources[0]))!r} holds no .parquet file beside its "
            f'{vectors.name} files; {remedy} (file_format="{vectors.name}" reads the vectors alone)'
        ) from error


def likely_metadata_folder(source: Source, storage_options: Mapping[str, Any] | None) -> str | None:
    """Return a folder beside the one of vectors that may be the one of their metadata, by its name."""
    return find_sibling(source, re.compile("meta"), storage_options)


def _warn_of_empty(source: Source) -> None:
    warn(
        f"{hide_secrets(os.fspath(source))!r} holds no file of this format and is passed over; the rows are those of "
        "the other sources",
    )


Headers = tuple[Sequence[FileHeader], Sequence[str]]
"""Headers, and the folders and files that were named to find them."""


def make_manifest(file_format: Format, columns: Columns, vectors: Headers, metadata: Headers | None) -> Manifest:
    """Make one collection of files whose headers are known.

    Raises
    ------
    NoFilesError
        If they have no rows.
    MismatchError
        If they do not belong together.
    """
    headers = _grouped(vectors[0])
    _check_alike(headers)
    table = file_table(headers, vectors[1])
    if not table.count:
        raise NoFilesError(
            f"no embeddings: {counted(len(headers), f'{file_format.vectors.name} file')} without rows (such as "
            f"{headers[0].file.url})"
        )
    metadata_files, fields = table if file_format.metadata == "same" else None, []
    if metadata is not None:
        _check_rows(headers, metadata[0])
        metadata_files = file_table(*metadata)
    if columns.meta:
        partners = headers if metadata is None else metadata[0]
        filled = [header for header in partners if header.rows]  # others may have columns of any type
        partitions = () if metadata_files is None else metadata_files.partitions
        metas = settled(columns.meta, partitions, [h.file.path for h in filled], [h.meta for h in filled])
        fields = merge_columns(columns.meta, [h.file.url for h in filled], metas)
    dtype = next(header.dtype for header in headers if header.rows).newbyteorder("=")
    metadata_table = metadata_files if columns.meta else None
    return Manifest(file_format, columns, table, metadata_table, tuple(fields), dtype, metadata_files)


def _grouped(headers: Sequence[FileHeader]) -> Sequence[FileHeader]:
    """Where some files can only be decoded whole, take those whose rows can be read one by one for one such part."""
    if not any(header.group_rows for header in headers):
        return headers
    return [
        header._replace(group_rows=(header.rows,)) if header.rows and not header.group_rows else header
        for header in headers
    ]


def _check_alike(headers: Sequence[FileHeader]) -> None:
    """Check that all files with rows hold vectors of one dimension and dtype (in either byte order)."""
    counts = Counter[tuple[int, np.dtype[Any]]]()
    # Those of equal bytes first: each dtype that is made anew would be hashed for 1 us.
    for (dimension, dtype), files in Counter((h.dimension, h.dtype) for h in headers if h.rows).items():
        counts[dimension, dtype.newbyteorder("=")] += files
    if len(counts) <= 1:
        return
    (dimension, dtype), most = counts.most_common(1)[0]
    odd = next(h for h in headers if h.rows and (h.dimension, h.dtype.newbyteorder("=")) != (dimension, dtype))
    like = next(h for h in headers if h.rows and (h.dimension, h.dtype.newbyteorder("=")) == (dimension, dtype))
    such = f", such as {glob!r}" if (glob := _named_alike(like.file, odd.file)) else ""
    raise MismatchError(
        f"{odd.file.url} holds {counted(odd.rows, 'vector')} of {odd.dimension} x "
        f"{odd.dtype.newbyteorder('=')}, but {most} of "
        f"{sum(counts.values())} files hold {dimension} x {dtype} (such as {like.file.url}); open them as separate "
        f"collections{such}, or write the file again"
    )


def _named_alike(wanted: StoredFile, other: StoredFile) -> str:
    """Write out a glob that names files like one, and not the other; nothing where there is none."""
    (folder, _, name), (other_folder, _, other_name) = (file.url.rpartition("/") for file in (wanted, other))
    pattern = numbered_alike(name)
    if folder == other_folder and pattern.startswith("*"):  # a name of a number alone
        pattern = f"[0-9]{pattern}"
    if folder != other_folder and (pattern == name or fnmatch.fnmatch(other_name, pattern)):
        pattern = "*" + os.path.splitext(name)[1]
    elif fnmatch.fnmatch(other_name, pattern):
        return ""
    return f"{folder}/{pattern}"


def _check_rows(headers: Sequence[FileHeader], partners: Sequence[FileHeader]) -> None:
    if len(partners) == 1 < len(headers):
        rows = sum(header.rows for header in headers)
        if partners[0].rows != rows:
            raise MismatchError(
                f"{partners[0].file.url} is the only file of metadata, and has {counted(partners[0].rows, 'row')}, but "
                f"the {len(headers):,} files of vectors have {rows:,} together; "
                + describe_unpaired([header.file for header in headers], [partners[0].file])
            )
        return
    for header, partner in zip(headers, partners, strict=True):
        if header.rows != partner.rows:
            raise MismatchError(
                f"{header.file.url} has {counted(header.rows, 'row')}, but its metadata {partner.file.url} has "
                f"{partner.rows:,}; they must be row for row the same: check which files belong together"
            )
