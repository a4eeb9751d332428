"""Vectors in another dtype, with a count of what it cannot hold: numpy itself casts 70,000 to an infinite float16."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.errors import ArgumentError, CastError
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.casting import cast_into, integer_limits, outside

_BLOCK_ITEMS = 2**18
"""Values are looked at in blocks that stay in the processor's cache from one look to the next."""


class Casting(NamedTuple):
    """How vectors become what is stored."""

    dtype: np.dtype[Any]
    """The dtype to be stored, in native byte order."""
    scale: float | None = None
    """For integers of floating-point vectors: what a step of one stands for."""


class Vectors(NamedTuple):
    """Vectors, and how they are cast when they are written, a block at a time."""

    array: Array
    """As they are."""
    casting: Casting
    """How they are stored."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As which they are stored."""
        return self.casting.dtype

    @property
    def dimension(self) -> int:
        """Items of a vector."""
        return int(self.array.shape[1])

    def stored(self, start: int, stop: int) -> Array:
        """Return some rows as they are stored, in C order; :func:`check_casting` tells whether they can be."""
        return _cast(self.array[start:stop], self.casting)


def plan_casting(stored: np.dtype[Any], dtype: np.dtype[Any] | None, scale: float | None) -> Casting:
    """Decide how to cast, before any value is seen.

    Raises
    ------
    ArgumentError
        If values of the one dtype cannot become values of the other, or ``scale`` makes no sense.
    """
    wanted = (stored if dtype is None else dtype).newbyteorder("=")
    if scale is not None:
        if not (np.isfinite(scale) and scale > 0):
            raise ArgumentError(f"scale={scale} must be a positive number: what a step of one stands for")
        if wanted.kind not in "iu" or stored.kind != "f":
            remedy = 'leave it out, or ask for dtype="int8"' if stored.kind == "f" else "leave it out"
            raise ArgumentError(
                f"scale={scale} is only for floating-point vectors that are stored as integers, not for {stored} as "
                f"{wanted}; {remedy}"
            )
    elif not np.can_cast(stored, wanted, "same_kind") and stored.kind not in "iu":
        can_scale = wanted.kind in "iu" and stored.kind == "f"
        remedy = "give scale=, the value that a step of one stands for" if can_scale else "choose another"
        raise ArgumentError(f"dtype={wanted} cannot hold vectors of {stored}; {remedy}")
    return Casting(wanted, scale)


def check_casting(vectors: Vectors, first_row: int = 0) -> int:
    """Return how many of the values are NaN or infinite, and are kept as such.

    They are counted only where the dtype is narrowed; else nothing happens to them.

    Raises
    ------
    CastError
        If finite values become infinite, or values lie outside the range of an integer dtype. The message counts them.
    """
    array, casting = vectors
    dtype, scale = casting
    if scale is None and np.can_cast(array.dtype, dtype, "safe"):
        return 0
    step = max(1, _BLOCK_ITEMS // max(1, array.shape[1]))
    bad, first_bad, not_finite = 0, 0, 0
    for start in range(0, len(array), step):
        values = array[start : start + step]
        if _holds_all(values, casting):
            continue
        lost, count = _look(values, casting)
        not_finite += count
        if lost.any():
            first_bad = first_bad if bad else start + int(np.argmax(lost.any(axis=1)))
            bad += int(np.count_nonzero(lost))
    if bad:
        largest = np.abs(array[first_bad].astype(np.result_type(array.dtype, np.float64))).max()
        raise CastError(
            f"{bad:,} of {array.size:,} values cannot be stored as {dtype}{_scaled(scale)}, which holds "
            f"{_limits(dtype, scale)}; the first is in row {first_row + first_bad:,} (largest magnitude there: "
            f"{largest:g}); choose a wider dtype or scale the vectors"
        )
    return not_finite


def _cast(array: Array, casting: Casting) -> Array:
    dtype, scale = casting
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        cast_into(out, array if scale is None else _steps(array, scale))
    return out


def _holds_all(values: Array, casting: Casting) -> bool:
    """Tell whether the least and the greatest of the values can be stored: then so can all others."""
    if values.dtype.kind == "c":
        return False
    extremes = np.array([[values.min(), values.max()]])  # NaN is both, where there is one
    lost, not_finite = _look(extremes, casting)
    return not not_finite and not lost.any()


def _look(values: Array, casting: Casting) -> tuple[Array, int]:
    """Return which values are outside of what can be stored, and how many are NaN or infinite and can be."""
    dtype, scale = casting
    if dtype.kind in "fc":
        lost = ~np.isfinite(_cast(values, casting))
        return lost & np.isfinite(values), int(np.count_nonzero(lost))
    with np.errstate(over="ignore"):
        steps = values if scale is None else _steps(values, scale)
    return outside(steps, dtype), 0  # compared as stored values


def _steps(values: Array, scale: float) -> npt.NDArray[np.float64]:
    steps = np.divide(values, scale, dtype=np.float64)
    return np.rint(steps, out=steps)


def _scaled(scale: float | None) -> str:
    return "" if scale is None else f" with scale={scale:g}"


def _limits(dtype: np.dtype[Any], scale: float | None) -> str:
    if dtype.kind in "fc":
        return f"{float(np.finfo(dtype).min):g} to {float(np.finfo(dtype).max):g}"
    least, greatest = (limit * (1.0 if scale is None else scale) for limit in integer_limits(dtype))
    return f"{least:g} to {greatest:g}, and neither NaN nor infinity"
