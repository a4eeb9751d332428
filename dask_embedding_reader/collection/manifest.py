"""What a collection is: its files and what each holds, as columns.

Columns, not a list of objects: a collection may have a million files.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.arguments import Source
from dask_embedding_reader._common.cached_property import cached_property
from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.threads import threads_at_once
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.beside import check_finished, read_saved, saved_headers
from dask_embedding_reader.collection.layout import (
    choose_column,
    choose_layout,
    choose_metadata,
    folders_within,
    joined_folders,
    tell_kind,
)
from dask_embedding_reader.collection.pairing import describe_unpaired, pair_files
from dask_embedding_reader.collection.saved import SavedManifest
from dask_embedding_reader.errors import ArgumentError, ColumnError, FileChangedError, MismatchError, NoFilesError
from dask_embedding_reader.formats.base import Columns, FileFormat, FileHeader, Format
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField, merge_columns
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.partitions import partition_types, settled
from dask_embedding_reader.formats.registry import KINDS, all_suffixes, get_file_format
from dask_embedding_reader.storage.find import Finder, Listing, find_sibling
from dask_embedding_reader.storage.retries import hide_secrets
from dask_embedding_reader.storage.store import Store, StoredFile, Version

Int64s = npt.NDArray[np.int64]

_LOCAL_THREADS = 8
_REMOTE_THREADS = 64
"""Headers are waited for, not computed: remote ones above all."""

_MUCH_WAITING = 3
"""Local headers come from memory, mostly: then threads, which take turns, only cost time. From a disk that lets us wait
for so many times as long as we compute, many are read at once."""

_BLOCK_FILES = 64
"""Files that a thread takes at a time: handing over each one alone costs more than reading a local header."""


@dataclass(frozen=True)
class FileTable:
    """The files of a collection, in order, as columns of equal length."""

    stores: tuple[Store, ...]
    """The storages that hold them; most collections have one."""
    store_of: npt.NDArray[np.int16]
    """Which of these each file is in."""
    paths: tuple[str, ...]
    """As the storage spells them."""
    sizes: Int64s
    """Bytes; -1 where the storage does not tell."""
    versions: tuple[Version, ...]
    """Others when the file is another one."""
    offsets: Int64s
    """The first row of each file in the collection, and after the last one the number of rows: one more than files."""
    dimension: int
    """Items in a vector; 0 for files of metadata alone."""
    dtypes: tuple[np.dtype[Any], ...]
    """The dtypes as stored, byte order included."""
    dtype_of: npt.NDArray[np.int16]
    """Which of these each file has."""
    layouts: tuple[tuple[Any, ...], ...]
    """What only the format of the files understands."""
    group_rows: Int64s
    """The rows of every row group (what can only be decoded whole), file after file."""
    first_group: Int64s
    """Where each file's row groups start in ``group_rows``, and where the last one's end."""
    checksums: tuple[str, ...]
    """SHA-256 of each file, where a manifest beside the data tells it; else empty."""
    roots: tuple[str, ...]
    """The folders and files that were named when the collection was opened."""

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"<FileTable of {counted(len(self), 'file')}, {counted(self.count, 'row')}>"

    @property
    def rows(self) -> Int64s:
        """Rows of each file."""
        return np.diff(self.offsets)

    @property
    def count(self) -> int:
        """Rows of all files."""
        return int(self.offsets[-1])

    @property
    def has_groups(self) -> bool:
        """Whether files consist of row groups, which can only be decoded whole."""
        return len(self.group_rows) > 0

    def url(self, position: int) -> str:
        """Spell the path of a file so that it can be opened again."""
        return self.stores[int(self.store_of[position])].url(self.paths[position])

    def header(self, position: int, start: int = 0, stop: int | None = None) -> FileHeader:
        """Return what is known of one file as a small value; of its row groups those in ``[start, stop)``."""
        file = StoredFile(
            self.stores[self.store_of[position]],
            self.paths[position],
            self.versions[position],
        )
        rows = int(self.offsets[position + 1] - self.offsets[position])
        groups, first, first_row = self._groups(position, start, rows if stop is None else stop)
        return FileHeader(
            file,
            rows,
            self.dimension,
            self.dtypes[self.dtype_of[position]],
            self.layouts[position],
            groups,
            first,
            first_row,
            partitions=self.partitions,
        )

    @cached_property
    def partitions(self) -> tuple[tuple[str, str], ...]:
        """The columns that the folders of some files tell, and their types."""
        return tuple(partition_types(self.paths).items())

    def _groups(self, position: int, start: int, stop: int) -> tuple[tuple[int, ...], int, int]:
        """Return the row groups of a file in ``[start, stop)``: their rows, the first one, and the row it starts at."""
        low, high = int(self.first_group[position]), int(self.first_group[position + 1])
        if low == high:
            return (), 0, 0
        bounds = self._group_bounds[low : high + 1] - self._group_bounds[low]
        first = max(0, int(bounds.searchsorted(start, "right")) - 1)
        last = int(bounds.searchsorted(stop, "left"))
        return tuple(self.group_rows[low + first : low + last].tolist()), first, int(bounds[first])

    @cached_property
    def _group_bounds(self) -> Int64s:
        """Where row groups start, counted over all files, and after the last one the end."""
        return np.concatenate([[0], np.cumsum(self.group_rows)]).astype(np.int64)

    @cached_property
    def token(self) -> str:
        """A hash of paths, versions and rows: equal in every process, another one when a file changes."""
        digest = hashlib.blake2b(digest_size=16)
        versions = (version.everywhere for version in self.versions)
        for text in (*(store.key for store in self.stores), *self.paths, *versions, *map(str, self.dtypes)):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        for column in (self.store_of, self.offsets, self.dtype_of):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def __dask_tokenize__(self) -> object:
        return "FileTable", self.token


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
    saved = None
    if file_format is None:
        file_format, saved = _choose_layout(
            sources, columns, metadata_sources, storage_options, finder, unfinished=unfinished
        )
        _check_dtype(file_format, columns)
    if file_format.metadata == "none":
        columns = columns._replace(meta=())
    vectors = file_format.vectors
    found = finder.find(sources, vectors.suffixes, storage_options, first_nbytes=vectors.first_nbytes)
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
    columns = choose_column(vectors, found.files, heads, [manifest for _, manifest in saved], columns)
    columns = choose_metadata(file_format, found.files if partners is None else partners.files, columns)
    own_columns = columns if file_format.metadata == "same" else columns._replace(meta=())
    known = saved_headers(saved, found.files, vectors.suffixes, own_columns)
    try:
        headers = _read_headers(vectors, found.files, own_columns, show_progress, known, heads)
    except ColumnError as error:
        lacking = next((file for file in found.files if str(error).startswith(file.url)), found.files[0])
        alike = next((named for file in found.files if (named := _named_alike(file, lacking))), "")
        if not alike:
            raise
        raise ColumnError(f"{error}. If it does not belong to the others, name these by a glob{alike}") from error
    metadata = None
    if partners is not None:
        paired = pair_files(found.files, partners.files, (found.roots, partners.roots))
        known = saved_headers(saved, paired, PARQUET.suffixes, Columns(meta=columns.meta))
        metadata = _read_headers(PARQUET, paired, Columns(meta=columns.meta), show_progress, known), partners.roots
    columns = columns._replace(glob="")  # as if they had been listed
    manifest = make_manifest(file_format, columns, (headers, found.roots), metadata)
    _warn_of_joined(manifest.vectors)
    return manifest


def _warn_of_joined(files: FileTable) -> None:
    """Name the folders whose files are joined, where they look like collections of their own."""
    for root in files.roots:
        if joined := joined_folders(folders_within(root, files.paths, files.rows.tolist())):
            shown = ", ".join(f"{name} ({counted(folder.rows, 'row')})" for name, folder in joined.items())
            url = hide_secrets(root)
            warnings.warn(
                f"{url!r} joins the files of folders that look like collections of their own: {shown}; name one of "
                f"them, as in {url + '/' + next(iter(joined))!r}, or a list of those to be joined. For the same rows "
                "of several of them open a reader of each",
                stacklevel=5,
            )


def _choose_layout(
    sources: Sequence[Source],
    columns: Columns,
    metadata_sources: Sequence[Source] | None,
    storage_options: Mapping[str, Any] | None,
    finder: Finder,
    *,
    unfinished: bool,
) -> tuple[Format, list[tuple[StoredFile, SavedManifest]] | None]:
    """List the files, and choose the format by what there is; return the manifests beside them, too, if it was read."""
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
    return layout, saved


def _find_metadata(
    vectors: FileFormat, sources: Sequence[Source], storage_options: Mapping[str, Any] | None, finder: Finder
) -> Listing:
    """Find the metadata of npy files where nobody says where it is: in the same folders."""
    try:
        return finder.find(sources, PARQUET.suffixes, storage_options, named=False)
    except NoFilesError as error:
        likely = find_sibling(sources[0], re.compile("meta"), storage_options)
        remedy = f"is it metadata_folder={likely!r}?" if likely else "say where it is: metadata_folder=..."
        raise NoFilesError(
            f"no metadata found: {hide_secrets(os.fspath(sources[0]))!r} holds no .parquet file beside its "
            f'{vectors.name} files; {remedy} (file_format="{vectors.name}" reads the vectors alone)'
        ) from error


def _warn_of_empty(source: Source) -> None:
    warnings.warn(
        f"{hide_secrets(os.fspath(source))!r} holds no file of this format and is passed over; the rows are those of "
        "the other sources",
        stacklevel=5,
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
    table = _table(headers, vectors[1])
    if not table.count:
        raise NoFilesError(
            f"no embeddings: {counted(len(headers), f'{file_format.vectors.name} file')} without rows (such as "
            f"{headers[0].file.url})"
        )
    metadata_files, fields = table if file_format.metadata == "same" else None, []
    if metadata is not None:
        _check_rows(headers, metadata[0])
        metadata_files = _table(*metadata)
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


def _read_headers(
    vectors: FileFormat,
    files: Sequence[StoredFile],
    columns: Columns,
    show_progress: bool,
    known: Mapping[StoredFile, FileHeader],
    heads: Mapping[StoredFile, bytes] = MappingProxyType({}),
) -> list[FileHeader]:
    """Read the headers of many files at once, in order; those that are known already are taken as they are."""
    if known:
        unknown = [file for file in files if file not in known]
        read = iter(_read_headers(vectors, unknown, columns, show_progress, {}, heads) if unknown else ())
        return [known.get(file) or next(read) for file in files]
    local = all(file.store.is_local for file in files)
    per_block = _BLOCK_FILES if local else 1
    blocks = [files[first : first + per_block] for first in range(0, len(files), per_block)]

    def read_block(block: Sequence[StoredFile]) -> list[FileHeader]:
        return [vectors.read_header(file, columns, heads.get(file, b"") if heads else b"") for file in block]

    headers: list[FileHeader] = []
    rest = deque(blocks)
    with progress_bar(show_progress, len(files), "opening", " files") as progress:
        waits = not local
        while rest and not waits:
            began, worked = time.perf_counter(), time.thread_time()
            block = read_block(rest.popleft())
            waits = time.perf_counter() - began > _MUCH_WAITING * (time.thread_time() - worked)
            headers += block
            progress.update(len(block))
        if rest:
            with threads_at_once(min(len(rest), _LOCAL_THREADS if local else _REMOTE_THREADS)) as pool:
                for block in pool.map(read_block, rest):
                    headers += block
                    progress.update(len(block))
    return headers


def _check_alike(headers: Sequence[FileHeader]) -> None:
    """Check that all files with rows hold vectors of one dimension and dtype (in either byte order)."""

    def kinds() -> Iterator[tuple[int, np.dtype[Any]]]:
        return ((header.dimension, header.dtype.newbyteorder("=")) for header in headers if header.rows)

    counts = Counter(kinds())
    if len(counts) <= 1:
        return
    (dimension, dtype), most = counts.most_common(1)[0]
    odd = next(h for h in headers if h.rows and (h.dimension, h.dtype.newbyteorder("=")) != (dimension, dtype))
    like = next(h for h in headers if h.rows and (h.dimension, h.dtype.newbyteorder("=")) == (dimension, dtype))
    raise MismatchError(
        f"{odd.file.url} holds {counted(odd.rows, 'vector')} of {odd.dimension} x "
        f"{odd.dtype.newbyteorder('=')}, but {most} of "
        f"{sum(counts.values())} files hold {dimension} x {dtype} (such as {like.file.url}); open them as separate "
        f"collections{_named_alike(like.file, odd.file)}, or write the file again"
    )


def _named_alike(wanted: StoredFile, other: StoredFile) -> str:
    """Spell a glob that names files like one, and not the other; nothing where there is none."""
    folder, _, name = wanted.url.rpartition("/")
    pattern = re.sub("[0-9].*(?=[.])", "*", name)
    if pattern == name or fnmatch.fnmatch(other.url.rpartition("/")[2], pattern):
        if folder == other.url.rpartition("/")[0]:
            return ""
        pattern = "*" + os.path.splitext(name)[1]
    return f", such as {hide_secrets(f'{folder}/{pattern}')!r}"


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


def _table(headers: Sequence[FileHeader], roots: Sequence[str]) -> FileTable:
    """Turn headers into columns."""
    store_ids: dict[Store, int] = {}
    store_of = [store_ids.setdefault(h.file.store, len(store_ids)) for h in headers]
    dtype_ids: dict[np.dtype[Any], int] = {}
    dtype_of = [dtype_ids.setdefault(header.dtype, len(dtype_ids)) for header in headers]
    layouts: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # most files have the same: one value for all of them
    return FileTable(
        stores=tuple(store_ids),
        store_of=np.array(store_of, np.int16),
        paths=tuple(header.file.path for header in headers),
        sizes=np.array([header.file.size for header in headers], np.int64),
        versions=tuple(header.file.version for header in headers),
        offsets=np.cumsum([0, *(header.rows for header in headers)], dtype=np.int64),
        dimension=next((header.dimension for header in headers if header.rows), 0),
        dtypes=tuple(dtype_ids),
        dtype_of=np.array(dtype_of, np.int16),
        layouts=tuple(layouts.setdefault(header.layout, header.layout) for header in headers),
        group_rows=np.array([rows for header in headers for rows in header.group_rows], np.int64),
        first_group=np.cumsum([0, *(len(header.group_rows) for header in headers)], dtype=np.int64),
        checksums=tuple(header.checksum for header in headers),
        roots=tuple(roots),
    )
