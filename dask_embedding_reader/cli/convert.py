"""A collection written anew, with all that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dask_embedding_reader.cli.opening import guess_format, metadata_columns, open_collection
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.storage.find import Listings
from dask_embedding_reader.write.embeddings import write_embeddings


def convert_collection(
    source: str,
    target: str,
    *,
    file_format: str | None,
    embedding_column: str,
    meta_columns: Sequence[str],
    metadata_folder: str | None,
    storage_options: Mapping[str, Any] | None,
    embedding_dtype: str | None,
    target_format: str | None,
    target_storage_options: Mapping[str, Any] | None,
    show_progress: bool,
    **how: Any,
) -> dict[str, Any]:
    """Write a collection to another folder; return plain facts of what was written.

    Parameters
    ----------
    source, target
        Where from and where to.
    file_format, embedding_column, meta_columns, metadata_folder, storage_options, embedding_dtype
        As for :class:`EmbeddingReader`; without ``meta_columns``, all columns that there are.
    target_format, target_storage_options
        The format to write, by default the same; options of the storage written to.
    show_progress
        Whether to show a progress bar.
    **how
        Passed to :func:`write_embeddings`.
    """
    listings: Listings = {}
    given = file_format or guess_format(source, bool(meta_columns), metadata_folder, storage_options, listings)
    written = target_format or given
    there = metadata_columns(source, given, embedding_column, metadata_folder, storage_options, listings)
    kept = [] if get_format(written).metadata == "none" else list(meta_columns) or there
    reader = open_collection(
        source,
        file_format=given,
        embedding_column=embedding_column,
        meta_columns=kept,
        metadata_folder=metadata_folder,
        storage_options=storage_options,
        embedding_dtype=embedding_dtype,
        listings=listings,
    )
    write_embeddings(
        reader, target, written, show_progress=show_progress, storage_options=target_storage_options, **how
    )
    result = EmbeddingReader.from_manifest(target, storage_options=target_storage_options)
    return {
        "rows": result.count,
        "dimension": result.dimension,
        "dtype": str(result.dtype),
        "nbytes": result.total_size,
        "file_format": written,
        "files": result.nb_files,
        "metadata": kept,
        "left_out": [name for name in (meta_columns or there) if name not in kept],
    }
