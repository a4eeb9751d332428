"""Vectors that lie in the pages of a parquet file nearly as they do in memory, taken without pyarrow's decoder.

Decoding costs pyarrow ten times what copying costs, since it looks at two levels of nesting for every item. Where each
vector has all its items the levels say nothing, and what remains is to decompress pages, which takes as long as to copy
them, and to copy these. Files that pandas, pyarrow, polars or Spark write by default begin each column chunk with a few
pages that refer to a dictionary, since each item is tried; these are looked up here.
Whatever is not provably so is left to pyarrow, with its errors.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.parquet.compression import decompress_prefix
from dask_embedding_reader.formats.parquet.levels import (
    MOST_LEVELS_NBYTES,
    are_levels,
    count_level_nbytes,
    first_level,
)
from dask_embedding_reader.formats.parquet.page_headers import PLAIN, PLAIN_DICTIONARY, PageHeader
from dask_embedding_reader.formats.parquet.page_index import PageIndex
from dask_embedding_reader.formats.parquet.pages import Fetch, PageSource, read_dictionary, read_page
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.values import InMemory, Values
from dask_embedding_reader.formats.raw import naming_rows, take_rows
from dask_embedding_reader.storage.store import StoredFile

_LEVELS_NBYTES = 2**12
"""Holds the levels of most pages that are compressed, and a little more."""

_PREFIX_NBYTES = {6: 2**17 + 2**10}
"""The same of zstd, which decompresses blocks of 128 KB."""


class _Kept:
    """The values of a page that two pieces or more need: whoever comes first reads it for all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: list[Values | None] = []


class _Dictionary:
    """What pages refer to: read by whoever needs it first, as the others find their pages meanwhile."""

    def __init__(self, file: StoredFile, place: Place, fetch: Fetch | None, header: PageHeader, body: int) -> None:
        self._lock = threading.Lock()
        self._found: list[Array | None] = []
        self._read = partial(read_dictionary, PageSource(file, place, fetch), place, header, body)

    def __call__(self) -> Array | None:
        """Return its values; None if it is no plain one."""
        with self._lock:
            if not self._found:
                self._found.append(self._read())
            return self._found[0]


class Page(NamedTuple):
    """A page of vectors."""

    header: PageHeader
    """What it says of itself."""
    body: int
    """Where in the file it begins, after its header."""
    before: int
    """The values of the column chunk before it."""
    kept: _Kept | None = None
    """Where its values are kept once they are read, if the next piece begins in it."""

    @property
    def stop(self) -> int:
        """The values up to its end."""
        return self.before + self.header.values


