"""Contenders at finding nearest neighbours."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from .contenders import Job, Vectors, contends, import_dask, open_reader, options
from .data import DIMENSION, Data
from .floors import EXHAUSTIVE, KNN, OURS, PASS, PRODUCT
from .works import Work

NEIGHBOURS = 10
QUERIES = {"nearest-memory": 1_000, "nearest-files": 100, "nearest-one": 1}
BLOCK_ROWS = 8_192


def random_queries(work: Work) -> Vectors:
    """Vectors of a seed."""
    queries: Vectors = np.random.default_rng(3).standard_normal((QUERIES[work.name], DIMENSION), np.float32)
    return queries


def in_memory(work: Work, data: Data) -> Vectors:
    """The vectors of one file."""
    vectors: Vectors = np.load(min(data.folder(work.data).glob("*.npy")))
    return vectors


def answer(scores: Any) -> dict[str, float]:
    """What all who return scores are compared by."""
    return {"scores": float(np.asarray(scores, np.float64).sum())}


@contends(OURS, "nearest-*")
def ours(work: Work, data: Data) -> Job:
    """Vectors in memory, or a reader."""
    nearest = import_module("dask_embedding_reader").nearest
    import_dask()
    source = in_memory(work, data) if work.name == "nearest-memory" else open_reader(OURS, work, data)
    queries = random_queries(work)
    return lambda: answer(nearest(source, queries, NEIGHBOURS, metric="ip")[0])


@contends(PRODUCT, "nearest-memory")
def product_alone(work: Work, data: Data) -> Job:
    """What BLAS takes for the products, of which nothing is kept."""
    vectors, queries = in_memory(work, data), random_queries(work)
    products = np.empty((BLOCK_ROWS, len(queries)), np.float32)

    def job() -> dict[str, float]:
        for start in range(0, len(vectors), BLOCK_ROWS):
            rows = vectors[start : start + BLOCK_ROWS]
            np.matmul(rows, queries.T, out=products[: len(rows)])
        return {}

    return job


@contends(KNN, "nearest-memory")
def faiss_knn(work: Work, data: Data) -> Job:
    """Exact search of arrays in memory."""
    faiss: Any = import_module("faiss")
    vectors, queries = in_memory(work, data), random_queries(work)
    return lambda: answer(faiss.knn(queries, vectors, NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)[0])


@contends(EXHAUSTIVE, "nearest-files")
def faiss_exhaustive(work: Work, data: Data) -> Job:
    """Exact search of what is iterated over, one file at a time."""
    faiss: Any = import_module("faiss")
    search = import_module("faiss.contrib.exhaustive_search").knn_ground_truth
    files, queries = sorted(data.folder(work.data).glob("*.npy")), random_queries(work)
    return lambda: answer(search(queries, map(np.load, files), NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)[0])


@contends(PASS, "nearest-one")
def one_pass(work: Work, data: Data) -> Job:
    """Read all batches, and do nothing with them."""
    reader = open_reader(OURS, work, data)

    def job() -> dict[str, float]:
        for _ in reader(BLOCK_ROWS, **options(work)):
            pass
        return {}

    return job
