"""Read large collections of embeddings: a lazy array, its metadata beside it, batches within a memory limit."""

from importlib import import_module
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from dask_embedding_reader.lazy.iter_batches import iter_batches
    from dask_embedding_reader.reader import EmbeddingReader, get_file_list
    from dask_embedding_reader.search.nearest import nearest
    from dask_embedding_reader.show.recorder import BatchRecorder
    from dask_embedding_reader.write.embeddings import write_embeddings
    from dask_embedding_reader.write.verify import verify_embeddings

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BatchRecorder",
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
    "nearest",
    "verify_embeddings",
    "write_embeddings",
]

# Imported when first used: they take seconds, for which the help of the command line should not wait.
_MODULE_OF = {
    "BatchRecorder": "show.recorder",
    "EmbeddingReader": "reader",
    "get_file_list": "reader",
    "iter_batches": "lazy.iter_batches",
    "nearest": "search.nearest",
    "verify_embeddings": "write.verify",
    "write_embeddings": "write.embeddings",
}


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
