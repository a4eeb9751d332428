"""Read large collections of embeddings: a lazy array, its metadata beside it, batches within a memory limit."""

from dask_embedding_reader.errors import (
    ArgumentError,
    ArgumentTypeError,
    CastError,
    ColumnError,
    DestinationError,
    EmbeddingReaderError,
    FileChangedError,
    FormatError,
    MismatchError,
    NoFilesError,
    ReadError,
    WriteError,
)
from dask_embedding_reader.reader import EmbeddingReader, get_file_list
from dask_embedding_reader.streaming import iter_batches
from dask_embedding_reader.verify import verify_embeddings
from dask_embedding_reader.write import write_embeddings

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CastError",
    "ColumnError",
    "DestinationError",
    "EmbeddingReader",
    "EmbeddingReaderError",
    "FileChangedError",
    "FormatError",
    "MismatchError",
    "NoFilesError",
    "ReadError",
    "WriteError",
    "__version__",
    "get_file_list",
    "iter_batches",
    "verify_embeddings",
    "write_embeddings",
]
