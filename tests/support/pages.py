"""Pages of parquet files, encoded as ``parquet.thrift`` and its encodings are described."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dask_embedding_reader.formats.parquet.compression import CODECS
from dask_embedding_reader.formats.parquet.page_headers import PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY, PageHeader
from dask_embedding_reader.formats.parquet.place import Place
from tests.support.thrift import FALSE, I32, STRUCT, TRUE, Value, encoded_fields, varint

Array = npt.NDArray[Any]

BYTE_STREAM_SPLIT = 9


def levels_of(count: int, before: int, place: Place) -> tuple[bytes, bytes]:
    """Of repetition, in groups of eight, and of definition, in one run."""
    repetition = definition = b""
    if place.is_list:
        ones = [(before + number) % place.dimension != 0 for number in range(count)]
        padded = np.array(ones + [False] * (-count % 8))
        repetition = varint(len(padded) // 8 << 1 | 1) + np.packbits(padded, bitorder="little").tobytes()
    if place.definition:
        definition = varint(count << 1) + bytes([place.definition])
    return repetition, definition


def packed(numbers: Array, width: int) -> bytes:
    """Numbers of some bits in one run of groups."""
    groups = -(-len(numbers) // 8)
    bits = sum(int(number) << place * width for place, number in enumerate(numbers))
    return bytes([width]) + varint(groups << 1 | 1) + bits.to_bytes(groups * width, "little")


def value_type(place: Place) -> np.dtype[Any]:
    """What values are looked up as."""
    size = place.stored_nbytes
    return np.dtype(f"u{size}" if size in (2, 4, 8) else f"V{size}")


def dictionary_of(items: Array, place: Place) -> Array:
    """The values that there are."""
    values = np.frombuffer(items.astype(place.stored).tobytes(), value_type(place))
    return np.frombuffer(b"".join(sorted({each.tobytes() for each in values})), values.dtype)


def encode_page(
    items: Array,
    place: Place,
    before: int,
    *,
    version: int = 1,
    encoding: int = PLAIN,
    dictionary: Array | None = None,
    has_checksum: bool = False,
    is_compressed: bool = True,
) -> tuple[PageHeader, bytes]:
    """Items after so many values of the column chunk: what the header of the page says, and the page."""
    plain = items.astype(place.stored).tobytes()
    count = len(plain) // place.stored_nbytes
    if encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
        assert dictionary is not None
        places = {each.tobytes(): number for number, each in enumerate(dictionary)}
        indices = [places[each.tobytes()] for each in np.frombuffer(plain, dictionary.dtype)]
        plain = packed(np.array(indices), len(dictionary).bit_length())
    elif encoding == BYTE_STREAM_SPLIT:
        plain = np.frombuffer(plain, np.uint8).reshape(count, -1).T.tobytes()
    repetition, definition = levels_of(count, before, place)
    name = CODECS[place.codec] if is_compressed else None

    def compressed(data: bytes) -> bytes:
        return data if name is None else pa.Codec(name).compress(data, asbytes=True)

    more: dict[str, Any] = {}
    if version == 1:
        levels = b"".join(len(each).to_bytes(4, "little") + each for each in (repetition, definition) if each)
        body = compressed(levels + plain)
    else:
        levels = repetition + definition
        body = levels + compressed(plain)
        more = {
            "rows": count // place.row_values,
            "levels": (len(repetition), len(definition)),
            "is_compressed": is_compressed,
        }
    checksum = zlib.crc32(body) - 2**32 if has_checksum else None  # a signed number, in files
    return PageHeader(len(body), count, encoding, len(levels) + len(plain), False, checksum, **more), body


def encode_dictionary(dictionary: Array, place: Place, encoding: int = PLAIN) -> tuple[PageHeader, bytes]:
    """The page that others refer to."""
    plain, name = dictionary.tobytes(), CODECS[place.codec]
    body = plain if name is None else pa.Codec(name).compress(plain, asbytes=True)
    return PageHeader(len(body), len(dictionary), encoding, len(plain), True), body


def encode_head(page: PageHeader) -> bytes:
    """The header of a page."""
    kind = 2 if page.is_dictionary else 0 if page.levels is None else 3
    fields = {number: Value(I32, value) for number, value in ((1, kind), (2, page.plain_nbytes), (3, page.nbytes))}
    if page.checksum is not None:
        fields[4] = Value(I32, page.checksum)
    numbers = [page.values, page.encoding]
    if kind == 0:
        numbers += [3, 3]
    elif page.levels is not None:
        assert page.rows is not None
        numbers = [page.values, 0, page.rows, page.encoding, page.levels[1], page.levels[0]]
    said = {number: Value(I32, value) for number, value in enumerate(numbers, 1)}
    if kind == 3:
        said[7] = Value(TRUE if page.is_compressed else FALSE, b"")
    return encoded_fields({**fields, {0: 5, 2: 7, 3: 8}[kind]: Value(STRUCT, said)})
