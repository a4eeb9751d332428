"""Vectors that lie in the pages of a parquet file nearly as they do in memory, taken without pyarrow's decoder.

Decoding costs pyarrow ten times what copying costs, since it looks at two levels of nesting for every item. Where each
vector has all its items the levels say nothing, and what remains is to decompress pages, which takes as long as to copy
them, and to copy these. Files that pandas, pyarrow, polars or Spark write by default begin each column chunk with a few
pages that refer to a dictionary, since each item is tried; these are looked up here.
Whatever is not provably so is left to pyarrow, with its errors.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dask_embedding_reader.formats.parquet.page_headers import (
    PLAIN,
    PLAIN_DICTIONARY,
    RLE_DICTIONARY,
    PageHeader,
    page_header,
)
from dask_embedding_reader.formats.parquet.thrift import read_length
from dask_embedding_reader.storage.read import read_into
from dask_embedding_reader.storage.store import StoredFile

Array = npt.NDArray[Any]

_HEAD_NBYTES = 2**9
"""Holds the header of most pages."""

_LONG_HEAD_NBYTES = 2**13
"""Holds that of nearly all, where it tells the smallest and the largest of long values; and mostly levels behind it."""

_MOST_LEVELS_NBYTES = 2**22

_LEVELS_NBYTES = 2**12
"""Holds the levels of most pages that are compressed, and a little more."""

_PREFIX_NBYTES = {6: 2**17 + 2**10}
"""The same of zstd, which decompresses blocks of 128 KB."""

_MOST_PAGE_NBYTES = 2**22
"""Pages that must be decompressed are decompressed whole; most are of 1 MB. Larger ones are left to pyarrow.

