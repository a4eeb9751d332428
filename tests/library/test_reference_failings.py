"""What the reference (embedding_reader 1.8.1) gets wrong comes out right here, or as an error that says so.

One test or more for each failing that was reproduced there, in the same order: silently wrong data, hangs, waste,
faults of the network, refusals and crashes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.collection import pairing
from dask_embedding_reader.errors import (
    ArgumentError,
    ColumnError,
    EmbeddingReaderError,
    FormatError,
    MismatchError,
    NoFilesError,
)
from dask_embedding_reader.storage.store import StoredFile, Version
from dask_embedding_reader.storage.urls import resolve
from tests.support.collections import (
    Rows,
    assert_same_rows,
    finishes,
    random_rows,
    skipping_what_pyarrow_lacks,
    vectors_as,
    wait_until,
    write_collection,
    write_npy,
    write_parquet,
)
from tests.support.servers import http_files
from tests.support.stores import Bucket, Meeting, emptied_bucket


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An object store that records what it delivers."""
    with emptied_bucket() as emptied:
        yield emptied


def rows_of(count: int, dimension: int = 3, dtype: str = "float32", seed: int = 0) -> Rows:
    """Random vectors."""
    return random_rows(np.random.default_rng(seed), count, dimension, dtype)


def everything(reader: EmbeddingReader, batch_size: int = 2) -> tuple[Rows, pd.DataFrame]:
    """All that the classic call yields, put together, stored dtype."""
    batches = list(reader(batch_size, dtype=None))
    return np.concatenate([rows for rows, _ in batches]), pd.concat([metadata for _, metadata in batches])


def assert_reads(reader: EmbeddingReader, expected: Rows) -> None:
    """Both ways of reading give these rows."""
    assert_same_rows(reader.to_dask_array().compute(), expected)
    assert_same_rows(everything(reader)[0], expected)


# ---------------------------------------------------------------------------------------------- silently wrong data


def test_fortran_order_is_not_read_as_c_order(tmp_path: Path) -> None:
    rows = rows_of(5)
    np.save(tmp_path / "a.npy", np.asfortranarray(rows))
    np.save(tmp_path / "b.npy", rows)
    assert_reads(EmbeddingReader(str(tmp_path)), np.concatenate([rows, rows]))


def test_header_longer_than_300_bytes(tmp_path: Path) -> None:
    rows = rows_of(4)
    write_npy(tmp_path / "a.npy", rows, pad=400)
    write_npy(tmp_path / "b.npy", rows * 2, pad=60_000)
    write_npy(tmp_path / "c.npy", rows * 3, pad=100_000, version=(2, 0))
    assert_reads(EmbeddingReader(str(tmp_path)), np.concatenate([rows, rows * 2, rows * 3]))


def test_files_of_different_dimension_in_one_folder(tmp_path: Path) -> None:
    for name, dimension in (("a", 3), ("b", 3), ("odd", 6)):
        np.save(tmp_path / f"{name}.npy", rows_of(4, dimension))
    with pytest.raises(MismatchError, match=r"(?s)odd\.npy.*6.*3"):
        EmbeddingReader(str(tmp_path))


def test_files_of_different_dtype_in_one_folder(tmp_path: Path) -> None:
    for name, dtype in (("a", "float32"), ("b", "float32"), ("odd", "float16")):
        np.save(tmp_path / f"{name}.npy", rows_of(4, dtype=dtype))
    with pytest.raises(MismatchError, match=r"(?s)odd\.npy.*float16.*float32"):
        EmbeddingReader(str(tmp_path))


def test_files_of_different_dimension_in_one_folder_of_parquet(tmp_path: Path) -> None:
    for name, dimension in (("a", 3), ("odd", 6)):
        write_parquet(tmp_path / f"{name}.parquet", pa.table({"embedding": vectors_as(rows_of(4, dimension), "list")}))
    # A list column does not say its dimension before it is read.
    with pytest.raises(EmbeddingReaderError, match=r"odd\.parquet"):
        everything(EmbeddingReader(str(tmp_path), "parquet"), 8)
    with pytest.raises(EmbeddingReaderError, match=r"odd\.parquet"):
        EmbeddingReader(str(tmp_path), "parquet").to_dask_array().compute()


def test_files_of_different_dtype_in_one_folder_of_parquet(tmp_path: Path) -> None:
    for name, dtype in (("a", "float32"), ("odd", "float64")):
        write_parquet(
            tmp_path / f"{name}.parquet", pa.table({"embedding": vectors_as(rows_of(4, dtype=dtype), "list")})
        )
    with pytest.raises(MismatchError, match=r"(?s)odd\.parquet.*(float64|double).*(float32|float)"):
        EmbeddingReader(str(tmp_path), "parquet")


