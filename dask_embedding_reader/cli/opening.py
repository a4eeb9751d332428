"""Opening a collection for a command: the format is guessed where it is not given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dask_embedding_reader.errors import NoFilesError
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.parquet.read import column_names
from dask_embedding_reader.formats.registry import KINDS, file_format, get_format
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.storage.find import Listings, find_files
from dask_embedding_reader.storage.read import read_range


def open_collection(
    url: str,
    *,
    file_format: str | None = None,
    embedding_column: str = "embedding",
    meta_columns: Sequence[str] = (),
    metadata_folder: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    embedding_dtype: str | None = None,
    listings: Listings | None = None,
) -> EmbeddingReader:
    """Open a collection as :class:`EmbeddingReader` does; what was listed to guess its format is not listed again."""
    listings = {} if listings is None else listings
    reader = EmbeddingReader.__new__(EmbeddingReader)
    reader._open(
        url,
        file_format or guess_format(url, bool(meta_columns), metadata_folder, storage_options, listings),
        embedding_column,
        list(meta_columns),
        metadata_folder,
        storage_options,
        None,
        embedding_dtype,
        True,
        listings,
    )
    return reader


def metadata_columns(
    url: str,
    file_format: str,
    embedding_column: str,
    metadata_folder: str | None,
    storage_options: Mapping[str, Any] | None,
    listings: Listings,
) -> list[str]:
    """Return the names of all columns of a collection that metadata can be read from."""
    layout = get_format(file_format)
    if layout.metadata == "none":
        return []
    source = url if metadata_folder is None else metadata_folder
    files = find_files([source], PARQUET.suffixes, storage_options, listings=listings)
    vectors = {embedding_column} if layout.metadata == "same" else set()
    return [name for name in column_names(files) if name not in vectors | {ROW_NUMBER}]


def guess_format(
    url: str,
    has_meta_columns: bool,
    metadata_folder: str | None,
    storage_options: Mapping[str, Any] | None,
    listings: Listings,
) -> str:
    """Tell the format by the names of the files; where there are both kinds, by whether metadata is wanted."""
    if metadata_folder is not None:
        return "parquet_npy"
    try:
        files = find_files([url], (".npy",), storage_options, listings=listings)
    except NoFilesError as error:
        # Parquet last: beside vectors of another kind it is their metadata.
        for name in sorted(KINDS[1:], key=lambda kind: file_format(kind).holds_columns):
            with suppress(NoFilesError):
                find_files([url], file_format(name).suffixes, storage_options, listings=listings)
                return f"parquet_{name}" if has_meta_columns and not file_format(name).holds_columns else name
        raise error from None
    if not files[0].path.endswith(".npy") and read_range(files[0], 0, 4) == b"PAR1":  # it is named, by no suffix
        return "parquet"
    return "parquet_npy" if has_meta_columns else "npy"
