"""Leaving a loop early stops the reading at once and leaves nothing behind: no thread, no open file, no lock."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import FileChangedError, ReadError
from tests.support.collections import (
    Collection,
    assert_batches,
    finishes,
    open_descriptors,
    wait_until,
    write_collection,
)
from tests.support.stores import Bucket, Request, emptied_bucket

#: Formats that read by ways of their own.
KINDS = ["npy", "npy-fortran", "parquet-list", "parquet_npy"]


@pytest.fixture(scope="module", params=KINDS)
def collection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Many more pieces than any window: 6 files of 50 rows."""
    root = tmp_path_factory.mktemp("abandon")
    return write_collection(root, request.param, file_rows=[50] * 6, columns=["id", "caption"], row_group_rows=10)


@pytest.fixture
def reader(collection: Collection) -> EmbeddingReader:
    """A fresh reader."""
    opened: EmbeddingReader = collection.open()
    return opened


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[Callable[[], None]]:
    """A check that no thread and no open file was added since the test began; made after every test here anyway."""
    gc.collect()
    threads, files = set(threading.enumerate()), open_descriptors()

    def new_files() -> list[str]:
        # Only data files: pytest and the interpreter open others when they like.
        return [
            path
            for fd, path in open_descriptors().items()
            if files.get(fd) != path and path.endswith((".npy", ".parquet"))
        ]

    def check() -> None:
        assert wait_until(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
        assert wait_until(lambda: not new_files()), new_files()

    yield check
    check()


def by_break(reader: EmbeddingReader) -> None:
    for _ in reader(7, max_piece_size=1, parallel_pieces=3):
        break


def by_exception(reader: EmbeddingReader) -> None:
    try:
        for _ in reader(7, max_piece_size=1, parallel_pieces=3):
            raise RuntimeError("in the body")
    except RuntimeError:
        pass


def by_del(reader: EmbeddingReader) -> None:
    batches = reader(7, max_piece_size=1, parallel_pieces=3)
    next(batches)
    next(batches)
    del batches


def by_garbage_collection(reader: EmbeddingReader) -> None:
    # A cycle: only the collector can free it, at a moment and in a thread of its own choosing.
    cycle: list[object] = []
    batches = reader(7, max_piece_size=1, parallel_pieces=3)
    next(batches)
    cycle.extend([batches, cycle])
    del batches, cycle
    gc.collect()


def by_never_starting(reader: EmbeddingReader) -> None:
    reader(7, max_piece_size=1, parallel_pieces=3)


def by_next_alone(reader: EmbeddingReader) -> None:
    next(reader(7))


WAYS: list[Callable[[EmbeddingReader], None]] = [
    by_break,
    by_exception,
    by_del,
    by_garbage_collection,
    by_never_starting,
    by_next_alone,
]


@pytest.mark.parametrize("leave", WAYS)
def test_leaving_early_returns_and_the_reader_still_works(
    collection: Collection, reader: EmbeddingReader, leave: Callable[[EmbeddingReader], None]
) -> None:
    finishes(lambda: leave(reader))
    assert_batches(reader(64), collection, 64)


def test_a_finished_loop_leaves_nothing_while_its_iterator_is_still_held(
    collection: Collection, reader: EmbeddingReader, nothing_left: Callable[[], None]
) -> None:
    batches = reader(64)
    assert_batches(batches, collection, 64)
    nothing_left()
    assert next(batches, None) is None


def test_leaving_one_of_two_iterators_does_not_disturb_the_other(
    collection: Collection, reader: EmbeddingReader
) -> None:
    stays = reader(20, max_piece_size=2)
    first = next(stays)
    by_break(reader)
    rest = list(stays)
    assert_batches(iter([first, *rest]), collection, 20)


def test_a_hundred_abandoned_iterators_show_no_growth(reader: EmbeddingReader) -> None:
    def cycle() -> None:
        for leave in (by_break, by_del):
            leave(reader)

    for _ in range(3):
        cycle()
    threads, files = threading.active_count(), len(open_descriptors())
    for _ in range(50):
        finishes(cycle)
    assert wait_until(lambda: threading.active_count() <= threads)
    assert wait_until(lambda: len(open_descriptors()) <= files)


def test_an_abandoned_iterator_and_its_reader_are_freed(collection: Collection) -> None:
    reader = collection.open()
    batches = reader(7, max_piece_size=1)
    embeddings, _ = next(batches)
    kept = [weakref.ref(reader), weakref.ref(embeddings)]
    del reader, batches, embeddings, _
    assert wait_until(lambda: all(ref() is None for ref in kept))


def fill(bucket: Bucket) -> list[str]:
    """Two objects of 1,000 rows of 8 bytes."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000, 2)}".ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8_000)
    return [bucket.put(f"emb/{k}.npy", content) for k in range(2)]


def test_reading_stops_when_the_loop_is_left(nothing_left: Callable[[], None]) -> None:
    with emptied_bucket() as bucket:
        reader = EmbeddingReader(fill(bucket))
        bucket.forget()
        for _ in reader(10, max_piece_size=1, parallel_pieces=2):
            break
        nothing_left()
        seen = bucket.nbytes
        assert 80 <= seen < 8_000, "the window, not the 16,000 bytes of the collection"
        gc.collect()
        assert bucket.nbytes == seen


def test_of_the_next_window_no_more_is_read_when_the_loop_is_left(nothing_left: Callable[[], None]) -> None:
    with emptied_bucket() as bucket:
        reader = EmbeddingReader(fill(bucket)).shuffle(1, buffer_rows=640)
        bucket.forget()
        window = reader.rows.window_rows
        asked, next_one, left = itertools.count(1), threading.Event(), threading.Event()

        def hold(request: Request) -> None:
            """Let the first window pass."""
            if next(asked) > window:
                next_one.set()
                left.wait(60)

        bucket.before_read = hold
        for _ in reader(10, max_piece_size=1, parallel_pieces=2):
            assert next_one.wait(60)
            break
        left.set()
        nothing_left()
        assert next(asked) - 1 <= window + 2, "what was under way"


def test_an_error_of_the_storage_propagates_and_leaves_no_thread() -> None:
    with emptied_bucket() as bucket:
        reader = EmbeddingReader(fill(bucket))

        def refuse(request: Request) -> None:
            if request.path.endswith("1.npy"):
                raise PermissionError(13, "no longer yours")

        bucket.before_read = refuse
        rows = 0

        def read() -> None:
            nonlocal rows
            for batch, _ in reader(100, max_piece_size=10):
                rows += len(batch)

        with pytest.raises(ReadError, match=r"(?s)1\.npy.*\d"):
            finishes(read)
        assert rows <= 1_000, "nothing of the file that could not be read"
        bucket.before_read = None
        assert sum(len(batch) for batch, _ in reader(100)) == 2_000, "works again when the storage does"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["deleted", "cut short", "replaced"])
def test_a_file_that_is_gone_or_changed_is_an_error_and_leaves_no_thread(kind: str, harm: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, kind, file_rows=[30, 30, 30], columns=["id"], row_group_rows=10)
    reader = collection.open()
    path = collection.files[1]
    if harm == "deleted":
        path.unlink()
    elif harm == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    else:
        # Same size, other content: only the time tells.
        shutil.copy(collection.files[0], path)
        os.utime(path, ns=(10**18, 10**18))
    expected = ReadError if harm == "deleted" else FileChangedError
    with pytest.raises(expected, match=path.name):
        finishes(lambda: list(reader(7, max_piece_size=3)))
    with pytest.raises(expected, match=path.name):
        # In this thread: the threads that Dask computes with are Dask's to keep.
        finishes(lambda: reader.to_dask_array().compute(scheduler="synchronous"))


def test_metadata_that_changed_is_an_error_too(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet_npy", file_rows=[30, 30], columns=["id"])
    reader = collection.open()
    path = tmp_path / "metadata" / "0001.parquet"
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(FileChangedError, match=r"0001\.parquet"):
        finishes(lambda: list(reader(7)))
    with pytest.raises(FileChangedError, match=r"0001\.parquet"):
        finishes(lambda: reader.to_dask_dataframe().compute(scheduler="synchronous"))


def test_an_iterator_that_failed_has_ended(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "npy", file_rows=[10, 10])
    reader = collection.open()
    collection.files[1].unlink()
    batches = reader(5)
    with pytest.raises(ReadError):
        finishes(lambda: [*batches])
    assert next(batches, None) is None


EXIT_PROGRAM = """
import sys
from dask_embedding_reader import EmbeddingReader
reader = EmbeddingReader(sys.argv[1])
batches = reader(2, max_piece_size=1, parallel_pieces=2)
print(len(next(batches)[0]))
{last}
"""


@pytest.mark.parametrize(
    ("last", "code"), [("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2)], ids=["exit", "ctrl-c"]
)
def test_a_program_can_end_with_a_half_used_iterator(last: str, code: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1_000, 2), dtype=np.float32))
    done = subprocess.run(
        [sys.executable, "-c", EXIT_PROGRAM.format(last=last), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "2\n"
    assert done.returncode in (code, 130 if code < 0 else code)
    if code >= 0:
        assert done.stderr == ""