def write_pairs(root: Path, vectors: dict[str, int], metadata: dict[str, int]) -> dict[str, Any]:
    """Files of so many rows; the n-th vector overall is n, and so is the n-th id."""
    for folder, names in (("emb", vectors), ("meta", metadata)):
        for name in names:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, count in vectors.items():
        np.save(root / "emb" / f"{name}.npy", np.arange(start, start + count, dtype=np.float32)[:, None])
        start += count
    start = 0
    for name, count in metadata.items():
        write_parquet(root / "meta" / f"{name}.parquet", pa.table({"id": np.arange(start, start + count)}))
        start += count
    return {
        "embeddings_folder": str(root / "emb"),
        "file_format": "parquet_npy",
        "meta_columns": ["id"],
        "metadata_folder": str(root / "meta"),
    }


def assert_paired(options: dict[str, Any]) -> None:
    """Vector n belongs to id n, in batches, array and frame."""
    reader = EmbeddingReader(**options)
    rows, metadata = everything(reader)
    assert rows[:, 0].tolist() == metadata["id"].tolist()
    assert reader.to_dask_array().compute()[:, 0].tolist() == reader.to_dask_dataframe()["id"].compute().tolist()
    assert len(rows) == reader.count


def test_an_empty_npy_file_does_not_shift_the_pairing(tmp_path: Path) -> None:
    counts = {"0": 3, "1": 0, "2": 2, "3": 3}
    assert_paired(write_pairs(tmp_path, counts, counts))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"0": 3}, "1.npy"),
        ({"0": 3, "1": 2}, "1.parquet"),
        ({"0": 3, "1": 1}, "1.parquet"),
        ({"0": 3, "1": 4}, "1.parquet"),
        ({"0": 3, "1": 3, "2": 3}, "2.parquet"),
        ({"0": 3, "2": 3}, "1.npy"),
    ],
    ids=["fewer files", "shorter", "one row for all", "longer", "more files", "another name"],
)
def test_metadata_files_that_do_not_fit_are_refused(metadata: dict[str, int], named: str, tmp_path: Path) -> None:
    options = write_pairs(tmp_path, {"0": 3, "1": 3}, metadata)
    with pytest.raises(MismatchError, match=named):
        EmbeddingReader(**options)


# The files of each kind, those that belong together at the same place.
PAIRED = {
    "path": ("a/0 a/1 b/0", "a/0 a/1 b/0"),
    "padding": ("0002 0010", "2 10"),  # as strings, 10 comes before 2
    "padding of some": ("8 9 10", "08 09 10"),
    "prefixes": ("img_emb_0 img_emb_1 img_emb_10", "metadata_0 metadata_1 metadata_10"),
    "words": ("train/0 test/0", "train_meta/0 test_meta/0"),
    "words the other way round": ("train_emb test_emb", "b_train a_test"),
    "capitals": ("Train_0 Test_0", "train0 test0"),
    "words and numbers": ("train/0 train/1 test/0", "train/meta_0 train/meta_1 test/meta_0"),
    "numbers of folders": ("e1/0 e1/1 e2/0", "m1/part-0 m1/part-1 m2/part-0"),
    "how many there are": ("emb_0_of_2 emb_1_of_2 emb_2_of_2", "0 1 2"),
    "dimension": ("emb_0_512 emb_1_512 emb_512_512", "0 1 512"),
    "model": ("vit_b32_0 vit_b32_1", "32_0 32_1"),
    "only the last number": ("a_0_7 b_1_8", "p7 q8"),
    "Spark": ("0 1 2", "part-0000-7f3e-c000 part-0001-5ab-9-c000 part-0002-c-c000"),
    "a folder for each": ("emb_0 emb_1", "0/metadata 1/metadata"),
    "the first has no number": ("emb emb_1 emb_2", "meta meta_1 meta_2"),
    "nothing in common": ("x y", "p q"),
    "numbers on one side": ("cats dogs", "part0 part1"),
    "one file of each": ("cats", "metadata"),
    "one file of each, and its number": ("emb_768_0002", "part2"),
    "one file of each, one with a number": ("emb_2", "captions"),
}


@pytest.mark.filterwarnings("ignore:.* joins the files of (folders|splits)")  # train and test
@pytest.mark.parametrize("case", PAIRED)
def test_files_are_paired_by_what_their_names_say(case: str, tmp_path: Path) -> None:
    vectors, metadata = (dict.fromkeys(names.split(), 3) for names in PAIRED[case])
    assert_paired(write_pairs(tmp_path, vectors, metadata))


