"""Vectors in another dtype, with a count of what it cannot hold: numpy itself casts 70,000 to an infinite float16."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dask_embedding_reader.errors import ArgumentError, CastError
from dask_embedding_reader.formats import Array

_BLOCK_ITEMS = 2**18
"""Values are cast and looked at in blocks that stay in the processor's cache between the two."""


class Casting(NamedTuple):
    """How vectors become what is stored."""

    dtype: np.dtype[Any]
    """The dtype to be stored, in native byte order."""
    scale: float | None = None
    """For integers of floating-point vectors: what a step of one stands for."""


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
            raise ArgumentError(
                f"scale={scale} is only for floating-point vectors that are stored as integers, not for {stored} as "
                f'{wanted}; leave it out, or ask for dtype="int8"'
            )
    elif not np.can_cast(stored, wanted, "same_kind") and stored.kind not in "iu":
        remedy = "give scale=, the value that a step of one stands for" if wanted.kind in "iu" else "choose another"
        raise ArgumentError(f"dtype={wanted} cannot hold vectors of {stored}; {remedy}")
    return Casting(wanted, scale)


def cast(array: Array, casting: Casting, first_row: int = 0) -> tuple[Array, int]:
    """Return vectors in C order and the dtype to be stored, and how many of the values are NaN or infinite.

    They are counted only where the dtype is narrowed; else nothing happens to them.

    Raises
    ------
    CastError
        If finite values become infinite, or values lie outside the range of an integer dtype. The message counts them.
    """
    dtype, scale = casting
    if scale is None and np.can_cast(array.dtype, dtype, "safe"):
        return np.ascontiguousarray(array, dtype), 0
    out = np.empty(array.shape, dtype)
    step = max(1, _BLOCK_ITEMS // max(1, array.shape[1]))
    bad, first_bad, not_finite = 0, 0, 0
    for start in range(0, len(array), step):
        values, block = array[start : start + step], out[start : start + step]
        outside, odd = _cast_block(values, block, scale)
        not_finite += odd
        if outside is not None:
            first_bad = first_bad if bad else start + int(np.argmax(outside.any(axis=1)))
            bad += int(np.count_nonzero(outside))
    if bad:
        largest = np.abs(array[first_bad].astype(np.float64)).max()
        raise CastError(
            f"{bad:,} of {array.size:,} values cannot be stored as {dtype}{_scaled(scale)}, which holds "
            f"{_limits(dtype, scale)}; the first is in row {first_row + first_bad:,} (largest magnitude there: "
            f"{largest:g}); choose a wider dtype or scale the vectors"
        )
    return out, not_finite


def _cast_block(values: Array, out: Array, scale: float | None) -> tuple[Array | None, int]:
    """Cast into ``out``; return where it cannot hold the values (None: nowhere), and how many are not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if out.dtype.kind in "fc":
            out[...] = values
            lost = ~np.isfinite(out)
            odd = int(np.count_nonzero(lost))
            if not odd:
                return None, 0
            outside = lost & np.isfinite(values)
            return (outside if outside.any() else None), odd
        steps = values if scale is None else np.rint(np.divide(values, scale, dtype=np.float64))
        limits = np.iinfo(out.dtype) if out.dtype.kind != "b" else None
        if limits is None:
            out[...] = steps
            return None, 0
        # Compared as stored values: NaN compares false, and is outside too.
        outside = ~((steps >= limits.min) & (steps <= limits.max))
        out[...] = np.where(outside, 0, steps)
        return (outside if outside.any() else None), 0


def _scaled(scale: float | None) -> str:
    return "" if scale is None else f" with scale={scale:g}"


def _limits(dtype: np.dtype[Any], scale: float | None) -> str:
    limits = np.finfo(dtype) if dtype.kind in "fc" else np.iinfo(dtype)
    factor = 1.0 if scale is None else scale
    nan = "" if dtype.kind in "fc" else ", and neither NaN nor infinity"
    return f"{float(limits.min) * factor:g} to {float(limits.max) * factor:g}{nan}"
