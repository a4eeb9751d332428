"""The schema in a footer: columns, their leaves, and what these are as Arrow types."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader.formats.parquet.thrift import (
    DEEPEST,
    DamagedError,
    Wanted,
    encode_structs,
    encode_varint,
    read_list,
    read_list_head,
    skip_struct,
)

INT96_UNIT = "us"
"""What old timestamps of 96 bits (Spark's) are read as: in nanoseconds those before 1677 and after 2262 wrap."""


class Schema(NamedTuple):
    """The columns of a file."""

    names: tuple[str, ...]
    """All columns."""
    paths: tuple[str, ...]
    """The path of each leaf, with dots."""
    arrow: pa.Schema
    """As Arrow types: all columns, or those that were asked for where pyarrow has no type for one of the others."""
    leaves: tuple[range, ...]
    """The leaves of each column of ``arrow``."""
    flat: frozenset[int]
    """The leaves that have one value a row."""
    asked: frozenset[str] | None = None
    """The columns that were asked for, where ``arrow`` has no others."""
    elements: bytes = b""
    """How these are encoded."""
    key_values: bytes = b""
    """What the writer noted of them."""


_ELEMENT: Wanted = {1: {}, 3: {}, 4: {}, 5: {}}
"""type, repetition_type, name, num_children"""

_REPEATED = 2


@lru_cache(maxsize=64)  # the files of a collection mostly have one schema
def whole_schema(elements: bytes, key_values: bytes, writer: bytes) -> Schema:
    """Read the lists of schema elements and of key-value pairs, as they are in the footer."""
    names, paths, leaves, flat = schema_tree(elements)
    arrow = arrow_schema(as_file(encode_footer(elements, [], key_values, writer)))
    if len(arrow.names) != len(leaves):
        raise DamagedError(f"its schema has {len(leaves)} columns, but {len(arrow.names)} as Arrow types")
    return Schema(names, paths, arrow, leaves, flat)


@lru_cache(maxsize=64)
def partial_schema(elements: bytes, key_values: bytes, columns: frozenset[str]) -> Schema:
    """Read some columns, where pyarrow has no type for one of the others."""
    names, paths, leaves, flat = schema_tree(elements)
    count, _, pos = read_list_head(elements, 0)
    places = [pos]
    for _ in range(count):
        places.append(skip_struct(elements, places[-1], 0))
    nodes, _ = read_list(elements, 0, _ELEMENT, 0)
    stops = [1]  # of each column, the element after its last one
    for _ in names:
        stops.append(_end_of_node(nodes, stops[-1]))
    kept = [position for position, name in enumerate(names) if name in columns]
    if not kept:
        return Schema(names, paths, pa.schema([]), (), flat, columns)
    root = b"\x48\x06schema\x15" + encode_varint(2 * len(kept)) + b"\0"
    encoded = [root]
    for position in kept:
        encoded += [elements[places[node] : places[node + 1]] for node in range(stops[position], stops[position + 1])]
    elements = encode_structs(encoded)
    key_values = _keep_noted(key_values, len(names), kept)
    arrow = arrow_schema(as_file(encode_footer(elements, [], key_values)))
    kept_leaves = tuple(leaves[position] for position in kept)
    return Schema(names, paths, arrow, kept_leaves, flat, columns, elements, key_values)


def _end_of_node(nodes: Sequence[Mapping[int, Any]], node: int) -> int:
    """Return the node after one of a tree that is encoded node by node, and after all that is below it."""
    left = 1
    while left:
        left += nodes[node].get(5, 0) - 1
        node += 1
    return node


def _keep_noted(key_values: bytes, count: int, kept: Sequence[int]) -> bytes:
    """Of what the writer noted keep the Arrow types of some columns: pyarrow finds these by position."""
    noted = read_list(key_values, 0, {1: {}, 2: {}}, 0)[0] if key_values else []
    given = next((pair[2] for pair in noted if pair[1] == b"ARROW:schema"), None)
    if given is None:
        return b""
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(given)))
    if len(schema) != count:
        return b""
    value = base64.b64encode(pa.schema([schema.field(position) for position in kept]).serialize())
    pair = b"\x18\x0cARROW:schema\x18" + encode_varint(len(value)) + value + b"\0"
    return encode_structs([pair])


def encode_footer(elements: bytes, groups: Sequence[bytes], key_values: bytes, writer: bytes = b"") -> bytes:
    """Encode a footer: version 2, schema, 0 rows, row groups, and what the writer noted."""
    footer = b"\x15\x04\x19" + elements + b"\x16\x00\x19" + encode_structs(groups)
    footer += b"\x19" + key_values if key_values else b""
    if writer:
        footer += (b"\x18" if key_values else b"\x28") + encode_varint(len(writer)) + writer
    return footer + b"\0"


def as_file(footer: bytes) -> bytes:
    """Encode a file of a footer alone."""
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def arrow_schema(file: bytes) -> pa.Schema:
    """Return the columns of a file, given its content or its footer alone, as they are when it is read.

    But parquet has no seconds: pyarrow stores milliseconds, notes in the footer what it was given, and does not heed
    that.
    """
    opened = pq.ParquetFile(pa.BufferReader(file), coerce_int96_timestamp_unit=INT96_UNIT)
    schema = opened.schema_arrow
    noted = (opened.metadata.metadata or {}).get(b"ARROW:schema")
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


@lru_cache(maxsize=64)
def schema_tree(elements: bytes) -> tuple[tuple[str, ...], tuple[str, ...], tuple[range, ...], frozenset[int]]:
    """Return the columns of a tree that is encoded node by node, each leaf's path, and the leaves of each column.

    And which of these leaves have one value a row.
    """
    nodes, _ = read_list(elements, 0, _ELEMENT, 0)
    rest = iter(nodes)
    paths: list[str] = []
    flat: list[int] = []

    def read_node(prefix: str, depth: int, *, is_flat: bool) -> str:
        node = next(rest)
        name: str = node[4].decode()
        is_flat = is_flat and node.get(3) != _REPEATED
        if depth > DEEPEST:
            raise DamagedError(f"its schema is nested deeper than {DEEPEST} levels")
        if 1 in node:
            if is_flat:
                flat.append(len(paths))
            paths.append(prefix + name)
        for _ in range(node.get(5, 0)):
            read_node(f"{prefix}{name}.", depth + 1, is_flat=is_flat)
        return name

    names, leaves = [], []
    for _ in range(next(rest).get(5, 0)):
        first = len(paths)
        names.append(read_node("", 1, is_flat=True))
        leaves.append(range(first, len(paths)))
    if next(rest, None) is not None:
        raise DamagedError("its schema has nodes that belong to no column")
    return tuple(names), tuple(paths), tuple(leaves), frozenset(flat)
