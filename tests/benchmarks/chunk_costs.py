"""What a chunk costs, by their number: `python -m tests.benchmarks.chunk_costs [--all]`.

The chunks are of 100 rows of one sparse file, so that reading them costs next to nothing. The costs do not depend on
luck, so once is enough. Leaves a JSON file and a plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, LocalCluster
from matplotlib.figure import Figure

from dask_embedding_reader import EmbeddingReader, iter_batches

ROWS, DIMENSION = 100, 8
COUNTS = (1_000, 10_000, 100_000)
SLOW = {("reduction", 100_000), ("iteration", 100_000)}
"""Dask takes minutes for the one, a minute for the other; ten times 10,000 tells the same."""
TASKS = 1_000
"""On a cluster, where a task takes a millisecond."""


def make_file(path: Path) -> None:
    """Rows of zeros that take no room on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        rows = ROWS * max(COUNTS)
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, DIMENSION)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + rows * DIMENSION * 4)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def drain(x: Any) -> None:
    """Take all batches."""
    for _ in iter_batches(x, batch_size=10_000):
        pass


def works(reader: EmbeddingReader, chunks: int) -> dict[str, Callable[[], Any]]:
    """What is measured."""
    rows = chunks * ROWS
    x = reader.to_dask_array(0, rows, max_piece_size=ROWS)
    return {
        "build": lambda: reader.to_dask_array(0, rows, max_piece_size=ROWS),
        "slice": lambda: x[rows // 2 : rows // 2 + 10].compute(),
        "reduction": lambda: x.sum().compute(scheduler="threads"),
        "iteration": lambda: drain(x),
    }


def on_cluster(reader: EmbeddingReader) -> dict[str, float]:
    """Seconds a task on a cluster of two processes."""
    x = reader.to_dask_array(0, TASKS * ROWS, max_piece_size=ROWS)
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        drain(x[:ROWS])
        gathering = timed(lambda: client.gather(client.compute(list(x.to_delayed(optimize_graph=False).ravel()))))
        return {
            "compute": timed(x.compute) / TASKS,
            "gather": gathering / TASKS,
            "iteration": timed(lambda: drain(x)) / TASKS,
        }


def draw(costs: dict[str, dict[str, float]], cluster: dict[str, float], path: Path) -> None:
    """Seconds against the number of chunks, both logarithmic: a straight line of slope one is a fixed cost a chunk."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, seconds in costs.items():
        axes.loglog([int(count) for count in seconds], list(seconds.values()), marker="o", label=name)
    figures = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in cluster.items())
    axes.set(xlabel="chunks", ylabel="seconds", title=f"Cost by number of chunks\non two workers, ms a task: {figures}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, and save beside the other results."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.chunk_costs", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="where data and results go (default: .bench)")
    parser.add_argument("--all", action="store_true", help="computing 100,000 chunks too: minutes")
    options = parser.parse_args()
    path = options.dir / "chunks" / "0.npy"
    make_file(path)
    reader = EmbeddingReader(str(path))
    drain(reader.to_dask_array(0, 1_000))
    costs: dict[str, dict[str, float]] = {}
    for count in COUNTS:
        for name, work in works(reader, count).items():
            if options.all or (name, count) not in SLOW:
                costs.setdefault(name, {})[str(count)] = timed(work)
                print(f"{name:10} of {count:7,} chunks: {costs[name][str(count)]:.4f} s", flush=True)
    cluster = on_cluster(reader)
    for name, seconds in cluster.items():
        print(f"{name:10} on two workers: {seconds * 1e3:.2f} ms a task")
    results = options.dir.resolve() / "chunk_costs.json"
    results.write_text(json.dumps({"seconds": costs, "cluster_seconds_a_task": cluster}, indent=1) + "\n")
    draw(costs, cluster, results.with_suffix(".png"))
    print(f"saved {results} and a plot")


if __name__ == "__main__":
    main()
