"""Pages of vectors: read, decompressed and decoded one by one, as far as they are plain or look up a dictionary."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.parquet.compression import SNAPPY, decompress
from dask_embedding_reader.formats.parquet.indices import read_indices
from dask_embedding_reader.formats.parquet.levels import MOST_LEVELS_NBYTES, are_levels, count_level_nbytes
from dask_embedding_reader.formats.parquet.page_headers import (
    PLAIN,
    PLAIN_DICTIONARY,
    RLE_DICTIONARY,
    PageHeader,
    page_header,
)
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.thrift import encode_varint, read_varint
from dask_embedding_reader.formats.parquet.values import (
    BLOCK_NBYTES,
    InFile,
    InMemory,
    Literals,
    Values,
    find_literals,
)
from dask_embedding_reader.storage.read import read_into
from dask_embedding_reader.storage.store import StoredFile

_HEAD_NBYTES = 2**9
"""Holds the header of most pages."""

_LONG_HEAD_NBYTES = 2**13
"""Holds that of nearly all, where it tells the smallest and the largest of long values; and mostly levels behind it."""

_MOST_PAGE_NBYTES = 2**22
"""Pages that must be decompressed are decompressed whole; most are of 1 MB. Larger ones are left to pyarrow.

A page takes six times its size at most: as it is stored, decompressed, its indices, twice while these are unpacked, and
its values. In two threads that is what is counted for decoding.
"""

_MOST_PLAIN_PAGE_NBYTES = 2**27
"""The same of pages that must only be decompressed: DuckDB writes pages of 100 MB. pyarrow would hold them as well."""

_BYTE_STREAM_SPLIT = 9

Fetch = Callable[[int, int], memoryview]
"""Returns some bytes of a file."""


class PageSource:
    """Reads a column chunk, and nothing else."""

    def __init__(self, file: StoredFile, place: Place, fetch: Fetch | None) -> None:
        self.file, self._stop, self._fetch = file, place.stop, fetch
        self._head_nbytes = _HEAD_NBYTES if place.codec else _LONG_HEAD_NBYTES
        self._memory = bytearray()  # used again from page to page
        self._start = self._end = 0
        self.is_fetched = fetch is not None

    def header(self, position: int) -> tuple[PageHeader, int] | None:
        """Read the header of the page at a position; None if there is none."""
        if position >= self._stop:
            return None
        found = page_header(self.read(position, min(position + self._head_nbytes, self._stop)))
        if found is None and position + self._head_nbytes < self._stop:
            found = page_header(self.read(position, min(position + _LONG_HEAD_NBYTES, self._stop)))
            if found is not None:
                self._head_nbytes = _LONG_HEAD_NBYTES  # as those of the next pages will be
        return found

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes, until others are read."""
        if self._fetch is not None:
            return self._fetch(start, stop)
        if not self._start <= start <= stop <= self._end:
            if stop - start > len(self._memory):
                self._memory = bytearray(stop - start)
            self._start = self._end = 0
            read_into(self.file, start, [memoryview(self._memory)[: stop - start]])
            self._start, self._end = start, stop
        return memoryview(self._memory)[start - self._start : stop - self._start]


def read_dictionary(source: PageSource, place: Place, page: PageHeader, body: int) -> Array | None:
    """Return the values of a dictionary, one a row; None if that is no plain one."""
    if page.plain_nbytes != page.values * place.stored_nbytes or page.plain_nbytes > _MOST_PAGE_NBYTES:
        return None
    plain = _plain_body(source, place, page, body, 0)
    if plain is None:
        return None
    # Copied: pages are read into the same memory. Looked up as integers these take a third of the time.
    size = place.stored_nbytes
    return np.frombuffer(plain, f"u{size}" if size in (1, 2, 4, 8) else f"V{size}").copy()


def _plain_body(
    source: PageSource,
    place: Place,
    page: PageHeader,
    body: int,
    levels: int,
    most: int = _MOST_PAGE_NBYTES,
) -> pa.Buffer | memoryview | bytes | None:
    """Return what is in a page after its first bytes, which are levels that are not compressed."""
    if not levels < min(page.nbytes, page.plain_nbytes) or max(page.nbytes, page.plain_nbytes) > most:
        return None
    stored = source.read(body, body + page.nbytes)
    if page.checksum is not None and zlib.crc32(stored) != page.checksum & 0xFFFFFFFF:
        return None
    if not place.codec or not page.is_compressed:
        return stored[levels:] if page.nbytes == page.plain_nbytes else None
    try:
        return decompress(place.codec, stored[levels:], page.plain_nbytes - levels)
    except Exception:  # noqa: BLE001 - pages may be damaged in any way; pyarrow says how
        return None


