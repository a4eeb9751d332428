"""What is known of a collection as a parquet file, so that opening again reads that and no header.

It holds no URL and no secret: files are named by their path below the folder that the collection was opened from. And
it opens nothing: whoever reads it says where that folder is, and a path that would lead out of it is refused.
"""

from __future__ import annotations

import base64
import json
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.base import Columns, FileFormat, FileHeader, MetaColumn
from dask_embedding_reader.formats.parquet.footer import parse_footer
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.parquet.page_headers import (
    PLAIN,
    PLAIN_DICTIONARY,
    RLE,
    RLE_DICTIONARY,
    iter_page_heads,
)
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import Store, StoredFile, Version

VECTORS, METADATA = "vectors", "metadata"

_KEY = b"dask_embedding_reader"
_VERSION = 2
_EARLIER_VERSION = 1
_MOST_ROWS = 2**53

MOST_FILE_NBYTES = 2**28
"""A larger one beside the data is not read: it would name 7 million files with checksums, or be a hole in a disk."""

_MOST_NBYTES = 2**26
_MOST_TIMES = 500
_MOST_FILES = 8
"""What a manifest may take in memory, in bytes and in times its own size, and how many files it may name for each of
its bytes. Of a million files it takes 0.7 bytes each where their names are numbers, 1.7 with a path of 200 characters
before these, and 190 times as much when it is decoded. More is an attack: a few kB can claim gigabytes."""

_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("source", pa.int64()),
        ("path", pa.binary()),  # names of files need not be UTF-8
        ("size", pa.int64()),
        ("fingerprint", pa.string()),
        ("checksum", pa.string()),
        ("rows", pa.int64()),
        ("dimension", pa.int64()),
        ("dtype", pa.string()),
        ("layout", pa.string()),
        ("group_rows", pa.list_(pa.int64())),
        ("columns", pa.int64()),
    ]
)


_EARLIER_SCHEMA = pa.schema(
    [field for field in _SCHEMA if field.name in ("kind", "source", "path", "size", "fingerprint", "checksum")]
    + [field for field in _SCHEMA if field.name in ("rows", "dimension", "dtype")]
    + [pa.field("data_offset", pa.int64()), pa.field("fortran_order", pa.bool_())]
    + [field for field in _SCHEMA if field.name in ("group_rows", "columns")]
)
"""The version before had two columns for what only npy files have: their layout."""

_TEXTS = ["kind", "path", "fingerprint", "checksum", "dtype", "layout"]


class SavedFile(NamedTuple):
    """One file of a saved manifest."""

    kind: str
    """``VECTORS``, or ``METADATA`` for the parquet files beside npy files."""
    source: int
    """Which of the folders, or files, that the collection was opened from; those of its metadata come after them."""
    path: str
    """Its path below that; empty if it is that itself."""
    header: FileHeader
    """What the file says of itself."""


class SavedManifest(NamedTuple):
    """The content of a saved manifest."""

    file_format: str
    """How the files are laid out."""
    columns: Columns
    """The columns that are described."""
    sources: int
    """How many folders or files the collection was opened from."""
    metadata_sources: int
    """The same for its metadata; 0 where these are the same."""
    written: Mapping[str, Any] | None
    """How it was written, if by this library."""
    files: list[SavedFile]
    """The files, in order."""


Locate = Callable[[int, str], tuple[Store, str] | None]
"""Given a source and the path below it, returns where a file is; None for a file that is not wanted."""


