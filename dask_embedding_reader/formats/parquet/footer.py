"""The footer of a parquet file, read from its bytes (Thrift's compact protocol), trusting none of them.

pyarrow tells of column chunks through bindings that let no C++ exception pass: one wrong byte there ends the process.
So what has to be known before rows are decoded is taken from the bytes here. pyarrow translates the schema, once for
all files that have the same, and sees the row groups that it decodes, where its exceptions do arrive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.parquet.column_chunks import (
    Chunk,
    EncryptedError,
    RowGroups,
    keep_chunks,
    read_groups,
)
from dask_embedding_reader.formats.parquet.schema import (
    Schema,
    as_file,
    encode_footer,
    partial_schema,
    schema_tree,
    whole_schema,
)
from dask_embedding_reader.formats.parquet.thrift import (
    RAW,
    DamagedError,
    Wanted,
    encode_structs,
    read_list_head,
    read_struct,
)
from dask_embedding_reader.storage.retries import describe


class Footer(NamedTuple):
    """What the footer of one file says."""

    url: str
    """The file, for messages."""
    data: bytes
    """The end of the file, from the footer on."""
    data_nbytes: int
    """How many bytes of the file are before that."""
    schema: Schema
    """Its columns."""
    writer: str
    """Who wrote it."""
    groups: RowGroups
    """Its row groups."""

    @property
    def group_rows(self) -> tuple[int, ...]:
        """The rows of each row group."""
        return self.groups.rows

    @property
    def nbytes(self) -> int:
        """Roughly the memory that it takes."""
        return len(self.data) + self.groups.nbytes

    def chunks(self, leaf: int, groups: Sequence[int] | None = None) -> list[Chunk]:
        """Return the chunks of a leaf in some row groups, by default in all.

        Raises
        ------
        FormatError
            If they are damaged, or encrypted.
        """
        groups = range(len(self.group_rows)) if groups is None else groups
        with _told(self.url):
            try:
                chunks = self.groups.read_chunks(self.data, leaf, groups, self.data_nbytes)
            except EncryptedError as error:
                raise EncryptedError(f"column {self.schema.paths[leaf]!r}") from error
            if leaf in self.schema.flat:
                for group, chunk in zip(groups, chunks, strict=True):
                    if chunk.values != self.group_rows[group]:  # rows behind it would be taken for others
                        raise DamagedError(
                            f"row group {group} is said to have {self.group_rows[group]:,} rows, but {chunk.values:,} "
                            f"values of column {self.schema.paths[leaf]!r}"
                        )
            return chunks

    def may_hold_nulls(self, leaf: int) -> bool:
        """Tell whether a leaf holds nulls, or may, as the writer does not say.

        Raises
        ------
        FormatError
            If its chunks are encrypted, or in another file.
        """
        if leaf in self.groups.odd:
            return any(chunk.nulls != 0 for rows, chunk in zip(self.group_rows, self.chunks(leaf), strict=True) if rows)
        return leaf in self.groups.with_nulls

    def plain_nbytes(self, leaves: Sequence[int], group: int) -> int:
        """Return what the chunks of some leaves in a row group are said to take before they are compressed.

        Raises
        ------
        FormatError
            If they are damaged.
        """
        with _told(self.url):
            return sum(self.groups.read_plain_nbytes(self.data, leaf, group) for leaf in leaves)

    def index_place(self, leaf: int, group: int) -> tuple[int, int]:
        """Return where the offset index of a chunk is said to be in the file; two equal places where there is none.

        Raises
        ------
        FormatError
            If the chunk is damaged.
        """
        with _told(self.url):
            start, stop = self.groups.read_index_place(self.data, leaf, group)
        return (start, stop) if 0 <= start <= stop <= self.data_nbytes else (0, 0)

    def select(self, groups: Sequence[int]) -> bytes:
        """Encode a footer of some of the row groups, with what pyarrow expects around it.

        pyarrow takes 0.5 us and some 700 bytes for each column chunk in it, wanted or not.
        """
        encoded = self.groups.select(self.data, groups)
        if self.schema.asked is None:
            return as_file(self.data[: self.groups.start] + encode_structs(encoded) + self.data[self.groups.stop : -8])
        kept = [leaf for leaves in self.schema.leaves for leaf in leaves]
        chunks = [keep_chunks(group, kept) for group in encoded]
        return as_file(encode_footer(self.schema.elements, chunks, self.schema.key_values))


def parse_footer(url: str, data: bytes, data_nbytes: int, columns: Collection[str] | None = None) -> Footer:
    """Read a footer, given the end of a file: the footer, its length in four bytes, and ``PAR1``.

    Where pyarrow has no type for one of the columns, the types of some of the others are read.

    Raises
    ------
    FormatError
        If it is damaged.
    """
    with _told(url):
        return _parse(url, data, data_nbytes, columns)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Say of a file what is wrong with it."""
    try:
        yield
        return
    except DamagedError as error:
        reason = f"damaged: {error}; write the file again"
    except EncryptedError as error:
        reason = f"{error} is encrypted, which cannot be read; write the file again without encryption"
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"its parquet footer cannot be read: {describe(error)}; write the file again"
    except Exception:  # noqa: BLE001 - a field is missing, of another kind, or the bytes end before it does
        reason = "its parquet footer cannot be read: what it should say is missing or garbled; write the file again"
    raise FormatError(f"{url}: {reason}")


