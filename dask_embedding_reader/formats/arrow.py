"""Arrow's IPC format (feather 2): a column of vectors, and columns of metadata beside it, in record batches.

Vectors that are not compressed are read as they lie in the file, row by row; compressed ones are inflated from the
beginning of their record batch, block by block.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import ColumnError, FormatError
from dask_embedding_reader.formats.arrow_tables import (
    column_path,
    columns_of_vectors,
    decoder_nbytes,
    decoding,
    meta_column,
    open_batch,
    promised_index,
    vectors_path,
)
from dask_embedding_reader.formats.base import (
    DEFAULT_COLUMN,
    Array,
    BaseFormat,
    Columns,
    FileHeader,
    MetaColumn,
    Stretch,
    StretchReader,
    default_piece_rows,
)
from dask_embedding_reader.formats.column_names import fields_of, name_vectors
from dask_embedding_reader.formats.ipc import Batch, Index, fail, read_index
from dask_embedding_reader.formats.ipc_columns import Column, Path, find_column, inflate
from dask_embedding_reader.formats.raw import copy_blocks, naming_rows, raw_held_nbytes, read_placed
from dask_embedding_reader.formats.vector_columns import (
    as_vectors,
    binary_dimension,
    is_binary,
    is_bytes,
    is_list,
    is_list_view,
    is_nested,
    join_items,
    lengths_of,
    type_of_columns,
    type_of_items,
)
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.put import WritableFile
from dask_embedding_reader.storage.read import read_into, read_range
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import StoredFile, Write

ARROW_LAYOUT = "arrow"
"""The first of every layout of such files. What follows, if anything, is where vectors lie that are not compressed, of
files of equal batches: the first byte, the bytes from batch to batch, and the rows of a batch."""

_BLOCK_NBYTES = 2**20
"""What is inflated at once."""

_WINDOW_NBYTES = 2**20
"""Of compressed vectors as much is held at once: writers make record batches of any size. Elsewhere it is what is worth
a request."""

_PADDING_NBYTES = 64
"""Buffers may be longer than what is in them by less than this."""

_BATCH_NBYTES = 32_000_000
"""What is written in a record batch, nearly: it is held until its buffers are known."""


class _Arrow(BaseFormat):
    name = "arrow"
    suffixes: tuple[str, ...] = (".arrow", ".feather", ".ipc")
    first_nbytes = 0  # its footer is at the end
    holds_columns = True
    tells_dtype = False

    def find_vectors(self, file: StoredFile, columns: Columns, head: bytes) -> tuple[Sequence[str] | None, bytes]:
        """Find the columns of numbers in lists of one length."""
        index = read_index(file)
        if not sum(index.batch_rows):
            return None, head
        names = index.schema.names
        if DEFAULT_COLUMN in names:
            return [DEFAULT_COLUMN], head
        if columns.embedding_dtype is not None:
            return [field.name for field in index.schema if is_bytes(field.type)], head
        return columns_of_vectors(file, index), head

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read where its record batches are, and what the wanted columns hold."""
        del head
        index = read_index(file)
        header = FileHeader(file, sum(index.batch_rows), 0, np.dtype(np.float32), (ARROW_LAYOUT,), index.batch_rows)
        if not header.rows:  # its columns are of any type then, or missing
            return header._replace(meta=(MetaColumn(pa.null(), True),) * len(columns.meta))
        if columns.embedding is not None:
            header = _with_vectors(header, index, columns)
            if not columns.meta and (places := _even_places(header, index, columns)):
                header = header._replace(layout=(ARROW_LAYOUT, *places), group_rows=())
        return header._replace(meta=tuple(meta_column(file, index, name) for name in columns.meta))

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether the vectors lie within the file, or its rows are those of its record batches."""
        if header.layout == (ARROW_LAYOUT,):
            return sum(header.group_rows) == header.rows
        if len(header.layout) != 4 or header.layout[0] != ARROW_LAYOUT or header.group_rows not in ((), (header.rows,)):
            return False
        first, stride, rows = header.layout[1:]
        row_nbytes = header.dimension * header.dtype.itemsize
        if any(type(number) is not int or number < 1 for number in (first, stride, rows)) or not header.rows:
            return False
        batches, rest = divmod(header.rows - 1, rows)
        return (
            rows * row_nbytes <= stride
            and not 0 <= header.file.size < first + batches * stride + (rest + 1) * row_nbytes
        )

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that fills arrays with some vectors."""
        del start, stop
        if len(header.layout) > 1:
            return _open_even(header)
        return _open_batches(header, columns)

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what answers hold, or windows and blocks of what is compressed, and decoded metadata."""
        if len(header.layout) > 1:
            return raw_held_nbytes(header, rows, threads)
        held = _window_nbytes(header) + 2 * _BLOCK_NBYTES
        if isinstance(columns.embedding, tuple):
            held = decoder_nbytes(header, columns.vectors) + _BLOCK_NBYTES
        return threads * held + decoder_nbytes(header, columns.meta)

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return the suffix: Arrow has real numbers of up to 64 bits."""
        return ".arrow" if dtype.kind in "iuf" and dtype.itemsize <= 8 else None

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of a file, not compressed, in batches of equal size."""
        element = pa.field("item", pa.from_numpy_dtype(vectors.dtype), nullable=False)
        kind = pa.list_(element, vectors.dimension)
        fields = [pa.field(embedding_column, kind, nullable=False)]
        if table is not None:
            table = table.combine_chunks()
            fields += [table.schema.field(name) for name in table.column_names]
        step = default_piece_rows(vectors.dimension * vectors.dtype.itemsize, _BATCH_NBYTES)
        try:
            with pa.ipc.new_file(WritableFile(write), pa.schema(fields)) as writer:
                for start in range(0, len(vectors.array), step):
                    items = pa.array(vectors.stored(start, start + step).reshape(-1))
                    columns = [pa.FixedSizeListArray.from_arrays(items, type=kind)]
                    if table is not None:
                        columns += [_chunk(column) for column in table.slice(start, step).columns]
                    writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields)))
        except pa.ArrowException as error:
            raise ColumnError(f"the metadata columns cannot be stored: {describe(error)}; convert them") from error


ARROW = _Arrow()


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    # New buffers, though there be one chunk: of a slice all would be written, and equal rows in other bytes.
    return pa.concat_arrays(column.chunks)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


def _paths(file: StoredFile, index: Index, columns: Columns) -> dict[str, Path]:
    """Return where the column of vectors is, or those of their items."""
    if isinstance(columns.embedding, tuple):
        return {name: column_path(file, index, name) for name in columns.embedding}
    return {columns.column: vectors_path(file, index, columns.column)}


def _with_vectors(header: FileHeader, index: Index, columns: Columns) -> FileHeader:
    """Return a header that tells the dtype and the dimension of the vectors."""
    file, paths = header.file, _paths(header.file, index, columns)
    if isinstance(columns.embedding, tuple):
        fields = [index.schema.field(path[0]) for path in paths.values()]
        dtype, dimension = type_of_columns(file.url, columns, fields, index.schema.names)
        return header._replace(dtype=dtype, dimension=dimension)
    [path] = paths.values()
    field = fields_of(index.schema, path)[-1].with_name(columns.column)
    dtype, known = type_of_items(
        file.url, field, columns, lambda: name_vectors(index.schema, columns_of_vectors(file, index))
    )
    header = header._replace(dtype=dtype)
    header = header._replace(dimension=_first_length(header, columns, index, path) if known is None else known)
    if not header.dimension:
        raise FormatError(f"{file.url}: column {columns.column!r} holds vectors of no items")
    first = 0
    for number, batch in enumerate(index.batches):
        column = find_column(file, index, batch, path)
        if batch.rows and not _can_hold(header, column, batch.rows):
            # The counts do not tell which row it is.
            for _ in _open_decoded(header, columns, index, number, first)(0, batch.rows):
                pass
            fail(file, f"a record batch claims {batch.rows:,} vectors, and has no room for them; write it again")
        first += batch.rows
    return header


def _first_length(header: FileHeader, columns: Columns, index: Index, path: Path) -> int:
    """Return how many items most vectors of the first record batch have."""
    number = next(number for number, batch in enumerate(index.batches) if batch.rows)
    column = find_column(header.file, index, index.batches[number], path)
    rows, items = index.batches[number].rows, int(column.nodes[-1, 0])
    counts: Counter[int] = Counter()
    if _has_views(column) and not column.has_nulls:
        counts.update(_numbers(header.file, column, 2, "large_list_view<")[:rows].tolist())
        return counts.most_common(1)[0][0] if counts else 0
    if not is_binary(column.type) and not column.has_nulls and items % rows == 0:
        return items // rows
    for batch in open_batch(header.file, index, number, 0, {columns.column: path})(0, rows, rows):
        array = batch.column(0)
        lengths = lengths_of(array.cast(pa.large_binary()) if is_binary(column.type) else array)
        counts.update(lengths[array.is_valid().to_numpy(zero_copy_only=False)].tolist())
    length = counts.most_common(1)[0][0] if counts else 0
    if not is_binary(column.type):
        return length
    where = f"{header.file.url}: column {columns.column!r} holds {length} bytes a row"
    return binary_dimension(where, length, header.dtype)


def _can_hold(header: FileHeader, column: Column, rows: int) -> bool:
    """Tell whether counts and sizes leave room for the vectors of a batch, none of them or of their items null."""
    has_views = _has_views(column)
    items = header.dimension if has_views else rows * header.dimension  # rows may share them
    if column.has_nulls:
        return False
    if is_binary(column.type) or is_nested(column.type):
        return True  # only the values tell their lengths
    nbytes = int(column.buffers[-1, 1])
    enough = nbytes >= (items * header.dtype.itemsize if not column.codec else (items * header.dtype.itemsize) >> 17)
    if is_bytes(column.type):
        return enough
    nodes = column.nodes[column.depth :]
    if has_views:
        return enough and 0 < items <= int(nodes[1, 0])
    return enough and int(nodes[1, 0]) == items and not int(nodes[1, 1])


def _stored(column: Column) -> pa.DataType:
    return column.type.storage_type if isinstance(column.type, pa.BaseExtensionType) else column.type


def _has_views(column: Column) -> bool:
    """Tell whether vectors may lie in any order, with others between: pyarrow writes all items into each batch."""
    kind = _stored(column)
    return is_list_view(kind) and not is_nested(kind)


def _numbers(file: StoredFile, column: Column, place: int, large: str) -> Array:
    """Return a buffer of places or lengths of lists; in some types, whose names begin so, they have 64 bits."""
    data = inflate(file, read_range(file, *column.spans[column.depth + place]), column.codec)
    dtype = np.dtype("<i8" if str(_stored(column)).startswith(large) else "<i4")
    return np.frombuffer(data, dtype, len(data) // dtype.itemsize)


def _values(header: FileHeader, column: Column, rows: int) -> tuple[int, int] | None:
    """Return where the items of a batch are, one vector after the other, and their length; None if that is not so."""
    kind = _stored(column)
    if is_binary(kind) or is_nested(kind) or _has_views(column) or not _can_hold(header, column, rows):
        return None
    if is_list(kind):
        offsets = _numbers(header.file, column, 1, "large_list<")[: rows + 1]
        if len(offsets) <= rows or (np.diff(offsets) != header.dimension).any() or offsets[0]:
            return None
    start, nbytes = column.buffers[-1].tolist()
    return start, nbytes


def _even_places(header: FileHeader, index: Index, columns: Columns) -> tuple[int, int, int] | None:
    """Return where vectors lie that are not compressed, if the batches follow each other evenly."""
    filled = [batch for batch in index.batches if batch.rows]
    rows = filled[0].rows
    if isinstance(columns.embedding, tuple):
        return None
    path = vectors_path(header.file, index, columns.column)
    if len(filled) < len(index.batches) or any(batch.codec for batch in index.batches):
        return None
    if any(batch.rows != rows for batch in index.batches[:-1]) or index.batches[-1].rows > rows:
        return None
    found = [find_column(header.file, index, batch, path) for batch in filled]
    if is_list(found[0].type):  # offsets would have to be read
        return None
    starts = [
        place[0]
        for column, batch in zip(found, filled, strict=True)
        if (place := _values(header, column, batch.rows)) is not None
    ]
    steps = set(np.diff(starts).tolist()) or {rows * header.dimension * header.dtype.itemsize}
    if len(starts) < len(filled) or len(steps) > 1:
        return None
    return starts[0], steps.pop(), rows


def _open_even(header: FileHeader) -> StretchReader:
    """Return a function that reads vectors as they lie in batches that follow each other evenly."""
    _, first, stride, batch_rows = header.layout
    row_nbytes = header.dimension * header.dtype.itemsize

    def place(stretches: Iterable[Stretch]) -> Iterator[tuple[int, int, Array]]:
        for row, out in stretches:
            done = 0
            while done < len(out):
                batch, within = divmod(row + done, batch_rows)
                count = min(len(out) - done, batch_rows - within)
                yield first + batch * stride + within * row_nbytes, row + done, out[done : done + count]
                done += count

    def read(stretches: Sequence[Stretch]) -> None:
        read_placed(header.file, header.dtype, list(place(stretches)))

    return read


def _open_batches(header: FileHeader, columns: Columns) -> StretchReader:
    """Return a function that reads vectors batch by batch."""
    index = promised_index(header)
    bounds = list(accumulate(index.batch_rows, initial=0))
    current, reader = -1, None

    def read(stretches: Sequence[Stretch]) -> None:
        nonlocal current, reader
        for row, out in stretches:
            done = 0
            while done < len(out):
                number = bisect_right(bounds, row + done) - 1
                count = min(len(out) - done, bounds[number + 1] - row - done)
                with naming_rows(row + done, row + done + count):
                    if number != current:
                        current, reader = number, _open_batch(header, columns, index, number, bounds[number])
                    assert reader is not None
                    reader([(row + done, out[done : done + count])])
                done += count

    return read


def _open_batch(header: FileHeader, columns: Columns, index: Index, number: int, first: int) -> StretchReader:
    """Return a function that reads vectors of one record batch, which begins at a row."""
    place, batch = None, index.batches[number]
    if not isinstance(columns.embedding, tuple):
        path = vectors_path(header.file, index, columns.column)
        place = _values(header, find_column(header.file, index, batch, path), batch.rows)
    row_nbytes = header.dimension * header.dtype.itemsize
    if place is not None and not batch.codec:

        def read_plain(stretches: Sequence[Stretch]) -> None:
            placed = [(place[0] + (row - first) * row_nbytes, row, out) for row, out in stretches]
            read_placed(header.file, header.dtype, placed)

        return read_plain
    if place is not None:
        return _open_compressed(header, batch, place, first)
    decode = _open_decoded(header, columns, index, number, first)

    def read_decoded(stretches: Sequence[Stretch]) -> None:
        for row, out in stretches:
            copy_blocks(decode(row - first, row - first + len(out)), [out], header.file, row)

    return read_decoded


def _open_decoded(
    header: FileHeader, columns: Columns, index: Index, number: int, first: int
) -> Callable[[int, int], Iterator[Array]]:
    """Return what decodes vectors of a record batch, a few at a time; it fails on the first that is none."""
    iter_rows = open_batch(header.file, index, number, first, _paths(header.file, index, columns))
    step = max(1, _BLOCK_NBYTES // max(1, header.dimension * header.dtype.itemsize))

    def decode(low: int, high: int) -> Iterator[Array]:
        for batch in iter_rows(low, high, step):
            if isinstance(columns.embedding, tuple):
                yield join_items(header, columns, first + low, batch)
            else:
                yield as_vectors(header, columns, first + low, batch.column(0))
            low += batch.num_rows

    return decode


class _FilePart(io.RawIOBase):
    """Some bytes of a file, read one after the other."""

    def __init__(self, file: StoredFile, start: int, stop: int) -> None:
        self._file, self._position, self._stop = file, start, stop

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = min(len(buffer), self._stop - self._position)
        if count:
            read_into(self._file, self._position, [memoryview(buffer)[:count]])
        self._position += count
        return count


def _window_nbytes(header: FileHeader) -> int:
    return max(_WINDOW_NBYTES, 8 * header.file.store.request_nbytes)


def _open_compressed(header: FileHeader, batch: Batch, place: tuple[int, int], first: int) -> StretchReader:
    """Return a function that inflates the vectors of a record batch, block by block."""
    part = _FilePart(header.file, place[0], place[0] + place[1])
    stored = io.BufferedReader(part, max(1, min(_window_nbytes(header), place[1])))
    row_nbytes = header.dimension * header.dtype.itemsize
    nbytes = batch.rows * row_nbytes
    claimed = int.from_bytes(stored.read(8), "little", signed=True)
    if claimed == -1:
        stream: Any = stored
        claimed = place[1] - 8
    else:
        stream = pa.CompressedInputStream(pa.PythonFile(stored, "r"), batch.codec)
    if not nbytes <= claimed <= nbytes + _PADDING_NBYTES:
        fail(header.file, f"a record batch of {nbytes:,} bytes of vectors claims to have {claimed:,}; write it again")
    reached = first

    def inflate_rows(rows: int) -> Iterator[Array]:
        step = max(1, _BLOCK_NBYTES // row_nbytes)
        for done in range(0, rows, step):
            wanted = min(step, rows - done) * row_nbytes
            with decoding(header.file, reached, reached + rows, "a column of vectors"):
                found = stream.read(wanted)
            if len(found) < wanted:
                fail(header.file, "a record batch ends before its last vector; write it again")
            yield np.frombuffer(found, header.dtype).reshape(-1, header.dimension)

    def read(stretches: Sequence[Stretch]) -> None:
        nonlocal reached
        for row, out in stretches:
            for _ in inflate_rows(row - reached):
                pass
            reached = row
            copy_blocks(inflate_rows(len(out)), [out], header.file, row)
            reached = row + len(out)

    return read
