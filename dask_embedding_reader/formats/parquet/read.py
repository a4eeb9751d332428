"""The parquet format: vectors in a column, metadata in others.

Only the footer and the column chunks that are asked for are read. Vectors are taken as the flat array of items that
parquet stores, never as one object a row, and decoded a few MB at a time: a row group may be larger than the memory.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from dask_embedding_reader._common.arguments import likest_first
from dask_embedding_reader._common.budget import count_cache
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import ColumnError, EmbeddingReaderError, FormatError, ReadError
from dask_embedding_reader.formats.base import (
    DEFAULT_COLUMN,
    Array,
    Columns,
    FileHeader,
    MetaColumn,
    PartReader,
    Stretch,
    StretchReader,
)
from dask_embedding_reader.formats.parquet.chunk_file import ChunkFile
from dask_embedding_reader.formats.parquet.column_chunks import Chunk
from dask_embedding_reader.formats.parquet.compression import can_be_plain
from dask_embedding_reader.formats.parquet.footer import Footer, parse_footer
from dask_embedding_reader.formats.parquet.footer_cache import FooterCache
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.plain_pages import Page, PlainChunk, take_rows
from dask_embedding_reader.formats.parquet.schema import INT96_UNIT
from dask_embedding_reader.formats.partitions import TOLD_BY_FOLDERS, partition_values
from dask_embedding_reader.formats.raw import copy_rows, naming_rows
from dask_embedding_reader.formats.vector_columns import (
    as_vectors,
    bad_vector,
    binary_dimension,
    is_binary,
    is_bytes,
    is_ml_vector,
    is_nested,
    item_type,
    join_items,
    lengths_of,
    no_vectors,
    type_of_items,
)
from dask_embedding_reader.storage.read import check_local, local_input, read_range
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import StoredFile

_FOOTER_READ_NBYTES = 2**16
"""Holds most footers; a longer one costs a second read."""

DECODER_NBYTES = 48 * 2**20
"""What decoding holds beside its result: pages, dictionaries, and what pyarrow's allocator keeps (measured)."""

_DECODE_NBYTES = 2 * 2**20
"""Vectors are decoded in steps of this many bytes: as fast as whole row groups, in a tenth of the memory."""

_BUFFER_NBYTES = 2**20
"""What pyarrow reads at a time of a column chunk that is larger than this."""

_WINDOW_NBYTES = 8 * 2**20
"""What is fetched at a time of a remote column chunk that is larger than this."""

_PEEK_NBYTES = 2**20
"""The same where only the first vectors are wanted."""

_PEEK_ROWS = 100
"""Most of so many tell how long the others should be."""

DECODE_ROWS = 8_192
"""Metadata is decoded in steps of this many rows."""

_PLAIN_TYPES = {1: ("<i4", "<u4"), 2: ("<i8", "<u8"), 4: ("<f4",), 5: ("<f8",), 7: ("<f2",)}
"""What parquet's types are in memory, by their numbers."""

_NARROW_TYPES = {"|i1": "<i4", "|u1": "<i4", "<i2": "<i4", "<u2": "<i4"}
"""What narrow integers are stored as."""

_COLUMN_NBYTES = 3 * 2**20
"""What decoding one of many columns holds at most: a page as it is stored and decoded, and a buffer."""

_STEPS_BETWEEN_RELEASES = 8
"""After so many steps pyarrow's allocator gives back what it keeps: 30 MB less are held, at no cost that shows."""


def read_header(file: StoredFile, columns: Columns) -> FileHeader:
    """Read the footer of a parquet file: rows, row groups, and what the wanted columns hold."""
    footer = _footer(file, _names(columns))
    rows = sum(footer.group_rows)
    header = FileHeader(file, rows, 0, np.dtype(np.float32), group_rows=footer.group_rows)
    if not rows:  # its columns are of any type then, or missing: pandas and Dask write such shards
        return header._replace(meta=(MetaColumn(pa.null(), True),) * len(columns.meta))
    if columns.embedding is not None:
        find_type = _type_of_items if isinstance(columns.embedding, tuple) else _vector_type
        dtype, dimension = find_type(header, footer, columns)
        header = header._replace(dtype=dtype, dimension=dimension)
    return header._replace(meta=tuple(_meta_column(file, footer, name) for name in columns.meta))