A page takes six times its size at most: as it is stored, decompressed, its indices, twice while these are unpacked, and
its values. In two threads that is what is counted for decoding.
"""

_MOST_PLAIN_PAGE_NBYTES = 2**27
"""The same of pages that must only be decompressed: DuckDB writes pages of 100 MB. pyarrow would hold them as well."""

_MOST_WINDOW_BITS = 23
"""What decompressing a frame of zstd that does not tell its size may look back at."""

_BYTE_STREAM_SPLIT = 9

_CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
"""How pages may be compressed, as ``parquet.thrift`` counts. Not the old lz4 (5): writers do not agree on it."""


class Place(NamedTuple):
    """Where vectors are, and what tells a vector from the next."""

    start: int
    """The first byte of the column chunk."""
    stop: int
    """The byte after its last one."""
    values: int
    """The values in it."""
    codec: int
    """How its pages are compressed; 0 for not at all."""
    stored: np.dtype[Any]
    """What items are in pages."""
    dtype: np.dtype[Any]
    """What they are read as: narrow integers are stored as wide ones."""
    dimension: int
    """Items in a vector."""
    is_list: bool
    """Whether items are counted one by one, with levels of repetition; else a vector is one value."""
    is_fixed: bool
    """Whether no vector can be of another length."""
    definition: int
    """The level of definition of what is not null; 0 where nothing can be."""
    is_counted: bool
    """Whether it has as many values as its row group should have."""

    @property
    def row_values(self) -> int:
        """The values in a vector."""
        return self.dimension if self.is_list else 1

    @property
    def row_nbytes(self) -> int:
        """The bytes of a vector."""
        return self.dimension * self.dtype.itemsize

    @property
    def value_nbytes(self) -> int:
        """The bytes of a value."""
        return self.row_nbytes // self.row_values

    @property
    def stored_nbytes(self) -> int:
        """The bytes of a value in a page."""
        return self.value_nbytes // self.dtype.itemsize * self.stored.itemsize


class Stretch(NamedTuple):
    """Vectors one after the other."""

    rows: int
    """How many."""
    position: int
    """Where the first one begins in the file."""
    vectors: Array | None
    """They themselves, where they do not lie in the file."""


def can_be_plain(codec: int) -> bool:
    """Tell whether pages that are compressed so can be decompressed here."""
    return codec in _CODECS


Fetch = Callable[[int, int], memoryview]
"""Returns some bytes of a file."""


class Page(NamedTuple):
    """A page of vectors."""

    header: PageHeader
    """What it says of itself."""
    body: int
    """Where in the file it begins, after its header."""
    before: int
    """The values of the column chunk before it."""

    @property
    def stop(self) -> int:
        """The values up to its end."""
        return self.before + self.header.values


class PlainChunk:
    """The vectors of one column chunk, as far as they are plain.

    Pages are found by one thread at a time, in ascending order; what has been found can be read by several.
    """

    def __init__(self, file: StoredFile, place: Place, fetch: Fetch | None) -> None:
        """The bytes of remote files come from ``fetch``."""
        self.place = place
        self._file, self._fetch = file, fetch
        self._source = _Source(file, place, fetch)
        self._position, self._before = place.start, 0
        self._dictionary: Array | None = None
        self._decompress = _decompressor(place.codec)
        self._pages: deque[Page] = deque()
        self._is_proved = _all_tell_rows(place)
        self._idle: list[_PageReader] = []

    def iter_pages(self, skip: int, rows: int) -> Iterator[Page]:
        """Yield the pages that hold ``rows`` vectors after the first ``skip``, as far as these may be plain.

        That it is those vectors is sure where all pages before say how many they have, or their levels do, or those
        of all pages behind; and once what has been found has been read and was plain.
        """
        first, last = skip * self.place.row_values, (skip + rows) * self.place.row_values
        while self._pages and self._pages[0].stop <= first:
            self._pages.popleft()
        for known in list(self._pages):
            if known.before < last:
                if not self._may_end(known, last):
                    return
                yield known
        if not self._is_proved and self._fetch is None and self.place.values - last < first - self._before:
            self._is_proved = self._proves_rest(first)
        while self._before < last:
            page = self._find(self._position, self._before)
            if page is None or not (page.stop > first or self._is_proved or self._is_regular(page)):
                return
            if not self._may_end(page, last):
                return
            self._position, self._before = page.body + page.header.nbytes, page.stop
            if page.stop > first:
                self._pages.append(page)
                yield page

    def iter_stretches(self, pages: Iterable[Page], skip: int, rows: int) -> Iterator[Stretch]:
        """Yield ``rows`` vectors after the first ``skip``, as far as they are plain, from the pages that hold them.

        Each is to be used before the next one is asked for.
        """
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = _PageReader(self._file, self.place, self._fetch)
        found = ((page, reader.read(page, self._dictionary)) for page in pages)
        yield from _iter_stretches(self._file, self.place, found, skip, rows)
        self._idle.append(reader)

    def _find(self, position: int, before: int) -> Page | None:
        """Return the page at a position; None if there is none that may be plain."""
        found = self._source.header(position)
        if found is None or position + found[1] + found[0].nbytes > self.place.stop:
            return None
        header, body = found[0], position + found[1]
        if not header.is_dictionary:
            is_right = 0 < header.values <= self.place.values - before and _has_rows(header, self.place, before)
            return Page(header, body, before) if is_right else None
        if position != self.place.start or header.encoding not in (PLAIN, PLAIN_DICTIONARY):
            return None
        if self._dictionary is None:
            self._dictionary = _read_dictionary(self._source, self.place, header, body, self._decompress)
        return None if self._dictionary is None else self._find(body + header.nbytes, before)

    def _is_regular(self, page: Page) -> bool:
        """Tell whether a page that is not read holds vectors that have all their items."""
        if page.header.rows is not None:
            return True
        levels = self._levels(page)
        return levels is not None and _are_levels(levels, page.header, self.place, page.before, len(levels))

    def _proves_rest(self, first: int) -> bool:
        """Tell whether all pages from the one on that holds some value are regular, up to the end of the chunk.

        Then so many vectors are before it as should be: the row group says how many there are in all.
        """
        if not self.place.is_counted:
            return False
        position, before = self._position, self._before
        while before < self.place.values:
            page = self._find(position, before)
            if page is None or not (page.stop <= first or self._is_regular(page)):
                return False
            position, before = page.body + page.header.nbytes, page.stop
        return True

    def _may_end(self, page: Page, last: int) -> bool:
        """Tell whether a vector begins behind a page where the last one ends: else that is longer than it seems."""
        if page.stop != last or last == self.place.values or self._is_proved:
            return True
        following = self._find(page.body + page.header.nbytes, page.stop)
        if following is None:
            return False
        if following.header.rows is not None:
            return True
        levels = self._levels(following)
        return levels is not None and _first_level(levels[4:].tobytes()) == 0

    def _levels(self, page: Page) -> Array | None:
        """Return the levels of a page of version 1, without what they are of."""
        take = _PREFIX_NBYTES.get(self.place.codec, _LEVELS_NBYTES)
        header = page.header
        while True:
            stored = self._source.read(page.body, page.body + min(take, header.nbytes))
            # What is told of the size before is not believed: pages that are read are compared with it.
            most = min(header.plain_nbytes, _MOST_LEVELS_NBYTES, max(4 * take, 2**16))
            plain = np.frombuffer(_decompress_prefix(self.place.codec, stored, most), np.uint8)
            nbytes = _levels_nbytes(plain, self.place)
            if nbytes <= len(plain) and len(plain) >= 4:
                return plain[:nbytes]
            if take >= min(header.nbytes, _MOST_LEVELS_NBYTES):
                return None
            take *= 4


class _PageReader:
    """Reads pages one after the other: the last one again, where the next vectors are in it, too."""

    def __init__(self, file: StoredFile, place: Place, fetch: Fetch | None) -> None:
        self._place = place
        self._source = _Source(file, place, fetch)
        self._decompress = _decompressor(place.codec)
        self._last: tuple[int, tuple[int, Array | int] | None] = (-1, None)

    def read(self, page: Page, dictionary: Array | None) -> tuple[int, Array | int] | None:
        """Return where in the file the values of a page lie and their bytes, or the bytes; None if it is not plain.

        The bytes are there until another one is read.
        """
        if self._last[0] != page.body:
            self._last = (-1, None)  # its memory is that of the next one
            self._last = (
                page.body,
                _read_page(
                    self._source, self._place, page.header, page.body, page.before, dictionary, self._decompress
                ),
            )
        return self._last[1]


def _iter_stretches(
    file: StoredFile,
    place: Place,
    pages: Iterable[tuple[Page, tuple[int, Array | int] | None]],
    skip: int,
    rows: int,
) -> Iterator[Stretch]:
    row_nbytes = place.row_nbytes
    start_nbytes, stop_nbytes = skip * row_nbytes, (skip + rows) * row_nbytes
    carried = b""  # the beginning of a vector that ends in the next page
    for page, found in pages:
        if found is None:
            return
        position, values = found
        del found
        first, nbytes = page.before * place.value_nbytes, values if isinstance(values, int) else values.nbytes
        start, stop = max(0, start_nbytes - first), min(nbytes, stop_nbytes - first)
        if carried or stop - start < row_nbytes:
            missing = min(row_nbytes - len(carried), stop - start)
            carried += _copy(file, position, values, start, start + missing)
            start += missing
            if len(carried) == row_nbytes:
                yield Stretch(1, 0, _as_vectors(np.frombuffer(carried, np.uint8), place))
                carried = b""
        whole, rest = divmod(stop - start, row_nbytes)
        if whole and isinstance(values, int):
            yield Stretch(whole, position + start, None)
        elif whole and not isinstance(values, int):
            yield Stretch(whole, 0, _as_vectors(values[start : stop - rest], place))
        if rest:
            carried = _copy(file, position, values, stop - rest, stop)
        del values  # its memory is that of the next page


def _copy(file: StoredFile, position: int, values: Array | int, start: int, stop: int) -> bytes:
    if not isinstance(values, int):
        return values[start:stop].tobytes()
    part = bytearray(stop - start)
    read_into(file, position + start, [memoryview(part)])
    return bytes(part)


def _as_vectors(values: Array, place: Place) -> Array:
    return values.view(place.dtype).reshape(-1, place.dimension)


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def _has_rows(page: PageHeader, place: Place, before: int) -> bool:
    """Tell whether the vectors of a page of version 2, which it counts, may all have their items."""
    return page.rows is None or (page.rows * place.row_values == page.values and before % place.row_values == 0)


def _all_tell_rows(place: Place) -> bool:
    """Tell whether all pages tell which vectors are in them: then those that are not wanted are passed over.

    Else one vector might be longer, and others shorter: only levels tell which is which.
    """
    return not place.is_list or place.is_fixed


class _Source:
    """Reads a column chunk, and nothing else."""

    def __init__(self, file: StoredFile, place: Place, fetch: Fetch | None) -> None:
        self._file, self._stop, self._fetch = file, place.stop, fetch
        self._head_nbytes = _HEAD_NBYTES if place.codec else _LONG_HEAD_NBYTES
        self._memory = bytearray()  # used again from page to page
        self._start = self._end = 0
        self.is_local = fetch is None

    def header(self, position: int) -> tuple[PageHeader, int] | None:
        """Read the header of the page at a position; None if there is none."""
        if position >= self._stop:
            return None
        found = page_header(self.read(position, min(position + self._head_nbytes, self._stop)))
        if found is None and position + self._head_nbytes < self._stop:
            found = page_header(self.read(position, min(position + _LONG_HEAD_NBYTES, self._stop)))
        return found

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes, until others are read."""
        if self._fetch is not None:
            return self._fetch(start, stop)
        if not self._start <= start <= stop <= self._end:
            if stop - start > len(self._memory):
                self._memory = bytearray(stop - start)
            self._start = self._end = 0
            read_into(self._file, start, [memoryview(self._memory)[: stop - start]])
            self._start, self._end = start, stop
        return memoryview(self._memory)[start - self._start : stop - self._start]

    def read_page(self, start: int, stop: int) -> memoryview:
        """Return the body of a page, and have the header of the next one at hand."""
        ahead = 0 if self._fetch is not None else self._head_nbytes
        return self.read(start, min(stop + ahead, self._stop))[: stop - start]