@pytest.mark.parametrize(
    ("vectors", "metadata", "lonely", "spare"),
    [
        ("emb_0 emb_1 emb_2 emb_4", "meta_0 meta_1 meta_3 meta_4", "emb_2.npy", "meta_3.parquet"),
        ("emb_0_512 emb_1_512 emb_3_512", "0 1 2", "emb_3_512.npy", "/2.parquet"),
        ("x y z", "w x y", "z.npy", "w.parquet"),
        ("train val", "meta_train meta_test", "val.npy", "meta_test.parquet"),
        ("a_0 b_1 c_2", "a_0 b_1 d_2", "c_2.npy", "d_2.parquet"),
        ("emb_1 emb_2", "meta_3 meta_4", "emb_1.npy", "meta_3.parquet"),
        ("0 1", "1 2", "0.npy", "2.parquet"),
        ("emb_2", "meta_3", "emb_2.npy", "meta_3.parquet"),
        ("emb_2_512", "meta_3_768", "emb_2_512.npy", "meta_3_768.parquet"),
        ("x/part2", "1-rows", "x/part2.npy", "1-rows.parquet"),
        # All that is left of the vectors lies in one folder.
        ("0/emb_0 0/emb_1 0/emb_2", "0/meta_1 0/meta_2 1/meta_0", "0/emb_0.npy", "1/meta_0.parquet"),
        # From 0 and from 1: which number is left out is not told.
        ("emb_0 emb_1 emb_2", "meta_1 meta_2 meta_3", "emb_0.npy", "meta_3.parquet"),
        ("emb_0 emb_1 emb_2", "meta_3 meta_4 meta_5", "emb_0.npy", "meta_3.parquet"),
        ("1/emb_0 1/emb_1 2/emb_0", "1/meta_0 1/meta_1 3/meta_0", "2/emb_0.npy", "3/meta_0.parquet"),
        # Which folder belongs to which is not told.
        ("a/0 b/0", "z/0 c/0", "a/0.npy", "b/0.npy"),
        ("a/0 a/1 b/0 b/1", "z/0 z/1 c/0 c/1", "a/0.npy", "b/0.npy"),
        # Words and the order, or the number, say different things.
        ("a_train/0 b_test/0", "b_train/0 a_test/0", "a_train/0.npy", "b_test/0.npy"),
        ("a_train b_test", "b_train a_test", "a_train.npy", "a_test.parquet"),
        ("a/emb_0 b/emb_1", "b/meta_0 a/meta_1", "a/emb_0.npy", "b/meta_0.parquet"),
        # The last and the first number, too.
        ("s1_e2 s2_e1", "s1_m1 s2_m2", "s1_e2.npy", "s1_m1.parquet"),
        ("s1_e5 s2_e6", "s3_m5 s1_m6", "s1_e5.npy", "s1_m6.parquet"),
    ],
)
def test_position_pairs_nothing_where_a_name_or_number_says_otherwise(
    vectors: str, metadata: str, lonely: str, spare: str, tmp_path: Path
) -> None:
    options = write_pairs(tmp_path, dict.fromkeys(vectors.split(), 3), dict.fromkeys(metadata.split(), 3))
    with pytest.raises(MismatchError, match=rf"(?s){re.escape(lonely)}.*{re.escape(spare)}"):
        EmbeddingReader(**options)


@pytest.mark.parametrize(
    ("left", "right", "told"),
    [
        ("0 1", "0", "; without metadata: v1.npy"),
        ("0", "0 1", "; without vectors: m1.parquet"),
        ("0 1", "0 2", "; without metadata: v1.npy; without vectors: m1.parquet"),
        ("0 0 1", "0 0", "; without metadata: v2.npy"),  # who has a partner is not the fault
        ("0 0", "0 0 1", "; without vectors: m2.parquet"),
        ("0 0", "0", "; alike in name and number: v0.npy, v1.npy"),
        ("0", "0 0", "; alike in name and number: v0.npy"),
        ("0 1 2", "9", "; without metadata: v0.npy, v1.npy, v2.npy; without vectors: m0.parquet"),
        ("0 1 2 3", "9", "; without metadata: v0.npy, v1.npy, v2.npy …; without vectors: m0.parquet"),
    ],
)
def test_what_cannot_be_paired_is_named(left: str, right: str, told: str) -> None:
    store, _ = resolve("/")
    vectors = [StoredFile(store, f"v{k}.npy", Version(1)) for k in range(len(left.split()))]
    metadata = [StoredFile(store, f"m{k}.parquet", Version(1)) for k in range(len(right.split()))]
    keys, others = ([(int(number),) for number in names.split()] for names in (left, right))
    said = pairing._unpaired(vectors, metadata, keys, others)
    assert f"only where these say nothing{told}; each npy file needs" in said


