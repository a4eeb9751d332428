"""What a caller wants written: arguments checked, and what follows from them before any row is seen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dask_embedding_reader._common.arguments import check_sources, is_numeric
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, DestinationError
from dask_embedding_reader.formats.base import default_piece_rows
from dask_embedding_reader.formats.registry import BESIDE, get_format
from dask_embedding_reader.formats.vectors import plan_casting
from dask_embedding_reader.storage.put import is_local_file, most_writers, put_nbytes
from dask_embedding_reader.storage.retries import hide_secrets
from dask_embedding_reader.storage.urls import resolve
from dask_embedding_reader.write.folder import Folder
from dask_embedding_reader.write.parts import Settings

_FILE_NBYTES = 200_000_000
"""The size of a file, where the caller does not say: a few pieces, so that there are neither too many files nor too
large ones to be held in memory."""


class Request(NamedTuple):
    """The arguments, checked."""

    folder: Folder
    """Where to."""
    file_format: str
    """In which format."""
    embedding_column: str
    """parquet: the column of vectors."""
    rows_per_file: int | None
    """Rows of a file; None for what suits."""
    dtype: np.dtype[Any] | None
    """What is to be stored; None for what the vectors are."""
    scale: float | None
    """What a step of one stands for."""
    overwrite: bool
    """Whether to replace data that are there."""
    show_progress: bool
    """Whether to show a progress bar, where somebody watches."""
    limit_nbytes: int
    """How much memory may be held."""


def check_folder(folder: Any, options: Mapping[str, Any] | None) -> Folder:
    """Return the folder of a path or URL, which need not exist yet."""
    source = check_sources("folder", [folder] if isinstance(folder, str | os.PathLike) else folder)
    if len(source) != 1:
        raise ArgumentError("folder is a list; one folder is written at a time")
    text = os.fspath(source[0])
    if "::" in text and not os.path.lexists(text):
        raise ArgumentError(f"{hide_secrets(text)!r} is a chain of storages, which is only read; name the last one")
    store, path = resolve(text, options)
    if is_local_file(store, path):
        raise DestinationError(f"{path}: is a file where a folder was expected; name another path")
    return Folder(store, path, store.url(path), options)


def make_settings(
    request: Request,
    token: str | None,
    shape: tuple[int | None, int],
    stored: np.dtype[Any],
    rows_per_file: int,
    has_columns: bool | None,
) -> Settings:
    """Decide what is written, and refuse what cannot be."""
    rows, dimension = shape
    if rows == 0 or dimension == 0:
        raise ArgumentError(f"an array of shape {shape} holds no embeddings: there is nothing to write")
    if not is_numeric(stored):
        raise ArgumentTypeError(
            f'the vectors are {stored}, not numbers that numpy knows; cast them first, as in array.astype("float32")'
        )
    dtype = plan_casting(stored, request.dtype, request.scale).dtype
    layout = get_format(request.file_format)
    if layout.vectors.suffix_for(dtype) is None:
        # No other dtype that complex numbers can be cast to is one that these files hold.
        give = "" if stored.kind == "c" else "give dtype=, or "
        instead = f"{BESIDE}npy" if layout.metadata == "beside" or has_columns else "npy"
        raise ArgumentError(
            f'{layout.vectors.name} files hold no vectors of {dtype}; {give}write file_format="{instead}"'
        )
    if layout.metadata == "none" and has_columns:
        raise ArgumentError(
            f'{layout.name} files hold no metadata; write file_format="{BESIDE}{layout.name}" or "parquet", or leave '
            "it out: a reader is opened without meta_columns"
        )
    if layout.metadata == "beside" and has_columns is False:
        raise ArgumentError(
            f"there is no metadata to be written beside {layout.vectors.name} files; write "
            f'file_format="{layout.vectors.name}", or give metadata (a reader has the columns that it was opened with: '
            "meta_columns=[...])"
        )
    return Settings(
        token, request.file_format, request.embedding_column, rows, rows_per_file, dimension, dtype.str, request.scale
    )


def estimate_nbytes(request: Request, rows: int, dimension: int, stored: np.dtype[Any]) -> int:
    """Estimate what a part holds in memory until it is written; refuse one that is too large for the limit."""
    wanted = (stored if request.dtype is None else request.dtype).itemsize
    items = rows * dimension
    nbytes = items * stored.itemsize + put_nbytes(request.folder.store, items * wanted)
    if 2 * nbytes > request.limit_nbytes and rows > 1:
        raise ArgumentError(
            f"writing files of {counted(rows, 'row')} takes about {2 * nbytes:,} bytes of memory "
            f"({nbytes:,} for a file, two at "
            f"a time); the limit is {request.limit_nbytes:,} (max_ram_usage_in_bytes): choose fewer rows_per_file, "
            "or a higher limit"
        )
    return nbytes


def choose_rows_per_file(request: Request, rows: int | None, dimension: int, stored: np.dtype[Any]) -> int:
    """Return how many rows a file has."""
    if request.rows_per_file is not None:
        return request.rows_per_file if rows is None else min(request.rows_per_file, max(rows, 1))
    itemsize = max(stored.itemsize, (stored if request.dtype is None else request.dtype).itemsize)
    chosen = default_piece_rows(dimension * itemsize, min(_FILE_NBYTES, request.limit_nbytes // 8))
    return chosen if rows is None else min(chosen, max(rows, 1))


def count_writers(request: Request, part_nbytes: int) -> int:
    """Return how many parts are encoded and written at once; half of the memory is for what comes next."""
    return max(1, min(most_writers(request.folder.store), request.limit_nbytes // (2 * max(1, part_nbytes))))
