"""The contenders: one function for each contender and kind of work.

A contender opens what it needs and returns the job to be timed. Imports happen while opening, so they are not timed,
and an import that fails leaves the contender out with a word. A job returns its answer, by which they are compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .data import DIMENSION, FILES, LARGE_ROWS, Data, probes
from .floors import BY_HAND, DASK_ALONE, DELAYED, OURS, PYARROW, RAW, REFERENCE
from .memory import status
from .works import WORKS, Work

Answer = dict[str, float]
Job = Callable[[], Answer]
Contender = Callable[[Work, Data], Job]
Vectors = npt.NDArray[Any]

REGISTRY: dict[tuple[str, str], Contender] = {}
KEPT: list[Any] = []
"""Iterators left early: to end them takes time, and the reference hangs."""
THREADS = 2
STEP_NBYTES = 4 * 2**20


def contends(contender: str, *patterns: str) -> Callable[[Contender], Contender]:
    """Enter the function for the works whose names match."""

    def enter(function: Contender) -> Contender:
        names = [name for name in WORKS if any(fnmatch(name, pattern) for pattern in patterns)]
        REGISTRY.update({(name, contender): function for name in names})
        return function

    return enter


def pages(kind: str) -> tuple[str, str]:
    """Patterns of the passes over one kind of parquet files, or over all."""
    return f"parquet-{kind}-whole", f"parquet-{kind}-fifths"


def contenders_of(work: Work) -> list[str]:
    """Who does this work."""
    return [contender for name, contender in REGISTRY if name == work.name]


def import_libraries(work: Work) -> None:
    """Import what pandas, pyarrow and fsspec would import at first use: neither time nor growth of the contender."""
    import_module("pyarrow.pandas_compat")
    import_module("fsspec.implementations.local")
    import_module("multiprocessing.dummy")
    if work.source.file_format != "npy":
        import_module("pyarrow.dataset")


def import_dask() -> Any:
    """Import dask.array and what it imports when it first computes."""
    array = import_module("dask.array")
    array.ones(1).sum().compute()
    return array


# The library and the reference: one call surface, so one function for both.


def open_reader(module: str, work: Work, data: Data) -> Any:
    """Open a reader."""
    import_libraries(work)
    vectors, _, metadata = work.data.partition("+")
    return import_module(module).EmbeddingReader(
        str(data.folder(vectors)),
        file_format=work.source.file_format,
        meta_columns=list(work.source.meta_columns) or None,
        metadata_folder=str(data.folder(metadata)) if metadata else None,
        **({"embedding_dtype": "float32"} if "binary" in vectors else {}),
    )


def options(work: Work) -> dict[str, Any]:
    """Arguments of the call that yields batches; defaults are left alone."""
    limit = {} if work.limit is None else {"max_ram_usage_in_bytes": work.limit}
    dtype = {"dtype": None} if work.source.dtype is None else {}
    return {"show_progress": False, **limit, **dtype}


def consume(batches: Iterable[tuple[Vectors, Any]]) -> Answer:
    """Take every batch as a user's loop does, and see that vectors and metadata keep step."""
    rows, check = 0, 0.0
    for embeddings, meta in batches:
        if len(embeddings) != len(meta):
            raise ValueError(f"{len(embeddings)} vectors came with {len(meta)} rows of metadata")
        rows += len(embeddings)
        check += float(embeddings[0, 0]) + float(embeddings[-1, -1])
    return {"rows": rows, "check": check}


def whole_pass(module: str, work: Work, data: Data) -> Job:
    """Every batch of the collection."""
    reader = open_reader(module, work, data)
    return repeated(work, lambda: consume(reader(work.batch_size, **options(work))))


def repeated(work: Work, job: Job) -> Job:
    """Do it as often as one run does the work."""
    return lambda: [job() for _ in range(work.repeats)][-1]


def first_batch(module: str, work: Work, data: Data) -> Job:
    """The first batch of an opened reader."""
    reader = open_reader(module, work, data)

    def job() -> Answer:
        KEPT.append(reader(work.batch_size, **options(work)))
        embeddings, _ = next(KEPT[0])
        return {"sum": float(embeddings.sum())}

    return job


def opening(module: str, work: Work, data: Data) -> Job:
    """Open the reader and know the number of rows."""
    import_libraries(work)
    assert import_module(module).EmbeddingReader  # imports what is behind the name
    return lambda: {"rows": float(open_reader(module, work, data).count)}


def rows_by_call(module: str, work: Work, data: Data) -> Job:
    """Look rows up one at a time through the call."""
    reader = open_reader(module, work, data)

    def row(number: int) -> float:
        embeddings, _ = next(reader(1, start=number, end=number + 1, **options(work)))
        return float(embeddings[0, -1])

    return lambda: {"sum": sum(map(row, probes()))}


@contends(OURS, "npy-*", "parquet", "parquet-npy", *pages("*"), "memory-*")
def our_pass(work: Work, data: Data) -> Job:
    """Every batch."""
    return whole_pass("dask_embedding_reader", work, data)


