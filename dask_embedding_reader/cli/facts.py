"""What can be told of a collection without reading its rows, and its first rows; as plain values that JSON can hold."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dask_embedding_reader._common.units import counted, human_size
from dask_embedding_reader.collection.files import FileTable
from dask_embedding_reader.collection.layout import folders_within
from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.formats.base import default_piece_rows
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.storage.retries import describe, hide_secrets

Facts = dict[str, Any]

_LARGE_GROUP_NBYTES = 500_000_000
"""A row group can only be decoded whole: one this large cannot be worked on in parallel."""

_SMALL_FILE_NBYTES = 1_000_000
_MANY_FILES = 1_000
"""Each file costs requests; of so many, small ones cost more than their bytes."""


def collection_facts(reader: EmbeddingReader) -> Facts:
    """Return what a collection is."""
    manifest = reader.manifest
    vectors = manifest.vectors
    rows = vectors.rows[vectors.rows > 0]
    return {
        "rows": reader.count,
        "dimension": reader.dimension,
        "dtype": str(reader.dtype),
        "row_nbytes": reader.byte_per_item,
        "nbytes": reader.total_size,
        "file_format": manifest.format.name,
        "embedding_column": manifest.vectors_name,
        "files": reader.nb_files,
        "empty_files": len(vectors) - reader.nb_files,
        "rows_per_file": _span(rows),
        "folders": dict(_folders(vectors)),
        "row_groups": _row_groups(vectors),
        "metadata": {field.name: str(field.dtype) for field in manifest.fields},
        "columns": list(reader.columns),
        "passes_over": manifest.passes_over,
        "problems": list(_problems(reader)),
    }


def _folders(vectors: FileTable) -> Iterator[tuple[str, Facts]]:
    """Tell what is joined: folders in the one that was named, or the several that were."""
    for root in vectors.roots:
        for name, folder in folders_within(root, vectors.paths, vectors.rows.tolist()).items():
            several = [hide_secrets(root.rstrip("/"))] if len(vectors.roots) > 1 else []
            if shown := "/".join([*several, *filter(None, [name])]):
                yield shown, {"files": folder.files, "rows": folder.rows}


def _problems(reader: EmbeddingReader) -> Iterator[str]:
    """Tell what makes a readable collection slow, or smaller than it looks."""
    vectors = reader.manifest.vectors
    empty = len(vectors) - reader.nb_files
    if empty:
        first = vectors.url(int(np.argmin(vectors.rows)))
        yield f"{empty:,} of {counted(len(vectors), 'file')} have no rows (such as {first}): was writing interrupted?"
    if reader.nb_files >= _MANY_FILES and reader.total_size / reader.nb_files < _SMALL_FILE_NBYTES:
        yield (
            f"{reader.nb_files:,} files of {human_size(reader.total_size // reader.nb_files)} on average: opening each "
            "costs more than reading it; convert them to larger ones (--rows-per-file)"
        )
    slow = [(vectors.url(k), drawback) for k, drawback in enumerate(_drawbacks(reader)) if drawback]
    if slow:
        yield f"{counted(len(slow), 'file')} (such as {slow[0][0]}) {slow[0][1]}; convert them"
    if vectors.has_groups:
        largest = int(vectors.group_rows.max())
        if largest * reader.byte_per_item > _LARGE_GROUP_NBYTES:
            yield (
                f"row groups of up to {largest:,} rows, {human_size(largest * reader.byte_per_item)}: each can only be "
                "decoded whole; write them smaller, of about 50 MB"
            )


def _drawbacks(reader: EmbeddingReader) -> Iterator[str]:
    """Say of each file what makes it slow to read."""
    vectors = reader.manifest.vectors
    return (
        reader.manifest.format.vectors.drawback(vectors.header(k)) if vectors.rows[k] else ""
        for k in range(len(vectors))
    )


def plan_facts(reader: EmbeddingReader, max_piece_size: int | None, batch_size: int | None) -> Facts:
    """Return how a collection is cut into pieces and batches."""
    vectors = reader.manifest.vectors
    piece_rows = max_piece_size or default_piece_rows(reader.byte_per_item)
    pieces = _span(np.array(reader.to_dask_array(max_piece_size=max_piece_size).chunks[0]))
    batches = None
    if batch_size is not None:
        full, rest = divmod(reader.count, batch_size)
        batches = _span(np.array([batch_size] * min(full, 1) + [rest] * bool(rest)))
        batches |= {"count": full + bool(rest), "max_nbytes": batches["max_rows"] * reader.dimension * 4}
    groups = _row_groups(vectors)
    split = groups is not None and groups["max_rows"] > piece_rows
    return {
        "files": reader.nb_files,
        "pieces": pieces | {"max_nbytes": pieces["max_rows"] * reader.byte_per_item},
        "row_groups": groups,
        "decoding": "the largest is cut into several pieces, after it was decoded once" if split else "none is cut",
        "batches": batches,
    }


def draw_plan(reader: EmbeddingReader, max_piece_size: int | None, batch_size: int | None, path: str) -> None:
    """Save the plot of a plan.

    Raises
    ------
    ArgumentError
        If matplotlib does not know the suffix of the path, or nothing can be written there.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "dask-embedding-reader[plot]"') from error
    mpl.use("Agg")
    figure: Any = reader.plot_plan(batch_size, max_piece_size=max_piece_size).figure
    suffix = os.path.splitext(path)[1].lower().removeprefix(".")
    if suffix and suffix not in (known := figure.canvas.get_supported_filetypes()):
        raise ArgumentError(f"--plot {path!r}: nothing draws .{suffix} files; those that can be are {', '.join(known)}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--plot {path!r} cannot be written: {describe(error)}") from error


def read_head(reader: EmbeddingReader, start: int, rows: int) -> list[Facts]:
    """Return some rows, each with its number, metadata and vector."""
    found = []
    for vectors, frame in reader(rows, start, start + rows, show_progress=False, dtype=None):
        meta = [name for name in frame.columns if name != ROW_NUMBER]
        columns = {name: frame[name].tolist() for name in meta}
        for position, (number, vector) in enumerate(zip(frame[ROW_NUMBER].tolist(), vectors, strict=True)):
            row = {"row": number}
            row |= {name: plain(values[position]) for name, values in columns.items()}
            found.append(row | {"embedding": plain(vector)})
    return found


def shown_vector(values: Sequence[Any], shown: int = 4) -> str:
    """Write out the first items of a vector."""
    items = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:shown]]
    return " ".join([*items, "…"] if len(values) > shown else items)


def plain(value: Any) -> Any:
    """Turn a value into what JSON can hold: no number, such as NaN or a missing value, becomes None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return None if str(value) in ("<NA>", "NaT") else str(value)


def _row_groups(vectors: FileTable) -> Facts | None:
    groups = vectors.group_rows[vectors.group_rows > 0]
    return _span(groups) if len(groups) else None


def _span(rows: np.ndarray[Any, np.dtype[Any]]) -> Facts:
    return {"count": len(rows), "min_rows": int(rows.min()), "max_rows": int(rows.max())}
