"""Vectors put into a parquet file as they lie in memory, beside metadata that pyarrow has encoded.

For each item pyarrow makes two levels of nesting, encodes them, and copies the item twice, in new memory each: for
vectors of one dimension, none of them null, that is four times the work of writing them. Here the levels of a page,
which are those of every page, are encoded once, and items go from the array to the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader.formats.parquet.footer import RawFooter, RawGroup, read_raw_footer
from dask_embedding_reader.formats.parquet.page_headers import PLAIN, RLE
from dask_embedding_reader.formats.parquet.thrift import encode_list_head, encode_varint
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.store import Write

_PAGE_NBYTES = 2**20
"""Pages are what stays in the processor's cache while it is measured and written."""

_INT32, _INT64, _FLOAT, _DOUBLE, _FIXED = 1, 2, 4, 5, 7
_PHYSICAL = {
    "f2": (_FIXED, "f2"),
    "f4": (_FLOAT, "f4"),
    "f8": (_DOUBLE, "f8"),
    "i8": (_INT64, "i8"),
    "u8": (_INT64, "u8"),
}
"""The physical type of each dtype, and what that is in memory; of narrower integers see :func:`_stored`."""

_I16, _I32, _I64, _BINARY, _LIST, _STRUCT = 4, 5, 6, 8, 9, 12
"""Kinds of values in Thrift's compact protocol."""


def write_plain_parquet(
    write: Write, vectors: Vectors, schema: pa.Schema, metadata: bytes | None, group_rows: int
) -> None:
    """Write a parquet file whose first column are vectors, a ``fixed_size_list``; nothing in it is null.

    ``metadata`` is a parquet file of the other columns, with row groups of as many rows; None where there are none.
    """
    other = None if metadata is None else read_raw_footer(metadata)
    footer = read_raw_footer(empty_file(schema))
    begin = b"PAR1" if other is None or metadata is None else metadata[: other.start]
    write(begin)
    position = len(begin)
    chunks = []
    rows = len(vectors.array)
    for start in range(0, rows, group_rows):
        chunks.append(_write_chunk(write, vectors, start, min(start + group_rows, rows), position))
        position = chunks[-1].stop
    indices = [_page_index(chunk) for chunk in chunks]
    groups = []
    for number, (chunk, index) in enumerate(zip(chunks, indices, strict=True)):
        write(index)
        group = RawGroup(b"\x0c", 0, 0) if other is None else other.groups[number]
        groups.append(_group(group, chunk, vectors, schema.names[0], number, position, len(index)))
        position += len(index)
    end = _footer(footer, rows, groups)
    write(end + len(end).to_bytes(4, "little") + b"PAR1")


