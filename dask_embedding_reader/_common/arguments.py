"""Arguments of public functions, checked before anything is done with them.

Each check names the argument, what was given and what was expected, in an error of :mod:`dask_embedding_reader.errors`.
"""

from __future__ import annotations

import difflib
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, RowError

Source = str | os.PathLike[str]
"""A path or a URL."""


def check_integer(name: str, value: Any) -> int:
    """Return a whole number, however it is written: an int, one of numpy's, or 1e6."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)  # 1e6 is how people write a million
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be a whole number, not {value!r}") from None


def check_positive(name: str, value: Any) -> int:
    """Return a whole number of at least 1."""
    number = check_integer(name, value)
    if number < 1:
        raise ArgumentError(f"{name} must be at least 1, not {number}")
    return number


_SIZE = re.compile(r"\s*([0-9]+(?:[.][0-9]*)?|[.][0-9]+)\s*([kmgtp]?)(i?)b\s*", re.IGNORECASE)


def check_nbytes(name: str, value: Any) -> int:
    """Return a number of bytes of at least 1, given as such or as text: ``"128MiB"``, ``"1.5 GB"``."""
    if not isinstance(value, str):
        return check_positive(name, value)
    found = _SIZE.fullmatch(value)
    if found is None:
        raise ArgumentTypeError(f'{name} must be a whole number, or a size such as "128MiB", not {value!r}')
    base = 1024 if found[3] else 1000
    return check_positive(name, int(float(found[1]) * base ** " kmgtp".index(found[2].lower() or " ")))


ALL_ROWS = 2**62


def check_piece_rows(name: str, value: Any, row_nbytes: int) -> int | None:
    """Return the most rows in a piece; None where it is for the library to choose.

    They are given as such or, as text, as bytes; ``"auto"`` is None, and ``chunks=-1`` all rows of a
    file, as Dask has it. What no integer of numpy can hold means as much as the most that one can.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    if name == "chunks" and type(value) is int and value == -1:
        return ALL_ROWS
    text = isinstance(value, str)
    rows = max(1, check_nbytes(name, value) // max(1, row_nbytes)) if text else check_positive(name, value)
    return min(rows, ALL_ROWS - 1)


def check_share(name: str, value: Any) -> float:
    """Return a number from 0 to 1."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ArgumentTypeError(f"{name} must be a number from 0 to 1, not {value!r}")
    if not 0 <= value <= 1:
        raise ArgumentError(f"{name} must be from 0 to 1, not {value!r}")
    return float(value)


def check_slice(name: str, value: slice) -> slice:
    """Return a slice of whole numbers."""
    parts = [None if part is None else check_integer(name, part) for part in (value.start, value.stop, value.step)]
    if parts[2] == 0:
        raise ArgumentError(f"{name}={value} has a step of 0")
    return slice(*parts)


def check_range(name: str, value: range, count: int) -> slice:
    """Return the slice that picks the same of ``count`` rows: unlike a list of them it takes no memory."""
    if not value:
        return slice(0)
    if min(value[0], value[-1]) < 0 or max(value[0], value[-1]) >= count:
        there = f"rows from 0 to {count - 1:,} only" if count else "no rows"
        raise RowError(f"{name} is {value}, but there are {there}")
    return slice(value.start, None if value.stop < 0 else value.stop, value.step)


def check_rows(name: str, value: Any, count: int) -> npt.NDArray[np.int64]:
    """Return positions among ``count`` rows, given as such or as a mask."""
    given = np.asarray(value)
    if given.ndim != 1 or (given.dtype.kind not in "iub" and given.size):
        what = f"{type(value).__name__} of shape {given.shape} and dtype {given.dtype}"
        raise ArgumentTypeError(f"{name} must be a slice, a list of row numbers or a mask of booleans, not {what}")
    if given.dtype.kind == "b":
        if len(given) != count:
            raise ArgumentError(f"{name} is a mask of {len(given):,} booleans where there are {count:,} rows")
        return np.flatnonzero(given)
    wrong = np.flatnonzero((given < 0) | (given >= count))
    if len(wrong):
        more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        hint = "; searches give -1 for hits that they did not find: leave those out" if given[wrong[0]] < 0 else ""
        raise RowError(
            f"{name} holds {int(given[wrong[0]]):,} at position {int(wrong[0]):,}{more}, but there are rows from 0 to "
            f"{count - 1:,} only{hint}"
            if count
            else f"{name} holds {int(given[wrong[0]]):,}, but there are no rows"
        )
    return given.astype(np.int64)


def check_text(name: str, value: Any) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be a string, not {value!r}")
    _check_whole(name, value)
    return value


_MOST_NAME_NBYTES = 2**15  # archives hold 65,535


def check_column_name(name: str, value: Any) -> str:
    """Return the name of a column, an array or a tensor that is written."""
    text = check_text(name, value)
    if not text or "\0" in text or len(text.encode()) > _MOST_NAME_NBYTES:
        raise ArgumentError(
            f"{name}={text[:100]!r} cannot be the name of a column; give one of 1 to {_MOST_NAME_NBYTES:,} bytes, none "
            "of them zero"
        )
    return text


def _check_whole(name: str, text: str) -> None:
    """Refuse halves of characters, such as JSON may bring: no file holds such a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{name}={text!r} holds half a character (a lone surrogate), which no file can") from None


def check_sources(name: str, value: Any) -> list[Source]:
    """Return a list of paths and URLs."""
    given = [value] if isinstance(value, str | os.PathLike) else value
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"{name} must be a path, a URL or a list of them, not {value!r}")
    if isinstance(given, set | frozenset):  # another order in each process, and other rows with the same numbers
        raise ArgumentTypeError(f"{name} is a set, which has no order, but rows are numbered in it: use sorted({name})")
    given = list(given)
    for source in given:
        if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
            raise ArgumentTypeError(f"{name} holds {source!r}; a path must be a string or an os.PathLike of one")
        if not os.fspath(source).strip():
            raise ArgumentError(f"{name} holds an empty path; for the current folder write '.'")
    if not given:
        raise ArgumentError(f"{name} is an empty list; name at least one file or folder")
    return given


