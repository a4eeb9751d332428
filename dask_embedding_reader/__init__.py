"""Read large collections of embeddings: a lazy array, its metadata beside it, batches within a memory limit."""

from dask_embedding_reader.errors import (
    ArgumentError,
    ArgumentTypeError,
    ColumnError,
    EmbeddingReaderError,
    FileChangedError,
    FormatError,
    MismatchError,
    NoFilesError,
    ReadError,
)
from dask_embedding_reader.reader import EmbeddingReader, get_file_list
from dask_embedding_reader.streaming import iter_batches

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ColumnError",
    "EmbeddingReader",
    "EmbeddingReaderError",
    "FileChangedError",
    "FormatError",
    "MismatchError",
    "NoFilesError",
    "ReadError",
    "__version__",
    "get_file_list",
    "iter_batches",
]