def _read_dictionary(
    source: _Source, place: Place, page: PageHeader, body: int, decompress: _Decompress
) -> Array | None:
    """Return the values of a dictionary, one a row; None if that is no plain one."""
    if page.plain_nbytes != page.values * place.stored_nbytes or page.plain_nbytes > _MOST_PAGE_NBYTES:
        return None
    plain = _plain_body(source, place, page, body, 0, decompress)
    if plain is None:
        return None
    # Copied: pages are read into the same memory. Looked up as integers these take a third of the time.
    size = place.stored_nbytes
    return np.frombuffer(plain, f"u{size}" if size in (1, 2, 4, 8) else f"V{size}").copy()


def _plain_body(
    source: _Source,
    place: Place,
    page: PageHeader,
    body: int,
    levels: int,
    decompress: _Decompress,
    most: int = _MOST_PAGE_NBYTES,
) -> pa.Buffer | memoryview | bytes | None:
    """Return what is in a page after its first bytes, which are levels that are not compressed."""
    if not levels < min(page.nbytes, page.plain_nbytes) or max(page.nbytes, page.plain_nbytes) > most:
        return None
    stored = source.read_page(body, body + page.nbytes)
    if page.checksum is not None and zlib.crc32(stored) != page.checksum & 0xFFFFFFFF:
        return None
    if not place.codec or not page.is_compressed:
        return stored[levels:] if page.nbytes == page.plain_nbytes else None
    try:
        return decompress(stored[levels:], page.plain_nbytes - levels)
    except Exception:  # noqa: BLE001 - pages may be damaged in any way; pyarrow says how
        return None