def read_page(
    source: PageSource,
    place: Place,
    page: PageHeader,
    body: int,
    before: int,
    dictionary: Callable[[], Array | None] | None,
    *,
    as_stored: bool,
) -> Values | None:
    """Return the values of a page; None if it is not plain.

    Those that are wanted as they are stored may be left in the file.
    """
    file, nbytes = source.file, page.values * place.stored_nbytes
    levels_nbytes = sum(page.levels or ())
    is_compressed = bool(place.codec) and page.is_compressed
    may_be_left = page.encoding == PLAIN and place.stored == place.dtype and page.checksum is None
    if may_be_left and not source.is_fetched and not is_compressed and page.nbytes == page.plain_nbytes:
        levels = page.nbytes - nbytes
        if not 0 <= levels <= MOST_LEVELS_NBYTES or not are_levels(
            source.read(body, body + levels), page, place, before, levels
        ):
            return None
        return InFile(file, place, body + levels, nbytes)
    if may_be_left and is_compressed and as_stored and place.codec == SNAPPY:
        literals = _find_literals(source, place, page, body, before)
        if literals is not None:
            return literals
    most = _MOST_PLAIN_PAGE_NBYTES if page.encoding == PLAIN else _MOST_PAGE_NBYTES
    if nbytes > most:  # a run may stand for any number of values
        return None
    plain = _plain_body(source, place, page, body, levels_nbytes, most)
    if plain is None:
        return None
    data = np.frombuffer(plain, np.uint8)
    if page.levels is None:
        levels_nbytes = count_level_nbytes(data, place)
        if not are_levels(data[:levels_nbytes], page, place, before, levels_nbytes):
            return None
        data = data[levels_nbytes:]
    elif not are_levels(source.read(body, body + levels_nbytes), page, place, before, levels_nbytes):
        return None
    values = _decode(data, page, place, dictionary)
    if values is None or values.nbytes != nbytes:
        return None
    if place.stored != place.dtype:
        wide = values.view(place.stored)
        narrow = wide.astype(place.dtype)
        if not np.array_equal(wide, narrow):
            return None
        values = narrow.view(np.uint8)
    return InMemory(file, place, values, is_lent=values is data and not is_compressed)


def _find_literals(source: PageSource, place: Place, page: PageHeader, body: int, before: int) -> Values | None:
    """Return values that snappy compressed, all but the first of whose blocks may be literals; None if they are not."""
    apart = sum(page.levels or ())
    plain_nbytes, nbytes = page.plain_nbytes - apart, page.values * place.stored_nbytes
    levels_nbytes = plain_nbytes - nbytes  # in the first block
    second = find_literals(page.nbytes - apart, plain_nbytes)
    if second is None or not 0 <= levels_nbytes <= (BLOCK_NBYTES if page.levels is None else 0):
        return None
    second += apart
    stored = source.read(body, body + page.nbytes) if source.is_fetched else None

    def open_first(data: memoryview) -> Array | None:
        try:
            told, position = read_varint(bytes(data[apart : apart + 10]), 0)
            block = encode_varint(BLOCK_NBYTES) + data[apart + position :]
            first = np.frombuffer(decompress(place.codec, memoryview(block), BLOCK_NBYTES), np.uint8)
        except Exception:  # noqa: BLE001 - it is compressed in another way, or damaged
            return None
        levels = first[:levels_nbytes] if page.levels is None else data[:apart]
        return first if told == plain_nbytes and are_levels(levels, page, place, before, len(levels)) else None

    def decompress_all() -> Values | None:
        fetch = None if stored is None else lambda start, stop: stored[start - body : stop - body]
        return read_page(PageSource(source.file, place, fetch), place, page, body, before, None, as_stored=False)

    return Literals(source.file, place, body, stored, second, levels_nbytes, nbytes, open_first, decompress_all)


def _decode(data: Array, page: PageHeader, place: Place, dictionary: Callable[[], Array | None] | None) -> Array | None:
    """Return the bytes of the values of a page; None if they are encoded in a way that is not known here."""
    if page.encoding == PLAIN:
        return data
    if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) and dictionary is not None:
        values, indices = dictionary(), read_indices(data, page.values)
        if values is None or indices is None or int(indices.max()) >= len(values):
            return None
        return values.take(indices).view(np.uint8)
    size = place.stored_nbytes
    if page.encoding == _BYTE_STREAM_SPLIT and len(data) == page.values * size and size in (2, 4, 8):
        values = np.empty((page.values, size), np.uint8)
        for place_in_value in range(size):
            values[:, place_in_value] = data[place_in_value * page.values : (place_in_value + 1) * page.values]
        return values.reshape(-1)
    return None