def encode_manifest(manifest: SavedManifest) -> bytes:
    """Return the content of the file."""
    headers = [file.header for file in manifest.files]
    names: dict[tuple[MetaColumn, ...], int] = {}
    kinds = [names.setdefault(header.meta, len(names)) for header in headers]
    facts = {
        "version": _VERSION,
        "file_format": manifest.file_format,
        "embedding_column": manifest.columns.embedding,
        "embedding_dtype": None if manifest.columns.embedding_dtype is None else manifest.columns.embedding_dtype.str,
        "sources": manifest.sources,
        "metadata_sources": manifest.metadata_sources,
        "columns": [_encode_columns(manifest.columns.meta, columns) for columns in names],
        "written": manifest.written,
    }
    columns = {
        "kind": [file.kind for file in manifest.files],
        "source": [file.source for file in manifest.files],
        "path": [_encode(file.path) for file in manifest.files],
        "size": [header.file.size for header in headers],
        "fingerprint": [str(header.file.version.lasting) for header in headers],
        "checksum": [header.checksum for header in headers],
        "rows": [header.rows for header in headers],
        "dimension": [header.dimension for header in headers],
        "dtype": [header.dtype.str for header in headers],
        "layout": [json.dumps(header.layout) for header in headers],
        "group_rows": [header.group_rows for header in headers],
        "columns": kinds,
    }
    table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({_KEY: json.dumps(facts)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def _encode(path: str) -> bytes:
    """Write out a path, with all that Python puts in the place of what is no text."""
    return path.encode("utf-8", "surrogatepass")


def _encode_columns(names: Sequence[str], columns: Sequence[MetaColumn]) -> str:
    """Write out the columns of a file; files of vectors alone have none, whatever the names."""
    fields = [pa.field(name, column.type, column.has_nulls) for name, column in zip(names, columns, strict=False)]
    return base64.b64encode(pa.schema(fields).serialize()).decode()


def decode_manifest(data: bytes, where: str, locate: Locate) -> SavedManifest:
    """Read the content of the file, trusting none of it: where files are is asked only of paths within the folder.

    Raises
    ------
    FormatError
        If it is damaged, of another version, or would lead out of the folder.
    """
    try:
        schema = _check_size(where, data)
        file = pq.ParquetFile(
            pa.BufferReader(data),
            # As many bytes as are stored, however often each is used.
            read_dictionary=[name for name in _TEXTS if name in schema.names],
            page_checksum_verification=True,
        )
        # In no thread of Arrow's, as ``pq.read_table`` does: one that lets go of Python's bytes while Python ends takes
        # the process with it ("terminate called without an active exception", one convert in ten on a busy machine).
        table = file.read(schema.names, use_threads=False)
        facts = json.loads((table.schema.metadata or {})[_KEY])
        if facts["version"] != (_VERSION if schema is _SCHEMA else _EARLIER_VERSION):
            _fail(where, f"is of version {facts['version']!r}, this library reads {_EARLIER_VERSION} and {_VERSION}")
        schemas = [pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text))) for text in facts["columns"]]
        dtype = None if facts["embedding_dtype"] is None else _numeric(where, facts["embedding_dtype"])
        meta = [tuple(MetaColumn(field.type, field.nullable) for field in schema) for schema in schemas]
        if len({tuple(schema.names) for schema in schemas if len(schema)}) > 1:
            _fail(where, "describes different columns in different files")
        sources, metadata_sources = int(facts["sources"]), int(facts["metadata_sources"])
        files = _decode_files(
            dict(zip(schema.names, _decode_columns(where, table, schema, len(data)), strict=True)),
            where,
            get_format(facts["file_format"]).vectors,
            meta,
            range(sources + metadata_sources),
            locate,
        )
        embedding = _vectors(where, facts["embedding_column"])
        written = facts["written"]
        if not (written is None or isinstance(written, dict)):
            _fail(where, "does not say how it was written")
        columns = Columns(embedding, dtype, max((tuple(schema.names) for schema in schemas), default=()))
        _check_columns(where, facts["file_format"], columns.meta, files)
        return SavedManifest(facts["file_format"], columns, sources, metadata_sources, written, files)
    except _UnusableError:
        raise
    except Exception as error:
        raise FormatError(
            f"{where}: not a readable manifest: {describe(error)}; remove it, and save it again"
        ) from error


def _vectors(where: str, named: Any) -> str | tuple[str, ...] | None:
    """Return the column of vectors, or those of their items."""
    if named is None or isinstance(named, str):
        return named
    names = named if isinstance(named, list) else []
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        _fail(where, f"names the column of vectors {named!r}")
    return tuple(names)


def _most_nbytes(data_nbytes: int) -> int:
    return _MOST_NBYTES + _MOST_TIMES * data_nbytes


def _check_size(where: str, data: bytes) -> pa.Schema:
    """Refuse what would take much more memory than a manifest can, before any of it is decoded; return its columns."""
    footer_start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if data[-4:] != b"PAR1" or footer_start < 4:
        _fail(where, "is no parquet file, or was cut short")
    footer = parse_footer(where, data[footer_start:], footer_start)
    schema = _EARLIER_SCHEMA if "data_offset" in footer.schema.arrow.names else _SCHEMA
    kinds = [6 if name in _TEXTS else 0 if name == "fortran_order" else 2 for name in schema.names]
    if footer.schema.arrow.names != schema.names or len(footer.schema.paths) != len(kinds):
        _fail(where, f"has the columns {', '.join(footer.schema.paths)[:200]}, not those of a manifest")
    nbytes, most = 0, _most_nbytes(len(data))
    if (rows := sum(footer.group_rows)) > _MOST_FILES * len(data):
        _fail(where, f"claims to name {rows:,} files, but has {len(data):,} bytes")
    for leaf, kind in enumerate(kinds):
        for chunk in footer.chunks(leaf):
            if chunk.kind != kind:
                _fail(where, "has a column of another type than those of manifests")
            for page in iter_page_heads(data, chunk.start, chunk.stop):
                nbytes += page.nbytes + 8 * page.values
                if page.encoding not in (PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY):
                    _fail(where, f"has pages in an encoding ({page.encoding}) that manifests are not written in")
                if nbytes > most:
                    _fail(
                        where,
                        f"claims to hold more than {most:,} bytes, but has {len(data):,}",
                    )
    return schema