class PlainChunk:
    """The vectors of one column chunk, as far as they are plain.

    Pages are found by one thread at a time, in ascending order; what has been found can be read by several.
    """

    def __init__(self, file: StoredFile, place: Place, fetch: Fetch | None, index: PageIndex | None = None) -> None:
        """The bytes of remote files come from ``fetch``; with an index it need not have pages that are not wanted."""
        self.place = place
        self._file, self._fetch, self._index = file, fetch, index
        self._source = PageSource(file, place, fetch)
        self._position, self._before = place.start, 0
        self._dictionary: _Dictionary | None = None
        self._pages: deque[Page] = deque()
        # Whether it is known which vectors are in pages that are passed over: else one might be longer, others shorter.
        self._is_proved = not place.is_list or place.is_fixed
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
        if self._index is not None:
            self._go_to(self._index, skip)
        while self._before < last:
            page = self._find(self._position, self._before)
            if page is None or not (page.stop > first or self._is_proved or self._is_regular(page)):
                return
            if self._index is not None and not self._is_as_told(self._index, page):
                return
            if not self._may_end(page, last):
                return
            self._position, self._before = page.body + page.header.nbytes, page.stop
            if page.stop > first:
                if page.stop > last:
                    page = page._replace(kept=_Kept())
                self._pages.append(page)
                yield page

    def fill(self, pages: Iterator[Page], skip: int, rows: int, row: int, outs: deque[Array]) -> int:
        """Fill arrays with ``rows`` vectors after the first ``skip``, from the pages that hold them.

        The first of them is a row of the file. Return how many came: as far as they are plain.
        """
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = _PageReader(self._file, self.place, self._fetch)
        try:
            return self._fill(reader, pages, skip, rows, row, outs)
        finally:
            self._idle.append(reader)

    def _fill(
        self, reader: _PageReader, pages: Iterator[Page], skip: int, rows: int, row: int, outs: deque[Array]
    ) -> int:
        file, place, row_nbytes = self._file, self.place, self.place.row_nbytes
        start_nbytes, stop_nbytes = skip * row_nbytes, (skip + rows) * row_nbytes
        as_stored = all(out.dtype == place.dtype for out in outs)
        done, carried = 0, b""  # the beginning of a vector that ends in the next page
        while True:
            with naming_rows(row + done, row + rows):
                page = next(pages, None)
                values = None if page is None else reader.read(page, self._dictionary, as_stored=as_stored)
                if page is None or values is None:
                    return done
                first = page.before * place.value_nbytes
                start, stop = max(0, start_nbytes - first), min(values.nbytes, stop_nbytes - first)
                begun: bytes | None = b""
                end: bytes | None = b""
                if carried:
                    missing = min(row_nbytes - len(carried), stop - start)
                    begun = values.copy(start, start + missing)
                    start += missing
                whole, rest = divmod(stop - start, row_nbytes)
                if rest:
                    end = values.copy(stop - rest, stop)
                if begun is None or end is None:
                    return done
            carried += begun
            if len(carried) == row_nbytes:
                vector = InMemory(file, place, np.frombuffer(carried, np.uint8))
                vector.fill(0, take_rows(outs, 1), row + done)
                done, carried = done + 1, b""
            if whole:
                taken = take_rows(outs, whole)
                if not values.fill(start, taken, row + done):
                    outs.extendleft(reversed(taken))
                    return done
                done += whole
            carried += end
            del values  # its memory is that of the next page, and in the cache

    def _go_to(self, index: PageIndex, row: int) -> None:
        """Pass over the pages before the one that holds a row: a page of a file with an index begins with a vector."""
        page = index.page_of(row)
        if index.starts[page] > self._position:
            if self._position < index.starts[0]:
                self._find(self._position, 0)  # the dictionary comes first
            self._position, self._before = index.starts[page], index.rows[page] * self.place.row_values

    def _is_as_told(self, index: PageIndex, page: Page) -> bool:
        """Tell whether a page has as many values as the vectors that should be in it."""
        number = index.page_of(page.before // self.place.row_values)
        return page.header.values == (index.rows[number + 1] - index.rows[number]) * self.place.row_values

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
            self._dictionary = _Dictionary(self._file, self.place, self._fetch, header, body)
            if self._fetch is not None:
                self._dictionary()  # while it is at hand
        return self._find(body + header.nbytes, before)

    def _is_regular(self, page: Page) -> bool:
        """Tell whether a page that is not read holds vectors that have all their items."""
        if page.header.rows is not None:
            return True
        levels = self._levels(page)
        return levels is not None and are_levels(levels, page.header, self.place, page.before, len(levels))

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
        if page.stop != last or last == self.place.values or self._is_proved or self._index is not None:
            return True
        following = self._find(page.body + page.header.nbytes, page.stop)
        if following is None:
            return False
        if following.header.rows is not None:
            return True
        levels = self._levels(following)
        return levels is not None and first_level(levels[4:].tobytes()) == 0

    def _levels(self, page: Page) -> Array | None:
        """Return the levels of a page of version 1, without what they are of."""
        take = _PREFIX_NBYTES.get(self.place.codec, _LEVELS_NBYTES)
        header = page.header
        while True:
            stored = self._source.read(page.body, page.body + min(take, header.nbytes))
            # What is told of the size before is not believed: pages that are read are compared with it.
            most = min(header.plain_nbytes, MOST_LEVELS_NBYTES, max(4 * take, 2**16))
            plain = np.frombuffer(decompress_prefix(self.place.codec, stored, most), np.uint8)
            nbytes = count_level_nbytes(plain, self.place)
            if nbytes <= len(plain) and len(plain) >= 4:
                return plain[:nbytes]
            if take >= min(header.nbytes, MOST_LEVELS_NBYTES):
                return None
            take *= 4


class _PageReader:
    """Reads pages one after the other, into the same memory."""

    def __init__(self, file: StoredFile, place: Place, fetch: Fetch | None) -> None:
        self._place = place
        self._source = PageSource(file, place, fetch)

    def read(self, page: Page, dictionary: _Dictionary | None, *, as_stored: bool) -> Values | None:
        """Return the values of a page, which are there until another one is read; None if it is not plain."""
        if page.kept is None:
            return self._read(page, dictionary, as_stored=as_stored)
        with page.kept.lock:
            if not page.kept.found:
                values = self._read(page, dictionary, as_stored=as_stored)
                page.kept.found.append(None if values is None else values.kept())
            return page.kept.found[0]

    def _read(self, page: Page, dictionary: _Dictionary | None, *, as_stored: bool) -> Values | None:
        return read_page(
            self._source,
            self._place,
            page.header,
            page.body,
            page.before,
            dictionary,
            as_stored=as_stored,
        )


def _has_rows(page: PageHeader, place: Place, before: int) -> bool:
    """Tell whether the vectors of a page of version 2, which it counts, may all have their items."""
    return page.rows is None or (page.rows * place.row_values == page.values and before % place.row_values == 0)
