"""Columns of record batches, and fields of structs in them: where they lie, and some of their rows decoded.

Of buffers that are not compressed as much is read as these rows need: writers make record batches of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dask_embedding_reader.formats.arrow_types import takeable
from dask_embedding_reader.formats.ipc import Batch, Index, Int64s, children_of, fail, is_view, parts_of
from dask_embedding_reader.storage.read import read_range, read_ranges
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import StoredFile

Path = tuple[int, ...]
"""The position of a column, then of the field in the struct that it is, and so on."""

Decode = Callable[[int, int], pa.Array]
"""Decodes the rows from one of a record batch up to another one."""

WINDOW_NBYTES = 2**23
"""Of columns that are not compressed as much is decoded at once; what is smaller is fetched as a whole."""


class Column(NamedTuple):
    """The part of a record batch that is one column, or a field of a struct."""

    type: pa.DataType
    """Its type."""
    depth: int
    """How many structs it lies in."""
    nodes: Int64s
    """As of a batch: those of the structs first, then its own."""
    buffers: Int64s
    """The same: of each struct one, which tells where it is null."""
    views: tuple[int, ...]
    codec: str

    @property
    def has_nulls(self) -> bool:
        """Whether a row is null, or a struct that it lies in."""
        return bool(self.nodes[: self.depth + 1, 1].any())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first byte of each buffer, and the one after its last."""
        return [(start, start + nbytes) for start, nbytes in self.buffers.tolist()]

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return int(self.buffers[:, 1].sum())


def find_column(file: StoredFile, index: Index, batch: Batch, path: Path) -> Column:
    """Return a column of a record batch, or a field of a struct in it."""
    top, *steps = path
    kind, start = index.schema.field(top).type, index.starts[top]
    nodes: list[int] = []
    buffers: list[int] = []
    for step in steps:
        # Of a struct, a node and the buffer that tells where it is null come before its fields.
        nodes.append(int(start[0]))
        buffers.append(int(start[1]) + sum(batch.views[: start[2]]))
        start = np.sum([start, (1, 1, 0), *map(parts_of, children_of(kind)[:step])], axis=0)
        kind = kind.field(step).type
    node, buffer, view = start.tolist()
    own_nodes, own_buffers, own_views = parts_of(kind)
    buffer += sum(batch.views[:view])
    views = batch.views[view : view + own_views]
    nodes += range(node, node + own_nodes)
    buffers += range(buffer, buffer + own_buffers + sum(views))
    if nodes[-1] >= len(batch.nodes) or max(buffers, default=0) > len(batch.buffers) - 1 or len(views) < own_views:
        fail(file, "a record batch has fewer buffers than its columns need; write it again")
    column = Column(kind, len(steps), batch.nodes[nodes], batch.buffers[buffers], views, batch.codec)
    if (odd := column.nodes[: len(path), 0] != batch.rows).any():
        fail(file, f"a record batch of {batch.rows:,} rows has a column of {int(column.nodes[odd.argmax(), 0]):,}")
    return column


def open_columns(file: StoredFile, index: Index, number: int, paths: Sequence[Path]) -> tuple[list[Decode], int]:
    """Return what decodes rows of columns of a record batch, and how many of them are worth decoding at once.

    Dictionaries stay such, for the values of all rows may be far larger.
    """
    batch = index.batches[number]
    columns = [find_column(file, index, batch, path) for path in paths]
    nbytes = sum(column.nbytes for column in columns)
    stored: Iterator[bytes] | None = None
    if nbytes <= WINDOW_NBYTES:  # at once: elsewhere each would be a request
        stored = iter(read_ranges(file, [span for column in columns for span in column.spans]))
    readers = []
    for path, column in zip(paths, columns, strict=True):
        decode = _open(file, column, None if stored is None else [next(stored) for _ in column.buffers])
        if pa.types.is_dictionary(index.schema.field(path[0]).type):
            known = index.dictionaries[number].get(index.dictionary_of[path[0]] or 0, ())
            decode = _with_dictionary(file, index.schema.field(path[0]), decode, known)
        readers.append(decode)
    return readers, 1 if batch.codec else WINDOW_NBYTES * batch.rows // max(1, nbytes)


