"""The parquet format: vectors in a column, metadata in others.

Only the footer and the column chunks that are asked for are read. Vectors are taken as the flat array of items that
parquet stores, never as one object a row, and decoded a few MB at a time: a row group may be larger than the memory.
"""

from __future__ import annotations

import base64
import difflib
import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader.errors import ArgumentError, ColumnError, EmbeddingReaderError, FormatError, ReadError
from dask_embedding_reader.formats import Array, Columns, FileHeader, MetaColumn, RowReader
from dask_embedding_reader.formats.cast import cast_into
from dask_embedding_reader.retries import describe
from dask_embedding_reader.storage import StoredFile, check_local, is_local, local_input, read_range, read_ranges

_FOOTER_READ_NBYTES = 2**16
"""Holds most footers; a longer one costs a second read."""

DECODER_NBYTES = 48 * 2**20
"""What decoding holds beside its result: pages, dictionaries, and what pyarrow's allocator keeps (measured)."""

_DECODE_NBYTES = 2 * 2**20
"""Vectors are decoded in steps of this many bytes: as fast as whole row groups, in a tenth of the memory."""

_DECODE_ROWS = 8_192
"""Metadata is decoded in steps of this many rows."""


class _Parquet:
    suffix = ".parquet"

    def read_header(self, file: StoredFile, columns: Columns) -> FileHeader:
        """Read the footer of a parquet file: rows, row groups, and what the wanted columns hold."""
        metadata = _footer(file)
        try:
            schema = arrow_schema(metadata)
            group_rows = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
            dimension, dtype = 0, np.dtype(np.float32)
            if columns.embedding is not None:
                dtype, dimension = _vector_type(file, schema, metadata, columns)
            meta = tuple(_meta_column(file, schema, metadata, name) for name in columns.meta)
        except EmbeddingReaderError:
            raise
        except Exception as error:
            raise FormatError(f"{file.url}: its parquet footer cannot be read: {describe(error)}") from error
        return FileHeader(file, sum(group_rows), dimension, dtype, group_rows=group_rows, meta=meta)

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that decodes the next vectors into arrays, each row group once however many it fills."""
        name = columns.embedding or ""
        step = max(1, _DECODE_NBYTES // (header.dimension * header.dtype.itemsize))
        decoded = iter_tables(header, (name,), start, stop, step)
        vectors = np.empty((0, header.dimension), header.dtype)

        def read(outs: Sequence[Array]) -> None:
            nonlocal start, vectors
            for out in outs:
                filled = 0
                while filled < len(out):
                    if not len(vectors):
                        vectors = _vectors(header, columns, start, next(decoded).column(0))
                    count = min(len(vectors), len(out) - filled)
                    cast_into(out[filled : filled + count], vectors[:count])
                    vectors = vectors[count:]
                    start += count
                    filled += count

        return read


PARQUET = _Parquet()


TableReader = Callable[[int], pa.Table]


def open_table(header: FileHeader, names: Sequence[str], start: int, stop: int) -> TableReader:
    """Return a function that decodes the next so many of the rows ``[start, stop)`` of some columns."""
    decoded = iter_tables(header, names, start, stop)
    rest: list[pa.RecordBatch] = []

    def read(rows: int) -> pa.Table:
        taken = []
        while rows:
            batch = rest.pop() if rest else next(decoded)
            taken.append(batch.slice(0, rows))
            if batch.num_rows > rows:
                rest.append(batch.slice(rows))
            rows -= taken[-1].num_rows
        return pa.Table.from_batches(taken)

    return read


def iter_tables(
    header: FileHeader, names: Sequence[str], start: int, stop: int, step: int = _DECODE_ROWS
) -> Iterator[pa.RecordBatch]:
    """Decode the rows ``[start, stop)`` of some columns, in order, a few rows at a time.

    Raises
    ------
    FormatError
        If a page cannot be decoded.
    ReadError
        If the storage does not deliver it.
    """
    bounds = list(accumulate(header.group_rows, initial=header.first_group_row))
    first, last = bisect_right(bounds, start) - 1, bisect_right(bounds, stop - 1) - 1
    groups = [header.first_group + group for group in range(first, last + 1) if header.group_rows[group]]
    row = bounds[first]
    try:
        for batch in _open(header.file, groups, names).iter_batches(
            batch_size=step, row_groups=groups, columns=list(names), use_threads=False
        ):
            skip, keep = max(0, start - row), min(batch.num_rows, stop - row)
            row += batch.num_rows
            check_local(header.file)
            if skip < keep:
                # By name: pyarrow also takes the columns `a.b` for `a`, and keeps the order of the file.
                yield batch.select(list(names)).slice(skip, keep - skip)
    except ReadError as error:
        raise type(error)(f"rows {max(start, row):,} to {stop:,}: {error}") from error
    except EmbeddingReaderError:
        raise
    except Exception as error:
        check_local(header.file)  # a file that was replaced explains what cannot be decoded
        kind = ReadError if isinstance(error, OSError) and error.errno else FormatError
        raise kind(
            f"{header.file.url}, rows {max(start, row):,} to {stop:,}: cannot be decoded: {describe(error)}"
        ) from error
    if row < stop:
        raise FormatError(
            f"{header.file.url}: ends after row {row:,} where its footer promises {header.rows:,}; write the file again"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The footer


def arrow_schema(metadata: pq.FileMetaData) -> pa.Schema:
    """Return the columns of a file as they were when it was written.

    Parquet has no seconds: pyarrow stores milliseconds, notes in the footer what it was given, and does not heed that.
    """
    schema = metadata.schema.to_arrow_schema()
    noted = (metadata.metadata or {}).get(b"ARROW:schema")
    if noted is None or not any(_in_seconds(field.type) for field in schema):
        return schema
    given = {field.name: field.type for field in pa.ipc.read_schema(pa.py_buffer(base64.b64decode(noted)))}
    restored = [
        kind if (kind := _in_seconds(field.type)) and given.get(field.name) == kind else field.type for field in schema
    ]
    return pa.schema([field.with_type(kind) for field, kind in zip(schema, restored, strict=True)])


def _in_seconds(kind: pa.DataType) -> pa.DataType | None:
    """Return what milliseconds may have been before they were stored; None for other types."""
    if pa.types.is_timestamp(kind) and kind.unit == "ms":
        return pa.timestamp("s", kind.tz)
    return pa.time32("s") if kind == pa.time32("ms") else None


def column_names(file: StoredFile) -> list[str]:
    """Return the names of all columns of a file."""
    return list(_footer(file).schema.to_arrow_schema().names)


@lru_cache(maxsize=128)  # a pass opens each file once a row group; and a footer may take as long to fetch as the data
def _footer(file: StoredFile) -> pq.FileMetaData:
    if 0 <= file.size < 12:
        raise FormatError(f"{file.url}: not a parquet file: it has only {file.size} bytes")
    if file.size < 0:
        raise ReadError(f"{file.url}: the storage does not tell its size, and a parquet file is read from its end")
    tail = read_range(file, max(0, file.size - _FOOTER_READ_NBYTES), file.size)
    if tail[-4:] != b"PAR1":
        reason = "it is encrypted" if tail[-4:] == b"PARE" else f"it ends with {tail[-4:]!r} where b'PAR1' was expected"
        raise FormatError(f"{file.url}: not a readable parquet file: {reason}; was it cut short?")
    nbytes = int.from_bytes(tail[-8:-4], "little") + 8
    if nbytes > file.size:
        raise FormatError(f"{file.url}: damaged: its footer claims {nbytes:,} bytes of the file's {file.size:,}")
    if nbytes > len(tail):
        tail = read_range(file, file.size - nbytes, file.size - len(tail)) + tail
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail))
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{file.url}: its parquet footer cannot be read: {describe(error)}") from error
    for group in range(metadata.num_row_groups):
        for start, stop in _chunk_ranges(metadata, group, range(metadata.num_columns)):
            if not 0 <= start <= stop <= file.size - nbytes:
                raise FormatError(
                    f"{file.url}: damaged: row group {group} is said to be at bytes {start:,} to {stop:,}, but the "
                    f"data of the file ends at {file.size - nbytes:,}; write the file again"
                )
    return metadata


def _chunk_ranges(metadata: pq.FileMetaData, group: int, leaves: Sequence[int]) -> list[tuple[int, int]]:
    """Return the byte ranges of some column chunks of a row group."""
    ranges = []
    for leaf in leaves:
        chunk = metadata.row_group(group).column(leaf)
        # Some old writers put 0 for "no dictionary page".
        start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
        ranges.append((start, start + chunk.total_compressed_size))
    return ranges


def _field(file: StoredFile, schema: pa.Schema, name: str) -> tuple[pa.Field, range]:
    """Return the field of a column and the indices of its leaves in the footer."""
    indices = schema.get_all_field_indices(name)
    if len(indices) != 1:
        what = f"has {len(indices)} columns named {name!r}" if indices else f"has no column {name!r}"
        raise ColumnError(f"{file.url}: {what}; its columns are {', '.join(map(repr, _nearest(name, schema.names)))}")
    counts = [_count_leaves(field.type) for field in schema]
    first = sum(counts[: indices[0]])
    return schema.field(indices[0]), range(first, first + counts[indices[0]])


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """Order names by likeness to the one that was asked for."""
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())


def _count_leaves(kind: pa.DataType) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _count_leaves(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return 1
    return sum(_count_leaves(kind.field(index).type) for index in range(kind.num_fields)) if kind.num_fields else 1


def _meta_column(file: StoredFile, schema: pa.Schema, metadata: pq.FileMetaData, name: str) -> MetaColumn:
    field, leaves = _field(file, schema, name)
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    has_nulls = field.nullable and any(
        not (stats := metadata.row_group(group).column(leaf).statistics) or not stats.has_null_count or stats.null_count
        for group in range(metadata.num_row_groups)
        if metadata.row_group(group).num_rows  # a group of no rows has no statistics either
        for leaf in leaves
    )
    return MetaColumn(kind, has_nulls)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


def _vector_type(
    file: StoredFile, schema: pa.Schema, metadata: pq.FileMetaData, columns: Columns
) -> tuple[np.dtype[Any], int]:
    """Return the dtype and dimension of the vector column, told by the footer alone."""
    field, leaves = _field(file, schema, columns.embedding or "")
    kind, where = field.type, f"{file.url}: column {field.name!r}"
    if pa.types.is_fixed_size_binary(kind):
        return _binary_type(where, kind.byte_width, columns.embedding_dtype)
    if columns.embedding_dtype is not None:
        raise ArgumentError(f"{where} is {kind}, which tells its own dtype; leave embedding_dtype out")
    if isinstance(kind, pa.FixedShapeTensorType):
        if len(kind.shape) != 1:
            raise FormatError(f"{where} holds tensors of shape {tuple(kind.shape)}; only those of one axis are vectors")
        item, dimension = kind.value_type, kind.shape[0]
    elif pa.types.is_fixed_size_list(kind):
        item, dimension = kind.value_type, kind.list_size
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item, dimension = kind.value_type, None
    else:
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        remedy = "write it as fixed-size binary, or as a list of numbers" if binary else "name the column of vectors"
        raise FormatError(f"{where} is {kind}, not a list of numbers; {remedy} (embedding_column=...)")
    if not (pa.types.is_floating(item) or pa.types.is_integer(item)):
        raise FormatError(f"{where} is {kind}; its items must be integers or floating-point numbers")
    return np.dtype(item.to_pandas_dtype()), _dimension(where, metadata, leaves[0], dimension)


def _binary_type(where: str, width: int, dtype: np.dtype[Any] | None) -> tuple[np.dtype[Any], int]:
    if dtype is None:
        raise ArgumentError(f"{where} is binary of {width} bytes and does not tell its dtype; give embedding_dtype=...")
    if width == 0 or width % dtype.itemsize:
        raise FormatError(f"{where} is binary of {width} bytes, which is no whole number of {dtype} items")
    return dtype, width // dtype.itemsize


def _dimension(where: str, metadata: pq.FileMetaData, leaf: int, dimension: int | None) -> int:
    """Return how many items each vector has, from the counts of items and rows; ragged vectors mostly show here."""
    first_row = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        rows, chunk = group.num_rows, group.column(leaf)
        if rows:
            if dimension is None:
                dimension = chunk.num_values // rows
            stats = chunk.statistics
            nulls = stats is not None and stats.has_null_count and stats.null_count
            if nulls or chunk.num_values != rows * dimension:
                found = f"{stats.null_count:,} nulls" if nulls else f"{chunk.num_values:,} items"
                raise FormatError(
                    f"{where}, rows {first_row:,} to {first_row + rows:,}: {found} in {rows:,} rows where vectors of "
                    f"{dimension} items were expected: some vectors are null or of another length; drop or repair them"
                )
        first_row += rows
    if dimension == 0 and first_row:
        raise FormatError(f"{where} holds vectors of no items")
    return dimension or 0


def _vectors(header: FileHeader, columns: Columns, start: int, column: pa.Array) -> Array:
    """View a decoded column as a 2-D array; fail on the first vector that is null or of another length."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    rows, dimension = len(column), header.dimension
    if column.null_count:
        _bad_vector(header, columns, start + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), "null")
    if pa.types.is_fixed_size_binary(column.type):
        binary = np.frombuffer(column.buffers()[1], header.dtype)
        return binary[column.offset * dimension : (column.offset + rows) * dimension].reshape(rows, dimension)
    if not pa.types.is_fixed_size_list(column.type):
        lengths = np.diff(column.offsets.to_numpy())
        if (lengths != dimension).any():
            bad = int(np.argmax(lengths != dimension))
            _bad_vector(header, columns, start + bad, f"of {lengths[bad]} items where {dimension} were expected")
    values = column.flatten()
    if values.null_count:
        bad = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // dimension
        _bad_vector(header, columns, start + bad, "with a null item")
    items: Array = values.to_numpy()
    return items.reshape(rows, dimension)


