"""Columns whose values the folders of a file tell, as Hive and Spark name these: ``lang=en/part-0.parquet``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from urllib.parse import unquote

import pyarrow as pa

from dask_embedding_reader.formats.base import FileHeader, MetaColumn
from dask_embedding_reader.storage.names import meant_path

_NULL = "__HIVE_DEFAULT_PARTITION__"

TOLD_BY_FOLDERS = MetaColumn(pa.dictionary(pa.int8(), pa.null()), True)
"""Stands for such a column until all files are known, which tell its type together: no file has a column like it."""

_TYPES = {"int32": pa.int32(), "string": pa.string()}


def partition_values(path: str) -> dict[str, str | None]:
    """Return what the folders of a path tell; None for null.

    Examples
    --------
    >>> partition_values("data/lang=en%20gb/day=__HIVE_DEFAULT_PARTITION__/x=y.parquet")
    {'lang': 'en gb', 'day': None}
    """
    if "=" not in (path := meant_path(path)):
        return {}
    parts = (part.partition("=") for part in path.split("/")[:-1])
    return {_decoded(key): None if value == _NULL else _decoded(value) for key, told, value in parts if told and key}


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text


def partition_types(paths: Iterable[str]) -> dict[str, str]:
    """Return the types of the columns that the folders of files tell: as ``pyarrow.dataset``, int32 if all can be."""
    values: dict[str, set[str | None]] = {}
    for path in paths:
        for key, value in partition_values(path).items():
            values.setdefault(key, set()).add(value)
    return {
        key: "int32" if found - {None} and all(map(_is_int32, found - {None})) else "string"
        for key, found in values.items()
    }


def shared_partitions(paths: Sequence[str]) -> dict[str, pa.DataType]:
    """Return the columns that the folders of every file tell."""
    keys = set.intersection(*(set(partition_values(path)) for path in paths)) if paths else set()
    return {key: _TYPES[name] for key, name in partition_types(paths).items() if key in keys}


def _is_int32(text: str | None) -> bool:
    return text is not None and re.fullmatch("-?[0-9]{1,10}", text) is not None and -(2**31) <= int(text) < 2**31


def settled(
    names: Sequence[str], types: Sequence[tuple[str, str]], paths: Sequence[str], files: Sequence[Sequence[MetaColumn]]
) -> list[Sequence[MetaColumn]]:
    """Put what is known of columns when all files are in the place of ``TOLD_BY_FOLDERS``."""
    known = dict(types)
    return [
        [
            MetaColumn(_TYPES[known[name]], partition_values(path)[name] is None)
            if column == TOLD_BY_FOLDERS
            else column
            for name, column in zip(names, columns, strict=True)
        ]
        if known and columns
        else columns
        for path, columns in zip(paths, files, strict=True)
    ]


def told_by_folders(header: FileHeader, names: Collection[str], stored: Collection[str]) -> dict[str, pa.Scalar]:
    """Return the values of the columns that the folders of a file tell: those that it does not store itself."""
    values = partition_values(header.file.path)
    told = {}
    for name, kind in header.partitions:
        if name in names and name in values and name not in stored:
            value = values[name]
            told[name] = pa.scalar(int(value) if kind == "int32" and value is not None else value, _TYPES[kind])
    return told