def open_stretches(header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
    """Return a function that fills arrays with some vectors; of those between, plain ones are not even read."""
    vectors = _Vectors(header, columns, start, stop)

    def read(stretches: Sequence[Stretch]) -> None:
        for row, out in stretches:
            vectors.read(row, [out])

    return read


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


TableReader = Callable[[int], pa.Table]


def iter_tables(
    header: FileHeader,
    names: Sequence[str],
    start: int,
    stop: int,
    step: int = DECODE_ROWS,
    window_nbytes: int = _WINDOW_NBYTES,
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
        _promised_footer(header, names)
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
        top, *fields = _steps(batch.schema, name) or [name]
        column = batch.column(top)
        for field in fields:
            column = column.flatten()[column.type.get_field_index(field)]
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, list(names))


def _steps(schema: pa.Schema, path: str) -> list[str] | None:
    """Return the column and the fields of structs that a path with dots names; None if there is none, or another."""

    def within(fields: Sequence[pa.Field], rest: str) -> list[list[str]]:
        found = []
        for field in fields:
            if field.name == rest:
                found.append([field.name])
            elif rest.startswith(f"{field.name}.") and pa.types.is_struct(field.type):
                found += [[field.name, *steps] for steps in within(list(field.type), rest[len(field.name) + 1 :])]
        return found

    found = within(list(schema), path)
    return found[0] if len(found) == 1 else None


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


# ---------------------------------------------------------------------------------------------------------------------
# The footer


def parquet_schema(file: StoredFile) -> pa.Schema:
    """Return the columns of a file."""
    return _footer(file, ()).schema.arrow


def may_match(file: StoredFile, expression: Any) -> set[int] | None:
    """Return the row groups that may hold rows for which an expression is true; None where nothing can be told."""
    try:
        # pyarrow's datasets, unlike its footers, turn whatever is wrong with statistics into exceptions.
        fragment = ds.ParquetFileFormat().make_fragment(pa.py_buffer(_footer(file, ()).data))
        return {group.id for part in fragment.split_by_row_group(expression) for group in part.row_groups}
    except Exception:  # noqa: BLE001 - the rows will tell
        return None


def decoder_nbytes(columns: Columns, most_rows: int, item_nbytes: int) -> int:
    """Return what decoding vectors holds beside its result, of row groups of so many rows at most."""
    if not isinstance(columns.embedding, tuple):
        return DECODER_NBYTES
    return DECODER_NBYTES + len(columns.embedding) * min(_COLUMN_NBYTES, 3 * most_rows * item_nbytes)


def row_nbytes(file: StoredFile, names: Sequence[str]) -> int:
    """Return about what a row of some columns takes as text and numbers; 0 where the footer is not at hand."""
    known = _FOOTERS.get(file)
    if known is None or not known.group_rows:
        return 0
    group = int(np.argmax(known.group_rows))
    return known.plain_nbytes(_leaves_of(known, names), group) // max(1, known.group_rows[group])


_FOOTERS = FooterCache(32 * 2**20)
"""A pass opens each file once a row group; and a footer may take as long to fetch as the data."""

count_cache(lambda: _FOOTERS.nbytes)


def _names(columns: Columns) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*columns.vectors, *columns.meta]))


def _footer(file: StoredFile, names: Sequence[str]) -> Footer:
    """Return the footer of a file, with the types of some columns at least."""
    wanted = frozenset(names)
    known = _FOOTERS.get(file)
    if known is not None:
        if known.schema.asked is None or wanted <= known.schema.asked:
            return known
        wanted |= known.schema.asked
    data = _read_footer(file) if known is None else known.data
    footer = parse_footer(file.url, data, file.size - len(data), wanted)
    _FOOTERS.put(file, footer)
    return footer


