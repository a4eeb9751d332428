"""Half floats become float32, and the other way round, faster than with numpy: each of them as numpy converts it."""

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


# Whatever is rounded off: nothing, a little, just under and over a half, a half, all but a little.
REST = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32)
NARROWED = ((np.arange(2**19, dtype=np.uint32) << 13)[:, np.newaxis] | REST).view(np.float32)
"""Every sign, exponent and fraction that half floats keep, with each rest: all that can make a difference."""


def assert_narrowed(values: np.ndarray) -> None:
    out = np.full(values.shape, 7, np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        cast_into(out, values)
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(NARROWED, id="all"),
        pytest.param(np.where(np.arange(2**16) % 60, np.float32(0.3), NARROWED.reshape(-1, 2**16)), id="few odd ones"),
        pytest.param(NARROWED.reshape(8, -1).T, id="column after column"),
        pytest.param(NARROWED[::7, 1:4], id="parts of rows"),
        pytest.param(np.random.default_rng(0).standard_normal((5_000, 64), np.float32) / 8, id="unit vectors"),
        pytest.param(NARROWED.reshape(1, -1)[:, 2**20 : 2**21], id="one row, longer than a block"),
        pytest.param(NARROWED[:0], id="no rows"),
        pytest.param(NARROWED.byteswap().view(NARROWED.dtype.newbyteorder()), id="other byte order"),
    ],
)
def test_half_floats_are_made_as_numpy_makes_them(values: np.ndarray) -> None:
    assert_narrowed(values)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_float32_becomes_the_half_float_that_numpy_makes_of_it() -> None:
    bits = np.arange(2**24, dtype=np.uint32).reshape(-1, 512)
    for high in range(2**8):
        assert_narrowed((bits | np.uint32(high << 24)).view(np.float32))


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
