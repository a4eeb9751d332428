"""The parquet format: vectors in a column, metadata in others.

Only the footer and the column chunks that are asked for are read. Vectors are taken as the flat array of items that
parquet stores, never as one object a row, and decoded a few MB at a time: a row group may be larger than the memory.
"""

from __future__ import annotations

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
from dask_embedding_reader.formats.parquet_footer import Footer, parse_footer
from dask_embedding_reader.formats.plain_pages import Place, iter_pages
from dask_embedding_reader.formats.raw import copy_rows, raw_reader
from dask_embedding_reader.retries import describe
from dask_embedding_reader.storage import StoredFile, check_local, is_local, local_input, read_range, read_ranges

_FOOTER_READ_NBYTES = 2**16
"""Holds most footers; a longer one costs a second read."""

DECODER_NBYTES = 48 * 2**20
"""What decoding holds beside its result: pages, dictionaries, and what pyarrow's allocator keeps (measured)."""

_DECODE_NBYTES = 2 * 2**20
"""Vectors are decoded in steps of this many bytes: as fast as whole row groups, in a tenth of the memory."""

_BUFFER_NBYTES = 2**20
"""What pyarrow reads at a time of a column chunk that is larger than this."""

_DECODE_ROWS = 8_192
"""Metadata is decoded in steps of this many rows."""

_PLAIN_TYPES = {1: ("<i4", "<u4"), 2: ("<i8", "<u8"), 4: ("<f4",), 5: ("<f8",), 7: ("<f2",)}
"""What parquet's types are in memory, by their numbers; narrow integers are stored as wide ones."""

_STEPS_BETWEEN_RELEASES = 8
"""After so many steps pyarrow's allocator gives back what it keeps: 30 MB less are held, at no cost that shows."""


class _Parquet:
    suffix = ".parquet"
    first_nbytes = 0

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read the footer of a parquet file: rows, row groups, and what the wanted columns hold."""
        del head  # its footer is at the end
        footer = _footer(file)
        dimension, dtype = 0, np.dtype(np.float32)
        if columns.embedding is not None:
            dtype, dimension = _vector_type(file, footer, columns)
        meta = tuple(_meta_column(file, footer, name) for name in columns.meta)
        return FileHeader(file, sum(footer.group_rows), dimension, dtype, group_rows=footer.group_rows, meta=meta)

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that fills arrays with the next vectors, each row group decoded once at most."""
        blocks = _iter_blocks(header, columns, start, stop)
        rows, read_block = 0, _array_reader(np.empty((0, header.dimension), header.dtype), header.file, start)

        def read(outs: Sequence[Array]) -> None:
            nonlocal rows, read_block
            for out in outs:
                filled = 0
                while filled < len(out):
                    if not rows:
                        rows, read_block = next(blocks)
                    count = min(rows, len(out) - filled)
                    read_block([out[filled : filled + count]])
                    rows -= count
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
    count = 0
    try:
        _promised_footer(header)
        file = _open(header.file, groups, names)
        # Group by group: where a page holds more rows than its group should, all later ones would be shifted.
        for group in groups:
            group_stop = row + header.group_rows[group - header.first_group]
            for batch in file.iter_batches(batch_size=step, row_groups=[group], columns=list(names), use_threads=False):
                skip, keep = max(0, start - row), min(batch.num_rows, stop - row)
                row += batch.num_rows
                check_local(header.file)
                count += 1
                if count % _STEPS_BETWEEN_RELEASES == 0:
                    pa.default_memory_pool().release_unused()
                # Text that is no UTF-8 and offsets that lead elsewhere would show when the values are used, or never.
                batch.validate(full=True)
                if skip < keep:
                    # By name: pyarrow also takes the columns `a.b` for `a`, and keeps the order of the file.
                    yield batch.select(list(names)).slice(skip, keep - skip)
            if row != group_stop:
                raise FormatError(
                    f"{header.file.url}: a row group ends after row {row:,} where the footer promises {group_stop:,}; "
                    "write the file again"
                )
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


# ---------------------------------------------------------------------------------------------------------------------
# The footer


def column_names(file: StoredFile) -> list[str]:
    """Return the names of all columns of a file."""
    return list(_footer(file).schema.arrow.names)


@lru_cache(maxsize=128)  # a pass opens each file once a row group; and a footer may take as long to fetch as the data
def _footer(file: StoredFile) -> Footer:
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
    return parse_footer(file.url, tail[-nbytes:], file.size - nbytes)