@pytest.mark.parametrize(
    ("left", "right", "is_hinted"),
    [
        ("a/0 b/0", "m/0", True),
        ("a/0 b/0", "m/0 n/0", False),
        ("a/0 b/1", "m/0", False),
        ("a/0 b/0", "m/0 m/1", False),
        ("a/0 a/0", "m/0", False),
    ],
)
def test_files_that_are_alike_in_several_folders_may_be_several_collections(
    left: str, right: str, is_hinted: bool
) -> None:
    store, _ = resolve("/")
    vectors, metadata = ([StoredFile(store, name, Version(1)) for name in names.split()] for names in (left, right))
    keys, others = ([(int(file.path[-1]),) for file in files] for files in (vectors, metadata))
    said = pairing._unpaired(vectors, metadata, keys, others)
    assert (" files are from 2 folders: open each by itself, as in 'a'" in said) is is_hinted


def test_the_two_files_that_are_named_themselves_are_a_pair(tmp_path: Path) -> None:
    options = write_pairs(tmp_path, {"emb_2": 3}, {"meta_3": 3})
    vectors, metadata = f"{options['embeddings_folder']}/emb_2.npy", f"{options['metadata_folder']}/meta_3.parquet"
    with pytest.raises(MismatchError, match=r"the two files\) have to be named"):
        EmbeddingReader(**options)
    with pytest.raises(MismatchError, match=r"the two files\) have to be named"):
        EmbeddingReader(**{**options, "embeddings_folder": vectors})
    assert_paired({**options, "embeddings_folder": vectors, "metadata_folder": metadata})
    assert_paired({**options, "embeddings_folder": [vectors], "metadata_folder": [metadata]})


def test_folders_that_are_named_one_by_one_are_paired_in_that_order(tmp_path: Path) -> None:
    options = write_pairs(tmp_path, {"a/0": 2, "a/1": 3, "b/0": 2}, {"z/0": 2, "z/1": 3, "c/0": 2})
    root, beside = options["embeddings_folder"], options["metadata_folder"]
    with pytest.raises(MismatchError, match="named one by one"):
        EmbeddingReader(**options)
    both = {"embeddings_folder": [f"{root}/a", f"{root}/b"], "metadata_folder": [f"{beside}/z", f"{beside}/c"]}
    assert_paired({**options, **both})
    with pytest.raises(MismatchError, match=r"a/1\.npy"):
        EmbeddingReader(**{**options, **both, "metadata_folder": [f"{beside}/c", f"{beside}/z"]})


def test_folders_that_are_named_one_by_one_may_share_some_names(tmp_path: Path) -> None:
    options = write_pairs(tmp_path, {"a/0": 2, "a/1": 3, "b/0": 2}, {"a/0": 2, "a/1": 3, "c/0": 2})
    root, beside = options["embeddings_folder"], options["metadata_folder"]
    both = {"embeddings_folder": [f"{root}/a", f"{root}/b"], "metadata_folder": [f"{beside}/a", f"{beside}/c"]}
    assert_paired({**options, **both})
    crossed = {"embeddings_folder": [f"{root}/b", f"{root}/a"], "metadata_folder": [f"{beside}/a", f"{beside}/c"]}
    with pytest.raises(MismatchError, match=r"b/0\.npy"):
        EmbeddingReader(**{**options, **crossed})


def test_int64_ids_do_not_pass_through_float64(tmp_path: Path) -> None:
    table = pa.table({"embedding": vectors_as(rows_of(3), "list"), "id": [2**53 + 1] * 3, "score": [0.5, 1.0, 1.5]})
    write_parquet(tmp_path / "a.parquet", table)
    reader = EmbeddingReader(str(tmp_path), "parquet", meta_columns=["id", "score"])
    _, metadata = everything(reader)
    assert metadata["id"].tolist() == [2**53 + 1] * 3
    assert metadata.dtypes.astype(str).to_dict() == {"id": "int64", "score": "float64", "i": "int64"}


def test_the_dtype_of_a_column_does_not_change_from_batch_to_batch(tmp_path: Path) -> None:
    values = pa.array([1, 2, None, 4, None, None], pa.int64())
    words = pa.array([None, None, "a", "b", "c", None], pa.string())
    table = pa.table({"embedding": vectors_as(rows_of(6), "list"), "n": values, "s": words})
    write_parquet(tmp_path / "a.parquet", table)
    reader = EmbeddingReader(str(tmp_path), "parquet", meta_columns=["n", "s"])
    seen = [metadata.dtypes.astype(str).to_dict() for _, metadata in reader(2)]
    assert seen == [{"n": "Int64", "s": "object", "i": "int64"}] * 3
    _, metadata = everything(reader)
    assert metadata["n"].tolist() == [1, 2, pd.NA, 4, pd.NA, pd.NA]
    assert metadata["s"].tolist() == [None, None, "a", "b", "c", None]


