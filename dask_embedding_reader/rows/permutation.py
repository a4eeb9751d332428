"""Permutations that are computed, not stored."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.rows.selection import Int64s

UInt32s = npt.NDArray[np.uint32]

_ROUNDS = 8
"""With six, rows of a few dozen stay neighbours by a fifth too often."""


def make_keys(text: str) -> UInt32s:
    """Return a key for each round."""
    digest = hashlib.blake2b(text.encode(), digest_size=4 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


def mix(values: UInt32s) -> UInt32s:
    """Hash numbers (the finaliser of MurmurHash3), in their own memory."""
    _mix(values)
    values ^= values >> np.uint32(16)
    return values


def _mix(values: UInt32s) -> None:
    """Hash numbers but for the last step, which leaves their upper halves as they are."""
    values ^= values >> np.uint32(16)
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)


def permute(values: Int64s, size: int, keys: UInt32s, tweaks: UInt32s | None = None) -> Int64s:
    """Map each of the numbers below ``size`` to another one: a permutation that the keys choose.

    A Feistel network on pairs of numbers that are each about the square root of ``size``: what lands outside goes
    round again until it lands inside. Numbers with different tweaks are permuted by different permutations.

    numpy's own generators may change with its versions (NEP 19), and would hold all of the permutation.
    """
    high = max(2, math.isqrt(size))
    low = -(-size // high)
    found = _encrypt(values, high, low, keys, tweaks)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        again = None if tweaks is None else tweaks[outside]
        found[outside] = _encrypt(found[outside], high, low, keys, again)
        outside = outside[found[outside] >= size]
    return found


def _encrypt(values: Int64s, high: int, low: int, keys: UInt32s, tweaks: UInt32s | None) -> Int64s:
    # Halves of 32 bits: twice as many in each instruction as of 64.
    quotients = values // low
    left, right = quotients.astype(np.uint32), (values - quotients * low).astype(np.uint32)
    for turn in range(0, _ROUNDS, 2):
        _rotate(left, right, high, keys[turn], tweaks)
        _rotate(right, left, low, keys[turn + 1], tweaks)
    return left.astype(np.int64) * low + right


def _rotate(values: UInt32s, by: UInt32s, size: int, key: np.uint32, tweaks: UInt32s | None) -> None:
    """Move numbers below ``size`` on by a hash of others, round and round."""
    hashed = by ^ key
    if tweaks is not None:
        hashed ^= tweaks
    # Scaled to a number below `size`, without a division.
    if size <= 2**16:
        _mix(hashed)
        hashed >>= np.uint32(16)
        hashed *= np.uint32(size)
        hashed >>= np.uint32(16)
    else:
        hashed = (mix(hashed).astype(np.uint64) * np.uint64(size) >> np.uint64(32)).astype(np.uint32)
    hashed += values
    # What is not too large becomes so, since there is nothing below 0.
    np.minimum(hashed, hashed - np.uint32(size), out=values)
