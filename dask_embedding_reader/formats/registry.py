"""The formats there are. Each is imported when it is first used."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Literal, cast

from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.formats.base import FileFormat, Format

_FORMATS = {
    "npy": "npy:NPY",
    "parquet": "parquet.format:PARQUET",
    "arrow": "arrow:ARROW",
    "fbin": "fbin:FBIN",
    "fvecs": "fvecs:FVECS",
    "npz": "npz:NPZ",
    "safetensors": "safetensors:SAFETENSORS",
}
"""Where each kind of file is read and written: a module of this package, and a value in it."""

KINDS = tuple(_FORMATS)
"""The names of all kinds of files."""

AUTO = "auto"
"""In the place of the name of a layout: the one that the files have."""

BESIDE = "parquet_"
"""What the names of layouts begin with whose metadata lies in parquet files beside the vectors: ``parquet_npy``."""

FileFormatName = Literal[
    "auto",
    "npy",
    "parquet",
    "arrow",
    "fbin",
    "fvecs",
    "npz",
    "safetensors",
    "parquet_npy",
    "parquet_fbin",
    "parquet_fvecs",
    "parquet_npz",
    "parquet_safetensors",
]
"""What ``file_format`` may be, for editors and type checkers."""


@cache
def get_file_format(name: str) -> FileFormat:
    """Return a kind of file by its name."""
    module, _, value = _FORMATS[name].partition(":")
    return cast("FileFormat", getattr(import_module(f"{__package__}.{module}"), value))


def format_names() -> tuple[str, ...]:
    """Return the names of all layouts."""
    return (*_FORMATS, *(BESIDE + name for name in _FORMATS if not get_file_format(name).holds_columns))


def get_format(name: str) -> Format:
    """Return a layout by its name.

    Raises
    ------
    ArgumentError
        If there is none of that name.
    """
    if name in _FORMATS:
        found = get_file_format(name)
        return Format(name, found, "same" if found.holds_columns else "none")
    vectors = name.removeprefix(BESIDE)
    if name in format_names():
        return Format(name, get_file_format(vectors), "beside")
    raise ArgumentError(f"unknown file_format {name!r}; the formats are {', '.join(map(repr, format_names()))}")


def all_suffixes() -> tuple[str, ...]:
    """Return what the names of files of vectors or metadata may end in."""
    return tuple(suffix for name in _FORMATS for suffix in get_file_format(name).suffixes)
