"""Which rows satisfy a condition on their metadata: only the columns of the condition are read, now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dask_embedding_reader._common.threads import threads_at_once
from dask_embedding_reader.collection.comparisons import (
    OPERATORS,
    SET_OPERATORS,
    exact_value,
    make_comparison,
)
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, ColumnError, MismatchError
from dask_embedding_reader.formats.base import Columns, FileFormat, FileHeader, MetaColumn
from dask_embedding_reader.formats.columns import iter_columns, may_match, step_rows
from dask_embedding_reader.formats.metadata import ROW_NUMBER, MetaField, make_frame, merge_columns
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.partitions import settled
from dask_embedding_reader.formats.picking import open_table_picker
from dask_embedding_reader.formats.registry import BESIDE
from dask_embedding_reader.rows.picked import pick, pick_all
from dask_embedding_reader.rows.selection import Int64s, Rows

Mask = npt.NDArray[np.bool_]
Condition = tuple[str, str, Any]


class _Filter(NamedTuple):
    """A condition, checked."""

    columns: tuple[str, ...]
    """What it looks at."""
    mask: Callable[[pa.Table, str], Mask]
    """Tells which rows of a table of a file satisfy it."""
    expression: Any
    """The same as pyarrow writes it, for the statistics of row groups; None where nothing can be told from them."""
    floats: frozenset[str] = frozenset()
    """Columns that it compares with floats."""


def select(manifest: Manifest, rows: Rows, filters: Any, columns: Any) -> Rows:
    """Return which of the rows satisfy a condition, in their order."""
    files = _files(manifest)
    checked = _checked(manifest, files, filters, columns)
    if rows.is_ascending:
        return pick_all(_matching(files, rows, checked))
    distinct = pick(np.unique(np.asarray(rows)))
    found = np.asarray(pick_all(_matching(files, distinct, checked)))
    numbers = np.asarray(rows)
    return pick(numbers[np.isin(numbers, found)])


def check_mask(given: Any, rows: Rows) -> Any:
    """Return a mask of pandas as an array, its nulls as false, and whatever else is given as it is.

    Raises
    ------
    MismatchError
        If its index holds other row numbers than those of the reader, or numbers that do not ascend and are each
        there once: it is not of these rows, or not in their order.
    """
    if not isinstance(given, pd.Series) or not pd.api.types.is_bool_dtype(given.dtype):
        return given
    if len(given) != len(rows):  # told as for any other mask
        return _values(given)
    index = given.index
    if index.name == ROW_NUMBER:
        start = 0
        for part in rows.parts():
            found = index[start : start + len(part)].to_numpy()
            if len(differ := np.flatnonzero(found != part)):
                place = int(differ[0])
                raise MismatchError(
                    f"the mask is of row {found[place]} ({ROW_NUMBER!r} in its index) at position {start + place:,}, "
                    f"where the reader has row {part[place]}; {_MASK_REMEDY}"
                )
            start += len(part)
    elif index.dtype.kind in "iu" and index.is_unique and not index.is_monotonic_increasing:
        raise MismatchError(
            f"the index of the mask does not ascend (it begins with {', '.join(map(str, index[:4]))}), as if it had "
            f"been sorted by something else; {_MASK_REMEDY}"
        )
    return _values(given)


def _values(mask: Any) -> Mask:
    """Return a mask as an array; pandas has types that hold nulls, which are as false here as where it picks rows."""
    nullable = isinstance(mask, pd.Series) and str(mask.dtype) in ("boolean", "bool[pyarrow]")
    return mask.to_numpy(bool, na_value=False) if nullable else np.asarray(mask)


_MASK_REMEDY = (
    "a mask picks by position: bring it into the order of the reader, as mask.sort_index() does for one that reads its "
    "collection in order, or pass mask.to_numpy() if it is"
)


def _files(manifest: Manifest) -> FileTable:
    """Return the files whose columns can be asked for."""
    if manifest.metadata_files is not None:
        return manifest.metadata_files
    remedy = (
        "open it with meta_columns=[...], so that its metadata files are known"
        if manifest.format.metadata == "beside"
        else f'metadata in parquet files beside them are read with file_format="{BESIDE}{manifest.format.name}", those '
        "elsewhere with metadata_folder=..."
    )
    raise ArgumentError(f"the {manifest.format.name} files of this reader have no columns to filter by; {remedy}")


# ---------------------------------------------------------------------------------------------------------------------
# Conditions


def _checked(manifest: Manifest, files: FileTable, filters: Any, columns: Any) -> _Filter:
    if callable(filters):
        names = _names(columns)
        _check_names(manifest, files, names)
        return _Filter(names, _called(filters, _fields(manifest, files, names)), None)
    if columns is not None:
        raise ArgumentError("columns= names what a function looks at; conditions name their columns themselves")
    alternatives = _alternatives(filters)
    names = tuple(dict.fromkeys(name for conditions in alternatives for name, _, _ in conditions))
    _check_names(manifest, files, names)

    comparisons = [[make_comparison(*one) for one in conditions] for conditions in alternatives]

    def mask(table: pa.Table, url: str) -> Mask:
        del url
        masks = (reduce(pc.and_kleene, (compare(table) for compare in all_of)) for all_of in comparisons)
        return _true(reduce(pc.or_kleene, masks))

    # What cannot be compared is refused now, though no row may ever be looked at.
    first = files.header(int(np.flatnonzero(files.rows)[0]))
    mask(pa.Table.from_batches([next(iter_columns(first, names, 0, 1)).slice(0, 0)]), "")
    return _Filter(names, mask, _expression(alternatives), _floats(alternatives))


def _expression(alternatives: Sequence[Sequence[Condition]]) -> Any:
    """Return conditions as pyarrow writes them, without those that statistics mislead about."""
    told = [[one for one in conditions if _is_told(*one)] for conditions in alternatives]
    if not all(told):
        return None
    try:
        return pq.filters_to_expression(told)
    except Exception:  # noqa: BLE001 - it is only a help
        return None


def _is_told(name: str, operator: str, value: Any) -> bool:
    """Tell whether statistics, which know of no NaN and of one zero, know all values that satisfy a condition."""
    del name
    if operator in ("!=", "not in"):  # NaN is unlike any number
        values = value if operator == "not in" else [value]
        return all(isinstance(one, str) for one in values)
    return operator != "in" or all(one < 0 or one > 0 for one in value if isinstance(one, int | float))


def _floats(alternatives: Sequence[Sequence[Condition]]) -> frozenset[str]:
    """Return which columns are compared with floats."""
    every = [one for conditions in alternatives for one in conditions]
    return frozenset(
        name
        for name, _, value in every
        if any(isinstance(one, float) for one in (value if isinstance(value, list) else [value]))
    )


def _names(columns: Any) -> tuple[str, ...]:
    names = (columns,) if isinstance(columns, str) else columns
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            f"a function as filter needs columns=[...], the metadata columns that it looks at, not {columns!r}"
        )
    return tuple(dict.fromkeys(names))


def _check_names(manifest: Manifest, files: FileTable, names: Sequence[str]) -> None:
    if ROW_NUMBER in names:
        raise ColumnError(f"{ROW_NUMBER!r} is the row number, not a column; take(slice(start, stop)) picks rows by it")
    unknown = [name for name in names if name not in manifest.columns.meta]
    if not unknown:
        return
    first = files.header(int(np.flatnonzero(files.rows)[0]))
    _kind(manifest).read_header(first.file, Columns(meta=tuple(unknown)))


def _kind(manifest: Manifest) -> FileFormat:
    return manifest.format.vectors if manifest.format.metadata == "same" else PARQUET


_SETS = (list, tuple, set, frozenset, np.ndarray, pd.Series, pd.Index)


def _alternatives(filters: Any) -> list[list[Condition]]:
    """Return a filter as alternatives, of each of which all conditions hold."""
    expected = (
        'conditions are (column, operator, value), such as [("width", ">=", 512), ("nsfw", "==", "UNLIKELY")], or a '
        "list of such lists, of which one has to hold"
    )
    if isinstance(filters, str | bytes) or not isinstance(filters, Sequence) or not filters:
        raise ArgumentTypeError(f"filters={filters!r}: {expected}, or a function with columns=")
    given = [filters] if all(isinstance(one, tuple) for one in filters) else filters
    found = []
    for conditions in given:
        if not isinstance(conditions, list | tuple) or not conditions:
            raise ArgumentTypeError(f"filters holds {conditions!r}: {expected}")
        for one in conditions:
            if not isinstance(one, tuple | list) or len(one) != 3 or not isinstance(one[0], str):
                raise ArgumentTypeError(f"filters holds {one!r}: {expected}")
            if one[1] not in OPERATORS:
                raise ArgumentError(f"{one!r}: the operator {one[1]!r} is none of {', '.join(OPERATORS)}")
            if one[1] in SET_OPERATORS and not isinstance(one[2], _SETS):
                raise ArgumentTypeError(f"{one!r}: the value of {one[1]!r} must be a list, tuple or set")
        found.append([(name, operator, exact_value(value)) for name, operator, value in conditions])
    return found


def _true(mask: Any) -> Mask:
    """Return where a mask is true: not where it is null."""
    # By way of bytes: bits are unpacked four times as fast.
    return np.asarray(pc.fill_null(mask, False).cast(pa.uint8()), np.uint8).view(np.bool_)


def _called(function: Callable[[pd.DataFrame], Any], fields: Sequence[MetaField]) -> Callable[[pa.Table, str], Mask]:
    """Return what has a function look at the rows of a table."""

    def mask(table: pa.Table, url: str) -> Mask:
        frame = make_frame(fields, table, pd.RangeIndex(table.num_rows), url)
        found = function(frame)
        values = _values(found)
        if values.dtype != bool or values.shape != (len(frame),):
            raise ArgumentTypeError(
                f"the filter returned {type(found).__name__} of shape {values.shape} and dtype {values.dtype}; "
                f"{_expected(len(frame))}"
            )
        if isinstance(found, pd.Series) and not found.index.equals(frame.index):
            raise MismatchError(
                "the filter returned a mask with another index than that of its frame: its rows may be in another "
                "order. Return one in the order of the frame, as mask.sort_index() makes of a sorted frame, or "
                "mask.to_numpy() where it is in order"
            )
        return values

    return mask


def _expected(rows: int) -> str:
    return f"expected is a mask: a boolean for each of the {rows:,} rows of its frame"


def _fields(manifest: Manifest, files: FileTable, names: Sequence[str]) -> list[MetaField]:
    """Return the types of columns in all files; those that the reader was not opened with are looked up in each."""
    known = {field.name: field for field in manifest.fields}
    if set(names) <= known.keys():
        return [known[name] for name in names]
    numbers = np.flatnonzero(files.rows).tolist()

    def columns(number: int) -> tuple[MetaColumn, ...]:
        return _kind(manifest).read_header(files.header(number).file, Columns(meta=tuple(names))).meta

    with threads_at_once(_threads(files)) as pool:
        found = list(pool.map(columns, numbers))
    metas = settled(names, files.partitions, [files.paths[number] for number in numbers], found)
    return merge_columns(names, [files.url(number) for number in numbers], metas)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _threads(files: FileTable) -> int:
    return files.connections


def _matching(files: FileTable, rows: Rows, condition: _Filter) -> Iterator[Int64s]:
    """Yield which rows of an ascending selection satisfy a condition, file after file."""
    cuts = rows.search(files.offsets)
    spans = [(file, a, b) for file, (a, b) in enumerate(pairwise(cuts.tolist())) if a < b]

    def read(span: tuple[int, int, int]) -> Int64s:
        file, start, stop = span
        first_row = int(files.offsets[file])
        first, last = (rows.at(np.array([start, stop - 1])) - first_row).tolist()
        # Of neighbours two numbers are enough: to make the others takes as long as to compare the values.
        is_range = last - first == stop - 1 - start
        here = range(first, last + 1) if is_range else rows.numbers(start, stop) - first_row
        return first_row + _read(files.header(file), here, condition)

    with threads_at_once(_threads(files)) as pool:
        yield from pool.map(read, spans)


def _read(header: FileHeader, rows: range | Int64s, condition: _Filter) -> Int64s:
    """Return which of some rows of a file, that ascend, satisfy a condition. Row groups that hold none are not read."""
    found = [np.empty(0, np.int64)]
    bounds = np.cumsum((0, *(header.group_rows or (header.rows,))))
    cuts = np.clip(bounds - rows.start, 0, len(rows)) if isinstance(rows, range) else np.searchsorted(rows, bounds)
    may = None if condition.expression is None else may_match(header, condition.expression, condition.floats)
    for group, (start, stop) in enumerate(pairwise(cuts.tolist())):
        if start < stop and (may is None or group in may):
            found += _matches(header, rows[start:stop], condition)
    return np.concatenate(found)


def _matches(header: FileHeader, rows: range | Int64s, condition: _Filter) -> Iterator[Int64s]:
    """Yield which of some rows of a row group satisfy a condition."""
    names, first, stop = condition.columns, int(rows[0]), int(rows[-1]) + 1
    step = step_rows(header, names)
    if isinstance(rows, range):
        for batch in iter_columns(header, names, first, stop, step):
            yield first + np.flatnonzero(condition.mask(pa.Table.from_batches([batch]), header.file.url))
            first += batch.num_rows
        return
    decode = open_table_picker(header, names, first, stop)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        yield some[condition.mask(decode(some), header.file.url)]