def _read_page(
    source: _Source,
    place: Place,
    page: PageHeader,
    body: int,
    before: int,
    dictionary: Array | None,
    decompress: _Decompress,
) -> tuple[int, Array | int] | None:
    """Return where in the file the values of a page lie and their bytes, or the bytes; None if it is not plain."""
    nbytes = page.values * place.stored_nbytes
    levels_nbytes = sum(page.levels or ())
    if (
        page.encoding == PLAIN
        and source.is_local
        and place.stored == place.dtype
        and page.checksum is None
        and not (place.codec and page.is_compressed)
        and page.nbytes == page.plain_nbytes
    ):
        levels = page.nbytes - nbytes
        if not 0 <= levels <= _MOST_LEVELS_NBYTES or not _are_levels(
            source.read(body, body + levels), page, place, before, levels
        ):
            return None
        return body + levels, nbytes
    most = _MOST_PLAIN_PAGE_NBYTES if page.encoding == PLAIN else _MOST_PAGE_NBYTES
    if nbytes > most:  # a run may stand for any number of values
        return None
    plain = _plain_body(source, place, page, body, levels_nbytes, decompress, most)
    if plain is None:
        return None
    data = np.frombuffer(plain, np.uint8)
    if page.levels is None:
        levels_nbytes = _levels_nbytes(data, place)
        if not _are_levels(data[:levels_nbytes], page, place, before, levels_nbytes):
            return None
        data = data[levels_nbytes:]
    elif not _are_levels(source.read(body, body + levels_nbytes), page, place, before, levels_nbytes):
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
    return 0, values


