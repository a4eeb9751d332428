"""Pages decompressed by pyarrow's codecs, to exactly the size that they tell; and the first bytes of some."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, cast

import pyarrow as pa

from dask_embedding_reader.formats.parquet.thrift import read_varint

SNAPPY = 1

CODECS = {0: None, SNAPPY: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
"""How pages may be compressed, as ``parquet.thrift`` counts. Not the old lz4 (5): writers do not agree on it."""

_MOST_WINDOW_BITS = 23
"""What decompressing a frame of zstd that does not tell its size may look back at."""


def can_be_plain(codec: int) -> bool:
    """Tell whether pages that are compressed so can be decompressed here."""
    return codec in CODECS


class _Codecs(threading.local):
    """Those of a thread, by name: some of pyarrow's have a state, and crash where two threads share one."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self.opened:
            self.opened[name] = pa.Codec(name)
        return self.opened[name]


_codecs = _Codecs()


def decompress(codec: int, data: memoryview, nbytes: int) -> pa.Buffer | bytes:
    """Decompress bytes that must become exactly so many, else it fails.

    pyarrow's codecs do not tell how much came: what is missing at the end would be anything that was in memory before.
    So each way has a proof that it is all. They take new memory for each page, from an allocator that gives what the
    last page has just left: measured, that is as fast as to decompress into memory of our own.
    """
    name = CODECS[codec]
    assert name is not None
    if name in ("snappy", "zstd"):
        told = _snappy_nbytes(data) if name == "snappy" else _zstd_nbytes(data)
        if told is not None:
            if told != nbytes:
                raise ValueError("another size")
            return _codecs(name).decompress(data, nbytes)
    elif name == "lz4_raw":
        plain = _codecs(name).decompress(data, nbytes)
        try:
            _codecs(name).decompress(data, nbytes - 1)
        except (pa.ArrowException, OSError):
            return plain
        raise ValueError("another size")
    with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(data)), name) as stream:
        streamed = cast("bytes", stream.read(nbytes + 1))
    if len(streamed) != nbytes:
        raise ValueError("another size")
    return streamed


def _snappy_nbytes(data: memoryview) -> int:
    """Return how large snappy's data are, which it compares itself."""
    return read_varint(bytes(data[:10]), 0)[0]


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


def decompress_prefix(codec: int, data: memoryview, most: int) -> bytes | memoryview:
    """Decompress the first bytes of a page, at most about so many, as far as a part of it gives them."""
    if not codec:
        return data
    try:
        if CODECS[codec] == "snappy":
            return _snappy_prefix(bytes(data), most)
        if CODECS[codec] == "lz4_raw":
            return _lz4_prefix(bytes(data), most)
        return _streamed_prefix(data, CODECS[codec] or "", most)
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
    position = read_varint(data, 0)[1]
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
        width = 1 << (kind - 1)
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
