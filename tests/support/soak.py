"""Read for as long as is wanted: ``python -m tests.support.soak FOLDER_OR_URL MINUTES [STORAGE_OPTIONS]``.

``make_collection`` writes what it reads. A loop at an easy pace takes batches in all the ways there are, opens a reader
for each pass, and leaves every third one early. Each minute it prints a line of JSON: a ``Minute``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dask_embedding_reader import EmbeddingReader, iter_batches, write_embeddings

BATCH_ROWS = 8_192
BATCHES_PER_SECOND = 12.0
DIMENSION = 128
FORMATS = ["npy", "parquet", "parquet_npy"]
#: In bytes, for each of several iterators.
LIMIT = 2**26


class Minute(NamedTuple):
    """What one minute came to."""

    minute: int
    batches: int
    #: Seconds a batch, as the loop waited for it, in the mean.
    wait: float
    #: Bytes.
    resident: int
    threads: int
    descriptors: int


def make_collection(folder: Path, rows: int) -> None:
    """Write the same vectors in each format; the first item of each is its row number."""
    vectors = np.random.default_rng(0).standard_normal((rows, DIMENSION), dtype=np.float32)
    vectors[:, 0] = np.arange(rows)
    frame = pd.DataFrame({"id": np.arange(rows), "word": [f"word {k}" for k in range(rows)]})
    for name in FORMATS:
        meta = None if name == "npy" else frame
        write_embeddings(vectors, folder / name, name, meta, rows_per_file=max(1, rows // 3))


def _passes(url: str, storage_options: dict[str, Any] | None) -> Iterator[Iterator[Any]]:
    """One way of reading after the other, without end."""
    for number in count():
        name = FORMATS[number % len(FORMATS)]
        columns = None if name == "npy" else ["id", "word"]
        reader = EmbeddingReader(f"{url}/{name}", name, meta_columns=columns, storage_options=storage_options)
        if number % 4 == 3:
            lazy = reader.to_dask_array(max_piece_size=10_000)
            frame = reader.to_dask_dataframe(max_piece_size=10_000) if columns else None
            yield iter_batches(lazy + 0, frame, batch_size=BATCH_ROWS, max_ram_usage_in_bytes=LIMIT)
        else:
            yield reader(BATCH_ROWS, show_progress=False, max_ram_usage_in_bytes=LIMIT)


def _check(batch: Any, frame: pd.DataFrame) -> None:
    rows = frame["i"].to_numpy()
    if not np.array_equal(batch[:, 0], rows) or ("id" in frame and not np.array_equal(frame["id"], rows)):
        raise AssertionError(f"wrong rows from {rows[0]:,} on")


def run(url: str, minutes: float, storage_options: dict[str, Any] | None = None) -> Iterator[Minute]:
    """Read for so many minutes."""
    start = time.monotonic()
    minute, batches, waited, paced = 1, 0, 0.0, start
    for number, reading in enumerate(_passes(url, storage_options)):
        for taken in count():
            asked = time.monotonic()
            item = next(reading, None)
            waited += time.monotonic() - asked
            if item is None or (number % 3 == 2 and taken == 2):
                break
            _check(*item)
            batches += 1
            del item
            paced = max(paced + 1 / BATCHES_PER_SECOND, time.monotonic())
            time.sleep(max(0.0, paced - time.monotonic()))
            while time.monotonic() >= start + 60 * minute:
                yield _minute(minute, batches, waited)
                minute, batches, waited = minute + 1, 0, 0.0
            if minute > minutes:
                return


def _minute(minute: int, batches: int, waited: float) -> Minute:
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    descriptors = len(os.listdir("/proc/self/fd"))
    return Minute(minute, batches, waited / max(batches, 1), resident, threading.active_count(), descriptors)


def main() -> None:
    """Print each minute as it ends."""
    url, minutes, *options = sys.argv[1:]
    warnings.simplefilter("error")
    for minute in run(url, float(minutes), json.loads(options[0]) if options else None):
        sys.stdout.write(json.dumps(minute._asdict()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