def _decode(data: Array, page: PageHeader, place: Place, dictionary: Array | None) -> Array | None:
    """Return the bytes of the values of a page; None if they are encoded in a way that is not known here."""
    if page.encoding == PLAIN:
        return data
    if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) and dictionary is not None:
        indices = _read_indices(data, page.values)
        if indices is None or int(indices.max()) >= len(dictionary):
            return None
        return dictionary.take(indices).view(np.uint8)
    size = place.stored_nbytes
    if page.encoding == _BYTE_STREAM_SPLIT and len(data) == page.values * size and size in (2, 4, 8):
        values = np.empty((page.values, size), np.uint8)
        for place_in_value in range(size):
            values[:, place_in_value] = data[place_in_value * page.values : (place_in_value + 1) * page.values]
        return values.reshape(-1)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Compression

_Decompress = Callable[[memoryview, int], "pa.Buffer | bytes"]
"""Decompresses bytes that must become exactly so many, else it fails."""


def _decompressor(codec: int) -> _Decompress:
    """Return what decompresses in one thread: some of pyarrow's codecs have a state, and crash where two share one.

    pyarrow's codecs do not tell how much came: what is missing at the end would be anything that was in memory before.
    So each way has a proof that it is all. They take new memory for each page, from an allocator that gives what the
    last page has just left: measured, that is as fast as to decompress into memory of our own.
    """
    name = _CODECS[codec]

    def by_length(data: memoryview, nbytes: int) -> pa.Buffer | bytes:
        told = _snappy_nbytes(data) if name == "snappy" else _zstd_nbytes(data)
        if told is None:
            return streamed(data, nbytes)
        if told != nbytes:
            raise ValueError("another size")
        return opened.decompress(data, nbytes)

    def streamed(data: memoryview, nbytes: int) -> bytes:
        with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(data)), name) as stream:
            plain = cast("bytes", stream.read(nbytes + 1))
        if len(plain) != nbytes:
            raise ValueError("another size")
        return plain

    def twice(data: memoryview, nbytes: int) -> pa.Buffer:
        plain = opened.decompress(data, nbytes)
        try:
            opened.decompress(data, nbytes - 1)
        except (pa.ArrowException, OSError):
            return plain
        raise ValueError("another size")

    opened: Any = None if name is None else pa.Codec(name)
    ways: dict[str | None, _Decompress] = {"snappy": by_length, "zstd": by_length, "lz4_raw": twice}
    return ways.get(name, streamed)


def _snappy_nbytes(data: memoryview) -> int:
    """Return how large snappy's data are, which it compares itself."""
    return read_length(bytes(data[:10]), 0)[0]


def _zstd_nbytes(data: memoryview) -> int | None:
    """Return how large a frame of zstd is, which it compares itself; None where the writer did not say."""
    head = bytes(data[:18])
    if head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = head[4]
    is_single, size, dictionary = flags >> 5 & 1, flags >> 6, (0, 1, 2, 4)[flags & 3]
    width = (is_single, 2, 4, 8)[size]
    if not width:
        if 10 + (head[5] >> 3) > _MOST_WINDOW_BITS:
            raise ValueError("a large window")
        return None
    start = 5 + (not is_single) + dictionary
    told = int.from_bytes(head[start : start + width], "little")
    return told + 256 if width == 2 else told


def _decompress_prefix(codec: int, data: memoryview, most: int) -> bytes | memoryview:
    """Decompress the first bytes of a page, at most about so many, as far as a part of it gives them."""
    if not codec:
        return data
    try:
        if _CODECS[codec] == "snappy":
            return _snappy_prefix(bytes(data), most)
        if _CODECS[codec] == "lz4_raw":
            return _lz4_prefix(bytes(data), most)
        return _streamed_prefix(data, _CODECS[codec] or "", most)
    except Exception:  # noqa: BLE001 - it ends too early, or is damaged in any way
        return b""


def _streamed_prefix(data: memoryview, name: str, most: int) -> bytes:
    """Decompress the first bytes of a stream, step by step: a step fails where there is less than it would give."""
    plain = bytearray()
    with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(data)), name) as stream, suppress(Exception):
        while len(plain) < most and (part := stream.read(min(2**9, most))):
            plain += part
    return bytes(plain)