def _parse(url: str, data: bytes, data_nbytes: int, columns: Collection[str] | None) -> Footer:
    def groups_behind_schema(pos: int, facts: Mapping[int, Any]) -> tuple[RowGroups, int]:
        return read_groups(data, pos, len(schema_tree(facts[2])[1]))

    # schema, num_rows, row_groups, key_value_metadata, created_by
    facts, _ = read_struct(data, 0, {2: RAW, 3: {}, 4: groups_behind_schema, 5: RAW, 6: {}}, 0)
    total, groups = facts[3], facts[4] if 4 in facts else read_groups(b"\x0c", 0, 0)[0]
    # Some writers leave the rows of the file at 0.
    if min(groups.rows, default=0) < 0 or total not in (0, sum(groups.rows)):
        raise DamagedError(f"it promises {total:,} rows, its row groups {sum(groups.rows):,}")
    key_values, writer = facts.get(5, b""), facts.get(6, b"")
    try:
        schema = whole_schema(facts[2], key_values, writer)
    except (pa.ArrowException, OSError):
        if columns is None:
            raise
        for name in columns:  # one after the other, to say which it is
            try:
                partial_schema(facts[2], key_values, frozenset([name]))
            except (pa.ArrowException, OSError) as error:
                raise DamagedError(f"pyarrow cannot tell the type of column {name!r}: {describe(error)}") from error
        schema = partial_schema(facts[2], key_values, frozenset(columns))
    return Footer(url, data, data_nbytes, schema, writer.decode(errors="replace"), groups)


# ---------------------------------------------------------------------------------------------------------------------
# Footers that pyarrow wrote just now


class RawGroup(NamedTuple):
    """A row group as it is encoded."""

    columns: bytes
    """The list of its column chunks."""
    nbytes: int
    """Their size before compression."""
    compressed_nbytes: int
    """Their size."""

    def split_columns(self) -> tuple[int, bytes]:
        """Return how many column chunks there are, and how they are encoded, one after the other."""
        count, _, position = read_list_head(self.columns, 0)
        return count, self.columns[position:]


class RawFooter(NamedTuple):
    """A footer whose parts are left as they are encoded."""

    start: int
    """Its first byte in the file."""
    version: int
    """The version of the format."""
    schema: bytes
    """The list of schema elements."""
    key_values: bytes
    """The list of notes, empty if there is none."""
    created_by: bytes
    """Who wrote it."""
    column_orders: bytes
    """The list of these, empty if there is none."""
    groups: list[RawGroup]
    """The row groups."""


def read_raw_footer(file: bytes) -> RawFooter:
    """Read the footer of a whole file that was written by pyarrow just now."""
    start = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    wanted: Wanted = {1: {}, 2: RAW, 4: {1: RAW, 2: {}, 6: {}}, 5: RAW, 6: {}, 7: RAW}
    facts, _ = read_struct(file, start, wanted, 0)
    groups = [RawGroup(group[1], group[2], group.get(6, group[2])) for group in facts.get(4, [])]
    return RawFooter(start, facts[1], facts[2], facts.get(5, b""), facts[6], facts.get(7, b""), groups)
