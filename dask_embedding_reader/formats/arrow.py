"""Arrow's IPC format (feather 2): a column of vectors, and columns of metadata beside it, in record batches.

Vectors that are not compressed are read as they lie in the file, row by row; compressed ones are inflated from the
beginning of their record batch, block by block.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import ColumnError, EmbeddingReaderError, FormatError, ReadError
from dask_embedding_reader.formats.base import (
    DEFAULT_COLUMN,
    Array,
    Columns,
    FileHeader,
    MetaColumn,
    RowReader,
    Stretch,
    StretchReader,
    default_piece_rows,
    in_order,
)
from dask_embedding_reader.formats.ipc import Batch, Index, column_of, decode_column, fail, inflate, read_index
from dask_embedding_reader.formats.parquet.tables import is_masked
from dask_embedding_reader.formats.partitions import TOLD_BY_FOLDERS, partition_values
from dask_embedding_reader.formats.raw import copy_blocks, naming_rows, raw_held_nbytes, read_placed
from dask_embedding_reader.formats.vector_columns import (
    as_vectors,
    binary_dimension,
    is_binary,
    is_bytes,
    is_list,
    is_nested,
    item_type,
    lengths_of,
    no_vectors,
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
"""Of compressed vectors as much is held at once: writers make record batches of any size."""

_REMOTE_WINDOW_NBYTES = 2**23
"""The same elsewhere, where each costs a request."""

_PADDING_NBYTES = 64
"""Buffers may be longer than what is in them by less than this."""

_BATCH_NBYTES = 32_000_000
"""What is written in a record batch, nearly: it is held until its buffers are known."""


class _Arrow:
    name = "arrow"
    suffixes: tuple[str, ...] = (".arrow", ".feather", ".ipc")
    first_nbytes = 0  # its footer is at the end
    holds_columns = True
    tells_dtype = False

    def find_vectors(self, file: StoredFile, columns: Columns, head: bytes) -> tuple[Sequence[str] | None, bytes]:
        """Find the columns of numbers in lists of one length."""
        index = read_index(file)
        if not _rows(index):
            return None, head
        names = index.schema.names
        if DEFAULT_COLUMN in names:
            return [DEFAULT_COLUMN], head
        if columns.embedding_dtype is not None:
            return [field.name for field in index.schema if is_bytes(field.type)], head
        return _columns_of_vectors(file, index), head

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read where its record batches are, and what the wanted columns hold."""
        del head
        index = read_index(file)
        header = FileHeader(file, _rows(index), 0, np.dtype(np.float32), (ARROW_LAYOUT,), _batch_rows(index))
        if not header.rows:  # its columns are of any type then, or missing
            return header._replace(meta=(MetaColumn(pa.null(), True),) * len(columns.meta))
        if columns.embedding is not None:
            header = _with_vectors(header, index, columns)
            if not columns.meta and (places := _even_places(header, index, columns)):
                header = header._replace(layout=(ARROW_LAYOUT, *places), group_rows=())
        return header._replace(meta=tuple(_meta_column(file, index, name) for name in columns.meta))

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

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that fills arrays with the next vectors."""
        return in_order(self.open_stretches(header, columns, start, stop), start)

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that fills arrays with some vectors."""
        del start, stop
        if len(header.layout) > 1:
            return _open_even(header)
        return _open_batches(header, columns)

    def raw_offset(self, header: FileHeader) -> int | None:
        """Return nothing: vectors lie in parts, or are encoded."""
        del header
        return None

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what answers hold, or windows and blocks of what is compressed."""
        del columns
        if len(header.layout) > 1:
            return raw_held_nbytes(header, rows, threads)
        return threads * (_window_nbytes(header) + 2 * _BLOCK_NBYTES)

    def drawback(self, header: FileHeader) -> str:
        """Say nothing: record batches are looked at by who knows how large they are."""
        del header
        return ""

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

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        """Return what :meth:`read_header` says of a file that :meth:`write` wrote."""
        del file, rows, dimension, dtype  # its footer tells, which pyarrow wrote
        return None


ARROW = _Arrow()


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _rows(index: Index) -> int:
    return sum(batch.rows for batch in index.batches)


def _batch_rows(index: Index) -> tuple[int, ...]:
    return tuple(batch.rows for batch in index.batches)


# ---------------------------------------------------------------------------------------------------------------------
# Columns


def arrow_schema(file: StoredFile) -> pa.Schema:
    """Return the columns of a file."""
    return read_index(file).schema


def _position(file: StoredFile, index: Index, name: str) -> int:
    positions = index.schema.get_all_field_indices(name)
    if len(positions) != 1:
        raise ColumnError(f"{file.url}: {_how_many(index, name)}; its columns are {_few(index.schema.names)}")
    return int(positions[0])


def _position_of_vectors(file: StoredFile, index: Index, name: str) -> int:
    if len(index.schema.get_all_field_indices(name)) == 1:
        return _position(file, index, name)
    if likely := _columns_of_vectors(file, index):
        remedy = f"name the column of vectors (embedding_column=...), such as {_few(likely)}"
        why = f"its columns are {_few(index.schema.names)}; {remedy}"
    else:
        why = no_vectors(index.schema, "name the column of vectors (embedding_column=...)")
    raise ColumnError(f"{file.url}: {_how_many(index, name)}; {why}")


def _how_many(index: Index, name: str) -> str:
    count = index.schema.names.count(name)
    return f"has {count} columns named {name!r}" if count else f"has no column {name!r}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _columns_of_vectors(file: StoredFile, index: Index) -> list[str]:
    """Return the columns of numbers in lists of one length, as far as their counts tell."""
    found = []
    for position, field in enumerate(index.schema):
        if item_type(field.type) is None or index.schema.names.count(field.name) > 1:
            continue
        columns = [(batch.rows, column_of(file, index, batch, position)) for batch in index.batches if batch.rows]
        lengths = {divmod(int(column.nodes[-1, 0]), rows) for rows, column in columns}
        if len(lengths) == 1 and lengths.pop()[1] == 0:
            found.append(field.name)
    return found


def _meta_column(file: StoredFile, index: Index, name: str) -> MetaColumn:
    if name not in index.schema.names and name in partition_values(file.path):
        return TOLD_BY_FOLDERS
    position = _position(file, index, name)
    field = index.schema.field(position)
    has_nulls = is_masked(field) or any(
        int(column_of(file, index, batch, position).nodes[0, 1]) for batch in index.batches if batch.rows
    )
    if not pa.types.is_dictionary(field.type):
        return MetaColumn(field.type, has_nulls or pa.types.is_null(field.type))
    number = index.dictionary_of[position] or 0
    parts = {id(part): part for known in index.dictionaries for part in known.get(number, ())}.values()
    return MetaColumn(field.type.value_type, has_nulls or any(int(part.nodes[0, 1]) for part in parts))


def iter_arrow_tables(
    header: FileHeader, names: Sequence[str], start: int, stop: int, step: int
) -> Iterator[pa.RecordBatch]:
    """Decode the rows ``[start, stop)`` of some columns, in order, a few rows at a time.

    Raises
    ------
    FormatError
        If a record batch cannot be decoded.
    ReadError
        If the storage does not deliver it.
    """
    file = header.file
    try:
        index = _promised(header)
        positions = [_position(file, index, name) for name in names]
        for number, first, low, high in _spans(index, start, stop):
            arrays = []
            for name, position in zip(names, positions, strict=True):
                with _decoding(file, first, first + index.batches[number].rows, name):
                    array = decode_column(file, index, number, position)
                    array.validate(full=True)
                arrays.append(array.slice(low, high - low))
            for begin in range(0, high - low, step):
                yield pa.RecordBatch.from_arrays(
                    [_values_of(array.slice(begin, step)) for array in arrays], list(names)
                )
    except ReadError as error:
        raise type(error)(f"rows {start:,} to {stop:,}: {error}") from error


def _values_of(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


@contextmanager
def _decoding(file: StoredFile, start: int, stop: int, name: str) -> Iterator[None]:
    """Have what goes wrong when rows are decoded say which they are."""
    try:
        yield
    except EmbeddingReaderError:
        raise
    except Exception as error:
        raise FormatError(
            f"{file.url}, rows {start:,} to {stop:,}: column {name!r} cannot be decoded: {describe(error)}; write the "
            "file again"
        ) from error


def _promised(header: FileHeader) -> Index:
    """Return what a file holds, which has the rows that the header tells, maybe from a manifest that is wrong."""
    index = read_index(header.file)
    rows = _batch_rows(index)
    wanted = rows[header.first_group : header.first_group + len(header.group_rows)]
    if sum(rows) != header.rows or header.group_rows not in ((), (header.rows,), wanted):
        raise FormatError(
            f"{header.file.url}: holds {sum(rows):,} rows in {len(rows):,} record batches, "
            f"where {header.rows:,} rows in other ones were promised; save the manifest again if there is one, else "
            "open the collection again"
        )
    return index


def _spans(index: Index, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the record batches that hold some rows: number, first row, and which of its rows are wanted."""
    first = 0
    for number, batch in enumerate(index.batches):
        low, high = max(0, start - first), min(batch.rows, stop - first)
        if low < high:
            yield number, first, low, high
        first += batch.rows


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


