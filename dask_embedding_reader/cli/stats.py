"""Statistics of all rows, in one pass and bounded memory."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.cli.facts import plain
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.reader import EmbeddingReader

_BATCH_NBYTES = 4_000_000
"""Rows as stored that are looked at together; computing takes a few times as much."""

_MOST_HASHES = 2**23
"""Rows that are remembered to find duplicates: 128 MB, and to sort them as much again. Of more, only a sample is."""

_MOST_GROUPS = 1_000
"""Groups of equal rows that are listed."""

_MOST_OF_GROUP = 100
"""Rows of a group that are listed."""

_FIRST_ROWS = 5
"""Rows that are named of each kind."""


def row_statistics(
    reader: EmbeddingReader,
    start: int = 0,
    end: int | None = None,
    *,
    show_progress: bool = False,
    most_hashes: int = _MOST_HASHES,
) -> dict[str, Any]:
    """Return the norms of a range of rows, and which are not finite, zero or there before; plain values.

    Of ``most_hashes`` rows duplicates are counted exactly; of more, their number is estimated.
    """
    norms = _Norms()
    kinds = {name: _Kind() for name in ("nan", "infinite", "zero")}
    seen = _Duplicates(most_hashes)
    batch_rows = max(1, _BATCH_NBYTES // reader.byte_per_item)
    for vectors, meta in reader(batch_rows, start, end, show_progress=show_progress, dtype=None):
        numbers = meta[ROW_NUMBER].to_numpy()
        wide = vectors.astype(np.complex128 if vectors.dtype.kind == "c" else np.float64)
        has_nan, has_infinity = np.isnan(wide).any(axis=1), np.isinf(wide).any(axis=1)
        kinds["nan"].add(numbers, has_nan)
        kinds["infinite"].add(numbers, has_infinity)
        kinds["zero"].add(numbers, ~wide.any(axis=1))
        norms.add(_norms(wide[~(has_nan | has_infinity)]))
        seen.add(numbers, vectors)
    return {
        "rows": seen.rows,
        "norms": plain(norms.facts()),
        **{name: kind.facts() for name, kind in kinds.items()},
        "duplicates": seen.facts(),
    }


def _norms(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the lengths of vectors, also of such whose squares are too large or too small for a float."""
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0)
    with np.errstate(over="ignore"):
        lengths: npt.NDArray[np.float64] = np.linalg.norm(rows / scale, axis=1) * scale[:, 0]
    return lengths


class _Kind:
    """Counts rows of a kind, and names the first."""

    def __init__(self) -> None:
        self.rows, self.first_rows = 0, list[int]()

    def add(self, numbers: npt.NDArray[np.int64], is_one: Any) -> None:
        found = numbers[is_one]
        self.rows += len(found)
        self.first_rows += found[: _FIRST_ROWS - len(self.first_rows)].tolist()

    def facts(self) -> dict[str, Any]:
        return {"rows": self.rows, "first_rows": self.first_rows}


class _Norms:
    """Merges means and deviations batch by batch (Chan's method: no sum of squares that cancels)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.least, self.most = math.inf, -math.inf

    def add(self, norms: npt.NDArray[np.float64]) -> None:
        if not len(norms):
            return
        count = self.count + len(norms)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(norms.mean())
            if math.isinf(mean):  # their sum, perhaps, not they
                mean = float((norms / len(norms)).sum())
            difference = mean - self.mean
            squares = float(((norms - mean) ** 2).sum())
        self.squares += squares + difference * difference * self.count * len(norms) / count
        self.mean += difference * (len(norms) / count)
        self.count = count
        self.least, self.most = min(self.least, float(norms.min())), max(self.most, float(norms.max()))

    def facts(self) -> dict[str, float] | None:
        if not self.count:
            return None
        return {"min": self.least, "max": self.most, "mean": self.mean, "std": math.sqrt(self.squares / self.count)}


class _Duplicates:
    """Finds rows whose bytes were there before.

    A row is remembered by its number and 64 bits of a hash. Where there are too many, only rows are remembered whose
    hash is a multiple of 2, then of 4 and so on: equal rows are kept or passed over together, and the count scales up.
    """

    def __init__(self, most: int) -> None:
        self._most, self._step = most, 1
        self._hashes: list[npt.NDArray[np.uint64]] = []
        self._numbers: list[npt.NDArray[np.int64]] = []
        self._kept, self.rows = 0, 0

    def add(self, numbers: npt.NDArray[np.int64], vectors: npt.NDArray[Any]) -> None:
        self.rows += len(vectors)
        data, row_nbytes = vectors.reshape(-1).view(np.uint8).data, vectors.shape[1] * vectors.itemsize
        starts = range(0, len(data), row_nbytes)
        digests = b"".join(blake2b(data[k : k + row_nbytes], digest_size=8).digest() for k in starts)
        self._keep(np.frombuffer(digests, np.uint64), numbers)
        while self._kept > self._most:
            self._step *= 2
            kept = list(zip(self._hashes, self._numbers, strict=True))
            self._hashes, self._numbers, self._kept = [], [], 0
            for some, their_numbers in kept:
                self._keep(some, their_numbers)

    def _keep(self, hashes: npt.NDArray[np.uint64], numbers: npt.NDArray[np.int64]) -> None:
        kept = hashes % np.uint64(self._step) == 0
        self._hashes.append(hashes[kept])
        self._numbers.append(numbers[kept])
        self._kept += len(self._hashes[-1])

    def facts(self) -> dict[str, Any]:
        hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        order = np.argsort(hashes, kind="stable")  # rows of a group stay in order
        numbers = np.concatenate([np.empty(0, np.int64), *self._numbers])[order]
        bounds = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order][:1], append=~hashes[order][-1:]))
        sizes = np.diff(bounds)
        repeated = np.flatnonzero(sizes > 1)
        listed = repeated[np.argsort(numbers[bounds[repeated]])][:_MOST_GROUPS]
        groups = [numbers[bounds[g] : bounds[g] + min(sizes[g], _MOST_OF_GROUP)].tolist() for g in listed]
        return {"rows": (self._kept - len(sizes)) * self._step, "exact": self._step == 1, "groups": groups}