def _read_footer(file: StoredFile) -> bytes:
    """Return the end of a file, from its footer on."""
    if 0 <= file.size < 12:
        raise FormatError(f"{file.url}: not a parquet file: it has only {counted(file.size, 'byte')}")
    if file.size < 0:
        raise ReadError(f"{file.url}: the storage does not tell its size, and a parquet file is read from its end")
    tail = read_range(file, max(0, file.size - _FOOTER_READ_NBYTES), file.size)
    if tail[-4:] == b"PARE":
        raise FormatError(
            f"{file.url}: encrypted parquet, which cannot be read; write the file again without encryption"
        )
    if tail[-4:] != b"PAR1":
        raise FormatError(
            f"{file.url}: not a readable parquet file: it ends with {tail[-4:]!r} where b'PAR1' was expected; was it "
            "cut short?"
        )
    nbytes = int.from_bytes(tail[-8:-4], "little") + 8
    if nbytes > file.size:
        raise FormatError(f"{file.url}: damaged: its footer claims {nbytes:,} bytes of the file's {file.size:,}")
    if nbytes > len(tail):
        tail = read_range(file, file.size - nbytes, file.size - len(tail)) + tail
    return tail[-nbytes:]


def _promised_footer(header: FileHeader, names: Sequence[str]) -> Footer:
    """Return the footer of a file that has the rows which the header tells, maybe from a manifest that is wrong."""
    footer = _footer(header.file, names)
    found = footer.group_rows[header.first_group : header.first_group + len(header.group_rows)]
    if sum(footer.group_rows) != header.rows or found != header.group_rows:
        raise FormatError(
            f"{header.file.url}: holds {sum(footer.group_rows):,} rows in {len(footer.group_rows):,} row groups, where "
            f"{header.rows:,} rows in other row groups were promised; save the manifest again if there is one, else "
            "open the collection again"
        )
    return footer


def _field(file: StoredFile, footer: Footer, name: str) -> tuple[pa.Field, range]:
    """Return the field of a column and the indices of its leaves in the footer."""
    indices = footer.schema.arrow.get_all_field_indices(name)
    if len(indices) != 1:
        raise ColumnError(f"{file.url}: {_how_many(footer, name)}; its columns are {_nearest(name, footer)}")
    return footer.schema.arrow.field(indices[0]), footer.schema.leaves[indices[0]]


def _vector_field(file: StoredFile, footer: Footer, name: str) -> tuple[pa.Field, range]:
    """The same of the column of vectors."""
    if footer.schema.names.count(name) == 1:
        return _field(file, footer, name)
    steps = None if footer.schema.names.count(name) else _steps(footer.schema.arrow, name)
    if steps is not None:
        top, leaves = _field(file, footer, steps[0])
        field = _within(top, steps)[-1]
        inside = [leaf for leaf in leaves if f"{footer.schema.paths[leaf]}.".startswith(f"{name}.")]
        return field.with_name(name), range(inside[0], inside[-1] + 1)
    found = f"{file.url}: {_how_many(footer, name)}"
    if not _columns_of_vectors(footer):
        raise ColumnError(f"{found}; {no_vectors(footer.schema.arrow, _remedy(footer))}")
    raise ColumnError(f"{found}; {_remedy(footer)}; its columns are {_nearest(name, footer)}")


def _within(top: pa.Field, steps: Sequence[str]) -> list[pa.Field]:
    """Return a column, the field of the struct in it, and so on."""
    fields = [top]
    for step in steps[1:]:
        fields.append(fields[-1].type.field(step))
    return fields


def _how_many(footer: Footer, name: str) -> str:
    count = footer.schema.names.count(name)
    return f"has {count} columns named {name!r}" if count else f"has no column {name!r}"


def _nearest(name: str, footer: Footer) -> str:
    """Spell names of columns, those like the one that was asked for first."""
    if not footer.schema.names:
        return "none"
    return _few(likest_first(name, footer.schema.names[:_MOST_COMPARED]), len(set(footer.schema.names)))


def _few(names: Sequence[str], count: int) -> str:
    """Spell the first of many names."""
    shown = [repr(name if len(name) <= 60 else f"{name[:59]}…") for name in names[:_MOST_NAMED]]
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


_MOST_COMPARED, _MOST_NAMED = 2_000, 10


