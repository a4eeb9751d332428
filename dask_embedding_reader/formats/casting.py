"""Copying vectors into an array of another dtype."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.threads import is_first_time
from dask_embedding_reader.errors import CastError

_INFINITE = 0x7C00
"""The exponent bits of a half float; all set mark infinities and NaNs."""

_SIGN_AND_REST = np.int32(-0x70002000)
"""What is left of a half float that was widened to 32 bits and shifted by 13: the sign, and exponent with fraction."""

_SIGN = np.uint32(0x8000)
"""The sign of a half float."""

_SMALLEST_NORMAL, _TOO_LARGE = np.uint32(0x38800000 << 1), np.uint32(0x477FF000 << 1)
"""The smallest normal half float, and the least that becomes infinite: as float32, bit by bit, without the sign."""

_UNDER_HALF = np.uint32((1 << 13) - 1)
"""Just under a half of the last bit that a half float keeps of those."""

_REBIAS = np.float32(2.0**112)
"""Exponents of float32 are counted from 112 further down than those of float16."""

_DENORMAL = np.array([2.0**-136], np.float32)


def cast_into(out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """Copy the rows of an array into one of another dtype."""
    found = _CONVERSIONS.get((values.dtype.str[1:], out.dtype.str[1:]))
    if found is None or not (values.dtype.isnative and out.dtype.isnative and values.size):
        np.copyto(out, values, casting="unsafe")
        return
    convert, items = found
    rows = max(1, items // values.shape[1])
    for start in range(0, len(values), rows):
        convert(out[start : start + rows], values[start : start + rows])


def integer_limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the least and the greatest integer that a dtype of integers, or of booleans, holds."""
    if dtype.kind == "b":
        return 0, 1
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def outside(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[np.bool_]:
    """Tell which values an integer dtype cannot hold; NaN, which compares false, is one of them."""
    least, greatest = integer_limits(dtype)
    if values.dtype.kind == "f":  # no float is the greatest integer of 64 bits: comparing makes it the next one
        return ~((values >= float(least)) & (values < float(greatest + 1)))
    return ~((values >= least) & (values <= greatest))


class CheckedCast:
    """Copies vectors of a file into arrays of another dtype, and reports what that cannot hold.

    It costs nothing but the least and the greatest integer of what stays in the processor's cache: where a float
    becomes infinite, the processor itself remembers it.
    """

    def __init__(self, url: str, row: int) -> None:
        self._url, self._first, self._row = url, row, row
        self._size = self._bad = 0
        self._found = ""
        self._overflowed: str = ""

    def into(self, out: npt.NDArray[Any], values: npt.NDArray[Any], rows: npt.NDArray[np.int64] | None = None) -> None:
        """Copy the next rows; ``rows`` tells which these are, where they do not follow each other."""
        if values.dtype.kind in "iu" and out.dtype.kind in "iu" and not np.can_cast(values.dtype, out.dtype, "safe"):
            self._count(values, out.dtype, rows)
        with np.errstate(over="call", invalid="ignore", call=lambda *_: self._note(values.dtype, out.dtype)):
            cast_into(out, values)
        self._row = self._row + len(values) if rows is None or not len(rows) else int(rows[-1]) + 1
        self._size += values.size

    def report(self) -> None:
        """Tell of what has been lost so far.

        Raises
        ------
        CastError
            If an integer dtype cannot hold some of the values.

        Warns
        -----
        UserWarning
            If finite values became infinite; once a pass for each file.
        """
        if self._bad:
            raise CastError(
                f"{self._url}, rows {self._first:,} to {self._row:,}: {self._bad:,} of {self._size:,} values "
                f"{self._found}; read with a wider dtype, or with dtype=None as they are stored"
            )
        if self._overflowed and is_first_time((self._url, self._overflowed)):
            warnings.warn(f"{self._url}: {self._overflowed}", stacklevel=2)

    def _count(self, values: npt.NDArray[Any], dtype: np.dtype[Any], rows: npt.NDArray[np.int64] | None) -> None:
        least, greatest = integer_limits(dtype)
        if not values.size or (int(values.min()) >= least and int(values.max()) <= greatest):
            return
        bad = outside(values, dtype)
        if not self._bad:
            place, item = np.unravel_index(int(np.argmax(bad)), bad.shape)
            row = self._row + int(place) if rows is None else int(rows[place])
            self._found = (
                f"cannot be read as {dtype}, which holds {least:,} to {greatest:,}; the first is "
                f"{int(values[place, item]):,} in row {row:,}"
            )
        self._bad += int(np.count_nonzero(bad))

    def _note(self, stored: np.dtype[Any], dtype: np.dtype[Any]) -> None:
        self._overflowed = (
            f"some of its {stored.newbyteorder('=')} values are too large for {dtype} and became infinite; read with a "
            "wider dtype, or with dtype=None as they are stored"
        )


def _widen(out: npt.NDArray[np.float32], values: npt.NDArray[np.float16]) -> None:
    """Convert half floats, six times faster than numpy, which converts them one by one without vector instructions.

    Moving the bits to where float32 has them gives the right number but for its exponent, which one multiplication
    puts right, exactly. Infinities and NaNs would become finite, and a process that flushes denormals to zero (some
    libraries switch it on) would lose the smallest half floats: both take the slower way over a table.
    """
    bits = values.view(np.int16)
    if np.bitwise_and(bits, _INFINITE).max() == _INFINITE or not (_DENORMAL * _REBIAS).all():
        np.take(_float16_values(), values.view(np.uint16), out=out, mode="wrap")
        return
    wide = out.view(np.int32)
    wide[...] = bits
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, _SIGN_AND_REST, out=wide)
    np.multiply(out, _REBIAS, out=out)


def _narrow(out: npt.NDArray[np.float16], values: npt.NDArray[np.float32]) -> None:
    """Convert to half floats, in little more than half of the time that numpy takes, for the same reason.

    How far the bits of a number are above those of the smallest normal half float is the same in both dtypes, but that
    float32 has 13 more bits of the fraction. They are rounded off: to the nearest, or if two are, to the even one. What
    is no normal half float (one of a thousand items of unit vectors) is left to numpy; all is, where many are not.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = np.left_shift(bits, 1)
    np.subtract(half, _SMALLEST_NORMAL - _UNDER_HALF, out=half)  # what is smaller wraps around, to the largest
    others = np.flatnonzero(half >= _TOO_LARGE - _SMALLEST_NORMAL + _UNDER_HALF)
    if len(others) > values.size // 64:  # zeros, mostly; to pick out more of them takes longer than numpy for all
        np.copyto(out, values, casting="unsafe")
        return
    last = np.right_shift(bits, 13)
    np.bitwise_and(last, 1, out=last)
    np.add(half, last, out=half)
    np.right_shift(half, 14, out=half)
    sign = np.right_shift(bits, 16, out=last)
    np.bitwise_and(sign, _SIGN, out=sign)
    np.add(half, sign, out=half)
    np.add(half, 1 << 10, out=out.view(np.uint16), casting="unsafe")
    if len(others):
        places = np.unravel_index(others, values.shape)
        out[places] = values[places]


_CONVERSIONS: dict[tuple[str, str], tuple[Callable[[Any, Any], None], int]] = {
    ("f2", "f4"): (_widen, 2**18),
    ("f4", "f2"): (_narrow, 2**16),
}
"""What numpy converts item by item, from one dtype to the other; and how many of these stay in the processor's cache,
and in memory that is used again, from one step to the next."""


@cache
def _float16_values() -> npt.NDArray[np.float32]:
    """Return every half float there is, as float32, at the position that its bits are."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
