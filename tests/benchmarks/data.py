"""The files that the works read, made once and kept.

Every data set is a folder, written under a temporary name and renamed when it is complete, so an interrupted run leaves
nothing that looks finished.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DIMENSION = 512
FILES = 6
PARQUET_FILES = 10
"""More, as what others hold in memory grows with them."""
PAGES_FILES = 2
"""Of each kind of parquet file; there are many kinds."""
CONVERTED_FILES = 18
"""More than fit in what is read ahead and written at once: how a conversion begins and ends is not how it goes on."""
FORMAT_FILES = 2
MANY, SMALL = 10_000, 5_000
LARGE_ROWS = 4_000_000
SPARSE_ROWS = 2**20
SCALE_FILES = 5_800
PROBES = 50
PICKED_FILES, PICKED_DIMENSION = 10, 256
"""Rows of 1 kB, 1 GB of them."""
PAGES_PROBES = 5
WORDS = [
    "small",
    "large",
    "old",
    "red",
    "blue",
    "wooden",
    "stone",
    "busy",
    "cat",
    "dog",
    "horse",
    "bird",
    "house",
    "in",
]
WORDS += ["street", "river", "table", "beside", "under", "near", "without", "morning", "light", "shadow", "photo", "of"]


@dataclass(frozen=True, slots=True)
class Data:
    """The data sets below one folder."""

    root: Path
    """Folder that holds them all."""
    rows: int = 100_000
    """Rows of each file of the large data sets."""

    def folder(self, name: str) -> Path:
        """Where the data set lies."""
        return self.root / f"{name}-{self.rows}"

    def files(self, name: str) -> list[Path]:
        """The files of the data set, in reading order."""
        return sorted(path for path in self.folder(name).iterdir() if path.is_file())

    def make(self, names: Iterable[str]) -> None:
        """Make the data sets that are not there yet; "a+b" names two of them."""
        missing = sorted({part for name in names for part in name.split("+") if not self.folder(part).exists()})
        self.root.mkdir(parents=True, exist_ok=True)
        need, free = sum(self.disk_nbytes(name) for name in missing), shutil.disk_usage(self.root).free
        if need * 1.1 + 2**30 > free:
            raise SystemExit(f"the data needs {need / 1e9:.1f} GB and a margin, {free / 1e9:.1f} GB are free")
        for name in missing:
            started = time.perf_counter()
            print(f"making {name} in {self.root} ... ", end="", file=sys.stderr, flush=True)
            make_one(self, name)
            print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr)

    def disk_nbytes(self, name: str) -> int:
        """About the room that the data set takes on disk."""
        items = self.rows * DIMENSION
        large = {"npy-f32": 4 * FILES, "npy-f16": 2 * FILES, "parquet": 5 * PARQUET_FILES}
        large |= dict.fromkeys(("rows", "rows-lance"), 4 * PICKED_FILES * PICKED_DIMENSION // DIMENSION)
        large |= dict.fromkeys(("npy-converted", "parquet-converted"), 4 * CONVERTED_FILES)
        large |= dict.fromkeys((name for name in MAKERS if name.startswith("format-")), 4 * FORMAT_FILES)
        large |= {f"pages-{kind}-{share}": 5 * PAGES_FILES for kind in PAGES for share in GROUPS}
        return items * large[name] if name in large else 2**28

    def warm(self, name: str) -> None:
        """Bring the data set into the page cache; sparse files need none of it."""
        for part in name.split("+"):
            if part != "large" and not part.startswith("sparse-"):
                for path in self.folder(part).rglob("*"):
                    if path.is_file():
                        populate(path)


def populate(path: Path) -> None:
    """Fault the whole file in without copying it."""
    with path.open("rb") as file:
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ).close()


def evict(path: Path) -> None:
    """Have the system forget what it holds of a file."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_one(data: Data, name: str) -> None:
    """Make one data set, whole or not at all."""
    final = data.folder(name)
    scratch = final.with_name(final.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    MAKERS[name](scratch, data.rows)
    scratch.rename(final)


def vectors(number: int, rows: int) -> npt.NDArray[np.float32]:
    """The vectors of one file: uniform in [0, 1), which no codec shrinks, like real embeddings."""
    return np.random.default_rng(number).random((rows, DIMENSION), dtype=np.float32)


def sentences(number: int, rows: int) -> list[str]:
    """One caption a row, unique as real captions nearly are."""
    picks = np.random.default_rng([number, 1]).integers(0, len(WORDS), (rows, 9)).tolist()
    return [" ".join([*map(WORDS.__getitem__, pick), str(row)]) for row, pick in enumerate(picks)]


def urls(number: int, rows: int) -> list[str]:
    """One address a row."""
    marks = np.random.default_rng([number, 2]).integers(0, 2**62, rows).tolist()
    return [f"https://images.example.org/{number:04}/{mark:016x}.jpg" for mark in marks]


def write_npy_f32(path: Path, number: int, rows: int) -> None:
    """One float32 file."""
    np.save(path / f"{number:04}.npy", vectors(number, rows))


def write_npy_f16(path: Path, number: int, rows: int) -> None:
    """One float16 file."""
    np.save(path / f"{number:04}.npy", vectors(number, rows).astype(np.float16))


def write_parquet(path: Path, number: int, rows: int) -> None:
    """One parquet file with vectors, as `DataFrame.to_parquet` leaves it: list<float32>, snappy, one row group."""
    ids = np.arange(number * rows, (number + 1) * rows)
    save_frame(path, number, {"embedding": list(vectors(number, rows)), "caption": sentences(number, rows), "id": ids})


def write_plain(path: Path, number: int, rows: int) -> None:
    """One parquet file with vectors that are neither compressed nor encoded, as the library writes them."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    column = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors(number, rows).reshape(-1)), DIMENSION)
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 24_000, "write_page_index": True}
    parquet.write_table(arrow.table({"embedding": column}), path / f"{number:04}.parquet", **options)


PAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "zstd": {"compression": "zstd"},
    "polars": {},
    "plain": {"compression": "none"},
    "v2": {"data_page_version": "2.0"},
    "half": {},
    "fixed": {},
    "binary": {},
    "split": {"use_dictionary": ["caption", "id"], "use_byte_stream_split": ["embedding.list.element"]},
}
"""Kinds of parquet files, and how pyarrow is asked for them."""

GROUPS = {"whole": 1, "fifths": 5}
"""How many row groups a file has."""


@dataclass(frozen=True, slots=True)
class PagesWriter:
    """Writes parquet files of one kind."""

    kind: str
    """One of ``PAGES``."""
    groups: int
    """Row groups of a file."""

    def __call__(self, path: Path, number: int, rows: int) -> None:
        """Write one file: vectors, a caption and a number."""
        file, group_rows, values = path / f"{number:04}.parquet", -(-rows // self.groups), vectors(number, rows)
        if self.kind == "half":
            values = values.astype(np.float16)
        captions, ids = sentences(number, rows), np.arange(number * rows, (number + 1) * rows)
        if self.kind == "polars":
            polars = import_module("polars")
            frame = polars.DataFrame({"embedding": values, "caption": captions, "id": ids})
            frame = frame.with_columns(polars.col("embedding").arr.to_list())
            frame.write_parquet(file, row_group_size=group_rows)
            return
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        items = arrow.array(values.reshape(-1))
        if self.kind == "fixed":
            column = arrow.FixedSizeListArray.from_arrays(items, DIMENSION)
        elif self.kind == "binary":
            column = arrow.Array.from_buffers(arrow.binary(4 * DIMENSION), rows, [None, items.buffers()[1]])
        else:
            column = arrow.ListArray.from_arrays(arrow.array(np.arange(rows + 1, dtype=np.int32) * DIMENSION), items)
        table = arrow.table({"embedding": column, "caption": captions, "id": ids})
        parquet.write_table(table, file, row_group_size=group_rows, **PAGES[self.kind])


def write_metadata(path: Path, number: int, rows: int) -> None:
    """One parquet file with two string columns, the partner of an npy file."""
    save_frame(path, number, {"caption": sentences(number, rows), "url": urls(number, rows)})


def save_frame(path: Path, number: int, columns: dict[str, Any]) -> None:
    """Write a parquet file with pandas' defaults."""
    import_module("pandas").DataFrame(columns).to_parquet(path / f"{number:04}.parquet")


def picked_table(number: int, rows: int) -> dict[str, Any]:
    """What rows are picked by: a number below a thousand at random, and a caption."""
    shares = np.random.default_rng([number, 3]).integers(0, 1000, rows)
    return {"share": shares, "caption": sentences(number, rows)}


def picked_vectors(number: int, rows: int) -> npt.NDArray[np.float32]:
    """The vectors that are picked, of one file."""
    return vectors(number, rows // 2 + 1).reshape(-1, PICKED_DIMENSION)[:rows]


def write_picked(path: Path, number: int, rows: int) -> None:
    """One float32 file of short rows."""
    np.save(path / f"{number:04}.npy", picked_vectors(number, rows))


def write_picked_metadata(path: Path, number: int, rows: int) -> None:
    """One parquet file, its partner."""
    save_frame(path, number, picked_table(number, rows))


def make_lance(path: Path, rows: int) -> None:
    """Write the same rows as a dataset of Lance, in a process of its own: none may be forked from it."""
    with ProcessPoolExecutor(1) as pool:
        pool.submit(write_lance, path, rows).result()


def write_lance(path: Path, rows: int) -> None:
    """Write the same rows as a dataset of Lance."""
    arrow = import_module("pyarrow")

    def batches() -> Iterator[Any]:
        for number in range(PICKED_FILES):
            flat = arrow.array(picked_vectors(number, rows).reshape(-1))
            embedding = arrow.FixedSizeListArray.from_arrays(flat, PICKED_DIMENSION)
            yield arrow.record_batch({"embedding": embedding, **picked_table(number, rows)})

    first = next(batches())
    import_module("lance").write_dataset(batches(), str(path / "dataset"), schema=first.schema)


def in_parallel(write: Callable[[Path, int, int], None], files: int = FILES) -> Callable[[Path, int], None]:
    """Make all the files of a data set, two processes at a time."""

    def make(path: Path, rows: int) -> None:
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(write, [path] * files, range(files), [rows] * files))

    return make


def make_many(path: Path, rows: int) -> None:
    """10,000 small files, for the cost of opening them."""
    block = vectors(0, 8)[:, :64]
    for number in range(MANY):
        np.save(path / f"{number:05}.npy", block)


def make_sparse(path: Path, rows: int) -> None:
    """Write one npy file of zeros that takes no room on disk."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, DIMENSION)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + rows * DIMENSION * 4)


def make_large(path: Path, rows: int) -> None:
    """Write one file of 8 GB, sparse but for the rows that are looked up: each is filled with its own number."""
    file = path / "large.npy"
    make_sparse(file, LARGE_ROWS)
    array = np.load(file, mmap_mode="r+")
    for row in probes():
        array[row] = row
    array.flush()


def probes() -> list[int]:
    """The rows of the large file that are looked up."""
    picks: list[int] = np.random.default_rng(7).integers(0, LARGE_ROWS, PROBES).tolist()
    return picks


def make_remote(path: Path, rows: int) -> None:
    """48 files of 8 MB, three times as many as are in flight; two of three are further names of the one before them."""
    for number in range(0, 48, 3):
        write_npy_f32(path, number, max(1, rows // 24))
        for copy in (1, 2):
            os.link(path / f"{number:04}.npy", path / f"{number + copy:04}.npy")


def make_remote_pages(path: Path, rows: int) -> None:
    """24 files of 25 MB as pandas leaves them; two of three are further names of the one before them."""
    write = PagesWriter("default", 1)
    for number in range(0, 24, 3):
        write(path, number, max(1, rows // 8))
        for copy in (1, 2):
            os.link(path / f"{number:04}.parquet", path / f"{number + copy:04}.parquet")


def make_links(links: int) -> Callable[[Path, int], None]:
    """Many names of one sparse file: the page cache holds it once, so the machine's memory is not what is measured."""

    def make(path: Path, rows: int) -> None:
        make_sparse(path / "0000.npy", SPARSE_ROWS)
        for number in range(1, links):
            os.link(path / "0000.npy", path / f"{number:04}.npy")

    return make


@dataclass(frozen=True, slots=True)
class FormatWriter:
    """Writes files of one format, each with the vectors of the npy file of its number."""

    file_format: str
    """One that the library writes."""

    def __call__(self, path: Path, number: int, rows: int) -> None:
        """Write one file."""
        write = import_module("dask_embedding_reader").write_embeddings
        write(vectors(number, rows), path / f"{number:04}", self.file_format, rows_per_file=rows)


def make_small(path: Path, rows: int) -> None:
    """5,000 files of four rows."""
    block = vectors(0, 4 * SMALL)
    for number in range(SMALL):
        np.save(path / f"{number:05}.npy", block[4 * number : 4 * number + 4])


def make_small_metadata(path: Path, rows: int) -> None:
    """5,000 parquet files, their partners."""
    for number in range(SMALL):
        save_frame(path, number, {"caption": sentences(number, 4), "url": urls(number, 4)})


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "npy-f32": in_parallel(write_npy_f32),
    "npy-f16": in_parallel(write_npy_f16),
    "parquet": in_parallel(write_parquet, PARQUET_FILES),
    "npy-converted": in_parallel(write_npy_f32, CONVERTED_FILES),
    "parquet-converted": in_parallel(write_plain, CONVERTED_FILES),
    "metadata": in_parallel(write_metadata),
    "rows": in_parallel(write_picked, PICKED_FILES),
    "rows-metadata": in_parallel(write_picked_metadata, PICKED_FILES),
    "rows-lance": make_lance,
    "many": make_many,
    "small": make_small,
    "small-metadata": make_small_metadata,
    "large": make_large,
    "remote": make_remote,
    "remote-pages": make_remote_pages,
    "sparse-20GB": make_links(10),
    "sparse-200GB": make_links(100),
    "sparse-6G": make_links(SCALE_FILES),
}
MAKERS |= {
    f"format-{name}": in_parallel(FormatWriter(name), FORMAT_FILES)
    for name in ("npy", "fbin", "npz", "safetensors", "arrow", "fvecs")
}
MAKERS |= {
    f"pages-{kind}-{share}": in_parallel(PagesWriter(kind, groups), PAGES_FILES)
    for kind in PAGES
    for share, groups in GROUPS.items()
}
