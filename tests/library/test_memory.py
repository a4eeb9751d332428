"""Memory: what arithmetic projects is what a pass takes, and that is the limit, or what a warning says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support.collections import Collection, Rows, write_collection
from tests.support.peaks import CAN_MEASURE, Meter, meter

pytestmark = [
    pytest.mark.skipif(not CAN_MEASURE, reason="resident memory is measured the Linux way"),
    pytest.mark.timeout(900),  # a process that imports everything, on a busy machine
]

MB = 10**6
NOISE = 24 * MB
"""What Python, its threads and allocators take beside: up to 5 MB where it was measured."""

OVER = 64 * MB
"""What may be held beyond the limit, as the pages say."""

FORMATS = (
    *("npy", "npy-fortran", "npy-big-endian", "npz-deflated", "fbin", "fvecs", "safetensors", "arrow", "arrow-zstd"),
    *("parquet-list", "parquet-fixed-size-list", "parquet-binary", "parquet_npy"),
)


def some_rows(rng: np.random.Generator, rows: int, dimension: int, dtype: np.typing.DTypeLike) -> Rows:
    """Rows that repeat: what takes time is not to make them."""
    return np.resize(rng.random((1_000, dimension), dtype=np.float32), (rows, dimension)).astype(dtype)


def write(
    folder: Path, format_name: str, *, rows: int = 20_000, text: int = 40, texts: int = 2**60, group_rows: int = 10_000
) -> Collection:
    """Three files, with a text beside each vector where there can be one, of so many different ones."""
    words = np.random.default_rng(0).integers(0, texts, rows)
    table = pa.table({"caption": [f"{word:x}".ljust(text, "x") for word in words.tolist()]})
    return write_collection(
        folder,
        format_name,
        file_rows=[rows] * 3,
        dimension=256,
        tables=[table] * 3,
        row_group_rows=group_rows,
        vectors=some_rows,
    )


@pytest.fixture(scope="module")
def measured() -> Iterator[Meter]:
    """Measures passes."""
    with meter() as found:
        yield found


def check(measured: Meter, collection: Collection, batch_size: int, limit: int, how: str = "in order") -> None:
    """A pass takes no more than was projected, and keeps to the limit, or there is a warning."""
    peak = measured.measure(collection, how, batch_size, limit)
    assert peak.grown <= peak.projected.within(limit) + NOISE
    assert peak.warned or (peak.projected.batches <= limit and peak.grown <= 1.1 * limit + OVER)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_pass_takes_what_is_projected(format_name: str, tmp_path: Path, measured: Meter) -> None:
    """61 MB of vectors, read ahead as far as the limit lets them be, or as far as is worth it."""
    collection = write(tmp_path, format_name)
    check(measured, collection, 1_000, 16 * MB)
    check(measured, collection, 10_000, 1_000 * MB)


@pytest.mark.parametrize(
    ("format_name", "rows"), [("parquet-list", 5_000), ("parquet_npy", 5_000), ("arrow", 20_000), ("arrow-zstd", 5_000)]
)
def test_wide_texts_are_decoded_fewer_at_a_time(format_name: str, rows: int, tmp_path: Path, measured: Meter) -> None:
    """20 MB of text a row group or record batch, of which the rows that are decoded at once by default would take 100
    MB as Python's strings. Of a batch of 80 MB that is not compressed only these are read."""
    collection = write(tmp_path, format_name, rows=rows, text=4_000, group_rows=rows)
    check(measured, collection, 100, 16 * MB)


def test_texts_that_repeat_weigh_what_they_are_decoded_to(tmp_path: Path, measured: Meter) -> None:
    """20 texts of 20 kB in a dictionary, which the footer calls 400 kB: 100 MB are what all rows are decoded to."""
    collection = write(tmp_path, "parquet-list", rows=5_000, text=20_000, texts=20, group_rows=5_000)
    check(measured, collection, 100, 16 * MB)


@pytest.mark.parametrize("how", ["every second", "lazy"])
def test_some_rows_and_lazy_arrays_take_what_is_projected(how: str, tmp_path: Path, measured: Meter) -> None:
    """184 MB of vectors; lazy chunks of 32 MB are computed ahead in as many threads as there are."""
    collection = write(tmp_path, "npy", rows=60_000)
    check(measured, collection, 1_000, 48 * MB, how)


@pytest.mark.parametrize("format_name", ["npy", "parquet-list", "arrow-zstd"])
def test_what_is_fetched_from_elsewhere_counts(format_name: str, tmp_path: Path, measured: Meter) -> None:
    """245 MB of vectors, row groups of 20 MB: sixteen readers could hold two windows of each of them."""
    check(measured, write(tmp_path, format_name, rows=80_000, group_rows=20_000), 1_000, 256 * MB, "remote")


def test_windows_of_a_shuffled_reader_keep_to_the_limit(tmp_path: Path, measured: Meter) -> None:
    """Windows of 128 MB, which are read in parts."""
    collection = write(tmp_path, "npy", rows=60_000)
    peak = measured.measure(collection, "shuffled", 1_000, 48 * MB)
    assert peak.warned
    assert peak.grown <= 48 * MB + NOISE


@pytest.mark.parametrize("how", ["in order", "every second", "shuffled"])
def test_the_numbers_of_rows_count_where_vectors_are_tiny(how: str, tmp_path: Path, measured: Meter) -> None:
    """Vectors of 4 bytes: to sort the numbers of their rows takes ten times as much."""
    collection = write_collection(tmp_path, "npy", file_rows=[1], dimension=1)
    np.lib.format.open_memmap(collection.files[0], "w+", np.float32, (10_000_000, 1))
    assert measured.measure(collection, how, 100_000, 32 * MB).grown <= 32 * MB + NOISE


@pytest.mark.slow
@pytest.mark.parametrize("limit", [64, 256, 1_000, 4_000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_limit_is_kept(limit: int, dtype: str, tmp_path: Path, measured: Meter) -> None:
    """12 GB of files that take no disk, in batches of which ten or a thousand are within the limit."""
    collection = write_collection(tmp_path, "npy", file_rows=[1], dimension=1_000, dtype=dtype)
    for number in range(3):
        np.lib.format.open_memmap(collection.files[0].with_name(f"{number}.npy"), "w+", dtype, (1_000_000, 1_000))
    collection.files[0].unlink()
    for batch_size in (limit * MB // 40_000, limit * MB // 4_000_000):
        check(measured, collection, batch_size, limit * MB)


@pytest.mark.slow
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("limit", [64, 256, 4_000])
def test_every_format_keeps_any_limit(limit: int, format_name: str, tmp_path: Path, measured: Meter) -> None:
    """600 MB of vectors."""
    collection = write(tmp_path, format_name, rows=200_000, group_rows=50_000)
    for batch_size in (100, 1_000, 30_000):
        check(measured, collection, batch_size, limit * MB)