@pytest.mark.parametrize("start", [-1, -100])
def test_negative_start_returns_no_header_bytes(start: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows_of(5))
    reader = EmbeddingReader(str(tmp_path))
    for ask in (lambda: reader(2, start), lambda: reader.to_dask_array(start), lambda: reader.to_dask_dataframe(start)):
        with pytest.raises(ArgumentError, match="start"):
            ask()


def test_a_stored_column_named_i_is_not_overwritten(tmp_path: Path) -> None:
    table = pa.table({"embedding": vectors_as(rows_of(3), "list"), "i": [70, 80, 90], "id": [7, 8, 9]})
    write_parquet(tmp_path / "a.parquet", table)
    # Two columns of one name are no answer, and dropping either is none: the caller is told instead.
    with pytest.raises(ColumnError, match="i"):
        EmbeddingReader(str(tmp_path), "parquet", meta_columns=["i"])
    _, metadata = everything(EmbeddingReader(str(tmp_path), "parquet", meta_columns=["id"]))
    assert metadata.to_dict("list") == {"id": [7, 8, 9], "i": [0, 1, 2]}


def test_the_order_of_a_list_of_folders_is_kept(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.full((2, 1), number, dtype=np.float32))
    reader = EmbeddingReader([str(tmp_path / name) for name in "cab"])
    assert everything(reader)[0][:, 0].tolist() == [2, 2, 0, 0, 1, 1]


# ------------------------------------------------------------------------------------------------------------ hangs


@pytest.fixture
def many_pieces(tmp_path: Path) -> EmbeddingReader:
    """200 rows in four files."""
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", rows_of(50, seed=number))
    return EmbeddingReader(str(tmp_path))


def test_break_with_more_pieces_queued_than_threads_does_not_hang(many_pieces: EmbeddingReader) -> None:
    def leave() -> int:
        for rows, _ in many_pieces(1, max_piece_size=1, parallel_pieces=2):
            return len(rows)
        return 0

    assert finishes(leave) == 1


def test_an_exception_in_the_loop_body_does_not_hang(many_pieces: EmbeddingReader) -> None:
    def fail() -> None:
        for _ in many_pieces(1, max_piece_size=1, parallel_pieces=2):
            raise KeyError("in the body")

    with pytest.raises(KeyError, match="in the body"):
        finishes(fail)


def test_garbage_collection_of_the_iterator_does_not_hang(many_pieces: EmbeddingReader) -> None:
    def collect() -> int:
        batches = many_pieces(1, max_piece_size=1, parallel_pieces=2)
        next(batches)
        del batches
        return 1

    assert finishes(collect) == 1


@pytest.mark.parametrize("size", [0, -1])
def test_max_piece_size_of_nothing_is_refused(size: int, many_pieces: EmbeddingReader) -> None:
    with pytest.raises(ArgumentError, match="max_piece_size"):
        finishes(lambda: many_pieces(10, max_piece_size=size))
    with pytest.raises(ArgumentError, match="max_piece_size"):
        finishes(lambda: many_pieces.to_dask_array(max_piece_size=size))


def test_abandoned_iterators_leak_no_threads(many_pieces: EmbeddingReader) -> None:
    before = set(threading.enumerate())
    for _ in range(10):
        next(many_pieces(1, max_piece_size=1, parallel_pieces=4))
    assert wait_until(lambda: set(threading.enumerate()) <= before)


# ------------------------------------------------------------------------------------------------------------ waste


def put_folder(bucket: Bucket, folder: Path) -> str:
    """Copy the files of a folder into the store, under its name, and return its URL."""
    for path in sorted(folder.iterdir()):
        bucket.put(f"{folder.name}/{path.name}", path.read_bytes())
    return f"bucket://{folder.name}"


