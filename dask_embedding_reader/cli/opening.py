"""Opening a collection for a command, and choosing rows of it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import time
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from dask_embedding_reader._common.arguments import likest_first
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.layout import ALL_COLUMNS
from dask_embedding_reader.errors import ArgumentError, ColumnError
from dask_embedding_reader.formats.registry import AUTO
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.storage.retries import describe

_CONDITION = re.compile(
    r"""
    \s* (?: "(?P<quoted>[^"]+)" | (?P<name>[^"].*?) ) \s*
    (?P<operator>
        == | != | <= | >= | < | >
        | (?<=[\s"]) (?:not\s+in|in) (?=[\s\[])
        | (?<=[\s"]) is\s+(?:not\s+)?null (?=\s*$)
    )
    \s* (?P<value>.*?) \s*
    """,
    re.VERBOSE,
)

_ITEM = re.compile(
    r"""\s* (?: "(?P<double>[^"]*)" | '(?P<single>[^']*)' | (?P<bare>[^"',\s][^,]*?)? ) \s* (?:,|$)""", re.VERBOSE
)
"""A value of a list; what stands between quotes is kept as it is, with the blanks at its ends."""

_EXPECTED = (
    "a condition is COLUMN OPERATOR VALUE with ==, !=, <, <=, > or >=, COLUMN in [VALUE, VALUE], COLUMN not in [...], "
    "COLUMN is null or COLUMN is not null; names that hold an operator, and values with commas, go in quotes"
)


_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")


class Condition(NamedTuple):
    """What rows are chosen by."""

    text: str
    """As it was given."""
    column: str
    """The metadata column."""
    operator: str
    """How it is compared, or ``is null`` or ``is not null``."""
    values: tuple[str, ...]
    """With what: one value, of ``in`` any number."""


def open_collection(
    urls: Sequence[str],
    *,
    file_format: str | None = None,
    embedding_column: str | None = None,
    meta_columns: Sequence[str] = (),
    metadata_folders: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    embedding_dtype: str | None = None,
    row_range: str | None = None,
    where: Sequence[str] = (),
    sample: int | None = None,
    seed: int | None = None,
) -> EmbeddingReader:
    """Open a collection as :class:`EmbeddingReader` does, and choose rows.

    First a range, then those of it that all conditions hold for, then a sample of these.

    Raises
    ------
    ArgumentError
        If what rows are chosen by makes no sense, or leaves none.
    """
    conditions = [parse_condition(text) for text in where]
    if seed is not None and sample is None:
        raise ArgumentError(f"--seed {seed} says which rows --sample draws: give --sample too")
    # So that metadata beside other files is looked for.
    added = [] if tuple(meta_columns) == ALL_COLUMNS else [one.column for one in conditions]
    try:
        with warnings.catch_warnings():
            if added:  # where there are no columns, what chooses by them says so
                warnings.filterwarnings("ignore", "meta_columns=")
            reader = EmbeddingReader(
                _source(urls),
                file_format or AUTO,
                embedding_column,
                list(dict.fromkeys([*meta_columns, *added])),
                _source(metadata_folders) if metadata_folders else None,
                storage_options=storage_options,
                embedding_dtype=embedding_dtype,
                show_progress=True,
            )
    except ColumnError as error:
        for one in conditions:
            if one.column not in meta_columns and repr(one.column) in str(error):
                raise ArgumentError(f"--where {one.text!r}: {error}") from error
        raise
    if added:
        known = {field.name for field in reader.manifest.fields}
        reader.manifest = reader.manifest.with_columns([name for name in meta_columns if name in known])
    return _choose(reader, row_range, conditions, sample, seed or 0)


def check_start(reader: EmbeddingReader, start: int) -> None:
    """Refuse to begin where no row is: a reader has an empty range there, of which nothing can be shown."""
    if start >= len(reader):
        raise ArgumentError(f"--start {start:,} is out of range: there are {counted(len(reader), 'row')}, from 0 on")


def _source(urls: Sequence[str]) -> str | list[str]:
    """Return what a reader takes: one folder has no place in a list, which would be told as one."""
    return urls[0] if len(urls) == 1 else list(urls)


def parse_condition(text: str) -> Condition:
    """Take a condition apart.

    Examples
    --------
    >>> parse_condition("width >= 512")[1:]
    ('width', '>=', ('512',))
    >>> parse_condition("kind in [noun.animal, 'a, b']")[1:]
    ('kind', 'in', ('noun.animal', 'a, b'))
    """
    found = _CONDITION.fullmatch(text)
    if not found:
        raise ArgumentError(f"--where {text!r} is no condition: {_EXPECTED}")
    operator, value = " ".join(found["operator"].split()), found["value"]
    if operator.endswith("null"):
        values: tuple[str, ...] = ()
    elif operator.endswith("in"):
        if not (value.startswith("[") and value.endswith("]")):
            raise ArgumentError(f"--where {text!r}: after {operator} a list is expected, such as [{value or 'a, b'}]")
        values = _items(text, value[1:-1])
    elif not value:
        raise ArgumentError(f"--where {text!r} names no value to compare with: {_EXPECTED}")
    else:
        values = (value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value,)
    return Condition(text, found["quoted"] or found["name"], operator, values)


def _items(text: str, listed: str) -> tuple[str, ...]:
    """Take a list of values apart, at commas that are not in quotes. Within a value a quote is a part of it."""
    items, place = list[str](), 0
    while place < len(listed):
        found = _ITEM.match(listed, place)
        if found is None:
            raise ArgumentError(f"--where {text!r}: a quote of the list is not closed: {_EXPECTED}")
        items += [item for item in found.groups() if item is not None]
        place = found.end()
    return tuple(items)


def _choose(
    reader: EmbeddingReader, row_range: str | None, conditions: Sequence[Condition], sample: int | None, seed: int
) -> EmbeddingReader:
    """Return a reader of the rows that are chosen."""
    if row_range is not None:
        reader = _take(reader, row_range)
    for one in conditions:
        found = _filter(reader, one)
        if not len(found):
            raise ArgumentError(f"--where {one.text!r}: none of {counted(len(reader), 'row')} satisfies it")
        reader = found
    if sample is not None:
        if sample > len(reader):
            raise ArgumentError(f"--sample {sample:,} draws no row twice, and there are {counted(len(reader), 'row')}")
        reader = reader.sample(sample, seed=seed)
    return reader


def _take(reader: EmbeddingReader, row_range: str) -> EmbeddingReader:
    """Return a reader of a range of rows, or of those whose numbers a file holds."""
    bounds = re.fullmatch(r"(\d*):(\d*)", row_range)
    if bounds:
        start, stop = (int(text) if text else None for text in bounds.groups())
        found = reader.take(slice(start, stop))
        if not len(found):
            raise ArgumentError(f"--rows {row_range} is no row: there are those from 0 to {len(reader) - 1:,}")
        return found
    if not row_range.endswith(".npy"):
        raise ArgumentError(
            f"--rows {row_range!r}: expected are START:STOP, such as 10:20, or an .npy file of row numbers"
        )
    rows = load_npy(row_range, "--rows")
    try:
        found = reader.take(rows)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"--rows {row_range}: {describe(error)}") from error
    if not len(found):
        raise ArgumentError(f"--rows {row_range} holds no row number")
    return found


def load_npy(path: str, option: str) -> npt.NDArray[Any]:
    """Read the npy file that an option names.

    Raises
    ------
    ArgumentError
        If it is none. Of any other file numpy says that it holds pickled data.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(6)
        if begin.startswith(b"PK"):
            raise ArgumentError(f"{option} {path}: an npz archive; save one of its arrays as an npy file")
        if begin != b"\x93NUMPY":
            raise ArgumentError(f"{option} {path}: not an npy file, as it begins with {begin!r}; numpy.save writes one")
        loaded: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except ArgumentError:
        raise
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{option} {path}: {describe(error)}") from error
    return loaded


def _filter(reader: EmbeddingReader, condition: Condition) -> EmbeddingReader:
    """Return a reader of the rows that a condition holds for."""
    text, column, operator, values = condition
    types = reader.columns
    if types and column not in types:
        there = ", ".join(map(repr, likest_first(column, types)))
        raise ArgumentError(f"--where {text!r}: there is no column {column!r}; the columns are {there}")
    try:
        if operator == "is null":
            return reader.filter(lambda frame: frame[column].isna(), columns=column)
        if operator == "is not null":
            return reader.filter(lambda frame: frame[column].notna(), columns=column)
        parsed = [_parse(value, types[column]) if types else value for value in values]
        return reader.filter([(column, operator, parsed if operator.endswith("in") else parsed[0])])
    except ArgumentError as error:
        raise ArgumentError(f"--where {text!r}: {error}") from error


def _parse(text: str, kind: pa.DataType) -> Any:
    """Read a value as a column of this type would hold it; of one of integers or decimals also other numbers."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind):
        return text
    if pa.types.is_integer(kind) and re.fullmatch(r"[+-]?\d+", text):
        return int(text)  # as it is: a column of int8 is compared with 300, too
    if pa.types.is_decimal(kind) and _DECIMAL.fullmatch(text):
        return Decimal(text)
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        return _parse_time(text, kind)
    is_exact = pa.types.is_integer(kind) or pa.types.is_decimal(kind)  # infinity is left, and NaN
    try:
        value = pa.scalar(text).cast(pa.float64() if is_exact else kind).as_py()
        # Beyond what the column can hold is not infinite: `f <= 1e39` is not true of infinity.
        return float(text) if pa.types.is_floating(kind) and math.isinf(value) else value
    except pa.ArrowException as error:
        raise ArgumentError(f"the column is {kind}, and {text!r} cannot be read as that ({describe(error)})") from error


def _parse_time(text: str, kind: pa.DataType) -> time | pd.Timedelta:
    """Read a time of day or a duration, which Arrow does not read from text."""
    is_time = pa.types.is_time(kind)
    with suppress(ValueError):
        if is_time:
            return time.fromisoformat(text)
        if text.strip("+-.0123456789"):  # not 5: five of what?
            return pd.Timedelta(text)
    example = "03:30 or 03:30:59" if is_time else "90s, 3h or '2 days 03:30:00'"
    raise ArgumentError(f"the column is {kind}, and {text!r} is none; write it like {example}")
