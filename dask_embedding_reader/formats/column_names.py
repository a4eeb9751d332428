"""Columns by their names: which are meant, and what to say where there are none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa

from dask_embedding_reader._common.arguments import likest_first
from dask_embedding_reader.errors import ColumnError

MOST_COMPARED = 2_000
"""Of more columns the others are not looked at, where one is not there."""

_MOST_NAMED = 10
"""Of more names the others are counted."""

_MANY_ITEMS = 8
"""So many columns of numbers that are numbered themselves are likely the items of vectors."""


def find_field(schema: pa.Schema, name: str) -> tuple[int, ...] | None:
    """Return the position of a column; where none is called so, those that lead to the field of a struct that is.

    None if there is none, or more than one.

    Examples
    --------
    >>> schema = pa.schema([("a.b", pa.int8()), ("a", pa.struct([("b", pa.int8()), ("c.d", pa.int8())]))])
    >>> find_field(schema, "a.b"), find_field(schema, "a.c.d"), find_field(schema, "d")
    ((0,), (1, 1), None)
    """

    def within(fields: Iterable[pa.Field], rest: str) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for position, field in enumerate(fields):
            if field.name == rest:
                found.append((position,))
            elif rest.startswith(f"{field.name}.") and pa.types.is_struct(field.type):
                found += [(position, *path) for path in within(field.type, rest[len(field.name) + 1 :])]
        return found

    columns = [(position,) for position in schema.get_all_field_indices(name)]
    found = columns or within(schema, name)
    return found[0] if len(found) == 1 else None


def fields_of(schema: pa.Schema, path: Sequence[int]) -> list[pa.Field]:
    """Return a column, the field of the struct in it, and so on, as :func:`find_field` found them."""
    fields = [schema.field(path[0])]
    for position in path[1:]:
        fields.append(fields[-1].type.field(position))
    return fields


def number_columns(url: str, glob: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that a pattern such as ``emb_*`` names, in the order of their numbers.

    Raises
    ------
    ColumnError
        If there is none, or one without a number, or a number is missing or there twice.
    """
    before, _, after = glob.partition("*")
    found = re.compile(f"{re.escape(before)}(.*){re.escape(after)}", re.DOTALL)
    matches = [match for name in names if (match := found.fullmatch(name))]
    where = f"{url}: embedding_column={glob!r}"
    if not matches:
        raise ColumnError(f"{where} names none of its columns: {few(names, len(names))}")
    if odd := [match[0] for match in matches if re.fullmatch("[0-9]+", match[1]) is None]:
        raise ColumnError(
            f"{where} also names {few(odd, len(odd))}, which is no number; list the names (embedding_column=[...])"
        )
    matches.sort(key=lambda match: int(match[1]))
    first = min(1, int(matches[0][1]))
    for number, match in enumerate(matches, first):
        if int(match[1]) != number:
            raise ColumnError(
                f"{where} names {len(matches):,} columns, but {match[0]!r} where number {number:,} was expected; if "
                "that is how it should be, list the names (embedding_column=[...])"
            )
    return tuple(match[0] for match in matches)


def few(names: Sequence[str], count: int = 0) -> str:
    """Write out the first of many names; there may be more of them than these."""
    shown = [repr(name if len(name) <= 60 else f"{name[:59]}…") for name in names[:_MOST_NAMED]]
    more = max(count, len(names)) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def no_column(url: str, names: Sequence[str], name: str) -> ColumnError:
    """Say that a file has no column of a name, or more than one, and which it has: the likest ones first."""
    return ColumnError(f"{url}: {_how_many(names, name)}; its columns are {_nearest(names, name)}")


def no_column_of_vectors(
    url: str, schema: pa.Schema, names: Sequence[str], name: str, likely: Sequence[str]
) -> ColumnError:
    """Say that a file has no column of vectors of a name, and which may be it."""
    found, remedy = f"{url}: {_how_many(names, name)}", name_vectors(schema, likely)
    if likely:
        return ColumnError(f"{found}; {remedy}; its columns are {_nearest(names, name)}")
    types = [f"{field.name[:60]!r} is {str(field.type)[:60]}" for field in list(schema)[:_MOST_NAMED]]
    more = f" and {len(schema) - _MOST_NAMED:,} more" if len(schema) > _MOST_NAMED else ""
    return ColumnError(
        f"{found}; none of its columns holds lists of numbers, equally many in each row: "
        f"{', '.join(types) or 'there are none'}{more}; {remedy}"
    )


def name_vectors(schema: pa.Schema, likely: Sequence[str]) -> str:
    """Say what to give for the column of vectors: one of those that may be it, or those of their items."""
    if likely:
        return f"name the column of vectors (embedding_column=...), such as {few(likely)}"
    remedy = "name the column of vectors (embedding_column=...)"
    if fields := _fields_of_structs(schema):
        remedy += f", a field of a struct as {fields[0]!r}"
    if any(str(field.type).startswith(_BYTES) for field in schema):
        remedy += '; where it is bytes, their dtype, too (embedding_dtype="float32")'
    stem, count = _commonest_stem(schema)
    return remedy + (f"; where each item has its own: embedding_column={stem + '*'!r}" if count >= _MANY_ITEMS else "")


_BYTES = ("binary", "large_binary", "fixed_size_binary")
_LISTS = ("list<", "large_list<", "fixed_size_list<", "list_view<", "large_list_view<")
"""What the names of types begin with; not every pyarrow has a function that tells those of views."""


def _fields_of_structs(schema: pa.Schema) -> list[str]:
    """Return the fields of structs that are lists of floating-point numbers."""
    return [
        f"{field.name}.{inner.name}"
        for field in schema
        if pa.types.is_struct(field.type)
        for inner in field.type
        if str(inner.type).startswith(_LISTS) and pa.types.is_floating(inner.type.value_type)
    ]


def _commonest_stem(schema: pa.Schema) -> tuple[str, int]:
    """Return what most columns of numbers are called that are numbered, and how many these are."""
    names = (field.name for field in schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
    stems = Counter(name.rstrip("0123456789") for name in names if name[-1:].isdecimal())
    return max(stems.items(), key=lambda each: each[1], default=("", 0))


def _how_many(names: Sequence[str], name: str) -> str:
    count = names.count(name)
    return f"has {count} columns named {name!r}" if count else f"has no column {name!r}"


def _nearest(names: Sequence[str], name: str) -> str:
    """Write out names of columns, those like the one that was asked for first."""
    return few(likest_first(name, names[:MOST_COMPARED]), len(set(names))) if names else "none"
