"""Two writers and one folder: one has it, the other is told so, and files of both never make one collection.

A writer is stopped before each single change that it makes. Another one takes it for dead, writes to the same folder
and finishes. Then the first one goes on.
"""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dask
import dask.array as da
import fsspec
import numpy as np
import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import DestinationError, EmbeddingReaderError, WriteError
from dask_embedding_reader.storage import fsspec as remote
from dask_embedding_reader.storage import local as local_disks
from dask_embedding_reader.storage import put as writing
from dask_embedding_reader.storage.put import list_files
from dask_embedding_reader.storage.urls import resolve
from dask_embedding_reader.write import claim, destination
from tests.support import servers
from tests.support.collections import wait_until

OLD, FIRST, SECOND = (np.full((rows, 3), value, np.float32) for rows, value in ((35, 0), (40, 1), (30, 2)))
PER_FILE = 5


@pytest.fixture(scope="module")
def s3() -> Iterator[servers.S3Server]:
    servers.require(servers.s3_available, "moto")
    with servers.s3() as server:
        yield server


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The arguments that name a folder."""
    if request.param == "local":
        return {"folder": str(tmp_path / "out")}
    if request.param == "memory":
        return {"folder": f"memory://{uuid.uuid4().hex}"}
    server = request.getfixturevalue("s3")
    return {"folder": f"{server.root}/{uuid.uuid4().hex}", "storage_options": server.storage_options}


def batches(rows: Any, before: Callable[[int], object] = lambda number: None) -> Iterator[tuple[Any, None]]:
    for number, start in enumerate(range(0, len(rows), PER_FILE)):
        before(number)
        yield rows[start : start + PER_FILE], None


def lazy(rows: Any, before: Callable[[int], object] = lambda number: None) -> da.Array:
    def block(chunk: Any, block_info: Any = None) -> Any:
        before(block_info[0]["chunk-location"][0])
        return chunk

    array: da.Array = da.from_array(rows, chunks=(PER_FILE, 3)).map_blocks(block, dtype=rows.dtype, meta=rows[:0])
    return array


def write(rows: Any, place: dict[str, Any], overwrite: bool = True, **options: Any) -> Any:
    return write_embeddings(rows, rows_per_file=PER_FILE, overwrite=overwrite, **place, **options)


def rows_in(place: dict[str, Any]) -> Any:
    options = place.get("storage_options")
    return EmbeddingReader(place["folder"], storage_options=options).to_dask_array().compute()


def names_in(place: dict[str, Any]) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(place["folder"], **place.get("storage_options", {}))
    filesystem.invalidate_cache()
    return sorted(name[len(path) + 1 :] for name in filesystem.find(path))


@contextmanager
def all_are_taken_for_dead() -> Iterator[None]:
    """Within the block, no other writer shows a sign of life."""
    with patch.object(claim._Sign, "is_alive", False):
        yield


def assert_of_one(place: dict[str, Any], rows: Any) -> None:
    np.testing.assert_array_equal(rows_in(place), rows)
    assert verify_embeddings(place["folder"], storage_options=place.get("storage_options")).empty


# --------------------------------------------------------------------------------------------------------------------
# Taken for dead


class Stopped:
    """Does something before a change of a number, in the middle of what makes the changes, and counts them."""

    def __init__(self, number: int, meanwhile: Callable[[], object]) -> None:
        self.number, self.meanwhile, self.seen, self.busy = number, meanwhile, 0, False

    def before(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self.busy and not remote._creating.locked():  # who holds it cannot be looked at from outside
                self.seen += 1
                if self.seen == self.number:
                    self.busy = True
                    self.meanwhile()
                    self.busy = False
            return change(*args, **kwargs)

        return wrapper


@contextmanager
def stopped_at(number: int, meanwhile: Callable[[], object], kind: str = "local") -> Iterator[Stopped]:
    stopped = Stopped(number, meanwhile)
    # One change after the other: a step has the same number each time.
    with pytest.MonkeyPatch.context() as patches, dask.config.set(scheduler="synchronous"):
        patches.setattr(writing, "_THREADS", 1)
        patches.setattr("dask_embedding_reader.write.threads.count_writers", lambda *_: 1)
        if kind == "local":
            for name in ("replace", "remove", "link", "mkdir", "rmdir", "fsync"):
                patches.setattr(os, name, stopped.before(getattr(os, name)))
        else:
            for name in ("_create", "_upload", "_rm_file"):
                patches.setattr(remote, name, stopped.before(getattr(remote, name)))
            patches.setattr(MemoryFileSystem, "cp_file", stopped.before(MemoryFileSystem.cp_file))
        yield stopped


EVERY = [("local", 7), ("memory", 2), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("local", "memory"))]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("source", [batches, lazy])
@pytest.mark.parametrize(("kind", "every"), EVERY)
def test_stopped_before_any_change_and_taken_for_dead(
    tmp_path: Path, kind: str, every: int, source: Callable[..., Any], existing: bool
) -> None:
    def attempt(number: int) -> tuple[int, dict[str, Any], bool]:
        place = {"folder": f"memory://{uuid.uuid4().hex}" if kind == "memory" else str(tmp_path / str(number))}
        if existing:
            write(OLD, place)

        def take_over() -> None:
            with all_are_taken_for_dead():
                write(SECOND, place)

        with stopped_at(number, take_over, kind) as stopped:
            try:
                write(source(FIRST), place)
            except EmbeddingReaderError:
                return stopped.seen, place, True
        return stopped.seen, place, False

    steps, whole, failed = attempt(0)
    assert steps > 20
    assert not failed
    assert_of_one(whole, FIRST)
    for number in range(1, steps + 1, every):
        seen, place, failed = attempt(number)
        assert seen >= number
        try:
            found = rows_in(place)
        except EmbeddingReaderError:
            # Of an object store one last request cannot be called back, such as that which marks a folder.
            assert kind == "memory", number
        else:
            # Who loses says so. Before it has begun it has lost nothing, and writes after the other one.
            assert len(np.unique(found)) == 1, number
            assert not failed or np.array_equal(found, SECOND), number
            assert kind == "memory" or verify_embeddings(place["folder"]).empty, number
        assert kind == "memory" or not [name for name in names_in(place) if name.startswith("_writing")], number
        write(SECOND, place)  # the folder is as good as before
        assert_of_one(place, SECOND)
        assert not [name for name in names_in(place) if name.startswith("_writing")], number
        assert kind == "memory" or not os.path.exists(f"{place['folder']}/_writing"), number


@pytest.mark.parametrize("removed", ["", "/_writing"], ids=["all", "notes"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_folder_that_is_removed_before_any_change_is_an_error_or_written(
    tmp_path: Path, removed: str, existing: bool, every: int
) -> None:
    def attempt(number: int) -> tuple[int, dict[str, Any], EmbeddingReaderError | None]:
        place = {"folder": str(tmp_path / str(number))}
        if existing:
            write(OLD, place)
        with stopped_at(number, lambda: shutil.rmtree(f"{place['folder']}{removed}", ignore_errors=True)) as stopped:
            try:
                write(batches(FIRST), place)
            except EmbeddingReaderError as error:
                return stopped.seen, place, error
        return stopped.seen, place, None

    steps, whole, _ = attempt(0)
    assert_of_one(whole, FIRST)
    for number in range(1, steps + 1, every):
        seen, place, error = attempt(number)
        assert seen >= number
        if error is not None:
            told = "somebody removed the claim|something removed the folder|has gone while it was needed|has gone, and"
            assert re.search(told, str(error)), number
        elif os.path.exists(f"{place['folder']}/.manifest.embeddings"):
            assert_of_one(place, FIRST)
        else:  # the last changes are made when all is written
            assert removed == "", number
            assert number > steps - 20, number
        write(FIRST, place)
        assert_of_one(place, FIRST)
        assert not os.path.exists(f"{place['folder']}/_writing"), number


@contextmanager
def full_from(number: int, *, for_good: bool, has_links: bool) -> Iterator[list[None]]:
    """A disk that has no room for a change of a number, or for any from then on; yields a list as long as these."""
    changes: list[None] = []

    def check() -> None:
        changes.append(None)
        if len(changes) == number or (for_good and 0 < number < len(changes)):
            raise OSError(errno.ENOSPC, "no room")

    def needs_room(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **options: Any) -> Any:
            check()
            return change(*given, **options)

        return wrapper

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            try:
                check()
            except OSError:
                super().write(memoryview(data)[:5])
                raise
            return super().write(data) or 0

    def no_links(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no links")

    with stopped_at(0, lambda: None), pytest.MonkeyPatch.context() as patches:
        patches.setattr(
            local_disks, "open", lambda path, mode, **_: (File if "x" in mode else open)(path, mode), raising=False
        )
        for name in ("replace", "mkdir", "fsync", "link"):
            patches.setattr(os, name, needs_room(getattr(os, name)))
        if not has_links:
            patches.setattr(os, "link", no_links)
        yield changes


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("has_links", [False, True])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_keeps_no_claim_and_no_half_a_file(
    tmp_path: Path, existing: bool, has_links: bool, for_good: bool, every: int
) -> None:
    def attempt(number: int) -> tuple[int, dict[str, Any]]:
        place = {"folder": str(tmp_path / str(number))}
        if existing:
            write(OLD, place)
        with full_from(number, for_good=for_good, has_links=has_links) as changes:
            try:
                write(batches(FIRST), place)
            except WriteError as error:
                assert re.search(r"no room; make room, or name a folder", str(error)), number  # noqa: PT017
        return len(changes), place

    steps, whole = attempt(0)
    assert steps > 60
    assert_of_one(whole, FIRST)
    for number in range(1, steps + 1, every):
        _, place = attempt(number)
        left = [path for path in Path(place["folder"]).rglob("*") if re.search("writer-|scratch-|tmp", path.name)]
        assert left == [], number
        write(batches(FIRST), place)
        assert_of_one(place, FIRST)


def test_a_folder_that_goes_while_a_writer_starts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(store: Any, folder: str, prefix: str) -> list[str]:
        shutil.rmtree(tmp_path / "out")
        return writing.find_folders(store, folder, prefix)

    with monkeypatch.context() as patches:
        patches.setattr(claim, "find_folders", find)
        told = r"out: another writer took this one for dead, since its claim was not renewed for 5 minutes, and took "
        with pytest.raises(
            DestinationError, match=told + r"over; or else somebody removed the claim, .*/out/_writing/"
        ):
            write_embeddings(FIRST, tmp_path / "out")
    write_embeddings(FIRST, tmp_path / "out")
    assert_of_one({"folder": tmp_path / "out"}, FIRST)


@pytest.mark.parametrize("second", [batches, lazy])
@pytest.mark.parametrize("first", [batches, lazy])
def test_taken_for_dead_on_every_storage(
    place: dict[str, Any], first: Callable[..., Any], second: Callable[..., Any]
) -> None:
    def meanwhile(number: int) -> None:
        if number == 5:
            with all_are_taken_for_dead():
                write(second(SECOND), place)

    with dask.config.set(scheduler="synchronous"), pytest.raises(DestinationError, match="took this one for dead"):
        write(first(FIRST, meanwhile), place)
    assert_of_one(place, SECOND)
    assert [name for name in names_in(place) if name.startswith("0")] == [f"{n:08d}.npy" for n in range(6)]


STOPS = """
import json, os, signal, socket, sys, time
import numpy as np
hostname = socket.gethostname
socket.gethostname = lambda: "another"
from dask_embedding_reader import DestinationError, write_embeddings
def batches():
    for number in range(8):
        if number == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield np.ones((5, 3), np.float32), None