def find_vectors(file: StoredFile, columns: Columns) -> list[str] | None:
    """Return the columns that may be that of vectors; None if the file has no rows, and maybe no columns."""
    footer = _footer(file, (DEFAULT_COLUMN,))
    if not sum(footer.group_rows):
        return None
    names = list(footer.schema.names)
    if DEFAULT_COLUMN in names:
        return [DEFAULT_COLUMN]
    if columns.embedding_dtype is not None:
        binary = [field.name for field in footer.schema.arrow if is_bytes(field.type)]
        return [name for name in binary if names.count(name) == 1]
    return _columns_of_vectors(footer)


def _remedy(footer: Footer) -> str:
    """Say which columns may be that of vectors."""
    found = _columns_of_vectors(footer)
    if not found:
        stem, count = _commonest_stem(footer.schema.arrow)
        numbered = f"; where each item has its own: embedding_column={stem + '*'!r}" if count >= _MANY_ITEMS else ""
        return f"name the column of vectors (embedding_column=...){numbered}"
    return f"name the column of vectors (embedding_column=...), such as {_few(found, len(found))}"


_MANY_ITEMS = 8
"""So many columns of numbers that are numbered themselves are likely the items of vectors."""


def _commonest_stem(schema: pa.Schema) -> tuple[str, int]:
    """Return what most columns of numbers are called that are numbered, and how many these are."""
    names = (field.name for field in schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
    stems = Counter(name.rstrip("0123456789") for name in names if name[-1:].isdecimal())
    return max(stems.items(), key=lambda each: each[1], default=("", 0))


def _columns_of_vectors(footer: Footer) -> list[str]:
    """Return the columns that may be that of vectors: those of numbers in lists of one length."""
    kinds = {field.name: field.type for field in footer.schema.arrow}
    names = [name for name, kind in kinds.items() if item_type(kind) is not None or is_ml_vector(kind)][:_MOST_COMPARED]
    found = []
    for name in names:
        indices = footer.schema.arrow.get_all_field_indices(name)
        try:
            chunks = footer.chunks(footer.schema.leaves[indices[0]][0])
        except FormatError:  # what is wrong with others is not what was asked for
            continue
        lengths = {divmod(chunk.values, rows) for chunk, rows in zip(chunks, footer.group_rows, strict=True) if rows}
        if len(indices) == 1 and len(lengths) == 1 and lengths.pop()[1] == 0:
            found.append(name)
    return found


def _meta_column(file: StoredFile, footer: Footer, name: str) -> MetaColumn:
    if name not in footer.schema.names and name in partition_values(file.path):
        return TOLD_BY_FOLDERS
    field, leaves = _field(file, footer, name)
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    may_hold_nulls = [footer.may_hold_nulls(leaf) for leaf in leaves]  # all are asked: one may be encrypted
    told_wrongly = pa.types.is_dictionary(field.type) and _counts_nulls_wrongly(footer.writer)
    return MetaColumn(kind, field.nullable and (told_wrongly or any(may_hold_nulls)))


def _counts_nulls_wrongly(writer: str) -> bool:
    """Tell whether the writer says of dictionaries that they hold no nulls, whatever they hold: Arrow before 5."""
    version = re.match(r"parquet-cpp(?:-arrow)? version (\d+)\.", writer)
    return version is not None and int(version[1]) < 5


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


def _vector_type(header: FileHeader, footer: Footer, columns: Columns) -> tuple[np.dtype[Any], int]:
    """Return the dtype and dimension of the vector column, told by the footer alone wherever it can."""
    field, leaves = _vector_field(header.file, footer, columns.column)
    dtype, dimension = _items(header.file, field, columns, footer)
    if is_binary(field.type):
        dimension = _first_width(header, columns, dtype)
    elif not pa.types.is_fixed_size_binary(field.type):
        # The items come last of what Spark ML stores for a vector.
        dimension = _dimension(header._replace(dtype=dtype), columns, footer, leaves[-1], dimension)
    if not dimension:
        raise FormatError(f"{header.file.url}: column {field.name!r} holds vectors of no items")
    # The counts do not tell whether each has one list, or is dense; the others are looked at when read.
    if is_nested(field.type) or is_ml_vector(field.type):
        stop = min(header.rows, _PEEK_ROWS)
        first = next(iter_tables(header, (field.name,), 0, stop, stop, _PEEK_NBYTES)).column(0)
        as_vectors(header._replace(dtype=dtype, dimension=dimension), columns, 0, first)
    return dtype, dimension


def _type_of_items(header: FileHeader, footer: Footer, columns: Columns) -> tuple[np.dtype[Any], int]:
    """Return the dtype that the columns of items share, and how many they are."""
    url, names = header.file.url, columns.vectors
    fields = {name: _field(header.file, footer, name)[0] for name in names}
    if columns.glob and (others := set(number_columns(url, columns.glob, footer.schema.names)) - set(names)):
        raise ColumnError(
            f"{url}: {columns.glob!r} names the columns {_few(sorted(others), len(others))}, too, which the first file "
            "lacks; open the files separately, or list the names (embedding_column=[...])"
        )
    first = fields[names[0]].type
    for name, field in fields.items():
        if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            raise FormatError(
                f"{url}: column {name!r} is {field.type}, not a number; where it is the column of vectors itself, "
                "name it alone"
            )
        if field.type != first:
            raise FormatError(
                f"{url}: column {name!r} is {field.type}, but {names[0]!r} is {first}; items of vectors have one type: "
                "cast the columns, and write the file again"
            )
    return np.dtype(first.to_pandas_dtype()), len(names)


def number_columns(url: str, glob: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that a pattern such as ``emb_*`` names, in the order of their numbers.

    Raises
    ------
    ColumnError
        If there is none, or one without a number, or a number is missing or there twice.
    """
    before, _, after = glob.partition("*")
    found = re.compile(f"{re.escape(before)}(.*){re.escape(after)}", re.DOTALL)
    matches = [match for name in names if (match := found.fullmatch(name))]
    where = f"{url}: embedding_column={glob!r}"
    if not matches:
        raise ColumnError(f"{where} names none of its columns: {_few(names, len(names))}")
    if odd := [match[0] for match in matches if re.fullmatch("[0-9]+", match[1]) is None]:
        raise ColumnError(
            f"{where} also names {_few(odd, len(odd))}, which is no number; list the names (embedding_column=[...])"
        )
    matches.sort(key=lambda match: int(match[1]))
    first = min(1, int(matches[0][1]))
    for number, match in enumerate(matches, first):
        if int(match[1]) != number:
            raise ColumnError(
                f"{where} names {len(matches):,} columns, but {match[0]!r} where number {number:,} was expected; if "
                "that is how it should be, list the names (embedding_column=[...])"
            )
    return tuple(match[0] for match in matches)


def expand_glob(file: StoredFile, glob: str) -> tuple[str, ...] | None:
    """Return the columns of a file that a pattern names, in order; None if the file has no rows, and maybe no columns.

    Raises
    ------
    ColumnError
        If the pattern is none.
    """
    footer = _footer(file, ())
    if not sum(footer.group_rows):
        return None
    return () if glob in footer.schema.names else number_columns(file.url, glob, footer.schema.names)


def _items(file: StoredFile, field: pa.Field, columns: Columns, footer: Footer) -> tuple[np.dtype[Any], int | None]:
    """Return the dtype of the items of a column, and the dimension of its vectors if its type tells it."""
    if is_ml_vector(field.type) and columns.embedding_dtype is None:
        return np.dtype(np.float64), None
    return type_of_items(file.url, field, columns, lambda: _remedy(footer))


def _first_width(header: FileHeader, columns: Columns, dtype: np.dtype[Any]) -> int:
    """Return the dimension of the first vectors of a column of bytes: only the values tell their lengths."""
    name = columns.column
    stop = min(header.rows, _PEEK_ROWS)
    column = next(iter_tables(header, (name,), 0, stop, stop, _PEEK_NBYTES)).column(0)
    lengths = Counter(len(value) for value in column.to_pylist() if value is not None)
    if not lengths:
        bad_vector(header, columns, 0, "is null")
    width = lengths.most_common(1)[0][0]
    return binary_dimension(f"{header.file.url}: column {name!r} holds {width} bytes a row", width, dtype)


def _dimension(header: FileHeader, columns: Columns, footer: Footer, leaf: int, dimension: int | None) -> int:
    """Return how many items each vector has, from the counts of items and rows; ragged vectors mostly show here."""
    groups = list(zip(footer.group_rows, footer.chunks(leaf), strict=True))
    if dimension is None:
        lengths: Counter[int] = Counter()
        for rows, chunk in groups:
            if rows and not chunk.nulls and chunk.values % rows == 0:
                lengths[chunk.values // rows] += rows
        dimension = lengths.most_common(1)[0][0] if lengths else _most_common_length(header, columns)
    header = header._replace(dimension=dimension)
    start = 0
    for rows, chunk in groups:
        if rows and (chunk.nulls or chunk.values != rows * dimension):
            # The counts do not tell which row it is; and they may be wrong themselves.
            first = start
            for table in iter_tables(header, (columns.column,), start, start + rows):
                as_vectors(header, columns, first, table.column(0))
                first += table.num_rows
        start += rows
    return dimension


def _most_common_length(header: FileHeader, columns: Columns) -> int:
    """Return the dimension of most vectors of the first row group, where some are null or of another length."""
    lengths: Counter[int] = Counter()
    start = 0
    stop = next(rows for rows in header.group_rows if rows)
    for table in iter_tables(header, (columns.column,), start, stop):
        column = table.column(0)
        lengths.update(lengths_of(column)[column.is_valid().to_numpy(zero_copy_only=False)].tolist())
    return lengths.most_common(1)[0][0] if lengths else 0


class _Group(NamedTuple):
    """A row group of which some vectors are wanted."""

    place: Place | None
    """Where they may lie plainly."""
    first: int
    """Its first row."""
    last: int
    """The row where what is wanted of it ends."""


class _Vectors:
    """The vectors of the rows ``[start, stop)`` of a file, which ascend from one call to the next.

    Those in plain pages are taken from there, pyarrow decodes the others.
    """

    def __init__(self, header: FileHeader, columns: Columns, start: int, stop: int) -> None:
        self._header, self._columns, self._start, self._stop = header, columns, start, stop
        self._groups: list[_Group] | None = None
        self._remote: ChunkFile | None = None
        self._chunk: tuple[int, PlainChunk] | None = None
        self._blocks: Iterator[Array] = iter(())
        self._block, self._block_row, self._blocks_stop = np.empty((0, header.dimension), header.dtype), 0, 0
        self._decoded_stop = 0  # pyarrow decodes the rows before

    def read(self, row: int, outs: Sequence[Array]) -> None:
        """Fill arrays, one after the other, with the vectors from a row on."""
        rest, stop = deque(outs), row + sum(map(len, outs))
        for group in self._open(row, stop):
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

    def find(self, row: int, stop: int) -> Callable[[Sequence[Array]], None] | None:
        """Return what fills arrays with the vectors of rows, at any time; None where that cannot be.

        Not of remote files: what is fetched at once holds pages of several pieces.
        """
        if not self._header.file.store.is_local:
            return None
        found: list[tuple[_Group, PlainChunk, list[Page], int, int]] = []
        for group in self._open(row, stop):
            last = min(group.last, stop)
            if row >= last:
                continue
            if row < self._decoded_stop or group.place is None:
                return None
            chunk, rows = self._plain_chunk(group), last - row
            with naming_rows(row, last):
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
            done = chunk.fill(iter(pages), row - group.first, last - row, row, rest)
            if done < last - row:
                # Whoever looks up the next ones shall not have the same again.
                self._decoded_stop = max(self._decoded_stop, group.last)
                for vectors in _iter_decoded(self._header, self._columns, row + done, last, None):
                    copy_rows(vectors, take_rows(rest, len(vectors)), file, row + done)
                    done += len(vectors)

    def _open(self, row: int, stop: int) -> list[_Group]:
        """Return the row groups that hold some of the rows that are wanted."""
        if self._groups is None:
            header = self._header
            try:
                if isinstance(self._columns.embedding, tuple):
                    _promised_items(header, self._columns)
                    wanted = _wanted_groups(header, self._start, self._stop)
                    self._groups = [_Group(None, first, last) for _, first, last in wanted]
                    return self._groups
                field, leaves = _promised_field(header, self._columns)
                self._groups = _find_groups(header, field, leaves[0], self._start, self._stop)
                is_plain = any(group.place is not None for group in self._groups)
                if is_plain and not header.file.store.is_local:
                    self._remote = _open_chunks(header, field.name, self._start, self._stop)
            except ReadError as error:
                raise type(error)(f"rows {row:,} to {stop:,}: {error}") from error
        return self._groups

    def _plain_chunk(self, group: _Group) -> PlainChunk:
        """Return the pages of a row group: of one at a time, the others are before it, or wanted later."""
        assert group.place is not None
        if self._chunk is None or self._chunk[0] != group.first:
            fetch = None if self._remote is None else self._remote.read_at
            self._chunk = group.first, PlainChunk(self._header.file, group.place, fetch)
        return self._chunk[1]

    def _decode(self, row: int, last: int, group: _Group, rest: deque[Array]) -> None:
        """Fill arrays with rows that pyarrow decodes, going on where it stopped."""
        if not self._block_row <= row < self._blocks_stop:
            self._blocks_stop = max(self._decoded_stop, group.last)
            self._blocks = _iter_decoded(self._header, self._columns, row, self._blocks_stop, self._remote)
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


def _open_chunks(header: FileHeader, name: str, start: int, stop: int) -> ChunkFile:
    groups = [group for group, _, _ in _wanted_groups(header, start, stop)]
    return ChunkFile(header.file, _chunk_ranges(_footer(header.file, (name,)), groups, (name,)), _WINDOW_NBYTES)


def _promised_field(header: FileHeader, columns: Columns) -> tuple[pa.Field, range]:
    """Return the column of vectors, of the type that the header tells: it may come from a manifest that is wrong."""
    footer = _promised_footer(header, (columns.column,))
    field, leaves = _vector_field(header.file, footer, columns.column)
    dtype, dimension = _items(header.file, field, columns, footer)
    if dtype != header.dtype or dimension not in (None, header.dimension):
        raise FormatError(
            f"{header.file.url}: column {field.name!r} is {field.type}, which does not hold the promised vectors of "
            f"{header.dimension} {header.dtype}; save the manifest again"
        )
    return field, leaves


def _promised_items(header: FileHeader, columns: Columns) -> None:
    """Check that the columns of items are of the type that the header tells."""
    found = _type_of_items(header, _promised_footer(header, columns.vectors), columns)
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
    steps = [field.name] if field.name in schema.names else _steps(schema, field.name) or []
    nullable = sum(bool(each.nullable) for each in _within(schema.field(steps[0]), steps))
    return nullable + (0 if pa.types.is_fixed_size_binary(kind) else 1 + int(kind.value_field.nullable))


def _find_groups(header: FileHeader, field: pa.Field, leaf: int, start: int, stop: int) -> list[_Group]:
    """Return the row groups that hold some rows, and where their vectors may lie plainly, as far as that is so."""
    footer = _footer(header.file, (field.name,))
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
        groups.append(_Group(place, first, last))
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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _open(
    file: StoredFile,
    groups: Sequence[int],
    names: Sequence[str],
    window_nbytes: int = _WINDOW_NBYTES,
    remote: ChunkFile | None = None,
) -> pq.ParquetFile:
    """Open some columns of some row groups, which are counted from 0 then."""
    footer = _footer(file, names)
    ranges = _chunk_ranges(footer, groups, names)
    source = local_input(file) if file.store.is_local else remote or ChunkFile(file, ranges, window_nbytes)
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


def _chunk_ranges(footer: Footer, groups: Sequence[int], names: Sequence[str]) -> list[tuple[int, int]]:
    """Return where some columns of some row groups are in a file."""
    chunks = [footer.chunks(leaf, groups) for leaf in _leaves_of(footer, names)]
    return [chunk[:2] for of_group in zip(*chunks, strict=True) for chunk in of_group]


def _leaves_of(footer: Footer, names: Sequence[str]) -> list[int]:
    """Return the leaves of some columns."""
    # Like pyarrow, which also takes the column `a.b` for a part of `a`.
    starts = tuple(f"{name}." for name in names)
    return [leaf for leaf, path in enumerate(footer.schema.paths) if f"{path}.".startswith(starts)]
