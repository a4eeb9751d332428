"""The folder that a collection is written to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dask_embedding_reader.storage.store import Store, shown_url

WRITING = "_writing"
"""The folder in it of what is not finished."""


class Folder(NamedTuple):
    """Where a collection is written to."""

    store: Store
    """The storage."""
    path: str
    """The folder in it."""
    url: str
    """The same as it can be opened again."""
    storage_options: Mapping[str, Any] | None
    """What fsspec needs for that."""

    @property
    def work(self) -> str:
        """The folder of what is not finished."""
        return f"{self.path}/{WRITING}"

    @property
    def shown(self) -> str:
        """How messages write it."""
        return shown_url(self.store, self.path)

    def at(self, name: str) -> str:
        """Return the path of something in it."""
        return f"{self.path}/{name}"
