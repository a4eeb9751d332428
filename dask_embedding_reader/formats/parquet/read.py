"""Vectors of parquet files: those that lie plainly in pages are taken from there, pyarrow decodes the others.

Only the footer and the column chunks that are asked for are read. Vectors are taken as the flat array of items that
parquet stores, never as one object a row, and decoded a few MB at a time: a row group may be larger than the memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.base import Array, Columns, FileHeader, PartReader, Stretch, StretchReader
from dask_embedding_reader.formats.column_names import fields_of, find_field
from dask_embedding_reader.formats.parquet.chunk_file import ChunkFile, Extent
from dask_embedding_reader.formats.parquet.column_chunks import Chunk
from dask_embedding_reader.formats.parquet.compression import can_be_plain
from dask_embedding_reader.formats.parquet.decode import WINDOW_NBYTES, iter_tables
from dask_embedding_reader.formats.parquet.footers import promised_footer, read_footer
from dask_embedding_reader.formats.parquet.header import columns_type, items_of, vector_field
from dask_embedding_reader.formats.parquet.page_index import PageIndex, read_page_index
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.plain_pages import Page, PlainChunk
from dask_embedding_reader.formats.raw import copy_rows, naming_rows, take_rows
from dask_embedding_reader.formats.vector_columns import as_vectors, is_binary, is_ml_vector, is_nested, join_items
from dask_embedding_reader.storage.read import reading_often

_DECODE_NBYTES = 2 * 2**20
"""Vectors are decoded in steps of this many bytes: as fast as whole row groups, in a tenth of the memory."""

_PLAIN_TYPES = {1: ("<i4", "<u4"), 2: ("<i8", "<u8"), 4: ("<f4",), 5: ("<f8",), 7: ("<f2",)}
"""What parquet's types are in memory, by their numbers."""

_NARROW_TYPES = {"|i1": "<i4", "|u1": "<i4", "<i2": "<i4", "<u2": "<i4"}
"""What narrow integers are stored as."""


