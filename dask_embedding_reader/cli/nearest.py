"""Rows that are nearest to others, with their metadata, as plain values that JSON can hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.cli.facts import plain, read_head
from dask_embedding_reader.cli.opening import load_npy
from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.search.nearest import nearest


def find_nearest(
    reader: EmbeddingReader, rows: Sequence[int], queries: str | None, k: int, metric: Any, *, show_progress: bool
) -> list[dict[str, Any]]:
    """Return what is nearest to some rows, or to the vectors in an npy file: a dictionary for each of them.

    Raises
    ------
    ArgumentError
        If neither rows nor a file are given, or both; if there is no such row, or the file holds no vectors.
    """
    if rows and queries is not None:
        raise ArgumentError("--row and --queries cannot be combined: search for rows, or for the vectors of a file")
    if not rows and queries is None:
        raise ArgumentError("name what to search for: rows of the collection (--row), or a file of vectors (--queries)")
    if beyond := [row for row in rows if row >= reader.count]:
        raise ArgumentError(f"--row {beyond[0]:,} is out of range: the collection has {reader.count:,} rows, from 0 on")
    wanted = np.atleast_2d(load_npy(queries, "--queries")) if queries is not None else _vectors(reader, rows)
    try:
        scores, found = nearest(reader, wanted, k, metric=metric, show_progress=show_progress)
    except ArgumentError as error:
        if not rows:
            raise
        told = re.sub(r"^query ([\d,]+)", lambda query: f"row {rows[int(query[1].replace(',', ''))]:,}", str(error))
        raise ArgumentError(told) from error
    numbers = list(rows) or list(range(len(wanted)))
    return [
        {"query": number, "nearest": _hits(reader, hits, best)}
        for number, best, hits in zip(numbers, scores.tolist(), found.tolist(), strict=True)
    ]


def _vectors(reader: EmbeddingReader, rows: Sequence[int]) -> npt.NDArray[Any]:
    vectors, _ = next(reader.take(rows)(len(rows), show_progress=False, dtype=None))
    return vectors


def _hits(reader: EmbeddingReader, rows: Sequence[int], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return rows with their scores first."""
    found = read_head(reader.take(rows), 0, len(rows))
    return [{"score": plain(score), **facts} for score, facts in zip(scores, found, strict=True)]
