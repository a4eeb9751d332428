"""The contenders at batches of lazy arrays: `iter_batches` against what users write today, and against Dask alone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from .contenders import KEPT, Answer, Job, Vectors, consume, contends, delayed_array, our_array
from .data import Data
from .floors import COMPUTE, GATHER, LOOP, OURS, SUM, XBATCHER
from .works import Work

WHOLE = ("iter-1000", "iter-100000")
LOOPS = ("iter-part-1000", "iter-unit-1000", "iter-standardised")


def unit(x: Any) -> Any:
    """Vectors of length one."""
    return x / import_module("dask.array").sqrt((x * x).sum(axis=1, keepdims=True))


def standardised(x: Any) -> Any:
    """Items of mean zero and variance one."""
    return (x - x.mean(axis=0)) / x.std(axis=0)


def lazy_array(work: Work, data: Data) -> Any:
    """What the work takes batches of: for slow contenders a part of the collection."""
    x = our_array(work, data)
    return {
        "iter-part-1000": lambda: x[: data.rows // 2],
        "iter-unit-1000": lambda: unit(x[: data.rows // 2]),
        "iter-standardised": lambda: standardised(x[: data.rows]),
        "iter-cluster": lambda: x[: 2 * data.rows],
    }.get(work.name, lambda: x)()


@contends(OURS, *WHOLE, *LOOPS)
def our_batches(work: Work, data: Data) -> Job:
    """Every batch."""
    x, iter_batches = lazy_array(work, data), import_module("dask_embedding_reader").iter_batches
    return lambda: consume(iter_batches(x, batch_size=work.batch_size))


def slices(work: Work, x: Any) -> Iterator[tuple[Vectors, Any]]:
    """Batches as a loop of slices gives them."""
    for start in range(0, len(x), work.batch_size):
        rows = x[start : start + work.batch_size].compute()
        yield rows, rows


@contends(LOOP, *LOOPS)
def slicing_loop(work: Work, data: Data) -> Job:
    """Compute a slice a batch: Dask computes each chunk, and each mean, anew for every batch.

    The plain array is that of one delayed np.load a file, as users write it today: slices of ours reach into the read.
    """
    x = delayed_array(data, work.data)[: data.rows // 2] if work.name == "iter-part-1000" else lazy_array(work, data)
    return lambda: consume(slices(work, x))


@contends(XBATCHER, *LOOPS)
def xbatcher_batches(work: Work, data: Data) -> Job:
    """Take the batches of xbatcher, without its cache, which would hold the collection."""
    table = import_module("xarray").DataArray(lazy_array(work, data), dims=("row", "item"))
    generator = import_module("xbatcher").BatchGenerator(
        table, {"row": work.batch_size, "item": table.sizes["item"]}, cache=None
    )
    return lambda: consume((batch.values, batch.values) for batch in generator)


@contends(SUM, *WHOLE)
def summing(work: Work, data: Data) -> Job:
    """Pass over the rows without handing them out."""
    x = lazy_array(work, data)

    def job() -> Answer:
        float(x.sum().compute())
        return {"rows": len(x)}

    return job


@contends(COMPUTE, "iter-100000")
def computing(work: Work, data: Data) -> Job:
    """Hold the whole array in memory."""
    x = lazy_array(work, data)
    return lambda: {"rows": len(x.compute())}


def start_cluster() -> Any:
    """Two workers of one thread, each a process, that have imported what they need."""
    distributed = import_module("distributed")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", processes=True)
    client = distributed.Client(cluster)
    client.run(import_module, "dask_embedding_reader")
    KEPT.append(client)  # to end it takes seconds; the workers end with this process
    return client


@contends(OURS, "iter-cluster")
def our_cluster_batches(work: Work, data: Data) -> Job:
    """Every batch, computed by the workers."""
    x, _ = lazy_array(work, data), start_cluster()
    iter_batches = import_module("dask_embedding_reader").iter_batches

    return lambda: consume(iter_batches(x, batch_size=work.batch_size))


@contends(GATHER, "iter-cluster")
def gathering(work: Work, data: Data) -> Job:
    """Compute the chunks on the workers and gather each."""
    x, client = lazy_array(work, data), start_cluster()

    def job() -> Answer:
        futures = client.compute(list(x.to_delayed(optimize_graph=False).ravel()))
        rows = 0
        for place, future in enumerate(futures):
            rows += len(np.asarray(client.gather(future)))
            futures[place] = None
        return {"rows": rows}

    return job