@contends(REFERENCE, "npy-f32-*", "npy-f16-to-f32", "parquet", "parquet-npy", "parquet-default-*")
def reference_pass(work: Work, data: Data) -> Job:
    """Every batch."""
    return whole_pass("embedding_reader", work, data)


@contends(OURS, "first-*")
def our_first_batch(work: Work, data: Data) -> Job:
    """The first batch."""
    return first_batch("dask_embedding_reader", work, data)


@contends(REFERENCE, "first-*")
def reference_first_batch(work: Work, data: Data) -> Job:
    """The first batch."""
    return first_batch("embedding_reader", work, data)


@contends(OURS, "open-10000")
def our_opening(work: Work, data: Data) -> Job:
    """Open many files."""
    return opening("dask_embedding_reader", work, data)


@contends(REFERENCE, "open-10000")
def reference_opening(work: Work, data: Data) -> Job:
    """Open many files."""
    return opening("embedding_reader", work, data)


@contends(OURS, "row")
def our_rows(work: Work, data: Data) -> Job:
    """Look rows up."""
    return rows_by_call("dask_embedding_reader", work, data)


@contends(REFERENCE, "row")
def reference_rows(work: Work, data: Data) -> Job:
    """Look rows up."""
    return rows_by_call("embedding_reader", work, data)


@contends(OURS, "row-lazy")
def our_lazy_rows(work: Work, data: Data) -> Job:
    """Look rows up in the lazy array."""
    x = our_array(work, data)
    return lambda: {"sum": sum(float(x[row].compute()[-1]) for row in probes())}


@contends(OURS, "sum")
def our_sum(work: Work, data: Data) -> Job:
    """Reduce the lazy array to a number."""
    x = our_array(work, data)
    return lambda: {"sum": float(x.sum().compute())}


@contends(OURS, "mean")
def our_mean(work: Work, data: Data) -> Job:
    """Reduce the lazy array to a row."""
    x = our_array(work, data)
    return lambda: {"sum": float(x.mean(axis=0).compute().sum())}


def our_array(work: Work, data: Data) -> Any:
    """The lazy array."""
    import_dask()
    return open_reader("dask_embedding_reader", work, data).to_dask_array()


@contends(OURS, "sparse-*")
def our_long_pass(work: Work, data: Data) -> Job:
    """Every batch, with an eye on how the peak moves after the first gigabyte."""
    reader = open_reader("dask_embedding_reader", work, data)

    def watched(peaks: list[int]) -> Iterator[tuple[Vectors, Any]]:
        seen = 0
        for embeddings, meta in reader(work.batch_size, **options(work)):
            seen += embeddings.nbytes
            if seen > 10**9 and not peaks:
                peaks.append(status("VmHWM"))
            yield embeddings, meta

    def job() -> Answer:
        peaks: list[int] = []
        answer = consume(watched(peaks))
        return {**answer, "late_growth_nbytes": max(0, status("VmHWM") - peaks[0])}

    return job


# pyarrow.dataset


def scan(work: Work, data: Data) -> Iterator[tuple[Vectors, Any]]:
    """Record batches as a careful user takes them: the flat child array reshaped, the metadata converted."""
    dataset = import_module("pyarrow.dataset").dataset(data.folder(work.data))
    columns = ["embedding", *work.source.meta_columns]
    for batch in dataset.to_batches(columns=columns, batch_size=work.batch_size):
        column = batch.column(0)
        if str(column.type).startswith("fixed_size_binary"):
            embeddings = np.frombuffer(column.buffers()[1], np.float32)[column.offset * DIMENSION :]
            embeddings = embeddings[: len(column) * DIMENSION].reshape(-1, DIMENSION)
        else:
            embeddings = column.flatten().to_numpy().reshape(-1, DIMENSION)
        yield embeddings, batch.select(columns[1:]).to_pandas()


@contends(PYARROW, "parquet", *pages("*"))
def pyarrow_pass(work: Work, data: Data) -> Job:
    """Every batch."""
    import_libraries(work)
    return repeated(work, lambda: {"rows": consume(scan(work, data))["rows"]})


# What a user writes by hand


def delayed_array(data: Data, name: str) -> Any:
    """The array that the documentation of dask teaches: one delayed np.load a file."""
    array = import_dask()
    load, shape = import_module("dask").delayed(np.load), (data.rows, DIMENSION)
    blocks = [array.from_delayed(load(path), shape=shape, dtype=np.float32) for path in data.files(name)]
    return array.concatenate(blocks)


@contends(DELAYED, "sum")
def delayed_sum(work: Work, data: Data) -> Job:
    """Reduce to a number."""
    x = delayed_array(data, work.data)
    return lambda: {"sum": float(x.sum().compute())}


@contends(DELAYED, "mean")
def delayed_mean(work: Work, data: Data) -> Job:
    """Reduce to a row."""
    x = delayed_array(data, work.data)
    return lambda: {"sum": float(x.mean(axis=0).compute().sum())}


