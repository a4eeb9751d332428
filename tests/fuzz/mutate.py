"""Damage, done with a knowledge of what is damaged: lengths are put right again, so that the damage is looked at."""

from __future__ import annotations

import re
from random import Random
from typing import Any

_ODD_BYTES = (0, 1, 2, 0x0C, 0x15, 0x19, 0x7F, 0x80, 0xFE, 0xFF)
_ODD_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, -(2**31), 2**32, 10**12, 2**63 - 1)


def damage(rng: Random, data: bytes, start: int = 0, stop: int | None = None, *, keep_length: bool = False) -> bytes:
    """Change one to four places between two bytes."""
    found = bytearray(data)
    stop = len(data) if stop is None else stop
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(start, max(start + 1, min(stop, len(found))))
        span = slice(place, place + rng.choice((1, 1, 2, 4, 8, 32)))
        kind = rng.randrange(5 if keep_length else 9)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(found):
            found[place] = rng.choice(_ODD_BYTES)
        elif kind == 2:
            found[span] = rng.randbytes(len(found[span]))
        elif kind == 3:
            number = (rng.choice(_ODD_NUMBERS) % 2**64).to_bytes(8, "little")
            found[span] = number[: len(found[span])].ljust(len(found[span]), b"\0")
        elif kind == 4 and place < len(found):
            found[place] = rng.randrange(256)
        elif kind == 5:
            found[span] = b""
        elif kind == 6:
            found[place:place] = found[span] * rng.choice((1, 1, 50))
        elif kind == 7:
            found[place : place + rng.choice((1, 2, 3))] = _varint(rng.choice(_ODD_NUMBERS))
        elif kind == 8:
            found[place:place] = rng.randbytes(rng.choice((1, 8)))
    return bytes(found)


def _varint(number: int) -> bytes:
    """A number as Thrift's compact protocol spells it."""
    rest = (number << 1) ^ (number >> 63)
    spelled = bytearray()
    while rest > 127:
        spelled.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*spelled, rest])


_DTYPES = ("<f4", ">f8", "<f2", "|i1", "<u8", "|O", "<U3", "|V9", "<M8[s]", "<c8", "|b1", "x", "", "<f4,<i4", "<f16")
_ORDERS = ("True", "False", "0", "None", "'C'")
_ODD_TEXTS = (
    "",
    "{}",
    "[" * 500,
    "(" * 90 + ")" * 90,
    "-" * 2000 + "1",
    "{'descr':",
    "1e999",
    "\0",
    "é" * 9,
    "__import__('os')",
)


def npy(rng: Random, seeds: list[bytes]) -> bytes:
    seed = rng.choice(seeds)
    if rng.random() < 0.5:
        return damage(rng, seed, 0, 140 if rng.random() < 0.8 else None)
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(300))
    lengths = (*_ODD_NUMBERS, 20, 3, 20, 3, 1.5, True, "'a'", "20L")
    shape = [20, 3] if rng.random() < 0.3 else [rng.choice(lengths) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 40)))]
    dtype = rng.choice((repr(rng.choice(_DTYPES)), "[('a', '<f4'), ('b', '<f4')]", "('<f4', (3,))"))
    numbers = "".join(f"{n}, " for n in shape)
    text = f"{{'descr': {dtype}, 'fortran_order': {rng.choice(_ORDERS)}, 'shape': ({numbers}), }}"
    if rng.random() < 0.1:
        text = rng.choice(_ODD_TEXTS)
    if rng.random() < 0.3:
        text = damage(rng, text.encode()).decode("latin1")
    version = rng.choice((1, 1, 1, 2, 3))
    header = text.encode("latin1" if version < 3 else "utf8", "replace") + b" " * rng.choice((0, 5, 60, 12_000)) + b"\n"
    length = len(header) if rng.random() < 0.9 else rng.choice(_ODD_NUMBERS)
    width = 2 if version == 1 else 4
    body = seed[-ROW_NBYTES:] if rng.random() < 0.5 else rng.randbytes(rng.choice((0, 60, 240, 480)))
    length %= 2 ** (8 * width)
    return b"\x93NUMPY" + bytes([version, 0]) + int(length).to_bytes(width, "little") + header + body


ROW_NBYTES = 240
"""20 vectors of three float32."""


def parquet_footer(rng: Random, seeds: list[bytes]) -> bytes:
    seed = rng.choice(seeds)
    nbytes = int.from_bytes(seed[-8:-4], "little")
    footer = damage(rng, seed[-8 - nbytes : -8])
    length = len(footer) if rng.random() < 0.97 else rng.choice(_ODD_NUMBERS) % 2**32
    return seed[: -8 - nbytes] + footer + length.to_bytes(4, "little") + b"PAR1"


def parquet_pages(rng: Random, seeds: list[bytes]) -> bytes:
    seed = rng.choice(seeds)
    stop = len(seed) - 8 - int.from_bytes(seed[-8:-4], "little")
    # The head of a page starts with its type, field 1 of kind 5: a good place to look for heads.
    heads = [place for place in range(4, stop) if seed[place] == 0x15 and seed[place + 1] < 8]
    if heads and rng.random() < 0.7:
        head = rng.choice(heads)
        return damage(rng, seed, head, min(head + 24, stop), keep_length=True)
    return damage(rng, seed, 4, stop, keep_length=True)


def snappy_literals(rng: Random, seeds: list[bytes]) -> bytes:
    """Damage the first page, or one of the tags before 64 KB of literal bytes."""
    seed = rng.choice(seeds)
    place = rng.choice([4, *(found.start() for found in re.finditer(b"\xf4\xff\xff", seed))])
    return damage(rng, seed, place, place + (100 if place == 4 else 4), keep_length=True)


_ODD_PATHS = (
    *("../0.npy", "/etc/passwd", "a/../../0.npy", "%2e%2e/0.npy", "%252e%252e/0.npy", "..\\0.npy", "./0.npy", "a\0b"),
    *("file:///etc/passwd", "zip://0.npy::file:///x.zip", "simplecache::memory://x", "~/.npy", "C:\\x", "//host/x", ""),
    *("é.npy", "0.npy/..", "\u2024\u2024/0.npy", ". ./0.npy", "..%00/0.npy", "0.npy", "?x=1", "#", "*", "x" * 5000),
)


def odd_value(rng: Random) -> Any:
    """A value where another one was expected."""
    deep: Any = []
    for _ in range(rng.choice((1, 50, 900))):
        deep = [deep]
    return rng.choice(
        (*_ODD_NUMBERS, *_ODD_PATHS, None, True, 1.5, float("nan"), float("inf"), 10**400, [], {}, [1], {"a": 1}, deep)
    )


def odd_path(rng: Random) -> str:
    return rng.choice(_ODD_PATHS)