def _decode_columns(where: str, table: pa.Table, schema: pa.Schema, data_nbytes: int) -> Iterator[list[Any]]:
    """Yield the columns as Python values."""
    if any(column.null_count for column in table.columns):
        _fail(where, "lacks values")
    nbytes = 0
    for field in schema:
        if field.name not in _TEXTS:
            yield table[field.name].cast(field.type).to_pylist()
            continue
        values: list[str] = []
        for chunk in table[field.name].chunks:
            distinct = [
                text.decode("utf-8", "surrogatepass") if isinstance(text, bytes) else text
                for text in chunk.dictionary.to_pylist()
            ]
            values += [distinct[index] for index in chunk.indices.to_pylist()]
        nbytes += sum(map(len, values))  # each is held once, but who uses them may copy them
        if nbytes > _most_nbytes(data_nbytes):
            _fail(where, f"claims to hold {nbytes:,} bytes of text, but has {data_nbytes:,}")
        yield values


def _decode_files(
    columns: dict[str, list[Any]],
    where: str,
    vectors: FileFormat,
    meta: Sequence[Any],
    sources: range,
    locate: Locate,
) -> list[SavedFile]:
    dtypes = {text: _numeric(where, text) for text in set(columns["dtype"])}
    if "layout" not in columns:  # an earlier one: files of parquet had no offset
        pairs = zip(columns.pop("data_offset"), columns.pop("fortran_order"), strict=True)
        columns["layout"] = [json.dumps([offset, order] if offset else []) for offset, order in pairs]
    layouts = {text: tuple(json.loads(text)) for text in set(columns["layout"])}
    files = []
    rows_of_all = 0
    for row in zip(*columns.values(), strict=True):
        facts = dict(zip(columns, row, strict=True))
        path, kind, source = facts["path"], facts["kind"], facts["source"]
        _check_path(where, path)
        if kind not in (VECTORS, METADATA) or source not in sources:
            _fail(where, f"describes {path!r} as {kind!r} of source {source}")
        if (located := locate(source, path)) is None:
            continue
        version = Version.parse(facts["fingerprint"])
        if version.size != facts["size"]:
            _fail(where, f"tells two sizes of {path!r}: {facts['size']:,} and {version.size:,}")
        header = FileHeader(
            StoredFile(*located, version),
            facts["rows"],
            facts["dimension"],
            dtypes[facts["dtype"]],
            layouts[facts["layout"]],
            tuple(facts["group_rows"]),
            meta=meta[facts["columns"]],
            checksum=facts["checksum"],
        )
        rows_of_all += header.rows
        _check_header(where, path, header, vectors if kind == VECTORS else PARQUET)
        files.append(SavedFile(kind, source, path, header))
    if rows_of_all > _MOST_ROWS:
        _fail(where, f"claims {counted(rows_of_all, 'row')}")
    return files


def _check_columns(where: str, file_format: str, meta: Sequence[str], files: Sequence[SavedFile]) -> None:
    """Refuse files that do not tell what each metadata column holds."""
    kind = {"same": VECTORS, "beside": METADATA}.get(get_format(file_format).metadata)
    for file in files:
        if file.kind == kind and len(file.header.meta) != len(meta):
            _fail(
                where,
                f"tells of {counted(len(file.header.meta), 'metadata column')} of {file.path!r}, not of {len(meta)}",
            )


def _check_path(where: str, path: str) -> None:
    """Refuse what could lead out of the folder, on a web server too, which decodes names before it looks."""
    for written in (path, urllib.parse.unquote(path), urllib.parse.unquote(urllib.parse.unquote(path))):
        parts = written.replace("\\", "/").split("/")
        if path and ("\0" in written or any(part in ("", ".", "..") for part in parts)):
            _fail(where, f"names the file {path!r}, which would lead out of the folder of the collection")


def _check_header(where: str, path: str, header: FileHeader, file_format: FileFormat) -> None:
    """Refuse numbers that cannot be; those that merely are wrong show when the file is read."""
    numbers = (header.rows, header.dimension, header.file.size + 1, *header.group_rows)
    if min(numbers) < 0 or max(numbers) > _MOST_ROWS or not file_format.check_header(header):
        _fail(
            where,
            f"holds numbers for {path!r} that cannot be: {counted(header.rows, 'row')}, "
            f"{counted(header.file.size, 'byte')}",
        )


def _numeric(where: str, text: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(text)
    if dtype.kind not in "biufc":
        _fail(where, f"names the dtype {text!r}, which is not numeric")
    return dtype


class _UnusableError(FormatError):
    """A manifest that is not what this library writes."""


def _fail(where: str, what: str) -> NoReturn:
    raise _UnusableError(f"{where}: not a usable manifest: it {what}; remove it, and save it again")