try:
    write_embeddings(batches(), rows_per_file=5, **json.loads(sys.argv[1]))
except DestinationError as error:
    print("refused", error)
"""


@pytest.mark.skipif(not hasattr(os, "WUNTRACED"), reason="stopping a process takes signals")
def test_a_process_that_is_stopped_and_goes_on_later(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if place["folder"].startswith("memory"):
        pytest.skip("memory is that of one process")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", STOPS, json.dumps(place)], stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
            with pytest.raises(DestinationError, match="on another is writing to this folder"):
                write(SECOND, place)
            now = time.time() + claim._SILENCE_SECONDS + 1
            with monkeypatch.context() as patches:
                patches.setattr(time, "time", lambda: now)
                write(SECOND, place)
            os.kill(first.pid, signal.SIGCONT)
            assert "refused" in first.communicate(timeout=100)[0]
        finally:
            first.kill()
    assert_of_one(place, SECOND)


@pytest.mark.parametrize("url", ["{tmp_path}", "memory://{name}"])
@pytest.mark.parametrize("how", ["the claim is gone", "the claim is of another", "its folder is gone"])
def test_what_only_the_holder_of_a_claim_may_do(tmp_path: Path, url: str, how: str) -> None:
    store, folder = resolve(url.format(tmp_path=tmp_path, name=uuid.uuid4().hex))
    done: list[str] = []

    def lose(held: claim.Claim) -> None:
        if how == "the claim is gone":
            store.remove(held.path)
        elif how == "the claim is of another":
            store.put(held.path, lambda write: write(claim._content("f" * 32)))
        elif store.is_local:
            store.remove_folder(held.scratch)
        else:
            pytest.skip("there are no folders")

    def work(held: claim.Claim, *, loses: bool, fails: bool) -> str:
        done.append("work")
        if loses:
            lose(held)
        if fails:
            raise WriteError("no room")
        return "result"

    with claim.claimed(store, folder) as held:
        assert held.keep(partial(work, held, loses=False, fails=False)) == "result"
        with pytest.raises(WriteError, match="no room"):
            held.keep(partial(work, held, loses=False, fails=True))
        assert held.is_held()
    for fails in (False, True):
        with claim.claimed(store, folder) as held, pytest.raises(DestinationError, match="took over"):
            held.keep(partial(work, held, loses=True, fails=fails))
        assert not held.is_held()
    assert len(done) == 4
    with claim.claimed(store, folder) as held:
        lose(held)
        with pytest.raises(DestinationError, match="took over"):
            held.keep(partial(work, held, loses=False, fails=False))
    assert len(done) == 4, "it is not even begun"
    for path in list_files(store, folder):
        store.remove(f"{folder}/{path}")


def test_a_process_that_shares_a_claim_says_so_at_once(tmp_path: Path) -> None:
    store, folder = resolve(tmp_path / "_writing")
    lease = claim.take(store, folder, claim.new_job(), is_shared=True)
    try:
        assert wait_until(lambda: any(name.startswith("alive-") for name in list_files(store, folder)), 20)
    finally:
        lease.give_back()
    assert list_files(store, folder) == {}


def test_who_cannot_begin_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise WriteError("no room")

    with monkeypatch.context() as patches:
        patches.setattr(claim, "make_folder", fail)
        with pytest.raises(WriteError, match="no room"):
            write_embeddings(FIRST, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    write_embeddings(FIRST, tmp_path)


def test_who_is_kept_off_by_one_that_ends_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = resolve(tmp_path / "_writing")
    dead = {**json.loads(claim._content()), "machine": "other", "alive_at": 0.0}
    writing.put_file(store, f"{folder}/writer-00000001.json", json.dumps(dead).encode())
    first = claim.take(store, folder, claim.new_job(), is_shared=False)  # the second one, and the first is free again

    def end_before(*given: Any) -> None:
        monkeypatch.undo()
        first.give_back()  # it finds another one's claim in the folder, and leaves it
        writing.remove_files(*given)

    monkeypatch.setattr(claim, "remove_files", end_before)
    with pytest.raises(DestinationError, match="is writing to this folder"):
        claim.take(store, folder, claim.new_job(), is_shared=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_of_another", [False, True])
def test_a_file_that_comes_late_is_removed_and_that_of_another_writer_is_not(
    monkeypatch: pytest.MonkeyPatch, is_of_another: bool
) -> None:
    """On an object store, where nothing keeps it off."""
    memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    stream = writing.stream_file

    def come_late(store: Any, path: str, *given: Any, **options: Any) -> Any:
        facts = stream(store, path, *given, **options)
        if is_of_another:
            memory.pipe_file(path, b"of another writer")
        for name in memory.glob(f"{root}/_writing/writer-*"):
            memory.rm_file(name)
        return facts

    monkeypatch.setattr(destination, "stream_file", come_late)
    with pytest.raises(DestinationError, match="took over"):
        write_embeddings(FIRST, f"memory:/{root}")
    left = [memory.cat_file(name) for name in memory.glob(f"{root}/*.npy")]
    assert left == ([b"of another writer"] if is_of_another else [])
    memory.rm(root, recursive=True)


@pytest.mark.parametrize("others", [1, 2])
def test_a_shared_claim_ends_with_the_last_process_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    monkeypatch.setattr(claim, "_HANDOVER_SECONDS", 0)
    store, folder = resolve(tmp_path / "_writing")
    held = claim.Claim(store, folder, claim.new_job(), 1)
    maker = psutil.Process(os.getppid())  # it lives, but holds the claim no more
    own = {**json.loads(claim._content(held.job)), "pid": maker.pid, "process_started": maker.create_time()}
    writing.make_folder(store, held.scratch)
    writing.put_file(store, held.path, json.dumps(own).encode())
    living = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(others)]
    try:
        for number, process in enumerate(living):
            sign = {**own, "pid": process.pid, "process_started": psutil.Process(process.pid).create_time()}
            path = f"{folder}/alive-{held.job}-{number}.json"
            writing.put_file(store, path, json.dumps(sign).encode(), held.scratch)
        while living:
            claim._end(held, [], is_done=False, is_shared=True)
            assert held.is_held()
            living[-1].kill()
            living.pop().wait()
    finally:
        for process in living:
            process.kill()
            process.wait()
    claim._end(held, [], is_done=False, is_shared=True)
    assert not held.is_held()
    claim._end(held, [], is_done=True, is_shared=True)  # nothing is amiss if another one has done it


def test_two_beats_may_fail_before_a_writer_counts_as_dead(tmp_path: Path) -> None:
    own = json.loads(claim._content())
    silent = {**own, "machine": "other", "alive_at": own["alive_at"] - 3 * claim._BEAT_SECONDS}
    (tmp_path / "_writing").mkdir()
    (tmp_path / "_writing" / "writer-00000001.json").write_text(json.dumps(silent))
    with pytest.raises(DestinationError, match="is writing to this folder"):
        write_embeddings(FIRST, tmp_path)


@pytest.mark.parametrize("late", ["commit.json", "done/00000002.json", "job.json"])
def test_what_a_writer_notes_late_does_not_count(tmp_path: Path, late: str) -> None:
    """Object stores alone cannot prevent it."""
    noted: dict[str, bytes] = {}

    def keep(*_: Any) -> bool:
        noted[late] = (first / "_writing" / late).read_bytes()
        return True

    first, out = tmp_path / "first", tmp_path / "out"
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("dask_embedding_reader.write.destination.complete", keep)
        write_embeddings(batches(FIRST), first, rows_per_file=PER_FILE)

    def put_late(number: int) -> None:
        if number == 4:
            (out / "_writing" / late).parent.mkdir(exist_ok=True)
            (out / "_writing" / late).write_bytes(noted[late])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(batches(SECOND, put_late), out, rows_per_file=PER_FILE)
    write_embeddings(batches(SECOND), out, rows_per_file=PER_FILE)
    assert_of_one({"folder": out}, SECOND)


# --------------------------------------------------------------------------------------------------------------------
# Lazy objects


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize("second", ["eager", "lazy", "lazy before"])
def test_a_lazy_object_that_is_computed_has_the_folder(place: dict[str, Any], scheduler: str, second: str) -> None:
    refused: list[BaseException] = []
    before = write(lazy(SECOND), place, compute=False)
    seconds = {
        "eager": lambda: write(SECOND, place),
        "lazy": lambda: write(lazy(SECOND), place, compute=False),
        "lazy before": lambda: before.compute(scheduler="synchronous"),
    }

    def meet(number: int) -> None:
        if number == 4:
            with pytest.raises(DestinationError, match=rf"process {os.getpid()} on .* is writing") as caught:
                seconds[second]()
            refused.append(caught.value)

    # With more workers, chunks may be computed before the claim is made.
    write(lazy(FIRST, meet), place, compute=False).compute(scheduler=scheduler, num_workers=1)
    assert len(refused) == 1
    assert_of_one(place, FIRST)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_lazy_objects_the_second_finds_what_the_first_wrote(place: dict[str, Any], overwrite: bool) -> None:
    first, second = (write(lazy(rows), place, overwrite, compute=False) for rows in (FIRST, SECOND))
    first.compute()
    if overwrite:
        second.compute()
    else:
        with pytest.raises(DestinationError, match="files of other data already"):
            second.compute()
    assert_of_one(place, SECOND if overwrite else FIRST)
    first.compute()
    assert_of_one(place, FIRST)


def test_a_lazy_object_that_is_never_computed_keeps_nobody_off(place: dict[str, Any]) -> None:
    later = write(lazy(FIRST), place, compute=False)
    assert names_in(place) == []
    write(SECOND, place)
    assert_of_one(place, SECOND)
    del later


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_lazy_object_that_failed_keeps_nobody_off(
    place: dict[str, Any], scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_HANDOVER_SECONDS", 0.1)

    def fail(number: int) -> None:
        if number == 6:
            raise ZeroDivisionError

    def compute() -> None:
        try:
            write(lazy(FIRST, fail), place, compute=False).compute(scheduler=scheduler, num_workers=1)
        except ZeroDivisionError:
            return
        raise AssertionError

    compute()
    gc.collect()  # the traceback, which has what Dask knew
    write(FIRST, place)
    assert_of_one(place, FIRST)
    # Else it would go on beside other tests, and warn when its server is no more.
    assert wait_until(lambda: not any(thread.name == "embedding-writer-claim" for thread in threading.enumerate()), 20)


def test_what_was_there_when_a_lazy_object_was_made_may_have_gone(tmp_path: Path) -> None:
    write_embeddings(lazy(FIRST), tmp_path, rows_per_file=PER_FILE)
    array = lazy(FIRST)
    write_embeddings(array, tmp_path, rows_per_file=PER_FILE, overwrite=True)
    (tmp_path / "00000003.npy").unlink()
    later = write_embeddings(array, tmp_path, rows_per_file=PER_FILE, compute=False)
    assert later is not None
    (tmp_path / "00000005.npy").unlink()
    with pytest.raises(DestinationError, match=r"1 files that were complete .* make it again"):
        later.compute()
    write_embeddings(array, tmp_path, rows_per_file=PER_FILE)
    assert_of_one({"folder": tmp_path}, FIRST)


def test_several_processes_share_the_claim_of_a_lazy_object(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def later() -> Any:
        first = da.from_array(FIRST, chunks=(PER_FILE, 3))
        return write_embeddings(first, folder, rows_per_file=PER_FILE, compute=False)

    later().compute(scheduler="processes", num_workers=2)
    assert_of_one({"folder": folder}, FIRST)
    assert not (folder / "_writing").exists()