def _with_vectors(header: FileHeader, index: Index, columns: Columns) -> FileHeader:
    """Return a header that tells the dtype and the dimension of the vectors."""
    file, position = header.file, _position_of_vectors(header.file, index, columns.column)
    field = index.schema.field(position)
    likely = _columns_of_vectors(file, index)
    remedy = "name the column of vectors (embedding_column=...)" + (f", such as {_few(likely)}" if likely else "")
    dtype, dimension = type_of_items(file.url, field, columns, lambda: remedy)
    header = header._replace(dtype=dtype)
    if dimension is None:
        number = next(number for number, batch in enumerate(index.batches) if batch.rows)
        dimension = _first_length(header, index, number, position, dtype)
    if not dimension:
        raise FormatError(f"{file.url}: column {field.name!r} holds vectors of no items")
    header = header._replace(dimension=dimension)
    first = 0
    for number, batch in enumerate(index.batches):
        if batch.rows and not _can_hold(header, index, batch, position):
            # The counts do not tell which row it is.
            _decoded(header, columns, index, number, first)
            fail(file, f"a record batch claims {batch.rows:,} vectors, and has no room for them; write it again")
        first += batch.rows
    return header


def _first_length(header: FileHeader, index: Index, number: int, position: int, dtype: np.dtype[Any]) -> int:
    """Return how many items most vectors of a record batch have."""
    batch = index.batches[number]
    column = column_of(header.file, index, batch, position)
    kind = index.schema.field(position).type
    if not is_binary(kind) and not int(column.nodes[0, 1]) and int(column.nodes[-1, 0]) % batch.rows == 0:
        return int(column.nodes[-1, 0]) // batch.rows
    with _decoding(header.file, 0, batch.rows, index.schema.field(position).name):
        array = decode_column(header.file, index, number, position)
        array.validate(full=True)
    lengths = lengths_of(array.cast(pa.large_binary()) if is_binary(kind) else array)
    counts = Counter(lengths[array.is_valid().to_numpy(zero_copy_only=False)].tolist())
    length = counts.most_common(1)[0][0] if counts else 0
    if not is_binary(kind):
        return int(length)
    where = f"{header.file.url}: column {index.schema.field(position).name!r} holds {length} bytes a row"
    return binary_dimension(where, length, dtype)


