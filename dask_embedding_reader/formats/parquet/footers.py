"""Footers of files: read once, checked, and kept for the next rows of the same file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from dask_embedding_reader._common.cache import CountedCache
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import EmbeddingReaderError, FormatError, ReadError
from dask_embedding_reader.formats.base import FileHeader
from dask_embedding_reader.formats.parquet.footer import Footer, parse_footer
from dask_embedding_reader.formats.parquet.page_headers import page_header
from dask_embedding_reader.storage.read import read_range, read_ranges
from dask_embedding_reader.storage.store import StoredFile

_FOOTER_READ_NBYTES = 2**16
"""Holds most footers; a longer one costs a second read."""

_PAGE_HEAD_NBYTES = 128
"""Holds the header of a dictionary."""

_BYTE_ARRAY = 6
"""What parquet calls texts and bytes by."""

_SMALL_NBYTES = 2**12
"""Texts of a row group that are no longer than this together are not looked at."""


FOOTERS: CountedCache[StoredFile, Footer] = CountedCache(32 * 2**20)
"""A pass opens each file once a row group; and a footer may take as long to fetch as the data."""


def read_footer(file: StoredFile, names: Sequence[str]) -> Footer:
    """Return the footer of a file, with the types of some columns at least."""
    wanted = frozenset(names)
    known = FOOTERS.get(file)
    if known is not None:
        if known.schema.asked is None or wanted <= known.schema.asked:
            return known
        wanted |= known.schema.asked
    data = _fetch_footer(file) if known is None else known.data
    footer = parse_footer(file.url, data, file.size - len(data), wanted)
    FOOTERS.put(file, footer)
    return footer


def _fetch_footer(file: StoredFile) -> bytes:
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


def promised_footer(header: FileHeader, names: Sequence[str]) -> Footer:
    """Return the footer of a file that has the rows which the header tells, maybe from a manifest that is wrong."""
    footer = read_footer(header.file, names)
    found = footer.group_rows[header.first_group : header.first_group + len(header.group_rows)]
    if sum(footer.group_rows) != header.rows or found != header.group_rows:
        raise FormatError(
            f"{header.file.url}: holds {sum(footer.group_rows):,} rows in {len(footer.group_rows):,} row groups, where "
            f"{header.rows:,} rows in other row groups were promised; save the manifest again if there is one, else "
            "open the collection again"
        )
    return footer


def parquet_schema(file: StoredFile) -> pa.Schema:
    """Return the columns of a file."""
    return read_footer(file, ()).schema.arrow


def has_rows(file: StoredFile) -> bool:
    """Tell whether a file has rows."""
    return any(read_footer(file, ()).group_rows)


def may_match(file: StoredFile, expression: Any) -> set[int] | None:
    """Return the row groups that may hold rows for which an expression is true; None where nothing can be told."""
    try:
        # pyarrow's datasets, unlike its footers, turn whatever is wrong with statistics into exceptions.
        fragment = ds.ParquetFileFormat().make_fragment(pa.py_buffer(read_footer(file, ()).data))
        return {group.id for part in fragment.split_by_row_group(expression) for group in part.row_groups}
    except Exception:  # noqa: BLE001 - the rows will tell
        return None


def row_nbytes(file: StoredFile, names: Sequence[str]) -> int:
    """Return about what a row of some columns takes as text and numbers; 0 where the footer is not at hand."""
    known = FOOTERS.get(file)
    if known is None or not sum(known.group_rows):
        return 0
    group = int(np.argmax(known.group_rows))
    rows, nbytes = known.group_rows[group], 0
    dictionaries = []
    for leaf in leaves_of(known, names):
        [chunk] = known.chunks(leaf, [group])
        told = known.plain_nbytes([leaf], group)
        nbytes += told // rows
        if chunk.kind == _BYTE_ARRAY and told > _SMALL_NBYTES:
            dictionaries.append(chunk.start)
    try:
        return max(nbytes, _entries_nbytes(file, tuple(dictionaries)) if dictionaries else 0)
    except EmbeddingReaderError:  # those who read the rows will tell
        return nbytes


@lru_cache(maxsize=64)
def _entries_nbytes(file: StoredFile, starts: tuple[int, ...]) -> int:
    """Return what entries take, on average, of the dictionaries that column chunks begin with, those that have any.

    Of what is in a dictionary the footer tells how much it is, and not that all rows may have the same long text.
    """
    heads = read_ranges(file, [(start, min(file.size, start + _PAGE_HEAD_NBYTES)) for start in starts])
    pages = [found[0] for head in heads if (found := page_header(head)) is not None and found[0].is_dictionary]
    return sum(page.plain_nbytes // max(1, page.values) for page in pages)


def chunk_ranges(footer: Footer, groups: Sequence[int], names: Sequence[str]) -> list[tuple[int, int]]:
    """Return where some columns of some row groups are in a file."""
    chunks = [footer.chunks(leaf, groups) for leaf in leaves_of(footer, names)]
    return [chunk[:2] for of_group in zip(*chunks, strict=True) for chunk in of_group]


def leaves_of(footer: Footer, names: Sequence[str]) -> list[int]:
    """Return the leaves of some columns."""
    # Like pyarrow, which also takes the column `a.b` for a part of `a`.
    starts = tuple(f"{name}." for name in names)
    return [leaf for leaf, path in enumerate(footer.schema.paths) if f"{path}.".startswith(starts)]