def _promised_footer(header: FileHeader) -> Footer:
    """Return the footer of a file that has the rows which the header tells, maybe from a manifest that is wrong."""
    footer = _footer(header.file)
    found = footer.group_rows[header.first_group : header.first_group + len(header.group_rows)]
    if sum(footer.group_rows) != header.rows or found != header.group_rows:
        raise FormatError(
            f"{header.file.url}: holds {sum(footer.group_rows):,} rows in {len(footer.group_rows):,} row groups, where "
            f"{header.rows:,} rows in other row groups were promised; save the manifest again if there is one, else "
            "open the collection again"
        )
    return footer


@lru_cache(maxsize=128)
def _metadata(file: StoredFile) -> pq.FileMetaData:
    """Return a footer as pyarrow takes it; nothing is asked of it here, see ``parquet_footer``."""
    return pq.read_metadata(pa.BufferReader(_footer(file).data))


def _field(file: StoredFile, footer: Footer, name: str) -> tuple[pa.Field, range]:
    """Return the field of a column and the indices of its leaves in the footer."""
    schema = footer.schema.arrow
    indices = schema.get_all_field_indices(name)
    if len(indices) != 1:
        what = f"has {len(indices)} columns named {name!r}" if indices else f"has no column {name!r}"
        raise ColumnError(f"{file.url}: {what}; its columns are {', '.join(map(repr, _nearest(name, schema.names)))}")
    return schema.field(indices[0]), footer.schema.leaves[indices[0]]


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """Order names by likeness to the one that was asked for."""
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())


def _meta_column(file: StoredFile, footer: Footer, name: str) -> MetaColumn:
    field, leaves = _field(file, footer, name)
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    has_nulls = field.nullable and any(
        chunks[leaf].nulls != 0
        for rows, chunks in zip(footer.group_rows, footer.chunks, strict=True)
        if rows  # a group of no rows has no statistics either
        for leaf in leaves
    )
    return MetaColumn(kind, has_nulls)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


def _vector_type(file: StoredFile, footer: Footer, columns: Columns) -> tuple[np.dtype[Any], int]:
    """Return the dtype and dimension of the vector column, told by the footer alone."""
    field, leaves = _field(file, footer, columns.embedding or "")
    dtype, dimension = _type_of_items(file, field, columns)
    if not pa.types.is_fixed_size_binary(field.type):
        dimension = _dimension(f"{file.url}: column {field.name!r}", footer, leaves[0], dimension)
    return dtype, dimension or 0


def _type_of_items(file: StoredFile, field: pa.Field, columns: Columns) -> tuple[np.dtype[Any], int | None]:
    """Return the dtype of the vector column, and its dimension if the type tells it."""
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
    return np.dtype(item.to_pandas_dtype()), dimension


def _binary_type(where: str, width: int, dtype: np.dtype[Any] | None) -> tuple[np.dtype[Any], int]:
    if dtype is None:
        raise ArgumentError(f"{where} is binary of {width} bytes and does not tell its dtype; give embedding_dtype=...")
    if width == 0 or width % dtype.itemsize:
        raise FormatError(f"{where} is binary of {width} bytes, which is no whole number of {dtype} items")
    return dtype, width // dtype.itemsize


def _dimension(where: str, footer: Footer, leaf: int, dimension: int | None) -> int:
    """Return how many items each vector has, from the counts of items and rows; ragged vectors mostly show here."""
    first_row = 0
    for rows, chunks in zip(footer.group_rows, footer.chunks, strict=True):
        chunk = chunks[leaf]
        if rows:
            if dimension is None:
                dimension = chunk.values // rows
            if chunk.nulls or chunk.values != rows * dimension:
                found = f"{chunk.nulls:,} nulls" if chunk.nulls else f"{chunk.values:,} items"
                raise FormatError(
                    f"{where}, rows {first_row:,} to {first_row + rows:,}: {found} in {rows:,} rows where vectors of "
                    f"{dimension} items were expected: some vectors are null or of another length; drop or repair them"
                )
        first_row += rows
    if dimension == 0 and first_row:
        raise FormatError(f"{where} holds vectors of no items")
    return dimension or 0