@contends(DASK_ALONE, "row-lazy")
def dask_alone_rows(work: Work, data: Data) -> Job:
    """Look rows up in an array that reads nothing: what dask itself costs."""
    x = import_dask().ones((LARGE_ROWS, DIMENSION), chunks=(24_000, DIMENSION))

    def job() -> Answer:
        for row in probes():
            x[row].compute()
        return {}

    return job


@contends(BY_HAND, "parquet-npy")
def by_hand_pass(work: Work, data: Data) -> Job:
    """A loop over pairs of files, whose rows happen to be one batch."""
    import_libraries(work)
    read_parquet = import_module("pandas").read_parquet
    vectors, metadata = map(data.files, work.data.split("+"))
    columns = list(work.source.meta_columns)
    pairs = ((np.load(a), read_parquet(b, columns=columns)) for a, b in zip(vectors, metadata, strict=True))
    return lambda: {"rows": consume(pairs)["rows"]}


# The machine's limit


def data_offset(path: Path) -> int:
    """Where the vectors of an npy file begin."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()


def read_into(path: Path, buffer: Vectors) -> None:
    """Fill the buffer from the vectors of the file."""
    with path.open("rb", buffering=0) as file:
        file.seek(data_offset(path))
        view, done = buffer.data.cast("B"), 0
        while done < len(view):
            done += file.readinto(view[done:])


def stream(path: Path, dtype: str, rows: int) -> Iterator[tuple[slice, Vectors]]:
    """The vectors of the file through one reused buffer of a few megabytes, with the rows they are."""
    step = STEP_NBYTES // (DIMENSION * np.dtype(dtype).itemsize)
    buffer = np.empty((step, DIMENSION), dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(data_offset(path))
        for start in range(0, rows, step):
            part = buffer[: min(step, rows - start)]
            file.readinto(part.data.cast("B"))
            yield slice(start, start + len(part)), part


def in_threads(job: Callable[[Path], Any], data: Data, name: str) -> list[Any]:
    """Two threads, a file at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(job, data.files(name)))


@contends(RAW, "npy-f32-*", "npy-f16-kept")
def raw_pass(work: Work, data: Data) -> Job:
    """Read every file into a fresh buffer and let it go."""
    stored = "<f2" if work.source.dtype is None else "<f4"

    def read(path: Path) -> int:
        buffer = np.empty((data.rows, DIMENSION), stored)
        read_into(path, buffer)
        return len(buffer)

    return lambda: {"rows": sum(in_threads(read, data, work.data))}


@contends(RAW, "npy-f16-to-f32")
def raw_cast(work: Work, data: Data) -> Job:
    """Read through a small buffer and cast into a fresh one."""

    def read(path: Path) -> int:
        out = np.empty((data.rows, DIMENSION), np.float32)
        for rows, part in stream(path, "<f2", data.rows):
            out[rows] = part
        return len(out)

    return lambda: {"rows": sum(in_threads(read, data, work.data))}


@contends(RAW, "sum")
def raw_sum(work: Work, data: Data) -> Job:
    """Add up through a small buffer."""

    def add(path: Path) -> float:
        return sum(float(part.sum()) for _, part in stream(path, "<f4", data.rows))

    return lambda: {"sum": sum(in_threads(add, data, work.data))}


@contends(RAW, "mean")
def raw_mean(work: Work, data: Data) -> Job:
    """Add rows up through a small buffer."""

    def add(path: Path) -> Vectors:
        total = np.zeros(DIMENSION)
        for _, part in stream(path, "<f4", data.rows):
            total += part.sum(axis=0)
        return total

    return lambda: {"sum": float(np.sum(in_threads(add, data, work.data))) / (data.rows * FILES)}


@contends(RAW, "first-npy")
def raw_first_batch(work: Work, data: Data) -> Job:
    """Read the first rows of the first file."""

    def job() -> Answer:
        buffer = np.empty((work.batch_size, DIMENSION), np.float32)
        read_into(data.files(work.data)[0], buffer)
        return {"sum": float(buffer.sum())}

    return job


@contends(RAW, "open-10000")
def raw_opening(work: Work, data: Data) -> Job:
    """List the folder and read the first bytes of every file."""

    def header(entry: os.DirEntry[str]) -> int:
        file = os.open(entry.path, os.O_RDONLY)
        try:
            return len(os.pread(file, 128, 0)) > 0
        finally:
            os.close(file)

    return lambda: {"files": sum(map(header, os.scandir(data.folder(work.data))))}


@contends(RAW, "row", "row-lazy")
def raw_rows(work: Work, data: Data) -> Job:
    """Copy rows out of a memory map."""
    x = np.load(data.files(work.data)[0], mmap_mode="r")
    if len(x) != LARGE_ROWS:
        raise ValueError(f"the large file has {len(x)} rows")
    return lambda: {"sum": sum(float(x[row].copy()[-1]) for row in probes())}