def check_columns(names: Any, argument: str = "meta_columns") -> tuple[str, ...]:
    """Return the names of metadata columns."""
    if names is None:
        return ()
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise ArgumentTypeError(f"{argument} must be a column name or a list of them, not {names!r}")
    if len(set(given)) < len(given):
        raise ArgumentError(f"{argument}={list(given)} names a column twice")
    for column in given:
        _check_whole(argument, column)
    return tuple(given)


def check_vector_column(named: Any) -> str | tuple[str, ...]:
    """Return the name of the column of vectors, or those of the columns of their items."""
    if isinstance(named, str):
        return check_text("embedding_column", named)
    names = check_columns(named, "embedding_column")
    if not names:
        raise ArgumentError("embedding_column=[] names no column")
    return names


def likest_first(name: str, names: Iterable[str]) -> list[str]:
    """Sort names, and leave out what is there twice, by how much they are like another one."""

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other[:100].lower()).ratio()

    return sorted(dict.fromkeys(names), key=lambda other: -likeness(other))


def check_options(name: str, options: Any) -> Mapping[str, Any] | None:
    """Return the options of a file system."""
    if options is not None and not isinstance(options, Mapping):
        # Never its value: it may hold secrets.
        raise ArgumentTypeError(f"{name} must be a dictionary, not {type(options).__name__}")
    return options


def check_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """Return a numeric dtype."""
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except (TypeError, ValueError) as error:  # of "5:2", and of text that is no UTF-8, numpy raises the latter
        raise ArgumentTypeError(f"{name}={dtype!r} is no dtype that numpy knows") from error
    if not is_numeric(found):
        raise ArgumentError(f"{name}={found} is none of numpy's own numeric dtypes")
    return found


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Tell whether a dtype is one of numpy's own numbers. Others (ml_dtypes) are counted from 256 on."""
    return dtype.kind in "biufc" and dtype.num < 256