def _iter_blocks(header: FileHeader, columns: Columns, start: int, stop: int) -> Iterator[tuple[int, RowReader]]:
    """Yield how many of the vectors ``[start, stop)`` are next, and what reads these: as they lie there, or decoded."""
    try:
        field, leaves = _promised_field(header, columns)
        for rows, read in _iter_plain_blocks(header, field, leaves[0], start, stop):
            yield rows, read
            start += rows
    except ReadError as error:
        raise type(error)(f"rows {start:,} to {stop:,}: {error}") from error
    if start < stop:
        step = max(1, _DECODE_NBYTES // max(1, header.dimension * header.dtype.itemsize))
        for table in iter_tables(header, (columns.embedding or "",), start, stop, step):
            yield table.num_rows, _array_reader(_vectors(header, columns, start, table.column(0)), header.file, start)
            start += table.num_rows


def _promised_field(header: FileHeader, columns: Columns) -> tuple[pa.Field, range]:
    """Return the column of vectors, of the type that the header tells: it may come from a manifest that is wrong."""
    field, leaves = _field(header.file, _promised_footer(header), columns.embedding or "")
    dtype, dimension = _type_of_items(header.file, field, columns)
    if dtype != header.dtype or dimension not in (None, header.dimension):
        raise FormatError(
            f"{header.file.url}: column {field.name!r} is {field.type}, which does not hold the promised vectors of "
            f"{header.dimension} {header.dtype}; save the manifest again"
        )
    return field, leaves


def _array_reader(vectors: Array, file: StoredFile, row: int) -> RowReader:
    """Return a function that hands out vectors that have been decoded, from a row of a file on."""

    def read(outs: Sequence[Array]) -> None:
        nonlocal vectors, row
        rows = sum(map(len, outs))
        copy_rows(vectors[:rows], outs, file, row)
        vectors, row = vectors[rows:], row + rows

    return read


def _definition(field: pa.Field) -> int:
    """Return the level of definition of an item that is not null: one for each thing that may be null or repeated."""
    kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    return int(field.nullable) + (0 if pa.types.is_fixed_size_binary(kind) else 1 + int(kind.value_field.nullable))


def _iter_plain_blocks(
    header: FileHeader, field: pa.Field, leaf: int, start: int, stop: int
) -> Iterator[tuple[int, RowReader]]:
    """Yield the vectors from ``start`` on, as long as there is nothing to decode: they lie there as in memory."""
    file = header.file
    if not is_local(file.filesystem):
        return
    footer = _footer(file)
    is_list = not pa.types.is_fixed_size_binary(field.type)
    row_nbytes = header.dimension * header.dtype.itemsize
    group_start = header.first_group_row
    for group, group_rows in enumerate(header.group_rows, header.first_group):
        skip, wanted = max(0, start - group_start), min(group_start + group_rows, stop) - max(group_start, start)
        group_start += group_rows
        if wanted <= 0:
            continue
        chunk = footer.chunks[group][leaf]
        if chunk.codec != 0 or (is_list and header.dtype.str not in _PLAIN_TYPES.get(chunk.kind or 0, ())):
            return
        place = Place(chunk.start, chunk.stop, is_list, _definition(field))
        for position, rows in iter_pages(file, place, header.dimension, row_nbytes, skip, wanted):
            yield rows, raw_reader(file, position, header.dtype, row_nbytes, start)
            start, wanted = start + rows, wanted - rows
        if wanted:
            return


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
    source: Any
    footer = _footer(file)
    if is_local(file.filesystem):
        source = local_input(file)
    else:
        # Like pyarrow, which also takes the column `a.b` for a part of `a`.
        paths = enumerate(footer.schema.paths)
        leaves = [leaf for leaf, path in paths if any(f"{path}.".startswith(f"{name}.") for name in names)]
        source = _ChunkFile(file, [footer.chunks[group][leaf][:2] for group in groups for leaf in leaves])
    # Small chunks are read whole: with a buffer, a damaged page that claims 2 GB would be given 2 GB.
    largest = max((chunk.stop - chunk.start for group in groups for chunk in footer.chunks[group]), default=0)
    buffer_size = _BUFFER_NBYTES if largest > _BUFFER_NBYTES else 0
    return pq.ParquetFile(
        source,
        metadata=_metadata(file),
        buffer_size=buffer_size,
        pre_buffer=False,
        page_checksum_verification=True,  # where there are checksums; they cost little beside decoding
    )


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