def _snappy_prefix(data: bytes, most: int) -> bytes:
    """Decompress the first bytes of snappy's data.

    These are literal bytes, or copies of some before; what a copy is of may not have been written yet, then it
    repeats itself.
    """
    plain = bytearray()
    position = read_length(data, 0)[1]
    while len(plain) < most and position < len(data):
        tag = data[position]
        position += 1
        length, kind = tag >> 2, tag & 3
        if kind == 0:
            if length >= 60:
                width = length - 59
                length = int.from_bytes(data[position : position + width], "little")
                position += width
            plain += data[position : position + length + 1]
            position += length + 1
            continue
        width = (0, 1, 2, 4)[kind]
        distance = int.from_bytes(data[position : position + width], "little")
        if position + width > len(data):
            break
        position += width
        if kind == 1:
            distance, length = distance | (length >> 3) << 8, (length & 7) + 3
        _repeat(plain, distance, length + 1)
    return bytes(plain)


def _lz4_prefix(data: bytes, most: int) -> bytes:
    """Decompress the first bytes of a block of lz4: each time some literal bytes, and a copy."""
    plain = bytearray()
    position = 0

    def read_more(length: int) -> int:
        nonlocal position
        while length >= 15:
            more = data[position]
            position += 1
            length += more
            if more < 255:
                break
        return length

    while len(plain) < most and position < len(data):
        tag = data[position]
        position += 1
        length = read_more(tag >> 4)
        plain += data[position : position + length]
        position += length
        if position + 2 > len(data):
            break
        distance = int.from_bytes(data[position : position + 2], "little")
        position += 2
        _repeat(plain, distance, min(read_more(tag & 15) + 4, most))
    return bytes(plain)


