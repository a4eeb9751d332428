"""The contenders at rows that are picked, filtered and shuffled: Lance, Dask alone, and our own passes in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from .contenders import Answer, Job, Vectors, consume, contends, data_offset, import_dask, import_libraries
from .data import PICKED_DIMENSION, PICKED_FILES, SPARSE_ROWS, Data
from .floors import DASK_ALONE, EVERYTHING, IN_ORDER, LANCE, OURS
from .remote import IN_FLIGHT, address, is_remote
from .works import FILTERED, SHARD, SHARDS, STEP, Work

Taking = Callable[[npt.NDArray[np.int64]], Vectors]


def open_reader(work: Work, data: Data) -> Any:
    """Open the vectors of a work, with the metadata beside them."""
    import_libraries(work)
    reader = import_module("dask_embedding_reader").EmbeddingReader
    if is_remote(work):
        return reader(address(work))
    vectors, *beside = (str(data.folder(part)) for part in work.data.split("+") if not part.endswith("-lance"))
    pairs = {"file_format": work.source.file_format, "metadata_folder": beside[0] if beside else None}
    return reader(vectors, meta_columns=list(work.source.meta_columns) or None, **pairs)


def open_lance(data: Data) -> Any:
    """Open the same rows as Lance has them."""
    return import_module("lance").dataset(str(data.folder("rows-lance") / "dataset"))


def unpacked(embeddings: Any) -> Vectors:
    """The vectors of a column of Arrow, where they lie."""
    chunks = embeddings.chunks if hasattr(embeddings, "chunks") else [embeddings]
    parts = [chunk.flatten().to_numpy().reshape(-1, PICKED_DIMENSION) for chunk in chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Random rows


def stored(data: Data, row: int) -> Vectors:
    """One row, as it lies in its file."""
    path = data.folder("rows") / f"{row // data.rows:04}.npy"
    skipped = data_offset(path) + row % data.rows * 4 * PICKED_DIMENSION
    return np.fromfile(path, np.float32, PICKED_DIMENSION, offset=skipped)


def taking(work: Work, data: Data, take: Taking) -> Job:
    """Take other rows each time. The first ones are compared with the files, and not timed."""
    rng, count = np.random.default_rng(work.batch_size), PICKED_FILES * data.rows
    picks = [rng.choice(count, min(work.batch_size, count), replace=False) for _ in range(work.repeats + 1)]
    np.testing.assert_array_equal(take(picks[0]), np.stack([stored(data, row) for row in picks[0].tolist()]))

    def job() -> Answer:
        return {"sum": float(sum(take(rows)[:, 0].sum(dtype=np.float64) for rows in picks[1:]))}

    return job


@contends(OURS, "rows-take-*", "rows-pairs-*")
def our_taking(work: Work, data: Data) -> Job:
    """One batch of all the rows."""
    reader = open_reader(work, data)
    return taking(work, data, lambda rows: next(reader.take(rows)(len(rows)))[0])


@contends(OURS, "rows-lazy-*")
def our_lazy_taking(work: Work, data: Data) -> Job:
    """An array of all the rows."""
    import_dask()
    reader = open_reader(work, data)
    return taking(work, data, lambda rows: reader.take(rows).to_dask_array().compute())


@contends(LANCE, "rows-take-*", "rows-lazy-*", "rows-pairs-*")
def lance_taking(work: Work, data: Data) -> Job:
    """A table of all the rows."""
    dataset = open_lance(data)
    columns = None if work.name.startswith("rows-pairs") else ["embedding"]
    return taking(work, data, lambda rows: unpacked(dataset.take(rows, columns=columns)["embedding"]))


@contends(DASK_ALONE, "rows-lazy-*")
def dask_alone_taking(work: Work, data: Data) -> Job:
    """Arrays of the same chunks that read nothing."""
    array = import_dask()
    reader = open_reader(work, data)
    rows = np.random.default_rng(0).choice(PICKED_FILES * data.rows, work.batch_size)
    chunks = reader.take(rows).to_dask_array().chunks

    def job() -> Answer:
        for _ in range(work.repeats):
            array.ones((work.batch_size, PICKED_DIMENSION), chunks=chunks, dtype=np.float32).compute()
        return {}

    return job


# ---------------------------------------------------------------------------------------------------------------------
# Rows that a condition holds for


def adding(batches: Iterable[Vectors]) -> Answer:
    """Take every batch, and tell which rows came in which order."""
    rows, total, order = 0, 0.0, 0.0
    for embeddings in batches:
        first = embeddings[:, 0].astype(np.float64)
        total += float(first.sum())
        order += float(first @ np.arange(rows, rows + len(first)))
        rows += len(first)
    return {"rows": rows, "sum": total, "order": order}


def limit_of(work: Work) -> int:
    """What the column ``share`` has to be below."""
    return FILTERED[work.name.removeprefix("rows-filter-")]


@contends(OURS, "rows-filter-*")
def our_filter(work: Work, data: Data) -> Job:
    """Filter, and take every batch."""
    reader, limit = open_reader(work, data), limit_of(work)

    def batches() -> Iterator[Vectors]:
        for embeddings, _ in reader.filter([("share", "<", limit)])(work.batch_size, show_progress=False):
            yield embeddings

    return lambda: adding(batches())


@contends(LANCE, "rows-filter-*")
def lance_filter(work: Work, data: Data) -> Job:
    """Have the scanner do it."""
    dataset, limit = open_lance(data), limit_of(work)

    def batches() -> Iterator[Vectors]:
        scanner = dataset.scanner(filter=f"share < {limit}", columns=["embedding"], batch_size=work.batch_size)
        for batch in scanner.to_batches():
            yield unpacked(batch.column("embedding"))

    return lambda: adding(batches())


@contends(EVERYTHING, "rows-filter-*")
def no_filter(work: Work, data: Data) -> Job:
    """Take every batch of all rows."""
    reader = open_reader(work, data)
    return lambda: {"all": adding(x for x, _ in reader(work.batch_size, show_progress=False))["rows"]}


# ---------------------------------------------------------------------------------------------------------------------
# Epochs


def passing(work: Work, reader: Any) -> Job:
    """Every batch."""
    options = {"parallel_pieces": IN_FLIGHT} if is_remote(work) else {}
    return lambda: {"rows": consume(reader(work.batch_size, show_progress=False, **options))["rows"]}


@contends(OURS, "rows-shuffle-*", "rows-remote-*")
def shuffled_pass(work: Work, data: Data) -> Job:
    """All rows in another order."""
    return passing(work, open_reader(work, data).shuffle(1))


@contends(IN_ORDER, "rows-shuffle-*", "rows-remote-*")
def ordered_pass(work: Work, data: Data) -> Job:
    """All rows as they lie in the files."""
    return passing(work, open_reader(work, data))


def reducing(reader: Any) -> Job:
    """The largest of all items, as Dask finds it."""
    return lambda: {"max": float(reader.to_dask_array().max().compute())}


@contends(OURS, "rows-array-*")
def array_in_another_order(work: Work, data: Data) -> Job:
    """All rows in another order."""
    import_dask()
    reader = open_reader(work, data)
    return reducing(reader.shuffle(1) if work.name.endswith("shuffled") else reader.take(slice(None, None, -1)))


@contends(IN_ORDER, "rows-array-*")
def array_in_order(work: Work, data: Data) -> Job:
    """All rows as they lie in the files."""
    import_dask()
    return reducing(open_reader(work, data))


# ---------------------------------------------------------------------------------------------------------------------
# Billions of rows


@contends(OURS, "rows-scale-take")
def take_of_billions(work: Work, data: Data) -> Job:
    """Ten rows of an array of hundreds of thousands of chunks."""
    import_dask()
    reader = open_reader(work, data)
    rng = np.random.default_rng(0)
    picks = cycle([rng.integers(0, reader.count, 10) for _ in range(work.repeats)])
    chunks = reader.to_dask_array().numblocks[0]

    def job() -> Answer:
        taken = [reader.take(next(picks)).to_dask_array().compute() for _ in range(work.repeats)]
        return {"chunks": chunks, "rows": sum(map(len, taken))}

    return job


@contends(OURS, "rows-scale-shuffle")
def shuffle_of_billions(work: Work, data: Data) -> Job:
    """A shard of an epoch."""
    reader = open_reader(work, data)
    return lambda: {"rows": sum(len(reader.shuffle(seed).shard(SHARDS, SHARD)) for seed in range(work.repeats))}


@contends(OURS, "rows-scale-resume")
def resumed_epoch(work: Work, data: Data) -> Job:
    """The batch that a stopped training goes on with."""
    view = open_reader(work, data).shuffle(1).shard(SHARDS, SHARD)
    start = STEP * work.batch_size
    return lambda: {"rows": len(next(view(work.batch_size, start=start, show_progress=False))[0])}


@contends(OURS, "rows-scale-filter")
def filter_of_billions(work: Work, data: Data) -> Job:
    """The array of what a filter has found."""
    import_dask()
    pick_all = import_module("dask_embedding_reader.rows.picked").pick_all
    reader = open_reader(work, data)
    found = np.flatnonzero(np.random.default_rng(0).random(SPARSE_ROWS) < 0.01)
    view = reader.take(pick_all(found + first for first in range(0, reader.count, SPARSE_ROWS)))

    def job() -> Answer:
        array = view.to_dask_array()
        return {"rows": len(array), "chunks": array.numblocks[0]}

    return job
