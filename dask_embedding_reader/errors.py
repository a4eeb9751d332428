"""What can go wrong, by name.

Every exception of this library is an :class:`EmbeddingReaderError` and also the builtin exception that a caller who
knows Python would catch. Its message names the file, the row range where there is one, what was found, what was
expected and the remedy.
"""

from __future__ import annotations


class EmbeddingReaderError(Exception):
    """Base of every exception that this library raises on purpose."""


class ArgumentError(EmbeddingReaderError, ValueError):
    """An argument has a value that makes no sense."""


class RowError(ArgumentError, IndexError):
    """There is no such row."""


class ArgumentTypeError(EmbeddingReaderError, TypeError):
    """An argument has a type that makes no sense."""


class NoFilesError(EmbeddingReaderError, FileNotFoundError, ValueError):
    """A path does not exist, or nothing under it has the wanted format.

    A ``ValueError`` too, since that is what ``embedding_reader`` raises.
    """


class FormatError(EmbeddingReaderError, ValueError):
    """A file is not what its format says: garbage, truncated, or of a kind that cannot be read as vectors."""


class MismatchError(EmbeddingReaderError, ValueError):
    """Files, or a file and its metadata, do not belong together."""


class ColumnError(EmbeddingReaderError, KeyError):
    """A column is missing or cannot be used."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would print the newlines and quotes of the message escaped.
        return Exception.__str__(self)


class ReadError(EmbeddingReaderError, OSError):
    """The storage did not deliver the bytes that were asked for."""


class FileChangedError(ReadError):
    """A file is no longer the one that was planned: it was replaced, appended to or cut short."""


class WriteError(EmbeddingReaderError, OSError):
    """The storage did not take what was to be written."""


class DestinationError(WriteError, FileExistsError):
    """A folder cannot be written to as it is: it holds something already, or another process is writing to it."""


class CastError(EmbeddingReaderError, ValueError):
    """Values cannot be held by the dtype that was asked for."""
