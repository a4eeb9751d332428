"""Exact nearest neighbours, against sorting everything by float64 scores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import ArgumentError, ArgumentTypeError, EmbeddingReader, FileChangedError, nearest
from dask_embedding_reader._common import progress
from dask_embedding_reader.search import blas, blocks, searcher, waiting
from dask_embedding_reader.search import nearest as searching
from dask_embedding_reader.search.blas import SINGLE_THREADED
from dask_embedding_reader.search.queries import prepare
from dask_embedding_reader.search.searcher import Searcher

Array = npt.NDArray[Any]
METRICS = ("cosine", "ip", "l2")


def sort_all(vectors: Array, queries: Array, k: int, metric: str) -> tuple[Array, Array]:
    """Score every pair in float64, and sort: by float32 scores, then by rows."""
    # Scores that float32 cannot hold are the largest that it holds.
    x, q = vectors.astype(np.float64), queries.astype(np.float32).astype(np.float64)
    pairs = (x[:, None] * q).sum(axis=2)
    if metric == "cosine":
        pairs /= np.sqrt((x * x).sum(axis=1))[:, None] * np.sqrt((q * q).sum(axis=1))
    elif metric == "l2":
        pairs = ((x[:, None] - q) ** 2).sum(axis=2)
    largest = np.finfo(np.float32).max
    scores = pairs.clip(-largest, largest).astype(np.float32).T
    keys = scores if metric == "l2" else -scores
    order = np.argsort(keys, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def random_vectors(rows: int, dimension: int, dtype: str = "float32", seed: int = 0) -> Array:
    """Vectors of which many are equal, none of length 0."""
    vectors = (np.random.default_rng(seed).standard_normal((rows, dimension)) * 20).astype(dtype)
    vectors[rows // 2 :] = vectors[: rows - rows // 2]
    vectors[~vectors.any(axis=1)] = 1
    return vectors


PEAK_PROGRAM = """
import sys
import numpy as np
from dask_embedding_reader import nearest

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))

wanted, k = map(int, sys.argv[1:])
vectors = np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32)
queries = np.random.default_rng(1).standard_normal((wanted, 64), dtype=np.float32)
nearest(vectors[:200], queries[:5], k=3)  # imports, threads, and the buffers of BLAS
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
nearest(vectors, queries, k=k)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is measured the Linux way")
@pytest.mark.parametrize(
    ("queries", "k", "each_thread"), [(1_000, 10, 18e6), (1_000, 100, 35e6), (10_000, 100, 35e6)]
)  # 20 with longer vectors
def test_memory_grows_by_no_more_than_the_docstring_says(queries: int, k: int, each_thread: float) -> None:
    program = [sys.executable, "-c", PEAK_PROGRAM, str(queries), str(k)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=True)
    threads = os.cpu_count() or 1
    assert int(done.stdout) < 12 * queries * (64 + k) + each_thread * threads


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "float64", "int32"])
def test_rows_and_scores_are_those_of_sorting_all(dtype: str, metric: Any) -> None:
    vectors, queries = random_vectors(3_000, 17, dtype), random_vectors(9, 17, seed=1)
    scores, rows = nearest(vectors, queries, 25, metric=metric)
    expected_scores, expected_rows = sort_all(vectors, queries, 25, metric)
    assert [scores.dtype, rows.dtype] == [np.dtype(np.float32), np.dtype(np.int64)]
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=3e-7, atol=1e-30)


