"""How fast a storage reads, with more and more pieces at the same time."""

from __future__ import annotations

import time
from typing import Any

from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader.reader import EmbeddingReader

_LOCAL, _REMOTE = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)
_BATCH_NBYTES = 8_000_000

_AS_GOOD = 0.9
"""Of settings that reach this share of the best speed, the one with the fewest pieces suits a storage."""


def measure_reading(reader: EmbeddingReader, seconds: float, *, show_progress: bool = False) -> dict[str, Any]:
    """Read for a while with each setting, every time rows that were not read yet, as long as there are some.

    Returns
    -------
    dict
        ``runs``, a dictionary for each setting; ``suits``, the setting to use; ``read_again``, whether rows were read
        more than once.
    """
    settings = _LOCAL if reader.manifest.vectors.is_local else _REMOTE
    runs, row, total = [], 0, 0
    with progress_bar(show_progress, len(settings), "measuring", " settings") as progress:
        for parallel_pieces in settings:
            rows, elapsed = _read_for(reader, row, parallel_pieces, seconds / len(settings))
            row, total = (row + rows) % reader.count, total + rows
            nbytes = rows * reader.byte_per_item
            runs.append(
                {
                    "parallel_pieces": parallel_pieces,
                    "seconds": elapsed,
                    "rows": rows,
                    "nbytes": nbytes,
                    "rows_per_second": rows / elapsed,
                    "nbytes_per_second": nbytes / elapsed,
                }
            )
            progress.update(1)
    best = max(run["nbytes_per_second"] for run in runs)
    suits = next(run["parallel_pieces"] for run in runs if run["nbytes_per_second"] >= _AS_GOOD * best)
    return {"runs": runs, "suits": suits, "read_again": total > reader.count}


def _read_for(reader: EmbeddingReader, row: int, parallel_pieces: int, seconds: float) -> tuple[int, float]:
    """Read from a row on, past the end again from the start, until the time is up; return rows and seconds."""
    batch_rows = max(1, _BATCH_NBYTES // reader.byte_per_item)
    begun, rows = time.perf_counter(), 0
    while True:
        for vectors, _ in reader(
            batch_rows, row, parallel_pieces=parallel_pieces, show_progress=False, dtype=reader.dtype
        ):
            rows += len(vectors)
            elapsed = time.perf_counter() - begun
            if elapsed >= seconds:
                return rows, elapsed
        row = 0