def open_stretches(header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
    """Return a function that fills arrays with some vectors; of those between, plain ones are not even read."""
    return _Vectors(header, columns, start, stop).read_stretches


def open_parts(header: FileHeader, columns: Columns, start: int, stop: int) -> PartReader:
    """Return a function that looks up where the next vectors are, and returns what fills arrays with them.

    Or nothing, where it had to read them at once.
    """
    vectors = _Vectors(header, columns, start, stop)

    def read(outs: Sequence[Array]) -> Callable[[], None] | None:
        nonlocal start
        row = start
        start += sum(map(len, outs))
        fill = vectors.find(row, start)
        if fill is not None:
            return partial(fill, outs)
        vectors.read(row, outs)
        return None

    return read


Span = tuple[int, int]
"""The first of some rows or bytes, and the one after the last."""


class _Group(NamedTuple):
    """A row group of which some vectors are wanted."""

    place: Place | None
    """Where they may lie plainly."""
    first: int
    """Its first row."""
    last: int
    """The row where what is wanted of it ends."""
    rows: int = 0
    """How many it has."""
    number: int = 0
    """Which one of the file it is."""
    chunk: Chunk | None = None
    """Where its column of vectors is."""
    pages: PageIndex | None = None
    """Where their pages are, if few of them are wanted of a remote file that tells."""

    def extents_of(self, spans: Sequence[Span]) -> list[Extent]:
        """Return where in the file is what holds some rows of it: pages, and what is before all of them."""
        here = [(max(a, self.first) - self.first, min(b, self.last) - self.first) for a, b in spans]
        here = [span for span in here if span[0] < span[1]]
        if self.chunk is None or not here:
            return []
        if self.pages is None:
            start, stop = self.chunk[:2]
            return [Extent(start, stop, start - (start - stop) * here[-1][1] // self.rows)]
        found = [(self.chunk.start, self.pages.starts[0])]
        for span in here:
            start, stop = self.pages.bytes_of(*span)
            if start <= found[-1][1]:
                start = found.pop()[0]
            found.append((start, stop))
        return [Extent(start, stop, stop) for start, stop in found if start < stop]


class _Vectors:
    """The vectors of the rows ``[start, stop)`` of a file, which ascend from one call to the next.

    Those in plain pages are taken from there, pyarrow decodes the others.
    """

    def __init__(self, header: FileHeader, columns: Columns, start: int, stop: int) -> None:
        self._header, self._columns, self._start, self._stop = header, columns, start, stop
        self._groups: list[_Group] | None = None
        self._remote: ChunkFile | None = None
        self._by_pages = False  # that is made anew for each call, of the pages that it needs
        self._chunk: tuple[int, PlainChunk] | None = None
        self._blocks: Iterator[Array] = iter(())
        self._block, self._block_row, self._blocks_stop = np.empty((0, header.dimension), header.dtype), 0, 0
        self._decoded_stop = 0  # pyarrow decodes the rows before

    def read_stretches(self, stretches: Sequence[Stretch]) -> None:
        """Fill arrays with stretches of rows."""
        rest = list(stretches)
        with reading_often(self._header.file):
            while rest:
                count = self._fetch_pages([(row, row + len(out)) for row, out in rest])
                for row, out in rest[:count]:
                    self.read(row, [out])
                del rest[:count]

    def _fetch_pages(self, spans: Sequence[Span]) -> int:
        """Fetch the pages of rows that lie apart, as many as may be held; return of how many spans these are."""
        groups = self._open(spans)
        if not self._by_pages:
            return len(spans)
        extents: list[Extent] = []
        count = 0
        while count < len(spans) and (not count or sum(each.stop - each.start for each in extents) < 2 * WINDOW_NBYTES):
            count += 1
            extents = [each for group in groups for each in group.extents_of(spans[:count])]
        with naming_rows(spans[0][0], spans[count - 1][1]):
            self._remote = ChunkFile(self._header.file, extents, WINDOW_NBYTES)
        return count

    def read(self, row: int, outs: Sequence[Array]) -> None:
        """Fill arrays, one after the other, with the vectors from a row on."""
        with reading_often(self._header.file):
            self._read(row, outs)

    def _read(self, row: int, outs: Sequence[Array]) -> None:
        rest, stop = deque(outs), row + sum(map(len, outs))
        for group in self._open([(row, stop)]):
            last = min(group.last, stop)
            if row >= last:
                continue
            if group.place is None:  # nor is anything behind it plain
                self._decoded_stop = self._stop
            if row >= self._decoded_stop:
                chunk, begin = self._plain_chunk(group), row
                skip, rows = row - group.first, last - row
                row += chunk.fill(chunk.iter_pages(skip, rows), skip, rows, row, rest)
                if row < last:  # nothing of it is plain; nor is what follows, then
                    self._decoded_stop = self._stop if row == begin else group.last
            if row < last:
                self._decode(row, last, group, rest)
                row = last
        if stop >= self._stop:  # who asked for the last ones may keep this for a while
            self._remote = self._chunk = None
            self._blocks, self._blocks_stop = iter(()), 0

    def find(self, row: int, stop: int) -> Callable[[Sequence[Array]], None] | None:
        """Return what fills arrays with the vectors of rows, at any time; None where that cannot be.

        Not of remote files: what is fetched at once holds pages of several pieces.
        """
        if self._header.file.store.request_nbytes:
            return None
        found: list[tuple[_Group, PlainChunk, list[Page], int, int]] = []
        for group in self._open([(row, stop)]):
            last = min(group.last, stop)
            if row >= last:
                continue
            if row < self._decoded_stop or group.place is None:
                return None
            chunk, rows = self._plain_chunk(group), last - row
            with naming_rows(row, last), reading_often(self._header.file):
                pages = list(chunk.iter_pages(row - group.first, rows))
            if not pages or pages[-1].stop < (last - group.first) * group.place.row_values:
                return None
            found.append((group, chunk, pages, row, last))
            row = last
        return partial(self._fill_found, found)

    def _fill_found(
        self, found: Sequence[tuple[_Group, PlainChunk, list[Page], int, int]], outs: Sequence[Array]
    ) -> None:
        file, rest = self._header.file, deque(outs)
        for group, chunk, pages, row, last in found:
            with reading_often(file):
                done = chunk.fill(iter(pages), row - group.first, last - row, row, rest)
            if done < last - row:
                # Whoever looks up the next ones shall not have the same again.
                self._decoded_stop = max(self._decoded_stop, group.last)
                for vectors in _iter_decoded(self._header, self._columns, row + done, last, None):
                    copy_rows(vectors, take_rows(rest, len(vectors)), file, row + done)
                    done += len(vectors)

    def _open(self, spans: Sequence[Span]) -> list[_Group]:
        """Return the row groups that hold rows that are wanted, some of them first."""
        if self._groups is None:
            header = self._header
            with naming_rows(spans[0][0], spans[-1][1]):
                if isinstance(self._columns.embedding, tuple):
                    _promised_items(header, self._columns)
                    wanted = _wanted_groups(header, self._start, self._stop)
                    self._groups = [_Group(None, first, last) for _, first, last in wanted]
                    return self._groups
                field, leaves = _promised_field(header, self._columns)
                self._groups = _find_groups(header, field, leaves[0], self._start, self._stop)
                if header.file.store.request_nbytes and any(group.place is not None for group in self._groups):
                    self._open_remote(leaves[0], spans)
        return self._groups

    def _open_remote(self, leaf: int, spans: Sequence[Span]) -> None:
        """Fetch small column chunks, or find the pages of larger ones of which little is wanted."""
        assert self._groups is not None
        rows, extent = sum(stop - start for start, stop in spans), spans[-1][1] - spans[0][0]
        share = rows / extent if 2 * rows <= extent else 1
        self._groups = [_with_index(self._header, group, leaf, self._start, share) for group in self._groups]
        self._by_pages = share < 1 and all(group.pages is not None for group in self._groups)
        if not self._by_pages:
            extents = [each for group in self._groups for each in group.extents_of([(self._start, self._stop)])]
            self._remote = ChunkFile(self._header.file, extents, WINDOW_NBYTES)

    def _read_at(self, start: int, stop: int) -> memoryview:
        assert self._remote is not None
        return self._remote.read_at(start, stop)

    def _plain_chunk(self, group: _Group) -> PlainChunk:
        """Return the pages of a row group: of one at a time, the others are before it, or wanted later."""
        assert group.place is not None
        if self._chunk is None or self._chunk[0] != group.first:
            fetch = None if self._remote is None else self._read_at
            self._chunk = group.first, PlainChunk(self._header.file, group.place, fetch, group.pages)
        return self._chunk[1]

    def _decode(self, row: int, last: int, group: _Group, rest: deque[Array]) -> None:
        """Fill arrays with rows that pyarrow decodes, going on where it stopped."""
        if not self._block_row <= row < self._blocks_stop:
            self._blocks_stop = max(self._decoded_stop, group.last)
            # Where only some pages are at hand, pyarrow fetches what it needs itself.
            remote = None if any(each.pages is not None for each in self._groups or ()) else self._remote
            self._blocks = _iter_decoded(self._header, self._columns, row, self._blocks_stop, remote)
            self._block, self._block_row = self._block[:0], row
        while row < last:
            skip = row - self._block_row
            if skip >= len(self._block):
                self._block_row += len(self._block)
                self._block = next(self._blocks)
                continue
            vectors = self._block[skip : skip + last - row]
            copy_rows(vectors, take_rows(rest, len(vectors)), self._header.file, row)
            row += len(vectors)
        if row == self._block_row + len(self._block):
            # Not an empty view: that would hold the memory.
            self._block, self._block_row = np.empty_like(self._block[:0]), row


def _iter_decoded(
    header: FileHeader, columns: Columns, start: int, stop: int, remote: ChunkFile | None
) -> Iterator[Array]:
    """Yield the vectors of the rows ``[start, stop)``, a few at a time, as pyarrow decodes them."""
    step = max(1, _DECODE_NBYTES // max(1, header.dimension * header.dtype.itemsize))
    for table in iter_tables(header, columns.vectors, start, stop, step, remote=remote):
        if isinstance(columns.embedding, tuple):
            yield join_items(header, columns, start, table)
        else:
            yield as_vectors(header, columns, start, table.column(0))
        start += table.num_rows


def _wanted_groups(header: FileHeader, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the row groups that hold some rows, the row where each begins, and the one where what is wanted ends."""
    first = header.first_group_row
    for group, rows in enumerate(header.group_rows, header.first_group):
        if max(first, start) < min(first + rows, stop):
            yield group, first, min(first + rows, stop)
        first += rows


def _with_index(header: FileHeader, group: _Group, leaf: int, start: int, share: float) -> _Group:
    """Add the index of the pages of a row group, if so little of it is wanted that two requests less are worth it.

    Of its rows from ``start`` on only a share is wanted.
    """
    footer, chunk = read_footer(header.file, ()), group.chunk
    if group.place is None or chunk is None:
        return group
    rows = footer.group_rows[group.number]
    wanted = share * (group.last - max(group.first, start)) / rows
    if (1 - wanted) * (chunk.stop - chunk.start) <= 2 * header.file.store.request_nbytes:
        return group
    return group._replace(pages=read_page_index(header.file, footer.index_place(leaf, group.number), chunk, rows))


def _promised_field(header: FileHeader, columns: Columns) -> tuple[pa.Field, range]:
    """Return the column of vectors, of the type that the header tells: it may come from a manifest that is wrong."""
    footer = promised_footer(header, (columns.column,))
    field, leaves = vector_field(header.file, footer, columns.column)
    dtype, dimension = items_of(header.file, field, columns, footer)
    if dtype != header.dtype or dimension not in (None, header.dimension):
        raise FormatError(
            f"{header.file.url}: column {field.name!r} is {field.type}, which does not hold the promised vectors of "
            f"{header.dimension} {header.dtype}; save the manifest again"
        )
    return field, leaves


def _promised_items(header: FileHeader, columns: Columns) -> None:
    """Check that the columns of items are of the type that the header tells."""
    found = columns_type(header, promised_footer(header, columns.vectors), columns)
    if found != (header.dtype, header.dimension):
        raise FormatError(
            f"{header.file.url}: holds vectors of {found[1]} {found[0]} in columns, where {header.dimension} "
            f"{header.dtype} were promised; save the manifest again"
        )


def _storage(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _definition(schema: pa.Schema, field: pa.Field) -> int:
    """Return the level of definition of an item that is not null: one for each thing that may be null or repeated."""
    kind = _storage(field.type)
    path = find_field(schema, field.name)
    assert path is not None
    nullable = sum(bool(each.nullable) for each in fields_of(schema, path))
    return nullable + (0 if pa.types.is_fixed_size_binary(kind) else 1 + int(kind.value_field.nullable))


def _find_groups(header: FileHeader, field: pa.Field, leaf: int, start: int, stop: int) -> list[_Group]:
    """Return the row groups that hold some rows, and where their vectors may lie plainly, as far as that is so."""
    footer = read_footer(header.file, (field.name,))
    wanted = list(_wanted_groups(header, start, stop))
    chunks = footer.chunks(leaf, [group for group, _, _ in wanted])
    groups = []
    # The length of each may lie between them.
    may_be_plain = not (is_binary(field.type) or is_nested(field.type) or is_ml_vector(field.type))
    definition = _definition(footer.schema.arrow, field) if may_be_plain else 0
    for (group, first, last), chunk in zip(wanted, chunks, strict=True):
        rows = header.group_rows[group - header.first_group]
        place = _plain_place(header, field, definition, chunk, rows) if may_be_plain else None
        may_be_plain = place is not None
        groups.append(_Group(place, first, last, rows, group, chunk))
    return groups


def _plain_place(header: FileHeader, field: pa.Field, definition: int, chunk: Chunk, rows: int) -> Place | None:
    """Return where in a file the vectors of a row group are; None if they cannot lie there as in memory."""
    kind = _storage(field.type)
    is_list = not pa.types.is_fixed_size_binary(kind)
    stored = np.dtype(_NARROW_TYPES.get(header.dtype.str, header.dtype.str) if is_list else header.dtype)
    if not can_be_plain(chunk.codec) or (is_list and stored.str not in _PLAIN_TYPES.get(chunk.kind, ())):
        return None
    return Place(
        start=chunk.start,
        stop=chunk.stop,
        values=chunk.values,
        codec=chunk.codec,
        stored=stored,
        dtype=header.dtype,
        dimension=header.dimension,
        is_list=is_list,
        is_fixed=pa.types.is_fixed_size_list(kind),
        definition=definition,
        is_counted=chunk.values == rows * (header.dimension if is_list else 1),
    )
