"""Half floats become float32 by a way of our own, faster than numpy's: each of them as numpy converts it."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dask_embedding_reader.formats.cast import cast_into

ALL = np.arange(2**16, dtype=np.uint16).view(np.float16)


def assert_cast(values: np.ndarray) -> None:
    """Compare bit by bit: NaNs and the sign of zero count too."""
    out = np.full(values.shape, 7, np.float32)
    cast_into(out, values)
    np.testing.assert_array_equal(out.view(np.uint32), values.astype(np.float32).view(np.uint32))


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Let the processor take denormal numbers for zero, as libraries built with -ffast-math do."""
    libm = ctypes.CDLL(None)
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    before, environment[7] = environment[7], environment[7] | 0x8040
    libm.fesetenv(environment)
    try:
        yield
    finally:
        environment[7] = before
        libm.fesetenv(environment)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(ALL[np.isfinite(ALL)].reshape(-1, 8), id="finite"),
        pytest.param(ALL.reshape(-1, 8), id="infinities and NaNs too"),
        pytest.param(ALL[np.isfinite(ALL)].reshape(8, -1).T, id="column after column"),
        pytest.param(np.tile(ALL, 20).reshape(-1, 16), id="more than a block"),
        pytest.param(ALL[:12].reshape(1, 12), id="one row"),
        pytest.param(ALL[:0].reshape(0, 4), id="no rows"),
        pytest.param(ALL.byteswap().view(ALL.dtype.newbyteorder()).reshape(-1, 8), id="other byte order"),
    ],
)
def test_half_floats_are_converted_as_numpy_does(values: np.ndarray) -> None:
    assert_cast(values)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the flags are those of x86-64, set through glibc"
)
def test_the_smallest_half_floats_survive_in_a_process_that_flushes_denormals() -> None:
    small = ALL[:1024].reshape(-1, 8)
    expected, out = small.astype(np.float32), np.empty(small.shape, np.float32)
    with denormals_flushed():
        flushed = not (np.array([1e-40], np.float32) * np.float32(1e30)).any()
        cast_into(out, small)
    assert flushed, "the processor should have flushed"
    np.testing.assert_array_equal(out, expected)