def _open(file: StoredFile, column: Column, stored: list[bytes] | None) -> Decode:
    """Return what decodes rows of a column whose buffers may be at hand; of a dictionary, their places in it."""
    if stored is None and column.codec:  # parts of them are of no use
        stored = read_ranges(file, column.spans)
    buffers = [
        _Buffer(file, start, nbytes, column.codec, None if stored is None else stored[place])
        for place, (start, nbytes) in enumerate(column.buffers.tolist())
    ]
    kind = column.type.index_type if pa.types.is_dictionary(column.type) and not column.depth else column.type
    for _ in range(column.depth):
        kind = pa.struct([("", kind)])

    def decode(low: int, high: int) -> pa.Array:
        first = low - low % 8
        array = _Building(file, column, buffers).build(kind, first, high)
        array.validate(full=True)
        array = array.slice(low - first)
        for _ in range(column.depth):
            [array] = array.flatten()  # null where the struct is
        return array

    return decode


def _with_dictionary(file: StoredFile, field: pa.Field, places: Decode, known: Sequence[Batch]) -> Decode:
    """Return what decodes rows of a column of a dictionary."""
    values: pa.Array | None = None

    def decode(low: int, high: int) -> pa.Array:
        nonlocal values
        if values is None:
            values = _join_dictionary(file, field, known)
        chosen = places(low, high)
        bounds = pc.min_max(chosen).as_py()
        if bounds["min"] is not None and not 0 <= bounds["min"] <= bounds["max"] < len(values):
            fail(file, f"column {field.name!r} has values that its dictionary lacks")
        return pa.DictionaryArray.from_arrays(chosen, values)

    return decode


def _join_dictionary(file: StoredFile, field: pa.Field, known: Sequence[Batch]) -> pa.Array:
    if not known:
        fail(file, f"the dictionary of column {field.name!r} is missing")
    kind = field.type.value_type
    parts = [
        _open(file, Column(kind, 0, part.nodes, part.buffers, part.views, part.codec), None)(0, part.rows)
        for part in known
    ]
    return takeable(pa.concat_arrays(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class _Buffer:
    """A buffer in the file: parts of it are read, or all of it once if it is compressed and not large."""

    def __init__(self, file: StoredFile, start: int, nbytes: int, codec: str, stored: bytes | None) -> None:
        self._file, self._start, self._nbytes, self._codec = file, start, nbytes, codec
        self._stored = stored
        self._whole: pa.Buffer | None = None
        self._inflating: _Inflating | None = None

    def read(self, start: int, stop: int, most_nbytes: int, *, ascending: bool = False) -> pa.Buffer:
        """Return some of its bytes, as far as it has them; it has so many at most.

        If what is wanted ascends from one call to the next, much of it need not be held.
        """
        if self._stored is not None:
            claimed = claimed_nbytes(self._file, self._stored, self._codec, most_nbytes)
            if ascending and claimed > _HELD_NBYTES:
                self._inflating = _Inflating(self._file, self._stored, self._codec, claimed)
            else:
                self._whole = inflate(self._file, self._stored, self._codec, most_nbytes=most_nbytes)
            self._stored = None
        if self._inflating is not None:
            return self._inflating.read(start, stop)
        size = self._nbytes if self._whole is None else self._whole.size
        start, stop = min(start, size), min(stop, size)
        if self._whole is not None:
            return self._whole.slice(start, stop - start)
        return pa.py_buffer(read_range(self._file, self._start + start, self._start + stop))


class _Inflating:
    """The bytes of a large compressed buffer, of which those are held that were wanted last: what is wanted ascends."""

    def __init__(self, file: StoredFile, data: bytes, codec: str, nbytes: int) -> None:
        self._file, self._data, self._codec, self._nbytes = file, data, codec, nbytes
        self._restart()

    def _restart(self) -> None:
        self._stream = pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(self._data).slice(8)), self._codec)
        self._last, self._last_start = b"", 0

    def read(self, start: int, stop: int) -> pa.Buffer:
        """Return some of the bytes, as far as there are so many."""
        start, stop = min(start, self._nbytes), min(stop, self._nbytes)
        reached = self._last_start + len(self._last)
        if self._last_start <= start and stop <= reached:
            return pa.py_buffer(self._last).slice(start - self._last_start, stop - start)
        if start < self._last_start:
            self._restart()
            reached = 0
        kept = self._last[start - self._last_start :] if start < reached else b""
        self._last = b""
        while reached < start:
            reached += len(self._take(min(_BLOCK_NBYTES, start - reached)))
        self._last, self._last_start = kept + self._take(stop - reached), start
        return pa.py_buffer(self._last)

    def _take(self, nbytes: int) -> bytes:
        try:
            found: bytes = self._stream.read(nbytes)
        except (pa.ArrowException, OSError) as error:
            fail(self._file, f"compressed bytes are damaged ({describe(error)}); write it again")
        if len(found) < nbytes:
            fail(self._file, f"compressed bytes claim to be {self._nbytes:,}, but end before; write it again")
        return found