def _bad_vector(header: FileHeader, columns: Columns, row: int, what: str) -> NoReturn:
    raise FormatError(
        f"{header.file.url}, row {row:,}: column {columns.embedding!r} holds a vector that is {what}; drop or repair it"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _open(file: StoredFile, groups: Sequence[int], names: Sequence[str]) -> pq.ParquetFile:
    metadata = _footer(file)
    source: Any
    if is_local(file.filesystem):
        source = local_input(file)
    else:
        paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
        # Like pyarrow, which also takes the column `a.b` for a part of `a`.
        leaves = [leaf for leaf, path in enumerate(paths) if any(f"{path}.".startswith(f"{name}.") for name in names)]
        source = _ChunkFile(file, [r for group in groups for r in _chunk_ranges(metadata, group, leaves)])
    return pq.ParquetFile(source, metadata=metadata, buffer_size=2**20, pre_buffer=False)


class _ChunkFile(io.RawIOBase):
    """A remote file of which only some column chunks can be read.

    Chunks that are small are fetched at once and together; a large one is fetched window by window, as it is decoded.
    """

    _WINDOW_NBYTES = 32 * 2**20

    def __init__(self, file: StoredFile, chunks: Sequence[tuple[int, int]]) -> None:
        self._file = file
        self._chunks = sorted(chunks)
        self._position = 0
        small = [(start, stop) for start, stop in self._chunks if stop - start <= self._WINDOW_NBYTES]
        self._windows = dict(
            zip(small, zip((start for start, _ in small), read_ranges(file, small), strict=True), strict=True)
        )

    def _fetch(self, start: int, stop: int) -> bytes:
        return read_ranges(self._file, [(start, stop)])[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position
        chunk = next((c for c in self._chunks if c[0] <= start < c[1]), None)
        if chunk is None:
            return b""  # a damaged page points outside its column chunk: pyarrow says so when the bytes run out
        stop = min(start + size, chunk[1])
        first, window = self._windows.get(chunk, (0, b""))
        if not first <= start <= stop <= first + len(window):
            first, window = start, self._fetch(start, min(max(stop, start + self._WINDOW_NBYTES), chunk[1]))
            self._windows[chunk] = first, window
        self._position = stop
        return window[start - first : stop - first]
