"""A collection written anew, with all that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dask_embedding_reader.cli.opening import open_collection
from dask_embedding_reader.collection.layout import ALL_COLUMNS
from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.write.embeddings import write_embeddings


def convert_collection(
    sources: Sequence[str],
    target: str,
    *,
    file_format: str | None,
    embedding_column: str | None,
    meta_columns: Sequence[str],
    metadata_folders: Sequence[str],
    storage_options: Mapping[str, Any] | None,
    embedding_dtype: str | None,
    row_range: str | None = None,
    where: Sequence[str] = (),
    sample: int | None = None,
    seed: int | None = None,
    target_format: str | None,
    target_storage_options: Mapping[str, Any] | None,
    show_progress: bool,
    **how: Any,
) -> dict[str, Any]:
    """Write a collection to another folder, by default in the same format; return plain facts of what was written.

    Without ``meta_columns`` all columns are written, or left out where the format holds none. Which rows,
    :func:`open_collection` says; how, is passed to :func:`write_embeddings`.
    """
    holds_metadata = target_format is None or get_format(target_format).metadata != "none"
    if meta_columns and not holds_metadata:
        raise ArgumentError(
            f"{target_format} files hold no metadata, which is asked for ({', '.join(meta_columns)}): --to "
            f"parquet_{target_format} keeps it, in parquet files beside them; without -m vectors alone are converted"
        )
    reader = open_collection(
        sources,
        file_format=file_format,
        embedding_column=embedding_column,
        meta_columns=(meta_columns or ALL_COLUMNS) if holds_metadata else (),
        metadata_folders=metadata_folders,
        storage_options=storage_options,
        embedding_dtype=embedding_dtype,
        row_range=row_range,
        where=where,
        sample=sample,
        seed=seed,
    )
    written = target_format or reader.manifest.format.name
    kept = [field.name for field in reader.manifest.fields]
    try:
        write_embeddings(
            reader, target, written, show_progress=show_progress, storage_options=target_storage_options, **how
        )
    except ArgumentError as error:  # of the source all is well, as it is open
        raise ArgumentError(str(error).replace("storage_options", "target_storage_options")) from error
    result = EmbeddingReader.from_manifest(target, storage_options=target_storage_options)
    return {
        "rows": result.count,
        "dimension": result.dimension,
        "dtype": str(result.dtype),
        "nbytes": result.total_size,
        "file_format": written,
        "files": result.nb_files,
        "metadata": kept,
        "left_out": [] if holds_metadata else list(reader.columns),
    }
