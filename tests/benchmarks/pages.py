"""Contenders at parquet files: what decompression alone takes, sums of lazy arrays, few rows, and remote files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import (
    Answer,
    Job,
    Vectors,
    contends,
    import_dask,
    in_threads,
    open_reader,
    options,
    our_array,
    pages,
    repeated,
)
from .data import DIMENSION, PAGES_PROBES, Data
from .floors import CAT_FILE, DASK_PARQUET, OURS, RAW, READ_TABLE
from .remote import IN_FLIGHT, address
from .works import Work

BLOCK_NBYTES = 2**20

_RANGE_NBYTES = 8 * 2**20
"""What is fetched at a time, by this library too."""


@contends(OURS, "parquet-sum")
def our_sum(work: Work, data: Data) -> Job:
    """Reduce the lazy array to a number."""
    x = our_array(work, data)
    return lambda: {"sum": float(x.sum(dtype=np.float64).compute())}


@contends(DASK_PARQUET, "parquet-sum")
def dask_sum(work: Work, data: Data) -> Job:
    """The same from a frame of lists."""
    import_dask()
    frame = import_module("dask.dataframe").read_parquet(str(data.folder(work.data)), columns=["embedding"])
    sums = frame.to_delayed()
    delayed = import_module("dask").delayed(lambda part: np.stack(part["embedding"].to_numpy()).sum(dtype=np.float64))
    total = import_module("dask").delayed(sum)([delayed(part) for part in sums])
    return lambda: {"sum": float(total.compute())}


def starts(data: Data) -> list[int]:
    """Where the few rows that are looked at begin."""
    picks: list[int] = np.random.default_rng(7).integers(0, data.rows - 10, PAGES_PROBES).tolist()
    return picks


def read_nbytes() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@contends(OURS, "parquet-rows-*")
def our_rows(work: Work, data: Data) -> Job:
    """Ten rows at a time through the call."""
    reader = open_reader("dask_embedding_reader", work, data)

    def rows(start: int) -> tuple[float, int]:
        before = read_nbytes()
        embeddings, _ = next(reader(10, start=start, end=start + 10, **options(work)))
        return float(embeddings.sum(dtype=np.float64)), read_nbytes() - before

    rows(0)  # imports what is imported when it is first needed

    def job() -> Answer:
        sums, nbytes = zip(*map(rows, starts(data)), strict=True)
        return {"sum": sum(sums), "read_nbytes": max(nbytes)}

    return job


@contends("pyarrow.parquet", "parquet-rows-*")
def pyarrow_rows(work: Work, data: Data) -> Job:
    """Decode the row group, and slice it."""
    file = import_module("pyarrow.parquet").ParquetFile(data.files(work.data)[0])

    def rows(start: int) -> float:
        table = file.read_row_group(0, columns=["embedding"]).slice(start, 10)
        return float(table.column(0).combine_chunks().flatten().to_numpy().sum(dtype=np.float64))

    def job() -> Answer:
        return {"sum": sum(map(rows, starts(data)))}

    return job


# What reading costs where nothing but decompression is done


def chunk_pages(path: Path) -> Iterator[tuple[Any, int, int, int]]:
    """Yield the codec of each page of vectors, where it begins, its size, and what that is decompressed."""
    page_headers = import_module("dask_embedding_reader.formats.parquet.page_headers")
    metadata = import_module("pyarrow.parquet").read_metadata(path)
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(0)
            position = chunk.dictionary_page_offset or chunk.data_page_offset
            stop = position + chunk.total_compressed_size
            while position < stop:
                file.seek(position)
                page, nbytes = page_headers.page_header(file.read(2**13))
                levels = sum(page.levels or ())
                body = position + nbytes
                yield (
                    chunk.compression if page.is_compressed else "UNCOMPRESSED",
                    body + levels,
                    page.nbytes - levels,
                    page.plain_nbytes - levels,
                )
                position = body + page.nbytes


@contends(RAW, *pages("*"))
def raw_pass(work: Work, data: Data) -> Job:
    """Read all pages of vectors, decompress them, a file a thread, and do nothing with them."""
    arrow = import_module("pyarrow")
    found = {path: list(chunk_pages(path)) for path in data.files(work.data)}

    def read(path: Path) -> int:
        names = {name for name, *_ in found[path]} - {"UNCOMPRESSED"}
        codecs = {name: arrow.Codec(name.lower()) for name in names}
        memory = memoryview(bytearray(max(size for _, _, size, _ in found[path])))
        with path.open("rb", buffering=0) as file:
            for name, position, size, plain in found[path]:
                file.seek(position)
                file.readinto(memory[:size])
                if name in codecs:
                    codecs[name].decompress(memory[:size], plain)
        return data.rows

    return repeated(work, lambda: {"rows": sum(in_threads(read, data, work.data))})


# Remote files


@contends(READ_TABLE, "remote-parquet-s3", "remote-parquet-http")
def read_table_pass(work: Work, data: Data) -> Job:
    """Each file by one call, many at once, through fsspec."""
    parquet = import_module("pyarrow.parquet")
    filesystem, path = import_module("fsspec.core").url_to_fs(address(work))
    names = [name for name in filesystem.find(path) if name.endswith(".parquet")]

    def read(name: str) -> Vectors:
        with filesystem.open(name) as file:
            table = parquet.read_table(file, columns=["embedding"], use_threads=False)
        vectors: Vectors = table.column(0).combine_chunks().flatten().to_numpy().reshape(-1, DIMENSION)
        return vectors

    def job() -> Answer:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return {"rows": sum(map(len, pool.map(read, names)))}

    return job


@contends(CAT_FILE, "remote-parquet-*")
def bare_ranges(work: Work, data: Data) -> Job:
    """All bytes of the files in ranges, many at once, dropped on arrival: what the link can do."""
    filesystem, path = import_module("fsspec.core").url_to_fs(address(work))
    infos = filesystem.find(path, detail=True)
    sizes = {name: info["size"] or filesystem.size(name) for name, info in infos.items()}
    filesystem.cat_file(next(iter(sizes)), start=0, end=1)
    ranges = [(name, start) for name, size in sizes.items() for start in range(0, size, _RANGE_NBYTES)]

    def read(name: str, start: int) -> int:
        return len(filesystem.cat_file(name, start=start, end=min(start + _RANGE_NBYTES, sizes[name])))

    def job() -> Answer:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return {"nbytes": sum(pool.map(read, *zip(*ranges, strict=True)))}

    return job
