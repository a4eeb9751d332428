"""Opening a collection for a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dask_embedding_reader.formats.registry import AUTO
from dask_embedding_reader.reader import EmbeddingReader


def open_collection(
    url: str,
    *,
    file_format: str | None = None,
    embedding_column: str | None = None,
    meta_columns: Sequence[str] = (),
    metadata_folder: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    embedding_dtype: str | None = None,
) -> EmbeddingReader:
    """Open a collection as :class:`EmbeddingReader` does."""
    return EmbeddingReader(
        url,
        file_format or AUTO,
        embedding_column,
        list(meta_columns),
        metadata_folder,
        storage_options=storage_options,
        embedding_dtype=embedding_dtype,
        show_progress=True,
    )
