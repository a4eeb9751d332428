"""Columns as pyarrow decodes them: row group by row group, a few rows at a time, in as little memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader.errors import EmbeddingReaderError, FormatError, ReadError
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.column_names import find_field
from dask_embedding_reader.formats.parquet.chunk_file import ChunkFile, Extent
from dask_embedding_reader.formats.parquet.footers import chunk_ranges, promised_footer, read_footer
from dask_embedding_reader.formats.parquet.schema import INT96_UNIT
from dask_embedding_reader.storage.read import check_local, local_input
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import StoredFile

TableReader = Callable[[int], pa.Table]

DECODER_NBYTES = 48 * 2**20
"""What decoding holds beside its result: pages, dictionaries, and what pyarrow's allocator keeps (measured)."""

_COLUMN_NBYTES = 3 * 2**20
"""What decoding one of many columns holds at most: a page as it is stored and decoded, and a buffer."""

_BUFFER_NBYTES = 2**20
"""What pyarrow reads at a time of a column chunk that is larger than this."""

WINDOW_NBYTES = 8 * 2**20
"""What is fetched at a time of a remote column chunk that is larger than this."""

DECODE_ROWS = 8_192
"""Metadata is decoded in steps of this many rows."""

_STEPS_BETWEEN_RELEASES = 8
"""After so many steps pyarrow's allocator gives back what it keeps: 30 MB less are held, at no cost that shows."""


def iter_tables(
    header: FileHeader,
    names: Sequence[str],
    start: int,
    stop: int,
    step: int = DECODE_ROWS,
    window_nbytes: int = WINDOW_NBYTES,
    remote: ChunkFile | None = None,
) -> Iterator[pa.RecordBatch]:
    """Decode the rows ``[start, stop)`` of some columns, in order, a few rows at a time.

    Of a large remote column so much is fetched at a time, where it has not been opened already.

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
    row = group_stop = bounds[first]
    count = 0
    try:
        promised_footer(header, names)
        file = _open(header.file, groups, names, window_nbytes, remote)
        # Group by group: where a page holds more rows than its group should, all later ones would be shifted.
        for position, group in enumerate(groups):
            group_stop += header.group_rows[group - header.first_group]
            for batch in _iter_group(file, position, names, step):
                batch_stop = row + batch.num_rows
                if batch_stop > group_stop:
                    raise _other_end(header, batch_stop, group_stop)
                check_local(header.file)
                count += 1
                if count % _STEPS_BETWEEN_RELEASES == 0:
                    pa.default_memory_pool().release_unused()
                skip, keep = max(0, start - row), min(batch.num_rows, stop - row)
                if skip < keep:
                    # By name: pyarrow also takes the columns `a.b` for `a`, and keeps the order of the file.
                    taken = _select(batch, names).slice(skip, keep - skip)
                    _validate(header.file, row + skip, taken)
                    yield taken
                row = batch_stop
            if row != group_stop:
                raise _other_end(header, row, group_stop)
    except ReadError as error:
        raise type(error)(f"rows {max(start, row):,} to {stop:,}: {error}") from error
    except EmbeddingReaderError:
        raise
    except Exception as error:
        check_local(header.file)  # a file that was replaced explains what cannot be decoded
        where = f"{header.file.url}, rows {row:,} to {max(row + 1, min(row + step, group_stop)):,}"
        if isinstance(error, OSError) and error.errno:
            raise ReadError(f"{where}: cannot be decoded: {describe(error)}") from error
        what = _undecodable(header.file, bisect_right(bounds, row) - 1 + header.first_group, names)
        raise FormatError(f"{where}: {what} cannot be decoded: {describe(error)}") from error


def _select(batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
    """Take columns, and fields of structs, which are null where the struct is."""
    if set(names) <= set(batch.schema.names):
        return batch.select(list(names))
    columns = []
    for name in names:
        top, *fields = find_field(batch.schema, name) or (name,)
        column = batch.column(top)
        for field in fields:
            column = column.flatten()[field]
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, list(names))


def _iter_group(file: pq.ParquetFile, group: int, names: Sequence[str], step: int) -> Iterator[pa.RecordBatch]:
    return file.iter_batches(  # type: ignore[no-any-return]
        batch_size=step, row_groups=[group], columns=list(names), use_threads=False
    )


def _other_end(header: FileHeader, found: int, promised: int) -> FormatError:
    return FormatError(
        f"{header.file.url}: a row group ends after row {found:,} where the footer promises {promised:,}; write the "
        "file again"
    )


def _validate(file: StoredFile, row: int, batch: pa.RecordBatch) -> None:
    """Refuse text that is no UTF-8 and offsets that lead elsewhere: that would show when values are used, or never."""
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if _fault(column) is not None:
                low, high = 0, len(column)  # the first bad value is not before the one, and before the other
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if _fault(column[low:middle]) is None else (low, middle)
                raise FormatError(
                    f"{file.url}, row {row + low:,}: column {name!r} is {column.type}, which this value is not: "
                    f"{_fault(column[low:high])}; write the file again, or leave the column out of meta_columns"
                ) from error
        raise


def _fault(values: pa.Array) -> str | None:
    """Say what is wrong with values; None if nothing is."""
    try:
        values.validate(full=True)
    except pa.ArrowException as error:
        return describe(error)
    return None


def _undecodable(file: StoredFile, group: int, names: Sequence[str]) -> str:
    """Return which of some columns of a row group cannot be decoded."""
    if len(names) == 1:
        return f"column {names[0]!r}"
    for name in names:
        try:
            for _ in _iter_group(_open(file, [group], [name]), 0, [name], DECODE_ROWS):
                pass
        except Exception:  # noqa: BLE001 - what is wrong with it was said already
            return f"column {name!r}"
    return "one of its columns"


def _open(
    file: StoredFile,
    groups: Sequence[int],
    names: Sequence[str],
    window_nbytes: int = WINDOW_NBYTES,
    remote: ChunkFile | None = None,
) -> pq.ParquetFile:
    """Open some columns of some row groups, which are counted from 0 then."""
    footer = read_footer(file, names)
    ranges = chunk_ranges(footer, groups, names)
    source = remote or local_input(file) or ChunkFile(file, [Extent(*each, each[1]) for each in ranges], window_nbytes)
    # Small chunks are read whole: with a buffer, a damaged page that claims 2 GB would be given 2 GB.
    largest = max((stop - start for start, stop in ranges), default=0)
    buffer_size = _BUFFER_NBYTES if largest > _BUFFER_NBYTES else 0
    return pq.ParquetFile(
        source,
        # Nothing is asked of it here, see ``footer``.
        metadata=pq.read_metadata(pa.BufferReader(footer.select(groups))),
        buffer_size=buffer_size,
        pre_buffer=False,
        coerce_int96_timestamp_unit=INT96_UNIT,
        page_checksum_verification=True,  # where there are checksums; they cost little beside decoding
    )


def decoder_nbytes(columns: Columns, items_nbytes: int) -> int:
    """Return what decoding vectors holds beside its result, of row groups with so many bytes of each item at most."""
    if not isinstance(columns.embedding, tuple):
        return DECODER_NBYTES
    return DECODER_NBYTES + len(columns.embedding) * min(_COLUMN_NBYTES, 3 * items_nbytes)


def fetched_nbytes(chunk_nbytes: int) -> int:
    """Return what is held of a remote column chunk by a thread: all of it, or a block, the next one, and a page."""
    return min(chunk_nbytes, 9 * WINDOW_NBYTES // 4)
