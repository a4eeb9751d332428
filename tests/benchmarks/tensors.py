"""What tensors cost: `make test-torch`, then `.venv-torch/bin/python -m tests.benchmarks.tensors`.

The same loops over the same rows in turn, with and without PyTorch, the best of five of each: tensors are in the memory
of the batches, so that a loop should take no longer. Files are in the page cache. Where others use the processors,
only the times of the processor tell anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.torch import EmbeddingBatches

FILES, ROWS, DIMENSION = 4, 100_000, 256
ROUNDS = 5
FLOOR = 0.9
"""Of the rate without PyTorch."""


def make_files(folder: Path) -> None:
    """400 MB of vectors, with a column of numbers and one of text beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(FILES):
        np.save(folder / f"{number}.npy", rng.standard_normal((ROWS, DIMENSION), np.float32))
        frame = pd.DataFrame({"n": np.arange(ROWS), "text": [f"text {row}" for row in range(ROWS)]})
        frame.to_parquet(folder / f"{number}.parquet")


def drain(batches: Iterable[Any]) -> tuple[float, float]:
    """Seconds that it takes to get all batches, each let go of when the next one comes; and those of the processor."""
    started, computed = time.perf_counter(), time.process_time()
    for vectors, _ in batches:
        float(vectors[-1, -1])
    return time.perf_counter() - started, time.process_time() - computed


def pairs(reader: EmbeddingReader, batch_size: int, columns: tuple[str, ...]) -> dict[str, Callable[[], Iterable[Any]]]:
    """The loop without PyTorch, and those with it."""
    dataset = EmbeddingBatches(reader, batch_size, columns=columns, rank=0, world_size=1)
    return {
        "reader": lambda: reader(batch_size, show_progress=False),
        "dataset": lambda: dataset,
        "DataLoader": lambda: DataLoader(dataset, batch_size=None, collate_fn=tuple),
    }


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tensors")
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="where the data is kept (default: .bench)")
    folder = parser.parse_args().dir / "tensors"
    if not (folder / f"{FILES - 1}.parquet").exists():
        make_files(folder)
    plain, both = EmbeddingReader(folder), EmbeddingReader(folder, "parquet_npy", meta_columns=["n", "text"])
    for name, reader, batch_size, columns in (
        ("in order, 1,024 rows", plain, 1_024, ()),
        ("in order, 50,000 rows", plain, 50_000, ()),
        ("shuffled, 1,024 rows", plain.shuffle(1, buffer_rows=2**17), 1_024, ()),
        ("two columns, 1,024 rows", both, 1_024, ("n", "text")),
    ):
        loops = pairs(reader, batch_size, columns)
        times: dict[str, list[tuple[float, float]]] = {loop: [] for loop in loops}
        for _ in range(ROUNDS):
            for loop, batches in loops.items():
                times[loop].append(drain(batches()))
        print(f"{name:26} {FILES * ROWS / min(times['reader'])[0]:10,.0f} rows/s without; with:", end="")
        for loop in ("dataset", "DataLoader"):
            share, work = (min(t[k] for t in times["reader"]) / min(t[k] for t in times[loop]) for k in (0, 1))
            print(f"  {loop} {share:.2f}{' (missed)' * (share < FLOOR)}, by processor time {work:.2f}", end="")
        print()


if __name__ == "__main__":
    main()
