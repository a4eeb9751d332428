"""What pages of a parquet file say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dask_embedding_reader.formats.parquet.thrift import FLAG, DamagedError, Wanted, read_struct

PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY = 0, 2, 3, 8
"""Encodings of items and of levels, by their numbers in ``parquet.thrift``."""


_PAGE: Wanted = {
    1: {},
    2: {},
    3: {},
    4: {},
    5: {1: {}, 2: {}, 3: {}, 4: {}},
    7: {1: {}, 2: {}},
    8: {1: {}, 2: {}, 3: {}, 4: {}, 5: {}, 6: {}, 7: FLAG},
}
"""type, uncompressed_page_size, compressed_page_size, crc, data_page_header, dictionary_page_header,
data_page_header_v2; of the first: num_values, encoding and those of the levels; of the second: num_values, encoding;
of the last: num_values, num_nulls, num_rows, encoding, the bytes of levels of definition and of repetition,
is_compressed."""


class PageHeader(NamedTuple):
    """What a page of data, or of the dictionary that these refer to, says of itself."""

    nbytes: int
    """Its size in the file, without this header."""
    values: int
    """The items in it, nulls included."""
    encoding: int
    """How they are encoded; 0 for plainly."""
    plain_nbytes: int
    """Its size when it is no more compressed."""
    is_dictionary: bool = False
    """Whether it is the dictionary."""
    checksum: int | None = None
    """The CRC-32 of what is in the file."""
    rows: int | None = None
    """The vectors that begin in it; pages of the first version do not tell."""
    levels: tuple[int, int] | None = None
    """The bytes of its levels of repetition and definition, which version 2 never compresses; these come first."""
    is_compressed: bool = True
    """Whether the others are, where any are."""


def page_header(data: bytes | memoryview) -> tuple[PageHeader, int] | None:
    """Read the header of a page, and how long it is; None if it is of another kind, or wrong.

    Nor is one wanted whose levels are encoded in the way of old.
    """
    try:
        facts, nbytes = read_struct(bytes(data), 0, _PAGE, 0)
        kind, plain_nbytes, stored_nbytes = facts[1], facts[2], facts[3]
        checksum = facts.get(4)
        said = facts[_PAGE_KINDS[kind]]
        if kind == _DATA_PAGE_2:
            page = PageHeader(
                stored_nbytes, said[1], said[4], plain_nbytes, False, checksum, said[3], (said[6], said[5]),
                said.get(7, True),
            )  # fmt: skip
            numbers = *page[:4], said[2], page.rows, *(page.levels or ())
            is_right = said[2] == 0 and said[5] + said[6] <= min(stored_nbytes, plain_nbytes)
        else:
            page = PageHeader(stored_nbytes, said[1], said[2], plain_nbytes, kind == _DICTIONARY_PAGE, checksum)
            numbers = page[:4]
            is_right = page.is_dictionary or (said[3], said[4]) == (RLE, RLE)
    except Exception:  # noqa: BLE001 - whatever may be wrong with it, pyarrow says what
        return None
    if not is_right or not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        return None
    return page, nbytes


_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_2 = 0, 2, 3
_PAGE_KINDS = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_2: 8}
"""The fields of a page's header that tell more, by its kind."""


class PageHead(NamedTuple):
    """How much memory a page takes that is decoded."""

    nbytes: int
    """Its size when it is no more compressed."""
    values: int
    """The items in it, nulls included; 0 in a dictionary."""
    encoding: int
    """How they are encoded."""


def iter_page_heads(file: bytes, start: int, stop: int) -> Iterator[PageHead]:
    """Yield what the pages of a column chunk claim, without decoding them; any error means that it is damaged."""
    page: Wanted = {1: {}, 2: {}, 4: {}}
    while start < stop:
        facts, body = read_struct(file, start, {2: {}, 3: {}, 5: page, 7: page, 8: page}, 0)
        nbytes, stored = facts[2], facts[3]
        numbers = facts.get(5) or facts.get(8) or facts[7]
        values, encoding = numbers[1], numbers[4] if 8 in facts else numbers[2]
        if min(nbytes, stored, values) < 0 or body + stored > stop:
            raise DamagedError("a page is larger than its column chunk")
        yield PageHead(nbytes, 0 if 7 in facts else values, encoding)
        start = body + stored
