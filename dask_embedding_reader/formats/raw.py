"""Vectors that lie in a file one after the other, as they do in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dask_embedding_reader.errors import ArgumentError, FormatError, ReadError
from dask_embedding_reader.formats.base import Array, BaseFormat, Columns, FileHeader, RowReader, Stretch, StretchReader
from dask_embedding_reader.formats.casting import CheckedCast
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.names import suffixes_of
from dask_embedding_reader.storage.read import read_blocks_into, read_each_into, read_into, try_read_in_turn
from dask_embedding_reader.storage.store import StoredFile, Write

_SCRATCH_NBYTES = 3 * 2**17
"""Vectors that are not wanted as they lie are read in blocks of this size: they stay in the processor's cache between
the two."""

_PAGE_NBYTES = 2**12
"""They begin at the same byte of a page as in the file: what lies 1 to 31 bytes further within its page is copied at a
third of the speed (see ``_common.memory``)."""

_BLOCK_NBYTES = 2**20
"""What is written at once."""


def _read_raw(file: StoredFile, position: int, dtype: np.dtype[Any], row: int, outs: Sequence[Array]) -> None:
    """Fill arrays, one after the other, with the vectors of a dtype from a row on, which begin at a byte of a file."""
    if all(out.dtype == dtype for out in outs):
        read_into(file, position, [as_bytes(out) for out in outs])
    elif all(out.dtype == dtype.newbyteorder() for out in outs):
        read_into(file, position, [as_bytes(out) for out in outs])
        for out in outs:
            out.byteswap(inplace=True)
    else:
        row_type = np.dtype((dtype, (outs[0].shape[1],)))
        copy_blocks(read_blocks(file, position, row_type, sum(map(len, outs))), outs, file, row)


class RawVectors(BaseFormat):
    """What formats have in common whose vectors lie in a file as in memory, from the first number of the layout on."""

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that reads the next rows straight into arrays."""
        del columns, stop
        row_nbytes = header.dimension * header.dtype.itemsize
        return raw_reader(header.file, header.layout[0] + start * row_nbytes, header.dtype, row_nbytes, start)

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that reads stretches of rows straight into arrays."""
        del columns, start, stop
        file, dtype, row_nbytes = header.file, header.dtype, header.dimension * header.dtype.itemsize

        def read(stretches: Sequence[Stretch]) -> None:
            read_placed(file, dtype, [(header.layout[0] + row * row_nbytes, row, out) for row, out in stretches])

        return read

    def raw_offset(self, header: FileHeader) -> int | None:
        """Return the first number of the layout."""
        offset: int = header.layout[0]
        return offset

    def held_nbytes(self, header: FileHeader, columns: Columns, rows: int, threads: int) -> int:
        """Return what answers hold, or what is cast."""
        del columns
        return raw_held_nbytes(header, rows, threads)


def raw_reader(file: StoredFile, position: int, dtype: np.dtype[Any], row_nbytes: int, row: int) -> RowReader:
    """Return a function that fills arrays with the vectors from a row on, which begin at a byte of a file."""

    def read(outs: Sequence[Array]) -> None:
        nonlocal position, row
        rows = sum(map(len, outs))
        with naming_rows(row, row + rows):
            _read_raw(file, position, dtype, row, outs)
        position += rows * row_nbytes
        row += rows

    return read


def raw_held_nbytes(header: FileHeader, rows: int, threads: int) -> int:
    """Return what reading vectors that lie as in memory holds: blocks that are cast, or the bodies of answers."""
    piece_nbytes = rows * header.dimension * header.dtype.itemsize
    return threads * (piece_nbytes if header.file.store.request_nbytes else min(_SCRATCH_NBYTES, piece_nbytes))


def raw_header_fits(header: FileHeader) -> bool:
    """Tell whether a file ends where its vectors do, which begin at the first number of its layout."""
    data_offset = header.layout[0]
    nbytes = data_offset + header.rows * header.dimension * header.dtype.itemsize
    return type(data_offset) is int and data_offset > 0 and not header.group_rows and header.file.size in (-1, nbytes)


def dtype_by_name(file: StoredFile, dtypes: Mapping[str, np.dtype[Any]], columns: Columns) -> np.dtype[Any]:
    """Return the dtype of the items of a file, which a suffix of it tells, or who opens it."""
    told = next((dtypes[suffix] for suffix in suffixes_of(file.path) if suffix in dtypes), None)
    given = columns.embedding_dtype
    if told is not None and given not in (None, told):
        raise ArgumentError(
            f"{file.url}: its name says that its items are {told}, and embedding_dtype= that they are {given}; leave "
            "that out, or rename the file"
        )
    dtype = given if told is None else told
    if dtype is None:
        raise FormatError(
            f"{file.url}: its name does not tell the dtype of its items, as one of {', '.join(dtypes)} would; name it "
            "with embedding_dtype=, or rename the file"
        )
    return dtype


def suffix_of_dtype(dtypes: Mapping[str, np.dtype[Any]], dtype: np.dtype[Any]) -> str | None:
    """Return the suffix that tells a dtype, if there is one."""
    return next((suffix for suffix, stored in dtypes.items() if stored == dtype), None)


def write_rows(write: Write, vectors: Vectors) -> None:
    """Write vectors one after the other, in blocks that stay in the processor's cache while they are measured."""
    step = max(1, _BLOCK_NBYTES // (vectors.dimension * vectors.dtype.itemsize))
    for start in range(0, len(vectors.array), step):
        write(vectors.stored(start, start + step).reshape(-1).view(np.uint8).data)


def read_placed(file: StoredFile, dtype: np.dtype[Any], placed: Sequence[tuple[int, int, Array]]) -> None:
    """Fill arrays with vectors of a dtype: each from a byte of a file on, where so many rows of it are before."""
    if not placed:
        return
    with naming_rows(placed[0][1], placed[-1][1] + len(placed[-1][2])):
        if all(out.dtype == dtype for _, _, out in placed):
            read_each_into(file, [(position, [as_bytes(out)]) for position, _, out in placed])
            return
        for position, row, out in placed:
            _read_raw(file, position, dtype, row, [out])


def try_read_runs(header: FileHeader, offset: int, rows: Array, out: Array) -> bool:
    """Fill an array with rows of a file, each greater than the one before, where it lies local; tell whether it does.

    They have the dtype of the array, and lie as in memory from a byte on. What lies between them is passed over.
    """
    row_nbytes = header.dimension * header.dtype.itemsize
    cuts = np.flatnonzero(rows[1:] - rows[:-1] != 1) + 1
    run_nbytes = np.diff(cuts, prepend=0, append=len(rows)) * row_nbytes
    gap_nbytes = (rows[cuts] - rows[cuts - 1] - 1) * row_nbytes
    start = offset + int(rows[0]) * row_nbytes
    return try_read_in_turn(header.file, start, as_bytes(out), run_nbytes, None, gap_nbytes)


@contextmanager
def naming_rows(start: int, stop: int) -> Iterator[None]:
    """Have errors of reading say which rows of the file are concerned."""
    try:
        yield
    except ReadError as error:
        raise type(error)(f"rows {start:,} to {stop:,}: {error}") from error


def as_bytes(array: Array) -> memoryview:
    """Return the memory of an array."""
    # Half the time of `reshape(-1)`, which counts where rows are read one by one; but it knows no empty arrays.
    return array.view(np.uint8).data.cast("B") if array.size else memoryview(bytearray())


def read_blocks(file: StoredFile, position: int, row_type: np.dtype[Any], rows: int) -> Iterator[Array]:
    """Read rows that are not wanted as they lie, in blocks that stay in the cache; each takes the last one's memory.

    The dtype of a row is one with fields, or of a sub-array.
    """
    # Elsewhere each block would be a request.
    step = max(1, rows if file.store.request_nbytes else _SCRATCH_NBYTES // row_type.itemsize)
    scratch = np.empty(min(step, rows) * row_type.itemsize + _PAGE_NBYTES, np.uint8)
    address = scratch.__array_interface__["data"][0]

    def blocks() -> Iterator[memoryview]:
        for first in range(0, rows, step):
            begin = (position + first * row_type.itemsize - address) % _PAGE_NBYTES
            yield scratch[begin : begin + min(step, rows - first) * row_type.itemsize].data

    for block in read_blocks_into(file, position, blocks()):
        items = np.frombuffer(block, row_type.base)
        yield items.reshape(-1, *row_type.shape) if row_type.shape else items


def open_block_stretches(
    file: StoredFile,
    data_offset: int,
    row_type: np.dtype[Any],
    convert: Callable[[Iterator[Array], int], Iterable[Array]],
) -> StretchReader:
    """Return a function that fills arrays with stretches of rows that are converted block by block.

    ``convert`` makes vectors of blocks of the rows from one on; ``row_type`` is as for :func:`read_blocks`.
    """

    def read(stretches: Sequence[Stretch]) -> None:
        for row, out in stretches:
            with naming_rows(row, row + len(out)):
                blocks = read_blocks(file, data_offset + row * row_type.itemsize, row_type, len(out))
                copy_blocks(convert(blocks, row), [out], file, row)

    return read


def copy_rows(values: Array, outs: Sequence[Array], file: StoredFile, row: int) -> None:
    """Copy the rows of a file from one on into arrays, one after the other."""
    copy_blocks([values], outs, file, row)


def copy_blocks(blocks: Iterable[Array], outs: Sequence[Array], file: StoredFile, row: int) -> None:
    """Copy the rows of a file from one on, which come in blocks, into arrays, one after the other."""
    cast, rest = CheckedCast(file.url, row), deque(outs)
    for block in blocks:
        done = 0
        for out in take_rows(rest, len(block)):
            cast.into(out, block[done : done + len(out)])
            done += len(out)
    cast.report()


def take_rows(outs: deque[Array], rows: int) -> list[Array]:
    """Take the first so many rows out of arrays that are to be filled."""
    taken = []
    while rows:
        array = outs.popleft()
        taken.append(array[:rows])
        if rows < len(array):
            outs.appendleft(array[rows:])
        rows -= len(taken[-1])
    return taken