def test_reading_three_headers_fetches_no_more_than_headers(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", np.zeros((20_000, 256), dtype=np.float32))
    reader = EmbeddingReader(put_folder(bucket, folder))
    assert reader.count == 60_000
    assert 0 < bucket.nbytes <= 3 * 2**16, "the files hold 61 MB"


def test_small_batches_fetch_their_rows_and_no_more(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    rows = rows_of(30_000, 256)
    np.save(folder / "0.npy", rows)
    reader = EmbeddingReader(put_folder(bucket, folder))
    bucket.forget()
    for number, (batch, _) in enumerate(reader(256, 5_000, 7_560)):
        np.testing.assert_array_equal(batch, rows[5_000 + 256 * number :][:256])
    data = 2_560 * 1_024
    assert data <= bucket.nbytes <= data + 2**16


def test_one_row_of_parquet_does_not_read_all_of_the_file(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    rows = rows_of(16_000, 128)
    table = pa.table({"embedding": vectors_as(rows, "list"), "noise": vectors_as(rows, "list")})
    write_parquet(folder / "0.parquet", table, 1_000, use_dictionary=False, compression="none")
    reader = EmbeddingReader(put_folder(bucket, folder), "parquet")
    group = 1_000 * 128 * 4
    ways: list[Callable[[], Any]] = [
        lambda: reader.to_dask_array()[8_500].compute(),
        lambda: next(reader(1, 8_500, 8_501))[0][0],
    ]
    for read in ways:
        bucket.forget()
        np.testing.assert_array_equal(read(), rows[8_500])
        assert bucket.nbytes <= 2 * group, "the file holds 32 groups of this size"


def test_parquet_files_are_not_opened_one_after_another(bucket: Bucket, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet-list", file_rows=[2] * 12, columns=["id"])
    url = put_folder(bucket, collection.folder)
    meeting = Meeting(4)
    bucket.before_read = meeting.arrive
    # Where the column is not named, the first file is asked for it, before the others.
    reader = EmbeddingReader(url, "parquet", "embedding", meta_columns=["id"])
    bucket.before_read = None
    assert reader.count == 24
    assert meeting.peak >= 4


#: Reads all batches under a memory limit and prints by how many bytes the peak of resident memory rose meanwhile.
PEAK_PROGRAM = """
import sys
from dask_embedding_reader import EmbeddingReader

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

folder, file_format, columns, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
reader = EmbeddingReader(folder, file_format, meta_columns=columns.split() or None)
next(reader(1, end=1))  # imports and thread pools
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
rows = 0
for batch, _ in reader(2_000, max_ram_usage_in_bytes=limit):
    rows += len(batch)
    del batch
assert rows == reader.count
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is measured the Linux way")
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_max_ram_usage_in_bytes_is_kept(file_format: str, tmp_path: Path) -> None:
    limit = 50 * 10**6
    if file_format == "npy":
        for number in range(4):
            # Sparse: 100 MB that take no disk.
            np.lib.format.open_memmap(tmp_path / f"{number}.npy", mode="w+", dtype=np.float32, shape=(50_000, 512))
    else:
        rows = rows_of(2_500, 512)
        for number in range(4):
            table = pa.table(
                {"embedding": vectors_as(np.tile(rows, (8, 1)), "list"), "caption": ["word " * 40] * 20_000}
            )
            write_parquet(tmp_path / f"{number}.parquet", table, 2_500, use_dictionary=False, compression="none")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PEAK_PROGRAM,
            str(tmp_path),
            file_format,
            "caption" * (file_format != "npy"),
            str(limit),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # The collection is several times the limit, the batch of 4 MB and its predecessor belong to the loop.
    assert int(done.stdout) <= limit + 25 * 10**6


def test_planning_a_million_pieces_takes_little_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", (np.arange(10**6) % 100).astype(np.int8)[:, None])
    reader = EmbeddingReader(str(tmp_path))
    next(reader(10, max_piece_size=1))  # what is imported at first use is not planning
    tracemalloc.start()
    try:
        rows, _ = next(reader(10, 500_000, max_piece_size=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(rows[:, 0], np.arange(10))
    assert peak < 150 * 10**6, "the reference takes 747 MB"


def test_one_random_row_reads_one_row(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    rows = rows_of(20_000, 64)
    np.save(folder / "0.npy", rows)
    reader = EmbeddingReader(put_folder(bucket, folder))
    x = reader.to_dask_array()
    ways: list[Callable[[], Any]] = [lambda: x[12_345].compute(), lambda: next(reader(1, 12_345, 12_346))[0][0]]
    for read in ways:
        bucket.forget()
        np.testing.assert_array_equal(read(), rows[12_345])
        assert [read.nbytes for read in bucket.reads] == [256]


# ----------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_one_fault_of_the_network_does_not_end_the_read(fault: str, tmp_path: Path) -> None:
    rows = [rows_of(6, seed=number) for number in range(3)]
    for number, part in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", part)
    with http_files(tmp_path) as server:
        server.faults.append(fault)
        reader = EmbeddingReader([f"{server.url}/{number}.npy" for number in range(3)])
        assert server.faults == [], "the fault fell on the opening"
        server.faults.append(fault)
        assert_same_rows(everything(reader, 4)[0], np.concatenate(rows))
        server.faults.append(fault)
        assert_same_rows(reader.to_dask_array().compute(), np.concatenate(rows))
        assert server.faults == []


def test_a_trailing_slash_makes_no_difference(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    np.save(folder / "0.npy", rows_of(3))
    for address in (put_folder(bucket, folder), str(folder)):
        assert EmbeddingReader(f"{address}/").count == EmbeddingReader(address).count == 3


# --------------------------------------------------------------------------------------------- refusals and crashes


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float64", ">f4", ">f8", ">i2", ">f2"])
def test_dtypes_that_the_reference_refuses_or_loses(dtype: str, tmp_path: Path) -> None:
    rows = rows_of(5, dtype=np.dtype(dtype).newbyteorder("=").str)
    np.save(tmp_path / "a.npy", rows.astype(dtype))
    reader = EmbeddingReader(str(tmp_path))
    assert reader.dtype == rows.dtype
    assert reader.dtype.isnative
    assert_reads(reader, rows)
    assert_same_rows(next(reader(5))[0], rows.astype(np.float32))


def test_a_one_dimensional_file_of_no_rows_is_empty(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(0, dtype=np.float32))
    np.save(tmp_path / "b.npy", rows_of(3))
    # np.array([]) is how most programs write "nothing", whatever the dtype of their vectors.
    np.save(tmp_path / "c.npy", np.array([]))
    reader = EmbeddingReader(str(tmp_path))
    assert (reader.count, reader.nb_files) == (3, 1)
    assert_reads(reader, rows_of(3))


def test_a_one_dimensional_file_with_rows_is_an_error_that_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(7, dtype=np.float32))
    with pytest.raises(FormatError, match=r"(?s)a\.npy.*7"):
        EmbeddingReader(str(tmp_path))


def test_zero_byte_files_and_litter_are_passed_over(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows_of(3))
    (tmp_path / "zero.npy").touch()
    (tmp_path / "._a.npy").write_bytes(b"\0\5\x16\7 a resource fork")
    (tmp_path / ".hidden.npy").write_bytes(b"?")
    (tmp_path / "_temporary").mkdir()
    np.save(tmp_path / "_temporary" / "b.npy", rows_of(3))
    reader = EmbeddingReader(str(tmp_path))
    assert reader.count == 3
    assert_reads(reader, rows_of(3))


def write_cells(path: Path, cells: pa.Array) -> None:
    """A parquet file of eight good rows in two row groups, and then these cells in a third."""
    good = vectors_as(rows_of(8), "list")
    column = pa.chunked_array([good, cells.cast(good.type)])
    write_parquet(path, pa.table({"embedding": column}), 4)


@pytest.mark.parametrize(
    "cells",
    [
        [[1.0, 2, 3], None],
        [[1.0, 2, 3], [1.0, 2]],
        [[1.0, 2, 3], [1.0, 2, 3, 4, 5]],
        [[1.0, 2, 3], []],
        [[1.0, None, 3]],
    ],
    ids=["null", "short", "long", "empty", "null inside"],
)
def test_null_and_ragged_cells_are_errors_that_name_file_and_rows(cells: list[Any], tmp_path: Path) -> None:
    write_cells(tmp_path / "bad.parquet", pa.array(cells, pa.list_(pa.float32())))
    with pytest.raises(FormatError, match=r"(?s)bad\.parquet.*\d"):
        everything(EmbeddingReader(str(tmp_path), "parquet"))
    with pytest.raises(FormatError, match=r"(?s)bad\.parquet.*\d"):
        EmbeddingReader(str(tmp_path), "parquet").to_dask_array().compute()


def test_ragged_cells_that_add_up_are_not_mixed_together(tmp_path: Path) -> None:
    # Two and four values where three and three belong: the flat values reshape without complaint.
    write_cells(tmp_path / "bad.parquet", pa.array([[1.0, 2], [3.0, 4, 5, 6]], pa.list_(pa.float32())))
    with pytest.raises(FormatError, match=r"bad\.parquet"):
        everything(EmbeddingReader(str(tmp_path), "parquet"), 10)
    with pytest.raises(FormatError, match=r"bad\.parquet"):
        EmbeddingReader(str(tmp_path), "parquet").to_dask_array().compute()


def test_null_cells_of_fixed_size_lists_are_errors_too(tmp_path: Path) -> None:
    cells = pa.array([[1.0, 2], None, [5.0, 6]], pa.list_(pa.float32(), 2))
    with skipping_what_pyarrow_lacks():
        write_parquet(tmp_path / "bad.parquet", pa.table({"embedding": cells}))
    with pytest.raises(FormatError, match=r"bad\.parquet"):
        everything(EmbeddingReader(str(tmp_path), "parquet"))


def test_null_cells_of_binary_are_errors_too(tmp_path: Path) -> None:
    cells = pa.array([b"12345678", None, b"12345678"], pa.binary(8))
    write_parquet(tmp_path / "bad.parquet", pa.table({"embedding": cells}))
    with pytest.raises(FormatError, match=r"bad\.parquet"):
        everything(EmbeddingReader(str(tmp_path), "parquet", embedding_dtype="float32"))


def test_binary_cells_are_read_when_their_dtype_is_declared(tmp_path: Path) -> None:
    rows = rows_of(5, 4, "float16")
    write_parquet(tmp_path / "a.parquet", pa.table({"embedding": vectors_as(rows, "binary")}))
    reader = EmbeddingReader(str(tmp_path), "parquet", embedding_dtype="float16")
    assert reader.dimension == 4
    assert_reads(reader, rows)
    with pytest.raises(ArgumentError, match="embedding_dtype"):
        EmbeddingReader(str(tmp_path), "parquet")


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_cells_that_are_no_vectors_are_refused(kind: pa.DataType, tmp_path: Path) -> None:
    cells = [b"12345678"] * 2 if kind == pa.binary() else ["[1, 2]"] * 2
    write_parquet(tmp_path / "a.parquet", pa.table({"embedding": pa.array(cells, kind)}))
    with pytest.raises(EmbeddingReaderError, match=r"a\.parquet"):
        EmbeddingReader(str(tmp_path), "parquet")


def test_meta_columns_given_as_a_string_is_one_column(tmp_path: Path) -> None:
    table = pa.table({"embedding": vectors_as(rows_of(2), "list"), "caption": ["cat", "dog"]})
    write_parquet(tmp_path / "a.parquet", table)
    _, metadata = everything(EmbeddingReader(str(tmp_path), "parquet", meta_columns="caption"))
    assert metadata.to_dict("list") == {"caption": ["cat", "dog"], "i": [0, 1]}


def test_parquet_npy_without_meta_columns(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet_npy")
    reader = collection.open(meta_columns=None)
    assert_reads(reader, collection.rows)
    assert list(everything(reader)[1].columns) == ["i"]


def test_paths_files_lists_and_globs(tmp_path: Path) -> None:
    rows = [rows_of(2, seed=number) for number in range(3)]
    for number, part in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", part)
    one, two = tmp_path / "1.npy", tmp_path / "2.npy"
    for address, numbers in (
        (tmp_path, [0, 1, 2]),
        (one, [1]),
        (str(one), [1]),
        ([str(two), str(one)], [2, 1]),
        ([two, tmp_path], [2, 0, 1]),
        (f"{tmp_path}/[12].npy", [1, 2]),
        (f"{tmp_path}/*.npy", [0, 1, 2]),
    ):
        assert_reads(EmbeddingReader(address), np.concatenate([rows[number] for number in numbers]))


@pytest.mark.parametrize("name", ["shard[0]", "a*b", "what?", "{x,y}", "with space", "50%", "a#b", "größe", "[", "a]["])
def test_folders_with_glob_characters_in_their_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    np.save(tmp_path / name / "0.npy", rows_of(3))
    assert_reads(EmbeddingReader(str(tmp_path / name)), rows_of(3))


def test_storage_options_reach_the_storage(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", rows_of(3))
    with http_files(tmp_path, password_needed=True) as server:
        with pytest.raises(EmbeddingReaderError):
            EmbeddingReader(f"{server.url}/0.npy")
        reader = EmbeddingReader(f"{server.url}/0.npy", storage_options={"headers": {"Authorization": "Bearer secret"}})
        assert "secret" not in repr(reader)
        assert_reads(reader, rows_of(3))


def test_chained_urls(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    for number in range(2):
        np.save(folder / f"{number}.npy", rows_of(3, seed=number))
    expected = np.concatenate([rows_of(3, seed=0), rows_of(3, seed=1)])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for number in range(2):
            archive.write(folder / f"{number}.npy", f"inside/{number}.npy")
    url = put_folder(bucket, folder)
    assert_reads(EmbeddingReader(f"zip://inside::{tmp_path}/all.zip"), expected)
    assert_reads(EmbeddingReader(f"zip://inside/*.npy::file://{tmp_path}/all.zip"), expected)
    cache = {"simplecache": {"cache_storage": str(tmp_path / "cache")}}
    assert_reads(EmbeddingReader(f"simplecache::{url}", storage_options=cache), expected)


def test_no_embeddings_found_says_what_was_searched_and_what_was_there(tmp_path: Path) -> None:
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", pa.table({"embedding": vectors_as(rows_of(1), "list")}))
    (tmp_path / "stats.json").write_text("{}")
    with pytest.raises(NoFilesError) as caught:
        EmbeddingReader(str(tmp_path), "npy")
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "npy" in message
    assert "3 .parquet" in message
    assert "1 .json" in message
    assert 'file_format="parquet"' in message


def test_opening_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        np.save(tmp_path / f"{number}.npy", rows_of(2))
    for show_progress in (False, True):
        # A pipe is no terminal: even when it is asked for, no bar ends up in a log file.
        EmbeddingReader(str(tmp_path), show_progress=show_progress)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