class _Building:
    """Builds rows of a column: its nodes and buffers are taken in the order in which types have them.

    Rows begin at a multiple of 8, which are whole bytes of bits.
    """

    def __init__(self, file: StoredFile, column: Column, buffers: Sequence[_Buffer]) -> None:
        self._file = file
        self._nodes = iter(column.nodes.tolist())
        self._buffers = iter(buffers)
        self._views = iter(column.views)
        self._ascending = True
        """Whether rows are taken of each buffer that ascend; of what is within some types all are taken each time."""

    def build(self, kind: pa.DataType, low: int, high: int | None) -> pa.Array:
        """Return rows of a column; all from the first on if nothing tells how many."""
        if isinstance(kind, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind, self.build(kind.storage_type, low, high))
        if pa.types.is_dictionary(kind):
            fail(self._file, f"a column holds {kind} within another type; write the values themselves")
        count, nulls = next(self._nodes)
        high = count if high is None else high
        if not low <= high <= count:
            fail(self._file, f"a column of {high:,} values has only {count:,}; write it again")
        rows = _Rows(low, high, count)
        if pa.types.is_null(kind):
            return pa.nulls(high - low)
        if str(kind).startswith("run_end_encoded<"):
            self._ascending = False
            children = [self.build(child, 0, None) for child in children_of(kind)]
            return pa.Array.from_buffers(kind, count, [None], 0, 0, children).slice(low, high - low)
        if pa.types.is_union(kind):
            self._ascending = False
            own, children = self._union(kind, rows)
            return pa.Array.from_buffers(kind, high - low, [None, *own], 0, 0, children)
        valid = self._read(1, rows)
        if nulls and high > low and not valid.size:  # of no rows there is nothing to tell
            fail(self._file, "a column has nulls, but does not tell which; write it again")
        if valid.size:
            here = high - low - int(_bits(valid, high - low).sum())
            if here > nulls or (here < nulls and high - low == count):
                fail(self._file, f"a column claims {nulls:,} nulls, but marks {here:,} of its rows so; write it again")
        own, children = self._values(kind, rows, valid)
        own = [valid if valid.size else None, *own]  # no value is null
        return pa.Array.from_buffers(kind, high - low, own, -1 if valid.size else 0, 0, children or None)

    def _values(self, kind: pa.DataType, rows: _Rows, valid: pa.Buffer) -> tuple[list[pa.Buffer], list[pa.Array]]:
        """Return the buffers of rows, but for that of which are null, and what is within."""
        low, high = rows.low, rows.high
        if is_view(kind):
            return self._text_views(rows, valid), []
        if str(kind) in ("string", "binary", "large_string", "large_binary"):
            offsets, room = self._offsets(str(kind).startswith("large"), rows)
            first, last = int(offsets[0]), int(offsets[-1])
            text = next(self._buffers).read(first, last, room, ascending=self._ascending)
            if text.size < last - first:
                fail(self._file, "a column of text has offsets beyond its end; write it again")
            return [pa.py_buffer(offsets - first), text], []
        children = children_of(kind)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
            offsets, _ = self._offsets(pa.types.is_large_list(kind), rows)
            first = int(offsets[0]) - int(offsets[0]) % 8
            return [pa.py_buffer(offsets - first)], [self.build(children[0], first, int(offsets[-1]))]
        if str(kind).startswith(("list_view<", "large_list_view<")):
            offsets, sizes, first, last = self._places(str(kind).startswith("large"), rows, valid)
            return [pa.py_buffer(offsets), pa.py_buffer(sizes)], [self.build(children[0], first, last)]
        if pa.types.is_fixed_size_list(kind):
            return [], [self.build(children[0], low * kind.list_size, high * kind.list_size)]
        if pa.types.is_struct(kind):
            return [], [self.build(child, low, high) for child in children]
        return [self._read(kind.bit_width, rows)], []

    def _read(self, bits: int, rows: _Rows) -> pa.Buffer:
        """Return what the next buffer has of rows of so many bits each."""
        low, high, count = rows
        start, stop = low * bits // 8, -(-high * bits // 8)
        return next(self._buffers).read(start, stop, count * bits // 8 + 1, ascending=self._ascending)

    def _numbers(self, dtype: npt.DTypeLike, rows: _Rows) -> npt.NDArray[Any]:
        """Return what the next buffer has of rows, as numbers of a memory of their own."""
        wanted = rows.high - rows.low
        data = self._read(8 * np.dtype(dtype).itemsize, rows)
        if data.size < wanted * np.dtype(dtype).itemsize:
            fail(self._file, "a column has a buffer that is too short for its rows; write it again")
        return np.array(memoryview(data)).view(dtype)[:wanted]

    def _offsets(self, large: bool, rows: _Rows) -> tuple[npt.NDArray[Any], int]:
        """Return where what is within begins of each row, and ends of the last one; and of all rows."""
        low, high, count = rows
        dtype = np.dtype("<i8" if large else "<i4")
        buffer = next(self._buffers)
        if low == high:
            return np.zeros(1, dtype), 0  # there may be none
        most_nbytes = 16 * (count + 1)
        data = buffer.read(low * dtype.itemsize, (high + 1) * dtype.itemsize, most_nbytes)
        offsets = np.frombuffer(data, dtype, data.size // dtype.itemsize)
        if len(offsets) <= high - low or not 0 <= offsets[0] <= offsets[-1]:
            fail(self._file, "a column has offsets that are too few, or descend; write it again")
        end = np.frombuffer(buffer.read(count * dtype.itemsize, (count + 1) * dtype.itemsize, most_nbytes), dtype)
        return offsets, int(end[0]) if len(end) else 0

    def _places(
        self, large: bool, rows: _Rows, valid: pa.Buffer
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int, int]:
        """Return where the items of each row begin and how many they are, and which ones that are in all."""
        dtype = np.dtype("<i8" if large else "<i4")
        offsets, sizes = self._numbers(dtype, rows), self._numbers(dtype, rows)
        unused = (sizes == 0) | ~_bits(valid, len(sizes))
        offsets[unused], sizes[unused] = 0, 0
        if unused.all():
            return offsets, sizes, 0, 0
        first, last = int(offsets[~unused].min()), int((offsets.astype(np.int64) + sizes).max())
        if first < 0 or sizes.min() < 0:
            fail(self._file, "a column has items at places that are negative; write it again")
        first -= first % 8
        offsets[~unused] -= first
        return offsets, sizes, first, last

    def _text_views(self, rows: _Rows, valid: pa.Buffer) -> list[pa.Buffer]:
        views = self._numbers(_VIEW, rows)
        views[~_bits(valid, len(views))] = 0
        texts = []
        for place in range(next(self._views)):
            buffer = next(self._buffers)
            here = (views["length"] > _INLINE_NBYTES) & (views["buffer"] == place)
            if not here.any():  # the text of other rows
                texts.append(pa.py_buffer(b""))
                continue
            starts = views["start"][here].astype(np.int64)
            first, last = int(starts.min()), int((starts + views["length"][here]).max())
            if first < 0:
                fail(self._file, "a column has text at places that are negative; write it again")
            texts.append(buffer.read(first, last, _MOST_NBYTES))
            views["start"][here] -= first
        return [pa.py_buffer(views.view(np.uint8)), *texts]

    def _union(self, kind: pa.DataType, rows: _Rows) -> tuple[list[pa.Buffer], list[pa.Array]]:
        codes = self._read(8, rows)
        if kind.mode == "sparse":
            return [codes], [self.build(child, rows.low, rows.high) for child in children_of(kind)]
        places = self._read(32, rows)
        return [codes, places], [self.build(child, 0, None) for child in children_of(kind)]


class _Rows(NamedTuple):
    """Some rows of a column."""

    low: int
    high: int
    all: int
    """How many the column has."""


_VIEW = np.dtype([("length", "<i4"), ("prefix", "<i4"), ("buffer", "<i4"), ("start", "<i4")])
_INLINE_NBYTES = 12
"""Text of up to so many bytes lies in the view of it."""


def _bits(valid: pa.Buffer, count: int) -> npt.NDArray[np.bool_]:
    """Return which of so many rows are not null."""
    if not valid.size:
        return np.ones(count, bool)
    return np.unpackbits(np.frombuffer(valid, np.uint8), count=count, bitorder="little").astype(bool)


# ---------------------------------------------------------------------------------------------------------------------
# What is compressed

_MOST_RATIO = 2**17
"""No codec of Arrow's makes more of a byte."""

_MOST_NBYTES = 2**31
"""A buffer that is larger is not inflated for metadata."""

_LITTLE_NBYTES = 2**25
"""So much may be inflated in any case. More only where rows need half of it: some writers leave more in buffers."""

_HELD_NBYTES = 2**25
"""A buffer that is no larger is held as a whole when it is inflated; of a larger one as much as rows need."""

_BLOCK_NBYTES = 2**20


def inflate(file: StoredFile, data: bytes, codec: str, *, most_nbytes: int = _MOST_NBYTES) -> pa.Buffer:
    """Return a buffer as it was before it was compressed, of which rows need so many bytes at most.

    What it claims to have is not reserved before it has come.

    Raises
    ------
    FormatError
        If it is damaged, or claims more than it can hold.
    """
    if not codec or not data:
        return pa.py_buffer(data)
    claimed = claimed_nbytes(file, data, codec, most_nbytes)
    if claimed == -1:
        return pa.py_buffer(data[8:])
    try:
        stream = pa.CompressedInputStream(pa.BufferReader(data[8:]), codec)
        if claimed <= _LITTLE_NBYTES:
            found = stream.read_buffer(claimed + 1)
        else:
            sink = pa.BufferOutputStream()
            while sink.tell() <= claimed and (block := stream.read_buffer(_BLOCK_NBYTES)):
                sink.write(block)
            found = sink.getvalue()
    except (pa.ArrowException, OSError) as error:
        fail(file, f"compressed bytes are damaged ({describe(error)}); write it again")
    if len(found) != claimed:
        fail(file, f"{len(data):,} compressed bytes claim to be {claimed:,}, but are {len(found):,}; write it again")
    return found


def claimed_nbytes(file: StoredFile, data: bytes, codec: str, most_nbytes: int) -> int:
    """Return how many bytes a compressed buffer claims to have been, of which rows need so many; -1 if it is as it was.

    Raises
    ------
    FormatError
        If it claims more than it can hold, or rows need.
    """
    claimed = int.from_bytes(data[:8], "little", signed=True) if codec and data else -1
    most_nbytes = min(_MOST_NBYTES, _MOST_RATIO * len(data), max(_LITTLE_NBYTES, 2 * most_nbytes))
    if not -1 <= claimed <= most_nbytes:
        fail(
            file,
            f"{len(data):,} compressed bytes claim to be {claimed:,}, where {most_nbytes:,} are the most that its rows "
            "need; write it again, in smaller batches",
        )
    return claimed


def inflated_nbytes(file: StoredFile, column: Column) -> int:
    """Return what the buffers of a column take when they are not compressed, as far as they claim to."""
    if not column.codec:
        return column.nbytes
    heads = read_ranges(file, [(start, min(stop, start + 8)) for start, stop in column.spans])
    claims = [int.from_bytes(head, "little", signed=True) for head in heads]
    nbytes = [stop - start for start, stop in column.spans]
    return sum(max(own, min(claim, _MOST_RATIO * own)) for claim, own in zip(claims, nbytes, strict=True))