@given(data=st.data(), metric=st.sampled_from(METRICS))
def test_blocks_and_chunks_change_nothing(data: st.DataObject, metric: Any) -> None:
    # Small integers: many scores are equal.
    rows, dimension = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    items = st.lists(st.integers(-2, 2), min_size=dimension, max_size=dimension).filter(any)
    vectors = np.array([data.draw(items) for _ in range(rows)], np.float32)
    queries = np.array([data.draw(items) for _ in range(data.draw(st.integers(1, 5)))], np.float32)
    k = data.draw(st.integers(1, 70))
    expected_scores, expected_rows = sort_all(vectors, queries, k, metric)
    chunked = da.from_array(vectors, chunks=(data.draw(st.integers(1, rows)), 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_VECTORS_NBYTES", 1)
        at_once = data.draw(st.integers(1, 5))
        patch.setattr(blocks, "QUERIES_AT_ONCE", at_once)
        patch.setattr(searcher, "QUERIES_AT_ONCE", at_once)
        patch.setattr(blocks, "_LEAST_BLOCK_ROWS", data.draw(st.integers(1, 8)))
        patch.setattr(searching, "_THREADS", 3)
        for source in (vectors, chunked):
            scores, found = nearest(source, queries, k, metric=metric)
            np.testing.assert_array_equal(found, expected_rows)
            np.testing.assert_allclose(scores, expected_scores, rtol=2e-7, atol=1e-7)


@given(data=st.data(), metric=st.sampled_from(METRICS))
def test_what_waits_to_be_scored_changes_nothing(data: st.DataObject, metric: Any) -> None:
    # Few directions, steps about those of float32, some rows equal, short or NaN.
    dtype = data.draw(st.sampled_from(["float64", "float32", "float16", "int8"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count, k = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 20))
    step = data.draw(st.sampled_from([1e-12, 1e-8, 6e-8, 1e-3]))
    vectors = rng.integers(1, 3, (count, 1)) * (1 + step * rng.integers(0, 5, (count, 6)))
    vectors[rng.random(count) < 0.1] *= rng.choice([0, 1e-3, -1, 50])
    vectors = vectors.astype(dtype)
    if vectors.dtype.kind == "f":
        vectors[rng.random(count) < 0.1] = np.nan
    queries = rng.standard_normal((data.draw(st.integers(1, 5)), 6))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        patch.setattr(waiting, "_MOST_PAIRS", 0)
        expected = nearest(vectors, queries, k, metric=metric)
        ranked = np.isfinite(vectors).all(axis=1) & (vectors.any(axis=1) | (metric != "cosine"))
        patch.setattr(waiting, "_MOST_PAIRS", data.draw(st.sampled_from([3, 50, 10_000])))
        patch.setattr(blocks, "_VECTORS_NBYTES", 1)
        patch.setattr(blocks, "_LEAST_BLOCK_ROWS", data.draw(st.integers(1, 80)))
        scores, rows = nearest(vectors, queries, k, metric=metric)
        everything = nearest(vectors, queries, count, metric=metric)
    for got, wanted, whole in zip((scores, rows), expected, everything, strict=True):
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(got, np.asarray(whole)[:, :k])
    assert np.isfinite(scores).sum(axis=1).tolist() == [min(k, int(ranked.sum()))] * len(queries)


def test_float64_scores_that_float32_rounds_to_one_are_ordered_by_row() -> None:
    near = np.c_[1 + np.arange(200) * 1e-12, np.zeros(200)]
    vectors = np.concatenate([near, near - 1e-3])
    assert nearest(vectors, [1, 0], 3, metric="ip")[1].tolist() == [0, 1, 2]


def test_what_a_thread_has_found_in_later_rows_keeps_out_no_earlier_one_that_rounds_to_the_same() -> None:
    vectors = np.array([[1 - 1e-9], [1]])
    queries = prepare(np.ones((1, 1)), "ip", 1)
    searcher = Searcher(queries, np.dtype("float64"))
    searcher.search(vectors[1:], 1, deque([0]))
    assert searcher.best.rows.tolist() == [[1]]
    searcher.search(vectors[:1], 0, deque([0]))
    assert searcher.best.rows.tolist() == [[0]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_reader_is_searched_as_it_is_read(tmp_path: Path, dtype: str) -> None:
    vectors = random_vectors(1_000, 8, dtype)
    for shard, part in enumerate(np.split(vectors, [300, 301])):
        np.save(tmp_path / f"{shard}.npy", part)
    scores, rows = nearest(EmbeddingReader(tmp_path), vectors[7].astype(np.float32), 3, metric="l2")
    assert (rows.shape, rows[0], scores[0], rows[1], scores[1]) == ((3,), 7, 0, 507, 0)
    np.testing.assert_array_equal(rows, nearest(vectors, vectors[7].astype(np.float32), 3, metric="l2")[1])


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_it_shows_how_far_it_is(
    tmp_path: Path, queries: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    vectors = random_vectors(5_000, 8)
    for shard, part in enumerate(np.split(vectors, [300, 301])):
        np.save(tmp_path / f"{shard}.npy", part)
    for source in (EmbeddingReader(tmp_path), vectors, EmbeddingReader(tmp_path).take(np.arange(4_999, -1, -1))):
        nearest(source, vectors[:queries], 3)
        assert capsys.readouterr().err == ""
        nearest(source, vectors[:queries], 3, show_progress=True)
        assert "searching: 5,000 of 5,000 embeddings (100%)" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "float64"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("asking", [2, 3])
def test_threads_that_read_and_search_find_the_same(tmp_path: Path, dtype: str, metric: Any, asking: int) -> None:
    vectors = random_vectors(900, 6, dtype)
    vectors[700] = 0
    if vectors.dtype.kind == "f":
        vectors[[5, 450]] = np.nan
    for shard, part in enumerate(np.split(vectors, [300, 301, 640])):
        np.save(tmp_path / f"{shard}.npy", part)
    reader = EmbeddingReader(tmp_path)
    queries = random_vectors(asking, 6, seed=1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr(searching, "_PIECE_NBYTES", 7 * 6 * 4)
        for view, rows in ((reader, vectors), (reader.take(slice(100, 800)), vectors[100:800])):
            for got, wanted in zip(
                nearest(view, queries, 30, metric=metric), nearest(rows, queries, 30, metric=metric), strict=True
            ):
                np.testing.assert_array_equal(got, wanted)
    told = [str(each.message) for each in warned]
    assert told[::2] == told[1::2]


def blas_threads() -> list[int]:
    """Those of numpy's BLAS: faiss and scipy bring their own, of which some count for each thread by itself."""
    found = [each["num_threads"] for each in blas._blas().info() if "numpy" in each["filepath"]]
    assert found
    return found


def test_blas_has_one_thread_for_each_of_ours_and_all_of_its_own_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    at_work = threading.Barrier(3)

    def look(self: Any, rows: Array, *given: Any, **options: Any) -> Any:
        seen.extend(blas_threads())
        at_work.wait(60)
        if not rows.any():
            raise ValueError("nothing but zeros")
        return search(self, rows, *given, **options)

    search = Searcher.search
    monkeypatch.setattr(Searcher, "search", look)
    monkeypatch.setattr(searching, "_THREADS", 1)
    vectors = random_vectors(50, 4)
    before = blas_threads()
    with ThreadPoolExecutor(3) as pool:
        *found, failed = [
            pool.submit(nearest, given, vectors[:3], metric="ip") for given in (vectors, vectors, vectors * 0)
        ]
        assert [len(each.result()[0]) for each in found] == [3, 3]
        assert isinstance(failed.exception(), ValueError)
    assert blas_threads() == before
    assert set(seen) <= {1}


def test_blas_has_its_threads_back_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    before = blas_threads()
    entered: list[bool] = []

    def interrupted(self: Future[Any], timeout: float | None = None) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)  # as the limit is set
    with pytest.raises(KeyboardInterrupt), SINGLE_THREADED:
        entered.append(True)
    assert not entered
    assert blas_threads() == before


def test_what_goes_wrong_in_a_thread_that_searches_ends_all(tmp_path: Path) -> None:
    for shard in range(3):
        np.save(tmp_path / f"{shard}.npy", random_vectors(50, 4))
    reader = EmbeddingReader(tmp_path)
    np.save(tmp_path / "1.npy", random_vectors(51, 4))
    with pytest.raises(FileChangedError, match=r"1\.npy"):
        nearest(reader, np.ones(4))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embedding-reader")]


@pytest.mark.parametrize("metric", METRICS)
def test_a_cluster_finds_the_same(tmp_path: Path, metric: Any) -> None:
    vectors, queries = random_vectors(2_000, 8), random_vectors(5, 8, seed=1)
    vectors[1_500] = np.nan
    np.save(tmp_path / "0.npy", vectors)
    reader = EmbeddingReader(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = nearest(vectors, queries, 7, metric=metric)
        with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0"):
            for source in (da.from_array(vectors, chunks=(90, 3)), reader):
                for got, wanted in zip(nearest(source, queries, 7, metric=metric), expected, strict=True):
                    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_that_cannot_be_compared_come_last_and_are_counted(metric: Any) -> None:
    vectors = np.array([[np.nan, 1], [1, 1], [0, 0], [np.inf, 0], [2, 2], [0, -np.inf]], np.float32)
    unranked = [0, 3, 5] if metric != "cosine" else [0, 2, 3, 5]
    with pytest.warns(UserWarning, match=rf"{len(unranked)} of 6 rows hold NaN or infinity.*such as row 0"):
        scores, rows = nearest(vectors, [1, 1], 6, metric=metric)
    assert rows[-len(unranked) :].tolist() == unranked
    assert np.isnan(scores[-len(unranked) :]).all()
    assert np.isfinite(scores[: -len(unranked)]).all()
    with pytest.warns(UserWarning, match="rows hold NaN"):
        assert nearest(vectors, [[1, 1], [2, 2]], 1, metric=metric)[1].tolist() in ([[1], [4]], [[4], [4]], [[1], [1]])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_items_whose_squares_float32_cannot_hold(metric: Any, scale: float) -> None:
    vectors = (random_vectors(400, 6) * scale / 20).astype(np.float32)
    queries = (random_vectors(4, 6, seed=1) * scale).astype(np.float32) if metric != "ip" else random_vectors(4, 6)
    with np.errstate(all="ignore"):
        expected = sort_all(vectors, queries, 5, metric)[1]
    np.testing.assert_array_equal(nearest(vectors, queries, 5, metric=metric)[1], expected)


def test_float64_is_compared_in_float64() -> None:
    vectors = np.array([[1.0, 0], [1 + 1e-12, 0]])
    assert nearest(vectors, [1 + 1e-12, 0], 1, metric="l2")[1].tolist() == [1]


def test_nothing_is_ranked_by_how_a_block_rounds() -> None:
    # Products of BLAS differ in their last digits by where in a block a row lies.
    vectors = np.repeat(random_vectors(4, 300), 500, axis=0)
    assert nearest(vectors, vectors[600], 3)[1].tolist() == [500, 501, 502]


@pytest.mark.parametrize(
    ("source", "queries", "options", "kind", "message"),
    [
        (np.ones((3, 2)), np.ones(3), {}, ArgumentError, r"queries have the shape \(3,\).*2 items"),
        (np.ones((3, 2)), np.ones((1, 1, 2)), {}, ArgumentError, "queries have the shape"),
        (np.ones((3, 2)), ["a", "b"], {}, ArgumentTypeError, "queries hold"),
        (
            np.ones((3, 2)),
            Path("notebooks/sample/queries"),
            {},
            ArgumentTypeError,
            r"not a reader; .*to_dask_array\(\)",
        ),
        (np.ones((3, 2)), [[1, 1], [1, np.nan]], {}, ArgumentError, "query 1 holds NaN"),
        (np.ones((3, 2), np.float32), [1e300, 1], {}, ArgumentError, "query 0 holds .* what float32 cannot hold"),
        (np.ones((3, 2)), [0, 0], {}, ArgumentError, "query 0 is of length 0"),
        (np.ones((3, 2)), [[1, 1], [1e154, 1e154]], {"metric": "l2"}, ArgumentError, "query 1 is longer than 1e154"),
        (np.ones((3, 2)), [1e200, 0], {"metric": "ip"}, ArgumentError, "its square is infinite; scale queries"),
        (np.ones((3, 2)), [1, 1], {"k": 0}, ArgumentError, "k must be at least 1"),
        (np.ones((3, 2)), [1, 1], {"metric": "dot"}, ArgumentError, "metric='dot' is none of 'cosine', 'ip', 'l2'"),
        (np.ones(3), [1, 1], {}, ArgumentError, "two axes"),
        (np.ones((3, 2), complex), [1, 1], {}, ArgumentError, "source holds complex128"),
        ([[1, 2]], [1, 1], {}, ArgumentTypeError, "source must be an EmbeddingReader"),
        ("some/folder", [1, 1], {}, ArgumentTypeError, r"EmbeddingReader\('some/folder'\) opens what it names"),
        (da.ones((3, 2))[da.ones(3) > 0], [1, 1], {}, ArgumentError, "compute_chunk_sizes"),
    ],
)
def test_bad_input(source: Any, queries: Any, options: Any, kind: type[Exception], message: str) -> None:
    queries = EmbeddingReader(queries) if isinstance(queries, Path) else queries
    with pytest.raises(kind, match=message):
        nearest(source, queries, **options)


def test_no_queries_and_fewer_rows_than_asked_for() -> None:
    assert nearest(np.ones((3, 2)), np.ones((0, 2)), 2)[1].shape == (0, 2)
    assert nearest(np.ones((3, 2)), [1, 1], 10)[1].tolist() == [0, 1, 2]


def test_queries_are_sent_once_and_not_with_each_task() -> None:
    queries = prepare(np.ones((100, 2), np.float32), "ip", 3)
    with dask.config.set(scheduler="synchronous"):
        found = searching._search_chunks(da.ones((60, 2), chunks=(2, 2)), queries, np.dtype("float32"))
    assert found.rows[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e30])
def test_cosines_are_told_apart_in_float64_also_of_vectors_whose_squares_float32_cannot_hold(scale: float) -> None:
    """Products in float64 are bounded as such: factors that are rounded to float32 are 1e-8 off, hundreds of rows."""
    rng = np.random.default_rng(0)
    for query in rng.standard_normal((6, 2)).astype(np.float32):
        along = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
        across = np.array([-along[1], along[0]]) * rng.choice([-1, 1], (2_000, 1))
        vectors = (rng.uniform(0, 1e-7, (2_000, 1)) * along + across) * scale
        vectors = (vectors * rng.uniform(0.5, 2, (2_000, 1))).astype(np.float32)
        wide = vectors.astype(np.float64)
        cosines = (wide @ along / np.sqrt((wide * wide).sum(axis=1))).astype(np.float32)
        assert nearest(vectors, query, k=5)[1].tolist() == np.argsort(-cosines, kind="stable")[:5].tolist()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_no_row_is_lost_where_twice_a_query_is_more_than_float32_holds(metric: Any) -> None:
    vectors = np.array([[3e38, -1e38], [0, 1], [2e38, 2e38], [np.nan, 0], [-3e38, 3e38]], np.float32)
    with pytest.warns(UserWarning, match="1 of 5 rows hold NaN"):
        scores, rows = nearest(vectors, vectors[2], k=5, metric=metric)
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    assert rows[-1] == 3
    if metric == "l2":
        assert (rows.tolist(), scores[0]) == ([2, 0, 1, 4, 3], 0)