def _repeat(plain: bytearray, distance: int, length: int) -> None:
    """Append bytes that are so far before the end, again and again where that is less than are wanted."""
    if not 0 < distance <= len(plain):
        raise ValueError("a copy of what is not there")
    repeated = plain[-distance:][:length]
    plain += (repeated * -(-length // len(repeated)))[:length]


# ---------------------------------------------------------------------------------------------------------------------
# Levels and indices: runs of one number, or of numbers of a few bits each


def _levels_nbytes(data: Array, place: Place) -> int:
    """Return how many bytes at the beginning of a page of version 1 are levels."""
    nbytes = 0
    for _ in range(int(place.is_list) + int(place.definition > 0)):
        nbytes += 4 + int.from_bytes(data[nbytes : nbytes + 4].tobytes(), "little")
    return nbytes


def _first_level(levels: bytes) -> int | None:
    """Return the first level of some; None if there is none."""
    try:
        head, position = read_length(levels[:10], 0)
        return levels[position] & 1 if head & 1 else levels[position]
    except Exception:  # noqa: BLE001 - levels may be damaged in any way
        return None


def _are_levels(data: Array | memoryview, page: PageHeader, place: Place, before: int, nbytes: int) -> bool:
    """Tell whether levels say of the values of a page that they are vectors after so many values, and not null."""
    if len(data) != nbytes or nbytes > _MOST_LEVELS_NBYTES:
        return False
    spelled = bytes(data)
    if page.levels is not None:
        repetition, definition = spelled[: page.levels[0]], spelled[page.levels[0] :]
    else:
        repetition = b""
        if place.is_list:
            nbytes = 4 + int.from_bytes(spelled[:4], "little")
            repetition, spelled = spelled[4:nbytes], spelled[nbytes:]
            if len(repetition) != nbytes - 4:
                return False
        definition = spelled[4:]
        if place.definition and len(definition) != int.from_bytes(spelled[:4], "little"):
            return False
        if not place.definition and spelled:
            return False
    if not _is_defined(definition, page.values, place.definition):
        return False
    if not place.is_list:
        return not repetition
    return _is_regular(repetition, page.values, before % place.dimension, place.dimension)


def _is_defined(levels: bytes, values: int, most: int) -> bool:
    """Tell whether levels of definition are one run that says that nothing is null."""
    if not most:
        return not levels
    try:
        head, position = read_length(levels, 0)
    except Exception:  # noqa: BLE001 - levels may be damaged in any way
        return False
    return head == values << 1 and levels[position:] == bytes([most])


@lru_cache(maxsize=64)  # pages of as many rows mostly have the same levels
def _is_regular(levels: bytes, total: int, phase: int, dimension: int) -> bool:
    """Tell whether levels of repetition are those of vectors of one dimension: 0 where one begins, else 1.

    So many values of the first vector are in the page before. Levels are spelled in runs: of one level, or of eight
    levels in each byte.
    """
    count, position = 0, 0
    begin = -phase % dimension  # where the next vector must begin
    try:
        while count < total:
            head, position = read_length(levels, position)
            if head & 1:
                size = head >> 1
                packed = levels[position : position + size]
                length = min(8 * size, total - count)
                if len(packed) != size or not length:
                    return False
                if size <= 64 and dimension > 32:  # five times as fast for so few
                    bits_expected = (1 << length) - 1
                    for start in range(begin - count, length, dimension):
                        bits_expected ^= 1 << start
                        begin += dimension
                    if int.from_bytes(packed, "little") & ((1 << length) - 1) != bits_expected:
                        return False
                    position, count = position + size, count + length
                    continue
                bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=length, bitorder="little")
                zeros = np.flatnonzero(bits == 0)
                expected = np.arange(begin - count, length, dimension)
                if not np.array_equal(zeros, expected):
                    return False
                begin += len(expected) * dimension
                position += size
            else:
                length, level = min(head >> 1, total - count), levels[position]
                if level > 1 or not length:
                    return False
                if level == 1 and begin < count + length:
                    return False
                if level == 0:  # vectors of one item, or the beginning of one
                    if begin != count or (length > 1 and dimension > 1):
                        return False
                    begin += length if dimension == 1 else dimension
                position += 1
            count += length
    except Exception:  # noqa: BLE001 - as above
        return False
    return position == len(levels)


def _read_indices(data: Array, count: int) -> Array | None:
    """Return so many numbers of a few bits each, which are spelled in runs as levels are; None if these are wrong."""
    if not len(data) or not 0 <= data[0] <= _MOST_BITS:
        return None
    width, spelled = int(data[0]), data[1:]
    # What is looked at as four bytes may begin at the last one.
    padded = np.concatenate([spelled, np.zeros(8, np.uint8)])
    indices = np.empty(count, np.uint32)
    filled, position = 0, 0
    while filled < count:
        try:
            head, after = read_length(spelled[position : position + 10].tobytes(), 0)
        except Exception:  # noqa: BLE001 - as above
            return None
        position += after
        if head & 1:
            groups = head >> 1
            if not 0 < groups <= -(-(count - filled) // 8):
                return None
            # Runs of the same length follow each other; all of them are unpacked at once.
            step = groups * width + after
            spell = padded[position - after : position]
            runs = 1
            most = min((len(spelled) - position + after) // step, -(-(count - filled) // (8 * groups)))
            if most > 1:
                heads = np.ndarray((most, after), np.uint8, padded, position - after, (step, 1))
                same = (heads == spell).all(axis=1)
                runs = most if same.all() else int(np.argmin(same))
            if position + (runs - 1) * step + groups * width > len(spelled):
                return None
            unpacked = _unpack(padded, position, runs, step, groups, width)
            length = min(len(unpacked), count - filled)
            indices[filled : filled + length] = unpacked[:length]
            position += (runs - 1) * step + groups * width
        else:
            length, size = min(head >> 1, count - filled), (width + 7) // 8
            if not length or position + size > len(spelled):
                return None
            indices[filled : filled + length] = int.from_bytes(spelled[position : position + size].tobytes(), "little")
            position += size
        filled += length
    return indices


_MOST_BITS = 25
"""Each number lies in four bytes then."""


def _unpack(data: Array, position: int, runs: int, step: int, groups: int, width: int) -> Array:
    """Return the numbers of runs, each of some groups of eight; a group takes as many bytes as a number has bits."""
    numbers = np.empty((runs, groups, 8), np.uint32)
    mask = np.uint32((1 << width) - 1)
    for place in range(8):
        byte, bit = divmod(place * width, 8)
        words = np.ndarray((runs, groups), "<u4", data, position + byte, (step, width))
        numbers[:, :, place] = (words >> np.uint32(bit)) & mask
    return numbers.reshape(-1)
