"""The command line, a module for each command that needs more than a few lines."""

from dask_embedding_reader.cli.commands import main

__all__ = ["main"]
