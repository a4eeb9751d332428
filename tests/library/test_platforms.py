"""What other systems lack or refuse is done without; what is not installed is named.

The suite runs on Linux. What the library calls that Windows or macOS does not have is taken away here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dask_embedding_reader import EmbeddingReader, NoFilesError, verify_embeddings, write_embeddings
from dask_embedding_reader.storage import local as storage
from dask_embedding_reader.storage.store import ObjectInfo
from dask_embedding_reader.storage.urls import resolve
from tests.support.collections import assert_batches, assert_same_frame, assert_same_rows, write_collection


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what Python has on POSIX alone, and refuse what Windows refuses."""
    for name in ("preadv", "pread", "posix_fadvise", "O_CLOEXEC", "readlink"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(os, "readlink", no_link, raising=False)
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)


@pytest.mark.parametrize("fadvise", ["there", "refused", "missing"])
def test_the_disk_begins_to_write_before_a_file_is_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fadvise: str
) -> None:
    """Where the system can be told to; it may refuse, and macOS and Windows cannot."""
    asked: list[tuple[int, int]] = []

    def advise(descriptor: int, start: int, nbytes: int, advice: int) -> None:
        asked.append((start, start + nbytes))
        if fadvise == "refused":
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    if fadvise == "missing":
        monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(storage, "_FLUSH_NBYTES", 2**21)
    rows = np.ones((10_000, 128), np.float32)  # 5 MB
    write_embeddings(rows, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "00000000.npy"), rows)
    begun = [] if fadvise == "missing" else [(0, 2**21 + 128), (2**21 + 128, 2**22 + 128)]
    assert asked == begun  # each byte once: the header, and blocks of 1 MB


@pytest.mark.parametrize("is_long", [False, True])
def test_the_system_lets_go_of_what_would_not_fit_beside_all_else_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_long: bool
) -> None:
    """It does so where bytes are on the disk: those of a while ago when more are written, and the rest at the end."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, nbytes, advice: asked.append((start, start + nbytes)))
    monkeypatch.setattr(storage, "_FLUSH_NBYTES", 2**21)
    monkeypatch.setattr(storage, "_UNDER_WAY_NBYTES", 2**20)
    rows = np.ones((10_000, 128), np.float32)  # 5 MB
    if is_long:
        monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 19_500, "SC_PAGE_SIZE": 4096}.__getitem__)
        write_embeddings(rows, tmp_path)
    else:
        write_embeddings(iter([(rows, None)]), tmp_path)  # nobody knows how many follow
    assert asked == [(0, 2**21 + 128), (2**20 + 128, 2**22 + 128), (0, rows.nbytes + 128)]


def no_link(path: str) -> str:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)


@pytest.mark.parametrize("copied", [2**24, 7])
@pytest.mark.parametrize("name", ["npy", "npy-fortran", "parquet_npy", "parquet-list"])
def test_reads_and_writes_as_on_windows(
    windows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, copied: int
) -> None:
    monkeypatch.setattr(storage, "_COPY_NBYTES", copied)
    columns = [] if name.startswith("npy") else ["id", "caption"]
    collection = write_collection(tmp_path / "source", name, columns=columns)
    reader = collection.open()
    assert_same_rows(reader.to_dask_array().compute(), collection.rows)
    assert_same_rows(reader.to_dask_array()[5:29:3].compute(), collection.rows[5:29:3])
    assert_same_frame(reader.to_dask_dataframe().compute(), collection.frame())
    assert_batches(reader(6), collection, 6)
    write_embeddings(reader, tmp_path / "copy", "parquet" if columns else "npy")
    verify_embeddings(tmp_path / "copy")
    copy = EmbeddingReader(tmp_path / "copy", "parquet" if columns else "npy")
    assert_same_rows(copy.to_dask_array().compute(), collection.rows)


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_no_call_asks_for_more_than_macos_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: int) -> None:
    preadv = os.preadv

    def refusing(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if sum(len(buffer) for buffer in buffers) > most:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    monkeypatch.setattr(storage, "_CALL_NBYTES", most)
    collection = write_collection(tmp_path, "npy")
    assert_same_rows(collection.open().to_dask_array().compute(), collection.rows)
    assert_batches(collection.open()(6), collection, 6)


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [
        ([3, 3, 3, 3, 3], [[3, 3, 3, 1], [2, 3]]),
        ([1] * 9, [[1] * 4, [1] * 4, [1]]),
        ([12, 5], [[10], [2, 5]]),
        ([5, 5, 5], [[5, 5], [5]]),
        ([4, 0, 3, 3], [[4, 3, 3]]),
        ([10], [[10]]),
        ([11], [[10], [1]]),
    ],
)
def test_as_few_calls_fill_memory_as_their_limits_allow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sizes: list[int], calls: list[list[int]]
) -> None:
    asked: list[list[int]] = []
    preadv = os.preadv

    def noting(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        asked.append([len(buffer) for buffer in buffers])
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noting)
    monkeypatch.setattr(storage, "_CALL_NBYTES", 10)
    monkeypatch.setattr(storage, "IOV_MAX", 4)
    path, places = tmp_path / "0.bin", [bytearray(size) for size in sizes]
    path.write_bytes(bytes(range(100)))
    store, name = resolve(path)
    [answer] = store.read(name, [(7, [memoryview(place) for place in places])])
    assert isinstance(answer, ObjectInfo)
    assert b"".join(places) == bytes(range(7, 7 + sum(sizes)))
    assert asked == calls


def test_the_most_in_one_call_is_less_than_any_system_refuses() -> None:
    assert storage._CALL_NBYTES < 2**31 - 1


def test_paths_with_backslashes_are_told_apart_as_those_with_slashes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    np.save(folder / "sub\\._litter.npy", np.ones((2, 3), "float32"))
    assert EmbeddingReader(folder).count == 2  # where it is no separator
    monkeypatch.setattr(os, "sep", "\\")
    with pytest.raises(NoFilesError):
        EmbeddingReader(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What is not installed

WITHOUT = """
import importlib.util, sys

for name in {missing!r}:
    sys.modules[name] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {missing!r} else find_spec(name, *rest)

import dask_embedding_reader

for url in {urls!r}:
    try:
        dask_embedding_reader.EmbeddingReader(url)
    except dask_embedding_reader.errors.EmbeddingReaderError as error:
        print(error)
"""


def test_a_client_that_is_not_installed_is_named_with_the_extra_that_installs_it() -> None:
    extras = {
        "gs://bucket/x": "gcs",
        "simplecache::gcs://bucket/x": "gcs",
        "az://box/x": "azure",
        "abfs://box/x": "azure",
        "hdfs://127.0.0.1:1/x": "hdfs",
        "webhdfs://127.0.0.1:1/x": "hdfs",
        "https://127.0.0.1:1/x": "http",
        "hf://datasets/owner/name": "hf",
    }
    missing = ["huggingface_hub", "gcsfs", "adlfs", "hdfs_native", "requests", "aiohttp"]
    program = WITHOUT.format(missing=missing, urls=list(extras))
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=110)
    told = done.stdout.splitlines()
    assert len(told) == len(extras), done.stdout
    for message, (url, extra) in zip(told, extras.items(), strict=True):
        assert url in message
        assert message.endswith(f'pip install "dask-embedding-reader[{extra}]"'), message


def test_a_protocol_that_is_in_no_extra_is_told_with_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"(?i)install ocifs.*; check the URL"):
        EmbeddingReader("oci://bucket/x")
