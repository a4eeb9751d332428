"""Pages are decompressed to exactly what they hold, and the first bytes of some as far as a part of them tells.

Blocks of snappy and lz4 are put together here piece by piece, with every kind of piece; pyarrow's codecs say what they
mean.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import pyarrow as pa
import pytest

from dask_embedding_reader.formats.parquet import compression


class Piece(NamedTuple):
    """What a codec writes at a time."""

    head: bytes
    """What comes first."""
    literal: bytes
    """Bytes as they are."""
    tail: bytes
    """What comes last."""
    plain: bytes
    """What both mean."""

    @property
    def stored(self) -> bytes:
        return self.head + self.literal + self.tail


def copied(plain: bytes, distance: int, length: int) -> bytes:
    """What repeats itself where the distance is less than the length."""
    found = bytearray(plain)
    for _ in range(length):
        found.append(found[-distance])
    return bytes(found[len(plain) :])


def copy_from(chance: Random, plain: bytes, most: int) -> int:
    """A distance, short ones mostly."""
    return chance.randint(1, min(len(plain), chance.choice([1, 3, 100, most])))


# ---------------------------------------------------------------------------------------------------------------------
# Snappy


def snappy_literal(content: bytes, width: int) -> Piece:
    """Its length is told in so many bytes, or in the tag."""
    if width:
        head = bytes([59 + width << 2]) + (len(content) - 1).to_bytes(width, "little")
    else:
        head = bytes([len(content) - 1 << 2])
    return Piece(head, content, b"", content)


def snappy_pieces(chance: Random, count: int) -> list[Piece]:
    pieces = [snappy_literal(chance.randbytes(5), 0)]
    plain = pieces[0].plain
    for _ in range(count):
        kind = chance.randrange(4)
        if kind == 0:
            width = chance.randrange(5)
            nbytes = chance.choice([1, 2, 59, 60] if not width else [1, 61, 256] if width == 1 else [1, 61, 257, 700])
            piece = snappy_literal(chance.randbytes(nbytes), width)
        elif kind == 1:
            distance, length = copy_from(chance, plain, 2_047), chance.randint(4, 11)
            head = bytes([distance >> 8 << 5 | length - 4 << 2 | 1, distance & 255])
            piece = Piece(head, b"", b"", copied(plain, distance, length))
        else:
            distance, length = copy_from(chance, plain, 60_000), chance.choice([1, 2, 63, 64])
            head = bytes([length - 1 << 2 | kind]) + distance.to_bytes(2 if kind == 2 else 4, "little")
            piece = Piece(head, b"", b"", copied(plain, distance, length))
        pieces.append(piece)
        plain += piece.plain
    return pieces


def snappy(pieces: list[Piece]) -> tuple[bytes, bytes]:
    """A page, and what comes before the first piece."""
    nbytes = sum(len(piece.plain) for piece in pieces)
    begin = bytes([nbytes & 127 | 128, nbytes >> 7 & 127 | 128, nbytes >> 14])
    return begin + b"".join(piece.stored for piece in pieces), begin


# ---------------------------------------------------------------------------------------------------------------------
# LZ4


def lz4_length(length: int) -> bytes:
    """What does not fit in four bits."""
    return b"" if length < 15 else bytes([255] * ((length - 15) // 255) + [(length - 15) % 255])


def lz4_pieces(chance: Random, count: int) -> list[Piece]:
    plain, pieces = b"", []
    for _ in range(count):
        literal = chance.randbytes(chance.choice([0, 1, 14, 15, 16, 269, 270, 271, 600] if plain else [3]))
        distance = copy_from(chance, plain + literal, 60_000)
        length = chance.choice([4, 5, 18, 19, 20, 273, 274, 275, 600])
        more = copied(plain + literal, distance, length)
        tag = min(15, len(literal)) << 4 | min(15, length - 4)
        tail = distance.to_bytes(2, "little") + lz4_length(length - 4)
        pieces.append(Piece(bytes([tag]) + lz4_length(len(literal)), literal, tail, literal + more))
        plain += literal + more
    last = chance.randbytes(20)
    return [*pieces, Piece(b"\xf0\x05", last, b"", last)]


def lz4(pieces: list[Piece]) -> tuple[bytes, bytes]:
    return b"".join(piece.stored for piece in pieces), b""


MADE = {1: (snappy_pieces, snappy), 7: (lz4_pieces, lz4)}


def made(codec: int, seed: int, count: int) -> tuple[list[Piece], bytes, bytes, bytes]:
    """Pieces, the page that they make, what is before them in it, and what it holds."""
    make_pieces, join = MADE[codec]
    pieces = make_pieces(Random(seed), count)
    return pieces, *join(pieces), b"".join(piece.plain for piece in pieces)


@pytest.mark.parametrize("codec", MADE)
@pytest.mark.parametrize("seed", range(10))
def test_the_first_pieces_are_decompressed_until_that_is_enough(codec: int, seed: int) -> None:
    pieces, stored, begin, plain = made(codec, seed, 60)
    assert pa.Codec(compression.CODECS[codec]).decompress(stored, len(plain)).to_pybytes() == plain
    done = 0
    for piece in pieces:
        for most in (done + 1, done + len(piece.plain)):
            found = bytes(compression.decompress_prefix(codec, memoryview(stored), most))
            if len(piece.plain) <= most:  # of a copy that is longer than what is wanted, no more
                assert found == plain[: done + len(piece.plain)]
            assert found[:most] == plain[:most]
        done += len(piece.plain)
    assert bytes(compression.decompress_prefix(codec, memoryview(stored), 2 * done)) == plain
    assert bytes(compression.decompress_prefix(codec, memoryview(begin), done)) == b""


@pytest.mark.parametrize("codec", MADE)
@pytest.mark.parametrize("seed", range(5))
def test_of_a_part_of_a_page_all_literal_bytes_come_and_all_whole_copies(codec: int, seed: int) -> None:
    pieces, stored, begin, plain = made(codec, seed, 25)
    start, done = len(begin), 0
    for piece in pieces:
        for cut in {*range(min(len(piece.stored), 8)), *range(max(0, len(piece.stored) - 8), len(piece.stored))}:
            literal = min(len(piece.literal), max(0, cut - len(piece.head)))
            expected = plain[: done + literal]
            behind = cut - len(piece.head) - len(piece.literal)
            if codec == 7 and (0 < cut < len(piece.head) or behind >= 2):  # a length is cut through
                expected = b""
            assert (
                bytes(compression.decompress_prefix(codec, memoryview(stored)[: start + cut], len(plain))) == expected
            )
        start, done = start + len(piece.stored), done + len(piece.plain)


@pytest.mark.parametrize(
    ("codec", "stored", "found"),
    [
        (1, b"\x20\x0cabcd\x01\x04", b"abcd" * 2),
        (1, b"\x20\x0cabcd\x01\x05", b""),
        (1, b"\x20\x0cabcd\x01\x00", b""),
        (1, b"\x20\x0cabcd\x1a\x01\x00", b"abcd" + b"d" * 7),
        (1, b"\x20\x0cabcd\x1a\x00\x00", b""),
        (1, b"\x20\x0cabcd\x1a\x01", b"abcd"),
        (7, b"\x40abcd\x04\x00\x10e", b"abcdabcde"),
        (7, b"\x40abcd\x05\x00\x10e", b""),
        (7, b"\x40abcd\x00\x00\x10e", b""),
        (7, b"\x40abcd\x04", b"abcd"),
    ],
)
def test_a_copy_is_of_what_is_there(codec: int, stored: bytes, found: bytes) -> None:
    """Where it is not, the page is damaged, and nothing of it is told."""
    assert bytes(compression.decompress_prefix(codec, memoryview(stored), 1_000)) == found


def test_a_copy_of_a_gigabyte_that_damage_claims_takes_no_more_than_is_wanted() -> None:
    stored = b"\x1fa\x01\x00" + b"\xff" * 1_000 + b"\x00"
    assert bytes(compression.decompress_prefix(7, memoryview(stored), 500)) == b"a" * 501


@pytest.mark.parametrize("codec", [2, 4, 6])
def test_of_streams_so_much_comes_as_is_wanted_in_steps_of_512_bytes(codec: int) -> None:
    plain = Random(codec).randbytes(200_000)
    stored = memoryview(pa.Codec(compression.CODECS[codec]).compress(plain, asbytes=True))
    for most in (1, 100, 511, 512, 513, 5_000, 200_000, 300_000):
        found = bytes(compression.decompress_prefix(codec, stored, most))
        step = min(512, most)
        assert found == plain[: -(-most // step) * step]
    assert plain.startswith(bytes(compression.decompress_prefix(codec, stored[:150_000], 200_000)))
    assert len(compression.decompress_prefix(codec, stored[:150_000], 200_000)) > 10_000
    assert bytes(compression.decompress_prefix(codec, memoryview(bytes(100)), 1_000)) == b""


def test_what_is_not_compressed_is_its_own_prefix() -> None:
    assert bytes(compression.decompress_prefix(0, memoryview(b"abcd"), 2)) == b"abcd"


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("dictionary", range(4))
@pytest.mark.parametrize("is_single", [0, 1])
@pytest.mark.parametrize("size", range(4))
def test_frames_of_zstd_tell_their_size_in_the_ways_that_there_are(size: int, is_single: int, dictionary: int) -> None:
    """As its format is described: flags, a window, the number of a dictionary, and the size in some bytes."""
    width = (is_single, 2, 4, 8)[size]
    for told in (0, 1, 0x7F, 0x81, 0x0123456789ABCDEF):
        told %= 256**width
        head = b"\x28\xb5\x2f\xfd" + bytes([size << 6 | is_single << 5 | dictionary])
        head += b"" if is_single else b"\x48"
        head += b"\xee" * (0, 1, 2, 4)[dictionary] + told.to_bytes(width, "little")
        expected = None if not width else told + 256 if width == 2 else told
        assert compression._zstd_nbytes(memoryview(head + b"\x99" * 9)) == expected
    assert compression._zstd_nbytes(memoryview(b"\x29" + head[1:] + bytes(9))) is None


def test_frames_of_zstd_of_a_large_window_and_no_size_are_refused() -> None:
    """They would be given as much memory, whatever a page says of itself."""
    for window in range(256):
        head = b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + bytes(12)
        if 10 + (window >> 3) <= 23:
            assert compression._zstd_nbytes(memoryview(head)) is None
        else:
            with pytest.raises(ValueError, match="a large window"):
                compression._zstd_nbytes(memoryview(head))


@pytest.mark.parametrize("codec", [1, 2, 4, 6, 7])
def test_all_sizes_are_told_apart(codec: int) -> None:
    for nbytes in (1, 2, 60, 128, 300, 2**16):
        plain = Random(nbytes).randbytes(nbytes)
        stored = memoryview(pa.Codec(compression.CODECS[codec]).compress(plain, asbytes=True))
        assert bytes(compression.decompress(codec, stored, nbytes)) == plain
        for other in (nbytes - 1, nbytes + 1, 2 * nbytes):
            with pytest.raises((OSError, ValueError, pa.ArrowException)):
                compression.decompress(codec, stored, other)


def test_pages_are_compressed_in_these_ways_or_left_to_pyarrow() -> None:
    assert [codec for codec in range(-1, 12) if compression.can_be_plain(codec)] == [0, 1, 2, 4, 6, 7]
