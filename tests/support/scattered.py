"""Runs of bytes that are read with one call of the system, seen by whoever watches ``os.preadv``."""

from __future__ import annotations

import ctypes
import os

import pytest


def watch_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have such a call made by ``os.preadv``, which does the same with an object for each place."""
    monkeypatch.setattr("dask_embedding_reader.storage.scatter._preadv", lambda: _preadv)


def _preadv(descriptor: int, entries: int, count: int, start: int) -> int:
    pairs = (ctypes.c_size_t * (2 * count)).from_address(entries)
    buffers = [
        memoryview((ctypes.c_char * nbytes).from_address(place)).cast("B")
        for place, nbytes in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    try:
        return os.preadv(descriptor, buffers, start)
    except OSError:
        return -1
