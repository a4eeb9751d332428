"""Batches of a few selected rows of local files: read at once in the caller's thread; to start another takes longer."""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_embedding_reader.batches.metadata import Form
from dask_embedding_reader.batches.request import BatchRequest
from dask_embedding_reader.batches.selected import read_metadata
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import picked_files
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.picking import read_picked

_MOST_NBYTES = 2**20
_MOST_ROWS = 1_000


def are_few(manifest: Manifest, request: BatchRequest) -> bool:
    """Tell whether rows are so few that they are read at once; the memory limit has room for them."""
    rows = request.stop - request.start
    nbytes = rows * manifest.dimension * max(manifest.dtype.itemsize, request.dtype.itemsize)
    few = rows <= _MOST_ROWS and nbytes <= min(_MOST_NBYTES, request.limit_nbytes // 2)
    return few and not manifest.vectors.has_groups and manifest.vectors.is_local


class FewReading:
    """One pass over a few selected rows, in any order."""

    def __init__(self, manifest: Manifest, request: BatchRequest, form: Form) -> None:
        self._manifest, self._request, self._form = manifest, request, form
        self._vectors: Array | None = None
        self._frame: Any = None

    def finish(self, stop: int) -> None:
        """Read all rows, the first time."""
        del stop
        if self._vectors is not None:
            return
        manifest, request = self._manifest, self._request
        assert request.rows is not None
        self._numbers = request.rows.numbers(request.start, request.stop)
        vectors = np.empty((len(self._numbers), manifest.dimension), request.dtype)
        for picked in picked_files(manifest.vectors, self._numbers, ascending=request.rows.is_ascending):
            read_picked(manifest.format.vectors, manifest.columns, picked.header, picked.rows, [vectors], picked.places)
        if manifest.metadata is not None:
            self._frame = read_metadata(manifest, manifest.metadata, self._numbers, self._form)
        self._vectors = vectors

    def take(self, start: int, stop: int) -> tuple[Array, Any]:
        """Hand out a batch."""
        assert self._vectors is not None
        here = slice(start - self._request.start, stop - self._request.start)
        if self._frame is None:
            return self._vectors[here], self._form.of_none(self._numbers[here])
        return self._vectors[here], self._form.join([self._frame[here]])

    def close(self) -> None:
        """Let go of what was read."""
        self._vectors = self._frame = None
