"""Much at once, for long, and while others change the files: right rows or an error, and memory that stays flat."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches
from dask_embedding_reader.errors import ReadError
from tests.support.collections import Collection, open_descriptors, wait_until, write_collection
from tests.support.servers import S3_KEY, S3Server, send
from tests.support.soak import Minute, make_collection, run

ROOT = Path(__file__).parents[2]
ROWS = np.arange(90 * 4, dtype=np.float32).reshape(90, 4)


# --------------------------------------------------------------------------------------------------------------------
# Many


def test_64_iterators_at_once_keep_to_the_sum_of_their_limits(tmp_path: Path) -> None:
    limit, batch_rows = 2**20, 1_024  # a batch is a quarter of it
    collection = write_collection(tmp_path, "npy", file_rows=[3_000] * 3, dimension=64)
    reader = collection.open()
    threads = set(threading.enumerate())
    tracemalloc.start()
    try:
        iterators = [reader(batch_rows, max_ram_usage_in_bytes=limit, show_progress=False) for _ in range(64)]
        for start in range(0, len(collection), batch_rows):
            batches = [next(iterator)[0] for iterator in iterators]
            for batch in batches:
                np.testing.assert_array_equal(batch, collection.rows[start : start + batch_rows])
            assert len(set(threading.enumerate()) - threads) <= 64 * max(2, os.cpu_count() or 1)
            del batch, batches
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 64 * limit / 4 < peak < 64 * limit * 1.1
    assert all(next(iterator, None) is None for iterator in iterators)
    assert wait_until(lambda: set(threading.enumerate()) <= threads)


READ = """
import sys, json, hashlib
from dask_embedding_reader import EmbeddingReader
reader = EmbeddingReader(sys.argv[1], storage_options=json.loads(sys.argv[2]))
digest = hashlib.sha256()
for rows, _ in reader(50, max_piece_size=20, show_progress=False):
    digest.update(rows)
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_8_processes_on_one_s3_server(s3: S3Server, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "npy", file_rows=[100] * 6)
    arguments = [s3.put_folder(collection.folder, "load"), json.dumps(s3.storage_options)]
    command = [sys.executable, "-c", READ, *arguments]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    answers = [program.communicate(timeout=100)[0] for program in programs]
    assert [program.returncode for program in programs] == [0] * 8
    assert len(set(answers)) == 1


@pytest.mark.parametrize("cycles", [100, pytest.param(1_000, marks=[pytest.mark.slow, pytest.mark.timeout(1_800)])])
def test_opened_iterated_and_abandoned_again_and_again(cycles: int, tmp_path: Path) -> None:
    collections = [
        write_collection(tmp_path / name, name, file_rows=[50] * 3, columns=["id", "caption"], row_group_rows=20)
        for name in ("npy", "parquet_npy", "parquet-list")
    ]

    def cycle(collection: Collection) -> None:
        reader = collection.open()
        next(reader(7, max_piece_size=3, show_progress=False))
        next(
            iter_batches(
                reader.to_dask_array(max_piece_size=9), reader.to_dask_dataframe(max_piece_size=9), batch_size=7
            )
        )

    def state() -> tuple[int, int]:
        gc.collect()
        assert wait_until(lambda: threading.active_count() <= threads)
        return psutil.Process().memory_info().rss, len(open_descriptors())

    threads = threading.active_count()
    for number in range(30):
        cycle(collections[number % 3])
    resident, files = state()
    for number in range(cycles):
        cycle(collections[number % 3])
    after, files_after = state()
    assert files_after <= files
    assert after < resident + 20_000_000


# --------------------------------------------------------------------------------------------------------------------
# Long


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_memory_and_speed_are_the_same_after_an_hour(tmp_path: Path) -> None:
    """SOAK_MINUTES says how long it takes, ten by default."""
    make_collection(tmp_path, 130_000)
    minutes: list[Minute] = list(run(str(tmp_path), int(os.environ.get("SOAK_MINUTES", "10"))))
    first, last = minutes[: len(minutes) // 2], minutes[len(minutes) // 2 :]
    assert max(m.resident for m in last) < max(m.resident for m in first) * 1.1
    assert max(m.threads for m in last) <= max(m.threads for m in first) + 2
    assert max(m.descriptors for m in last) <= max(m.descriptors for m in first) + 2
    assert min(m.wait for m in last) < 2 * min(m.wait for m in first)  # the quietest minutes: noise only slows


# --------------------------------------------------------------------------------------------------------------------
# Changed while they are read


class Place(NamedTuple):
    """Three files, of which the second one is changed."""

    url: str
    options: dict[str, Any] | None
    #: Puts content in its place, or removes it.
    put: Callable[[bytes | None], object]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    folder, path = tmp_path / "emb", tmp_path / "emb" / "1.npy"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", ROWS[number * 30 : number * 30 + 30])
    if request.param == "local":

        def put(content: bytes | None) -> None:
            if content is None:
                path.unlink()
                return
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").replace(path)

        yield Place(str(folder), None, put)
        return
    server: S3Server = request.getfixturevalue("s3")
    url = server.put_folder(folder, tmp_path.name)

    def put_object(content: bytes | None) -> None:
        if content is not None:
            server.put(f"{tmp_path.name}/1.npy", content)
            return
        address = f"{server.endpoint}/{server.bucket}/{tmp_path.name}/1.npy"
        send("DELETE", address, Authorization=f"AWS {S3_KEY}:unchecked")

    yield Place(url, server.storage_options, put_object)


def _other_rows(content: bytes) -> bytes:
    return content[:-480] + (ROWS[30:60] + 1000).tobytes()


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "replaced": _other_rows,
    "appended to": lambda content: content + bytes(16),
    "cut short": lambda content: content[:-100],
    "deleted": lambda content: None,
}
WAYS: dict[str, Callable[[EmbeddingReader], Iterator[Any]]] = {
    "batches": lambda reader: reader(7, max_piece_size=4, max_ram_usage_in_bytes=500, show_progress=False),
    "batches of an array": lambda reader: iter_batches(
        reader.to_dask_array(max_piece_size=4), batch_size=7, max_ram_usage_in_bytes=500
    ),
}


@pytest.mark.filterwarnings("ignore:.*max_ram_usage_in_bytes:UserWarning")
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("harm", list(HARMS))
def test_a_file_that_is_changed_while_it_is_read_is_never_mixed_with_what_it_was(
    place: Place, harm: str, way: str
) -> None:
    stream = io.BytesIO()
    np.save(stream, ROWS[30:60])
    original = stream.getvalue()
    failed = 0
    for taken in (0, 3, 6, 9):
        place.put(original)
        reader = EmbeddingReader(place.url, storage_options=place.options)
        batches = WAYS[way](reader)
        rows = [next(batches)[0].copy() for _ in range(taken)]
        place.put(HARMS[harm](original))
        complete = False
        with suppress(ReadError):
            rows += [batch.copy() for batch, _ in batches]
            complete = True
        found = np.concatenate([ROWS[:0], *rows])
        np.testing.assert_array_equal(found, ROWS[: len(found)])
        assert complete == (len(found) == len(ROWS))
        failed += not complete
    assert failed >= 2, "before and in the midst of the file"