def _can_hold(header: FileHeader, index: Index, batch: Batch, position: int) -> bool:
    """Tell whether counts and sizes leave room for the vectors of a batch, none of them or of their items null."""
    kind = index.schema.field(position).type
    column = column_of(header.file, index, batch, position)
    items = batch.rows * header.dimension
    if int(column.nodes[0, 1]):
        return False
    if is_binary(kind) or is_nested(kind):
        return True  # only the values tell their lengths
    nbytes = int(column.buffers[-1, 1])
    enough = nbytes >= (items * header.dtype.itemsize if not batch.codec else (items * header.dtype.itemsize) >> 17)
    if is_bytes(kind):
        return enough
    return enough and int(column.nodes[1, 0]) == items and not int(column.nodes[1, 1])


def _values(header: FileHeader, index: Index, number: int, position: int) -> tuple[int, int] | None:
    """Return where the items of a batch are, one vector after the other, and their length; None if that is not so."""
    batch = index.batches[number]
    kind = index.schema.field(position).type
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if is_binary(kind) or is_nested(kind) or not _can_hold(header, index, batch, position):
        return None
    column = column_of(header.file, index, batch, position)
    start, nbytes = column.buffers[-1].tolist()
    if is_list(kind):
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return None  # views may lie in any order
        first, length = column.buffers[1].tolist()
        dtype = np.dtype("<i4" if pa.types.is_list(kind) else "<i8")
        most = (batch.rows + 1) * dtype.itemsize
        data = inflate(header.file, read_range(header.file, first, first + length), batch.codec)
        offsets = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        if offsets.nbytes < most or (np.diff(offsets[: batch.rows + 1]) != header.dimension).any() or offsets[0]:
            return None
    return start, nbytes