def empty_file(schema: pa.Schema) -> bytes:
    """Return a file of no rows, whose footer says everything that the schema decides."""
    sink = pa.BufferOutputStream()
    # pyarrow's own empty tables have no extension types within others.
    pq.write_table(pa.Table.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema), sink)
    return bytes(sink.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Pages


class _Chunk(NamedTuple):
    rows: int
    pages: list[tuple[int, int, int]]
    """Of each page: where it begins in the file, its size, and its first row in the row group."""
    start: int
    stop: int


def _stored(dtype: np.dtype[np.generic]) -> tuple[int, np.dtype[np.generic]]:
    """Return as which physical type items of a dtype are stored, and what that is in memory."""
    kind, memory = _PHYSICAL.get(dtype.str[1:], (_INT32, f"{dtype.kind}4"))
    return kind, np.dtype(f"<{memory}")


def _write_chunk(write: Write, vectors: Vectors, start: int, stop: int, position: int) -> _Chunk:
    _, stored = _stored(vectors.dtype)
    dimension = vectors.dimension
    step = max(1, _PAGE_NBYTES // (dimension * stored.itemsize))
    pages, begin = [], position
    for first in range(start, stop, step):
        page = vectors.stored(first, min(first + step, stop))
        items = np.ascontiguousarray(page, stored).reshape(-1)
        levels = _levels(len(page), dimension)
        head = _page_header(len(levels) + items.nbytes, len(items)) + levels
        write(head)
        write(items.view(np.uint8).data)
        pages.append((position, len(head) + items.nbytes, first - start))
        position += len(head) + items.nbytes
    return _Chunk(stop - start, pages, begin, position)


@lru_cache(maxsize=16)
def _levels(rows: int, dimension: int) -> bytes:
    """Encode the levels of a page: of repetition, 0 where a vector begins, else 1; of definition, 1 as none is null."""
    repetition = _run(rows, 0) if dimension == 1 else (_run(1, 0) + _run(dimension - 1, 1)) * rows
    definition = _run(rows * dimension, 1)
    return b"".join(len(levels).to_bytes(4, "little") + levels for levels in (repetition, definition))


def _run(count: int, level: int) -> bytes:
    return encode_varint(count << 1) + bytes([level])


# ---------------------------------------------------------------------------------------------------------------------
# Thrift; the numbers of fields are those of ``parquet.thrift``


def _integer(value: int) -> bytes:
    return encode_varint(value << 1)  # zigzag of what is not negative


def _binary(value: bytes) -> bytes:
    return encode_varint(len(value)) + value


def _list(kind: int, items: Sequence[bytes], encoded: bytes = b"", count: int = 0) -> bytes:
    """Encode a list; its last items may be ``count`` that are encoded already."""
    return encode_list_head(count + len(items), kind) + b"".join(items) + encoded


def _struct(fields: Mapping[int, tuple[int, bytes]]) -> bytes:
    encoded, last = b"", 0
    for number, (kind, value) in fields.items():
        encoded += bytes([(number - last) << 4 | kind]) + value
        last = number
    return encoded + b"\0"


def _page_header(nbytes: int, values: int) -> bytes:
    data_page = {
        1: (_I32, _integer(values)),
        2: (_I32, _integer(PLAIN)),
        3: (_I32, _integer(RLE)),
        4: (_I32, _integer(RLE)),
    }
    size = (_I32, _integer(nbytes))
    return _struct({1: (_I32, _integer(0)), 2: size, 3: size, 5: (_STRUCT, _struct(data_page))})


def _page_index(chunk: _Chunk) -> bytes:
    """Encode where each page is: an OffsetIndex."""
    places = [
        _struct({1: (_I64, _integer(start)), 2: (_I32, _integer(nbytes)), 3: (_I64, _integer(row))})
        for start, nbytes, row in chunk.pages
    ]
    return _struct({1: (_LIST, _list(_STRUCT, places))})


def _group(
    others: RawGroup, chunk: _Chunk, vectors: Vectors, name: str, number: int, index_start: int, index_nbytes: int
) -> bytes:
    """Encode a row group: the chunk of vectors, and those of metadata as pyarrow encoded them."""
    kind, _ = _stored(vectors.dtype)
    nbytes = chunk.stop - chunk.start
    path = [_binary(part.encode()) for part in (name, "list", "element")]
    facts = {
        1: (_I32, _integer(kind)),
        2: (_LIST, _list(_I32, [_integer(PLAIN), _integer(RLE)])),
        3: (_LIST, _list(_BINARY, path)),
        4: (_I32, _integer(0)),
        5: (_I64, _integer(chunk.rows * vectors.dimension)),
        6: (_I64, _integer(nbytes)),
        7: (_I64, _integer(nbytes)),
        9: (_I64, _integer(chunk.start)),
    }
    column = {
        2: (_I64, _integer(0)),
        3: (_STRUCT, _struct(facts)),
        4: (_I64, _integer(index_start)),
        5: (_I32, _integer(index_nbytes)),
    }
    count, encoded = others.split_columns()
    return _struct(
        {
            1: (_LIST, _list(_STRUCT, [_struct(column)], encoded, count)),
            2: (_I64, _integer(others.nbytes + nbytes)),
            3: (_I64, _integer(chunk.rows)),
            5: (_I64, _integer(chunk.start)),
            6: (_I64, _integer(others.compressed_nbytes + nbytes)),
            7: (_I16, _integer(number)),
        }
    )


def _footer(raw: RawFooter, rows: int, groups: Sequence[bytes]) -> bytes:
    fields = {
        1: (_I32, _integer(raw.version)),
        2: (_LIST, raw.schema),
        3: (_I64, _integer(rows)),
        4: (_LIST, _list(_STRUCT, groups)),
        5: (_LIST, raw.key_values),
        6: (_BINARY, _binary(raw.created_by)),
        7: (_LIST, raw.column_orders),
    }
    return _struct({number: (kind, value) for number, (kind, value) in fields.items() if value})