def _even_places(header: FileHeader, index: Index, columns: Columns) -> tuple[int, int, int] | None:
    """Return where vectors lie that are not compressed, if the batches follow each other evenly."""
    filled = [number for number, batch in enumerate(index.batches) if batch.rows]
    rows = index.batches[filled[0]].rows
    position = _position_of_vectors(header.file, index, columns.column)
    kind = index.schema.field(position).type
    if len(filled) < len(index.batches) or any(batch.codec for batch in index.batches):
        return None
    if any(batch.rows != rows for batch in index.batches[:-1]) or index.batches[-1].rows > rows:
        return None
    if is_list(kind):  # offsets would have to be read
        return None
    starts = [place[0] for number in filled if (place := _values(header, index, number, position)) is not None]
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
    index = _promised(header)
    position = _position_of_vectors(header.file, index, columns.column)
    bounds = list(accumulate(_batch_rows(index), initial=0))
    current, reader = -1, None

    def read(stretches: Sequence[Stretch]) -> None:
        nonlocal current, reader
        for row, out in stretches:
            done = 0
            while done < len(out):
                number = bisect_right(bounds, row + done) - 1
                if number != current:
                    current, reader = number, _open_batch(header, columns, index, number, position, bounds[number])
                count = min(len(out) - done, bounds[number + 1] - row - done)
                assert reader is not None
                with naming_rows(row + done, row + done + count):
                    reader([(row + done, out[done : done + count])])
                done += count

    return read


def _open_batch(
    header: FileHeader, columns: Columns, index: Index, number: int, position: int, first: int
) -> StretchReader:
    """Return a function that reads vectors of one record batch, which begins at a row."""
    place = _values(header, index, number, position)
    codec = index.batches[number].codec
    row_nbytes = header.dimension * header.dtype.itemsize
    if place is not None and not codec:

        def read_plain(stretches: Sequence[Stretch]) -> None:
            placed = [(place[0] + (row - first) * row_nbytes, row, out) for row, out in stretches]
            read_placed(header.file, header.dtype, placed)

        return read_plain
    if place is not None:
        return _open_compressed(header, index.batches[number], place, first)
    vectors = _decoded(header, columns, index, number, first)

    def read_decoded(stretches: Sequence[Stretch]) -> None:
        for row, out in stretches:
            copy_blocks([vectors[row - first : row - first + len(out)]], [out], header.file, row)

    return read_decoded


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
    return _WINDOW_NBYTES if header.file.store.is_local else _REMOTE_WINDOW_NBYTES


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
            with _decoding(header.file, reached, reached + rows, "of vectors"):
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


def _decoded(header: FileHeader, columns: Columns, index: Index, number: int, first: int) -> Array:
    """Decode the vectors of a record batch; fail on the first that is null or of another length."""
    position = _position_of_vectors(header.file, index, columns.column)
    with _decoding(header.file, first, first + index.batches[number].rows, columns.column):
        array = decode_column(header.file, index, number, position)
        array.validate(full=True)
    return as_vectors(header, columns, first, array)
